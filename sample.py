"""Prompts in, clips out, in any number of steps:

    python sample.py --prompt "a red circle moving left" --steps 4 --out clip.mp4
    python sample.py --causal --prompt "a red circle moving left" --frames 32 --stream
"""
import argparse
import json
import os
import shutil
import time
import zlib
from collections import Counter
from pathlib import Path

import cli
from config import SAMPLERS, STAGES, folder_of


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(
        "Sample clips from a trained run.",
        'python sample.py --prompt "a red circle moving left" --steps 4 --out clip.mp4')
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="what to show; repeatable (default none)")
    add("--prompts", type=Path, metavar="FILE", help="a prompt a line, or a .json list of prompts "
        "or of VBench's entries with prompt_en (default none)")
    add("--run-dir", type=Path, help="the run (default runs/toy-shapes; what is shipped, until it "
        "is there)")
    add("--causal", action="store_true", help="sample the run's causal student (default off)")
    add("--ckpt", type=Path, help="RUN/STAGE, or Wan or AnyFlow weights (default: of --run-dir)")
    add("--base", type=Path, help="the weights' pipeline folder, for its encoders: Wan2.1 or "
        "Wan2.2-TI2V-5B (default none, for networks of the toy sets)")
    add("--height", type=int, least=1,
        help="pixels, for weights without a run (default 480, or as trained)")
    add("--width", type=int, least=1,
        help="pixels, for weights without a run (default 832, or as trained)")
    add("--stage", type=cli.choice(STAGES), metavar="NAME",
        help="pretrain, flowmap or distill (default: the furthest that is finished)")
    add("--steps", type=int, least=1, default=4,
        help="steps a chunk, 1 or more: one network call each, two with guidance (default 4)")
    add("--grid", metavar="T,...", help="times from 1 to 0, in place of --steps (default none)")
    add("--shift", type=float, help="timestep shift of the grid (default: the one trained with)")
    add("--seed", type=int, default=0, help="of the first clip; others count on (default 0)")
    add("--per-prompt", type=int, least=1, default=1, help="clips of each prompt (default 1)")
    add("--sampler", type=cli.choice(SAMPLERS), default="euler", metavar="NAME", help="euler "
        "follows the flow map; consistency re-noises at each step (default euler)")
    add("--guidance", type=float, help="guidance scale, 1 is none (default: the teacher's of its "
        "recipe; 1 where it is built in: for flow maps and the consistency sampler)")
    add("--frames", type=int, least=1, help="pixel frames: of causal models, rounded up to whole "
        "chunks; or for weights without a run (default: as trained, or 81)")
    add("--chunks", type=cli.positive_ints, metavar="N,N,...", help="latent frames a chunk, for "
        "causal weights that do not say so, as Self-Forcing's 3,3,3,3,3,3,3 (default none)")
    add("--image", type=Path, help="the clip starts with this picture: an input of Wan2.1-I2V; of "
        "others the first chunk or, of a bidirectional model, latent frame (default none)")
    add("--video", type=Path, help="causal: go on from the chunks of this clip (default none)")
    add("--prompt-at", nargs=2, action="append", default=[], metavar=("M", "PROMPT"),
        help="causal: another prompt from chunk M = 0, 1, ... on; repeatable (default none)")
    add("--window", type=int, help="causal: past chunks kept, the full ones in any case; 0: all "
        "(default: as in training)")
    add("--stream", action="store_true", help="write and time chunk by chunk (default off)")
    add("--tiling", action="store_true", help="Wan's autoencoder works in overlapping tiles: less "
        "GPU memory, a little slower (default off)")
    add("--bf16", action=argparse.BooleanOptionalAction, default=None, help="weights in bf16, or "
        "with --no-bf16 in fp32 (default: bf16 for Wan's networks on a GPU)")
    add("--device", type=cli.choice(("auto", "cpu", "cuda")), default="auto", metavar="NAME",
        help="auto, cpu or cuda (default auto)")
    add("--out", type=Path, default=Path("clip.mp4"),
        help="a .mp4, .gif or .png file; several clips are numbered (default clip.mp4)")
    add("--vbench", action="store_true", help="clips PROMPT-0.mp4, ... in --out (default off)")
    add("--save-latents", type=Path, metavar="SHARDS", help="write shards to train on, in place of "
        "clips; also under torchrun, and the same command goes on (default none)")
    add("--sheet", type=Path, metavar="PNG", help="also a row of each clip's frames (default none)")
    args = parser.parse(argv)
    check(args)
    return args


