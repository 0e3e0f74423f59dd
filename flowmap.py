"""Time and transitions: the path, the flow map, its samplers, and how training times are drawn (METHOD sections 2, 5).

    z_t = (1 - t) x + t n          the linear path from data x (t = 0) to noise n (t = 1)
    v   = n - x                    its velocity
    z_r = z_t - (t - r) u(z_t, t, r)          the flow map; u is the average velocity over [r, t]

Everywhere `u` is a callable u(z, t, r) -> velocity of z's shape. z is (B, ...), typically (B, F, C, H, W); times are
float32 in [0, 1], of shape (B,) or (B, F). The prompt is bound beforehand (`conditioned`), so this file and the
losses work for any network and for closed forms alike.
"""
from functools import lru_cache

import torch


def conditioned(network, context):
    """The callable u(z, t, r) of a network u(z, t, r, context) for one batch of prompts."""
    return lambda z, t, r: network(z, t, r, context)


def guided(u_c, u_0, scale: float):
    """Classifier-free guidance as a callable u(z, t, r): u_0 + scale (u_c - u_0), where scale 1 is no guidance.

    u_c, u_0: callables with the prompt and with the empty one. The paper's "cond + 3 (cond - uncond)" is scale 4 here.
    """
    if scale == 1:
        return u_c

    def u(z, t, r):
        empty = u_0(z, t, r)
        return empty + scale * (u_c(z, t, r) - empty)
    return u


