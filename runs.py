"""The run folder: what a stage is built on, where its clips come from, and what is recorded of it.

A run is a folder with a folder for each stage, see checkpoint.py for what these hold.
"""
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import checkpoint
import cli
import data
import distributed
import encoders
import wan
from config import CHANGEABLE, Config, chunks_of, command, folder_of, stage_before
from model import PRESETS

CODEC = "codec.safetensors"


def stage_folder(c: Config) -> Path:
    return Path(c.run_dir) / folder_of(c.stage, c.causal)


def origins(c: Config) -> dict[str, str]:
    """Where the networks of a stage start from, files or folders: the "teacher", from which the
    fake score starts too, in distill; the "student", if not from fresh weights."""
    run, before = Path(c.run_dir), stage_before(c.stage)
    student = c.base or (str(run / folder_of(before, c.causal)) if before else "")
    teacher = str(run / "pretrain")
    if c.stage == "distill" and not finished(teacher):
        # Stage flowmap may have had weights in place of stage pretrain.
        teacher = read_record(Path(student)).get("config", {}).get("base") or teacher
    found = {"teacher": teacher if c.stage == "distill" else "", "student": student}
    return {role: place for role, place in found.items() if place}


def finished(stage) -> bool:
    return (Path(stage) / "model.safetensors").exists()


def first_command(c: Config, stage: str) -> str:
    """The command that begins a stage of the run."""
    flags = {"preset": c.preset, "data": c.data}
    given = [f" --{name} {value}" for name, value in flags.items()
             if value != getattr(Config, name)]
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
        if place.parent == Path(c.run_dir) and not finished(place):
            name = place.name.removeprefix("causal-")
            raise ValueError(f"stage {c.stage} needs stage {name}, which is not finished in "
                             f"{c.run_dir}. First run: {first_command(c, name)}")
    per_step = world.size * (c.micro_batch or max(1, c.batch_size // world.size))
    if c.batch_size % per_step:
        raise ValueError(f"--batch-size {c.batch_size} is not a multiple of {per_step}: "
                         f"{world.size} processes times {per_step // world.size} samples "
                         "(--micro-batch)")
    cli.check_folder(stage, "--run-dir")
    begun, sums = distributed.on_main(lambda: (read_record(stage), built_on(c)), world)
    # What a launch has begun afresh it goes on with, when it is started once more.
    fresh = distributed.on_main(
        lambda: c.fresh and not distributed.is_restart(begun.get("launch")), world)
    if begun and not fresh:
        if change := change_between(begun["config"], settings(c)):
            raise ValueError(f"{stage} was started with {change}: use --fresh to start it anew, or "
                             "another --run-dir")
        for role, checksum in sums.items():
            if begun.get("built_on", {}).get(role, checksum) != checksum:
                raise ValueError(f"{stage} was started on other weights than {origins(c)[role]} "
                                 "holds now: use --fresh to start this stage anew, too")
    return fresh, sums


def settings(c: Config) -> dict:
    """What is recorded of a config: a base by its absolute path, as a run goes on from anywhere."""
    base = {"base": os.path.abspath(c.base)} if c.base else {}
    return dataclasses.asdict(c) | base


def read_record(stage: Path) -> dict:
    """config.json of a stage; {} for one that was not begun."""
    file = stage / "config.json"
    return json.loads(file.read_text()) if file.exists() else {}


def change_between(then: dict, now: dict) -> str:
    """The first setting that changed and may not, or ''."""
    for name, value in now.items():
        if name in then and name not in CHANGEABLE and then[name] != value:
            return f"{name} = {then[name]}, not {value}"
    return ""


def built_on(c: Config) -> dict[str, str]:
    """What tells the weights that a stage starts from, by role."""
    return {role: fingerprint(place) for role, place in origins(c).items()}


def fingerprint(place) -> str:
    """Of a finished stage its checksum. Of other weights, which may be tens of GB, the SHA-256 of
    their sizes and of sixteen pieces of each file."""
    if finished(place):
        return data.checksum(Path(place) / "model.safetensors")
    found = hashlib.sha256()
    for file in wan.weight_files(Path(place)):
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with open(file, "rb") as opened:
            for piece in range(16):
                opened.seek(piece * size // 16)
                found.update(opened.read(2**16))
    return found.hexdigest()


def open_source(c: Config, fresh: bool):
    """Where latents and prompt features come from: shards, or clips and captions behind stand-ins
    for encoders, which the first stage fits. Raises ValueError for a set that cannot be used."""
    try:
        source = data.open_data(c.data, c.frames, c.size)
        if isinstance(source, data.Shards):
            return source
        places = [Path(origins(c).get("student", "none")) / CODEC]
        places += [] if fresh else [stage_folder(c) / CODEC]
        found = [place for place in places if place.exists()]
        if found:
            codec = encoders.PatchPCA.from_state(load_file(found[-1]))
        else:
            clips = source.clips(range(1024), seed=c.seed)[0]
            codec = encoders.PatchPCA.fit(clips, PRESETS[c.preset].channels)
        words = encoders.Words.of(source.captions, PRESETS[c.preset].text_dim)
        return encoders.Encoded(source, codec, words)
    except ValueError as error:
        raise ValueError(f"--data {c.data}: {error}") from None


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


def prepare(c: Config, source, fresh: bool, world) -> None:
    """Make the stage's folder, with the codec in it, which all ranks then use."""
    stage = stage_folder(c)
    own_codec = not isinstance(source, data.Shards)
    if world.is_main:
        if fresh:
            shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True, exist_ok=True)
        if own_codec and not (stage / CODEC).exists():
            aside = stage / f"{CODEC}.partial"
            save_file(source.codec.state(), aside)
            aside.rename(stage / CODEC)
    distributed.barrier(world)
    if own_codec:
        source.codec = encoders.PatchPCA.from_state(load_file(stage / CODEC))


def record(c: Config, source, first: int, sums: dict) -> None:
    """Write config.json, and take rows out of log.jsonl of updates that are made again."""
    stage = stage_folder(c)
    found = {} if isinstance(source, data.Shards) else {"vocabulary": source.words.vocabulary}
    found |= {"config": settings(c), "git": git_revision(), "torch": torch.__version__,
              "latent_shape": source.latent_shape,
              "chunks": chunks_of(c, source.latent_shape[0]),
              "text_length": len(source.null_text), "built_on": sums,
              "launch": distributed.launch()}
    data.write_text(stage / "config.json", json.dumps(found, indent=1))
    log = stage / "log.jsonl"
    rows = log.read_text().splitlines(keepends=True) if log.exists() else []
    whole = [row for row in rows if row.endswith("}\n")]           # the last may be cut short
    data.write_text(log, "".join(row for row in whole if json.loads(row)["step"] <= first))


def ship(run, to) -> None:
    """Copies of a run's models, to be sampled and not trained further: weights in bf16, codec and
    record. Without the causal flow map, whose student does what it does."""
    for stage in ("pretrain", "flowmap", "distill", "causal-distill"):
        source, target = Path(run) / stage, Path(to) / stage
        config, tensors, _ = checkpoint.load_model(source)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        checkpoint.save_model(target, rounded, config, is_main=True)
        shutil.copyfile(source / CODEC, target / CODEC)
        found = read_record(source)
        found["config"] |= {"run_dir": str(to), "base": ""}      # another machine's paths
        del found["launch"]
        data.write_text(target / "config.json", json.dumps(found, indent=1))


def git_revision() -> str:
    """The commit that ran, with '+' when files differ; 'unknown' outside a git checkout."""
    describe = ["git", "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True,
                              cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
