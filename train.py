"""Train the three stages, one after the other, with one loop:

    python train.py --stage pretrain      a flow-matching teacher
    python train.py --stage flowmap       the teacher becomes a flow map: any t to any r < t
    python train.py --stage distill       the flow map learns on its own samples (DMD)
    torchrun --nproc_per_node=8 train.py --stage distill

With --causal the clip is made of chunks of frames, one after the other. A bidirectional clip is one chunk.

Read from top to bottom: config, recipes, losses, then the loop. Everything random is a pure function of (seed, step,
sample), so a killed run resumes bit for bit and a global batch is the same however it is split.
"""
import dataclasses
import json
import math
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import backward_sim
import checkpoint
import cli
import data
import distributed
import dmd
import encoders
import flowmap
import lora
import meanflow
import wan
from cli import flag
from distributed import barrier
from cache import Context, append_chunk, teacher_forced
from checkpoint import Tensors
from model import PRESETS, FlowMapDiT

STAGES = ("pretrain", "flowmap", "distill")
STAGE_BEFORE = dict(zip(STAGES[1:], STAGES))


@dataclass
class Config:
    stage: str = flag("pretrain", "which stage to train", choices=STAGES)
    preset: str = flag("toy", "size of the network and its recipe", choices=tuple(PRESETS))
    data: str = flag("shapes", "toy set 'shapes', 'loop' (shapes that come back in) or 'digits', a folder of mp4/gif clips with "
                     "captions, or a folder of shards")
    run_dir: str = flag("", "folder of the run; stages are folders in it (default runs/PRESET-DATA, or "
                        "runs/PRESET-DATA-causal)")
    frames: int = flag(8, "frames of a clip")
    size: int = flag(16, "height and width of a clip in pixels")
    causal: bool = flag(False, "generate chunk by chunk, each chunk seeing the clean ones before it")
    chunks: str = flag("1,1,1,1", "causal: latent frames of each chunk; the toy codec makes one of two pixel frames")
    full_chunks: int = flag(3, "causal: how many chunks are full, the newest included; older ones are compressed. 0: all")
    base: str = flag("", "pretrain: the weights to start from, a finished stage or Wan2.1 (see wan.py), or none for fresh ones; "
                     "flowmap: flow-map weights to go on with, such as AnyFlow's, in place of stage pretrain (default none; pretrain "
                     "with --causal and the toy preset runs/toy-DATA/pretrain)")
    seed: int = flag(0, "seed of weights, data order, noise and times")
    device: str = flag("auto", "auto takes a GPU if there is one", choices=("auto", "cpu", "cuda"))
    lora_rank: int = flag(0, "train low-rank adapters of this rank on the frozen weights that the stage starts from; in distill, "
                          "student, teacher and fake score are then adapters of one base. 0: train all weights")
    lora_alpha: float = flag(0.0, "an adapter is scaled by alpha / rank; 0: the rank")
    bf16: bool = flag(False, "multiply in bf16 with fp32 master weights; for GPUs (CPUs are slower with it)")
    shard: str = flag("all", "FSDP2 spreads the weights over all processes, or over those of each node, with a copy a node: "
                      "less traffic between nodes, more memory", choices=("all", "node"))
    compile: bool = flag(False, "torch.compile each block: faster on GPUs, after minutes of compiling")
    checkpointing: bool = flag(False, "keep no activations inside a block and compute them again: less memory, a third more time")
    fresh: bool = flag(False, "delete what this stage has saved and start anew, instead of resuming")

    steps: int = flag(1000, "updates of the network")
    batch_size: int = flag(32, "samples of an update, over all processes and accumulation steps")
    micro_batch: int = flag(0, "samples a process takes at once; 0: no gradient accumulation")
    lr: float = flag(1e-3, "peak learning rate of AdamW")
    lr_end: float = flag(1.0, "last learning rate as a fraction of the peak, reached by a cosine; 1 keeps it constant")
    warmup: int = flag(50, "updates over which the learning rate rises")
    beta1: float = flag(0.9, "AdamW's first-moment decay; 0 for distill, whose gradient changes as the student moves")
    beta2: float = flag(0.95, "AdamW's second-moment decay; short, so that it follows the losses' changing scale")
    weight_decay: float = flag(0.0, "none, as in the released recipe")
    clip: float = flag(1.0, "gradients are scaled down to this norm")
    ema_decay: float = flag(0.99, "decay of the weights' moving average, which is what is sampled and shipped")
    ema_start: int = flag(100, "update at which the average starts, by copying the weights")
    text_drop: float = flag(0.1, "fraction of prompts replaced by the empty one, which guidance needs")

    shift: float = flag(5.0, "timestep shift s: more of training and sampling goes to high noise; 5 is Wan's")
    guidance: float = flag(2.0, "guidance scale fused into the flow map; 1 is none, and u_0 + w (u_c - u_0) in general")
    epsilon: float = flag(0.005, "half width of the finite difference, in [0, 1] time; must lie where d u / d t is flat")
    derivative: str = flag("finite-difference", "how dF/dt is taken", choices=tuple(meanflow.DERIVATIVES))
    time_weight: str = flag("beta", "density w(t) of the forward loss", choices=tuple(flowmap.TIME_WEIGHTS))
    weight_before_balance: bool = flag(False, "the released order, in which w(t) cancels for r < t")
    flow_fraction: float = flag(0.5, "fraction of the batch with r = t")
    consistency_fraction: float = flag(0.25, "fraction with r = 0; 1 - flow fraction makes a consistency model")

    rollout: str = flag("flow-map", "backward simulation of distill", choices=("flow-map", "consistency"))
    budgets: str = flag("2,4,8,16,50", "step counts N that a rollout may have; one is drawn an iteration")
    real_guidance: float = flag(2.0, "guidance scale of the teacher in DMD: 4 for the paper's 'cond + 3 (cond - uncond)'. With "
                                "the scale fused into the flow map, small and large steps aim at the same clips")
    cotrain: float = flag(1.0, "factor of the forward flow-map loss in distill; it keeps the any-step map alive")
    fake_lr: float = flag(1e-3, "peak learning rate of the fake score")
    fake_rollout: str = flag("shared", "the fake score trains on the student's rollout of the same iteration, or on a "
                             "fresh one of the updated student", choices=("shared", "fresh"))

    save_every: int = flag(200, "updates between checkpoints")
    log_every: int = flag(10, "updates between rows of log.jsonl")
    max_skips: int = flag(5, "the run stops after this many updates in a row with a non-finite gradient")


