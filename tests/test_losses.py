"""The three losses and the rollouts against closed forms, autograd and each other."""
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import backward_sim
import data
import distributed
import dmd
import encoders
import flowmap
import meanflow
import train
from closed_form import Gaussian, on_path
from config import Config
from distributed import generator
from model import PRESETS, FlowMapDiT
from test_updates import WORLD

DATA = Gaussian(mean=0.7, std=0.4)
TEXT, KEPT = torch.ones(32, 1, 1), torch.zeros(32, dtype=torch.bool)


def points(count=32, width=6):
    g = generator("points")
    z = torch.randn(count, width, generator=g, dtype=torch.float64)
    t = 0.1 + 0.8 * torch.rand(count, generator=g, dtype=torch.float64)
    return z, t, t * 0.7 * torch.rand(count, generator=g, dtype=torch.float64)


def small_network():
    g = generator("network")
    net = FlowMapDiT(PRESETS["tiny"]).init_weights(g)
    with torch.no_grad():                                # a fresh, zero head says nothing
        net.head.weight.normal_(std=0.3, generator=g)
    return net


# --- meanflow.py

PLAIN = meanflow.Settings(guidance=1.0)


def plain_error(x, n, t, r, dropped=KEPT, flow_rows=0, **settings):
    """The forward loss of the exact u of DATA, by default without guidance."""
    text = TEXT[:len(x)]
    return meanflow.meanflow_error(DATA.u, x, n, t, r, text, text, dropped[:len(x)],
                                   replace(PLAIN, **settings), flow_rows)


def test_exact_average_velocity_is_a_fixed_point_and_the_error_shrinks_as_epsilon_squared():
    z_t, t, r = points()
    x, n = on_path(DATA, z_t, t)
    errors = [plain_error(x, n, t, r, epsilon=e).sqrt().max().item() for e in (0.04, 0.02, 0.01)]
    assert errors[-1] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_exact_derivative_makes_the_fixed_point_exact():
    z_t, t, r = points()
    x, n = on_path(DATA, z_t, t)
    assert plain_error(x, n, t, r, derivative="jvp").max() < 1e-20


@pytest.mark.parametrize("t, r", [(1.0, 0.2), (0.003, 0.0), (0.5, 0.499), (0.997, 0.0)])
def test_difference_stays_inside_the_interval_and_divides_by_the_true_gap(t, r):
    seen = []
    def u(z, t, r):                                      # d/dt along dz/dt = v is 3 + v
        seen.append(t)
        return 3 * t[:, None] + z
    t, r, z, v = torch.tensor([t]), torch.tensor([r]), torch.zeros(1, 4), torch.full((1, 4), 2.0)
    derivative = meanflow.finite_difference(u, z, t, r, v, epsilon=0.005)
    torch.testing.assert_close(derivative, torch.full((1, 4), 5.0), rtol=1e-3, atol=0)
    assert all(bool((r <= time) & (time <= 1)) for time in seen) and seen[0] > seen[1]


def test_guidance_fusion_and_target_are_the_papers_formula():
    z, t, r = points(8)
    x, n = z, z.flip(0)
    w, e, v = 3.0, 0.005, n - x
    text, null = torch.full((8, 1, 1), 2.0), torch.zeros(8, 1, 1)
    network = lambda z, t, r, text: z * t[:, None] ** 2 * (1 + r[:, None]) * (1 + text[:, 0])
    z_t = flowmap.interpolate(x, n, t)
    F = (network(z_t, t, r, text) - (1 - w) * network(z_t, t, r, null)) / w
    above, below = network(z_t + e * v, t + e, r, text), network(z_t - e * v, t - e, r, text)
    dF_dt = (above - below) / (2 * e * w)
    expected = (F - (v - (t - r)[:, None] * dF_dt)).square().mean(1)
    settings = meanflow.Settings(w, e)
    err = meanflow.meanflow_error(network, x, n, t, r, text, null, KEPT[:8], settings)
    torch.testing.assert_close(err, expected)


