"""Settings of training: the flags of train.py, the recipes, and what a stage takes over.

A flag that is given wins; then what the stage was begun with; then what the stage before hands on;
then the recipe of the preset; then the defaults here.
"""
import math
import os
import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import cli
from cli import flag

STAGES = ("pretrain", "flowmap", "distill")
# Names that flags accept. They stand here, too, as importing what has them would make --help wait
# for torch.
PRESETS = ("tiny", "toy", "wan-1.3b", "wan-5b", "wan-14b")
TOY_SETS = ("shapes", "loop", "digits")       # toys.SETS
DERIVATIVES = ("finite-difference", "jvp")
TIME_EMBEDDINGS = ("interpolated", "added")
VELOCITIES = ("data", "teacher")
TIME_WEIGHTS = ("beta", "uniform", "normal")
FLOW_TIMES = ("larger", "either")
SIMULATIONS = ("flow-map", "consistency")
SAMPLERS = ("euler", "consistency")


@dataclass
class Config:
    # --- the run
    stage: str = flag("pretrain", "which stage to train", choices=STAGES)
    preset: str = flag("toy", "size of the network and its recipe", choices=PRESETS)
    data: str = flag("shapes", "toy set 'shapes', 'loop' (shapes that come back in) or 'digits', a "
                     "folder of mp4/gif clips with captions, or a folder of shards")
    run_dir: str = flag("", "folder of the run; stages are folders in it (default "
                        "runs/PRESET-DATA)")
    frames: int = flag(8, "frames of a clip")
    size: int = flag(16, "height and width of a clip in pixels")
    seed: int = flag(0, "seed of weights, data order, noise and times")
    base: str = flag("", "weights to start from, a finished stage or Wan2.1 (see wan.py): of "
                     "pretrain in place of fresh ones; of flowmap in place of stage pretrain, a "
                     "teacher (of distill, too, where the run has none), or a flow map such as "
                     "AnyFlow's to go on with (default none)")
    fresh: bool = flag(False, "delete what this stage has saved and start anew, not resume")
    # --- chunk by chunk
    causal: bool = flag(False, "flowmap, distill: a student that generates chunk by chunk, each "
                        "one seeing the clean ones before it; it starts from the same "
                        "bidirectional teacher, in folders causal-flowmap and causal-distill")
    chunks: str = flag("", "causal: latent frames of each chunk; the toy codec makes one of two "
                       "pixel frames (default one each, and 1,3,3,3,3,3,3,2 for Wan)")
    full_chunks: int = flag(3, "causal: how many chunks are full, the newest included; older ones "
                            "are compressed. 0: all")
    # --- how it is computed
    device: str = flag("auto", "auto takes a GPU if there is one", choices=("auto", "cpu", "cuda"))
    lora_rank: int = flag(0, "train low-rank adapters of this rank on the frozen weights that the "
                          "stage starts from; in distill, student, teacher and fake score are then "
                          "adapters of one base. 0: train all weights")
    lora_alpha: float = flag(0.0, "an adapter is scaled by alpha / rank; 0: the rank")
    bf16: bool = flag(False, "multiply in bf16, with fp32 master weights; for GPUs")
    shard: str = flag("all", "FSDP2 spreads the weights over all processes, or over those of each "
                      "node, with a copy a node: less traffic between nodes, more memory",
                      choices=("all", "node"))
    compile: bool = flag(False, "torch.compile each block: faster on GPUs, after minutes")
    checkpointing: int = flag(0, "keep no activations inside a block, compute them again: less "
                              "memory, a third more time. A number N: only of every Nth block; 0, "
                              "or --no-checkpointing: of none", alone=1)
    deterministic: bool = flag(False, "GPUs: only algorithms that give the same bits each time, "
                               "so that a resumed run does; slower")
    # --- optimisation
    steps: int = flag(1000, "updates of the network")
    batch_size: int = flag(32, "samples of an update, over all processes and accumulation steps")
    micro_batch: int = flag(0, "samples a process takes at once; 0: no gradient accumulation")
    lr: float = flag(1e-3, "peak learning rate of AdamW")
    lr_end: float = flag(1.0, "last learning rate as a fraction of the peak, reached by a cosine; "
                         "1 keeps it constant")
    warmup: int = flag(50, "updates over which the learning rate rises")
    beta1: float = flag(0.9, "AdamW's first-moment decay; 0 for distill, whose gradient changes as "
                        "the student moves")
    beta2: float = flag(0.95, "AdamW's second-moment decay; short, so that it follows the losses' "
                        "changing scale")
    weight_decay: float = flag(0.0, "none, as in the released recipe")
    clip: float = flag(1.0, "gradients are scaled down to this norm")
    ema_decay: float = flag(0.99, "decay of the EMA of the weights, which is what is sampled")
    ema_start: int = flag(100, "update at which the EMA starts, as a copy of the weights")
    text_drop: float = flag(0.1, "fraction of prompts replaced by the empty one; guidance needs it")
    # --- the forward loss, of flowmap and of distill's co-training
    shift: float = flag(5.0, "timestep shift s: more of training and sampling goes to high noise; "
                        "5 is Wan's")
    guidance: float = flag(2.0, "guidance scale fused into the flow map; 1 is none, and "
                           "u_0 + w (u_c - u_0) in general")
    time_embedding: str = flag("interpolated", "flowmap: how the second time enters: (1 - g) E(t) "
                               "+ g E'(r), or E(t) + E'(t - r) with an E' that starts at zero (not "
                               "with adapters)", choices=TIME_EMBEDDINGS)
    velocity: str = flag("data", "v of the forward loss: the data's n - x, or the frozen "
                         "teacher's at (z_t, t), guided, which has no noise (not with --causal: "
                         "the teacher sees whole clips)", choices=VELOCITIES)
    epsilon: float = flag(0.005, "half width of the finite difference, in [0, 1] time: so small "
                          "that d u / d t is constant across it, and large beside rounding")
    derivative: str = flag("finite-difference", "how dF/dt is taken", choices=DERIVATIVES)
    time_weight: str = flag("beta", "density w(t) of the forward loss", choices=TIME_WEIGHTS)
    balance: float = flag(0.0, "scale b of the adaptive balance: an error with r < t is scaled by "
                          "b / (error + b), a square well below b and at most b. 0: by the mean "
                          "error with r = t, the paper's, which vanishes with --velocity teacher")
    tangent_warmup: int = flag(0, "flowmap: updates over which the target's dF/dt grows from 0 to "
                               "its full size; large gaps learn v first, which keeps them from "
                               "wrong maps that satisfy the identity. 0 to go on with a flow map")
    weight_before_balance: bool = flag(False, "the released order, in which w(t) cancels for r < t")
    flow_fraction: float = flag(0.5, "fraction of the batch with r = t")
    flow_times: str = flag("larger", "how t is drawn where r = t: the larger of two draws, as "
                           "where r < t, or either one, which is small more often: many sampling "
                           "steps need that", choices=FLOW_TIMES)
    consistency_fraction: float = flag(0.25, "fraction with r = 0; 1 - flow fraction makes a "
                                       "consistency model")
    bidirectional_fraction: float = flag(0.0, "causal flowmap: fraction of updates that add flow "
                                         "matching on the whole clip as one chunk")
    # --- distill
    rollout: str = flag("flow-map", "backward simulation of distill", choices=SIMULATIONS)
    budgets: str = flag("2,4,8,16,50", "step counts N of a rollout; one is drawn an update")
    real_guidance: float = flag(2.0, "guidance scale of the teacher in DMD: 4 for the paper's "
                                "'cond + 3 (cond - uncond)'. With the scale that is fused into the "
                                "flow map, small and large steps aim at the same clips (default "
                                "that one; 4 for Wan where it is 3)")
    cotrain: float = flag(1.0, "factor of the forward flow-map loss in distill; it keeps the "
                          "any-step map alive")
    fake_lr: float = flag(1e-3, "peak learning rate of the fake score")
    fake_rollout: str = flag("shared", "the fake score trains on the student's rollout of the same "
                             "update, or on a fresh one of the updated student",
                             choices=("shared", "fresh"))
    # --- bookkeeping
    save_every: int = flag(200, "updates between checkpoints")
    log_every: int = flag(10, "updates between rows of log.jsonl")
    max_skips: int = flag(5, "stop after this many updates in a row with a non-finite gradient")

    @property
    def either_share(self) -> float:
        """Share of the batch whose t is either of the two draws, not the larger."""
        return self.flow_fraction if self.flow_times == "either" else 0.0

    @property
    def forward_settings(self):
        from meanflow import Settings  # here, as it imports torch
        fused = self.guidance if self.velocity == "data" else 1.0    # the teacher's is guided
        return Settings(fused, self.epsilon, self.derivative)


