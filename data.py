"""Where clips and captions come from: toy sets (toys.py), a folder of videos, shards of latents:

    python data.py encode --videos DIR --base WAN_DIR --out SHARDS    also under torchrun, and again
    python data.py check SHARDS                             compare every shard with its checksum

Legend:  B batch   T pixel frames   H, W picture (both `size` but in shards)   F, C, h, w latents
Videos are float32 (B, T, 3, H, W) in [-1, 1]. Every clip is a pure function of (seed, index).
"""
import hashlib
import json
import os
import struct
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
import torch.nn.functional as nnf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import cli
import encoders
from toys import SETS, draw, nearest_word

SUFFIXES = (".mp4", ".gif", ".mov", ".webm")
AGAIN = "run the command that made the shards again"
DECODER_ERRORS = (OSError, RuntimeError, ValueError, SyntaxError, IndexError, struct.error)


def open_data(name: str, frames: int = 8, size: int = 16):
    """The data set called 'shapes', 'loop' or 'digits', or the folder at path `name`; its clips are
    (frames, 3, size, size). Raises ValueError for other names, sizes and lengths."""
    if frames < 1 or size < 8:
        raise ValueError(f"clips need frames >= 1 and size >= 8, not frames = {frames}, "
                         f"size = {size}")
    if name in SETS:
        return SETS[name](frames, size)
    if (Path(name) / "manifest.json").exists():
        return Shards(name)
    if not Path(name).is_dir():
        near = nearest_word(str(name), list(SETS))
        raise ValueError(f"no data set or folder {str(name)!r}: choose shapes, loop, digits "
                         f"(nearest: {near}) or the path of a folder of clips or shards")
    return Folder(name, frames, size)


class Folder:
    """Clips (mp4, gif, mov, webm) in a folder, each captioned by a .txt file of the same name or by
    a row {"file": ..., "caption": ...} of any .jsonl file there (the .txt wins).

    Decoded once, into memory, as uint8: the short side resized to `size`, the middle cropped. What
    cannot be used is named on stderr and skipped; ValueError if nothing is left. There are no
    attributes to read back.
    """

    def __init__(self, path, frames: int = 8, size: int = 16):
        self.name, self.frames, self.size, self.attributes = str(path), frames, size, {}
        self.videos, self.texts, skipped = [], [], 0             # (frames, 3, size, size), captions
        files = videos_in(Path(path))
        captions, problems = read_captions(Path(path), {file.name for file in files})
        for file in files:
            try:
                if not captions.get(file.name):
                    raise ValueError("no caption")
                pictures = [fit_frame(frame, size, size) for frame in imageio.imiter(file)]
                if len(pictures) < frames:
                    raise ValueError(f"{len(pictures)} frames, {frames} needed")
                self.videos.append(torch.stack(pictures))
                self.texts.append(captions[file.name])
            except DECODER_ERRORS as error:
                problems.append(f"{file.name}: {first_line(error)}")
                skipped += 1
        for problem in problems:
            print(f"skipped {problem}", file=sys.stderr)
        if problems:
            print(f"{path}: {len(self.videos)} clips usable, {skipped} skipped", file=sys.stderr)
        if not self.videos:
            raise ValueError(f"no usable clip in {path}: expected videos ({', '.join(SUFFIXES)}) "
                             f"of at least {frames} frames, each with a caption in NAME.txt or as "
                             'a row {"file": ..., "caption": ...} of a .jsonl file')
        self.captions = sorted(set(self.texts))

    def __len__(self) -> int:
        return len(self.videos)

    def clips(self, indices, seed: int = 0, captions=None):
        """Video (B, T, 3, size, size) and its captions. Each len(self) consecutive indices are an
        epoch that shows every file once; (seed, index) picks the first frame."""
        if captions is not None:
            raise ValueError("the captions of a folder belong to its clips and cannot be chosen")
        video, texts = [], []
        draws = draw(seed, indices, 1)[:, 0].tolist()
        for i, u in zip(shuffled(indices, seed, len(self)), draws):
            clip = self.videos[i]
            start = int(u * (len(clip) - self.frames + 1))
            video.append(clip[start : start + self.frames])
            texts.append(self.texts[i])
        shape = (len(video), self.frames, 3, self.size, self.size)
        return torch.cat(video).view(shape).float() / 127.5 - 1, texts

    def labels(self, captions) -> dict[str, torch.Tensor]:
        return {}

    def read(self, video) -> dict[str, torch.Tensor]:
        return {}


