"""Training state on disk: EMA, checkpoints that resume bit for bit, a stage's final weights.

A stage's folder holds config.json, log.jsonl, codec.safetensors (what turns clips into latents),
checkpoints/STEP/ (everything that training needs to go on) and, when the stage is finished,
model.safetensors (what is sampled: the EMA of the network, or of its adapter). Checkpoints are
written and read by torch.distributed.checkpoint: every rank writes the shards that it holds, and
another number of ranks may read them. Only safetensors and JSON are read: nothing runs code.
"""
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.distributed.tensor import DTensor, distribute_tensor

import cli
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

    def __contains__(self, name) -> bool:
        return name in self.makers                               # without making it

    def __iter__(self):
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


class Trainable:
    """A network (or an adapter, lora.Adapted) that is trained, its AdamW state and, optionally, the
    EMA of its weights (fp32, sharded alike)."""

    def __init__(self, network, lr: float, betas, weight_decay: float, with_ema: bool):
        self.network = network
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=lr, betas=betas,
                                           weight_decay=weight_decay, fused=True)
        # AdamW makes its state at the first step; made here, saving has no special first case.
        for p in self.optimizer.param_groups[0]["params"]:
            self.optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                                       "exp_avg": torch.zeros_like(p),
                                       "exp_avg_sq": torch.zeros_like(p)}
        self.ema = None
        if with_ema:
            self.ema = {name: p.detach().clone() for name, p in network.named_parameters()}

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """ema = decay * ema + (1 - decay) * weights; 0 copies the weights: a late EMA starts so."""
        for name, p in self.network.named_parameters():
            self.ema[name].lerp_(p, 1 - decay)

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """Every tensor of the training state, by name. The tensors themselves, not copies."""
        out = {}
        for name, p in self.network.named_parameters():
            out[f"{prefix}.weights.{name}"] = p.detach()
            for key, value in self.optimizer.state[p].items():
                out[f"{prefix}.{key}.{name}"] = value
            if self.ema is not None:
                out[f"{prefix}.ema.{name}"] = self.ema[name]
        return out


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The unsharded tensor on the CPU; every rank must call it."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu().contiguous()


@torch.no_grad()
def load_weights(network: torch.nn.Module, state: dict, source) -> None:
    """Fill a network without its adapters, or an adapter (lora.Adapted), sharded or not, from whole
    tensors. Raises ValueError naming the first tensor that is missing, left over or misshapen."""
    parameters = {name: p for name, p in network.named_parameters() if ".adapters." not in name}
    for name in sorted(parameters.keys() ^ state.keys()):
        wrong = "missing" if name in parameters else "not of this network"
        raise ValueError(f"{source}: tensor {name} is {wrong}")
    for name, p in parameters.items():
        value = state[name]                          # read once: it may come from a file
        if p.shape != value.shape:
            raise ValueError(f"{source}: tensor {name} has shape {tuple(value.shape)}, the "
                             f"network's has {tuple(p.shape)}")
        if isinstance(p, DTensor):                   # every rank has read the whole tensor
            value = distribute_tensor(value.to(p.device), p.device_mesh, p.placements,
                                      src_data_rank=None)
        p.copy_(value)


def sync(files) -> None:
    """Flush files to the disk."""
    for file in files:
        if file.is_file():
            cli.flush(file)


@contextmanager
def folder_aside(folder: Path):
    """A folder to write in, which becomes `folder` in one instant, flushed to the disk: there is no
    such folder yet, or an empty one. A kill leaves nothing or all of it."""
    aside = aside_of(folder)
    try:
        yield aside
        sync(aside.rglob("*"))
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def aside_of(folder: Path) -> Path:
    """An empty folder to write `folder` in."""
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def save_checkpoint(stage: Path, step: int, parts: dict[str, Trainable], counters: dict,
                    world: World) -> None:
    """Write checkpoints/STEP after `step` updates; the newest two stay. Every rank must call it,
    and writes its shards. Raises OSError, on every rank, when the disk is full or cannot be
    written; the checkpoints before are kept."""
    folder = stage / "checkpoints" / f"{step:08d}"
    aside = folder.with_name(folder.name + ".partial")

    def together(act):
        """act's result on this rank; all ranks end when it fails on one."""
        problem, result = "", None
        try:
            result = act()
        except (OSError, SafetensorError, dcp.CheckpointException) as error:
            problem = (str(error).strip() or type(error).__name__).splitlines()[-1]
        if sum_over_ranks(float(bool(problem)), world=world)[0]:
            kept = "".join(f"{path} is kept. " for path in checkpoints(stage)[-1:])
            raise OSError(f"cannot write {aside}: {problem or 'see the other ranks'}. {kept}Make "
                          f"room, then run the same command again")
        return result

    together(lambda: world.is_main and aside_of(folder))
    together(lambda: write_shards(aside, parts))
    # Its own files: those of other nodes may be late to show on a network disk.
    own = sorted(aside.glob(f"shard-{world.rank + 1:05d}-*"))
    sums = together(lambda: flushed_sums(own))       # nobody waits for a rank that has failed
    sums = merge_over_ranks(sums, world)
    state = {"step": step, **counters, "sha256": dict(sorted(sums.items()))}
    together(lambda: world.is_main and publish(aside, folder, state))


