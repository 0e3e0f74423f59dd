"""How the stages are wired: every call of an update is recorded and compared with the method, then
the mutations that a wrong wiring would be. And the gradient of a causal rollout, chunk by chunk."""
import weakref
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch

import backward_sim
import distributed
import dmd
import flowmap
import networks
import train
import updates
from cache import append_chunk
from config import STAGES, Config
from eval import HELD_OUT
from model import PRESETS, FlowMapDiT

WORLD = distributed.World(0, 1, torch.device("cpu"))
KEPT_TEXT = updates.kept_text    # which a mutation below replaces


@dataclass
class Call:
    """One call of a network, with what it was given and what it said."""
    name: str
    method: str                  # forward or encode
    text: str                    # prompt, empty or kept (prompts with dropped ones replaced)
    z: torch.Tensor
    t: torch.Tensor | None
    r: torch.Tensor | None
    gradient: bool
    context: object
    u: torch.Tensor | None = None


class Recorded:
    """A network that notes its calls."""

    def __init__(self, name, network, calls, batch):
        self.name, self.network, self.calls, self.batch = name, network, calls, batch

    def note(self, method, z, t, r, context):
        batch, some = self.batch, context.text
        texts = {"kept": KEPT_TEXT(batch), "prompt": batch.text, "empty": batch.null_text}
        subsets = slice(None), batch.r < batch.t, batch.guided_rows
        text = next((name for name, value in texts.items() for rows in subsets
                     if torch.equal(value[rows], some)), "?")
        call = Call(self.name, method, text, z.detach(), t, r, torch.is_grad_enabled(), context)
        self.calls.append(call)
        return call

    def __call__(self, z, t, r, context):
        call = self.note("forward", z, t, r, context)
        u = self.network(z, t, r, context)
        call.u = u.detach()
        return u

    def encode(self, z, context, compressed=False):
        self.note("compressed" if compressed else "encode", z, None, None, context)
        return self.network.encode(z, context, compressed)


class Source:
    """Random latents and prompts, as a folder of shards would give them."""
    latent_shape, conditioning = (4, 48, 4, 4), ()
    null_text = torch.full((3, 64), 0.5)

    def draw(self, indices, seed):
        g = distributed.generator("source", seed, *indices)
        x = torch.randn(len(indices), *self.latent_shape, generator=g)
        return x, torch.randn(len(indices), 3, 64, generator=g), {}


def settings(stage, **more):
    return Config(stage=stage, preset="tiny", batch_size=8, guidance=3.0, real_guidance=4.0,
                  text_drop=0.3, budgets="4", full_chunks=2, **more)


def random_networks(c):
    """The stage's networks, all of random weights, none like another."""
    config = networks.student_config(c, PRESETS["tiny"])
    nets = networks.build(c, config, WORLD)
    for name, network in nets.items():
        network.to_empty(device="cpu")
        for key, p in network.named_parameters():
            p.data.copy_(0.2 * torch.randn(p.shape, generator=distributed.generator(name, key)))
    return nets


def one_update(c, step=1):
    """(calls, batch, log) of an update of random networks."""
    batch, nets, calls = updates.draw_batch(c, Source(), WORLD, step, 0), random_networks(c), []
    parts = networks.trainables(c, nets)
    recorded = {name: Recorded(name, net, calls, batch) for name, net in nets.items()}
    log = distributed.Sums(train.LOGGED[c.stage])
    train.update(c, recorded, parts, iter([batch]), step, WORLD, log)
    return calls, batch, log.means(WORLD)


def kinds(calls):
    return [(call.name, call.text, call.gradient) for call in calls]


