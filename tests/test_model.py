"""The network: sizes, the two times, invariances. Parity with Diffusers is in test_causal.py."""
from dataclasses import replace
from functools import partial

import pytest
import torch

import meanflow
import model
import networks
import wan
from distributed import generator
from flowmap import conditioned, flow_map
from golden import SMALL, inputs, network
from model import PRESETS, FlowMapDiT, time_features


@pytest.mark.parametrize("preset, extra, count", [
    ("wan-1.3b", dict(second_time=False), 1_418_996_800), ("wan-1.3b", {}, 1_421_752_384),
    ("wan-1.3b", dict(compressed=True), 1_422_147_136),
    ("wan-14b", dict(second_time=False), 14_288_491_584), ("wan-14b", {}, 14_316_026_944),
    ("wan-14b", dict(compressed=True), 14_317_342_784)])
def test_parameter_counts_are_wans(preset, extra, count):
    with torch.device("meta"):
        net = FlowMapDiT(replace(PRESETS[preset], **extra))
    assert sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize("config", [SMALL, PRESETS["tiny"]])
def test_a_teacher_turned_into_a_flow_map_is_unchanged_at_r_equal_t(config):
    teacher = network(replace(config, second_time=False))
    student = FlowMapDiT(config)
    student.load_state_dict(wan.as_flow_map(teacher.state_dict()))
    z, t, r, text = inputs(config)
    expected = teacher(z, t, t, text)
    atol = 1e-5 * expected.std().item()
    torch.testing.assert_close(student(z, t, t, text), expected, rtol=1e-5, atol=atol)
    assert (student(z, t, r, text) - expected).abs().max() > 1e-3       # and it does look at r
    torch.testing.assert_close(teacher(z, t, r, text), expected, rtol=0, atol=0)


def test_an_added_time_embedding_starts_as_the_teacher_and_knows_the_gap_only():
    teacher = network(replace(SMALL, second_time=False))
    config, state = networks.with_added_time(SMALL, wan.as_flow_map(teacher.state_dict()))
    student = FlowMapDiT(config)
    student.load_state_dict(dict(state))
    z, t, r, text = inputs(SMALL)
    torch.testing.assert_close(student(z, t, r, text), teacher(z, t, r, text), rtol=0, atol=0)
    torch.nn.init.normal_(student.r_embed.down.weight)
    plain = student.time_embed(time_features(t, SMALL.freq_dim, SMALL.time_scale))
    part = [student.embed_times(t, t - gap, "") - plain for gap in (r, r.flip(0))]
    torch.testing.assert_close(part[0], part[1].flip(0), rtol=1e-3, atol=1e-3)
    assert (student(z, t, r, text) - teacher(z, t, r, text)).abs().max() > 1e-3
    given = torch.zeros_like(t)                          # the t of frames whose r is the others
    torch.testing.assert_close(student.embed_times(given, r, ""),
                               student.embed_times(given, given, ""))


def test_one_time_a_clip_is_the_same_time_for_every_frame():
    net, (z, t, r, text) = network(), inputs()
    frames = lambda time: time[:, None].expand(-1, z.shape[1])
    u = net(z, frames(t), frames(r), text)
    torch.testing.assert_close(u, net(z, t, r, text), rtol=1e-4, atol=1e-5)


def test_samples_of_a_batch_do_not_mix():
    net, (z, t, r, text) = network(), inputs()
    alone = net(z[1:], t[1:], r[1:], text[1:])
    torch.testing.assert_close(net(z, t, r, text)[1:], alone, rtol=1e-4, atol=1e-5)


def test_every_input_matters():
    net, (z, t, r, text) = network(), inputs()
    base = net(z, t, r, text)
    others = [(z.flip(1), t, r, text), (z, t * 0.9, r, text), (z, t, r * 0.5, text),
              (z, t, r, -text)]
    for changed in others:
        assert (net(*changed) - base).abs().max() > 1e-3
    order = torch.tensor([4, 1, 0, 3, 2])                   # prompt tokens are a set
    torch.testing.assert_close(net(z, t, r, text[:, order]), base, rtol=1e-4, atol=1e-5)


def test_rotary_attention_depends_on_distances_only():
    """Scores between rotated vectors do not change when all frames move by the same number."""
    g = generator("rotary")
    q, k = torch.randn(2, 1, 2, 24, 16, generator=g)
    def scores(first):
        rope = model.grid_rotations(torch.arange(first, first + 2), 3, 4, 16).flatten(0, 1)
        return model.rotate(q, rope) @ model.rotate(k, rope).mT
    torch.testing.assert_close(scores(0), scores(37), rtol=1e-4, atol=1e-4)
    assert (scores(0) - q @ k.mT).abs().max() > 0.1