def test_a_dropped_prompt_is_trained_towards_the_plain_velocity():
    z_t, t, r = points()
    x, n = on_path(DATA, z_t, t)
    guided = plain_error(x, n, t, r, dropped=~KEPT, guidance=3.0)
    torch.testing.assert_close(guided, plain_error(x, n, t, r))


def test_the_teachers_velocity_leaves_no_noise():
    """On clips and noise that are drawn apart, as in training, the exact u has no error against it;
    the data's n - x leaves its variance given z_t, also in the derivative's tangent."""
    z, t, r = points()
    x, n = DATA.mean + DATA.std * z, z.roll(1, 0)
    r[:8] = t[:8]
    v = DATA.velocity(flowmap.interpolate(x, n, t), t)
    err = meanflow.meanflow_error(DATA.u, x, n, t, r, TEXT, None, KEPT, PLAIN, v=v)
    noisy = plain_error(x, n, t, r)
    assert err.max() < 1e-6 and noisy[:8].mean() > 0.3 and noisy[8:].mean() > 0.3


def test_derivative_is_never_computed_for_flow_matching_rows():
    sizes = []
    def network(z, t, r, text):
        sizes.append(len(z))
        return z
    z, t, r = points(8)
    r[:5] = t[:5]
    text, null = torch.ones(8, 1, 1), torch.zeros(8, 1, 1)
    guided = meanflow.Settings()
    meanflow.meanflow_error(network, z, z, t, r, text, null, KEPT[:8], guided, flow_rows=5)
    assert sizes == [8, 8, 3, 3]                         # u_c, u_0, two points of rows r < t
    sizes.clear()
    meanflow.meanflow_error(network, z, z, t, t, text, null, KEPT[:8], PLAIN, flow_rows=8)
    assert sizes == [8]
    # Under FSDP another rank may differentiate: the calls are made, and change nothing.
    t[0] = 1
    err = plain_error(z, z, t, t, flow_rows=8)
    same = plain_error(z, z, t, t)
    assert same.isfinite().all()
    torch.testing.assert_close(err, same, rtol=0, atol=0)


def test_finite_difference_agrees_with_jvp_on_the_network():
    """Within 1e-3 in fp32, and e = 0.005 lies in the flat region: 0.0025 agrees with it too."""
    net, g = small_network(), generator("jvp")
    z, v = torch.randn(2, 16, 2, 48, 2, 2, generator=g)
    t = 0.1 + 0.8 * torch.rand(16, generator=g)
    r, text = t * torch.rand(16, generator=g), torch.randn(16, 3, 64, generator=g)
    u = flowmap.conditioned(net, text)
    exact = meanflow.exact_derivative(u, z, t, r, v)
    for epsilon in (0.0025, 0.005):
        approximate = meanflow.finite_difference(u, z, t, r, v, epsilon)
        assert (approximate - exact).norm() / exact.norm() < 1e-3


def test_epsilon_lies_in_the_flat_region_of_the_toy_preset():
    """Of a network that has learned a little: 5e-3 and half of it agree with the derivative."""
    clips = data.open_data("shapes")
    codec = encoders.PatchPCA.fit(clips.clips(range(64))[0], PRESETS["toy"].channels)
    source = encoders.Encoded(clips, codec, encoders.Words.of(clips.captions))
    net = FlowMapDiT(PRESETS["toy"]).init_weights(generator("toy"))
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for i in range(30):
        (x, text, _), g = source.draw(range(8 * i, 8 * i + 8)), generator("little", i)
        n, t = torch.randn(x.shape, generator=g), flowmap.logit_normal_time(g, 8, 5.0)
        optimizer.zero_grad()
        flowmap.flow_matching_error(flowmap.conditioned(net, text), x, n, t).mean().backward()
        optimizer.step()
    net.requires_grad_(False)
    (x, text, _), g = source.draw(range(1000, 1008)), generator("flat")
    n, (t, r) = torch.randn(x.shape, generator=g), flowmap.flow_map_times(g, 8, 5.0, 0.0, 0.25)
    z_t, v, u = flowmap.interpolate(x, n, t), n - x, flowmap.conditioned(net, text)
    exact = meanflow.exact_derivative(u, z_t, t, r, v)
    for epsilon in (0.0025, 0.005):
        approximate = meanflow.finite_difference(u, z_t, t, r, v, epsilon)
        assert (approximate - exact).norm() / exact.norm() < 0.01, epsilon


