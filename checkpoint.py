"""Training state on disk: EMA, checkpoints that resume bit for bit, and the final weights of a stage.

A stage's folder holds config.json, log.jsonl, codec.safetensors (what turns clips into latents), checkpoints/STEP/
(everything that training needs to go on) and, when the stage is finished, model.safetensors (what is sampled: the EMA of
the network, or of its adapter). Checkpoints are written and read by torch.distributed.checkpoint: every rank writes the
shards that it holds, and another number of ranks may read them. Only safetensors and JSON are read: nothing that could
execute code.
"""
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.distributed.tensor import DTensor, distribute_tensor

from data import checksum
from distributed import World, merge_over_ranks, on_main, sum_over_ranks
from model import ModelConfig


class Tensors(Mapping):
    """Named tensors, each read or made only when it is asked for: a large model never lies in
    memory twice."""

    def __init__(self, makers: dict):
        self.makers = makers

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.makers[name]()

    def __iter__(self):
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


@dataclass
class Trainable:
    """A network (or an adapter, lora.Adapted) that is trained, with its AdamW state and, optionally, the EMA of its weights
    (fp32, sharded alike)."""
    network: torch.nn.Module
    optimizer: torch.optim.AdamW
    ema: dict | None = None

    def __post_init__(self):
        # AdamW would make its state at the first step; made here, saving and loading need no special first case.
        for p in self.optimizer.param_groups[0]["params"]:
            self.optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                                       "exp_avg_sq": torch.zeros_like(p)}

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """ema = decay * ema + (1 - decay) * weights; decay 0 copies the weights, which is how a late EMA starts."""
        for name, p in self.network.named_parameters():
            self.ema[name].lerp_(p, 1 - decay)

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """Every tensor of the training state, by name. The tensors themselves, not copies."""
        out = {}
        for name, p in self.network.named_parameters():
            out[f"{prefix}.weights.{name}"] = p.detach()
            out |= {f"{prefix}.{key}.{name}": value for key, value in self.optimizer.state[p].items()}
            if self.ema is not None:
                out[f"{prefix}.ema.{name}"] = self.ema[name]
        return out


def trainable(network, lr: float, betas, weight_decay: float, with_ema: bool) -> Trainable:
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    ema = {name: p.detach().clone() for name, p in network.named_parameters()} if with_ema else None
    return Trainable(network, optimizer, ema)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The unsharded tensor on the CPU; every rank must call it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().contiguous()


@torch.no_grad()
def fill(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole tensor, which every rank has read, into a plain or sharded one."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)


def load_weights(network: torch.nn.Module, state: dict, source) -> None:
    """Fill a network without its adapters, or one adapter (lora.Adapted), sharded or not, from whole tensors. Raises
    ValueError naming the first tensor that is missing, left over or of another shape."""
    parameters = {name: p for name, p in network.named_parameters() if ".adapters." not in name}
    for name in sorted(parameters.keys() ^ state.keys()):
        raise ValueError(f"{source}: tensor {name} is {'missing' if name in parameters else 'not of this network'}")
    for name, p in parameters.items():
        value = state[name]                          # read once: it may come from a file
        if p.shape != value.shape:
            raise ValueError(f"{source}: tensor {name} has shape {tuple(value.shape)}, the network's has {tuple(p.shape)}")
        fill(p, value)


def sync(files) -> None:
    """Flush files to the disk."""
    for file in files:
        if file.is_file():
            with open(file, "rb") as f:
                os.fsync(f.fileno())


def write_aside(folder: Path, write) -> None:
    """Make `folder` in one instant: write(temporary folder), flush to disk, rename. A kill leaves old or new, never
    half."""
    aside = aside_of(folder)
    write(aside)
    sync(aside.rglob("*"))
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def aside_of(folder: Path) -> Path:
    """An empty folder to write `folder` in."""
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def save_checkpoint(stage: Path, step: int, parts: dict[str, Trainable], counters: dict, world: World, keep: int = 2) -> None:
    """Write checkpoints/STEP after `step` updates; the newest `keep` stay. Every rank must call it, and writes its shards.

    Raises OSError, on every rank, when the disk is full or cannot be written; the checkpoints before are kept.
    """
    folder = stage / "checkpoints" / f"{step:08d}"
    aside = folder.with_name(folder.name + ".partial")

    def together(act):
        """act() on every rank; all end when it fails on one."""
        problem = ""
        try:
            act()
        except (OSError, SafetensorError, dcp.CheckpointException) as error:
            problem = (str(error).strip() or type(error).__name__).splitlines()[-1]
        if sum_over_ranks(float(bool(problem)), world=world)[0]:
            kept = "".join(f"{path} is kept. " for path in checkpoints(stage)[-1:])
            raise OSError(f"cannot write {aside}: {problem or 'see the other ranks'}. {kept}Make room, then run the same "
                             f"command again")

    def write():
        tensors = {}
        for prefix, part in parts.items():
            tensors |= part.tensors(prefix)
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(aside), save_distributed=True))

    def flush():
        own = [aside / name for name in names[world.rank::world.size]]
        sync(own)
        sums.update({file.name: checksum(file) for file in own})

    def finish():
        state = {"step": step, **counters, "sha256": dict(sorted(all_sums.items()))}
        (aside / "state.json").write_text(json.dumps(state | {"own_sha256": json_checksum(state)}))
        sync([aside / "state.json"])
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        for old in [*checkpoints(stage)[:-keep], *folder.parent.glob("*.partial")]:
            shutil.rmtree(old, ignore_errors=True)
    together(lambda: world.is_main and aside_of(folder))
    together(write)
    sums, names = {}, on_main(lambda: sorted(file.name for file in aside.iterdir()), world)
    together(flush)                                      # nobody waits for sums of a rank that has failed
    all_sums = merge_over_ranks(sums, world)
    together(lambda: world.is_main and finish())


