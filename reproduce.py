"""The method's claims, with seeds: train what is missing, measure it, say which claims hold.

    python reproduce.py                  every run that has no record in results/, on all cores
    python reproduce.py --runs student --seeds 1
                                         one of them, with those that it starts from
    python reproduce.py tables           results/README.md anew: tables, figure, claims
    python reproduce.py compare RUN      a run's log.jsonl over those of the same stage in results/

A run is one stage, on top of another run's; a record, results/NAME.SEED.json, has its settings,
git revision, machine, seconds, figures at every step count, and its log, thinned. A record of
other settings than those below is stale, and its run is made again. Each run takes one core, with
the same bits however many go on beside it (--jobs). Stopped at any time, it goes on.
"""
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import cli
from config import CHANGEABLE, INHERITED, Config, folder_of, recipe, stage_before

HERE = Path(__file__).parent
RESULTS, FOLDER = HERE / "results", Path("runs/reproduce")
COUNT = 480                  # clips that a model makes at each step count


@dataclass(frozen=True)
class Run:
    stage: str
    after: str               # the run that it starts from
    flags: str               # of train.py
    samplers: tuple = ("euler",)
    steps: str = "1,2,4,8,16,32"
    seeds: int = 1000        # at most
    anew: bool = False       # with other clips: the one before is its --base, and no more