# The released recipe, for Wan2.1 (METHOD section 8).
COMMON = dict(bf16=True, checkpointing=True, lora_rank=256, micro_batch=1, save_every=20)
WAN = {
    "pretrain": dict(COMMON, steps=6000, lr=5e-5, warmup=1000, ema_decay=0.999, ema_start=1000),
    "flowmap": dict(COMMON, steps=6000, lr=5e-5, warmup=1000, ema_decay=0.999, ema_start=1000, guidance=3.0),
    "distill": dict(COMMON, steps=1000, lr=2e-6, fake_lr=2e-6, warmup=0, beta1=0.0, beta2=0.999, ema_start=200, guidance=3.0,
                    real_guidance=4.0),
}
WAN_CAUSAL = {stage: dict(chunks="1,3,3,3,3,3,3,2") for stage in STAGES}

# What differs from the defaults above, by preset and stage. Reasons stand in LOG.md where they were measured.
RECIPES = {
    "wan-1.3b": WAN,
    "wan-5b": WAN,
    "wan-14b": {stage: recipe | dict(batch_size=16) | (dict(steps=4000) if stage != "distill" else {})
                for stage, recipe in WAN.items()},
    "wan-1.3b-causal": WAN_CAUSAL,
    "wan-5b-causal": WAN_CAUSAL,
    "wan-14b-causal": WAN_CAUSAL,
    "toy": {
        "pretrain": dict(steps=6000, batch_size=16, lr=2e-3, lr_end=0.05, ema_start=200),
        "flowmap": dict(steps=2200, batch_size=16, lr_end=0.05),
        "distill": dict(steps=330, batch_size=24, lr=2e-4, beta1=0.0, beta2=0.999, warmup=10, ema_decay=0.97, ema_start=50,
                        budgets="1,1,2,4,8,16,50", cotrain=8.0),
    },
    "toy-causal": {  # what differs again with --causal, which starts from the bidirectional teacher
        "pretrain": dict(base="runs/toy-{data}/pretrain", steps=1500, lr=1e-3, lr_end=0.1),
        "flowmap": dict(steps=1500),
        "distill": dict(steps=120, real_guidance=1.5),
    },
    "tiny": {  # seconds a stage: for tests and smoke runs
        "pretrain": dict(steps=20, batch_size=8, warmup=5, ema_start=5, save_every=10),
        "flowmap": dict(steps=12, batch_size=8, warmup=5, ema_start=5, save_every=6),
        "distill": dict(steps=6, batch_size=8, beta1=0.0, beta2=0.999, warmup=2, ema_start=2, save_every=3),
    },
}
# A later stage takes these over from the stage before it, unless a flag says otherwise.
INHERITED = ("preset", "data", "frames", "size", "shift", "causal", "chunks", "full_chunks", "lora_rank", "lora_alpha")
# These may change when a run is resumed.
CHANGEABLE = ("steps", "run_dir", "micro_batch", "device", "checkpointing", "shard", "compile", "fresh", "save_every", "log_every",
              "max_skips")


