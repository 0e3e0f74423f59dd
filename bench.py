"""Speed and memory:

    python bench.py write                            cost of remembering a finished chunk, from the 8th to the 64th of a long video
    python bench.py plan --preset wan-14b --gpus 8   memory a GPU and traffic an update, simulated: nothing is allocated
    python bench.py check                            the simulation against the measured memory of small networks, on this machine

`write`: the attention of a compressed chunk to all compressed chunks before it grows with the video; --window bounds it.
`plan`: one update of each stage as train.py makes it, of the largest kind (longest clip, deepest rollout), on fake tensors
under a process group that only pretends, followed by torch's own memory tracker. Activation memory is that of the CPU's
attention kernel, which keeps what the GPU's keeps: queries, keys, values, output, and a number a query.
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

import backward_sim
import checkpoint
import cli
import distributed
import dmd
import flowmap
import lora
import meanflow
from cache import Context, append_chunk, teacher_forced
from model import PRESETS, FlowMapDiT, ModelConfig
from train import RECIPES, STAGES

SIZES = {"toy": (4, 4), "tiny": (4, 4), "wan-1.3b": (60, 104), "wan-5b": (30, 52), "wan-14b": (60, 104)}     # of the latents
GB = 1e9


def write_cost(config: ModelConfig, size, frames: int, full_chunks: int, window: int, chunks: int, device) -> list[tuple]:
    """(seconds, floating-point operations outside attention) of `append_chunk` for each of `chunks` chunks of `frames` latent
    frames, in order."""
    net = FlowMapDiT(config).to(device).requires_grad_(False)
    g = distributed.generator("bench")
    z = torch.randn(1, frames, config.channels, *size, generator=g).to(device)
    context, costs = Context(net.encode_prompt(torch.randn(1, 16, config.text_dim, generator=g).to(device))), []
    for _ in trange(chunks, desc="write", unit="chunk"):
        with FlopCounterMode(display=False) as flops:
            append_chunk(net, context, z, full_chunks, window)
        dense = sum(n for op, n in flops.get_flop_counts()["Global"].items() if "attention" not in str(op))
        started = time.perf_counter()
        context = append_chunk(net, context, z, full_chunks, window)
        if z.is_cuda:
            torch.cuda.synchronize()
        costs.append((time.perf_counter() - started, dense))
    return costs


@dataclass
class Case:
    """What is planned: one stage of one network on some processes, with a clip a process and micro-batch."""
    stage: str
    config: ModelConfig
    shape: tuple                 # latents (F, C, H, W)
    chunks: tuple = ()           # latent frames of each chunk; none: bidirectional
    full_chunks: int = 3
    gpus: int = 8
    lora_rank: int = 256
    checkpointing: bool = True
    bf16: bool = True
    micro_steps: int = 1         # 2 stand for any number: more repeat the second
    tokens: int = 512            # of the prompt


def build(case: Case, world, fake):
    """The stage's networks, sharded, and what trains: ({name: network}, the modules below them, [Trainable])."""
    names = ["student"] + ["teacher", "fake"] * (case.stage == "distill")
    config = replace(case.config, second_time=case.stage != "pretrain", compressed=bool(case.chunks and case.full_chunks))
    configs = [config] if case.lora_rank else [replace(config, second_time=config.second_time and name == "student") for name in names]
    modules = []
    for c in configs:
        with torch.device("meta"):
            net = FlowMapDiT(c)
            if case.lora_rank:
                net = net.requires_grad_(False).to(torch.bfloat16 if case.bf16 else torch.float32)
                for name in names:
                    lora.add_adapter(net, name, case.lora_rank, case.lora_rank)
        for block in net.blocks:
            block.checkpointing = case.checkpointing
        modules.append(distributed.shard(net, world, case.bf16))
    with fake():
        for net in modules:
            net.to_empty(device="cpu")
            for p in net.parameters():
                local(p).data.normal_(std=0.02)
        nets = dict(zip(names, modules)) if not case.lora_rank else {name: lora.Adapted(modules[0], name) for name in names}
        trained = [checkpoint.trainable(nets[name], 1e-4, (0.9, 0.99), 0.0, with_ema=name == "student") for name in nets
                   if name != "teacher"]
        if case.stage == "distill":
            nets["teacher"].requires_grad_(False)
    return nets, modules, trained


