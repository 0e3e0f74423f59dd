"""The plan of memory: closed forms where there are any, and the measured memory of a real update."""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench
from model import PRESETS, FlowMapDiT
from train import STAGES, parse_config

TINY = bench.Case("pretrain", PRESETS["tiny"], (4, 48, 4, 4), gpus=2, lora_rank=0, checkpointing=False, bf16=False, tokens=8)


@pytest.fixture(autouse=True)
def no_group():
    """The plan makes a process group of its own: the one that training left is put aside."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def parameters(processes=1, part=lambda net: net, **fields):
    """How many weights the first of so many processes keeps: of each tensor the first rows, rounded up."""
    with torch.device("meta"):
        net = part(FlowMapDiT(replace(TINY.config, **fields)))
    return sum(-(-len(p) // processes) * p[0].numel() for p in net.parameters())


def test_what_is_kept_is_counted_exactly():
    """fp32, two processes: each keeps half of the weights, gradients, both moments and the EMA, and AdamW's step counts."""
    one = bench.plan(TINY)
    count, tensors = parameters(2, second_time=False), len(list(FlowMapDiT(replace(TINY.config, second_time=False)).parameters()))
    assert one["parameters"] == one["gradients"] == one["EMA"] == 4 * count
    assert one["optimiser"] == 2 * 4 * count + 4 * tensors
    assert one["peak"] == sum(one[name] for name in ("parameters", "gradients", "optimiser", "EMA", "activations"))


def test_traffic_is_that_of_fsdp():
    """Pretrain: every weight gathered in forward and again in backward, every gradient reduced; half of each comes from the
    other process. A second micro-batch gathers again and reduces nothing."""
    one, two = bench.plan(TINY), bench.plan(replace(TINY, micro_steps=2))
    count = parameters(2, second_time=False)
    assert one["gathered"] == 2 * 4 * count and two["gathered"] == 2 * one["gathered"]
    assert one["reduced"] == two["reduced"] == 4 * count


def test_three_adapters_need_one_base():
    """bf16, one process: distill keeps the base once, at two bytes a weight, and three adapters at four."""
    case = replace(TINY, stage="distill", gpus=1, lora_rank=2, bf16=True)
    kept, full = bench.plan(case), bench.plan(replace(case, lora_rank=0))
    adapter = kept["EMA"]
    assert kept["parameters"] == 2 * parameters(second_time=True) + 3 * adapter and kept["gradients"] == 2 * adapter
    assert full["parameters"] == 4 * (parameters(second_time=True) + 2 * parameters(second_time=False))


@pytest.mark.parametrize("chunks", [(), (2, 1, 1)])
def test_checkpointing_saves_activations(chunks):
    case = replace(TINY, stage="flowmap", config=replace(TINY.config, layers=4), shape=(4, 48, 16, 16), chunks=chunks, full_chunks=2)
    assert bench.plan(replace(case, checkpointing=True))["activations"] < 0.6 * bench.plan(case)["activations"]


def test_predicted_is_measured():
    """The short form of `python bench.py check`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "BENCH_CASE": "0"}
    out = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "bench.py", "check"],
                         cwd=Path(bench.__file__).parent, env=environment, capture_output=True, text=True, check=True).stdout
    assert int(out.split("measured")[1].split()[0]) == pytest.approx(bench.plan(bench.checked_cases()[0])["peak"], rel=0.15)


@pytest.mark.parametrize("preset", ["wan-1.3b", "wan-5b", "wan-14b"])
def test_recipes_take_as_many_clips_at_once_as_the_plan(preset):
    for stage in STAGES:
        c = parse_config(["--preset", preset, "--stage", stage, *(["--base", "weights"] if stage == "pretrain" else [])])
        assert (c.micro_batch, c.lora_rank, c.checkpointing, c.bf16) == (1, bench.Case.lora_rank, True, True)


def test_command_line(capsys):
    bench.main(["plan", "--preset", "tiny", "--gpus", "2", "--stage", "flowmap", "--causal", "--micro-steps", "1"])
    assert "| flowmap | causal | all weights | yes |" in capsys.readouterr().out
    for flags, message in ((["--preset", "wan-14b", "--frames", "80"], "4 n + 1"), (["--gpus", "0"], "at least 1"),
                           (["--preset", "wan-14b", "--causal", "--frames", "41"], "add up to 21 latent frames, but")):
        with pytest.raises(SystemExit):
            bench.main(["plan", *flags])
        assert message in capsys.readouterr().err
