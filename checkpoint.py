"""Training state on disk: EMA, checkpoints that resume bit for bit, and the final weights of a stage.

A stage's folder holds config.json, log.jsonl, codec.safetensors (what turns clips into latents), checkpoints/STEP/
(everything that training needs to go on) and, when the stage is finished, model.safetensors (what is sampled: the EMA).
Only safetensors and JSON are read: nothing that could execute code.
"""
import json
import os
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from data import checksum, write_text
from model import ModelConfig, Tensors


@dataclass
class Trainable:
    """A network that is trained, with its AdamW state and, optionally, the EMA of its weights (fp32, sharded alike)."""
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
    """Fill a network, sharded or not, from whole tensors. Raises ValueError naming the first tensor that is missing,
    left over or of another shape."""
    parameters = dict(network.named_parameters())
    for name in sorted(parameters.keys() ^ state.keys()):
        raise ValueError(f"{source}: tensor {name} is {'missing' if name in parameters else 'not of this network'}")
    for name, p in parameters.items():
        value = state[name]                          # read once: it may come from a file
        if p.shape != value.shape:
            raise ValueError(f"{source}: tensor {name} has shape {tuple(value.shape)}, the network's has {tuple(p.shape)}")
        fill(p, value)


def write_aside(folder: Path, write) -> None:
    """Make `folder` in one instant: write(temporary folder), flush to disk, rename. A kill leaves old or new, never
    half."""
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write(aside)
    for file in aside.rglob("*"):
        if file.is_file():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def save_checkpoint(stage: Path, step: int, parts: dict[str, Trainable], counters: dict, is_main: bool, keep: int = 2):
    """Write checkpoints/STEP after `step` updates; the newest `keep` stay. Every rank must call it, rank 0 writes."""
    tensors = {}
    for prefix, part in parts.items():
        tensors |= {name: whole(tensor) for name, tensor in part.tensors(prefix).items()}
    if not is_main:
        return

    def write(folder):
        save_file(tensors, folder / "state.safetensors")
        record = {"step": step, **counters, "sha256": checksum(folder / "state.safetensors")}
        (folder / "state.json").write_text(json.dumps(record))
    try:
        write_aside(stage / "checkpoints" / f"{step:08d}", write)
    except (OSError, SafetensorError) as error:
        kept = checkpoints(stage)
        raise SystemExit(f"cannot write a checkpoint in {stage / 'checkpoints'}: {error}. "
                         + (f"{kept[-1]} is kept: make room, then run the same command again" if kept else
                            "Make room, then run the same command again")) from None
    for old in checkpoints(stage)[:-keep]:
        shutil.rmtree(old)


def checkpoints(stage: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in (stage / "checkpoints").glob("*") if p.name.isdigit())


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint is what was written: both files are there and the checksum fits."""
    try:
        return json.loads((folder / "state.json").read_text())["sha256"] == checksum(folder / "state.safetensors")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load_checkpoint(stage: Path, parts: dict[str, Trainable], say=print) -> dict:
    """Fill `parts` from the newest checkpoint; returns its counters ("step", ...), or {} when there is none.

    A damaged checkpoint is named and the one before it used. Raises ValueError for one of another network, or when all
    are damaged.
    """
    found = checkpoints(stage)
    if not found:
        return {}
    damaged = []
    while found and not is_whole(found[-1]):
        damaged.append(found.pop())
        say(f"{damaged[-1]} is damaged (truncated, or not what was written) and is left out")
    if not found:
        raise ValueError(f"every checkpoint in {stage / 'checkpoints'} is damaged; --fresh trains the stage anew")
    with safe_open(found[-1] / "state.safetensors", "pt") as file:
        targets = {}
        for prefix, part in parts.items():
            targets |= part.tensors(prefix)
        if set(file.keys()) != set(targets):
            raise ValueError(f"{found[-1]}: the training state of another network; start anew with --fresh, or use "
                             f"another --run-dir")
        for name, tensor in targets.items():
            fill(tensor, file.get_tensor(name))
    return json.loads((found[-1] / "state.json").read_text())


def save_model(stage: Path, weights: dict, config: ModelConfig, is_main: bool) -> None:
    """model.safetensors: the finished stage's weights with the network's config in the file's header."""
    tensors = {name: whole(tensor) for name, tensor in weights.items()}
    if is_main:
        aside = stage / "model.safetensors.partial"
        save_file(tensors, aside, metadata={"model_config": json.dumps(asdict(config))})
        aside.rename(stage / "model.safetensors")


def load_model(stage: Path) -> tuple[ModelConfig, Tensors]:
    """The config and the tensors of a finished stage. Raises FileNotFoundError for an unfinished one, ValueError for a
    damaged file."""
    path = Path(stage) / "model.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: the stage was not trained, or is not finished")
    try:
        file = safe_open(path, "pt")
        config = ModelConfig(**json.loads(file.metadata()["model_config"]))
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: truncated, or not a stage's weights ({error}); --fresh trains the stage anew") from None
    return config, Tensors({name: partial(file.get_tensor, name) for name in file.keys()})
