"""sample.py and eval.py on a finished run: whole clips, and chunk by chunk."""
import argparse
import itertools
import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import checkpoint
import data
import distributed
import eval as evaluation
import flowmap
import media
import pipeline
import play
import runs
import sample
import train
import wan
from cache import Context, append_chunk
from config import record_of
from distributed import generator
from golden import SMALL, network

PROMPTS = ["a red circle moving left", "a blue square moving up"]
GRID = [1.0, 0.6, 0.0]


@pytest.fixture(scope="module")
def bidirectional(finished):
    return sample.load_pipeline(finished / "distill")


@pytest.fixture(scope="module")
def causal(finished):
    return sample.load_pipeline(finished / "causal-distill")


def clip_of(pipeline, **options) -> torch.Tensor:
    """Latents of one clip."""
    return torch.cat(list(sample.latents(pipeline, PROMPTS[:1], [3], GRID, **options)), 1)


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_a_seed_decides_its_clip_whatever_else_is_in_the_batch(bidirectional, sampler):
    both = sample.generate(bidirectional, PROMPTS, [3, 4], GRID, sampler)
    alone, other = (sample.generate(bidirectional, PROMPTS[1:], [seed], GRID, sampler)
                    for seed in (4, 5))
    torch.testing.assert_close(alone, both[1:], rtol=1e-4, atol=1e-5)
    assert (other - both[1:]).abs().max() > 0.01


def test_a_clip_uses_no_noise_twice(causal, monkeypatch):
    """The consistency sampler adds neither the clip's noise nor that of a chunk before."""
    seen = []

    def sampler(u, z, grid, renoise):
        seen.extend([z, *(renoise(z.shape[1:]) for _ in grid[1:-1])])
        return z
    monkeypatch.setitem(flowmap.SAMPLERS, "consistency", sampler)
    clip_of(causal, sampler="consistency")
    alike = torch.corrcoef(torch.cat(seen).flatten(1))           # (8, 8), of 768 numbers each
    assert len(alike) == 8 and (alike - torch.eye(8)).abs().max() < 0.2


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.png"])
def test_clips_are_written(finished, tmp_path, name):
    sheet = tmp_path / "sheet.png"
    sample.main(["--run-dir", str(finished), "--prompt", PROMPTS[0], "--prompt", PROMPTS[1],
                 "--out", str(tmp_path / "deep" / name), "--sheet", str(sheet), "--steps", "3"])
    # Clips of 16 x 16 are magnified 8 times; a row of 8 frames with gaps of 2, 18 x 144, 7 times.
    expected = (126, 1008, 3) if name == "clip.png" else (8, 128, 128, 3)
    for i in range(2):
        file = tmp_path / "deep" / name.replace("clip", f"clip-{i:03d}")
        assert iio.imread(file).shape == expected
    assert iio.imread(sheet).shape == (252, 1008, 3)


@pytest.mark.parametrize("stage", sorted(sample.SHIPPED.glob("*/model.safetensors")))
def test_models_that_are_shipped_make_clips(stage):
    shipped = pipeline.load_pipeline(stage.parent)
    clip = pipeline.generate(shipped, PROMPTS[:1], [0], [1.0, 0.0])
    assert clip.shape[2:] == (3, 16, 16) and clip.std() > 0.1


@pytest.mark.parametrize("name", ["night: rain.mp4", "-rain.mp4"])
def test_a_name_is_neither_an_address_nor_a_flag_of_ffmpeg(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    media.write_clip(Path(name), torch.zeros(3, 3, 16, 16), 8)
    assert len(iio.imread(tmp_path / name)) == 3


def test_a_stream_is_the_clip_piece_by_piece(causal):
    pieces = list(sample.stream(causal, PROMPTS, [3, 4], GRID))
    assert [piece.shape for piece in pieces] == [(2, 2, 3, 16, 16)] * 4
    assert torch.equal(torch.cat(pieces, 1), sample.generate(causal, PROMPTS, [3, 4], GRID))
    # With guidance two contexts go along.
    guided = list(sample.stream(causal, PROMPTS, [3, 4], GRID, guidance=3.0))
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(guided, pieces))


def test_a_video_without_end_begins_as_a_short_one_and_takes_prompts_between_chunks(causal):
    prompts = {2: PROMPTS[1]}
    short = clip_of(causal, prompt_at=prompts)
    later = {}
    endless = sample.latents(causal, PROMPTS[:1], [3], GRID, chunks=itertools.repeat(1),
                             prompt_at=later)
    chunks = [next(endless), next(endless)]
    later |= prompts
    chunks += [next(endless) for _ in range(6)]
    assert torch.equal(torch.cat(chunks[:4], 1), short) and not torch.equal(chunks[4], chunks[5])


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_every_step_is_seen_as_it_ends(bidirectional, sampler):
    seen = []
    z_0 = clip_of(bidirectional, sampler=sampler, on_step=seen.append)
    assert len(seen) == 2 and torch.equal(seen[1], z_0)
    # Of the Euler steps, the first leads where the first of a shorter way leads.
    if sampler == "euler":
        u = flowmap.conditioned(bidirectional.network, Context(bidirectional.words(PROMPTS[:1])))
        z_1 = distributed.noise(seen[0].shape[1:], "sample", slots=[3])
        with torch.no_grad():
            z_r = flowmap.flow_map(u, z_1, torch.tensor([1.0]), torch.tensor([0.6]))
        torch.testing.assert_close(seen[0], z_r)


