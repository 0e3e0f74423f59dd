"""The loop: same seed same bits, resume, splitting a batch, two processes, errors that say what to do."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

import checkpoint
import distributed
import kill
import sample
import train
import eval as evaluation

ROOT = Path(__file__).parent.parent
STAGES = train.STAGES


def run_stage(run, stage, *flags):
    return train.train(train.parse_config(["--preset", "tiny", "--stage", stage, "--run-dir", str(run), *flags]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All three stages of the tiny preset, trained without interruption."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    for stage in STAGES:
        run_stage(run, stage)
    return run


CAUSAL = ("--causal", "--full-chunks", "2", "--checkpointing")


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """The same for a causal network."""
    run = tmp_path_factory.mktemp("runs") / "causal"
    for stage in STAGES:
        run_stage(run, stage, *CAUSAL)
    return run


@pytest.fixture(scope="module", params=["finished", "causal"])
def either(request):
    """(run, flags that make such a run) of both kinds."""
    return request.getfixturevalue(request.param), CAUSAL if request.param == "causal" else ()


def same_files(a: Path, b: Path):
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


STATE = "shard-00001-model-00001-of-00001.safetensors"          # of a checkpoint by one process


def link_stages(source: Path, target: Path, before: str):
    target.mkdir()
    for stage in STAGES[:STAGES.index(before)]:
        (target / stage).symlink_to(source / stage)


def log_rows(stage: Path) -> list[dict]:
    rows = [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize("stage", STAGES)
def test_same_seed_same_bits_and_another_seed_other_bits(either, tmp_path, stage):
    finished, flags = either
    link_stages(finished, tmp_path / "again", stage)
    run_stage(tmp_path / "again", stage, *flags)
    newest = checkpoint.checkpoints(finished / stage)[-1].name
    same_files(finished / stage / "checkpoints" / newest / STATE,
               tmp_path / "again" / stage / "checkpoints" / newest / STATE)
    assert log_rows(finished / stage) == log_rows(tmp_path / "again" / stage)
    link_stages(finished, tmp_path / "other", stage)
    other = load_file(run_stage(tmp_path / "other", stage, "--seed", "1", *flags) / "model.safetensors")
    mine = load_file(finished / stage / "model.safetensors")
    assert not torch.equal(other["time_proj.weight"], mine["time_proj.weight"])


@pytest.mark.parametrize("stage", STAGES)
def test_interrupted_and_resumed_equals_uninterrupted(either, tmp_path, stage, monkeypatch):
    """Killed between two checkpoints: the updates since the last one are lost and made again, to the bit."""
    finished, flags = either
    link_stages(finished, tmp_path / "run", stage)
    every = train.RECIPES["tiny"][stage]["save_every"]
    update, count = train.checkpoint.Trainable.update_ema, [0]

    class Killed(Exception):
        pass

    def kill(self, decay):
        count[0] += 1
        if count[0] == every + 2:
            raise Killed
        update(self, decay)
    with monkeypatch.context() as patch:
        patch.setattr(train.checkpoint.Trainable, "update_ema", kill)
        with pytest.raises(Killed):
            run_stage(tmp_path / "run", stage, *flags)
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run" / stage)] == [f"{every:08d}"]
    assert not (tmp_path / "run" / stage / "model.safetensors").exists()
    with open(tmp_path / "run" / stage / "log.jsonl", "a") as file:
        file.write('{"step": 3, "lo')                            # a row that was being written
    run_stage(tmp_path / "run", stage, *flags)
    newest = checkpoint.checkpoints(finished / stage)[-1].name
    for file in ("model.safetensors", f"checkpoints/{newest}/{STATE}"):
        same_files(finished / stage / file, tmp_path / "run" / stage / file)
    assert log_rows(finished / stage) == log_rows(tmp_path / "run" / stage)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no record", "flipped record", "half-written"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(finished, tmp_path, damage, capsys):
    link_stages(finished, tmp_path / "run", "flowmap")
    folder = run_stage(tmp_path / "run", "flowmap", "--save-every", "4")
    before, newest = checkpoint.checkpoints(folder)[-2:]
    state = (newest / STATE).read_bytes()
    expected = {name: t.clone() for name, t in load_file(newest / STATE).items()}      # load_file maps the file
    if damage == "truncated":
        (newest / STATE).write_bytes(state[:-9])
    elif damage == "flipped":
        (newest / STATE).write_bytes(state[:-9] + bytes([state[-9] ^ 4]) + state[-8:])
    elif damage == "no record":
        (newest / "state.json").unlink()
    elif damage == "flipped record":
        (newest / "state.json").write_text((newest / "state.json").read_text().replace('"skipped": 0', '"skipped": 1'))
    else:
        newest.rename(newest.with_name(newest.name + ".partial"))          # killed before the rename
    (folder / "model.safetensors").unlink()
    run_stage(tmp_path / "run", "flowmap", "--save-every", "4")
    out = capsys.readouterr()
    assert (f"{newest} is damaged" in out.out + out.err) == (damage != "half-written")
    again = load_file(checkpoint.checkpoints(folder)[-1] / STATE)
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    for path in checkpoint.checkpoints(folder):
        (path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="every checkpoint in .* is damaged"):
        run_stage(tmp_path / "run", "flowmap", "--save-every", "4", "--steps", "13")


def test_a_full_disk_keeps_the_last_checkpoint(finished, tmp_path, monkeypatch):
    link_stages(finished, tmp_path / "run", "flowmap")
    save, calls = safetensors.torch.save, []

    def full(tensors, **options):                                # turns a shard into bytes
        calls.append(tensors)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return save(tensors, **options)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save", full)
        with pytest.raises(OSError, match="No space left on device.*00000004 is kept. Make room"):
            run_stage(tmp_path / "run", "flowmap", "--save-every", "4")
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run" / "flowmap")] == ["00000004"]
    run_stage(tmp_path / "run", "flowmap", "--save-every", "4")
    same_files(tmp_path / "run" / "flowmap" / "model.safetensors", finished / "flowmap" / "model.safetensors")


FAILS_ON_ONE_RANK = """
import os, sys
sys.path.insert(0, {root!r})
import checkpoint, cli, distributed, train

