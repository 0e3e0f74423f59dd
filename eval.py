"""The any-step curve: how good are a run's models at 1, 2, 4, 8, 16, 32 steps?

    python eval.py            every finished stage of runs/toy-shapes, and the consistency sampler

The evaluation set is fixed: every caption equally often, noise and clips that training never draws;
of a folder clips that it holds out, one in ten by name, drawn again and again from other first
frames (so that the floor is that of other moments of the same clips).

ed        energy distance to real clips, on the 64 main components of real pixels: that of other
          real clips is 0 on average, where every caption is as often, at least twice (--count);
          lower is better
ed_teach  the same to 50-step samples of the guided teacher, which is what distillation aims at: the
          first one among the models, or else that of the first one's run
fd        Frechet distance to real clips, on the same components
acc       share of clips in which every attribute of the caption is read back right
psnr      likeness (dB) of a clip to the nearest that the toy set could have drawn: realism
fd_chunks fd of each chunk's frames alone, for causal runs: a rise is drift (exposure bias)

With --length K a causal model makes clips of K times the trained length, and each stretch of the
trained length ("model #1", "model #2", ...) is measured as a clip.

Frechet distances depend on the number of samples: compare only at the same --count. The printed
floor is the distance of fresh real clips, its +- the noise to expect at that count.
"""
import argparse
import json
import textwrap
import time
from pathlib import Path

import cli
from config import SAMPLERS, record_of


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser("Measure models at several step counts: a table, a figure, contact sheets.",
                        "python eval.py --models distill,flowmap:consistency --steps 1,2,4")
    add = parser.add_argument
    add("--run-dir", type=Path, help="the run (default runs/toy-shapes; what is shipped, until it "
        "is there)")
    add("--models", metavar="M,M,...", help="stages of the run or folders of stages, each with an "
        "optional ':consistency' sampler (default: all finished, and flowmap:consistency)")
    add("--steps", type=cli.positive_ints, default=[1, 2, 4, 8, 16, 32], metavar="N,N,...",
        help="step counts (default 1,2,4,8,16,32)")
    add("--count", type=int, least=2, default=480,
        help="clips a model and step count (default 480)")
    add("--length", type=int, least=1, default=1,
        help="causal: clips of so many times the trained length (default 1)")
    add("--guidance", type=float, help="guidance scale of the teacher, and of flow maps that have "
        "none fused in (default: of the teacher that of the first flow map beside it, or its own; "
        "of flow maps 1)")
    add("--data", help="the clips, where they have moved, or real ones in place of shards "
        "(default: as in training)")
    add("--device", type=cli.choice(("auto", "cpu", "cuda")), default="auto", metavar="NAME",
        help="auto, cpu or cuda (default auto)")
    add("--out", type=Path, help="folder for the results (default: eval in the run, that of the "
        "first of --models where they are paths; runs/shipped of what is shipped)")
    return parser.parse(argv)


if __name__ == "__main__":
    cli.run(parse_args)   # answers --help and wrong flags, before what takes seconds to import

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
import distributed
import flowmap
import runs
from media import to_pixels, write_frames, write_picture
from pipeline import Pipeline, generate, load_pipeline
from sample import SHIPPED, default_run, newest_stage

HELD_OUT = 1_000_000         # no stage draws clips with seeds from here to 2 * 10^6
TEACHER_STEPS = 50
REFERENCE = 4096             # real clips that fix the feature space


class Frechet:
    """Frechet distance between sets of clips, in a feature space fixed by real clips."""

    def __init__(self, real: torch.Tensor, components: int = 64):
        self.mean = real.flatten(1).mean(0, dtype=torch.float64)             # (pixels,)
        some = real[:1024].flatten(1) - self.mean                # more would take a minute
        _, vectors = torch.linalg.eigh(some @ some.T)            # the largest last
        self.basis = torch.linalg.qr(some.T @ vectors[:, -components:])[0]   # (pixels, components)
        self.real = self.statistics(real)

    def features(self, clips: torch.Tensor) -> torch.Tensor:
        parts = clips.split(256)                                 # in fp64 a part at a time
        return torch.cat([(part.flatten(1) - self.mean) @ self.basis for part in parts])

    def statistics(self, clips: torch.Tensor):
        features = self.features(clips)
        return features.mean(0), features.T.cov()

    @staticmethod
    def distance(a, b) -> float:
        """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) for statistics (mean, covariance)."""
        (mean_a, cov_a), (mean_b, cov_b) = a, b
        values, vectors = torch.linalg.eigh(cov_a)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
        return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def mean_distance(x: torch.Tensor, kinds: int = 0) -> float:
    """Of two independent samples, from samples x (N, D). kinds > 0: row i is of kind i mod kinds,
    and two independent samples are of the same kind in one case of `kinds`."""
    rows = torch.arange(len(x)) % (kinds or len(x))
    same, distances = rows[:, None] == rows, torch.cdist(x, x)
    different = distances[~same].mean()
    if not len(x) > kinds > 0:                       # no two rows are of the same kind
        return different.item()
    alike = distances[same].sum() / (same.sum() - len(x))        # a row and itself are 0 apart
    return (different + (alike - different) / kinds).item()


