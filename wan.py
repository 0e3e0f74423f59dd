"""The bridge to the real world: Wan2.1 and AnyFlow weights in, weights for Diffusers out (METHOD section 3).

    python wan.py show PATH                          what a file or folder of weights holds
    python wan.py export RUN/STAGE --to DIR          a folder that Diffusers' AnyFlowPipeline opens; an adapter is merged
    python wan.py export RUN/STAGE --to NAME.safetensors          the adapter alone, for a pipeline made with `export BASE`

Read: safetensors (one file, or shards with an index) and .pt / .pth with tensors only (weights_only=True: no code in a file
is ever run), in the layout of Diffusers or Wan's own, bare or under an entry such as `generator_ema`.
"""
import json
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import checkpoint
import cli
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
    *((f"{attn}.{ours}", f"{theirs}.{to}", f"{attn}.{wan}") for attn, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
      for ours, to, wan in (("q", "to_q", "q"), ("k", "to_k", "k"), ("v", "to_v", "v"), ("out", "to_out.0", "o"),
                            ("norm_q", "norm_q", "norm_q"), ("norm_k", "norm_k", "norm_k"))),
    ("cross_attn.k_image", "attn2.add_k_proj", "cross_attn.k_img"),
    ("cross_attn.v_image", "attn2.add_v_proj", "cross_attn.v_img"),
    ("cross_attn.norm_k_image", "attn2.norm_added_k", "cross_attn.norm_k_img"),
    ("norm_cross", "norm2", "norm3"),
    ("ffn.up", "ffn.net.0.proj", "ffn.0"),
    ("ffn.down", "ffn.net.2", "ffn.2"),
    ("modulation", "scale_shift_table", "modulation"),
)
LAYOUTS = ("diffusers", "wan")
UNUSED = "norm_added_q."          # published image-to-video weights hold it, and no network ever used it
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "module.")         # of all names in a file, the longest first
ENTRIES = ("generator_ema", "ema", "generator", "model", "state_dict")      # of a training checkpoint, the first that is there


def their_name(name: str, layout: str) -> str:
    """Our tensor's name in a layout; '' where that layout has none. name: of a parameter of FlowMapDiT."""
    prefix, table = "", TOP
    if name.startswith("blocks."):
        _, number, name = name.split(".", 2)
        prefix, table = f"blocks.{number}.", BLOCK
    for ours, *theirs in table:
        if name == ours or name.startswith(ours + "."):
            theirs = theirs[LAYOUTS.index(layout)]
            return theirs and prefix + theirs + name[len(ours):]
    raise AssertionError(f"no row for {name}")


def open_tensors(path: Path) -> tuple[Tensors, dict]:
    """The tensors of a file or folder under the names they have there, and their shapes. Raises ValueError for what cannot be
    read."""
    files = weight_files(path)
    readers, shapes = {}, {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                handle = safe_open(file, "pt")
                for name in handle.keys():
                    readers[name] = partial(handle.get_tensor, name)
                    shapes[name] = tuple(handle.get_slice(name).get_shape())
            else:
                found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
                while (entry := next((e for e in ENTRIES if isinstance(found.get(e), dict)), None)):
                    found = found[entry]
                for name, tensor in found.items():
                    if isinstance(tensor, torch.Tensor):
                        readers[name] = lambda tensor=tensor: tensor
                        shapes[name] = tuple(tensor.shape)
        except (SafetensorError, RuntimeError, OSError, EOFError, AttributeError) as error:
            raise ValueError(f"{file}: truncated, or not a file of weights ({str(error).splitlines()[0]})") from None
        except Exception as error:                               # the unpickler's own, which torch exposes by this name only
            if type(error).__name__ != "UnpicklingError":
                raise
            raise ValueError(f"{file}: holds more than tensors, which could run code when it is read; convert it to "
                             f"safetensors where it came from") from None
    strip = [prefix for prefix in PREFIXES if readers and all(name.startswith(prefix) for name in readers)]
    def plain(name):
        return name.removeprefix(strip[0] if strip else "").replace("_fsdp_wrapped_module.", "")
    return Tensors({plain(n): r for n, r in readers.items()}), {plain(n): s for n, s in shapes.items()}


def weight_files(path: Path) -> list[Path]:
    """The files of a model: `path` itself, or those of a folder (or of its folder `transformer`), by the index if any."""
    path = Path(path)
    if path.is_file():
        return [path]
    if (path / "transformer_2").is_dir():
        raise ValueError(f"{path} holds two networks, one for high noise and one for low (Wan2.2-A14B), which must work "
                         f"together: not supported. One alone is {path / 'transformer'}")
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    for index in sorted(folder.glob("*.safetensors.index.json")):
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise ValueError(f"{index} names {len(names)} files, of which {', '.join(missing)} are missing")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors")) or sorted([*folder.glob("*.pt"), *folder.glob("*.pth")])
    if len(files) != 1:
        raise ValueError(f"{folder}: expected one .safetensors, .pt or .pth file, or shards with an index; found "
                         f"{', '.join(f.name for f in files) or 'none'}")
    return files


def read_config(path: Path) -> dict:
    """config.json beside the weights, or {}."""
    path = Path(path)
    folder = path.parent if path.is_file() else path / "transformer" if (path / "transformer").is_dir() else path
    return json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}


