"""The network u(z, t, r, context): the average velocity over [r, t] of a video's latents
(docs/method.md, 2).

A Wan2.1-style diffusion transformer whose time embedding takes two times, so that one set of
weights answers both "which way does the flow point at t" (r = t) and "what is the mean velocity
from t down to r" (r < t).

Legend:  B batch   F latent frames   C latent channels   H, W latent height and width
         P spatial patch   h, w = H / P, W / P   S = h * w tokens of a frame   L = F * S tokens
         D width   N heads   K = D / N   T text tokens   I image tokens
         L' keys: the cache's tokens, then z's own
Times are float32 in [0, 1] (1 = noise): (B,), one a clip, or (B, F), one a frame.

Causal generation is the same network asked about one chunk of frames at a time, or about several
that do not see each other, in a `Context` (cache.py): the prompt and the KV cache of the clean
chunks before. A clip in one chunk, with an empty cache, is the bidirectional case.

An image-to-video network (Wan2.1-I2V) gets the picture in the `Context` too: as I image tokens
beside the prompt's in cross-attention, and as channels beside those of z.
"""
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
import torch.nn.functional as nnf
from torch import nn
from torch.utils.checkpoint import checkpoint

from cache import CachedChunk, Context, attention_spans
from lora import BELOW


@dataclass(frozen=True)
class ModelConfig:
    dim: int = 1536               # D
    heads: int = 12               # N; D / N must be even and at least 6 (three rotary axes)
    layers: int = 30
    ffn_dim: int = 8960
    channels: int = 16            # C
    patch: int = 2                # P; frames are never merged: each may have its own time
    text_dim: int = 4096
    freq_dim: int = 256           # sinusoidal features of a time
    time_scale: float = 1000.0    # the sinusoid sees time_scale * t. Wan knows 1000; a short
                                  # training from scratch needs less, for a smooth d u / d t
    second_time: bool = True      # False: the plain teacher, which knows t only and ignores r
    image_channels: int = 0       # image-to-video: channels of Context.condition
    image_dim: int = 0            # image-to-video: width of Context.image; 0: no image tokens
    compressed: bool = False      # a second patch embedding, of patch 2 P, for older chunks
    gate: float = 0.25            # g in e = (1 - g) E(t) + g E'(r)
    added: bool = False           # e = E(t) + E'(t - r) instead (networks.with_added_time)
    output_skip: float = 0.0      # > 0: add the exact average velocity of Gaussian data of this
                                  # standard deviation, which helps small networks from scratch


PRESETS = {
    "tiny": ModelConfig(dim=32, heads=2, layers=2, ffn_dim=64, channels=48, patch=1, text_dim=64,
                        freq_dim=32, time_scale=50.0, output_skip=1.0),
    "toy": ModelConfig(dim=96, heads=4, layers=4, ffn_dim=384, channels=48, patch=1, text_dim=64,
                       freq_dim=64, time_scale=50.0, output_skip=1.0),
    "wan-1.3b": ModelConfig(),
    "wan-5b": ModelConfig(dim=3072, heads=24, ffn_dim=14336, channels=48),
    "wan-14b": ModelConfig(dim=5120, heads=40, layers=40, ffn_dim=13824),
}


