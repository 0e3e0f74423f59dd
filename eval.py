"""The any-step curve: how good are a run's models at 1, 2, 4, 8, 16, 32 steps?

    python eval.py                        every finished stage of runs/toy-shapes, and the consistency sampler

The evaluation set is fixed: every caption equally often, noise seeds and real clips that training never draws.

fd        Frechet distance to real clips, on the 64 main components of real pixels; lower is better
fd_teach  the same to the guided teacher's 50-step samples, which is what distillation aims at
acc       share of clips in which every attribute of the caption is read back right
psnr      likeness (dB) of a clip to the nearest clip that the toy set could have rendered: sharpness and realism
fd_chunks fd of each chunk's frames alone, for causal runs: a rise along the clip is drift (exposure bias)

With --length K a causal model makes clips of K times the trained length, and each stretch of the trained length ("model
#1", "model #2", ...) is measured as a clip.

Distances depend on the number of samples: compare only at the same --count. The printed floor is the distance of fresh
real clips, its +- the noise to expect at that count.
"""
import json
import time
from pathlib import Path

import imageio.v3 as iio
import torch
from tqdm import tqdm

import cli
import data
import distributed
import flowmap
from pipeline import SAMPLERS, generate, load_pipeline
from sample import contact_sheet, to_pixels

HELD_OUT = 1_000_000         # clip seeds from here on are never used in training
TEACHER_STEPS = 50


