"""data.py, toys.py, media.py, stand-ins: clips are functions of (seed, index) and can be read back;
videos and pictures are what a person sees; shards hold what was written or say so."""
import errno
import json
import os
import random
import signal
import subprocess
import threading
import time
from math import prod
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageCms
from safetensors.torch import load_file

import data as data_module
import encoders
import eval as evaluation
import media
import stages
from config import parse_config
from data import Folder, Shards, ShardWriter, open_data, shuffled
from encoders import Encoded, PatchPCA, Words, in_parts
from toys import DIRECTIONS, SETS

TOYS = tuple(SETS)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors on a busy machine: a second thread mostly waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def psnr(a, b):
    return 10 * torch.log10(4 / (a - b).square().flatten(1).mean(1).clamp(min=1e-10))


@pytest.mark.parametrize("name", TOYS)
def test_a_clip_depends_on_seed_and_index_only(name):
    whole, captions = open_data(name).clips(range(12), seed=5)
    data = open_data(name)
    data.clips([99], seed=1)                                     # leaves no trace
    for i in (11, 3, 0):
        alone, caption = data.clips([i], seed=5)
        assert torch.equal(alone[0], whole[i]) and caption == [captions[i]]
    other, _ = data.clips(range(12), seed=6)
    assert not any(torch.equal(a, b) for a, b in zip(whole, other))
    assert len({clip.numpy().tobytes() for clip in whole}) == 12


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("frames, size", [(8, 16), (5, 32)])
def test_attributes_read_back_and_nearest_clip_is_close(name, frames, size):
    data = open_data(name, frames, size)
    video, captions = data.clips(range(480 if size == 16 else 96), seed=1)
    assert video.dtype == torch.float32 and video.shape[1:] == (frames, 3, size, size)
    assert video.min() == -1 and video.max() <= 1
    truth, seen = data.labels(captions), data.read(video)
    assert list(truth) == list(seen) == list(data.attributes)
    for key in truth:
        assert (truth[key] == seen[key]).float().mean() >= 0.99, key
    near = data.nearest(video)
    assert psnr(video, near).mean() >= 35 and psnr(video, near).min() >= 25
    # A swap of attributes must show: played backwards, every clip moves the other way.
    back = data.read(video.flip(1))
    if "direction" in truth:
        opposite = torch.tensor([1, 0, 3, 2])[truth["direction"]]
        assert (back["direction"] == opposite).float().mean() >= 0.99
    assert psnr(video.flip(1), near).mean() < psnr(video, near).mean() - 10


@pytest.mark.parametrize("name", TOYS)
def test_readers_bear_mild_noise_and_degenerate_clips(name):
    data = open_data(name)
    video, captions = data.clips(range(200))
    noisy = video + 0.2 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    truth, seen = data.labels(captions), data.read(noisy)
    for key in truth:
        assert (truth[key] == seen[key]).float().mean() >= 0.97, key
    noise = 3 * torch.randn(4, *video.shape[1:], generator=torch.Generator().manual_seed(1))
    flat = [torch.full_like(noise, level) for level in (-1, 1, torch.nan)]
    for clip in (noise, *flat, video[:0]):
        found, near = data.read(clip), data.nearest(clip)
        assert near.shape == clip.shape and near.isfinite().all()
        for key, values in data.attributes.items():
            assert found[key].shape == (len(clip),)
            assert ((found[key] >= 0) & (found[key] < len(values))).all()


@pytest.mark.parametrize("name", TOYS)
def test_captions_cover_the_attributes_and_can_be_chosen(name):
    data = open_data(name)
    count = prod(map(len, data.attributes.values()))
    assert len(set(data.captions)) == len(data.captions) == count
    video, captions = data.clips(range(len(data.captions)), captions=data.captions)
    assert captions == data.captions
    truth = data.labels(captions)
    for key, values in data.attributes.items():
        assert all(values[i] in caption.split() for i, caption in zip(truth[key], captions))
    assert all(torch.equal(data.read(video)[key], truth[key]) for key in truth)
    drawn = data.clips(range(1000))[1]
    assert set(drawn) == set(data.captions)                      # all are drawn ...
    assert max(map(drawn.count, set(drawn))) < 3 * 1000 / count  # ... about evenly
    with pytest.raises(ValueError, match="is not in list"):
        data.clips([0], captions=[data.captions[0] + "s"])
    with pytest.raises(ValueError, match="one for each"):
        data.clips([0, 1], captions=data.captions[:1])


@pytest.mark.parametrize("frames, size", [(8, 16), (21, 64), (1, 8)])
def test_a_shape_stays_inside_and_travels_the_same_share_of_the_picture(frames, size):
    data = open_data("shapes", frames, size)
    video, captions = data.clips(range(48), captions=data.captions)
    ink = (video.amax(2) + 1) / 2                                # (B, T, H, W)
    mass = ink.sum((2, 3))
    assert (mass.std(1, correction=0) / mass.mean(1)).max() < 0.05   # nothing is cut off on the way
    pixel = torch.arange(size) + 0.5
    centre = torch.stack([ink.sum(2) @ pixel, ink.sum(3) @ pixel], -1) / mass[..., None]
    heading = torch.tensor([DIRECTIONS[c.split()[-1]] for c in captions])
    travel = 0.35 * size * (frames > 1)
    assert torch.allclose(centre[:, -1] - centre[:, 0], heading * travel, atol=0.25)     # pixels