def test_balance_and_weight():
    err = torch.tensor([1.0, 3.0, 5.0, 400.0], requires_grad=True)
    t, r = torch.tensor([0.5, 0.6, 0.7, 0.8]), torch.tensor([0.5, 0.6, 0.0, 0.1])
    weight = torch.tensor([1.0, 2.0, 0.5, 0.25])
    loss = meanflow.balanced_loss(err, t, r, mu=2.0) * weight
    torch.testing.assert_close(loss, torch.tensor([1.0, 6.0, 1.0, 0.5]), rtol=1e-4, atol=0)
    gradient, = torch.autograd.grad(loss.sum(), err)
    expected = torch.tensor([1.0, 2.0, 2 / 5 * 0.5, 2 / 400 * 0.25])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=0)


def test_a_fixed_balance_is_a_square_below_its_scale_and_at_most_the_scale_above():
    err = torch.tensor([0.0, 5.0, 1e-4, 0.1, 1e4], requires_grad=True)
    t, r = torch.ones(5), torch.tensor([1.0, 1.0, 0.2, 0.2, 0.2])
    weight = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.5])
    loss = meanflow.balanced_loss(err, t, r, torch.tensor(0.0), fixed=0.1) * weight
    torch.testing.assert_close(loss, torch.tensor([0.0, 10.0, 1e-4, 0.05, 0.05]),
                               rtol=2e-3, atol=0)
    gradient, = torch.autograd.grad(loss.sum(), err)     # none vanishes, though r = t errors do
    expected = torch.tensor([1.0, 2.0, 1.0, 0.5, 0.5e-5])
    torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("released", [False, True])
def test_the_weight_comes_after_the_balance_or_before_it_and_then_mu_is_of_weighted_errors(
        released):
    c = Config(weight_before_balance=released)
    err = torch.tensor([1.0, 3.0, 5.0, 400.0])
    t, r = torch.tensor([0.5, 0.6, 0.7, 0.8]), torch.tensor([0.5, 0.6, 0.0, 0.1])
    weight = flowmap.time_weight(t, c.time_weight, c.shift)
    mu = (err * weight)[:2].mean() if released else err[:2].mean() * weight[2:]
    loss = train.balanced(err, SimpleNamespace(t=t, r=r, roles=(2, 1, 1)),
                          distributed.RunningMean(WORLD), c,
                          distributed.Sums(train.LOGGED["flowmap"]))
    torch.testing.assert_close(loss[:2], (err * weight)[:2])
    torch.testing.assert_close(loss[2:], mu.expand(2))


@pytest.mark.parametrize("balance, scale", [(0.0, 1.0), (0.1, 0.1)])
def test_without_flow_matching_rows_and_with_a_scale_of_its_own(balance, scale):
    c, err = Config(balance=balance), torch.tensor([5.0, 400.0])
    batch = SimpleNamespace(t=torch.tensor([0.7, 0.8]), r=torch.tensor([0.0, 0.1]),
                            roles=(0, 1, 1))
    loss = train.balanced(err, batch, distributed.RunningMean(WORLD), c,
                          distributed.Sums(train.LOGGED["flowmap"]))
    weight = flowmap.time_weight(batch.t, c.time_weight, c.shift)
    torch.testing.assert_close(loss, scale * weight, rtol=0.03, atol=0)


def test_flags_of_the_forward_loss_reach_it():
    c = Config(guidance=2.5, epsilon=0.01, derivative="jvp")
    assert c.forward_settings == meanflow.Settings(2.5, 0.01, "jvp")


# --- backward_sim.py

