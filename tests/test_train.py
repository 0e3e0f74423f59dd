"""The loop: same seed same bits, resume, damage, splitting a batch, what a stage takes over."""
import json
import os
import shutil
import signal
from dataclasses import asdict, fields, replace
from itertools import product

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

import checkpoint
import config
import distributed
import dmd
import encoders
import meanflow
import model
import networks
import runs
import toys
import train
from config import TOY_SETS, Config, clips_at, parse_config
from stages import (
    BEFORE,
    FOLDERS,
    STATE,
    assert_same_files,
    flags_of,
    linked,
    no_space,
    rows,
    trained,
)
from test_updates import WORLD


def assert_same_stage(a, b):
    """Weights, training state and losses, to the bit."""
    newest = checkpoint.checkpoints(b)[-1].name
    for file in ("model.safetensors", f"checkpoints/{newest}/{STATE}"):
        assert_same_files(a / file, b / file)
    assert rows(a) == rows(b)


def test_the_rate_rises_in_the_warmup_and_falls_along_a_cosine_to_its_end():
    c = Config(steps=100, warmup=10, lr_end=0.1)
    rates = [config.learning_rate(c, step, 2.0) for step in range(101)]
    assert [rates[i] for i in (0, 50, 100)] == pytest.approx([0.2, 1.1, 0.2])
    assert rates[25] == pytest.approx(2 * (0.1 + 0.9 * (1 + 0.5**0.5) / 2))
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)


# The released settings (docs/method.md, 8), written out.
FORWARD = dict(lr=5e-5, beta1=0.9, beta2=0.95, warmup=1000, ema_decay=0.999, ema_start=1000)
DISTILL = dict(lr=2e-6, fake_lr=2e-6, beta1=0.0, beta2=0.999, warmup=0, ema_decay=0.99,
               ema_start=200, real_guidance=4.0, budgets="2,4,8,16,50", cotrain=1.0)
ALWAYS = dict(weight_decay=0.0, clip=1.0, lr_end=1.0, lora_rank=256, lora_alpha=256.0, bf16=True,
              text_drop=0.1, shift=5.0, guidance=3.0, epsilon=0.005, time_weight="beta",
              flow_fraction=0.5, consistency_fraction=0.25)


@pytest.mark.parametrize("form", [[], ["--causal"]])
@pytest.mark.parametrize("preset, steps, batch", [("wan-1.3b", 6000, 32), ("wan-14b", 4000, 16)])
def test_wans_recipe_is_the_released_one(tmp_path, preset, steps, batch, form):
    for stage in ("flowmap", "distill") if form else ("pretrain", "flowmap", "distill"):
        base = ["--base", "weights"] if stage == "pretrain" else []
        c = parse_config(["--preset", preset, "--stage", stage, *form, *base, "--run-dir",
                          str(tmp_path)])
        expected = ALWAYS | {"batch_size": batch}
        expected |= DISTILL if stage == "distill" else FORWARD | {"steps": steps}
        expected |= {"chunks": "1,3,3,3,3,3,3,2", "full_chunks": 3} if form else {}
        if form and stage == "flowmap":
            expected["bidirectional_fraction"] = 0.1
        assert {name: getattr(c, name) for name in expected} == expected
        assert stage != "distill" or 800 <= c.steps <= 1200


@pytest.mark.parametrize("stage", ["flowmap", "causal-distill"])
def test_interrupted_and_resumed_equals_uninterrupted(finished, tmp_path, stage, monkeypatch):
    """Killed between two checkpoints: the updates since the last one are lost and made again. So
    the same seed gives the same bits, too."""
    run = linked(finished, tmp_path / "run", stage)
    every = config.RECIPES["tiny"][stage.removeprefix("causal-")]["save_every"]
    update, count = checkpoint.Trainable.update_ema, [0]

    class Killed(Exception):
        pass

    def kill(self, decay):
        count[0] += 1
        if count[0] == every + 2:
            raise Killed
        update(self, decay)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Trainable, "update_ema", kill)
        with pytest.raises(Killed):
            trained(run, stage, "--log-every", "1")
    assert [path.name for path in checkpoint.checkpoints(run / stage)] == [f"{every:08d}"]
    assert not (run / stage / "model.safetensors").exists()
    with open(run / stage / "log.jsonl", "a") as file:
        file.write('{"step": 3, "lo')                            # a row that was being written
    trained(run, stage, "--log-every", "1")
    assert_same_stage(run / stage, finished / stage)


