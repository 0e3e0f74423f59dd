"""The evidence: which runs there are, what each is trained with, and the claims that they decide.

A run is one stage, on top of another run's; a record, results/NAME.SEED.json, has its settings,
git revision, machine, seconds, figures at every step count, and its log, thinned. A record of
other settings than those below is stale. A claim is a rule on records, evaluated seed by seed.
reproduce.py makes the runs, and the tables.
"""
import statistics
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import cli
from config import CHANGEABLE, INHERITED, Config, folder_of, stage_before, with_recipe

SHARDS = "shards"            # of the clips that a run is trained on, in its folder
RESULTS, FOLDER = Path(__file__).parent / "results", Path("runs/reproduce")
COUNT = 480                  # clips that a model makes at each step count


@dataclass(frozen=True)
class Run:
    stage: str               # "": the run before it is measured again, with flags of eval.py
    after: str               # the run that it starts from
    flags: str               # of train.py, or else of eval.py
    samplers: tuple = ("euler",)
    steps: str = "1,2,4,8,16,32"
    seeds: int = 1000        # at most
    anew: bool = False       # with other clips: the one before is its --base, and no more
    made: str = ""           # flags of sample.py: these clips are made by the one before


BOTH = ("euler", "consistency")
TO_50 = "1,2,4,8,16,32,50"
# A flow map that goes on needs no warm-up.
ON_DIGITS = "--data digits --tangent-warmup 0"
# The frozen teacher's velocity in the forward loss. Its r = t error vanishes; the paper's balance,
# which is that error, would leave nothing to learn from where r < t.
TEACHER = "--velocity teacher --balance 0.1"
# Half of the updates, to save time, of what is only to be seen broken.
HALF = "--steps 495"
RUNS = {
    # The main line: guidance 1, where data, teacher and DMD aim at the same distribution.
    "teacher": Run("pretrain", "", "", steps=TO_50),
    "flowmap": Run("flowmap", "teacher", ""),
    "student": Run("distill", "flowmap", ""),
    # Consistency: r = 0 in training, in the rollout, in both.
    "consistency": Run("flowmap", "teacher", "--consistency-fraction 0.5", BOTH),
    "consistency-student": Run("distill", "consistency", "--rollout consistency", BOTH),
    "student-rollout": Run("distill", "flowmap", "--rollout consistency", BOTH),
    # One thing changed in the forward loss.
    "flowmap-weight-first": Run("flowmap", "teacher", "--weight-before-balance"),
    "flowmap-no-balance": Run("flowmap", "teacher", "--balance 1e6"),
    "flowmap-uniform": Run("flowmap", "teacher", "--time-weight uniform"),
    "flowmap-normal": Run("flowmap", "teacher", "--time-weight normal"),
    "flowmap-added": Run("flowmap", "teacher", "--time-embedding added"),
    "flowmap-jvp": Run("flowmap", "teacher", "--derivative jvp"),
    "flowmap-epsilon-0.0001": Run("flowmap", "teacher", "--epsilon 0.0001"),
    "flowmap-epsilon-0.02": Run("flowmap", "teacher", "--epsilon 0.02"),
    # The teacher's velocity, in both stages. Before the main line's settings were found with it:
    # the larger draw for r = t; no warm-up, at another rate; distilled in fewer, larger batches.
    "flowmap-teacher": Run("flowmap", "teacher", TEACHER),
    "student-teacher": Run("distill", "flowmap-teacher", ""),
    "flowmap-teacher-larger": Run("flowmap", "teacher", f"{TEACHER} --flow-times larger"),
    "flowmap-teacher-no-warmup": Run(
        "flowmap", "teacher", f"{TEACHER} --flow-times larger --tangent-warmup 0 --lr 1e-3"),
    "student-teacher-larger": Run(
        "distill", "flowmap-teacher-larger",
        "--steps 660 --batch-size 24 --lr 2e-4 --lr-end 0.3 --cotrain 8"),
    # Clips that the teacher made, 4800, in place of real ones.
    "flowmap-synthetic": Run("flowmap", "teacher", "", anew=True,
                             made="--steps 16 --per-prompt 100"),
    # One thing changed on policy.
    "student-no-cotraining": Run("distill", "flowmap", "--cotrain 0"),
    "student-fresh": Run("distill", "flowmap", "--fake-rollout fresh"),
    "student-few-steps": Run("distill", "flowmap", "--budgets 1,2,4"),
    "student-longer": Run("distill", "flowmap", "--steps 1980"),
    # Guidance: fused, or two calls a step; in DMD as well, or not.
    "guided-flowmap": Run("flowmap", "teacher", "--guidance 2"),
    "unfused-flowmap": Run("", "flowmap", "--guidance 2"),
    "guided-student": Run("distill", "guided-flowmap", ""),
    "guided-student-dmd-1": Run("distill", "guided-flowmap", "--real-guidance 1"),
    # Real images, and chunk by chunk.
    "digits-teacher": Run("pretrain", "", "--data digits", steps=TO_50),
    "digits-flowmap": Run("flowmap", "digits-teacher", ""),
    "digits-student": Run("distill", "digits-flowmap", ""),
    # The distilled student learns other clips by the forward loss, in the codec that it has, which
    # shows digits less well than their own does: real ones have psnr 30.5 and ed 0.018 in it.
    "student-on-digits": Run("flowmap", "student", ON_DIGITS, anew=True),
    "consistency-on-digits": Run("flowmap", "consistency-student",
                                 f"{ON_DIGITS} --consistency-fraction 0.5", BOTH, anew=True),
    "loop-teacher": Run("pretrain", "teacher", "--steps 2000 --lr 1e-3 --data loop --frames 16",
                        steps="4,32", anew=True),
    "causal-flowmap": Run("flowmap", "loop-teacher", "--causal", steps="1,4,32"),
    "causal-student": Run("distill", "causal-flowmap", "--causal", steps="1,4,32"),
    "causal-consistency": Run("flowmap", "loop-teacher", "--causal --consistency-fraction 0.5",
                              BOTH, "1,4,32"),
    # Broken on purpose: what their logs and clips look like.
    "broken-fake-score": Run("distill", "flowmap", f"{HALF} --fake-lr 1e-6", seeds=1),
    "broken-guidance": Run("distill", "flowmap", f"{HALF} --real-guidance 8", seeds=1),
    "broken-learning-rate": Run("distill", "flowmap", f"{HALF} --lr 0.01", seeds=1),
    "broken-average": Run("pretrain", "", "--steps 3000 --ema-decay 0.9999 --ema-start 0",
                          steps="8,32", seeds=1),
    "broken-text": Run("pretrain", "", "--steps 3000 --text-drop 0 --guidance 2", steps="8,32",
                       seeds=1),
    # Beside it: sampled without guidance, which asks no empty prompt; a healthy one, in both ways.
    "broken-text-unguided": Run("", "broken-text", "--guidance 1", steps="8,32", seeds=1),
    "healthy-text": Run("pretrain", "", "--steps 3000 --guidance 2", steps="8,32", seeds=1),
    "healthy-text-unguided": Run("", "healthy-text", "--guidance 1", steps="8,32", seeds=1),
}
TABLES = {
    "The main line, and consistency": ("teacher", "flowmap", "student", "consistency",
                                       "student-rollout", "consistency-student"),
    "The forward loss": [name for name in RUNS if name.startswith("flowmap")],
    "On policy": [name for name in RUNS if name.startswith("student") and "digits" not in name],
    "Guidance 2": [name for name in RUNS if name.startswith(("guided", "unfused"))],
    "Real images: digits": [name for name in RUNS if "digits" in name],
    "Chunk by chunk: loop, 16 frames": [name for name in RUNS
                                        if name.startswith(("loop", "causal"))],
    "Broken on purpose": [name for name in RUNS if name.startswith(("broken", "healthy"))],
}
FIGURE = ("teacher", "flowmap", "student", "consistency-student:consistency")
HEALTHY = ("teacher", "flowmap", "student",
           *(name for name in RUNS if name.startswith(("digits", "loop", "causal"))))
