"""claims.py and reproduce.py: what is run, what is recorded, which claims hold."""
import importlib.util
import json
import shutil
import time
from dataclasses import replace
from itertools import product
from zlib import crc32

import pytest

import claims
import eval as evaluation
import reproduce
import sample
import train
from claims import RUNS, Run
from config import INHERITED, folder_of, parse_config, stage_before


def rows(model, **figures):
    """Rows of a record: ed at so many steps, by name s1, s4, ..."""
    return [{"model": model, "steps": int(name[1:]), "ed": ed, "acc": 1 - ed}
            for name, ed in figures.items()]


def test_seconds_of_a_run_that_was_stopped_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "FOLDER", tmp_path)
    stage, measured = (tmp_path / "seed-0" / "teacher" / name for name in ("pretrain", "eval"))
    for folder in (stage, measured):
        folder.mkdir(parents=True)
    (stage / "config.json").write_text('{"git": "g", "torch": "t"}')
    (measured / "results.json").write_text('{"rows": []}')
    log = [{"step": i, "seconds": s} for i, s in enumerate((10.0, 20.0, 5.0, 9.0))]
    (stage / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    assert reproduce.recorded("teacher", 0, "cpu")["seconds"] == 29


def test_a_rule_is_judged_seed_by_seed():
    found = {("student", seed): {"rows": rows("student", s4=4 + seed, s32=ed)}
             for seed, ed in enumerate((4.5, 5.5, 6.5))}
    plain, spread = "ed('student', 32) <= ed('student', 4)", " + sd('student', 4)"
    assert claims.judged(found, plain)[0] == "does not hold (0 of 3 seeds)"
    assert claims.judged(found, plain + spread)[0] == "holds (3 of 3 seeds)"
    assert claims.judged(found, plain + spread)[1] == "4.500 : 5.000, 5.500 : 6.000, " \
                                                         "6.500 : 7.000"
    found["student", 2]["rows"][1]["ed"] = 5.0
    assert claims.judged(found, plain)[0] == "inconclusive at 3 seeds (1 of 3)"
    assert claims.judged(found, "acc('student', 4) <= 0")[0] == "holds (3 of 3 seeds)"
    found["student", 0]["rows"][0]["fd_chunks"] = [9.0, 2.0, 8.0, 3.0]
    assert claims.judged(found, "drift('student', 4) <= 1")[1] == "1.500 : 1.000"
    del found["student", 0]
    assert claims.judged(found, plain + spread)[0] == "inconclusive at 2 seeds (2 of 2)"
    assert claims.judged(found, "ed('student', 32) <= ed('teacher', 50)") == ("not run", "")
    assert claims.judged(found, "ed('student', 8) <= 1")[0] == "not run"
    assert claims.judged(found, "best('student') <= 4")[0] == "not run"    # of all step counts


@pytest.mark.parametrize("name", RUNS)
def test_settings_are_those_that_training_takes(name, tmp_path):
    """Also what a stage takes over from the one before, if it does."""
    stages, before = claims.settings(name, 7)[:-1], {}
    trained = [part for part in claims.lineage(name) if RUNS[part].stage]
    for part, told in zip(trained, stages, strict=True):
        run = RUNS[part]
        folder = tmp_path / part / (folder_of(stage_before(run.stage), told["causal"]) or "none")
        folder.mkdir(parents=True)
        if before and not run.anew:
            handed = {key: before[key] for key in INHERITED[stage_before(run.stage)]}
            (folder / "config.json").write_text(json.dumps({"config": handed}))
        c = parse_config(["--stage", run.stage, "--run-dir", str(tmp_path / part), "--seed", "7",
                          *claims.flags_of(part, 7)])
        assert told.pop("made", "") == run.made
        assert told == {key: getattr(c, key) for key in told}
        before = told


def test_a_record_of_other_settings_is_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    monkeypatch.setattr(claims, "FOLDER", tmp_path / "runs")
    told = claims.settings("flowmap", 0)
    del told[1]["derivative"]                            # newer than the record: at its default
    file = tmp_path / "flowmap.0.json"
    file.write_text(json.dumps({"settings": told}))
    assert claims.record_of("flowmap", 0)
    assert reproduce.missing(["flowmap"], 0) == []
    assert reproduce.missing(["student"], 0) == ["teacher", "flowmap", "student"]  # its start
    assert reproduce.missing(["flowmap"], 1) == ["teacher", "flowmap"]
    for stage, change in ((0, {"lr": 1.0}), (1, {"tangent_warmup": None}), (2, {"count": 8})):
        wrong = [dict(part) for part in told]
        wrong[stage] |= change                           # of the teacher below it, say
        wrong[stage] = {key: value for key, value in wrong[stage].items() if value is not None}
        file.write_text(json.dumps({"settings": wrong}))
        assert not claims.record_of("flowmap", 0), change
        assert reproduce.missing(["flowmap"], 0) == ["teacher", "flowmap"]


def test_what_is_on_disk_is_not_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "FOLDER", tmp_path)
    folder = tmp_path / "seed-0" / "teacher"
    (folder / "pretrain").mkdir(parents=True)
    (folder / "pretrain" / "model.safetensors").touch()
    assert not reproduce.finished("teacher", 0)
    (folder / "settings.json").write_text(json.dumps(claims.settings("teacher", 0)[:-1]))
    assert reproduce.finished("teacher", 0) and not reproduce.finished("teacher", 1)


