"""The causal network: its cache, who sees whom, checkpointing, and parity with Diffusers."""
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import backward_sim
import golden
import model
import pipeline
import wan
from cache import Context, append_chunk, teacher_forced
from flowmap import conditioned, euler_sample, time_grid
from golden import CAUSAL, ROLLOUT, ROLLOUT_SIDES, SMALL, inputs, network

PARTITIONS = [(1, 3, 3, 3, 3, 3, 3, 2), (2,) * 6, (1,) * 5]


def rollout(net, jump, context, z, chunks, full_chunks):
    """A clip, chunk by chunk. jump(z, u): a chunk's z_0 from its noise."""
    return golden.rollout(net, lambda z, context: jump(z, conditioned(net, context)), context, z,
                          chunks, full_chunks)


@pytest.mark.parametrize("full_chunks", [0, 1, 2, 3])
@pytest.mark.parametrize("chunks", PARTITIONS)
def test_cached_generation_equals_the_uncached_forward(chunks, full_chunks, batch=3):
    """The last chunk, with a cache that grew chunk by chunk, and with its clean past at once."""
    net = network(CAUSAL)
    z, t, r, text = inputs(CAUSAL, batch, sum(chunks))
    clean = inputs(CAUSAL, batch, sum(chunks), seed=1)[0]
    context, start = Context(net.encode_prompt(text)), 0
    for i, frames in enumerate(chunks):
        clip = torch.cat([clean[:, :start], z[:, start:start + frames]], 1)
        whole = teacher_forced(net, clip, text, chunks[:i + 1], full_chunks)
        expected = net(clip[:, whole.start:], t, r, whole)[:, -frames:]
        assert (net(z[:, start:start + frames], t, r, context) - expected).abs().max() < 1e-5
        context = append_chunk(net, context, clean[:, start:start + frames], full_chunks)
        start += frames
    assert context.start == sum(chunks)


@pytest.mark.parametrize("full_chunks", [0, 2])
def test_clean_never_sees_noisy_and_no_chunk_sees_a_later_one(full_chunks):
    net, chunks = network(CAUSAL), (2, 1, 2, 1)
    z, t, r, text = inputs(CAUSAL, frames=6)
    clean = inputs(CAUSAL, frames=6, seed=1)[0]

    def outputs(z, clean):
        context = teacher_forced(net, clean, text, chunks, full_chunks)
        layers = [layer for chunk in context.cache for layer in chunk.keys_values]
        keys_values = torch.cat([torch.cat(layer, 1) for layer in layers], 1)
        return net(z[:, context.start:], t, r, context), keys_values, context.start
    u, keys, first = outputs(z, clean)
    starts = [sum(chunks[:i]) for i in range(5)]
    for i in range(4):
        rows = slice(starts[i], starts[i + 1])
        louder = clean.clone()
        louder[:, rows] += 1
        changed = outputs(z, louder)[0] - u
        # A changed clean chunk reaches later noisy chunks, and neither itself nor earlier ones.
        assert starts[i + 1] <= first or changed[:, :starts[i + 1] - first].abs().max() == 0
        later = changed[:, max(0, starts[i + 1] - first):].abs().amax((0, 2, 3, 4))
        assert i == 3 or later.min() > 1e-4
        noisier = z.clone()
        noisier[:, rows] += 1
        changed, same_keys, _ = outputs(noisier, clean)
        assert torch.equal(same_keys, keys)                     # clean never sees noisy
        if starts[i] >= first:                                  # a noisy chunk reaches itself only
            own = (changed - u).abs().amax((0, 2, 3, 4))
            inside = torch.arange(first, 6)
            inside = (inside >= starts[i]) & (inside < starts[i + 1])
            assert own[inside].min() > 1e-4 and own[~inside].max() == 0


def test_a_single_chunk_is_the_bidirectional_network():
    net, (z, t, r, text) = network(CAUSAL), inputs(CAUSAL)
    context = teacher_forced(net, z, text, (3,), 3)
    assert torch.equal(net(z, t, r, context), net(z, t, r, text))
    assert (net(z, t, r, Context(net.encode_prompt(text))) - net(z, t, r, text)).abs().max() < 1e-6
    assert torch.equal(net(z[1:], t[1:], r[1:], context[1:]), net(z[1:], t[1:], r[1:], text[1:]))