@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_flow_map_simulation_equals_the_rollout_for_an_exact_map(steps):
    z, _, _ = points()
    grid = flowmap.time_grid(steps, 5.0)
    u = lambda z, t, r: DATA.u(z, t.double(), r.double())
    rollout = flowmap.euler_sample(u, z, grid)
    for k in range(steps):
        z_0 = backward_sim.flow_map_simulation(u, z, grid, k)
        torch.testing.assert_close(z_0, rollout, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps, k, intervals", [
    (1, 0, [(1.0, 0.0)]), (4, 0, [(1.0, 0.75), (0.75, 0.0)]), (4, 3, [(1.0, 0.25), (0.25, 0.0)]),
    (4, 1, [(1.0, 0.75), (0.75, 0.5), (0.5, 0.0)]),
    (50, 20, [(1.0, 0.6), (0.6, 0.58), (0.58, 0.0)])])
def test_flow_map_simulation_makes_at_most_three_calls_all_with_gradient(steps, k, intervals):
    seen, outputs = [], []
    def u(z, t, r):
        seen.append((t[0].item(), r[0].item()))
        outputs.append((z * 0.5).detach().requires_grad_())
        return outputs[-1]
    z_0 = backward_sim.flow_map_simulation(u, torch.ones(2, 3), flowmap.time_grid(steps, 1.0), k)
    assert seen == [pytest.approx(pair, abs=1e-6) for pair in intervals]
    gradients = torch.autograd.grad(z_0.sum(), outputs)
    assert all(gradient.abs().min() > 0 for gradient in gradients)


def test_steps_outside_the_rollout_are_refused():
    for bad in ([0.9, 0.5, 0.0], [1.0, 0.5], [1.0, 0.3, 0.6, 0.0], [1.0, 0.5, 0.5, 0.0]):
        for simulation in backward_sim.SIMULATIONS.values():
            with pytest.raises(ValueError, match="must fall strictly from 1 to 0"):
                simulation(None, torch.zeros(1, 1), bad, 0, None)
    with pytest.raises(ValueError, match="step k = 4 of a rollout of 4"):
        backward_sim.flow_map_simulation(None, torch.ones(1), flowmap.time_grid(4, 1.0), 4)


def test_consistency_simulation_makes_n_calls_and_only_the_last_has_gradient():
    parameter, seen = torch.ones((), requires_grad=True), []
    def u(z, t, r):
        seen.append((t[0].item(), r[0].item(), torch.is_grad_enabled()))
        return parameter * z
    grid = flowmap.time_grid(4, 1.0)
    g = generator("sim")
    def renoise(shape, count=2):
        return torch.randn(count, *shape, generator=g)
    backward_sim.consistency_simulation(u, torch.ones(2, 3), grid, 0, renoise).sum().backward()
    assert seen == [(1.0, 0.0, False), (0.75, 0.0, False), (0.5, 0.0, False), (0.25, 0.0, True)]
    assert parameter.grad.abs() > 0
    z_1 = torch.randn(20000, 2, generator=generator("z"))
    many = partial(renoise, count=20000)
    samples = backward_sim.consistency_simulation(DATA.u, z_1, grid, 0, many)
    assert samples.mean().item() == pytest.approx(DATA.mean, abs=0.015)
    assert samples.std().item() == pytest.approx(DATA.std, rel=0.03)


@pytest.mark.parametrize("name", backward_sim.SIMULATIONS)
def test_every_rollout_is_found_by_name_and_called_alike(name):
    u, renoise = lambda z, t, r: z * 0.5, lambda shape: torch.zeros(2, *shape)
    z_0 = backward_sim.SIMULATIONS[name](u, torch.ones(2, 3), [1.0, 0.5, 0.0], 1, renoise)
    # A jump of d multiplies by 1 - d / 2; re-noising with zeros halves the clean sample.
    assert z_0[0, 0].item() == {"flow-map": 0.75 * 0.75, "consistency": 0.5 * 0.5 * 0.75}[name]


# --- dmd.py

def test_dmd_gradient_between_two_gaussians():
    real, fake = Gaussian(mean=1.0, std=0.5), Gaussian(mean=-0.5, std=0.8)
    z_0, tau, _ = points()
    n = z_0.flip(0)
    gradient = dmd.dmd_gradient(z_0, n, tau, real.u, fake.u)
    z_tau = flowmap.interpolate(z_0, n, tau)
    x_real, x_fake = real.posterior_mean(z_tau, tau), fake.posterior_mean(z_tau, tau)
    expected = (x_fake - x_real) / (z_0 - x_real).abs().mean(1, keepdim=True)
    torch.testing.assert_close(gradient, expected)
    # Going against it moves towards the real mean.
    assert gradient.mean() < 0
    assert dmd.dmd_gradient(z_0, n, tau, real.u, real.u).abs().max() == 0