def test_a_teacher_is_guided(finished):
    teacher = sample.load_pipeline(finished / "pretrain")
    plain, guided = (sample.generate(teacher, PROMPTS, [3, 4], GRID, guidance=scale)
                     for scale in (1.0, 2.0))
    assert plain.shape == (2, 8, 3, 16, 16) and not torch.equal(plain, guided)


def test_a_new_prompt_changes_the_clip_from_its_chunk_on(causal):
    plain, other = (clip_of(causal, prompt_at=prompts) for prompts in ({}, {2: PROMPTS[1]}))
    assert torch.equal(plain[:, :2], other[:, :2])
    assert ((plain - other)[:, 2:].abs().amax((2, 3, 4)) > 1e-4).all()


def test_given_latents_are_kept_and_change_what_follows(causal):
    video = torch.rand(1, 4, 3, 16, 16, generator=distributed.generator("given")) * 2 - 1
    given = causal.codec.encode(video)
    clip, plain = clip_of(causal, given=given), clip_of(causal)
    assert torch.equal(clip[:, :2], given)
    assert (clip - plain)[:, 2:].abs().max() > 1e-3
    with pytest.raises(ValueError, match="4 given latent frames: must be whole chunks"):
        clip_of(causal, given=given.repeat(1, 2, 1, 1, 1))


def test_causal_command_lines(finished, tmp_path, capsys):
    def run(*flags):
        sample.main(["--run-dir", str(finished), "--causal", "--prompt", PROMPTS[0], "--steps", "2",
                     *flags])
        return capsys.readouterr().out
    start, clip, longer = (tmp_path / name for name in ("start.png", "clip.mp4", "long.mp4"))
    picture = torch.rand(20, 32, 3, generator=distributed.generator("png")) * 255
    iio.imwrite(start, picture.byte().numpy())
    run("--image", str(start), "--out", str(clip))
    assert iio.imread(clip).shape == (8, 128, 128, 3)
    out = run("--video", str(clip), "--out", str(longer), "--frames", "12", "--window", "2")
    assert iio.imread(longer).shape[0] == 12 and "frames are used" not in out
    # 12 frames are given, and 10 of them leave one chunk.
    out = run("--video", str(longer), "--frames", "11", "--out", str(clip))
    assert "its first 10 frames at 8 a second are used, 5 whole chunks" in out
    assert iio.imread(clip).shape[0] == 12
    for name in ("stream.mp4", "stream.gif"):
        out = run("--stream", "--frames", "16", "--out", str(tmp_path / name),
                  "--prompt-at", "2", PROMPTS[1])
        assert "16 frames; first chunk after" in out
        assert iio.imread(tmp_path / name).shape == (16, 128, 128, 3)


def test_shipped_models_are_sampled_until_there_is_a_run(finished, tmp_path, monkeypatch, capsys):
    shipped = tmp_path / "box" / "toy"
    runs.ship(finished, finished, shipped)
    monkeypatch.setattr(sample, "SHIPPED", shipped)
    monkeypatch.chdir(tmp_path)
    clip = ["--prompt", PROMPTS[0], "--steps", "1", "--out", "clip.gif"]
    sample.main(clip)
    said = capsys.readouterr().out
    assert f"no run in runs/toy-shapes yet: the models of {shipped} are used" in said
    assert "1 steps, distill)" in said
    for stage in ("pretrain", "flowmap", "distill", "causal-distill"):
        whole, half = (sum(file.stat().st_size for file in (run / stage).glob("model*"))
                       for run in (finished, shipped))
        assert half < 0.6 * whole and str(tmp_path) not in json.dumps(
            record_of(shipped / stage)).replace(str(shipped), "")
        a, b = (clip_of(sample.load_pipeline(run / stage)) for run in (finished, shipped))
        assert 0 < (a - b).abs().max() < 0.1
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "toy-shapes").symlink_to(finished)
    sample.main(clip)
    assert "yet" not in capsys.readouterr().out


