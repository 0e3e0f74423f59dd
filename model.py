"""The network u(z, t, r, text): the average velocity over [r, t] of a video's latents (METHOD of AnyFlow, section 3).

A Wan2.1-style diffusion transformer whose time embedding takes two times, so that one set of weights answers
both "which way does the flow point at t" (r = t) and "what is the mean velocity from t down to r" (r < t).

Legend:  B batch   F latent frames   C latent channels   H, W latent height and width   P spatial patch
         S = (H / P) * (W / P) tokens of a frame   L = F * S tokens   D width   N heads   K = D / N   T text tokens
Times are float32 in [0, 1] (1 = noise), of shape (B,) for one time a clip or (B, F) for one a frame.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


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
    gate: float = 0.25            # g in e = (1 - g) E(t) + g E'(r)
    output_skip: float = 0.0      # > 0: add the exact average velocity of Gaussian data of this standard deviation to
                                  # the output, which helps small networks that start from scratch


PRESETS = {
    "tiny": ModelConfig(dim=32, heads=2, layers=2, ffn_dim=64, channels=48, patch=1, text_dim=64, freq_dim=32,
                        time_scale=50.0, output_skip=1.0),
    "toy": ModelConfig(dim=96, heads=4, layers=4, ffn_dim=384, channels=48, patch=1, text_dim=64, freq_dim=64,
                       time_scale=50.0, output_skip=1.0),
    "wan-1.3b": ModelConfig(),
    "wan-14b": ModelConfig(dim=5120, heads=40, layers=40, ffn_dim=13824),
}


def time_features(t: torch.Tensor, width: int, scale: float) -> torch.Tensor:
    """Sinusoidal features of times t (...,) -> (..., width): the cosines first, then the sines, in fp32."""
    frequencies = 10000.0 ** (-torch.arange(width // 2, device=t.device, dtype=torch.float32) / (width // 2))
    angles = scale * t.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary_angles(frames: torch.Tensor, height: int, width: int, head_dim: int) -> torch.Tensor:
    """Unit complex rotations (F, h * w, K / 2) of a token grid, for the 3-D rotary embedding.

    frames: positions (F,) of the latent frames, any numbers, so that a chunk may sit anywhere in a long video.
    The head's channels split into time, height and width as (K - 4 (K // 6), 2 (K // 6), 2 (K // 6)), theta 10000.
    """
    axis_dim = 2 * (head_dim // 6)
    axes = []
    for positions, dim in ((frames, head_dim - 2 * axis_dim),
                           (torch.arange(height, device=frames.device), axis_dim),
                           (torch.arange(width, device=frames.device), axis_dim)):
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


def layer_norm(x: torch.Tensor, weight=None, bias=None) -> torch.Tensor:
    """LayerNorm in fp32; the result stays in fp32 for the modulation that follows."""
    weight, bias = (None if p is None else p.float() for p in (weight, bias))
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, 1e-6)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)    # over all heads' channels at once

    def forward(self, x, context, rope=None):
        """x (B, L, D) asks, context (B, L', D) answers; rope (L, K / 2) turns both (self-attention only)."""
        q = self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)           # (B, N, L,  K)
        k = self.norm_k(self.k(context)).unflatten(-1, (self.heads, -1)).transpose(1, 2)     # (B, N, L', K)
        v = self.v(context).unflatten(-1, (self.heads, -1)).transpose(1, 2)                  # (B, N, L', K)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        x = F.scaled_dot_product_attention(q, k, v)                                          # (B, N, L,  K)
        return self.out(x.transpose(1, 2).flatten(2))                                        # (B, L, D)


class MLP(nn.Module):
    """Linear, activation, Linear: the time embedders, the text embedder and the feed-forward network."""

    def __init__(self, dim_in: int, dim_hidden: int, dim_out: int, activation):
        super().__init__()
        self.up, self.down, self.activation = nn.Linear(dim_in, dim_hidden), nn.Linear(dim_hidden, dim_out), activation

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


def gelu(x):
    return F.gelu(x, approximate="tanh")


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.self_attn, self.cross_attn = Attention(c.dim, c.heads), Attention(c.dim, c.heads)
        self.norm_cross = nn.LayerNorm(c.dim, eps=1e-6)          # the only norm of the block with weights of its own
        self.ffn = MLP(c.dim, c.ffn_dim, c.dim, gelu)
        self.modulation = nn.Parameter(torch.randn(1, 6, c.dim) / c.dim**0.5)

    def forward(self, x, modulation, text, rope):
        """x (B, F, S, D), modulation (B, F or 1, 6, D) in fp32, text (B, T, D), rope (L, K / 2)."""
        # Modulation depends on the frame only and broadcasts over its tokens: never expanded to (B, L, 6, D).
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + modulation).unsqueeze(3).unbind(2)
        size = x.shape[1:3]
        h = (layer_norm(x) * (1 + scale1) + shift1).type_as(x).flatten(1, 2)                 # (B, L, D)
        x = (x.float() + gate1 * self.self_attn(h, h, rope).unflatten(1, size)).type_as(x)   # (B, F, S, D)
        h = layer_norm(x, self.norm_cross.weight, self.norm_cross.bias).type_as(x).flatten(1, 2)
        x = x + self.cross_attn(h, text).unflatten(1, size)
        h = (layer_norm(x) * (1 + scale2) + shift2).type_as(x)                               # (B, F, S, D)
        return (x.float() + gate2 * self.ffn(h)).type_as(x)


