"""The run folder: what a stage is built on, where its clips come from, and what is recorded of it.

A run is a folder with a folder for each stage, see checkpoint.py for what these hold.
"""
import dataclasses
import fcntl
import json
import math
import os
import shlex
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import torch

import checkpoint
import cli
import data
import distributed
import encoders
import wan
from config import (
    CHANGEABLE,
    STAGES,
    Config,
    chunks_of,
    command,
    finished,
    folder_of,
    micro_batch,
    record_of,
    stage_before,
)
from model import PRESETS
from toys import SETS

CODEC, LOCK = "codec.safetensors", "lock"


def stage_folder(c: Config) -> Path:
    return Path(c.run_dir) / folder_of(c.stage, c.causal)


def needs_teacher(c: Config) -> bool:
    return c.stage == "distill" or c.stage == "flowmap" and c.velocity == "teacher"


def origins(c: Config) -> dict[str, str]:
    """Where the networks of a stage start from, files or folders: the "teacher", from which the
    fake score starts too, if the stage has one; the "student", if not from fresh weights."""
    run, before = Path(c.run_dir), stage_before(c.stage)
    student = c.base or (str(run / folder_of(before, c.causal)) if before else "")
    teacher = str(run / "pretrain")
    if needs_teacher(c) and not finished(teacher):
        # Weights in place of stage pretrain, of this stage or of the one before.
        teacher = c.base or record_of(Path(student)).get("config", {}).get("base") or teacher
    found = {"teacher": teacher if needs_teacher(c) else "", "student": student}
    return {role: place for role, place in found.items() if place}


def teacher_of(run) -> Path:
    """Stage pretrain of a run, or the teacher of the same clips that its flow map started from in
    place of it."""
    own = Path(run) / "pretrain"
    if finished(own):
        return own
    for stage in ("flowmap", "causal-flowmap"):
        base = record_of(Path(run) / stage).get("config", {}).get("base")
        if base and finished(base) and not other_clips(base, Path(run) / stage):
            if record_of(base).get("config", {}).get("stage") == "pretrain":
                return Path(base)
    return own


def other_clips(first, other) -> str:
    """In what the clips of two stages differ, or ''. Those that were moved are the same if what
    they hold is."""
    a, b = record_of(first), record_of(other)
    for name in ("data", "frames", "size"):
        then, now = (record.get("config", {}).get(name) for record in (a, b))
        held = name == "data" and not {then, now} & set(SETS) and a.get("set")
        if then != now and not (held and held == b.get("set")):
            return f"{first} was trained with --{name} {then}, {other} with {now}"
    return ""


def first_command(c: Config, stage: str) -> str:
    """The command that begins a stage of the run."""
    given = [f" --{name} {shlex.quote(str(getattr(c, name)))}"
             for name in ("preset", "data", "frames", "size")
             if getattr(c, name) != getattr(Config, name)]
    base = " --base WEIGHTS" if stage == "pretrain" and c.lora_rank else ""
    return command(stage, c.causal, c.run_dir) + "".join(given) + base


def check_start(c: Config, world) -> tuple[bool, dict]:
    """(whether the stage starts anew, `built_on`). Raises ValueError when it cannot start or go
    on."""
    stage = stage_folder(c)
    if c.base and not Path(c.base).exists():
        raise ValueError(f"--base {c.base}: not there; give a finished stage, or a file or folder "
                         "of weights (--base none: none)")
    for place in map(Path, origins(c).values()):
        check_origin(c, place)
    per_step = world.size * micro_batch(c, world.size)
    if c.batch_size % per_step:
        raise ValueError(f"--batch-size {c.batch_size} is not a multiple of {per_step}: "
                         f"{world.size} processes times {per_step // world.size} samples "
                         "(--micro-batch)")
    cli.check_folder(stage, "--run-dir")
    begun, sums = distributed.on_main(lambda: (begun_by(c), built_on(c)), world)
    # What a launch has begun afresh it goes on with, when it is started once more.
    fresh = distributed.on_main(
        lambda: c.fresh and not distributed.is_restart(begun.get("launch")), world)
    if not fresh:
        check_begun(c, begun, sums)
    return fresh, sums


