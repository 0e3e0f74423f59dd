"""The whole method on points in the plane, where the exact answer is known.

    python plane.py      three stages in under a minute, two tables of errors, and plane.png

The data is a ring of Gaussians. The velocity that carries noise to it has a closed form, and its
flow map can be solved as finely as one likes, so what a network should have learnt is known for
every point. The losses and samplers are those of the video networks (flowmap.py, meanflow.py,
backward_sim.py, dmd.py). Only the data and the network are small.

    z_t = (1 - t) x + t n               from data x (t = 0) to noise n (t = 1), with v = n - x
    z_r = z_t - (t - r) u(z_t, t, r)    the flow map; u is the average velocity over [r, t]

1 pretrain  u(z_t, t, t) learns v. This teacher steps along tangents: long steps miss a curved flow.
2 flowmap   u(z_t, t, r) learns the average velocity: a step of any length lands on the flow.
3 distill   a student goes on from there on samples of its own. They are moved to where the teacher
            finds them likelier than a fake score does, which knows the student's distribution.

Shapes: z (B, P, 2) is B clips of P points, times are (B,): the points of a clip share their time,
as the frames of a video do. P is not 1, because losses divide by the error of a clip. In a video
that is a mean over many numbers; of one point it is mostly luck, and the flow map is then biased.
"""
import argparse
import copy
import math
import time
from pathlib import Path

import cli


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser("The three stages on points in the plane, beside the exact flow map.",
                        "python plane.py --seed 1 --out seed1.png")
    parser.add_argument("--seed", type=int, default=0, help="of weights and training (default 0)")
    parser.add_argument("--updates", type=float, default=1.0, metavar="FACTOR",
                        help="train so many times as long (default 1.0)")
    parser.add_argument("--out", type=Path, default=Path("plane.png"),
                        help="the picture, a PNG (default plane.png)")
    args = parser.parse(argv)
    if not 0.01 <= args.updates <= 100:
        parser.error(f"--updates {args.updates}: give a factor from 0.01 to 100")
    if args.out.suffix != ".png" or args.out.is_dir():
        parser.error(f"--out {args.out}: the name of a file, which must end in .png")
    cli.check_folder(args.out.parent, "--out")
    return args


if __name__ == "__main__":
    cli.run(parse_args)   # answers --help and wrong flags, before what takes seconds to import

import torch
from torch import nn
from tqdm import tqdm

import backward_sim
import dmd
import flowmap
import meanflow
from distributed import generator

CLIPS, POINTS = 64, 16            # of a batch
UPDATES = {"pretrain": 1000, "flowmap": 2000, "distill": 400}
BUDGETS = (2, 4, 8, 16, 50)       # step counts N that stage `distill` simulates
STEPS = (1, 2, 4, 8, 32)          # step counts that are measured
SHIFT = 1.0                       # times are not shifted towards noise; Wan's large latents need 5

ANGLES = torch.arange(6) * (2 * math.pi / 6)
CENTRES = 1.8 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)                        # (K, 2)
STD = 0.25


def draw_noise(g: torch.Generator, clips: int = CLIPS):
    return torch.randn(clips, POINTS, 2, generator=g)


def draw_data(g: torch.Generator, clips: int = CLIPS):
    component = torch.randint(len(CENTRES), (clips, POINTS), generator=g)
    return CENTRES[component] + STD * draw_noise(g, clips)


def exact_velocity(z_t, t):
    """v = E[n - x | z_t] (B, P, 2): each Gaussian's, weighted by the odds that x is of it."""
    t = t[:, None, None, None]
    variance = (1 - t) ** 2 * STD**2 + t**2
    offset = z_t[:, :, None] - (1 - t) * CENTRES                                    # (B, P, K, 2)
    weight = (-offset.square().sum(3, keepdim=True) / (2 * variance)).softmax(2)    # (B, P, K, 1)
    v = (t - (1 - t) * STD**2) / variance * offset - CENTRES                        # (B, P, K, 2)
    return (weight * v).sum(2)


def exact_u(z_t, t, r):
    """The exact average velocity over [r, t], r < t, by Runge-Kutta steps of order 4, none longer
    than 1/32. The end point of a path is right to 2e-5 (RMS)."""
    substeps = math.ceil(32 * (t - r).max().item())
    h = (t - r) / substeps                                                          # (B,)
    z, dt = z_t, h[:, None, None]
    for i in range(substeps):
        now = t - i * h
        v_1 = exact_velocity(z, now)
        v_2 = exact_velocity(z - dt / 2 * v_1, now - h / 2)
        v_3 = exact_velocity(z - dt / 2 * v_2, now - h / 2)
        v_4 = exact_velocity(z - dt * v_3, now - h)
        z = z - dt / 6 * (v_1 + 2 * v_2 + 2 * v_3 + v_4)
    return (z_t - z) / (t - r)[:, None, None]