# Whose log and contact sheet are kept as pictures, of the first seed, for docs/runs.md.
SHOWN = ("teacher", "flowmap", "student", "student-no-cotraining",
         *(name for name in RUNS if name.startswith("broken") and RUNS[name].stage))

# Each rule is evaluated as it stands, seed by seed: ed, ed_teach and acc of a run at so many steps;
# sd, over the seeds, of ed if no other is named; best, the least ed; drift, the Frechet distance of
# the last chunk over that of the second.
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
    ("d", "with twice the updates it gains a quarter at 1 step",
     "ed('student-longer', 1) <= 0.75 * ed('flowmap', 1)"),
    ("d", "at 2", "ed('student-longer', 2) <= 0.75 * ed('flowmap', 2)"),
    ("d", "at 4", "ed('student-longer', 4) <= 0.75 * ed('flowmap', 4)"),
    ("d", "and does not lose at 32", "ed('student-longer', 32) <= ed('flowmap', 32)"),
    ("d", "measured to its teacher's clips, which DMD aims at, it gains a quarter at 1 step",
     "ed_teach('student', 1) <= 0.75 * ed_teach('flowmap', 1)"),
    ("d", "consistency rollouts from the same start lose at 32, with the sampler that made them",
     "ed('flowmap', 32) <= ed('student-rollout:consistency', 32)"),
    ("d", "and sampled as a flow map", "ed('flowmap', 32) <= ed('student-rollout', 32)"),
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
    ("b, causal", "4 steps are within 1.15 of the teacher, who sees whole clips, at 32",
     "ed('causal-student', 4) <= 1.15 * ed('loop-teacher', 32)"),
    ("c, causal", "flow-map training beats consistency training at 4 steps, each with its sampler",
     "ed('causal-flowmap', 4) <= ed('causal-consistency:consistency', 4)"),
    ("c, causal", "and at 32",
     "ed('causal-flowmap', 32) <= ed('causal-consistency:consistency', 32)"),
    ("d, causal", "on policy the flow map gains a quarter at 4 steps",
     "ed('causal-student', 4) <= 0.75 * ed('causal-flowmap', 4)"),
    ("d, causal", "and does not lose at 32",
     "ed('causal-student', 32) <= ed('causal-flowmap', 32)"),
    ("e", "on policy, clips of 4 steps drift less than the flow map's",
     "drift('causal-student', 4) <= drift('causal-flowmap', 4)"),
    ("f", "Beta(2, 1.5) is no worse at 4 steps than a uniform time weight",
     "ed('flowmap', 4) <= ed('flowmap-uniform', 4) + sd('flowmap', 4)"),
    ("f", "than a normal one", "ed('flowmap', 4) <= ed('flowmap-normal', 4) + sd('flowmap', 4)"),
    ("f", "with the teacher's velocity, either draw for r = t gains at 32 steps over the larger",
     "ed('flowmap-teacher', 32) <= ed('flowmap-teacher-larger', 32)"),
    ("f", "and with it the student, whose distill settings differ, too",
     "ed('student-teacher', 32) <= ed('student-teacher-larger', 32)"),
    ("g", "interpolated times are no worse at 4 steps than an added gap",
     "ed('flowmap', 4) <= ed('flowmap-added', 4) + sd('flowmap-added', 4)"),
    ("h", "the balance gains at 1 step", "ed('flowmap', 1) <= ed('flowmap-no-balance', 1)"),
    ("h", "the weight after it does", "ed('flowmap', 1) <= ed('flowmap-weight-first', 1)"),
    ("i", "the difference is no worse at 4 steps than the exact derivative",
     "ed('flowmap', 4) <= ed('flowmap-jvp', 4) + sd('flowmap-jvp', 4)"),
    ("i", "its width of 0.005 is no worse at 4 steps than one of 0.02",
     "ed('flowmap', 4) <= ed('flowmap-epsilon-0.02', 4) + sd('flowmap', 4)"),
    ("i", "than one of 0.0001",
     "ed('flowmap', 4) <= ed('flowmap-epsilon-0.0001', 4) + sd('flowmap', 4)"),
    ("j", "guidance fused: 4 steps are no farther from the guided teacher's fifty than the unfused "
     "flow map's, of two calls each",
     "ed_teach('guided-flowmap', 4) <= ed_teach('unfused-flowmap', 4) "
     "+ sd('unfused-flowmap', 4, 'ed_teach')"),
    ("j", "nor are 32", "ed_teach('guided-flowmap', 32) <= ed_teach('unfused-flowmap', 32) "
     "+ sd('unfused-flowmap', 32, 'ed_teach')"),
    ("j", "distilled, 4 steps are nearer to them with guidance in DMD, too, than without",
     "ed_teach('guided-student', 4) <= ed_teach('guided-student-dmd-1', 4)"),
    ("k", "the teacher's velocity gains at 1 step over the data's",
     "ed('flowmap-teacher', 1) <= ed('flowmap', 1)"),
    ("k", "at 4", "ed('flowmap-teacher', 4) <= ed('flowmap', 4)"),
    ("k", "and at 32", "ed('flowmap-teacher', 32) <= ed('flowmap', 32)"),
    ("k", "distilled from it and with it, the student gains at 1 step",
     "ed('student-teacher', 1) <= ed('student', 1)"),
    ("k", "at 4", "ed('student-teacher', 4) <= ed('student', 4)"),
    ("k", "and at 32", "ed('student-teacher', 32) <= ed('student', 32)"),
    ("k", "clips that the teacher made are no worse at 4 steps than real ones",
     "ed('flowmap-synthetic', 4) <= ed('flowmap', 4) + sd('flowmap', 4)"),
    ("k", "nor at 32", "ed('flowmap-synthetic', 32) <= ed('flowmap', 32) + sd('flowmap', 32)"),
    ("l", "co-training keeps the 32 steps", "ed('student', 32) <= "
     "ed('student-no-cotraining', 32)"),
    ("l", "long rollouts keep the 32 steps", "ed('student', 32) <= ed('student-few-steps', 32)"),
    ("l", "one rollout for student and fake score is no worse at 4 steps than a fresh one",
     "ed('student', 4) <= ed('student-fresh', 4) + sd('student', 4)"),
    ("n", "trained on with digits, the student's 32 steps are no worse than 4",
     "ed('student-on-digits', 32) <= ed('student-on-digits', 4) + sd('student-on-digits', 4)"),
    ("n", "the consistency student's 32 steps are 1.5 times worse than its best",
     "1.5 * best('consistency-on-digits:consistency') <= "
     "ed('consistency-on-digits:consistency', 32)"),
]