# A later stage takes these over from the stage before it, unless a flag says otherwise.
OF_THE_RUN = ("preset", "data", "frames", "size", "seed", "shift", "guidance", "text_drop",
              "lora_rank", "lora_alpha", "bf16")
# Distill co-trains with the forward loss of flowmap, on the same chunks.
OF_THE_FLOW_MAP = ("chunks", "full_chunks", "velocity", "epsilon", "derivative", "time_weight",
                   "balance", "weight_before_balance", "flow_fraction", "flow_times",
                   "consistency_fraction")
# Of one stage alone.
ONLY_IN = {"tangent_warmup": "flowmap", "bidirectional_fraction": "flowmap",
           **dict.fromkeys(("rollout", "budgets", "cotrain", "real_guidance", "fake_lr",
                            "fake_rollout"), "distill")}
INHERITED = {"pretrain": OF_THE_RUN, "flowmap": OF_THE_RUN + OF_THE_FLOW_MAP}
# These may change when a run is resumed.
CHANGEABLE = ("steps", "lr", "fake_lr", "run_dir", "micro_batch", "device", "checkpointing",
              "shard", "compile", "deterministic", "fresh", "save_every", "log_every", "max_skips")

# The released recipe, for Wan2.1.
COMMON = dict(bf16=True, checkpointing=1, lora_rank=256, micro_batch=1, save_every=20, guidance=3.0)
FORWARD = dict(COMMON, steps=6000, lr=5e-5, warmup=1000, ema_decay=0.999, ema_start=1000)
WAN = {
    "pretrain": FORWARD,
    "flowmap": FORWARD,
    "distill": dict(COMMON, steps=1000, lr=2e-6, fake_lr=2e-6, warmup=0, beta1=0.0, beta2=0.999,
                    ema_start=200, real_guidance=4.0),
}
WAN_14B = {
    "pretrain": WAN["pretrain"] | dict(batch_size=16, steps=4000),
    "flowmap": WAN["flowmap"] | dict(batch_size=16, steps=4000),
    "distill": WAN["distill"] | dict(batch_size=16),
}
RELEASED_CHUNKS = "1,3,3,3,3,3,3,2"               # of AnyFlow-FAR: 21 latent frames
WAN_CAUSAL = {
    "flowmap": dict(chunks=RELEASED_CHUNKS, bidirectional_fraction=0.1),
    "distill": dict(chunks=RELEASED_CHUNKS),
}

