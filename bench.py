"""Speed and memory:

    python bench.py write    cost of appending a finished chunk to the cache of a long video
    python bench.py plan --preset wan-14b --gpus 8
                             memory a GPU and traffic an update, simulated: nothing is allocated
    python bench.py check    the simulation against the measured memory of small networks

`write`: attention of a compressed chunk to all compressed chunks before it grows with the video;
--window bounds it. `plan`: train.update on networks of networks.build, with a batch of the largest
kind (longest clip, deepest rollout), on fake tensors under a process group that pretends, followed
by torch's own memory tracker. Activation memory is that of the CPU's attention kernel, which keeps
what the GPU's keeps: queries, keys, values, output, and a number a query.
"""
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm, trange

import cli
import distributed
import flowmap
import networks
import train
import updates
from cache import Context, append_chunk
from config import STAGES, Config, chunks_of, recipe
from model import PRESETS, FlowMapDiT, ModelConfig, rotary_table

# Height and width of the latents.
SIZES = {"toy": (4, 4), "tiny": (4, 4), "wan-1.3b": (60, 104), "wan-5b": (30, 52),
         "wan-14b": (60, 104)}
GB = 1e9


def synchronise(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def write_cost(config: ModelConfig, size, frames: int, full_chunks: int, window: int, chunks: int,
               device) -> list[tuple]:
    """(seconds, floating-point operations outside attention) of appending each of `chunks` chunks
    of `frames` latent frames, in order."""
    net = FlowMapDiT(config).to(device).requires_grad_(False)
    g = distributed.generator("bench")
    z = torch.randn(1, frames, config.channels, *size, generator=g).to(device)
    text = torch.randn(1, 16, config.text_dim, generator=g).to(device)
    context, costs = Context(net.encode_prompt(text)), []
    for _ in trange(chunks, desc="write", unit="chunk"):
        with FlopCounterMode(display=False) as flops:
            append_chunk(net, context, z, full_chunks, window)
        counts = flops.get_flop_counts()["Global"].items()
        dense = sum(count for op, count in counts if "attention" not in str(op))
        synchronise(z.device)                        # what was queued before is not timed
        started = time.perf_counter()
        context = append_chunk(net, context, z, full_chunks, window)
        synchronise(z.device)
        costs.append((time.perf_counter() - started, dense))
    return costs


@dataclass
class Case:
    """What is planned: a stage on some processes, with one clip a process and micro-batch."""
    c: Config                    # its batch_size is made to fit
    config: ModelConfig          # of the weights that the stage starts from
    shape: tuple                 # latents (F, C, H, W)
    gpus: int = 8
    micro_steps: int = 1         # 2 stand for any number: more repeat the second
    tokens: int = 512            # of the prompt

    def __post_init__(self):
        self.c = replace(self.c, micro_batch=1, batch_size=self.gpus * self.micro_steps,
                         lora_alpha=self.c.lora_alpha or float(self.c.lora_rank))


def constant_batch(case: Case) -> updates.Batch:
    """A batch of the largest kind: the longest clip, a row with r < t, a rollout of three jumps.
    One clip a process: control flow that looks at times then looks at single numbers, which fake
    tensors carry along."""
    c, chunks = case.c, chunks_of(case.c, case.shape[0])
    start = sum(chunks[:-(c.full_chunks or len(chunks))])
    x, text = torch.randn(1, *case.shape), torch.randn(1, case.tokens, case.config.text_dim)
    n = torch.randn(1, *case.shape)
    t, r, kept = torch.tensor([0.75]), torch.tensor([0.25]), torch.zeros(1, dtype=torch.bool)
    batch = updates.Batch(x, n[:, start:], text, text, kept, {}, chunks, start, t, r, (0, 0, 1),
                          some_gap=True)
    if c.stage == "flowmap" and c.bidirectional_fraction:
        batch.whole_t, batch.whole_noise = t, n
    if c.stage == "distill":
        renoise = [n[:, :frames] for frames in chunks for _ in range(3)]
        batch.rollout = updates.Rollout(flowmap.time_grid(4, c.shift), 1, n, renoise)
        batch.fake_rollout = batch.rollout if c.fake_rollout == "fresh" else None
        batch.tau, batch.tau_noise, batch.fake_t, batch.fake_noise = t, n, t, n
    return batch


def update(case: Case, nets: dict, parts: dict, world) -> None:
    """An update as train.py makes it."""
    log = distributed.Sums(train.LOGGED[case.c.stage])
    batches = (constant_batch(case) for _ in range(case.micro_steps))
    train.update(case.c, nets, parts, batches, 0, world, log)


def build(case: Case, world, fake):
    """({name: network}, {name: Trainable}) of a stage, as train.py makes them, with random weights.
    fake(): the context in which they get their memory."""
    nets = networks.build(case.c, networks.student_config(case.c, case.config), world)
    with fake():
        for module in networks.modules_of(nets):
            module.to_empty(device="cpu")
            for p in module.parameters():
                local(p).data.normal_(std=0.02)
        return nets, networks.trainables(case.c, nets)


def local(tensor):
    """This process's shard of a tensor, or all of a plain one."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def states_of(parts: dict) -> list:
    """The optimisers' tensors."""
    states = [state for part in parts.values() for state in part.optimizer.state.values()]
    return [value for state in states for value in state.values()]


def kept(nets: dict, parts: dict) -> dict:
    """Bytes that a process keeps all the time; gradients, from backward pass to optimiser step."""
    def size(tensors):
        return sum(local(t).nbytes for t in tensors)
    weights = [p for module in networks.modules_of(nets) for p in module.parameters()]
    trained = [p for part in parts.values() for p in part.network.parameters()]
    return {"parameters": size(weights), "gradients": size(trained),
            "optimiser": size(states_of(parts)), "EMA": size(parts["student"].ema.values())}


class Ledger(MemTracker):
    """torch's memory tracker without its account by module, whose hooks keep graphs alive and fail
    on frozen parameters; and the bytes that this process receives in all-gathers and sends in
    reduce-scatters."""

    def __init__(self, size: int):
        super().__init__()
        self.share, self.gathered, self.reduced = (size - 1) / size, 0.0, 0.0

        def nothing(*args):
            pass
        self._mod_tracker = SimpleNamespace(
            register_user_hooks=nothing, clear_user_hooks=nothing, __enter__=nothing,
            __exit__=nothing, is_bw=False, parents=())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].constant is None:
            return 1.0                               # a gradient's norm: it is finite
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if out is not NotImplemented and "_allgather_base" in str(func):
            self.gathered += args[0].nbytes * self.share
        elif out is not NotImplemented and "_reduce_scatter_base" in str(func):
            self.reduced += args[1].nbytes * self.share
        return out


