"""What keeps a GPU busy, shown without one: no micro-batch asks the device for a value, and blocks
compile as one graph."""
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import backward_sim
import bench
import config
import distributed
import flowmap
import meanflow
import model
import plan
import train
import updates
from config import Config
from golden import CAUSAL, inputs, network
from model import PRESETS
from test_updates import WORLD, Source

CONFIG = replace(PRESETS["tiny"], layers=1)
KINDS = [("pretrain", False, 0), ("flowmap", False, 0), ("flowmap", True, 2), ("distill", False, 2),
         ("distill", True, 0)]


class NoQuestions(TorchDispatchMode):
    """Raises where the host would wait for a GPU: at values that it asks for."""
    WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique2")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)
                 ] if name in ("index", "index_put", "index_put_") else []
        if name in self.WAIT or masks:
            raise AssertionError(f"the host waits for {func}")
        return func(*args, **(kwargs or {}))


def case_of(stage, causal, rank, **more) -> plan.Case:
    c = Config(stage=stage, preset="tiny", causal=causal, lora_rank=rank, full_chunks=2,
               budgets="4", bidirectional_fraction=float(causal), **more)
    return plan.Case(c, CONFIG, (4, 48, 4, 4), gpus=1)


def update(case: plan.Case, monkeypatch, mode=None) -> None:
    """A real update of four clips, `mode` watching all but the optimiser's step."""
    c = replace(case.c, micro_batch=4, batch_size=4, text_drop=0.5)
    nets, parts = plan.build(case, WORLD)
    monkeypatch.setattr(train, "optimizer_step", lambda *args: 1.0)
    batch = updates.draw_batch(c, Source(), WORLD, 0, 0)
    log = distributed.Sums(train.LOGGED[c.stage])
    # A number of the host, found once:
    flowmap.mean_time_weight(c.time_weight, c.shift, c.either_share)
    with mode or nullcontext():
        train.update(c, nets, parts, iter([batch]), 0, WORLD, log)


@pytest.mark.parametrize("stage, causal, rank, rollout", [
    *((*kind, "flow-map") for kind in KINDS), ("distill", False, 0, "consistency"),
    ("distill", True, 2, "consistency")])
def test_no_micro_batch_asks_the_device(stage, causal, rank, rollout, monkeypatch):
    update(case_of(stage, causal, rank, rollout=rollout, checkpointing=causal), monkeypatch,
           NoQuestions())


@pytest.mark.parametrize("question", [
    lambda gap, z: gap.any().item(), lambda gap, z: bool(gap.any()), lambda gap, z: gap.nonzero(),
    lambda gap, z: z[gap], lambda gap, z: z.__setitem__(gap, 0), lambda gap, z: z[:int(gap.sum())]])
def test_a_question_is_noticed(question, monkeypatch):
    error = meanflow.meanflow_error

    def asking(net, x, n, t, r, *args, **kwargs):
        question(r < t, x.clone())
        return error(net, x, n, t, r, *args, **kwargs)
    monkeypatch.setattr(meanflow, "meanflow_error", asking)
    with pytest.raises(AssertionError, match="the host waits"):
        update(case_of("flowmap", False, 0), monkeypatch, NoQuestions())


def test_calls_with_the_same_past_share_a_rotary_table(monkeypatch):
    made, grid = [], model.grid_rotations
    monkeypatch.setattr(model, "grid_rotations", lambda *args: made.append(args) or grid(*args))
    model.rotary_table.cache_clear()
    net, (z, t, r, text) = network(CAUSAL), inputs(CAUSAL, frames=4)
    context = updates.teacher_forced(net, z, text, (1, 1, 1, 1), 2)
    made.clear()
    first = net(z[:, 2:], t, r, context)
    calls = len(made)
    again = net(z[:, 2:], t, r, context)
    assert calls == len(made) == 2                       # compressed chunks, full ones
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    net(z[:, 2:], t, r, replace(context, start=3))
    assert len(made) > calls                             # elsewhere in the video


def test_compiled_rotations_are_those_of_complex_numbers():
    g = distributed.generator("rotate")
    x = torch.randn(2, 3, 24, 16, generator=g)
    rope = model.rotary_table(((5, 2, 1),), 3, 4, 16, x.device)
    compiled = torch.compile(model.rotate, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, rope), model.rotate(x, rope), rtol=1e-6, atol=1e-6)
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    angles = torch.view_as_complex(rope.double())
    expected = torch.view_as_real(turned * angles).flatten(-2).float()
    torch.testing.assert_close(model.rotate(x, rope), expected, rtol=1e-6, atol=1e-6)


def graphs(case: plan.Case, layers: int, monkeypatch) -> int:
    """How many graphs the blocks of a network become in an update."""
    torch._dynamo.reset()
    counters.clear()
    update(replace(case, config=replace(CONFIG, layers=layers)), monkeypatch)
    assert not counters["graph_break"]
    assert counters["frames"]["ok"] == counters["stats"]["unique_graphs"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("causal, rank", [
    (False, 0), pytest.param(True, 2, marks=pytest.mark.slow)])
def test_a_block_is_one_graph_and_blocks_share_it(causal, rank, monkeypatch):
    """Traced as for a GPU, computed without compiling. There is a graph for each kind of call, not
    for each block; what the first one gets may come without a gradient, hence two against three."""
    compile_block = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compile_block(
        self, backend="eager", **options))
    case = case_of("flowmap", causal, rank, compile=True, checkpointing=causal)
    two = graphs(case, 2, monkeypatch)
    assert 0 < two == graphs(case, 3, monkeypatch)


def test_choices_are_named_where_no_torch_is():
    for names, known in ((config.PRESETS, model.PRESETS),
                         (config.TIME_WEIGHTS, flowmap.TIME_WEIGHTS),
                         (config.DERIVATIVES, meanflow.DERIVATIVES),
                         (config.SIMULATIONS, backward_sim.SIMULATIONS),
                         (config.SAMPLERS, flowmap.SAMPLERS),
                         (bench.MEASURES, bench.WHAT)):
        assert names == tuple(known)


def test_what_is_sent_has_no_place_twice():
    """An expanded tensor cannot be pinned as it is: its rows are one place in memory."""
    batch = updates.draw_batch(replace(Config(), stage="flowmap", preset="tiny", batch_size=4),
                               Source(), WORLD, 0, 0)
    assert batch.null_text.stride(0) == 0
    assert distributed.to_device(batch.null_text, torch.device("cpu")).equal(batch.null_text)
    made = []
    class OnGPU:
        type = "cuda"
    class Host:
        def contiguous(self):
            made.append("contiguous")
            return self
        def pin_memory(self):
            made.append("pinned")
            return self
        def to(self, device, non_blocking):
            return self
    distributed.to_device(Host(), OnGPU())
    assert made == ["contiguous", "pinned"]
