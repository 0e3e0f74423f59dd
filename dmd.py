"""Stage `distill`: distribution matching on the student's own samples (METHOD section 6, "DMD").

The student's sample z_0 is noised to a level tau, where two flow-matching networks say what a clean clip would be: the
teacher (real score, guided) and a network that follows the student's samples (fake score). Their difference is the
gradient of the reverse KL divergence. Pure functions; `real` and `fake` are callables u(z, t, r), called with r = t.
Latents (B, F, C, H, W), times (B,) float32 in [0, 1].
"""
import torch

from flowmap import expand, flow_matching_error, interpolate


@torch.no_grad()
def dmd_gradient(z_0: torch.Tensor, n: torch.Tensor, tau: torch.Tensor, real, fake) -> torch.Tensor:
    """grad = (x_fake - x_real) / mean |z_0 - x_real| per sample, where x = z_tau - tau u(z_tau, tau, tau).

    In fp32, and as tau (u_real - u_fake): the common z_tau cancels before it can round the small difference away.
    """
    z_tau = interpolate(z_0, n, tau)
    u_real, u_fake = real(z_tau, tau, tau), fake(z_tau, tau, tau)
    x_real = z_tau - expand(tau, z_0) * u_real
    normaliser = (z_0 - x_real).abs().flatten(1).mean(1).clamp(min=1e-6)              # (B,)
    return expand(tau, z_0) * (u_real - u_fake) / expand(normaliser, z_0)


def dmd_loss(z_0: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """mse(z_0, stopgrad(z_0 - grad)) per sample (B,): its derivative is 2 grad / (numel of a sample), its value the
    mean square of the gradient."""
    return (z_0 - (z_0 - gradient).detach()).square().flatten(1).mean(1)


def fake_score_error(fake, z_0: torch.Tensor, n: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """Flow matching (B,) of the fake score on the student's samples, which get no gradient."""
    return flow_matching_error(fake, z_0.detach(), n, tau)
