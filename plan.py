"""An update that is simulated: what it takes of memory and traffic, at any size, where nothing is
allocated.

It is train.update on networks of networks.build, with a batch of the largest kind (longest clip,
deepest rollout), on fake tensors under a process group that pretends. A ledger counts storages;
networks of 2 and of 3 layers stand for deep ones. Activation memory is that of the CPU's attention
kernel, which keeps what the GPU's keeps: queries, keys, values, output, and a number a query.
"""
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor, _sharding_prop
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import distributed
import flowmap
import networks
import train
import updates
from config import Config, chunks_of
from model import FlowMapDiT, ModelConfig, rotary_table


@dataclass
class Case:
    """What is planned: a stage on some processes, with one clip a process and micro-batch."""
    c: Config                    # its batch_size is made to fit
    config: ModelConfig          # of the weights that the stage starts from
    shape: tuple                 # latents (F, C, H, W)
    gpus: int = 8
    micro_steps: int = 1         # 2 stand for any number: more repeat the second
    tokens: int = 512            # of the prompt

    def __post_init__(self):
        self.c = replace(self.c, micro_batch=1, batch_size=self.gpus * self.micro_steps,
                         lora_alpha=self.c.lora_alpha or float(self.c.lora_rank))


def constant_batch(case: Case) -> updates.Batch:
    """A batch of the largest kind: the longest clip, a row with r < t, a rollout of three jumps.
    One clip a process: control flow that looks at times then looks at single numbers, which fake
    tensors carry along."""
    c, chunks = case.c, chunks_of(case.c, case.shape[0])
    start = sum(chunks[:-(c.full_chunks or len(chunks))])
    x, text = torch.randn(1, *case.shape), torch.randn(1, case.tokens, case.config.text_dim)
    n = torch.randn(1, *case.shape)
    t, r, kept = torch.tensor([0.75]), torch.tensor([0.25]), torch.zeros(1, dtype=torch.bool)
    guided = torch.zeros(1, dtype=torch.long)
    batch = updates.Batch(x=x, n=n[:, start:], text=text, null_text=text, dropped=kept,
                          guided_rows=guided, conditioning={}, chunks=chunks, start=start, t=t, r=r,
                          roles=(0, 0, 1), some_gap=True)
    if c.stage == "flowmap" and c.bidirectional_fraction:
        batch.whole_t, batch.whole_noise = t, n
    if c.stage == "distill":
        renoise = [n[:, :frames] for frames in chunks for _ in range(3)]
        batch.rollout = updates.Rollout(flowmap.time_grid(4, c.shift), 1, n, renoise)
        batch.fake_rollout = batch.rollout if c.fake_rollout == "fresh" else None
        batch.tau, batch.tau_noise, batch.fake_t, batch.fake_noise = t, n, t, n
    return batch


def update(case: Case, nets: dict, parts: dict, world) -> None:
    """An update as train.py makes it."""
    log = distributed.Sums(train.LOGGED[case.c.stage])
    batches = (constant_batch(case) for _ in range(case.micro_steps))
    train.update(case.c, nets, parts, batches, 0, world, log)


def build(case: Case, world, mode=None):
    """({name: network}, {name: Trainable}) of a stage, as train.py makes them, with random weights.
    mode: a FakeTensorMode, for networks that take no memory."""
    nets = networks.build(case.c, networks.student_config(case.c, case.config), world)
    with mode or nullcontext():
        for module in networks.modules_of(nets):
            module.to_empty(device=world.device)
            for p in module.parameters():
                local(p).data.normal_(std=0.02)
        return nets, networks.trainables(case.c, nets)


def local(tensor):
    """This process's shard of a tensor, or all of a plain one."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def states_of(parts: dict) -> list:
    """The optimisers' tensors."""
    states = [state for part in parts.values() for state in part.optimizer.state.values()]
    return [value for state in states for value in state.values()]


def kept(nets: dict, parts: dict) -> dict:
    """Bytes that a process keeps all the time; gradients, from backward pass to optimiser step."""
    def size(tensors):
        return sum(local(t).nbytes for t in tensors)
    weights = [p for module in networks.modules_of(nets) for p in module.parameters()]
    trained = [p for part in parts.values() for p in part.network.parameters()]
    return {"parameters": size(weights), "gradients": size(trained),
            "optimiser": size(states_of(parts)), "EMA": size(parts["student"].ema.values())}


