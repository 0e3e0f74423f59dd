"""Arithmetic of an update: what train.update does, what the equations need, and what the released
procedure takes for the same batch (docs/method.md), at any size, on tensors without memory.

Counted are products of matrices and attention, which are nearly all; a backward pass through
attention counts as two forward ones, as in published figures. An update is of the largest kind (the
longest clip, a rollout of three jumps) and of clips in the shares of the recipe: half with r = t, a
tenth with their prompt dropped, 20 at a time by one process (with a clip a rank u_0 of dropped
prompts is not saved). Figures are means of a clip.
"""
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import distributed
import meanflow
import networks
import plan
import train
import updates
from cache import Context, teacher_forced
from config import chunks_of
from flowmap import conditioned
from model import Block, FlowMapDiT, ModelConfig, rotary_table

CLIPS = 20                              # of a batch: makes whole numbers of all shares
META = torch.device("meta")
PARTS = ("student forward", "student backward", "guidance", "derivative", "scores", "fake score",
         "contexts", "recomputation")


class Flops(TorchDispatchMode):
    """Counts by part of the update: `labelled` calls, and whether a gradient is kept."""

    def __init__(self):
        super().__init__()
        self.found, self.labels = Counter(), []

    def labelled(self, true, label: str):
        """A function whose calls have a label."""
        def call(*args, **kwargs):
            self.labels.append(label)
            try:
                return true(*args, **kwargs)
            finally:
                self.labels.pop()
        return call

    def part(self) -> str:
        labels = self.labels
        again = "backward" in labels and labels[-1] == "block"       # activation checkpointing
        if again or "again" in labels and "contexts" in labels:
            return "recomputation"
        if "fake score" in labels:
            return "fake score"
        if "backward" in labels:
            return "student backward"
        for label in ("contexts", "derivative", "scores"):
            if label in labels:
                return label
        if torch.is_grad_enabled():
            return "student forward"
        return "guidance" if "forward loss" in labels else "recomputation"   # rolled out once more

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        count = flop_registry.get(func.overloadpacket)
        if count:
            self.found[self.part()] += count(*args, **kwargs or {}, out_val=out)
        return out


def batch_of(case: plan.Case) -> updates.Batch:
    """CLIPS clips of plan.constant_batch, in the recipe's shares, on no device."""
    c, one = case.c, plan.constant_batch(case)
    flow = round(c.flow_fraction * CLIPS)
    roles = flow, CLIPS // 4, CLIPS - flow - CLIPS // 4
    guided = torch.arange(round((1 - c.text_drop) * CLIPS))
    rows = {name: repeated(value) for name, value in vars(one).items()}
    many = updates.Batch(**rows | {"roles": roles, "guided_rows": guided, "whole_t": None})
    for name in ("rollout", "fake_rollout"):
        if found := getattr(one, name):
            setattr(many, name, replace(found, z_1=repeated(found.z_1),
                                        renoise=[repeated(noise) for noise in found.renoise]))
    return many.to(META)


def repeated(value):
    return value.expand(CLIPS, *value.shape[1:]) if isinstance(value, torch.Tensor) else value


def without_memory(case: plan.Case, clips: int) -> tuple:
    """(networks, settings, world) of a stage on one process that has no device."""
    c = replace(case.c, batch_size=clips, micro_batch=clips, bf16=False, compile=False)
    world = distributed.World(0, 1, META)
    nets = networks.build(c, networks.student_config(c, case.config), world)
    return nets, c, world


def done(case: plan.Case, batch: updates.Batch) -> Counter:
    """Of train.update itself."""
    nets, c, world = without_memory(case, len(batch.x))
    parts, log = networks.trainables(c, nets), distributed.Sums(train.LOGGED[c.stage])
    flops = Flops()

    def no_step(*args):
        flops.labels.append("fake score")       # what comes after the student's step
        return 1.0
    rotary_table.cache_clear()
    with ExitStack() as stack:
        for owner, name, label in (
                (updates, "clean_past", "contexts"), (updates, "append_chunk", "contexts"),
                (updates, "score_gradient", "scores"), (meanflow, "meanflow_error", "forward loss"),
                (train, "backward", "backward"), (train, "backward_chunks", "again"),
                (Block, "compute", "block")):
            call = flops.labelled(getattr(owner, name), label)
            stack.enter_context(patch.object(owner, name, call))
        derivatives = meanflow.DERIVATIVES
        call = flops.labelled(derivatives[c.derivative], "derivative")
        stack.enter_context(patch.dict(derivatives, {c.derivative: call}))
        stack.enter_context(patch.object(train, "optimizer_step", no_step))
        stack.enter_context(flops)
        train.update(c, nets, parts, iter([batch]), 0, world, log)
    return flops.found


