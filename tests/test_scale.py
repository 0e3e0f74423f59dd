"""What a cluster does to a run: other process counts, nodes, killed processes, bf16."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import kill
import train

ROOT = Path(__file__).parent.parent
# With the second, a restart finds no addresses of the processes before it (README).
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
LORA = ("--lora-rank", "4", "--lr", "1e-2", "--log-every", "1")


def run_stage(run, stage, *flags):
    return train.train(train.parse_config(["--preset", "tiny", "--stage", stage, "--run-dir", str(run), *flags]))


def torchrun(processes: int, run, stage: str, *flags, launch=("--standalone",)) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *launch, f"--nproc_per_node={processes}", "train.py",
                             "--preset", "tiny", "--stage", stage, "--run-dir", str(run), *flags], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **ENVIRONMENT})


def finish(process: subprocess.Popen) -> str:
    out = process.communicate(timeout=180)[0]
    assert process.returncode == 0, out
    return out


def link(source: Path, target: Path, *stages):
    target.mkdir()
    for stage in stages:
        (target / stage).symlink_to(source / stage)
    return target


def losses(stage: Path) -> list[dict]:
    rows = [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("seconds", "lr")} for row in rows]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A teacher, and pretrain and flowmap as adapters of it."""
    folder = tmp_path_factory.mktemp("scale")
    base = run_stage(folder / "base", "pretrain")
    run_stage(folder / "run", "pretrain", "--base", str(base), *LORA)
    run_stage(folder / "run", "flowmap", *LORA)
    return folder / "run"


def test_saved_on_four_processes_resumed_on_two_and_one(adapted, tmp_path):
    """Distill with three adapters on one base: the same losses on 4 processes as on 1, and after a change of processes."""
    before = ("pretrain", "flowmap")
    whole = link(adapted, tmp_path / "whole", *before)
    run_stage(whole, "distill", *LORA, "--steps", "10")
    four = link(adapted, tmp_path / "four", *before)
    finish(torchrun(4, four, "distill", *LORA, "--steps", "5"))
    assert len(list((four / "distill" / "checkpoints" / "00000005").glob("*.safetensors"))) == 4
    rest = {}
    for processes in (4, 2, 1):
        run = link(adapted, tmp_path / f"then-{processes}", *before)
        subprocess.run(["cp", "-r", four / "distill", run], check=True)
        if processes == 1:
            run_stage(run, "distill", *LORA, "--steps", "10")
        else:
            finish(torchrun(processes, run, "distill", *LORA, "--steps", "10"))
        rest[processes] = losses(run / "distill")
        assert [row["step"] for row in rest[processes]] == list(range(1, 11))
        for row, expected in zip(rest[processes], losses(whole / "distill"), strict=True):
            assert row == pytest.approx(expected, rel=1e-5)
    for processes in (2, 1):
        for row, expected in zip(rest[processes], rest[4], strict=True):
            assert row == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_two_nodes_with_a_copy_of_the_weights_each(tmp_path):
    """--shard node, on two torchruns of two processes: the losses of one process."""
    run_stage(tmp_path / "one", "pretrain", "--log-every", "1", "--steps", "10")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [torchrun(2, tmp_path / "nodes", "pretrain", "--log-every", "1", "--steps", "10", "--shard", "node",
                      launch=["--nnodes=2", f"--node_rank={rank}", "--master_addr=127.0.0.1", f"--master_port={port}"])
             for rank in range(2)]
    for node in nodes:
        finish(node)
    for a, b in zip(losses(tmp_path / "nodes" / "pretrain"), losses(tmp_path / "one" / "pretrain"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    # Two copies of each shard, of which one is saved.
    state = [load_file(file) for file in checkpoint.checkpoints(tmp_path / "nodes" / "pretrain")[-1].glob("*.safetensors")]
    saved = sum(part["student.weights.head.weight"].numel() for part in state if "student.weights.head.weight" in part)
    assert saved == load_file(tmp_path / "one" / "pretrain" / "model.safetensors")["head.weight"].numel()


def test_a_process_that_dies_ends_the_others_and_torchrun_goes_on(tmp_path):
    """SIGKILL to one of two: torchrun starts both again, from the last checkpoint, and the bits are those of a whole run."""
    flags = ("--steps", "80", "--save-every", "10")
    finish(torchrun(2, tmp_path / "whole", "pretrain", *flags))
    process = torchrun(2, tmp_path / "run", "pretrain", *flags, launch=("--standalone", "--max-restarts=1"))
    while process.poll() is None and kill.updates_saved(tmp_path / "run" / "pretrain") < 20:
        time.sleep(0.01)
    workers = [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(workers[-1], signal.SIGKILL)
    started = time.time()
    out = finish(process)
    assert "resumed from update" in out and time.time() - started < 60
    mine, whole = (kill.state(tmp_path / name / "pretrain") for name in ("run", "whole"))
    assert mine.keys() == whole.keys() and all(torch.equal(mine[name], whole[name]) for name in whole)


def test_killed_at_any_instant_it_ends_with_the_same_bits(tmp_path):
    """The short form of `python tests/kill.py`: twice in distill. Whole or killed, a run is a process of its own with one
    thread: sums over another number of threads are rounded otherwise."""
    kill.check(tmp_path, ["distill"], kills=2, processes=1, seed=0)


def test_bf16_keeps_fp32_masters_of_what_trains(adapted, tmp_path):
    run = link(adapted, tmp_path / "run", "pretrain", "flowmap")
    stage = run_stage(run, "distill", *LORA, "--bf16", "--steps", "3")
    state = load_file(next(checkpoint.checkpoints(stage)[-1].glob("*.safetensors")))
    assert {tensor.dtype for tensor in state.values()} == {torch.float32} and all(t.isfinite().all() for t in state.values())
    plain = link(adapted, tmp_path / "plain", "pretrain", "flowmap")
    run_stage(plain, "distill", *LORA, "--steps", "3")
    for a, b in zip(losses(stage), losses(plain / "distill"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02) and a["fake"] == pytest.approx(b["fake"], rel=0.02)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_give_the_same_losses(tmp_path):
    flags = ("--steps", "2", "--log-every", "1")
    compiled, plain = (run_stage(tmp_path / name, "pretrain", *flags, *more) for name, more in (("compiled", ["--compile"]), ("plain", [])))
    for a, b in zip(losses(compiled), losses(plain), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
