"""Prompts in, clips out, in any number of steps:

    python sample.py --prompt "a red circle moving left" --steps 4 --out clip.mp4
"""
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
import cli
import distributed
import flowmap

SAMPLERS = ("euler", "consistency")


@torch.no_grad()
def generate(pipeline: checkpoint.Pipeline, captions: list[str], seeds: list[int], grid: list[float],
             sampler: str = "euler", guidance: float = 1.0, batch: int = 120) -> torch.Tensor:
    """Clips (B, T, 3, H, W) in [-1, 1] on the CPU, one for each caption and seed, by len(grid) - 1 steps.

    A seed decides its clip whatever else is in the batch (with the euler sampler; the consistency sampler's fresh noise
    also depends on the place in the list). guidance: classifier-free guidance, for a teacher; 1 for flow maps, which
    have theirs built in. Raises ValueError for a caption with unknown words or a grid that does not fall from 1 to 0.
    """
    device = next(pipeline.network.parameters()).device
    text, null_text = pipeline.words(captions).to(device), pipeline.words([""] * len(captions)).to(device)
    noise = distributed.noise(pipeline.latent_shape, "sample", slots=seeds).to(device)
    clips = []
    for first in range(0, len(captions), batch):
        rows = slice(first, first + batch)
        u = flowmap.guided(pipeline.network, text[rows], null_text[rows], guidance)
        if sampler == "euler":
            z_0 = flowmap.euler_sample(u, noise[rows], grid)
        else:
            z_0 = flowmap.consistency_sample(u, noise[rows], grid, distributed.generator("renoise", seeds[first], first))
        clips.append(pipeline.codec.decode(z_0.cpu()))
    return torch.cat(clips)


def to_pixels(video: torch.Tensor, height: int = 128) -> np.ndarray:
    """Clips (..., 3, H, W) in [-1, 1] -> uint8 (..., H', W, 3), magnified by whole factors so that small ones can be seen."""
    factor = max(1, height // video.shape[-2])
    video = video.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1).numpy()


def contact_sheet(rows: torch.Tensor, gap: int = 2) -> torch.Tensor:
    """Pictures (R, N, 3, H, W) -> one picture (3, R * (H + gap), N * (W + gap)) with grey gaps."""
    cells = F.pad(rows, (0, gap, 0, gap), value=0.0)
    return cells.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def write_clip(path: Path, video: torch.Tensor, fps: int = 8) -> None:
    """Write one clip (T, 3, H, W): .mp4 and .gif play, .png is a row of its frames. Raises ValueError for other names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        iio.imwrite(path, to_pixels(contact_sheet(video[None]), video.shape[-2] * 4))
    elif path.suffix == ".gif":
        iio.imwrite(path, to_pixels(video), duration=1000 / fps, loop=0)
    elif path.suffix == ".mp4":
        iio.imwrite(path, to_pixels(video), fps=fps, codec="libx264", macro_block_size=2,
                    output_params=["-crf", "12", "-loglevel", "error"])
    else:
        raise ValueError(f"{path}: the name must end in .mp4, .gif or .png")


def newest_stage(run: Path) -> Path:
    """The furthest finished stage of a run."""
    for name in ("distill", "flowmap", "pretrain"):
        if (run / name / "model.safetensors").exists():
            return run / name
    raise SystemExit(f"no finished stage in {run}. First run:\n    python train.py --stage pretrain --run-dir {run}")


def main(argv=None) -> None:
    parser = cli.Parser("Sample clips from a trained run.",
                        'python sample.py --prompt "a red circle moving left" --steps 4 --out clip.mp4')
    parser.add_argument("--prompt", action="append", default=[], help="what to show; may be given several times")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with a prompt a line")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/toy-shapes"), help="the run (default runs/toy-shapes)")
    parser.add_argument("--stage", type=cli.choice(("pretrain", "flowmap", "distill")), metavar="NAME",
                        help="pretrain, flowmap or distill (default: the furthest that is finished)")
    parser.add_argument("--steps", type=int, default=4, help="network calls, any number from 1 up (default 4)")
    parser.add_argument("--grid", metavar="T,T,...", help="your own times from 1 down to 0, instead of --steps")
    parser.add_argument("--shift", type=float, help="timestep shift of the grid (default: the one trained with)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first clip; the next have the next (default 0)")
    parser.add_argument("--count", type=int, default=1, help="clips a prompt (default 1)")
    parser.add_argument("--sampler", type=cli.choice(SAMPLERS), default="euler", metavar="NAME",
                        help="euler follows the flow map; consistency re-noises at each step (default euler)")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 is none (default: 1 for a flow map, which has "
                        "it built in; for a teacher the scale that the flow map would be trained with)")
    parser.add_argument("--device", type=cli.choice(("auto", "cpu", "cuda")), default="auto", metavar="NAME",
                        help="auto, cpu or cuda (default auto)")
    parser.add_argument("--out", type=Path, default=Path("clip.mp4"),
                        help="a .mp4, .gif or .png file; several clips are numbered (default clip.mp4)")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="also a picture with a row of frames for each clip")
    args = parser.parse(argv)

    captions = list(args.prompt)
    if args.prompts:
        if not args.prompts.is_file():
            parser.error(f"--prompts {args.prompts}: no such file")
        captions += [line.strip() for line in args.prompts.read_text().splitlines() if line.strip()]
    if not captions:
        parser.error('no prompt: give --prompt "..." or --prompts FILE')
    for name in ("steps", "count"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    for name, path in (("out", args.out), ("sheet", args.sheet)):
        if path and path.suffix not in ((".mp4", ".gif", ".png") if name == "out" else (".png",)):
            parser.error(f"--{name} {path}: the name must end in {'.mp4, .gif or .png' if name == 'out' else '.png'}")

    stage = args.run_dir / args.stage if args.stage else newest_stage(args.run_dir)
    world = distributed.start(args.device)
    try:
        pipeline = checkpoint.load_pipeline(stage, world.device)
        shift = args.shift or pipeline.config["shift"]
        grid = [float(t) for t in args.grid.split(",")] if args.grid else flowmap.time_grid(args.steps, shift)
        flowmap.check_grid(grid)
        guidance = args.guidance or (1.0 if pipeline.network.config.second_time else pipeline.config["guidance"])
        captions = [caption for caption in captions for _ in range(args.count)]
        seeds = list(range(args.seed, args.seed + len(captions)))
        clips = generate(pipeline, captions, seeds, grid, args.sampler, guidance)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))

    for i, (caption, clip) in enumerate(zip(captions, tqdm(clips, desc="writing", disable=len(clips) < 20))):
        path = args.out if len(clips) == 1 else args.out.with_stem(f"{args.out.stem}-{i:03d}")
        write_clip(path, clip)
        print(f"{path}: {caption} (seed {seeds[i]}, {len(grid) - 1} steps, {stage.name})")
    if args.sheet:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        iio.imwrite(args.sheet, to_pixels(contact_sheet(clips), clips.shape[-2] * 4))
        print(args.sheet)


if __name__ == "__main__":
    main(sys.argv[1:])
