"""What a cluster does to a run: several processes, nodes, killed ones, signals, full disks, bf16.

Starting Python takes longer than a tiny training: all but one of these tests share two launches,
`nodes` with four processes and `two`.
"""
import shutil
import socket
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import distributed
import kill
import media
import model
import sample
from cache import Context
from stages import FOLDERS, flags_of, launch, linked, rows, trained

LOG = ("--log-every", "1")
LORA = ("--lora-rank", "4", "--lr", "1e-2", "--steps", "4", *LOG)
PROMPT = "a red circle moving left"


def finish(process) -> str:
    """What it wrote. It must end well."""
    out = process.communicate(timeout=240)[0]
    assert process.returncode == 0, out
    return out


def assert_same_losses(a: Path, b: Path, **tolerances) -> None:
    """Of two stages, or of the first updates of the longer one."""
    a, b = rows(a), rows(b)
    assert min(len(a), len(b)) >= 4
    for mine, expected in zip(a, b):
        assert mine == pytest.approx(expected, **tolerances)


@pytest.fixture(scope="module")
def adapted(finished, tmp_path_factory):
    """The three stages as adapters of one teacher."""
    run = tmp_path_factory.mktemp("scale") / "adapted"
    trained(run, "pretrain", "--base", str(finished / "pretrain"), *LORA)
    trained(run, "flowmap", *LORA)
    trained(run, "distill", *LORA)
    return run


@pytest.fixture(scope="module")
def nodes(adapted, tmp_path_factory):
    """Two torchruns of two processes: weights with a copy a node, then adapters over all four."""
    folder = tmp_path_factory.mktemp("nodes")
    four = linked(adapted, folder / "four", "distill")
    copies = flags_of(folder / "copies", "pretrain", "--shard", "node", "--steps", "6", *LOG)
    jobs = [["train", copies, []],
            ["train", flags_of(four, "distill", "--save-every", "2", *LORA), []]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--nnodes=2", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    both = [launch(folder / f"{rank}.json", jobs, f"--node_rank={rank}", *flags)
            for rank in range(2)]
    for node in both:
        finish(node)
    return folder


def half_done(four: Path, run: Path) -> Path:
    """A copy of what four processes trained, as it was after the second update of four."""
    stage = run / "distill"
    shutil.copytree(four / "distill", stage)
    shutil.rmtree(stage / "checkpoints" / "00000004")
    (stage / "model.safetensors").unlink()
    return run


@pytest.fixture(scope="module")
def two(finished, adapted, nodes, tmp_path_factory):
    """(folder, what was printed) of one torchrun of two processes, which starts them once more
    after a death."""
    folder = tmp_path_factory.mktemp("two")
    killed = flags_of(folder / "killed", "pretrain", "--save-every", "2", "--steps", "6", *LOG)
    jobs = [["train", killed, [[3, "die"], [4, "SIGUSR1 to the workers"]]],
            ["train", killed, []]]
    for stage in FOLDERS:
        run = linked(finished, folder / stage, stage)
        jobs.append(["train", flags_of(run, stage, "--steps", "6", *LOG), []])
    clips = ["--ckpt", str(folder / "distill" / "distill"), "--prompt", PROMPT, "--per-prompt", "3",
             "--steps", "1", "--out", str(folder / "clip.png")]
    jobs.append(["sample", clips, []])
    resumed = half_done(nodes / "four", linked(adapted, folder / "resumed", "distill"))
    jobs.append(["train", flags_of(resumed, "distill", *LORA), []])
    odd = flags_of(folder / "odd", "pretrain", "--batch-size", "9")
    jobs.append(["train", odd, []])
    full = flags_of(folder / "full", "pretrain", "--save-every", "1")
    jobs.append(["train", full, [[1, "full disk"]]])
    ended = flags_of(folder / "ended", "pretrain")
    jobs.append(["train", ended, [[1, "SIGTERM to torchrun"]]])
    process = launch(folder / "jobs.json", jobs, "--standalone", "--nproc_per_node=2",
                     "--max-restarts=1")
    return folder, process.communicate(timeout=300)[0]


def test_two_nodes_with_a_copy_of_the_weights_each(nodes, finished):
    """--shard node: the losses of one process. Of the two copies of each shard one is saved."""
    copies, one = nodes / "copies" / "pretrain", finished / "pretrain"
    assert_same_losses(copies, one, rel=1e-5)
    name, files = "student.weights.head.weight", checkpoint.checkpoints(copies)[-1]
    state = [load_file(file) for file in files.glob("*.safetensors")]
    saved = sum(part[name].numel() for part in state if name in part)
    assert saved == load_file(one / "model.safetensors")["head.weight"].numel()


def test_saved_on_four_processes_resumed_on_two_and_one(adapted, nodes, two, tmp_path):
    """Distill with three adapters on one base: the losses of one process on four, and after a
    change from four to two or one."""
    four = nodes / "four" / "distill"
    assert len(list((four / "checkpoints" / "00000002").glob("*.safetensors"))) == 4
    run = half_done(nodes / "four", linked(adapted, tmp_path / "run", "distill"))
    for stage in (trained(run, "distill", *LORA), two[0] / "resumed" / "distill"):
        assert [row["step"] for row in rows(stage)] == [1, 2, 3, 4]
        assert_same_losses(stage, four, rel=1e-6, abs=1e-6)
        assert_same_losses(stage, adapted / "distill", rel=1e-5)


