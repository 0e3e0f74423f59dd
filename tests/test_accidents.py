"""What a machine does to a run, and what a person does to its folder: nothing is lost, nothing is
silently another thing."""
import fcntl
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import cli
import config
import data
import kill
import meanflow
import media
import runs
import sample
import train
from stages import STATE, assert_same_files, flags_of, linked, trained

PROMPT = ["--prompt", "a red circle moving left", "--steps", "1"]


def ended(script, argv, capsys) -> tuple[int, str]:
    """Exit code and the error of a script that fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: script.main([str(word) for word in argv]))
    code = end.value.code
    if isinstance(code, str):                        # Python prints it, and the code is 1
        return 1, code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return code, lines[0]


@contextmanager
def small_disk():
    """No file of this process, or of one that it starts, can be longer than 2000 bytes; pytest's
    own output neither, so that it is not for a whole test."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


@pytest.fixture
def copied(finished, tmp_path):
    """A finished run that may be written to."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def flip(file: Path, place: int = -1000) -> None:
    """One bit of a file, which keeps its size."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.unlink()                                    # it may be mapped still
    file.write_bytes(content)


# --- clips

@pytest.mark.parametrize("name, more", [
    ("clip.mp4", []), ("clip.gif", []), ("clip.png", []), ("clip.mp4", ["--sheet", "sheet.png"]),
    ("clip.mp4", ["--causal", "--stream"]), ("clip.gif", ["--causal", "--stream"])])
def test_on_a_full_disk_the_clip_before_stays(finished, tmp_path, monkeypatch, capsys, name,
                                              more):
    monkeypatch.chdir(tmp_path)
    for file in (name, "sheet.png"):
        Path(file).write_bytes(b"a good one")
    with small_disk():
        code, line = ended(sample, ["--run-dir", finished, *PROMPT, "--out", name, *more], capsys)
    assert code == 1 and "error: " in line and name.split(".")[1] in line
    assert [Path(file).read_bytes() for file in (name, "sheet.png")] == [b"a good one"] * 2
    assert {file.name for file in tmp_path.iterdir()} == {name, "sheet.png"}


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif"])
def test_a_stream_that_is_stopped_leaves_what_was_there(finished, tmp_path, monkeypatch, capsys,
                                                        name):
    def stopped(*args, **options):
        yield torch.zeros(1, 2, 3, 16, 16)
        raise KeyboardInterrupt
    monkeypatch.setattr(sample, "stream", stopped)
    (tmp_path / name).write_bytes(b"a good one")
    argv = ["--run-dir", finished, "--causal", *PROMPT, "--stream", "--out", tmp_path / name]
    assert ended(sample, argv, capsys)[0] == 130
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"a good one"]


def test_too_little_memory_is_said_and_a_bug_is_not_hidden(finished, tmp_path, monkeypatch,
                                                           capsys):
    argv = ["--run-dir", finished, *PROMPT, "--out", tmp_path / "clip.gif"]
    bug = RuntimeError("CUDA error: an illegal memory access was encountered")
    errors = iter([RuntimeError("CUDA out of memory. Tried to allocate"), bug])

    def fails(*args, **options):
        raise next(errors)
    monkeypatch.setattr(sample, "generate", fails)
    code, line = ended(sample, argv, capsys)
    assert code == 1 and "too little memory" in line and "frames" in line
    with pytest.raises(RuntimeError, match="illegal"):
        ended(sample, argv, capsys)
    assert not [*tmp_path.iterdir()]


def test_clips_of_other_settings_do_not_stand_for_these(finished, tmp_path, capsys, monkeypatch):
    def argv(*flags):
        return ["--run-dir", str(finished), "--prompt", "a red circle moving left", "--vbench",
                "--out", str(tmp_path / "clips"), *flags]
    clip = tmp_path / "clips" / "a red circle moving left-0.mp4"
    sample.main(argv("--steps", "1"))
    before = clip.stat().st_mtime_ns
    for flags, then, now in ((["--steps", "2"], "grid = [1.0, 0.0]", "[1.0, "),
                             (["--steps", "1", "--seed", "3"], "first_seed = 0", "3"),
                             (["--steps", "1", "--stage", "flowmap"], "distill", "flowmap")):
        code, line = ended(sample, argv(*flags), capsys)
        assert code == 2 and then in line and now in line and "another folder" in line
    monkeypatch.chdir(clip.parent)
    for same in ([], ["--out", "."]):                # goes on: nothing is left to do
        sample.main(argv("--steps", "1", *same))
    assert clip.stat().st_mtime_ns == before
    (tmp_path / "clips.made_by.json").unlink()
    assert "clips.made_by.json" in ended(sample, argv("--steps", "1"), capsys)[1]