def check_origin(c: Config, place: Path) -> None:
    """Raises ValueError where the stage cannot start from the weights there."""
    stage, now = stage_folder(c), settings(c)
    if stage.resolve() in (place.resolve(), *place.resolve().parents):
        raise ValueError(f"--base {c.base}: lies in the folder of the stage itself, which --fresh "
                         "would delete. Leave --base out to go on with the stage, or give another "
                         "--run-dir")
    if place.parent == Path(c.run_dir):              # a stage of this run
        if not finished(place):
            name = place.name.removeprefix("causal-")
            other = "; or give a teacher as --base" if c.stage == "flowmap" else ""
            raise ValueError(f"stage {c.stage} needs stage {name}, which is not finished in "
                             f"{c.run_dir}. First run: {first_command(c, name)}{other}")
        then = absolute(record_of(place).get("config", {}))
        for name in ("preset", "data", "frames", "size"):
            if name in then and differ(name, then[name], now[name]):
                raise ValueError(f"stage {c.stage} starts from {place}, which was trained with "
                                 f"--{name} {then[name]}, not {now[name]}: leave --{name} out, or "
                                 f"give another --run-dir")
    if not place.exists():
        raise ValueError(f"stage {c.stage} needs {place}, which is not there any more: put it, or "
                         "a link to it, there again, or train the run anew")


def check_begun(c: Config, begun: dict, sums: dict) -> None:
    """Raises ValueError where the stage, of which `begun` is the record, cannot go on. sums:
    `built_on` now."""
    stage = stage_folder(c)
    if not begun:
        if finished(stage) or checkpoint.checkpoints(stage):
            raise ValueError(f"{stage} holds what was trained, but its config.json, which says how,"
                             " is gone: put it there again, or train the stage anew with --fresh")
        return
    if change := change_between(begun.get("config", {}), settings(c)):
        raise ValueError(f"{stage} was started with {change}: use --fresh to start it anew, or "
                         "another --run-dir")
    if finished(stage) and not checkpoint.checkpoints(stage):
        raise ValueError(f"{stage} is finished, but its checkpoints are gone: training would begin "
                         "at 0 and overwrite it. Put checkpoints/ there again, or train it anew "
                         "with --fresh")
    for role, checksum in sums.items():
        if begun.get("built_on", {}).get(role, checksum) != checksum:
            raise ValueError(f"{stage} was started on other weights than {origins(c)[role]} holds "
                             "now: use --fresh to start this stage anew, too")


def settings(c: Config) -> dict:
    """What is recorded of a config."""
    return absolute(dataclasses.asdict(c))


def absolute(config: dict) -> dict:
    """A recorded config with absolute paths, as a run goes on from anywhere."""
    given = {name: config[name] for name in ("base", "data") if config.get(name)}
    return config | {name: os.path.abspath(path) for name, path in given.items()
                     if path not in SETS}


def change_between(then: dict, now: dict) -> str:
    """The first setting that changed and may not, or ''."""
    then = then and dataclasses.asdict(Config()) | absolute(then)    # a setting may be newer
    for name, value in now.items() if then else ():
        if name not in CHANGEABLE and differ(name, then[name], value):
            return f"{name} = {then[name]}, not {value}"
    return ""


def differ(name: str, then, now) -> bool:
    """Whether a setting changed. Clips and weights that are not where they were may have been
    moved: what they hold, `check_set` and `built_on` compare."""
    are_paths = name in ("base", "data") and not {then, now} & {"", *SETS}
    return then != now and not (are_paths and not os.path.exists(then))


def built_on(c: Config) -> dict[str, str]:
    """What tells the weights that a stage starts from, by role."""
    return {role: wan.fingerprint(place) for role, place in origins(c).items()}


