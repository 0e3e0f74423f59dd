"""What an update is made of: a `Batch`, which holds everything random, and the losses of each stage
as plain functions of networks, a batch and settings. They draw nothing and know no ranks; train.py
puts them in order.

Legend:  B samples of a micro-batch   F latent frames   C, H, W latents   T prompt tokens
"""
from dataclasses import dataclass, fields, replace

import torch

import backward_sim
import cli
import distributed
import dmd
import flowmap
import meanflow
from cache import Context, append_chunk, teacher_forced
from config import STAGES, Config, chunks_of


@dataclass
class Rollout:
    """What a rollout of the student draws. N and k are the same on every rank."""
    grid: list                   # 1 = t_0 > ... > t_N = 0
    step: int                    # k, the step that flow-map simulation corrects
    z_1: torch.Tensor            # noise (B, F, C, H, W)
    renoise: list                # for each chunk, what the consistency simulation adds at each step


@dataclass
class Batch:
    """A micro-batch: a pure function of (seed, stage, step, slot), on the CPU until it is used.

    Its clips are cut to `chunks`, of which the frames from `start` on are trained; a bidirectional
    clip is one chunk, trained whole. What a stage does not need is None.
    """
    x: torch.Tensor              # latents (B, sum(chunks), C, H, W)
    n: torch.Tensor              # noise (B, frames that are trained, C, H, W)
    text: torch.Tensor           # prompts (B, T, text_dim)
    null_text: torch.Tensor      # empty prompts
    dropped: torch.Tensor        # (B,) bool: prompts that forward losses replace by the empty one
    conditioning: dict           # of image-to-video networks, by names of cache.Context
    chunks: tuple
    start: int
    t: torch.Tensor              # times (B,) of the forward loss; r <= t
    r: torch.Tensor
    roles: tuple                 # how many rows have r = t, then r = 0, then another r < t
    some_gap: bool               # whether any rank of this micro-step has a row with r < t
    rollout: Rollout | None = None
    tau: torch.Tensor | None = None          # level (B,) at which DMD scores, and its noise
    tau_noise: torch.Tensor | None = None
    fake_rollout: Rollout | None = None      # of --fake-rollout fresh
    fake_t: torch.Tensor | None = None       # times (B,) of the fake score's loss, and its noise
    fake_noise: torch.Tensor | None = None

    def to(self, device) -> "Batch":
        """The same on a device; not the rollouts, whose noise is moved when it is used."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {n: v.to(device) for n, v in tensors.items() if isinstance(v, torch.Tensor)}
        conditioning = {name: v.to(device) for name, v in self.conditioning.items()}
        return replace(self, **moved, conditioning=conditioning)


def micro_batch(c: Config, world) -> int:
    """Samples that a process takes at once."""
    return c.micro_batch or max(1, c.batch_size // world.size)


def micro_steps(c: Config, world) -> int:
    """Micro-batches of an update on each process."""
    return c.batch_size // (world.size * micro_batch(c, world))


def draw_batch(c: Config, source, world, step: int, micro_step: int) -> Batch:
    """The samples of an update that this rank takes in a micro-step. source: what data.open_data
    gives, behind its encoders.

    Half of the updates take a clip's first full chunks, half a random number of chunks from there
    up, the same on every rank; all but the last full ones are compressed context.
    """
    key = 10**7 * STAGES.index(c.stage) + step       # no stage draws what another drew
    count = micro_batch(c, world)
    slots = distributed.slots(world, count, micro_step)

    def generator(purpose: str) -> torch.Generator:
        return distributed.generator(c.seed, key, purpose)

    def noise(purpose: str, shape) -> torch.Tensor:
        return distributed.noise(shape, c.seed, key, purpose, slots=slots)

    all_chunks = chunks_of(c, source.latent_shape[0])
    full = c.full_chunks or len(all_chunks)
    coin, share = torch.rand(2, generator=generator("chunks")).tolist()
    extra = len(all_chunks) - full
    longer = int(share * (extra + 1)) if extra > 0 and coin < 0.5 else 0
    chunks = all_chunks[:full + longer]
    start, stop = sum(chunks[:-full]), sum(chunks)

    x, text, conditioning = source.draw((key * c.batch_size + slots).tolist(), seed=c.seed)
    n = noise("noise", source.latent_shape)[:, start:stop]
    dropped = torch.rand(c.batch_size, generator=generator("drop"))[slots] < c.text_drop
    if c.stage == "pretrain":
        t = flowmap.logit_normal_time(generator("time"), c.batch_size, c.shift)
        r = t
    else:
        t, r = flowmap.flow_map_times(generator("time"), c.batch_size, c.shift, c.flow_fraction,
                                      c.consistency_fraction)
    first = int(slots[0]) - world.rank               # the slots of all ranks in this micro-step
    on_any_rank = slice(first, first + world.size * count)
    batch = Batch(x[:, :stop], n, text, source.null_text.expand_as(text), dropped,
                  {name: conditioning[name] for name in source.conditioning}, chunks, start,
                  t[slots], r[slots], roles_of(t[slots], r[slots]),
                  bool((r < t)[on_any_rank].any()))
    if c.stage == "distill":
        batch.rollout = draw_rollout(c, batch, key, slots)
        batch.tau = flowmap.shift_time(
            torch.rand(c.batch_size, generator=generator("tau"))[slots], c.shift)
        batch.tau_noise = noise("dmd", n.shape[1:])
        if c.fake_rollout == "fresh":
            batch.fake_rollout = draw_rollout(c, batch, -1 - key, slots)
        batch.fake_t = flowmap.logit_normal_time(generator("fake"), c.batch_size, c.shift)[slots]
        batch.fake_noise = noise("fake", n.shape[1:])
    return batch


def roles_of(t, r) -> tuple[int, int, int]:
    """How many rows have r = t, r = 0, and another r; in this order, see flowmap.flow_map_times."""
    flow, consistency = int((r == t).sum()), int(((r < t) & (r == 0)).sum())
    return flow, consistency, len(t) - flow - consistency


def draw_rollout(c: Config, batch: Batch, key: int, slots) -> Rollout:
    draws, budgets = distributed.generator(c.seed, key, "rollout"), cli.positive_ints(c.budgets)
    steps = budgets[int(torch.randint(len(budgets), (1,), generator=draws))]
    k = int(torch.randint(steps, (1,), generator=draws))
    z_1 = distributed.noise(batch.n.shape[1:], c.seed, key, "rollout", slots=slots)
    stream = distributed.noise_stream(c.seed, key, "renoise", slots=slots)
    chunks = z_1.split(trained_chunks(c, batch), 1)
    renoise = [[stream(z.shape[1:]) for _ in range(steps - 1)] if c.rollout == "consistency" else []
               for z in chunks]
    return Rollout(flowmap.time_grid(steps, c.shift), k, z_1, renoise)


def trained_chunks(c: Config, batch: Batch) -> list[int]:
    return list(batch.chunks[-(c.full_chunks or len(batch.chunks)):])


def context(network, batch: Batch, text, c: Config, z_0=None) -> Context:
    """The prompt and the clean chunks that each trained chunk sees: the data's, or samples z_0."""
    x = batch.x if z_0 is None else torch.cat([batch.x[:, :batch.start], z_0.detach()], 1)
    given = Context(text, **batch.conditioning)
    return teacher_forced(network, x, given, batch.chunks, c.full_chunks)