BOTH = ("euler", "consistency")
TEACHER, TO_50 = "--steps 12000 --guidance 1", "1,2,4,8,16,32,50"
FORWARD = "--steps 2200 --tangent-warmup 500 --lr 3e-4 --flow-times either"
TEACHERS = f"{FORWARD} --velocity teacher --balance 0.1"
DATA = f"{FORWARD} --velocity data --balance 0"
ON_DIGITS = "--data digits --guidance 1 --steps 2200 --lr 3e-4 --flow-times either"
DISTILL = "--steps 660 --real-guidance 1 --lr-end 0.3 --ema-decay 0.99"
RUNS = {
    # The main line: guidance 1, where data, teacher and DMD aim at the same distribution.
    "teacher": Run("pretrain", "", TEACHER, steps=TO_50),
    "flowmap": Run("flowmap", "teacher", TEACHERS),
    "student": Run("distill", "flowmap", DISTILL),
    # Consistency: r = 0 in training, in the rollout, in both.
    "consistency": Run("flowmap", "teacher", f"{TEACHERS} --consistency-fraction 0.5", BOTH),
    "consistency-student": Run("distill", "consistency", f"{DISTILL} --rollout consistency", BOTH),
    "student-rollout": Run("distill", "flowmap", f"{DISTILL} --rollout consistency", BOTH),
    # Before small t had their share of r = t rows; then without a warm-up, at the rate of before.
    "flowmap-larger": Run("flowmap", "teacher", f"{TEACHERS} --flow-times larger"),
    "flowmap-no-warmup": Run("flowmap", "teacher", f"{TEACHERS} --flow-times larger "
                             "--tangent-warmup 0 --lr 1e-3"),
    "student-larger": Run("distill", "flowmap-larger", DISTILL),
    # One thing changed in the forward loss. Rate and warm-up were chosen for the teacher's
    # velocity.
    "flowmap-data": Run("flowmap", "teacher", DATA),
    "flowmap-weight-first": Run("flowmap", "teacher", f"{DATA} --weight-before-balance"),
    "flowmap-no-balance": Run("flowmap", "teacher", f"{DATA} --balance 1e6"),
    "flowmap-balance-0.01": Run("flowmap", "teacher", f"{TEACHERS} --balance 0.01"),
    "flowmap-balance-1": Run("flowmap", "teacher", f"{TEACHERS} --balance 1"),
    "flowmap-uniform": Run("flowmap", "teacher", f"{TEACHERS} --time-weight uniform"),
    "flowmap-normal": Run("flowmap", "teacher", f"{TEACHERS} --time-weight normal"),
    "flowmap-added": Run("flowmap", "teacher", f"{TEACHERS} --time-embedding added"),
    "flowmap-jvp": Run("flowmap", "teacher", f"{TEACHERS} --derivative jvp"),
    "flowmap-epsilon-0.0001": Run("flowmap", "teacher", f"{TEACHERS} --epsilon 0.0001"),
    "flowmap-epsilon-0.02": Run("flowmap", "teacher", f"{TEACHERS} --epsilon 0.02"),
    # One thing changed on policy.
    "student-no-cotraining": Run("distill", "flowmap", f"{DISTILL} --cotrain 0"),
    "student-fresh": Run("distill", "flowmap", f"{DISTILL} --fake-rollout fresh"),
    "student-few-steps": Run("distill", "flowmap", f"{DISTILL} --budgets 1,2,4"),
    # Real images, and chunk by chunk.
    "digits-teacher": Run("pretrain", "", f"{TEACHER} --data digits", steps=TO_50),
    "digits-flowmap": Run("flowmap", "digits-teacher", TEACHERS),
    "digits-student": Run("distill", "digits-flowmap", DISTILL),
    # The distilled student learns other clips by the forward loss, in the same codec.
    "student-on-digits": Run("flowmap", "student", ON_DIGITS, anew=True),
    "consistency-on-digits": Run("flowmap", "consistency-student",
                                 f"{ON_DIGITS} --consistency-fraction 0.5", BOTH, anew=True),
    "loop-teacher": Run("pretrain", "", "--steps 6000 --guidance 1 --data loop --frames 16"),
    "causal-flowmap": Run("flowmap", "loop-teacher", "--causal"),
    "causal-student": Run("distill", "causal-flowmap", "--causal --real-guidance 1"),
    "causal-consistency": Run("flowmap", "loop-teacher", "--causal --consistency-fraction 0.5",
                              BOTH),
    # Broken on purpose: what their logs and clips look like.
    "broken-fake-score": Run("distill", "flowmap", f"{DISTILL} --fake-lr 1e-6", seeds=1),
    "broken-guidance": Run("distill", "flowmap", f"{DISTILL} --real-guidance 8", seeds=1),
    "broken-learning-rate": Run("distill", "flowmap", f"{DISTILL} --lr 0.01", seeds=1),
    "broken-average": Run("pretrain", "", "--steps 3000 --guidance 1 --ema-decay 0.9999 "
                          "--ema-start 0", steps="8,32", seeds=1),
    "broken-text": Run("pretrain", "", "--steps 3000 --text-drop 0", steps="8,32", seeds=1),
}
TABLES = {
    "The main line, and consistency": ("teacher", "flowmap", "student", "consistency",
                                       "student-rollout", "consistency-student"),
    "The forward loss": [name for name in RUNS if name.startswith("flowmap")],
    "On policy": [name for name in RUNS if name.startswith("student") and "digits" not in name],
    "Real images: digits": [name for name in RUNS if "digits" in name],
    "Chunk by chunk: loop, 16 frames": [name for name in RUNS
                                        if name.startswith(("loop", "causal"))],
    "Broken on purpose": [name for name in RUNS if name.startswith("broken")],
}
FIGURE = ("teacher", "flowmap", "student", "consistency-student:consistency")
# Whose log and contact sheet are kept as pictures, of the first seed (docs/runs.md).
SHOWN = ("teacher", "flowmap", "student", "student-no-cotraining",
         *(name for name in RUNS if name.startswith("broken")))

