"""What a user may get wrong, in every script: one line that names the offender and the remedy, exit
code 2, nothing changed."""
import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import bench
import checkpoint
import cli
import data
import eval as evaluation
import plane
import play
import reproduce
import sample
import train
import wan
from test_wan import PLAIN, SMALL, finished_stage, renamed

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train": train, "sample": sample, "data": data, "eval": evaluation, "wan": wan,
           "bench": bench, "plane": plane, "play": play, "reproduce": reproduce}
PROMPT = ["--prompt", "a red circle moving left"]
RUN, STAGE = ["--run-dir", "run"], "run/distill"
CAUSAL = [*RUN, "--causal"]
TINY = ["--preset", "tiny", "--run-dir", "new"]
IN = ["--preset", "tiny", "--run-dir"]
ENCODE = ["encode", "--base", "good", "--out", "o", "--videos"]
AGAIN = "run the command that made the shards again"


class Code:
    """A pickle of this runs code when it is read."""
    def __reduce__(self):
        return (os.system, ("touch was-run",))


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    """A finished run, clips, shards, weights, and broken ones of each."""
    folder = tmp_path_factory.mktemp("bad")
    shutil.copytree(finished, folder / "run")
    (folder / "half").mkdir()
    (folder / "clips.mp4").mkdir()
    shutil.copytree(folder / "run" / "pretrain", folder / "half" / "pretrain")
    for name, change in (("truncated", lambda stage: cut(stage / "model.safetensors")),
                         ("other", lambda stage: shutil.rmtree(stage / "checkpoints"))):
        shutil.copytree(folder / "run" / "pretrain", folder / name / "pretrain")
        change(folder / name / "pretrain")
    # The training state of another network, and one that is damaged.
    shutil.copytree(folder / "run" / "causal-flowmap" / "checkpoints",
                    folder / "other" / "pretrain" / "checkpoints")
    shutil.copytree(folder / "run" / "pretrain", folder / "damaged" / "pretrain")
    for file in (folder / "damaged" / "pretrain" / "checkpoints").rglob("*.safetensors"):
        cut(file)
    (folder / "damaged" / "pretrain" / "model.safetensors").unlink()
    clip = np.zeros((8, 16, 16, 3), dtype=np.uint8)
    for name, frames in (("clips", 8), ("silent", 8), ("short", 1)):
        (folder / name).mkdir()
        iio.imwrite(folder / name / "a.gif", clip[:frames], duration=125)
        if name != "silent":
            (folder / name / "a.txt").write_text("a red box")
    (folder / "empty").mkdir()
    # Stages that do not belong together: of other clips, of another size, unreadable, or newer.
    for name, settings in (("digits", {"data": "digits"}), ("large", {"size": 32})):
        shutil.copytree(folder / "run" / "pretrain", folder / name / "pretrain")
        change_settings(folder / name / "pretrain", settings)
    shutil.copytree(folder / "run" / "flowmap", folder / "wide" / "flowmap")
    finished_stage(folder / "wide" / "pretrain", PLAIN)
    for name in ("unreadable", "newer"):
        shutil.copytree(folder / "run" / "pretrain", folder / name / "pretrain")
    (folder / "unreadable" / "pretrain" / "config.json").write_bytes(b"\xff\xfe{")
    shutil.copytree(folder / "truncated" / "pretrain", folder / "alone" / "pretrain")
    shutil.rmtree(folder / "alone" / "pretrain" / "checkpoints")
    make_newer(folder / "newer" / "pretrain")
    writer = data.ShardWriter(folder / "shards", {"frames": 8})
    for i in range(2):
        writer.add(f"{i}", "a red box", latents=torch.randn(4, 48, 4, 4), text=torch.randn(3, 64))
    writer.close(torch.zeros(3, 64))
    for name in ("shards-cut", "shards-flipped", "shards-json", "shards-old"):
        shutil.copytree(folder / "shards", folder / name)
    shard = next((folder / "shards-cut").glob("part-0-of-1-*.safetensors"))
    cut(shard)
    flipped = folder / "shards-flipped" / shard.name
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"x")
    (folder / "shards-json" / "manifest.json").write_text('{"clips": 2')
    (folder / "shards-old" / "manifest.json").write_text('{"clips": 2}')
    weights = {"good": renamed(PLAIN, "diffusers")}
    weights["missing"] = {n: t for n, t in weights["good"].items() if n != "proj_out.bias"}
    weights["misshaped"] = weights["good"] | {"proj_out.bias": torch.zeros(3)}
    weights["more"] = weights["good"] | {"surprise": torch.zeros(3)}
    for name, tensors in weights.items():
        (folder / name).mkdir()
        save_file(tensors, folder / name / "weights.safetensors")
        (folder / name / "config.json").write_text(json.dumps({"num_attention_heads": SMALL.heads}))
    (folder / "index").mkdir()
    (folder / "index" / "x.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    torch.save({"weights": Code()}, folder / "code.pt")
    (folder / "nonsense.safetensors").write_bytes(b"nonsense")
    (folder / "note.txt").write_text("not a picture")
    (folder / "none.txt").write_text("\n")
    (folder / "latin.txt").write_bytes("ein Bär".encode("latin-1"))
    (folder / "long.txt").write_text("circel " * 10_000)
    (folder / "prompts.json").write_text('{"prompt": 1}')
    (folder / "list.json").write_text('[{"text": "no prompt_en"}]')
    iio.imwrite(folder / "start.png", clip[0])
    iio.imwrite(folder / "one.gif", clip[:1], duration=125)
    return folder


def change_settings(stage: Path, settings: dict):
    record = json.loads((stage / "config.json").read_text())
    record["config"] |= settings
    (stage / "config.json").write_text(json.dumps(record))


def make_newer(stage: Path):
    """Weights whose network has a setting that this code does not know."""
    with safe_open(stage / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(file.metadata()["model_config"]) | {"flux_capacitor": 1.21}
    with cli.written_aside(stage / "model.safetensors") as aside:        # the tensors are its pages
        checkpoint.write_tensors(aside, tensors, {"model_config": json.dumps(config)})


def cut(file: Path):
    file.write_bytes(file.read_bytes()[:-9])


def listing(folder: Path) -> dict:
    """Time and contents of every file and folder, but for a stage's lock, which names who was last
    to open it."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"")
            for p in folder.rglob("*") if p.name != "lock"}


# (script, arguments, what the line must hold: the offender, the remedy)
CASES = [
    # train: flags and their combinations
    ("train", ["--stpes", "5"], "--stpes", "did you mean --steps"),
    ("train", ["extra"], "'extra'", "unexpected argument"),
    ("train", ["--preset", "small"], "'small'", "valid: tiny, toy"),
    ("train", ["--steps", "0"], "--steps 0", "at least 1"),
    ("train", ["--stage", "flowmap", "--tangent-warmup", "1000", "--steps", "1000"],
     "--steps 1000", "shorter --tangent-warmup"),
    ("train", ["--stage", "distill", "--tangent-warmup", "9"], "--tangent-warmup", "flowmap"),
    ("train", ["--stage", "flowmap", "--time-embedding", "added", "--lora-rank", "4"],
     "--time-embedding added", "--lora-rank 0"),
    ("train", ["--stage", "distill", "--time-embedding", "added"], "--time-embedding added",
     "stage flowmap"),
    ("train", ["--stage", "distil"], "'distil'", "did you mean distill"),
    ("train", ["--preset", "wan-13b"], "'wan-13b'", "did you mean wan-1"),
    ("train", ["--steps", "many"], "--steps 'many'", "expected a whole number"),
    ("train", ["--lr", "-1"], "--lr -1.0", "above 0"),
    ("train", ["--guidance", "0"], "--guidance 0.0", "above 0"),
    ("train", ["--ema-decay", "2"], "--ema-decay 2.0", "lie in [0, 1]"),
    ("train", ["--cotrain", "2"], "--cotrain", "is for stage distill"),
    ("train", ["--stage", "distill", "--budgets", "0,2"], "--budgets '0,2'",
     "whole numbers from 1 up"),
    ("train", ["--stage", "flowmap", "--flow-fraction", "0.9"], "--flow-fraction",
     "together at most 1"),
    ("train", ["--flow-fraction", "0.9"], "--flow-fraction", "is for stages flowmap and distill"),
    ("train", ["--causal", "--full-chunks", "-1"], "--full-chunks -1", "at least 0"),
    ("train", ["--micro-batch", "-2"], "--micro-batch -2", "at least 0"),
    ("train", ["--epsilon", "0.7"], "--epsilon 0.7", "lie in [1e-6, 0.5]"),
    ("train", ["--epsilon", "1e-8"], "--epsilon 1e-08", "lie in [1e-6, 0.5]"),
    ("train", ["--lora-rank", "4"], "--lora-rank", "--base"),
    ("train", ["--stage", "distill", *RUN, "--base", "run"], "--base", "pretrain and flowmap"),
    ("train", [*TINY, "--base", "run/flowmap"], "--base run/flowmap is a flow map already",
     "--stage flowmap --base run/flowmap"),
    ("train", [*TINY, "--base", "run/flowmap", "--stage", "flowmap", "--velocity", "teacher",
               "--balance", "0.1"], "run/flowmap is a flow map",
     "or go on without one: --velocity data --balance 0 --tangent-warmup 0"),
    ("train", [*TINY, "--run-dir", "run", "--stage", "flowmap", "--tangent-warmup", "0", "--base",
               "run/flowmap", "--fresh"], "--base run/flowmap", "lies in the folder of the stage"),
    ("train", [*TINY, "--base", "run/flowmap", "--stage", "flowmap", "--tangent-warmup", "2"],
     "run/flowmap is a flow map already", "give --tangent-warmup 0"),
    ("train", [*TINY, "--frames", "7"], "(7, 16, 16)", "divisible by the patch (2, 4, 4)"),
    ("train", [*TINY, "--size", "15"], "15", "divisible by the patch"),
    ("train", ["--preset", "wan-1.3b", "--base", "good"], "--data shapes: --preset wan-1.3b",
     "data.py encode"),
    ("train", ["--base", "good"], "--base good is no finished stage", "say --preset wan-1.3b"),
    ("train", ["--base", "damaged/pretrain"], "damaged/pretrain is not finished", "--steps 20"),
    ("eval", [*RUN, "--data", "digits", "--steps", "1"], "--data digits", "not those that"),
    ("train", ["--stage", "flowmap", "--derivative", "jvp", "--bf16"], "--derivative jvp",
     "--no-bf16"),
    ("train", ["--causal"], "--causal", "leave it out of stage pretrain"),
    ("train", [*IN, "half", "--causal", "--stage", "flowmap", "--chunks", "1,2"],
     "--chunks 1,2: add up to 3", "clips have 4 latent frames"),
    ("train", ["--causal", "--stage", "flowmap", "--chunks", "1,x"], "--chunks '1,x'",
     "whole numbers from 1 up"),
    ("train", [*TINY, "--chunks", "2,2"], "--chunks", "--causal"),
    ("train", [*TINY, "--device", "cuda"], "device cuda", "--device cpu"),
    ("train", [*TINY, "--micro-batch", "3"], "--batch-size 8", "not a multiple of 3"),
    # train: data
    ("train", [*TINY, "--data", "shape"], "--data shape", "did you mean shapes?"),
    ("train", [*TINY, "--data", "empty"], "empty", "a caption in NAME.txt"),
    ("train", [*TINY, "--data", "silent"], "silent", "a caption in NAME.txt"),
    ("train", [*TINY, "--data", "short"], "short", "at least 8 frames"),
    ("train", [*TINY, "--data", "shards-cut"], "part-0-of-1", AGAIN),
    ("train", [*TINY, "--data", "shards-json"], "shards-json", AGAIN),
    ("train", [*TINY, "--data", "shards-old"], "shards-old", AGAIN),
    # train: stages, weights, checkpoints
    ("train", ["--stage", "flowmap", *TINY], "pretrain, which is not finished in new",
     "python train.py --stage pretrain --run-dir new --preset tiny; or give a teacher as --base"),
    ("train", [*TINY, "--stage", "distill"], "distill needs stage pretrain", "--stage pretrain"),
    ("train", [*IN, "half", "--stage", "distill", "--causal"], "distill needs stage flowmap",
     "python train.py --causal --stage flowmap --run-dir half"),
    ("train", [*TINY, "--base", "nowhere"], "--base nowhere", "--base none"),
    ("train", [*TINY, "--base", "good"], "good works on 6 channels", "--data shapes has 48"),
    ("train", [*TINY, "--base", "code.pt"], "code.pt", "convert it to safetensors"),
    ("train", [*IN, "run", "--seed", "1"], "seed = 0, not 1", "--fresh"),
    ("train", [*IN, "truncated", "--stage", "flowmap"], "truncated/pretrain/model.safetensors",
     "from the checkpoint beside it"),
    ("train", [*IN, "other"], "the training state of another network", "--fresh"),
    ("train", [*IN, "damaged"], "every checkpoint in damaged", "--fresh"),
    ("train", [*IN, "note.txt/run"], "--run-dir note.txt/run", "give another one"),
    # train: what does not belong together
    ("train", [*IN, "run", "--data", "loop"], "data = shapes, not loop", "another --run-dir"),
    ("train", [*IN, "half", "--stage", "flowmap", "--data", "loop"], "with --data shapes, not loop",
     "leave --data out"),
    ("train", [*IN, "half", "--stage", "flowmap", "--size", "32"], "with --size 16, not 32",
     "leave --size out"),
    ("train", [*TINY, "--base", "large/pretrain"], "was trained with --size 32, but --size is 16",
     "say --size 32"),
    ("train", ["--run-dir", "new", "--base", "run/pretrain"], "--preset tiny, but --preset is toy",
     "say --preset tiny"),
    ("train", [*IN, "wide", "--stage", "distill"], "dim = 32, its teacher wide/pretrain has 48",
     "of one size"),
    ("train", [*IN, "unreadable", "--stage", "flowmap"], "unreadable/pretrain/config.json",
     "UTF-8"),
    ("train", [*IN, "newer", "--stage", "flowmap"], "newer/pretrain/model.safetensors",
     "another version of this code, whose networks have flux_capacitor"),
    ("train", [*IN, "alone", "--stage", "flowmap"], "alone/pretrain/model.safetensors is damaged",
     "--fresh trains the stage anew"),
    # sample
    ("sample", ["--ckpt", "damaged/pretrain", *PROMPT], "damaged/pretrain is not finished",
     "--steps 20"),
    ("sample", [*RUN, "--prompt", " "], "prompt ' '", "has no word"),
    ("sample", [*RUN, "--prompt", "!?"], "prompt '!?'", "has no word"),
    ("sample", [*CAUSAL, *PROMPT, "--prompt-at", "1", ""], "prompt ''", "has no word"),
    ("sample", [*RUN, "--prompts", "latin.txt"], "latin.txt", "not a text in UTF-8"),
    ("sample", [*RUN, "--prompts", "long.txt"], "nearest known: 'circle'", "'circel'"),
    ("sample", [*RUN, *PROMPT, "--out", "clips.mp4/"], "--out clips.mp4", "is a folder"),
    ("sample", [*RUN, *PROMPT, "--grid", "1,nan,0"], "nan", "fall strictly from 1 to 0"),
    ("sample", [*RUN, *PROMPT, "--guidance", "inf"], "--guidance inf", "at most"),
    ("sample", RUN, "no prompt", "--prompt"),
    ("sample", [*RUN, "--prompts", "gone.txt"], "gone.txt", "no such file"),
    ("sample", [*RUN, "--prompts", "none.txt"], "none.txt", "holds no prompt"),
    ("sample", [*RUN, "--prompts", "bad.jsonl"], "bad.jsonl", "a prompt a line"),
    ("sample", [*RUN, *PROMPT, "--width", "64"], "--height, --width: run/", "leave them out"),
    ("sample", [*RUN, *PROMPT, "--save-latents", "made", "--vbench"],
     "--save-latents and --vbench", "one of them"),
    ("sample", [*RUN, *PROMPT, "--vbench", "--sheet", "s.png"], "--vbench and --sheet", "one of"),
    ("sample", [*RUN, *PROMPT, "--grid", "1,0", "--shift", "3"], "--grid and --shift", "one of"),
    ("sample", [*CAUSAL, *PROMPT, "--frames", "2", "--video", "clips/a.gif"],
     "clips/a.gif: 3 frames", "one more must be left"),
    ("sample", [*RUN, "--prompts", "prompts.json"], "prompts.json", "expected a list"),
    ("sample", [*RUN, "--prompts", "list.json"], "list.json", "prompt_en"),
    ("sample", [*RUN, "--prompt", "a red cirkle"], "'cirkle'", "nearest known: 'circle'"),
    ("sample", [*RUN, *PROMPT, "--steps", "0"], "--steps 0", "at least 1"),
    ("sample", [*RUN, *PROMPT, "--grid", "1,0.2,0.5,0"], "[1.0, 0.2, 0.5, 0.0]", "fall strictly"),
    ("sample", [*RUN, *PROMPT, "--grid", "1,half,0"], "--grid 1,half,0", "numbers with commas"),
    ("sample", [*RUN, *PROMPT, "--guidance", "0"], "--guidance 0", "above 0"),
    ("sample", [*RUN, *PROMPT, "--shift", "-5"], "--shift -5", "above 0"),
    ("sample", [*RUN, *PROMPT, "--out", "clip.avi"], "--out clip.avi", ".mp4, .gif or .png"),
    ("sample", [*RUN, *PROMPT, "--out", "note.txt/clip.mp4"], "--out note.txt", "give another one"),
    ("sample", [*RUN, *PROMPT, "--sheet", "sheet.jpg"], "--sheet sheet.jpg", "end in .png"),
    ("sample", [*RUN, *PROMPT, "--stream", "--sheet", "s.png"], "--stream and --sheet", "one of"),
    ("sample", [*RUN, *PROMPT, "--stream", "--out", "a.png"], "--out a.png", " .mp4 or .gif"),
    ("sample", [*RUN, *PROMPT, *PROMPT, "--stream"], "--stream takes", "one clip"),
    ("sample", [*RUN, *PROMPT, "--stream", "--vbench"], "--stream and --vbench", "one of them"),
    ("sample", [*PROMPT, "--ckpt", STAGE, "--causal"], "--ckpt and --causal", "one of them"),
    ("sample", [*RUN, *PROMPT, "--ckpt", STAGE], "--ckpt and --run-dir", "one of them"),
    ("plane", ["--out", "picture"], "--out picture", "end in .png"),
    ("sample", [*RUN, *PROMPT, "--sampler", "heun"], "'heun'", "valid: euler, consistency"),
    ("sample", [*RUN, *PROMPT, "--stage", "distl"], "'distl'", "did you mean distill"),
    ("sample", ["--run-dir", "half", *PROMPT, "--stage", "flowmap"], "half/flowmap", "not trained"),
    ("sample", ["--run-dir", "nowhere", *PROMPT], "nowhere", "python train.py --stage pretrain"),
    ("sample", ["--ckpt", "nonsense.safetensors", *PROMPT], "nonsense.safetensors", "not a file"),
    ("sample", ["--ckpt", "good", *PROMPT], "good", "--base"),
    ("sample", [*RUN, *PROMPT, "--frames", "16"], "one length", "--causal"),
    ("sample", [*RUN, *PROMPT, "--video", "clips/a.gif"], "--video", "trained with --causal"),
    ("sample", [*CAUSAL, *PROMPT, "--image", "note.txt"], "note.txt", "cannot be read"),
    ("sample", [*CAUSAL, *PROMPT, "--video", "one.gif"], "one.gif: 1 frames", "takes 2 frames"),
    ("sample", [*CAUSAL, *PROMPT, "--image", "start.png", "--video", "clips/a.gif"],
     "--image and --video", "one of them"),
    ("sample", [*CAUSAL, *PROMPT, "--prompt-at", "two", "a box"], "--prompt-at two", "from 0 up"),
    ("sample", [*CAUSAL, *PROMPT, "--prompt-at", "9", "a box"], "--prompt-at 9", "has 4 chunks"),
    ("sample", [*CAUSAL, *PROMPT, "--prompt-at", "1", "a red circel"], "'circel'", "'circle'"),
    ("sample", [*CAUSAL, *PROMPT, "--video", "note.txt"], "note.txt", "cannot be read"),
    ("sample", [*CAUSAL, *PROMPT, "--frames", "0"], "--frames 0", "at least 1"),
    ("sample", [*CAUSAL, *PROMPT, "--window", "-1"], "--window -1", "at least 0"),
    ("sample", [*CAUSAL, *PROMPT, *PROMPT, "--stream"], "--stream", "one prompt"),
    ("sample", [*CAUSAL, *PROMPT, "--stream", "--out", "clip.png"], "clip.png", ".mp4 or .gif"),
    ("sample", [*CAUSAL, *PROMPT, "--chunks", "2,2"],
     "--chunks: run/causal-distill was trained with chunks of [1, 1, 1, 1]", "--frames"),
    # data
    ("data", ["encode"], "encode", "--videos"),
    ("data", ["encod"], "'encod'", "did you mean encode"),
    ("data", [*ENCODE, "clips"], "good has no vae", "--base"),
    ("data", [*ENCODE, "gone"], "--videos gone", "no video"),
    ("data", ["check", "empty"], "empty", "manifest.json"),
    ("data", ["check", "shards-flipped"], "part-0-of-1", AGAIN),
    # eval
    ("eval", ["--models", "run/distil"], "--models run/distil", "finished in"),
    ("eval", [*RUN, "--steps", "0"], "'0'", "whole numbers from 1 up"),
    ("eval", [*RUN, "--count", "1"], "--count 1", "at least 2"),
    ("eval", [*RUN, "--models", "distill", "--length", "4"], "--length 4", "causal models only"),
    ("eval", ["--models", "run/pretrain,digits/pretrain"], "run/pretrain was trained with --data "
     "shapes, digits/pretrain with digits", "one after the other"),
    ("eval", ["--models", "run/pretrain,large/pretrain"], "--size 16, large/pretrain with 32",
     "one after the other"),
    # wan
    ("wan", ["show", "nowhere"], "nowhere", "not there"),
    ("wan", ["show", "empty"], "empty", "expected one .safetensors"),
    ("wan", ["show", "code.pt"], "code.pt", "convert it to safetensors"),
    ("wan", ["show", "index"], "gone.safetensors", "missing"),
    ("wan", ["show", "missing"], "proj_out.bias", "missing"),
    ("wan", ["show", "misshaped"], "proj_out.bias has shape (3,)", "expected (24,)"),
    ("wan", ["show", "more"], "surprise", "not of this network"),
    ("wan", ["export", STAGE], "export", "--to DIR"),
    ("wan", ["export", STAGE, "--to", "out"], "run/distill", "output_skip"),
    ("wan", ["export", "good", "--to", "clips"], "clips is not empty", "a new folder"),
    ("wan", ["export", STAGE, "--to", "lora.safetensors"], "run/distill", "export it to a folder"),
    # plane, play
    ("plane", ["--updates", "0"], "--updates 0", "must be above 0"),
    ("plane", ["--updates", "1000"], "--updates 1000", "a factor from 0.01 to 100"),
    ("plane", ["--seeds", "1"], "--seeds", "did you mean --seed"),
    ("plane", ["--out", "note.txt/plane.png"], "--out note.txt", "give another one"),
    ("play", ["--run-dir", "nowhere"], "no finished stage in nowhere", "--stage pretrain"),
    ("play", ["--ckpt", "good"], "good", "--base"),
    ("play", [*RUN, "--port", "70000"], "--port 70000", "give another one"),
    # bench
    ("bench", ["plan", "--gpus", "0"], "--gpus 0", "at least 1"),
    ("bench", ["plan", "--preset", "wan-14b", "--frames", "80"], "--frames 80", "4 n + 1"),
]


@pytest.mark.parametrize("script, argv, offender, remedy", CASES,
                         ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)])
def test_one_line_names_the_offender_and_the_remedy(folder, monkeypatch, capsys, script, argv,
                                                    offender, remedy):
    monkeypatch.chdir(folder)
    before = listing(folder)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
    with pytest.raises(SystemExit) as error:
        cli.run(lambda: SCRIPTS[script].main(argv))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.value.code == 2 and len(line) < 800
    assert offender in line and remedy in line and f"{script}.py: error: " in line, line
    assert listing(folder) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_of_every_flag_what_it_is_and_its_default(script, monkeypatch, capsys):
    parsers, wrong, parse = [], [], cli.Parser.parse
    monkeypatch.setattr(cli.Parser, "parse", lambda *args: parsers.append(args[0]) or parse(*args))
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main(["--help"])
    assert stop.value.code == 0 and f"example: python {script}.py" in capsys.readouterr().out
    for action in parsers[0]._actions[1:]:                       # the first is --help
        words, _, default = (action.help or "").partition("(default")
        if len(words.split()) < 2 or action.option_strings and not default:
            wrong.append((action.dest, action.help))
        elif type(action.default) in (int, float, str) and action.default != argparse.SUPPRESS:
            if str(action.default) not in default:
                wrong.append((action.dest, action.help))
    assert len(parsers[0]._actions) > 3 and not wrong


# What is answered at once, by script: help, and command lines that are wrong.
AT_ONCE = {
    "train": ["--help", "--stage distill --help", "--stpes 5", "--steps", "--steps 0"],
    "sample": ["--help", "", "--prompt a --stpes 5", "--prompt", "--prompt a --steps 0",
               "--prompt a --sampler heun", "--prompt a --out clip.avi"],
    "eval": ["--help", "--modles a", "--count", "--count 1"],
    "data": ["--help", "encode --help", "check --help", "encode --vidoes a", "encode --fps",
             "encode --fps 0", "check"],
    "wan": ["--help", "show --help", "export --help", "show a --too b", "show", "export a"],
    "bench": ["--help", *(f"{what} --help" for what in bench.WHAT), "paln", "plan --gpu 8",
              "plan --gpus", "plan --gpus 0", "plan --preset wan-14b --frames 80"],
    "plane": ["--help", "--seeds 1", "--seed", "--updates 0", "--out pyproject.toml/a.png"],
    "play": ["--help", "--prot 1", "--port", "--port one"],
    "reproduce": ["--help", "--sedes 1", "--seeds", "--seeds 0", "--runs studnet", "compare"],
}
# Runs the script argv[1] once for each command line in argv[2], where nothing that takes long can
# be imported.
ALONE = """
import contextlib, io, json, runpy, sys
script, ended = sys.argv[1], []
sys.modules |= dict.fromkeys(["torch", "numpy", "safetensors", "imageio", "imageio_ffmpeg", "PIL"])
for line in json.loads(sys.argv[2]):
    sys.argv, out, err, code = [script, *line.split()], io.StringIO(), io.StringIO(), "none"
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    ended.append([line, code, out.getvalue(), err.getvalue()])
print(json.dumps(ended))
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_wrong_flags_wait_for_no_torch(script):
    command = [sys.executable, "-c", ALONE, f"{script}.py", json.dumps(AT_ONCE[script])]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    for line, code, out, err in json.loads(run.stdout):
        if line.endswith("--help"):
            assert code == 0 and f"example: python {script}.py" in out and not err, line
        else:
            assert code == 2 and err.startswith(f"{script}.py: error: "), (line, code, err)
            assert err.count("\n") == 1 and "halted" not in err and not out, (line, err)


def test_as_a_command(folder):
    """The same from a shell."""
    before = listing(folder)
    out = subprocess.run([sys.executable, str(ROOT / "train.py"), "--data", "shape"], cwd=folder,
                         capture_output=True, text=True, timeout=120)
    assert out.returncode == 2 and out.stderr.count("\n") == 1
    assert "train.py: error: --data shape" in out.stderr and "mean shapes?" in out.stderr
    assert listing(folder) == before
