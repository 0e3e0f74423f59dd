"""Kill a run with SIGKILL again and again, and compare what it ends with to a run that was never killed, bit for bit:

    python tests/kill.py --kills 20              all stages; some kills fall into a checkpoint's write
    python tests/kill.py --kills 4 --stages distill --processes 2
"""
import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
STEPS = {"pretrain": 60, "flowmap": 30, "distill": 12}


def flags(stage: str) -> list[str]:
    """A checkpoint after every update: half of the time goes into writing, and so do half of the kills."""
    return ["--save-every", "1", "--steps", str(STEPS[stage])]


def start(run: Path, stage: str, processes: int) -> subprocess.Popen:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, "train.py", "--preset", "tiny", "--stage", stage, "--run-dir", str(run), *flags(stage)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def signal_all(run: Path, number=signal.SIGKILL, word: str = "") -> None:
    """A signal to every process of a run, torchrun's workers, which are in sessions of their own, too; or to those with `word`
    in their command (workers: -u)."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if str(run).encode() in words and (not word or word.encode() in words):
                os.kill(int(entry.name), number)
        except (OSError, ValueError):
            pass


def state(stage: Path) -> dict:
    """Weights, optimisers and EMA of the last checkpoint, and the final weights; those of each process by its file."""
    import checkpoint
    files = [*checkpoint.checkpoints(stage)[-1].glob("*.safetensors"), stage / "model.safetensors"]
    return {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def updates_saved(stage: Path) -> int:
    import checkpoint
    return max((int(path.name) for path in checkpoint.checkpoints(stage)), default=0)


def check_stage(run: Path, whole: Path, stage: str, kills: int, processes: int, chance: random.Random, say=print) -> int:
    """Train `stage` in run with `kills` kills; how many fell into a checkpoint's write. Raises AssertionError if the bits differ
    from those in `whole`."""
    in_write = 0
    for kill in range(kills):
        # Each life makes some updates at least, so that the kills are spread over the stage.
        goal = updates_saved(run / stage) + chance.randint(1, max(1, STEPS[stage] // (kills + 1) - 1))
        process = start(run, stage, processes)
        while process.poll() is None and updates_saved(run / stage) < goal:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.08)
        assert process.poll() is None, process.communicate()[1]
        signal_all(run)
        process.communicate()
        partial = list((run / stage / "checkpoints").glob("*.partial"))
        in_write += bool(partial)
        say(f"{stage}: kill {kill + 1} of {kills} after update {updates_saved(run / stage)}"
            f"{', while a checkpoint was written' if partial else ''}")
    process = start(run, stage, processes)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    mine, expected = state(run / stage), state(whole / stage)
    assert mine.keys() == expected.keys()
    different = [name for name in mine if not torch.equal(mine[name], expected[name])]
    assert not different, f"{stage}: {different[:3]} differ"
    say(f"{stage}: after {kills} kills the same bits in {len(mine)} tensors")
    return in_write


def check(folder: Path, stages, kills: int, processes: int, seed: int, say=print) -> int:
    """All `stages`, `kills` shared among them; returns how many fell into a checkpoint's write."""
    chance, in_write = random.Random(seed), 0
    for name in ("whole", "killed"):
        for stage in STEPS:
            if name == "whole" or stage not in stages:
                if name == "killed":
                    (folder / name).mkdir(exist_ok=True)
                    (folder / name / stage).symlink_to(folder / "whole" / stage)
                    continue
                process = start(folder / name, stage, processes)
                errors = process.communicate()[1]
                assert process.returncode == 0, errors
            else:
                share = kills // len(stages) + (list(stages).index(stage) < kills % len(stages))
                in_write += check_stage(folder / name, folder / "whole", stage, share, processes, chance, say)
    say(f"{kills} kills, {in_write} of them while a checkpoint was written: the same bits as never killed")
    return in_write


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stages", default=",".join(STEPS))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder), args.stages.split(","), args.kills, args.processes, args.seed)
