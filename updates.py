"""What an update is made of: a `Batch`, which holds everything random, and the losses of each stage
as plain functions of networks, a batch and settings. They draw nothing and know no ranks; train.py
puts them in order.

Legend:  B samples of a micro-batch   F latent frames   C, H, W latents   T prompt tokens
"""
from dataclasses import dataclass, replace

import torch

import backward_sim
import cli
import distributed
import dmd
import flowmap
import meanflow
from cache import Context, append_chunk, teacher_forced
from config import STAGES, Config, chunks_of, micro_batch


@dataclass
class Rollout:
    """What a rollout of the student draws. N and k are the same for all ranks and chunks."""
    grid: list                   # 1 = t_0 > ... > t_N = 0
    k: int                       # the step that flow-map simulation corrects
    z_1: torch.Tensor            # noise (B, F, C, H, W)
    renoise: list                # what consistency simulation adds, step by step, chunk by chunk


@dataclass
class Batch:
    """A micro-batch: a pure function of (seed, stage, step, slot), on the CPU until it is used.

    The forward loss takes a clip's first `chunks`, of which the frames from `start` on are trained;
    a bidirectional clip is one chunk, trained whole. What a stage does not need is None.
    """
    x: torch.Tensor              # latents of whole clips (B, F, C, H, W)
    n: torch.Tensor              # noise (B, frames that are trained, C, H, W)
    text: torch.Tensor           # prompts (B, T, text_dim)
    null_text: torch.Tensor      # empty prompts
    dropped: torch.Tensor        # (B,) bool: prompts that forward losses replace by the empty one
    guided_rows: torch.Tensor    # indices of those that get a u_0: at least all that keep theirs
    conditioning: dict           # of image-to-video networks, by names of cache.Context
    chunks: tuple
    start: int
    t: torch.Tensor              # times (B,) of the forward loss; r <= t
    r: torch.Tensor
    roles: tuple                 # how many rows have r = t, then r = 0, then another r < t
    some_gap: bool               # whether any rank of this micro-step has a row with r < t
    tangent_scale: float = 1.0   # factor of dF/dt in the target
    whole_t: torch.Tensor | None = None      # causal flowmap, some updates: the clip as one chunk
    whole_noise: torch.Tensor | None = None
    rollout: Rollout | None = None           # distill
    tau: torch.Tensor | None = None          # level (B,) at which DMD scores
    tau_noise: torch.Tensor | None = None    # (B, F, C, H, W)
    fake_rollout: Rollout | None = None      # of --fake-rollout fresh
    fake_t: torch.Tensor | None = None       # times (B,) of the fake score's loss
    fake_noise: torch.Tensor | None = None

    def context(self, text) -> Context:
        """What a network is told of whole clips with these prompts."""
        return Context(text, **self.conditioning)

    def to(self, device) -> "Batch":
        """The same with all tensors on a device, but for the noise of rollouts, which moves when
        it is used."""
        moved = {name: distributed.to_device(x, device) for name, x in vars(self).items()
                 if isinstance(x, torch.Tensor)}
        conditioning = {name: distributed.to_device(x, device)
                        for name, x in self.conditioning.items()}
        return replace(self, **moved, conditioning=conditioning)


# A stage draws its clips with the seed of training, below 10^6, plus its number times this; seeds
# from 10^6 to 2 * 10^6 are left to eval.py.
SEEDS_A_STAGE = 2 * 10**6


