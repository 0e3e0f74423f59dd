"""Where clips and captions come from: toy sets (toys.py), a folder of videos, shards of latents:

    python data.py encode --videos DIR --base WAN_DIR --out SHARDS    also under torchrun, and again
    python data.py check SHARDS                             compare every clip with its checksum

Legend:  B batch   T pixel frames   H, W picture (both `size` but in shards)   F, C, h, w latents
Videos are float32 (B, T, 3, H, W) in [-1, 1]. Every clip is a pure function of (seed, index).
"""
import argparse
import fcntl
import hashlib
import json
import os
import socket
import sys
import zlib
from contextlib import contextmanager
from itertools import count
from multiprocessing.pool import ThreadPool
from pathlib import Path
from unicodedata import normalize

import cli


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(
        "Videos to shards of latents, for training on Wan.",
        "python data.py encode --videos clips --base Wan2.1-T2V-1.3B-Diffusers --out shards")
    add = parser.add_argument
    add("what", type=cli.choice(("encode", "check")),
        help="encode videos, or check the shards of a folder")
    add("shards", type=Path, nargs="?", help="check: the folder of shards")
    add("--videos", type=Path,
        help="folder of mp4, gif, mov, webm, mkv, avi or m4v files, with captions in .txt or "
        ".jsonl files (default none)")
    add("--base", type=Path, help="Wan pipeline folder, for its encoders (default none)")
    add("--out", type=Path, help="folder of the shards; the same command goes on (default none)")
    add("--frames", type=int, default=81, help="pixel frames, 4 n + 1 (default 81)")
    add("--height", type=int, default=480,
        help="pixels, a multiple of 16, or of 32 for Wan2.2-TI2V-5B; for --causal training twice "
        "that (default 480)")
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
    return args


if __name__ == "__main__":
    cli.run(parse_args)   # answers --help and wrong flags, before what takes seconds to import

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from tqdm import tqdm

import encoders
import media
from media import decode, read_clip
from toys import SETS, draw

SUFFIXES = (".mp4", ".gif", ".mov", ".webm", ".mkv", ".avi", ".m4v")
# Of decoded videos. It may be deleted when no training runs.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "nanoanyflow"
DECODERS = 4                 # videos that are decoded at a time
AGAIN = "delete it and run the command that made the shards again"


def open_data(name: str, frames: int = 8, size: int = 16, held_out: bool = False):
    """The data set called 'shapes', 'loop' or 'digits', or the folder at path `name`; its clips are
    (frames, 3, size, size). held_out: those that training never sees; toy sets draw them by their
    seeds. Raises ValueError for other names, sizes and lengths."""
    if frames < 1 or size < 8:
        raise ValueError(f"clips need frames >= 1 and size >= 8, not frames = {frames}, "
                         f"size = {size}")
    if name in SETS:
        return SETS[name](frames, size)
    if is_shards(name):
        return Shards(name)
    if not Path(name).is_dir():
        raise ValueError(f"no folder {str(name)!r} of clips or shards, and no data set"
                         + cli.nearest(str(name), SETS))
    return Folder(name, frames, size, held_out)


def is_shards(name: str) -> bool:
    """Whether --data is a folder of shards, finished or not."""
    return any((Path(name) / file).exists() for file in ("manifest.json", "made_by.json"))