# The toy set is learned at guidance 1, where data, teacher and DMD aim at the same distribution.
TOY = dict(batch_size=16, guidance=1.0)

# What differs from the defaults, by preset and stage. LOG.md says why where it was measured.
RECIPES = {
    "wan-1.3b": WAN,
    "wan-5b": WAN,
    "wan-14b": WAN_14B,
    "toy": {
        "pretrain": dict(TOY, steps=12000, lr=2e-3, lr_end=0.05, ema_start=200),
        "flowmap": dict(TOY, steps=2200, lr=3e-4, lr_end=0.05, tangent_warmup=500,
                        flow_times="either"),
        "distill": dict(TOY, steps=990, lr=3e-4, lr_end=0.1, beta1=0.0, beta2=0.999, warmup=10,
                        ema_start=50, budgets="1,1,2,4,8,16,50", cotrain=4.0),
    },
    "tiny": {  # seconds a stage: for tests and smoke runs
        "pretrain": dict(steps=20, batch_size=8, warmup=5, ema_start=5, save_every=10),
        "flowmap": dict(steps=12, batch_size=8, warmup=5, ema_start=5, save_every=6),
        "distill": dict(steps=6, batch_size=8, beta1=0.0, beta2=0.999, warmup=2, ema_start=2,
                        save_every=3),
    },
}
# What differs again with --causal.
CAUSAL_RECIPES = {
    "wan-1.3b": WAN_CAUSAL,
    "wan-5b": WAN_CAUSAL,
    "wan-14b": WAN_CAUSAL,
    "toy": {
        "flowmap": dict(steps=1500, lr=1e-3, tangent_warmup=0),
        "distill": dict(steps=200),
    },
    "tiny": {},
}