def test_logs_are_thinned_to_means():
    log = [{"step": 10 * i, "loss": float(i), "seconds": 1.0} for i in range(1, 121)]
    thin = reproduce.thinned(log)
    assert len(thin) == 60 and thin[0]["loss"] == 1.5 and thin[-1] == {
        "step": 1200, "loss": 119.5, "seconds": 1.0}
    assert reproduce.thinned(log[:5]) == log[:5]
    log[1]["err_whole"] = 3.0                            # not every row has it
    assert reproduce.thinned(log)[0]["err_whole"] == 3.0


def test_a_script_that_fails_is_quoted(tmp_path):
    with pytest.raises(ValueError, match="train.py failed, see .*txt: .*unknown flag --stag"):
        reproduce.script(tmp_path, "train.py", "--stag", "pretrain")


TINY = "--preset tiny --guidance 1 --steps 4 --save-every 4"
MADE = ["--seeds", "1", "--jobs", "1"]


def tiny_runs(runs, tmp_path, monkeypatch) -> list:
    """Runs of the tiny preset, trained in this process, with a stand-in for eval.py, which takes
    seconds, that tells weights apart. Returns the list in which what is done is noted."""
    rules = [("x", "t", "ed('flowmap', 2) <= 2 * ed('teacher', 1)")]
    for name, new in (("RUNS", runs), ("TABLES", {"All": runs}), ("FIGURE", tuple(runs)),
                      ("CLAIMS", rules), ("RESULTS", tmp_path / "results"),
                      ("FOLDER", tmp_path / "runs")):
        monkeypatch.setattr(claims, name, new)
    monkeypatch.setattr(evaluation, "draw_figure", lambda *args: False)
    done = []

    def script(folder, file, *words):
        real = words[words.index("--data"):] if file == "eval.py" and "--data" in words else ()
        done.append((file, " ".join([folder.name, *real])))
        if file == "train.py":
            return train.main(list(map(str, words)))
        if file == "sample.py":
            return sample.main(list(map(str, words)))
        stage = claims.stage_of(folder.name)
        ed = float(crc32((folder / stage / "model.safetensors").read_bytes()))
        measured = {"real_ed": 0.0, "real_ed_std": 0.1, "real_psnr": 40.0,
                    "real_accuracy": {"all": 1.0}}
        models = words[words.index("--models") + 1].split(",")
        counts = map(int, words[words.index("--steps") + 1].split(","))
        likeness = 20.0 + ("--guidance" in words)
        measured["rows"] = [{"model": model, "steps": n, "ed": ed, "acc": 1.0, "psnr": likeness}
                            for model, n in product(models, counts)]
        (folder / "eval").mkdir(exist_ok=True)
        (folder / "eval" / "results.json").write_text(json.dumps(measured))
        (folder / "eval" / f"{stage}.png").write_text(folder.name)
    monkeypatch.setattr(reproduce, "script", script)
    return done