class Folder:
    """Clips (of SUFFIXES) in a folder, each captioned by a .txt file of the same name or by
    a row {"file": ..., "caption": ...} of any .jsonl file there (the .txt wins).

    Decoded once, see `decode` and `decode_once`: PatchPCA.fps frames a second, the short side
    resized to `size`, the middle cropped. One clip in ten, chosen by a checksum of its name alone,
    is held out of training for eval.py. What cannot be used is named on stderr and skipped;
    ValueError if nothing is left. There are no attributes to read back.
    """

    def __init__(self, path, frames: int = 8, size: int = 16, held_out: bool = False):
        self.frames, self.size, self.attributes = frames, size, {}
        encoders.check_sides(frames, size, size)     # before what takes time
        files, usable = videos_in(Path(path)), []
        captions, problems = read_captions(Path(path), {file.name for file in files})
        captions = {name: text for name, text in captions.items() if encoders.split_words(text)}
        problems += [f"{file.name}: no caption" for file in files if file.name not in captions]
        captioned = [file for file in files if file.name in captions]
        stored, undecoded = decode_once(Path(path), captioned, size, encoders.PatchPCA.fps)
        problems += undecoded
        for name, file in stored.items():
            length = file.stat().st_size // (3 * size**2)
            if length < frames:
                problems.append(f"{name}: {length} frames at {encoders.PatchPCA.fps} a second, "
                                f"{frames} needed")
            else:
                usable.append((name, file, length))
        if not usable:
            say(f"skipped {problem}" for problem in problems)
            raise ValueError(f"no usable clip in {path}: expected videos ({', '.join(SUFFIXES)}) "
                             f"of at least {frames} frames, each with a caption in NAME.txt or as "
                             'a row {"file": ..., "caption": ...} of a .jsonl file')
        apart = [clip for clip in usable if name_hash(clip[0]) % 10 == 0]
        rest = [clip for clip in usable if name_hash(clip[0]) % 10]
        if not rest:
            rest, apart = usable, []
        if held_out and not apart:
            raise ValueError(f"{path}: none of its {len(usable)} clips is held out to compare with "
                             "(one in ten is, by its name): more clips are needed")
        megabytes = sum(3 * size**2 * length for _, _, length in usable) / 1e6
        say([*(f"skipped {problem}" for problem in problems),
             f"{path}: {len(usable)} clips usable, {len(files) - len(usable)} skipped; "
             f"{len(apart)} held out for eval.py; {megabytes:.0f} MB decoded"])
        self.held_out = held_out
        self.stored = apart if held_out else rest                # (name, raw frames, how many)
        self.texts = captions
        self.captions = sorted({captions[name] for name, _, _ in usable})

    def __len__(self) -> int:
        return len(self.stored)

    def clips(self, indices, seed: int = 0, captions=None):
        """Video (B, T, 3, size, size) and its captions. Each len(self) consecutive indices are an
        epoch that shows every file once; (seed, index) picks the first frame. What is held out is
        drawn file by file, each time from all, as statistics of independent samples need."""
        if captions is not None:
            raise ValueError("the captions of a folder belong to its clips and cannot be chosen")
        video, texts, frame = [], [], 3 * self.size**2           # bytes
        draws = draw(seed, indices, 2)
        if self.held_out:
            files = (draws[:, 1] * len(self)).long().tolist()
        else:
            files = shuffled(indices, seed, len(self))
        for i, u in zip(files, draws[:, 0].tolist()):
            name, file, length = self.stored[i]
            start = int(u * (length - self.frames + 1))
            video.append(np.fromfile(file, np.uint8, self.frames * frame, offset=start * frame))
            texts.append(self.texts[name])
        shape = (len(video), self.frames, self.size, self.size, 3)
        video = torch.from_numpy(np.concatenate(video)).view(shape).movedim(4, 2)
        return media.from_pixels(video.contiguous()), texts


def videos_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def name_hash(name: str) -> int:
    return zlib.crc32(os.fsencode(name))


def say(lines) -> None:
    """On stderr, by one process of a launch."""
    for line in lines if int(os.environ.get("RANK", 0)) == 0 else ():
        print(line, file=sys.stderr)


def decode_once(folder: Path, files: list[Path], size: int, fps: float) -> tuple[dict, list[str]]:
    """By its name, each video as a file of raw frames (n, size, size, 3) uint8; and a line about
    each that cannot be decoded. Kept in CACHE by the folder, the file's name, size and time, and
    what is asked for; one process decodes, with a progress bar, and others wait for it."""
    decoder = checksum(Path(media.__file__))         # what another one made is decoded again
    key = os.fsencode(folder.resolve()) + f" {size} {fps} {decoder}".encode()
    key = hashlib.sha256(key).hexdigest()
    cache, stored, problems = CACHE / f"{folder.resolve().name}-{key[:16]}", {}, []
    for file in files:
        if not file.exists():
            problems.append(f"{file.name}: is not there")
            continue
        found = file.stat()
        key = os.fsencode(file.name) + f" {found.st_size} {found.st_mtime_ns}".encode()
        stored[file.name] = cache / f"{hashlib.sha256(key).hexdigest()[:32]}.raw"
    if not stored:
        return stored, problems
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)                     # until it is closed, or killed
            for left in cache.glob("*.partial"):
                left.unlink()
            todo = [(folder / name, target, size, fps) for name, target in stored.items()
                    if not target.exists()]
            if todo:
                say([f"{folder}: decoding {len(todo)} videos, once, into {cache}"])
            with ThreadPool(DECODERS) as pool:
                bar = tqdm(pool.imap(decode_into, todo), "decode", len(todo), disable=not todo)
                problems += filter(None, bar)
    except ChildProcessError:                                    # ffmpeg was stopped
        raise
    except OSError as error:
        raise OSError(f"decoded videos cannot be kept in {cache} ({error}): make room there, or "
                      "set XDG_CACHE_HOME to another folder") from None
    return {name: file for name, file in stored.items() if file.exists()}, problems


