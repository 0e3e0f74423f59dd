"""The plan of memory: closed forms where there are any, the calls and the measured memory of a real
update."""
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench
import cli
import distributed
import flops
import meanflow
import plan
import speed
import train
import updates
from config import STAGES, Config, parse_config
from model import PRESETS, FlowMapDiT
from test_updates import WORLD, Source

PRETRAIN = Config(stage="pretrain", preset="tiny", full_chunks=2, budgets="4")
SMALLEST = replace(PRESETS["tiny"], layers=1)         # a plan takes a second a block
TINY = plan.Case(PRETRAIN, SMALLEST, (3, 48, 4, 4), gpus=2, tokens=8)
ALONE = replace(TINY, gpus=1)


class Clips(Source):
    latent_shape = TINY.shape


def case_of(case=TINY, **settings) -> plan.Case:
    """The case with other settings of training."""
    return replace(case, c=replace(case.c, lora_alpha=0.0, **settings))


@pytest.fixture(autouse=True)
def no_group():
    """The plan makes a process group of its own: the one that training left is put aside."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def parameters(processes=1, **fields):
    """How many weights the first of so many processes keeps: of each tensor the first rows, rounded
    up."""
    with torch.device("meta"):
        net = FlowMapDiT(replace(TINY.config, **fields))
    return sum(-(-len(p) // processes) * p[0].numel() for p in net.parameters())


@pytest.mark.parametrize("checkpointing", [0, 2])
def test_each_part_of_a_deep_network_is_extrapolated_for_itself(checkpointing, monkeypatch):
    """The highest peak of few layers need not be that of many."""
    def simulated(case):
        n = case.config.layers
        kept = {"parameters": 4 * n, "gradients": n, "optimiser": 2 * n, "EMA": n}
        return kept | {"gathered": 3 * n, "reduced": n, "peaks": [1000 + 10 * n, 100 * n]}
    monkeypatch.setattr(plan, "simulate", simulated)
    case = replace(case_of(checkpointing=checkpointing), config=replace(SMALLEST, layers=40))
    assert plan.memory_by_layers(case) == plan.memory(case)
    monkeypatch.setattr(flops, "CLIPS", 1)
    monkeypatch.setattr(flops, "batch_of", lambda some: None)
    monkeypatch.setattr(flops, "done", lambda some, batch: Counter(scores=some.config.layers))
    monkeypatch.setattr(flops, "expected", lambda some: [Counter(contexts=2)])
    first, second = flops.arithmetic(case)
    assert first["scores"] == 40 and second["contexts"] == 2


def test_seconds_are_medians_in_turn_without_the_first_round(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def call(name, *seconds):
        left = iter(seconds)

        def run():
            order.append(name)
            now[0] += next(left)
        return run
    calls = {"a": call("a", 100.0, 1.0, 2.0, 9.0), "b": call("b", 100.0, 3.0, 3.0, 4.0)}
    assert speed.medians(calls, 3, torch.device("cpu")) == {"a": 2.0, "b": 3.0}
    assert order == ["a", "b"] * 4


def test_what_is_computed_again_is_no_arithmetic_of_an_update():
    case = replace(case_of(ALONE, stage="pretrain"), config=replace(SMALLEST, layers=2))
    assert flops.of_an_update(case_of(case, checkpointing=1)) == flops.of_an_update(case) > 0


def test_what_is_kept_is_counted_exactly():
    """fp32, two processes: each keeps half of the weights, gradients, both moments and the EMA, and
    AdamW's step counts."""
    one, teacher = plan.memory(TINY), FlowMapDiT(replace(TINY.config, second_time=False))
    count, tensors = parameters(2, second_time=False), len(list(teacher.parameters()))
    assert one["parameters"] == one["gradients"] == one["EMA"] == 4 * count
    assert one["optimiser"] == 2 * 4 * count + 4 * tensors
    parts = ("parameters", "gradients", "optimiser", "EMA", "activations")
    assert one["peak"] == sum(one[name] for name in parts)