def check(args) -> None:
    """Raises ValueError for what is wrong whatever the weights are."""
    if args.prompts and args.prompts.suffix == ".jsonl":
        raise ValueError(f"--prompts {args.prompts}: give a prompt a line, or a list as .json")
    if args.prompts and not args.prompts.is_file():
        raise ValueError(f"--prompts {args.prompts}: no such file")
    if not args.prompt and not args.prompts:
        raise ValueError('no prompt: give --prompt "..." or --prompts FILE')
    for pair in (("ckpt", "run_dir"), ("ckpt", "stage"), ("ckpt", "causal"), ("image", "video"),
                 ("save_latents", "sheet"), ("save_latents", "vbench"), ("stream", "save_latents"),
                 ("stream", "sheet"), ("stream", "vbench"), ("stream", "tiling"),
                 ("vbench", "sheet"), ("grid", "shift")):
        if all(getattr(args, name) for name in pair):
            names = (f"--{name.replace('_', '-')}" for name in pair)
            raise ValueError(f"{' and '.join(names)}: give one of them")
    for chunk, _ in args.prompt_at:
        if not chunk.isdecimal():
            raise ValueError(f"--prompt-at {chunk}: the chunk must be a number from 0 up")
    kinds = (".mp4", ".gif") if args.stream else (".mp4", ".gif", ".png")
    if not args.vbench and args.out.suffix not in kinds:
        raise ValueError(f"--out {args.out}: the name must end in {', '.join(kinds[:-1])} or "
                         f"{kinds[-1]}")
    if args.sheet and args.sheet.suffix != ".png":
        raise ValueError(f"--sheet {args.sheet}: the name must end in .png")
    for flag, path in (("--out", None if args.vbench else args.out), ("--sheet", args.sheet)):
        if path and path.is_dir():
            raise ValueError(f"{flag} {path}: is a folder; give the name of a file")
    if args.save_latents:
        cli.check_folder(args.save_latents, "--save-latents")
    else:
        cli.check_folder(args.out if args.vbench else args.out.parent, "--out")
    if args.sheet:
        cli.check_folder(args.sheet.parent, "--sheet")


if __name__ == "__main__":
    cli.run(parse_args)   # answers --help and wrong flags, before what takes seconds to import

import torch
from tqdm import tqdm

import data
import distributed
import encoders
import flowmap
import runs
import wan
from media import contact_sheet, to_pixels, write_clip, write_frames, write_picture
from pipeline import (
    Pipeline,
    chunks_for,
    generate,
    given_latents,
    latents,
    load_pipeline,
    read_picture,
    stream,
)

SHIPPED = Path(__file__).parent / "assets" / "toy"          # a run without checkpoints


def newest_stage(run: Path, causal: bool = False) -> Path:
    """The furthest finished stage of a run; causal: of the causal student's."""
    names = ["distill", "causal-distill", "flowmap", "causal-flowmap", "pretrain"]
    if causal:
        names = ["causal-distill", "causal-flowmap"]
    for name in names:
        if runs.finished(run / name):
            return run / name
    has_teacher = causal and runs.finished(run / "pretrain")
    form = "--causal --stage flowmap" if has_teacher else "--stage pretrain"
    raise ValueError(f"no finished stage in {run}. First run: python train.py {form} "
                     f"--run-dir {run}")


def default_run() -> Path:
    """The run of no --run-dir: the toy one or, until a stage of it is finished, what is shipped."""
    toy = Path("runs/toy-shapes")
    if not SHIPPED.is_dir() or any(map(runs.finished, toy.glob("*"))):
        return toy
    print(f"no run in {toy} yet: the models of {SHIPPED} are used")
    return SHIPPED


def read_grid(text: str) -> list[float]:
    try:
        times = [float(t) for t in text.split(",")]
    except ValueError:
        raise ValueError(f"--grid {text}: expected numbers with commas from 1 down to 0, such as "
                         f"1,0.6,0") from None
    flowmap.check_grid(times)
    return times


def sampling_options(args, pipeline: Pipeline, stage: Path) -> dict:
    """What pipeline.latents is told besides captions, seeds and grid. Raises ValueError for what
    these weights cannot do."""
    options = {"sampler": args.sampler, "window": args.window,
               "guidance": args.guidance or pipeline.default_guidance(args.sampler),
               "prompt_at": {int(chunk): prompt for chunk, prompt in args.prompt_at}}
    chunks = pipeline.chunks
    if args.frames and args.frames != pipeline.codec.frames(sum(chunks)):
        chunks = chunks_for(pipeline, args.frames)
        options["chunks"] = chunks
    late = [m for m in options["prompt_at"] if m >= len(chunks)]
    if late:
        raise ValueError(f"--prompt-at {late[0]}: the clip has {len(chunks)} chunks, counted from "
                         f"0; give more --frames")
    if pipeline.network.config.image_channels:
        if not args.image:
            raise ValueError(f"{stage} is an image-to-video network: give its first frame with "
                             f"--image")
        options["picture"] = read_picture(pipeline, args.image, sum(chunks))
    elif start := args.image or args.video:
        options["given"] = given_latents(pipeline, start, bool(args.image), chunks)
    return options