def cost(call) -> tuple[int, int, int]:
    """(forward, backward, contexts) of a call that gives a tensor, without recomputation."""
    flops = Flops()
    append = flops.labelled(updates.append_chunk, "contexts")
    with patch.object(updates, "append_chunk", append), flops:
        out = call()
        found, forward = flops.found["contexts"], sum(flops.found.values())
        if out.requires_grad:
            out.sum().backward()
    return forward - found, sum(flops.found.values()) - forward, found


def expected(case: plan.Case) -> tuple[Counter, Counter]:
    """(what the equations need, what the released procedure takes), from the costs of single calls.

    Released: the derivative and the empty prompt for every row; where causal, the clean clip beside
    the noisy one in each of the four calls, and the whole past encoded again for each chunk; a
    second rollout, of the updated student, for the fake score.
    """
    nets, c, _ = without_memory(replace(case, c=replace(case.c, checkpointing=0)), CLIPS)
    batch, student = batch_of(case), nets["student"]
    needed, released = Counter(), Counter()
    guided, gap = len(batch.guided_rows) / CLIPS, 1 - batch.roles[0] / CLIPS

    def past():
        return updates.clean_past(student, batch, batch.text, c)

    def u_c():
        return student(batch.n, batch.t, batch.r, past())
    if c.stage != "distill" or c.cotrain:
        causal = c.causal and len(batch.chunks) > 1
        with torch.no_grad():
            contexts = cost(lambda: past().cache[0].keys_values[0][0])[0] if causal else 0
        forward, backward, _ = cost(u_c)
        u = forward - contexts
        needed += Counter({"student forward": u, "student backward": backward})
        released += needed
        if c.stage != "pretrain":
            needed += Counter({"guidance": guided * u, "derivative": 2 * gap * u,
                               "contexts": (1 + guided) * contexts})
            released += Counter({"guidance": u, "derivative": 2 * u, "contexts": 4 * contexts})
    if c.stage == "distill":
        def rolled_out():
            return torch.cat(list(updates.roll_out(student, batch, batch.rollout, c, "all")), 1)

        def score(name):
            u = conditioned(nets[name], Context(batch.text))
            return cost(lambda: u(batch.x, batch.tau, batch.tau))
        forward, backward, contexts = cost(rolled_out)
        with torch.no_grad():
            teacher = score("teacher")[0]
        fake, fake_backward, _ = score("fake")
        both = Counter({"student forward": forward, "student backward": backward,
                        "scores": 2 * teacher + fake, "fake score": fake + fake_backward})
        needed += both + Counter({"contexts": contexts})
        again = 2 * encoded_again(student, batch, c)
        released += both + Counter({"fake score": forward, "contexts": again})
    return needed, released


@torch.no_grad()
def encoded_again(student, batch, c) -> int:
    """Contexts of each chunk of a clip, each made from nothing."""
    chunks, total = chunks_of(c, batch.x.shape[1]), 0
    for i in range(1, len(chunks)):
        x = batch.x[:, :sum(chunks[:i + 1])]
        context = lambda x=x, i=i: teacher_forced(student, x, batch.text, chunks[:i + 1],
                                                  c.full_chunks).cache[0].keys_values[0][0]
        total += cost(context)[0]
    return total


def arithmetic(case: plan.Case) -> list[dict]:
    """FLOP a clip by part: [done, needed, released]."""
    def measure(some):
        counts = done(some, batch_of(some)), *expected(some)
        return [{part: count[part] / CLIPS for part in PARTS} for count in counts]
    return plan.by_layers(case, measure)


def of_an_update(case: plan.Case) -> float:
    """FLOP of the update that is planned and timed, but for recomputation."""
    def measure(some):
        count = done(some, plan.constant_batch(some).to(META))
        return sum(count.values()) - count["recomputation"]
    return plan.by_layers(case, measure)


def of_a_call(config: ModelConfig, shape) -> tuple[int, int]:
    """FLOP of a (forward, backward) pass over one clip (F, C, H, W) and a prompt of Wan's length,
    all weights trained."""
    with META:
        network, z, t = FlowMapDiT(config), torch.empty(1, *shape), torch.empty(1)
        text = torch.empty(1, 512, config.text_dim)
    rotary_table.cache_clear()
    return cost(lambda: network(z, t, t, text))[:2]
