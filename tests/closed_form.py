"""Gaussian data, for which the velocity, the flow map and the average velocity are known exactly.

x ~ N(mean, std^2) in every coordinate: z_t ~ N((1 - t) mean, S(t)^2) with S(t)^2 = (1 - t)^2 std^2
+ t^2, and the flow keeps a point's standard score: (z_t - (1 - t) mean) / S(t) is constant.
"""
import torch

from flowmap import expand


class Gaussian:
    def __init__(self, mean: float, std: float):
        self.mean, self.std = mean, std

    def scale(self, t):
        return ((1 - t) ** 2 * self.std**2 + t**2).sqrt()

    def velocity(self, z, t):
        t = expand(t, z)
        slope = (t - (1 - t) * self.std**2) / self.scale(t) ** 2
        return -self.mean + slope * (z - (1 - t) * self.mean)

    def map(self, z, t, r):
        t, r = expand(t, z), expand(r, z)
        return (1 - r) * self.mean + self.scale(r) / self.scale(t) * (z - (1 - t) * self.mean)

    def u(self, z, t, r, text=None):
        """The exact average velocity over [r, t]; the velocity at r = t."""
        gap = expand(t - r, z)
        mean = (z - self.map(z, t, r)) / torch.where(gap == 0, 1.0, gap)
        return torch.where(gap == 0, self.velocity(z, t), mean)

    def posterior_mean(self, z, t):
        """E[x | z_t] = z_t - t v."""
        return z - expand(t, z) * self.velocity(z, t)


def on_path(gaussian: Gaussian, z_t, t):
    """Endpoints (x, n) of the straight line that passes z_t at t with the marginal velocity: with
    them the losses see it in place of one sample's."""
    v = gaussian.velocity(z_t, t)
    return z_t - expand(t, z_t) * v, z_t + expand(1 - t, z_t) * v