def test_the_shipped_teacher_is_distilled(finished, tmp_path):
    """As make demo does: both stages find it, in a run that has no stage pretrain; also as the
    teacher of the flow map's velocity."""
    runs.ship(finished, finished, tmp_path / "toy")
    teacher, run = tmp_path / "toy" / "pretrain", ["--run-dir", str(tmp_path / "demo")]
    train.main(["--stage", "flowmap", "--base", str(teacher), "--preset", "tiny", "--steps", "1",
                "--velocity", "teacher", "--balance", "0.1", *run])
    train.main(["--stage", "distill", "--steps", "1", *run])
    checksums = record_of(tmp_path / "demo" / "distill")["built_on"]
    assert checksums["teacher"] == wan.fingerprint(teacher)
    found = {word: place for word, place, _ in evaluation.parse_models(tmp_path / "demo", None)}
    assert list(found) == ["pretrain", "flowmap", "distill", "flowmap:consistency"]
    assert found["pretrain"] == runs.teacher_of(tmp_path / "demo") == teacher
    clip = tmp_path / "clip.png"
    sample.main([*run, "--stage", "pretrain", "--prompt", PROMPTS[0], "--steps", "1", "--out",
                 str(clip)])
    assert clip.exists()
    args = argparse.Namespace(run_dir=tmp_path / "demo", ckpt=None, base=None, frames=81,
                              height=480, width=832)
    assert play.Player(args, "cpu").models["teacher"][0] == teacher
    record = tmp_path / "demo" / "flowmap" / "config.json"
    text = record.read_text()
    own = tmp_path / "demo" / "pretrain"
    for old, new in (('"frames": 8', '"frames": 10'), (str(teacher), str(finished / "flowmap")),
                     (str(teacher), str(tmp_path / "gone"))):
        record.write_text(text.replace(old, new))
        assert record.read_text() != text and runs.teacher_of(tmp_path / "demo") == own
    record.write_text(text)
    own.symlink_to(finished / "pretrain")            # a teacher of its own comes first
    assert runs.teacher_of(tmp_path / "demo") == own
    own.unlink()
    record.write_text(text.replace(str(teacher), str(tmp_path / "gone")))
    with pytest.raises(ValueError, match="distill needs .*gone, which is not there any more"):
        train.main(["--stage", "distill", "--fresh", *run])


# --- eval.py

class Noise:
    """Clips whose three frames have levels of their own."""
    attributes, captions = {}, []

    def __init__(self):
        self.seeds = []

    def clips(self, indices, seed=0, captions=None):
        self.seeds.append(seed)
        levels = torch.arange(3.0)[:, None, None, None]
        noise = torch.randn(len(indices), 3, 3, 2, 2, generator=generator("real", seed))
        return levels + noise, [""] * len(indices)


def test_the_floor_is_of_five_draws_that_nothing_else_makes(quick):
    """Not of the reference, nor of one draw again; seeds of training lie elsewhere (updates.py)."""
    real = Noise()
    measured = evaluation.EvaluationSet(real, 60, [])
    found = measured.summary({})
    reference, _, *floor = real.seeds
    assert len(set(floor)) == len(floor) == 5 and reference not in floor
    assert all(10**6 <= seed < 2 * 10**6 for seed in real.seeds)
    ed = [measured.energy(real.clips(range(60), seed)[0], measured.real) for seed in floor]
    assert found["real_ed"] == pytest.approx(statistics.fmean(ed), rel=1e-3, abs=1e-5)
    assert found["real_ed_std"] == pytest.approx(statistics.stdev(ed), rel=1e-3) and ed[0] != ed[1]


def test_each_chunk_is_compared_with_the_same_chunk_of_real_clips(quick):
    measured = evaluation.EvaluationSet(Noise(), 60, [1, 1, 1])
    clips = Noise().clips(range(60), 5)[0]
    alike, moved = (measured.scores(some)["fd_chunks"] for some in (clips, clips.roll(1, 1)))
    assert len(alike) == 3 and max(alike) < 5 < min(moved)       # 12 values, a level apart: 12


def test_a_sheet_has_the_right_clip_in_every_cell():
    clips = torch.rand(2, 3, 2, 5, 3, 16, 16, generator=distributed.generator("sheet")) * 2 - 1
    models = {name: list(some) for name, some in zip(("teacher", "student"), clips)}
    movie = evaluation.labelled_sheet(models, [1, 2, 4], ["a red circle moving left", "two"], gap=4)
    found = []
    for frame in (0, 4):
        for model, row, column in itertools.product(range(2), range(3), range(2)):
            cell = media.to_pixels(clips[model, row, column, frame], 64)
            x, bottom = 36 + model * (2 * 68 + 16) + column * 68, len(movie[0]) - (3 - row) * 68
            found.append((movie[frame, bottom:bottom + 64, x:x + 64] == cell).all())
    assert all(found) and movie.shape[0] == 5

def test_frechet_distance_of_gaussians_is_the_closed_form():
    g = distributed.generator("frechet")
    frechet = evaluation.Frechet(torch.randn(200, 6, generator=g), components=6)

    def gaussian(mean, variances):
        return torch.tensor(mean).double(), torch.diag(torch.tensor(variances)).double()
    a, b = gaussian([0.0, 0.0, 0.0], [1.0, 4.0, 9.0]), gaussian([1.0, 2.0, 0.0], [4.0, 4.0, 1.0])
    assert frechet.distance(a, b) == pytest.approx(5 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2)
    assert frechet.distance(a, a) == pytest.approx(0, abs=1e-9)
    clips = torch.randn(300, 6, generator=g)
    shifted = clips.clone()
    shifted[:, 0] += 2                               # all components are kept, and so are lengths
    statistics = [frechet.statistics(some) for some in (clips, shifted)]
    assert frechet.distance(*statistics) == pytest.approx(4, rel=1e-4)


