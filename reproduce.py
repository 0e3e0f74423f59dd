"""The method's claims, with seeds: train what is missing, measure it, say which claims hold.

    python reproduce.py                  every run that has no record in results/, on all cores
    python reproduce.py --runs student --seeds 1
                                         one of them, with those that it starts from
    python reproduce.py tables           results/README.md anew: tables, figure, claims
    python reproduce.py compare RUN      a run's log.jsonl over those of the same stage in results/

Runs and claims are those of claims.py. A run whose record is stale is made again. Each run takes
one core, with the same bits however many go on beside it (--jobs). Stopped at any time, it goes on.
"""
import importlib.util
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import pairwise
from pathlib import Path

import claims
import cli
import config
from claims import place, record_of, records, settings, stage_of

HERE = Path(__file__).parent


def finished(name: str, seed: int) -> bool:
    """Whether later runs can start from it."""
    return begun(name, seed) and config.finished(place(name, seed) / stage_of(name))


def begun(name: str, seed: int) -> bool:
    """Whether its folder is of these settings of training."""
    told = place(name, seed) / "settings.json"
    return told.exists() and claims.alike(cli.read_json(told, list), settings(name, seed)[:-1])


def make(name: str, seed: int, device: str, before=None) -> dict:
    """Train a run, and measure it if it has no record; returns its record. before: the future of
    what it starts from. Raises ValueError when a script fails."""
    if before:
        before.result()
    run, folder, stage = claims.RUNS[name], place(name, seed), stage_of(name)
    if not begun(name, seed):
        shutil.rmtree(folder, ignore_errors=True)        # links, not what they point to
    with cli.written_aside(folder / "settings.json") as aside:
        aside.write_text(json.dumps(settings(name, seed)[:-1]))
    for earlier in claims.lineage(name, own=True)[:-1]:
        link = folder / stage_of(earlier)
        link.unlink(missing_ok=True)
        link.symlink_to(Path("..", earlier, stage_of(earlier)))
    if run.made and not finished(name, seed):
        make_clips(name, seed, device)
    if run.stage:
        script(folder, "train.py", "--stage", run.stage, "--run-dir", folder, "--seed", seed,
               "--device", device, *claims.flags_of(name, seed))
    if not finished(name, seed):
        raise ValueError(f"{folder}: training was stopped; the same command goes on")
    if record := record_of(name, seed):
        return record                                    # another run starts from it
    models = [stage if sampler == "euler" else f"{stage}:{sampler}" for sampler in run.samplers]
    script(folder, "eval.py", "--run-dir", folder, "--models", ",".join(models), "--steps",
           run.steps, "--count", claims.COUNT, "--device", device,
           *(["--data", real_data(name, seed)] if run.made else []),
           *([] if run.stage else run.flags.split()))
    record = recorded(name, seed, device)
    if name in claims.SHOWN and seed == 0:
        claims.RESULTS.mkdir(exist_ok=True)
        shutil.copy(folder / "eval" / f"{stage}.png", claims.RESULTS / f"{name}.png")
    with cli.written_aside(claims.RESULTS / f"{name}.{seed}.json") as aside:
        aside.write_text(json.dumps(record))
    return record


def real_data(name: str, seed: int) -> str:
    """The toy set that a run was trained on, or the run that made its clips."""
    before = claims.RUNS[name].after
    return real_data(before, seed) if claims.RUNS[name].made else settings(name, seed)[-2]["data"]


def make_clips(name: str, seed: int, device: str) -> None:
    """Shards of clips of every prompt, made by the run before, of no other seed's noise."""
    from toys import SETS  # imports torch
    run, folder = claims.RUNS[name], place(name, seed)
    prompts = SETS[real_data(name, seed)]().captions
    script(folder, "sample.py", "--run-dir", place(run.after, seed), "--stage",
           stage_of(run.after), "--seed", seed * 10**5, "--device", device, *run.made.split(),
           "--save-latents", folder / claims.SHARDS,
           *(word for prompt in prompts for word in ("--prompt", prompt)))


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
    log = folder / stage_of(name) / "log.jsonl"
    lines = log.read_text().splitlines() if claims.RUNS[name].stage else []    # nothing trained
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


