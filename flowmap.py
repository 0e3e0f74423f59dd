"""Time and transitions: path, flow map, samplers, times of training (docs/method.md, 1 and 4).

    z_t = (1 - t) x + t n          the linear path from data x (t = 0) to noise n (t = 1)
    v   = n - x                    its velocity
    z_r = z_t - (t - r) u(z_t, t, r)          the flow map; u is the average velocity over [r, t]

Everywhere `u` is a callable u(z, t, r) -> velocity of z's shape. z is (B, ...), typically
(B, F, C, H, W); times are float32 in [0, 1], of shape (B,) or (B, F). The prompt is bound before
(`conditioned`), so all here works for any network and for closed forms alike.
"""
from functools import lru_cache

import torch


def conditioned(network, context):
    """The callable u(z, t, r) of a network u(z, t, r, context) for one batch of prompts."""
    return lambda z, t, r: network(z, t, r, context)


def guided(u_c, u_0, scale: float):
    """Classifier-free guidance as a callable u(z, t, r): u_0 + scale (u_c - u_0); scale 1 is none.

    u_c, u_0: callables with the prompt and with the empty one. The paper's
    "cond + 3 (cond - uncond)" is scale 4 here.
    """
    if scale == 1:
        return u_c

    def u(z, t, r):
        empty = u_0(z, t, r)
        return empty + scale * (u_c(z, t, r) - empty)
    return u


def watched(u, on_step):
    """The callable u, which after each call tells on_step the point that it jumps to: z_r, or the
    consistency sampler's z_0 before it is noised again."""
    def seen(z, t, r):
        velocity = u(z, t, r)
        on_step(z - expand(t - r, z) * velocity)
        return velocity
    return seen


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
    """Mean square (B,) of u(z_t, t, t) - v: the loss of stage `pretrain` and of the fake score."""
    return (u(interpolate(x, n, t), t, t) - (n - x)).square().flatten(1).mean(1)


def shift_time(t, shift: float):
    """sigma(t) = s t / (1 + (s - 1) t): towards noise for s > 1; 0 and 1 stay. Wan has s = 5."""
    return shift * t / (1 + (shift - 1) * t)