def default_text(field) -> str:
    recipes = [f"{stage} {RECIPES['toy'][stage].get(field.name, field.default)}" for stage in STAGES
               if any(field.name in recipe for recipe in RECIPES["toy"].values())]
    return "default " + (", ".join(recipes) if recipes else str(field.default))


def parse_config(argv=None) -> Config:
    parser = cli.Parser("Train a stage of an any-step video model.", "python train.py --stage flowmap --steps 500")
    parser.add_config(Config, default_text)
    given = vars(parser.parse(argv))
    stage = given.get("stage", Config.stage)
    before = STAGE_BEFORE.get(stage)
    run = Path(given.get("run_dir") or f"runs/{given.get('preset', Config.preset)}-"
                                   f"{Path(given.get('data', Config.data)).name}{'-causal' * given.get('causal', False)}")
    # A stage that was begun goes on with its own settings; a new one takes some over from the stage before it.
    inherited, own = {}, [field.name for field in dataclasses.fields(Config) if field.name != "fresh"]
    for name, names in ((stage, [] if given.get("fresh") else own), (before, INHERITED)):
        folder = run / (name or stage)
        if not inherited and (folder / "config.json").exists():
            record = json.loads((folder / "config.json").read_text())["config"]
            inherited = {name: record[name] for name in names if name in record}
    values = inherited | given | {"run_dir": str(run)}
    preset = values.get("preset", Config.preset)
    recipe = RECIPES[preset][stage] | RECIPES.get(f"{preset}-causal" if values.get("causal") else "", {}).get(stage, {})
    c = Config(**recipe | values)
    c.base = "" if c.base == "none" else c.base.format(data=Path(c.data).name)
    for name in ("steps", "batch_size", "frames", "size", "log_every", "save_every", "max_skips"):
        if getattr(c, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(c, name)}: must be at least 1")
    for name in ("lr", "shift", "guidance", "real_guidance", "epsilon", "clip", "fake_lr"):
        if not getattr(c, name) > 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(c, name)}: must be above 0")
    for name in ("lr_end", "beta1", "beta2", "ema_decay", "text_drop", "flow_fraction", "consistency_fraction"):
        if not 0 <= getattr(c, name) <= 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(c, name)}: must lie in [0, 1]")
    if not 0 <= c.seed < 1_000_000:
        parser.error(f"--seed {c.seed}: must lie in [0, 1000000); higher ones are for clips that eval.py holds back")
    if c.epsilon > 0.5:
        parser.error(f"--epsilon {c.epsilon}: must be at most 0.5, the half width of all times")
    for name in ("chunks", "full_chunks"):
        if name in given and not c.causal:
            parser.error(f"--{name.replace('_', '-')} is for --causal: a bidirectional clip is one chunk")
    if c.flow_fraction + c.consistency_fraction > 1:
        parser.error("--flow-fraction and --consistency-fraction: together at most 1")
    for name in ("budgets", "chunks"):
        try:
            cli.positive_ints(getattr(c, name))
        except cli.argparse.ArgumentTypeError as error:
            parser.error(f"--{name} {error}")
    for name in ("full_chunks", "lora_rank", "lora_alpha", "micro_batch", "warmup", "cotrain", "weight_decay"):
        if getattr(c, name) < 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(c, name)}: must be at least 0")
    c.lora_alpha = c.lora_alpha or float(c.lora_rank)
    if c.lora_rank and stage == "pretrain" and not c.base:
        parser.error("--lora-rank: adapters need weights to adapt; give them with --base, or train all weights with --lora-rank 0")
    if c.base and stage == "distill":
        parser.error(f"--base is for stages pretrain and flowmap; stage {stage} starts from those")
    return c


def change_between(then: dict, now: dict) -> str:
    """The first setting that changed and may not, or ''."""
    return next((f"{name} = {then[name]}, not {value}" for name, value in now.items()
                 if name in then and name not in CHANGEABLE and then[name] != value), "")