def decode_into(job: tuple) -> str:
    """Decode (file, target, size, fps); returns what went wrong with it, or ''."""
    file, target, size, fps = job
    try:
        with written(target) as aside, open(aside, "wb") as out:
            for frames in decode(file, size, size, fps):
                frames.tofile(out)
    except ValueError as error:
        return str(error)
    return ""


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
    """Captions of the clips `names`, and a line about each useless file, or row of a .jsonl one."""
    captions, problems = {}, []

    def read(file: Path) -> str:
        try:
            return file.read_text("utf-8-sig").strip()
        except UnicodeDecodeError:
            problems.append(f"{file.name}: not UTF-8 text; save it as such")
            return ""
    known = {normalize("NFC", name): name for name in names}     # an accent may be a letter more
    for file in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(read(file).split("\n"), 1):    # no U+2028
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name, caption = str(row["file"]), row["caption"].strip()
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                expected = '{"file": ..., "caption": ...}'
                problems.append(f"{file.name} line {number}: expected {expected}")
                continue
            if name not in names:
                name = known.get(normalize("NFC", name), name)
            if name not in names:
                problems.append(f"{file.name} line {number}: there is no clip {name!r}")
            captions[name] = caption
    for name in sorted(names):
        text = (folder / name).with_suffix(".txt")
        if text.is_file():
            captions[name] = read(text)
    return captions, problems


class Shards:
    """A folder of latents and prompt features: safetensors shards, each with `latents` (n, F, C, h,
    w), `text` (n, T, D) and its captions, and manifest.json, which lists them with counts and
    checksums. For image-to-video networks also what these are told of first frames: `image` (n, I,
    image_dim) and `condition` (n, F, image_channels, h, w); `conditioning` names what is there.
    codec, words: of the toy model that made them (runs.add_encoders); None where that is Wan.

    Raises ValueError for a shard that is missing or not as long as the manifest says, and in `draw`
    for a clip that is not what was written.
    """

    def __init__(self, path):
        self.path, self.codec, self.words = Path(path), None, None
        try:
            self.manifest = json.loads((self.path / "manifest.json").read_text("utf-8"))
            self.places = [(shard, row) for shard in self.manifest["shards"]
                           for row in range(shard["clips"])]
            files = [(self.path / shard["name"], shard["bytes"])
                     for shard in self.manifest["shards"]]
        except FileNotFoundError:
            raise ValueError(f"{path}: has no manifest.json, no finished shards: run the command "
                             "that made the shards again") from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{self.path / 'manifest.json'}: not what was written ({error}); "
                             f"{AGAIN}") from None
        for file, size in files:
            if not file.exists() or file.stat().st_size != size:
                raise ValueError(f"{file}: missing, or not the {size} bytes of the manifest; "
                                 f"{AGAIN}")
        if not self.places:
            raise ValueError(f"{path}: no clip in any shard")
        null_text = self.path / "null_text.safetensors"
        if self.manifest.get("null_text") != checksum(null_text):
            raise ValueError(f"{null_text}: is not what was written (checksum); {AGAIN}")
        with readable(null_text):
            self.null_text = load_file(null_text)["text"].float()                     # (T, D)
        first = files[0][0]
        with readable(first), safe_open(first, "pt") as file:
            self.latent_shape = tuple(file.get_slice("latents").get_shape()[1:])   # (F, C, h, w)
            self.conditioning = tuple(n for n in ("image", "condition") if n in file.keys())
        self.read(*self.places[0])                               # raises, before training starts

    def __len__(self) -> int:
        return len(self.places)

    def draw(self, indices, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Latents (B, F, C, h, w), prompt features (B, T, D) and, by name, the `conditioning`, all
        float32. Each len(self) consecutive indices show every clip once."""
        clips = [self.read(*self.places[i]) for i in shuffled(indices, seed, len(self))]
        batch = {name: torch.stack([clip[name] for clip in clips]) for name in clips[0]}
        return batch.pop("latents"), batch.pop("text"), batch

    def read(self, shard: dict, row: int) -> dict[str, torch.Tensor]:
        """A clip's tensors, float32. Raises ValueError for what is not what was written."""
        file, found = self.path / shard["name"], {}
        with readable(file), safe_open(file, "pt") as opened:
            for name in ("latents", "text", *self.conditioning):
                found[name] = opened.get_slice(name)[row]
            keys = json.loads(opened.metadata()["keys"])
            sums = {name: shard["crc32"][name][row] for name in found}
        for name, tensor in found.items():
            if crc32(tensor) != sums[name]:
                raise ValueError(f"{file}: clip {keys[row]!r} is not what was written (checksum); "
                                 f"{AGAIN}")
        return {name: tensor.float() for name, tensor in found.items()}


@contextmanager
def readable(file: Path):
    """Names the file of tensors that cannot be read inside."""
    try:
        yield
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError,
            AttributeError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); {AGAIN}") from None