def test_latents_that_are_no_numbers_name_their_clip(finished, monkeypatch, tmp_path, capsys):
    pipeline = sample.load_pipeline(finished / "distill")
    pipeline.network.head.bias.fill_(torch.nan)
    monkeypatch.setattr(sample, "load_pipeline", lambda *args: pipeline)
    argv = ["--run-dir", finished, *PROMPT, "--seed", "7", "--out", tmp_path / "clip.mp4"]
    code, line = ended(sample, argv, capsys)
    assert code == 2 and "'a red circle moving left', seed 7" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [
    pytest.param("sample", marks=pytest.mark.slow), "export"])
def test_killed_at_any_instant_no_half_file_has_a_final_name(finished, tmp_path, name):
    """The short form of `python tests/kill.py --output sample,stream,export`."""
    kill.check_output(tmp_path, finished, name, kills=1, seed=0)


# --- a run's folder

def test_one_process_trains_a_stage_at_a_time(copied, capsys, monkeypatch):
    hold = ("import fcntl, sys; file = open(sys.argv[1], 'a+'); fcntl.flock(file, fcntl.LOCK_EX); "
            "print('held', flush=True); sys.stdin.read()")
    lock = copied / "flowmap" / runs.LOCK
    holder = f"process 123 on {os.uname().nodename}"
    lock.write_text(holder)
    other = subprocess.Popen([sys.executable, "-c", hold, lock], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    for flags in ([], ["--fresh"]):
        code, line = ended(train, flags_of(copied, "flowmap", *flags), capsys)
        assert code == 2 and f"is trained by {holder} already" in line
    assert (copied / "flowmap" / "model.safetensors").exists()
    # What dies on another node has its lock until the lease ends: that is waited for.
    lock.write_text("process 123 on another-node")

    def ends(seconds):
        other.kill()                                 # and its lock is gone with it
        other.communicate()
    monkeypatch.setattr(runs.time, "sleep", ends)
    assert trained(copied, "flowmap") == copied / "flowmap"
    with open(lock) as file:                         # as is that of a training that has ended
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert file.read() == f"process {os.getpid()} on {os.uname().nodename}"


@pytest.mark.parametrize("name, other", [("data", "shapes"), ("base", "")])
def test_clips_and_weights_may_be_moved_and_not_exchanged(tmp_path, name, other):
    here = {name: str(tmp_path)}
    assert not runs.change_between({name: "/gone/there"}, here)
    for then in ("/", other):                        # both are there: they are not the same
        assert f"{name} = {then}, not {tmp_path}" in runs.change_between({name: then}, here)
    assert runs.change_between({name: "/gone/there"}, {name: other})


def test_a_stage_goes_on_when_its_base_has_moved(finished, copied, tmp_path, capsys):
    run, base = tmp_path / "other", copied / "pretrain"
    first = ("--base", str(base), "--steps", "1")
    trained(run, "flowmap", *first)
    moved = base.rename(tmp_path / "moved")
    code, line = ended(train, flags_of(run, "flowmap", "--steps", "2"), capsys)
    assert code == 2 and f"--base {base}: not there" in line
    other = flags_of(run, "flowmap", "--steps", "2", "--base", finished / "flowmap")
    code, line = ended(train, other, capsys)
    assert code == 2 and "was started on other weights" in line
    stage = trained(run, "flowmap", "--steps", "2", "--base", str(moved))
    assert json.loads((stage / "config.json").read_text())["config"]["base"] == str(moved)


def test_fresh_starts_over_a_damaged_record(copied, capsys):
    record = copied / "flowmap" / "config.json"
    record.write_text(record.read_text()[:50])
    code, line = ended(train, flags_of(copied, "flowmap"), capsys)
    assert code == 2 and str(record) in line
    assert trained(copied, "flowmap", "--fresh", "--steps", "1") == copied / "flowmap"


def test_two_prompts_of_one_name_are_refused(finished, tmp_path, capsys):
    argv = ["--run-dir", finished, *PROMPT, *PROMPT, "--vbench", "--out", tmp_path / "clips"]
    code, line = ended(sample, argv, capsys)
    assert code == 2 and "two prompts would both be" in line and not [*tmp_path.glob("clips/*")]
    argv[3] = "a red circle " * 20
    code, line = ended(sample, argv, capsys)
    assert code == 2 and "too long for the name of a file" in line


@pytest.mark.parametrize("gone", ["checkpoints", "config.json"])
def test_a_finished_stage_is_not_trained_over(copied, capsys, gone):
    stage = copied / "flowmap"
    before = (stage / "model.safetensors").stat()
    shutil.move(stage / gone, copied / "away")
    code, line = ended(train, flags_of(copied, "flowmap"), capsys)
    assert code == 2 and str(stage) in line and "--fresh" in line
    assert (stage / "model.safetensors").stat() == before
    shutil.move(copied / "away", stage / gone)
    trained(copied, "flowmap")


@pytest.mark.parametrize("flags", [["--frames", "7"], ["--data", "shape"], ["--micro-batch", "3"],
                                   ["--base", "nowhere"], ["--lr", "nan"], ["--device", "cuda"],
                                   ["--data", "shards"]])
def test_fresh_deletes_nothing_before_all_is_in_order(copied, monkeypatch, capsys, flags):
    monkeypatch.chdir(copied.parent)
    writer = data.ShardWriter("shards", {}, clips_per_shard=1)
    for i in range(8):
        writer.add(f"{i}", "a red box", latents=torch.zeros(4, 48, 4, 4), text=torch.zeros(3, 64))
    writer.close(torch.zeros(3, 64))
    for shard in sorted(Path("shards").glob("part-*.safetensors"))[1:]:
        flip(shard)
    stage = copied / "pretrain"
    before = {file: file.read_bytes() for file in stage.rglob("*") if file.is_file()}
    assert ended(train, flags_of(copied, "pretrain", "--fresh", *flags), capsys)[0] == 2
    after = {file: file.read_bytes() for file in stage.rglob("*") if file.is_file()}
    assert after == before


@pytest.mark.parametrize("file", ["model.safetensors", "codec.safetensors"])
def test_a_flipped_bit_is_noticed_by_what_is_built_on_it(copied, tmp_path, capsys, file):
    damaged = copied / "pretrain" / file
    flip(damaged)
    clip = ["--run-dir", copied, "--stage", "pretrain", *PROMPT, "--out", tmp_path / "clip.mp4"]
    fresh = flags_of(copied, "flowmap", "--fresh")
    for script, argv in ((sample, clip), (train, fresh)):
        code, line = ended(script, argv, capsys)
        assert code == 2 and f"{damaged} is damaged" in line, line
    assert (copied / "flowmap" / "model.safetensors").exists()
    if file == "model.safetensors":                  # the command made it, and makes it again
        assert "the command that trains the stage makes it again" in line
        trained(copied, "pretrain")
        sample.main([str(word) for word in clip])


def test_the_file_that_is_made_again_is_the_same(finished, copied):
    (copied / "flowmap" / "model.safetensors").write_bytes(b"")
    trained(copied, "flowmap")
    assert_same_files(*(run / "flowmap" / "model.safetensors" for run in (copied, finished)))


def test_files_are_as_readable_as_the_umask_says(finished, tmp_path):
    mask = os.umask(0)
    os.umask(mask)
    for file in finished.rglob("*"):
        assert file.is_dir() or file.stat().st_mode & 0o777 == 0o666 & ~mask, file


# --- numbers that are none

def test_a_stage_that_skipped_most_of_its_updates_has_failed(finished, tmp_path, monkeypatch,
                                                             capsys):
    original, calls = meanflow.meanflow_error, itertools.count()
    monkeypatch.setattr(meanflow, "meanflow_error", lambda *args, **kwargs: original(
        *args, **kwargs) * (torch.nan if next(calls) % 3 else 1.0))
    run = linked(finished, tmp_path / "run", "flowmap")
    for _ in range(2):                               # again: it does not end well the second time
        code, line = ended(train, flags_of(run, "flowmap"), capsys)
        assert code == 1 and "8 of its 12 updates were skipped" in line
        assert not (run / "flowmap" / "model.safetensors").exists()


def test_after_gradients_that_are_no_numbers_a_lower_lr_goes_on(finished, tmp_path, monkeypatch,
                                                                capsys):
    run = linked(finished, tmp_path / "run", "flowmap")
    with monkeypatch.context() as patch:
        patch.setattr(meanflow, "meanflow_error", lambda student, x, *args, **kwargs: (
            student.head.bias.sum() * torch.nan).expand(len(x)))
        code, line = ended(train, flags_of(run, "flowmap"), capsys)
    assert code == 1 and "No checkpoint was saved" in line and "with a lower --lr" in line
    trained(run, "flowmap", "--lr", "1e-4", "--save-every", "1", "--steps", "2")
    assert load_file(checkpoint.checkpoints(run / "flowmap")[-1] / STATE)


def test_a_folder_is_the_same_however_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for other in ("clips/", "./clips", str(tmp_path / "clips")):
        a, b = (runs.settings(config.Config(data=name)) for name in ("clips", other))
        assert a == b and not runs.change_between({"data": other}, a)
    assert runs.settings(config.Config(data="loop"))["data"] == "loop"


def test_a_clip_is_what_was_written(tmp_path):
    video = torch.zeros(5, 3, 16, 16)
    video[2] = 1
    media.write_clip(tmp_path / "clip.mp4", video, 8)
    means = [frame.mean() for frame in iio.imiter(tmp_path / "clip.mp4")]
    assert len(means) == 5 and means[2] > 240 and max(means[:2] + means[3:]) < 140
    assert iio.immeta(tmp_path / "clip.mp4")["fps"] == 8