def learning_rate(c: Config, step: int, peak: float) -> float:
    """Linear warm-up, then a cosine from the peak to lr_end * peak at the last step."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / c.steps))
    return peak * min(1, (step + 1) / max(1, c.warmup)) * (c.lr_end + (1 - c.lr_end) * cosine)


@dataclass
class Batch:
    """A micro-batch. Its clips are cut to `chunks`, of which the frames from `start` on are trained; a bidirectional clip
    is one chunk, trained whole."""
    x: torch.Tensor                  # latents (B, sum(chunks), C, H, W)
    n: torch.Tensor                  # noise (B, frames that are trained, C, H, W)
    text: torch.Tensor               # prompts (B, T, text_dim)
    null_text: torch.Tensor          # empty prompts
    conditioning: dict               # what an image-to-video network is told of first frames, by the names of model.Context
    slots: torch.Tensor              # (B,) places in the global batch
    chunks: tuple
    start: int


def train(c: Config) -> Path:
    """Train (or go on with) one stage; returns its folder. Raises ValueError with what to do when it cannot, OSError for what
    cannot be read or written."""
    stopping = distributed.StopSignal()
    try:
        return train_until(stopping, c)
    finally:
        stopping.restore()


def train_until(stopping: distributed.StopSignal, c: Config) -> Path:
    world = distributed.start(c.device)
    run, stage = Path(c.run_dir), Path(c.run_dir) / c.stage
    before = None if c.base else STAGE_BEFORE.get(c.stage)
    origin = run / before if before else c.base              # what the stage starts from; nothing: fresh weights
    say = tqdm.write if world.is_main else (lambda text: None)

    def generator(*keys) -> torch.Generator:
        return distributed.generator(c.seed, *keys)

    def noise(shape, *keys, slots) -> torch.Tensor:
        return distributed.noise(shape, c.seed, *keys, slots=slots).to(world.device)

    # --- the run folder: start, resume, or find the stage finished
    needed = () if c.base else STAGES[:STAGES.index(c.stage)]
    for name in needed:
        if not (run / name / "model.safetensors").exists():
            raise ValueError(f"stage {c.stage} needs stage {name}, which is not finished in {run}. First run: "
                             f"python train.py --stage {name} --run-dir {run}")
    if c.base and not Path(c.base).exists():
        raise ValueError(f"--base {c.base}: not there. First run: python train.py --stage pretrain --data {c.data} (or start from "
                         f"fresh weights with --base none)")
    per_step = world.size * (c.micro_batch or max(1, c.batch_size // world.size))
    if c.batch_size % per_step:
        raise ValueError(f"--batch-size {c.batch_size} is not a multiple of {per_step}: {world.size} processes times "
                         f"{per_step // world.size} samples (--micro-batch)")
    micro_batch, micro_steps = per_step // world.size, c.batch_size // per_step
    cli.check_folder(stage, "--run-dir")
    built_on = {name: json.loads((run / name / "config.json").read_text())["config"] for name in needed}
    before_now = json.loads((stage / "config.json").read_text()) if (stage / "config.json").exists() else None
    # What it has begun afresh it goes on with, when torchrun or the scheduler starts it once more.
    fresh = distributed.on_main(lambda: c.fresh and not distributed.is_restart((before_now or {}).get("launch")), world)
    if before_now and not fresh:
        if change := change_between(before_now["config"], dataclasses.asdict(c)):
            raise ValueError(f"{stage} was started with {change}: use --fresh to start it anew, or another --run-dir")
        for name, now in built_on.items():
            if change := change_between(before_now.get("built_on", {}).get(name, {}), now):
                raise ValueError(f"{stage} was started on a stage {name} with {change}, which was trained anew since: use --fresh to "
                                 f"start this stage anew, too")

    # --- data: latents and prompt features, from shards or made of clips and captions on the fly
    record, codec_file = {}, stage / "codec.safetensors"
    try:
        source = data.open_data(c.data, c.frames, c.size)
        if not isinstance(source, data.Shards):
            # Fitted once, by the first stage.
            places = [Path(origin or "none") / codec_file.name]
            places += [codec_file] if codec_file.exists() and not fresh else []
            codec = (encoders.PatchPCA.from_state(load_file(places[-1])) if places[-1].exists() else
                     encoders.PatchPCA.fit(source.clips(range(1024), seed=c.seed)[0], PRESETS[c.preset].channels))
            words = encoders.Words.of(source.captions, PRESETS[c.preset].text_dim)
            source = encoders.Encoded(source, codec, words)
            record = {"vocabulary": words.vocabulary}
    except ValueError as error:
        raise ValueError(f"--data {c.data}: {error}") from None
    latent_shape = source.latent_shape

    all_chunks = tuple(cli.positive_ints(c.chunks)) if c.causal else latent_shape[:1]
    if sum(all_chunks) != latent_shape[0]:
        raise ValueError(f"--chunks {c.chunks}: add up to {sum(all_chunks)}, but clips have {latent_shape[0]} latent frames")
    full_chunks = c.full_chunks or len(all_chunks)

    def draw(step: int, slots: torch.Tensor) -> Batch:
        """The samples of an update that sit at `slots`; each depends on (seed, step, slot) only.

        Half of the updates take a clip's first full chunks, half a random number of chunks from there up, the same on
        every rank; all but the last `full_chunks` are compressed context (METHOD section 7).
        """
        coin, count = torch.rand(2, generator=generator(step, "chunks")).tolist()
        extra = len(all_chunks) - full_chunks
        chunks = all_chunks[:full_chunks + (int(count * (extra + 1)) if extra > 0 and coin < 0.5 else 0)]
        start, stop = sum(chunks[:-full_chunks]), sum(chunks)
        x, text, conditioning = source.draw((step * c.batch_size + slots).tolist(), seed=c.seed)
        n = noise(latent_shape, step, "noise", slots=slots)
        tensors = x[:, :stop], n[:, start:stop], text, source.null_text.expand_as(text)
        conditioning = {name: conditioning[name].to(world.device) for name in wanted}
        return Batch(*(tensor.to(world.device) for tensor in tensors), conditioning, slots, chunks, start)

    def context(net, batch: Batch, text, z_0=None) -> Context:
        """The prompt and the clean chunks that each trained chunk may see: the data's, or the samples z_0."""
        x = batch.x if z_0 is None else torch.cat([batch.x[:, :batch.start], z_0.detach()], 1)
        return teacher_forced(net, x, Context(text, **batch.conditioning), batch.chunks, c.full_chunks)

    def drop_text(step: int, batch: Batch):
        """Which prompts are dropped (B,), a fraction text_drop, and the prompts with the empty one in their place."""
        coin = torch.rand(c.batch_size, generator=generator(step, "drop"))[batch.slots]
        dropped = (coin < c.text_drop).to(world.device)
        return dropped, torch.where(dropped[:, None, None], batch.null_text, batch.text)

    # --- networks: each stage starts from the one before
    compressed = c.causal and c.full_chunks > 0

    def network(config, state, origin, adapters: dict | None = None):
        """A network of these weights; or, as a dict, one for each of the named adapters, which share the weights."""
        with torch.device("meta"):                       # no rank ever holds the whole network: shards, then weights
            net = FlowMapDiT(config)
            if adapters:                                 # frozen weights need no fp32 master
                net = net.requires_grad_(False).to(torch.bfloat16 if c.bf16 else torch.float32)
            for name in adapters or ():
                lora.add_adapter(net, name, c.lora_rank, c.lora_alpha)
        for block in net.blocks:
            block.checkpointing = c.checkpointing
            if c.compile:                                # a block is called with many adapters, pasts, and with and without gradient
                torch._dynamo.config.recompile_limit = 64
                block.compile()
        net = distributed.shard(net, world, c.bf16, c.shard).to_empty(device=world.device)
        checkpoint.load_weights(net, state, origin)
        if not adapters:
            return net
        nets = {name: lora.Adapted(net, name) for name in adapters}
        for name, (tensors, source) in adapters.items():
            if tensors is None:
                tensors = Tensors(lora.fresh_adapter(nets[name], state, partial(distributed.generator, c.seed, "init")))
            checkpoint.load_weights(nets[name], tensors, source)
        return nets

    def adapter_of(stage, base: str) -> tuple:
        """The adapter of `base` that a stage ended with, and where it is from; (None, ...) if it ended with `base` itself."""
        config, tensors, adapter = checkpoint.load_model(stage)
        if adapter and (adapter["rank"], adapter["alpha"]) != (c.lora_rank, c.lora_alpha):
            raise ValueError(f"{stage} ended with an adapter of rank {adapter['rank']} and alpha {adapter['alpha']:g}, not --lora-rank "
                             f"{c.lora_rank} --lora-alpha {c.lora_alpha:g}: leave them out, or train anew from stage pretrain")
        if Path(adapter["base"] if adapter else stage).resolve() != Path(base).resolve():
            raise ValueError(f"{stage} is not an adapter of {base}, which this stage adapts: train all weights with --lora-rank 0")
        if not adapter:
            return None, stage
        return (tensors if config.second_time else wan.as_flow_map(tensors)), stage

    if c.lora_rank:
        # The weights that the stage before adapted, or those that it ended with.
        adapter = checkpoint.load_model(origin)[2] if before else None
        base = adapter["base"] if adapter else str(origin)
        if not Path(base).exists():
            raise ValueError(f"{origin} adapts the weights {base}, which are not there: put them there again, or run where they are")
        adapters = {"student": adapter_of(origin, base) if before else (None, origin)}
        if c.stage == "distill":
            adapters |= {name: adapter_of(run / "pretrain", base) for name in ("teacher", "fake")}
        origin = base
    if not origin:
        origin, config = "fresh weights", dataclasses.replace(PRESETS[c.preset], second_time=False, compressed=compressed)
        state = FlowMapDiT(config).init_weights(distributed.generator(c.seed, "init")).state_dict()
    else:
        if c.stage == "pretrain" and wan.load(origin)[0].second_time:
            raise ValueError(f"--base {origin} is a flow map already, and a teacher knows one time only: go on with it by --stage "
                             f"flowmap --base {origin}, or give flow-matching weights")
        config, state = wan.load(origin, second_time=c.stage != "pretrain", compressed=compressed)
    wanted = ["condition"] * (config.image_channels > 0) + ["image"] * (config.image_dim > 0)
    if not set(wanted) <= set(source.conditioning):
        raise ValueError(f"{origin} is an image-to-video network, and --data {c.data} has no first frames: make shards with `python "
                         f"data.py encode --base` and the pipeline folder of these weights")
    source.conditioning = wanted                              # nothing else is read
    if config.channels != latent_shape[1] or config.text_dim != source.null_text.shape[1]:
        raise ValueError(f"{origin} works on {config.channels} channels and prompts of width {config.text_dim}, but --data "
                         f"{c.data} has {latent_shape[1]} and {source.null_text.shape[1]}")
    if c.lora_rank:
        nets = network(config, state, origin, adapters)
    else:
        nets = {"student": network(config, state, origin)}
        if c.stage == "distill":
            plain, state = wan.load(run / "pretrain", second_time=False, compressed=compressed)
            nets |= {name: network(plain, state, run / "pretrain") for name in ("teacher", "fake")}
    student_net, teacher, fake_net = nets["student"], nets.get("teacher"), nets.get("fake")
    parts = {"student": checkpoint.trainable(student_net, c.lr, (c.beta1, c.beta2), c.weight_decay, with_ema=True)}
    if c.stage == "distill":
        teacher.requires_grad_(False)
        parts["fake"] = checkpoint.trainable(fake_net, c.fake_lr, (c.beta1, c.beta2), c.weight_decay, with_ema=False)
    student = parts["student"]

    # --- everything is in order: the folder, and what is saved in it
    if world.is_main:
        if fresh:
            shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True, exist_ok=True)
        if record and not codec_file.exists():
            save_file(source.codec.state(), codec_file.with_suffix(".partial"))
            codec_file.with_suffix(".partial").rename(codec_file)
    barrier(world)
    if record:                                           # all ranks go on with what one has fitted
        source.codec = encoders.PatchPCA.from_state(load_file(codec_file))
    counters = checkpoint.load_checkpoint(stage, parts, world, say)
    first, skipped = counters.get("step", 0), counters.get("skipped", 0)
    if first >= c.steps and distributed.on_main((stage / "model.safetensors").exists, world):
        say(f"stage {c.stage} is finished in {stage} ({first} updates); --steps {2 * first} would go on, --fresh train it anew")
        return stage
    if world.is_main:
        record |= {"config": dataclasses.asdict(c), "git": git_revision(), "torch": torch.__version__,
                   "latent_shape": latent_shape, "chunks": all_chunks, "text_length": len(source.null_text), "built_on": built_on,
                   "launch": distributed.launch()}
        data.write_text(stage / "config.json", json.dumps(record, indent=1))
        log_path = stage / "log.jsonl"
        rows = log_path.read_text().splitlines(keepends=True) if log_path.exists() else []
        # Without the rows of updates that are made again, and a last one that was cut short.
        data.write_text(log_path, "".join(row for row in rows if row.endswith("}\n") and json.loads(row)["step"] <= first))
        if first:
            say(f"stage {c.stage}: resumed from update {first} of {c.steps} in {stage}")

    # --- the losses of a micro-batch; each calls backward itself and adds to the sums that are logged
    roles = ("err_flow", "err_free", "err_consistency")
    log = distributed.Sums({"pretrain": ("loss",), "flowmap": ("loss", *roles),
                            "distill": ("loss", *roles, "dmd", "dmd_gradient", "fake")}[c.stage])
    # FSDP averages gradients over ranks; the losses are sums over the micro-batch divided by the global batch.
    per_sample = world.size / c.batch_size

    def backward(loss: torch.Tensor, net, last: bool) -> None:
        distributed.sync_gradients(net, last)
        (loss.sum() * per_sample).backward()

    def pretrain_loss(step: int, batch: Batch, last: bool) -> None:
        t = flowmap.logit_normal_time(generator(step, "time"), c.batch_size, c.shift)
        u = flowmap.conditioned(student_net, context(student_net, batch, drop_text(step, batch)[1]))
        err = flowmap.flow_matching_error(u, batch.x[:, batch.start:], batch.n, t[batch.slots].to(world.device))
        log.add("loss", err)
        backward(err, student_net, last)

    def flow_map_loss(step: int, batch: Batch, last: bool, flow_errors: list, factor: float = 1.0) -> None:
        """flow_errors: running [sum, count] of the r = t errors of this update. The r = t samples come first in the
        global batch, so it is complete by the time that the first r < t sample needs it."""
        t_all, r_all = flowmap.flow_map_times(generator(step, "time"), c.batch_size, c.shift, c.flow_fraction, c.consistency_fraction)
        micro = slice(int(batch.slots[0]) - world.rank, int(batch.slots[0]) - world.rank + per_step)
        t, r = t_all[batch.slots].to(world.device), r_all[batch.slots].to(world.device)
        dropped, text = drop_text(step, batch)
        with torch.no_grad():
            null_context = context(student_net, batch, batch.null_text) if c.guidance != 1 else None
        err = meanflow.meanflow_error(student_net, batch.x[:, batch.start:], batch.n, t, r,
                                      context(student_net, batch, text), null_context, dropped,
                                      c.guidance, c.epsilon, c.derivative,
                                      all_ranks_differentiate=bool((r_all[micro] < t_all[micro]).any()))
        del null_context                                  # keys and values of a whole clip that the backward pass does not need
        flow, detached = r == t, err.detach()
        sums = distributed.sum_over_ranks(detached[flow].sum().item(), int(flow.sum()), world=world)
        flow_errors[0] += sums[0]
        flow_errors[1] += sums[1]
        # Without an r = t sample (a global batch of 1 may have none) 1 sets the scale, about the error of u = 0.
        mu = flow_errors[0] / flow_errors[1] if flow_errors[1] else 1.0
        weight = flowmap.time_weight(t, c.time_weight, c.shift)
        loss = meanflow.balanced_loss(err, t, r, weight, mu, c.weight_before_balance)
        for name, rows in (("err_flow", flow), ("err_free", ~flow & (r > 0)), ("err_consistency", ~flow & (r == 0))):
            log.add(name, detached[rows])
        log.add("loss", loss)
        backward(factor * loss, student_net, last)

    def rollout(step: int, batch: Batch) -> torch.Tensor:
        """Samples z_0 of the student; N and k are the same on every rank, the noise is not."""
        draws, budgets = generator(step, "rollout"), cli.positive_ints(c.budgets)
        steps = budgets[int(torch.randint(len(budgets), (1,), generator=draws))]
        k = int(torch.randint(steps, (1,), generator=draws))
        grid = flowmap.time_grid(steps, c.shift)
        z_1 = noise(batch.n.shape[1:], step, "rollout", slots=batch.slots)
        renoise = distributed.noise_stream(c.seed, step, "renoise", slots=batch.slots)

        def jump(z, context):
            u = flowmap.conditioned(student_net, context)
            if c.rollout == "flow-map":
                return backward_sim.flow_map_simulation(u, z, grid, k)
            return backward_sim.consistency_simulation(u, z, grid, renoise)

        with torch.no_grad():                             # the compressed context is the data's
            new, told = batch.chunks[-full_chunks:], Context(batch.text, **batch.conditioning)
            old = dataclasses.replace(told, chunks=batch.chunks[:-full_chunks])
            cache = student_net.encode(batch.x[:, :batch.start], old, compressed=True) if batch.start else ()
        chunks = backward_sim.chunk_by_chunk(jump, lambda context, z_0: append_chunk(student_net, context, z_0, full_chunks=0),
                                             dataclasses.replace(told, cache=cache, start=batch.start), z_1, new)
        return torch.cat(list(chunks), 1)

    def dmd_student_loss(step: int, batch: Batch, last: bool) -> torch.Tensor:
        z_0 = rollout(step, batch)
        tau = torch.rand(c.batch_size, generator=generator(step, "tau"))[batch.slots]
        n = noise(z_0.shape[1:], step, "dmd", slots=batch.slots)

        def score(net, text):
            # The clean chunks are encoded for the call and freed after it: three contexts at once are large.
            return lambda z, t, r: net(z, t, r, context(net, batch, text, z_0))
        gradient = dmd.dmd_gradient(z_0, n, flowmap.shift_time(tau, c.shift).to(world.device), fake=score(fake_net, batch.text), real=
                                    flowmap.guided(score(teacher, batch.text), score(teacher, batch.null_text), c.real_guidance))
        loss = dmd.dmd_loss(z_0, gradient)
        log.add("dmd", loss)
        log.add("dmd_gradient", gradient.flatten(1).norm(dim=1))
        backward(loss, student_net, last)
        return z_0.detach()

    def fake_loss(step: int, batch: Batch, z_0: torch.Tensor, last: bool) -> None:
        if c.fake_rollout == "fresh":
            with torch.no_grad():
                z_0 = rollout(-1 - step, batch)                   # another key: fresh noise, N and k
        tau = flowmap.logit_normal_time(generator(step, "fake"), c.batch_size, c.shift)
        n = noise(z_0.shape[1:], step, "fake", slots=batch.slots)
        u = flowmap.conditioned(fake_net, context(fake_net, batch, batch.text, z_0))
        err = dmd.fake_score_error(u, z_0, n, tau[batch.slots].to(world.device))
        log.add("fake", err)
        backward(err, fake_net, last)

    def update(part: checkpoint.Trainable, step: int, peak: float) -> float:
        """Clip and step; returns the gradient norm. A non-finite gradient changes nothing."""
        norm = torch.nn.utils.clip_grad_norm_(part.network.parameters(), c.clip)
        norm = checkpoint.whole(norm).item()
        if math.isfinite(norm):
            part.optimizer.param_groups[0]["lr"] = learning_rate(c, step, peak)
            part.optimizer.step()
        part.optimizer.zero_grad(set_to_none=True)
        return norm

    # --- the loop
    bar = tqdm(total=c.steps, initial=first, desc=f"{c.stage:8}", disable=not world.is_main, mininterval=1.0,
               dynamic_ncols=True)
    skips_in_a_row, started = 0, time.time()
    first_draw = 10**7 * STAGES.index(c.stage)           # no stage draws the clips, noise and times that another drew
    for step in range(first, c.steps):
        flow_errors, rollouts, norms = [0.0, 0.0], [], {}
        for micro_step in range(micro_steps):
            last = micro_step == micro_steps - 1
            batch = draw(first_draw + step, distributed.slots(world, micro_batch, micro_step))
            if c.stage == "pretrain":
                pretrain_loss(first_draw + step, batch, last)
            elif c.stage == "flowmap":
                flow_map_loss(first_draw + step, batch, last, flow_errors)
            else:
                rollouts.append((batch, dmd_student_loss(first_draw + step, batch, last and not c.cotrain)))
                if c.cotrain:
                    flow_map_loss(first_draw + step, batch, last, flow_errors, c.cotrain)
        norms["grad_norm"] = update(student, step, c.lr)
        if math.isfinite(norms["grad_norm"]):
            student.update_ema(c.ema_decay if step >= c.ema_start else 0.0)
        if c.stage == "distill":
            for micro_step, (batch, z_0) in enumerate(rollouts):
                fake_loss(first_draw + step, batch, z_0, last=micro_step == micro_steps - 1)
            norms["fake_grad_norm"] = update(parts["fake"], step, c.fake_lr)

        bad = not all(map(math.isfinite, norms.values()))
        skipped, skips_in_a_row = skipped + bad, skips_in_a_row + 1 if bad else 0
        if skips_in_a_row >= c.max_skips:
            raise SystemExit(f"stopped at update {step}: {skips_in_a_row} non-finite gradients in a row ({norms}). The "
                             f"last checkpoint is kept in {stage}; try a lower --lr, then run the same command again")
        stop = stopping.on_any_rank(world)
        save = (step + 1) % c.save_every == 0 or step + 1 == c.steps or stop
        if (step + 1) % c.log_every == 0 or save:         # with a checkpoint too: its resume starts with empty sums
            row = {"step": step + 1, **log.means(world), **norms, "lr": learning_rate(c, step, c.lr), "skipped": skipped,
                   "seconds": round(time.time() - started, 2)}
            if world.is_main:
                with open(log_path, "a") as file:
                    file.write(json.dumps(row) + "\n")
                bar.set_postfix({name: f"{row[name]:.3f}" for name in ("loss", "dmd", "fake") if name in row}, refresh=False)
        bar.update()
        if save:
            checkpoint.save_checkpoint(stage, step + 1, parts, {"skipped": skipped}, world)
        if stop and step + 1 < c.steps:
            bar.close()
            say(f"stopped by a signal after update {step + 1} of {c.steps}, which is saved. To go on (under torchrun with as many "
                f"processes, or others that divide the batch):\n    python train.py --stage {c.stage} --run-dir {run}")
            return stage
    bar.close()
    inside = Path(origin).absolute().is_relative_to(run.absolute())
    base = os.path.relpath(origin, stage) if inside else os.path.abspath(origin)
    adapter = {"rank": c.lora_rank, "alpha": c.lora_alpha, "base": base, "targets": [*lora.TARGETS, *lora.REPLACED]}
    checkpoint.save_model(stage, student.ema, config, world.is_main, adapter if c.lora_rank else None)
    barrier(world)
    say(f"stage {c.stage}: finished, {stage / 'model.safetensors'}")
    return stage


def git_revision() -> str:
    """The commit that ran, with '+' when files differ from it; 'unknown' outside a git checkout."""
    try:
        return subprocess.run(["git", "describe", "--always", "--abbrev=40", "--dirty=+"], capture_output=True, text=True,
                              check=True, cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(argv=None) -> None:
    train(parse_config(argv))


if __name__ == "__main__":
    cli.run(main)
    distributed.stop()