def test_a_stage_with_an_added_time_embedding_goes_on(finished, tmp_path):
    """By its own record, without the flag; and the stage after with what its weights have."""
    whole = linked(finished, tmp_path / "whole", "flowmap")
    trained(whole, "flowmap", "--time-embedding", "added", "--steps", "3", "--save-every", "1")
    run = tmp_path / "run"
    shutil.copytree(whole, run, symlinks=True)
    (run / "flowmap" / "model.safetensors").unlink()
    shutil.rmtree(checkpoint.checkpoints(run / "flowmap")[-1])
    trained(run, "flowmap")
    assert_same_stage(run / "flowmap", whole / "flowmap")
    for stage in (run / "flowmap", trained(run, "distill", "--steps", "1")):
        assert checkpoint.load_model(stage)[0].added


def test_another_seed_other_bits(finished, tmp_path):
    """The flag arrives; tests/test_updates.py has the draws of updates and of fresh weights."""
    other = trained(tmp_path / "run", "pretrain", "--seed", "1", "--steps", "1", "--log-every", "1")
    assert rows(other)[0]["grad_norm"] != rows(finished / "pretrain")[0]["grad_norm"]


@pytest.fixture(scope="module")
def saved(finished, tmp_path_factory):
    """Stage flowmap with checkpoints after the second of three updates and after the last."""
    run = linked(finished, tmp_path_factory.mktemp("runs") / "saved", "flowmap")
    trained(run, "flowmap", "--save-every", "1", "--steps", "3")
    return run


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no record", "flipped record",
                                    "half-written"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(saved, tmp_path, damage, capsys):
    run = tmp_path / "run"
    shutil.copytree(saved, run, symlinks=True)
    folder = run / "flowmap"
    newest = checkpoint.checkpoints(folder)[-1]
    state, record = (newest / STATE).read_bytes(), (newest / "state.json").read_text()
    if damage == "truncated":
        (newest / STATE).write_bytes(state[:-9])
    elif damage == "flipped":
        (newest / STATE).write_bytes(state[:-9] + bytes([state[-9] ^ 4]) + state[-8:])
    elif damage == "no record":
        (newest / "state.json").unlink()
    elif damage == "flipped record":
        (newest / "state.json").write_text(record.replace('"skipped": 0', '"skipped": 1'))
    else:
        newest.rename(newest.with_name(newest.name + ".partial"))    # killed before the rename
    (folder / "model.safetensors").unlink()
    trained(run, "flowmap")
    out = capsys.readouterr()
    assert (f"{newest} is damaged" in out.out + out.err) == (damage != "half-written")
    assert_same_stage(folder, saved / "flowmap")
    for path in checkpoint.checkpoints(folder):
        (path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="every checkpoint in .* is damaged"):
        trained(run, "flowmap", "--steps", "4")


def test_a_full_disk_keeps_the_last_checkpoint(finished, tmp_path, monkeypatch):
    run = linked(finished, tmp_path / "run", "flowmap")
    save, calls = safetensors.torch.save, []

    def full(tensors, **options):                                # turns a shard into bytes
        calls.append(tensors)
        if len(calls) == 2:
            no_space([])
        return save(tensors, **options)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save", full)
        with pytest.raises(OSError, match="No space left on device.*00000006 is kept. Make room"):
            trained(run, "flowmap", "--log-every", "1")
    assert [path.name for path in checkpoint.checkpoints(run / "flowmap")] == ["00000006"]
    trained(run, "flowmap", "--log-every", "1")
    assert_same_stage(run / "flowmap", finished / "flowmap")