def test_energy_distance_is_0_on_average_between_samples_of_one_distribution():
    """Also where each of four kinds of prompt, far apart, has as many rows; not if that is left
    out."""
    g = distributed.generator("energy")
    means = torch.arange(4.0)[:, None] * 10

    def draw(kinds):
        return torch.randn(len(kinds), 3, generator=g) + means[kinds]
    found = {4: [], 0: []}
    for _ in range(200):
        x, y = draw(torch.arange(8) % 4), draw(torch.randint(4, (64,), generator=g))
        for kinds, values in found.items():
            spreads = evaluation.mean_distance(x, kinds), evaluation.mean_distance(y)
            values.append(evaluation.energy_distance(x, y, *spreads))
    right, wrong = (torch.tensor(values) for values in found.values())
    noise = right.std() / 200**0.5
    assert abs(right.mean()) < 3 * noise and wrong.mean() < -5 * noise
    found = {True: [], False: []}                    # a prompt drawn for each row, that both have
    for _ in range(200):
        kinds = torch.randint(4, (8,), generator=g)
        x, y = draw(kinds), draw(kinds)
        for paired, values in found.items():
            spreads = evaluation.mean_distance(x), evaluation.mean_distance(y)
            values.append(evaluation.energy_distance(x, y, *spreads, paired))
    right, wrong = (torch.tensor(values) for values in found.values())
    noise = right.std() / 200**0.5
    assert abs(right.mean()) < 3 * noise and wrong.mean() < -5 * noise
    zeros, twos = torch.zeros(5, 1), torch.full((3, 1), 2.0)
    assert evaluation.energy_distance(zeros, twos, 0, 0) == 4


@pytest.fixture
def quick(monkeypatch):
    """Else the feature space and the teacher's clips take most of the time."""
    monkeypatch.setattr(evaluation, "REFERENCE", 256)
    monkeypatch.setattr(evaluation, "TEACHER_STEPS", 2)


def evaluate(run, out, *flags):
    """What eval.py finds."""
    evaluation.main(["--run-dir", str(run), "--count", "48", "--out", str(out), *flags])
    return json.loads((out / "results.json").read_text())


def test_eval_writes_table_figure_and_sheets(finished, tmp_path, quick, capsys):
    results = evaluate(finished, tmp_path, "--steps", "1,2")
    models = ("pretrain", "flowmap", "distill", "causal-flowmap", "causal-distill",
              "flowmap:consistency")
    expected = [(model, steps) for model in models for steps in (1, 2)]
    assert [(row["model"], row["steps"]) for row in results["rows"]] == expected
    assert results["real_accuracy"]["all"] >= 0.99 and results["real_fd"] > 0
    for name in ("table.md", "distill.png", "distill.gif", "flowmap-consistency.png"):
        assert (tmp_path / name).stat().st_size > 0
    out = capsys.readouterr().out
    assert "| distill | 2 |" in out
    assert "--count 48: energy distances are biased" in out and "from 96 up" in out


def test_eval_measures_drift_along_long_causal_clips(finished, tmp_path, quick):
    flags = ("--models", "causal-distill", "--steps", "2", "--length", "2")
    rows = evaluate(finished, tmp_path, *flags)["rows"]
    assert [row["model"] for row in rows] == ["causal-distill #1", "causal-distill #2"]
    assert len(rows[0]["fd_chunks"]) == 4 and rows[0]["fd"] != rows[1]["fd"]
    assert rows[0]["ed_teach"] != rows[1]["ed_teach"]    # the teacher's clips are as trained


def test_a_student_alone_is_measured_against_its_teacher(finished, tmp_path, quick):
    models = "distill", "distill,pretrain"
    alone, both = (evaluate(finished, tmp_path, "--models", some, "--steps", "1")["rows"]
                   for some in models)
    assert alone == both[:1] and alone[0]["ed_teach"] != alone[0]["ed"]
    folder = tmp_path / "run" / "causal-distill"     # of other clips, as one of those shipped
    shutil.copytree(finished / "causal-distill", folder)
    (tmp_path / "run" / "pretrain").symlink_to(finished / "pretrain")
    student = {folder: sample.load_pipeline(folder)}
    teacher = evaluation.teacher_pipeline(student, "cpu")
    assert not teacher.network.config.second_time
    record = json.loads((folder / "config.json").read_text())
    record["config"]["data"] = "loop"
    (folder / "config.json").write_text(json.dumps(record))
    assert evaluation.teacher_pipeline(student, "cpu") is None