def crc32(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy())


class ShardWriter:
    """Writes one part (of `parts`, one a process) of a folder of shards. `done` has the keys of the
    clips that are there: the same command goes on after a kill. A shard appears whole or not at
    all, with a checksum of each clip.

    made_by: what the clips depend on, as JSON. Raises ValueError for a folder that was begun with
    other settings, or by another number of processes.
    """

    def __init__(self, folder, made_by: dict, part=0, parts=1, clips_per_shard: int = 64):
        self.folder, self.part, self.parts, self.size = Path(folder), part, parts, clips_per_shard
        self.folder.mkdir(parents=True, exist_ok=True)
        record, made_by = self.folder / "made_by.json", made_by | {"processes": parts}
        self.made_by = same_settings(record, made_by, self.folder, "part-*")
        self.rows, self.done, self.shards = [], set(), {}        # of these: {file: metadata}
        for left in self.folder.glob(f"part-{part}-of-{parts}*.partial"):
            left.unlink()
        for file in sorted(self.folder.glob(f"part-{part}-of-{parts}-*.safetensors")):
            with readable(file), safe_open(file, "pt") as opened:
                self.shards[file] = {name: json.loads(text)
                                     for name, text in opened.metadata().items()}
                self.done |= set(self.shards[file]["keys"])

    def add(self, key: str, caption: str, **tensors: torch.Tensor) -> None:
        """The tensors of the clip `key`, by their names in `Shards`, in the type to be stored.
        Raises ValueError for one that is not finite."""
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{key}: its {name} are no finite numbers as {tensor.dtype}")
        self.rows.append((key, caption, {name: tensor.cpu() for name, tensor in tensors.items()}))
        self.done.add(key)
        if len(self.rows) >= self.size:
            self.flush()

    def flush(self) -> None:
        if not self.rows:
            return
        names = (self.folder / f"part-{self.part}-of-{self.parts}-{i:05d}.safetensors"
                 for i in count(len(self.shards)))
        file = next(name for name in names if not name.exists())
        tensors = {name: torch.stack([clip[name] for _, _, clip in self.rows])
                   for name in self.rows[0][2]}
        metadata = {"keys": [key for key, _, _ in self.rows],
                    "captions": [caption for _, caption, _ in self.rows],
                    "crc32": {name: list(map(crc32, rows)) for name, rows in tensors.items()}}
        write_tensors(file, tensors, {name: json.dumps(x) for name, x in metadata.items()})
        self.shards[file] = metadata
        self.rows = []

    def close(self, null_text: torch.Tensor) -> bool:
        """End this part; the last part to end writes the manifest. True if that was this one."""
        self.flush()
        own = [{"name": file.name, "clips": len(metadata["keys"]), "bytes": file.stat().st_size,
                "crc32": metadata["crc32"]}
               for file, metadata in self.shards.items()]
        null_file = self.folder / "null_text.safetensors"
        if self.part == 0:
            write_tensors(null_file, {"text": null_text.cpu().contiguous()})
        lists = [self.folder / f"part-{part}-of-{self.parts}.json" for part in range(self.parts)]
        write_text(lists[self.part], json.dumps(own))
        if not all(file.exists() for file in lists):
            return False
        shards = [shard for file in lists for shard in json.loads(file.read_text("utf-8"))]
        if shards:
            manifest = {"clips": sum(shard["clips"] for shard in shards), "made_by": self.made_by,
                        "null_text": checksum(null_file), "shards": shards}
            write_text(self.folder / "manifest.json", json.dumps(manifest, indent=1))
        return True