def test_runs_are_made_recorded_and_made_again_with_the_same_bits(tmp_path, monkeypatch):
    runs = {"teacher": Run("pretrain", "", TINY, steps="1,2"),
            "flowmap": Run("flowmap", "teacher", "--steps 3", ("euler", "consistency"), "1,2")}
    done = tiny_runs(runs, tmp_path, monkeypatch)
    reproduce.main(MADE)
    first = {name: claims.record_of(name, 0) for name in runs}
    assert [(row["model"], row["steps"]) for row in first["flowmap"]["rows"]] == [
        ("flowmap", 1), ("flowmap", 2), ("flowmap:consistency", 1), ("flowmap:consistency", 2)]
    assert first["flowmap"]["log"][-1]["step"] == 3 and first["flowmap"]["git"]
    text = (tmp_path / "results" / "README.md").read_text()
    assert "inconclusive at 1 seeds" in text and "| flowmap:consistency | 1 |" in text
    assert (tmp_path / "results" / "teacher.png").read_text() == "teacher"      # contact sheet

    done.clear()
    reproduce.main(MADE)
    assert not done                                      # nothing is missing
    shutil.rmtree(tmp_path / "runs" / "seed-0" / "flowmap")
    (tmp_path / "results" / "flowmap.0.json").unlink()
    reproduce.main(MADE)                                 # from the teacher that is there
    assert done == [("train.py", "flowmap"), ("eval.py", "flowmap")]
    assert claims.record_of("flowmap", 0)["rows"] == first["flowmap"]["rows"]
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "results" / "flowmap.0.json").unlink()
    reproduce.main(MADE)                                 # from a teacher that is trained again
    assert done[2:] == [("train.py", "teacher"), *done[:2]]      # whose record stays
    assert claims.record_of("flowmap", 0)["rows"] == first["flowmap"]["rows"]

    done.clear()
    runs["flowmap"] = Run("flowmap", "teacher", "--steps 2", steps="1")
    reproduce.main(MADE)                                 # other settings: trained anew
    assert done == [("train.py", "flowmap"), ("eval.py", "flowmap")]
    assert claims.record_of("flowmap", 0)["log"][-1]["step"] == 2

    runs["flowmap"] = Run("flowmap", "teacher", "--steps 2")
    reproduce.main(MADE)                                 # measured otherwise, not trained again
    assert len(claims.record_of("flowmap", 0)["rows"]) == 6
    log = tmp_path / "runs" / "seed-0" / "flowmap" / "flowmap" / "log.jsonl"
    assert len(log.read_text().splitlines()) == 1

    done.clear()
    runs["guided"] = Run("", "flowmap", "--guidance 2", steps="1")
    reproduce.main(MADE)                                 # the same network, measured otherwise
    assert done == [("eval.py", "guided")] and claims.said(runs["guided"]) == "eval.py --guidance 2"
    record = claims.record_of("guided", 0)
    row, like = record["rows"][0], claims.record_of("flowmap", 0)["rows"][0]
    assert row == like | {"model": "guided", "psnr": 21.0} and record["seconds"] == 0
    runs["guided"] = Run("", "flowmap", "--guidance 3", steps="1")
    assert not claims.record_of("guided", 0)             # stale

    def stopped(folder, file, *words):
        raise ValueError("a full disk")
    monkeypatch.setattr(reproduce, "script", stopped)
    with pytest.raises(ValueError, match="4 of 4 runs were not made: a full disk"):
        reproduce.main(["--seeds", "2", "--jobs", "1"])
    assert (tmp_path / "results" / "README.md").exists()


def test_a_run_with_other_clips_has_a_base_and_is_stale_with_it(tmp_path, monkeypatch):
    more = "--preset tiny --data digits --guidance 1 --steps 1"
    runs = {"teacher": Run("pretrain", "", TINY, steps="1"),
            "flowmap": Run("flowmap", "teacher", "--steps 1", steps="1"),
            "other": Run("flowmap", "flowmap", more, steps="1", anew=True)}
    done = tiny_runs(runs, tmp_path, monkeypatch)
    reproduce.main(MADE)
    folder = tmp_path / "runs" / "seed-0"
    told = json.loads((folder / "other" / "flowmap" / "config.json").read_text())["config"]
    assert (told["data"], told["base"]) == ("digits", str(folder / "flowmap" / "flowmap"))
    assert not (folder / "other" / "pretrain").exists()          # no teacher of these clips
    assert claims.said(runs["other"]) == f"--stage flowmap {more} --base flowmap"

    done.clear()
    runs["flowmap"] = Run("flowmap", "teacher", "--steps 2", steps="1")
    reproduce.main(MADE)
    assert done == list(product(("train.py", "eval.py"), ["flowmap"])) + list(
        product(("train.py", "eval.py"), ["other"]))