def json_checksum(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def checkpoints(stage: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in (stage / "checkpoints").glob("*") if p.name.isdigit())


def is_whole(folder: Path, world: World) -> bool:
    """Whether a checkpoint is what was written: every file is there and its checksum fits. Each rank reads some."""
    try:
        state = json.loads((folder / "state.json").read_text())
        sums, own = state["sha256"], state.pop("own_sha256")
        bad = not sums or own != json_checksum(state) or state["step"] != int(folder.name)
        bad = bad or any(checksum(folder / name) != sums[name] for name in sorted(sums)[world.rank::world.size])
    except (OSError, ValueError, KeyError, TypeError):
        bad = True
    return sum_over_ranks(float(bad), world=world)[0] == 0


def load_checkpoint(stage: Path, parts: dict[str, Trainable], world: World, say=print) -> dict:
    """Fill `parts` from the newest checkpoint, whatever number of ranks wrote it; returns its counters ("step", ...), or {}
    when there is none.

    A damaged checkpoint is named and the one before it used. Raises ValueError for one of another network, or when all
    are damaged.
    """
    found = on_main(lambda: checkpoints(stage), world)
    if not found:
        return {}
    while found and not is_whole(found[-1], world):
        say(f"{found.pop()} is damaged (truncated, not what was written, or by an older version) and is left out")
    if not found:
        raise ValueError(f"every checkpoint in {stage / 'checkpoints'} is damaged; --fresh trains the stage anew")
    tensors = {}
    for prefix, part in parts.items():
        tensors |= part.tensors(prefix)
    reader = dcp.HuggingFaceStorageReader(str(found[-1]))
    saved = reader.read_metadata().state_dict_metadata
    if {name: entry.size for name, entry in saved.items()} != {name: tensor.shape for name, tensor in tensors.items()}:
        raise ValueError(f"{found[-1]}: the training state of another network; start anew with --fresh, or use another "
                         f"--run-dir")
    dcp.load(tensors, storage_reader=reader)
    return json.loads((found[-1] / "state.json").read_text())


def save_model(stage: Path, weights: dict, config: ModelConfig, is_main: bool, adapter: dict | None = None) -> None:
    """model.safetensors: the finished stage's weights with the network's config in the file's header.

    adapter: for the weights of an adapter its rank, alpha, targets, and base, the path of the weights that it adapts. Every
    rank must call it. Tensors are gathered, and written, one at a time: no rank ever holds the whole network.
    """
    aside = stage / "model.safetensors.partial"
    metadata = {"model_config": json.dumps(asdict(config))} | ({"adapter": json.dumps(adapter)} if adapter else {})
    write_tensors(aside, {name: (tensor.shape, tensor.dtype, partial(whole, tensor)) for name, tensor in weights.items()},
                  metadata, is_main)
    if is_main:
        sync([aside])
        aside.rename(stage / "model.safetensors")


def write_tensors(path: Path, tensors: dict, metadata: dict, is_main: bool = True) -> None:
    """A safetensors file written one tensor at a time: each is (shape, dtype, what makes it). All ranks make, rank 0
    writes. The header is the library's own, of empty stand-ins with the true sizes put in."""
    header, end = {"__metadata__": metadata}, 0
    names = {dtype: json.loads(save({"x": torch.empty(0, dtype=dtype)})[8:])["x"]["dtype"] for _, dtype, _ in tensors.values()}
    for name, (shape, dtype, _) in tensors.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") if is_main else open(os.devnull, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, make in tensors.values():
            value = make()
            if is_main:
                file.write(value.contiguous().view(-1).view(torch.uint8).numpy().data)


def load_model(stage: Path) -> tuple[ModelConfig, Tensors, dict | None]:
    """The config and the tensors of a finished stage; and, where they are those of an adapter, what `save_model` said of it.
    Raises FileNotFoundError for an unfinished one, ValueError for a damaged file."""
    path = Path(stage) / "model.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: the stage was not trained, or is not finished")
    try:
        file = safe_open(path, "pt")
        metadata = file.metadata()
        config, adapter = ModelConfig(**json.loads(metadata["model_config"])), json.loads(metadata.get("adapter", "null"))
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: truncated, or not a stage's weights ({error}); --fresh trains the stage anew") from None
    if adapter:                                          # a path inside the run is relative to the stage, so that the run may move
        adapter["base"] = os.path.normpath(os.path.join(os.path.abspath(stage), adapter["base"]))
    return config, Tensors({name: partial(file.get_tensor, name) for name in file.keys()}), adapter