def written(path: Path):
    """cli.written_aside, by a name of this process: several write to one folder."""
    name = f"{path.name}.{socket.gethostname()}.{os.getpid()}.partial"
    return cli.written_aside(path, path.with_name(name))


def write_text(path: Path, text: str) -> None:
    with written(path) as aside:
        aside.write_text(text, "utf-8")


def same_settings(record: Path, now: dict, folder: Path, pattern: str) -> dict:
    """Write down what the files `pattern` of a folder depend on, and return it as it is read again.
    Raises ValueError where other settings are written there, or files and none."""
    now = json.loads(json.dumps(now))
    if not record.exists() and any(folder.glob(pattern)):
        raise ValueError(f"{folder} holds {pattern}, and no {record.name} says how they were made: "
                         "give another folder")
    before = cli.read_json(record) if record.exists() else now
    for name in before | now:
        if before.get(name) != now.get(name):
            raise ValueError(f"{folder} was begun with {name} = {before.get(name)}, not "
                             f"{now.get(name)}: go on with the same settings, or give another "
                             f"folder ({record} keeps them)")
    write_text(record, json.dumps(now, indent=1))
    return now


def write_tensors(path: Path, tensors: dict, metadata: dict | None = None) -> None:
    """As safetensors. Not by its save_file: only the owner may read what that writes."""
    with written(path) as aside:
        aside.write_bytes(save(tensors, metadata))


def checksum(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def key_of(file: Path, caption: str) -> str:
    """Of a clip in shards: another video or caption under the same name has another one."""
    found, size = hashlib.sha256(caption.encode(errors="surrogatepass")), file.stat().st_size
    with open(file, "rb") as opened:
        for place in (0, size // 2, max(0, size - 2**16)):
            opened.seek(place)
            found.update(opened.read(2**16) + str(size).encode())
    return f"{file.name} {found.hexdigest()[:16]}"


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
    writer, keys = ShardWriter(args.out, made_by, part, parts, args.clips_per_shard), {}
    # By name: a clip keeps its part when others come.
    own = [file for file in files if name_hash(file.name) % parts == part]
    for file in own:
        try:
            keys[key_of(file, captions.get(file.name, ""))] = file
        except cli.WRONG_PATH as error:
            problems.append(f"{file.name}: {error.strerror}")
    if strange := sorted(writer.done - keys.keys()):
        raise ValueError(f"{args.out} holds clips that are not in {args.videos}, or have changed "
                         f"there: {strange[0]!r} and {len(strange) - 1} more; give another folder")
    todo = [(key, file) for key, file in keys.items() if key not in writer.done]
    for n, (key, file) in enumerate(tqdm(todo, desc="encode", disable=part > 0)):
        if n % encoders.PROMPTS_AHEAD == 0:
            coming = [captions.get(later.name) for _, later in todo[n:n + encoders.PROMPTS_AHEAD]]
            words.prepare([encoders.NEGATIVE_PROMPT, *filter(None, coming)])
        try:
            if not captions.get(file.name):
                raise ValueError(f"{file.name}: no caption")
            video = read_clip(file, args.frames, args.height, args.width, made_by["fps"])
            pixels = media.from_pixels(video[None])
            clip = {"latents": codec.encode(pixels), "text": words([captions[file.name]])}
            if picture:
                clip["image"] = picture(video[0])
                clip["condition"] = codec.condition(pixels[:, 0], clip["latents"].shape[1])
            rounded = {name: tensor[0].to(dtype) for name, tensor in clip.items()}
            writer.add(key, captions[file.name], **rounded)
        except ValueError as error:
            problems.append(str(error))
    for problem in problems:
        print(f"skipped {problem}", file=sys.stderr)
    last = writer.close(words([encoders.NEGATIVE_PROMPT])[0].to(dtype))
    print(f"{args.out}: part {part + 1} of {parts}, {len(writer.done)} clips, "
          f"{len(own) - len(writer.done)} skipped"
          + ("; the manifest is written" if last and writer.done else ""))
    if not writer.done and parts == 1:
        raise ValueError(f"no usable clip in {args.videos}: see the lines above")


def check(args) -> None:
    shards = Shards(args.shards)
    for place in tqdm(shards.places, desc="check"):
        shards.read(*place)                          # raises
    print(f"{args.shards}: {len(shards)} clips, latents {shards.latent_shape}, prompts "
          f"{tuple(shards.null_text.shape)}: all as written")


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.what == "encode":
        encode(args)
    else:
        check(args)


if __name__ == "__main__":
    cli.run(main)