def update(case: Case, nets: dict, trained: list) -> None:
    """One update as in train.py, with the losses of the largest kind. One clip a process: control flow that looks at times
    then looks at single numbers, which fake tensors carry along."""
    c, chunks = case.config, case.chunks or case.shape[:1]
    full = case.full_chunks or len(chunks)
    student, teacher, fake_score = (nets.get(name) for name in ("student", "teacher", "fake"))
    x, text = torch.randn(1, *case.shape), torch.randn(1, case.tokens, c.text_dim)
    start = sum(chunks[:-full])
    n, t, r = torch.randn(1, *case.shape)[:, start:], torch.tensor([0.75]), torch.tensor([0.25])

    def context(net, z_0=None):
        clip = x if z_0 is None else torch.cat([x[:, :start], z_0.detach()], 1)
        return teacher_forced(net, clip, text, chunks, case.full_chunks)

    def flow_map_loss(last):
        with torch.no_grad():
            null_context = context(student)
        err = meanflow.meanflow_error(student, x[:, start:], n, t, r, context(student), null_context,
                                      torch.zeros(1, dtype=torch.bool), guidance=3.0, all_ranks_differentiate=True)
        del null_context
        backward(err, student, last)

    def backward(loss, net, last):
        distributed.sync_gradients(net, last)
        loss.sum().backward()

    def rollout():
        def jump(z, context):
            u = flowmap.conditioned(student, context)
            return backward_sim.flow_map_simulation(u, z, flowmap.time_grid(4, 5.0), 1)
        with torch.no_grad():
            past = student.encode(x[:, :start], Context(text, chunks=chunks[:-full]), compressed=True) if start else ()
        pieces = backward_sim.chunk_by_chunk(jump, lambda context, z_0: append_chunk(student, context, z_0, full_chunks=0),
                                             Context(text, past, start), n, chunks[-full:])
        return torch.cat(list(pieces), 1)

    rollouts = []
    for micro_step in range(case.micro_steps):
        last = micro_step == case.micro_steps - 1
        if case.stage == "pretrain":
            u = flowmap.conditioned(student, context(student))
            backward(flowmap.flow_matching_error(u, x[:, start:], n, t), student, last)
        elif case.stage == "flowmap":
            flow_map_loss(last)
        else:
            z_0 = rollout()
            real, fake = (lambda z, t, r, net=net: net(z, t, r, context(net, z_0)) for net in (teacher, fake_score))
            gradient = dmd.dmd_gradient(z_0, n, t, real=flowmap.guided(real, real, 4.0), fake=fake)
            backward(dmd.dmd_loss(z_0, gradient), student, False)
            rollouts.append(z_0.detach())
            del z_0, gradient
            flow_map_loss(last)
    step(trained[0])
    for z_0 in rollouts:
        u = flowmap.conditioned(fake_score, context(fake_score, z_0))
        backward(dmd.fake_score_error(u, z_0, n, t), fake_score, z_0 is rollouts[-1])
    for part in trained[1:]:
        step(part)


def step(part) -> None:
    torch.nn.utils.clip_grad_norm_(part.network.parameters(), 1.0)
    part.optimizer.step()
    part.optimizer.zero_grad(set_to_none=True)
    if part.ema is not None:
        part.update_ema(0.99)


def local(tensor):
    """This process's shard of a tensor, or all of a plain one."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def local_bytes(tensors) -> int:
    return sum(local(t).nbytes for t in tensors)


def kept(modules, trained) -> dict:
    """Bytes that a process keeps all the time; gradients, from the backward pass to the optimiser's step."""
    weights = [p for part in trained for p in part.network.parameters()]
    states = [value for part in trained for state in part.optimizer.state.values() for value in state.values()]
    return {"parameters": local_bytes(p for net in modules for p in net.parameters()), "gradients": local_bytes(weights),
            "optimiser": local_bytes(states), "EMA": local_bytes(trained[0].ema.values())}


class Ledger(MemTracker):
    """torch's memory tracker without its account by module, whose hooks keep graphs alive and fail on frozen parameters; and
    the bytes that this process receives in all-gathers and sends in reduce-scatters."""

    def __init__(self, size: int):
        super().__init__()
        self.share, self.gathered, self.reduced = (size - 1) / size, 0.0, 0.0
        def nothing(*args):
            pass
        self._mod_tracker = SimpleNamespace(register_user_hooks=nothing, clear_user_hooks=nothing, __enter__=nothing,
                                            __exit__=nothing, is_bw=False, parents=())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if out is not NotImplemented and "_allgather_base" in str(func):
            self.gathered += args[0].nbytes * self.share
        elif out is not NotImplemented and "_reduce_scatter_base" in str(func):
            self.reduced += args[1].nbytes * self.share
        return out