def test_a_restart_of_a_fresh_start_goes_on(finished, tmp_path, monkeypatch, capsys):
    """torchrun and SLURM start the same command once more; another launch with --fresh does start
    anew."""
    run = linked(finished, tmp_path / "run", "flowmap")
    trained(run, "flowmap", "--steps", "1")
    launches = [({"SLURM_JOB_ID": "7"}, False), ({"SLURM_JOB_ID": "7"}, False),
                ({"SLURM_RESTART_COUNT": "1"}, True), ({"SLURM_JOB_ID": "8"}, False),
                ({"TORCHELASTIC_RUN_ID": "none"}, False), ({}, True)]
    for i, (variables, resumed) in enumerate(launches):          # each adds to the environment
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        trained(run, "flowmap", "--fresh", "--steps", str(1 + i))
        out = capsys.readouterr()
        assert (f"resumed from update {i}" in out.out + out.err) == resumed
    # In each container torchrun may be process 1, of the run "none".
    before = distributed.launch()
    assert distributed.is_restart(before) and before["torchrun"].split()[-1].isdecimal()
    monkeypatch.setattr(distributed, "begin_of", lambda process: "0")
    assert not distributed.is_restart(before)


def test_a_stage_whose_teacher_changed_is_not_gone_on_with(tmp_path):
    run = tmp_path / "run"
    for stage in BEFORE["distill"] + ("distill",):
        trained(run, stage, "--steps", "1")
    trained(run, "pretrain", "--steps", "1", "--seed", "5", "--fresh")
    changed = f"was started on other weights than {run / 'pretrain'} holds now: use --fresh"
    for stage in ("distill", "flowmap"):
        with pytest.raises(ValueError, match=changed):
            trained(run, stage, "--steps", "2")
    trained(run, "flowmap", "--steps", "2", "--fresh")
    with pytest.raises(ValueError, match="was started on other weights than .*holds now"):
        trained(run, "distill", "--steps", "2")
    trained(run, "distill", "--steps", "1", "--fresh")


def test_signals_are_noted_until_the_run_has_saved():
    world, before = distributed.World(0, 1, torch.device("cpu")), signal.getsignal(signal.SIGTERM)
    stopping = distributed.StopSignal()
    assert not stopping.on_any_rank(world)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        assert signal.getsignal(number) == stopping.note         # else the next line would end this
        os.kill(os.getpid(), number)
        assert stopping.on_any_rank(world)
    stopping.restore()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("stage, words", [("pretrain", "train.py --stage pretrain"),
                                          ("causal-flowmap", "train.py --causal --stage flowmap")])
def test_a_signal_ends_a_run_after_its_update_and_it_goes_on(finished, tmp_path, stage, words,
                                                             monkeypatch, capsys):
    """What it printed is the command that goes on, to the same bits as never stopped."""
    run, update = linked(finished, tmp_path / "run", stage), train.update

    def signalled(c, nets, parts, batches, step, world, log):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(c, nets, parts, batches, step, world, log)
    monkeypatch.setattr(train, "update", signalled)
    trained(run, stage, "--log-every", "1")
    out = capsys.readouterr().out
    assert "stopped by a signal after update 5 of" in out and f"python {words} --run-dir" in out
    assert checkpoint.checkpoints(run / stage)[-1].name == "00000005"
    train.train(parse_config(out.split("train.py ")[-1].split()))
    assert_same_stage(run / stage, finished / stage)


@pytest.mark.parametrize("form", ["", "causal-"])
def test_no_stage_draws_what_another_drew(finished, tmp_path, form, monkeypatch):
    """Noise, times, roles, budgets and the order of the data; only fresh weights are a function of
    the seed alone."""
    drawn, generator, draw = {}, distributed.generator, encoders.Encoded.draw

    def noted(*keys):
        drawn[stage].add(keys)
        return generator(*keys)

    def noted_draw(self, indices, seed):
        drawn[stage].update(("clip", seed, index) for index in indices)
        return draw(self, indices, seed)
    monkeypatch.setattr(distributed, "generator", noted)
    monkeypatch.setattr(encoders.Encoded, "draw", noted_draw)
    for stage in ("pretrain", f"{form}flowmap", f"{form}distill"):
        drawn[stage] = set()
        trained(linked(finished, tmp_path / stage, stage), stage, "--steps", "2")
        drawn[stage] = {keys for keys in drawn[stage] if "init" not in keys}
        clips = [keys for keys in drawn[stage] if keys[0] == "clip"]
        assert len(clips) == 16 and len(drawn[stage]) > 32
    assert sum(map(len, drawn.values())) == len(set().union(*drawn.values()))


@pytest.mark.parametrize("stage", [
    "distill", pytest.param("causal-distill", marks=pytest.mark.slow)])