def chosen_stage(args) -> Path:
    if args.ckpt:
        return args.ckpt
    run = args.run_dir or default_run()
    if args.stage == "pretrain":
        return runs.teacher_of(run)
    if args.stage:
        return run / folder_of(args.stage, args.causal)
    return newest_stage(run, args.causal)


def main(argv=None) -> None:
    args = parse_args(argv)
    prompts = read_prompts(args)
    times = read_grid(args.grid) if args.grid else None
    stage = chosen_stage(args)
    captions = [prompt for prompt in prompts for _ in range(args.per_prompt)]
    seeds = list(range(args.seed, args.seed + len(captions)))
    if args.stream and len(captions) > 1:
        raise ValueError("--stream takes one prompt and one clip")
    world = distributed.start(args.device)
    if world.size > 1 and (args.stream or args.sheet):
        raise ValueError(f"--{'stream' if args.stream else 'sheet'} is for one process: leave "
                         f"torchrun out")
    if (args.height or args.width) and runs.finished(stage):
        raise ValueError(f"--height, --width: {stage} makes clips of the size that it was trained "
                         "with; leave them out")
    pipeline = load_pipeline(stage, world.device, args.base, args.frames or 81, args.height or 480,
                             args.width or 832, args.tiling, args.bf16, args.chunks)
    grid = times or flowmap.time_grid(args.steps, args.shift or pipeline.config["shift"])
    options = sampling_options(args, pipeline, stage)
    if args.stream:
        prepare(pipeline, captions, options)
        pieces = stream(pipeline, captions, seeds, grid, **options)
        stream_to(args.out, pieces, pipeline.fps)
    elif args.save_latents:
        save_latents(args, stage, world, pipeline, captions, seeds, grid, options)
    else:
        write_clips(args, stage, world, pipeline, captions, seeds, grid, options)


def prepare(pipeline: Pipeline, captions: list[str], options: dict) -> None:
    """Encode all prompts of the next clips in one go, see encoders.WanText."""
    null = [pipeline.null_prompt] if options["guidance"] != 1 else []
    pipeline.words.prepare([*null, *options["prompt_at"].values(), *captions])


def batches(rows: list[int], pipeline: Pipeline, captions: list[str], options: dict, quiet: bool):
    """Which of `rows` are made at a time, with a bar; prompts are encoded some of them ahead."""
    ahead = encoders.PROMPTS_AHEAD * pipeline.batch
    for first in tqdm(range(0, len(rows), pipeline.batch), desc="sample", disable=quiet):
        if first % ahead == 0:
            prepare(pipeline, [captions[i] for i in rows[first:first + ahead]], options)
        yield rows[first:first + pipeline.batch]


def clip_paths(args, captions: list[str]) -> list[Path]:
    if args.vbench:
        names = (caption.replace("/", " ") for caption in captions)        # as VBench names them
        paths = [args.out / f"{name}-{i % args.per_prompt}.mp4" for i, name in enumerate(names)]
        if long := [path.name for path in paths if len(os.fsencode(path.name)) > 200]:
            raise ValueError(f"--prompts: VBench names clips by their prompts, and {long[0][:50]!r}"
                             "... is too long for the name of a file; leave --vbench out")
        if twice := [path for path, count in Counter(paths).items() if count > 1]:
            raise ValueError(f"--prompts: two prompts would both be {twice[0].name}; leave one out")
        return paths
    if len(captions) == 1:
        return [args.out]
    return [args.out.with_stem(f"{args.out.stem}-{i:03d}") for i in range(len(captions))]


def write_clips(args, stage, world, pipeline, captions, seeds, grid, options: dict) -> None:
    """The clips of this process, less what an earlier run of this command made for VBench."""
    paths = clip_paths(args, captions)
    if args.vbench:
        args.out.mkdir(parents=True, exist_ok=True)
        now = made_by(args, stage, pipeline, captions, seeds, grid, options)
        out = args.out.resolve()                     # "." has no name
        beside = out.with_name(f"{out.name}.made_by.json")               # VBench opens all inside
        data.same_settings(beside, now, args.out, "*.mp4")
    todo = [i for i in range(world.rank, len(paths), world.size)
            if not (args.vbench and paths[i].exists())]
    quiet = len(todo) <= pipeline.batch or not world.is_main
    made = []
    for rows in batches(todo, pipeline, captions, options, quiet):
        clips = generate(pipeline, [captions[i] for i in rows], [seeds[i] for i in rows], grid,
                         **options)
        for i, clip in zip(rows, clips):
            write_clip(paths[i], clip, pipeline.fps)
            tqdm.write(f"{paths[i]}: {cli.one_line(captions[i], 200)} (seed {seeds[i]}, "
                       f"{len(grid) - 1} steps, {stage.name})")
        if args.sheet:
            made.append(clips)
    if made:
        sheet = torch.cat(made)                                  # (clips, T, 3, H, W)
        write_picture(args.sheet, to_pixels(contact_sheet(sheet), 128 * len(sheet)))
        print(args.sheet)