def test_a_longer_video_sees_no_more_chunks_than_in_training(causal, monkeypatch):
    known, append = [], pipeline.append_chunk
    monkeypatch.setattr(pipeline, "append_chunk",
                        lambda *args: known.append(append(*args)) or known[-1])
    list(sample.latents(causal, PROMPTS[:1], [3], [1.0, 0.0], chunks=(1,) * 9))
    assert [len(context.cache) for context in known] == [1, 2, 3, 3, 3, 3, 3, 3]


def test_guidance_has_a_past_for_each_of_its_prompts(causal):
    """u_0 + w (u_c - u_0), chunk by chunk: the empty prompt sees the clip's past, too."""
    made, net, w = clip_of(causal, guidance=3.0), causal.network, 3.0
    contexts = [Context(causal.words([text])) for text in (PROMPTS[0], "")]
    noise = distributed.noise(causal.latent_shape, "sample", slots=[3])
    for z in noise.split(list(causal.chunks), 1):
        u_c, u_0 = (flowmap.conditioned(net, context) for context in contexts)
        u = lambda z, t, r: u_0(z, t, r) + w * (u_c(z, t, r) - u_0(z, t, r))     # noqa: B023
        start, z_0 = contexts[0].start, flowmap.euler_sample(u, z, GRID)
        torch.testing.assert_close(made[:, start:start + z.shape[1]], z_0, rtol=1e-4, atol=1e-5)
        contexts = [append_chunk(net, context, z_0, causal.config["full_chunks"])
                    for context in contexts]


def test_clips_play_at_the_rate_of_the_shards_that_they_were_learned_from(finished, tmp_path):
    stage = shutil.copytree(finished / "pretrain", tmp_path / "stage")
    assert sample.load_pipeline(stage).fps == 8
    record = json.loads((stage / "config.json").read_text())
    record["set"]["made by"] = {"fps": 12.0}
    (stage / "config.json").write_text(json.dumps(record))
    assert sample.load_pipeline(stage).fps == 12


def test_more_clips_than_a_batch_are_those_of_their_seeds(bidirectional):
    few = replace(bidirectional, batch=2)
    whole, parts = (sample.generate(some, PROMPTS[:1] * 5, [3, 4, 5, 6, 7], GRID)
                    for some in (bidirectional, few))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_a_video_goes_on_from_its_first_frames(causal, tmp_path):
    levels = torch.linspace(-0.9, 0.9, 8)
    video = levels[:, None, None, None].expand(8, 3, 16, 16)
    media.write_clip(tmp_path / "clip.mp4", video, 8)
    given = pipeline.given_latents(causal, tmp_path / "clip.mp4", False, causal.chunks)
    seen = causal.codec.decode(given)[0].mean((1, 2, 3))         # 3 chunks of 4, 2 frames each
    torch.testing.assert_close(seen, levels[:6], atol=0.1, rtol=0)


def test_shards_of_a_teacher_hold_the_prompt_of_each_clip(finished, tmp_path):
    teacher = sample.load_pipeline(finished / "pretrain")
    sample.main(["--run-dir", str(finished), "--stage", "pretrain", "--prompt", PROMPTS[0],
                 "--prompt", PROMPTS[1], "--steps", "1", "--save-latents", str(tmp_path / "made")])
    latents, text, _ = data.Shards(tmp_path / "made").draw(range(2))
    guidance = teacher.config["guidance"]
    for i, prompt in enumerate(PROMPTS):
        clip, = sample.latents(teacher, [prompt], [i], [1.0, 0.0], guidance=guidance)
        row = (latents - clip.bfloat16().float()).flatten(1).norm(dim=1).argmin()
        assert torch.equal(text[row], teacher.words([prompt])[0].bfloat16().float())


def test_what_is_trained_on_clips_of_a_toy_model_is_sampled_with_its_encoders(finished, tmp_path):
    """Shards of toys bring codec and words along, also to the stage after."""
    teacher = finished / "pretrain"
    made, run = tmp_path / "made", tmp_path / "run"
    sample.main(["--run-dir", str(finished), "--stage", "pretrain", "--prompt", PROMPTS[0],
                 "--per-prompt", "2", "--steps", "1", "--save-latents", str(made)])
    common = ["--preset", "tiny", "--run-dir", str(run), "--data", str(made), "--steps", "1"]
    train.main([*common, "--stage", "flowmap", "--tangent-warmup", "0", "--base", str(teacher)])
    train.main([*common, "--stage", "distill"])
    flags = [*common, "--stage", "flowmap", "--tangent-warmup", "0", "--base", str(teacher)]
    with pytest.raises(ValueError, match="holds clips of --frames 8 --size 16, not 4 and 16"):
        train.train(train.parse_config([*flags, "--frames", "4", "--fresh"]))
    codec = dict(checkpoint.read_tensors(made / runs.CODEC))
    (made / runs.CODEC).unlink()
    checkpoint.write_tensors(made / runs.CODEC, codec | {"mean": codec["mean"] + 0.1}, {})
    with pytest.raises(ValueError, match="of another codec than .*pretrain"):
        train.train(train.parse_config([*flags, "--fresh"]))
    shutil.rmtree(made)
    first = sample.load_pipeline(teacher)
    found = sample.load_pipeline(run / "distill")
    assert found.words.vocabulary == first.words.vocabulary
    assert torch.equal(found.words([PROMPTS[1]]), first.words([PROMPTS[1]]))
    assert all(torch.equal(x, vars(first.codec)[name]) for name, x in vars(found.codec).items())
    clip, = pipeline.generate(found, [PROMPTS[1]], [0], [1.0, 0.0])
    assert clip.shape == (8, 3, 16, 16)


