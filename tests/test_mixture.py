"""Both stages that need no student samples, on a mixture of Gaussians in the plane."""
import torch
from torch import nn

import flowmap
import meanflow
from distributed import generator

SHIFT = 1.0
STD = 0.5
CENTRES = torch.tensor([[1.5, 0.0], [-0.75, 1.3], [-0.75, -1.3]])


def exact_velocity(z, t):
    """v = (z - E[x | z]) / t: the components' posterior means, weighted by responsibility."""
    t = t[:, None, None]
    variance = (1 - t) ** 2 * STD**2 + t**2
    offset = z[:, None] - (1 - t) * CENTRES                      # (B, 3, 2)
    responsibility = (-offset.square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)
    means = CENTRES + (1 - t) * STD**2 / variance * offset
    return (z - (responsibility * means).sum(1)) / t[:, 0]


class Net(nn.Module):
    """u(z, t, r) with sinusoidal times."""

    def __init__(self, width=128):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 24, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, z, t, r, text):
        angles = torch.stack([t, r], 1)[:, :, None] * torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0, 6.0])
        return self.layers(torch.cat([z, angles.sin().flatten(1), angles.cos().flatten(1)], 1))


def fit(net, steps, loss_of, lr=2e-3, batch=1024):
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        g = generator("mixture", step)
        which = torch.randint(3, (batch,), generator=g)
        x = CENTRES[which] + STD * torch.randn(batch, 2, generator=g)
        optimizer.zero_grad()
        loss_of(x, torch.randn(batch, 2, generator=g), g).mean().backward()
        optimizer.step()
        schedule.step()


def test_a_trained_flow_map_jumps_in_one_step_where_its_teacher_cannot():
    torch.manual_seed(0)
    net, no_text = Net(), torch.zeros(1024, 1, 1)

    def pretrain(x, n, g):
        t = torch.rand(len(x), generator=g)
        return flowmap.flow_matching_error(flowmap.conditioned(net, None), x, n, t)

    def forward_flow_map(x, n, g):
        t, r = flowmap.flow_map_times(g, len(x), SHIFT)
        none_dropped = torch.zeros(len(x), dtype=torch.bool)
        err = meanflow.meanflow_error(net, x, n, t, r, no_text, None, none_dropped, guidance=1.0)
        mu = err.detach()[r == t].mean()
        return meanflow.balanced_loss(err, t, r, flowmap.time_weight(t, "beta", SHIFT), mu)

    z = torch.randn(4096, 2, generator=generator("test"))

    def ends(u, steps):
        with torch.no_grad():
            return flowmap.euler_sample(u, z, flowmap.time_grid(steps, SHIFT))
    solution = ends(lambda z, t, r: exact_velocity(z, t), 1000)

    def errors(u):
        """Root mean square distance to the exact flow's end points, by step count."""
        return {n: (ends(u, n) - solution).square().mean().sqrt().item() for n in (1, 4, 32)}

    fit(net, 1500, pretrain)
    teacher = errors(lambda z, t, r: net(z, t, t, None))
    fit(net, 4000, forward_flow_map)
    student = errors(flowmap.conditioned(net, None))
    print(f"\nteacher {teacher}\nstudent {student}")
    assert student[1] < teacher[1] / 4
    assert student[4] < teacher[4]
    assert student[32] < 1.5 * teacher[32]
