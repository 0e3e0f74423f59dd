"""Times, transitions and samplers against closed forms."""
import pytest
import torch
from torch.distributions import Beta, Normal, Uniform

import flowmap
from closed_form import Gaussian
from distributed import generator
from updates import roles_of

GAUSSIAN = Gaussian(mean=1.5, std=0.3)


def noise(*shape):
    return torch.randn(shape, generator=generator("noise"), dtype=torch.float64)


def test_velocity_is_the_derivative_of_the_path():
    x, n = noise(4, 3), noise(4, 3).flip(0)
    t = torch.linspace(0.1, 0.9, 4, dtype=torch.float64)
    _, tangent = torch.func.jvp(lambda t: flowmap.interpolate(x, n, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(tangent, n - x)


def test_exact_maps_compose():
    z = noise(16, 5)
    t, s, r = (torch.full((16,), time, dtype=torch.float64) for time in (0.9, 0.5, 0.2))
    jump = flowmap.flow_map(GAUSSIAN.u, z, t, r)
    two = flowmap.flow_map(GAUSSIAN.u, flowmap.flow_map(GAUSSIAN.u, z, t, s), s, r)
    torch.testing.assert_close(jump, two)
    torch.testing.assert_close(flowmap.flow_map(GAUSSIAN.u, z, t, t), z)


@pytest.mark.parametrize("grid", [
    flowmap.time_grid(1, 5.0), flowmap.time_grid(2, 5.0), flowmap.time_grid(7, 1.0),
    [1.0, 0.93, 0.2, 0.1, 0.0]])
def test_euler_with_the_exact_average_velocity_is_exact_on_any_grid(grid):
    z = noise(64, 2)
    one, zero = torch.ones(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
    u = lambda z, t, r: GAUSSIAN.u(z, t.double(), r.double())
    grid_error = 1e-6                                       # the sampler hands out times in float32
    sample, exact = flowmap.euler_sample(u, z, grid), GAUSSIAN.map(z, one, zero)
    torch.testing.assert_close(sample, exact, atol=grid_error, rtol=0)


def test_given_first_frames_are_seen_clean_at_time_0_and_do_not_move():
    seen = []

    def u(z, t, r):
        seen.append((z, t, r))
        return torch.ones_like(z)
    z, given = torch.zeros(2, 3, 4), torch.full((2, 1, 4), 7.0)
    z_0 = flowmap.euler_sample(flowmap.first_frames_given(u, given), z, [1.0, 0.5, 0.0])
    for (z_t, t, r), (high, low) in zip(seen, [(1.0, 0.5), (0.5, 0.0)], strict=True):
        assert torch.equal(z_t[:, :1], given)
        assert t.tolist() == [[0.0, high, high]] * 2 and r.tolist() == [[low] * 3] * 2
    assert (z_0[:, 1:] == -1).all() and (z_0[:, :1] == 0).all()


def test_a_draw_of_zero_is_no_role(monkeypatch):
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *shape, **more: rand(*shape, **more) * 0)
    t, r = flowmap.flow_map_times(generator("times"), 8, 5.0)
    assert roles_of(t, r) == (4, 2, 2) and (t > 0).all()


def test_roles_are_counted_and_another_order_is_refused():
    t, r = torch.full((4,), 0.5), torch.tensor([0.5, 0.0, 0.0, 0.2])
    assert roles_of(t, r) == (1, 2, 1) and roles_of(t[:1] * 0, r[1:2]) == (1, 0, 0)
    for order in ([1, 0, 2, 3], [0, 3, 1, 2]):
        with pytest.raises(ValueError, match="rows with r = t must come first"):
            roles_of(t, r[order])


def test_euler_with_the_instantaneous_velocity_converges_at_first_order():
    z = noise(64, 2)
    one, zero = torch.ones(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
    exact = GAUSSIAN.map(z, one, zero)
    v = lambda z, t, r: GAUSSIAN.velocity(z, t.double())
    samples = [flowmap.euler_sample(v, z, flowmap.time_grid(n, 1.0)) for n in (64, 128, 256)]
    errors = [(sample - exact).abs().max().item() for sample in samples]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_consistency_sampler_keeps_the_data_distribution_of_an_exact_map():
    g = generator("renoise")
    renoise = lambda shape: torch.randn(20000, *shape, generator=g)
    z_1, grid = noise(20000, 2).float(), flowmap.time_grid(5, 5.0)
    z = flowmap.consistency_sample(GAUSSIAN.u, z_1, grid, renoise)
    assert z.mean().item() == pytest.approx(GAUSSIAN.mean, abs=0.01)
    assert z.std().item() == pytest.approx(GAUSSIAN.std, rel=0.02)


@pytest.mark.parametrize("name", flowmap.SAMPLERS)
def test_every_sampler_is_found_by_name_and_called_alike(name):
    z, renoise = torch.ones(2, 3), lambda shape: torch.zeros(2, *shape)
    u = lambda z, t, r: z * 0.5
    # A jump of d multiplies by 1 - d / 2; re-noising with zeros halves the clean sample.
    expected = {"euler": 0.75 * 0.75, "consistency": 0.5 * 0.5 * 0.75}[name]
    assert flowmap.SAMPLERS[name](u, z, [1.0, 0.5, 0.0], renoise)[0, 0].item() == expected


def test_grid_and_shift():
    assert flowmap.time_grid(1, 5.0) == [1.0, 0.0]
    assert flowmap.time_grid(4, 1.0) == [1.0, 0.75, 0.5, 0.25, 0.0]
    for shift in (0.1, 0.2, 0.3, 0.45, 3.3):
        flowmap.check_grid(flowmap.time_grid(3, shift))
    assert flowmap.time_grid(2, 5.0)[1] == pytest.approx(5 * 0.5 / 3)
    for grid in ([1.0, 0.5], [0.9, 0.0], [1.0, 0.5, 0.5, 0.0], [1.0], [0.0, 1.0]):
        with pytest.raises(ValueError, match="fall strictly from 1 to 0"):
            flowmap.euler_sample(None, torch.zeros(1), grid)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        flowmap.time_grid(0, 5.0)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 64])
def test_roles_have_their_exact_share_at_every_global_batch(count):
    totals, draws = torch.zeros(3), 4000
    for i in range(draws):
        t, r = flowmap.flow_map_times(generator("roles", i), count, 5.0)
        flow, consistency = r == t, (r == 0) & (r < t)
        assert bool(((0 <= r) & (r <= t) & (t <= 1)).all())
        assert flow.any() or count == 1
        assert bool((flow[:-1] >= flow[1:]).all())                  # the r = t samples come first
        totals += torch.stack([flow, consistency, ~flow & ~consistency]).sum(1)
    shares = totals / (draws * count)
    # Three standard errors of a share, were the roles drawn one by one; stratified ones stray less.
    bound = 3 * (0.25 / (draws * count)) ** 0.5
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.25, 0.25]), atol=bound, rtol=0)