def test_unknown_data_set():
    for name, hint in (("shape", r"did you mean shapes\?"), ("zzz", f"valid: {', '.join(SETS)}$")):
        with pytest.raises(ValueError, match=f"no folder '{name}' .* no data set; {hint}"):
            open_data(name)
    with pytest.raises(ValueError, match="size >= 8"):
        open_data("shapes", size=4)


def test_patch_pca_keeps_the_picture_and_its_spectrum():
    data = open_data("shapes")
    train, test = data.clips(range(256))[0], data.clips(range(64), seed=1)[0]
    pca = PatchPCA.fit(train)
    z = pca.encode(train)
    assert z.shape == (256, 4, 48, 4, 4)
    channel = z.transpose(1, 2).transpose(0, 1).flatten(1)       # (C, values)
    assert channel.mean(1).abs().max() < 1e-4 and abs(z.var() - 1) < 1e-3
    variance = channel.var(1)
    # The spectrum decays: it is not whitened.
    assert (variance.diff() <= 1e-5).all() and variance[0] > 10 * variance[-1]
    for video in (train, test):
        lost = (pca.decode(pca.encode(video)) - video).square().mean()
        assert lost < 0.03 * (video - video.mean((0, 1, 3, 4), keepdim=True)).square().mean()
    assert psnr(pca.decode(pca.encode(test)), test).mean() > 22
    full = PatchPCA.fit(train, channels=96)                      # all components: nothing is lost
    assert torch.allclose(full.decode(full.encode(test)), test, atol=1e-3)
    assert pca.decode(z * 100).abs().max() <= 1
    again = PatchPCA(**vars(pca))
    assert torch.equal(again.encode(test), pca.encode(test))
    assert torch.equal(PatchPCA.fit(train).basis, pca.basis)
    peak = pca.basis.gather(0, pca.basis.abs().argmax(0, keepdim=True))
    assert (peak > 0).all()


def test_patch_pca_of_parts_is_that_of_the_whole():
    """The parts differ in their means: the first is dark."""
    data = open_data("shapes")
    whole = data.clips(range(64), seed=1)[0]
    whole[:16] -= 1
    expected, sizes = PatchPCA.fit(whole), []
    found = PatchPCA.fit(lambda: [sizes.append(len(x)) or x for x in whole.split(16)])
    assert sizes == [16, 16, 16, 16] * 2
    assert (found.basis - expected.basis).abs().max() < 1e-6
    assert torch.allclose(found.mean, expected.mean) and found.scale == expected.scale
    parts = list(in_parts(data, 64, seed=1, values=10 * data.clips([0])[0].numel()))
    assert [len(part) for part in parts] == [10] * 6 + [4]
    assert torch.equal(torch.cat(parts), data.clips(range(64), seed=1)[0])


def test_patch_pca_places_patches():
    """A lit patch moves the latents of its own place and frame only."""
    pca = PatchPCA.fit(open_data("shapes").clips(range(32))[0])
    dark, lit = torch.full((1, 8, 3, 16, 16), -1.0), torch.full((1, 8, 3, 16, 16), -1.0)
    lit[:, 5, :, 9, 2] = 1                # frame 5 -> F 2, row 9 -> h 2, column 2 -> w 0
    moved = (pca.encode(lit) - pca.encode(dark)).abs().amax(2)[0] > 1e-3
    assert moved.nonzero().tolist() == [[2, 2, 0]]


def test_a_size_without_patches_is_refused_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "decode_once", None)
    for frames, size in ((7, 16), (8, 18)):
        with pytest.raises(ValueError, match="divisible by the patch"):
            Folder(tmp_path, frames, size)


def test_patch_pca_errors():
    with pytest.raises(ValueError, match="divisible"):
        PatchPCA.fit(torch.zeros(1, 7, 3, 16, 16))


