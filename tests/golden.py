"""What Diffusers' AnyFlow networks compute for fixed weights and inputs, for the parity tests.

    python tests/golden.py        writes tests/golden.safetensors, for where Diffusers is missing

Weights and inputs are functions of seeds, so the file holds outputs only.
"""
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from cache import append_chunk  # noqa: E402
from distributed import generator  # noqa: E402
from flowmap import time_grid  # noqa: E402
from model import FlowMapDiT, ModelConfig  # noqa: E402
from wan import their_name  # noqa: E402

SMALL = ModelConfig(dim=48, heads=4, layers=2, ffn_dim=80, channels=6, patch=2, text_dim=20,
                    freq_dim=32)
FILE = Path(__file__).with_name("golden.safetensors")
# (chunks, full_chunk_limit) of the causal cases; theirs fails at a limit of 1.
CASES = [((1, 3, 3, 3, 3, 3, 3, 2), 3), ((2,) * 6, 2), ((1,) * 5, 3), ((1, 2), 3), ((2, 1, 2), 2)]

CAUSAL = replace(SMALL, compressed=True)
# Their cached inference step pads queries and keys to a multiple of 128 tokens without a mask, so
# that zero keys take part in the softmax. Hence 16 x 8 patches a frame here, which need no padding.
ROLLOUT, ROLLOUT_SIDES = replace(CAUSAL, channels=2), (16, 8)


def rollout(net, jump, context, z, chunks, full_chunks):
    """A clip, chunk by chunk. jump(z, context): a chunk's z_0; it is cached without gradient."""
    made = []
    for noise in z.split(list(chunks), 1):
        made.append(jump(noise, context))
        with torch.no_grad():
            context = append_chunk(net, context, made[-1].detach(), full_chunks)
    return torch.cat(made, 1)


def network(config=SMALL, seed=0):
    """Random weights everywhere, so that no term is hidden by a zero."""
    net, g = FlowMapDiT(config), generator("model", seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.1 if p.ndim > 1 else 0.3))
    return net.requires_grad_(False)


def inputs(config=SMALL, batch=2, frames=3, seed=0, sides=(4, 2)):
    """z, t, r, text; sides in patches."""
    g = generator("inputs", seed)
    z = torch.randn(batch, frames, config.channels, *(n * config.patch for n in sides), generator=g)
    t = torch.rand(batch, generator=g)
    r = t * torch.rand(batch, generator=g)
    return z, t, r, torch.randn(batch, 5, config.text_dim, generator=g)


def theirs(config, **extra):
    """Diffusers' network with the weights of `network(config)`."""
    import diffusers
    kind = diffusers.WanTransformer3DModel
    if config.second_time:
        kind = diffusers.AnyFlowTransformer3DModel
    if config.compressed:
        kind = diffusers.AnyFlowFARTransformer3DModel
    if config.image_dim:
        extra |= {"image_dim": config.image_dim, "added_kv_proj_dim": config.dim}
    net = kind(patch_size=(1, config.patch, config.patch), num_attention_heads=config.heads,
               attention_head_dim=config.dim // config.heads,
               in_channels=config.channels + config.image_channels, out_channels=config.channels,
               text_dim=config.text_dim, freq_dim=config.freq_dim, ffn_dim=config.ffn_dim,
               num_layers=config.layers, cross_attn_norm=True, **extra)
    weights = network(config).state_dict()
    net.load_state_dict({their_name(name, "diffusers"): p for name, p in weights.items()})
    return net.eval()


def per_frame(time, frames: int):
    return 1000 * time[:, None].expand(-1, frames)


@torch.no_grad()
def bidirectional(second_time: bool) -> torch.Tensor:
    """AnyFlow's u(z, t, r, text), or plain Wan's velocity at t."""
    config = replace(SMALL, second_time=second_time)
    z, t, r, text = inputs(config)
    if second_time:
        return theirs(config)(z, per_frame(t, 3), per_frame(r, 3), text).sample
    return theirs(config)(z.transpose(1, 2), 1000 * t, text).sample.transpose(1, 2)


@torch.no_grad()
def causal_training(chunks, limit: int) -> torch.Tensor:
    """The training forward: u of the last `limit` chunks, noisy, given clean ones before."""
    net, frames = theirs(CAUSAL, full_chunk_limit=limit, chunk_partition=chunks), sum(chunks)
    z, t, r, text = inputs(CAUSAL, frames=frames)
    clean = inputs(CAUSAL, frames=frames, seed=1)[0]
    first = sum(chunks[:-limit])
    # Frames before `first` are compressed context: clean, at time 0.
    mixed = torch.cat([clean[:, :first], z[:, first:]], 1)
    times = [torch.cat([torch.zeros(2, first), per_frame(time, frames - first)], 1)
             for time in (t, r)]
    return net(mixed, *times, text, list(chunks), clean_hidden_states=clean[:, first:],
               clean_timestep=torch.zeros(2, frames - first)).sample


@torch.no_grad()
def causal_rollout(chunks, limit: int, steps: int = 2) -> torch.Tensor:
    """Latents of a whole clip: their cached inference step for every jump, then the cache step."""
    net, frames = theirs(ROLLOUT, full_chunk_limit=limit, chunk_partition=chunks), sum(chunks)
    c = ROLLOUT
    z, _, _, text = inputs(c, 1, frames, sides=ROLLOUT_SIDES)
    clip, grid = z.clone(), time_grid(steps, 5.0)
    kinds = {"full_cache": 128, "compressed_cache": 32}          # tokens of a frame
    cache = [{name: torch.zeros(2, 1, c.heads, frames * tokens, c.dim // c.heads)
              for name, tokens in kinds.items()} for _ in range(c.layers)]
    for i, length in enumerate(chunks):
        stop = sum(chunks[: i + 1])
        partition, now = list(chunks[: i + 1]), z[:, stop - length: stop]
        for t, r in zip(grid, grid[1:]):
            flag = {"num_cached_chunks": i, "is_cache_step": False}
            times = (torch.full((1, length), 1000 * time) for time in (t, r))
            u = net(now, *times, text, partition, kv_cache=cache, kv_cache_flag=flag).sample
            now = now - (t - r) * u
        clip[:, stop - length: stop] = now
        flag = {"num_cached_chunks": i, "is_cache_step": True}
        zero = torch.zeros(1, stop)
        net(clip[:, :stop], zero, zero, text, partition, kv_cache=cache, kv_cache_flag=flag)
    return clip


def cases():
    """Every case by name, as a function without arguments."""
    out = {f"bidirectional-{second}": partial(bidirectional, second) for second in (True, False)}
    for chunks, limit in CASES:
        name = f"{','.join(map(str, chunks))}-{limit}"
        out[f"training-{name}"] = partial(causal_training, chunks, limit)
        out[f"rollout-{name}"] = partial(causal_rollout, chunks, limit)
    return out


if __name__ == "__main__":
    from safetensors.torch import save_file
    save_file({name: case().contiguous() for name, case in cases().items()}, FILE)
    print(f"{FILE}: {FILE.stat().st_size} bytes")