def read_record(path, config: ModelConfig, frames: int = 21, chunks=None) -> dict:
    """What a stage's config.json would say of weights that were not trained here: "chunks", for clips of so many latent frames
    unless they are given, and the "config" of sampling. What no file beside the weights says is that of the released recipe."""
    path, own = Path(path), read_config(path)
    scheduler = path / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(scheduler.read_text()) if scheduler.exists() else {}
    shift = scheduler["shift"] if scheduler.get("_class_name") == "FlowMapEulerDiscreteScheduler" else 5.0
    if not chunks and config.compressed:                         # 1, 3, 3, ..., and what is left
        chunks = own.get("chunk_partition") or [min(n, frames - start) for n, start in
                                                zip([1, *[3] * frames], [0, *range(1, frames, 3)])]
    full_chunks = own.get("full_chunk_limit", 3) if config.compressed else 0
    return {"chunks": list(chunks or [frames]), "config": {"shift": shift, "guidance": 5.0, "full_chunks": full_chunks}}


def load(path, second_time: bool | None = None, compressed: bool | None = None, base=None) -> tuple[ModelConfig, Tensors]:
    """(config, state) of the weights at `path`, a finished stage RUN/STAGE or Wan or AnyFlow weights: state has our names and
    reads each tensor when it is asked for, so that `checkpoint.load_weights` never holds more than the network and one
    tensor. A stage's adapter is merged into its base, which is looked for at `base` when it is no longer where it was.

    second_time, compressed: ask for a flow map, or a causal network with compressed chunks. Where the weights have no such
    tensors they start as the method says: the second time embedder as a copy of the first, the compressed patch
    embedding as the interpolated one. None: as the weights are. False: leave them out.
    Raises ValueError that names the file, or the first tensor that is missing, left over, or of another shape.
    """
    config, state, adapter = load_apart(path, base)
    if adapter:
        state = Tensors(lora.merged(state, adapter["tensors"], adapter["alpha"] / adapter["rank"]))
    if second_time is False:
        state = Tensors({name: maker for name, maker in state.makers.items() if not name.startswith("r_embed.")})
    if compressed is False:
        state = Tensors({name: maker for name, maker in state.makers.items() if not name.startswith("far_patch_embed.")})
    if second_time and not config.second_time:
        state = as_flow_map(state)
    if compressed and not config.compressed:
        state = as_causal(state)
    asked = {"second_time": second_time, "compressed": compressed}
    return replace(config, **{flag: on for flag, on in asked.items() if on is not None}), state


def load_apart(path, base=None) -> tuple[ModelConfig, Tensors, dict | None]:
    """`load` for weights as they are, without merging: (config, state, None), or (config, state of the base, adapter) with the
    adapter's "rank", "alpha" and "tensors"."""
    if Path(path).exists() and not (Path(path) / "model.safetensors").exists():
        return *load_foreign(path), None
    config, state, adapter = checkpoint.load_model(path)
    if not adapter:
        return config, state, None
    place = next((place for place in (adapter["base"], base) if place and Path(place).exists()), None)
    if not place:
        raise ValueError(f"{path} adapts the weights {adapter['base']}, which are not there: give their folder with --base")
    return config, load(place, config.second_time, config.compressed)[1], adapter | {"tensors": state}