# Each rule is evaluated as it stands, seed by seed: ed and acc of a run at so many steps, sd that
# of ed over the seeds.
CLAIMS = [
    ("a", "any-step: 32 steps of the student are no worse than 4",
     "ed('student', 32) <= ed('student', 4) + sd('student', 4)"),
    ("a", "and better than 1", "ed('student', 32) <= ed('student', 1)"),
    ("a", "the consistency student's 32 steps are 1.5 times worse than its best",
     "1.5 * best('consistency-student:consistency') <= ed('consistency-student:consistency', 32)"),
    ("b", "few-step: 1 step is a quarter of the teacher's distance at 1",
     "ed('student', 1) <= ed('teacher', 1) / 4"),
    ("b", "4 steps are within 1.15 of the teacher at 50",
     "ed('student', 4) <= 1.15 * ed('teacher', 50)"),
    ("b", "32 steps within 1.05", "ed('student', 32) <= 1.05 * ed('teacher', 50)"),
    ("b", "accuracy at 4 steps within a point of the teacher's at 50",
     "acc('teacher', 50) - 0.01 <= acc('student', 4)"),
    ("c", "flow-map training beats consistency training at 4 steps, each with its sampler",
     "ed('flowmap', 4) <= ed('consistency:consistency', 4)"),
    ("c", "and at 32", "ed('flowmap', 32) <= ed('consistency:consistency', 32)"),
    ("c", "both sampled as flow maps, at 4", "ed('flowmap', 4) <= ed('consistency', 4)"),
    ("c", "and at 32", "ed('flowmap', 32) <= ed('consistency', 32)"),
    ("d", "on policy: the flow map gains a quarter at 1 step",
     "ed('student', 1) <= 0.75 * ed('flowmap', 1)"),
    ("d", "at 2", "ed('student', 2) <= 0.75 * ed('flowmap', 2)"),
    ("d", "at 4", "ed('student', 4) <= 0.75 * ed('flowmap', 4)"),
    ("d", "and does not lose at 32", "ed('student', 32) <= ed('flowmap', 32)"),
    ("d", "consistency rollouts from the same start lose at 32",
     "ed('flowmap', 32) <= ed('student-rollout', 32)"),
    ("a, digits", "32 steps of the student are no worse than 4",
     "ed('digits-student', 32) <= ed('digits-student', 4) + sd('digits-student', 4)"),
    ("b, digits", "4 steps are within 1.15 of the teacher at 50",
     "ed('digits-student', 4) <= 1.15 * ed('digits-teacher', 50)"),
    ("d, digits", "on policy the flow map gains a quarter at 2 steps",
     "ed('digits-student', 2) <= 0.75 * ed('digits-flowmap', 2)"),
    ("d, digits", "and does not lose at 32",
     "ed('digits-student', 32) <= ed('digits-flowmap', 32)"),
    ("a, causal", "32 steps of the student are no worse than 4",
     "ed('causal-student', 32) <= ed('causal-student', 4) + sd('causal-student', 4)"),
    ("c, causal", "flow-map training beats consistency training at 4 steps",
     "ed('causal-flowmap', 4) <= ed('causal-consistency:consistency', 4)"),
    ("c, causal", "and at 32",
     "ed('causal-flowmap', 32) <= ed('causal-consistency:consistency', 32)"),
    ("f", "Beta(2, 1.5) is no worse at 4 steps than a uniform time weight",
     "ed('flowmap', 4) <= ed('flowmap-uniform', 4) + sd('flowmap', 4)"),
    ("f", "than a normal one", "ed('flowmap', 4) <= ed('flowmap-normal', 4) + sd('flowmap', 4)"),
    ("g", "interpolated times are no worse at 4 steps than an added gap",
     "ed('flowmap', 4) <= ed('flowmap-added', 4) + sd('flowmap-added', 4)"),
    ("h", "the balance gains at 1 step, against the data", "ed('flowmap-data', 1) <= "
     "ed('flowmap-no-balance', 1)"),
    ("h", "the weight after it does", "ed('flowmap-data', 1) <= ed('flowmap-weight-first', 1)"),
    ("i", "the difference is no worse at 4 steps than the exact derivative",
     "ed('flowmap', 4) <= ed('flowmap-jvp', 4) + sd('flowmap-jvp', 4)"),
    ("k", "the teacher's velocity gains at 4 steps over the data's",
     "ed('flowmap', 4) <= ed('flowmap-data', 4)"),
    ("k", "and at 32", "ed('flowmap', 32) <= ed('flowmap-data', 32)"),
    ("l", "co-training keeps the 32 steps", "ed('student', 32) <= "
     "ed('student-no-cotraining', 32)"),
    ("l", "long rollouts keep the 32 steps", "ed('student', 32) <= ed('student-few-steps', 32)"),
]


def chain(name: str) -> list[str]:
    """The runs whose stages lie in a run's folder, itself last."""
    run = RUNS[name]
    return [*(chain(run.after) if run.after and not run.anew else []), name]


def flags_of(name: str, seed: int) -> list[str]:
    run = RUNS[name]
    base = ["--base", str(place(run.after, seed) / stage_of(run.after))] if run.anew else []
    return [*run.flags.split(), *base]