def time_grid(steps: int, shift: float) -> list[float]:
    """The sampling grid 1 = t_0 > ... > t_steps = 0: sigma(linspace(1, 0, steps + 1))."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    return [1.0, *(shift_time(1 - i / steps, shift) for i in range(1, steps)), 0.0]


def check_grid(grid) -> None:
    """Raises ValueError unless grid is a decreasing list of times from 1 to 0."""
    falls = all(t > r for t, r in zip(grid, grid[1:]))
    if len(grid) < 2 or grid[0] != 1 or grid[-1] != 0 or not falls:
        raise ValueError(f"a time grid must fall strictly from 1 to 0, not {list(grid)}")


def euler_sample(u, z: torch.Tensor, grid, renoise=None) -> torch.Tensor:
    """Follow the flow map over any decreasing grid, one call of u a step: noise z (B, ...) -> z_0.

    A network without a second time (a teacher) ignores r, and the step is the ordinary Euler step.
    renoise: unused, samplers are called alike. Raises ValueError as `check_grid` does.
    """
    check_grid(grid)
    levels = [torch.full((len(z),), t, device=z.device) for t in grid]
    for t, r in zip(levels, levels[1:]):
        z = flow_map(u, z, t, r)
    return z


def consistency_sample(u, z: torch.Tensor, grid, renoise) -> torch.Tensor:
    """The consistency sampler, for contrast: jump to z_0, re-noise to the next level, repeat.

    renoise(shape of a sample) draws noise for the batch. Each re-noising forgets detail, so more
    steps may look worse. Raises ValueError as `check_grid` does.
    """
    check_grid(grid)
    for t, r in zip(grid, grid[1:]):
        t = torch.full((len(z),), t, device=z.device)
        z = flow_map(u, z, t, torch.zeros_like(t))
        if r > 0:
            z = interpolate(z, renoise(z.shape[1:]).to(z), torch.full_like(t, r))
    return z


# Every sampler is called as sampler(u, z, grid, renoise); the Euler steps draw no noise.
SAMPLERS = {"euler": euler_sample, "consistency": consistency_sample}


def first_frames_given(u, given: torch.Tensor):
    """u(z, t, r) for clips whose first G frames are given, as clean latents (B, G, ...): this
    turns a network of whole clips into image-to-video.

    The given frames are seen at t = 0 in place of z's own, and do not move. They keep the r of the
    others, r > t: AnyFlow's published weights are sampled so; no network here is trained so.
    """
    G = given.shape[1]

    def u_of_the_rest(z, t, r):
        level = (torch.arange(z.shape[1], device=z.device) >= G).float()    # (F,): 0 where given
        t = t.view(len(z), -1) * level                                      # (B, F)
        r = r.view(len(z), -1).expand(-1, len(level))                       # (B, F)
        velocity = u(torch.cat([given, z[:, G:]], 1), t, r)
        return torch.cat([torch.zeros_like(velocity[:, :G]), velocity[:, G:]], 1)
    return u_of_the_rest


def logit_normal_time(generator: torch.Generator, count: int, shift: float) -> torch.Tensor:
    """Times (count,), logit-normal and then shifted: shift_time(sigmoid(N(0, 1)), shift). For stage
    `pretrain` and the fake score."""
    return shift_time(torch.randn(count, generator=generator).sigmoid(), shift)


def flow_map_times(generator: torch.Generator, count: int, shift: float,
                   flow: float = 0.5, consistency: float = 0.25, flow_times: str = "larger"):
    """Times t >= r (count,) of one GLOBAL batch of stage `flowmap`; the r = t samples come first.

    t is the larger of two uniform draws and r the smaller, both shifted; then a fraction `flow` of
    the batch gets r = t (flow matching), a fraction `consistency` r = 0, the rest stays free. Roles
    are stratified: with one random offset o, sample i has position (i + o) / count on [0, 1). Over
    o every role has its exact share at any count; 1 / flow samples always hold one with r = t.

    flow_times: "larger" gives an r = t sample the larger draw, too. "either" gives it the first
    draw, uniform before the shift: at shift 5 21 times as many of these samples lie below 0.2.
    """
    # rand may give a 0, and r = 0 is a role.
    pair = torch.rand(2, count, generator=generator).clamp(min=torch.finfo(torch.float32).tiny)
    position = (torch.arange(count) + torch.rand(1, generator=generator)) / count
    t, r = pair.amax(0), pair.amin(0)
    if flow_times == "either":
        t = torch.where(position < flow, pair[0], t)
    t, r = shift_time(t, shift), shift_time(r, shift)
    r = torch.minimum(r, t.nextafter(torch.zeros_like(t)))   # two draws may round to one
    r = torch.where(position < flow + consistency, 0.0, r)
    return t, torch.where(position < flow, t, r)


TIME_WEIGHTS = {                             # densities over the shifted time, up to a factor
    "beta": lambda t: t * (1 - t) ** 0.5,    # Beta(2, 1.5)
    "uniform": torch.ones_like,
    "normal": lambda t: torch.exp(-((t - 0.5) ** 2) / (2 * 0.25**2)),
}


@lru_cache
def mean_time_weight(name: str, shift: float, either: float) -> float:
    """Mean of a time weight under `flow_map_times`: the integral of w(sigma(a)) p(a) over [0, 1].

    p(a) is 2 a for the larger of two uniform draws and 1 for a single one; `either` is the share of
    the batch whose t is a single draw. Gauss-Legendre in a = 1 - y^2 takes the root at t = 1 out of
    the Beta density, so that 64 nodes are exact to rounding.
    """
    import numpy as np
    nodes, weights = np.polynomial.legendre.leggauss(64)
    y, weights = torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)
    a = 1 - y**2
    p = 2 * a * (1 - either) + either
    return float((TIME_WEIGHTS[name](shift_time(a, shift)) * p * 2 * y * weights).sum())


def time_weight(t: torch.Tensor, name: str, shift: float, either: float = 0.0) -> torch.Tensor:
    """w(t) (B,) with mean 1 under the training times: normalised over them, not inside a batch,
    where it would vanish at batch 1. either: see `mean_time_weight`. Raises ValueError for an
    unknown name."""
    if name not in TIME_WEIGHTS:
        raise ValueError(f"time weight {name!r}: choose one of {', '.join(TIME_WEIGHTS)}")
    return TIME_WEIGHTS[name](t) / mean_time_weight(name, shift, either)