def test_a_prompt_ends_where_its_line_does_and_nowhere_else(tmp_path):
    text = "a red\u2028circle\r\n\n a box \n"
    (tmp_path / "p.txt").write_bytes(text.encode())
    args = SimpleNamespace(prompt=[], prompts=tmp_path / "p.txt", prompt_at=[])
    assert sample.read_prompts(args) == ["a red\u2028circle", "a box"]


def test_a_row_of_frames_is_magnified_where_they_are_small_alone(tmp_path):
    for side, height in ((16, 18 * 7), (200, 202)):
        media.write_clip(tmp_path / "clip.png", torch.zeros(2, 3, side, side), 8)
        assert iio.imread(tmp_path / "clip.png").shape == (height, 2 * height, 3)


def test_pixels_have_their_colours_and_a_gif_its_pace(tmp_path):
    orange = torch.tensor([1.0, 0.0, -1.0])[:, None, None].expand(3, 2, 2)
    assert media.to_pixels(orange, 2)[0, 0].tolist() == [255, 128, 0]
    video = torch.stack([orange, -orange]).repeat_interleave(2, 0)
    media.write_clip(tmp_path / "clip.gif", video, 8)
    with Image.open(tmp_path / "clip.gif") as gif:
        assert gif.n_frames * gif.info["duration"] == 500
        assert np.abs(np.asarray(gif.convert("RGB"))[0, 0].astype(int) - [255, 128, 0]).max() < 9



def test_models_are_measured_as_they_were_trained(monkeypatch):
    """On the grid of their shift, teachers guided as much as the flow map beside them, which has it
    built in or is guided where that is asked; the teacher's clips are of other noise."""
    calls = []
    def generate(pipeline, captions, seeds, grid, sampler, guidance, chunks):
        calls.append((seeds, grid, guidance))
        return torch.zeros(len(captions), 8, 3, 16, 16)
    monkeypatch.setattr(evaluation, "generate", generate)
    teacher, student, plain = (
        pipeline.Pipeline(network(replace(SMALL, second_time=second)), None, None,
                          {"shift": 3.0, "guidance": guidance}, (), (4,))
        for second, guidance in ((False, 1.5), (True, 2.5), (True, 1.0)))
    measured = SimpleNamespace(dataset=SimpleNamespace(frames=8), captions=["a"] * 4,
                               features=lambda clips: None, scores=lambda clips: {})
    models = [("t", 0, "euler"), ("s", 1, "euler"), ("p", 2, "euler")]
    for some, asked, expected in ((models, None, [2.5, 2.5, 1.0, 1.0]),
                                  (models[:1], None, [1.5, 1.5]),
                                  (models, 4.0, [4.0, 4.0, 1.0, 4.0])):
        calls.clear()
        args = argparse.Namespace(steps=[2], length=1, guidance=asked)
        evaluation.measure(measured, some, [teacher, student, plain], teacher, args)
        assert [guidance for _, _, guidance in calls] == expected
        grids = [flowmap.time_grid(n, 3.0) for n in (50, 2, 2, 2)]
        assert [grid for _, grid, _ in calls] == grids[:len(calls)]
        (compared, *measured_with) = [set(seeds) for seeds, _, _ in calls]
        assert all(not compared & seeds for seeds in measured_with)


def test_stages_whose_clips_were_moved_are_of_one_set(finished, tmp_path):
    stages = [shutil.copytree(finished / name, tmp_path / name) for name in ("pretrain", "flowmap")]

    def record(stage, data, held, frames=8):
        found = json.loads((stage / "config.json").read_text())
        found["config"] |= {"data": data, "frames": frames}
        (stage / "config.json").write_text(json.dumps(found | {"set": held}))
    held = {"captions": "checksum 1", "clips": "checksum 2"}
    for there, other, differs in (
            (("/old", held), ("/new", held), False), (("/old", held), ("/new", {}), True),
            (("/old", {}), ("/new", {}), True), (("shapes", held), ("loop", held), True),
            (("/old", held), ("/old", held, 16), True)):
        record(stages[0], *there)
        record(stages[1], *other)
        assert bool(runs.other_clips(*stages)) == differs


def test_accuracy_asks_for_every_attribute():
    shapes = data.open_data("shapes")
    clips = shapes.clips(range(4), captions=["a red circle moving left"] * 4)[0]
    asked = ["a red circle moving left", "a blue circle moving left", "a red square moving left",
             "a blue circle moving up"]
    assert evaluation.accuracy(shapes, clips, asked) == {
        "all": 0.25, "colour": 0.5, "shape": 0.75, "direction": 0.75}


