"""Small stand-ins for a video autoencoder and a text encoder, so that the toy sets need no download.

Legend:  B batch   T pixel frames   H, W picture   F, h, w latent frames, height, width   C latent channels
         P values of a pixel patch
Videos are float32 (B, T, 3, H, W) in [-1, 1], latents (B, F, C, h, w), prompts (B, length, dim).
"""
import re
import zlib
from difflib import get_close_matches
from math import prod

import numpy as np
import torch


class PatchPCA:
    """Stand-in for a video autoencoder: each patch of pixels (P = 2 x 4 x 4 x 3 = 96 values) is projected to C
    principal components. Components keep their decaying variances; one global scale makes the latents' variance 1."""

    def __init__(self, mean: torch.Tensor, basis: torch.Tensor, scale: torch.Tensor, patch=(2, 4, 4)):
        self.mean, self.basis, self.scale = mean, basis, scale   # (P,), (P, C), ()
        self.patch = tuple(int(p) for p in patch)                # frames, rows, columns
        self.pixels = self.patch[1]                              # of a latent, each way

    @classmethod
    def fit(cls, video: torch.Tensor, channels: int = 48, patch=(2, 4, 4)) -> "PatchPCA":
        """Fits video (B, T, 3, H, W). ValueError if the patch does not divide T, H, W, or channels exceed P."""
        if not 1 <= channels <= 3 * prod(patch):
            raise ValueError(f"channels must be 1 to {3 * prod(patch)}, the values of a patch, not {channels}")
        x = split_patches(video, patch).flatten(0, 3).double()   # (patches, P)
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))     # ascending
        values, basis = values.flip(0)[:channels], vectors.flip(1)[:, :channels]
        # An eigenvector is known up to its sign: its largest entry is made positive.
        basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
        scale = values.mean().clamp(min=1e-12).sqrt()
        return cls(mean.float(), basis.float().contiguous(), scale.float(), patch)

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """(B, T, 3, H, W) -> (B, F, C, h, w). ValueError if the patch does not divide T, H and W."""
        x = split_patches(video.float(), self.patch)             # (B, F, h, w, P)
        z = (x - self.mean.to(x.device)) @ self.basis.to(x.device) / self.scale.to(x.device)
        return z.permute(0, 1, 4, 2, 3).contiguous()             # (B, F, C, h, w)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, F, C, h, w) -> (B, T, 3, H, W), clamped to [-1, 1]."""
        z = latents.float().permute(0, 1, 3, 4, 2) * self.scale.to(latents.device)
        x = z @ self.basis.to(z.device).T + self.mean.to(z.device)                  # (B, F, h, w, P)
        x = x.unflatten(4, (self.patch[0], 3, *self.patch[1:]))                     # (B, F, h, w, 2, 3, 4, 4)
        x = x.permute(0, 1, 4, 5, 2, 6, 3, 7)                                       # (B, F, 2, 3, h, 4, w, 4)
        return x.flatten(6, 7).flatten(4, 5).flatten(1, 2).clamp(-1, 1)

    def frames(self, latents: int) -> int:
        """Pixel frames of so many latent frames."""
        return latents * self.patch[0]

    def decoder(self):
        """A function that decodes the chunks of a video one after the other."""
        return self.decode

    def state(self) -> dict[str, torch.Tensor]:
        return {"mean": self.mean, "basis": self.basis, "scale": self.scale, "patch": torch.tensor(self.patch)}

    @classmethod
    def from_state(cls, state: dict[str, torch.Tensor]) -> "PatchPCA":
        return cls(state["mean"], state["basis"], state["scale"], state["patch"].tolist())


def split_patches(video: torch.Tensor, patch) -> torch.Tensor:
    """(B, T, 3, H, W) -> (B, F, h, w, P), P in the order frame, colour, row, column."""
    sides = (video.shape[1], *video.shape[3:])
    if any(side % p for side, p in zip(sides, patch)):
        raise ValueError(f"frames x height x width {sides} must be divisible by the patch {tuple(patch)}")
    t, p, q = patch
    x = video.unflatten(4, (-1, q)).unflatten(3, (-1, p)).unflatten(1, (-1, t))     # (B, F, t, 3, h, p, w, q)
    return x.permute(0, 1, 4, 6, 2, 3, 5, 7).flatten(4)


class Words:
    """Stand-in for a text encoder: each word is a fixed random vector of mean square 1, a function of its letters."""

    def __init__(self, vocabulary: list[str], dim: int = 64, length: int = 8):
        self.vocabulary, self.dim, self.length = list(vocabulary), dim, length
        vectors = {word: np.random.default_rng(zlib.crc32(word.encode())).standard_normal(dim) for word in vocabulary}
        self.vectors = {word: torch.from_numpy(v / (v**2).mean() ** 0.5).float() for word, v in vectors.items()}

    @classmethod
    def of(cls, captions: list[str], dim: int = 64) -> "Words":
        """Knows all words of the captions, and is as long as the longest."""
        lists = [split_words(caption) for caption in captions]
        return cls(sorted({word for words in lists for word in words}), dim, max(map(len, lists), default=0))

    def __call__(self, captions: list[str]) -> torch.Tensor:
        """(B, length, dim) float32 on the CPU, zero after a caption's last word; '' is all zeros. ValueError for an
        unknown word or a caption longer than `length`."""
        lists = [split_words(caption) for caption in captions]
        unknown = sorted({word for words in lists for word in words} - self.vectors.keys())
        if unknown:
            raise ValueError("unknown words: " + ", ".join(
                f"{word!r} (nearest known: {''.join(get_close_matches(word, self.vocabulary, 1, 0))!r})" for word in unknown))
        text = torch.zeros(len(captions), self.length, self.dim)
        for row, words, caption in zip(text, lists, captions):
            if len(words) > self.length:
                raise ValueError(f"caption of {len(words)} words, at most {self.length} fit: {caption!r}")
            for i, word in enumerate(words):
                row[i] = self.vectors[word]
        return text


def split_words(caption: str) -> list[str]:
    return re.findall(r"\w+", caption.lower())


class Encoded:
    """A set of clips (data.py) behind the two stand-in encoders, with the interface of data.Shards."""

    def __init__(self, dataset, codec: PatchPCA, words: Words):
        self.dataset, self.codec, self.words = dataset, codec, words
        self.null_text = words([""])[0]                                             # (T, D)
        self.latent_shape = tuple(codec.encode(dataset.clips([0])[0]).shape[1:])    # (F, C, h, w)

    def draw(self, indices, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (B, F, C, h, w) and prompt features (B, T, D) of clips that are functions of (seed, index)."""
        video, captions = self.dataset.clips(indices, seed=seed)
        return self.codec.encode(video), self.words(captions)