def energy_distance(x: torch.Tensor, y: torch.Tensor, spread_x: float, spread_y: float,
                    paired: bool = False) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of samples (N, D) and (M, D), whose own mean distances
    are given: 0 when the distributions agree. Without bias, so that it may fall below 0. paired:
    row i of both has the same caption, drawn for it, and is left out of E|x - y|."""
    distances = torch.cdist(x, y)
    if paired:
        distances = distances[~torch.eye(len(x), dtype=torch.bool)]
    return 2 * distances.mean().item() - spread_x - spread_y


def psnr(clips: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio (B,) in dB of clips in [-1, 1]."""
    return 10 * torch.log10(4 / (clips - reference).square().flatten(1).mean(1).clamp(min=1e-10))


def accuracy(dataset, clips: torch.Tensor, captions: list[str]) -> dict[str, float]:
    """Share of clips with each attribute right, and with all of them right under the name 'all'."""
    truth, read = dataset.labels(captions), dataset.read(clips)
    right = {name: truth[name] == read[name] for name in truth}
    return {"all": torch.stack(list(right.values())).all(0).double().mean().item(),
            **{name: values.double().mean().item() for name, values in right.items()}}


def draw_figure(path: Path, rows: list[dict]) -> bool:
    """Distance and accuracy against steps, a line for each model, with the standard deviation over
    its rows of as many steps (of several seeds). False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    titles = {"ed": "energy distance to real clips", "acc": "prompt accuracy"}
    metrics = [key for key in titles if key in rows[0]]
    figure = Figure(figsize=(5.5 * len(metrics), 4))
    axes = figure.subplots(1, len(metrics), squeeze=False)
    for axis, key in zip(axes[0], metrics):
        for model in dict.fromkeys(row["model"] for row in rows):
            mine = [row for row in rows if row["model"] == model]
            steps = sorted({row["steps"] for row in mine})
            several = [[row[key] for row in mine if row["steps"] == n] for n in steps]
            axis.errorbar(steps, [np.mean(some) for some in several], marker="o", label=model,
                          yerr=[np.std(some, ddof=1) if len(some) > 1 else 0 for some in several])
        axis.set(xscale="log", xlabel="sampling steps", title=titles[key])
        ticks = sorted({row["steps"] for row in rows})
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        if key == "ed":
            axis.set(yscale="log")
    axes[0][0].legend()
    figure.tight_layout()
    with cli.written_aside(path) as aside:
        figure.savefig(aside, dpi=120)
    return True


class EvaluationSet:
    """Prompts, and real clips to compare with: whole, and chunk by chunk for causal models.

    lengths: pixel frames of each of their chunks, none for bidirectional models.
    """

    def __init__(self, dataset, count: int, lengths: list[int]):
        self.dataset, self.count, self.lengths = dataset, count, lengths
        self.prompts, self.chunk_spaces = None, []
        if dataset.attributes:
            self.prompts = [dataset.captions[i % len(dataset.captions)] for i in range(count)]
        reference = dataset.clips(range(REFERENCE), seed=HELD_OUT)[0]
        self.space = Frechet(reference)
        if lengths:
            self.chunk_spaces = [Frechet(part) for part in reference.split(lengths, 1)]
        self.captions = self.real_clips(1)[1]
        self.kinds = len(dataset.captions) if self.prompts else 0
        if self.kinds and (count % self.kinds or count == self.kinds):
            print(f"--count {count}: energy distances are biased unless every caption is as often, "
                  f"at least twice; give a multiple of {self.kinds}, from {2 * self.kinds} up")
        real = self.space.features(reference)
        self.real = real, mean_distance(real)
        self.teacher = None                                      # the same of its clips

    def real_clips(self, seed: int):
        return self.dataset.clips(range(self.count), seed=HELD_OUT + seed, captions=self.prompts)

    def summary(self, config: dict) -> dict:
        """What real clips score."""
        clips = [self.real_clips(seed)[0] for seed in range(1, 6)]
        summary = {"count": self.count, "config": config}
        floors = {"ed": [self.energy(some, self.real) for some in clips],
                  "fd": [self.distance(self.space, some) for some in clips]}
        for name, values in floors.items():
            std, mean = torch.std_mean(torch.tensor(values))
            summary |= {f"real_{name}": mean.item(), f"real_{name}_std": std.item()}
        if self.dataset.attributes:
            summary["real_accuracy"] = accuracy(self.dataset, clips[0], self.captions)
            summary["real_psnr"] = self.likeness(clips[0])
        return summary

    def distance(self, space: Frechet, clips: torch.Tensor) -> float:
        return space.distance(space.statistics(clips), space.real)

    def features(self, clips: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Of clips of the prompts in turn, with their mean distance."""
        features = self.space.features(clips)
        return features, mean_distance(features, self.kinds)

    def energy(self, clips: torch.Tensor, others, paired: bool = False) -> float:
        (x, spread), (y, spread_y) = self.features(clips), others
        return energy_distance(x, y, spread, spread_y, paired)

    def likeness(self, clips: torch.Tensor) -> float:
        return psnr(clips, self.dataset.nearest(clips)).mean().item()

    def scores(self, clips: torch.Tensor) -> dict:
        """Every metric of clips (count, T, 3, H, W) of these captions."""
        scores = {"ed": self.energy(clips, self.real)}
        if self.teacher:
            scores["ed_teach"] = self.energy(clips, self.teacher, paired=not self.kinds)
        scores["fd"] = self.distance(self.space, clips)
        if self.dataset.attributes:
            right = accuracy(self.dataset, clips, self.captions)
            scores |= {"acc": right.pop("all"), "psnr": self.likeness(clips), **right}
        if self.chunk_spaces:
            parts = zip(self.chunk_spaces, clips.split(self.lengths, 1))
            scores["fd_chunks"] = [self.distance(space, part) for space, part in parts]
        return scores