def test_psnr_is_of_the_whole_range():
    clips = torch.zeros(2, 1, 3, 4, 4)
    assert evaluation.psnr(clips, clips + 0.2).tolist() == pytest.approx([20.0, 20.0])


@pytest.mark.parametrize("kinds", [0, 4])
def test_what_is_alike_by_design_is_left_out_of_a_sets_distances(kinds):
    """Prompts in turn are kinds; captions that were drawn are paired with the teacher's."""
    x, y = torch.randn(2, 16, 3, generator=generator("kinds"))
    measured = object.__new__(evaluation.EvaluationSet)
    measured.__dict__ |= {"space": evaluation.Frechet(x, 3), "kinds": kinds, "chunk_spaces": [],
                          "dataset": SimpleNamespace(attributes={}), "real": (y, 1.0)}
    measured.space.features = lambda clips: clips
    measured.distance = lambda space, clips: 0.0
    measured.teacher = measured.features(y)
    spreads = evaluation.mean_distance(x, kinds), evaluation.mean_distance(y, kinds)
    expected = evaluation.energy_distance(x, y, *spreads, paired=not kinds)
    assert measured.scores(x)["ed_teach"] == pytest.approx(expected, rel=1e-6)


def test_a_colon_in_a_path_is_no_sampler(finished, tmp_path):
    (tmp_path / "at 12:30").symlink_to(finished)
    stage = tmp_path / "at 12:30" / "distill"
    words = f"{stage},{stage}:consistency"
    assert evaluation.parse_models(tmp_path, words) == [
        (str(stage), stage, "euler"), (f"{stage}:consistency", stage, "consistency")]


def test_features_of_many_clips_are_those_of_each():
    clips = torch.randn(600, 2, 3, 4, 4, generator=generator("clips"))
    space = evaluation.Frechet(clips, 8)
    centred = clips.flatten(1).double() - clips.flatten(1).double().mean(0)
    torch.testing.assert_close(space.features(clips), centred @ space.basis)
    values = torch.linalg.eigvalsh(centred.T @ centred).flip(0)[:8]          # the main components
    torch.testing.assert_close(space.features(clips).square().sum(0).sort(descending=True)[0],
                               values)


def test_a_step_shows_the_given_frames_as_they_are(bidirectional):
    seen, given = [], torch.ones(1, 1, *bidirectional.latent_shape[1:])
    z_0 = clip_of(bidirectional, given=given, on_step=seen.append)
    assert len(seen) == 2 and all(torch.equal(z[:, :1], given) for z in seen)
    torch.testing.assert_close(seen[-1], z_0)


def test_figures_of_other_runs_are_kept_beside_them(finished, monkeypatch):
    def found(folder, flag):
        raise ValueError(f"in {folder}")
    monkeypatch.setattr(evaluation.cli, "check_folder", found)
    for words in (["--run-dir", str(finished)], ["--models", str(finished / "distill")]):
        with pytest.raises(ValueError) as error:
            evaluation.main(words)
        assert str(error.value) == f"in {finished / 'eval'}"


def test_models_that_are_shipped_know_their_words():
    """The vectors of words are part of what was trained."""
    shipped, shapes = pipeline.load_pipeline(sample.SHIPPED / "distill"), data.open_data("shapes")
    captions = shapes.captions[::3]
    clips = pipeline.generate(shipped, captions, list(range(16)), [1.0, 0.9, 0.6, 0.0])
    assert evaluation.accuracy(shapes, clips, captions)["all"] >= 0.75


@pytest.mark.parametrize("flags, expected", [
    (["--steps", "2", "--shift", "3"], [1.0, 0.75, 0.0]),
    (["--grid", "1,0.6,0.2,0"], [1.0, 0.6, 0.2, 0.0])])
def test_a_clip_is_made_on_the_grid_that_is_asked_for(monkeypatch, flags, expected):
    grids = []
    monkeypatch.setattr(sample, "write_clips", lambda *args: grids.append(args[-2]))
    sample.main(["--ckpt", str(sample.SHIPPED / "distill"), "--prompt", PROMPTS[0], *flags])
    assert grids == [pytest.approx(expected)]


def test_a_longer_clip_goes_on_with_the_longest_chunk():
    codec = SimpleNamespace(frames=lambda n: 4 * n - 3)
    released = SimpleNamespace(chunks=(1, 3, 3, 2), codec=codec)
    assert pipeline.chunks_for(released, 34) == (1, 3, 3, 2, 3)
    assert pipeline.chunks_for(released, 25) == (1, 3, 3)


def test_error_bars_are_the_deviation_of_a_sample(tmp_path, monkeypatch):
    axes, bars = pytest.importorskip("matplotlib.axes").Axes, []
    errorbar = axes.errorbar
    monkeypatch.setattr(axes, "errorbar", lambda *args, **more: bars.append(more["yerr"])
                        or errorbar(*args, **more))
    rows = [{"model": "m", "steps": n, "ed": ed} for n, ed in ((1, 1.0), (1, 3.0), (2, 5.0))]
    assert evaluation.draw_figure(tmp_path / "curve.png", rows)
    assert bars == [pytest.approx([2**0.5, 0])]