def open_source(c: Config, fresh: bool):
    """Where latents and prompt features come from: shards, or clips and captions behind stand-ins
    for encoders, which the first stage fits. Raises ValueError for a set that cannot be used."""
    if c.preset.startswith("wan") and not data.is_shards(c.data):
        raise ValueError(f"--data {c.data}: --preset {c.preset} works on latents of Wan's own "
                         "autoencoder: give a folder of shards, which `python data.py encode` "
                         "makes of videos")
    try:
        source = data.open_data(c.data, c.frames, c.size)
        if isinstance(source, data.Shards):
            if (source.path / CODEC).exists():           # a toy model made them
                add_encoders(source, c)
            return source
        places = [Path(origins(c).get("student", "none")) / CODEC]
        places += [] if fresh else [stage_folder(c) / CODEC]
        found = [place for place in places if place.exists()]
        if found:
            codec = read_codec(found[-1])
        else:
            codec = encoders.PatchPCA.fit(lambda: encoders.in_parts(source, 1024, c.seed),
                                          PRESETS[c.preset].channels)
        words = encoders.Words.of(source.captions, PRESETS[c.preset].text_dim)
        return encoders.Encoded(source, codec, words)
    except ValueError as error:
        raise ValueError(f"--data {c.data}: {error}") from None


def add_encoders(source, c: Config) -> None:
    """Those that shards of a toy model bring along. Raises ValueError where they are not those of
    the weights that the stage starts from, or clips not as long and large as asked."""
    source.codec = read_codec(source.path / CODEC)
    source.words = encoders.Words(source.manifest["made_by"]["vocabulary"])
    frames = source.codec.frames(source.latent_shape[0])
    size = source.latent_shape[2] * source.codec.pixels
    if (frames, size) != (c.frames, c.size):
        raise ValueError(f"holds clips of --frames {frames} --size {size}, not {c.frames} and "
                         f"{c.size}")
    place = Path(origins(c).get("student", "none")) / CODEC
    if place.exists():
        before = vars(read_codec(place))
        if not all(torch.equal(x, before[name]) for name, x in vars(source.codec).items()):
            raise ValueError(f"its latents are of another codec than {place}: make the shards with "
                             "weights that have this one")


def set_of(source) -> dict:
    """What tells a set of clips or latents from another one, for config.json."""
    if isinstance(source, data.Shards):
        found = {"clips": len(source), "made by": source.manifest.get("made_by")}
    else:
        found = {"captions": short_sum(source.dataset.captions)}
        if isinstance(source.dataset, data.Folder):
            clips = [(name, length) for name, _, length in source.dataset.stored]
            found["clips"] = short_sum(clips)            # their order is that of the draws
    return found | {"latents": list(source.latent_shape), "prompts": list(source.null_text.shape)}


def short_sum(value) -> str:
    return f"checksum {checkpoint.json_checksum(value)[:8]}"


def check_set(c: Config, source) -> None:
    """Raises ValueError when a stage that goes on was begun on another set."""
    now = set_of(source)
    for name, then in record_of(stage_folder(c)).get("set", {}).items():
        if now.get(name) != then:
            raise ValueError(f"{stage_folder(c)} was started when --data {c.data} had {name} {then}"
                             f", not {now.get(name)}: put it there again, or use --fresh to start "
                             "this stage anew")


def fit_to(source, config, origin: str, c: Config) -> None:
    """Have the source give what a network of `config` is told of first frames. Raises ValueError
    when they do not fit each other."""
    wanted = ["condition"] if config.image_channels else []
    wanted += ["image"] if config.image_dim else []
    if not set(wanted) <= set(source.conditioning):
        raise ValueError(f"{origin} is an image-to-video network, and --data {c.data} has no first "
                         "frames: make shards with `python data.py encode --base` and the pipeline "
                         "folder of these weights")
    source.conditioning = wanted                     # nothing else is read
    channels, width = source.latent_shape[1], source.null_text.shape[1]
    if config.channels != channels or config.text_dim != width:
        raise ValueError(f"{origin} works on {config.channels} channels and prompts of width "
                         f"{config.text_dim}, but --data {c.data} has {channels} and {width}")
    sides, side = source.latent_shape[2:], config.patch * (2 if config.compressed else 1)
    if any(length % side for length in sides):
        without = ", or train with --full-chunks 0, which compresses no chunk" * config.compressed
        raise ValueError(f"--data {c.data} has latents of {sides[0]} x {sides[1]}, and this "
                         f"network takes multiples of {side}: give clips of another size{without}")