def draw_batch(c: Config, source, world, step: int, micro_step: int) -> Batch:
    """The samples of an update that this rank takes in a micro-step. source: what data.open_data
    gives, behind its encoders."""
    stage = STAGES.index(c.stage)
    key = 10**7 * stage + step                       # no stage draws what another drew
    shape = source.latent_shape
    count = micro_batch(c, world.size)
    slots = distributed.slots(world, count, micro_step)      # this rank's places in the batch

    def generator(purpose: str) -> torch.Generator:
        return distributed.generator(c.seed, key, purpose)

    def noise(purpose: str) -> torch.Tensor:
        return distributed.noise(shape, c.seed, key, purpose, slots=slots)

    chunks, start = draw_chunks(c, shape[0], generator("chunks"))
    clips = (step * c.batch_size + slots).tolist()
    x, text, conditioning = source.draw(clips, seed=c.seed + stage * SEEDS_A_STAGE)
    dropped = torch.rand(c.batch_size, generator=generator("drop")) < c.text_drop
    if c.stage == "pretrain":
        t = flowmap.logit_normal_time(generator("time"), c.batch_size, c.shift)
        r = t
    else:
        t, r = flowmap.flow_map_times(generator("time"), c.batch_size, c.shift, c.flow_fraction,
                                      c.consistency_fraction, c.flow_times)
    first = micro_step * world.size * count
    all_ranks = slice(first, first + world.size * count)     # places of all ranks, this micro-step
    guided = (~dropped[slots]).nonzero()[:, 0]       # rows that get a u_0: those with a prompt
    if not len(guided) and not dropped[all_ranks].all():
        guided = torch.zeros(1, dtype=torch.long)    # FSDP: others call u_0, so must this rank
    if len(guided) and c.compile:
        guided = torch.arange(count)                 # one shape: each new number would be compiled
    batch = Batch(x=x, n=noise("noise")[:, start:sum(chunks)], text=text,
                  null_text=source.null_text.expand_as(text), dropped=dropped[slots],
                  guided_rows=guided, chunks=chunks, start=start, t=t[slots], r=r[slots],
                  conditioning={name: conditioning[name] for name in source.conditioning},
                  roles=roles_of(t[slots], r[slots]), some_gap=bool((r < t)[all_ranks].any()))
    if c.stage == "flowmap" and step < c.tangent_warmup:
        batch.tangent_scale = step / c.tangent_warmup
    if c.stage == "flowmap" and c.causal:
        if torch.rand((), generator=generator("whole coin")) < c.bidirectional_fraction:
            whole_t = flowmap.logit_normal_time(generator("whole"), c.batch_size, c.shift)
            batch.whole_t, batch.whole_noise = whole_t[slots], noise("whole")
    if c.stage == "distill":
        batch.rollout = draw_rollout(c, shape, key, slots)
        if c.fake_rollout == "fresh":
            # The key of no other draw: those are 0 and up.
            batch.fake_rollout = draw_rollout(c, shape, -1 - key, slots)
        tau = torch.rand(c.batch_size, generator=generator("tau"))
        fake_t = flowmap.logit_normal_time(generator("fake"), c.batch_size, c.shift)
        batch.tau, batch.tau_noise = flowmap.shift_time(tau[slots], c.shift), noise("dmd")
        batch.fake_t, batch.fake_noise = fake_t[slots], noise("fake")
    return batch


def draw_chunks(c: Config, frames: int, generator) -> tuple[tuple, int]:
    """(chunks of the forward loss, the first frame that is trained), the same on every rank. Half
    of the updates take a clip's first `full_chunks` chunks. The others take at least as many, a
    random number, of which the last `full_chunks` are trained and the rest is compressed context.
    """
    chunks = chunks_of(c, frames)
    full = c.full_chunks or len(chunks)
    coin, share = torch.rand(2, generator=generator).tolist()
    extra = max(0, len(chunks) - full)
    longer = int(share * (extra + 1)) if coin < 0.5 else 0
    chunks = chunks[:full + longer]
    return chunks, sum(chunks[:-full])


def roles_of(t, r) -> tuple[int, int, int]:
    """How many rows have r = t, r = 0, and another r < t. Balance and derivative rely on this order
    (flowmap.flow_map_times makes it); raises ValueError for any other."""
    role = torch.where(r == t, 0, torch.where(r == 0, 1, 2))
    if (role.diff() < 0).any():
        raise ValueError("times out of order: rows with r = t must come first, then those with "
                         "r = 0, then the others")
    return tuple(role.bincount(minlength=3).tolist())


def draw_rollout(c: Config, shape, key: int, slots) -> Rollout:
    """N, k and the noise of a rollout of clips (F, C, H, W) of this shape."""
    draws = distributed.generator(c.seed, key, "rollout")
    budgets = cli.positive_ints(c.budgets)
    steps = budgets[int(torch.randint(len(budgets), (1,), generator=draws))]
    k = int(torch.randint(steps, (1,), generator=draws))
    z_1 = distributed.noise(shape, c.seed, key, "rollout", slots=slots)
    renoise = []
    if c.rollout == "consistency":
        stream = distributed.noise_stream(c.seed, key, "renoise", slots=slots)
        for frames in chunks_of(c, shape[0]):
            renoise += [stream((frames, *shape[1:])) for _ in range(steps - 1)]
    return Rollout(flowmap.time_grid(steps, c.shift), k, z_1, renoise)


def kept_text(batch: Batch) -> torch.Tensor:
    """Prompts (B, T, text_dim) with the empty one in place of those that are dropped."""
    return torch.where(batch.dropped[:, None, None], batch.null_text, batch.text)


def whole_clip(network, batch: Batch, text):
    """The callable u(z, t, r) of a network for whole clips as one chunk."""
    return flowmap.conditioned(network, batch.context(text))


def flow_matching_error(network, batch: Batch) -> torch.Tensor:
    """Stage pretrain: flow matching (B,) on whole clips, some of them with the empty prompt."""
    u = whole_clip(network, batch, kept_text(batch))
    return flowmap.flow_matching_error(u, batch.x, batch.n, batch.t)


