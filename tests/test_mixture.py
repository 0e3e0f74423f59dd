"""The stages of plane.py, trained for seconds and held against the exact flow map."""
import copy
import importlib.util
import sys

import pytest
import torch

import plane
from closed_form import Gaussian
from distributed import generator

Z_1 = plane.draw_noise(generator("test"), clips=128)
EXACT = plane.any_step(plane.exact_u, Z_1, 1)


def errors(measure, u, sampler=plane.any_step):
    """{steps: error} of a model's samples."""
    return {n: measure(sampler(u, Z_1, n), EXACT) for n in (1, 4, 32)}


@pytest.fixture(scope="module")
def stages():
    teacher = plane.pretrain(0, 600)
    flow_map = plane.train_flow_map(teacher, 0, 600)
    return teacher, flow_map, plane.distill(teacher, flow_map, 0, 150)


def test_of_one_gaussian_the_exact_solution_is_the_closed_form(monkeypatch):
    monkeypatch.setattr(plane, "CENTRES", torch.tensor([[0.7, 0.7]]))
    gaussian, t, r = Gaussian(0.7, plane.STD), torch.full((128,), 0.9), torch.full((128,), 0.2)
    assert (plane.exact_velocity(Z_1, t) - gaussian.velocity(Z_1, t)).abs().max() < 1e-5
    assert (plane.exact_u(Z_1, t, r) - gaussian.u(Z_1, t, r)).abs().max() < 1e-5


def test_the_exact_map_gives_the_same_points_in_any_number_of_steps_and_they_are_data():
    assert plane.distance(plane.any_step(plane.exact_u, Z_1, 7), EXACT) < 2e-5
    data = plane.draw_data(generator("data"), clips=128)
    assert abs(plane.energy_distance(data, EXACT)) < 3                              # noise: about 1
    assert abs(plane.energy_distance(EXACT, EXACT)) < 0.01
    assert plane.energy_distance(1.1 * EXACT, EXACT) > 5
    assert plane.energy_distance(EXACT + 0.2, EXACT) > 5


def test_the_flow_map_jumps_in_one_step_where_its_teacher_cannot(stages):
    teacher, flow_map, _ = stages
    before = errors(plane.distance, lambda z, t, r: teacher(z, t, t))
    after = errors(plane.distance, flow_map)
    print(f"\nteacher {before}\nflow map {after}")
    assert after[1] < before[1] / 5
    assert after[4] < before[4] / 1.5
    assert after[32] < 1.5 * before[32]


def test_the_student_is_closer_to_the_data_in_one_step_and_no_worse_in_many(stages):
    _, flow_map, student = stages
    before = errors(plane.energy_distance, flow_map)
    after = errors(plane.energy_distance, student)
    print(f"\nflow map {before}\nstudent {after}")
    assert after[1] < before[1]
    assert after[32] < 1.3 * before[32]
    # Co-training keeps the student on the flow: without it this ratio is 1.4 to 2.
    off = plane.distance(plane.any_step(student, Z_1, 32), EXACT)
    assert off < 1.25 * plane.distance(plane.any_step(flow_map, Z_1, 32), EXACT)


def test_the_scores_alone_move_samples_back_to_the_data(stages, monkeypatch):
    monkeypatch.setattr(plane, "flow_map_loss", lambda net, g: 0)                   # it sees data
    teacher, flow_map = stages[0], copy.deepcopy(stages[1])
    flow_map.layers[-1].bias += 0.3
    before = errors(plane.energy_distance, flow_map)
    after = errors(plane.energy_distance, plane.distill(teacher, flow_map, 0, 100))
    print(f"\nmoved away {before}\nmoved back {after}")
    for steps in before:
        assert after[steps] < before[steps] / 5


def test_with_more_steps_the_consistency_sampler_gets_worse_and_the_any_step_one_does_not(stages):
    student = stages[2]
    consistency = errors(plane.energy_distance, student, plane.consistency)
    any_step = errors(plane.energy_distance, student)
    print(f"\nconsistency {consistency}\nany step {any_step}")
    assert consistency[4] < 2 * consistency[1]
    assert consistency[32] > 2 * consistency[4]
    assert any_step[32] < 1.2 * any_step[4]


def test_a_seed_gives_one_result_and_no_other_randomness_is_touched():
    def weights(seed):
        teacher = plane.pretrain(seed, 2)
        student = plane.distill(teacher, plane.train_flow_map(teacher, seed, 2), seed, 2)
        return torch.cat([p.flatten() for p in student.parameters()])
    state = torch.get_rng_state()
    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))
    assert torch.equal(state, torch.get_rng_state())


def test_a_short_run_prints_its_tables_and_draws_if_it_can(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plane, "STEPS", (1, 2))
    picture = tmp_path / "new" / "plane.png"
    plane.main(["--updates", "0.01", "--out", str(picture)])
    assert capsys.readouterr().out.count("| exact flow map | 0.00 | 0.00 |") == 2
    assert picture.exists() == bool(importlib.util.find_spec("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not plane.draw_figure(picture, {}, {}, {}, Z_1)