def check_forward_loss(calls, batch, c, err, tangent=1.0):
    """u_c, u_0, and two calls of the derivative: guidance fused in, target v - (t - r) dF/dt."""
    assert kinds(calls) == [("student", "kept", True), ("student", "empty", False),
                            ("student", "kept", False), ("student", "kept", False)]
    u_c, u_0, above, below = calls
    x = batch.x[:, batch.start:sum(batch.chunks)]
    z_t, v = flowmap.interpolate(x, batch.n, batch.t), batch.n - x
    kept = ~batch.dropped                           # a dropped prompt is empty: u_0 is not asked
    for call, rows in ((u_c, slice(None)), (u_0, kept)):
        assert torch.equal(call.z, z_t[rows])
        assert torch.equal(call.t, batch.t[rows]) and torch.equal(call.r, batch.r[rows])
    gap = batch.r < batch.t
    w = torch.where(batch.dropped, 1.0, c.guidance).view(-1, 1, 1, 1, 1)
    F = u_c.u / w
    F[kept] -= (1 - w[kept]) * u_0.u / w[kept]
    dF_dt = (above.u - below.u) / flowmap.expand(above.t - below.t, above.u) / w[gap]
    target = v.clone()
    target[gap] -= tangent * flowmap.expand((batch.t - batch.r)[gap], v) * dF_dt
    assert torch.equal(above.r, batch.r[gap]) and (above.t > batch.t[gap] - 1e-6).all()
    expected = (F - target).square().mean((1, 2, 3, 4))
    assert err["err_flow"] == pytest.approx(expected[~gap].mean().item(), rel=1e-3)
    free = gap & (batch.r > 0)
    assert err["err_free"] == pytest.approx(expected[free].mean().item(), rel=1e-3)