def expand(t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Times (B,) or (B, F) with the trailing axes that broadcast them over z (B, F, ...)."""
    return t.view(*t.shape, *[1] * (z.ndim - t.ndim))


def interpolate(x: torch.Tensor, n: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """z_t = (1 - t) x + t n."""
    t = expand(t, x)
    return (1 - t) * x + t * n


def flow_map(u, z: torch.Tensor, t: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Jump from level t to level r <= t: z_r = z_t - (t - r) u(z_t, t, r)."""
    return z - expand(t - r, z) * u(z, t, r)


def flow_matching_error(u, x: torch.Tensor, n: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Mean squared error (B,) of u(z_t, t, t) against v = n - x: the loss of stage `pretrain` and of the fake score."""
    return (u(interpolate(x, n, t), t, t) - (n - x)).square().flatten(1).mean(1)


def shift_time(t, shift: float):
    """sigma(t) = s t / (1 + (s - 1) t): moves times towards noise for s > 1; 0 and 1 stay. Wan uses s = 5."""
    return shift * t / (1 + (shift - 1) * t)


def time_grid(steps: int, shift: float) -> list[float]:
    """The sampling grid 1 = t_0 > ... > t_steps = 0: sigma(linspace(1, 0, steps + 1))."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    return [1.0, *(shift_time(1 - i / steps, shift) for i in range(1, steps)), 0.0]


def check_grid(grid) -> None:
    """Raises ValueError unless grid is a decreasing list of times from 1 to 0."""
    if len(grid) < 2 or grid[0] != 1 or grid[-1] != 0 or any(t <= r for t, r in zip(grid, grid[1:])):
        raise ValueError(f"a time grid must fall strictly from 1 to 0, not {list(grid)}")


def euler_sample(u, z: torch.Tensor, grid) -> torch.Tensor:
    """Follow the flow map over any decreasing grid, one call of u a step: noise z (B, ...) -> z_0.

    With r = t models (a teacher) each step still passes the next level as r; a network without a second time ignores
    it, and the step is the ordinary Euler step.
    """
    check_grid(grid)
    for t, r in zip(grid, grid[1:]):
        t, r = (torch.full((len(z),), time, device=z.device) for time in (t, r))
        z = flow_map(u, z, t, r)
    return z


def first_frames_given(u, given: torch.Tensor):
    """The callable u(z, t, r) of clips whose first frames are given, clean latents (B, G, ...): image-to-video by a network
    of whole clips. Those frames are at t = 0. Their r stays that of the others, which is how published AnyFlow weights are
    sampled; nothing is trained so here, and a network without a second time does not see it. Their velocity is 0, whatever
    the network says, and what z holds in their place is not looked at.
    """
    G = given.shape[1]

    def u_of_the_rest(z, t, r):
        level = (torch.arange(z.shape[1], device=z.device) >= G).float()                     # (F,): 0 where given
        t, r = t.view(len(z), -1) * level, r.view(len(z), -1).expand(-1, len(level))         # (B, F)
        v = u(torch.cat([given, z[:, G:]], 1), t, r)
        return torch.cat([torch.zeros_like(v[:, :G]), v[:, G:]], 1)
    return u_of_the_rest


def consistency_sample(u, z: torch.Tensor, grid, renoise) -> torch.Tensor:
    """The consistency sampler, for contrast: jump to z_0 (r = 0), add fresh noise up to the next level, repeat.

    renoise(shape of a sample) draws noise for the batch. Each re-noising forgets detail, so more steps may look worse.
    """
    check_grid(grid)
    for t, r in zip(grid, grid[1:]):
        t = torch.full((len(z),), t, device=z.device)
        z = flow_map(u, z, t, torch.zeros_like(t))
        if r > 0:
            z = interpolate(z, renoise(z.shape[1:]).to(z), torch.full_like(t, r))
    return z


SAMPLERS = {                                 # all called with (u, z, grid, renoise)
    "euler": lambda u, z, grid, renoise: euler_sample(u, z, grid),
    "consistency": consistency_sample,
}


def logit_normal_time(generator: torch.Generator, count: int, shift: float) -> torch.Tensor:
    """Times (count,) = sigma(sigmoid(N(0, 1))), for `pretrain` and the fake score (METHOD sections 4, 6)."""
    return shift_time(torch.randn(count, generator=generator).sigmoid(), shift)


def flow_map_times(generator: torch.Generator, count: int, shift: float, flow: float = 0.5, consistency: float = 0.25):
    """Times t >= r, each (count,), of one GLOBAL batch for stage `flowmap` (METHOD section 5).

    t is the larger of two uniform draws and r the smaller, both shifted; then a fraction `flow` of the batch gets
    r = t (flow matching), a fraction `consistency` r = 0, the rest stays free. Roles are stratified over the batch: with
    one random offset o, sample i has position (i + o) / count on [0, 1), which gives every role its exact expected
    share at any count from 1 up, and an r = t sample in every batch of 2 or more. The r = t samples come first.
    """
    pair = torch.rand(2, count, generator=generator)
    t, r = shift_time(pair.amax(0), shift), shift_time(pair.amin(0), shift)
    position = (torch.arange(count) + torch.rand(1, generator=generator)) / count
    r = torch.where(position < flow, t, torch.where(position < flow + consistency, torch.zeros_like(r), r))
    return t, r


TIME_WEIGHTS = {                             # densities over the shifted time, up to a factor (METHOD section 5)
    "beta": lambda t: t * (1 - t) ** 0.5,    # Beta(2, 1.5)
    "uniform": torch.ones_like,
    "normal": lambda t: torch.exp(-((t - 0.5) ** 2) / (2 * 0.25**2)),
}


@lru_cache
def mean_time_weight(name: str, shift: float) -> float:
    """Mean of a time weight under the training times of `flow_map_times`: the integral of w(sigma(a)) 2 a over [0, 1].

    2 a is the density of the larger of two uniform draws. Gauss-Legendre in a = 1 - y^2 takes the root at t = 1 out of
    the Beta density, so that 64 nodes are exact to rounding.
    """
    import numpy as np
    nodes, weights = np.polynomial.legendre.leggauss(64)
    y, weights = torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)
    a = 1 - y**2
    return float((TIME_WEIGHTS[name](shift_time(a, shift)) * 2 * a * 2 * y * weights).sum())


def time_weight(t: torch.Tensor, name: str, shift: float) -> torch.Tensor:
    """w(t) (B,) with mean 1 under the training distribution: normalised over it, never inside a batch (where the
    weight would vanish at batch 1). Raises ValueError for an unknown name."""
    if name not in TIME_WEIGHTS:
        raise ValueError(f"time weight {name!r}: choose one of {', '.join(TIME_WEIGHTS)}")
    return TIME_WEIGHTS[name](t) / mean_time_weight(name, shift)
