"""Speed and memory:

    python bench.py plan --preset wan-14b --gpus 8
                             memory a GPU and traffic an update, simulated (plan.py)
    python bench.py check    the simulation against the measured memory of small networks
    python bench.py flops --preset wan-1.3b
                             arithmetic of an update, of what it needs, and of others (flops.py)
    python bench.py gpu      what a GPU makes of it: seconds, share of its peak, memory (speed.py)
    python bench.py peers    against Diffusers' networks of the same weights
    python bench.py costs    an update of each kind beside a plainer one, a late chunk of a stream
                             beside an early one
"""
import argparse
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product

import cli
from config import PRESETS as NAMES
from config import STAGES, Config, chunks_of, recipe

MEASURES = ("plan", "check", "flops", "peers", "costs", "gpu")


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser("Measure speed, plan memory.",
                        "python bench.py plan --preset wan-14b --causal --gpus 8")
    add = parser.add_argument
    add("what", type=cli.choice(MEASURES),
        help="plan: memory and traffic of training, simulated; check: the simulation against "
        "measurement; flops: arithmetic of training; peers: against Diffusers' networks; costs: of "
        "updates and late chunks, as ratios; gpu: what this machine's GPU does")
    add("--preset", type=cli.choice(NAMES), default="toy", metavar="NAME",
        help="size of the network (default toy)")
    add("--repeats", type=int, least=1, default=5, help="peers, costs: runs (default 5)")
    add("--device", type=cli.choice(("auto", "cpu", "cuda")), default="auto", metavar="NAME",
        help="costs, gpu: auto, cpu or cuda (default auto)")
    add("--gpus", type=int, least=1, default=8, help="plan: processes (default 8)")
    add("--memory", type=int, least=1, default=80,
        help="plan: GB (10^9 bytes) of a GPU, to say what fits (default 80)")
    add("--stage", type=cli.choice(("all", *STAGES)), default="all", metavar="NAME",
        help="plan, flops: one stage (default all)")
    add("--causal", action="store_true",
        help="plan, flops: the chunk-by-chunk network (default off)")
    add("--lora-rank", type=int,
        help="plan, flops, gpu: rank of the adapters, 0 for all weights (default: the recipe's)")
    add("--checkpointing", type=int, nargs="?", const=1, metavar="N",
        help="plan, flops: activation checkpointing, of every Nth block (alone: of every one); "
        "plan: 0 is none (default both, and flops: of every one)")
    add("--micro-steps", type=int, least=1, default=2,
        help="plan: micro-batches an update; more than 2 take what 2 take (default 2)")
    add("--frames", type=int, least=1, default=81,
        help="plan, flops, gpu, costs: pixel frames (default 81)")
    add("--height", type=int, least=1, default=480,
        help="plan, flops, gpu, peers, costs: pixels (default 480)")
    add("--width", type=int, least=1, default=832, help="as --height (default 832)")
    args = parser.parse(argv)
    if args.what in ("check", "peers") and not os.path.exists("/proc/self/clear_refs"):
        parser.error(f"{args.what} measures memory by /proc, which Linux alone has")
    if args.causal and args.stage == "pretrain":
        parser.error("--causal is for stages flowmap and distill; the teacher sees whole clips")
    if args.what in ("plan", "flops") and args.preset.startswith("wan"):
        latent_side(args, args.causal)
    return args


def latent_side(args, causal: bool) -> int:
    """Pixels that a latent of Wan covers, each way. Raises ValueError for clips that have no
    latents, or no compressed tokens."""
    pixels = 16 if args.preset == "wan-5b" else 8
    side = pixels * (4 if causal else 2)
    if (args.frames - 1) % 4 or args.height % side or args.width % side:
        raise ValueError(f"--frames {args.frames} must be 4 n + 1, --height {args.height} and "
                         f"--width {args.width} multiples of {side}"
                         + " (of compressed tokens)" * causal)
    return pixels


if __name__ == "__main__":
    cli.run(parse_args)   # answers --help and wrong flags, before what takes seconds to import

import torch
from tqdm import tqdm

import distributed
import flops
import plan
import speed
from model import PRESETS