def test_pretrain_is_flow_matching_with_prompts_dropped():
    c = settings("pretrain")
    (call,), batch, log = one_update(c)
    assert batch.dropped.any() and not batch.dropped.all()
    assert (call.name, call.text, call.gradient) == ("student", "kept", True)
    assert torch.equal(call.t, batch.t) and torch.equal(call.r, batch.t)
    assert torch.equal(call.z, flowmap.interpolate(batch.x, batch.n, batch.t))
    expected = (call.u - (batch.n - batch.x)).square().mean()
    assert log["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_flowmap_fuses_guidance_and_takes_the_derivative():
    c = settings("flowmap")
    calls, batch, log = one_update(c)
    check_forward_loss(calls, batch, c, log)


@pytest.mark.parametrize("flow_times, either", [("larger", 0.0), ("either", 1.0)])
def test_flow_matching_has_the_draw_that_is_asked_and_its_weight(flow_times, either):
    c = replace(settings("flowmap"), guidance=1.0, flow_fraction=1.0, consistency_fraction=0.0,
                flow_times=flow_times)
    (call,), batch, log = one_update(c)
    draws = distributed.generator(c.seed, 10**7 + 1, "time")
    t, r = flowmap.flow_map_times(draws, 8, c.shift, 1.0, 0.0, flow_times)
    assert torch.equal(batch.t, t) and torch.equal(batch.r, r)
    weight = flowmap.time_weight(t, c.time_weight, c.shift, either)
    err = (call.u - (batch.n - batch.x)).square().mean((1, 2, 3, 4))
    assert log["loss"] == pytest.approx((err * weight).mean().item(), rel=1e-5)


@pytest.mark.parametrize("step, tangent", [(0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0), (9, 1.0)])
def test_the_targets_derivative_warms_up(step, tangent):
    c = settings("flowmap", tangent_warmup=4)
    calls, batch, log = one_update(c, step)
    check_forward_loss(calls, batch, c, log, tangent)


def test_distills_cotraining_has_no_warmup():
    c = settings("distill", tangent_warmup=4)
    assert updates.draw_batch(c, Source(), WORLD, 1, 0).tangent_scale == 1


def test_flowmap_learns_the_guided_velocity_of_the_frozen_teacher():
    c = settings("flowmap", velocity="teacher")
    calls, batch, log = one_update(c)
    assert kinds(calls) == [("teacher", "kept", False), ("teacher", "empty", False),
                            ("student", "kept", True), ("student", "kept", False),
                            ("student", "kept", False)]
    v, v_0, u, above, below = calls
    z_t, kept = flowmap.interpolate(batch.x, batch.n, batch.t), ~batch.dropped
    for call, rows in ((v, slice(None)), (v_0, kept)):
        assert torch.equal(call.z, z_t[rows])
        assert torch.equal(call.t, batch.t[rows]) and torch.equal(call.r, batch.t[rows])
    assert torch.equal(u.z, z_t) and torch.equal(u.r, batch.r)
    target, gap = v.u.clone(), batch.r < batch.t
    target[kept] = v_0.u + c.guidance * (v.u[kept] - v_0.u)
    span = above.t - below.t
    torch.testing.assert_close(above.z - below.z, flowmap.expand(span, target) * target[gap],
                               rtol=1e-3, atol=1e-5)
    dF_dt = (above.u - below.u) / flowmap.expand(span, above.u)
    target[gap] -= flowmap.expand((batch.t - batch.r)[gap], target) * dF_dt
    expected = (u.u - target).square().mean((1, 2, 3, 4))
    assert log["err_flow"] == pytest.approx(expected[~gap].mean().item(), rel=1e-3)
    free = gap & (batch.r > 0)
    assert log["err_free"] == pytest.approx(expected[free].mean().item(), rel=1e-3)


def test_causal_flowmap_has_a_clean_past_for_each_prompt_and_sometimes_the_whole_clip():
    c = settings("flowmap", causal=True, bidirectional_fraction=1.0)
    calls, batch, log = one_update(c)
    whole, rest = calls[-2:], calls[:-2]
    assert kinds(whole) == [("student", "kept", True), ("student", "empty", False)]
    for call, rows in zip(whole, (slice(None), ~batch.dropped)):
        assert not call.context.cache and torch.equal(call.t, call.r)
        assert torch.equal(call.t, batch.whole_t[rows])
        z_t = flowmap.interpolate(batch.x, batch.whole_noise, batch.whole_t)
        assert torch.equal(call.z, z_t[rows])
    u_c, u_0 = (call.u for call in whole)
    w, kept = torch.where(batch.dropped, 1.0, c.guidance).view(-1, 1, 1, 1, 1), ~batch.dropped
    F = u_c / w
    F[kept] -= (1 - w[kept]) * u_0 / w[kept]
    expected = (F - (batch.whole_noise - batch.x)).square().mean().item()
    assert log["err_whole"] == pytest.approx(expected, rel=1e-3)
    encoded = [call for call in rest if call.method != "forward"]
    half = len(encoded) // 2
    assert all(call.text == "empty" and not call.gradient for call in encoded[:half])
    assert all(call.text == "kept" and call.gradient for call in encoded[half:]) and half
    check_forward_loss([call for call in rest if call.method == "forward"], batch, c, log)


def distill_expectations(calls, batch, c, log):
    """Of an update's forward calls after the rollout: scores of the whole clip, then the rest."""
    rollout = [call for call in calls if call.name == "student" and call.text == "prompt"]
    jumps = [call for call in rollout if call.method == "forward"]
    scores = [call for call in calls if call.name != "student"]
    assert kinds(scores) == [("teacher", "empty", False), ("teacher", "prompt", False),
                             ("fake", "prompt", False), ("fake", "prompt", True)]
    empty, prompt, fake, fake_loss = scores
    z_tau = empty.z
    for call in (empty, prompt, fake):
        assert torch.equal(call.z, z_tau) and not call.context.cache
        assert torch.equal(call.t, batch.tau) and torch.equal(call.r, batch.tau)
    # z_tau = (1 - tau) z_0 + tau n says what z_0 was scored.
    tau = flowmap.expand(batch.tau, z_tau)
    z_0 = (z_tau - tau * batch.tau_noise) / (1 - tau)
    real = empty.u + c.real_guidance * (prompt.u - empty.u)
    x_real, x_fake = z_tau - tau * real, z_tau - tau * fake.u
    normaliser = (z_0 - x_real).abs().mean((1, 2, 3, 4), keepdim=True)
    gradient = (x_fake - x_real) / normaliser
    assert log["dmd"] == pytest.approx(gradient.square().mean().item(), rel=1e-2)
    expected = gradient.flatten(1).norm(dim=1).mean().item()
    assert log["dmd_gradient"] == pytest.approx(expected, rel=1e-2)
    assert torch.equal(fake_loss.t, batch.fake_t) and torch.equal(fake_loss.r, batch.fake_t)
    t = flowmap.expand(batch.fake_t, z_0)
    torch.testing.assert_close(fake_loss.z, (1 - t) * z_0 + t * batch.fake_noise,
                               rtol=1e-3, atol=1e-3)
    err = (fake_loss.u - (batch.fake_noise - z_0)).square().mean().item()
    assert log["fake"] == pytest.approx(err, rel=1e-2)
    return jumps, z_0


def levels_of(rollout):
    grid, k = rollout.grid, rollout.k
    return sorted({1.0, grid[k], grid[k + 1], 0.0}, reverse=True)


def check_jumps(jumps, z_1, rollout):
    """Jumps of one chunk from its noise; returns its z_0."""
    z, levels = z_1, levels_of(rollout)
    assert len(jumps) == len(levels) - 1
    for call, t, r in zip(jumps, levels, levels[1:]):
        torch.testing.assert_close(call.z, z, rtol=1e-4, atol=1e-5)
        assert call.t.tolist() == pytest.approx([t] * 8)
        assert call.r.tolist() == pytest.approx([r] * 8)
        z = call.z - (t - r) * call.u
    return z


def test_distill_rolls_out_scores_cotrains_and_trains_the_fake_score():
    c = settings("distill")
    calls, batch, log = one_update(c)
    jumps, z_0 = distill_expectations(calls, batch, c, log)
    assert all(call.gradient for call in jumps)
    made = check_jumps(jumps, batch.rollout.z_1, batch.rollout)
    torch.testing.assert_close(made, z_0, rtol=1e-3, atol=1e-3)
    forward = [call for call in calls if call.name == "student" and call.text != "prompt"]
    check_forward_loss(forward, batch, c, log)
    scores = ["teacher", "teacher", "fake"]
    expected = ["student"] * 4 + ["student"] * len(jumps) + scores + ["fake"]
    assert [call.name for call in calls] == expected


def test_causal_distill_rolls_out_whole_clips_on_the_students_own_cache():
    """All chunks from noise, nothing of the data; then all but the last are made again."""
    c = settings("distill", causal=True)
    calls, batch, log = one_update(c)
    jumps, z_0 = distill_expectations(calls, batch, c, log)
    each = len(levels_of(batch.rollout)) - 1
    first, again = jumps[:4 * each], jumps[4 * each:]
    assert len(again) == 3 * each
    assert [call.gradient for call in first] == [False] * 3 * each + [True] * each
    assert all(call.gradient for call in again)
    for i in range(4):
        rows = slice(i * each, (i + 1) * each)
        noise, chunk = batch.rollout.z_1[:, i:i + 1], z_0[:, i:i + 1]
        for calls_of_chunk in (first[rows], again[rows]):
            if calls_of_chunk:
                made = check_jumps(calls_of_chunk, noise, batch.rollout)
                torch.testing.assert_close(made, chunk, rtol=1e-3, atol=1e-3)
                strides = [cached.stride for cached in calls_of_chunk[0].context.cache]
                assert strides == [2] * max(0, i - 1) + [1] * min(1, i)       # 2 full chunks
    written = [call for call in calls if call.method != "forward" and call.text == "prompt"]
    assert written and not any(call.gradient for call in written)
    for call in written:                             # what is cached is the student's own
        start = call.context.start
        own = z_0[:, start:start + call.z.shape[1]]
        torch.testing.assert_close(call.z, own, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("stage", ["flowmap", "distill"])
def test_the_first_pass_of_an_update_reaches_all_weights_that_it_trains(stage, monkeypatch):
    """FSDP in bf16 could not reduce a gradient that a later pass alone has (torch 2.11)."""
    c = settings(stage, causal=True, bidirectional_fraction=1.0)
    reached, backward = [], train.backward

    def watched(loss, network, *rest):
        backward(loss, network, *rest)
        if network.name == "student":
            reached.append({name for name, p in network.network.named_parameters()
                            if p.grad is not None})
    monkeypatch.setattr(train, "backward", watched)
    compressed = next(step for step in range(99)
                      if updates.draw_batch(c, Source(), WORLD, step, 0).start)
    one_update(c, compressed)
    assert "far_patch_embed.weight" in reached[0] and len(reached) > 1
    assert all(later == reached[0] for later in reached)


def test_a_fresh_rollout_is_of_the_updated_student():
    c = settings("distill", fake_rollout="fresh", lr=0.1)
    calls, batch, log = one_update(c)
    rollout = [call for call in calls if call.name == "student" and call.text == "prompt"]
    fresh = [call for call in rollout if not call.gradient]
    made = check_jumps(fresh, batch.fake_rollout.z_1, batch.fake_rollout)
    t = flowmap.expand(batch.fake_t, made)
    z = (1 - t) * made + t * batch.fake_noise
    torch.testing.assert_close(calls[-1].z, z, rtol=1e-3, atol=1e-3)


MUTATIONS = {
    "teacher and fake score swapped": lambda patch: swap_scores(patch),
    "cond and uncond swapped in DMD": lambda patch: patch.setattr(
        flowmap, "guided", lambda u_c, u_0, w, true=flowmap.guided: true(u_0, u_c, w)),
    "the empty prompt replaced by the prompt": lambda patch: patch.setattr(
        updates, "kept_text", lambda batch: batch.null_text),
    "the fake score trained on zeros": lambda patch: patch.setattr(
        dmd, "fake_score_error",
        lambda u, z_0, n, t, true=dmd.fake_score_error: true(u, 0 * z_0, n, t)),
    "teacher without guidance": lambda patch: patch.setattr(
        flowmap, "guided", lambda u_c, u_0, w: u_c),
    "the flow map asked for another r": lambda patch: patch.setattr(
        flowmap, "flow_map",
        lambda u, z, t, r, true=flowmap.flow_map: true(u, z, t, 0 * r)),
}


def swap_scores(patch):
    true = updates.score_gradient
    patch.setattr(updates, "score_gradient",
                  lambda z_0, teacher, fake, batch, c: true(z_0, fake, teacher, batch, c))


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_wiring_fails(name, monkeypatch):
    """The tests above do fail where they should."""
    MUTATIONS[name](monkeypatch)
    monkeypatch.setitem(backward_sim.SIMULATIONS, "flow-map", backward_sim.flow_map_simulation)
    with pytest.raises(AssertionError):
        test_distill_rolls_out_scores_cotrains_and_trains_the_fake_score()


# --- the gradient of a causal rollout

def gradients_of(network):
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


@pytest.mark.parametrize("rollout, chunks", [("flow-map", ""), ("consistency", ""),
                                             ("flow-map", "1,3"), ("flow-map", "4")])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_chunk_by_chunk_the_gradient_is_that_of_the_whole_graph(rollout, chunks, checkpointing):
    c = settings("distill", causal=True, rollout=rollout, chunks=chunks,
                 checkpointing=checkpointing)
    batch, student = updates.draw_batch(c, Source(), WORLD, 1, 0), random_networks(c)["student"]
    gradient = torch.randn(batch.x.shape, generator=distributed.generator("gradient"))
    chunks = list(updates.roll_out(student, batch, batch.rollout, c, graph="all"))
    loss = dmd.dmd_loss(torch.cat(chunks, 1), gradient)
    (loss.sum() / c.batch_size).backward()
    whole = gradients_of(student)
    student.zero_grad()
    chunks = list(updates.roll_out(student, batch, batch.rollout, c, graph="last"))
    *earlier, last = [chunk.requires_grad for chunk in chunks]
    assert last and not any(earlier)
    z_0 = torch.cat([chunk.detach() for chunk in chunks], 1)
    train.backward_chunks(chunks[-1], z_0, gradient, batch, student, True, c, WORLD)
    assert (gradients_of(student) - whole).norm() < 1e-5 * whole.norm() and whole.norm() > 0.1


def test_later_chunks_change_no_gradient_of_earlier_ones():
    """What they write into their caches is made after, and apart."""
    c = settings("distill", causal=True)
    batch, student = updates.draw_batch(c, Source(), WORLD, 1, 0), random_networks(c)["student"]
    rows = batch.rollout.z_1.clone()
    found = []
    for noise in (rows, torch.cat([rows[:, :2], 2 * rows[:, 2:]], 1)):
        rollout = replace(batch.rollout, z_1=noise)
        chunks = list(updates.roll_out(student, batch, rollout, c, graph="all"))
        student.zero_grad()
        chunks[1].square().sum().backward()
        found.append(gradients_of(student))
    assert torch.equal(*found)


def test_at_most_one_chunks_graph_is_alive(monkeypatch):
    """When a chunk is made with gradient, all that was saved for the chunks before is gone."""
    c = settings("distill", causal=True)
    batch, student = updates.draw_batch(c, Source(), WORLD, 1, 0), random_networks(c)["student"]
    alive, found, true = weakref.WeakSet(), [], backward_sim.SIMULATIONS["flow-map"]

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            alive.add(self)

    def simulate(*args):
        if torch.is_grad_enabled():
            found.append(len(alive))
        return true(*args)
    monkeypatch.setitem(backward_sim.SIMULATIONS, "flow-map", simulate)
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        chunks = list(updates.roll_out(student, batch, batch.rollout, c, graph="last"))
        assert len(alive) > 100                      # the last one's, until its backward pass
        z_0 = torch.cat([chunk.detach() for chunk in chunks], 1)
        train.backward_chunks(chunks.pop(), z_0, z_0, batch, student, True, c, WORLD)
    assert found == [0, 0, 0, 0]


def test_the_cache_is_that_of_generation():
    """A rollout's chunks are what the sampler makes from the same noise in the same jumps."""
    c = settings("distill", causal=True)
    batch, student = updates.draw_batch(c, Source(), WORLD, 1, 0), random_networks(c)["student"]
    made = torch.cat(list(updates.roll_out(student, batch, batch.rollout, c)), 1)
    context = updates.Context(batch.text, **batch.conditioning)
    with torch.no_grad():
        for i in range(4):
            u = flowmap.conditioned(student, context)
            z_0 = flowmap.euler_sample(u, batch.rollout.z_1[:, i:i + 1], levels_of(batch.rollout))
            torch.testing.assert_close(z_0, made[:, i:i + 1], rtol=1e-4, atol=1e-5)
            context = append_chunk(student, context, z_0, c.full_chunks)
    assert isinstance(student, FlowMapDiT)


def test_ranks_ask_for_u_0_together_and_it_changes_nothing():
    """Also where one rank of two has dropped all prompts and the other has not."""
    c, kinds = replace(settings("flowmap"), batch_size=2, micro_batch=1, text_drop=0.5), {}
    for step in range(40):
        two = [updates.draw_batch(c, Source(), distributed.World(rank, 2, WORLD.device), step, 0)
               for rank in (0, 1)]
        assert len({len(batch.guided_rows) > 0 for batch in two}) == 1
        kinds[tuple(bool(batch.dropped.all()) for batch in two)] = two
    assert len(kinds) == 4
    asks, student = kinds[True, False][0], random_networks(c)["student"]
    assert asks.dropped.all() and len(asks.guided_rows)
    silent = replace(asks, guided_rows=asks.guided_rows[:0])
    errors = [updates.flow_map_error(student, batch, c) for batch in (asks, silent)]
    torch.testing.assert_close(*errors, rtol=0, atol=0)


def test_ranks_differentiate_together_and_it_changes_nothing():
    """Also where one rank of two has r = t alone and the other r < t alone."""
    c = replace(settings("flowmap"), batch_size=2, micro_batch=1, text_drop=0.0)
    student, made, errors = random_networks(c)["student"], [], []
    for rank in (0, 1):
        world = distributed.World(rank, 2, WORLD.device)
        batch, calls = updates.draw_batch(c, Source(), world, 0, 0), []
        network = Recorded("student", student, calls, batch)
        errors.append(updates.flow_map_error(network, batch, c))
        made.append([(call.method, call.gradient) for call in calls])
        if rank == 0:
            assert batch.roles == (1, 0, 0)
            alone = updates.flow_map_error(student, replace(batch, some_gap=False), c)
    assert batch.roles[0] == 0 and made[0] == made[1]
    torch.testing.assert_close(errors[0], alone, rtol=0, atol=0)


# --- what is drawn

def test_a_rollout_has_each_budget_and_each_of_its_steps():
    c = replace(settings("distill"), budgets="2,4")
    drawn = [updates.draw_rollout(c, (1, 1, 1, 1), key, [0]) for key in range(400)]
    found = Counter((len(rollout.grid) - 1, rollout.k) for rollout in drawn)
    assert found.keys() == {(n, k) for n in (2, 4) for k in range(n)}
    assert all(abs(count / 400 - 0.5 / n) < 0.1 for (n, _), count in found.items())


def test_half_of_the_updates_train_the_first_chunks_and_half_any_number_of_them():
    c = Config(stage="flowmap", causal=True, full_chunks=2)
    found = Counter(len(updates.draw_chunks(c, 4, distributed.generator("c", i))[0])
                    for i in range(1000))
    expected = {2: 0.5 + 0.5 / 3, 3: 0.5 / 3, 4: 0.5 / 3}
    assert {n: count / 1000 for n, count in found.items()} == pytest.approx(expected, abs=0.05)


class Dots(Source):
    latent_shape = (4, 1, 1, 1)


@pytest.mark.parametrize("stage, more", [
    ("pretrain", {}), ("flowmap", dict(causal=True, bidirectional_fraction=1.0)),
    ("distill", dict(rollout="consistency", fake_rollout="fresh"))])
def test_two_seeds_share_no_draw(stage, more, monkeypatch):
    """Of weights, clips, times, noise: else the spread over seeds, which judges claims, is none."""
    generator, drawn, seed = distributed.generator, {0: set(), 1: set()}, 0
    monkeypatch.setattr(distributed, "generator",
                        lambda *keys: drawn[seed].add(keys) or generator(*keys))
    for seed in drawn:
        c = settings(stage, seed=seed, **more)
        updates.draw_batch(c, Source(), WORLD, 1, 0)
        if stage == "pretrain":
            networks.find_weights(c)                 # fresh ones
    assert drawn[0] and not drawn[0] & drawn[1]


@pytest.mark.parametrize("stage, more", [
    ("pretrain", {}), ("distill", dict(rollout="consistency", fake_rollout="fresh")),
    ("flowmap", dict(causal=True, bidirectional_fraction=1.0))])
def test_levels_have_the_methods_laws_and_no_noise_is_used_twice(stage, more):
    c = replace(settings(stage, **more), batch_size=3000, shift=3.0)
    batch = updates.draw_batch(c, Dots(), WORLD, 1, 0)
    x, even = torch.linspace(-1.5, 1.5, 7), torch.linspace(0.1, 0.9, 9)
    logistic = {"pretrain": batch.t, "flowmap": batch.whole_t, "distill": batch.fake_t}[stage]
    laws = [(logistic, x.sigmoid(), torch.special.ndtr(x))]
    laws += [(batch.tau, even, even)] if stage == "distill" else []
    for times, levels, shares in laws:
        found = (times < flowmap.shift_time(levels, 3.0)[:, None]).float().mean(1)
        torch.testing.assert_close(found, shares, atol=0.04, rtol=0)
    dropped = batch.dropped.float()
    assert dropped.mean().item() == pytest.approx(c.text_drop, abs=0.03)
    assert torch.corrcoef(torch.stack([dropped, batch.t]))[0, 1].abs() < 0.1     # at any level
    rollouts = [rollout for rollout in (batch.rollout, batch.fake_rollout) if rollout]
    drawn = [noise for rollout in rollouts for noise in (rollout.z_1, *rollout.renoise)]
    noises = [batch.n, batch.whole_noise, batch.tau_noise, batch.fake_noise, *drawn]
    noises = [noise[:, -1:].flatten() for noise in noises if noise is not None]
    alike = torch.corrcoef(torch.stack([*noises, noises[0]]))[:-1, :-1]
    assert (alike - torch.eye(len(noises))).abs().max() < 0.1


def test_ranks_agree_on_what_changes_the_graph_and_not_on_noise():
    def agreed(batch):
        rollouts = [rollout for rollout in (batch.rollout, batch.fake_rollout) if rollout]
        return (batch.chunks, batch.start, batch.some_gap, batch.tangent_scale,
                batch.whole_t is None,
                [(rollout.grid, rollout.k) for rollout in rollouts])
    for c in (settings("flowmap", causal=True, bidirectional_fraction=0.5),
              settings("distill", causal=True, fake_rollout="fresh")):
        c = replace(c, batch_size=2, micro_batch=1, budgets="2,4")
        for step in range(20):
            a, b = (updates.draw_batch(c, Source(), distributed.World(rank, 2, WORLD.device), step,
                                       0) for rank in (0, 1))
            assert agreed(a) == agreed(b) and not torch.equal(a.n, b.n)


def test_roles_are_even_over_ranks():
    c = replace(settings("flowmap"), micro_batch=2)              # 8 clips, four ranks
    for step in range(10):
        flow = [updates.draw_batch(c, Source(), distributed.World(rank, 4, WORLD.device), step,
                                   0).roles[0] for rank in range(4)]
        assert max(flow) - min(flow) <= 1


def test_no_stage_draws_the_clips_that_eval_holds_back(monkeypatch):
    found, draw = [], Source.draw
    monkeypatch.setattr(Source, "draw", lambda self, indices, seed: found.append(seed) or draw(
        self, indices, seed))
    for seed in (0, 999_999):
        for stage in STAGES:
            updates.draw_batch(settings(stage, seed=seed), Source(), WORLD, 0, 0)
    assert len(found) == 6 and not any(HELD_OUT <= seed < 2 * HELD_OUT for seed in found)


# --- the update

@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cotrain", [0.0, 1.0])
def test_gradients_are_reduced_once_by_the_last_backward_pass(monkeypatch, causal, cotrain):
    c = replace(settings("distill", causal=causal, cotrain=cotrain), batch_size=4, micro_batch=2)
    nets, on = random_networks(c), {}
    monkeypatch.setattr(distributed, "sync_gradients",
                        lambda net, last: on.setdefault(net, []).append(last))
    batches = (updates.draw_batch(c, Source(), WORLD, 1, i) for i in range(2))
    train.update(c, nets, networks.trainables(c, nets), batches, 1, WORLD,
                 distributed.Sums(train.LOGGED[c.stage]))
    for name in ("student", "fake"):
        *before, last = on[nets[name]]
        assert last and before and not any(before)


def test_cotrain_is_the_factor_of_the_forward_loss(monkeypatch):
    found = []
    monkeypatch.setattr(train, "optimizer_step", lambda part, lr, clip: found.append(
        gradients_of(part.network)) or 1.0)
    for cotrain in (0.0, 1.0, 3.0):
        one_update(settings("distill", cotrain=cotrain))
    none, one, three = found[::2]
    torch.testing.assert_close(three - none, 3 * (one - none), rtol=1e-3, atol=1e-5)
    assert (one - none).norm() > 0.1


def test_each_network_is_stepped_at_its_own_rate(monkeypatch):
    steps = []
    monkeypatch.setattr(train, "optimizer_step", lambda part, lr, clip: steps.append(
        (lr, clip, part.optimizer.param_groups[0]["betas"])) or 1.0)
    one_update(settings("distill", lr=0.1, fake_lr=0.3, warmup=4, clip=2.0, beta1=0.1, beta2=0.2))
    assert steps == [(pytest.approx(lr), 2.0, (0.1, 0.2)) for lr in (0.05, 0.15)]


def test_a_budget_that_is_named_twice_is_drawn_twice_as_often():
    c = replace(settings("distill"), budgets="1,1,2")
    drawn = [updates.draw_rollout(c, (1, 1, 1, 1), key, [0]) for key in range(600)]
    assert sum(len(rollout.grid) == 2 for rollout in drawn) / 600 == pytest.approx(2 / 3, abs=0.08)


def test_whole_clips_are_in_the_asked_fraction_of_updates():
    c = replace(settings("flowmap", causal=True, bidirectional_fraction=0.25), batch_size=1)
    found = [updates.draw_batch(c, Dots(), WORLD, step, 0).whole_t is not None
             for step in range(400)]
    assert sum(found) / 400 == pytest.approx(0.25, abs=0.08)


def test_the_time_weight_of_an_update_has_mean_one_for_any_share_of_flow_matching():
    c = replace(settings("flowmap"), batch_size=100_000, flow_times="either", flow_fraction=0.3)
    t, _ = flowmap.flow_map_times(distributed.generator("share"), c.batch_size, c.shift,
                                  c.flow_fraction, c.consistency_fraction, c.flow_times)
    weight = flowmap.time_weight(t.double(), c.time_weight, c.shift, c.either_share)
    assert weight.mean().item() == pytest.approx(1, abs=0.01)