def write_shards(aside: Path, parts: dict[str, Trainable]) -> None:
    writer = dcp.HuggingFaceStorageWriter(str(aside), save_distributed=True)
    writer.per_thread_copy_ahead = 0     # ahead it would copy all into pinned memory, and keep that
    dcp.save(training_state(parts), storage_writer=writer)


def training_state(parts: dict[str, Trainable]) -> dict[str, torch.Tensor]:
    tensors = {}
    for prefix, part in parts.items():
        tensors |= part.tensors(prefix)
    return tensors


def flushed_sums(files: list[Path]) -> dict[str, str]:
    """Checksums of files, which are flushed to the disk before."""
    sync(files)
    return {file.name: checksum(file) for file in files}


def publish(aside: Path, folder: Path, state: dict) -> None:
    """The last file of a checkpoint, which says that it is complete; its name; old ones go."""
    text = json.dumps(state | {"own_sha256": json_checksum(state)})
    (aside / "state.json").write_text(text)
    sync([aside / "state.json"])
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    for old in [*checkpoints(folder.parent.parent)[:-2], *folder.parent.glob("*.partial")]:
        shutil.rmtree(old, ignore_errors=True)


def json_checksum(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def checkpoints(stage: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in (stage / "checkpoints").glob("*") if p.name.isdigit())


def is_whole(folder: Path, world: World) -> bool:
    """Whether a checkpoint is what was written: every file is there and its checksum fits."""
    try:
        state = json.loads((folder / "state.json").read_text())
        sums, own = state["sha256"], state.pop("own_sha256")
        bad = not sums or own != json_checksum(state) or state["step"] != int(folder.name)
        for name in sorted(sums)[world.rank::world.size]:            # each rank reads some
            bad = bad or checksum(folder / name) != sums[name]
    except (OSError, ValueError, KeyError, TypeError):
        bad = True
    return sum_over_ranks(float(bad), world=world)[0] == 0


def load_checkpoint(stage: Path, parts: dict[str, Trainable], world: World, say) -> dict:
    """Fill `parts` from the newest checkpoint, whatever number of ranks wrote it; returns its
    counters ("step", ...), or {} when there is none.

    A damaged checkpoint is named and the one before it used. Raises ValueError for one of another
    network, or when all are damaged.
    """
    found = on_main(lambda: checkpoints(stage), world)
    if not found:
        return {}
    while found and not is_whole(found[-1], world):
        say(f"{found.pop()} is damaged (truncated, not what was written, or by an older version) "
            f"and is left out")
    if not found:
        raise ValueError(f"every checkpoint in {stage / 'checkpoints'} is damaged; --fresh trains "
                         f"the stage anew")
    tensors = training_state(parts)
    reader = dcp.HuggingFaceStorageReader(str(found[-1]))
    saved = reader.read_metadata().state_dict_metadata
    sizes = {name: entry.size for name, entry in saved.items()}
    if sizes != {name: tensor.shape for name, tensor in tensors.items()}:
        raise ValueError(f"{found[-1]}: the training state of another network; start anew with "
                         f"--fresh, or use another --run-dir")
    dcp.load(tensors, storage_reader=reader)
    return json.loads((found[-1] / "state.json").read_text())


def has_model(stage: Path) -> bool:
    """Whether a stage's final weights are there, and whole."""
    try:
        return bool(load_model(stage))
    except (ValueError, FileNotFoundError):
        return False


def save_model(stage: Path, weights: dict, config: ModelConfig, is_main: bool,
               adapter: dict | None = None) -> None:
    """model.safetensors: the finished stage's weights, with the network's config in its header.

    adapter: for the weights of an adapter its rank, alpha, targets, and base, the path of the
    weights that it adapts. Every rank must call it. Tensors are gathered, and written, one at a
    time: no rank ever holds the whole network.
    """
    metadata = {"model_config": json.dumps(asdict(config))}
    if adapter:
        metadata["adapter"] = json.dumps(adapter)
    if not is_main:
        for tensor in weights.values():
            gathered(tensor)
        return
    with cli.written_aside(stage / "model.safetensors") as aside:
        write_tensors(aside, weights, metadata)


OWN_SUM, NO_SUM = "own_sha256", b"0" * 64


def write_tensors(path: Path, tensors: Mapping, metadata: dict) -> None:
    """A safetensors file written one tensor at a time, sharded ones gathered. Each is asked for
    twice (`Tensors`). The header holds the SHA-256 of the file as it is with NO_SUM in its place.
    """
    header, end = {"__metadata__": {OWN_SUM: NO_SUM.decode(), **metadata}}, 0
    for name, x in tensors.items():
        start, end = end, end + x.numel() * x.dtype.itemsize
        header[name] = {"dtype": dtype_name(x.dtype), "shape": list(x.shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    found = hashlib.sha256(text)
    with open(path, "wb") as file:
        file.write(text)
        for x in tensors.values():
            piece = gathered(x).view(-1).view(torch.uint8).numpy().data
            file.write(piece)
            found.update(piece)
        file.seek(text.index(NO_SUM))
        file.write(found.hexdigest().encode())


def recorded_sum(path: Path) -> str:
    """The checksum that write_tensors left in a file, or, of another program's file, its own."""
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get(OWN_SUM) or checksum(path)


def open_checked(path: Path):
    """A safetensors file, opened. Raises ValueError for one that is not what write_tensors wrote,
    which one process of a node looks at; of another program's, for what is no whole file."""
    path = Path(path).resolve()
    try:
        file, stat = safe_open(path, "pt"), os.stat(path)
        written = (file.metadata() or {}).get(OWN_SUM)
        looks = os.environ.get("LOCAL_RANK", "0") == "0"
        if written and looks and written != sum_without(path, written, stat.st_size,
                                                        stat.st_mtime_ns):
            raise ValueError("it is not what was written: the checksum differs")
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    return file


@cache
def sum_without(path: Path, written: str, size: int, time: int) -> str:
    """The checksum of a file with NO_SUM in place of `written`; once for a file, while its size and
    time stay the same."""
    with open(path, "rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
        found = hashlib.sha256(length + header.replace(written.encode(), NO_SUM, 1))
        while piece := file.read(2**22):
            found.update(piece)
    return found.hexdigest()


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file. Errors as for open_checked."""
    file = open_checked(path)
    return {name: file.get_tensor(name) for name in file.keys()}


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """A type's name in a safetensors header, from a file of the library's own."""
    file = save({"x": torch.empty(0, dtype=dtype)})
    return json.loads(file[8:])["x"]["dtype"]            # 8 bytes say how long the header is


def load_model(stage: Path) -> tuple[ModelConfig, Tensors, dict | None]:
    """The config and the tensors of a finished stage; and, where they are those of an adapter, what
    `save_model` said of it. Raises FileNotFoundError for an unfinished one, ValueError for a
    damaged file."""
    path = Path(stage) / "model.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: the stage was not trained, or is not "
                                f"finished")
    remedy = "--fresh trains the stage anew"
    if checkpoints(Path(stage)):
        remedy = "the command that trains the stage makes it again, from the checkpoint beside it"
    try:
        file = open_checked(path)
        metadata = file.metadata() or {}
        settings = json.loads(metadata["model_config"])
        adapter = json.loads(metadata.get("adapter", "null"))
    except KeyError:
        raise ValueError(f"{path}: no stage wrote it; give the file itself in place of its folder, "
                         f"if it holds others' weights, or else {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None
    if newer := sorted(settings.keys() - {f.name for f in fields(ModelConfig)}):
        raise ValueError(f"{path} was written by another version of this code, whose networks have "
                         f"{', '.join(newer)}: use that one, or train the stage anew with --fresh")
    config = ModelConfig(**settings)
    if adapter:                              # relative to the stage, so that the run may move
        adapter["base"] = os.path.normpath(os.path.join(os.path.abspath(stage), adapter["base"]))
    return config, Tensors({name: partial(file.get_tensor, name) for name in file.keys()}), adapter
