"""Seconds on this machine, with random weights: what an update costs beside plainer ones, other
people's networks beside this one, and all that a GPU owner wants to know.

What is compared is measured in one run, in turn, and given as medians.
"""
import gc
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import distributed
import flops
import flowmap
import plan
import train
import updates
from cache import Context, append_chunk
from config import SIMULATIONS, Config, chunks_of, recipe
from distributed import generator
from model import FlowMapDiT, ModelConfig
from wan import diffusers_config, their_name


def synchronise(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def medians(calls: dict, repeats: int, device) -> dict:
    """Seconds of each call, {name: median}, in turn, after a first round that does not count."""
    seconds = {name: [] for name in calls}
    for _ in range(1 + repeats):
        for name, call in calls.items():
            synchronise(device)
            started = time.perf_counter()
            call()
            synchronise(device)
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def random_network(config: ModelConfig, device="cpu", dtype=torch.float32) -> FlowMapDiT:
    with torch.device("meta"):
        network = FlowMapDiT(config).to(dtype)
    network.to_empty(device=device)
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(std=0.02)
    return network


# --- costs

class RandomClips:
    """Latents and prompts, as a set of latents gives them."""
    conditioning = ()

    def __init__(self, config: ModelConfig, shape):
        self.latent_shape, self.null_text = shape, torch.zeros(16, config.text_dim)

    def draw(self, indices, seed):
        g = generator("clips", seed)
        x = torch.randn(len(indices), *self.latent_shape, generator=g)
        return x, torch.randn(len(indices), *self.null_text.shape, generator=g), {}


def update_of(c: Config, config: ModelConfig, shape, world, built=None):
    """A function that makes one update of a batch of the settings' size, the same each time. built:
    networks and what is trained of them, of the same stage and form."""
    case = plan.Case(c, config, shape, gpus=1)
    case.c = replace(case.c, batch_size=c.batch_size, micro_batch=c.batch_size)
    nets, parts = built or plan.build(case, world)
    batch = updates.draw_batch(case.c, RandomClips(config, shape), world, 1, 0)
    if batch.rollout:                                # a step in the middle, of three jumps
        batch.rollout.k = (len(batch.rollout.grid) - 1) // 2
    log = distributed.Sums(train.LOGGED[c.stage])
    return lambda: train.update(case.c, nets, parts, iter([batch]), 1, world, log)


# The paper's calls in every recipe: the toy's has no guidance, and makes fewer.
PAPERS = {"guidance": 3.0, "real_guidance": 4.0}


def costs(config: ModelConfig, shape, preset: str, repeats: int, world):
    """Yields (what, ratio of seconds): of flowmap, with the paper's loss, to flow matching in the
    same contexts, of both forms, without and with checkpointing; of distill to itself with a
    flow-map rollout of 2 steps, by rollout and steps."""
    def settings(stage, causal, **more):
        fixed = {"stage": stage, "causal": causal, "batch_size": 16, **PAPERS}
        return Config(**recipe(preset, stage, causal) | fixed | more)
    plain = {"guidance": 1.0, "flow_fraction": 1.0, "consistency_fraction": 0.0}
    for causal in (False, True):
        form = "causal" if causal else "bidirectional"
        for on in (0, 1):
            whole = settings("flowmap", causal, checkpointing=on)
            calls = {"flowmap": whole, "plain": replace(whole, **plain)}
            times = medians({name: update_of(c, config, shape, world)
                             for name, c in calls.items()}, repeats, world.device)
            name = f"flowmap / flow matching, {form}, checkpointing {'yes' if on else 'no'}"
            yield name, times["flowmap"] / times["plain"]
        built = plan.build(plan.Case(settings("distill", causal), config, shape, gpus=1), world)
        cases = [(rollout, n) for rollout in SIMULATIONS for n in (2, 4, 8, 16, 50)]
        calls = {case: update_of(settings("distill", causal, rollout=case[0], budgets=str(case[1])),
                                 config, shape, world, built) for case in cases}
        times = medians(calls, repeats, world.device)
        for rollout, n in cases[1:]:
            yield (f"distill, {form}, {rollout} rollout of {n} steps / flow-map rollout of 2",
                   times[rollout, n] / times[cases[0]])


# --- peers

def theirs(network: FlowMapDiT, chunks=(1,)):
    """Diffusers' network with the same weights; causal where there are several chunks."""
    import diffusers
    record = {"chunks": list(chunks), "config": {"full_chunks": 3}}
    config = diffusers_config("random weights", network.config, record)
    other = getattr(diffusers, config["_class_name"]).from_config(config)
    weights = network.state_dict()
    other.load_state_dict({their_name(name, "diffusers"): p for name, p in weights.items()})
    return other.eval()


def calls_of_both(config: ModelConfig, batch: int, shape, tokens: int, backward: bool) -> dict:
    """{ours, theirs}: functions that make one call, with a backward pass or without gradient."""
    ours = random_network(config)
    other, g = theirs(ours), generator("peers")
    z = torch.randn(batch, shape[0], config.channels, *shape[1:], generator=g)
    t = torch.rand(batch, generator=g)
    text = torch.randn(batch, tokens, config.text_dim, generator=g)
    times = (1000 * t)[:, None].expand(-1, shape[0])

    def call(forward):
        with torch.set_grad_enabled(backward):
            u = forward()
            if backward:
                u.square().mean().backward()
    return {"ours": lambda: call(lambda: ours(z, t, t / 2, text)),
            "theirs": lambda: call(lambda: other(z, times, times / 2, text).sample)}


def peak_of(call) -> int:
    """Bytes of resident memory that a call takes at its peak, above what was there. Linux."""
    Path("/proc/self/clear_refs").write_text("5")                # the peak starts anew
    before = plan.resident("VmRSS")
    call()
    return plan.resident("VmHWM") - before


@torch.no_grad()
def our_rollout(network, z, text, grid, full_chunks: int, window: int = 0, chunks=()) -> list:
    """Seconds of each chunk, of one frame unless said, of a clip made from noise z (1, F, C, H, W):
    its jumps, and writing it into the cache."""
    context, seconds = Context(network.encode_prompt(text)), []
    for noise in z.split(list(chunks) or 1, 1):
        started = time.perf_counter()
        made = flowmap.euler_sample(flowmap.conditioned(network, context), noise, grid)
        context = append_chunk(network, context, made, full_chunks, window)
        synchronise(z.device)
        seconds.append(time.perf_counter() - started)
    return seconds


@torch.no_grad()
def their_rollout(network, c: ModelConfig, z, text, grid) -> None:
    """The same by their inference and cache steps."""
    F, sides = z.shape[1], (z.shape[3] // c.patch) * (z.shape[4] // c.patch)
    kinds = {"full_cache": sides, "compressed_cache": sides // 4}       # tokens of a frame
    cache = [{name: torch.zeros(2, 1, c.heads, F * tokens, c.dim // c.heads)
              for name, tokens in kinds.items()} for _ in range(c.layers)]
    clip = z.clone()
    for i in range(F):
        now, partition = z[:, i:i + 1], [1] * (i + 1)
        for t, r in zip(grid, grid[1:]):
            flag = {"num_cached_chunks": i, "is_cache_step": False}
            times = (torch.full((1, 1), 1000 * time) for time in (t, r))
            u = network(now, *times, text, partition, kv_cache=cache, kv_cache_flag=flag).sample
            now = now - (t - r) * u
        clip[:, i:i + 1] = now
        flag, zero = {"num_cached_chunks": i, "is_cache_step": True}, torch.zeros(1, i + 1)
        network(clip[:, :i + 1], zero, zero, text, partition, kv_cache=cache, kv_cache_flag=flag)


# The causal network that is compared: 128 tokens a frame, which neither implementation pads.
CAUSAL = ModelConfig(dim=96, heads=4, layers=4, ffn_dim=384, channels=16, text_dim=64, freq_dim=64,
                     compressed=True)


def peers(wide: ModelConfig, sides, chunks, repeats: int):
    """Yields (what, theirs / ours in seconds; ours / theirs in memory). wide: the network whose
    forward pass is timed and weighed, on one clip of 21 frames and these sides."""
    device = torch.device("cpu")
    toy = replace(CAUSAL, compressed=False)
    for name, backward in (("forward", False), ("forward and backward", True)):
        times = medians(calls_of_both(toy, 16, (4, 8, 8), 16, backward), 5 * repeats, device)
        yield f"{name}, width 96", times["theirs"] / times["ours"]
    pair = calls_of_both(wide, 1, (21, *sides), 512, False)
    tokens = 21 * sides[0] * sides[1] // wide.patch**2
    peaks = {name: peak_of(call) for name, call in pair.items()}
    yield (f"memory of a forward pass, {tokens} tokens (ours / theirs)",
           peaks["ours"] / peaks["theirs"])
    times = medians(pair, 1, device)
    yield f"forward, width {wide.dim}, {tokens} tokens", times["theirs"] / times["ours"]
    network, grid = random_network(CAUSAL), flowmap.time_grid(4, 5.0)
    text = torch.randn(1, 16, CAUSAL.text_dim, generator=generator("text"))
    for count in chunks:
        z = torch.randn(1, count, CAUSAL.channels, 32, 16, generator=generator("z"))
        other = theirs(network, (1,) * count)
        times = medians({"ours": lambda z=z: our_rollout(network, z, text, grid, 3),
                         "theirs": lambda z=z, o=other: their_rollout(o, CAUSAL, z, text, grid)},
                        repeats, device)
        yield f"causal rollout of {count} chunks", times["theirs"] / times["ours"]


def late_chunks(repeats: int, device):
    """Yields (what, seconds of four chunks about the 62nd of a stream over those about the 8th)."""
    network, grid = random_network(CAUSAL, device), flowmap.time_grid(4, 5.0)
    text = torch.randn(1, 16, CAUSAL.text_dim, generator=generator("text")).to(device)
    z = torch.randn(1, 64, CAUSAL.channels, 32, 16, generator=generator("z")).to(device)
    for window in (7, 0):
        runs = [our_rollout(network, z, text, grid, 3, window) for _ in range(repeats)]
        early, late = (min(sum(run[n - 2:n + 2]) for run in runs) for n in (8, 62))
        yield f"64th chunk of a stream / 8th, window {window or 'of all'}", late / early


# --- gpu

def ceiling(device, side: int) -> float:
    """FLOP a second of the best product of matrices, in bf16 on a GPU."""
    a = torch.randn(side, side, device=device, dtype=dtype_of(device))
    return 2 * side**3 / medians({"product": lambda: a @ a}, 20, device)["product"]


def dtype_of(device):
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def network_calls(config: ModelConfig, shape, device, compiled: bool) -> dict:
    """Seconds of {forward, forward and backward} of one clip."""
    emptied(device)
    network = random_network(config, device, dtype_of(device))
    for block in network.blocks:
        block.checkpointing = True
        if compiled:
            block.compile(dynamic=False)
    z = torch.randn(1, *shape, device=device)
    t, text = torch.rand(1, device=device), torch.randn(1, 512, config.text_dim, device=device)
    inputs = z, t, t / 2, text

    def call(backward: bool):
        with torch.set_grad_enabled(backward):
            u = network(*inputs)
            if backward:
                u.square().mean().backward()
                network.zero_grad(set_to_none=True)
    return medians({"forward": lambda: call(False), "forward and backward": lambda: call(True)}, 3,
                   device)


def layers_that_fit(config: ModelConfig, shape, memory: float) -> ModelConfig:
    """The network with as many layers as leave two fifths of `memory` (bytes) beside bf16 weights,
    gradients, and the inputs that checkpointed blocks keep."""
    with torch.device("meta"):
        block = sum(p.numel() for p in FlowMapDiT(replace(config, layers=1)).blocks.parameters())
    tokens = shape[0] * shape[2] * shape[3] // config.patch**2
    layer = 4 * block + 2 * tokens * config.dim
    return replace(config, layers=max(1, min(config.layers, int(0.6 * memory / layer))))


def emptied(device) -> None:
    """Compiled and sharded networks are cycles of references: only the collector frees them."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def streaming(config: ModelConfig, shape, chunks, device, compiled: bool) -> dict:
    """Seconds to the first chunk of a 4-step stream, and frames a second after it; decoded too,
    by Wan2.1's autoencoder with random weights, where Diffusers is installed."""
    emptied(device)
    network = random_network(replace(config, compressed=True), device, dtype_of(device))
    network.requires_grad_(False)
    for block in network.blocks if compiled else ():
        block.compile(dynamic=False)
    z, grid = torch.randn(1, *shape, device=device), flowmap.time_grid(4, 5.0)
    text = torch.randn(1, 512, config.text_dim, device=device)
    for _ in range(2):                                           # the first one warms up
        seconds = our_rollout(network, z, text, grid, 3, chunks=chunks)
    pixel_frames = 4 * sum(chunks[1:])
    found = {"first": seconds[0], "frames a second": pixel_frames / sum(seconds[1:])}
    try:
        from diffusers import AutoencoderKLWan
    except ImportError:
        return found
    if config.channels != 16:                                    # Wan2.2's has other widths
        return found
    decoder = AutoencoderKLWan(z_dim=config.channels).to(device).eval()      # fp32: as WanCodec
    latents = z.transpose(1, 2)

    def decoded(frames: int):                                    # the first one makes one picture
        return lambda: decoder.decode(latents[:, :, :frames])
    with torch.no_grad():
        found_s = medians({"1": decoded(1), "3": decoded(3)}, 1, device)
    both = sum(seconds[1:]) + (found_s["3"] - found_s["1"]) / 2 * sum(chunks[1:])
    return found | {"frames a second, decoded": pixel_frames / both}


def gpu(cases: list, others: list, world, compiled) -> list[dict]:
    """What this machine's device does: rows {what, seconds, tflop, utilisation, ...}. cases: the
    updates (plan.Case) that are timed; others: (name, ModelConfig, latents) of networks that are;
    compiled: whether blocks are, round for round."""
    device, cuda = world.device, world.device.type == "cuda"
    best = ceiling(device, 8192 if cuda else 256)
    rows = [{"what": "product of matrices", "tflop a second": best / 1e12}]

    def row(what, seconds, flop, **more):
        rows.append({"what": what, "seconds": seconds, "tflop": flop / 1e12,
                     "utilisation": flop / seconds / best} | more)
        print(f"{what}: {seconds:.3f} s", file=sys.stderr, flush=True)   # should a later one fail
    for on in compiled:
        kind = ", compiled" if on else ""
        for name, config, shape in others:
            if cuda:
                memory = torch.cuda.get_device_properties(0).total_memory
                config = layers_that_fit(config, shape, memory)
            forward, backward = flops.of_a_call(config, shape)
            times = network_calls(config, shape, device, on)
            what = f"{name}, {config.layers} layers{kind}"
            row(f"forward, {what}", times["forward"], forward)
            row(f"forward and backward, {what}", times["forward and backward"], forward + backward)
        for case in cases:
            case = replace(case, c=replace(case.c, compile=on))
            seconds, more = seconds_of(case, world), {}
            if cuda:
                more["peak"] = torch.cuda.max_memory_allocated()
            form = "causal" if case.c.causal else "bidirectional"
            row(f"update, {case.c.stage}, {form}{kind}", seconds, flops.of_an_update(case), **more)
        last = cases[-1]
        chunks = chunks_of(replace(last.c, causal=True), last.shape[0])
        found = streaming(last.config, last.shape, chunks, device, on)
        rows.append({"what": f"stream, 4 steps{kind}"} | found)
    return rows


def seconds_of(case: plan.Case, world) -> float:
    """Of an update of the kind that is planned."""
    emptied(world.device)
    nets, parts = plan.build(case, world)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return medians({"update": lambda: plan.update(case, nets, parts, world)}, 2,
                   world.device)["update"]
