"""The networks of a stage: which weights it starts from, and how they are laid over the processes.

A network is made on the meta device, sharded, given memory and then filled tensor by tensor, so
that no rank ever holds the whole of it. With adapters, all networks of a stage share one frozen base.
"""
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

import checkpoint
import distributed
import lora
import wan
from checkpoint import Tensors
from config import Config, stage_before
from model import PRESETS, FlowMapDiT, ModelConfig


@dataclass
class Weights:
    """What the networks of a stage are filled with: each (tensors, where they are from)."""
    config: ModelConfig              # of the student
    student: tuple                   # with adapters, of the base that all share
    scores: tuple = ()               # of teacher and fake score, without adapters
    adapters: dict = field(default_factory=dict)     # by name; tensors None: a fresh one


def names_of(c: Config) -> list[str]:
    return ["student", "teacher", "fake"] if c.stage == "distill" else ["student"]


def build(c: Config, config: ModelConfig, world) -> dict:
    """The networks of a stage by name, sharded, on the meta device. config: of the student."""
    names, plain = names_of(c), replace(config, second_time=False)
    if not c.lora_rank:
        return {name: lay_out(c, config if name == "student" else plain, world) for name in names}
    base = lay_out(c, config, world, adapters=names)
    return {name: lora.Adapted(base, name) for name in names}


def lay_out(c: Config, config: ModelConfig, world, adapters=()) -> torch.nn.Module:
    with torch.device("meta"):
        network = FlowMapDiT(config)
        if adapters:                                 # frozen weights need no fp32 master
            network.requires_grad_(False).to(torch.bfloat16 if c.bf16 else torch.float32)
        for name in adapters:
            lora.add_adapter(network, name, c.lora_rank, c.lora_alpha)
    for block in network.blocks:
        block.checkpointing = c.checkpointing
        if c.compile:    # called with many adapters and pasts, and with and without gradient
            torch._dynamo.config.recompile_limit = 64
            block.compile()
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
    checkpoint.load_weights(nets["student"].network, state, origin)
    for name, (tensors, source) in weights.adapters.items():
        if tensors is None:
            seeds = partial(distributed.generator, c.seed, "init")
            tensors = Tensors(lora.fresh_adapter(nets[name], state, seeds))
        checkpoint.load_weights(nets[name], tensors, source)


def trainables(c: Config, nets: dict) -> dict[str, checkpoint.Trainable]:
    """What is trained, with optimisers; the teacher is frozen."""
    betas = (c.beta1, c.beta2)
    student = checkpoint.trainable(nets["student"], c.lr, betas, c.weight_decay, with_ema=True)
    if c.stage != "distill":
        return {"student": student}
    nets["teacher"].requires_grad_(False)
    fake = checkpoint.trainable(nets["fake"], c.fake_lr, betas, c.weight_decay, with_ema=False)
    return {"student": student, "fake": fake}


def student_config(c: Config, config: ModelConfig) -> ModelConfig:
    """That of the stage's student, which starts from a network of `config`."""
    return replace(config, second_time=c.stage != "pretrain",
                   compressed=c.causal and c.full_chunks > 0)


def find_weights(c: Config) -> Weights:
    """The weights that a stage starts from. Raises ValueError for those that do not fit."""
    run, compressed = Path(c.run_dir), c.causal and c.full_chunks > 0
    before = "" if c.base else stage_before(c.stage)
    origin, adapters = str(run / before) if before else c.base, {}
    if not origin:
        config = student_config(c, PRESETS[c.preset])
        fresh = FlowMapDiT(config).init_weights(distributed.generator(c.seed, "init"))
        return Weights(config, (fresh.state_dict(), "fresh weights"))
    if c.lora_rank:
        adapter = checkpoint.load_model(origin)[2] if before else None
        base = adapter["base"] if adapter else origin
        if not Path(base).exists():
            raise ValueError(f"{origin} adapts the weights {base}, which are not there: put them "
                             "there again, or run where they are")
        student = adapter_of(c, origin, base) if before else (None, origin)
        teacher = adapter_of(c, run / "pretrain", base) if c.stage == "distill" else None
        adapters = {name: student if name == "student" else teacher for name in names_of(c)}
        origin = base
    if c.stage == "pretrain" and wan.load(origin)[0].second_time:
        raise ValueError(f"--base {origin} is a flow map already, and a teacher knows one time "
                         f"only: go on with it by --stage flowmap --base {origin}, or give "
                         "flow-matching weights")
    config, state = wan.load(origin, second_time=c.stage != "pretrain", compressed=compressed)
    scores = ()
    if c.stage == "distill" and not c.lora_rank:
        plain = wan.load(run / "pretrain", second_time=False, compressed=compressed)
        scores = (plain[1], run / "pretrain")
    return Weights(config, (state, origin), scores, adapters)


def adapter_of(c: Config, stage, base: str) -> tuple:
    """The adapter of `base` that a stage ended with, and where it is from; (None, ...) if it ended
    with `base` itself."""
    config, tensors, adapter = checkpoint.load_model(stage)
    if adapter and (adapter["rank"], adapter["alpha"]) != (c.lora_rank, c.lora_alpha):
        raise ValueError(f"{stage} ended with an adapter of rank {adapter['rank']} and alpha "
                         f"{adapter['alpha']:g}, not --lora-rank {c.lora_rank} --lora-alpha "
                         f"{c.lora_alpha:g}: leave them out, or train anew from stage pretrain")
    if Path(adapter["base"] if adapter else stage).resolve() != Path(base).resolve():
        raise ValueError(f"{stage} is not an adapter of {base}, which this stage adapts: train all "
                         "weights with --lora-rank 0")
    if not adapter:
        return None, stage
    return (tensors if config.second_time else wan.as_flow_map(tensors)), stage