def parse_models(run: Path, text: str | None) -> list[tuple[str, Path, str]]:
    """'distill,flowmap:consistency,some/folder' -> [(label, stage folder, sampler)]."""
    others = ("flowmap", "distill", "causal-flowmap", "causal-distill")
    folders = {"pretrain": runs.teacher_of(run), **{name: run / name for name in others}}
    finished = [name for name, folder in folders.items() if runs.finished(folder)]
    if text is None:
        newest_stage(run)                                        # or the error that there is none
        # What is shipped holds a causal student of another set.
        first = folders[finished[0]]
        alike = [name for name in finished if not runs.other_clips(first, folders[name])]
        text = ",".join(alike) + (",flowmap:consistency" if "flowmap" in alike else "")
    models = []
    for word in text.split(","):
        name, _, sampler = word.rpartition(":")
        if not name or "/" in sampler:                           # a colon of the path, or none
            name, sampler = word, ""
        folder = folders.get(name, run / name)
        folder = folder if folder.exists() else Path(name)
        if not runs.finished(folder):
            raise ValueError(f"--models {word}: no finished stage in {folder}; finished in {run}: "
                             + (", ".join(finished) or "none"))
        if (sampler or "euler") not in SAMPLERS:
            near = cli.nearest(sampler, SAMPLERS)
            raise ValueError(f"--models {word}: sampler {sampler!r}{near}")
        models.append((word, folder, sampler or "euler"))
    return models