class PatchEmbed(nn.Module):
    """Conv3d with kernel = stride = (1, P, P), written as one Linear over flattened patches."""

    def __init__(self, channels: int, patch: int, dim: int):
        super().__init__()
        self.patch = patch
        self.weight = nn.Parameter(torch.empty(dim, channels, 1, patch, patch))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, z):
        P = self.patch
        z = z.unflatten(4, (-1, P)).unflatten(3, (-1, P)).permute(0, 1, 3, 5, 2, 4, 6)       # (B, F, h, w, C, P, P)
        z = z.flatten(4).flatten(2, 3).to(self.weight.dtype)                                 # (B, F, S, C * P * P)
        return F.linear(z, self.weight.flatten(1), self.bias)


class FlowMapDiT(nn.Module):
    """u(z, t, r, text). Weights may be bf16 (under FSDP's mixed precision, say); times, norms, modulation, the
    residual sums and the returned velocity are fp32."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        if c.dim % c.heads or c.dim // c.heads % 2 or c.dim // c.heads < 6:
            raise ValueError(f"width {c.dim} over {c.heads} heads: the head width must be a whole, even number >= 6")
        self.patch_embed = PatchEmbed(c.channels, c.patch, c.dim)
        self.time_embed = MLP(c.freq_dim, c.dim, c.dim, F.silu)                     # E
        if c.second_time:
            self.r_embed = MLP(c.freq_dim, c.dim, c.dim, F.silu)                    # E', starts as a copy of E
        self.time_proj = nn.Linear(c.dim, 6 * c.dim)
        self.text_embed = MLP(c.text_dim, c.dim, c.dim, gelu)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.head_modulation = nn.Parameter(torch.randn(1, 2, c.dim) / c.dim**0.5)
        self.head = nn.Linear(c.dim, c.patch * c.patch * c.channels)

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
        return self

    def forward(self, z: torch.Tensor, t: torch.Tensor, r: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """z (B, F, C, H, W), times t >= r of shape (B,) or (B, F), text (B, T, text_dim) -> u (B, F, C, H, W), fp32.

        Raises ValueError for latents that the patch size does not divide, or of another channel count.
        """
        c = self.config
        B, F_, C, H, W = z.shape
        if C != c.channels or H % c.patch or W % c.patch:
            raise ValueError(f"latents of {C} channels, {H} x {W}: expected {c.channels} channels and sides that "
                             f"are multiples of {c.patch}")
        t, r = (time.float().view(B, -1) for time in (t, r))                        # (B, F) or (B, 1)
        r = r if c.second_time else t
        dtype = self.time_proj.weight.dtype
        e = self.time_embed(time_features(t, c.freq_dim, c.time_scale).to(dtype))   # (B, F or 1, D)
        if c.second_time:
            e = (1 - c.gate) * e + c.gate * self.r_embed(time_features(r, c.freq_dim, c.time_scale).to(dtype))
        modulation = self.time_proj(F.silu(e)).unflatten(-1, (6, -1)).float()       # (B, F or 1, 6, D)

        rope = rotary_angles(torch.arange(F_, device=z.device), H // c.patch, W // c.patch, c.dim // c.heads)
        rope = rope.flatten(0, 1)                                                   # (L, K / 2)
        text = self.text_embed(text.to(dtype))                                      # (B, T, D)
        x = self.patch_embed(z)                                                     # (B, F, S, D)
        for block in self.blocks:
            x = block(x, modulation, text, rope)

        shift, scale = (self.head_modulation.float() + e.float().unsqueeze(2)).unsqueeze(3).unbind(2)
        x = self.head((layer_norm(x) * (1 + scale) + shift).type_as(x)).float()     # (B, F, S, P * P * C)
        x = x.view(B, F_, H // c.patch, W // c.patch, c.patch, c.patch, C)
        u = x.permute(0, 1, 6, 2, 4, 3, 5).reshape(B, F_, C, H, W)
        if c.output_skip:
            u = u + gaussian_average_velocity(z.float(), *(time[..., None, None, None] for time in (t, r)), c.output_skip)
        return u


def gaussian_average_velocity(z: torch.Tensor, t: torch.Tensor, r: torch.Tensor, std: float) -> torch.Tensor:
    """The exact u(z, t, r) when the data are N(0, std^2): there z_r = z_t s(r) / s(t) with s(t)^2 = t^2 + std^2 (1 - t)^2,
    and (z_t - z_r) / (t - r) in a form that needs no division by t - r."""
    s_t, s_r = ((time**2 + std**2 * (1 - time) ** 2).sqrt() for time in (t, r))
    return ((t + r) * (1 + std**2) - 2 * std**2) / (s_t * (s_t + s_r)) * z


def as_flow_map(teacher_state: dict) -> dict:
    """A plain teacher's state dict with the second time embedder added, copied from the first: at r = t the network
    is the teacher exactly, whatever the gate."""
    return teacher_state | {name.replace("time_embed", "r_embed"): value.clone()
                            for name, value in teacher_state.items() if name.startswith("time_embed.")}