def lineage(name: str, own: bool = False) -> list[str]:
    """The runs that a run rests on, itself last. own: those whose stages lie in its folder."""
    run = RUNS[name]
    before = run.after and not (own and run.anew)
    return [*(lineage(run.after, own) if before else []), name]


def flags_of(name: str, seed: int) -> list[str]:
    run = RUNS[name]
    base = ["--base", str(place(run.after, seed) / stage_of(run.after))] if run.anew else []
    shards = ["--data", str(place(name, seed) / SHARDS)] if run.made else []
    return [*run.flags.split(), *base, *shards]


def stage_of(name: str) -> str:
    run = RUNS[name]
    return folder_of(run.stage, "--causal" in run.flags) if run.stage else stage_of(run.after)


def place(name: str, seed: int) -> Path:
    return FOLDER / f"seed-{seed}" / name


def said(run: Run) -> str:
    """Its flags of train.py, or of eval.py."""
    if not run.stage:
        return f"eval.py {run.flags}"
    base = f" --base {run.after}" if run.anew else ""
    made = f" --data {SHARDS}, made with {run.made}" if run.made else ""
    return f"--stage {run.stage} {run.flags}".strip() + base + made


@cache
def flag_parser() -> cli.Parser:
    parser = cli.Parser("", "")
    parser.add_config(Config)
    return parser


