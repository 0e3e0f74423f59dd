"""Stage `flowmap`: the loss that turns a flow-matching network into a flow map (docs/method.md, 4).

    F      = (u_c - (1 - w) u_0) / w         guidance fusion: u_c becomes the guided velocity itself
    dF/dt  ~ [u(z_t + a v, t + a, r) - u(z_t - b v, t - b, r)] / ((a + b) w)
    target = v - (t - r) dF/dt               the MeanFlow identity
    err    = mean (F - target)^2             per sample; at r = t this is flow matching

Pure functions of tensors. `network` is any callable u(z, t, r, context) that returns fp32; context,
indexable by sample, is the prompt and what else it knows (features (B, T, text_dim), or a Context).
Latents are (B, F, C, H, W) in fp32, times (B,) float32 in [0, 1] with t >= r.
"""
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowmap import conditioned, expand, interpolate


@torch.no_grad()
def finite_difference(u, z_t, t, r, v, epsilon: float):
    """d/dt of u(z_t, t, r) along the path (dz/dt = v), over [t - b, t + a], all in fp32.

    a and b are epsilon, cut where the interval would leave [r, 1], no longer central there. The
    quotient divides by the gap that the fp32 times really have, not by the intended one.
    """
    above, below = (t + epsilon).clamp(max=1), torch.maximum(t - epsilon, r)
    u_above = u(z_t + expand(above - t, z_t) * v, above, r)
    u_below = u(z_t - expand(t - below, z_t) * v, below, r)
    return (u_above - u_below) / expand(above - below, z_t)


@torch.no_grad()
def exact_derivative(u, z_t, t, r, v, epsilon=None):
    """The same by forward-mode differentiation, to check `finite_difference` on small networks. It
    needs the plain attention kernel, does not work under FSDP, and has no use for epsilon."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda z, t: u(z, t, r), (z_t, t), (v, torch.ones_like(t)))[1]


DERIVATIVES = {"finite-difference": finite_difference, "jvp": exact_derivative}


@dataclass(frozen=True)
class Settings:
    """Settings of the forward loss."""
    guidance: float = 3.0        # w; 1 is none, which also saves the u_0 pass
    epsilon: float = 0.005       # half width of the finite difference
    derivative: str = "finite-difference"


def meanflow_error(network, x, n, t, r, context, null_context, dropped,
                   settings: Settings, flow_rows: int = 0, guided_rows=slice(None), v=None,
                   tangent_scale: float = 1.0):
    """err (B,) of the forward loss, with gradient through u_c only.

    context, null_context: with the prompt, and with the empty one for guided_rows alone (None: no
    row). guided_rows: indices of the rows for which u_0 is computed, at least all not dropped.
    dropped (B,) bool: rows whose prompt already is the empty one. There u_c = u_0, so w = 1, and
    the target is the plain velocity.
    flow_rows: how many leading rows, all with r = t, need no derivative: its factor is 0. A Python
    int, as reading it from t and r would make the host wait for the GPU.
    v: velocity at z_t in place of the data's n - x, such as a teacher's.
    tangent_scale: factor of dF/dt in the target, below 1 while it warms up.
    """
    z_t = interpolate(x, n, t)
    v = n - x if v is None else v
    w = torch.where(dropped, 1.0, settings.guidance).to(t)                  # (B,)
    F = network(z_t, t, r, context)
    if settings.guidance != 1 and null_context is not None:
        rows = guided_rows
        u_0 = torch.zeros_like(v)                     # other rows keep 0: there w = 1
        with torch.no_grad():
            u_0[rows] = network(z_t[rows], t[rows], r[rows], null_context)
        F = (F - expand(1 - w, F) * u_0) / expand(w, F)

    target = v
    if flow_rows < len(t):
        rest = slice(flow_rows, None)
        u = conditioned(network, context[rest])
        # Where r = t the factor is 0, and any lower end below t will do; r itself would give 0 / 0
        # at t = 1.
        lower = torch.where(r < t, r, 0.0)
        derivative = DERIVATIVES[settings.derivative]
        du_dt = derivative(u, z_t[rest], t[rest], lower[rest], v[rest], settings.epsilon)
        factor = tangent_scale * (t - r)[rest] / w[rest]                     # dF/dt ~ du_dt / w
        target = torch.cat([v[:flow_rows], v[rest] - expand(factor, du_dt) * du_dt])
    return (F - target).square().flatten(1).mean(1)


def balanced_loss(err, t, r, mu, fixed: float = 0.0):
    """Adaptive balance (B,): where r < t an error is scaled by mu / (err + 1e-5), so that the
    regression at r = t sets the scale and a large gap cannot blow up.

    err (B,). mu: mean error of the r = t rows of the GLOBAL batch, a float or a tensor without
    gradient.
    fixed: a constant b in place of both, b / (err + b), for losses whose r = t errors vanish;
    errors well below b are then a plain square. 0: use mu.
    """
    if fixed:
        scale = fixed * (err.detach() + fixed).reciprocal()
    else:
        scale = mu * (err.detach() + 1e-5).reciprocal()
    return torch.where(r < t, scale, 1.0) * err
