"""Ranks, sharding, explicit randomness: the same script on one CPU, gloo processes, or N GPUs."""
import hashlib
import os
import signal
import sys
import threading
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def pick_device(device: str = "auto") -> torch.device:
    """auto (this process's GPU if there is one), cpu or cuda (ValueError if there is none)."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch sees no GPU here; say --device auto or --device cpu")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def start(device: str = "auto", deterministic: bool = False) -> World:
    """Join the processes that torchrun started, or be a world of one. deterministic: ask for
    deterministic GPU kernels, as attention otherwise adds in any order. Errors as `pick_device`."""
    picked = pick_device(device)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if picked.type == "cuda":
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:          # FSDP's streams fragment memory
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(picked)
    if not dist.is_initialized():
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if size == 1 else {}
        # NCCL's own ten minutes are short where one rank reads a slow disk for all.
        dist.init_process_group("nccl" if picked.type == "cuda" else "gloo",
                                timeout=timedelta(hours=1), **alone)
    return World(rank, size, picked)


def stop() -> None:
    """Leave the group and end the process with code 0. For scripts, after their last line.

    The interpreter is not torn down: gloo's worker threads outlive destroy_process_group, and one
    that still holds a Python tensor then aborts the process (seen in 1 run of 25).
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def shard(network: torch.nn.Module, world: World, bf16: bool, over: str = "all") -> torch.nn.Module:
    """FSDP2: every block, then the rest, over all ranks or those of each node; fp32 reductions.

    With bf16, weights are gathered and multiplied in bf16; inputs are not cast, or times would lose
    their digits. A single process without bf16 keeps the plain module.
    """
    if world.size == 1 and not bf16:
        return network
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size)) if over == "node" else world.size
    shape, names = (world.size,), ("ranks",)
    if local != world.size:
        shape, names = (world.size // local, local), ("nodes", "ranks")
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    # A block returns keys and values as Linears make them, views; nothing changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None,
                                  reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in network.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(block, "encode_prompt")
    # Sharded again after every forward: a last call without gradient would else leave whole weights
    # for a checkpoint to save.
    fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for method in ("encode", "encode_prompt"):                   # these, too, gather the weights
        register_fsdp_forward_method(network, method)
    return network


def sync_gradients(network: torch.nn.Module, on: bool) -> None:
    """Gradient accumulation: reduce over ranks only after the last micro-batch."""
    base = getattr(network, "network", network)                  # of an adapter (lora.Adapted)
    if isinstance(base, FSDPModule):
        base.set_requires_gradient_sync(on)


def to_device(tensor: torch.Tensor, device) -> torch.Tensor:
    """A tensor of the host on a device. The host does not wait for a GPU to take it: it lies in
    pinned memory until then."""
    if device.type == "cuda":
        tensor = tensor.contiguous().pin_memory()    # an expanded one cannot be pinned as it is
    return tensor.to(device, non_blocking=True)


def sum_over_ranks(*values: float, world: World) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64, device=world.device)
    if world.size > 1:
        dist.all_reduce(total)
    return total.tolist()


class RunningMean:
    """Mean over ranks of what was added so far, such as the r = t errors of an update. It stays on
    the device: nobody waits for its value."""

    def __init__(self, world: World):
        self.size, self.total = world.size, 0.0

    def add(self, values: torch.Tensor, default: float) -> torch.Tensor:
        """The mean (), or `default` while there is nothing. Every rank must call it."""
        found = torch.stack([values.sum().double(), values.new_full((), len(values)).double()])
        if self.size > 1:
            dist.all_reduce(found)
        self.total = self.total + found
        return torch.where(self.total[1] > 0, self.total[0] / self.total[1], default)