def test_a_run_on_clips_that_the_one_before_made(tmp_path, monkeypatch):
    """Their shards are made before it, of every prompt, and it is measured to real clips."""
    runs = {"teacher": Run("pretrain", "", TINY, steps="1"),
            "synthetic": Run("flowmap", "teacher", f"{TINY} --tangent-warmup 0", steps="1",
                             anew=True, made="--steps 1 --per-prompt 2")}
    done = tiny_runs(runs, tmp_path, monkeypatch)
    reproduce.main(MADE)
    assert done[2:] == [("sample.py", "synthetic"), ("train.py", "synthetic"),
                        ("eval.py", "synthetic --data shapes")]
    folder = tmp_path / "runs" / "seed-0" / "synthetic"
    told = json.loads((folder / "flowmap" / "config.json").read_text())
    assert told["config"]["data"] == str(folder / "shards") and told["set"]["clips"] == 2 * 48
    text = (tmp_path / "results" / "README.md").read_text()
    assert "--data shards, made with --steps 1 --per-prompt 2" in text
    assert text.count("Other real clips of") == text.count("Other real clips of `shapes`") == 1

    done.clear()
    runs["synthetic"] = replace(runs["synthetic"], made="--steps 1")
    reproduce.main(MADE)                                 # other clips: made and trained anew
    assert [file for file, _ in done] == ["sample.py", "train.py", "eval.py"]
    assert json.loads((folder / "flowmap" / "config.json").read_text())["set"]["clips"] == 48


def test_records_and_tables_in_the_repository_belong_together(tmp_path, monkeypatch, capsys):
    """results/README.md is what its records give, none is stale; curve and logs are there."""
    results, drawn = claims.RESULTS, ["curve.png"]
    files = sorted(results.glob("*.json"))
    for file in files:
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    monkeypatch.setattr(reproduce, "draw_log", lambda path, *rest: drawn.append(path.name))
    reproduce.tables()
    assert f"from {len(files)} records" in capsys.readouterr().out
    assert (tmp_path / "README.md").read_text() == (results / "README.md").read_text()
    if importlib.util.find_spec("matplotlib"):
        assert len(drawn) > 1 and all((results / name).exists() for name in drawn)
    assert sum(file.stat().st_size for file in results.iterdir()) < 3e6


def test_compare_draws_a_run_over_healthy_records(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    log = [{"step": 10 * i, "loss": 1 / i, "grad_norm": 1.0, "lr": 1e-3, "seconds": 1}
           for i in range(1, 9)]
    def record(data):
        return {"log": log, "settings": [{"data": data}, {}]}
    monkeypatch.setattr(reproduce, "records", lambda: {
        ("teacher", 0): record("shapes"), ("broken-text", 0): record("shapes"),
        ("digits-teacher", 0): record("digits"), ("flowmap", 0): None})
    drawn, save = [], figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *args, **more: drawn.append(self) or save(
        self, *args, **more))
    (tmp_path / "pretrain").mkdir()
    file = tmp_path / "pretrain" / "log.jsonl"
    rows = "".join(json.dumps(row) + "\n" for row in log)
    file.write_text(rows + '{"step": 90, "lo')            # the last one was cut short
    (tmp_path / "pretrain" / "config.json").write_text('{"config": {"data": "shapes"}}')
    reproduce.main(["compare", str(tmp_path)])
    assert (tmp_path / "compare-pretrain.png").stat().st_size > 1000
    loss, grad_norm = drawn[0].axes
    assert loss.get_title() == "loss" and [len(axis.lines) for axis in drawn[0].axes] == [2, 2]
    assert list(loss.lines[-1].get_ydata()) == [row["loss"] for row in reproduce.thinned(log)]
    (tmp_path / "pretrain" / "config.json").write_text('{"config": {"data": "my clips"}}')
    reproduce.main(["compare", str(tmp_path)])           # of no record's: beside all of them
    assert len(drawn[1].axes[0].lines) == 3
    file.write_text("")
    with pytest.raises(ValueError, match="no row yet"):
        reproduce.compare(tmp_path)
    with pytest.raises(ValueError, match="no log.jsonl"):
        reproduce.compare(tmp_path / "pretrain")