def test_a_new_prompt_is_encoded_anew():
    net, (z, t, r, text) = network(CAUSAL), inputs(CAUSAL)
    context = append_chunk(net, Context(net.encode_prompt(text)), z, 3)
    other = replace(context, text=net.encode_prompt(-text))
    expected = net(z, t, r, replace(context, text=-text))
    torch.testing.assert_close(net(z, t, r, other), expected, rtol=1e-4, atol=1e-5)
    assert (net(z, t, r, context) - expected).abs().max() > 1e-3


def test_rows_of_a_context():
    """The finite difference asks for some samples only."""
    net, (z, t, r, text) = network(CAUSAL), inputs(CAUSAL, batch=3, frames=6)
    context = teacher_forced(net, z, net.encode_prompt(text), (2, 1, 2, 1), 2)
    rows, z = torch.tensor([2, 0]), z[:, context.start:]
    expected = net(z, t, r, context)[rows]
    some = net(z[rows], t[rows], r[rows], context[rows])
    torch.testing.assert_close(some, expected, rtol=1e-4, atol=1e-5)


def test_behind_a_window_chunks_are_written_as_in_a_clip_of_its_length():
    """A chunk that is dropped is not seen by those that are written later."""
    net, (z, _, _, text) = network(CAUSAL), inputs(CAUSAL, frames=7)
    context = Context(text)
    for i in range(6):
        context = append_chunk(net, context, z[:, i:i + 1], 3, window=4)
    *kept, newest = context.cache[:2]
    before = replace(context, cache=tuple(kept), start=3)
    expected = net.encode(z[:, 3:4], before, compressed=True)
    before = replace(context, cache=(*kept, newest), start=4, chunks=(1, 1))
    expected += net.encode(z[:, 4:6], before)
    assert [chunk.stride for chunk in context.cache] == [2, 2, 1, 1]
    for chunk, other in zip(context.cache[1:], expected, strict=True):
        for (keys, values), (other_keys, other_values) in zip(chunk.keys_values, other.keys_values):
            torch.testing.assert_close(keys, other_keys)
            torch.testing.assert_close(values, other_values)


def test_the_window_bounds_the_past():
    net, (z, _, _, text) = network(CAUSAL), inputs(CAUSAL, frames=1)
    for full_chunks, window in ((0, 2), (3, 5), (3, 2), (3, 1), (1, 2)):
        context = Context(text)
        for _ in range(8):
            context = append_chunk(net, context, z, full_chunks, window)
        assert len(context.cache) == max(window, full_chunks - 1) and context.start == 8
        assert [chunk.start for chunk in context.cache] == list(range(8 - len(context.cache), 8))


def test_positions_may_lie_anywhere():
    """Attention depends on distances only: a long video stays in the trained range of a window."""
    net, (z, t, r, text) = network(CAUSAL), inputs(CAUSAL, frames=2)
    def u(first):
        context = append_chunk(net, Context(text, start=first), z, 3)
        return net(z, t, r, context)
    assert (u(0) - u(500)).abs().max() < 1e-4


@pytest.mark.parametrize("full_chunks", [0, 2])
def test_checkpointing_changes_no_gradient_of_a_causal_rollout(full_chunks):
    """A cache overwritten in place would be read again in backward, after it has changed."""
    chunks, (z, _, _, text) = (1, 2, 1, 2), inputs(CAUSAL, frames=6)
    def gradients(checkpointing):
        net = network(CAUSAL).requires_grad_(True)
        for block in net.blocks:
            block.checkpointing = checkpointing

        def jump(z, u):
            return backward_sim.flow_map_simulation(u, z, time_grid(4, 5.0), 1)
        clip = rollout(net, jump, Context(text), z, chunks, full_chunks)
        (clip * torch.linspace(-1, 1, clip.numel()).view(clip.shape)).sum().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    plain = gradients(False)
    assert (gradients(True) - plain).norm() < 1e-5 * plain.norm() and plain.norm() > 1


def test_a_late_chunk_takes_the_arithmetic_of_an_early_one():
    """Outside attention: the past is never encoded again."""
    net, (z, _, _, text), dense = network(CAUSAL), inputs(CAUSAL, frames=1), []
    context = Context(net.encode_prompt(text))
    for _ in range(8):
        with FlopCounterMode(display=False) as counter:
            context = append_chunk(net, context, z, 2)
        counts = counter.get_flop_counts()["Global"].items()
        dense.append(sum(count for op, count in counts if "attention" not in str(op)))
    assert 0 < dense[0] < dense[3] == dense[7]