def test_patch_embedding_is_the_strided_convolution():
    embed, (z, *_) = network().patch_embed, inputs()
    conv = torch.nn.functional.conv3d(z.transpose(1, 2), embed.weight, embed.bias, stride=(1, 2, 2))
    torch.testing.assert_close(embed(z), conv.flatten(3).permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("std", [1.0, 0.3])
def test_output_skip_is_the_exact_flow_map_of_gaussian_data(std):
    config = replace(SMALL, output_skip=std)
    net = FlowMapDiT(config).init_weights(generator("init"))            # zero head: the skip alone
    z, t, r, text = inputs(config)
    scale = lambda t: (t**2 + std**2 * (1 - t) ** 2).sqrt()[:, None, None, None, None]
    z_r = flow_map(conditioned(net, text), z, t, r)
    torch.testing.assert_close(z_r, z * scale(r) / scale(t), rtol=1e-4, atol=1e-5)


def test_gate_is_a_convex_mix():
    """With E' = E the mixed embedding is E's at equal times, for every gate."""
    z, t, _, text = inputs()
    state = wan.as_flow_map(network(replace(SMALL, second_time=False)).state_dict())
    outputs = []
    for gate in (0.0, 0.25, 1.0):
        net = FlowMapDiT(replace(SMALL, gate=gate))
        net.load_state_dict(state)
        outputs.append(net(z, t, t, text))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs[0], outputs[2], rtol=1e-4, atol=1e-4)


def test_wrong_latents_are_named():
    net, (z, t, r, text) = network(), inputs()
    with pytest.raises(ValueError, match="5 channels.*expected 6 channels"):
        net(z[:, :, :5], t, r, text)
    with pytest.raises(ValueError, match="multiples of 2"):
        net(z[..., :3], t, r, text)
    with pytest.raises(ValueError, match="head width"):
        FlowMapDiT(replace(SMALL, heads=5))


def test_in_bf16_small_differences_survive_where_no_backward_pass_comes():
    """dF/dt, and the velocities of two networks that are 2 % apart, against fp32 with the same bf16
    weights: at most a quarter of the error that rounding between blocks makes, which is what calls
    with a backward pass do."""
    config, g = replace(SMALL, layers=6, dim=96, ffn_dim=384, time_scale=50.0), generator("bf16")
    net = FlowMapDiT(config).init_weights(g)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim > 1 and ("head" in name or "time_embed" in name):
                p.normal_(std=p.shape[1] ** -0.5, generator=g)
        state = {name: p.bfloat16().float() for name, p in net.state_dict().items()}
        other = dict(state)
        for name, p in state.items():
            if p.ndim > 1:
                p = p + 0.01 * p.std() * torch.randn(p.shape, generator=g)
                other[name] = p.bfloat16().float()
    (z, t, r, text), (v, _, _, _) = inputs(config, batch=8), inputs(config, batch=8, seed=1)

    def answers(bf16: bool, grad: bool):
        nets = [FlowMapDiT(config), FlowMapDiT(config)]
        for net, weights in zip(nets, (state, other)):
            net.load_state_dict(weights)
            if bf16:
                net.bfloat16()

        def u(net, z, t, r):
            with torch.set_grad_enabled(grad):
                return net(z, t, r, text).detach()
        dF_dt = meanflow.finite_difference(partial(u, nets[0]), z, t, r, v, 0.005)
        return dF_dt, u(nets[1], z, t, t) - u(nets[0], z, t, t)
    exact = answers(False, False)
    assert all(torch.equal(a, b) for a, b in zip(exact, answers(False, True)))
    for kept, rounded, expected in zip(answers(True, False), answers(True, True), exact):
        error = (kept - expected).norm()
        assert error < 0.25 * (rounded - expected).norm()
        assert error < 0.1 * expected.norm()


def test_late_frames_are_turned_as_exactly_as_early_ones():
    """Of a video without end: position x frequency in fp32 would lose digits."""
    late, step = model.axis_rotations(torch.tensor([20_001, 40_003]), 22)
    late, step = torch.view_as_complex(late), torch.view_as_complex(step)
    one, = torch.view_as_complex(model.axis_rotations(torch.tensor([1]), 22))
    assert (late**2 * one - step).abs().max() < 1e-6
