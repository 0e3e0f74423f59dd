"""On a GPU: the losses of the CPU, then all stages of both forms in bf16 and compiled, with and
without adapters, resumed to the bit, and sampled. In a process of its own: this one sees no GPU."""
import json
import os
import shutil
import subprocess
import sys

import pytest

import checkpoint
import stages
from stages import FOLDERS, assert_same_files, flags_of, linked, rows

pytestmark = pytest.mark.gpu
FAST = ("--device", "cuda", "--bf16", "--compile", "--deterministic", "--log-every", "1",
        "--steps", "4")
LORA = ("--lora-rank", "4", "--lr", "1e-2")


def see(code: str, *args) -> str:
    """What Python prints that sees the GPUs."""
    run = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True,
                         cwd=stages.ROOT, env=dict(os.environ))
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(autouse=True)
def gpu(gpus_where_asked):
    found = shutil.which("nvidia-smi") and see("import torch; print(torch.cuda.is_available())")
    if not found or "True" not in found:
        pytest.skip("no GPU")


def done(folder, jobs) -> None:
    """Do the jobs in one process."""
    (folder / "jobs.json").write_text(json.dumps([["train", job, []] for job in jobs]))
    run = subprocess.run([sys.executable, stages.__file__, str(folder / "jobs.json")],
                         capture_output=True, text=True, cwd=stages.ROOT, env=dict(os.environ))
    assert run.returncode == 0 and "rank 0:" not in run.stdout, run.stdout + run.stderr


def test_losses_are_those_of_the_cpu(finished, tmp_path):
    """In fp32. What is random is drawn on the CPU: the batches are the same."""
    done(tmp_path, [flags_of(linked(finished, tmp_path / stage, stage), stage, "--device", "cuda",
                             "--log-every", "1", "--steps", "4") for stage in FOLDERS])
    for stage in FOLDERS:
        mine = rows(tmp_path / stage / stage)
        assert len(mine) == 4
        for a, b in zip(mine, rows(finished / stage)):
            assert a == pytest.approx(b, rel=1e-2)


def test_what_a_launch_runs_by_default(tmp_path):
    """Eager and not deterministic, attention takes other kernels."""
    done(tmp_path, [flags_of(tmp_path / "run", stage, "--device", "cuda", "--bf16", "--log-every",
                             "1", "--steps", "4") for stage in FOLDERS])
    for stage in FOLDERS:
        assert len(rows(tmp_path / "run" / stage)) == 4
        assert rows(tmp_path / "run" / stage)[-1]["skipped"] == 0


@pytest.mark.parametrize("more", [(), LORA], ids=["all weights", "adapters"])
def test_all_stages_of_both_forms_resumed_and_sampled(finished, tmp_path, more):
    whole, run = tmp_path / "whole", tmp_path / "run"
    base = ("--base", str(finished / "pretrain")) if more else ()
    jobs = [flags_of(whole, stage, *FAST, *more, *(base if stage == "pretrain" else ()))
            for stage in FOLDERS]
    done(tmp_path, jobs)
    for stage in FOLDERS:
        assert len(rows(whole / stage)) == 4 and rows(whole / stage)[-1]["skipped"] == 0
    linked(whole, run, "causal-distill")
    done(tmp_path, [flags_of(run, "causal-distill", *FAST, *more, "--steps", steps)
                    for steps in ("2", "4")])
    newest = [checkpoint.checkpoints(folder / "causal-distill")[-1] for folder in (whole, run)]
    assert_same_files(*(folder / stages.STATE for folder in newest))
    for form in ([], ["--causal", "--stream"]):
        clip = tmp_path / "clip.mp4"
        see("import sample, sys; sample.main(sys.argv[1:])", "--device", "cuda", "--run-dir",
            str(whole), "--prompt", "a red circle moving left", "--out", str(clip), *form)
        assert clip.stat().st_size > 0
        clip.unlink()