def settings(name: str, seed: int) -> list[dict]:
    """Those of each stage of the chain, as config.parse_config would find them, and how the last
    one is measured."""
    parser, found = cli.Parser("", ""), []
    parser.add_config(Config)
    for part in chain(name):
        run = RUNS[part]
        given = vars(parser.parse(flags_of(part, seed))) | {"stage": run.stage, "seed": seed}
        before = INHERITED.get(stage_before(run.stage), ()) if found else ()
        given = {key: found[-1][key] for key in before} | given
        causal = given.get("causal", False)
        told = asdict(Config()) | recipe(Config.preset, run.stage, causal) | given
        found.append({key: value for key, value in told.items()
                      if key in ("steps", "lr", "fake_lr") or key not in CHANGEABLE})
    run = RUNS[name]
    return [*found, {"count": COUNT, "sampled": run.steps, "samplers": list(run.samplers)}]


def alike(then: list[dict], now: list[dict]) -> bool:
    """Whether settings agree; one that is newer than `then` was at its default."""
    default = asdict(Config())
    return len(then) == len(now) and all(
        (default | old).get(key) == value for old, new in zip(then, now)
        for key, value in new.items())


def record_of(name: str, seed: int) -> dict:
    """What results/ has of a run; {} if nothing, or of other settings."""
    file = RESULTS / f"{name}.{seed}.json"
    record = cli.read_json(file) if file.exists() else {}
    return record if record and alike(record["settings"], settings(name, seed)) else {}


def place(name: str, seed: int) -> Path:
    return FOLDER / f"seed-{seed}" / name


def stage_of(name: str) -> str:
    return folder_of(RUNS[name].stage, "--causal" in RUNS[name].flags)


def finished(name: str, seed: int) -> bool:
    """Whether later runs can start from it."""
    return begun(name, seed) and (place(name, seed) / stage_of(name) / "model.safetensors").exists()


def begun(name: str, seed: int) -> bool:
    """Whether its folder is of these settings of training."""
    told = place(name, seed) / "settings.json"
    return told.exists() and alike(cli.read_json(told, list), settings(name, seed)[:-1])


def make(name: str, seed: int, device: str, before=None) -> dict:
    """Train a run, and measure it if it has no record; returns its record. before: the future of
    what it starts from. Raises ValueError when a script fails."""
    if before:
        before.result()
    run, folder, stage = RUNS[name], place(name, seed), stage_of(name)
    if not begun(name, seed):
        shutil.rmtree(folder, ignore_errors=True)        # links, not what they point to
    for earlier in chain(name)[:-1]:
        link = folder / stage_of(earlier)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(Path("..", earlier, stage_of(earlier)))
    with cli.written_aside(folder / "settings.json") as aside:
        aside.write_text(json.dumps(settings(name, seed)[:-1]))
    script(folder, "train.py", "--stage", run.stage, "--run-dir", folder, "--seed", seed,
           "--device", device, *flags_of(name, seed))
    if not finished(name, seed):
        raise ValueError(f"{folder}: training was stopped; the same command goes on")
    if record := record_of(name, seed):
        return record                                    # another run starts from it
    models = [stage if sampler == "euler" else f"{stage}:{sampler}" for sampler in run.samplers]
    script(folder, "eval.py", "--run-dir", folder, "--models", ",".join(models), "--steps",
           run.steps, "--count", COUNT, "--device", device)
    record = recorded(name, seed, device)
    with cli.written_aside(RESULTS / f"{name}.{seed}.json") as aside:
        aside.write_text(json.dumps(record))
    if name in SHOWN and seed == 0:
        shutil.copy(folder / "eval" / f"{stage}.png", RESULTS / f"{name}.png")
    return record