def settings(name: str, seed: int) -> list[dict]:
    """Those of each stage of the lineage, as config.parse_config would find them, and how the last
    one is measured."""
    found, last = [], RUNS[name]
    measured = {"count": COUNT, "sampled": last.steps, "samplers": list(last.samplers)}
    if not last.stage:
        measured["flags"] = last.flags
    for part in lineage(name):
        run = RUNS[part]
        if not run.stage:
            continue
        given = vars(flag_parser().parse(flags_of(part, seed)))
        given |= {"stage": run.stage, "seed": seed}
        before = () if run.anew else INHERITED.get(stage_before(run.stage), ())
        given = {key: found[-1][key] for key in before} | given
        causal = given.get("causal", False)
        told = asdict(Config()) | with_recipe(run.stage, Config.preset, causal, given)
        found.append({key: value for key, value in told.items()
                      if key in ("steps", "lr", "fake_lr") or key not in CHANGEABLE})
        found[-1] |= {"made": run.made} if run.made else {}
    return [*found, measured]


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


def records() -> dict[tuple[str, int], dict]:
    """{(name, seed): record}, of the settings of today."""
    files = [file.stem.rpartition(".") for file in sorted(RESULTS.glob("*.json"))]
    found = {(name, int(seed)): record_of(name, int(seed)) for name, _, seed in files
             if name in RUNS}
    return {key: record for key, record in found.items() if record}


