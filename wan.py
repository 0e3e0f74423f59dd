"""The bridge to the real world: weights of Wan2.1 and AnyFlow in, weights for Diffusers out.

    python wan.py show PATH                     what a file or folder of weights holds
    python wan.py export RUN/STAGE --to DIR     a folder that Diffusers' AnyFlowPipeline opens; an
                                                adapter is merged
    python wan.py export RUN/STAGE --to NAME.safetensors     the adapter alone, for a pipeline made
                                                             with `export BASE`

Read: safetensors (one file, or shards with an index) and .pt / .pth with tensors only
(weights_only=True: no code in a file is ever run), in the layout of Diffusers or Wan's own, bare or
under an entry such as `generator_ema`.
"""
import argparse
import hashlib
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import cli
from config import RELEASED_CHUNKS, finished, record_of


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser("Weights of Wan2.1 and AnyFlow, in and out.",
                        "python wan.py export runs/wan/distill --to anyflow "
                        "--base Wan2.1-T2V-1.3B-Diffusers")
    parser.add_argument("what", type=cli.choice(("show", "export")),
                        help="show: what a path holds; export: for Diffusers")
    parser.add_argument("path", type=Path, help="a file or folder of weights; for export a "
                        "finished stage, RUN/STAGE, or Wan weights to become a flow map")
    parser.add_argument("--to", type=Path, help="export: the new folder, or NAME.safetensors for "
                        "the adapter alone (default none)")
    parser.add_argument("--base", type=Path, help="export: a Wan pipeline folder, for text "
                        "encoder, tokenizer and autoencoder; export, show: the weights that an "
                        "adapter is of, where they have moved (default none)")
    parser.add_argument("--copy", action="store_true",
                        help="export: copy them from --base (default off: link)")
    args = parser.parse(argv)
    if args.what == "export" and not args.to:
        parser.error("export needs --to DIR")
    return args


if __name__ == "__main__":
    cli.run(parse_args)   # answers --help and wrong flags, before what takes seconds to import

import torch
from safetensors import SafetensorError, safe_open

import checkpoint
import encoders
import lora
from checkpoint import Tensors
from model import FlowMapDiT, ModelConfig, compressed_patch_embed