def test_a_run_waits_for_that_of_its_own_seed(monkeypatch):
    two = {"a": Run("pretrain", "", ""), "b": Run("flowmap", "a", "")}
    monkeypatch.setattr(claims, "RUNS", two)
    monkeypatch.setattr(reproduce, "missing", lambda names, seed: list(names))
    monkeypatch.setattr(reproduce, "tables", lambda: None)
    ended = []

    def make(name, seed, device, before):
        if before:
            before.result()
        time.sleep(0.2 * seed * (name == "a"))
        ended.append((name, seed))
        return {"name": name, "seed": seed, "seconds": 0}
    monkeypatch.setattr(reproduce, "make", make)
    reproduce.run_all(["a", "b"], [0, 1], 4, "cpu")
    assert ended.index(("a", 1)) < ended.index(("b", 1))


def test_a_run_is_trained_with_its_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "FOLDER", tmp_path)
    monkeypatch.setattr(reproduce, "finished", lambda *run: True)
    monkeypatch.setattr(reproduce, "record_of", lambda *run: {"seed": 2})
    told = []
    monkeypatch.setattr(reproduce, "script", lambda folder, *words: told.append(words))
    reproduce.make("teacher", 2, "cpu")
    (words,) = told
    assert words[words.index("--seed") + 1] == 2


def test_a_script_has_one_core(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    file = tmp_path / "cores.py"
    file.write_text("import os; print(os.environ['OMP_NUM_THREADS'])")
    reproduce.script(tmp_path, file)
    assert (tmp_path / "output.txt").read_text() == "1\n"


def test_a_seed_starts_from_its_own_runs_and_makes_clips_of_its_own_noise(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "FOLDER", tmp_path)
    told = []
    monkeypatch.setattr(reproduce, "script", lambda folder, *words: told.append(words))
    for seed in (1, 2):
        flags = claims.flags_of("flowmap-synthetic", seed)
        teacher = tmp_path / f"seed-{seed}" / "teacher"
        assert flags[flags.index("--base") + 1] == str(teacher / "pretrain")
        reproduce.make_clips("flowmap-synthetic", seed, "cpu")
        assert told[-1][told[-1].index("--run-dir") + 1] == teacher
    one, two = (words[words.index("--seed") + 1] for words in told)
    assert two - one >= 4800                                     # 48 prompts, 100 clips of each


def test_a_run_has_no_more_seeds_than_it_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "FOLDER", tmp_path)
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    assert reproduce.missing(["broken-guidance"], 0) == ["teacher", "flowmap", "broken-guidance"]
    assert reproduce.missing(["broken-guidance"], 1) == []


def test_a_thinned_log_has_at_most_60_rows():
    rows = [{"step": i, "loss": 1.0} for i in range(119)]
    assert [len(reproduce.thinned(rows[:n])) for n in (60, 61, 119)] == [60, 31, 60]


def test_a_run_is_measured_where_it_is_trained_and_the_first_seed_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "FOLDER", tmp_path)
    monkeypatch.setattr(claims, "RESULTS", tmp_path / "results")
    for name, said in (("begun", True), ("finished", True), ("record_of", {}), ("recorded", {})):
        monkeypatch.setattr(reproduce, name, lambda *run, said=said: said)
    told = []
    monkeypatch.setattr(reproduce, "script", lambda folder, *words: told.append(words))
    for seed in (0, 1):
        sheet = tmp_path / f"seed-{seed}" / "teacher" / "eval" / "pretrain.png"
        sheet.parent.mkdir(parents=True)
        sheet.write_text(f"of seed {seed}")
        reproduce.make("teacher", seed, "cpu")
    assert [words[0] for words in told] == ["train.py", "eval.py"] * 2
    assert all(words[words.index("--device") + 1] == "cpu" for words in told)
    assert (tmp_path / "results" / "teacher.png").read_text() == "of seed 0"