def test_there_is_no_prompt_at_the_end_of_a_clip():
    causal = pipeline.load_pipeline(sample.SHIPPED / "causal-distill")
    count = len(causal.chunks)
    inside, beyond = (sample.parse_args(["--prompt", "a", "--prompt-at", str(m), "a"])
                      for m in (count - 1, count))
    sample.sampling_options(inside, causal, "stage")
    with pytest.raises(ValueError, match="counted from 0"):
        sample.sampling_options(beyond, causal, "stage")


def test_every_clip_keeps_its_own_given_frames():
    few = replace(pipeline.load_pipeline(sample.SHIPPED / "distill"), batch=2)
    clips = data.open_data("shapes").clips(range(3))[0]
    given = few.codec.encode(clips)[:, :1]
    made = pipeline.generate(few, [PROMPTS[0]] * 3, [0, 1, 2], [1.0, 0.0], given=given)
    torch.testing.assert_close(made[:, :2], few.codec.decode(given))


def test_prompts_of_an_evaluation_come_in_turn(quick):
    """As mean_distance takes them: row i is of caption i mod 48. The space has 64 components."""
    measured = evaluation.EvaluationSet(data.open_data("shapes"), 96, [])
    assert measured.prompts == measured.captions == 2 * data.open_data("shapes").captions
    assert measured.kinds == 48 and measured.real[0].shape == (256, 64)


def test_a_curve_is_the_mean_over_seeds(tmp_path, monkeypatch):
    axes, means = pytest.importorskip("matplotlib.axes").Axes, []
    errorbar = axes.errorbar
    monkeypatch.setattr(axes, "errorbar", lambda self, x, y, **more: means.append((x, y))
                        or errorbar(self, x, y, **more))
    rows = [{"model": "m", "steps": n, "ed": ed} for n, ed in ((2, 5.0), (1, 1.0), (1, 3.0))]
    assert evaluation.draw_figure(tmp_path / "curve.png", rows)
    assert means == [([1, 2], [2.0, 5.0])]


def test_a_picture_that_clips_start_from_is_known_by_its_bytes(tmp_path):
    stage, start, found = sample.SHIPPED / "distill", tmp_path / "a.png", []
    args = sample.parse_args(["--prompt", "a", "--image", str(start)])
    shipped, options = sample.load_pipeline(stage), {"sampler": "euler", "guidance": 1.0}
    for content in (b"one", b"another"):
        start.write_bytes(content)
        found.append(sample.made_by(args, stage, shipped, ["a"], [0], [1.0, 0.0], options))
    assert found[0]["start"] != found[1]["start"]


def test_shards_of_many_batches_hold_every_seeds_clip_with_its_caption_and_rate(tmp_path,
                                                                                monkeypatch):
    stage = sample.SHIPPED / "distill"
    few = replace(sample.load_pipeline(stage), batch=2, fps=12.0)
    monkeypatch.setattr(sample, "load_pipeline", lambda *args: few)
    sample.main(["--ckpt", str(stage), "--prompt", PROMPTS[0], "--prompt", PROMPTS[1],
                 "--per-prompt", "3", "--steps", "1", "--save-latents", str(tmp_path / "made")])
    made = json.loads((tmp_path / "made" / "made_by.json").read_text())
    assert made["fps"] == 12
    clips = data.Shards(tmp_path / "made").draw(range(6))[0]
    assert len({clip.numpy().tobytes() for clip in clips}) == 6
    file, = (tmp_path / "made").glob("part-*.safetensors")
    with safe_open(str(file), "pt") as shard:
        assert json.loads(shard.metadata()["captions"]) == [p for p in PROMPTS for _ in range(3)]


def test_figures_of_shipped_models_are_not_put_among_them(monkeypatch):
    def found(folder, flag):
        raise ValueError(f"in {folder}")
    monkeypatch.setattr(evaluation.cli, "check_folder", found)
    for words in (["--run-dir", str(sample.SHIPPED)],
                  ["--models", str(sample.SHIPPED / "distill")]):
        with pytest.raises(ValueError, match="^in runs/shipped$"):
            evaluation.main(words)


def test_a_shipped_student_of_another_set_is_not_measured_with_the_others():
    found = [word for word, _, _ in evaluation.parse_models(sample.SHIPPED, None)]
    assert found == ["pretrain", "flowmap", "distill", "flowmap:consistency"]


def test_a_teacher_has_the_flow_maps_guidance_in_euler_steps_alone():
    teacher = sample.load_pipeline(sample.SHIPPED / "pretrain")
    for sampler, expected in (("euler", 2.5), ("consistency", 1.0)):
        assert evaluation.guidance_of(teacher, sampler, None, [2.5]) == expected
