"""Kill a run with SIGKILL again and again, and compare what it ends with to a run that was never
killed, bit for bit:

    python tests/kill.py --kills 20        all stages; some kills fall into a checkpoint's write
    python tests/kill.py --kills 4 --stages distill,causal-distill --processes 2
    python tests/kill.py --kills 20 --output sample,stream,export      what is written otherwise
"""
import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint  # noqa: E402
import stages  # noqa: E402
from test_wan import PLAIN, renamed  # noqa: E402

STEPS = {"pretrain": 60, "flowmap": 30, "distill": 12, "causal-flowmap": 30, "causal-distill": 12}


def flags(stage: str) -> list[str]:
    """A checkpoint after every update: half of the time goes into writing, and so do half of the
    kills."""
    return ["--save-every", "1", "--steps", str(STEPS[stage])]


def start(run: Path, stage: str, processes: int) -> subprocess.Popen:
    launch = []
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    argv = stages.flags_of(run, stage, *flags(stage))
    return subprocess.Popen([sys.executable, *launch, "train.py", *argv], cwd=ROOT, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(process: subprocess.Popen) -> None:
    errors = process.communicate()[1]
    assert process.returncode == 0, errors


def state(stage: Path) -> dict:
    """Weights, optimisers and EMA of the last checkpoint, and the final weights; those of each
    process by its file."""
    files = [*checkpoint.checkpoints(stage)[-1].glob("*.safetensors"), stage / "model.safetensors"]
    return {f"{file.name} {name}": tensor for file in files
            for name, tensor in load_file(file).items()}


def assert_same_bits(a: Path, b: Path) -> int:
    """Of two stages; how many tensors they have."""
    mine, expected = state(a), state(b)
    assert mine.keys() == expected.keys()
    different = [name for name in mine if not torch.equal(mine[name], expected[name])]
    assert not different, f"{a}: {different[:3]} differ"
    return len(mine)


def updates_saved(stage: Path) -> int:
    return max((int(path.name) for path in checkpoint.checkpoints(stage)), default=0)


def check_stage(run: Path, whole: Path, stage: str, kills: int, processes: int,
                chance: random.Random, say=print) -> int:
    """Train `stage` in run with `kills` kills; how many fell into a checkpoint's write. Raises
    AssertionError if the bits differ from those in `whole`."""
    in_write = 0
    for kill in range(kills):
        # Each life makes some updates at least, so that the kills are spread over the stage.
        most = max(1, STEPS[stage] // (kills + 1) - 1)
        goal = updates_saved(run / stage) + chance.randint(1, most)
        process = start(run, stage, processes)
        while process.poll() is None and updates_saved(run / stage) < goal:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.08)
        assert process.poll() is None, process.communicate()[1]
        stages.signal_all(run)
        process.communicate()
        partial = list((run / stage / "checkpoints").glob("*.partial"))
        in_write += bool(partial)
        say(f"{stage}: kill {kill + 1} of {kills} after update {updates_saved(run / stage)}"
            f"{', while a checkpoint was written' if partial else ''}")
    finish(start(run, stage, processes))
    tensors = assert_same_bits(run / stage, whole / stage)
    say(f"{stage}: after {kills} kills the same bits in {tensors} tensors")
    return in_write


def check(folder: Path, names: list[str], kills: int, processes: int, seed: int, say=print) -> int:
    """The stages of these names, `kills` shared among them; returns how many fell into a
    checkpoint's write. The run that is never killed is folder/whole; a stage that is finished
    there is not trained again."""
    whole, killed = folder / "whole", folder / "killed"
    chance, in_write = random.Random(seed), 0
    killed.mkdir()
    needed = {*names, *(before for name in names for before in stages.BEFORE[name])}
    for stage in [stage for stage in STEPS if stage in needed]:
        if not (whole / stage / "model.safetensors").exists():
            finish(start(whole, stage, processes))
        if stage not in names:
            (killed / stage).symlink_to(whole / stage)
            continue
        share = kills // len(names) + (names.index(stage) < kills % len(names))
        in_write += check_stage(killed, whole, stage, share, processes, chance, say)
    say(f"{kills} kills, {in_write} of them while a checkpoint was written: the same bits as never "
        "killed")
    return in_write


# --- clips and exported weights

def output_commands(folder: Path, run: Path) -> dict:
    """What writes files, by name: the command, and where."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    weights = folder / "weights.safetensors"
    save_file(renamed(replace(PLAIN, layers=24), "diffusers"), weights)
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": PLAIN.heads}))
    sample = ["sample.py", "--run-dir", str(run), "--steps", "1"]
    return {"sample": [*sample, "--prompts", str(folder / "prompts.txt"), "--vbench", "--out"],
            "stream": [*sample, "--causal", "--stream", "--frames", "400", "--prompt", PROMPTS[0],
                       "--out"],
            "export": ["wan.py", "export", str(weights), "--to"]}


PROMPTS = [f"a {colour} {shape} moving {way}" for colour in ("red", "blue") for shape in (
    "circle", "square") for way in ("left", "right", "up", "down")]
NAMES = {"sample": "clips", "stream": "clip.mp4", "export": "exported"}


def final_files(place: Path) -> dict[str, bytes]:
    """What stands under a final name, by it."""
    files = [place] if place.is_file() else sorted(place.rglob("*"))
    return {str(file.relative_to(place.parent)): file.read_bytes() for file in files
            if file.is_file() and ".partial" not in file.name}


def check_output(folder: Path, run: Path, name: str, kills: int, seed: int, say=print) -> int:
    """Kill a command that writes files, at random instants while it writes; how many kills left a
    file that was not whole, under another name. Raises AssertionError for one under a final name,
    or if the same command does not go on to what it makes when it is never killed."""
    command = output_commands(folder, run)[name]
    chance, in_write, whole = random.Random(seed), 0, folder / "whole" / NAMES[name]
    killed = folder / "killed" / NAMES[name]

    def start(place: Path) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, *command, str(place)], cwd=ROOT, text=True,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})

    def wait_for_file(process, place: Path) -> None:
        while process.poll() is None and not [*place.parent.glob("*")]:
            time.sleep(0.001)
    process = start(whole)
    wait_for_file(process, whole)
    started = time.time()
    finish(process)
    seconds, expected = time.time() - started, final_files(whole)
    for kill in range(kills):
        if final_files(killed) == expected:          # it had ended: from the start
            shutil.rmtree(killed.parent)
        process = start(killed)
        wait_for_file(process, killed)
        with suppress(subprocess.TimeoutExpired):
            process.wait(chance.random() * seconds)
        process.kill()
        process.communicate()
        time.sleep(0.1)                              # ffmpeg ends when nobody feeds it
        found = final_files(killed) if killed.exists() else {}
        wrong = [file for file, content in found.items() if content != expected[file]]
        assert not wrong, f"kill {kill + 1}: {wrong} are not whole"
        partial = [*killed.parent.rglob("*.partial*")]
        in_write += bool(partial)
        say(f"{name}: kill {kill + 1} of {kills}, {len(found)} of {len(expected)} files are there"
            f"{', one is half' if partial else ''}")
    if final_files(killed) != expected:
        finish(start(killed))
    assert final_files(killed) == expected
    say(f"{name}: after {kills} kills, {in_write} of them in a file, all {len(expected)} are whole")
    return in_write


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stages", default=",".join(STEPS))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", default="", help="sample, stream, export: in place of stages")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run, names = Path(folder) / "run", args.output.split(",") if args.output else []
        for stage in stages.FOLDERS if {"sample", "stream"} & set(names) else ():
            stages.trained(run, stage)
        for i, name in enumerate(names):
            (Path(folder) / name).mkdir()
            share = args.kills // len(names) + (i < args.kills % len(names))
            check_output(Path(folder) / name, run, name, share, args.seed)
        if names:
            sys.exit()
        check(Path(folder), args.stages.split(","), args.kills, args.processes, args.seed)