def test_dmd_loss_has_the_stated_derivative():
    z_0, gradient = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(5, 2, 3).double()
    z_0.requires_grad_()
    loss = dmd.dmd_loss(z_0, gradient)
    torch.testing.assert_close(loss, gradient.square().mean((1, 2)))
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), z_0)[0], 2 * gradient / 6)


def test_fake_score_leaves_the_student_alone_and_is_flow_matching():
    z_0 = torch.randn(4, 3, requires_grad=True)
    parameter = torch.zeros((), requires_grad=True)
    n, tau = torch.randn(4, 3), torch.rand(4)
    err = dmd.fake_score_error(lambda z, t, r: parameter * z, z_0, n, tau)
    torch.testing.assert_close(err, (n - z_0).square().mean(1))
    err.sum().backward()
    assert z_0.grad is None and parameter.grad is not None


def test_dmd_descent_moves_a_gaussian_onto_the_target():
    """A student that shifts and scales noise, under exact scores of both, ends at the target."""
    real = Gaussian(mean=1.0, std=0.5)
    mean, log_std = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([mean, log_std], lr=0.05)
    for step in range(300):
        g = generator("descent", step)
        z_0 = mean + log_std.exp() * torch.randn(256, 4, generator=g)
        fake = Gaussian(mean.item(), log_std.exp().item())
        tau = flowmap.shift_time(torch.rand(256, generator=g), 5.0)
        gradient = dmd.dmd_gradient(z_0, torch.randn(256, 4, generator=g), tau, real.u, fake.u)
        optimizer.zero_grad()
        dmd.dmd_loss(z_0, gradient).mean().backward()
        optimizer.step()
    assert mean.item() == pytest.approx(1.0, abs=0.05)
    assert log_std.exp().item() == pytest.approx(0.5, abs=0.05)


def test_math_attention_is_the_same_network():
    """jvp needs the plain attention kernel; it must be the function that is trained."""
    net, g = small_network(), generator("kernel")
    z, t = torch.randn(4, 2, 48, 2, 2, generator=g), torch.rand(4, generator=g)
    text = torch.randn(4, 3, 64, generator=g)
    with sdpa_kernel(SDPBackend.MATH):
        plain = net(z, t, t / 2, text)
    torch.testing.assert_close(net(z, t, t / 2, text), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("derivative", list(meanflow.DERIVATIVES))
def test_the_target_has_no_gradient(derivative):
    """The gradient of err is 2 (F - target) dF / d parameter: u_c alone has one."""
    parameter = torch.ones((), requires_grad=True)
    network = lambda z, t, r, text: parameter * z * t[:, None]
    z, t, r = torch.ones(4, 3), torch.full((4,), 0.8), torch.full((4,), 0.2)
    text, kept = torch.zeros(4, 1, 1), torch.zeros(4, dtype=torch.bool)
    settings = meanflow.Settings(guidance=1.0, derivative=derivative)
    err = meanflow.meanflow_error(network, z, 2 * z, t, r, text, None, kept, settings)
    gradient, = torch.autograd.grad(err.mean(), parameter)
    z_t, v = 1.8, 1.0
    F, target = z_t * 0.8, v - 0.6 * (z_t + 0.8 * v)             # u = z t along dz / dt = v
    assert gradient.item() == pytest.approx(2 * (F - target) * z_t * 0.8, rel=1e-3)


def test_a_sample_that_the_teacher_leaves_as_it_is_has_a_finite_gradient():
    z = torch.randn(3, 4)
    still, other = lambda z, t, r: torch.zeros_like(z), lambda z, t, r: torch.ones_like(z)
    for fake in (still, other):
        assert dmd.dmd_gradient(z, z, torch.tensor([0.0, 1e-8, 0.0]), still, fake).isfinite().all()