def test_a_fresh_rollout_leaves_the_weights_sharded_for_the_checkpoint(finished, tmp_path, stage):
    """Its calls, without gradient, are the student's last of an update. With bf16 one process
    shards, too."""
    for name, ends in (("whole", ("2",)), ("run", ("1", "2"))):
        run = linked(finished, tmp_path / name, stage)
        for steps in ends:
            trained(run, stage, "--fake-rollout", "fresh", "--bf16", "--log-every", "1", "--steps",
                    steps)
    assert_same_stage(tmp_path / "run" / stage, tmp_path / "whole" / stage)


CONSISTENCY = ("--rollout", "consistency", "--budgets", "2,4")
TEACHERS = ("--velocity", "teacher", "--balance", "0.1")


@pytest.mark.parametrize("stage, more", [*((stage, ()) for stage in FOLDERS),
                                         ("flowmap", TEACHERS), ("distill", TEACHERS),
                                         ("distill", CONSISTENCY),
                                         pytest.param("causal-distill", CONSISTENCY,
                                                      marks=pytest.mark.slow)])
def test_accumulation_reproduces_the_whole_batch(finished, tmp_path, stage, more):
    steps = 2 if "distill" in stage else 4
    flags, whole = ("--log-every", "1", "--steps", str(steps), *more), finished / stage
    if more:
        whole = trained(linked(finished, tmp_path / "whole", stage), stage, *flags)
    split = trained(linked(finished, tmp_path / "run", stage), stage, "--micro-batch", "4", *flags)
    assert len(rows(split)) == steps
    # A student that starts as its teacher has errors of 1e-5, differences of numbers near 1.
    for a, b in zip(rows(split), rows(whole)):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7 if more == TEACHERS else 0)


def test_a_file_written_one_tensor_at_a_time_is_the_library_s(tmp_path):
    tensors = {"b": torch.randn(5, 3).bfloat16().T, "a": torch.arange(4.0),
               "count": torch.tensor(7), "empty": torch.zeros(0, 2)}
    checkpoint.write_tensors(tmp_path / "x", tensors, {"config": "{1}"})
    found = load_file(tmp_path / "x")
    assert safetensors.safe_open(tmp_path / "x", "pt").metadata()["config"] == "{1}"
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype


def test_an_added_time_embedding_is_trained_and_kept_by_the_stage_after(finished, tmp_path):
    run, added = linked(finished, tmp_path / "run", "flowmap"), ("--time-embedding", "added")
    trained(run, "flowmap", *added)
    trained(run, "distill", "--lr", "1e-9")
    (c, state, _), (kept, after, _) = (checkpoint.load_model(run / stage)
                                       for stage in ("flowmap", "distill"))
    assert c.added and kept.added
    # From zero, by 12 updates of at most 1e-3; E's are larger from the start.
    first, second = (state[f"{name}.down.weight"].abs().max() for name in ("time_embed", "r_embed"))
    assert 0 < second < 0.02 < first
    for name in state:
        torch.testing.assert_close(after[name], state[name], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="has an interpolated one"):
        trained(tmp_path / "other", "flowmap", *added, "--base", str(finished / "flowmap"))


def test_a_global_batch_of_one_trains(finished, tmp_path):
    """Two of the three roles are empty in every update."""
    for stage in ("flowmap", "distill"):
        run = linked(finished, tmp_path / stage, stage)
        found = rows(trained(run, stage, "--batch-size", "1", "--log-every", "1"))
        assert found[-1]["skipped"] == 0
        assert all(value == value for row in found for value in row.values())


def test_a_fake_score_that_is_no_number_ends_the_run(finished, tmp_path, monkeypatch):
    run, original = linked(finished, tmp_path / "run", "distill"), dmd.fake_score_error
    monkeypatch.setattr(dmd, "fake_score_error", lambda *args: original(*args) * torch.nan)
    with pytest.raises(SystemExit, match="2 non-finite gradients in a row.*--fake-lr"):
        trained(run, "distill", "--max-skips", "2")