@pytest.mark.parametrize("stage", FOLDERS)
def test_two_processes_equal_one(two, finished, stage):
    """FSDP2 over gloo: the same losses for the same global batch."""
    assert_same_losses(two[0] / stage / stage, finished / stage, rel=1e-5)


@pytest.mark.parametrize("stage", ["distill", "causal-distill"])
def test_weights_of_two_processes_are_those_of_one(two, finished, stage):
    mine, one = (load_file(path / "model.safetensors")
                 for path in (two[0] / stage / stage, finished / stage))
    assert mine.keys() == one.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-3, atol=1e-4)


def test_each_process_makes_its_part_of_the_clips(two):
    folder, out = two
    pipeline = sample.load_pipeline(folder / "distill" / "distill")
    clips = sample.generate(pipeline, [PROMPT] * 3, [0, 1, 2], [1.0, 0.0])
    for i, clip in enumerate(clips):
        file = folder / f"clip-{i:03d}.png"
        assert out.count(f"{file}: {PROMPT} (seed {i}") == 1
        picture = media.to_pixels(media.contact_sheet(clip[None])).astype(int)
        assert abs(iio.imread(file) - picture).max() <= 1


def test_a_process_that_dies_ends_the_others_and_torchrun_goes_on(two):
    """SIGKILL to one of two: both are started again, from the last checkpoint; then SIGUSR1 to the
    workers, which end well; and the bits are those of a whole run."""
    folder, out = two
    killed = folder / "killed"
    assert f"resumed from update 2 of 6 in {killed}" in out
    assert "stopped by a signal after update 5 of 6" in out
    assert f"python train.py --stage pretrain --run-dir {killed}" in out
    assert f"resumed from update 5 of 6 in {killed}" in out
    kill.assert_same_bits(killed / "pretrain", folder / "pretrain" / "pretrain")


def checkpoints(run: Path) -> list[str]:
    return [path.name for path in checkpoint.checkpoints(run / "pretrain")]


def test_sigterm_to_torchrun_saves(two):
    folder, out = two
    assert "stopped by a signal after update 2 of 20" in out
    assert checkpoints(folder / "ended") == ["00000002"]


def test_a_full_disk_of_one_process_ends_both(two):
    """Nobody waits for a rank that could not write its shards."""
    folder, out = two
    for rank in range(2):
        assert f"rank {rank}: cannot write {folder / 'full'}" in out
    assert "No space left on device" in out
    assert checkpoints(folder / "full") == ["00000001"]


def test_a_batch_that_the_processes_do_not_divide(two):
    folder, out = two
    for rank in range(2):
        assert f"rank {rank}: --batch-size 9 is not a multiple of 8: 2 processes times 4" in out
    assert not (folder / "odd").exists()


@pytest.mark.slow
def test_killed_at_any_instant_it_ends_with_the_same_bits(finished, tmp_path):
    """The short form of `python tests/kill.py`: twice in distill."""
    whole = linked(finished, tmp_path / "whole", "distill")
    trained(whole, "distill", *kill.flags("distill"))
    kill.check(tmp_path, ["distill"], kills=2, processes=1, seed=0)


def test_bf16_keeps_fp32_masters_of_what_trains(adapted, tmp_path):
    run = linked(adapted, tmp_path / "run", "distill")
    stage = trained(run, "distill", "--bf16", *LORA, "--steps", "3")
    state = load_file(next(checkpoint.checkpoints(stage)[-1].glob("*.safetensors")))
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in state.values())
    for a, b in zip(rows(stage), rows(adapted / "distill")):
        for name in ("loss", "fake"):
            assert a[name] == pytest.approx(b[name], rel=0.02)


def test_in_bf16_times_keep_their_digits_and_gradients_are_summed_in_fp32(monkeypatch):
    distributed.start("cpu")
    g, times, features = distributed.generator("fsdp"), [], model.time_features
    net = model.FlowMapDiT(model.PRESETS["tiny"]).init_weights(g)
    net = distributed.shard(net, distributed.World(0, 1, torch.device("cpu")), bf16=True)
    monkeypatch.setattr(model, "time_features", lambda t, *a: times.append(t) or features(t, *a))
    z, t = torch.randn(2, 2, 48, 2, 2, generator=g), torch.tensor([0.9983, 0.9861])
    text = torch.randn(2, 3, 64, generator=g)
    for last in (False, True):
        distributed.sync_gradients(net, last)
        net(z * (1 + last), t, t / 3, Context(text)).square().mean().backward()
    assert torch.equal(times[0].view(-1), t)
    grad = net.head.weight.grad.full_tensor()        # two bf16 gradients, summed in fp32
    assert grad.dtype == torch.float32 and not torch.equal(grad, grad.bfloat16().float())


@pytest.mark.parametrize("over, local, shape", [("node", "2", (3, 2)), ("node", "6", (6,)),
                                                ("all", "2", (6,))])
def test_weights_are_sharded_in_a_node_and_copied_between_nodes(over, local, shape, monkeypatch):
    """Of six processes; FSDP2 shards over the last axis of a mesh and copies over the first."""
    meshes = []

    def mesh(device, shape, mesh_dim_names):
        meshes.append(shape)
        raise InterruptedError
    monkeypatch.setattr(distributed, "init_device_mesh", mesh)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    world = distributed.World(0, 6, torch.device("cpu"))
    with pytest.raises(InterruptedError):
        distributed.shard(torch.nn.Linear(1, 1), world, False, over)
    assert meshes == [shape]