def kept_text(batch: Batch) -> torch.Tensor:
    """Prompts (B, T, text_dim) with the empty one in place of those that are dropped."""
    return torch.where(batch.dropped[:, None, None], batch.null_text, batch.text)


def flow_matching_error(network, batch: Batch, c: Config) -> torch.Tensor:
    """Stage pretrain: (B,)."""
    u = flowmap.conditioned(network, context(network, batch, kept_text(batch), c))
    return flowmap.flow_matching_error(u, batch.x[:, batch.start:], batch.n, batch.t)


def flow_map_error(student, batch: Batch, c: Config) -> torch.Tensor:
    """Stage flowmap, and distill's co-training: the forward error (B,), before the balance."""
    with torch.no_grad():
        null = context(student, batch, batch.null_text, c) if c.guidance != 1 else None
    return meanflow.meanflow_error(
        student, batch.x[:, batch.start:], batch.n, batch.t, batch.r,
        context(student, batch, kept_text(batch), c), null, batch.dropped, c.guidance, c.epsilon,
        c.derivative, all_ranks_differentiate=batch.some_gap)


def roll_out(student, batch: Batch, rollout: Rollout, c: Config) -> torch.Tensor:
    """Stage distill: samples z_0 (B, F, C, H, W) of the student, by backward simulation."""
    z_1 = rollout.z_1.to(batch.x.device)
    renoise = iter([n.to(z_1) for chunk in rollout.renoise for n in chunk])
    given = Context(batch.text, **batch.conditioning)
    with torch.no_grad():                            # the compressed context is the data's
        chunks = trained_chunks(c, batch)
        old = replace(given, chunks=batch.chunks[:-len(chunks)])
        data = batch.x[:, :batch.start]
        past = student.encode(data, old, compressed=True) if batch.start else ()

    def jump(z, context):
        u = flowmap.conditioned(student, context)
        simulation = backward_sim.SIMULATIONS[c.rollout]
        return simulation(u, z, rollout.grid, rollout.step, lambda shape: next(renoise))

    def write(context, z_0):
        return append_chunk(student, context, z_0, full_chunks=0)
    first = replace(given, cache=past, start=batch.start)
    return torch.cat(list(backward_sim.chunk_by_chunk(jump, write, first, z_1, chunks)), 1)


def score_gradient(z_0, teacher, fake, batch: Batch, c: Config) -> torch.Tensor:
    """Stage distill: DMD's gradient at the samples z_0, of their shape."""
    def score(network, text):
        # The clean chunks are encoded for the call and freed after it: three contexts are large.
        return lambda z, t, r: network(z, t, r, context(network, batch, text, c, z_0))
    real = flowmap.guided(score(teacher, batch.text), score(teacher, batch.null_text),
                          c.real_guidance)
    return dmd.dmd_gradient(z_0, batch.tau_noise, batch.tau, real, score(fake, batch.text))


def fake_score_error(fake, batch: Batch, z_0, c: Config) -> torch.Tensor:
    """Stage distill: flow matching (B,) of the fake score on samples of the student."""
    u = flowmap.conditioned(fake, context(fake, batch, batch.text, c, z_0))
    return dmd.fake_score_error(u, z_0, batch.fake_noise, batch.fake_t)