def plan(case: Case) -> dict:
    """Bytes a GPU of one update: parameters, gradients, optimiser, EMA, activations (with all other
    temporaries), peak, and those of its traffic. Starts, and ends, a process group that only
    pretends."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=case.gpus)
    world = distributed.World(0, case.gpus, torch.device("cpu"))
    rotary_table.cache_clear()                       # fake tables are for fake calls
    try:
        nets, parts = build(case, world, lambda: mode)
        out, ledger = kept(nets, parts), Ledger(case.gpus)
        with mode:
            weights = [p for module in networks.modules_of(nets) for p in module.parameters()]
            tensors = [*weights, *parts["student"].ema.values(), *states_of(parts)]
            ledger.track_external(*(local(tensor) for tensor in tensors))
            with ledger:
                update(case, nets, parts, world)
    finally:
        torch.distributed.destroy_process_group()
        rotary_table.cache_clear()
    peak = sum(found["Total"] for found in ledger.get_tracker_snapshot("peak").values())
    return out | {"activations": peak - sum(out.values()), "peak": peak,
                  "gathered": ledger.gathered, "reduced": ledger.reduced}


# Small enough to run here.
CHECKED = ModelConfig(dim=512, heads=8, layers=4, ffn_dim=2048, text_dim=256, freq_dim=64)


def checked_cases() -> list[Case]:
    """Two processes, full precision: every stage and kind."""
    kinds = (("pretrain", 0, False), ("flowmap", 32, True), ("distill", 0, True),
             ("distill", 32, False), ("distill", 32, True))
    cases = [Case(Config(stage=stage, lora_rank=rank, checkpointing=on), CHECKED, (8, 16, 24, 32),
                  gpus=2, tokens=64) for stage, rank, on in kinds]
    causal = replace(cases[-1].c, causal=True, chunks="1,3,2,2")
    return [*cases, replace(cases[-1], c=causal)]


def measure(case: Case) -> int:
    """Bytes of resident memory that one real update of a case takes at its peak on this process,
    from before its networks are made. For processes that torchrun started."""
    def resident(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if name in line)
    world = distributed.start("cpu")
    distributed.barrier(world)
    torch.randn(64, 64) @ torch.randn(64, 64)
    before = resident("VmRSS")
    nets, parts = build(case, world, nullcontext)
    update(case, nets, parts, world)
    return resident("VmHWM") - before


def name_of(case: Case) -> str:
    c = case.c
    kind = "causal" if c.causal else "bidirectional"
    trains = f"adapters, rank {c.lora_rank}" if c.lora_rank else "all weights"
    return f"{c.stage} | {kind} | {trains} | {'yes' if c.checkpointing else 'no'}"


def case_of(args, stage: str, checkpointing: bool, parser) -> Case:
    """What the plan's flags ask for."""
    config, wan = PRESETS[args.preset], args.preset.startswith("wan")
    shape = (4, config.channels, *SIZES[args.preset])
    if wan:
        if (args.frames - 1) % 4 or args.height % 16 or args.width % 16:
            parser.error(f"--frames {args.frames} must be 4 n + 1, --height {args.height} and "
                         f"--width {args.width} multiples of 16")
        frames = (args.frames - 1) // 4 + 1
        shape = (frames, config.channels, args.height // 8, args.width // 8)
    settings = recipe(args.preset, stage, args.causal) | {
        "stage": stage, "preset": args.preset, "causal": args.causal,
        "checkpointing": checkpointing, "base": ""}
    if args.lora_rank is not None:
        settings["lora_rank"] = args.lora_rank
    c = Config(**settings)
    try:
        chunks_of(c, shape[0])
    except ValueError:
        parser.error(f"--frames {args.frames}: the recipe's chunks, {c.chunks}, are for 81 frames")
    return Case(c, config, shape, args.gpus, args.micro_steps)


def plan_main(args, parser) -> None:
    stages = STAGES[args.causal:] if args.stage == "all" else [args.stage]     # one teacher
    kinds = (True, False) if args.checkpointing is None else [args.checkpointing]
    cases = [case_of(args, stage, on, parser) for stage, on in product(stages, kinds)]
    print(f"{args.preset}, latents {' x '.join(map(str, cases[0].shape))}, {args.gpus} GPUs, a "
          f"clip each, {args.micro_steps} micro-batches an update. GB a GPU and update; "
          "activations with all other temporaries.\n\n"
          "| stage | network | trains | checkpointing | parameters | gradients | optimiser | EMA | "
          f"activations | peak | gathered | reduced | fits {args.memory} GB |\n|{'---|' * 13}")
    for case in tqdm(cases, desc="plan (minutes a row at 14B)", unit="row"):
        found = plan(case)
        fits = "yes" if found["peak"] * 1.1 < args.memory * GB else "no"
        figures = " | ".join(f"{value / GB:.1f}" for value in found.values())
        tqdm.write(f"| {name_of(case)} | {figures} | {fits} |")
    print("\nfits: with a tenth more for what is not a tensor: CUDA's context, NCCL's buffers, "
          "fragmentation")


def check_main(args, parser) -> None:
    print("GB a process | stage | network | trains | checkpointing\n---|---|---|---|---")
    worst = 0.0
    for number, case in enumerate(checked_cases()):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
                       "BENCH_CASE": str(number)}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc_per_node=2", __file__, "check"]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(run.stderr)
        measured = int(run.stdout.split("measured")[1].split()[0])
        predicted = plan(case)["peak"]
        worst = max(worst, abs(measured / predicted - 1))
        print(f"predicted {predicted / GB:.3f}, measured {measured / GB:.3f}, ratio "
              f"{measured / predicted:.3f} | {name_of(case)}", flush=True)
    print(f"furthest off: {100 * worst:.1f} %")