def recipe(preset: str, stage: str, causal: bool) -> dict:
    """What a stage of a preset is trained with, where it differs from the defaults."""
    return RECIPES[preset][stage] | (CAUSAL_RECIPES[preset].get(stage, {}) if causal else {})


def with_recipe(stage: str, preset: str, causal: bool, given: dict) -> dict:
    """What differs from the defaults: the recipe, and over it what is given. Unless it is given,
    DMD's teacher has the guidance that is fused into the flow map; where that is the recipe's, what
    the recipe says."""
    own = recipe(preset, stage, causal)
    found = own | given
    fused = found.get("guidance", Config.guidance)
    unusual = fused != own.get("guidance", Config.guidance)
    if stage == "distill" and (unusual or "real_guidance" not in own):
        found["real_guidance"] = given.get("real_guidance", fused)
    return found


def stage_before(stage: str) -> str:
    """The stage that comes before, or ''."""
    return {"flowmap": "pretrain", "distill": "flowmap"}.get(stage, "")


def folder_of(stage: str, causal: bool) -> str:
    """The folder of a stage in the run's. One teacher serves both forms of the student."""
    return f"causal-{stage}" if causal and stage != "pretrain" else stage


def command(stage: str, causal: bool, run_dir) -> str:
    """The command that trains a stage, or goes on with it."""
    form = "--causal " if causal and stage != "pretrain" else ""
    return f"python train.py {form}--stage {stage} --run-dir {shlex.quote(str(run_dir))}"


def default_text(field) -> str:
    """The toy recipe's values by stage; of what is handed on, that of its first stage."""
    name = field.name
    stages = ("pretrain",) if name in OF_THE_RUN else STAGES
    stages = ("flowmap",) if name in OF_THE_FLOW_MAP else stages
    stages = (ONLY_IN[name],) if name in ONLY_IN else stages
    found = {stage: recipe("toy", stage, False).get(name, field.default) for stage in stages}
    found |= {f"causal {stage}": settings[name]
              for stage, settings in CAUSAL_RECIPES["toy"].items() if name in settings}
    if len(set(found.values())) == 1:
        return f"default {found[stages[0]]}"
    return "default " + ", ".join(f"{stage} {value}" for stage, value in found.items())


def parse_config(argv=None) -> Config:
    parser = cli.Parser("Train a stage of an any-step video model.",
                        "python train.py --stage flowmap --steps 1800")
    parser.add_config(Config, default_text)
    given = vars(parser.parse(argv))
    stage = given.get("stage", Config.stage)
    given["run_dir"] = given.get("run_dir") or default_run(given)
    causal = given.get("causal", False)
    values = taken_over(Path(given["run_dir"]), stage, causal, given.get("fresh", False)) | given
    if "lora_rank" in given and "lora_alpha" not in given:
        values.pop("lora_alpha", None)               # it goes with the rank
    c = Config(**with_recipe(stage, values.get("preset", Config.preset), causal, values))
    c.base = "" if c.base == "none" else c.base
    c.data = clips_at(c.data)
    check(c, given, parser)
    check_base(c, given, parser)
    c.lora_alpha = c.lora_alpha or float(c.lora_rank)
    return c


def clips_at(data: str) -> str:
    """--data as it is recorded: clips/ is clips, but ./digits is a folder, not the toy set."""
    path = os.path.normpath(data) if data.strip() else data
    return os.path.abspath(path) if path in TOY_SETS and path != data else path


def default_run(given: dict) -> str:
    return f"runs/{given.get('preset', Config.preset)}-{Path(given.get('data', Config.data)).name}"


def taken_over(run: Path, stage: str, causal: bool, fresh: bool) -> dict:
    """Settings of the stage, if it was begun; else those that the stage before hands on, or the
    teacher that is trained anew."""
    own = {} if fresh else record_of(run / folder_of(stage, causal))
    if own:                                          # a setting newer than it was at its default
        found = asdict(Config()) | own.get("config", {})
        return {field.name: found[field.name] for field in fields(Config) if field.name != "fresh"}
    before = stage_before(stage) or stage            # a teacher trained anew is of the same clips
    try:
        found = record_of(run / folder_of(before, causal)).get("config", {})
    except ValueError:
        if before != stage:
            raise
        found = {}
    return {name: found[name] for name in INHERITED.get(before, ()) if name in found}