def test_non_finite_updates_change_nothing_and_end_the_run(finished, tmp_path, monkeypatch):
    run, calls = linked(finished, tmp_path / "run", "flowmap"), [0]
    original = meanflow.meanflow_error

    def poisoned(*args, **kwargs):
        calls[0] += 1
        return original(*args, **kwargs) * (float("nan") if calls[0] >= 9 else 1.0)
    monkeypatch.setattr(meanflow, "meanflow_error", poisoned)
    ends = "3 non-finite gradients in a row.*00000010 is kept; .*with a lower --lr"
    with pytest.raises(SystemExit, match=ends):
        trained(run, "flowmap", "--max-skips", "3", "--save-every", "1")
    state, before = (load_file(folder / STATE)
                     for folder in checkpoint.checkpoints(run / "flowmap")[::-1])
    assert state["student.step.head.bias"] == 8      # of ten updates
    assert all(torch.equal(state[name], before[name]) for name in state)
    calls[0] = -100                                  # now healthy again: the same command goes on
    trained(run, "flowmap", "--max-skips", "3")


def test_run_folder_says_how_it_was_made(finished):
    record = json.loads((finished / "flowmap" / "config.json").read_text())
    assert record["config"]["steps"] == config.RECIPES["tiny"]["flowmap"]["steps"]
    assert record["git"] and record["built_on"].keys() == {"student"}
    logged = {"err_flow", "err_consistency", "err_free", "loss", "grad_norm"}
    found = {name for row in rows(finished / "flowmap") for name in row}
    assert found == logged | {"step", "lr", "skipped"}
    found = {name for row in rows(finished / "causal-distill") for name in row}
    assert found > logged | {"dmd", "dmd_gradient", "fake", "fake_grad_norm"}


def test_a_finished_stage_is_reused_and_other_settings_are_refused(finished):
    before = (finished / "flowmap" / "model.safetensors").stat().st_mtime_ns
    trained(finished, "flowmap")
    assert (finished / "flowmap" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="was started with clip = 1.0, not 0.5.*--fresh"):
        trained(finished, "flowmap", "--clip", "0.5")


# --- what a stage takes over

# Settings that the stage after does not take over, by the reason why.
OF_ONE_STAGE = {
    "says which stage, and where": ("stage", "causal", "run_dir"),
    "weights that stand in place of an earlier stage; a later one has that stage": ("base",),
    "is asked for once": ("fresh",),
    "of the machine, which may be another, with room for other micro-batches": (
        "device", "shard", "compile", "checkpointing", "deterministic", "micro_batch"),
    "how long and how fast: each stage has its own in the recipe": (
        "steps", "batch_size", "lr", "lr_end", "warmup", "beta1", "beta2", "weight_decay", "clip",
        "ema_decay", "ema_start"),
    "of a loss that flowmap alone has": ("bidirectional_fraction", "tangent_warmup"),
    "is in the weights that a later stage starts from": ("time_embedding",),
    "of distill, after which there is none": (
        "rollout", "budgets", "real_guidance", "cotrain", "fake_lr", "fake_rollout"),
    "bookkeeping, which changes no result": ("save_every", "log_every", "max_skips"),
}


def test_every_setting_is_taken_over_or_is_of_one_stage():
    """For a new one, decide: of the run, of the flow map, or of one stage, and why."""
    named = [*config.OF_THE_RUN, *config.OF_THE_FLOW_MAP]
    for names in OF_ONE_STAGE.values():
        named += names
    assert sorted(named) == sorted(field.name for field in fields(Config))


def test_a_setting_newer_than_a_stage_is_at_its_default_when_it_goes_on(tmp_path):
    c = parse_config(["--stage", "flowmap", "--run-dir", str(tmp_path), "--clip", "0.5"])
    assert c.lr_end == config.RECIPES["toy"]["flowmap"]["lr_end"] < 1
    begun(tmp_path, c)
    file = tmp_path / "flowmap" / "config.json"
    record = json.loads(file.read_text())
    del record["config"]["lr_end"]
    file.write_text(json.dumps(record))
    again = parse_config(["--stage", "flowmap", "--run-dir", str(tmp_path)])
    assert (again.lr_end, again.clip, again.steps) == (1, 0.5, c.steps)


def begun(run, c: Config):
    """The record of a stage that was begun with these settings."""
    folder = run / config.folder_of(c.stage, c.causal)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": asdict(c)}))