def made_by(args, stage, pipeline, captions, seeds, grid, options: dict) -> dict:
    """What the clips of a command depend on, to be kept beside them."""
    start = args.image or args.video
    return {"weights": str(stage.resolve()), "checksum": wan.fingerprint(stage),
            "start": data.checksum(start) if start else None, "prompt_at": args.prompt_at,
            "window": args.window, "grid": grid, "sampler": options["sampler"],
            "guidance": options["guidance"], "first_seed": seeds[0],
            "chunks": options.get("chunks", pipeline.chunks), "size": pipeline.latent_shape[1:],
            "prompts": f"checksum {zlib.crc32(json.dumps(captions).encode()):08x}"}


def read_prompts(args) -> list[str]:
    """Those of --prompt and then those of the file --prompts; ValueError if there are none."""
    captions, path = list(args.prompt), args.prompts
    if path:
        if path.suffix == ".json":
            captions += read_list(path)
        else:
            captions += filter(None, map(str.strip, cli.read_text(path).split("\n")))
    if not captions:
        raise ValueError(f"--prompts {path}: holds no prompt; write one a line")
    for prompt in captions + [prompt for _, prompt in args.prompt_at]:
        if not encoders.split_words(prompt):
            raise ValueError(f"prompt {prompt!r}: has no word")
    return captions


def read_list(path: Path) -> list[str]:
    rows = cli.read_json(path, list)
    prompts = [row.get("prompt_en") if isinstance(row, dict) else row for row in rows]
    for i, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise ValueError(f"--prompts {path}: expected a list of prompts, or of entries with "
                             f"prompt_en; number {i} is {rows[i - 1]!r}")
    return prompts


def save_latents(args, stage, world, pipeline, captions, seeds, grid, options: dict) -> None:
    """A teacher's clips as shards (data.ShardWriter): synthetic training data, as in the paper.
    Those of toys bring their encoders along."""
    found = made_by(args, stage, pipeline, captions, seeds, grid, options)
    found["fps"] = pipeline.fps
    own_codec = stage / runs.CODEC
    if own_codec.exists():
        found["vocabulary"] = pipeline.words.vocabulary
    writer = data.ShardWriter(args.save_latents, found, world.rank, world.size)
    if own_codec.exists() and world.is_main:
        with cli.written_aside(args.save_latents / runs.CODEC) as aside:
            shutil.copyfile(own_codec, aside)
    picture = zip(("image", "condition"), options.get("picture", ()))
    given = {name: x[0] for name, x in picture if x is not None}             # of all clips
    todo = [i for i in range(world.rank, len(captions), world.size)
            if f"{i:07d}" not in writer.done]
    for rows in batches(todo, pipeline, captions, options, not world.is_main):
        prompts = [captions[i] for i in rows]
        chunks = list(latents(pipeline, prompts, [seeds[i] for i in rows], grid, **options))
        for i, z, text in zip(rows, torch.cat(chunks, 1), pipeline.words(prompts)):
            clip = {"latents": z, "text": text, **given}
            rounded = {name: x.bfloat16() for name, x in clip.items()}
            writer.add(f"{i:07d}", captions[i], **rounded)
    writer.close(pipeline.words([pipeline.null_prompt])[0].bfloat16())
    print(f"{args.save_latents}: part {world.rank + 1} of {world.size}, {len(writer.done)} clips")


def stream_to(path: Path, pieces, fps: float) -> None:
    """Write chunks (1, T, 3, H, W) into one .mp4 or .gif as they come; print how fast they came."""
    write_frames(path, timed_frames(path, pieces), fps)


def timed_frames(path: Path, pieces):
    started, first, frames = time.time(), None, 0
    for piece in pieces:
        yield from to_pixels(piece[0])
        first = first or time.time() - started
        frames += piece.shape[1]
        print(f"\r{path}: {frames} frames", end="", flush=True)
    seconds = time.time() - started
    print(f"; first chunk after {first:.2f} s, {frames / seconds:.1f} frames a second")


if __name__ == "__main__":
    cli.run(main)
    distributed.stop()
