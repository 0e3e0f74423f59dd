"""The network u(z, t, r, text): the average velocity over [r, t] of a video's latents (METHOD of AnyFlow, section 3).

A Wan2.1-style diffusion transformer whose time embedding takes two times, so that one set of weights answers
both "which way does the flow point at t" (r = t) and "what is the mean velocity from t down to r" (r < t).

Legend:  B batch   F latent frames   C latent channels   H, W latent height and width   P spatial patch
         S = (H / P) * (W / P) tokens of a frame   L = F * S tokens   D width   N heads   K = D / N   T text tokens
Times are float32 in [0, 1] (1 = noise), of shape (B,) for one time a clip or (B, F) for one a frame.

Causal generation (METHOD section 7) is the same network asked about one chunk of frames at a time, or about several
that do not see each other, in a `Context`: the prompt and the keys and values of the clean chunks before. A clip in one
chunk, with nothing before it, is the bidirectional case.

An image-to-video network (Wan2.1-I2V) gets the picture in the `Context` too: as I image tokens beside the prompt's in
cross-attention, and as channels beside those of z, which say what of the clip is known.
"""
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class ModelConfig:
    dim: int = 1536               # D
    heads: int = 12               # N; D / N must be even and at least 6 (three rotary axes)
    layers: int = 30
    ffn_dim: int = 8960
    channels: int = 16            # C
    patch: int = 2                # P; frames are never merged, because each frame may have its own time
    text_dim: int = 4096
    freq_dim: int = 256           # sinusoidal features of a time
    time_scale: float = 1000.0    # the sinusoid sees time_scale * t. 1000 is what Wan weights know; a network trained
                                  # from scratch for minutes needs a slower one for a smooth d u / d t
    second_time: bool = True      # False: the plain teacher, which knows t only and ignores r
    image_channels: int = 0       # image-to-video: channels of Context.known, which stand beside those of z
    image_dim: int = 0            # image-to-video: width of Context.image; 0: no image tokens
    compressed: bool = False      # a second patch embedding, of patch 2 P, for the older chunks of a causal network
    gate: float = 0.25            # g in e = (1 - g) E(t) + g E'(r)
    output_skip: float = 0.0      # > 0: add the exact average velocity of Gaussian data of this standard deviation to
                                  # the output, which helps small networks that start from scratch


PRESETS = {
    "tiny": ModelConfig(dim=32, heads=2, layers=2, ffn_dim=64, channels=48, patch=1, text_dim=64, freq_dim=32,
                        time_scale=50.0, output_skip=1.0),
    "toy": ModelConfig(dim=96, heads=4, layers=4, ffn_dim=384, channels=48, patch=1, text_dim=64, freq_dim=64,
                       time_scale=50.0, output_skip=1.0),
    "wan-1.3b": ModelConfig(),
    "wan-5b": ModelConfig(dim=3072, heads=24, ffn_dim=14336, channels=48),
    "wan-14b": ModelConfig(dim=5120, heads=40, layers=40, ffn_dim=13824),
}