def test_two_draws_that_are_one_do_not_change_roles(monkeypatch):
    """In fp32 the shift may make them one, or swap them."""
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.full(size, 0.7))
    t, r = flowmap.flow_map_times(None, 8, 5.0)
    assert (r == t).tolist() == [True] * 4 + [False] * 4 and bool((r <= t).all())


def test_times_are_the_larger_draw_or_where_asked_either_for_flow_matching_alone():
    count, shift = 100_000, 5.0
    larger = flowmap.flow_map_times(generator("times"), count, shift, 0.3, 0.25)
    either = flowmap.flow_map_times(generator("times"), count, shift, 0.3, 0.25, "either")
    flow = larger[0] == larger[1]
    assert bool((either[0] == either[1]).eq(flow).all())
    for one, other in zip(larger, either):
        torch.testing.assert_close(other[~flow], one[~flow])        # r < t is drawn as before

    # P(t < sigma(a)) is a for one uniform draw and a^2 for the larger of two.
    a = torch.linspace(0.1, 0.9, 9)
    for t, expected in ((larger[0][flow], a**2), (either[0][flow], a)):
        shares = (t < flowmap.shift_time(a, shift)[:, None]).double().mean(1)
        torch.testing.assert_close(shares, expected.double(), atol=4 * 0.5 / len(t)**0.5, rtol=0)


@pytest.mark.parametrize("name", flowmap.TIME_WEIGHTS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("flow_times, either", [("larger", 0.0), ("either", 0.3)])
def test_time_weights_have_mean_one_under_the_training_times(name, shift, flow_times, either):
    t, _ = flowmap.flow_map_times(generator("weights"), 400_000, shift, 0.3, 0.25, flow_times)
    weight = flowmap.time_weight(t.double(), name, shift, either)
    standard_error = weight.std().item() / 400_000**0.5
    assert weight.mean().item() == pytest.approx(1, abs=4 * standard_error + 1e-9)
    alone = flowmap.time_weight(t[:1].double(), name, shift, either)  # not in the batch
    torch.testing.assert_close(alone, weight[:1])


def test_unknown_time_weight_is_named():
    with pytest.raises(ValueError, match="'gamma'.*beta, uniform, normal"):
        flowmap.time_weight(torch.ones(1), "gamma", 5.0)


def test_logit_normal_time_has_its_median_at_the_shifted_half():
    t = flowmap.logit_normal_time(generator("logit"), 100_000, 5.0)
    assert t.median().item() == pytest.approx(5 / 6, abs=0.005) and 0 < t.min() and t.max() < 1


def test_guidance_scale_one_is_the_conditional_output_and_needs_one_pass():
    def no_call(z, t, r):
        raise AssertionError("the empty prompt is not needed")
    z, t = noise(3, 2), torch.ones(3)
    u_c, u_0 = lambda z, t, r: 5 * z, lambda z, t, r: z
    torch.testing.assert_close(flowmap.guided(u_c, no_call, 1.0)(z, t, t), 5 * z)
    torch.testing.assert_close(flowmap.guided(u_c, u_0, 4.0)(z, t, t), 5 * z + 3 * (5 * z - z))


def test_time_weights_are_the_densities_that_they_are_named_for():
    t = torch.linspace(0.05, 0.95, 19)
    laws = {"beta": Beta(2.0, 1.5), "normal": Normal(0.5, 0.25), "uniform": Uniform(0.0, 1.0)}
    assert laws.keys() == flowmap.TIME_WEIGHTS.keys()
    for name, law in laws.items():
        ratio = flowmap.time_weight(t, name, 5.0) / law.log_prob(t).exp()
        torch.testing.assert_close(ratio, ratio[:1].expand(19))


def test_a_free_r_is_the_smaller_of_two_shifted_draws():
    """P(r < sigma(a)) is 1 - (1 - a)^2, and (t, r) are the two draws in order."""
    t, r = flowmap.flow_map_times(generator("free"), 20_000, 3.0, 0.0, 0.0)
    a = torch.linspace(0.1, 0.9, 9)
    level = flowmap.shift_time(a, 3.0)[:, None]
    for times, expected in ((r, 1 - (1 - a) ** 2), (t, a**2)):
        shares = (times < level).float().mean(1)
        torch.testing.assert_close(shares, expected, atol=4 * 0.5 / 20_000**0.5, rtol=0)
