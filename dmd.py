"""Stage `distill`: distribution matching on the student's own samples (docs/method.md, 6).

    z_tau = (1 - tau) z_0 + tau n                        the student's sample, noised
    x     = z_tau - tau u(z_tau, tau, tau)               cleaned, by teacher or fake score
    grad  = (x_fake - x_real) / mean |z_0 - x_real|
    loss  = mean (z_0 - stopgrad(z_0 - grad))^2

The teacher (real score) is guided, the fake score is a flow-matching network that follows the
student's samples, and grad points along that of the reverse KL divergence. Pure functions; `real`
and `fake` are callables u(z, t, r), called with r = t. Latents (B, F, C, H, W), times (B,) in
[0, 1].
"""
import torch

from flowmap import expand, flow_matching_error, interpolate


@torch.no_grad()
def dmd_gradient(z_0: torch.Tensor, n: torch.Tensor, tau: torch.Tensor, real, fake) -> torch.Tensor:
    """grad, in fp32, each sample with its own normaliser.

    x_fake - x_real is computed as tau (u_real - u_fake): subtracting the two would lose digits, as
    both contain z_tau.
    """
    z_tau = interpolate(z_0, n, tau)
    u_real, u_fake = real(z_tau, tau, tau), fake(z_tau, tau, tau)
    x_real = z_tau - expand(tau, z_0) * u_real
    normaliser = (z_0 - x_real).abs().flatten(1).mean(1).clamp(min=1e-6)    # (B,); 0 at tau = 0
    return expand(tau, z_0) * (u_real - u_fake) / expand(normaliser, z_0)


def dmd_loss(z_0: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The loss (B,): its derivative is 2 grad / (numel of a sample), its value mean grad^2."""
    return (z_0 - (z_0 - gradient).detach()).square().flatten(1).mean(1)


def fake_score_error(fake, z_0: torch.Tensor, n: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """Flow matching (B,) of the fake score on the student's samples, which get no gradient."""
    return flow_matching_error(fake, z_0.detach(), n, tau)