class Ledger(TorchDispatchMode):
    """What fake tensors would hold, and its peak; the bytes that this process receives in
    all-gathers and sends in reduce-scatters. A storage counts from the operation that makes it
    until it is freed, or emptied as FSDP empties gathered weights."""

    def __init__(self, mode: FakeTensorMode, processes: int):
        super().__init__()
        self.mode, self.share = mode, (processes - 1) / processes
        self.total = self.gathered = self.reduced = 0
        self.peaks = [0]                     # of each part of the update
        self.held = {}                       # of each storage: bytes, and what notices its end

    def part_of(self, call):
        """A function whose calls begin a part of the update."""
        def begins(*args, **kwargs):
            self.peaks.append(self.total)
            return call(*args, **kwargs)
        return begins

    def hold(self, tensor: torch.Tensor) -> None:
        if getattr(tensor, "fake_mode", None) is self.mode:      # not in DTensor's own reckoning
            storage = tensor.untyped_storage()
            if storage._cdata not in self.held:
                end = weakref.ref(storage, partial(self.resize, storage._cdata, 0))
                self.held[storage._cdata] = 0, end
            self.resize(storage._cdata, storage.nbytes())

    def resize(self, key: int, size: int, ended=None) -> None:
        before, end = self.held[key]
        self.held[key] = size, end
        self.total += size - before
        self.peaks[-1] = max(self.peaks[-1], self.total)
        if ended:
            del self.held[key]

    def resizing(self, true):
        """UntypedStorage.resize_, which no mode gets to see."""
        def resize_(storage, size: int) -> None:
            true(storage, size)
            if storage._cdata in self.held:
                self.resize(storage._cdata, size)
        return resize_

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented                                # its shards come by later
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device                           # every other question is this one
        if func is torch.ops.aten._local_scalar_dense.default and args[0].constant is None:
            return 1.0                                           # a gradient's norm: it is finite
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]                                       # fake tensors make a copy here
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            self.hold(tensor)
        if "_allgather_base" in str(func):
            self.gathered += args[0].nbytes * self.share
        elif "_reduce_scatter_base" in str(func):
            self.reduced += args[1].nbytes * self.share
        return out


def simulate(case: Case) -> dict:
    """Bytes a GPU of one update: parameters, gradients, optimiser, EMA, traffic, and the peak of
    each part: a call of a network, or a backward pass. Starts, and ends, a process group that only
    pretends."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=case.gpus)
    world = distributed.World(0, case.gpus, torch.device("cpu"))
    rotary_table.cache_clear()                       # fake tables are for fake calls
    # But this number is a true one:
    flowmap.mean_time_weight(case.c.time_weight, case.c.shift, case.c.either_share)
    try:
        nets, parts = build(case, world, mode)
        out, ledger = kept(nets, parts), Ledger(mode, case.gpus)
        with mode:
            weights = [p for module in networks.modules_of(nets) for p in module.parameters()]
            tensors = [*weights, *parts["student"].ema.values(), *states_of(parts)]
            for tensor in tensors:
                ledger.hold(local(tensor))
            with (patch.object(FlowMapDiT, "run_blocks", ledger.part_of(FlowMapDiT.run_blocks)),
                  patch.object(train, "backward", ledger.part_of(train.backward)),
                  patch.object(train, "optimizer_step", ledger.part_of(train.optimizer_step)),
                  patch.object(torch.UntypedStorage, "resize_",
                               ledger.resizing(torch.UntypedStorage.resize_)),
                  # DTensor reckons shapes in the active mode, once for each: not part of an update.
                  patch.object(_sharding_prop, "detect_fake_mode", lambda: None),
                  ledger):
                update(case, nets, parts, world)
    finally:
        torch.distributed.destroy_process_group()
        rotary_table.cache_clear()
    return out | {"gathered": ledger.gathered, "reduced": ledger.reduced, "peaks": ledger.peaks}


def memory(case: Case) -> dict:
    """Bytes a GPU of one update: parameters, gradients, optimiser, EMA, activations (with all other
    temporaries), peak, and those of its traffic."""
    return with_peak(simulate(case))


def with_peak(found: dict) -> dict:
    lasting = {name: found[name] for name in ("parameters", "gradients", "optimiser", "EMA")}
    peak = max(found["peaks"])
    return lasting | {"activations": peak - sum(lasting.values()), "peak": peak,
                   "gathered": found["gathered"], "reduced": found["reduced"]}


def by_layers(case: Case, measure):
    """measure(case), numbers in lists and dicts, of a deep network from those of 2 and of 3 layers
    (times N with checkpointing of every Nth): every further one adds the same."""
    unit = max(1, case.c.checkpointing)
    steps = case.config.layers / unit - 2
    if steps <= 1:
        return measure(case)
    two, three = (measure(replace(case, config=replace(case.config, layers=n * unit)))
                  for n in (2, 3))
    return tree_map(lambda few, more: few + steps * (more - few), two, three)


def memory_by_layers(case: Case) -> dict:
    """`memory` of a deep network: of each part, as which has the highest peak may change."""
    return with_peak(by_layers(case, simulate))


# Small enough to run here.
CHECKED = ModelConfig(dim=512, heads=8, layers=4, ffn_dim=2048, text_dim=256, freq_dim=64)


def checked_cases() -> list[Case]:
    """Two processes, full precision: every stage and kind."""
    kinds = (("pretrain", 0, False), ("flowmap", 32, True), ("distill", 0, True),
             ("distill", 32, False), ("distill", 32, True))
    cases = [Case(Config(stage=stage, lora_rank=rank, checkpointing=on), CHECKED, (8, 16, 24, 32),
                  gpus=2, tokens=64) for stage, rank, on in kinds]
    causal = replace(cases[-1].c, causal=True, chunks="1,3,2,2")
    return [*cases, replace(cases[-1], c=causal)]


def resident(name: str) -> int:
    """Bytes of this process: now ("VmRSS"), or at their peak ("VmHWM"). Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if name in line)


def measure(case: Case) -> int:
    """Bytes of resident memory that one real update of a case takes at its peak on this process,
    from before its networks are made. For processes that torchrun started."""
    world = distributed.start("cpu")
    distributed.barrier(world)
    torch.randn(64, 64) @ torch.randn(64, 64)
    before = resident("VmRSS")
    nets, parts = build(case, world)
    update(case, nets, parts, world)
    return resident("VmHWM") - before
