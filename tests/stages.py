"""Trainings of the tiny preset: here, and several in one launch, which starts Python only once:

    torchrun --nproc_per_node=2 tests/stages.py JOBS.json

JOBS.json lists jobs, done one after the other: [script, its arguments, [[update, event], ...]]; see
`happen` for events. What a job raises is printed, and the next one goes on.
"""
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint  # noqa: E402
import distributed  # noqa: E402
import train  # noqa: E402
from config import parse_config  # noqa: E402

# Folders of a run, and those that each starts from.
BEFORE = {"pretrain": (), "flowmap": ("pretrain",), "distill": ("pretrain", "flowmap"),
          "causal-flowmap": ("pretrain",), "causal-distill": ("pretrain", "causal-flowmap")}
FOLDERS = tuple(BEFORE)
CAUSAL = ("--causal", "--full-chunks", "2", "--checkpointing")
STATE = "shard-00001-model-00001-of-00001.safetensors"      # of a checkpoint by one process
# With the second, a restart finds no addresses of the processes before it (docs/scale.md).
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def flags_of(run, folder: str, *flags) -> list[str]:
    """train.py's arguments for the stage in this folder of the run."""
    stage = folder.removeprefix("causal-")
    form = () if stage == folder else CAUSAL
    return ["--preset", "tiny", "--run-dir", str(run), "--stage", stage, *form, *flags]


def trained(run, folder: str, *flags) -> Path:
    """Train a stage here; returns its folder."""
    return train.train(parse_config(flags_of(run, folder, *flags)))


def linked(source: Path, target: Path, folder: str) -> Path:
    """A new run `target` with the stages of `source` that a stage starts from."""
    target.mkdir()
    for name in BEFORE[folder]:
        (target / name).symlink_to(source / name)
    return target


def rows(stage: Path) -> list[dict]:
    """Of log.jsonl, without the time."""
    lines = (stage / "log.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


def assert_same_files(a: Path, b: Path) -> None:
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def launch(file: Path, jobs: list, *flags) -> subprocess.Popen:
    """torchrun, with these flags of its own, on jobs that are listed in `file`."""
    file.write_text(json.dumps(jobs))
    torchrun = [sys.executable, "-m", "torch.distributed.run", *flags, __file__, str(file)]
    return subprocess.Popen(torchrun, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def signal_all(argument, number=signal.SIGKILL, word: str = "") -> None:
    """A signal to every process with this argument, torchrun's workers, which are in sessions of
    their own, too; or to those with `word` in their command (workers: -u)."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if str(argument).encode() in words and (not word or word.encode() in words):
                os.kill(int(entry.name), number)
        except (OSError, ValueError):
            pass


def happen(event: str, world, file: str) -> None:
    """Before an update on this rank."""
    if event == "die" and world.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    if event == "full disk" and world.rank == 1:
        checkpoint.sync = no_space
    if event == "SIGUSR1 to the workers" and world.rank == 0:    # as in docs/scale.md
        signal_all(file, signal.SIGUSR1, "-u")
    if event == "SIGTERM to torchrun" and world.rank == 0:
        os.kill(os.getppid(), signal.SIGTERM)
        while not signal.getsignal(signal.SIGTERM).__self__.seen:    # until it is passed on
            time.sleep(0.01)


def no_space(files):
    raise OSError(28, "No space left on device")


def with_events(update, events: list, file: str):
    """train.update, with what happens before some updates."""
    def watched(c, nets, parts, batches, step, world, log):
        for at, event in events:
            if at == step:
                happen(event, world, file)
        return update(c, nets, parts, batches, step, world, log)
    return watched


def main(file: str) -> None:
    update, sync = train.update, checkpoint.sync
    for script, argv, events in json.loads(Path(file).read_text()):
        train.update, checkpoint.sync = with_events(update, events, file), sync
        try:
            importlib.import_module(script).main(argv)
        except (ValueError, OSError) as error:
            print(f"rank {os.environ.get('RANK', 0)}: {error}", flush=True)
    distributed.stop()


if __name__ == "__main__":
    main(sys.argv[1])