def read_codec(file: Path) -> encoders.PatchPCA:
    """Raises ValueError for a damaged file."""
    found = checkpoint.read_tensors(file)            # those of older versions hold more
    try:
        return encoders.PatchPCA(found["mean"], found["basis"], found["scale"])
    except KeyError as error:
        raise ValueError(f"{file}: has no {error}, and is not a codec of the toy sets") from None


@contextmanager
def prepared(c: Config, source, fresh: bool, world):
    """The stage's folder, locked for this process and its ranks, with the codec in it, which all
    ranks then use. Raises ValueError when another process trains the stage."""
    stage = stage_folder(c)
    stage.mkdir(parents=True, exist_ok=True)
    with open(stage / LOCK, "a+") as lock:
        if holder := distributed.on_main(lambda: locked_by(lock), world):
            raise ValueError(f"{stage} is trained by {holder} already: wait for it, stop it, or "
                             "give another --run-dir")
        begun = {} if fresh else distributed.on_main(lambda: record_of(stage), world)
        if not fresh and (change := change_between(begun.get("config", {}), settings(c))):
            raise ValueError(f"{stage} was started with {change} by another process just now")
        if world.is_main and fresh:
            for entry in stage.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry.name != LOCK:
                    entry.unlink()
        if world.is_main and source.codec and not (stage / CODEC).exists():
            with cli.written_aside(stage / CODEC) as aside:
                checkpoint.write_tensors(aside, vars(source.codec), {})
        distributed.barrier(world)
        if source.codec:
            source.codec = read_codec(stage / CODEC)
        yield


def begun_by(c: Config) -> dict:
    """The stage's record; {} for a damaged one that --fresh deletes."""
    try:
        return record_of(stage_folder(c))
    except ValueError:
        if not c.fresh:
            raise
        return {}


def locked_by(file) -> str:
    """Lock an open file until it is closed, or say who has done so.

    The system takes the lock back when the process ends, however it ends. Over several nodes it
    holds where the network disk passes flock on (NFS 4, Lustre with -o flock); else on each alone.
    That of a node that died ends with its lease, for which a restart waits.
    """
    end = time.time() + 150                          # seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            if holder.endswith(f" on {socket.gethostname()}") or time.time() > end:
                return holder
            time.sleep(5)
        except OSError:                              # a disk that knows no locks
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return ""


def record(c: Config, source, first: int, sums: dict) -> None:
    """Write config.json, and take rows out of log.jsonl of updates that are made again."""
    stage = stage_folder(c)
    found = {"vocabulary": source.words.vocabulary} if source.codec else {}
    found |= {"config": settings(c), "set": set_of(source), "git": git_revision(),
              "torch": torch.__version__, "latent_shape": source.latent_shape,
              "chunks": chunks_of(c, source.latent_shape[0]),
              "text_length": len(source.null_text), "built_on": sums,
              "launch": distributed.launch()}
    log = stage / "log.jsonl"
    text = log.read_text(errors="replace") if log.exists() else ""
    data.write_text(stage / "config.json", json.dumps(found, indent=1))
    kept = [row for row in text.splitlines(keepends=True) if step_of(row) <= first]
    data.write_text(log, "".join(kept))


def step_of(row: str) -> float:
    """The update of a row of log.jsonl; infinite for one that is cut short or damaged."""
    try:
        return float(json.loads(row)["step"]) if row.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def ship(run, causal_run, to) -> None:
    """Copies of the models of two runs, to be sampled or started from: weights in bf16, codec and
    record. Without the causal flow map, whose student does what it does."""
    whole = [Path(run) / stage for stage in STAGES]
    for source in (*whole, Path(causal_run) / "causal-distill"):
        target = Path(to) / source.name
        config, tensors, _ = checkpoint.load_model(source)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        checkpoint.save_model(target, rounded, config, is_main=True)
        shutil.copyfile(source / CODEC, target / CODEC)
        found = record_of(source)
        found["config"] |= {"run_dir": str(to), "base": ""}      # another machine's paths
        found.pop("launch", None)
        data.write_text(target / "config.json", json.dumps(found, indent=1))


def git_revision() -> str:
    """The commit that ran, with '+' when files differ; 'unknown' outside a git checkout."""
    describe = ["git", "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True,
                              cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