def another(field):
    """A value that is not the default."""
    words = {"data": "loop", "chunks": "2,2", "budgets": "3", "base": "b", "run_dir": "r"}
    if field.name in words:
        return words[field.name]
    if "choices" in field.metadata:
        return [value for value in field.metadata["choices"] if value != field.default][0]
    if type(field.default) is float:
        return field.default / 2 or 0.5
    return not field.default if type(field.default) is bool else field.default + 1


@pytest.mark.parametrize("form", [[], ["--causal"]])
@pytest.mark.parametrize("stage", ["pretrain", "flowmap"])
def test_the_next_stage_takes_these_over_and_no_others(tmp_path, stage, form):
    values = {field.name: another(field) for field in fields(Config)}
    if form:
        values["velocity"] = "data"                  # a teacher of whole clips has no other
    if stage == "flowmap":
        values["derivative"] = "finite-difference"   # the other one is not for bf16
    before = Config(**values | {"stage": stage, "causal": bool(form)})
    begun(tmp_path / "run", before)
    after = {"pretrain": "flowmap", "flowmap": "distill"}[stage]
    flags = ["--stage", after, *form, "--run-dir"]
    found = parse_config([*flags, str(tmp_path / "run")])
    plain = parse_config([*flags, str(tmp_path / "other"), "--preset", before.preset])
    of_the_map = config.OF_THE_FLOW_MAP if stage == "flowmap" else ()
    for name in values.keys() - {"run_dir", "real_guidance"}:
        taken = name in config.OF_THE_RUN or name in of_the_map
        assert getattr(found, name) == getattr(before if taken else plain, name), name


@pytest.mark.parametrize("form", [[], ["--causal"]])
def test_distill_co_trains_with_the_forward_loss_of_flowmap(tmp_path, form):
    flags = ["--guidance", "3", "--time-weight", "uniform", "--derivative", "jvp",
             "--consistency-fraction", "0.5", "--flow-times", "either"]
    run = ["--run-dir", str(tmp_path), *form]
    begun(tmp_path, parse_config([*run, "--stage", "flowmap", *flags]))
    c = parse_config([*run, "--stage", "distill"])
    found = (c.guidance, c.time_weight, c.derivative, c.consistency_fraction, c.flow_times)
    assert found == (3.0, "uniform", "jvp", 0.5, "either")
    assert parse_config([*run, "--stage", "distill", "--guidance", "4"]).guidance == 4.0


def test_dmd_has_the_guidance_of_the_flow_map_unless_told(tmp_path):
    run, wan = ["--run-dir", str(tmp_path)], ["--preset", "wan-1.3b"]
    assert parse_config(["--stage", "distill"]).real_guidance == 1.0
    assert parse_config(["--stage", "distill", *wan]).real_guidance == 4.0
    assert parse_config(["--stage", "distill", *wan, "--guidance", "5"]).real_guidance == 5.0
    begun(tmp_path, parse_config([*run, "--stage", "flowmap", "--guidance", "3"]))
    assert parse_config([*run, "--stage", "distill"]).real_guidance == 3.0
    told = parse_config([*run, "--stage", "distill", "--real-guidance", "2"])
    assert (told.guidance, told.real_guidance) == (3.0, 2.0)
    begun(tmp_path, told)
    assert parse_config([*run, "--stage", "distill"]).real_guidance == 2.0


def test_help_names_the_default_where_it_comes_from():
    text = {field.name: config.default_text(field) for field in fields(Config)}
    assert text["flow_times"] == "default either"
    assert text["tangent_warmup"] == "default flowmap 500, causal flowmap 0"
    assert text["cotrain"] == "default 4.0"
    assert text["guidance"] == "default 1.0"
    assert text["steps"].startswith("default pretrain 12000, flowmap 2200, distill 990, causal")


def test_later_stages_inherit_the_data(tmp_path):
    trained(tmp_path / "run", "pretrain", "--data", "digits", "--steps", "1")
    c = parse_config(["--stage", "flowmap", "--run-dir", str(tmp_path / "run")])
    assert c.data == "digits" and c.preset == "tiny"
    assert parse_config(["--causal", "--stage", "flowmap"]).run_dir == "runs/toy-shapes"