def videos_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def shuffled(indices, seed: int, count: int) -> list[int]:
    """The clip of each index: every `count` consecutive indices are an epoch that shows all clips
    once, in an order given by (seed, epoch)."""
    orders, clips = {}, []
    for index in map(int, indices):
        epoch, place = divmod(index, count)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([1, seed, epoch]).permutation(count)
        clips.append(int(orders[epoch][place]))
    return clips


def read_captions(folder: Path, names: set[str]) -> tuple[dict[str, str], list[str]]:
    """Captions of the clips `names`, and a line about each useless row of a .jsonl file."""
    captions, problems = {}, []
    for file in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name, caption = row["file"], row["caption"].strip()
            except (ValueError, TypeError, KeyError, AttributeError):
                expected = '{"file": ..., "caption": ...}'
                problems.append(f"{file.name} line {number}: expected {expected}")
                continue
            if name not in names:
                problems.append(f"{file.name} line {number}: there is no clip {name!r}")
            captions[name] = caption
    for name in names:
        text = (folder / name).with_suffix(".txt")
        if text.is_file():
            captions[name] = text.read_text("utf-8").strip()
    return captions, problems


def fit_frame(frame: np.ndarray, height: int, width: int) -> torch.Tensor:
    """A decoded frame, (H, W) or (H, W, channels) uint8 -> (3, height, width) uint8: resized with
    its aspect, the middle cropped."""
    frame = np.atleast_3d(frame)
    rgb = frame[..., :3] if frame.shape[2] >= 3 else frame[..., :1].repeat(3, 2)
    image = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)[None].float()
    h, w = image.shape[2:]                                       # of image (1, 3, h, w)
    factor = max(height / h, width / w)
    size = max(height, round(h * factor)), max(width, round(w * factor))
    image = nnf.interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return image[0, :, top : top + height, left : left + width].round().clamp(0, 255).byte()