GB = 1e9


def name_of(case: plan.Case) -> str:
    c = case.c
    kind = "causal" if c.causal else "bidirectional"
    trains = f"adapters, rank {c.lora_rank}" if c.lora_rank else "all weights"
    blocks = {0: "no", 1: "yes"}.get(c.checkpointing, f"1 in {c.checkpointing}")
    return f"{c.stage} | {kind} | {trains} | {blocks}"


def case_of(args, stage: str, checkpointing: int, causal: bool) -> plan.Case:
    """What the plan's flags ask for."""
    config, wan = PRESETS[args.preset], args.preset.startswith("wan")
    shape = (4, config.channels, 4, 4)
    if wan:
        pixels = latent_side(args, causal)
        frames = (args.frames - 1) // 4 + 1
        shape = (frames, config.channels, args.height // pixels, args.width // pixels)
    settings = recipe(args.preset, stage, causal) | {
        "stage": stage, "preset": args.preset, "causal": causal,
        "checkpointing": checkpointing, "base": ""}
    if args.what == "flops":                         # counts updates with guidance
        settings |= speed.PAPERS
    if args.lora_rank is not None:
        settings["lora_rank"] = args.lora_rank
    c = Config(**settings)
    try:
        chunks_of(c, shape[0])
    except ValueError:
        raise ValueError(f"--frames {args.frames}: the recipe's chunks, {c.chunks}, are for 81 "
                         "frames") from None
    return plan.Case(c, config, shape, args.gpus, args.micro_steps)


def plan_main(args) -> None:
    stages = STAGES[args.causal:] if args.stage == "all" else [args.stage]     # one teacher
    kinds = (1, 0) if args.checkpointing is None else [args.checkpointing]
    cases = [case_of(args, stage, on, args.causal) for stage, on in product(stages, kinds)]
    print(f"{args.preset}, latents {' x '.join(map(str, cases[0].shape))}, {args.gpus} GPUs, a "
          f"clip each, {args.micro_steps} micro-batches an update. GB a GPU and update; "
          "activations with all other temporaries.\n\n"
          "| stage | network | trains | checkpointing | parameters | gradients | optimiser | EMA | "
          f"activations | peak | gathered | reduced | fits {args.memory} GB |\n|{'---|' * 13}")
    for case in tqdm(cases, desc="plan (a minute a row, causal more)", unit="row"):
        found = plan.memory_by_layers(case)
        fits = "yes" if found["peak"] * 1.1 < args.memory * GB else "no"
        figures = " | ".join(f"{value / GB:.1f}" for value in found.values())
        tqdm.write(f"| {name_of(case)} | {figures} | {fits} |")
    print("\nfits: with a tenth more for what is not a tensor: CUDA's context, NCCL's buffers, "
          "fragmentation")


def flops_main(args) -> None:
    unit, scale = ("TFLOP", 1e12) if args.preset.startswith("wan") else ("GFLOP", 1e9)
    print(f"{args.preset}: {unit} a clip and update; released / done: outside recomputation\n")
    print(f"| stage | network | trains | checkpointing | | {' | '.join(flops.PARTS)} | all but "
          f"recomputation |\n|{'---|' * (len(flops.PARTS) + 6)}")
    for stage in STAGES[args.causal:] if args.stage == "all" else [args.stage]:
        on = 1 if args.checkpointing is None else args.checkpointing
        case, totals = case_of(args, stage, on, args.causal), []
        counts = flops.arithmetic(case)
        for name, found in zip(("done", "needed", "released"), counts):
            totals.append(sum(found.values()) - found["recomputation"])
            figures = " | ".join(f"{found[part] / scale:.1f}" for part in flops.PARTS)
            print(f"| {name_of(case)} | {name} | {figures} | {totals[-1] / scale:.1f} |")
        print(f"{stage}: done / needed {totals[0] / totals[1]:.3f}, released / done "
              f"{totals[2] / totals[0]:.2f}", flush=True)


def check_main(args) -> None:
    print("GB a process | stage | network | trains | checkpointing\n---|---|---|---|---")
    worst = 0.0
    for number, case in enumerate(plan.checked_cases()):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
                       "BENCH_CASE": str(number)}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc_per_node=2", __file__, "check"]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(run.stderr)
        measured = int(run.stdout.split("measured")[1].split()[0])
        predicted = plan.memory(case)["peak"]
        worst = max(worst, abs(measured / predicted - 1))
        print(f"predicted {predicted / GB:.3f}, measured {measured / GB:.3f}, ratio "
              f"{measured / predicted:.3f} | {name_of(case)}", flush=True)
    print(f"furthest off: {100 * worst:.1f} %")