class Frechet:
    """Frechet distance between sets of clips, in a feature space fixed by real clips."""

    def __init__(self, real: torch.Tensor, components: int = 64):
        pixels = real.flatten(1).double()                                           # (B, pixels)
        self.mean = pixels.mean(0)
        _, _, basis = torch.linalg.svd(pixels[:1024] - self.mean, full_matrices=False)     # more would take a minute
        self.basis = basis[:components].T                                           # (pixels, components)

    def statistics(self, clips: torch.Tensor):
        features = (clips.flatten(1).double() - self.mean) @ self.basis
        return features.mean(0), features.T.cov()

    @staticmethod
    def distance(a, b) -> float:
        """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) for statistics (mean, covariance)."""
        (mean_a, cov_a), (mean_b, cov_b) = a, b
        values, vectors = torch.linalg.eigh(cov_a)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
        return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def psnr(clips: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio (B,) in dB of clips in [-1, 1]."""
    return 10 * torch.log10(4 / (clips - reference).square().flatten(1).mean(1).clamp(min=1e-10))


def accuracy(dataset, clips: torch.Tensor, captions: list[str]) -> dict[str, float]:
    """Share of clips with each attribute right, and with all of them right under the name 'all'."""
    truth, read = dataset.labels(captions), dataset.read(clips)
    right = {name: truth[name] == read[name] for name in truth}
    return {"all": torch.stack(list(right.values())).all(0).double().mean().item(),
            **{name: values.double().mean().item() for name, values in right.items()}}


def draw_figure(path: Path, rows: list[dict], floor: float) -> bool:
    """Distance and accuracy against steps, one line a model. False when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    metrics = [("fd", "Frechet distance to real clips"), ("acc", "prompt accuracy")]
    metrics = [(key, title) for key, title in metrics if key in rows[0]]
    figure, axes = plt.subplots(1, len(metrics), figsize=(5.5 * len(metrics), 4), squeeze=False)
    for axis, (key, title) in zip(axes[0], metrics):
        for model in dict.fromkeys(row["model"] for row in rows):
            line = [(row["steps"], row[key]) for row in rows if row["model"] == model]
            axis.plot(*zip(*line), marker="o", label=model)
        axis.set(xscale="log", xlabel="sampling steps", title=title)
        ticks = sorted({row["steps"] for row in rows})
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        if key == "fd":
            axis.set(yscale="log")
            axis.axhline(floor, color="grey", linestyle=":", label="real clips")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def parse_models(run: Path, text: str | None, parser) -> list[tuple[str, Path, str]]:
    """'distill,flowmap:consistency,some/folder' -> [(label, stage folder, sampler)]."""
    if text is None:
        text = ",".join(name for name in ("pretrain", "flowmap", "distill") if (run / name / "model.safetensors").exists())
        text += ",flowmap:consistency" if "flowmap" in text else ""
        if not text:
            parser.error(f"no finished stage in {run}. First run: python train.py --stage pretrain --run-dir {run}")
    models = []
    for word in text.split(","):
        name, _, sampler = word.partition(":")
        folder = run / name if (run / name).exists() else Path(name)
        if not (folder / "model.safetensors").exists():
            parser.error(f"--models {word}: no finished stage in {folder}; finished in {run}: "
                         + (", ".join(file.parent.name for file in sorted(run.glob("*/model.safetensors"))) or "none"))
        if (sampler or "euler") not in SAMPLERS:
            parser.error(f"--models {word}: sampler {sampler!r}{cli.nearest(sampler, SAMPLERS)}")
        models.append((word, folder, sampler or "euler"))
    return models


def main(argv=None) -> None:
    parser = cli.Parser("Measure models at several step counts; write a table, a figure and contact sheets.",
                        "python eval.py --models distill,flowmap:consistency --steps 1,2,4")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/toy-shapes"), help="the run (default runs/toy-shapes)")
    parser.add_argument("--models", metavar="M,M,...", help="stages of the run or folders of stages, each with an optional "
                        "':consistency' sampler (default: all finished stages, and flowmap:consistency)")
    parser.add_argument("--steps", type=cli.positive_ints, default=[1, 2, 4, 8, 16, 32], metavar="N,N,...",
                        help="step counts (default 1,2,4,8,16,32)")
    parser.add_argument("--count", type=int, default=480, help="clips a model and step count (default 480)")
    parser.add_argument("--length", type=int, default=1, help="causal: clips of so many times the trained length (default 1)")
    parser.add_argument("--guidance", type=float, help="the teacher's guidance scale (default: the one fused into the "
                        "flow map)")
    parser.add_argument("--device", type=cli.choice(("auto", "cpu", "cuda")), default="auto", metavar="NAME",
                        help="auto, cpu or cuda (default auto)")
    parser.add_argument("--out", type=Path, help="folder for the results (default RUN_DIR/eval)")
    args = parser.parse(argv)
    if args.count < 2:
        parser.error(f"--count {args.count}: must be at least 2")
    if args.length < 1:
        parser.error(f"--length {args.length}: must be at least 1")
    models, out, started = parse_models(args.run_dir, args.models, parser), args.out or args.run_dir / "eval", time.time()
    cli.check_folder(out, "--out")
    try:
        world = distributed.start(args.device)
        pipelines = {folder: load_pipeline(folder, world.device) for _, folder, _ in models}
        config = next(iter(pipelines.values())).config
        if args.length > 1 and any(len(p.chunks) == 1 for p in pipelines.values()):
            raise ValueError(f"--length {args.length} is for causal models only")
        dataset = data.open_data(config["data"], config["frames"], config["size"])
    except ValueError as error:
        parser.error(str(error))

    # The evaluation set, its feature space, and what real clips score.
    prompts = [dataset.captions[i % len(dataset.captions)] for i in range(args.count)] if dataset.attributes else None
    def real_clips(seed):
        return dataset.clips(range(args.count), seed=HELD_OUT + seed, captions=prompts)
    reference = dataset.clips(range(4096), seed=HELD_OUT)[0]
    frechet = Frechet(reference)
    target = frechet.statistics(reference)
    # Pixel frames of each chunk of the first causal model; none if all are bidirectional.
    causal = next((p for p in pipelines.values() if len(p.chunks) > 1), None)
    lengths = [causal.codec.frames(frames) for frames in causal.chunks] if causal else []
    chunk_spaces = [(space := Frechet(part), space.statistics(part)) for part in (reference.split(lengths, 1) if lengths else [])]
    real, captions = real_clips(1)
    floors = torch.tensor([Frechet.distance(frechet.statistics(real_clips(seed)[0]), target) for seed in range(1, 6)])
    summary = {"count": args.count, "floor": floors.mean().item(), "floor_std": floors.std().item(), "config": config}
    if dataset.attributes:
        summary["real_accuracy"] = accuracy(dataset, real, captions)
        summary["real_psnr"] = psnr(real, dataset.nearest(real)).mean().item()

    def sample(pipeline, sampler, steps, first_seed):
        teacher = not pipeline.network.config.second_time
        guidance = (args.guidance or pipeline.config["guidance"]) if teacher else 1.0
        seeds = list(range(first_seed, first_seed + args.count))
        options = {"chunks": pipeline.chunks * args.length} if args.length > 1 else {}
        grid = flowmap.time_grid(steps, pipeline.config["shift"])
        return generate(pipeline, captions, seeds, grid, sampler, guidance, **options)

    teacher = next((p for p in pipelines.values() if not p.network.config.second_time), None)
    calls = sum(args.steps) * sum(2 - p.network.config.second_time for p in (pipelines[f] for _, f, _ in models))
    bar = tqdm(total=args.length * (calls + (2 * TEACHER_STEPS if teacher else 0)), desc="eval    ", unit="call", mininterval=1.0,
               dynamic_ncols=True)
    if teacher:
        longer = sample(teacher, "euler", TEACHER_STEPS, HELD_OUT + args.count)
        teacher_target = frechet.statistics(longer[:, :config["frames"]])
        bar.update(args.length * 2 * TEACHER_STEPS)

    rows, pictures = [], {}
    for label, folder, sampler in models:
        for steps in args.steps:
            clips = sample(pipelines[folder], sampler, steps, HELD_OUT)
            for i, piece in enumerate(clips.split(config["frames"], 1)):
                statistics = frechet.statistics(piece)
                row = {"model": label + f" #{i + 1}" * (args.length > 1), "steps": steps,
                       "fd": Frechet.distance(statistics, target)}
                if teacher:
                    row["fd_teach"] = Frechet.distance(statistics, teacher_target)
                if dataset.attributes:
                    right = accuracy(dataset, piece, captions)
                    row |= {"acc": right.pop("all"), "psnr": psnr(piece, dataset.nearest(piece)).mean().item(), **right}
                if causal:
                    row["fd_chunks"] = [Frechet.distance(space.statistics(part), real) for part, (space, real) in
                                        zip(piece.split(lengths, 1), chunk_spaces)]
                rows.append(row)
            pictures.setdefault(label, []).append(clips[:: len(dataset.captions) // 8 + 1][:8])
            bar.update(args.length * steps * (2 - pipelines[folder].network.config.second_time))
    bar.close()

    columns = [key for key in rows[0] if key not in ("model", "steps")]
    lines = ["| model | steps | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    def cell(key, value):
        return " ".join(f"{x:.1f}" for x in value) if key == "fd_chunks" else f"{value:.{1 if key in ('fd', 'fd_teach', 'psnr') else 3}f}"
    lines += [f"| {row['model']} | {row['steps']} | " + " | ".join(cell(key, row[key]) for key in columns) + " |" for row in rows]
    table = "\n".join(lines) + (f"\n\n{args.count} clips each; real clips: fd {summary['floor']:.1f} +- "
                                f"{summary['floor_std']:.1f}")
    if dataset.attributes:
        table += f", acc {summary['real_accuracy']['all']:.3f}, psnr {summary['real_psnr']:.1f}"
    print("\n" + table + "\n")
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(table + "\n")
    (out / "results.json").write_text(json.dumps({**summary, "rows": rows}, indent=1))
    written = ["table.md", "results.json"]
    # Rows of a sheet are step counts, columns are prompts; the png shows the middle frame, the gif plays.
    for label, grids in pictures.items():
        name = label.replace(":", "-").replace("/", "-")
        grid = torch.stack(grids)                                                    # (steps, prompts, T, 3, H, W)
        frames = [contact_sheet(grid[:, :, i]) for i in range(grid.shape[2])]
        side = 4 * grid.shape[-2]
        iio.imwrite(out / f"{name}.png", to_pixels(frames[len(frames) // 2], side * len(grids)))
        iio.imwrite(out / f"{name}.gif", to_pixels(torch.stack(frames), side * len(grids)), duration=125, loop=0)
        written += [f"{name}.png", f"{name}.gif"]
    if draw_figure(out / "curve.png", rows, summary["floor"]):
        written.append("curve.png")
    else:
        print("no figure: it needs matplotlib (pip install matplotlib)")
    print(f"in {out}: {', '.join(written)} ({time.time() - started:.0f} s)")


if __name__ == "__main__":
    cli.run(main)