def script(folder: Path, *words) -> None:
    """Run one of the scripts on one core. Raises ValueError with the last line that it said."""
    log = folder / "output.txt"
    with open(log, "a") as file:
        done = subprocess.run([sys.executable, HERE / words[0], *map(str, words[1:])], stdout=file,
                              stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        last = log.read_text(errors="replace").split("\n")[-2:]
        raise ValueError(f"{folder}: {words[0]} failed, see {log}: {cli.one_line(' '.join(last))}")


def recorded(name: str, seed: int, device: str) -> dict:
    folder = place(name, seed)
    stage = cli.read_json(folder / stage_of(name) / "config.json")
    measured = cli.read_json(folder / "eval" / "results.json")
    lines = (folder / stage_of(name) / "log.jsonl").read_text().splitlines()
    rows = [rounded(json.loads(line)) for line in lines]
    times = [row["seconds"] for row in rows]             # of a resumed run, from its start on
    seconds = sum(b - a if b > a else b for a, b in pairwise([0, *times]))
    labels = {stage_of(name): name, f"{stage_of(name)}:consistency": f"{name}:consistency"}
    return {"name": name, "seed": seed, "settings": settings(name, seed), "git": stage["git"],
            "torch": stage["torch"], "machine": machine(device), "seconds": round(seconds),
            "real": {key: value for key, value in measured.items() if key.startswith("real_")},
            "rows": [{**rounded(row), "model": labels[row["model"]]} for row in measured["rows"]],
            "log": thinned(rows)}


def machine(device: str) -> str:
    """Of the CPU one core was used."""
    if device == "cuda":
        import torch
        return torch.cuda.get_device_name()
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def rounded(row: dict) -> dict:
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value
            for key, value in row.items()}


