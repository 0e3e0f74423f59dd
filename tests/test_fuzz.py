"""Every flag of every script and every kind of file that is read, spoilt in every way: no exception
but a message of one line, exit code 2 (1 where the machine failed), and nothing changed. Where what
is spoilt does not matter, the script just ends well."""
import argparse
import json
import shutil
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import bench
import cli
import data
import encoders
import eval as evaluation
import plane
import play
import sample
import train
import wan
from distributed import generator
from golden import SMALL
from test_wan import PLAIN, renamed

SCRIPTS = {"train": train, "sample": sample, "data": data, "eval": evaluation, "wan": wan,
           "bench": bench, "plane": plane, "play": play}
PROMPT = ["--prompt", "a red circle moving left", "--steps", "1"]
SAMPLE = ["sample", "--run-dir", "run", *PROMPT, "--out", "out/clip.gif"]
TRAIN = ["train", "--preset", "tiny", "--run-dir"]


class Enough(Exception):
    """All was accepted, and the work would begin."""


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    """A finished run, and one good file of every kind that is read."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(finished, folder / "run")
    (folder / "half").mkdir()
    shutil.copytree(finished / "pretrain", folder / "half" / "pretrain")
    (folder / "out").mkdir()
    clip = np.zeros((8, 16, 16, 3), dtype=np.uint8)
    (folder / "clips").mkdir()
    for name in "ab":
        iio.imwrite(folder / "clips" / f"{name}.gif", clip, duration=125)
    (folder / "clips" / "a.txt").write_text("a red box")
    (folder / "clips" / "all.jsonl").write_text('{"file": "b.gif", "caption": "a blue box"}\n')
    iio.imwrite(folder / "start.png", clip[0])
    iio.imwrite(folder / "start.gif", clip, duration=125)
    writer = data.ShardWriter(folder / "shards", {"frames": 8})
    for i in range(8):
        writer.add(f"{i}", "a red box", latents=torch.randn(4, 48, 4, 4), text=torch.randn(3, 64))
    writer.close(torch.zeros(3, 64))
    (folder / "prompts.txt").write_text("a red circle moving left\n")
    (folder / "prompts.json").write_text('[{"prompt_en": "a red circle moving left"}]')
    weights = renamed(PLAIN, "diffusers")
    for name in ("weights", "index"):
        (folder / name).mkdir()
        save_file(weights, folder / name / "x.safetensors")
        (folder / name / "config.json").write_text(json.dumps({
            "num_attention_heads": SMALL.heads, "gate_value": 0.25, "deltatime_type": "r"}))
    (folder / "index" / "x.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(weights, "x.safetensors")}))
    torch.save({"generator": weights}, folder / "weights.pt")
    return folder


def listing(folder: Path) -> dict:
    """Time and size of every file and folder but a stage's lock, which names who was last to open
    it."""
    found = {str(file): file.stat() for file in folder.rglob("*") if file.name != "lock"}
    return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in found.items()}


def outcome(monkeypatch, capsys, folder: Path, argv: list[str]) -> tuple:
    """How a script ends (0: well), and what is wrong with that, if anything is."""
    script, *argv = argv
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
    before, end = listing(folder), 0
    capsys.readouterr()
    try:
        cli.run(lambda: SCRIPTS[script].main(argv))
    except Enough:
        pass
    except SystemExit as error:
        end = error.code
    except BaseException as error:                   # what no user may see
        return None, f"{type(error).__name__}: {error}"
    lines = [line for line in capsys.readouterr().err.splitlines()
             if line and "skipped" not in line and "it/s]" not in line]      # no progress bars
    if not end:
        for made in {Path(name) for name in listing(folder).keys() - before.keys()}:
            shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)
        return end, ""
    if end not in (1, 2) or len(lines) != 1 or f"{script}.py: error: " not in lines[0]:
        return end, f"ends with {end} and {lines}"
    if len(lines[0]) > 800:
        return end, f"a line of {len(lines[0])} letters"
    return end, "" if listing(folder) == before else "the folder is changed"


@pytest.fixture
def idle(monkeypatch, folder):
    """What takes long is not begun."""
    def begin(*args, **kwargs):
        raise Enough
    for module, names in ((train, ["update"]), (evaluation, ["EvaluationSet"]),
                          (plane, ["pretrain"]),
                          (sample, ["write_clips", "stream_to", "save_latents"])):
        for name in names:
            monkeypatch.setattr(module, name, begin)
    monkeypatch.setattr(play, "ThreadingHTTPServer", begin)
    monkeypatch.setattr(bench, "WHAT", dict.fromkeys(bench.WHAT, begin))
    few = encoders.in_parts                          # clips that the codec is fitted to
    monkeypatch.setattr(encoders, "in_parts", lambda source, count, seed: few(source, 8, seed))
    monkeypatch.chdir(folder)


# --- flags

BASE = {"train": [*TRAIN, "new"], "sample": SAMPLE, "eval": ["eval", "--run-dir", "run"],
        "data": ["data", "encode", "--videos", "clips", "--base", "weights", "--out", "out/s"],
        "bench": ["bench", "plan"], "plane": ["plane", "--out", "out/p.png"],
        "play": ["play", "--no-browser", "--run-dir", "run"],
        "wan": ["wan", "show", "weights"]}
NUMBERS = ("nan", "inf", "-inf", "1e30", "-1", "0", "", "one")
WORDS = ("", "nan", "-1", "x" * 5000, "run/pretrain/config.json", "gone/\u00fc", "1,nan,0", "\0")


def actions(script: str, monkeypatch) -> list[argparse.Action]:
    """The flags of a script that take a value."""
    parsers, parse = [], cli.Parser.parse
    with monkeypatch.context() as patch:
        patch.setattr(cli.Parser, "parse", lambda *args: parsers.append(args[0]) or parse(*args))
        with pytest.raises(SystemExit):
            SCRIPTS[script].main(["--help"])
    return [action for action in parsers[0]._actions if action.option_strings
            and action.nargs in (None, 2)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags(folder, idle, monkeypatch, capsys, script):
    wrong = []
    for action in actions(script, monkeypatch):
        flag = action.option_strings[0]
        is_number = getattr(action.type, "__qualname__", "").startswith("number.")
        for value in NUMBERS if is_number else WORDS:
            words = [flag, value, PROMPT[1]] if action.nargs else [f"{flag}={value}"]
            end, problem = outcome(monkeypatch, capsys, folder, [*BASE[script], *words])
            if is_number and value != "0" and end != 2:
                problem = problem or "is accepted"
            if problem:
                wrong.append((flag, value[:20], problem))
    assert not wrong, "\n".join(map(str, wrong))


# --- files

def change_json(text: bytes):
    """The same with a key missing, or with a value of another kind."""
    def spoilt(value):
        if isinstance(value, dict | list):
            keys = list(value)[:50] if isinstance(value, dict) else list(range(len(value)))[:2]
            for key in keys:
                rest = {k: v for k, v in value.items() if k != key} if isinstance(
                    value, dict) else value[:key] + value[key + 1:]
                yield rest
                for other in (None, "x", -1, float("nan"), [], {"a": 1}, 1e300):
                    yield {**value, key: other} if isinstance(value, dict) else [
                        *value[:key], other, *value[key + 1:]]
                for inner in spoilt(value[key]):
                    yield {**value, key: inner} if isinstance(value, dict) else [
                        *value[:key], inner, *value[key + 1:]]
    return (json.dumps(other).encode() for other in spoilt(json.loads(text)))


FLIPS = 6


def spoilt_files(file: Path, kind: str, many: int):
    """Contents in place of a file's: about `many`."""
    good, draws = file.read_bytes(), generator("fuzz", file.name)
    yield from (b"", good[:-9], good[: len(good) // 2], good[:7], good + b"xyz", b"\0" * 100,
                b"not what it says")
    if kind in ("json", "text"):
        yield from (b"[]", b"{}", b"null", b"1", b'"x"', b"{\"a\": NaN}", b"\xff\xfe" + b"a\0",
                    "ein Bär".encode("latin-1"), good.replace(b"\n", b"\r"))
    for _ in range(FLIPS):
        place = int(torch.randint(len(good), (1,), generator=draws))
        flipped = bytearray(good)
        flipped[place] ^= 1 << int(torch.randint(8, (1,), generator=draws))
        yield bytes(flipped)
    if kind == "json":
        others = list(change_json(good))
        order = torch.randperm(len(others), generator=draws)[:many].tolist()
        yield from (others[i] for i in order)
    if kind == "text":
        yield from (good.decode().encode("utf-16"), b"\n" * 100, b"word " * 10_000)


FLOWMAP, RESUME = [*TRAIN, "half", "--stage", "flowmap"], [*TRAIN, "run", "--stage", "pretrain"]
SHARDS, CLIPS = [*TRAIN, "new", "--data", "shards"], [*TRAIN, "new", "--data", "clips"]
FILES = [  # (file, kind, commands that read it)
    ("run/distill/config.json", "json", [SAMPLE, [*TRAIN, "run", "--stage", "distill"]]),
    ("run/causal-distill/config.json", "json", [["eval", "--run-dir", "run"]]),
    ("half/pretrain/config.json", "json", [FLOWMAP]),
    ("half/pretrain/config.json", "json", [["wan", "export", "half/pretrain", "--to", "o"]]),
    ("half/pretrain/model.safetensors", "", [FLOWMAP]),
    ("run/distill/model.safetensors", "", [SAMPLE]),
    ("run/distill/codec.safetensors", "", [SAMPLE]),
    ("half/pretrain/codec.safetensors", "", [FLOWMAP]),
    ("run/pretrain/checkpoints/00000020/state.json", "", [RESUME]),
    ("run/pretrain/log.jsonl", "text", [[*RESUME, "--steps", "21"]]),
    ("shards/manifest.json", "json", [SHARDS, ["data", "check", "shards"]]),
    ("shards/part-0-of-1-00000.safetensors", "", [SHARDS]),
    ("shards/null_text.safetensors", "", [SHARDS]),
    ("clips/a.txt", "text", [CLIPS]),
    ("clips/all.jsonl", "text", [CLIPS]),
    ("clips/a.gif", "", [CLIPS]),
    ("start.png", "", [[*SAMPLE, "--causal", "--image", "start.png"]]),
    ("start.gif", "", [[*SAMPLE, "--causal", "--video", "start.gif"]]),
    ("prompts.txt", "text", [[*SAMPLE[:3], "--prompts", "prompts.txt"]]),
    ("prompts.json", "json", [[*SAMPLE[:3], "--prompts", "prompts.json"]]),
    ("weights/x.safetensors", "", [["wan", "show", "weights"]]),
    ("weights/config.json", "json", [["wan", "show", "weights"],
                                     ["wan", "export", "weights", "--to", "o"]]),
    ("index/x.safetensors.index.json", "json", [["wan", "show", "index"]]),
    ("weights.pt", "", [["wan", "show", "weights.pt"]]),
]


@pytest.mark.parametrize("name, kind, commands", FILES, ids=[name for name, _, _ in FILES])
def test_files(folder, idle, monkeypatch, capsys, name, kind, commands):
    file, wrong, ended = folder / name, [], 0
    good = file.read_bytes()
    try:
        for content in spoilt_files(file, kind, many=30):
            file.unlink()                            # it may be mapped still
            file.write_bytes(content)
            for command in commands:
                problem = outcome(monkeypatch, capsys, folder, command)[1]
                ended += 1
                if problem:
                    wrong.append((" ".join(command[:5]), content[:60], problem))
        file.unlink()
        for place in ("missing", "a folder"):
            for command in commands:
                if problem := outcome(monkeypatch, capsys, folder, command)[1]:
                    wrong.append((" ".join(command[:5]), place, problem))
            if place == "missing":
                file.mkdir()
    finally:
        if file.is_dir():
            file.rmdir()
        file.write_bytes(good)
    assert not wrong, f"{len(wrong)} of {ended}:\n" + "\n".join(map(str, wrong[:20]))