def load_foreign(path) -> tuple[ModelConfig, Tensors]:
    """`load` for weights that were not trained here, as they are."""
    (tensors, shapes), record = open_tensors(Path(path)), read_config(path)
    if record.get("deltatime_type", "r") != "r":
        raise ValueError(f"{path}: a network whose second time is {record['deltatime_type']!r}; only 'r' is supported")
    marks = zip(LAYOUTS, ("condition_embedder.time_embedder.linear_1.weight", "time_embedding.0.weight"))
    layout = next((layout for layout, name in marks if name in shapes), None)
    if layout is None:
        some = ", ".join(sorted(tensors)[:3])
        raise ValueError(f"{path}: neither Diffusers' nor Wan's names ({len(tensors)} tensors: {some} ...)")
    shapes = {name: size for name, size in shapes.items() if UNUSED not in name}

    def shape(ours):
        name = their_name(ours, layout)
        if name not in shapes:
            raise ValueError(f"{path}: tensor {name} is missing")
        return shapes[name]
    patch, up, picture = shape("patch_embed.weight"), shape("time_embed.up.weight"), their_name("image_embed.norm_in.weight", layout)
    channels = shape("head.weight")[0] // patch[-1] ** 2
    has = {flag: bool(their_name(name, layout)) and their_name(name, layout) in tensors
           for flag, name in (("second_time", "r_embed.up.weight"), ("compressed", "far_patch_embed.weight"))}
    blocks = {int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")}
    config = ModelConfig(dim=patch[0], heads=record.get("num_attention_heads", record.get("num_heads", patch[0] // 128)),
                         layers=max(blocks, default=-1) + 1, ffn_dim=shape("blocks.0.ffn.up.weight")[0], channels=channels,
                         image_channels=patch[1] - channels, image_dim=shapes.get(picture, [0])[0],
                         patch=patch[-1], text_dim=shape("text_embed.up.weight")[1], freq_dim=up[1],
                         gate=record.get("gate_value", 0.25), **has)
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in FlowMapDiT(config).named_parameters()}
    theirs = {name: their_name(name, layout) for name in expected}
    for name, other in theirs.items():
        if other not in shapes:
            raise ValueError(f"{path}: tensor {other} is missing")
        if shapes[other] != expected[name]:
            raise ValueError(f"{path}: tensor {other} has shape {shapes[other]}, expected {expected[name]}")
    for other in sorted(shapes.keys() - set(theirs.values())):
        raise ValueError(f"{path}: tensor {other}, of shape {shapes[other]}, is not of this network")
    return config, Tensors({name: partial(tensors.__getitem__, other) for name, other in theirs.items()})


def as_flow_map(state: Mapping) -> Tensors:
    """A plain teacher's tensors with the second time embedder added, a copy of the first: at r = t
    the network is the teacher exactly, whatever the gate."""
    makers = {name: partial(state.__getitem__, name) for name in state}
    for name in state:
        if name.startswith("time_embed."):
            makers[name.replace("time_embed.", "r_embed.")] = makers[name]
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


def export(stage, to, base=None, copy: bool = False) -> Path:
    """Write a finished stage as a Diffusers pipeline folder: AnyFlowPipeline, or AnyFlowFARPipeline for a causal network. Or
    Wan's weights as the flow map that training starts from, for adapters that are kept apart (`export_adapter`).

    base: a Wan pipeline folder whose text encoder, tokenizer and autoencoder are linked, or copied with `copy`. Raises
    ValueError for a network that Diffusers' classes cannot hold (a toy one, or a teacher without a second time).
    """
    stage, to = Path(stage), Path(to)
    if (stage / "model.safetensors").exists() or not stage.exists():
        (c, state), record = load(stage, base=base), json.loads((stage / "config.json").read_text())
    else:
        c, state = load(stage, second_time=True)
        record = read_record(stage, c)
    if c.image_channels:
        raise ValueError(f"{stage}: Diffusers has no class for a flow map with Wan2.1-I2V's image inputs")
    if c.output_skip or c.time_scale != 1000 or not c.second_time:
        raise ValueError(f"{stage}: Diffusers has no class for it: output_skip {c.output_skip} (must be 0), time_scale "
                         f"{c.time_scale} (1000), second_time {c.second_time} (True: stage flowmap or distill)")
    causal = len(record["chunks"]) > 1
    if causal and not c.compressed:
        raise ValueError(f"{stage}: Diffusers' causal class needs a compressed patch embedding (--full-chunks above 0)")
    kind = "AnyFlowFARTransformer3DModel" if causal else "AnyFlowTransformer3DModel"
    config = {"_class_name": kind, "patch_size": [1, c.patch, c.patch], "num_attention_heads": c.heads,
              "attention_head_dim": c.dim // c.heads, "in_channels": c.channels, "out_channels": c.channels,
              "text_dim": c.text_dim, "freq_dim": c.freq_dim, "ffn_dim": c.ffn_dim, "num_layers": c.layers,
              "cross_attn_norm": True, "gate_value": c.gate, "deltatime_type": "r"}
    if causal:
        config |= {"compressed_patch_size": [1, 2 * c.patch, 2 * c.patch], "chunk_partition": record["chunks"],
                   "full_chunk_limit": record["config"]["full_chunks"]}
    index = {"_class_name": "AnyFlowFARPipeline" if causal else "AnyFlowPipeline", "transformer": ["diffusers", kind],
             "scheduler": ["diffusers", "FlowMapEulerDiscreteScheduler"]}
    parts = json.loads((Path(base) / "model_index.json").read_text()) if base else {}
    if to.exists() and any(to.iterdir()):
        raise ValueError(f"{to} is not empty: give a new folder")

    def write(folder):
        for name in ("text_encoder", "tokenizer", "vae"):
            index[name] = parts.get(name, [None, None])
            if base and copy:
                shutil.copytree(Path(base) / name, folder / name)
            elif base:
                (folder / name).symlink_to((Path(base) / name).resolve(), target_is_directory=True)
        (folder / "transformer").mkdir()
        (folder / "scheduler").mkdir()
        tensors = {their_name(name, "diffusers"): (tensor.shape, tensor.dtype, partial(state.__getitem__, name))
                   for name, tensor in state.items()}             # read twice, but never held together
        checkpoint.write_tensors(folder / "transformer" / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})
        (folder / "transformer" / "config.json").write_text(json.dumps(config, indent=1))
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(
            {"_class_name": "FlowMapEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": record["config"]["shift"]}))
        (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    checkpoint.write_aside(to, write)
    return to


def export_adapter(stage, to) -> Path:
    """Write the adapter of a finished stage as a LoRA file that Diffusers' pipelines load onto the base's flow map; alpha /
    rank is multiplied into its second matrices. Raises ValueError where there is no adapter, or more than low-rank pairs."""
    to = Path(to)
    _, tensors, adapter = checkpoint.load_model(stage)
    if not adapter:
        raise ValueError(f"{stage} has all its weights trained and no adapter: export it to a folder")
    if any(name.startswith(lora.REPLACED) for name in tensors):
        raise ValueError(f"{stage} trains {', '.join(lora.REPLACED)} as a whole, which no LoRA file can hold: export it to a folder")
    if to.exists():
        raise ValueError(f"{to} is there already: give a new file")
    state = {}
    for name, tensor in tensors.items():
        path, part = name.rsplit(".", 1)
        path = their_name(f"{path}.weight", "diffusers").removesuffix(".weight")
        state[f"transformer.{path}.lora_{'A' if part == 'down' else 'B'}.weight"] = (
            tensor if part == "down" else tensor * (adapter["alpha"] / adapter["rank"]))
    to.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, aside := to.with_suffix(".partial"), metadata={"format": "pt"})
    return aside.rename(to)