# Every module by name: ours, Diffusers', Wan's own ('' where a layout has no such tensor).
TOP = (
    ("patch_embed", "patch_embedding", "patch_embedding"),
    ("far_patch_embed", "far_patch_embedding", ""),
    ("time_embed.up", "condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("time_embed.down", "condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("r_embed.up", "condition_embedder.delta_embedder.linear_1", ""),
    ("r_embed.down", "condition_embedder.delta_embedder.linear_2", ""),
    ("time_proj", "condition_embedder.time_proj", "time_projection.1"),
    ("text_embed.up", "condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("text_embed.down", "condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("image_embed.norm_in", "condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("image_embed.mlp.up", "condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("image_embed.mlp.down", "condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("image_embed.norm_out", "condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("head_modulation", "scale_shift_table", "head.modulation"),
    ("head", "proj_out", "head.head"),
)
BLOCK = (
    ("self_attn.q", "attn1.to_q", "self_attn.q"),
    ("self_attn.k", "attn1.to_k", "self_attn.k"),
    ("self_attn.v", "attn1.to_v", "self_attn.v"),
    ("self_attn.out", "attn1.to_out.0", "self_attn.o"),
    ("self_attn.norm_q", "attn1.norm_q", "self_attn.norm_q"),
    ("self_attn.norm_k", "attn1.norm_k", "self_attn.norm_k"),
    ("cross_attn.q", "attn2.to_q", "cross_attn.q"),
    ("cross_attn.k", "attn2.to_k", "cross_attn.k"),
    ("cross_attn.v", "attn2.to_v", "cross_attn.v"),
    ("cross_attn.out", "attn2.to_out.0", "cross_attn.o"),
    ("cross_attn.norm_q", "attn2.norm_q", "cross_attn.norm_q"),
    ("cross_attn.norm_k", "attn2.norm_k", "cross_attn.norm_k"),
    ("cross_attn.k_image", "attn2.add_k_proj", "cross_attn.k_img"),
    ("cross_attn.v_image", "attn2.add_v_proj", "cross_attn.v_img"),
    ("cross_attn.norm_k_image", "attn2.norm_added_k", "cross_attn.norm_k_img"),
    ("norm_cross", "norm2", "norm3"),
    ("ffn.up", "ffn.net.0.proj", "ffn.0"),
    ("ffn.down", "ffn.net.2", "ffn.2"),
    ("modulation", "scale_shift_table", "modulation"),
)
LAYOUTS = ("diffusers", "wan")
UNUSED = "norm_added_q."      # published image-to-video weights hold it, no network ever used it
# Of all names in a file, the longest first; and of a training checkpoint, the first that is there.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "module.")
ENTRIES = ("generator_ema", "ema", "generator", "model", "state_dict")


def their_name(name: str, layout: str) -> str:
    """The name of a parameter or module of FlowMapDiT in a layout; '' where that has none."""
    prefix, table = "", TOP
    if name.startswith("blocks."):
        _, number, name = name.split(".", 2)
        prefix, table = f"blocks.{number}.", BLOCK
    for ours, diffusers, wan in table:
        if name == ours or name.startswith(ours + "."):
            theirs = diffusers if layout == "diffusers" else wan
            return theirs and prefix + theirs + name[len(ours):]
    raise AssertionError(f"no row for {name}")


# What torch.load and safetensors raise for bytes that are no weights.
UNREADABLE = (SafetensorError, RuntimeError, OSError, EOFError, AttributeError, LookupError,
              ValueError, TypeError, struct.error)


def open_tensors(path: Path) -> tuple[Tensors, dict]:
    """The tensors of a file or folder under the names they have there, and their shapes. Raises
    ValueError for what cannot be read."""
    found = {}                               # by name: what reads it, its shape
    for file in weight_files(path):
        try:
            found |= open_safetensors(file) if file.suffix == ".safetensors" else open_pickle(file)
        except UNREADABLE as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{file}: truncated, or not a file of weights ({reason})") from None
        except pickle.UnpicklingError:
            raise ValueError(f"{file}: holds more than tensors, which could run code when it is "
                             f"read; convert it to safetensors where it came from") from None
    strip = next((p for p in PREFIXES if all(name.startswith(p) for name in found)), "")
    found = {name.removeprefix(strip).replace("_fsdp_wrapped_module.", ""): pair
             for name, pair in found.items()}
    return (Tensors({name: reader for name, (reader, _) in found.items()}),
            {name: shape for name, (_, shape) in found.items()})


def open_safetensors(file: Path) -> dict:
    """Of each tensor of a file, by its name: what reads it, and its shape."""
    handle = safe_open(file, "pt")
    return {name: (partial(handle.get_tensor, name), tuple(handle.get_slice(name).get_shape()))
            for name in handle.keys()}


def open_pickle(file: Path) -> dict:
    """The same for .pt and .pth; the tensors may lie under an entry."""
    mmap = zipfile.is_zipfile(file)
    found = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    while (entry := next((e for e in ENTRIES if isinstance(found.get(e), dict)), None)):
        found = found[entry]
    return {name: (lambda tensor=tensor: tensor, tuple(tensor.shape))
            for name, tensor in found.items()
            if isinstance(name, str) and isinstance(tensor, torch.Tensor)}


def weight_files(path: Path) -> list[Path]:
    """The files of a model: `path` itself, or those of a folder or its `transformer`, by the index
    if any."""
    path = Path(path)
    if path.is_file():
        return [path]
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    if (path / "transformer_2").is_dir():
        raise ValueError(f"{path} holds two networks, one for high noise and one for low "
                         f"(Wan2.2-A14B), which must work together: not supported. One alone is "
                         f"{path / 'transformer'}")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        names = cli.read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise ValueError(f"{index}: has no weight_map of tensors to files")
        names = sorted(set(names.values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise ValueError(f"{index} names {len(names)} files, of which {', '.join(missing)} are "
                             f"missing")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    files = files or sorted([*folder.glob("*.pt"), *folder.glob("*.pth")])
    if len(files) != 1:
        found = ", ".join(f.name for f in files) or "none"
        raise ValueError(f"{folder}: expected one .safetensors, .pt or .pth file, or shards with "
                         f"an index; found {found}")
    return files


def fingerprint(place) -> str:
    """Of a finished stage its checksum; ValueError if it is damaged. Of other weights, which may be
    tens of GB, the SHA-256 of their sizes and of sixteen pieces of each file."""
    if finished(place):
        checkpoint.load_model(place)
        return checkpoint.recorded_sum(Path(place) / "model.safetensors")
    found = hashlib.sha256()
    for file in weight_files(Path(place)):
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with open(file, "rb") as opened:
            for piece in range(16):
                opened.seek(piece * size // 16)
                found.update(opened.read(2**16))
    return found.hexdigest()


def read_config(path: Path) -> dict:
    """config.json beside the weights, or {}. Raises ValueError for values that cannot be."""
    path = Path(path)
    inner = path / "transformer"
    folder = path.parent if path.is_file() else inner if inner.is_dir() else path
    found = read_json(folder / "config.json")
    numbers = {name: [found[name]] for name in NUMBERS if found.get(name) is not None}
    for name, values in (numbers | {"chunk_partition": found.get("chunk_partition") or []}).items():
        if not isinstance(values, list) or not all(type(n) is int and n >= 0 for n in values):
            raise ValueError(f"{folder / 'config.json'}: {name} is {found[name]!r}")
    return found


NUMBERS = ("num_attention_heads", "num_heads", "full_chunk_limit")       # in config.json


def read_json(file: Path) -> dict:
    """What is in a file, {} where there is none."""
    return cli.read_json(file) if file.exists() else {}


def read_record(path, config: ModelConfig, frames: int = 21, chunks=None) -> dict:
    """What a stage's config.json would say of weights that were not trained here: "chunks", one of
    so many latent frames for networks of whole clips, and the "config" of sampling. What no file
    beside the weights says is that of the released recipe."""
    path, own = Path(path), read_config(path)
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    ours = scheduler.get("_class_name") == "FlowMapEulerDiscreteScheduler"
    shift = scheduler.get("shift", 5.0) if ours else 5.0
    settings = {"shift": shift, "guidance": 5.0, "full_chunks": 0}
    if config.compressed:
        settings["full_chunks"] = own.get("full_chunk_limit", 3)
        chunks = chunks or own.get("chunk_partition") or cli.positive_ints(RELEASED_CHUNKS)
    return {"chunks": list(chunks or [frames]), "config": settings}


def load(path, second_time: bool | None = None, compressed: bool | None = None,
         base=None) -> tuple[ModelConfig, Tensors]:
    """(config, state) of a finished stage RUN/STAGE, or of Wan or AnyFlow weights. state has our
    names and reads a tensor when it is asked for: `checkpoint.load_weights` never holds more than
    the network and one tensor. A stage's adapter is merged into its base, which is looked for at
    `base` when it is no longer where it was.

    second_time, compressed: ask for a flow map, or for compressed chunks (None: as the weights are;
    False: leave them out). Tensors that are not there start as copies, see `as_flow_map`,
    `as_causal`. Raises ValueError that names the file, or the first tensor that is missing, left
    over, or of another shape.
    """
    config, state, adapter = load_apart(path, base)
    if adapter:
        scale = adapter["alpha"] / adapter["rank"]
        state = Tensors(lora.merged(state, adapter["tensors"], scale))
    return as_asked(config, state, second_time, compressed)


def load_apart(path, base=None) -> tuple[ModelConfig, Tensors, dict | None]:
    """`load` for weights as they are, without merging: (config, state, None), or (config, state of
    the base, adapter) with the adapter's "rank", "alpha" and "tensors". Where the base is itself an
    adapter stage, they are the base's base and both adapters as one."""
    if Path(path).exists() and not finished(path):
        if saved := checkpoint.checkpoints(Path(path)):
            raise ValueError(f"{path} is not finished: its last checkpoint is of update "
                             f"{int(saved[-1].name)}. To look at it, copy the run and finish the "
                             "copy there: python train.py [--causal] --stage STAGE --run-dir COPY "
                             f"--steps {int(saved[-1].name)}")
        return *load_foreign(path), None
    config, tensors, adapter = checkpoint.load_model(path)
    if not adapter:
        return config, tensors, None
    place = base_of(path, adapter, base)
    adapter["tensors"] = tensors
    below, state, first = load_apart(place, None if place == base else base)
    _, state = as_asked(below, state, config.second_time, config.compressed)
    return config, state, as_one(first, adapter) if first else adapter


def base_of(stage, adapter: dict, other=None):
    """Where the weights are that a stage's adapter adapts: where they were, or else at `other`.
    Raises ValueError for those that are not there, or have changed."""
    places = [place for place in (adapter["base"], other) if place and Path(place).exists()]
    if not places:
        raise ValueError(f"{stage} adapts the weights {adapter['base']}, which are not there: put "
                         "them, or a link to them, there again (where nothing is trained --base "
                         "may name them)")
    if adapter.get("base_sha256", "") not in ("", fingerprint(places[0])):
        raise ValueError(f"{stage} adapts other weights than {places[0]} holds now: put those "
                         "there again, or train the stage anew with --fresh")
    return places[0]


def as_one(first: dict, second: dict) -> dict:
    """One adapter (`load_apart`) in place of `second` on a base with `first`: merged, they would be
    lost in bf16 weights."""
    tensors = first["tensors"]
    if "r_embed.up.down" in second["tensors"]:
        tensors = as_flow_map(tensors)
    rank, scale = first["rank"] + second["rank"], second["alpha"] / second["rank"]
    ratio = first["alpha"] / first["rank"] / scale
    makers = lora.stacked(tensors, second["tensors"], ratio)
    return second | {"rank": rank, "alpha": scale * rank, "tensors": Tensors(makers)}


def as_asked(config: ModelConfig, state: Tensors, second_time: bool | None,
             compressed: bool | None) -> tuple[ModelConfig, Tensors]:
    """The config and tensors of a network with, or without, a second time and compressed chunks, as
    `load` says."""
    second_time = config.second_time if second_time is None else second_time
    compressed = config.compressed if compressed is None else compressed
    if second_time:
        state = as_flow_map(state)
    if compressed and not config.compressed:
        state = as_causal(state)
    unwanted = () if second_time else ("r_embed.",)
    unwanted += () if compressed else ("far_patch_embed.",)
    makers = {name: make for name, make in state.makers.items() if not name.startswith(unwanted)}
    return replace(config, second_time=second_time, compressed=compressed), Tensors(makers)


def load_foreign(path) -> tuple[ModelConfig, Tensors]:
    """`load` for weights that were not trained here, as they are."""
    tensors, shapes = open_tensors(Path(path))
    record = read_config(path)
    if record.get("deltatime_type", "r") != "r":
        raise ValueError(f"{path}: a network whose second time is {record['deltatime_type']!r}; "
                         f"only 'r' is supported")
    layout = next((x for x in LAYOUTS if their_name("time_embed.up.weight", x) in shapes), "")
    if not layout:
        some = ", ".join(sorted(tensors)[:3])
        raise ValueError(f"{path}: neither Diffusers' nor Wan's names ({len(tensors)} tensors: "
                         f"{some} ...)")
    shapes = {name: shape for name, shape in shapes.items() if UNUSED not in name}
    try:
        config = config_of(path, shapes, layout, record)
        with torch.device("meta"):
            expected = {name: tuple(p.shape) for name, p in FlowMapDiT(config).named_parameters()}
    except (IndexError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: the shapes of its tensors, with its config.json, fit no network "
                         f"of Wan's kind ({error})") from None
    theirs = {name: their_name(name, layout) for name in expected}
    for name, other in theirs.items():
        if other not in shapes:
            raise ValueError(f"{path}: tensor {other} is missing")
        if shapes[other] != expected[name]:
            raise ValueError(f"{path}: tensor {other} has shape {shapes[other]}, expected "
                             f"{expected[name]}")
    for other in sorted(shapes.keys() - set(theirs.values())):
        raise ValueError(f"{path}: tensor {other}, of shape {shapes[other]}, is not of this "
                         f"network")
    readers = {name: partial(tensors.__getitem__, other) for name, other in theirs.items()}
    return config, Tensors(readers)


def config_of(path, shapes: dict, layout: str, record: dict) -> ModelConfig:
    """The network's config, from the shapes of its tensors and the record beside them."""
    def shape(ours):
        name = their_name(ours, layout)
        if name not in shapes:
            raise ValueError(f"{path}: tensor {name} is missing")
        return shapes[name]

    embed = shape("patch_embed.weight")
    dim, channels_in, patch = embed[0], embed[1], embed[-1]
    channels = shape("head.weight")[0] // patch**2
    heads = record.get("num_attention_heads", record.get("num_heads", dim // 128))
    numbers = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
    image = shapes.get(their_name("image_embed.norm_in.weight", layout), [0])
    return ModelConfig(
        dim=dim, heads=heads, layers=max(numbers, default=-1) + 1,
        ffn_dim=shape("blocks.0.ffn.up.weight")[0], channels=channels, patch=patch,
        text_dim=shape("text_embed.up.weight")[1], freq_dim=shape("time_embed.up.weight")[1],
        image_channels=channels_in - channels, image_dim=image[0],
        second_time=their_name("r_embed.up.weight", layout) in shapes,
        compressed=their_name("far_patch_embed.weight", layout) in shapes,
        gate=record.get("gate_value", 0.25))


def as_flow_map(state: Mapping) -> Tensors:
    """Tensors of a network, or adapter, with a second time embedder, which is a copy of the first
    where there is none: at r = t the network is the teacher exactly, whatever the gate."""
    makers = {name: partial(state.__getitem__, name) for name in state}
    for name in state:
        if name.startswith("time_embed."):
            makers.setdefault(name.replace("time_embed.", "r_embed."), makers[name])
    return Tensors(makers)


def as_causal(state: Mapping) -> Tensors:
    """A bidirectional network's tensors with the compressed patch embedding added, interpolated
    from the patch embedding."""
    def make(part):
        embed = {name: state[f"patch_embed.{name}"] for name in ("weight", "bias")}
        return compressed_patch_embed(embed)[part]

    makers = {name: partial(state.__getitem__, name) for name in state}
    for part in ("weight", "bias"):
        makers[f"far_patch_embed.{part}"] = partial(make, part)
    return Tensors(makers)


def moved_down(base: Tensors, adapter: Tensors, flow_map: bool) -> tuple[Tensors, Tensors]:
    """(base, adapter) of an adapter stage that becomes a base: the compressed patch embedding,
    which adapters replace as a whole, is the base's then; and, of a flow map, the adapter of the
    second time embedder starts as that of the first."""
    makers = adapter.makers
    replaced = {name: make for name, make in makers.items() if name.startswith(lora.REPLACED)}
    adapter = Tensors({name: make for name, make in makers.items() if name not in replaced})
    if flow_map:
        adapter = as_flow_map(adapter)
    return Tensors(base.makers | replaced), adapter


def complete(adapter: Tensors, config: ModelConfig, base: Tensors) -> Tensors:
    """An adapter's tensors for a network of `config`: that of the second time embedder starts as a
    copy of the first's, the compressed patch embedding as that of the tensors `base`."""
    if config.second_time:
        adapter = as_flow_map(adapter)
    if config.compressed and "far_patch_embed.weight" not in adapter:
        names = [f"far_patch_embed.{part}" for part in ("weight", "bias")]
        adapter = Tensors(adapter.makers | {name: base.makers[name] for name in names})
    return adapter


def export(stage, to, base=None, copy: bool = False) -> Path:
    """Write a finished stage as a Diffusers pipeline folder: AnyFlowPipeline, or AnyFlowFARPipeline
    for a causal network. Or Wan's weights, or a teacher's, as the flow map that training starts
    from, for adapters that are kept apart (`export_adapter`).

    base: a Wan pipeline folder whose text encoder, tokenizer and autoencoder are linked, or copied
    with `copy`. Raises ValueError for a network that Diffusers' classes cannot hold, as a toy one.
    """
    stage, to = Path(stage), Path(to).resolve()      # "." has no name
    config, state = load(stage, second_time=True, base=base)
    if finished(stage):
        record = record_of(stage, "chunks", "shift")
    else:
        record = read_record(stage, config)
    theirs = diffusers_config(stage, config, record)
    if to.exists() and any(to.iterdir()):
        raise ValueError(f"{to} is not empty: give a new folder")
    with checkpoint.folder_aside(to) as aside:
        write_pipeline(aside, theirs, state, record["config"]["shift"], base, copy)
    return to


def diffusers_config(stage, c: ModelConfig, record: dict) -> dict:
    """config.json of the network in Diffusers' class for it."""
    if c.image_channels:
        raise ValueError(f"{stage}: Diffusers has no class for a flow map with Wan2.1-I2V's image "
                         f"inputs")
    if c.output_skip or c.time_scale != 1000 or c.added:
        raise ValueError(f"{stage}: Diffusers has no class for it: output_skip {c.output_skip} "
                         f"(must be 0), time_scale {c.time_scale} (1000), added {c.added} (False)")
    config = {
        "_class_name": "AnyFlowTransformer3DModel", "patch_size": [1, c.patch, c.patch],
        "num_attention_heads": c.heads, "attention_head_dim": c.dim // c.heads,
        "in_channels": c.channels, "out_channels": c.channels, "text_dim": c.text_dim,
        "freq_dim": c.freq_dim, "ffn_dim": c.ffn_dim, "num_layers": c.layers,
        "cross_attn_norm": True, "gate_value": c.gate, "deltatime_type": "r"}
    if len(record["chunks"]) == 1:
        return config
    if not c.compressed:
        raise ValueError(f"{stage}: Diffusers' causal class needs a compressed patch embedding "
                         f"(--full-chunks above 0)")
    return config | {
        "_class_name": "AnyFlowFARTransformer3DModel", "chunk_partition": record["chunks"],
        "compressed_patch_size": [1, 2 * c.patch, 2 * c.patch],
        "full_chunk_limit": record["config"]["full_chunks"]}


PARTS = ("text_encoder", "tokenizer", "vae")                     # of a pipeline, beside the network


def write_pipeline(folder: Path, config: dict, state: Tensors, shift: float, base, copy) -> None:
    """A pipeline folder of a network with Diffusers' `config` and tensors `state`."""
    kind = config["_class_name"]
    index = {"_class_name": "AnyFlowFARPipeline" if "FAR" in kind else "AnyFlowPipeline",
             "transformer": ["diffusers", kind],
             "scheduler": ["diffusers", "FlowMapEulerDiscreteScheduler"]}
    parts = cli.read_json(Path(base) / "model_index.json") if base else {}
    for name in PARTS:
        index[name] = parts.get(name, [None, None])
        if base and copy:
            shutil.copytree(encoders.part_of(base, name), folder / name)
        elif base:
            target = encoders.part_of(base, name).resolve()
            (folder / name).symlink_to(target, target_is_directory=True)

    theirs = {their_name(name, "diffusers"): make for name, make in state.makers.items()}
    (folder / "transformer").mkdir()
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    checkpoint.write_tensors(file, Tensors(theirs), {"format": "pt"})
    (folder / "transformer" / "config.json").write_text(json.dumps(config, indent=1))

    scheduler = {"_class_name": "FlowMapEulerDiscreteScheduler", "num_train_timesteps": 1000,
                 "shift": shift}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))


def export_adapter(stage, to) -> Path:
    """Write the adapter of a finished stage as a LoRA file that Diffusers' pipelines load onto the
    base's flow map; alpha / rank is multiplied into its second matrices. Raises ValueError where
    there is no adapter, or more than low-rank pairs."""
    to = Path(to)
    _, tensors, adapter = checkpoint.load_model(stage)
    if not adapter:
        raise ValueError(f"{stage} has all its weights trained and no adapter: export it to a "
                         f"folder")
    if any(name.startswith(lora.REPLACED) for name in tensors):
        raise ValueError(f"{stage} trains {', '.join(lora.REPLACED)} as a whole, which no LoRA "
                         f"file can hold: export it to a folder")
    if to.exists():
        raise ValueError(f"{to} is there already: give a new file")
    scale = adapter["alpha"] / adapter["rank"]
    state = {}
    for name, tensor in as_flow_map(tensors).items():            # a teacher's for both times
        path, part = name.rsplit(".", 1)
        path = their_name(path, "diffusers")
        if part == "down":
            state[f"transformer.{path}.lora_A.weight"] = tensor
        else:
            state[f"transformer.{path}.lora_B.weight"] = tensor * scale
    with cli.written_aside(to) as aside:
        checkpoint.write_tensors(aside, state, {"format": "pt"})
    return to


def show(path: Path, base=None) -> None:
    config, state = load(path, base=base)
    with torch.device("meta"):
        count = sum(p.numel() for p in FlowMapDiT(config).parameters())
    print(f"{path}: {count:,} parameters in {len(state)} tensors, float32 "
          f"{4 * count / 2**30:.1f} GiB\n{asdict(config)}")


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.what == "show":
        show(args.path, args.base)
    elif args.to.suffix == ".safetensors":
        print(export_adapter(args.path, args.to))
    else:
        print(export(args.path, args.to, args.base, args.copy))


if __name__ == "__main__":
    cli.run(main)
