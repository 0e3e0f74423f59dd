"""Pixels and prompts to what the network works on, and back: Wan's own encoders, and stand-ins for
the toy sets, which need no download.

Legend:  B batch   T pixel frames   H, W picture   F, h, w latent frames, height, width
         C latent channels          P values of a pixel patch
Videos are float32 (B, T, 3, H, W) in [-1, 1], latents (B, F, C, h, w), prompts (B, length, dim).
"""
import html
import importlib
import re
import zlib
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

PATCH = 2, 4, 4              # frames, rows, columns


@dataclass
class PatchPCA:
    """Stand-in for a video autoencoder: each patch of pixels (P = 2 x 4 x 4 x 3 = 96 values) is
    projected to C principal components. They keep their decaying variances; one scale makes the
    latents' variance 1."""
    mean: torch.Tensor                                           # (P,)
    basis: torch.Tensor                                          # (P, C)
    scale: torch.Tensor                                          # ()
    fps = 8                                                      # of the networks' clips
    pixels = PATCH[1]                                            # of a latent, each way

    @classmethod
    def fit(cls, video, channels: int = 48) -> "PatchPCA":
        """Fits video (B, T, 3, H, W), or a function that gives it in parts, each time it is called.
        ValueError if the patch does not divide it."""
        def patches():
            for part in video() if callable(video) else [video]:
                yield split_patches(part).flatten(0, 3).double()                   # (patches, P)
        count, total = 0, 0.0
        for x in patches():
            count, total = count + len(x), total + x.sum(0)
        mean = total / count
        covariance = sum(x.T @ x for x in (x.sub_(mean) for x in patches())) / count
        values, vectors = torch.linalg.eigh(covariance)          # ascending
        values, basis = values.flip(0)[:channels], vectors.flip(1)[:, :channels]
        # An eigenvector is known up to its sign: its largest entry is made positive.
        basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
        scale = values.mean().clamp(min=1e-12).sqrt()
        return cls(mean.float(), basis.float().contiguous(), scale.float())

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """(B, T, 3, H, W) -> (B, F, C, h, w). ValueError if the patch does not divide T, H, W."""
        x = split_patches(video.float())                         # (B, F, h, w, P)
        z = (x - self.mean) @ self.basis / self.scale
        return z.permute(0, 1, 4, 2, 3).contiguous()             # (B, F, C, h, w)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, F, C, h, w) -> (B, T, 3, H, W), clamped to [-1, 1]."""
        z = latents.float().permute(0, 1, 3, 4, 2) * self.scale
        x = z @ self.basis.T + self.mean                         # (B, F, h, w, P)
        x = pixel_shuffle(x.movedim(4, 2), PATCH[1])             # (B, F, 2 * 3, H, W)
        return x.unflatten(2, (PATCH[0], 3)).flatten(1, 2).clamp(-1, 1)

    def frames(self, latents: int) -> int:
        """Pixel frames of so many latent frames."""
        return latents * PATCH[0]

    def decoder(self):
        """A function that decodes the chunks of a video one after the other."""
        return self.decode


def check_sides(*sides: int) -> None:
    """Raises ValueError unless patches fill clips of these frames, rows, columns."""
    if any(side % p for side, p in zip(sides, PATCH)):
        raise ValueError(f"frames x height x width {sides} must be divisible by the patch {PATCH}")


def split_patches(video: torch.Tensor) -> torch.Tensor:
    """(B, T, 3, H, W) -> (B, F, h, w, P), P in the order frame, colour, row, column."""
    check_sides(video.shape[1], *video.shape[3:])
    x = video.unflatten(1, (-1, PATCH[0])).flatten(2, 3)         # (B, F, 2 * 3, H, W)
    return pixel_unshuffle(x, PATCH[1]).movedim(2, 4).contiguous()