def test_no_gradient_through_the_cache():
    net, (z, _, _, text) = network(CAUSAL), inputs(CAUSAL, frames=2)
    z.requires_grad_()
    jump = lambda z, u: euler_sample(u, z, [1.0, 0.0])
    clip = rollout(net, jump, Context(text), z, (1, 1), 3)
    gradient, = torch.autograd.grad(clip[:, 1].sum(), z)
    assert gradient[:, 0].abs().max() == 0 and gradient[:, 1].abs().min() > 0


def test_compressed_patch_embedding_starts_as_the_interpolated_one():
    plain = network(replace(CAUSAL, compressed=False)).state_dict()
    net = model.FlowMapDiT(CAUSAL)
    net.load_state_dict(wan.as_causal(plain))
    assert net.far_patch_embed.weight.shape == (48, 6, 1, 4, 4)
    weight, far = plain["patch_embed.weight"], net.far_patch_embed.weight
    torch.testing.assert_close(far[..., 0, 0], weight[..., 0, 0])
    between = 0.75 * weight[..., 0, 0] + 0.25 * weight[..., 0, 1]
    torch.testing.assert_close(far[..., 0, 1], between)
    with pytest.raises(ValueError, match="no compressed patch embedding"):
        network().encode(inputs()[0], Context(inputs()[3]), compressed=True)
    with pytest.raises(ValueError, match=r"3 latent frames, but chunks of \[1, 1\]"):
        net(*inputs()[:3], Context(inputs()[3], chunks=(1, 1)))


def test_compressed_rotations_are_the_renormalised_mean_of_those_they_cover():
    tables = (model.grid_rotations(torch.arange(2), 4 // s, 6 // s, 24, s) for s in (1, 2))
    fine, coarse = (torch.view_as_complex(table) for table in tables)
    mean = fine.view(2, 2, 2, 3, 2, 12).mean((2, 4))             # (F, h, w, K / 2), of 2 x 2 each
    torch.testing.assert_close(coarse.view(2, 2, 3, 12), mean / mean.abs(), rtol=1e-4, atol=1e-5)


def test_a_sampler_that_is_not_known_is_an_error():
    unfinished = pipeline.Pipeline(network(), None, None, {}, (), ())
    with pytest.raises(ValueError, match="sampler 'heun': choose one of euler, consistency"):
        pipeline.generate(unfinished, ["a clip"], [0], [1.0, 0.0], "heun")


# --- parity with Diffusers: golden vectors always, its live networks where it is installed

def ours(name: str) -> torch.Tensor:
    kind, _, case = name.partition("-")
    if kind == "bidirectional":
        config = replace(SMALL, second_time=case == "True")
        return network(config)(*inputs(config))
    chunks, limit = case.rsplit("-", 1)
    chunks, limit = tuple(map(int, chunks.split(","))), int(limit)
    if kind == "training":
        net, (z, t, r, text) = network(CAUSAL), inputs(CAUSAL, frames=sum(chunks))
        clean = inputs(CAUSAL, frames=sum(chunks), seed=1)[0]
        context = teacher_forced(net, clean, text, chunks, limit)
        return net(z[:, context.start:], t, r, context)
    net, (z, _, _, text) = network(ROLLOUT), inputs(ROLLOUT, 1, sum(chunks), sides=ROLLOUT_SIDES)
    jump = lambda z, u: euler_sample(u, z, time_grid(2, 5.0))
    return rollout(net, jump, Context(net.encode_prompt(text)), z, chunks, limit)


@pytest.mark.parametrize("source", ["golden", "live"])
@pytest.mark.parametrize("name", list(golden.cases()))
def test_parity_with_diffusers(name, source):
    """Same weights and input, another implementation: within 1e-4 of the output's deviation."""
    if source == "live":
        pytest.importorskip("diffusers", minversion="0.42")
        expected = golden.cases()[name]()
    else:
        from safetensors.torch import load_file
        expected = load_file(golden.FILE)[name]
    assert (ours(name) - expected).abs().max() < 1e-4 * expected.std()