def full(files, sync=checkpoint.sync):
    if os.environ["RANK"] == "1":
        raise OSError(28, "No space left on device")
    sync(files)
checkpoint.sync = full
cli.run(train.main)
"""


def test_a_full_disk_of_one_process_ends_both(tmp_path):
    """Nobody waits for a rank that could not write its shards."""
    (tmp_path / "script.py").write_text(FAILS_ON_ONE_RANK.format(root=str(ROOT)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "script.py"),
               "--preset", "tiny", "--steps", "2", "--run-dir", str(tmp_path / "run")]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert out.returncode and "cannot write" in out.stderr and "No space left on device" in out.stderr
    assert not checkpoint.checkpoints(tmp_path / "run" / "pretrain")


def test_a_restart_of_a_fresh_start_goes_on(finished, tmp_path, monkeypatch, capsys):
    """torchrun and SLURM start the same command once more; another launch with --fresh does start anew."""
    link_stages(finished, tmp_path / "run", "flowmap")
    run_stage(tmp_path / "run", "flowmap", "--steps", "2")
    launches = [({"SLURM_JOB_ID": "7"}, False), ({"SLURM_JOB_ID": "7"}, False), ({"SLURM_RESTART_COUNT": "1"}, True),
                ({"SLURM_JOB_ID": "8"}, False), ({"TORCHELASTIC_RUN_ID": "none"}, False), ({}, True)]
    for i, (variables, resumed) in enumerate(launches):          # what is added to the environment before each try
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        run_stage(tmp_path / "run", "flowmap", "--fresh", "--steps", str(2 + i))
        out = capsys.readouterr()
        assert (f"resumed from update {1 + i}" in out.out + out.err) == resumed


def test_a_stage_whose_teacher_was_trained_anew_is_not_gone_on_with(tmp_path):
    for stage in STAGES[:2]:
        run_stage(tmp_path / "run", stage, "--steps", "2")
    run_stage(tmp_path / "run", "pretrain", "--steps", "2", "--seed", "5", "--fresh")
    with pytest.raises(ValueError, match="started on a stage pretrain with seed = 0, not 5, which was trained anew since: use --fresh"):
        run_stage(tmp_path / "run", "flowmap", "--steps", "4")
    run_stage(tmp_path / "run", "flowmap", "--steps", "2", "--fresh")


def test_signals_are_noted_until_the_run_has_saved():
    world, before = distributed.World(0, 1, torch.device("cpu")), signal.getsignal(signal.SIGTERM)
    stopping = distributed.StopSignal()
    assert not stopping.on_any_rank(world)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        assert signal.getsignal(number) == stopping.note         # else the next line would end this process
        os.kill(os.getpid(), number)
        assert stopping.on_any_rank(world)
    stopping.restore()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("processes, to_workers", [(1, False), (2, False), (2, True)])
def test_a_signal_ends_a_run_cleanly_and_it_goes_on(tmp_path, processes, to_workers):
    """SIGTERM in the middle: exit code 0, a checkpoint, and the command that goes on; then the same bits as never stopped. Or
    SIGUSR1 to the workers alone, as the README's SLURM script does: torchrun then ends well, too."""
    launch = [sys.executable] + (["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes > 1 else [])
    flags = ["--preset", "tiny", "--steps", "400", "--save-every", "1000", "--log-every", "1", "--run-dir"]
    command = [*launch, "train.py", *flags, str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = tmp_path / "run" / "pretrain" / "log.jsonl"
    for _ in range(600):
        if log.exists() and len(log.read_text().splitlines()) > 3:
            break
        time.sleep(0.1)
    if to_workers:
        kill.signal_all(tmp_path / "run", signal.SIGUSR1, "-u")
    else:
        process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=60)[0]
    if processes == 1 or to_workers:                                           # torchrun passes the signal on, and reports it as its own end
        assert process.returncode == 0, out
    assert "stopped by a signal after update" in out and "python train.py --stage pretrain --run-dir" in out
    step = int(checkpoint.checkpoints(tmp_path / "run" / "pretrain")[-1].name)
    assert 3 < step < 400
    if processes == 1:
        train.train(train.parse_config(out.split("train.py ")[-1].split()))
        run_stage(tmp_path / "whole", "pretrain", *flags[2:-1])
        same_files(tmp_path / "run" / "pretrain" / "model.safetensors", tmp_path / "whole" / "pretrain" / "model.safetensors")


def test_no_stage_draws_what_another_drew(finished, tmp_path, monkeypatch):
    """Noise, times, roles, budgets and the order of the data; only fresh weights are a function of the seed alone."""
    drawn, original, clips = {}, distributed.generator, train.encoders.Encoded.draw
    monkeypatch.setattr(distributed, "generator", lambda *keys: drawn[stage].add(keys) or original(*keys))
    monkeypatch.setattr(train.encoders.Encoded, "draw", lambda self, indices, seed: drawn[stage].add(("data", seed, *indices)) or
                        clips(self, indices, seed))
    for stage in STAGES:
        drawn[stage] = set()
        (tmp_path / stage).mkdir()
        link_stages(finished, tmp_path / stage / "run", stage)
        run_stage(tmp_path / stage / "run", stage, "--steps", "2")
        drawn[stage] = {keys for keys in drawn[stage] if "init" not in keys}
        assert len(drawn[stage]) > 16
    assert sum(map(len, drawn.values())) == len(set().union(*drawn.values()))


def test_a_fresh_rollout_leaves_the_weights_sharded_for_the_checkpoint(either, tmp_path):
    """Its calls, without gradient, are the student's last of an update. With bf16 one process shards, too."""
    finished, kind = either
    for name, ends in (("whole", ("6",)), ("run", ("3", "6"))):
        link_stages(finished, tmp_path / name, "distill")
        for steps in ends:
            run_stage(tmp_path / name, "distill", "--fake-rollout", "fresh", "--bf16", "--steps", steps, *kind)
    same_files(*(tmp_path / name / "distill" / "checkpoints" / "00000006" / STATE for name in ("run", "whole")))


@pytest.mark.parametrize("stage, more", [*((stage, ()) for stage in STAGES), ("distill", ("--rollout", "consistency"))])
def test_accumulation_reproduces_the_whole_batch(either, tmp_path, stage, more):
    finished, flags = either[0], (*either[1], *more)
    link_stages(finished, tmp_path / "run", stage)
    run_stage(tmp_path / "run", stage, "--micro-batch", "2", "--log-every", "1", "--steps", "10", *flags)
    link_stages(finished, tmp_path / "whole", stage)
    run_stage(tmp_path / "whole", stage, "--log-every", "1", "--steps", "10", *flags)
    split, whole = log_rows(tmp_path / "run" / stage), log_rows(tmp_path / "whole" / stage)
    for a, b in zip(split, whole, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_two_processes_equal_one(either, tmp_path):
    """FSDP2 over gloo: the same losses for the same global batch, in every stage, and weights that any run can read."""
    _, flags = either
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "tests/stages.py",
               "--preset", "tiny", "--run-dir", str(tmp_path / "run"), "--log-every", "1", "--steps", "10", *flags]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for stage in STAGES:                                         # the same start, one process
        link = tmp_path / f"one-{stage}"
        link_stages(tmp_path / "run", link, stage)
        run_stage(link, stage, "--log-every", "1", "--steps", "10", *flags)
        for a, b in zip(log_rows(tmp_path / "run" / stage), log_rows(link / stage), strict=True):
            assert a == pytest.approx(b, rel=1e-5)
    # Each process makes its part of the clips.
    command = [*command[:5], "sample.py", "--run-dir", str(tmp_path / "run"), "--prompt", "a red circle moving left", "--per-prompt", "3",
               "--steps", "1", "--out", str(tmp_path / "clip.png")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and all(result.stdout.count(f"clip-00{i}.png:") == 1 for i in range(3)), result.stderr
    clips = sample.generate(sample.load_pipeline(tmp_path / "run" / "distill"), ["a red circle moving left"] * 3, [0, 1, 2], [1.0, 0.0])
    for i, clip in enumerate(clips):
        picture = sample.to_pixels(sample.contact_sheet(clip[None]), 64).astype(int)
        assert abs(iio.imread(tmp_path / f"clip-00{i}.png") - picture).max() <= 1


def test_a_file_written_one_tensor_at_a_time_is_the_library_s(tmp_path):
    from safetensors import safe_open
    tensors = {"b": torch.randn(3, 5).bfloat16(), "a": torch.arange(4.0), "count": torch.tensor(7), "empty": torch.zeros(0, 2)}
    checkpoint.write_tensors(tmp_path / "x", {n: (t.shape, t.dtype, lambda t=t: t) for n, t in tensors.items()}, {"config": "{1}"})
    found = load_file(tmp_path / "x")
    assert found.keys() == tensors.keys() and safe_open(tmp_path / "x", "pt").metadata() == {"config": "{1}"}
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items())


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_small_global_batches_train(finished, tmp_path, batch):
    for stage in ("flowmap", "distill"):
        link_stages(finished, tmp_path / stage, stage)
        folder = run_stage(tmp_path / stage, stage, "--batch-size", str(batch), "--log-every", "1")
        rows = log_rows(folder)
        assert rows[-1]["skipped"] == 0 and all(value == value for row in rows for value in row.values())


def test_non_finite_updates_change_nothing_and_end_the_run(finished, tmp_path, monkeypatch):
    link_stages(finished, tmp_path / "run", "flowmap")
    original = train.meanflow.meanflow_error
    calls = [0]

    def poisoned(*args, **kwargs):
        calls[0] += 1
        return original(*args, **kwargs) * (float("nan") if calls[0] >= 9 else 1.0)
    monkeypatch.setattr(train.meanflow, "meanflow_error", poisoned)
    with pytest.raises(SystemExit, match="3 non-finite gradients in a row.*last checkpoint is kept"):
        run_stage(tmp_path / "run", "flowmap", "--max-skips", "3")
    state = load_file(checkpoint.checkpoints(tmp_path / "run" / "flowmap")[-1] / STATE)
    assert all(bool(value.isfinite().all()) for value in state.values())
    calls[0] = -100                                               # now healthy again: the same command goes on
    run_stage(tmp_path / "run", "flowmap", "--max-skips", "3")


def test_run_folder_says_how_it_was_made(finished):
    record = json.loads((finished / "flowmap" / "config.json").read_text())
    assert record["config"]["steps"] == train.RECIPES["tiny"]["flowmap"]["steps"] and record["git"]
    assert {"step", "loss", "err_flow", "err_free", "err_consistency", "grad_norm"} <= log_rows(finished / "flowmap")[0].keys()
    assert {"dmd", "dmd_gradient", "fake", "fake_grad_norm"} <= log_rows(finished / "distill")[0].keys()


def test_a_finished_stage_is_reused_and_other_settings_are_refused(finished):
    before = (finished / "flowmap" / "model.safetensors").stat().st_mtime_ns
    run_stage(finished, "flowmap")
    assert (finished / "flowmap" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="was started with lr = 0.001, not 0.5.*--fresh"):
        run_stage(finished, "flowmap", "--lr", "0.5")


def test_later_stages_inherit_the_data(tmp_path):
    run = tmp_path / "digits"
    run_stage(run, "pretrain", "--data", "digits", "--steps", "2")
    config = train.parse_config(["--stage", "flowmap", "--run-dir", str(run)])
    assert config.data == "digits" and config.preset == "tiny"


@pytest.mark.parametrize("flags, message", [
    (["--stage", "flowmap"], "needs stage pretrain.*First run:.*--stage pretrain"),
    (["--stage", "distill"], "needs stage pretrain.*First run:.*--stage pretrain"),
    (["--batch-size", "5", "--micro-batch", "2"], "not a multiple of 2"),
    (["--data", "shape"], "choose shapes, loop, digits"),
    (["--frames", "7"], "divisible by the patch"),
])
def test_what_cannot_work_says_what_to_do(tmp_path, flags, message):
    config = train.parse_config(["--preset", "tiny", "--run-dir", str(tmp_path / "run"), *flags])
    with pytest.raises(ValueError) as error:
        train.train(config)
    assert __import__("re").search(message, str(error.value), flags=16)
    assert not (tmp_path / "run" / "pretrain" / "checkpoints").exists()


@pytest.mark.parametrize("flags, message", [
    (["--stpes", "5"], "did you mean --steps"), (["--stage", "distil"], "did you mean distill"),
    (["--steps", "0"], "at least 1"), (["--steps", "many"], "invalid int"), (["--lr", "-1"], "above 0"),
    (["--ema-decay", "2"], r"lie in \[0, 1\]"), (["--budgets", "2,x"], "whole numbers"), (["extra"], "unexpected argument"),
    (["--preset", "wam-14b"], "did you mean wan-14b"), (["--preset", "small"], "valid: tiny, toy"), (["--flow-fraction", "0.9"], "together at most 1")])
def test_wrong_flags_name_the_nearest_right_one(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        train.parse_config(flags)
    assert error.value.code == 2
    assert __import__("re").search(message, capsys.readouterr().err)


# --- sample.py and eval.py on the finished run

@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_a_seed_decides_its_clip_whatever_else_is_in_the_batch(finished, sampler):
    pipeline, grid = sample.load_pipeline(finished / "distill"), [1.0, 0.6, 0.0]
    prompts = ["a red circle moving left", "a blue square moving up"]
    both = sample.generate(pipeline, prompts, [3, 4], grid, sampler)
    torch.testing.assert_close(sample.generate(pipeline, prompts[1:], [4], grid, sampler), both[1:], rtol=1e-4, atol=1e-5)
    assert (sample.generate(pipeline, prompts[1:], [5], grid, sampler) - both[1:]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.png"])
def test_clips_are_written(finished, tmp_path, name, capsys):
    sample.main(["--run-dir", str(finished), "--prompt", "a red circle moving left", "--prompt", "a green square moving up",
                 "--out", str(tmp_path / "deep" / name), "--sheet", str(tmp_path / "sheet.png"), "--steps", "3"])
    # Clips of 16 x 16 are magnified 8 times; a row of 8 frames with gaps of 2, 18 x 144, 3 times.
    expected = (54, 432, 3) if name == "clip.png" else (8, 128, 128, 3)
    for i in range(2):
        picture = iio.imread(tmp_path / "deep" / name.replace("clip", f"clip-{i:03d}"))
        assert picture.shape == expected
    assert iio.imread(tmp_path / "sheet.png").shape == (108, 432, 3)


@pytest.mark.parametrize("flags, message", [
    ([], "no prompt"), (["--prompt", "a red circel moving left"], "'circel'.*'circle'"),
    (["--prompt", "a red circle", "--steps", "0"], "at least 1"), (["--prompt", "a", "--grid", "1,0.5"], "fall strictly"),
    (["--prompt", "a", "--out", "clip.avi"], "must end in"), (["--prompt", "a", "--sampler", "eular"], "did you mean euler"),
    (["--prompts", "missing.txt"], "no such file")])
def test_wrong_requests_are_refused(finished, flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        sample.main(["--run-dir", str(finished), *flags])
    assert error.value.code == 2
    assert __import__("re").search(message, capsys.readouterr().err)


def test_frechet_distance_of_gaussians_is_the_closed_form():
    g = distributed.generator("frechet")
    a, b = torch.randn(2, 5, 50, 50, generator=g, dtype=torch.float64)
    frechet = evaluation.Frechet(torch.randn(200, 6, generator=g), components=6)
    diagonal = [(torch.zeros(3).double(), torch.diag(torch.tensor([1.0, 4.0, 9.0]).double())),
                (torch.tensor([1.0, 2.0, 0.0]).double(), torch.diag(torch.tensor([4.0, 4.0, 1.0]).double()))]
    assert frechet.distance(*diagonal) == pytest.approx(5 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2)
    assert frechet.distance(diagonal[0], diagonal[0]) == pytest.approx(0, abs=1e-9)
    clips = torch.randn(300, 6, generator=g)
    shifted = clips.clone()
    shifted[:, 0] += 2                                            # the features keep lengths: all components are kept
    assert frechet.distance(frechet.statistics(clips), frechet.statistics(shifted)) == pytest.approx(4, rel=1e-4)


def test_eval_writes_table_figure_and_sheets(finished, tmp_path, capsys):
    evaluation.main(["--run-dir", str(finished), "--steps", "1,2", "--count", "48", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(row["model"], row["steps"]) for row in results["rows"]] == [
        (model, steps) for model in ("pretrain", "flowmap", "distill", "flowmap:consistency") for steps in (1, 2)]
    assert results["real_accuracy"]["all"] >= 0.99 and results["floor"] > 0
    for name in ("table.md", "distill.png", "distill.gif", "flowmap-consistency.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert "| distill | 2 |" in capsys.readouterr().out


# --- causal sampling

def test_a_stream_is_the_clip_piece_by_piece(causal):
    pipeline, grid = sample.load_pipeline(causal / "distill"), [1.0, 0.6, 0.0]
    captions = ["a red circle moving left", "a blue square moving up"]
    pieces = list(sample.stream(pipeline, captions, [3, 4], grid))
    assert [piece.shape for piece in pieces] == [(2, 2, 3, 16, 16)] * 4
    assert torch.equal(torch.cat(pieces, 1), sample.generate(pipeline, captions, [3, 4], grid))
    # A teacher is guided: two contexts go along.
    teacher = sample.load_pipeline(causal / "pretrain")
    clips = sample.generate(teacher, captions, [3, 4], grid, guidance=2.0)
    assert clips.shape == (2, 8, 3, 16, 16) and not torch.equal(clips, sample.generate(teacher, captions, [3, 4], grid))


def test_a_new_prompt_changes_the_clip_from_its_chunk_on(causal):
    pipeline, grid = sample.load_pipeline(causal / "distill"), [1.0, 0.6, 0.0]
    plain, other = (sample.generate(pipeline, ["a red circle moving left"], [3], grid, prompt_at=prompts)
                    for prompts in ({}, {2: "a blue square moving up"}))
    assert torch.equal(plain[:, :4], other[:, :4])
    assert ((plain - other)[:, 4:].abs().amax((2, 3, 4)) > 1e-4).all()


def test_given_latents_are_kept_and_change_what_follows(causal):
    pipeline, grid = sample.load_pipeline(causal / "distill"), [1.0, 0.0]
    given = pipeline.codec.encode(torch.rand(1, 4, 3, 16, 16, generator=distributed.generator("given")) * 2 - 1)
    clips, plain = (torch.cat(list(sample.latents(pipeline, ["a red circle moving left"], [3], grid, given=known)), 1)
                    for known in (given, None))
    assert torch.equal(clips[:, :2], given)
    assert (clips - plain)[:, 2:].abs().max() > 1e-3
    with pytest.raises(ValueError, match="4 given latent frames: must be whole chunks"):
        sample.generate(pipeline, ["a red circle moving left"], [3], grid, given=given.repeat(1, 2, 1, 1, 1))


def test_causal_command_lines(causal, tmp_path, capsys):
    def run(*flags):
        sample.main(["--run-dir", str(causal), "--prompt", "a red circle moving left", "--steps", "2", *flags])
        return capsys.readouterr().out
    start, clip, longer = tmp_path / "start.png", tmp_path / "clip.mp4", tmp_path / "long.mp4"
    iio.imwrite(start, (torch.rand(20, 32, 3, generator=distributed.generator("png")) * 255).byte().numpy())
    run("--image", str(start), "--out", str(clip))
    assert iio.imread(clip).shape == (8, 128, 128, 3)
    out = run("--video", str(clip), "--out", str(longer), "--frames", "12", "--window", "2")
    assert iio.imread(longer).shape[0] == 12 and "frames are used" not in out
    out = run("--video", str(longer), "--frames", "11", "--out", str(clip))       # 12 frames given, 10 leave one chunk
    assert "10 of its 12 frames are used, 5 whole chunks" in out and iio.imread(clip).shape[0] == 12
    for name in ("stream.mp4", "stream.gif"):
        out = run("--stream", "--frames", "16", "--out", str(tmp_path / name), "--prompt-at", "2", "a blue square moving up")
        assert "16 frames; first chunk after" in out and iio.imread(tmp_path / name).shape == (16, 128, 128, 3)


@pytest.mark.parametrize("flags, message", [
    (["--image", "missing.png"], "missing.png: cannot be read"), (["--video", "README.md"], "README.md: cannot be read"),
    (["--frames", "0"], "--frames 0: must be at least 1"), (["--window", "-1"], "must be at least 0"),
    (["--image", "a.png", "--video", "b.mp4"], "give one of them"), (["--prompt-at", "x", "a"], "must be a number"),
    (["--prompt-at", "1", "a red circel"], "'circel'.*'circle'"), (["--stream", "--out", "a.png"], "written to .mp4 or .gif"),
    (["--stream", "--per-prompt", "2"], "one prompt and one clip"), (["--frames", "2", "--image", "assets/none.png"], "cannot be read")])
def test_wrong_causal_requests_are_refused(causal, flags, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as error:
        sample.main(["--run-dir", str(causal), "--prompt", "a red circle moving left", *flags])
    assert error.value.code == 2
    assert __import__("re").search(message, capsys.readouterr().err)


def test_a_bidirectional_model_makes_one_chunk(finished, capsys):
    with pytest.raises(SystemExit):
        sample.main(["--run-dir", str(finished), "--prompt", "a red circle moving left", "--frames", "16"])
    assert "trained on whole clips" in capsys.readouterr().err


def test_eval_measures_drift_along_long_causal_clips(causal, tmp_path, capsys):
    evaluation.main(["--run-dir", str(causal), "--models", "distill", "--steps", "2", "--count", "24", "--length", "2",
                     "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["distill #1", "distill #2"] and len(rows[0]["fd_chunks"]) == 4
    assert rows[0]["fd"] != rows[1]["fd"]


def test_the_causal_recipe_is_checked(tmp_path, capsys):
    def config(*flags):
        return train.parse_config(["--preset", "tiny", "--causal", "--run-dir", str(tmp_path), *flags])
    with pytest.raises(ValueError, match="add up to 3, but clips have 4 latent frames"):
        train.train(config("--chunks", "1,2"))
    for flags, message in ((["--chunks", "1,x"], "whole numbers"), (["--full-chunks", "-1"], "at least 0"),
                           (["--stage", "distill", "--base", "a"], "--base is for stages pretrain and flowmap")):
        with pytest.raises(SystemExit):
            config(*flags)
        assert message in capsys.readouterr().err
    default = train.parse_config(["--causal"])
    assert default.run_dir == "runs/toy-shapes-causal" and default.base == "runs/toy-shapes/pretrain"
    with pytest.raises(ValueError, match="--base nowhere: not there. First run"):
        train.train(config("--base", "nowhere"))


def test_flowmap_goes_on_with_a_flow_map(finished, tmp_path):
    """As with AnyFlow's weights: no stage pretrain, and the trained second time embedder is kept."""
    stage = run_stage(tmp_path / "run", "flowmap", "--base", str(finished / "flowmap"), "--steps", "1", "--lr", "1e-12", "--ema-start", "0")
    same_files(stage / "model.safetensors", finished / "flowmap" / "model.safetensors")
    same_files(stage / "codec.safetensors", finished / "flowmap" / "codec.safetensors")
    state = load_file(stage / "model.safetensors")
    assert not torch.equal(state["r_embed.up.weight"], state["time_embed.up.weight"])
    with pytest.raises(ValueError, match="distill needs stage pretrain"):
        run_stage(tmp_path / "run", "distill")


def test_a_causal_teacher_starts_from_a_bidirectional_one(finished, tmp_path):
    folder = run_stage(tmp_path / "run", "pretrain", "--causal", "--base", str(finished / "pretrain"), "--steps", "1", "--lr", "1e-9")
    mine, before = (load_file(path / "model.safetensors") for path in (folder, finished / "pretrain"))
    assert mine.keys() - before.keys() == {"far_patch_embed.weight", "far_patch_embed.bias"}
    torch.testing.assert_close(mine["head.weight"], before["head.weight"], rtol=0, atol=1e-8)
    same_files(folder / "codec.safetensors", finished / "pretrain" / "codec.safetensors")
