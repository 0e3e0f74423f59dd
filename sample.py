"""Prompts in, clips out, in any number of steps:

    python sample.py --prompt "a red circle moving left" --steps 4 --out clip.mp4
    python sample.py --causal --prompt "a red circle moving left" --image start.png --frames 32 --stream
"""
import argparse
import json
import time
import zlib
from pathlib import Path

import imageio.v2
import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import cli
import data
import distributed
import flowmap
from pipeline import SAMPLERS, Pipeline, chunks_for, generate, given_latents, latents, load_pipeline, read_picture, stream


def to_pixels(video: torch.Tensor, height: int = 128) -> np.ndarray:
    """Clips (..., 3, H, W) in [-1, 1] -> uint8 (..., H', W, 3), magnified by whole factors so that small ones can be seen."""
    factor = max(1, height // video.shape[-2])
    video = video.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1).numpy()


def contact_sheet(rows: torch.Tensor, gap: int = 2) -> torch.Tensor:
    """Pictures (R, N, 3, H, W) -> one picture (3, R * (H + gap), N * (W + gap)) with grey gaps."""
    cells = F.pad(rows, (0, gap, 0, gap), value=0.0)
    return cells.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def write_clip(path: Path, video: torch.Tensor, fps: int) -> None:
    """Write one clip (T, 3, H, W), aside and then renamed: .mp4 and .gif play, .png is a row of its frames. Raises ValueError
    for other names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_stem(f"{path.stem}.partial")
    if path.suffix == ".png":
        iio.imwrite(aside, to_pixels(contact_sheet(video[None]), video.shape[-2] * 4))
    elif path.suffix == ".gif":
        iio.imwrite(aside, to_pixels(video), duration=1000 / fps, loop=0)
    elif path.suffix == ".mp4":
        iio.imwrite(aside, to_pixels(video), fps=fps, codec="libx264", macro_block_size=2,
                    output_params=["-crf", "12", "-loglevel", "error"])
    else:
        raise ValueError(f"{path}: the name must end in .mp4, .gif or .png")
    aside.replace(path)


def newest_stage(run: Path) -> Path:
    """The furthest finished stage of a run."""
    for name in ("distill", "flowmap", "pretrain"):
        if (run / name / "model.safetensors").exists():
            return run / name
    raise ValueError(f"no finished stage in {run}. First run: python train.py --stage pretrain --run-dir {run}")


def main(argv=None) -> None:
    parser = cli.Parser("Sample clips from a trained run.",
                        'python sample.py --prompt "a red circle moving left" --steps 4 --out clip.mp4')
    parser.add_argument("--prompt", action="append", default=[], help="what to show; may be given several times "
                        "(default none: --prompts)")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with a prompt a line, or a .json list of "
                        "prompts or of VBench's entries with prompt_en (default none)")
    parser.add_argument("--run-dir", type=Path, help="the run (default runs/toy-shapes, or runs/toy-shapes-causal)")
    parser.add_argument("--causal", action="store_true", help="use the causal run runs/toy-shapes-causal (default off)")
    parser.add_argument("--ckpt", type=Path, help="a finished stage RUN/STAGE, or Wan or AnyFlow weights, in place of --run-dir "
                        "(default none)")
    parser.add_argument("--base", type=Path, help="the weights' pipeline folder of Wan2.1 or Wan2.2-TI2V-5B: text encoder, autoencoder "
                        "and, for Wan2.1-I2V, image encoder (default none, for networks of the toy sets)")
    parser.add_argument("--height", type=int, default=480, help="pixels, for weights without a run (default 480)")
    parser.add_argument("--width", type=int, default=832, help="pixels, for weights without a run (default 832)")
    parser.add_argument("--stage", type=cli.choice(("pretrain", "flowmap", "distill")), metavar="NAME",
                        help="pretrain, flowmap or distill (default: the furthest that is finished)")
    parser.add_argument("--steps", type=int, default=4, help="network calls, any number from 1 up (default 4)")
    parser.add_argument("--grid", metavar="T,T,...", help="your own times from 1 down to 0, instead of --steps (default none)")
    parser.add_argument("--shift", type=float, help="timestep shift of the grid (default: the one trained with)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first clip; the next have the next (default 0)")
    parser.add_argument("--per-prompt", type=int, default=1, help="clips a prompt (default 1)")
    parser.add_argument("--sampler", type=cli.choice(SAMPLERS), default="euler", metavar="NAME",
                        help="euler follows the flow map; consistency re-noises at each step (default euler)")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 is none (default: 1 for a flow map and with the "
                        "consistency sampler, whose networks have it built in; for a teacher the scale that the flow map would be "
                        "trained with)")
    parser.add_argument("--frames", type=int, help="pixel frames: of a causal model, rounded up to whole chunks, or for "
                        "weights without a run (default: as trained, or 81)")
    parser.add_argument("--chunks", type=cli.positive_ints, metavar="N,N,...", help="latent frames of each chunk, for causal weights "
                        "whose file does not say so: 3,3,3,3,3,3,3 for Self-Forcing and Krea (default none)")
    parser.add_argument("--image", type=Path, help="the clip starts from this picture (image-to-video): by the image inputs of "
                        "Wan2.1-I2V; else its first chunk is kept or, of a bidirectional model, the first latent frame, for weights "
                        "that were trained so, as Wan2.2-TI2V-5B (default none)")
    parser.add_argument("--video", type=Path, help="causal: the clip goes on from this one's whole chunks (video-to-video, "
                        "default none)")
    parser.add_argument("--prompt-at", nargs=2, action="append", default=[], metavar=("M", "PROMPT"),
                        help="causal: another prompt from chunk M on, counted from 0; may be given several times (default none)")
    parser.add_argument("--window", type=int, help="causal: past chunks that are remembered; 0: all (default: as many as in "
                        "training, which long videos need)")
    parser.add_argument("--stream", action="store_true", help="write each chunk as soon as it is ready; prints the time to "
                        "the first chunk and the frames a second (default off)")
    parser.add_argument("--tiling", action="store_true", help="Wan's autoencoder works in overlapping tiles of 256 x 256 pixels: "
                        "less GPU memory, a little slower (default off)")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=None, help="weights in bf16, --no-bf16: in fp32 "
                        "(default: bf16 for Wan's networks on a GPU)")
    parser.add_argument("--device", type=cli.choice(("auto", "cpu", "cuda")), default="auto", metavar="NAME",
                        help="auto, cpu or cuda (default auto)")
    parser.add_argument("--out", type=Path, default=Path("clip.mp4"),
                        help="a .mp4, .gif or .png file; several clips are numbered (default clip.mp4)")
    parser.add_argument("--vbench", action="store_true", help="name clips PROMPT-0.mp4, PROMPT-1.mp4, ... in the folder --out "
                        "(default off)")
    parser.add_argument("--save-latents", type=Path, metavar="SHARDS", help="write latents and prompt features as shards to train "
                        "on, in place of clips; under torchrun every process makes its part, and the same command goes on "
                        "(default none)")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="also a picture with a row of frames for each clip (default none)")
    args = parser.parse(argv)

    captions = list(args.prompt)
    if args.prompts:
        if not args.prompts.is_file():
            parser.error(f"--prompts {args.prompts}: no such file")
        captions += read_prompts(args.prompts, parser)
    if not captions:
        parser.error(f"--prompts {args.prompts}: holds no prompt; write one a line" if args.prompts else
                     'no prompt: give --prompt "..." or --prompts FILE')
    for name, least in (("steps", 1), ("per_prompt", 1), ("frames", 1), ("window", 0)):
        if (getattr(args, name) if getattr(args, name) is not None else least) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    for name in ("guidance", "shift"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name} {getattr(args, name):g}: must be above 0")
    if args.image and args.video:
        parser.error("--image and --video: give one of them")
    for chunk, _ in args.prompt_at:
        if not chunk.isdigit():
            parser.error(f"--prompt-at {chunk}: the chunk must be a number from 0 up")
    for name, path in (("out", args.out), ("sheet", args.sheet)):
        if name == "out" and args.vbench:
            continue
        if path and path.suffix not in ((".mp4", ".gif", ".png") if name == "out" else (".png",)):
            parser.error(f"--{name} {path}: the name must end in {'.mp4, .gif or .png' if name == 'out' else '.png'}")

    try:
        grid = [float(t) for t in args.grid.split(",")] if args.grid else None
    except ValueError:
        parser.error(f"--grid {args.grid}: expected numbers with commas from 1 down to 0, such as 1,0.6,0")
    for name, path in (("--out", args.out if args.vbench else args.out.parent), ("--save-latents", args.save_latents),
                       ("--sheet", args.sheet and args.sheet.parent)):
        if path:
            cli.check_folder(path, name)
    run_dir = args.run_dir or Path("runs/toy-shapes-causal" if args.causal else "runs/toy-shapes")
    stage = args.ckpt or (run_dir / args.stage if args.stage else newest_stage(run_dir))
    world = distributed.start(args.device)
    try:
        if world.size > 1 and (args.stream or args.sheet):
            raise ValueError(f"--{'stream' if args.stream else 'sheet'} is for one process: leave torchrun out")
        pipeline = load_pipeline(stage, world.device, args.base, args.frames or 81, args.height, args.width, args.tiling, args.bf16,
                                 args.chunks)
        shift = args.shift or pipeline.config["shift"]
        grid = grid or flowmap.time_grid(args.steps, shift)
        built_in = pipeline.network.config.second_time or args.sampler == "consistency"
        guidance = args.guidance or (1.0 if built_in else pipeline.config["guidance"])
        captions = [caption for caption in captions for _ in range(args.per_prompt)]
        seeds = list(range(args.seed, args.seed + len(captions)))
        options = {"window": args.window, "prompt_at": {int(chunk): prompt for chunk, prompt in args.prompt_at}}
        start = args.image or args.video
        if args.frames and args.frames != pipeline.codec.frames(sum(pipeline.chunks)):
            options["chunks"] = chunks_for(pipeline, args.frames)
        count = len(options.get("chunks", pipeline.chunks))
        if late := [m for m in options["prompt_at"] if m >= count]:
            raise ValueError(f"--prompt-at {late[0]}: the clip has {count} chunks, counted from 0; give more --frames")
        if pipeline.network.config.image_channels:
            if not args.image:
                raise ValueError(f"{stage} is an image-to-video network: give its first frame with --image")
            options["picture"] = read_picture(pipeline, args.image)
        elif start:
            options["given"] = given_latents(pipeline, start, bool(args.image), options.get("chunks", pipeline.chunks))
        if args.stream:
            if len(captions) > 1 or args.tiling:
                parser.error("--stream takes one prompt and one clip" if len(captions) > 1 else
                             "--stream and --tiling: give one of them; a stream is not decoded in tiles")
            stream_to(args.out, stream(pipeline, captions, seeds, grid, args.sampler, guidance, **options), pipeline.fps)
            return
        if args.save_latents:
            made_by = {"weights": str(stage.resolve()), "start": data.checksum(start) if start else None,
                       "prompt_at": args.prompt_at, "window": args.window}
            save_latents(args.save_latents, world, pipeline, captions, seeds, grid, args.sampler, guidance, options, made_by)
            return
        paths = [args.out / f"{file_name(caption)}-{(seed - args.seed) % args.per_prompt}.mp4" if args.vbench else
                 args.out if len(captions) == 1 else args.out.with_stem(f"{args.out.stem}-{i:03d}")
                 for i, (caption, seed) in enumerate(zip(captions, seeds))]
        # Those of this process, less what an earlier run of this command made.
        todo = [i for i in range(world.rank, len(paths), world.size) if not (args.vbench and paths[i].exists())]
        made = []
        for first in tqdm(range(0, len(todo), pipeline.batch), desc="sample", disable=len(todo) <= pipeline.batch or not world.is_main):
            rows = todo[first:first + pipeline.batch]
            clips = generate(pipeline, [captions[i] for i in rows], [seeds[i] for i in rows], grid, args.sampler, guidance, **options)
            for i, clip in zip(rows, clips):
                write_clip(paths[i], clip, pipeline.fps)
                tqdm.write(f"{paths[i]}: {captions[i]} (seed {seeds[i]}, {len(grid) - 1} steps, {stage.name})")
            made += [clips] if args.sheet else []
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if made:
        clips = torch.cat(made)
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        iio.imwrite(args.sheet, to_pixels(contact_sheet(clips), clips.shape[-2] * 4 * len(clips)))
        print(args.sheet)


def file_name(caption: str) -> str:
    """The caption as VBench names files. One that no file system would take is cut, and told apart by a checksum."""
    name = caption.replace("/", " ")
    return name if len(name.encode()) <= 200 else f"{name.encode()[:180].decode(errors='ignore')} {zlib.crc32(name.encode()):08x}"


def read_prompts(path: Path, parser) -> list[str]:
    text = path.read_text("utf-8")
    if path.suffix != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        rows = json.loads(text)
        if not isinstance(rows, list):
            raise TypeError(f"not {type(rows).__name__}")
        return [row["prompt_en"] if isinstance(row, dict) else str(row) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        parser.error(f"--prompts {path}: expected a list of prompts, or of entries with prompt_en ({error})")


def save_latents(folder: Path, world, pipeline: Pipeline, captions, seeds, grid, sampler, guidance, options, made_by: dict) -> None:
    """Clips of a teacher as shards (data.ShardWriter): synthetic training data, as the paper uses."""
    made_by |= {"grid": grid, "sampler": sampler, "guidance": guidance, "first_seed": seeds[0],
               "chunks": options.get("chunks", pipeline.chunks), "size": pipeline.latent_shape[1:],
               "prompts": f"checksum {zlib.crc32(json.dumps(captions).encode()):08x}"}
    writer = data.ShardWriter(folder, made_by, world.rank, world.size)
    rows = [i for i in range(world.rank, len(captions), world.size) if f"{i:07d}" not in writer.done]
    for i in tqdm(rows, desc="latents", disable=not world.is_main):
        z_0 = torch.cat(list(latents(pipeline, [captions[i]], [seeds[i]], grid, sampler, guidance, **options)), 1)[0]
        tensors = {"latents": z_0, "text": pipeline.words([captions[i]])[0]}
        tensors |= {name: m[0] for name, m in zip(("image", "condition"), options.get("picture", ())) if m is not None}
        writer.add(f"{i:07d}", captions[i], **{name: tensor.bfloat16() for name, tensor in tensors.items()})
    writer.close(pipeline.words([pipeline.null_prompt])[0].bfloat16())
    print(f"{folder}: part {world.rank + 1} of {world.size}, {len(writer.done)} clips")


def stream_to(path: Path, pieces, fps: int) -> None:
    """Write chunks (1, T, 3, H, W) into one .mp4 or .gif as they come, and print how fast they came."""
    if path.suffix not in (".mp4", ".gif"):
        raise ValueError(f"{path}: a stream is written to .mp4 or .gif")
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"fps": fps, "macro_block_size": 2} if path.suffix == ".mp4" else {"duration": 1000 / fps, "loop": 0}
    started, first, frames = time.time(), None, 0
    with imageio.v2.get_writer(path, **options) as writer:
        for piece in pieces:
            for frame in to_pixels(piece[0]):
                writer.append_data(frame)
            first, frames = first or time.time() - started, frames + piece.shape[1]
            print(f"\r{path}: {frames} frames", end="", flush=True)
    seconds = time.time() - started
    print(f"; first chunk after {first:.2f} s, {frames / seconds:.1f} frames a second")


if __name__ == "__main__":
    cli.run(main)