def test_words():
    words = Words.of(["a red circle moving left", "a blue square"])
    assert words.length == 5 and words.vocabulary == sorted(words.vocabulary)
    text = words(["A red, circle!", "circle red a", ""])
    assert text.shape == (3, 5, 64) and text.dtype == torch.float32
    assert torch.equal(text[0, :3], text[1, :3].flip(0)) and not torch.equal(text[0], text[1])
    assert not text[0, 3:].any() and not text[2].any()
    assert torch.allclose(text[0, :3].square().mean(1), torch.ones(3))
    # A vector belongs to its word, whatever else is in the vocabulary.
    assert torch.equal(Words(["red"])(["red"])[0, 0], text[0, 1])
    near = "'circel' .nearest known: 'circle'.*'ret' .nearest known: 'red'"
    with pytest.raises(ValueError, match=near):
        words(["a ret circel"])
    with pytest.raises(ValueError, match="at most 5"):
        words(["a a a a a a"])


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(("a.mp4", "b.mp4", "c.gif", "d.gif")):
        # GIF writers merge equal frames, so the grey level moves a little.
        video = np.full((6, 32, 64, 3), 40 * i + 20, np.uint8)
        video += np.arange(6, dtype=np.uint8)[:, None, None, None]
        video[:, :, :8] = video[:, :, -8:] = 255                 # beyond the square crop
        rate = {"fps": 8} if name.endswith("mp4") else {"duration": 100}
        imageio.imwrite(tmp_path / name, video, **rate)
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "c.txt").write_text("third")
    rows = [{"file": "b.mp4", "caption": "second"}, {"file": "d.gif", "caption": "fourth"},
            {"file": "a.mp4", "caption": "overruled"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


def test_folder_shows_each_clip_once_an_epoch(folder):
    data = open_data(str(folder), frames=4, size=16)
    assert len(data) == 4 and data.captions == ["first", "fourth", "second", "third"]
    orders = []
    for epoch in range(6):
        video, captions = data.clips(range(4 * epoch, 4 * epoch + 4), seed=2)
        assert sorted(captions) == data.captions and video.shape == (4, 4, 3, 16, 16)
        for clip, caption in zip(video, captions):               # the caption belongs to the clip
            level = 40 * ["first", "second", "third", "fourth"].index(caption) + 20
            assert ((clip + 1) * 127.5 - level).abs().max() < 12
            alone = data.clips([4 * epoch + captions.index(caption)], seed=2)
            assert torch.equal(alone[0][0], clip) and alone[1] == [caption]
        orders.append(tuple(captions))
    assert len(set(orders)) > 1
    again = Folder(folder, 4, 16).clips(range(24), seed=2)
    assert torch.equal(again[0], data.clips(range(24), seed=2)[0])
    starts = {tuple(clip.mean((1, 2, 3)).tolist()) for clip in data.clips(range(80))[0]}
    assert len(starts) > 6                                       # 4 files with up to 3 starts each
    with pytest.raises(ValueError, match="cannot be chosen"):
        data.clips([0], captions=["first"])


def test_folder_names_and_skips_what_it_cannot_use(folder, capfd):
    (folder / "corrupt.mp4").write_bytes(b"not a video at all")
    (folder / "corrupt.gif").write_bytes(b"GIF89a nor this")
    (folder / "empty.mp4").write_bytes(b"")
    imageio.imwrite(folder / "short.mp4", np.zeros((2, 32, 32, 3), np.uint8), fps=8)
    imageio.imwrite(folder / "silent.mp4", np.zeros((6, 32, 32, 3), np.uint8), fps=8)
    for name in ("corrupt", "empty", "short"):
        (folder / f"{name}.txt").write_text("a caption")
    with (folder / "captions.jsonl").open("a") as file:
        file.write('{"file": "missing.mp4", "caption": "nowhere"}\nnot json\n')
    capfd.readouterr()
    data = open_data(str(folder), frames=4)
    said = capfd.readouterr().err
    assert len(data) == 4
    for name in ("corrupt.mp4", "corrupt.gif", "empty.mp4",
                 "short.mp4: 2 frames at 8 a second, 4 needed",
                 "silent.mp4: no caption", "missing.mp4", "line 5"):
        assert name in said
    assert "4 clips usable, 5 skipped" in said


def test_folder_without_a_usable_clip(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"junk")
    with pytest.raises(ValueError, match="expected videos"):
        open_data(str(tmp_path))


def test_a_folder_is_decoded_once(folder, monkeypatch):
    calls, decode = [], data_module.decode

    def watched(file, *args):
        calls.append(file.name)
        time.sleep(0.05)
        return decode(file, *args)
    monkeypatch.setattr(data_module, "decode", watched)
    threads = [threading.Thread(target=Folder, args=(folder, 4, 16)) for _ in range(3)]
    for thread in threads:                                       # as the ranks of a launch
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(calls) == ["a.mp4", "b.mp4", "c.gif", "d.gif"]
    calls.clear()
    Folder(folder, 6, 16, held_out=False)                        # a later stage
    assert not calls
    os.utime(folder / "b.mp4", (1, 1))                           # another video
    Folder(folder, 4, 16)
    assert calls == ["b.mp4"]
    Folder(folder, 4, 24)
    assert len(calls) == 5


def test_a_half_decoded_video_does_not_count(folder, monkeypatch):
    def half(*args):
        yield np.zeros((4, 16, 16, 3), np.uint8)
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(data_module, "decode", half)
        with pytest.raises(OSError, match="No space left .*make room there, or set XDG_CACHE_HOME"):
            Folder(folder, 4, 16)
    assert len(Folder(folder, 4, 16)) == 4
    left = [file.name for file in data_module.CACHE.rglob("*.partial")]
    assert not left


@pytest.fixture
def twenty(tmp_path):
    for i in range(20):
        clip = np.full((4, 16, 16, 3), 10 * i, np.uint8)
        clip += np.arange(4, dtype=np.uint8)[:, None, None, None]
        imageio.imwrite(tmp_path / f"{i}.gif", clip, duration=120)
        (tmp_path / f"{i}.txt").write_text(f"level {i}")
    return tmp_path


def test_a_run_does_not_go_on_with_other_clips(twenty, tmp_path_factory):
    run, flags = tmp_path_factory.mktemp("run"), ("--data", str(twenty), "--frames", "4")
    stages.trained(run, "pretrain", *flags, "--steps", "1")
    clip = twenty / Folder(twenty, 4, 16).stored[0][0]
    caption = clip.with_suffix(".txt").read_text()
    clip.with_suffix(".txt").write_text("another level")
    with pytest.raises(ValueError, match="was started when --data .* had captions"):
        stages.trained(run, "pretrain", *flags, "--steps", "2")
    clip.with_suffix(".txt").write_text(caption)
    longer = np.arange(6, dtype=np.uint8)[:, None, None, None].repeat(16, 1).repeat(16, 2)
    imageio.imwrite(clip, longer.repeat(3, 3), duration=120)     # under the same name
    with pytest.raises(ValueError, match="was started when --data .* had clips"):
        stages.trained(run, "pretrain", *flags, "--steps", "2")


def test_a_folder_holds_out_clips_by_their_names(twenty):
    def names(held_out):
        return {name for name, _, _ in Folder(twenty, 4, 16, held_out).stored}
    train, apart = names(False), names(True)
    assert train | apart == {f"{i}.gif" for i in range(20)} and not train & apart and apart
    assert Folder(twenty, 4, 16).captions == Folder(twenty, 4, 16, held_out=True).captions
    for file in sorted(twenty.glob("1*")):                       # others do not move
        file.unlink()
    assert names(False) == {name for name in train if name[0] != "1"}
    for name in apart:
        (twenty / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="none of its .* clips is held out"):
        Folder(twenty, 4, 16, held_out=True)


def test_evaluation_draws_what_training_does_not(twenty, tmp_path_factory, monkeypatch):
    run, sets = tmp_path_factory.mktemp("run"), []
    stages.trained(run, "pretrain", "--data", str(twenty), "--frames", "4", "--steps", "1")

    def noted(dataset, *args):
        sets.append(dataset.stored)
        raise KeyboardInterrupt
    monkeypatch.setattr(evaluation, "EvaluationSet", noted)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(["--run-dir", str(run)])
    assert sets == [Folder(twenty, 4, 16, held_out=True).stored]


def test_what_is_held_out_is_drawn_file_by_file_each_time_from_all(twenty):
    """Statistics of independent samples are asked of it; training sees all in each epoch."""
    for held_out in (False, True):
        folder = Folder(twenty, 4, 16)
        folder.held_out = held_out                   # of its own clip there is one
        texts = folder.clips(range(300 * len(folder)), seed=3)[1]
        counts = torch.tensor([texts.count(text) for text in sorted(set(texts))]).double()
        assert len(counts) == len(folder) > 1
        if held_out:                                 # of as many independent draws as there are
            expected = 300 * (1 - 1 / len(folder))
            assert 0 < (counts - 300).square().mean() < 9 * expected
        else:
            assert set(counts.tolist()) == {300}


def test_ffmpeg_that_is_stopped_is_no_damaged_video(twenty, tmp_path_factory, monkeypatch):
    """By a signal or for want of memory: else a good clip would be missing in the set of the run.
    It runs in a session of its own, where Ctrl-C in the terminal does not reach it."""
    folder = tmp_path_factory.mktemp("bin")
    monkeypatch.setattr(data_module, "CACHE", folder / "cache")
    monkeypatch.setattr(data_module, "DECODERS", 1)
    for i, end in enumerate(("exit 255", "kill -TERM $$", "kill -KILL $$")):
        stopped = folder / f"ffmpeg-{i}"
        stopped.write_text(f"#!/bin/sh\nread a b c d e session rest < /proc/$$/stat\n"
                           f"echo $session >> {folder}/session\n{end}\n")
        stopped.chmod(0o755)
        monkeypatch.setattr(media, "get_ffmpeg_exe", lambda path=stopped: str(path))
        with pytest.raises(ChildProcessError, match="ffmpeg was stopped"):
            Folder(twenty, 4, 16)
        sessions = (folder / "session").read_text().split()      # others may be writing still
        assert int(sessions[0]) != os.getsid(0)


def test_shards_that_are_not_finished_are_not_taken_for_a_folder_of_videos(tmp_path):
    (tmp_path / "made_by.json").write_text("{}")
    with pytest.raises(ValueError, match="no finished shards: run the command"):
        open_data(str(tmp_path))


def test_a_folder_has_one_name():
    assert {parse_config(["--data", name]).data for name in ("clips/", "./clips", "clips")} == {
        "clips"}


def test_captions_in_another_encoding_are_named(folder, capfd):
    (folder / "a.txt").write_bytes("gr\u00fcn".encode("latin-1"))
    (folder / "c.txt").write_bytes("gr\u00fcn".encode("utf-8-sig"))
    (folder / "more.jsonl").write_bytes("{}".encode("utf-16"))
    (folder / "d.txt").write_text("!?")
    data = Folder(folder, 4, 16)
    said = capfd.readouterr().err
    assert data.captions == ["gr\u00fcn", "second"]
    for line in ("a.txt: not UTF-8 text", "more.jsonl: not UTF-8 text", "d.gif: no caption"):
        assert line in said


# --- media.py

QUARTERS = np.array([[[200, 30, 40], [20, 180, 60]], [[40, 60, 190], [250, 250, 250]]], np.uint8)
UPRIGHT = QUARTERS.repeat(32, 0).repeat(32, 1)                   # (64, 64, 3)
STILL = UPRIGHT[None].repeat(4, 0)


def ffmpeg(*args, pictures=STILL, rate=16):
    """Run it on these pictures, or on a file where the arguments name one."""
    height, width, channels = pictures.shape[1:]
    pixels = "rgba" if channels == 4 else "rgb24"
    source = f"-f rawvideo -pix_fmt {pixels} -s {width}x{height} -r {rate} -i -".split()
    start = [] if "-i" in args else source
    subprocess.run([get_ffmpeg_exe(), "-v", "error", "-y", *start, *map(str, args)],
                   input=pictures.tobytes(), check=True)


def quarters(picture) -> np.ndarray:
    """The colours (2, 2, 3) in the middles of the quarters of (3, H, W)."""
    side = picture.shape[1] // 4
    return picture[:, side::2 * side, side::2 * side].permute(1, 2, 0).numpy().astype(int)


def test_a_video_shows_the_same_at_any_frame_rate(tmp_path):
    levels = (np.arange(64) * 3 + 30).astype(np.uint8)           # a second at 64 a second
    scene = np.zeros((64, 32, 32, 3), np.uint8) + levels[:, None, None, None]
    lossless = ["-c:v", "libx264", "-qp", "0"]
    for rate in (16, 32, 64):
        ffmpeg(*lossless, tmp_path / f"{rate}.mp4", pictures=scene[::64 // rate], rate=rate)
    files = [tmp_path / f"{name}.mp4" for name in (16, 32, 64, "late", "uneven")]
    ffmpeg("-itsoffset", "3.3", "-i", files[0], "-c", "copy", files[3])
    ffmpeg("-i", files[2], "-vf", "select=not(mod(n\\,8))+lt(n\\,20)", "-fps_mode", "vfr",
           *lossless, files[4])
    files.append(tmp_path / "16.webm")                           # its times are in milliseconds
    ffmpeg("-i", files[0], "-c:v", "libvpx-vp9", "-lossless", "1", files[5])
    for file in files:
        seen = media.read_video(file, 16, 16, 8)[:, 0, 8, 8].int().numpy()
        assert np.abs(seen - levels[::8].astype(int)).max() <= 2, file
        assert len(media.read_video(file, 16, 16, 8, most=3)) == 3
    for file in (files[0], files[5]):
        seen = media.read_video(file, 16, 16, 16)[:, 0, 8, 8].int().numpy()
        assert np.abs(seen - levels[::4].astype(int)).max() <= 2, file
    assert len(media.read_video(files[0], 16, 16, 24)) == 24     # slower ones are held
    assert media.read_clip(files[1], 8, 16, 16, 8).shape == (8, 3, 16, 16)
    with pytest.raises(ValueError, match="32.mp4: too short, 8 of 9 frames at 8 a second"):
        media.read_clip(files[1], 9, 16, 16, 8)


BT709 = "-colorspace bt709 -color_primaries bt709 -color_trc bt709"
# As telephones write it; what is white here has 203 candela a square metre.
HDR = ("-vf zscale=min=gbr:tin=bt709:pin=bt709:rin=full:m=bt2020nc:t={0}:p=bt2020:r=tv:npl=203,"
       "format=yuv420p10le -colorspace bt2020nc -color_primaries bt2020 -color_trc {0}")
ALPHA = np.concatenate([UPRIGHT, np.full((64, 64, 1), 255, np.uint8)], 2)[None].repeat(4, 0)
ALPHA[:, 32:, :32, 3] = 128


@pytest.mark.parametrize("name, flags, pictures", [
    ("601.mp4", "-vf scale=out_color_matrix=bt601:out_range=tv,format=yuv420p -colorspace "
     "smpte170m", STILL),
    ("709.mp4", f"-vf scale=out_color_matrix=bt709:out_range=tv,format=yuv420p {BT709}", STILL),
    ("full.mp4", "-vf scale=out_color_matrix=bt709:out_range=pc,format=yuv420p -color_range "
     f"pc {BT709}", STILL),
    ("deep.mp4", f"-vf scale=out_color_matrix=bt709:out_range=tv,format=yuv420p10le {BT709}",
     STILL),
    ("hlg.mp4", HDR.format("arib-std-b67"), STILL),
    ("pq.mp4", HDR.format("smpte2084"), STILL),
    ("wide.mp4", "-vf scale=32:64,setsar=2", STILL),
    ("paint.gif", "-filter_complex split[a][b];[a]palettegen[p];[b][p]paletteuse", STILL),
    ("alpha.mov", "-c:v png", ALPHA),
])
def test_a_video_is_what_a_person_sees(tmp_path, name, flags, pictures):
    lossless = ["-c:v", "libx264", "-qp", "0"] if name.endswith("mp4") else []
    ffmpeg(*lossless, *flags.split(), tmp_path / name, pictures=pictures)
    expected = QUARTERS.astype(int)
    if pictures is ALPHA:                                        # half transparent, over white
        expected[1, 0] = (expected[1, 0] + 255) / 2
    seen = quarters(media.read_video(tmp_path / name, 64, 64, 16)[1])
    assert np.abs(seen - expected).max() <= 5, seen
    upright = media.read_video(tmp_path / name, 32, 16, 16)[0]   # the middle, cropped
    assert upright.shape == (3, 32, 16)
    assert np.abs(upright[:, 6, 3].numpy() - expected[0, 0]).max() <= 5
    assert np.abs(upright[:, 6, 12].numpy() - expected[0, 1]).max() <= 5


def test_pixels_that_are_not_square_are_shown_wide(tmp_path):
    framed = STILL.copy()
    framed[:, :6] = 255
    ffmpeg("-vf", "scale=32:64,setsar=2", "-qp", "0", tmp_path / "wide.mp4", pictures=framed)
    seen = media.read_video(tmp_path / "wide.mp4", 64, 64, 16)[0]
    assert seen[:, 1].min() > 240 and np.abs(quarters(seen) - QUARTERS).max() <= 6


def test_a_rotated_video_is_upright(tmp_path):
    ffmpeg("-qp", "0", tmp_path / "turned.mp4", pictures=np.rot90(STILL, -1, (1, 2)).copy())
    ffmpeg("-display_rotation", "90", "-i", tmp_path / "turned.mp4", "-c", "copy",
           tmp_path / "phone.mp4")
    seen = quarters(media.read_video(tmp_path / "phone.mp4", 64, 64, 16)[0])
    assert np.abs(seen - QUARTERS).max() <= 6


def test_a_damaged_video_is_named(tmp_path, capfd):
    noise = np.random.default_rng(0).integers(0, 255, (16, 64, 64, 3), dtype=np.uint8)
    ffmpeg("-movflags", "faststart", tmp_path / "a.mp4", pictures=noise)
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:len(whole) // 2])
    assert len(media.read_video(tmp_path / "cut.mp4", 64, 64, 16)) < 16
    assert "cut.mp4: used, though damaged" in capfd.readouterr().err
    for name, content in (("text.mp4", b"not a video"), ("list.mp4", b"#EXTM3U\nhttp://a/b.ts\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: cannot be read"):
            media.read_video(tmp_path / name, 64, 64, 16)


def swapped() -> bytes:
    """A colour profile whose red and green are exchanged."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in ((b"rXYZ", b"?XYZ"), (b"gXYZ", b"rXYZ"), (b"?XYZ", b"gXYZ")):
        srgb = srgb.replace(old, new)
    return srgb


def picture(kind: str, path) -> tuple:
    """Write the quarters in this way; returns (file, their colours)."""
    image, expected, options = Image.fromarray(UPRIGHT), QUARTERS.astype(int), {}
    grey = (0.299 * expected[..., :1] + 0.587 * expected[..., 1:2] + 0.114 * expected[..., 2:])
    file = path / f"{kind}.{'jpg' if kind in ('cmyk', 'exif') else 'png'}"
    if kind in ("grey", "deep grey", "grey alpha"):
        image, expected = image.convert("L"), grey.repeat(3, 2).round()
    if kind == "deep grey":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    if kind == "palette":
        image = image.quantize(8)
    if kind == "palette alpha":
        image = image.quantize(8)
        options["transparency"], expected[0, 0] = image.getpixel((5, 5)), 255
    if kind in ("alpha", "grey alpha"):
        image.putalpha(Image.fromarray(ALPHA[0, ..., 3]))
        expected[1, 0] = (expected[1, 0] + 255) / 2
    if kind == "cmyk":
        image = image.convert("CMYK")
    if kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6                                         # to be turned right
        image, options = image.rotate(90), {"exif": exif}
    if kind == "profile":
        options["icc_profile"] = swapped()
        expected = None
    if kind == "animated":
        other = Image.fromarray(255 - UPRIGHT)
        file, options = path / "a.gif", {"save_all": True, "append_images": [other]}
    image.save(file, quality=100, **options)
    return file, expected


@pytest.mark.parametrize("kind", ["plain", "grey", "deep grey", "palette", "palette alpha", "alpha",
                                  "grey alpha", "cmyk", "exif", "profile", "animated"])
def test_a_picture_is_what_a_person_sees(kind, tmp_path):
    file, expected = picture(kind, tmp_path)
    seen = quarters(media.read_picture(file, 32, 32))
    if kind == "profile":                                        # red is green, and green is red
        assert seen[0, 0, 1] > seen[0, 0, 0] + 50 and seen[0, 1, 0] > seen[0, 1, 1] + 50
    else:
        assert np.abs(seen - expected).max() <= 4, seen
    wide = media.read_picture(file, 16, 32)                      # the middle, cropped
    assert wide.shape == (3, 16, 32) and wide.dtype == torch.uint8


def test_what_is_no_picture_is_named(tmp_path):
    """Files of every kind, with bytes changed or cut off, are read or named."""
    chance, read = random.Random(0), 0
    for kind in ("palette alpha", "deep grey", "cmyk", "exif", "profile", "animated"):
        file, _ = picture(kind, tmp_path)
        whole = file.read_bytes()
        for _ in range(30):
            broken = bytearray(whole[:chance.choice([len(whole), chance.randrange(len(whole))])])
            for _ in range(chance.randrange(4)):
                if broken:
                    broken[chance.randrange(min(len(broken), 300))] = chance.randrange(256)
            file.write_bytes(broken)
            try:
                media.read_picture(file, 16, 16)
                read += 1
            except ValueError as error:
                assert f"{file}: cannot be read" in str(error)
    assert 20 < read < 170


# --- shards

def write_shards(folder, count: int = 5, size: int = 2):
    """Clips of which all values are their number."""
    writer = ShardWriter(folder, {"frames": 8}, clips_per_shard=size)
    for i in range(count):
        if f"clip {i}" not in writer.done:
            writer.add(f"clip {i}", "a box", latents=torch.full((2, 4, 2, 2), float(i)),
                       text=torch.full((3, 8), float(i)))
    writer.close(torch.zeros(3, 8))
    return folder


def assert_whole(folder, count: int = 5):
    latents, text, _ = Shards(folder).draw(range(count))
    assert sorted(latents[:, 0, 0, 0, 0].tolist()) == list(range(count))
    assert torch.equal(latents[:, 0, 0, 0, 0], text[:, 0, 0])


def test_a_flipped_bit_is_noticed_when_the_clip_is_drawn(tmp_path):
    folder = write_shards(tmp_path / "shards")
    assert_whole(folder)
    file = sorted(folder.glob("part-*.safetensors"))[1]          # clips 2 and 3
    content = bytearray(file.read_bytes())
    content[-3] ^= 1                                             # of the last one's text
    file.write_bytes(content)
    found = Shards(folder)
    with pytest.raises(ValueError, match=f"{file.name}: clip 'clip 3' is not what was written"):
        found.draw(range(5))
    file.unlink()
    assert_whole(write_shards(folder))           # as the message says; the others are still there
    null = folder / "null_text.safetensors"
    null.write_bytes(null.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="null_text.safetensors: is not what was written"):
        Shards(folder)


def test_a_clip_that_is_not_finite_is_named_and_left_out(tmp_path):
    writer, latents, text = ShardWriter(tmp_path, {}), torch.zeros(2, 4, 2, 2), torch.zeros(3, 8)
    for bad in (torch.nan, torch.inf, 1e38):                     # the last one as float16
        latents[1, 2, 0, 0] = bad
        with pytest.raises(ValueError, match="clip 0: its latents are no finite .*float16"):
            writer.add("clip 0", "a box", latents=latents.half(), text=text)
        with pytest.raises(ValueError, match="clip 0: its text are no finite"):
            writer.add("clip 0", "a box", latents=torch.zeros(2, 4, 2, 2), text=text + torch.nan)
    writer.add("clip 1", "a box", latents=torch.zeros(2, 4, 2, 2), text=text)
    writer.close(text)
    assert writer.done == {"clip 1"} and len(Shards(tmp_path)) == 1


@pytest.mark.parametrize("name", ["manifest.json", "null_text.safetensors", "made_by.json",
                                  "part-0-of-1-00000.safetensors"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null", b"{\"shards\": 3}", b"\xff\xfe",
                                     b"[" * 100_000])
def test_an_index_that_cannot_be_parsed_is_named(tmp_path, name, content):
    folder = write_shards(tmp_path / "shards")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}|was begun with frames"):
        if name in ("manifest.json", "null_text.safetensors"):
            Shards(folder)
        else:
            ShardWriter(folder, {"frames": 8})


def test_what_is_written_can_be_read_by_others(tmp_path):
    before = os.umask(0o022)
    folder = write_shards(tmp_path / "shards")
    os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}


def test_a_full_disk_leaves_no_half_shard(tmp_path, monkeypatch):
    def full(file, content):
        file.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left.*part-0-of-1"):
            write_shards(tmp_path / "shards")
    assert [file.name for file in (tmp_path / "shards").iterdir()] == ["made_by.json"]
    assert_whole(write_shards(tmp_path / "shards"))


def test_killed_at_any_instant_the_same_command_goes_on(tmp_path):
    """20 kills; each life writes 1 to 15 shards, and what it manages before it is killed."""
    folder, chance, alive = tmp_path / "shards", random.Random(0), 0

    def shards():
        return list(folder.glob("part-0-of-1-*.safetensors"))
    for _ in range(20):
        enough = len(shards()) + chance.randint(1, 15)
        child = os.fork()
        if child == 0:
            write_shards(folder, count=1000, size=1)
            os._exit(0)
        while len(shards()) < enough:
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(chance.random() * 0.002)
        os.kill(child, signal.SIGKILL)
        alive += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        for file in folder.glob("*.safetensors"):
            assert load_file(file)
    assert alive == 20 and len(shards()) < 1000
    (folder / "part-0-of-1-00009.safetensors.1.partial").write_bytes(b"half")
    assert_whole(write_shards(folder, count=1000, size=1), 1000)
    assert not list(folder.glob("part-*.partial"))


def test_a_folders_clips_are_stretches_of_its_videos(tmp_path):
    """Frames in their order, from any first one, the last as well."""
    clip = np.arange(20, 260, 40, dtype=np.uint8)[:, None, None, None].repeat(16, 1)
    clip = clip.repeat(16, 2).repeat(3, 3)
    imageio.imwrite(tmp_path / "a.gif", clip, duration=125)
    (tmp_path / "a.txt").write_text("grows")
    video, _ = Folder(tmp_path, 4, 16).clips(range(40))
    levels = ((video.mean((2, 3, 4)) + 1) * 127.5 - 20) / 40     # (40, 4): numbers of frames
    assert (levels.round() - levels).abs().max() < 0.1
    starts = levels.round().int()
    assert (starts.diff(dim=1) == 1).all() and set(starts[:, 0].tolist()) == {0, 1, 2}


def test_a_caption_may_hold_any_character_of_json(tmp_path):
    clip = np.zeros((8, 16, 16, 3), np.uint8)
    imageio.imwrite(tmp_path / "a.gif", clip, duration=125)
    row = json.dumps({"file": "a.gif", "caption": "red\u2028blue\u0085green"}, ensure_ascii=False)
    (tmp_path / "all.jsonl").write_text(row + "\n", encoding="utf-8")
    _, (caption,) = Folder(tmp_path, 4, 16).clips(range(1))
    assert caption.split() == ["red", "blue", "green"]


def test_a_name_may_spell_its_accents_otherwise_than_its_row(tmp_path):
    imageio.imwrite(tmp_path / "a.mp4", np.zeros((8, 16, 16, 3), np.uint8), fps=8)
    (tmp_path / "a.mp4").rename(tmp_path / "e\u0301.mkv")        # as archives of a Mac have it
    row = json.dumps({"file": "\u00e9.mkv", "caption": "dark"})
    (tmp_path / "all.jsonl").write_text(row, encoding="utf-8")
    assert Folder(tmp_path, 4, 16).captions == ["dark"]


def test_clips_are_brought_to_the_rate_that_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.txt").write_text("a ball")
    codec = SimpleNamespace(fps=16, stride=4, pixels=8)
    monkeypatch.setattr(encoders, "WanCodec", lambda *args: codec)
    monkeypatch.setattr(encoders, "WanText", lambda *args: SimpleNamespace(prepare=print))

    def read(file, frames, height, width, fps):
        assert (frames, height, width, fps) == (5, 32, 64, 8)
        raise InterruptedError
    monkeypatch.setattr(data_module, "read_clip", read)
    with pytest.raises(InterruptedError):
        data_module.main(["encode", "--videos", str(tmp_path), "--base", str(tmp_path), "--out",
                          str(tmp_path / "o"), "--fps", "8", "--frames", "5", "--height", "32",
                          "--width", "64"])


@pytest.mark.parametrize("frames, size", [(8, 16), (21, 64)])
def test_a_digit_travels_a_quarter_of_the_picture(frames, size):
    digits = open_data("digits", frames, size)
    ink = (digits.clips(range(40), captions=digits.captions)[0].amax(2) + 1) / 2
    mass, pixel = ink.sum((2, 3)), torch.arange(size) + 0.5
    centre = torch.stack([ink.sum(2) @ pixel, ink.sum(3) @ pixel], -1) / mass[..., None]
    assert torch.allclose((centre[:, -1] - centre[:, 0]).norm(dim=1),
                          torch.tensor(size / 4), atol=size / 64)
    assert (mass.std(1) / mass.mean(1)).max() < 0.05             # nothing is cut off on the way


def test_the_order_of_an_epoch_is_that_of_its_seed():
    orders = {tuple(shuffled(range(first, first + 20), seed, 20))
              for seed in (0, 1, 2) for first in (0, 20)}
    assert len(orders) == 6 and all(sorted(order) == list(range(20)) for order in orders)


@pytest.mark.parametrize("name", TOYS)
def test_no_clip_of_a_seed_is_one_of_another(name):
    """At whatever index: eval.py's draws, and those of training, differ in their seeds alone."""
    clips = torch.cat([open_data(name).clips(range(20), seed)[0] for seed in (0, 1, 10)])
    assert len({clip.numpy().tobytes() for clip in clips}) == 60


@pytest.mark.parametrize("name", TOYS)
def test_what_a_caption_leaves_open_is_drawn_apart(name, monkeypatch):
    """Start, radius or image of a digit: none follows from another, nor from the caption."""
    data, seen = open_data(name), []
    render = data.render
    monkeypatch.setattr(data, "render", lambda *args: seen.append(args) or render(*args))
    _, captions = data.clips(range(2000))
    right = torch.tensor([caption.endswith("right") for caption in captions])
    number = torch.tensor([data.captions.index(caption) for caption in captions])
    centre, other = seen[0][:2]                      # (B, T, 2), and radius (B,) or image (B,)
    drawn = torch.stack([number, *centre[:, 0].T, other])[:, right]
    assert (torch.corrcoef(drawn) - torch.eye(4)).abs().max() < 0.25
    x = centre[..., 0]                               # up to both edges, over all directions
    assert abs(x.min() + x.max() - 16) < 0.5


def test_a_digit_is_drawn_as_its_image_and_named_by_its_label():
    digits = open_data("digits", 1, 64)              # a pixel of an image is 5 x 5 here
    drawn = digits.render(torch.full((100, 1, 2), 32.0), torch.arange(100))[:, 0]
    torch.testing.assert_close(drawn[:, 14:52:5, 14:52:5], digits.images[:100])
    assert digits.labels(["a handwritten seven moving up"])["digit"] == 7
    assert digits.labels(["a handwritten two moving up"])["digit"] == 2


@pytest.mark.parametrize("sides", [(64, 128), (128, 64)])
def test_of_a_wide_picture_the_middle_is_shown(tmp_path, sides):
    framed = np.full((*sides, 3), 255, np.uint8)
    top, left = (side // 2 - 32 for side in sides)
    framed[top:top + 64, left:left + 64] = UPRIGHT
    Image.fromarray(framed).save(tmp_path / "wide.png")
    assert (quarters(media.read_picture(tmp_path / "wide.png", 64, 64)) == QUARTERS).all()


def test_a_gif_plays_for_ever(tmp_path):
    media.write_clip(tmp_path / "clip.gif", torch.randn(3, 3, 16, 16), 8)
    with Image.open(tmp_path / "clip.gif") as gif:
        assert gif.info["loop"] == 0


def test_the_stand_in_draws_with_its_seed():
    """Else all seeds and stages of a toy run would see the same clips."""
    data = open_data("shapes")
    codec, words = PatchPCA.fit(data.clips(range(32))[0]), Words.of(data.captions)
    clips, captions = data.clips(range(4), seed=7)
    x, text, _ = Encoded(data, codec, words).draw(range(4), seed=7)
    assert torch.equal(x, codec.encode(clips)) and torch.equal(text, words(captions))