def time_features(t: torch.Tensor, width: int, scale: float) -> torch.Tensor:
    """Sinusoidal features of times t (...,) -> (..., width): the cosines first, then the sines, in fp32."""
    frequencies = 10000.0 ** (-torch.arange(width // 2, device=t.device, dtype=torch.float32) / (width // 2))
    angles = scale * t.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary_angles(frames: torch.Tensor, height: int, width: int, head_dim: int, stride: int = 1) -> torch.Tensor:
    """Unit complex rotations (F, h * w, K / 2) of a token grid, for the 3-D rotary embedding.

    frames: positions (F,) of the latent frames, any numbers, so that a chunk may sit anywhere in a long video.
    The head's channels split into time, height and width as (K - 4 (K // 6), 2 (K // 6), 2 (K // 6)), theta 10000.
    stride: rows and columns that a token covers. The mean of their rotations, brought back to length 1, is the rotation
    of their middle.
    """
    axis_dim = 2 * (head_dim // 6)
    axes = []
    for positions, dim in ((frames, head_dim - 2 * axis_dim),
                           (torch.arange(height, device=frames.device) * stride + (stride - 1) / 2, axis_dim),
                           (torch.arange(width, device=frames.device) * stride + (stride - 1) / 2, axis_dim)):
        frequencies = 10000.0 ** (-torch.arange(0, dim, 2, device=frames.device, dtype=torch.float64) / dim)
        angles = positions.double()[:, None] * frequencies
        axes.append(torch.polar(torch.ones_like(angles), angles))
    size = (len(frames), height, width, -1)
    grid = torch.cat([axes[0][:, None, None].expand(size), axes[1][None, :, None].expand(size),
                      axes[2][None, None, :].expand(size)], dim=-1)          # (F, h, w, K / 2)
    return grid.flatten(1, 2).to(torch.complex64)


def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Turn interleaved channel pairs of x (B, N, L, K), seen as complex numbers, by rope (L, K / 2), in fp32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())             # (B, N, L, K / 2)
    return torch.view_as_real(pairs * rope).flatten(-2).type_as(x)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a learned scale, computed in fp32."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), 1e-6).type_as(x)


def layer_norm(x: torch.Tensor, weight=None, bias=None, eps: float = 1e-6) -> torch.Tensor:
    """LayerNorm in fp32; the result stays in fp32 for the modulation that follows."""
    weight, bias = (None if p is None else p.float() for p in (weight, bias))
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)


@dataclass(frozen=True)
class Chunk:
    """A clean chunk as later ones see it: the keys, before rotation, and values of every layer, (B, L, D) each."""
    start: int                    # position in the video of its first frame
    frames: int
    stride: int                   # 1, or 2 for a compressed chunk: patches of frames that a token covers, each way
    memory: tuple                 # of (keys, values)


@dataclass(frozen=True)
class Context:
    """What a call of the network knows beside z and its times. Never changed in place: `remember` makes a new one, so
    that a checkpointed block computes the same again in the backward pass."""
    text: torch.Tensor | tuple    # prompt features (B, T, text_dim), or what `read` made of them
    past: tuple[Chunk, ...] = ()  # compressed chunks, then full ones, in the order of the video
    start: int = 0                # position in the video of z's first frame
    chunks: tuple[int, ...] = ()  # frames of each chunk of z; none: z is one chunk
    adapter: str = ""             # which of the adapters on the weights (lora.py) is added; none: the weights as they are
    recent: tuple = ()            # clean latents of the full chunks of `past`, for when the window slides
    image: torch.Tensor | None = None   # image-to-video: features (B, I, image_dim) of the picture; none where `read` saw them
    known: torch.Tensor | None = None   # image-to-video: (B, frames of the video, image_channels, H, W), what is known of it

    def __getitem__(self, rows) -> "Context":
        """The same for some samples of the batch."""
        def pick(layers):
            return tuple(tuple(m[rows] for m in memory) for memory in layers)
        return replace(self, text=pick(self.text) if isinstance(self.text, tuple) else self.text[rows],
                       past=tuple(replace(chunk, memory=pick(chunk.memory)) for chunk in self.past),
                       recent=tuple(z[rows] for z in self.recent),
                       image=None if self.image is None else self.image[rows],
                       known=None if self.known is None else self.known[rows])


class Linear(nn.Linear):
    """A Linear that multiplies in the type of its input, and may carry low-rank adapters (lora.py), of which a call names the
    one to add."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__(dim_in, dim_out)
        self.adapters = nn.ModuleDict()

    def forward(self, x, adapter: str = ""):
        y = F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        return y + self.adapters[adapter](x) if adapter in self.adapters else y


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, image: bool = False):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)    # over all heads' channels at once
        if image:
            self.k_image, self.v_image, self.norm_k_image = Linear(dim, dim), Linear(dim, dim), RMSNorm(dim)

    def memory(self, context, adapter: str = ""):
        """Keys, not rotated, and values of context, all (B, L', D)."""
        return self.norm_k(self.k(context, adapter)), self.v(context, adapter)

    def image_memory(self, image):
        """Keys and values of image tokens (B, I, D)."""
        return self.norm_k_image(self.k_image(image)), self.v_image(image)

    def forward(self, x, k, v, *image, rope=None, spans=None, adapter: str = ""):
        """x (B, L, D) asks, keys and values (B, L', D) answer; rope (L', K / 2) turns all keys and, with its end, the
        queries. spans: which queries may see which keys, as (start, stop, key ranges); none: all see all.
        image: keys and values (B, I, D) of image tokens, whose answer, with a softmax of its own, is added."""
        q, k, v, *image = (m.unflatten(-1, (self.heads, -1)).transpose(1, 2)                 # (B, N, L, L' or I, K)
                           for m in (self.norm_q(self.q(x, adapter)), k, v, *image))
        if rope is not None:
            q, k = rotate(q, rope[-q.shape[2]:]), rotate(k, rope)
        parts = []
        for start, stop, ranges in spans or [(0, q.shape[2], [(0, k.shape[2])])]:
            seen = ([m[:, :, a:b] for a, b in ranges] for m in (k, v))
            seen = (m[0] if len(m) == 1 else torch.cat(m, 2) for m in seen)
            parts.append(F.scaled_dot_product_attention(q[:, :, start:stop], *seen))
        x = parts[0] if len(parts) == 1 else torch.cat(parts, 2)                             # (B, N, L, K)
        if image:
            x = x + F.scaled_dot_product_attention(q, *image)
        return self.out(x.transpose(1, 2).flatten(2), adapter)                               # (B, L, D)


class MLP(nn.Module):
    """Linear, activation, Linear: the time embedders, the text embedder and the feed-forward network."""

    def __init__(self, dim_in: int, dim_hidden: int, dim_out: int, activation):
        super().__init__()
        self.up, self.down, self.activation = Linear(dim_in, dim_hidden), Linear(dim_hidden, dim_out), activation

    def forward(self, x, adapter: str = ""):
        return self.down(self.activation(self.up(x, adapter)), adapter)


def gelu(x):
    return F.gelu(x, approximate="tanh")


class ImageEmbed(nn.Module):
    """Features of a picture (B, I, image_dim) -> image tokens (B, I, D): norm, MLP, norm. Unlike elsewhere in the network
    the GELU is exact and the norms have eps 1e-5."""

    def __init__(self, dim_in: int, dim: int):
        super().__init__()
        self.norm_in, self.norm_out = nn.LayerNorm(dim_in), nn.LayerNorm(dim)
        self.mlp = MLP(dim_in, dim_in, dim, F.gelu)

    def forward(self, image):
        image = layer_norm(image, self.norm_in.weight, self.norm_in.bias, 1e-5).to(self.mlp.up.weight.dtype)
        image = self.mlp(image)
        return layer_norm(image, self.norm_out.weight, self.norm_out.bias, 1e-5).type_as(image)


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.self_attn, self.cross_attn = Attention(c.dim, c.heads), Attention(c.dim, c.heads, image=c.image_dim > 0)
        self.norm_cross = nn.LayerNorm(c.dim, eps=1e-6)          # the only norm of the block with weights of its own
        self.ffn = MLP(c.dim, c.ffn_dim, c.dim, gelu)
        self.modulation = nn.Parameter(torch.zeros(1, 6, c.dim))
        self.checkpointing = False                               # keep no activations, compute them again in backward

    def read(self, text, image=None):
        """Keys and values for cross-attention: the prompt's, from text (B, T, D), then those of image tokens (B, I, D), if
        any. For callers: under FSDP it gathers the block's weights and lets go of them, so `compute` cannot use it."""
        return self.cross_memory(text, image)

    def cross_memory(self, text, image):
        return self.cross_attn.memory(text) + (() if image is None else self.cross_attn.image_memory(image))

    def forward(self, x, modulation, text, image, rope, spans=None, past=(), adapter: str = ""):
        """x (B, F, S, D), modulation (B, F or 1, 6, D) in fp32, text (B, T, D) with image (B, I, D) or none, or what `read`
        made of them, rope of past and own tokens (L', K / 2), past: keys and values of each chunk before. Returns x, and
        its own keys and values."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.compute, x, modulation, text, image, rope, spans, past, adapter, use_reentrant=False)
        return self.compute(x, modulation, text, image, rope, spans, past, adapter)

    def compute(self, x, modulation, text, image, rope, spans, past, adapter):
        # Modulation depends on the frame only and broadcasts over its tokens: never expanded to (B, L, 6, D).
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + modulation).unsqueeze(3).unbind(2)
        size, dtype = x.shape[1:3], self.ffn.up.weight.dtype
        h = (layer_norm(x) * (1 + scale1) + shift1).to(dtype).flatten(1, 2)                  # (B, L, D)
        own = self.self_attn.memory(h, adapter)
        k, v = (torch.cat([*before, now], 1) for *before, now in zip(*past, own)) if past else own
        x = (x.float() + gate1 * self.self_attn(h, k, v, rope=rope, spans=spans, adapter=adapter).unflatten(1, size)).type_as(x)
        h = layer_norm(x, self.norm_cross.weight, self.norm_cross.bias).to(dtype).flatten(1, 2)
        text = text if isinstance(text, tuple) else self.cross_memory(text, image)
        x = x + self.cross_attn(h, *text).unflatten(1, size)
        h = (layer_norm(x) * (1 + scale2) + shift2).to(dtype)                                # (B, F, S, D)
        return (x.float() + gate2 * self.ffn(h, adapter)).type_as(x), own


class PatchEmbed(nn.Module):
    """Conv3d with kernel = stride = (1, P, P), written as one Linear over flattened patches, in z's type. An adapter replaces
    it."""

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
        z = z.unflatten(4, (-1, P)).unflatten(3, (-1, P)).permute(0, 1, 3, 5, 2, 4, 6)       # (B, F, h, w, C, P, P)
        z = z.flatten(4).flatten(2, 3)                                                       # (B, F, S, C * P * P)
        return F.linear(z, self.weight.flatten(1).to(z.dtype), self.bias.to(z.dtype))


class FlowMapDiT(nn.Module):
    """u(z, t, r, text). Weights may be bf16 (under FSDP's mixed precision, say), which is then what blocks multiply in; times,
    norms, modulation and residual sums are computed, and the velocity returned, in fp32.

    With a backward pass to come, what is kept between blocks is rounded to the weights' type, as are the embedded times.
    Without one (the finite difference, the scores of DMD, sampling) nothing is: there small differences of two calls count.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        if c.dim % c.heads or c.dim // c.heads % 2 or c.dim // c.heads < 6:
            raise ValueError(f"width {c.dim} over {c.heads} heads: the head width must be a whole, even number >= 6")
        self.patch_embed = PatchEmbed(c.channels + c.image_channels, c.patch, c.dim)
        if c.compressed:
            self.far_patch_embed = PatchEmbed(c.channels + c.image_channels, 2 * c.patch, c.dim)
        self.time_embed = MLP(c.freq_dim, c.dim, c.dim, F.silu)                     # E
        if c.second_time:
            self.r_embed = MLP(c.freq_dim, c.dim, c.dim, F.silu)                    # E', starts as a copy of E
        self.time_proj = Linear(c.dim, 6 * c.dim)
        self.text_embed = MLP(c.text_dim, c.dim, c.dim, gelu)
        if c.image_dim:
            self.image_embed = ImageEmbed(c.image_dim, c.dim)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.head_modulation = nn.Parameter(torch.zeros(1, 2, c.dim))
        self.head = Linear(c.dim, c.patch * c.patch * c.channels)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> "FlowMapDiT":
        """Fresh weights drawn from `generator` (on the CPU), for training from scratch. Returns self."""
        for name, p in self.named_parameters():
            if name.endswith("modulation"):
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
            elif "norm" in name:
                p.fill_(float(name.endswith("weight")))
            elif name.endswith("bias") or name.startswith("head."):
                p.zero_()                                        # a zero head: training starts at u = 0 (or the skip)
            elif name.startswith(("time_", "text_")):
                p.copy_(0.02 * torch.randn(p.shape, generator=generator))
            else:                                                # Xavier, uniform
                bound = (6 / (p.flatten(1).shape[0] + p.flatten(1).shape[1])) ** 0.5
                p.copy_((2 * torch.rand(p.shape, generator=generator) - 1) * bound)
        if self.config.second_time:
            self.r_embed.load_state_dict(self.time_embed.state_dict())
        if self.config.compressed:
            self.far_patch_embed.load_state_dict(compressed_patch_embed(self.patch_embed.state_dict()))
        return self

    def forward(self, z: torch.Tensor, t: torch.Tensor, r: torch.Tensor, context) -> torch.Tensor:
        """z (B, F, C, H, W), times t >= r of shape (B,) or (B, F) -> u (B, F, C, H, W), fp32.

        context: prompt features (B, T, text_dim) alone, or a Context. A chunk of z sees itself and the past chunks that
        end before it begins. Raises ValueError for latents that the patch size does not divide, of another channel
        count, or of another length than the context's chunks, and for a picture that is missing or not wanted.
        """
        c, P = self.config, self.config.patch
        context = context if isinstance(context, Context) else Context(context)
        t, r = (time.float().view(len(z), -1) for time in (t, r))                   # (B, F) or (B, 1)
        r = r if c.second_time else t
        e = self.embed_times(t, r, context.adapter)
        x, _ = self.run(z, self.patch_embed, e, context)                            # (B, F, S, D)

        shift, scale = (self.head_modulation.float() + e.float().unsqueeze(2)).unsqueeze(3).unbind(2)
        x = self.head((layer_norm(x) * (1 + scale) + shift).type_as(x)).float()     # (B, F, S, P * P * C)
        x = x.unflatten(3, (P, P, -1)).unflatten(2, (z.shape[3] // P, -1))          # (B, F, h, w, P, P, C)
        u = x.permute(0, 1, 6, 2, 4, 3, 5).reshape(z.shape)
        if c.output_skip:
            u = u + gaussian_average_velocity(z.float(), *(time[..., None, None, None] for time in (t, r)), c.output_skip)
        return u

    def encode(self, z: torch.Tensor, context: Context, compressed: bool = False) -> tuple[Chunk, ...]:
        """Clean latents z (B, F, C, H, W) -> its chunks, as later ones see them. A chunk of z sees the past and the
        chunks of z up to itself, at t = r = 0."""
        if compressed and not self.config.compressed:
            raise ValueError("this network has no compressed patch embedding: keep every past chunk full")
        zero = torch.zeros(len(z), 1, device=z.device)
        embed = self.far_patch_embed if compressed else self.patch_embed
        _, layers = self.run(z, embed, self.embed_times(zero, zero, context.adapter), context, encoding=True)
        tokens, chunks, frame = layers[0][0].shape[1] // z.shape[1], [], 0
        for frames in context.chunks or (z.shape[1],):
            rows = slice(frame * tokens, (frame + frames) * tokens)
            memory = tuple((k[:, rows], v[:, rows]) for k, v in layers)
            chunks.append(Chunk(context.start + frame, frames, 1 + compressed, memory))
            frame += frames
        return tuple(chunks)

    def read(self, text: torch.Tensor, image: torch.Tensor | None = None) -> tuple:
        """Prompt features (B, T, text_dim) and those of a picture (B, I, image_dim), if the network takes one -> keys and
        values of every cross-attention, for a Context that many calls share."""
        text, image = self.embed_words(text, image)
        return tuple(block.read(text, image) for block in self.blocks)

    def embed_words(self, text, image):
        """What cross-attention reads: the prompt's tokens (B, T, D), and image tokens (B, I, D) or None."""
        if (image is None) == (self.config.image_dim > 0):
            raise ValueError("this network needs the features of a picture: Context.image" if image is None else
                             "this network takes no features of a picture (Context.image)")
        text = self.text_embed(text.to(self.time_proj.weight.dtype))
        return text, None if image is None else self.image_embed(image)

    def stream_type(self) -> torch.dtype:
        """Of what runs through the network, see the class."""
        return self.time_proj.weight.dtype if torch.is_grad_enabled() else torch.float32

    def embed_times(self, t, r, adapter: str = ""):
        """e (B, F or 1, D), the mixed embedding of both times."""
        c, dtype = self.config, self.stream_type()
        e = self.time_embed(time_features(t, c.freq_dim, c.time_scale).to(dtype), adapter)
        if c.second_time:
            e = (1 - c.gate) * e + c.gate * self.r_embed(time_features(r, c.freq_dim, c.time_scale).to(dtype), adapter)
        return e

    def run(self, z, embed, e, context: Context, encoding: bool = False):
        """The blocks: latents z through the patch embedding `embed`, modulated by e -> tokens (B, F, S, D) after the last
        block and, when encoding, the keys and values of every layer."""
        (F_, C, H, W), c = z.shape[1:], self.config
        if C != c.channels or H % embed.patch or W % embed.patch:
            raise ValueError(f"latents of {C} channels, {H} x {W}: expected {c.channels} channels and sides that "
                             f"are multiples of {embed.patch}")
        chunks = context.chunks or (F_,)
        if sum(chunks) != F_:
            raise ValueError(f"{F_} latent frames, but chunks of {list(chunks)}")
        known = () if context.known is None else (context.known[:, context.start:context.start + F_].to(z),)
        shapes = [tuple(m.shape[1:]) for m in known], [(F_, c.image_channels, H, W)] * (c.image_channels > 0)
        if shapes[0] != shapes[1]:
            raise ValueError(f"Context.known, what is known of the clip: {shapes[0] or 'nothing'} is there, this network wants "
                             f"{shapes[1] or 'nothing'}")
        h, w, head_dim = H // c.patch, W // c.patch, c.dim // c.heads
        own = Chunk(context.start, F_, embed.patch // c.patch, ())
        rope = []                                                                   # one table for all of a stride
        for stride, group in groupby((*context.past, own), key=lambda chunk: chunk.stride):
            frames = torch.cat([torch.arange(b.start, b.start + b.frames, device=z.device) for b in group])
            rope.append(rotary_angles(frames, h // stride, w // stride, head_dim, stride).flatten(0, 1))
        rope = torch.cat(rope)                                                      # (L', K / 2)
        modulation = self.time_proj(F.silu(e)).unflatten(-1, (6, -1)).float()       # (B, F or 1, 6, D)
        text, image = context.text, None
        if isinstance(text, torch.Tensor):
            text, image = self.embed_words(text, context.image)
            text = [text] * c.layers
        x = embed(torch.cat([z, *known], 2).to(self.stream_type()), context.adapter)         # (B, F, S, D)
        spans, layers = attention_spans(context, chunks, x.shape[2], sees_earlier_own=encoding), []
        for i, block in enumerate(self.blocks):
            x, memory = block(x, modulation, text[i], image, rope, spans, tuple(chunk.memory[i] for chunk in context.past),
                              context.adapter)
            if encoding:
                layers.append(memory)
        return x, layers


def attention_spans(context: Context, chunks, tokens: int, sees_earlier_own: bool) -> list:
    """Which keys each chunk of z may see: (first query, last query + 1, [ranges of keys]). Keys are those of the past,
    then z's own, `tokens` a frame; one dense attention a chunk."""
    past = [(chunk.start + chunk.frames, chunk.memory[0][0].shape[1]) for chunk in context.past]
    offset, spans, start = sum(length for _, length in past), [], 0
    for frames in chunks:
        stop = start + frames * tokens
        seen = sum(length for end, length in past if end <= context.start + start // tokens)
        first = offset + (0 if sees_earlier_own else start)
        # Two ranges that touch are one, which needs no copy.
        ranges = [(0, offset + stop)] if seen == first else [(0, seen), (first, offset + stop)]
        spans.append((start, stop, ranges))
        start = stop
    return spans


def teacher_forced(network, x: torch.Tensor, context, chunks, full_chunks: int) -> Context:
    """The context in which the last chunks of a clip are trained (METHOD section 7): each sees the clean chunks before.

    x (B, F, C, H, W) clean latents, context: prompt features alone, or a Context without a past, chunks: frames of each
    chunk, adding up to F. The last `full_chunks` are the ones to be trained, older ones are compressed; 0 trains all and
    compresses none. The `start` of the result is the first frame to be trained. A single chunk makes the bidirectional
    context: nothing but what `context` holds.
    """
    old, new = (tuple(chunks[:-full_chunks]), tuple(chunks[-full_chunks:])) if full_chunks else ((), tuple(chunks))
    context = context if isinstance(context, Context) else Context(context)
    past = network.encode(x[:, :sum(old)], replace(context, chunks=old), compressed=True) if old else ()
    context = replace(context, past=past, start=sum(old), chunks=new)
    if len(new) > 1:                                 # nobody sees the clean copy of the last chunk
        clean = network.encode(x[:, sum(old):sum(chunks[:-1])], replace(context, chunks=new[:-1]))
        context = replace(context, past=context.past + clean)
    return context


def remember(network, context: Context, z_0: torch.Tensor, full_chunks: int, window: int = 0) -> Context:
    """The context of the next chunk, once z_0 (B, F, C, H, W) is finished.

    The next chunk and the `full_chunks` - 1 before it are full, older ones compressed (0: all are full). What is encoded
    is the chunk that leaves the full ones, whose compressed form depends on compressed chunks only and never changes,
    and the full ones, which now see one compressed chunk more. window > 0: only the last `window` chunks are kept.
    """
    start = context.start + z_0.shape[1]
    if not full_chunks:
        past = context.past + network.encode(z_0, context)
        return replace(context, past=past[-window:], start=start)
    recent = (*context.recent, z_0)
    old = tuple(chunk for chunk in context.past if chunk.stride > 1)
    first = start - sum(z.shape[1] for z in recent)                      # of the recent ones
    while len(recent) >= full_chunks:
        old += network.encode(recent[0], replace(context, past=old, start=first, chunks=()), compressed=True)
        first, recent = first + recent[0].shape[1], recent[1:]
    if window:
        old = old[-(window - len(recent)):] if window > len(recent) else ()
    full = ()
    if recent:
        lengths = tuple(z.shape[1] for z in recent)
        full = network.encode(torch.cat(recent, 1), replace(context, past=old, start=first, chunks=lengths))
    return replace(context, past=old + full, start=start, recent=recent)


def gaussian_average_velocity(z: torch.Tensor, t: torch.Tensor, r: torch.Tensor, std: float) -> torch.Tensor:
    """The exact u(z, t, r) when the data are N(0, std^2): there z_r = z_t s(r) / s(t) with s(t)^2 = t^2 + std^2 (1 - t)^2,
    and (z_t - z_r) / (t - r) in a form that needs no division by t - r."""
    s_t, s_r = ((time**2 + std**2 * (1 - time) ** 2).sqrt() for time in (t, r))
    return ((t + r) * (1 + std**2) - 2 * std**2) / (s_t * (s_t + s_r)) * z


class Tensors(Mapping):
    """Named tensors, each read or made only when it is asked for: a large model never lies in memory twice."""

    def __init__(self, makers: dict):
        self.makers = makers

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.makers[name]()

    def __iter__(self):
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


def as_flow_map(state: Mapping) -> Tensors:
    """A plain teacher's tensors with the second time embedder added, a copy of the first: at r = t the network is the
    teacher exactly, whatever the gate."""
    copies = {name.replace("time_embed.", "r_embed."): name for name in state if name.startswith("time_embed.")}
    return Tensors({name: partial(state.__getitem__, source) for name, source in ({n: n for n in state} | copies).items()})


def as_causal(state: Mapping) -> Tensors:
    """A bidirectional network's tensors with the compressed patch embedding added, interpolated from the patch embedding."""
    def make(part):
        return compressed_patch_embed({n: state[f"patch_embed.{n}"] for n in ("weight", "bias")})[part]
    makers = {name: partial(state.__getitem__, name) for name in state}
    return Tensors(makers | {f"far_patch_embed.{part}": partial(make, part) for part in ("weight", "bias")})


def compressed_patch_embed(embed: dict) -> dict:
    """The compressed patch embedding that a patch embedding {weight (D, C, 1, P, P), bias} starts as: its kernel
    interpolated to (1, 2 P, 2 P)."""
    weight = embed["weight"]
    kernel = F.interpolate(weight.float(), size=(1, 2 * weight.shape[3], 2 * weight.shape[4]), mode="trilinear")
    return {"weight": kernel.to(weight.dtype), "bias": embed["bias"].clone()}