class Net(nn.Module):
    """u(z, t, r): a perceptron of a point and two times, each as sines and cosines."""

    def __init__(self, seed: int):
        super().__init__()
        self.frequencies = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0, 6.0])
        g, layers = generator(seed, "init"), []
        for inputs, outputs in ((2 + 24, 64), (64, 64), (64, 64), (64, 2)):
            linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
            nn.init.normal_(linear.weight, std=inputs**-0.5, generator=g)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.SiLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, z, t, r, context=None):
        """context is the prompt of a video network; points have none."""
        angles = torch.cat([t[:, None] * self.frequencies, r[:, None] * self.frequencies], 1)
        times = torch.cat([angles.sin(), angles.cos()], 1)                          # (B, 24)
        return self.layers(torch.cat([z, times[:, None].expand(-1, z.shape[1], -1)], 2))


class Trainer:
    """Adam, with a learning rate that falls to 0 along a cosine."""

    def __init__(self, net: Net, updates: int, lr: float, beta1: float = 0.9):
        self.optimizer = torch.optim.Adam(net.parameters(), lr, (beta1, 0.999), fused=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, updates)

    def update(self, loss):
        loss.mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()


def draws(seed: int, stage: str, updates: int):
    """The random generator of each update, behind a progress bar."""
    for update in tqdm(range(updates), desc=f"{stage:8}"):
        yield generator(seed, stage, update)


def pretrain(seed: int, updates: int) -> Net:
    """Stage 1: the teacher, by flow matching."""
    net = Net(seed)
    trainer = Trainer(net, updates, lr=4e-3)
    for g in draws(seed, "pretrain", updates):
        t = flowmap.logit_normal_time(g, CLIPS, SHIFT)
        trainer.update(flowmap.flow_matching_error(net, draw_data(g), draw_noise(g), t))
    return net.requires_grad_(False)


def flow_map_loss(net: Net, g: torch.Generator):
    """The forward loss (B,): half of the clips have r = t, a quarter r = 0, the rest any r < t."""
    t, r = flowmap.flow_map_times(g, CLIPS, SHIFT)
    prompt, dropped = torch.zeros(CLIPS, 0), torch.zeros(CLIPS, dtype=torch.bool)   # there are none
    err = meanflow.meanflow_error(net, draw_data(g), draw_noise(g), t, r,
                                  prompt, prompt, dropped, meanflow.Settings(guidance=1.0),
                                  flow_rows=int((r == t).sum()))
    mu = err.detach()[r == t].mean()
    return meanflow.balanced_loss(err, t, r, mu) * flowmap.time_weight(t, "beta", SHIFT)


def train_flow_map(teacher: Net, seed: int, updates: int) -> Net:
    """Stage 2: the flow map, from the teacher's weights."""
    net = copy.deepcopy(teacher).requires_grad_(True)
    trainer = Trainer(net, updates, lr=4e-3)
    for g in draws(seed, "flowmap", updates):
        trainer.update(flow_map_loss(net, g))
    return net.requires_grad_(False)


def distill(teacher: Net, flow_map: Net, seed: int, updates: int) -> Net:
    """Stage 3: the student, from the flow map's weights."""
    student = copy.deepcopy(flow_map).requires_grad_(True)
    real_score, fake_score = teacher, copy.deepcopy(teacher).requires_grad_(True)
    trainer = Trainer(student, updates, lr=2e-4, beta1=0.0)
    fake_trainer = Trainer(fake_score, updates, lr=1e-3, beta1=0.0)
    for g in draws(seed, "distill", updates):
        # What N steps give, by three jumps around step k: z_1 -> z_{t_k} -> z_{t_{k+1}} -> z_0.
        N = BUDGETS[int(torch.randint(len(BUDGETS), (1,), generator=g))]
        k = int(torch.randint(N, (1,), generator=g))
        grid = flowmap.time_grid(N, SHIFT)
        z_0 = backward_sim.flow_map_simulation(student, draw_noise(g), grid, k)

        # The student: its samples are moved, and the loss of stage 2 goes on. Without the latter
        # the student would drift off the flow, and more steps would make its samples worse.
        tau = flowmap.shift_time(torch.rand(CLIPS, generator=g), SHIFT)
        gradient = dmd.dmd_gradient(z_0, draw_noise(g), tau, real_score, fake_score)
        trainer.update(dmd.dmd_loss(z_0, gradient) + flow_map_loss(student, g))

        # The fake score: flow matching on these samples, to know the student's distribution.
        tau = flowmap.logit_normal_time(g, CLIPS, SHIFT)
        fake_trainer.update(dmd.fake_score_error(fake_score, z_0, draw_noise(g), tau))
    return student.requires_grad_(False)


def any_step(u, z_1, steps: int):
    """z_0 by `steps` jumps along the flow."""
    return flowmap.euler_sample(u, z_1, flowmap.time_grid(steps, SHIFT))


def consistency(u, z_1, steps: int):
    """z_0 by `steps` jumps to the clean end, with fresh noise between them."""
    g = generator("renoise", steps)
    return flowmap.consistency_sample(u, z_1, flowmap.time_grid(steps, SHIFT),
                                      lambda shape: torch.randn(len(z_1), *shape, generator=g))


