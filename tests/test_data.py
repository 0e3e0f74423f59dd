"""data.py, toys.py, stand-ins: clips are functions of (seed, index) and can be read back."""
import json

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

from data import Folder, open_data
from encoders import PatchPCA, Words
from toys import DIRECTIONS

TOYS = ("shapes", "loop", "digits")


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
    count = 40 if name == "digits" else 48
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
    with pytest.raises(ValueError, match="nearest known"):
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
    with pytest.raises(ValueError, match="nearest: shapes"):
        open_data("shape")
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
    assert all(x.is_contiguous() for x in pca.state().values())  # safetensors asks for that
    again = PatchPCA.from_state(pca.state())
    assert torch.equal(again.encode(test), pca.encode(test)) and again.patch == (2, 4, 4)
    assert torch.equal(PatchPCA.fit(train).basis, pca.basis)
    peak = pca.basis.gather(0, pca.basis.abs().argmax(0, keepdim=True))
    assert (peak > 0).all()


def test_patch_pca_places_patches():
    """A lit patch moves the latents of its own place and frame only."""
    pca = PatchPCA.fit(open_data("shapes").clips(range(32))[0])
    dark, lit = torch.full((1, 8, 3, 16, 16), -1.0), torch.full((1, 8, 3, 16, 16), -1.0)
    lit[:, 5, :, 9, 2] = 1                # frame 5 -> F 2, row 9 -> h 2, column 2 -> w 0
    moved = (pca.encode(lit) - pca.encode(dark)).abs().amax(2)[0] > 1e-3
    assert moved.nonzero().tolist() == [[2, 2, 0]]


def test_patch_pca_errors():
    with pytest.raises(ValueError, match="divisible"):
        PatchPCA.fit(torch.zeros(1, 7, 3, 16, 16))
    with pytest.raises(ValueError, match="1 to 96"):
        PatchPCA.fit(torch.zeros(1, 8, 3, 16, 16), channels=97)


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
    for name in ("corrupt.mp4", "corrupt.gif", "empty.mp4", "short.mp4: 2 frames, 4 needed",
                 "silent.mp4: no caption", "missing.mp4", "line 5"):
        assert name in said
    assert "4 clips usable, 5 skipped" in said


def test_folder_without_a_usable_clip(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"junk")
    with pytest.raises(ValueError, match="expected videos"):
        open_data(str(tmp_path))