def test_flowmap_goes_on_with_a_flow_map(finished, tmp_path):
    """As with AnyFlow's weights: no stage pretrain, and the trained second time embedder is
    kept."""
    before, flags = finished / "flowmap", ("--steps", "1", "--lr", "1e-12", "--ema-start", "0")
    stage = trained(tmp_path / "run", "flowmap", "--base", str(before), *flags)
    for file in ("model.safetensors", "codec.safetensors"):
        assert_same_files(stage / file, before / file)
    state = load_file(stage / "model.safetensors")
    assert not torch.equal(state["r_embed.up.weight"], state["time_embed.up.weight"])
    with pytest.raises(ValueError, match="distill needs stage pretrain"):
        trained(tmp_path / "run", "distill")


def test_a_causal_student_starts_from_the_bidirectional_teacher(finished, tmp_path):
    """A second time embedder that is the first's copy, and a compressed patch embedding of the
    teacher's own, made coarser."""
    run = linked(finished, tmp_path / "run", "causal-flowmap")
    folder = trained(run, "causal-flowmap", "--steps", "1", "--lr", "1e-9")
    mine, before = (load_file(path / "model.safetensors") for path in (folder, run / "pretrain"))
    start = {name.removeprefix("patch_embed."): tensor for name, tensor in before.items()
             if name.startswith("patch_embed.")}
    expected = dict(before)
    for name, tensor in model.compressed_patch_embed(start).items():
        expected[f"far_patch_embed.{name}"] = tensor
    for name in ("up.weight", "up.bias", "down.weight", "down.bias"):
        expected[f"r_embed.{name}"] = before[f"time_embed.{name}"]
    assert mine.keys() == expected.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-8)
    assert_same_files(folder / "codec.safetensors", run / "pretrain" / "codec.safetensors")


def test_clips_that_compressed_chunks_cannot_take_are_refused_before_training(tmp_path):
    run = tmp_path / "run"
    trained(run, "pretrain", "--size", "12", "--steps", "1")     # latents of 3 x 3
    with pytest.raises(ValueError, match="takes multiples of 2: .* another size, or .*-chunks 0"):
        trained(run, "causal-flowmap", "--steps", "1")
    trained(run, "causal-flowmap", "--steps", "1", "--full-chunks", "0")


def test_what_is_saved_is_the_moving_average_from_its_start_on(tmp_path, monkeypatch):
    seen, update = [], train.update

    def noted(c, nets, *args):
        norms = update(c, nets, *args)
        seen.append({n: p.detach().clone() for n, p in nets["student"].named_parameters()})
        return norms
    monkeypatch.setattr(train, "update", noted)
    stage = trained(tmp_path / "run", "pretrain", "--steps", "5", "--ema-start", "2",
                    "--ema-decay", "0.75", "--lr", "0.1")
    expected = seen[1]
    for weights in seen[2:]:
        expected = {n: 0.75 * expected[n] + 0.25 * weights[n] for n in weights}
    for name, tensor in load_file(stage / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name])


def test_scores_start_as_the_teacher_and_the_student_as_the_flow_map(finished):
    c = parse_config(flags_of(finished, "distill"))
    found = networks.find_weights(c)
    nets = networks.build(c, found.config, WORLD, found.below)
    networks.fill(nets, found, c, WORLD)
    for name, stage in (("student", "flowmap"), ("teacher", "pretrain"), ("fake", "pretrain")):
        expected = load_file(finished / stage / "model.safetensors")
        for key, p in nets[name].named_parameters():
            assert torch.equal(p, expected[key]), (name, key)


def test_a_step_clips_the_gradient_and_has_the_rate_it_is_given():
    net = torch.nn.Linear(2, 1, bias=False)
    part = checkpoint.Trainable(net, 9.0, (0.0, 0.5), 0.0, False)
    before, net.weight.grad = net.weight.detach().clone(), torch.tensor([[30.0, -40.0]])
    assert train.optimizer_step(part, 0.01, 1.0) == pytest.approx(50)
    average = part.optimizer.state[net.weight]["exp_avg"]
    torch.testing.assert_close(average, torch.tensor([[0.6, -0.8]]))
    torch.testing.assert_close(net.weight - before, torch.tensor([[-0.01, 0.01]]), rtol=1e-3,
                               atol=0)


def test_a_signal_ends_what_comes_before_training_at_once(tmp_path, monkeypatch):
    """Videos may be decoded for hours there."""
    before = signal.getsignal(signal.SIGTERM)

    def opened(c, fresh):
        assert signal.getsignal(signal.SIGTERM) is before
        raise ValueError("decoding")
    monkeypatch.setattr(runs, "open_source", opened)
    with pytest.raises(ValueError, match="decoding"):
        trained(tmp_path / "run", "pretrain")