def test_a_plan_does_not_depend_on_those_before():
    """The first of its size is not charged with what DTensor reckons of whole tensors."""
    case = replace(TINY, config=replace(SMALLEST, ffn_dim=1016))           # in no other test
    assert plan.memory(case) == plan.memory(case)


def test_traffic_is_that_of_fsdp():
    """Pretrain: every weight gathered in forward and again in backward, every gradient reduced;
    half of each comes from the other process. A second micro-batch gathers again and reduces
    nothing."""
    one, two = plan.memory(TINY), plan.memory(replace(TINY, micro_steps=2))
    count = parameters(2, second_time=False)
    assert one["gathered"] == 2 * 4 * count and two["gathered"] == 2 * one["gathered"]
    assert one["reduced"] == two["reduced"] == 4 * count


def test_three_adapters_need_one_base():
    """bf16, one process: distill keeps the base once, at two bytes a weight, and three adapters at
    four, of which teacher and fake score leave the second time embedder as it is."""
    case, world = case_of(ALONE, stage="distill", lora_rank=2, bf16=True), distributed.start("cpu")
    kept, full = (plan.kept(*plan.build(some, world))
                  for some in (case, case_of(case, lora_rank=0)))
    student, c = kept["EMA"], TINY.config
    score = student - 4 * (2 * (c.freq_dim + c.dim) + 2 * 2 * c.dim)
    assert kept["parameters"] == 2 * parameters(second_time=True) + student + 2 * score
    assert kept["gradients"] == student + score
    assert full["parameters"] == 4 * (parameters() + 2 * parameters(second_time=False))


@pytest.mark.parametrize("settings", [
    {"stage": "pretrain"},
    {"stage": "flowmap", "causal": True, "chunks": "1,1,1", "guidance": 1.0}])
def test_checkpointing_saves_activations(settings):
    case = replace(case_of(ALONE, **settings), config=replace(SMALLEST, layers=2),
                   shape=(3, 48, 16, 16))
    saving = plan.memory(case_of(case, checkpointing=True))
    assert saving["activations"] < 0.6 * plan.memory(case)["activations"]


@pytest.mark.slow
@pytest.mark.parametrize("stage, causal, gpus", [("pretrain", False, 2), ("flowmap", True, 1)])
def test_deep_networks_from_two_and_three_layers(stage, causal, gpus):
    """Every figure of each part is linear in the layers: within a promille."""
    case = case_of(replace(TINY, gpus=gpus), stage=stage, causal=causal, lora_rank=2,
                   bf16=gpus > 1, checkpointing=True, guidance=1.0)
    case = replace(case, config=replace(SMALLEST, layers=5), shape=(3, 48, 32, 32))
    whole, few = plan.memory(case), plan.memory_by_layers(case)
    for name in whole:
        assert few[name] == pytest.approx(whole[name], rel=1e-3), name