def main(argv=None) -> None:
    started = time.time()
    args = parse_args(argv)
    of_others = not args.run_dir and args.models and "/" in args.models
    run = args.run_dir or (Path("runs/toy-shapes") if of_others else default_run())
    models = parse_models(run, args.models)
    beside = models[0][1].parent if of_others else run
    shipped = beside.resolve() == SHIPPED.resolve()
    out = args.out or (Path("runs/shipped") if shipped else beside / "eval")
    cli.check_folder(out, "--out")
    first = models[0][1]
    records = [record_of(folder, "config", "data", "frames", "size") for _, folder, _ in models]
    config = records[0]["config"]
    for _, folder, _ in models[1:]:
        if difference := runs.other_clips(first, folder):
            raise ValueError(f"--models: {difference}; measure them one after the other")
    clips = args.data or config["data"]
    dataset = data.open_data(clips, config["frames"], config["size"], held_out=True)
    if isinstance(dataset, data.Shards):
        raise ValueError(f"{first} was trained on the shards {clips}, and latents are no clips to "
                         "compare with: give real ones with --data, or measure it with VBench "
                         "(sample.py --vbench)")
    held = records[0].get("set", {}).get("captions")
    if args.data and held and held != runs.short_sum(dataset.captions):
        raise ValueError(f"--data {clips}: its captions are not those that {first} was trained on")
    device = distributed.start(args.device).device
    pipelines = {folder: load_pipeline(folder, device) for _, folder, _ in models}
    teacher = teacher_pipeline(pipelines, device)
    if args.length > 1 and any(len(p.chunks) == 1 for p in pipelines.values()):
        raise ValueError(f"--length {args.length} is for causal models only")
    chunks = {p.chunks: folder for folder, p in pipelines.items() if len(p.chunks) > 1}
    if len(chunks) > 1:
        (some, a), (others, b) = list(chunks.items())[:2]
        raise ValueError(f"--models: {a} has chunks of {list(some)}, {b} of {list(others)}; "
                         "measure them one after the other")
    causal = [p for p in pipelines.values() if len(p.chunks) > 1]
    lengths = [causal[0].codec.frames(chunk) for chunk in causal[0].chunks] if causal else []
    evaluation = EvaluationSet(dataset, args.count, lengths)
    summary = evaluation.summary(config | {"data": clips}) | {"asked_guidance": args.guidance}
    rows, pictures = measure(evaluation, models, pipelines, teacher, args)
    table = to_table(rows, summary)
    print("\n" + table + "\n")
    out.mkdir(parents=True, exist_ok=True)
    data.write_text(out / "table.md", table + "\n")
    data.write_text(out / "results.json", json.dumps({**summary, "rows": rows}, indent=1))
    sheets = draw_sheets(out, pictures, args.steps, shown(evaluation.captions))
    written = ["table.md", "results.json", *sheets]
    if draw_figure(out / "curve.png", rows):
        written.append("curve.png")
    else:
        print("no figure: it needs matplotlib (pip install matplotlib)")
    print(f"in {out}: {', '.join(written)} ({time.time() - started:.0f} s)")


def teacher_pipeline(pipelines: dict[Path, Pipeline], device) -> Pipeline | None:
    """The first teacher among them, or that of the run of the first, if it knows the same clips."""
    for pipeline in pipelines.values():
        if not pipeline.network.config.second_time:
            return pipeline
    first = next(iter(pipelines))
    teacher = runs.teacher_of(first.parent)
    alike = runs.finished(teacher) and not runs.other_clips(teacher, first)
    return load_pipeline(teacher, device) if alike else None


def guidance_of(pipeline: Pipeline, sampler: str, asked: float | None, fused: list) -> float:
    """What is asked for, but of flow maps that have theirs built in. fused: what the flow maps
    beside have; a teacher has that of the first, as both aim at the same clips."""
    is_teacher = not pipeline.network.config.second_time
    if asked and (is_teacher or pipeline.config["guidance"] == 1):
        return asked
    if is_teacher and fused and sampler == "euler":
        return fused[0]
    return pipeline.default_guidance(sampler)


def sample(pipeline: Pipeline, sampler: str, steps: int, first_seed: int, captions, guidance, args):
    seeds = list(range(first_seed, first_seed + len(captions)))
    grid = flowmap.time_grid(steps, pipeline.config["shift"])
    chunks = pipeline.chunks * args.length if len(pipeline.chunks) > 1 else None
    return generate(pipeline, captions, seeds, grid, sampler, guidance, chunks=chunks)


def measure(evaluation: EvaluationSet, models, pipelines, teacher: Pipeline | None,
            args) -> tuple[list[dict], dict]:
    """Rows of the table, and some clips (N, T, 3, H, W) of each model at each step count."""
    dataset, captions, rows, pictures = evaluation.dataset, evaluation.captions, [], {}
    jobs = [(label, pipelines[folder], sampler, steps) for label, folder, sampler in models
            for steps in args.steps]
    total = sum(steps for _, _, _, steps in jobs) + (TEACHER_STEPS if teacher else 0)
    bar = tqdm(total=total, desc="eval    ", unit="step", mininterval=1.0, dynamic_ncols=True)
    fused = [p.config["guidance"] for _, p, _, _ in jobs if p.network.config.second_time]
    if teacher:
        seed = HELD_OUT + len(captions)
        guidance = guidance_of(teacher, "euler", args.guidance, fused)
        clips = sample(teacher, "euler", TEACHER_STEPS, seed, captions, guidance, args)
        evaluation.teacher = evaluation.features(clips)
        bar.update(TEACHER_STEPS)
    for label, pipeline, sampler, steps in jobs:
        guidance = guidance_of(pipeline, sampler, args.guidance, fused)
        clips = sample(pipeline, sampler, steps, HELD_OUT, captions, guidance, args)
        for i, stretch in enumerate(clips.split(dataset.frames, 1)):
            name = f"{label} #{i + 1}" if args.length > 1 else label
            rows.append({"model": name, "steps": steps, **evaluation.scores(stretch)})
        pictures.setdefault(label, []).append(shown(clips))
        bar.update(steps)
    bar.close()
    return rows, pictures