def flow_map_error(student, batch: Batch, c: Config, teacher=None) -> torch.Tensor:
    """Stage flowmap, and distill's co-training: the forward error (B,), before the balance.
    teacher: whose velocity is learned, with --velocity teacher."""
    null_context, v = None, None
    if c.velocity == "teacher":
        v = teacher_velocity(teacher, batch, c)
    elif c.guidance != 1 and len(batch.guided_rows):
        with torch.no_grad():
            null_context = clean_past(student, batch, batch.null_text, c, batch.guided_rows)
    context = clean_past(student, batch, kept_text(batch), c)
    x = batch.x[:, batch.start:sum(batch.chunks)]
    # Under FSDP all ranks make the same calls: where another one has a row with r < t and this one
    # has none, it differentiates its last row, which changes nothing.
    flow_rows = min(batch.roles[0], len(x) - 1) if batch.some_gap else len(x)
    return meanflow.meanflow_error(student, x, batch.n, batch.t, batch.r, context, null_context,
                                   batch.dropped, c.forward_settings, flow_rows=flow_rows,
                                   guided_rows=batch.guided_rows, v=v,
                                   tangent_scale=batch.tangent_scale)


@torch.no_grad()
def teacher_velocity(teacher, batch: Batch, c: Config) -> torch.Tensor:
    """The teacher's v (B, F, C, H, W) at z_t, guided where the prompt is not dropped."""
    t, z_t = batch.t, flowmap.interpolate(batch.x, batch.n, batch.t)
    v = whole_clip(teacher, batch, kept_text(batch))(z_t, t, t)
    rows = batch.guided_rows
    if c.guidance != 1 and len(rows):
        u_0 = teacher(z_t[rows], t[rows], t[rows], batch.context(batch.null_text)[rows])
        w = torch.where(batch.dropped[rows], 1.0, c.guidance).to(t)
        v = v.index_copy(0, rows, u_0 + flowmap.expand(w, u_0) * (v[rows] - u_0))
    return v


def clean_past(student, batch: Batch, text, c: Config, rows=slice(None)) -> Context:
    """The prompt, and the data's clean chunks that each trained chunk sees; of some rows."""
    x, context = batch.x[rows, :sum(batch.chunks)], batch.context(text)[rows]
    return teacher_forced(student, x, context, batch.chunks, c.full_chunks)


def whole_clip_error(student, batch: Batch, c: Config) -> torch.Tensor:
    """Causal flowmap, some updates: guided flow matching (B,) on the clip as one chunk, so that the
    network stays able to see all of it."""
    context = batch.context(kept_text(batch))
    null_context = None
    if c.guidance != 1 and len(batch.guided_rows):
        null_context = batch.context(batch.null_text)[batch.guided_rows]
    return meanflow.meanflow_error(student, batch.x, batch.whole_noise, batch.whole_t,
                                   batch.whole_t, context, null_context, batch.dropped,
                                   c.forward_settings, flow_rows=len(batch.x),
                                   guided_rows=batch.guided_rows)


def roll_out(student, batch: Batch, rollout: Rollout, c: Config, graph: str = "", made=None):
    """Stage distill: yields z_0 of each chunk of a clip that the student makes, by backward
    simulation against its own cache, as in generation; nothing comes from the data.

    graph: which chunks are made with gradient: "all", the "last", or "", none. made
    (B, F, C, H, W): the clip of an earlier pass over this rollout, which then fills the cache, so
    that each chunk is made again from the same past.
    """
    simulation = backward_sim.SIMULATIONS[c.rollout]
    device = batch.x.device
    z_1 = distributed.to_device(rollout.z_1, device)
    renoise = (distributed.to_device(noise, device) for noise in rollout.renoise)
    context = batch.context(batch.text)
    frames = z_1.shape[1]
    for noise in z_1.split(chunks_of(c, frames), 1):
        start, stop = context.start, context.start + noise.shape[1]
        with torch.set_grad_enabled(graph == "all" or (graph == "last" and stop == frames)):
            u = flowmap.conditioned(student, context)
            z_0 = simulation(u, noise, rollout.grid, rollout.k, lambda shape: next(renoise))
        yield z_0
        if stop < frames:
            clean = z_0.detach() if made is None else made[:, start:stop]
            with torch.no_grad():
                context = append_chunk(student, context, clean, c.full_chunks)


def score_gradient(z_0, teacher, fake, batch: Batch, c: Config) -> torch.Tensor:
    """Stage distill: DMD's gradient at the clips z_0, scored whole, of their shape."""
    real = flowmap.guided(whole_clip(teacher, batch, batch.text),
                          whole_clip(teacher, batch, batch.null_text), c.real_guidance)
    u_fake = whole_clip(fake, batch, batch.text)
    return dmd.dmd_gradient(z_0, batch.tau_noise, batch.tau, real, u_fake)


def fake_score_error(fake, batch: Batch, z_0) -> torch.Tensor:
    """Stage distill: flow matching (B,) of the fake score on clips of the student."""
    u = whole_clip(fake, batch, batch.text)
    return dmd.fake_score_error(u, z_0, batch.fake_noise, batch.fake_t)