def write_main(args, parser) -> None:
    world = distributed.start(args.device)
    config = replace(PRESETS[args.preset], compressed=args.full_chunks > 0)
    runs = [write_cost(config, SIZES[args.preset], args.chunk_frames, args.full_chunks, args.window,
                       64, world.device) for _ in range(args.repeats)]
    best = [min(costs) for costs in zip(*runs)]
    for number in (1, 2, 4, 8, 16, 32, 48, 64):
        seconds, dense = best[number - 1]
        print(f"chunk {number:2}: {1000 * seconds:8.2f} ms, {dense / 1e9:.4f} GFLOP outside "
              "attention")
    early, late = (sum(seconds for seconds, _ in best[n - 2:n + 2]) / 4 for n in (8, 62))
    print(f"the 64th against the 8th: {late / early:.2f} x in time (means of four), "
          f"{best[63][1] / best[7][1]:.2f} x in arithmetic outside attention")


def parse_args(argv=None):
    parser = cli.Parser("Measure speed, plan memory.",
                        "python bench.py plan --preset wan-14b --causal --gpus 8")
    add = parser.add_argument
    add("what", type=cli.choice(("write", "plan", "check")),
        help="write: cost of appending a chunk; plan: memory and traffic of training, simulated; "
        "check: the simulation against measurement")
    add("--preset", type=cli.choice(tuple(SIZES)), default="toy", metavar="NAME",
        help="size of the network (default toy)")
    add("--chunk-frames", type=int, default=3, help="write: latent frames of a chunk (default 3)")
    add("--full-chunks", type=int, default=3,
        help="write: full chunks, the newest included (default 3)")
    add("--window", type=int, default=0, help="write: past chunks that are kept (default 0: all)")
    add("--repeats", type=int, default=5,
        help="write: runs; the fastest of each chunk counts (default 5)")
    add("--device", type=cli.choice(("auto", "cpu", "cuda")), default="auto", metavar="NAME",
        help="write: auto, cpu or cuda (default auto)")
    add("--gpus", type=int, default=8, help="plan: processes (default 8)")
    add("--memory", type=int, default=80,
        help="plan: GB (10^9 bytes) of a GPU, to say what fits (default 80)")
    add("--stage", type=cli.choice(("all", *STAGES)), default="all", metavar="NAME",
        help="plan: one stage (default all)")
    add("--causal", action="store_true", help="plan: the chunk-by-chunk network (default off)")
    add("--lora-rank", type=int,
        help="plan: rank of the adapters, 0 for all weights (default: the recipe's)")
    add("--checkpointing", action=cli.argparse.BooleanOptionalAction,
        help="plan: only with or without (default both)")
    add("--micro-steps", type=int, default=2,
        help="plan: micro-batches an update; more than 2 take what 2 take (default 2)")
    add("--frames", type=int, default=81, help="plan: pixel frames (default 81)")
    add("--height", type=int, default=480, help="plan: pixels (default 480)")
    add("--width", type=int, default=832, help="plan: pixels (default 832)")
    args = parser.parse(argv)
    at_least_1 = ("chunk_frames", "repeats", "gpus", "memory", "micro_steps", "frames", "height",
                  "width")
    for name in at_least_1:
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.causal and args.stage == "pretrain":
        parser.error("--causal is for stages flowmap and distill; the teacher sees whole clips")
    if (args.lora_rank or 0) < 0 or args.window < 0 or args.full_chunks < 0:
        parser.error("--lora-rank, --window and --full-chunks: must be at least 0")
    return args, parser


def main(argv=None) -> None:
    args, parser = parse_args(argv)
    if args.what == "check" and "BENCH_CASE" in os.environ:      # a process that check_main started
        found = measure(checked_cases()[int(os.environ["BENCH_CASE"])])
        if os.environ["RANK"] == "0":
            print(f"measured {found}")
        distributed.stop()
    {"write": write_main, "plan": plan_main, "check": check_main}[args.what](args, parser)


if __name__ == "__main__":
    cli.run(main)