@pytest.mark.slow
def test_predicted_is_measured():
    """The short form of `python bench.py check`."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "BENCH_CASE": "0"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.run([*torchrun, "bench.py", "check"], cwd=Path(bench.__file__).parent,
                         env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    predicted = plan.memory(plan.checked_cases()[0])["peak"]
    assert int(run.stdout.split("measured")[1].split()[0]) == pytest.approx(predicted, rel=0.15)


# --- arithmetic

def test_arithmetic_of_a_forward_pass_is_its_closed_form():
    case = case_of(ALONE, stage="pretrain")
    c, (F, C, H, W), T = replace(case.config, layers=7), case.shape, case.tokens
    D, L = c.dim, F * H * W                                      # patches of one
    block = 2 * L * (6 * D**2 + 2 * D * c.ffn_dim) + 4 * T * D**2 + 4 * L * (L + T) * D
    rest = 4 * L * C * D + 2 * T * (c.text_dim + D) * D + 2 * (c.freq_dim + D + 6 * D) * D
    done, needed, _ = flops.arithmetic(replace(case, config=c))
    assert done["student forward"] == needed["student forward"] == 7 * block + rest
    # Of the first products (patches, text, times) nobody asks the gradient of what they get.
    first = 2 * L * C * D + 2 * T * c.text_dim * D + 2 * c.freq_dim * D
    assert done["student backward"] == 2 * done["student forward"] - first


@pytest.mark.parametrize("stage, causal, rank", [
    ("flowmap", False, 2), ("flowmap", True, 0), ("distill", False, 0),
    pytest.param("distill", True, 2, marks=pytest.mark.slow)])
def test_nothing_is_done_that_is_not_needed(stage, causal, rank, monkeypatch):
    """Outside of recomputation; and the derivative of every row, say, would be noticed."""
    case = case_of(ALONE, stage=stage, causal=causal, lora_rank=rank, checkpointing=1)
    done, (needed, released) = flops.done(case, flops.batch_of(case)), flops.expected(case)
    assert done.pop("recomputation") > 0
    assert dict(done) == pytest.approx({part: needed[part] for part in done}, rel=1e-6)
    assert sum(released.values()) > 1.15 * sum(done.values())
    error = meanflow.meanflow_error
    monkeypatch.setattr(meanflow, "meanflow_error", lambda *args, **kwargs: error(
        *args, **kwargs | {"flow_rows": 0}))
    found = flops.done(case, flops.batch_of(case))["derivative"]
    assert found == 2 * done["derivative"]


def test_checkpointing_of_every_second_block_computes_half_of_them_again():
    case = replace(case_of(ALONE, stage="pretrain"), config=replace(SMALLEST, layers=2))
    cases = [case_of(case, checkpointing=n) for n in (0, 1, 2)]
    found = [flops.done(some, flops.batch_of(some)) for some in cases]
    none, every, half = (count["recomputation"] for count in found)
    assert none == 0 and half == every / 2 > 0
    assert found[0]["student backward"] == found[1]["student backward"]


# --- seconds

@pytest.mark.slow
def test_what_a_gpu_is_asked_runs_here():
    cases = [case_of(ALONE, stage=stage, causal=causal)
             for stage, causal in (("pretrain", False), ("flowmap", True))]
    rows = speed.gpu(cases, [("tiny", SMALLEST, ALONE.shape)], WORLD, (False,))
    product, forward, both, pretrain, flowmap, stream = rows
    assert product["tflop a second"] > 0
    for row in (forward, both, pretrain, flowmap):
        assert row["seconds"] > 0 and 0 < row["utilisation"] < 1
    assert 2 * forward["tflop"] < both["tflop"] < 3 * forward["tflop"] + 1e-12
    assert pretrain["tflop"] > 0 and stream["frames a second"] > 0


def test_costs_are_those_of_the_papers_loss_by_rollout_and_steps(monkeypatch):
    """In calls of a network in place of seconds, which a busy machine spreads."""
    run, count = FlowMapDiT.run_blocks, []

    def counted_run(*args, **kwargs):
        count.append(1)
        return run(*args, **kwargs)

    def calls_of(calls, repeats, device):
        found = {}
        for name, call in calls.items():
            count.clear()
            call()
            found[name] = len(count)
        return found
    monkeypatch.setattr(FlowMapDiT, "run_blocks", counted_run)
    monkeypatch.setattr(speed, "medians", calls_of)
    # At 2 steps a rollout has two calls, like DMD's teacher; the fake score has two as well, the
    # forward loss four: u_c, u_0, and the derivative's.
    distill = {("flow-map", n): 11 / 10 for n in (4, 8, 16, 50)} | {
        ("consistency", n): (8 + n) / 10 for n in (2, 4, 8, 16, 50)}
    found = dict(speed.costs(SMALLEST, (2, 48, 4, 4), "toy", 1, WORLD))    # of no guidance itself
    assert len(found) == 22
    whole = {what: ratio for what, ratio in found.items() if "bidirectional" in what}
    assert list(whole.values()) == [4, 4, *distill.values()]
    assert all(f"{rollout} rollout of {n} steps" in what
               for (rollout, n), what in zip(distill, list(whole)[2:], strict=True))
    part = list(found.values())[11:]
    assert part[:2] == [3, 3] and len(set(part[2:6])) == 1 < part[2] < part[-1]


def test_peers_are_ratios():
    pytest.importorskip("diffusers", minversion="0.42")
    what, ratio = next(speed.peers(SMALLEST, (4, 4), (2,), 1))
    assert what.startswith("forward") and 0.3 < ratio < 10
    for causal, kind in enumerate(("AnyFlowTransformer3DModel", "AnyFlowFARTransformer3DModel")):
        config = replace(SMALLEST, compressed=bool(causal), output_skip=0.0, time_scale=1000.0)
        other = speed.theirs(FlowMapDiT(config), (1,) * (1 + causal))    # all weights have a place
        assert type(other).__name__ == kind and other.config.num_layers == 1


# --- what is planned is what is trained

@pytest.fixture
def calls(monkeypatch):
    """Every call of a network: what it is asked, with which adapter, whether with gradient, the
    shape of z, and how many chunks it knows."""
    found = []
    forward, encode = FlowMapDiT.forward, FlowMapDiT.encode

    def note(call, z, context):
        found.append((call, context.adapter, torch.is_grad_enabled(), tuple(z.shape),
                      len(context.cache)))

    def noted_forward(net, z, t, r, context):
        note("forward", z, context)
        return forward(net, z, t, r, context)

    def noted_encode(net, z, context, compressed=False):
        note("compressed" if compressed else "encode", z, context)
        return encode(net, z, context, compressed)
    monkeypatch.setattr(FlowMapDiT, "forward", noted_forward)
    monkeypatch.setattr(FlowMapDiT, "encode", noted_encode)
    return found


def drawn(case: plan.Case) -> updates.Batch:
    """A batch of training of the largest kind: all chunks, a row with r < t, three jumps."""
    for step in range(1000):
        batch = updates.draw_batch(case.c, Clips(), WORLD, step, 0)
        rollouts = [found for found in (batch.rollout, batch.fake_rollout) if found]
        three_jumps = all(0 < rollout.k < 3 for rollout in rollouts)
        gap = batch.some_gap or case.c.stage == "pretrain"
        if sum(batch.chunks) == 3 and gap and three_jumps:
            return batch


def trained(case: plan.Case, batch: updates.Batch) -> None:
    """A real update on one process."""
    nets, parts = plan.build(case, WORLD)
    log = distributed.Sums(train.LOGGED[case.c.stage])
    train.update(case.c, nets, parts, iter([batch]), 0, WORLD, log)


@pytest.mark.parametrize("stage, causal, rank", [
    ("pretrain", False, 0), ("flowmap", False, 0), ("flowmap", True, 2), ("distill", False, 0),
    pytest.param("distill", True, 2, marks=pytest.mark.slow)])
def test_the_planned_update_makes_the_calls_of_the_trained_one(calls, stage, causal, rank):
    settings = {"stage": stage, "causal": causal, "lora_rank": rank, "checkpointing": causal,
                "bidirectional_fraction": float(causal)}
    case, found = case_of(ALONE, **settings), []
    for make in (lambda: trained(case, plan.constant_batch(case)),
                 lambda: trained(case, drawn(case)), lambda: plan.memory(case)):
        calls.clear()
        make()
        found.append(list(calls))
    on_constant, on_drawn, planned = found
    assert planned and planned == on_constant == on_drawn


@pytest.mark.parametrize("rollout, fake_rollout", [("consistency", "shared"),
                                                   ("flow-map", "fresh")])
def test_also_with_other_rollouts(calls, rollout, fake_rollout):
    case = case_of(ALONE, stage="distill", rollout=rollout, fake_rollout=fake_rollout)
    trained(case, drawn(case))
    on_drawn = list(calls)
    calls.clear()
    plan.memory(case)
    assert calls and calls == on_drawn


def test_a_plan_of_other_calls_is_noticed(calls, monkeypatch):
    """As when the batch that is planned had no row with r < t."""
    case, true = case_of(ALONE, stage="flowmap"), plan.constant_batch
    trained(case, true(case))
    on_constant = list(calls)
    monkeypatch.setattr(plan, "constant_batch", lambda case: replace(
        true(case), r=true(case).t, roles=(1, 0, 0), some_gap=False))
    calls.clear()
    plan.memory(case)
    assert calls != on_constant


@pytest.mark.parametrize("preset", ["wan-1.3b", "wan-5b", "wan-14b"])
def test_recipes_take_as_many_clips_at_once_as_the_plan(preset):
    for stage in STAGES:
        base = ["--base", "weights"] if stage == "pretrain" else []
        c = parse_config(["--preset", preset, "--stage", stage, *base])
        args = bench.parse_args(["plan", "--preset", preset])
        planned = bench.case_of(args, stage, c.checkpointing, False).c
        assert c.micro_batch == planned.micro_batch == 1
        for name in ("lora_rank", "lora_alpha", "checkpointing", "bf16"):
            assert getattr(c, name) == getattr(planned, name), name


def test_command_line(capsys):
    bench.main("plan --preset tiny --gpus 1 --stage pretrain --micro-steps 1 "
               "--checkpointing".split())
    assert "| pretrain | bidirectional | all weights | yes |" in capsys.readouterr().out
    bench.main("flops --preset toy --stage flowmap".split())     # no guidance: flops gives it one
    assert "flowmap: done / needed 1.000, released / done 1." in capsys.readouterr().out
    wan = "--preset wan-14b --frames"
    for flags, message in ((f"{wan} 80", "4 n + 1"), ("--gpus 0", "at least 1"),
                           (f"{wan} 41 --causal", "are for 81 frames"),
                           ("--preset wan-5b --causal", "multiples of 64"),
                           ("--causal --stage pretrain", "the teacher sees whole clips")):
        with pytest.raises(SystemExit):
            cli.run(partial(bench.main, ["plan", *flags.split()]))
        assert message in capsys.readouterr().err


def test_what_a_gpu_took_stands_beside_what_was_planned(monkeypatch, capsys):
    """Of each update as it is, then compiled; a stand-in measures and plans."""
    def gpu(cases, others, world, kinds):
        return [{"what": f"{case.c.stage} {kind}", "seconds": 1.0, "tflop": 1.0,
                 "utilisation": 0.5, "peak": 1e9} for kind in (0, 1) for case in cases]
    monkeypatch.setattr(speed, "gpu", gpu)
    monkeypatch.setattr(plan, "memory_by_layers",
                        lambda case: {"peak": 1e9 * (STAGES.index(case.c.stage) + 2)})
    bench.main(["gpu", "--preset", "tiny", "--device", "cpu"])
    out = capsys.readouterr().out
    for stage, planned, forms in (("pretrain", 2, 1), ("flowmap", 3, 2), ("distill", 4, 2)):
        for kind in (0, 1):
            row = f"| {stage} {kind} | 1.000 | 1.0 | 0.500 | 1.0 | {planned}.0 |"
            assert out.count(row) == forms


def test_traffic_is_what_comes_from_other_processes():
    gpus = 4
    found, count = plan.memory(replace(TINY, gpus=gpus)), parameters(gpus, second_time=False)
    assert found["gathered"] == 2 * 4 * count * (gpus - 1)
    assert found["reduced"] == 4 * count * (gpus - 1)