def main(argv=None) -> None:
    parser = cli.Parser("Weights of Wan2.1 and AnyFlow, in and out.",
                        "python wan.py export runs/wan/distill --to anyflow --base Wan2.1-T2V-1.3B-Diffusers")
    parser.add_argument("what", type=cli.choice(("show", "export")), help="show: what a path holds; export: for Diffusers")
    parser.add_argument("path", type=Path, help="a file or folder of weights; for export a finished stage, RUN/STAGE, "
                        "or Wan weights to become a flow map")
    parser.add_argument("--to", type=Path, help="export: the new folder, or NAME.safetensors for the adapter alone")
    parser.add_argument("--base", type=Path, help="export: a Wan pipeline folder, for text encoder, tokenizer and autoencoder")
    parser.add_argument("--copy", action="store_true", help="export: copy them from --base; the default is to link")
    args = parser.parse(argv)
    try:
        if args.what == "show":
            config, state = load(args.path)
            with torch.device("meta"):
                count = sum(p.numel() for p in FlowMapDiT(config).parameters())
            print(f"{args.path}: {count:,} parameters in {len(state)} tensors, float32 {4 * count / 2**30:.1f} GiB\n{asdict(config)}")
        else:
            if not args.to:
                parser.error("export needs --to DIR")
            print(export_adapter(args.path, args.to) if args.to.suffix == ".safetensors" else
                  export(args.path, args.to, args.base, args.copy))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    cli.run(main)
