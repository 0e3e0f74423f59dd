"""Rollouts that are trained through: from noise z_1 to z_0 with gradient (docs/method.md, 5).

Pure functions of a callable u(z, t, r) and a grid 1 = t_0 > ... > t_N = 0, the same on all ranks.
"""
import torch

from flowmap import check_grid, consistency_sample, euler_sample, flow_map, interpolate


def flow_map_simulation(u, z_1: torch.Tensor, grid, k: int, renoise=None) -> torch.Tensor:
    """Flow-map backward simulation of the N-step Euler rollout around one of its steps.

        z_{t_k}     = map(z_1,         1       -> t_k)          shortcut, absent at k = 0
        z_{t_{k+1}} = map(z_{t_k},     t_k     -> t_{k+1})      the step being corrected
        z_0         = map(z_{t_{k+1}}, t_{k+1} -> 0)            shortcut, absent at k = N - 1

    z_1 (B, ...) noise, k in 0 .. N - 1. At most three calls, all with gradient, whatever N.
    Flow maps compose: an exact u gives the z_0 of the whole rollout. Raises ValueError for a k
    outside the grid, and as flowmap.check_grid does.
    """
    check_grid(grid)
    if not 0 <= k < len(grid) - 1:
        raise ValueError(f"step k = {k} of a rollout of {len(grid) - 1} steps: 0 is the first")
    # A set, so that a shortcut of no length drops out: t_k = 1 at k = 0, t_{k+1} = 0 at k = N - 1.
    times = sorted({1.0, grid[k], grid[k + 1], 0.0}, reverse=True)
    return euler_sample(u, z_1, times)


def consistency_simulation(u, z_1: torch.Tensor, grid, k: int, renoise) -> torch.Tensor:
    """The baseline: N calls of the consistency sampler, gradient through the last one only.
    renoise: as for flowmap.consistency_sample."""
    check_grid(grid)
    z, t = z_1, torch.full((len(z_1),), grid[-2], device=z_1.device)
    if len(grid) > 2:
        with torch.no_grad():
            # The sampler over all but the last level ends clean, and is noised to that level again.
            x = consistency_sample(u, z_1, [*grid[:-2], 0.0], renoise)
            z = interpolate(x, renoise(x.shape[1:]).to(x), t)
    return flow_map(u, z, t, torch.zeros_like(t))


# Every rollout is called as simulation(u, z_1, grid, k, renoise). The first draws no noise; the
# second always trains its last step.
SIMULATIONS = {"flow-map": flow_map_simulation, "consistency": consistency_simulation}