def distance(z_0, exact) -> float:
    """Root mean square distance of samples to where the exact map takes the same noise. Only for
    samplers that keep to a path: fresh noise ends elsewhere, and no worse for that."""
    return (z_0 - exact).square().sum(2).mean().sqrt().item()


def energy_distance(z_0, exact) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| of samples a and data b, x 1000: 0 when the distributions
    agree. The exact map's points are such b. Pairs from the same noise are left out; all others are
    independent, which makes the estimate unbiased: it may fall below 0."""
    a, b = z_0.flatten(0, 1), exact.flatten(0, 1)
    pairs = torch.cdist(a, b)
    between = (pairs.sum() - pairs.diagonal().sum()) / (len(a) * (len(a) - 1))
    return 1000 * (2 * between - torch.pdist(a).mean() - torch.pdist(b).mean()).item()


def digits(error: float) -> str:
    return f"{round(error, 2) + 0:.2f}"                      # + 0, as a rounded -0.001 is -0


def table(title: str, errors: dict) -> str:
    rule = "|---" * (1 + len(STEPS)) + "|"
    lines = [f"\n{title}", f"| steps | {' | '.join(map(str, STEPS))} |", rule]
    lines += [f"| {name} | {' | '.join(map(digits, row))} |" for name, row in errors.items()]
    return "\n".join(lines)


def path(u, sampler, z_1, steps: int):
    """Where points are before each step of a sampler and after the last (steps + 1, B, P, 2)."""
    points = []

    def recorded(z, t, r):
        points.append(z)
        return u(z, t, r)
    points.append(sampler(recorded, z_1, steps))
    return torch.stack(points)


def draw_figure(out: Path, models: dict, samples: dict, errors: dict, z_1) -> bool:
    """A row a model: samples with errors, then paths. False when matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    shown = slice(0, 1000)
    exact = samples["exact flow map"][0].flatten(0, 1)[shown]
    colour = torch.cdist(exact, CENTRES).argmin(1)           # of a noise: where it should end
    few = z_1[:8, :1]
    curves = path(exact_u, any_step, few, 32)[:, :, 0]                              # (33, 8, 2)
    figure = Figure(figsize=(9.6, 8.2))
    axes = figure.subplots(len(models), len(STEPS) + 1)
    for row, (name, (u, sampler)) in zip(axes, models.items()):
        row[0].set_ylabel(name)
        for axis, z_0, error in zip(row, samples[name], errors[name]):
            x, y = z_0.flatten(0, 1)[shown].T
            axis.scatter(x, y, s=2, c=colour, cmap="Dark2", vmin=0, vmax=7, lw=0, antialiased=False)
            axis.text(-2.6, 2.2, digits(error), fontsize=9)
        points = path(u, sampler, few, 4)[:, :, 0]                                  # (5, 8, 2)
        row[-1].plot(curves[..., 0], curves[..., 1], color="0.8", linewidth=3)
        row[-1].plot(points[..., 0], points[..., 1], "k.-", linewidth=0.6, markersize=4)
    for axis, title in zip(axes[0], [*(f"N = {steps}" for steps in STEPS), "paths, N = 4"]):
        axis.set_title(title, fontsize=10)
    for axis in axes.flat:
        axis.set(xlim=(-2.8, 2.8), ylim=(-2.8, 2.8), xticks=[], yticks=[], aspect="equal")
    figure.tight_layout(pad=0.4)
    with cli.written_aside(out) as aside:
        figure.savefig(aside, dpi=120)
    return True


def main(argv=None) -> None:
    started = time.time()
    args = parse_args(argv)
    updates = {stage: round(args.updates * count) for stage, count in UPDATES.items()}

    teacher = pretrain(args.seed, updates["pretrain"])
    flow_map = train_flow_map(teacher, args.seed, updates["flowmap"])
    student = distill(teacher, flow_map, args.seed, updates["distill"])

    models = {"exact flow map": (exact_u, any_step),
              "teacher": (lambda z, t, r: teacher(z, t, t), any_step),    # it knows one time only
              "flow map": (flow_map, any_step),
              "student": (student, any_step),
              "consistency sampler": (student, consistency)}
    z_1 = draw_noise(generator("evaluation"), clips=256)
    samples = {name: [sampler(u, z_1, n) for n in STEPS] for name, (u, sampler) in models.items()}
    exact = samples["exact flow map"][0]
    distances = {name: [distance(z_0, exact) for z_0 in row] for name, row in samples.items()}
    energies = {name: [energy_distance(z_0, exact) for z_0 in row] for name, row in samples.items()}
    print(table("distance to the exact map's point from the same noise", distances))
    print(table("energy distance to the data x 1000, as in the picture", energies))
    drawn = draw_figure(args.out, models, samples, energies, z_1)
    place = args.out if drawn else "none, as matplotlib is not installed"
    print(f"\npicture: {place}\ntime: {time.time() - started:.0f} s")


if __name__ == "__main__":
    cli.run(main)