def thinned(rows: list[dict]) -> list[dict]:
    """At most 60 rows, each the mean of its neighbours."""
    some = max(1, -(-len(rows) // 60))
    parts = [rows[i:i + some] for i in range(0, len(rows), some)]
    return [rounded({key: statistics.fmean(row[key] for row in part if key in row)
                     for key in keys_of(part)}) | {"step": part[-1]["step"]} for part in parts]


def keys_of(rows: list[dict]) -> list[str]:
    """All, in order: not every row of a log has every quantity."""
    return list(dict.fromkeys(key for row in rows for key in row))


def missing(names: list[str], seed: int) -> list[str]:
    """Runs to be made: without a record, and those that they start from, which come first."""
    found = []
    for name in reversed(claims.RUNS):
        needed = any(claims.RUNS[later].after == name for later in found)
        wanted = name in names and seed < claims.RUNS[name].seeds and not record_of(name, seed)
        if wanted or needed and not finished(name, seed):
            found.insert(0, name)
    return found


def run_all(names: list[str], seeds: list[int], jobs: int, device: str) -> None:
    """Make what is missing; a seed after the other of each run, so that jobs seldom wait."""
    from tqdm import tqdm
    by_seed = {seed: missing(names, seed) for seed in seeds}
    todo = [(name, seed) for name in claims.RUNS for seed in seeds if name in by_seed[seed]]
    futures, failed = {}, []
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(todo), desc="runs", unit="run") as bar:
        try:
            for name, seed in todo:
                before = futures.get((claims.RUNS[name].after, seed))
                futures[name, seed] = pool.submit(make, name, seed, device, before)
            for future in as_completed(futures.values()):
                error = future.exception()
                failed += [error] if error else []
                tqdm.write(str(error) if error else
                           "{name}, seed {seed}: {seconds} s of training".format(**future.result()))
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    if claims.RESULTS.exists():
        tables()
    if failed:
        first = failed[0]
        raise ValueError(f"{len(failed)} of {len(todo)} runs were not made: {first}") from first


# --- what the records say

def tables() -> None:
    import eval as evaluation
    found = records()
    if not found:
        raise ValueError(f"{claims.RESULTS} has no record of these settings: python reproduce.py")
    lines = ["# Results", "", "Made by `python reproduce.py tables` from the records beside it; "
             "not edited by hand.", ""]
    machines = {record["machine"] for record in found.values()}
    hours = sum(record["seconds"] for record in found.values()) / 3600
    lines += [f"{len(found)} runs, {hours:.1f} hours of training, each on one core or GPU of: "
              f"{'; '.join(sorted(machines))}. {claims.COUNT} clips at each step count. Mean ± "
              "standard deviation over seeds. ed is to real clips, ed_teach to the teacher's at 50 "
              "steps. `:consistency` is the consistency sampler.", ""]
    real = {real_data(*key): record["real"] for key, record in found.items()}
    lines += [f"Other real clips of `{data}`: ed {r['real_ed']:.3f} ± {r['real_ed_std']:.3f}, acc "
              f"{r['real_accuracy']['all']:.3f}, psnr {r['real_psnr']:.1f}.\n"
              for data, r in sorted(real.items())]
    rows = [row for record in found.values() for row in record["rows"]
            if row["model"] in claims.FIGURE]
    rows.sort(key=lambda row: claims.FIGURE.index(row["model"]))
    if rows:
        lines += ["![energy distance and prompt accuracy by step count](curve.png)", ""]
        if evaluation.draw_figure(claims.RESULTS / "curve.png", rows):
            draw_logs(found)
        else:
            print("no figures: they need matplotlib (pip install matplotlib)")
    lines += ["## Claims", "", "A rule is evaluated as it stands, seed by seed. A claim holds if "
              "it is true, and does not hold if it is false, in each of at least three seeds; "
              "anything else is inconclusive. `sd`: standard deviation over seeds, of ed if no "
              "other is named; `best`: the least ed; `drift`: Frechet distance of the last chunk "
              "over the second's.", "",
              "| | claim | rule | left : right, by seed | |", "|---|---|---|---|---|"]
    for letter, text, rule in claims.CLAIMS:
        verdict, sides = claims.judged(found, rule)
        lines.append(f"| {letter} | {text} | `{rule}` | {sides} | {verdict} |")
    for title, names in claims.TABLES.items():
        parts = [claims.table(found, names, *kind)
                 for kind in (("ed", 3), ("ed_teach", 3), ("acc", 3), ("psnr", 1))]
        if any(parts):
            lines += ["", f"## {title}", ""]
            lines += [line for part in parts for line in (*part, "")]
    lines += ["## Runs", "", "| run | starts from | flags | minutes |",
              "|---|---|---|---|"]
    for name, run in claims.RUNS.items():
        seeds = claims.seeds_of(found, name)
        minutes = [f"{found[name, seed]['seconds'] / 60:.0f}" for seed in seeds]
        lines.append(f"| {name} | {run.after} | `{claims.said(run)}` | "
                     f"{', '.join(minutes) or 'not run yet'} |")
    (claims.RESULTS / "README.md").write_text("\n".join(lines) + "\n")
    print(f"in {claims.RESULTS}: README.md, from {len(found)} records")


def compare(run: Path) -> None:
    """Draw each quantity of a run's logs over its range in the records of the same stage."""
    import runs  # here, as it imports torch
    if not importlib.util.find_spec("matplotlib"):
        raise ModuleNotFoundError("compare draws pictures: pip install matplotlib")
    found, logs = records(), sorted(run.glob("*/log.jsonl"))
    if not logs:
        raise ValueError(f"{run}: holds no log.jsonl of a stage; give the folder of a run, such as "
                         "runs/toy-shapes")
    for file in logs:
        told = file.parent / "config.json"
        data = cli.read_json(told).get("config", {}).get("data") if told.exists() else ""
        whole = [line for line in file.read_text().splitlines(keepends=True)
                 if runs.step_of(line) < math.inf]               # the last one may be cut short
        rows = thinned([json.loads(line) for line in whole])
        if not rows:
            raise ValueError(f"{file}: has no row yet; it gets one every --log-every updates")
        picture = run / f"compare-{file.parent.name}.png"
        draw_log(picture, str(file.parent), rows, healthy(found, file.parent.name, data))
        print(picture)


def healthy(found: dict, stage: str, data: str, but=None) -> list[list[dict]]:
    """Logs of healthy records of a stage, of the same clips where there are any. but: not this."""
    normal = [record for key, record in found.items() if key != but
              and key[0] in claims.HEALTHY and stage_of(key[0]) == stage]
    same = [record for record in normal if record["settings"][-2]["data"] == data]
    return [record["log"] for record in same or normal]


def draw_log(path: Path, title: str, rows: list[dict], normal: list[list[dict]]) -> None:
    """Each quantity of a log in red, over those of others in grey."""
    from matplotlib.figure import Figure
    keys = [key for key in keys_of(rows) if key not in ("step", "lr", "seconds", "skipped")]
    columns = min(5, len(keys))
    lines = math.ceil(len(keys) / columns)
    size = max(5, 2.2 * columns), 2.1 * lines
    figure = Figure(figsize=size)
    axes = figure.subplots(lines, columns, squeeze=False)
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


def draw_logs(found: dict) -> None:
    """Of the records that are shown as pictures."""
    for name in claims.SHOWN:
        if record := found.get((name, 0)):
            data = record["settings"][-2]["data"]
            normal = healthy(found, stage_of(name), data, but=(name, 0))
            draw_log(claims.RESULTS / f"{name}-log.png", name, record["log"], normal)


def parse(argv=None):
    parser = cli.Parser("The method's claims, with seeds.",
                        "python reproduce.py --runs student --seeds 1")
    add = parser.add_argument
    add("what", nargs="?", type=cli.choice(("run", "tables", "compare")), default="run",
        metavar="WHAT", help="run: what has no record, then tables; tables; compare (default run)")
    add("run", nargs="?", type=Path, metavar="RUN", help="compare: the folder of a run")
    add("--runs", nargs="+", type=cli.choice(tuple(claims.RUNS)), default=list(claims.RUNS),
        metavar="NAME",
        help=f"only these, and what they start from (default all): {', '.join(claims.RUNS)}")
    add("--seeds", type=int, least=1, default=3, help="seeds 0 to so many less one (default 3)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--jobs", type=int, least=1,
        help=f"runs at a time, a core each (default all cores, {cores} here; with cuda 1)")
    add("--device", type=cli.choice(("cpu", "cuda")), default="cpu", metavar="NAME",
        help="cpu or cuda, of which jobs share one (default cpu: the same bits on one machine)")
    args = parser.parse(argv)
    args.jobs = args.jobs or (1 if args.device == "cuda" else cores)
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
