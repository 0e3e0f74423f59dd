"""Speed, measured on this machine:

    python bench.py write        cost of remembering a finished chunk, from the 8th to the 64th of a long video

The attention of a compressed chunk to all compressed chunks before it grows with the video; --window bounds it.
"""
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import trange

import cli
import distributed
from model import PRESETS, Context, FlowMapDiT, ModelConfig, remember

SIZES = {"toy": (4, 4), "tiny": (4, 4), "wan-1.3b": (60, 104), "wan-14b": (60, 104)}     # latent height and width


def write_cost(config: ModelConfig, size, frames: int, full_chunks: int, window: int, chunks: int, device) -> list[tuple]:
    """(seconds, floating-point operations outside attention) of `remember` for each of `chunks` chunks of `frames` latent
    frames, in order."""
    net = FlowMapDiT(config).to(device).requires_grad_(False)
    g = distributed.generator("bench")
    z = torch.randn(1, frames, config.channels, *size, generator=g).to(device)
    context, costs = Context(net.read(torch.randn(1, 16, config.text_dim, generator=g).to(device))), []
    for _ in trange(chunks, desc="write", unit="chunk"):
        with FlopCounterMode(display=False) as flops:
            remember(net, context, z, full_chunks, window)
        dense = sum(n for op, n in flops.get_flop_counts()["Global"].items() if "attention" not in str(op))
        started = time.perf_counter()
        context = remember(net, context, z, full_chunks, window)
        if z.is_cuda:
            torch.cuda.synchronize()
        costs.append((time.perf_counter() - started, dense))
    return costs


def main(argv=None) -> None:
    parser = cli.Parser("Measure speed.", "python bench.py write --preset toy")
    parser.add_argument("what", type=cli.choice(("write",)), help="write: cost of remembering a chunk")
    parser.add_argument("--preset", type=cli.choice(tuple(PRESETS)), default="toy", metavar="NAME", help="size (default toy)")
    parser.add_argument("--frames", type=int, default=3, help="latent frames of a chunk (default 3)")
    parser.add_argument("--full-chunks", type=int, default=3, help="full chunks, the newest included (default 3)")
    parser.add_argument("--window", type=int, default=0, help="past chunks that are remembered (default 0: all)")
    parser.add_argument("--repeats", type=int, default=5, help="runs; the fastest of each chunk counts (default 5)")
    parser.add_argument("--device", type=cli.choice(("auto", "cpu", "cuda")), default="auto", metavar="NAME",
                        help="auto, cpu or cuda (default auto)")
    args = parser.parse(argv)
    world = distributed.start(args.device)
    config = ModelConfig(**{**vars(PRESETS[args.preset]), "compressed": args.full_chunks > 0})
    runs = [write_cost(config, SIZES[args.preset], args.frames, args.full_chunks, args.window, 64, world.device)
            for _ in range(args.repeats)]
    best = [min(costs) for costs in zip(*runs)]
    for number in (1, 2, 4, 8, 16, 32, 48, 64):
        print(f"chunk {number:2}: {1000 * best[number - 1][0]:8.2f} ms, {best[number - 1][1] / 1e9:.4f} GFLOP outside attention")
    early, late = (sum(seconds for seconds, _ in best[n - 2:n + 2]) / 4 for n in (8, 62))
    print(f"the 64th against the 8th: {late / early:.2f} x in time (means of four), {best[63][1] / best[7][1]:.2f} x in "
          f"arithmetic outside attention")


if __name__ == "__main__":
    main(sys.argv[1:])