def test_a_folder_that_is_named_as_a_toy_set_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert clips_at("./digits") == clips_at("digits/") == str(tmp_path / "digits")
    assert clips_at("digits") == "digits" and clips_at("clips/") == "clips"
    assert set(TOY_SETS) == set(toys.SETS)


def test_a_teacher_that_is_trained_anew_keeps_its_clips(tmp_path):
    words, stage = ["--stage", "pretrain", "--run-dir", str(tmp_path)], tmp_path / "pretrain"
    stage.mkdir()
    record = {"config": asdict(Config(stage="pretrain", preset="tiny", data="loop", lr=0.5))}
    (stage / "config.json").write_text(json.dumps(record))
    c = parse_config([*words, "--fresh"])
    assert (c.preset, c.data) == ("tiny", "loop") and c.lr != 0.5
    (stage / "config.json").write_text("{")
    assert parse_config([*words, "--fresh"]).data == "shapes"        # nothing is known of it
    with pytest.raises(ValueError, match="config.json"):
        parse_config(words)


def test_a_record_of_an_unknown_choice_is_refused(tmp_path):
    (tmp_path / "flowmap").mkdir()
    file = tmp_path / "flowmap" / "config.json"
    file.write_text(json.dumps({"config": asdict(Config(flow_times="none"))}))
    with pytest.raises(ValueError, match="flow_times missing or of another kind"):
        parse_config(["--stage", "flowmap", "--run-dir", str(tmp_path)])


def test_the_working_folder_is_no_base(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps({"config": {"size": 32}}))
    monkeypatch.chdir(tmp_path)
    assert parse_config(["--run-dir", str(tmp_path / "run")]).size == 16
    with pytest.raises(SystemExit):
        parse_config(["--stage", "distill", "--budgets", "", "--run-dir", str(tmp_path / "run")])


def test_help_names_the_choices(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    assert "--time-weight {beta,uniform,normal}" in capsys.readouterr().out


def test_a_new_rank_has_its_own_alpha(tmp_path):
    (tmp_path / "pretrain").mkdir()
    before = asdict(Config(lora_rank=256, lora_alpha=256.0))
    (tmp_path / "pretrain" / "config.json").write_text(json.dumps({"config": before}))
    words = ["--stage", "flowmap", "--run-dir", str(tmp_path)]
    for flags, expected in (([], (256, 256)), (["--lora-rank", "64"], (64, 64)),
                            (["--lora-rank", "64", "--lora-alpha", "9"], (64, 9))):
        c = parse_config([*words, *flags])
        assert (c.lora_rank, c.lora_alpha) == expected


@pytest.mark.parametrize("name, value", [("frames", 16), ("size", 32), ("shift", 3.0),
                                         ("guidance", 3.0)])
def test_a_base_of_other_settings_is_named(tmp_path, name, value, capsys):
    then = asdict(replace(Config(guidance=1.0), **{name: value}))    # 1: the toy recipe's
    (tmp_path / "config.json").write_text(json.dumps({"config": then}))
    (tmp_path / "model.safetensors").touch()
    words = ["--base", str(tmp_path), "--run-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        parse_config(words)
    assert f"was trained with --{name} {value}" in capsys.readouterr().err
    assert getattr(parse_config([*words, f"--{name}", str(value)]), name) == value


def test_the_released_recipe_of_every_wan_but_the_largest_is_one():
    for stage, causal in product(config.STAGES, (False, True)):
        small, middle = (config.recipe(f"wan-{size}", stage, causal) for size in ("1.3b", "5b"))
        assert small == middle


def test_what_the_machine_needs_may_change_when_a_stage_goes_on():
    begun = asdict(Config())
    for name in ("steps", "lr", "fake_lr", "micro_batch", "device", "checkpointing", "shard",
                 "compile", "deterministic", "save_every", "log_every", "max_skips"):
        assert not runs.change_between(begun, begun | {name: "another"}), name
    for name in ("seed", "batch_size", "guidance", "budgets", "lora_rank", "ema_decay"):
        assert name in runs.change_between(begun, begun | {name: "another"})