def in_parts(dataset, count: int, seed: int, values: int = 2**24):
    """Yields the first `count` clips of a set (data.py), so many at a time as have `values`."""
    size = max(1, values // dataset.clips([0])[0].numel())
    for first in range(0, count, size):
        yield dataset.clips(range(first, min(first + size, count)), seed=seed)[0]


class Words:
    """Stand-in for a text encoder: each word is a fixed random vector of mean square 1, a function
    of its letters."""

    def __init__(self, vocabulary: list[str], dim: int = 64, length: int = 8):
        self.vocabulary, self.dim, self.length = list(vocabulary), dim, length
        self.vectors = {}
        for word in vocabulary:
            v = np.random.default_rng(zlib.crc32(word.encode())).standard_normal(dim)
            self.vectors[word] = torch.from_numpy(v / (v**2).mean() ** 0.5).float()

    @classmethod
    def of(cls, captions: list[str], dim: int = 64) -> "Words":
        """Knows all words of the captions, and is as long as the longest."""
        lists = [split_words(caption) for caption in captions]
        vocabulary = sorted({word for words in lists for word in words})
        return cls(vocabulary, dim, max(map(len, lists), default=0))

    def __call__(self, captions: list[str]) -> torch.Tensor:
        """(B, length, dim) float32 on the CPU, zero after a caption's last word; '' is all zeros.
        ValueError for an unknown word or a caption longer than `length`."""
        lists = [split_words(caption) for caption in captions]
        unknown = sorted({word for words in lists for word in words} - self.vectors.keys())
        nearest = ["".join(get_close_matches(word, self.vocabulary, 1, 0)) for word in unknown]
        if unknown:
            raise ValueError("unknown words: " + ", ".join(
                f"{word!r} (nearest known: {near!r})" for word, near in zip(unknown, nearest)))
        text = torch.zeros(len(captions), self.length, self.dim)
        for row, words, caption in zip(text, lists, captions):
            if len(words) > self.length:
                raise ValueError(f"caption of {len(words)} words, at most {self.length} fit: "
                                 f"{caption!r}")
            for i, word in enumerate(words):
                row[i] = self.vectors[word]
        return text

    def prepare(self, captions: list[str]) -> None:
        """Nothing; `WanText` encodes ahead here."""


def split_words(caption: str) -> list[str]:
    return re.findall(r"\w+", caption.lower())


class Encoded:
    """A set of clips (data.py) behind the stand-in encoders, with the interface of data.Shards."""
    conditioning = ()

    def __init__(self, dataset, codec: PatchPCA, words: Words):
        self.dataset, self.codec, self.words = dataset, codec, words
        self.null_text = words([""])[0]                          # (T, D)
        self.latent_shape = tuple(codec.encode(dataset.clips([0])[0]).shape[1:])   # (F, C, h, w)

    def draw(self, indices, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Latents (B, F, C, h, w) and prompt features (B, T, D), functions of (seed, index)."""
        video, captions = self.dataset.clips(indices, seed=seed)
        return self.codec.encode(video), self.words(captions), {}


# Wan's standard negative prompt, which takes the place of the empty one.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")


def extra(name: str):
    """Import an optional package, or say how to get it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"Wan's text encoder and autoencoder need {name}: pip install -r "
                                  f"requirements-wan.txt") from None


def part_of(base, name: str) -> Path:
    """The folder of a part of a pipeline. ValueError where it is missing: nothing is fetched."""
    folder = Path(base) / name
    if not folder.is_dir():
        raise ValueError(f"{base} has no {name}: give --base the pipeline folder of the weights, "
                         f"in Diffusers' layout")
    return folder


class WanCodec:
    """Wan's video autoencoder, with the interface of `PatchPCA`: videos (B, T, 3, H, W) in [-1, 1],
    T = 4 n + 1, to latents (B, n + 1, C, H / pixels, W / pixels) of mean 0, variance 1, and back.
    Its config says which it is: 16 channels of 8 x 8 pixels (Wan2.1), 48 of 16 x 16 (Wan2.2-TI2V).

    tiling: one clip at a time, in overlapping tiles, for GPUs of little memory.
    """

    def __init__(self, base, device="cpu", tiling: bool = False):
        folder = part_of(base, "vae")
        wan_vae = extra("diffusers").AutoencoderKLWan
        vae = wan_vae.from_pretrained(folder, torch_dtype=torch.float32)
        self.vae = vae.to(device).eval().requires_grad_(False)
        if tiling:
            self.vae.enable_tiling()
            self.vae.enable_slicing()
        c = self.vae.config
        self.channels = c.z_dim
        self.pixels = c.scale_factor_spatial                     # of a latent, each way
        self.stride = c.scale_factor_temporal                    # pixel frames of a latent one
        self.fps = 16 if c.z_dim == 16 else 24                   # of the networks' clips
        self.mean = torch.tensor(c.latents_mean, device=device).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(c.latents_std, device=device).view(1, -1, 1, 1, 1)

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        video = video.transpose(1, 2).to(self.mean.device)       # (B, 3, T, H, W)
        z = self.vae.encode(video).latent_dist.mode()            # (B, C, F, h, w)
        return ((z - self.mean) / self.std).transpose(1, 2).contiguous()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(self.unscaled(latents)).sample.transpose(1, 2).clamp(-1, 1).cpu()

    def unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, F, C, h, w) -> (B, C, F, h, w), as the autoencoder has them."""
        return latents.float().to(self.mean.device).transpose(1, 2) * self.std + self.mean

    def frames(self, latents: int) -> int:
        """Pixel frames of so many latent frames: the first is one frame, every other one four."""
        return self.stride * (latents - 1) + 1

    def condition(self, picture: torch.Tensor, latents: int) -> torch.Tensor:
        """What Wan2.1-I2V is told of a clip of so many latent frames that starts with picture
        (B, 3, H, W) in [-1, 1]: a mask, 1 for each pixel frame that is given, and the latents of
        the picture with grey after it, (B, F, 4 + C, h, w)."""
        video = picture.new_zeros(len(picture), self.frames(latents), *picture.shape[1:])
        video[:, 0] = picture
        z = self.encode(video)
        mask = z.new_zeros(*z.shape[:2], self.stride, *z.shape[3:])
        mask[:, 0] = 1
        return torch.cat([mask, z], 2)

    def decoder(self):
        """A function that decodes the chunks of a video in their order. The autoencoder is causal:
        its cache of features, as decode() uses it, is kept between calls. Never in tiles."""
        vae, first = self.vae, True
        vae.clear_cache()

        def decode(latents: torch.Tensor) -> torch.Tensor:
            nonlocal first
            frames = []
            for frame in vae.post_quant_conv(self.unscaled(latents)).split(1, 2):
                vae._conv_idx = [0]
                frames.append(vae.decoder(frame, feat_cache=vae._feat_map, feat_idx=vae._conv_idx,
                                          first_chunk=first))
                first = False
            video = torch.cat(frames, 2)
            if vae.config.patch_size:           # Wan2.2-TI2V: squares of pixels are channels inside
                from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
                video = unpatchify(video, vae.config.patch_size)
            return video.transpose(1, 2).clamp(-1, 1).cpu()
        return decode


PROMPTS_AHEAD = 64           # that callers of WanText.prepare give at a time


class WanText:
    """Wan's text encoder: prompts -> features (B, length, D), zero after a prompt's last token. The
    weights (11 GB) rest on the CPU; with `device` a GPU they visit it when there are new prompts.
    Features of the last 128 prompts are kept, 0.5 GB in bf16: `prepare` makes many in one visit."""

    def __init__(self, base, device="cpu", length: int = 512):
        transformers = extra("transformers")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(part_of(base, "tokenizer"))
        # bf16 on a GPU, as the network: 11 GB in place of 23.
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        self.encoder = transformers.UMT5EncoderModel.from_pretrained(
            part_of(base, "text_encoder"), dtype=dtype).eval().requires_grad_(False)
        self.device, self.length = device, length
        self.kept = {}                                           # by prompt, the last ones last

    def __call__(self, captions: list[str]) -> torch.Tensor:
        self.prepare(captions)
        return torch.stack([self.kept[caption] for caption in captions]).float()

    def prepare(self, captions: list[str]) -> None:
        """Encode those that are new, for the calls that follow."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.kept]
        if new:
            self.encoder.to(self.device)
            self.kept |= {caption: self.encode(caption) for caption in new}
            self.encoder.to("cpu")                               # the network needs the room more
        asked = {caption: self.kept.pop(caption) for caption in dict.fromkeys(captions)}
        others = list(self.kept.items())[-128:]
        self.kept = dict(others) | asked

    def encode(self, caption: str) -> torch.Tensor:
        """(length, D) on the CPU, one at a time: whatever else is asked for does not change it."""
        clean = html.unescape(html.unescape(extra("ftfy").fix_text(caption)))
        tokens = self.tokenizer(
            [" ".join(clean.split())], padding="max_length", max_length=self.length,
            truncation=True, return_tensors="pt", return_attention_mask=True)
        mask = tokens.attention_mask.to(self.device)
        with torch.no_grad():
            out = self.encoder(tokens.input_ids.to(self.device), mask).last_hidden_state
        return (out * mask[..., None])[0].cpu()


class WanPicture:
    """Wan2.1-I2V's image encoder: a picture (3, H, W) uint8 -> CLIP's features before its last
    layer, (1, 257, 1280). The weights rest on the CPU. ValueError for a folder without one."""

    def __init__(self, base, device="cpu"):
        transformers, self.device = extra("transformers"), device
        self.processor = transformers.CLIPImageProcessor.from_pretrained(
            part_of(base, "image_processor"))
        self.encoder = transformers.CLIPVisionModel.from_pretrained(
            part_of(base, "image_encoder")).eval().requires_grad_(False)

    def __call__(self, picture: torch.Tensor) -> torch.Tensor:
        image = picture.permute(1, 2, 0).numpy()
        pixels = self.processor(images=image, return_tensors="pt").pixel_values
        encoder = self.encoder.to(self.device)
        layers = encoder(pixels.to(self.device, encoder.dtype), output_hidden_states=True)
        self.encoder.to("cpu")
        return layers.hidden_states[-2].float().cpu()