def finished(stage) -> bool:
    """Whether a stage has its final weights."""
    return (Path(stage) / "model.safetensors").exists()


def record_of(stage, *needed: str) -> dict:
    """config.json of a stage, as runs.record writes it; {} for one that was not begun. needed: what
    must be there, in it or in its "config". Raises ValueError for a file of another kind."""
    file = Path(stage) / "config.json"
    if not file.exists() and not needed:
        return {}
    record = cli.read_json(file)
    settings = record.get("config", {})
    settings = settings if isinstance(settings, dict) else {}
    kinds = {"config": dict, "built_on": dict, "chunks": list, "latent_shape": list,
             "text_length": int, "vocabulary": list, "set": dict}
    wrong = [name for name in needed if name not in (record if name in kinds else settings)]
    wrong += [name for name, kind in kinds.items()
              if not isinstance(record.get(name, kind()), kind)]
    wrong += [name for name in ("chunks", "latent_shape") if name not in wrong
              and not all(type(n) is int and n > 0 for n in record.get(name, []))]
    if "vocabulary" not in wrong and not all(isinstance(word, str)
                                             for word in record.get("vocabulary", [])):
        wrong.append("vocabulary")
    for field in fields(Config):
        value, kind = settings.get(field.name, field.default), type(field.default)
        fits = isinstance(value, (int, float) if kind is float else kind)
        fits = fits and value in field.metadata.get("choices", [value])
        if not fits or kind is float and not math.isfinite(value):
            wrong.append(field.name)
    if wrong:
        raise ValueError(f"{file}: not what training writes: {', '.join(wrong)} missing or of "
                         f"another kind; put it there again, or train the stage anew with --fresh")
    return record


AT_LEAST_1 = ("steps", "batch_size", "frames", "size", "log_every", "save_every", "max_skips")
AT_LEAST_0 = ("full_chunks", "lora_rank", "lora_alpha", "micro_batch", "warmup", "ema_start",
              "tangent_warmup", "cotrain", "weight_decay", "checkpointing", "balance")
ABOVE_0 = ("lr", "shift", "guidance", "real_guidance", "epsilon", "clip", "fake_lr")
FRACTIONS = ("lr_end", "beta1", "beta2", "ema_decay", "text_drop", "flow_fraction",
             "consistency_fraction", "bidirectional_fraction")


def check(c: Config, given: dict, parser) -> None:
    """Ends with a message for the first setting that cannot be. given: flags of the command."""
    if not c.run_dir.strip() or not c.data.strip():
        parser.error("--run-dir and --data must not be empty")
    def need(names, right, rule):
        for name in names:
            if not right(getattr(c, name)):
                parser.error(f"{flag_name(name)} {getattr(c, name)}: must {rule}")
    need(AT_LEAST_1, lambda value: value >= 1, "be at least 1")
    need(ABOVE_0, lambda value: value > 0, "be above 0")
    need(FRACTIONS, lambda value: 0 <= value <= 1, "lie in [0, 1]")
    need(["seed"], lambda value: 0 <= value < 1_000_000,
         "lie in [0, 1000000); higher ones are for clips that eval.py holds back")
    need(["epsilon"], lambda value: 1e-6 <= value <= 0.5,
         "lie in [1e-6, 0.5]: fp32 times near 1 are 6e-8 apart")
    need(AT_LEAST_0, lambda value: value >= 0, "be at least 0")
    for name in ("chunks", "full_chunks", "bidirectional_fraction"):
        if name in given and not c.causal:
            parser.error(f"{flag_name(name)} is for --causal: a bidirectional clip is one chunk")
    for name, stage in ONLY_IN.items():
        if name in given and c.stage != stage:
            parser.error(f"{flag_name(name)} is for stage {stage}")
    for name in OF_THE_FLOW_MAP:
        if name in given and c.stage == "pretrain":
            parser.error(f"{flag_name(name)} is for stages flowmap and distill")
    if c.causal and c.stage == "pretrain":
        parser.error("--causal is for stages flowmap and distill: they start from the teacher of "
                     "whole clips; leave it out of stage pretrain")
    if c.causal and c.velocity == "teacher":
        parser.error("--velocity teacher: the teacher sees whole clips, and a causal student only "
                     "what came before; leave it out with --causal")
    if c.time_embedding == "added" and (c.lora_rank or c.stage != "flowmap"):
        parser.error("--time-embedding added is for stage flowmap and --lora-rank 0: later stages "
                     "go on with what the weights have")
    begun = Path(c.run_dir) / folder_of(c.stage, c.causal) / "checkpoints" / f"{c.steps:08d}"
    if c.stage == "flowmap" and c.steps <= c.tangent_warmup and not begun.exists():
        parser.error(f"--steps {c.steps}: the tangent warms up over {c.tangent_warmup}, and what "
                     "ends before is no flow map; give a shorter --tangent-warmup, or 0")
    if c.velocity == "teacher" and not c.balance:
        parser.error("--velocity teacher: the errors with r = t, whose mean scales those with r < "
                     "t, vanish; give that scale, such as --balance 0.1")
    differentiates = c.stage == "flowmap" or c.stage == "distill" and c.cotrain
    sharded = c.bf16 or int(os.environ.get("WORLD_SIZE", 1)) > 1
    if c.derivative == "jvp" and differentiates and sharded:
        parser.error("--derivative jvp is for one process and --no-bf16, as FSDP has no "
                     "forward-mode differentiation: give --derivative finite-difference")
    if c.flow_fraction + c.consistency_fraction > 1:
        parser.error("--flow-fraction and --consistency-fraction: together at most 1")
    for name in ("budgets", "chunks") if c.chunks else ("budgets",):
        try:
            cli.positive_ints(getattr(c, name))
        except cli.argparse.ArgumentTypeError as error:
            parser.error(f"--{name} {error}")
    if c.lora_rank and c.stage == "pretrain" and not c.base:
        parser.error("--lora-rank: adapters need weights to adapt; give them with --base, or train "
                     "all weights with --lora-rank 0")
    if c.base and c.stage == "distill":
        parser.error("--base is for stages pretrain and flowmap; stage distill starts from those")


def check_base(c: Config, given: dict, parser) -> None:
    """Ends with a message where a stage begins on weights of another kind, or on a stage of other
    clips, and no flag says of which it shall be."""
    own = Path(c.run_dir) / folder_of(c.stage, c.causal) / "config.json"
    if not c.base or own.exists() and not c.fresh:
        return
    if not finished(c.base):                         # no stage
        foreign = Path(c.base).exists() and not (Path(c.base) / "checkpoints").exists()
        if foreign and c.preset == Config.preset and "preset" not in given:
            wan = " or ".join(name for name in PRESETS if name.startswith("wan"))
            parser.error(f"--base {c.base} is no finished stage, and without --preset the recipe "
                         f"is that of the toy sets: say --preset {wan}")
        return
    then = record_of(c.base).get("config", {})
    for name in ("preset", "frames", "size", "shift", "guidance"):
        if name not in given and then.get(name, getattr(c, name)) != getattr(c, name):
            parser.error(f"--base {c.base} was trained with --{name} {then[name]}, but --{name} is "
                         f"{getattr(c, name)} where it is left out: say --{name} {then[name]}, or "
                         f"what it shall be")


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def chunks_of(c: Config, frames: int) -> tuple[int, ...]:
    """Latent frames of each chunk of a clip of so many; a bidirectional clip is one chunk. Raises
    ValueError for chunks of another length."""
    if not c.causal:
        return (frames,)
    if not c.chunks:
        return (1,) * frames
    chunks = tuple(cli.positive_ints(c.chunks))
    if sum(chunks) != frames:
        raise ValueError(f"--chunks {c.chunks}: add up to {sum(chunks)}, but clips have {frames} "
                         "latent frames")
    return chunks


def micro_batch(c: Config, processes: int) -> int:
    """Samples that a process takes at once."""
    return c.micro_batch or max(1, c.batch_size // processes)


def micro_steps(c: Config, processes: int) -> int:
    """Micro-batches of an update on each process."""
    return c.batch_size // (processes * micro_batch(c, processes))


def learning_rate(c: Config, step: int, peak: float) -> float:
    """A linear warm-up times a cosine, which falls from 1 at the first step to lr_end after the
    last: unless lr_end is 1, the rate does not reach the peak after a long warm-up."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / c.steps))
    rise = min(1, (step + 1) / max(1, c.warmup))
    return peak * rise * (c.lr_end + (1 - c.lr_end) * cosine)