def time_features(t: torch.Tensor, width: int, scale: float) -> torch.Tensor:
    """Sinusoidal features of times t (...,) -> (..., width): cosines, then sines, in fp32."""
    powers = torch.arange(width // 2, device=t.device, dtype=torch.float32) / (width // 2)
    angles = scale * t.float()[..., None] * 10000.0 ** -powers
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def axis_rotations(positions: torch.Tensor, dim: int) -> torch.Tensor:
    """Cosines and sines (n, dim / 2, 2) of the turns by positions (n,) along one axis."""
    powers = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim
    angles = positions.double()[:, None] * 10000.0 ** -powers
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def grid_rotations(frames: torch.Tensor, height: int, width: int, head_dim: int,
                   stride: int = 1) -> torch.Tensor:
    """Cosines and sines (F, h * w, K / 2, 2) of a token grid, for the 3-D rotary embedding.

    frames: positions (F,) of the latent frames, any numbers: a chunk may sit anywhere in a video.
    The head's channels split into time, height, width as (K - 4 (K // 6), 2 (K // 6), 2 (K // 6)).
    stride: rows and columns that a token covers. The mean of their rotations, brought back to
    length 1, is the rotation of their middle.
    """
    axis_dim = 2 * (head_dim // 6)
    middle = (stride - 1) / 2
    rows = torch.arange(height, device=frames.device) * stride + middle
    columns = torch.arange(width, device=frames.device) * stride + middle
    by_frame = axis_rotations(frames, head_dim - 2 * axis_dim)
    by_row = axis_rotations(rows, axis_dim)
    by_column = axis_rotations(columns, axis_dim)
    size = (len(frames), height, width, -1, 2)
    grid = torch.cat([by_frame[:, None, None].expand(size),
                      by_row[None, :, None].expand(size),
                      by_column[None, None].expand(size)], dim=3)         # (F, h, w, K / 2, 2)
    return grid.flatten(1, 2).float()


# Calls with the same past share a table: the steps of a chunk, the calls of a forward loss.
@lru_cache(maxsize=8)
def rotary_table(places: tuple, height: int, width: int, head_dim: int, device) -> torch.Tensor:
    """Rotations (L', K / 2, 2) of chunks' tokens. places: (start, frames, stride) of each; height
    and width in patches of stride 1."""
    tables = []                                                          # one for a stride
    for stride, group in groupby(places, key=lambda place: place[2]):
        frames = torch.cat([torch.arange(start, start + count, device=device)
                            for start, count, _ in group])
        table = grid_rotations(frames, height // stride, width // stride, head_dim, stride)
        tables.append(table.flatten(0, 1))
    return torch.cat(tables)


def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Turn interleaved channel pairs of x (B, N, L, K) by rope (L, K / 2, 2)."""
    pairs = x.float().unflatten(-1, (-1, 2)).contiguous()                    # (B, N, L, K / 2, 2)
    if torch.compiler.is_compiling():        # makes one kernel of this, but none of complex numbers
        (a, b), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)               # (B, N, L, K / 2) each
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:                                    # one pass over memory, where those are seven
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return turned.flatten(-2).type_as(x)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a learned scale, computed in fp32."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return nnf.rms_norm(x.float(), self.weight.shape, self.weight.float(), 1e-6).type_as(x)


def layer_norm(x: torch.Tensor, norm: nn.LayerNorm | None = None) -> torch.Tensor:
    """LayerNorm in fp32, with the weights of `norm`, if any; the result stays in fp32 for the
    modulation that follows."""
    if norm is None:
        return nnf.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
    return nnf.layer_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps)


class Linear(nn.Linear):
    """A Linear that multiplies in the type of its input and adds low-rank adapters (lora.py): the
    base's own, BELOW, in every call, and the one that a call names."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__(dim_in, dim_out)
        self.adapters = nn.ModuleDict()

    def forward(self, x, adapter: str = ""):
        y = nnf.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        for name in (BELOW, adapter):
            if name in self.adapters:
                y = y + self.adapters[name](x)
        return y


def join(parts: list, dim: int) -> torch.Tensor:
    """torch.cat, without a copy of a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def attend(q, k, v, spans=None) -> torch.Tensor:
    """Attention of queries (B, N, L, K) to keys and values (B, N, L', K) -> (B, N, L, K).

    spans: which queries may see which keys, see cache.attention_spans; none: all see all.
    """
    answers = []
    if not spans:
        spans = [(0, q.shape[2], [(0, k.shape[2])])]
    for start, stop, ranges in spans:
        keys = join([k[:, :, first:last] for first, last in ranges], 2)
        values = join([v[:, :, first:last] for first, last in ranges], 2)
        answers.append(nnf.scaled_dot_product_attention(q[:, :, start:stop], keys, values))
    return join(answers, 2)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, image: bool = False):
        super().__init__()
        self.heads = heads
        self.q = Linear(dim, dim)
        self.k = Linear(dim, dim)
        self.v = Linear(dim, dim)
        self.out = Linear(dim, dim)
        self.norm_q = RMSNorm(dim)                               # over all heads' channels at once
        self.norm_k = RMSNorm(dim)
        if image:
            self.k_image = Linear(dim, dim)
            self.v_image = Linear(dim, dim)
            self.norm_k_image = RMSNorm(dim)

    def keys_values(self, x, adapter: str = "") -> tuple:
        """Keys, not rotated, and values of tokens x, each of x's shape."""
        return self.norm_k(self.k(x, adapter)), self.v(x, adapter)

    def image_keys_values(self, image) -> tuple:
        """Keys and values of image tokens (B, I, D)."""
        return self.norm_k_image(self.k_image(image)), self.v_image(image)

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)             # (B, N, L, K)

    def forward(self, x, keys, values, image_keys=None, image_values=None, rope=None, spans=None,
                adapter: str = ""):
        """x (B, L, D) asks, keys and values (B, L', D) answer -> (B, L, D).

        image_keys, image_values: of image tokens, whose answer, with its own softmax, is added.
        rope: (L', K / 2, 2) turns the keys and, with its end, the queries. spans: as for `attend`.
        """
        q = self.split_heads(self.norm_q(self.q(x, adapter)))
        k = self.split_heads(keys)
        v = self.split_heads(values)
        if rope is not None:
            q = rotate(q, rope[-q.shape[2]:])
            k = rotate(k, rope)
        answer = attend(q, k, v, spans)                                      # (B, N, L, K)
        if image_keys is not None:
            k, v = self.split_heads(image_keys), self.split_heads(image_values)
            answer = answer + attend(q, k, v)
        return self.out(answer.transpose(1, 2).flatten(2), adapter)


class MLP(nn.Module):
    """Linear, activation, Linear: the time and text embedders and the feed-forward network."""

    def __init__(self, dim_in: int, dim_hidden: int, dim_out: int, activation):
        super().__init__()
        self.up = Linear(dim_in, dim_hidden)
        self.down = Linear(dim_hidden, dim_out)
        self.activation = activation

    def forward(self, x, adapter: str = ""):
        return self.down(self.activation(self.up(x, adapter)), adapter)


def gelu(x):
    return nnf.gelu(x, approximate="tanh")


class ImageEmbed(nn.Module):
    """Features of a picture (B, I, image_dim) -> image tokens (B, I, D): norm, MLP, norm. Here
    alone the GELU is exact and the norms have eps 1e-5."""

    def __init__(self, dim_in: int, dim: int):
        super().__init__()
        self.norm_in = nn.LayerNorm(dim_in)
        self.norm_out = nn.LayerNorm(dim)
        self.mlp = MLP(dim_in, dim_in, dim, nnf.gelu)

    def forward(self, image):
        image = layer_norm(image, self.norm_in)
        image = self.mlp(image.to(self.mlp.up.weight.dtype))
        return layer_norm(image, self.norm_out).type_as(image)


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.self_attn = Attention(c.dim, c.heads)
        self.cross_attn = Attention(c.dim, c.heads, image=c.image_dim > 0)
        self.norm_cross = nn.LayerNorm(c.dim, eps=1e-6)          # the block's only one with weights
        self.ffn = MLP(c.dim, c.ffn_dim, c.dim, gelu)
        self.modulation = nn.Parameter(torch.zeros(1, 6, c.dim))
        self.checkpointing = False          # keep no activations, compute again in backward

    def encode_prompt(self, text, image) -> tuple:
        """Keys and values for cross-attention: of text tokens (B, T, D), then of image tokens
        (B, I, D), if any. For callers: under FSDP it gathers the block's weights and lets go of
        them, so `compute` cannot use it."""
        return self.prompt_keys_values(text, image)

    def prompt_keys_values(self, text, image) -> tuple:
        keys_values = self.cross_attn.keys_values(text)
        if image is not None:
            keys_values += self.cross_attn.image_keys_values(image)
        return keys_values

    def forward(self, x, modulation, text, image, rope, spans, cache, adapter: str):
        """x (B, F, S, D) -> (x, keys and values of its tokens).

        modulation (B, F or 1, 6, D) in fp32; text (B, T, D) with image (B, I, D) or None, or what
        `encode_prompt` made of them; rope (L', K / 2, 2); cache: each earlier chunk's keys, values.
        """
        arguments = (x, modulation, text, image, rope, spans, cache, adapter)
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.compute, *arguments, use_reentrant=False,
                              preserve_rng_state=False)      # nothing here is random
        return self.compute(*arguments)

    def compute(self, x, modulation, text, image, rope, spans, cache, adapter):
        # Of the frame only: it broadcasts over its tokens and is never expanded to (B, L, 6, D).
        modulation = (self.modulation.float() + modulation).unsqueeze(3)     # (B, F or 1, 6, 1, D)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.unbind(2)
        size = x.shape[1:3]                                                  # (F, S)
        dtype = self.ffn.up.weight.dtype

        h = layer_norm(x) * (1 + scale_1) + shift_1
        h = h.to(dtype).flatten(1, 2)                                        # (B, L, D)
        own = self.self_attn.keys_values(h, adapter)
        seen = [*cache, own]
        keys = join([keys for keys, _ in seen], 1)
        values = join([values for _, values in seen], 1)
        h = self.self_attn(h, keys, values, rope=rope, spans=spans, adapter=adapter)
        x = (x.float() + gate_1 * h.unflatten(1, size)).type_as(x)           # (B, F, S, D)

        h = layer_norm(x, self.norm_cross).to(dtype).flatten(1, 2)
        prompt = text if isinstance(text, tuple) else self.prompt_keys_values(text, image)
        x = x + self.cross_attn(h, *prompt).unflatten(1, size)

        h = (layer_norm(x) * (1 + scale_2) + shift_2).to(dtype)              # (B, F, S, D)
        x = (x.float() + gate_2 * self.ffn(h, adapter)).type_as(x)
        return x, own


class PatchEmbed(nn.Module):
    """Conv3d with kernel = stride = (1, P, P), written as one Linear over flattened patches, in z's
    type. An adapter replaces it."""

    def __init__(self, channels: int, patch: int, dim: int):
        super().__init__()
        self.patch = patch
        self.weight = nn.Parameter(torch.empty(dim, channels, 1, patch, patch))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.adapters = nn.ModuleDict()

    def forward(self, z, adapter: str = ""):
        if adapter in self.adapters:
            return self.adapters[adapter](z)
        P = self.patch
        z = z.unflatten(4, (-1, P)).unflatten(3, (-1, P))                    # (B, F, C, h, P, w, P)
        z = z.permute(0, 1, 3, 5, 2, 4, 6)                                   # (B, F, h, w, C, P, P)
        z = z.flatten(4).flatten(2, 3)                                       # (B, F, S, C * P * P)
        return nnf.linear(z, self.weight.flatten(1).to(z.dtype), self.bias.to(z.dtype))


class FlowMapDiT(nn.Module):
    """u(z, t, r, context). Blocks multiply in the dtype of the weights (bf16 under FSDP's mixed
    precision). Times, norms, modulation, residual sums and the returned velocity are fp32.

    When gradients are recorded, what passes from block to block is stored in the weights' dtype, as
    are the embedded times. Without gradients (finite difference, DMD's scores, sampling) it stays
    in fp32, since small differences between two calls matter there.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        if c.dim % c.heads or c.dim // c.heads % 2 or c.dim // c.heads < 6:
            raise ValueError(f"width {c.dim} over {c.heads} heads: the head width must be a whole, "
                             f"even number >= 6")
        channels_in = c.channels + c.image_channels
        self.patch_embed = PatchEmbed(channels_in, c.patch, c.dim)
        if c.compressed:
            self.far_patch_embed = PatchEmbed(channels_in, 2 * c.patch, c.dim)
        self.time_embed = MLP(c.freq_dim, c.dim, c.dim, nnf.silu)            # E
        if c.second_time:
            self.r_embed = MLP(c.freq_dim, c.dim, c.dim, nnf.silu)           # E', starts as E
        self.time_proj = Linear(c.dim, 6 * c.dim)
        self.text_embed = MLP(c.text_dim, c.dim, c.dim, gelu)
        if c.image_dim:
            self.image_embed = ImageEmbed(c.image_dim, c.dim)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.head_modulation = nn.Parameter(torch.zeros(1, 2, c.dim))
        self.head = Linear(c.dim, c.patch * c.patch * c.channels)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> "FlowMapDiT":
        """Fresh weights drawn from `generator` (on the CPU). Returns self."""
        for name, p in self.named_parameters():
            if name.endswith("modulation"):
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
            elif "norm" in name:
                p.fill_(float(name.endswith("weight")))
            elif name.endswith("bias") or name.startswith("head."):
                p.zero_()                            # a zero head: u starts at 0 (or as the skip)
            elif name.startswith(("time_", "text_")):
                p.copy_(0.02 * torch.randn(p.shape, generator=generator))
            else:                                    # Xavier, uniform
                fan_out, fan_in = p.flatten(1).shape
                bound = (6 / (fan_out + fan_in)) ** 0.5
                p.copy_((2 * torch.rand(p.shape, generator=generator) - 1) * bound)
        if self.config.second_time:
            self.r_embed.load_state_dict(self.time_embed.state_dict())
        if self.config.compressed:
            start = compressed_patch_embed(self.patch_embed.state_dict())
            self.far_patch_embed.load_state_dict(start)
        return self

    def forward(self, z: torch.Tensor, t: torch.Tensor, r: torch.Tensor, context) -> torch.Tensor:
        """z (B, F, C, H, W), times t >= r of shape (B,) or (B, F) -> u (B, F, C, H, W), fp32.
        Frames that are given have t = 0, whatever their r.

        context: prompt features (B, T, text_dim) alone, or a Context. A chunk of z sees itself and
        the cached chunks that end before it starts. Raises ValueError for latents that the patch
        size does not divide, of another channel count, or of another length than the context's
        chunks, and for a picture that is missing or not wanted.
        """
        c, P = self.config, self.config.patch
        if not isinstance(context, Context):
            context = Context(context)
        t = t.float().view(len(z), -1)                                       # (B, F or 1)
        r = r.float().view(len(z), -1) if c.second_time else t               # (B, F or 1)
        e = self.embed_times(t, r, context.adapter)                          # (B, F or 1, D)
        x, _ = self.run_blocks(z, self.patch_embed, e, context)              # (B, F, S, D)

        modulation = self.head_modulation.float() + e.float().unsqueeze(2)   # (B, F or 1, 2, D)
        shift, scale = modulation.unsqueeze(3).unbind(2)                     # (B, F or 1, 1, D)
        h = layer_norm(x) * (1 + scale) + shift
        u = self.head(h.type_as(x)).float()                                  # (B, F, S, P * P * C)
        u = u.unflatten(3, (P, P, -1)).unflatten(2, (z.shape[3] // P, -1))   # (B, F, h, w, P, P, C)
        u = u.permute(0, 1, 6, 2, 4, 3, 5).reshape(z.shape)                  # (B, F, C, H, W)
        if c.output_skip:
            t, r = t[..., None, None, None], r[..., None, None, None]
            u = u + gaussian_average_velocity(z.float(), t, r, c.output_skip)
        return u

    def encode(self, z: torch.Tensor, context: Context,
               compressed: bool = False) -> tuple[CachedChunk, ...]:
        """Clean latents z (B, F, C, H, W) -> its chunks, for the cache, at t = r = 0. A chunk of z
        sees the cache and the chunks of z up to itself."""
        if compressed and not self.config.compressed:
            raise ValueError("this network has no compressed patch embedding: keep all chunks full")
        zero = torch.zeros(len(z), 1, device=z.device)
        e = self.embed_times(zero, zero, context.adapter)
        embed = self.far_patch_embed if compressed else self.patch_embed
        _, layers = self.run_blocks(z, embed, e, context, prefill=True)
        tokens = layers[0][0].shape[1] // z.shape[1]                         # of a frame
        stride = 2 if compressed else 1
        chunks, frame = [], 0
        for frames in context.chunks or (z.shape[1],):
            rows = slice(frame * tokens, (frame + frames) * tokens)
            keys_values = tuple((keys[:, rows], values[:, rows]) for keys, values in layers)
            chunks.append(CachedChunk(context.start + frame, frames, stride, keys_values))
            frame += frames
        return tuple(chunks)

    def encode_prompt(self, text: torch.Tensor, image: torch.Tensor | None = None) -> tuple:
        """Prompt features (B, T, text_dim) and those of a picture (B, I, image_dim), if any -> keys
        and values of every cross-attention, for a Context that many calls share."""
        text, image = self.embed_prompt(text, image)
        return tuple(block.encode_prompt(text, image) for block in self.blocks)

    def embed_prompt(self, text, image) -> tuple:
        """What cross-attention sees: the prompt's tokens (B, T, D), and image tokens or None."""
        if self.config.image_dim and image is None:
            raise ValueError("this network needs the features of a picture: Context.image")
        if not self.config.image_dim and image is not None:
            raise ValueError("this network takes no features of a picture (Context.image)")
        text = self.text_embed(text.to(self.time_proj.weight.dtype))
        return text, None if image is None else self.image_embed(image)

    def residual_type(self) -> torch.dtype:
        """Of the residual stream and of e: the weights' type with gradient, else fp32."""
        return self.time_proj.weight.dtype if torch.is_grad_enabled() else torch.float32

    def embed_times(self, t, r, adapter: str) -> torch.Tensor:
        """e (B, F or 1, D), the mixed embedding of both times."""
        c, dtype = self.config, self.residual_type()
        e = self.time_embed(time_features(t, c.freq_dim, c.time_scale).to(dtype), adapter)
        # The adapters of teacher and fake score, which know one time, leave r_embed out.
        if c.second_time and (not adapter or adapter in self.r_embed.up.adapters):
            second = (t - r).clamp(min=0) if c.added else r      # given frames have t = 0 < r
            second = time_features(second, c.freq_dim, c.time_scale)
            e_r = self.r_embed(second.to(dtype), adapter)
            e = e + e_r if c.added else (1 - c.gate) * e + c.gate * e_r
        return e

    def run_blocks(self, z, embed: PatchEmbed, e, context: Context, prefill: bool = False) -> tuple:
        """The blocks: latents z through the patch embedding `embed`, modulated by e -> tokens
        (B, F, S, D) after the last block and, in a prefill, keys and values of every layer."""
        c = self.config
        B, F, C, H, W = z.shape
        if C != c.channels or H % embed.patch or W % embed.patch:
            raise ValueError(f"latents of {C} channels, {H} x {W}: expected {c.channels} channels "
                             f"and sides that are multiples of {embed.patch}")
        chunks = context.chunks or (F,)
        if sum(chunks) != F:
            raise ValueError(f"{F} latent frames, but chunks of {list(chunks)}")
        z = self.with_condition(z, context)
        places = [(chunk.start, chunk.frames, chunk.stride) for chunk in context.cache]
        places.append((context.start, F, embed.patch // c.patch))
        rope = rotary_table(tuple(places), H // c.patch, W // c.patch, c.dim // c.heads, z.device)
        modulation = self.time_proj(nnf.silu(e)).unflatten(-1, (6, -1)).float()
        prompt, image = context.text, None           # features, or each layer's keys and values
        if isinstance(prompt, torch.Tensor):
            tokens, image = self.embed_prompt(prompt, context.image)
            prompt = [tokens] * c.layers
        x = embed(z.to(self.residual_type()), context.adapter)               # (B, F, S, D)
        spans = attention_spans(context, chunks, x.shape[2], prefill)
        layers = []
        for i, block in enumerate(self.blocks):
            cache = tuple(chunk.keys_values[i] for chunk in context.cache)
            x, own = block(x, modulation, prompt[i], image, rope, spans, cache, context.adapter)
            if prefill:
                layers.append(own)
        return x, layers

    def with_condition(self, z, context: Context) -> torch.Tensor:
        """z and beside its channels the condition's: (B, F, C + image_channels, H, W)."""
        B, F, C, H, W = z.shape
        wanted = (F, self.config.image_channels, H, W) if self.config.image_channels else "nothing"
        condition, found = context.condition, "nothing"
        if condition is not None:
            condition = condition[:, context.start:context.start + F].to(z)
            found = tuple(condition.shape[1:])
        if found != wanted:
            raise ValueError(f"Context.condition, what is told of the clip: {found} is there, this "
                             f"network wants {wanted}")
        return z if condition is None else torch.cat([z, condition], 2)


def gaussian_average_velocity(z, t, r, std: float) -> torch.Tensor:
    """The exact u(z, t, r) when the data are N(0, std^2): there z_r = z_t s(r) / s(t) with
    s(t)^2 = t^2 + std^2 (1 - t)^2, and (z_t - z_r) / (t - r) needs no division by t - r."""
    s_t = (t**2 + std**2 * (1 - t) ** 2).sqrt()
    s_r = (r**2 + std**2 * (1 - r) ** 2).sqrt()
    return ((t + r) * (1 + std**2) - 2 * std**2) / (s_t * (s_t + s_r)) * z


def compressed_patch_embed(embed: dict) -> dict:
    """The compressed patch embedding that a patch embedding {weight (D, C, 1, P, P), bias} starts
    as: its kernel interpolated to (1, 2 P, 2 P)."""
    weight, bias = embed["weight"], embed["bias"]
    size = (1, 2 * weight.shape[3], 2 * weight.shape[4])
    kernel = nnf.interpolate(weight.float(), size=size, mode="trilinear")
    return {"weight": kernel.to(weight.dtype), "bias": bias.clone()}