def value(found: dict, seed: int, model: str, steps: int, metric: str = "ed") -> float:
    """Raises KeyError for what was not measured."""
    rows = found[model.partition(":")[0], seed]["rows"]
    row = next((row for row in rows if (row["model"], row["steps"]) == (model, steps)), {})
    return row[metric]


def seeds_of(found: dict, model: str) -> list[int]:
    return [seed for name, seed in found if name == model.partition(":")[0]]


def spread(found: dict, model: str, steps: int, metric: str = "ed") -> float:
    """Standard deviation over seeds; 0 of one."""
    values = [value(found, seed, model, steps, metric) for seed in seeds_of(found, model)]
    return statistics.stdev(values) if len(values) > 1 else 0.0


def judged(found: dict, rule: str) -> tuple[str, str]:
    """(verdict, both sides of each seed) of a rule 'left <= right'."""
    sides = []
    for seed in sorted({seed for _, seed in found}):
        ed = partial(value, found, seed)             # of (model, steps)
        def drift(model, steps, ed=ed):
            chunks = ed(model, steps, "fd_chunks")
            return chunks[-1] / chunks[1]
        names = {"ed": ed, "ed_teach": partial(ed, metric="ed_teach"),
                 "acc": partial(ed, metric="acc"), "sd": partial(spread, found), "drift": drift,
                 "best": lambda model, ed=ed: min(ed(model, n) for n in (1, 2, 4, 8, 16, 32))}
        try:
            sides.append([eval(side, names) for side in rule.split("<=")])
        except KeyError:
            continue                                 # not run with this seed
    right = sum(a <= b for a, b in sides)
    verdict = f"inconclusive at {len(sides)} seeds ({right} of {len(sides)})"
    if len(sides) >= 3 and right in (0, len(sides)):
        verdict = f"{'holds' if right else 'does not hold'} ({right} of {len(sides)} seeds)"
    return verdict if sides else "not run", ", ".join(f"{a:.3f} : {b:.3f}" for a, b in sides)


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
        if any(cells):
            lines.append(f"| {model} | {len(seeds)} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []
