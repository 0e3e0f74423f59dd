"""The networks of a stage: which weights it starts from, and how they are laid over the processes.

A network is made on the meta device, sharded, given memory and then filled tensor by tensor, so
that no rank ever holds the whole of it, unless its weights are fresh. With adapters, all networks
of a stage share one frozen base.
"""
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch._inductor import config as inductor

import checkpoint
import distributed
import lora
import runs
import wan
from checkpoint import Tensors
from config import Config
from model import PRESETS, FlowMapDiT, ModelConfig


@dataclass
class Weights:
    """What the networks of a stage are filled with: each (tensors, where they are from)."""
    config: ModelConfig              # of the student
    student: tuple                   # with adapters, of the base that all share
    scores: tuple = ()               # of teacher and fake score, without adapters
    adapters: dict = field(default_factory=dict)     # by name; tensors None: a fresh one
    below: dict | None = None        # of a base that is an adapter stage: its adapter, kept apart
    base_sha256: str = ""            # with adapters, of the base as it was read


def names_of(c: Config) -> list[str]:
    if c.stage == "distill":
        return ["student", "teacher", "fake"]
    return ["student", "teacher"] if runs.needs_teacher(c) else ["student"]


def build(c: Config, config: ModelConfig, world, below: dict | None = None) -> dict:
    """The networks of a stage by name, sharded, on the meta device. config: of the student; below:
    see Weights."""
    names, score = names_of(c), replace(config, second_time=False, compressed=False)
    if not c.lora_rank:
        return {name: lay_out(c, config if name == "student" else score, world) for name in names}
    base = lay_out(c, config, world, names, below)
    return {name: lora.Adapted(base, name) for name in names}


def lay_out(c: Config, config: ModelConfig, world, adapters=(), below=None) -> torch.nn.Module:
    if c.compile:    # a block is called with each past, with and without gradient, by each adapter
        torch._dynamo.config.recompile_limit = 512
        torch._dynamo.config.accumulated_recompile_limit = 512
        torch._dynamo.config.fail_on_recompile_limit_hit = True      # never eager without a word
        inductor.deterministic = c.deterministic                     # or timings choose kernels
    with torch.device("meta"):
        network = FlowMapDiT(config)
        if adapters:                                 # frozen weights need no fp32 master
            network.requires_grad_(False).to(torch.bfloat16 if c.bf16 else torch.float32)
        for name in adapters:
            without = () if name == "student" else lora.SCORE
            lora.add_adapter(network, name, c.lora_rank, c.lora_alpha, without)
        if below:
            lora.add_adapter(network, lora.BELOW, below["rank"], below["alpha"], lora.REPLACED)
            lora.Adapted(network, lora.BELOW).requires_grad_(False)
    for i, block in enumerate(network.blocks):
        block.checkpointing = c.checkpointing > 0 and i % c.checkpointing == 0
        if c.compile:
            block.compile(dynamic=False)             # sizes are few, and symbolic ones fail
    return distributed.shard(network, world, c.bf16, c.shard)


def modules_of(nets: dict) -> list[torch.nn.Module]:
    """The modules below the networks: one where adapters share it."""
    modules = [getattr(network, "network", network) for network in nets.values()]
    return list({id(module): module for module in modules}.values())


def fill(nets: dict, weights: Weights, c: Config, world) -> None:
    """Give the networks memory and their weights. Errors as for checkpoint.load_weights."""
    for module in modules_of(nets):
        module.to_empty(device=world.device)
    state, origin = weights.student
    if not c.lora_rank:
        checkpoint.load_weights(nets["student"], state, origin)
        for name in names_of(c)[1:]:
            checkpoint.load_weights(nets[name], *weights.scores)
        return
    base = nets["student"].network
    checkpoint.load_weights(base, state, origin)
    if weights.below:
        checkpoint.load_weights(lora.Adapted(base, lora.BELOW), weights.below["tensors"], origin)
    for name, (tensors, source) in weights.adapters.items():
        if tensors is None:
            seeds = partial(distributed.generator, c.seed, "init")
            tensors = Tensors(lora.fresh_adapter(nets[name], state, seeds))
        elif name == "student":
            tensors = wan.complete(tensors, weights.config, state)
        checkpoint.load_weights(nets[name], tensors, source)


def trainables(c: Config, nets: dict) -> dict[str, checkpoint.Trainable]:
    """What is trained, with optimisers; the teacher is frozen."""
    betas = (c.beta1, c.beta2)
    student = checkpoint.Trainable(nets["student"], c.lr, betas, c.weight_decay, with_ema=True)
    if "teacher" in nets:
        nets["teacher"].requires_grad_(False)
    if c.stage != "distill":
        return {"student": student}
    fake = checkpoint.Trainable(nets["fake"], c.fake_lr, betas, c.weight_decay, with_ema=False)
    return {"student": student, "fake": fake}


def student_config(c: Config, config: ModelConfig) -> ModelConfig:
    """That of the stage's student, which starts from a network of `config`."""
    return replace(config, second_time=c.stage != "pretrain",
                   compressed=c.causal and c.full_chunks > 0)


def find_weights(c: Config) -> Weights:
    """The weights that a stage starts from. Raises ValueError for those that do not fit."""
    origins = runs.origins(c)
    if not origins:
        config = student_config(c, PRESETS[c.preset])
        fresh = FlowMapDiT(config).init_weights(distributed.generator(c.seed, "init"))
        return Weights(config, (fresh.state_dict(), "fresh weights"))
    student, adapters, below, scores = origins["student"], {}, None, ()
    flow_map = c.stage != "pretrain"
    if c.lora_rank:
        student, adapters = find_adapters(c, origins)
        config, state, below = wan.load_apart(student)
    else:
        config, state = wan.load(student)
    if not flow_map and config.second_time:
        raise ValueError(f"--base {student} is a flow map already, and a teacher knows one time "
                         f"only: go on with it by --stage flowmap --base {student}, or give "
                         "flow-matching weights")
    if below:
        state, below["tensors"] = wan.moved_down(state, below["tensors"], flow_map)
    if runs.needs_teacher(c):
        # With adapters the teacher is one of the base, or the base itself.
        teacher = student if c.lora_rank else origins["teacher"]
        teacher_config = wan.load(teacher)[0]
        if teacher_config.second_time:
            without = ("" if c.stage == "distill" else
                       "; or go on without one: --velocity data --balance 0 --tangent-warmup 0")
            raise ValueError(f"stage {c.stage} needs stage pretrain, a teacher: {teacher} is a "
                             f"flow map. First run: {runs.first_command(c, 'pretrain')}{without}")
        check_alike(config, student, teacher_config, teacher)
        if not c.lora_rank:
            scores = (wan.load(teacher, second_time=False, compressed=False)[1], teacher)
    has_second = config.second_time
    if has_second and c.stage == "flowmap" and c.tangent_warmup:
        raise ValueError(f"--tangent-warmup {c.tangent_warmup}: {student} is a flow map already, "
                         "which that would undo: give --tangent-warmup 0")
    if has_second and c.time_embedding == "added" and not config.added:
        raise ValueError(f"--time-embedding added: {student} has an interpolated one; start "
                         "from a teacher")
    config, state = wan.as_asked(config, state, flow_map, c.causal and c.full_chunks > 0)
    if c.time_embedding == "added" and not has_second:
        config, state = with_added_time(config, state)
    return Weights(config, (state, student), scores, adapters, below)


def with_added_time(config: ModelConfig, state: Tensors) -> tuple[ModelConfig, Tensors]:
    """Of a flow map that starts from a teacher: its second embedder's output starts at zero."""
    def zero(name):
        return torch.zeros_like(state[name])
    last = [f"r_embed.down.{part}" for part in ("weight", "bias")]
    makers = state.makers | {name: partial(zero, name) for name in last}
    return replace(config, added=True), Tensors(makers)


def check_alike(student: ModelConfig, place, teacher: ModelConfig, origin) -> None:
    """Raises ValueError for networks of different sizes."""
    for name, value in asdict(student).items():
        other = getattr(teacher, name)
        if name not in ("second_time", "compressed", "gate", "added") and value != other:
            raise ValueError(f"the student {place} has {name} = {value}, its teacher {origin} has "
                             f"{other}: they must be of one size; train both in one run")


def find_adapters(c: Config, origins: dict) -> tuple[str, dict]:
    """The weights that the stage adapts, and the adapters it starts from: those of the stages
    before, or fresh ones (tensors None)."""
    place = origins["student"]
    own = None if c.base else checkpoint.load_model(place)[2]
    base = wan.base_of(place, own) if own else place
    adapters = {"student": (None, place) if c.base else adapter_of(c, place, base)}
    if runs.needs_teacher(c):
        teacher = adapter_of(c, origins["teacher"], base)
        adapters |= {name: teacher for name in names_of(c)[1:]}
    return base, adapters


def adapter_of(c: Config, stage, base: str) -> tuple:
    """The adapter of `base` that a stage ended with, and where it is from; (None, ...) if it ended
    with `base` itself."""
    if Path(stage).resolve() == Path(base).resolve():
        return None, stage
    tensors, adapter = checkpoint.load_model(stage)[1:]
    if adapter and (adapter["rank"], adapter["alpha"]) != (c.lora_rank, c.lora_alpha):
        raise ValueError(f"{stage} ended with an adapter of rank {adapter['rank']} and alpha "
                         f"{adapter['alpha']:g}, not --lora-rank {c.lora_rank} --lora-alpha "
                         f"{c.lora_alpha:g}: leave them out, or train anew from stage pretrain")
    if not adapter or Path(adapter["base"]).resolve() != Path(base).resolve():
        raise ValueError(f"{stage} is not an adapter of {base}, which this stage adapts: train all "
                         "weights with --lora-rank 0")
    return tensors, stage