def to_table(rows: list[dict], summary: dict) -> str:
    columns = [key for key in rows[0] if key not in ("model", "steps")]
    lines = ["| model | steps | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        cells = " | ".join(to_cell(key, row[key]) for key in columns)
        lines.append(f"| {row['model']} | {row['steps']} | {cells} |")
    floor = ", ".join(f"{name} {to_cell(name, summary[f'real_{name}'])} +- "
                      f"{to_cell(name, summary[f'real_{name}_std'])}" for name in ("ed", "fd"))
    if "real_psnr" in summary:
        floor += f", acc {summary['real_accuracy']['all']:.3f}, psnr {summary['real_psnr']:.1f}"
    return "\n".join(lines) + f"\n\n{summary['count']} clips each; real clips: {floor}"


def to_cell(metric: str, value) -> str:
    if metric == "fd_chunks":
        return " ".join(f"{x:.1f}" for x in value)
    return f"{value:.1f}" if metric in ("fd", "psnr") else f"{value:.3f}"


def shown(rows):
    """Seven of the first 48 clips or captions, spread over the attributes."""
    return rows[:48:7]


def draw_sheets(out: Path, pictures: dict, steps: list[int], captions: list[str]) -> list[str]:
    """Contact sheets, named: of each model, and of all side by side with half of the prompts; the
    png shows the middle frame, the gif plays."""
    sheets = {label: {label: clips} for label, clips in pictures.items()}
    if len({clips[0].shape for clips in pictures.values()}) == 1 < len(pictures):
        sheets["compare"] = {label: [x[:4] for x in clips] for label, clips in pictures.items()}
    written = []
    for label, models in sheets.items():
        name = label.replace(":", "-").replace("/", "-")
        movie = labelled_sheet(models, steps, captions)
        write_picture(out / f"{name}.png", movie[len(movie) // 2])
        write_frames(out / f"{name}.gif", movie, fps=8)
        written += [f"{name}.png", f"{name}.gif"]
    return written


def labelled_sheet(models: dict, steps: list[int], captions: list[str], gap: int = 4) -> np.ndarray:
    """Frames (T, H, W, 3) of clips {model: [(prompts, T, 3, h, w) for each step count]}: a row for
    each step count; a block of columns for each model, of a column for each prompt."""
    grids = [to_pixels(torch.stack(clips), 64) for clips in models.values()]
    _, prompts, T, h, w, _ = grids[0].shape
    names = [textwrap.wrap(caption, w // 6) for caption in captions[:prompts]]
    left, top, wide = 36, 22 + 13 * max(map(len, names)), prompts * (w + gap) + 4 * gap
    page = Image.new("RGB", (left + len(grids) * wide, top + len(steps) * (h + gap)), "white")
    pen = ImageDraw.Draw(page)
    for row, count in enumerate(steps):
        pen.text((left - 6, top + row * (h + gap) + h // 2), str(count), "black", anchor="rm",
                 font_size=15)
    for block, model in enumerate(models):
        pen.text((left + block * wide, 2), f"{model}, by steps", "black", font_size=13)
        for column, name in enumerate(names):
            place = (left + block * wide + column * (w + gap), 19)
            pen.text(place, "\n".join(name), "#555", font_size=10, spacing=2)
    movie = np.repeat(np.asarray(page)[None], T, 0)
    for block, grid in enumerate(grids):
        for row, column in np.ndindex(len(steps), prompts):
            x, y = left + block * wide + column * (w + gap), top + row * (h + gap)
            movie[:, y:y + h, x:x + w] = grid[row, column]
    return movie


if __name__ == "__main__":
    cli.run(main)
    distributed.stop()