class Shards:
    """A folder of latents and prompt features: safetensors shards, each with `latents` (n, F, C, h,
    w), `text` (n, T, D) and its captions, and manifest.json, which lists them with counts and
    checksums. For image-to-video networks also what these are told of first frames: `image` (n, I,
    image_dim) and `condition` (n, F, image_channels, h, w); `conditioning` names what is there.

    Raises ValueError for a shard that is missing or not as long as the manifest says.
    """

    def __init__(self, path):
        self.path, self.attributes = Path(path), {}
        try:
            self.manifest = cli.read_json(self.path / "manifest.json")
            self.latent_shape = tuple(self.manifest["latent_shape"])
            self.text_shape = tuple(self.manifest["text_shape"])
            sizes = {str(shard["name"]): shard["bytes"] for shard in self.manifest["shards"]}
            self.places = [(str(shard["name"]), row) for shard in self.manifest["shards"]
                           for row in range(shard["clips"])]
            if not all(type(n) is int and n > 0 for n in self.latent_shape + self.text_shape):
                raise ValueError("latent_shape and text_shape")
        except FileNotFoundError:
            raise ValueError(f"{path}: has no manifest.json, no finished shards: {AGAIN}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path / 'manifest.json'}: not what was written ({error}); "
                             f"{AGAIN}") from None
        for name, size in sizes.items():
            file = self.path / name
            if not file.is_file() or file.stat().st_size != size:
                raise ValueError(f"{file}: missing, or not the {size} bytes of the manifest; "
                                 f"delete it and {AGAIN}")
        if not self.places:
            raise ValueError(f"{path}: no clip in any shard")
        self.null_text = self.read("null_text.safetensors", None, ["text"])["text"]      # (T, D)
        self.read(*self.places[0], ["latents", "text"])          # raises, before training starts
        with safe_open(self.path / self.places[0][0], "pt") as file:
            self.conditioning = tuple(n for n in ("image", "condition") if n in file.keys())

    def read(self, name: str, row: int | None, tensors) -> dict[str, torch.Tensor]:
        """A row (None: all) of some tensors of a file, float32. Raises ValueError for what is not
        there, not of the manifest's shape, or not finite."""
        file, found = self.path / name, {}
        shapes = {"latents": self.latent_shape, "text": self.text_shape}
        try:
            with safe_open(file, "pt") as opened:
                for tensor in tensors:
                    whole = opened.get_slice(tensor)
                    found[tensor] = (whole[:] if row is None else whole[row]).float()
        except (SafetensorError, OSError, IndexError) as error:
            raise ValueError(f"{file}: cannot be read ({error}); delete it and {AGAIN}") from None
        for tensor, values in found.items():
            clip = "" if row is None else f" of clip {row}"
            if tuple(values.shape) != shapes.get(tensor, tuple(values.shape)):
                raise ValueError(f"{file}: {tensor}{clip} has shape {tuple(values.shape)}, but the "
                                 f"manifest says {shapes[tensor]}")
            if not values.isfinite().all():
                raise ValueError(f"{file}: {tensor}{clip} holds numbers that are not finite: leave "
                                 f"that clip out and {AGAIN}")
        return found

    def __len__(self) -> int:
        return len(self.places)

    def draw(self, indices, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Latents (B, F, C, h, w), prompt features (B, T, D) and, by name, the `conditioning`, all
        float32. Each len(self) consecutive indices show every clip once."""
        found = {name: [] for name in ("latents", "text", *self.conditioning)}
        for i in shuffled(indices, seed, len(self)):
            for name, values in self.read(*self.places[i], found).items():
                found[name].append(values)
        batch = {name: torch.stack(rows) for name, rows in found.items()}
        return batch.pop("latents"), batch.pop("text"), batch


class ShardWriter:
    """Writes one part (of `parts`, one a process) of a folder of shards. `done` names the clips
    that are there: the same command goes on after a kill. A shard appears whole or not at all.

    made_by: what the clips depend on, as JSON. Raises ValueError for a folder that was begun with
    other settings, or by another number of processes.
    """

    def __init__(self, folder, made_by: dict, part=0, parts=1, clips_per_shard: int = 64):
        self.folder, self.part, self.parts, self.size = Path(folder), part, parts, clips_per_shard
        self.folder.mkdir(parents=True, exist_ok=True)
        self.made_by = json.loads(json.dumps(made_by | {"processes": parts}))
        begun = self.folder / "made_by.json"
        if not begun.exists() and any(self.folder.glob("part-*")):
            raise ValueError(f"{folder} holds shards without made_by.json: give another folder")
        if begun.exists():
            before = json.loads(begun.read_text())
            for name in self.made_by:
                if before.get(name) != self.made_by[name]:
                    raise ValueError(f"{folder} was begun with {name} = {before.get(name)}, not "
                                     f"{self.made_by[name]}: go on with the same settings, or give "
                                     f"another folder")
        write_text(begun, json.dumps(self.made_by, indent=1))
        self.rows, self.done, self.shards = [], set(), []
        for file in sorted(self.folder.glob(f"part-{part}-of-{parts}-*.safetensors")):
            try:
                with safe_open(file, "pt") as opened:
                    keys = json.loads(opened.metadata()["keys"])
            except (SafetensorError, OSError):
                raise ValueError(f"{file}: no whole shard; delete it and run again") from None
            self.done |= set(keys)
            self.shards.append((file, len(keys)))

    def add(self, key: str, caption: str, **tensors: torch.Tensor) -> None:
        """The tensors of the clip `key`, by their names in `Shards`, in the type to be stored."""
        self.rows.append((key, caption, {name: tensor.cpu() for name, tensor in tensors.items()}))
        self.done.add(key)
        if len(self.rows) >= self.size:
            self.flush()

    def flush(self) -> None:
        if not self.rows:
            return
        file = self.folder / f"part-{self.part}-of-{self.parts}-{len(self.shards):05d}.safetensors"
        aside = file.with_suffix(".partial")
        metadata = {"keys": json.dumps([key for key, _, _ in self.rows]),
                    "captions": json.dumps([caption for _, caption, _ in self.rows])}
        names = self.rows[0][2]
        save_file({name: torch.stack([clip[name] for _, _, clip in self.rows]) for name in names},
                  aside, metadata)
        aside.rename(file)
        self.shards.append((file, len(self.rows)))
        self.rows = []

    def close(self, null_text: torch.Tensor) -> bool:
        """End this part; the last part to end writes the manifest. True if that was this one."""
        self.flush()
        own = [{"name": file.name, "clips": count, "bytes": file.stat().st_size,
                "sha256": checksum(file)} for file, count in self.shards]
        if self.part == 0:
            save_file({"text": null_text.cpu().contiguous()}, self.folder / "null_text.safetensors")
        lists = [self.folder / f"part-{part}-of-{self.parts}.json" for part in range(self.parts)]
        write_text(lists[self.part], json.dumps(own))
        if not all(file.exists() for file in lists):
            return False
        shards = [shard for file in lists for shard in json.loads(file.read_text())]
        if shards:
            with safe_open(self.folder / shards[0]["name"], "pt") as file:
                manifest = {"clips": sum(shard["clips"] for shard in shards),
                            "latent_shape": file.get_slice("latents").get_shape()[1:],
                            "text_shape": file.get_slice("text").get_shape()[1:],
                            "made_by": self.made_by, "shards": shards}
            write_text(self.folder / "manifest.json", json.dumps(manifest, indent=1))
        return True


def write_text(path: Path, text: str) -> None:
    aside = path.with_name(path.name + f".{os.getpid()}.partial")
    aside.write_text(text)
    aside.rename(path)


def checksum(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_clip(file: Path, frames: int, height: int, width: int, fps: float) -> torch.Tensor:
    """The start of a video at another frame rate and size: (frames, 3, height, width) uint8, the
    nearest frame in time at every instant. Raises ValueError if it is too short."""
    known = imageio.immeta(file)
    rate = known.get("fps") or 1000 / (known.get("duration") or 1000 / fps)
    wanted, video = [round(i * rate / fps) for i in range(frames)], []
    for i, frame in enumerate(imageio.imiter(file)):
        video += [fit_frame(frame, height, width)] * wanted.count(i)
        if len(video) == frames:
            return torch.stack(video)
    raise ValueError(f"too short: {len(video)} of {frames} frames at {fps:g} a second")


def encode(args) -> None:
    """Clips and captions of a folder -> shards of latents and prompt features, by Wan's own."""
    import distributed  # above this file: only this command needs it
    files = videos_in(args.videos) if args.videos.is_dir() else []
    if not files:
        raise ValueError(f"--videos {args.videos}: no video ({', '.join(SUFFIXES)}) is there")
    captions, problems = read_captions(args.videos, {file.name for file in files})
    part, parts = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, dtype = distributed.pick_device(args.device), getattr(torch, args.dtype)
    codec = encoders.WanCodec(args.base, device)
    sides = 2 * codec.pixels                         # of a token
    if (args.frames - 1) % codec.stride or args.height % sides or args.width % sides:
        raise ValueError(f"--frames {args.frames} must be {codec.stride} n + 1, --height "
                         f"{args.height} and --width {args.width} multiples of {sides}")
    words = encoders.WanText(args.base, device, args.text_length)
    # Of a base whose networks see the first frame's features (Wan2.1-I2V) these are written too.
    has_image = (args.base / "image_encoder").is_dir()
    picture = encoders.WanPicture(args.base, device) if has_image else None
    made_by = {"base": args.base.resolve().name, "fps": args.fps or codec.fps}
    made_by |= {name: getattr(args, name) for name in
                ("frames", "height", "width", "text_length", "dtype")}
    writer, skipped = ShardWriter(args.out, made_by, part, parts, args.clips_per_shard), 0
    todo = [file for file in files[part::parts] if file.name not in writer.done]
    for n, file in enumerate(tqdm(todo, desc="encode", disable=part > 0)):
        if n % encoders.PROMPTS_AHEAD == 0:
            coming = [captions.get(later.name) for later in todo[n:n + encoders.PROMPTS_AHEAD]]
            words.prepare([encoders.NEGATIVE_PROMPT, *filter(None, coming)])
        try:
            if not captions.get(file.name):
                raise ValueError("no caption")
            video = read_clip(file, args.frames, args.height, args.width, made_by["fps"])
        except DECODER_ERRORS as error:
            problems.append(f"{file.name}: {first_line(error)}")
            skipped += 1
            continue
        pixels = video[None].float() / 127.5 - 1
        clip = {"latents": codec.encode(pixels), "text": words([captions[file.name]])}
        if picture:
            clip["image"] = picture(video[0])
            clip["condition"] = codec.condition(pixels[:, 0], clip["latents"].shape[1])
        rounded = {name: tensor[0].to(dtype) for name, tensor in clip.items()}
        writer.add(file.name, captions[file.name], **rounded)
    for problem in problems:
        print(f"skipped {problem}", file=sys.stderr)
    last = writer.close(words([encoders.NEGATIVE_PROMPT])[0].to(dtype))
    print(f"{args.out}: part {part + 1} of {parts}, {len(writer.done)} clips, {skipped} skipped"
          + ("; the manifest is written" if last and writer.done else ""))
    if not writer.done and parts == 1:
        raise ValueError(f"no usable clip in {args.videos}: see the lines above")


def check(args) -> None:
    shards = Shards(args.shards)
    for shard in tqdm(shards.manifest["shards"], desc="check"):
        file = args.shards / shard["name"]
        if checksum(file) != shard.get("sha256"):
            raise ValueError(f"{file}: is not what was written (checksum); delete it and run the "
                             f"command that made the shards again")
    print(f"{args.shards}: {len(shards)} clips, latents {shards.latent_shape}, prompts "
          f"{shards.text_shape}: all as written")


def main(argv=None) -> None:
    parser = cli.Parser(
        "Videos to shards of latents, for training on Wan.",
        "python data.py encode --videos clips --base Wan2.1-T2V-1.3B-Diffusers --out shards")
    add = parser.add_argument
    add("what", type=cli.choice(("encode", "check")),
        help="encode videos, or check the shards of a folder")
    add("shards", type=Path, nargs="?", help="check: the folder of shards")
    add("--videos", type=Path,
        help="folder of mp4, gif, mov, webm, with captions in .txt or .jsonl files (default none)")
    add("--base", type=Path, help="Wan pipeline folder, for its encoders (default none)")
    add("--out", type=Path, help="folder of the shards; the same command goes on (default none)")
    add("--frames", type=int, default=81, help="pixel frames, 4 n + 1 (default 81)")
    add("--height", type=int, default=480,
        help="pixels, a multiple of 16, or of 32 for Wan2.2-TI2V-5B (default 480)")
    add("--width", type=int, default=832, help="pixels, as --height (default 832)")
    add("--fps", type=float, help="frame rate that clips are brought to (default: the network's, "
        "16, or 24 for Wan2.2-TI2V-5B)")
    add("--text-length", type=int, default=512, help="tokens of a prompt (default 512)")
    add("--clips-per-shard", type=int, default=64, help="clips in a file (default 64)")
    add("--dtype", type=cli.choice(("bfloat16", "float16", "float32")), default="bfloat16",
        metavar="NAME", help="type on disk: bfloat16, float16 or float32 (default bfloat16)")
    add("--device", type=cli.choice(("auto", "cpu", "cuda")), default="auto", metavar="NAME",
        help="auto, cpu or cuda (default auto)")
    args = parser.parse(argv)
    if args.what == "check" and not args.shards:
        parser.error("check needs the folder of the shards")
    for name in ("videos", "base", "out") if args.what == "encode" else ():
        if not getattr(args, name):
            parser.error(f"encode needs --{name}")
    try:
        if args.what == "encode":
            encode(args)
        else:
            check(args)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    cli.run(main)