# Seconds and shares that others publish, for the column beside one's own.
PUBLIC = """Published: Wan 14B training under FSDP alone, 18 % of peak on 8 H100, 23 % on 64; with
tensor and context parallelism 33 % on 128. Wan 1.3B: 1.04 s a guided step on an H100. Streaming:
35 frames a second with a small decoder on an H100; LongLive 20.7."""


def gpu_main(args) -> None:
    world = distributed.start(args.device)
    cuda = world.device.type == "cuda"
    if cuda and not args.preset.startswith("wan"):
        args.preset = "wan-1.3b"
    args.gpus = args.micro_steps = 1
    cases = [case_of(args, stage, 1, causal) for causal in (False, True)
             for stage in STAGES[causal:]]
    others = [(args.preset, cases[0].config, cases[0].shape)]
    if args.preset == "wan-1.3b":
        others.append(("wan-14b", PRESETS["wan-14b"], cases[0].shape))
    rows = speed.gpu(cases, others, world, (False, True) if cuda else (False,))
    torch.distributed.destroy_process_group()
    planned = [plan.memory_by_layers(case)["peak"] for case in cases]
    weighed = [row for row in rows if "peak" in row]             # as they are, then compiled
    for row, peak in zip(weighed, itertools.cycle(planned)):
        row["planned"] = peak
    device = torch.cuda.get_device_name() if cuda else "CPU"
    print(f"{device}, torch {torch.__version__}; memory in GB\n\n"
          "| | seconds | TFLOP | of the product | peak | planned |\n|---|---|---|---|---|---|")
    for row in rows:
        cells = [f"{row['seconds']:.3f} | {row['tflop']:.1f} | {row['utilisation']:.3f}"
                 if "seconds" in row else
                 "; ".join(f"{name}: {value:.3f}" for name, value in row.items() if name != "what")]
        cells += [f"{row[name] / GB:.1f}" for name in ("peak", "planned") if name in row]
        print(f"| {row['what']} | {' | '.join(cells)} |")
    print(f"\n{PUBLIC}\n\n{json.dumps({'device': device, 'rows': rows})}")


def peers_main(args) -> None:
    try:
        import diffusers
    except ImportError:
        raise ValueError("peers needs Diffusers: pip install -r requirements-wan.txt") from None
    sides = args.height // 8, args.width // 8
    wide = replace(PRESETS["wan-1.3b"], layers=1)
    print(f"Diffusers {diffusers.__version__}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads", flush=True)
    for what, ratio in speed.peers(wide, sides, (8, 32), args.repeats):
        print(f"{ratio:6.2f} x  {what}", flush=True)


def costs_main(args) -> None:
    world = distributed.start(args.device)
    case = case_of(args, "flowmap", 0, True)         # sizes that fit this fit the other form, too
    for what, ratio in speed.costs(case.config, case.shape, args.preset, args.repeats, world):
        print(f"{ratio:6.2f} x  {what}", flush=True)
    for what, ratio in speed.late_chunks(args.repeats, world.device):
        print(f"{ratio:6.2f} x  {what}", flush=True)


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.what == "check" and "BENCH_CASE" in os.environ:      # a process that check_main started
        found = plan.measure(plan.checked_cases()[int(os.environ["BENCH_CASE"])])
        if os.environ["RANK"] == "0":
            print(f"measured {found}")
        distributed.stop()
    WHAT[args.what](args)


WHAT = {"plan": plan_main, "check": check_main, "flops": flops_main,
        "peers": peers_main, "costs": costs_main, "gpu": gpu_main}       # by name in MEASURES


if __name__ == "__main__":
    cli.run(main)