def thinned(rows: list[dict], most: int = 60) -> list[dict]:
    """At most so many rows, each the mean of its neighbours."""
    some = max(1, -(-len(rows) // most))
    parts = [rows[i:i + some] for i in range(0, len(rows), some)]
    return [rounded({key: statistics.fmean(row[key] for row in part if key in row)
                     for key in part[0]}) | {"step": part[-1]["step"]} for part in parts]


def missing(names: list[str], seed: int) -> list[str]:
    """Runs to be made: without a record, and those that they start from, which come first."""
    found = []
    for name in reversed(RUNS):
        needed = any(RUNS[later].after == name for later in found)
        wanted = name in names and seed < RUNS[name].seeds and not record_of(name, seed)
        if wanted or needed and not finished(name, seed):
            found.insert(0, name)
    return found


def run_all(names: list[str], seeds: list[int], jobs: int, device: str) -> None:
    """Make what is missing; a seed after the other of each run, so that jobs seldom wait."""
    from tqdm import tqdm
    by_seed = {seed: missing(names, seed) for seed in seeds}
    todo = [(name, seed) for name in RUNS for seed in seeds if name in by_seed[seed]]
    futures, failed = {}, []
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(todo), desc="runs", unit="run") as bar:
        try:
            for name, seed in todo:
                before = futures.get((RUNS[name].after, seed))
                futures[name, seed] = pool.submit(make, name, seed, device, before)
            for future in as_completed(futures.values()):
                error = future.exception()
                failed += [error] if error else []
                tqdm.write(str(error) if error else
                           "{name}, seed {seed}: {seconds} s of training".format(**future.result()))
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    if RESULTS.exists():
        tables()
    if failed:
        first = failed[0]
        raise ValueError(f"{len(failed)} of {len(todo)} runs were not made: {first}") from first


# --- what the records say

def records() -> dict[tuple[str, int], dict]:
    """{(name, seed): record}, of the settings of today."""
    files = [file.stem.rpartition(".") for file in sorted(RESULTS.glob("*.json"))]
    found = {(name, int(seed)): record_of(name, int(seed)) for name, _, seed in files
             if name in RUNS}
    return {key: record for key, record in found.items() if record}


def value(found: dict, seed: int, model: str, steps: int, metric: str) -> float:
    """Raises KeyError for what was not measured."""
    rows = found[model.partition(":")[0], seed]["rows"]
    values = [row[metric] for row in rows if (row["model"], row["steps"]) == (model, steps)]
    if not values:
        raise KeyError(model)
    return values[0]


def seeds_of(found: dict, model: str) -> list[int]:
    return [seed for name, seed in found if name == model.partition(":")[0]]


def judged(found: dict, rule: str) -> tuple[str, str]:
    """(verdict, both sides of each seed) of a rule 'left <= right'."""
    sides = []
    for seed in sorted({seed for _, seed in found}):
        def ed(model, steps, metric="ed", seed=seed):
            return value(found, seed, model, steps, metric)
        names = {"ed": ed, "acc": lambda model, steps: ed(model, steps, "acc"),
                 "sd": lambda model, steps: spread(found, model, steps),
                 "best": lambda model: min(ed(model, n) for n in (1, 2, 4, 8, 16, 32))}
        try:
            sides.append([eval(side, names) for side in rule.split("<=")])
        except KeyError:
            continue                                 # not run with this seed
    right = sum(a <= b for a, b in sides)
    verdict = f"inconclusive at {len(sides)} seeds ({right} of {len(sides)})"
    if len(sides) >= 3 and right in (0, len(sides)):
        verdict = f"{'holds' if right else 'does not hold'} ({right} of {len(sides)} seeds)"
    return verdict if sides else "not run", ", ".join(f"{a:.3f} : {b:.3f}" for a, b in sides)


def spread(found: dict, model: str, steps: int, metric: str = "ed") -> float:
    """Standard deviation over seeds; 0 of one."""
    values = [value(found, seed, model, steps, metric) for seed in seeds_of(found, model)]
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table(found: dict, names, metric: str, digits: int) -> list[str]:
    """Mean +- standard deviation over seeds, a row for each model and sampler."""
    counts = [1, 2, 4, 8, 16, 32, 50]
    lines = [f"| {metric} | seeds | {' | '.join(map(str, counts))} |", "|---" * 9 + "|"]
    models = [name if sampler == "euler" else f"{name}:{sampler}" for name in names
              for sampler in RUNS[name].samplers]
    for model in models:
        cells, seeds = [], seeds_of(found, model)
        for steps in counts if seeds else []:
            try:
                mean = statistics.fmean(value(found, seed, model, steps, metric) for seed in seeds)
            except KeyError:
                cells.append("")
                continue
            pm = f" ± {spread(found, model, steps, metric):.{digits}f}" * (len(seeds) > 1)
            cells.append(f"{mean:.{digits}f}{pm}")
        if seeds:
            lines.append(f"| {model} | {len(seeds)} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def tables() -> None:
    import eval as evaluation
    found = records()
    if not found:
        raise ValueError(f"{RESULTS} has no record of these settings: python reproduce.py")
    lines = ["# Results", "", "Made by `python reproduce.py tables` from the records beside it; "
             "not edited by hand.", ""]
    machines = {record["machine"] for record in found.values()}
    hours = sum(record["seconds"] for record in found.values()) / 3600
    lines += [f"{len(found)} runs, {hours:.1f} hours of training, each on one core or GPU of: "
              f"{'; '.join(sorted(machines))}. {COUNT} clips at each step count. Mean ± standard "
              "deviation over seeds. `:consistency` is the consistency sampler.", ""]
    real = {record["settings"][0]["data"]: record["real"] for record in found.values()}
    lines += [f"Other real clips of `{data}`: ed {r['real_ed']:.3f} ± {r['real_ed_std']:.3f}, acc "
              f"{r['real_accuracy']['all']:.3f}, psnr {r['real_psnr']:.1f}.\n"
              for data, r in sorted(real.items())]
    rows = [row for record in found.values() for row in record["rows"] if row["model"] in FIGURE]
    rows.sort(key=lambda row: FIGURE.index(row["model"]))
    if rows:
        lines += ["![energy distance and prompt accuracy by step count](curve.png)", ""]
        if evaluation.draw_figure(RESULTS / "curve.png", rows):
            draw_logs(found)
        else:
            print("no figures: they need matplotlib (pip install matplotlib)")
    lines += ["## Claims", "", "A rule is evaluated as it stands, seed by seed. It holds where it "
              "is true, and does not where it is false, in every one of three seeds or more.", "",
              "| | claim | rule | left : right, by seed | |", "|---|---|---|---|---|"]
    for letter, text, rule in CLAIMS:
        verdict, sides = judged(found, rule)
        lines.append(f"| {letter} | {text} | `{rule}` | {sides} | {verdict} |")
    for title, names in TABLES.items():
        parts = [table(found, names, *kind) for kind in (("ed", 3), ("acc", 3), ("psnr", 1))]
        if any(parts):
            lines += ["", f"## {title}", ""]
            lines += [line for part in parts for line in (*part, "")]
    lines += ["## Runs", "", "| run | starts from | flags of train.py | minutes |",
              "|---|---|---|---|"]
    for name, run in RUNS.items():
        minutes = [f"{found[name, seed]['seconds'] / 60:.0f}" for seed in seeds_of(found, name)]
        lines.append(f"| {name} | {run.after} | `--stage {run.stage} {run.flags}` | "
                     f"{', '.join(minutes) or 'not run yet'} |")
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")
    print(f"in {RESULTS}: README.md, from {len(found)} records")


def compare(run: Path) -> None:
    """Draw each quantity of a run's logs over its range in the records of the same stage."""
    logs = sorted(run.glob("*/log.jsonl"))
    if not logs:
        raise ValueError(f"{run}: holds no log.jsonl of a stage; give the folder of a run, such as "
                         "runs/toy-shapes")
    for file in logs:
        told = file.parent / "config.json"
        data = cli.read_json(told).get("config", {}).get("data") if told.exists() else ""
        rows = thinned([json.loads(line) for line in file.read_text().splitlines()])
        if not rows:
            raise ValueError(f"{file}: has no row yet; it gets one every --log-every updates")
        picture = run / f"compare-{file.parent.name}.png"
        draw_log(picture, str(file.parent), rows, healthy(records(), file.parent.name, data))
        print(picture)


def healthy(found: dict, stage: str, data: str) -> list[list[dict]]:
    """Logs of the records of a stage, of the same clips where there are any."""
    normal = [record for (name, _), record in found.items()
              if stage_of(name) == stage and not name.startswith("broken")]
    same = [record for record in normal if record["settings"][-2]["data"] == data]
    return [record["log"] for record in same or normal]


def draw_log(path: Path, title: str, rows: list[dict], normal: list[list[dict]]) -> None:
    """Each quantity of a log in red, over those of others in grey."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    keys = [key for key in rows[0] if key not in ("step", "lr", "seconds", "skipped")]
    lines = math.ceil(len(keys) / 5)
    figure, axes = plt.subplots(lines, 5, figsize=(11, 2.1 * lines))
    for axis in axes.flat[len(keys):]:
        axis.remove()
    for axis, key in zip(axes.flat, keys):
        for log, colour in (*((log, "#bbb") for log in normal), (rows, "C3")):
            axis.plot([row["step"] / log[-1]["step"] for row in log],
                      [row.get(key, math.nan) for row in log], color=colour, linewidth=1)
        axis.set_title(key, fontsize=9)
        axis.set_xlabel("share of the updates", fontsize=7)
        axis.set_yscale("log")
        axis.tick_params(which="both", labelsize=7)
    figure.suptitle(f"{title}, over {len(normal)} records in grey", fontsize=9)
    figure.tight_layout()
    with cli.written_aside(path) as aside:
        figure.savefig(aside, dpi=80)
    plt.close(figure)


def draw_logs(found: dict) -> None:
    """Of each record that docs/runs.md shows."""
    for name in SHOWN:
        if record := found.get((name, 0)):
            normal = healthy(found, stage_of(name), record["settings"][-2]["data"])
            draw_log(RESULTS / f"{name}-log.png", name, record["log"], normal)


def parse(argv=None):
    parser = cli.Parser("The method's claims, with seeds.",
                        "python reproduce.py --runs student --seeds 1")
    add = parser.add_argument
    add("what", nargs="?", type=cli.choice(("run", "tables", "compare")), default="run",
        metavar="WHAT", help="run: what has no record, then tables; tables; compare (default run)")
    add("run", nargs="?", type=Path, metavar="RUN", help="compare: the folder of a run")
    add("--runs", nargs="+", type=cli.choice(tuple(RUNS)), default=list(RUNS), metavar="NAME",
        help=f"only these, and what they start from (default all): {', '.join(RUNS)}")
    add("--seeds", type=int, least=1, default=3, help="seeds 0 to so many less one (default 3)")
    add("--jobs", type=int, least=1, default=os.cpu_count(),
        help=f"runs at a time, a core each (default all cores, {os.cpu_count()} here)")
    add("--device", type=cli.choice(("cpu", "cuda")), default="cpu", metavar="NAME",
        help="cpu or cuda, of which jobs share one (default cpu: the same bits on one machine)")
    args = parser.parse(argv)
    if (args.what == "compare") != bool(args.run):
        parser.error("compare takes the folder of a run, and nothing else does: python "
                     "reproduce.py compare runs/toy-shapes")
    return args


def main(argv=None) -> None:
    args = parse(argv)
    if args.what == "compare":
        return compare(args.run)
    if args.what == "run":
        return run_all(args.runs, list(range(args.seeds)), args.jobs, args.device)
    tables()


if __name__ == "__main__":
    cli.run(main)