class Sums:
    """Sums and counts of what is logged, over micro-batches and ranks; .means() empties it. Sums
    stay on the device until then."""

    def __init__(self, names):
        self.values = {name: [0.0, 0] for name in names}

    def add(self, name: str, values: torch.Tensor) -> None:
        pair = self.values[name]
        pair[0] = pair[0] + values.detach().double().sum()
        pair[1] += values.numel()

    def means(self, world: World) -> dict[str, float]:
        pairs = [float(number) for pair in self.values.values() for number in pair]
        flat = sum_over_ranks(*pairs, world=world)
        found = list(zip(self.values, flat[::2], flat[1::2]))
        self.values = {name: [0.0, 0] for name in self.values}
        return {name: total / count for name, total, count in found if count}


def merge_over_ranks(values: dict, world: World) -> dict:
    """The union of every rank's dict of small values, on every rank."""
    found = [values] * world.size
    if world.size > 1:
        dist.all_gather_object(found, values)
    return {key: value for part in found for key, value in part.items()}


def begin_of(process: int) -> str:
    """When a process began, in ticks since the system did; '' where /proc does not say."""
    file = Path(f"/proc/{process}/stat")
    return file.read_text().rpartition(")")[2].split()[19] if file.exists() else ""


def launch() -> dict:
    """Who started this process: torchrun's process, if any, SLURM's job and its restarts. In every
    container torchrun may be process 1: hence when it began."""
    run, parent = os.environ.get("TORCHELASTIC_RUN_ID", ""), os.getppid()
    return {"torchrun": run and f"{run} {parent} {begin_of(parent)}",
            "job": os.environ.get("SLURM_JOB_ID", ""),
            "restarts": int(os.environ.get("SLURM_RESTART_COUNT", 0))}


def is_restart(before: dict | None) -> bool:
    """Whether torchrun or SLURM has started this process once more, after the launch `before`. The
    same command that a user starts again in the same job is another launch."""
    now = launch()
    if not before:
        return False
    same_job = now["job"] and now["job"] == before.get("job")
    if same_job and now["restarts"] > before["restarts"]:
        return True
    return bool(now["torchrun"] and now["torchrun"] == before.get("torchrun"))


def on_main(decide, world: World):
    """decide() of rank 0, on every rank: on a network disk, ranks may see different files."""
    return merge_over_ranks({"it": decide()} if world.is_main else {}, world)["it"]


def barrier(world: World) -> None:
    """Wait until every rank is here (rank 0 has written what the others read)."""
    sum_over_ranks(0.0, world=world)


class StopSignal:
    """Notes SIGTERM, SIGINT and SIGUSR1, so that a run ends after its update, not in it; until
    `restore`. A second SIGINT ends it at once. SIGUSR1 is for schedulers: torchrun does not wait
    for workers that have SIGTERM longer than its --shutdown-timeout."""

    def __init__(self):
        self.seen, self.before = False, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                self.before[number] = signal.signal(number, self.note)

    def note(self, number, frame):
        self.seen = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_any_rank(self, world: World) -> bool:
        """Ranks hear a signal at different moments, but must stop after the same update."""
        return sum_over_ranks(float(self.seen), world=world)[0] > 0

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


def generator(*keys) -> torch.Generator:
    """A CPU generator that is a pure function of its keys, such as (seed, step, slot, "noise").

    What ranks must agree on (the rollout's N and k) is drawn from keys without a rank or slot; what
    must differ (noise) has the sample's slot in the global batch: a split over ranks and
    micro-batches changes nothing.
    """
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def slots(world: World, micro_batch: int, micro_step: int) -> torch.Tensor:
    """Which samples of the global batch this rank takes in a micro-step, (micro_batch,): dealt out
    like cards, so that roles, which are stratified along the batch, are even over ranks."""
    return (micro_step * micro_batch + torch.arange(micro_batch)) * world.size + world.rank


def noise(shape, *keys, slots) -> torch.Tensor:
    """Standard normal noise (len(slots), *shape), a sample from its own generator (*keys, slot)."""
    return noise_stream(*keys, slots=slots)(shape)


def noise_stream(*keys, slots):
    """A function that draws the next noise (len(slots), *shape) at each call."""
    generators = [generator(*keys, int(slot)) for slot in slots]
    return lambda shape: torch.stack([torch.randn(shape, generator=g) for g in generators])