def plan(case: Case) -> dict:
    """Bytes a GPU of one update: parameters, gradients, optimiser, EMA, activations (with all other temporaries), peak, and
    those of its traffic. Starts, and ends, a process group that only pretends."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=case.gpus)
    nets, modules, trained = build(case, distributed.World(0, case.gpus, torch.device("cpu")), lambda: mode)
    out, ledger = kept(modules, trained), Ledger(case.gpus)
    with mode:
        ledger.track_external(*(local(p) for net in modules for p in net.parameters()), *(local(e) for e in trained[0].ema.values()),
                              *(local(v) for part in trained for state in part.optimizer.state.values() for v in state.values()))
        with ledger:
            update(case, nets, trained)
    torch.distributed.destroy_process_group()
    peak = sum(found["Total"] for found in ledger.get_tracker_snapshot("peak").values())
    return out | {"activations": peak - sum(out.values()), "peak": peak, "gathered": ledger.gathered, "reduced": ledger.reduced}


CHECKED = ModelConfig(dim=512, heads=8, layers=4, ffn_dim=2048, text_dim=256, freq_dim=64)     # small enough to run here


def checked_cases() -> list[Case]:
    """Two processes, full precision: every stage and kind."""
    cases = [Case(stage, CHECKED, (8, 16, 24, 32), gpus=2, lora_rank=rank, checkpointing=on, bf16=False, tokens=64)
             for stage, rank, on in (("pretrain", 0, False), ("flowmap", 32, True), ("distill", 0, True), ("distill", 32, False),
                                     ("distill", 32, True))]
    return [*cases, replace(cases[-1], chunks=(1, 3, 2, 2))]


def measure(case: Case) -> int:
    """Bytes of resident memory that one real update of a case takes at its peak on this process, from before its networks
    are made. For processes that torchrun started."""
    def resident(name):
        return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if name in line)
    world = distributed.start("cpu")
    distributed.barrier(world)
    torch.randn(64, 64) @ torch.randn(64, 64)
    before = resident("VmRSS")
    nets, _, trained = build(case, world, nullcontext)
    update(case, nets, trained)
    return resident("VmHWM") - before


def name_of(case: Case) -> str:
    kind = "causal" if case.chunks else "bidirectional"
    return f"{case.stage} | {kind} | {f'adapters, rank {case.lora_rank}' if case.lora_rank else 'all weights'} | " \
           f"{'yes' if case.checkpointing else 'no'}"


def plan_main(args, parser) -> None:
    config, (height, width) = PRESETS[args.preset], SIZES[args.preset]
    wan = args.preset.startswith("wan")
    if wan:
        if (args.frames - 1) % 4 or args.height % 16 or args.width % 16:
            parser.error(f"--frames {args.frames} must be 4 n + 1, --height {args.height} and --width {args.width} multiples of 16")
        shape = ((args.frames - 1) // 4 + 1, config.channels, args.height // 8, args.width // 8)
    else:
        shape = (4, config.channels, height, width)
    chunks = ()
    if args.causal:
        chunks = tuple(cli.positive_ints(RECIPES[f"{args.preset}-causal"]["distill"]["chunks"] if wan else "1,1,1,1"))
        if sum(chunks) != shape[0]:
            parser.error(f"--causal: chunks {chunks} add up to {sum(chunks)} latent frames, but --frames {args.frames} makes {shape[0]}")
    rank = RECIPES[args.preset]["distill"].get("lora_rank", 0) if args.lora_rank is None else args.lora_rank
    print(f"{args.preset}, latents {' x '.join(map(str, shape))}, {args.gpus} GPUs, a clip each, {args.micro_steps} micro-batches "
          f"an update. GB a GPU and update; activations with all other temporaries.\n\n"
          "| stage | network | trains | checkpointing | parameters | gradients | optimiser | EMA | activations | peak | gathered | "
          f"reduced | fits {args.memory} GB |\n|{'---|' * 13}")
    rows = product(STAGES if args.stage == "all" else [args.stage], (True, False) if args.checkpointing is None else [args.checkpointing])
    for stage, checkpointing in tqdm(list(rows), desc="plan (minutes a row at 14B)", unit="row"):
        case = Case(stage, config, shape, chunks, 3, args.gpus, rank, checkpointing, bf16=wan, micro_steps=args.micro_steps)
        found = plan(case)
        fits = "yes" if found["peak"] * 1.1 < args.memory * GB else "no"
        tqdm.write(f"| {name_of(case)} | " + " | ".join(f"{value / GB:.1f}" for value in found.values()) + f" | {fits} |")
    print("\nfits: with a tenth more for what is not a tensor: CUDA's context, NCCL's buffers, fragmentation")


def check_main(args, parser) -> None:
    cases = checked_cases()
    print("GB a process | stage | network | trains | checkpointing\n---|---|---|---|---")
    worst = 0.0
    for number, case in enumerate(cases):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "BENCH_CASE": str(number)}
        run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, "check"],
                             env=environment, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(run.stderr)
        measured = int(run.stdout.split("measured")[1].split()[0])
        predicted = plan(case)["peak"]
        worst = max(worst, abs(measured / predicted - 1))
        print(f"predicted {predicted / GB:.3f}, measured {measured / GB:.3f}, ratio {measured / predicted:.3f} | {name_of(case)}", flush=True)
    print(f"furthest off: {100 * worst:.1f} %")


def write_main(args, parser) -> None:
    world = distributed.start(args.device)
    config = replace(PRESETS[args.preset], compressed=args.full_chunks > 0)
    runs = [write_cost(config, SIZES[args.preset], args.chunk_frames, args.full_chunks, args.window, 64, world.device)
            for _ in range(args.repeats)]
    best = [min(costs) for costs in zip(*runs)]
    for number in (1, 2, 4, 8, 16, 32, 48, 64):
        print(f"chunk {number:2}: {1000 * best[number - 1][0]:8.2f} ms, {best[number - 1][1] / 1e9:.4f} GFLOP outside attention")
    early, late = (sum(seconds for seconds, _ in best[n - 2:n + 2]) / 4 for n in (8, 62))
    print(f"the 64th against the 8th: {late / early:.2f} x in time (means of four), {best[63][1] / best[7][1]:.2f} x in "
          f"arithmetic outside attention")


def main(argv=None) -> None:
    parser = cli.Parser("Measure speed, plan memory.", "python bench.py plan --preset wan-14b --causal --gpus 8")
    parser.add_argument("what", type=cli.choice(("write", "plan", "check")), help="write: cost of remembering a chunk; plan: memory and "
                        "traffic of training, simulated; check: the simulation against measurement")
    parser.add_argument("--preset", type=cli.choice(tuple(SIZES)), default="toy", metavar="NAME", help="size (default toy)")
    parser.add_argument("--chunk-frames", type=int, default=3, help="write: latent frames of a chunk (default 3)")
    parser.add_argument("--full-chunks", type=int, default=3, help="write: full chunks, the newest included (default 3)")
    parser.add_argument("--window", type=int, default=0, help="write: past chunks that are remembered (default 0: all)")
    parser.add_argument("--repeats", type=int, default=5, help="write: runs; the fastest of each chunk counts (default 5)")
    parser.add_argument("--device", type=cli.choice(("auto", "cpu", "cuda")), default="auto", metavar="NAME",
                        help="write: auto, cpu or cuda (default auto)")
    parser.add_argument("--gpus", type=int, default=8, help="plan: processes (default 8)")
    parser.add_argument("--memory", type=int, default=80, help="plan: GB (10^9 bytes) of a GPU, to say what fits (default 80)")
    parser.add_argument("--stage", type=cli.choice(("all", *STAGES)), default="all", metavar="NAME", help="plan: one stage (default all)")
    parser.add_argument("--causal", action="store_true", help="plan: the chunk-by-chunk network")
    parser.add_argument("--lora-rank", type=int, help="plan: rank of the adapters, 0 for all weights (default: the recipe's)")
    parser.add_argument("--checkpointing", action=cli.argparse.BooleanOptionalAction, help="plan: only with or without (default both)")
    parser.add_argument("--micro-steps", type=int, default=2, help="plan: micro-batches an update; more than 2 take what 2 take (default 2)")
    parser.add_argument("--frames", type=int, default=81, help="plan: pixel frames (default 81)")
    parser.add_argument("--height", type=int, default=480, help="plan: pixels (default 480)")
    parser.add_argument("--width", type=int, default=832, help="plan: pixels (default 832)")
    args = parser.parse(argv)
    for name in ("chunk_frames", "repeats", "gpus", "memory", "micro_steps", "frames", "height", "width"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if (args.lora_rank or 0) < 0 or args.window < 0 or args.full_chunks < 0:
        parser.error("--lora-rank, --window and --full-chunks: must be at least 0")
    if args.what == "check" and "BENCH_CASE" in os.environ:      # a process that check_main started
        print(f"measured {measure(checked_cases()[int(os.environ['BENCH_CASE'])])} " * (os.environ["RANK"] == "0"))
        distributed.stop()
    {"write": write_main, "plan": plan_main, "check": check_main}[args.what](args, parser)


if __name__ == "__main__":
    cli.run(main)
