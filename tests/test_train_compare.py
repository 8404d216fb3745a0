"""The study: its statistics by definition, its plan, and whole studies that are stopped, killed and go on."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from train import checkpoint, features, loop, making, model
from train.augment import evaluation_view
from train.compare import drift, findings, plan, report, statistics, study, work
from train.compare.plan import TEST, VALIDATION, Plan
from train.config import Config, ConfigError
from train.data import DataError, Dataset, validation
from train.model import Embedder

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "data": "emoji", "max-classes": "40", "steps": "12", "batch-size": "8", "samples-per-class": "2",
    "memory-size": "24", "eval-every": "4", "seeds": "2", "map-seeds": "1", "lrs": "1e-3,1e-2", "memory-sizes": "8,24",
    "batch-sizes": "4,8", "warmups": "0,4", "noises": "0.1,1", "momenta": "0.1",
    "methods": "batch,xbm,axbn", "threads": "1",
}  # fmt: skip


SMALL_METHODS = SMALL["methods"].split(",")


def small_plan(**changes: Any) -> Plan:
    return replace(study.parse(arguments(Path("cache"), Path("out")))[1], **changes)


def arguments(cache: Path, out: Path, jobs: int = 1) -> list[str]:
    settings = SMALL | {"cache": str(cache), "out": str(out), "jobs": str(jobs)}
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def results(out: Path) -> dict[str, Any]:
    """What every run found, less how long it took."""
    found = {path.name: json.loads(path.read_text()) for path in sorted((out / "runs").glob("*.json"))}
    return {name: {k: v for k, v in result.items() if k != "seconds"} for name, result in found.items()}


# ---- statistics -----------------------------------------------------------------------------------------------------


def test_an_interval_is_students() -> None:
    found = statistics.estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445105 * np.sqrt(2.5) / np.sqrt(5)  # Student's t for four degrees of freedom, from a table
    assert found.mean == 3 and found.count == 5
    assert np.allclose([found.low, found.high], [3 - half, 3 + half])
    assert str(found) == "3.00 ± 1.96"


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = [
        found.low <= 7 <= found.high
        for found in (statistics.estimate(rng.normal(7, 2, 5).tolist()) for _ in range(4000))
    ]
    assert 0.94 < np.mean(held) < 0.96


def test_what_a_seed_does_to_both_cancels_out() -> None:
    found = statistics.difference([11.0, 21.0, 31.5], [10.0, 20.0, 30.0])
    assert found.mean == pytest.approx(3.5 / 3) and found.high - found.low < 2
    assert str(statistics.estimate([4.0])) == "4.00"
    with pytest.raises(ValueError, match="no values"):
        statistics.estimate([])


def test_a_corrected_interval_is_bonferronis() -> None:
    found = statistics.estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert statistics.corrected(found, 1).half == pytest.approx(found.half)
    half = 4.604094871 * np.sqrt(2.5) / np.sqrt(5)  # Student's t at 1 - 0.05 / 5, two-sided, from a table
    assert statistics.corrected(found, 5).half == pytest.approx(half)
    with pytest.raises(ValueError, match="one value has no interval"):
        statistics.corrected(statistics.estimate([1.0]), 2)


def test_the_interval_of_a_ratio_is_fiellers() -> None:
    """By its definition: at its ends the difference of ours and so much of theirs is just not significant."""
    ours, theirs = [2.0, 2.6, 3.1, 2.2, 2.9], [3.9, 4.4, 5.2, 3.5, 4.6]
    found = statistics.ratio(ours, theirs)
    assert found is not None and found.mean == pytest.approx(np.mean(ours) / np.mean(theirs))
    assert found.low < found.mean < found.high
    for end in (found.low, found.high):
        gap = statistics.difference(ours, [end * value for value in theirs])
        assert abs(gap.mean) == pytest.approx(gap.half)
    assert statistics.ratio(ours, ours) == statistics.Estimate(1.0, 1.0, 1.0, 5)
    for seed in range(2000):  # of proportional ones the interval is a point, whatever is rounded on the way
        some = np.random.default_rng(seed).normal(1, 0.3, 3)
        for factor in (1.0, 0.7):
            same = statistics.ratio((factor * some).tolist(), some.tolist())
            assert same is None or (same.high - same.low < 1e-3 and same.mean == pytest.approx(factor))
    assert statistics.ratio(ours, [1.0, -1.2, 0.9, -1.1, 0.8]) is None, "what is divided by might be 0"
    assert statistics.ratio([1.0], [2.0]) is None
    assert report.percent(statistics.Estimate(0.5, 0.25, 0.9, 5)) == "50 % (25 to 90)" and report.percent(None) == "-"


@pytest.mark.long
def test_the_interval_of_a_ratio_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = []
    for _ in range(4000):
        shared, own, their = rng.normal(0, 0.5, (3, 5))
        found = statistics.ratio((1.5 + shared + own).tolist(), (2 + shared + their).tolist())
        held.append(found is None or found.low <= 0.75 <= found.high)
    assert 0.94 < np.mean(held) < 0.96


@pytest.mark.long
def test_seldom_is_one_of_many_differences_of_nothing_called_significant() -> None:
    rng = np.random.default_rng(0)
    studies = [[report.judgement(statistics.estimate(rng.normal(0, 1, 5).tolist()), 12) for _ in range(12)]
               for _ in range(1000)]  # fmt: skip
    wrong = np.mean([any(sentence.startswith("significantly") for sentence in study) for study in studies])
    assert 0.02 < wrong < 0.06


def test_a_difference_is_judged_seed_by_seed() -> None:
    ours, theirs = [11.1, 21.0, 30.9, 41.0], [10.0, 20.0, 30.0, 40.0]
    assert statistics.estimate(ours).low < statistics.estimate(theirs).high, "each alone they overlap by far"
    gap = statistics.difference(ours, theirs)
    assert report.judgement(gap, 12).startswith("significantly different, higher; seed by seed +1.00 ± 0.13 points, ")
    gap = statistics.difference(theirs, ours)
    assert report.judgement(gap, 12).startswith("significantly different, lower; seed by seed -1.00 ± 0.13 points, ")
    barely = statistics.difference([1.2, 0.9, 0.6, 1.3], [0.0, 0.0, 0.0, 0.0])
    assert report.judgement(barely, 1).startswith("significantly") and barely.low > 0
    assert (
        report.judgement(barely, 12) == "no significant difference; seed by seed +1.00 ± 0.50 points, corrected ± 1.26"
    )
    assert report.judgement(statistics.estimate([1.0]), 12) == "+1.00 points; one seed shows no more"


def test_staleness_is_of_the_phase_and_age_asked_for() -> None:
    config = Config(steps=100, memory_size=640, batch_size=64)  # a row lives for 10 steps
    points = [
        {"step": step, "age": age, "uncorrected": 0.2, "in_memory": 0.05 if step > 50 and age > 5 else 0.3}
        for step in (10, 50, 51, 100)
        for age in (5, 6)
    ]
    found = drift.staleness([{"drift": points}, {"drift": points}], config, (0.5, 1.0), (0.5, 1.0))
    assert found is not None and found.in_memory.mean == pytest.approx(0.05) and found.removed == pytest.approx(75)
    assert drift.staleness([{"drift": points}], config, (0.0, 0.05), (0.0, 1.0)) is None
    of_steps = Config(steps=100, memory_size=640, batch_size=64, accumulate=3)  # four steps, as ages are
    old = [{"step": 60, "age": age, "uncorrected": 0.1 * age, "in_memory": 0.0} for age in (1, 2, 3, 4)]
    thirds = [drift.staleness([{"drift": old}], of_steps, (0.4, 1.0), age) for age in drift.AGES.values()]
    assert [t and t.uncorrected.mean for t in thirds] == pytest.approx([0.1, 0.2, 0.35])
    assert drift.staleness([{"drift": points}], config, (0.5, 1.0), (0.5, 1.0), drift.SHARED) is None, (
        "of an earlier version"
    )
    shared = [point | {"shared_uncorrected": 0.1, "shared_in_memory": 0.01} for point in points]
    found = drift.staleness([{"drift": shared}] * 2, config, (0.5, 1.0), (0.5, 1.0), drift.SHARED)
    assert found is not None and found.in_memory.mean == pytest.approx(0.01) and found.removed == pytest.approx(90)


def test_the_oracle_s_images_count_as_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("train.run.bytes_of_memory", lambda: 10_000_000)
    assert study.parse(["--methods", "xbm,axbn"])
    with pytest.raises(SystemExit):
        study.parse(["--methods", "xbm,oracle"])
    assert "the memory, with its images, takes" in capsys.readouterr().err


def test_a_method_gets_its_part_of_what_the_oracle_gains() -> None:
    scores = {"batch": [8.0, 9.0, 10.0], "xbm": [10.0, 11.0, 12.0], "axbn": [11.0, 12.1, 12.9],
              "oracle": [12.0, 13.1, 13.9]}  # fmt: skip
    found = small_plan(methods=tuple(scores), seeds=3)
    chosen = {method: {"lr": 1e-3} for method in scores}
    tested = found.final(chosen)
    results = {
        run.name: {"scores": {"map@r": score}}
        for method, runs in tested.items()
        for run, score in zip(runs, scores[method], strict=True)
    }
    below = {run.name: {"scores": {"map@r": 1.0 + run.config.seed}} for run in tested["oracle"]}
    text = report._recovered(findings.Findings(found, "", results | below, chosen, ""))[-1]
    assert text.count("| - |") == 3 and "%" not in text, "no part of what the oracle loses"
    lines = report._recovered(findings.Findings(found, "", results, chosen, ""))[-1].splitlines()
    parts = {line.split(" | ")[1]: line.split(" | ")[2:] for line in lines[2:]}
    assert parts.keys() == {"batch", "axbn", "oracle"}
    assert parts["axbn"][0] == "1.00 ± 0.25" and parts["axbn"][1].startswith("50 % (4")
    assert parts["oracle"][1] == "100 % (100 to 100) |" and parts["batch"][1].startswith("-100 %")
    assert report._recovered(findings.Findings(small_plan(), "", results, chosen, "")) == []


@pytest.mark.long
def test_what_broke_down_is_marked_and_does_not_win(tmp_path: Path) -> None:
    def found(failed: Callable[[plan.Run], bool]) -> str:
        study = small_plan(map_seeds=2, seeds=3)
        chosen = {method: {"lr": 1e-3} for method in study.methods}
        runs = [*study.map(), *plan.unique(study.own(chosen) | study.effects(chosen))]
        runs += [run for of_method in study.final(chosen).values() for run in of_method]
        point = {
            "age": 1,
            **{name: math.nan if name in drift.WHOLE else -0.01 for name in (*drift.WHOLE, *drift.SHARED)},
        }
        good = {"age": 1, **dict.fromkeys((*drift.WHOLE, *drift.SHARED), 0.25)}
        results = {
            run.name: {"scores": None if failed(run) else dict.fromkeys(report.SCORES, 10.0 + run.config.seed),
                       "failure": "the loss was nan" if failed(run) else None, "seconds": 1,
                       "drift": [{"step": 12, **(point if failed(run) else good)}]}
            for run in runs
        }  # fmt: skip
        report.write(tmp_path, findings.Findings(study, "", results, chosen, "here"))
        return (tmp_path / "report.md").read_text()

    counted = " broke down (a run that broke down counts as 0 %; numbers that it is in say so). here."
    text = found(lambda run: False)
    assert " 0 broke down. here." in text and text.count("broke down") == 1
    text = found(lambda run: run.config.method == "axbn" and run.config.seed == 2 and run.part == TEST)
    assert f" 1{counted}" in text and "**batch** is highest, MAP@R 11.00 ± 2.48." in text
    assert "| axbn | lr 0.001 | 7.00 ± 15.11 (1 of 3 broke down) |" in text
    assert text.count("points, corrected ± 24.82; axbn (1 of 3 broke down).") == 2, text
    assert "| axbn | rest | 0.250 → 0.250 (-0 %) |" in text and "nan" not in text
    assert "| axbn | rest | 0.163 → 0.163 (-0 %) |" in text, "numbers that are finite count"
    text = found(lambda run: run.config.lr == 1e-3)
    assert "All at learning rate 0.001: all runs broke down, no method is highest." in text and "**" in text
    assert "axbn against xbm: all runs of both broke down." in text and "nan" not in text
    assert "| axbn over xbm | 0.00 (4 of 4 broke down) | 0.00 |" in text
    assert "| axbn | rest | - | - | - |" in text and "| axbn | rest | -0.010 → -0.010 (-) |" in text


# ---- what is compared -----------------------------------------------------------------------------------------------


def test_settings_are_chosen_on_held_out_training_classes_only(few_emoji: Dataset) -> None:
    held_out = validation.of(few_emoji)
    names = set(few_emoji.train.classes)
    assert set(held_out.train.classes) | set(held_out.test.classes) == names
    assert not set(held_out.train.classes) & set(held_out.test.classes)
    assert len(held_out.test.classes) == round(0.25 * len(names))
    for part in (held_out.train, held_out.test):
        assert set(part.labels.tolist()) == set(range(len(part.classes)))
        name = part.classes[part.labels[3]]
        where = few_emoji.train.classes.index(name)
        images = np.asarray(few_emoji.train.images)[few_emoji.train.labels == where]
        assert any(np.array_equal(part.images[3], image) for image in images)
    chosen = small_plan()
    runs = [*chosen.map(), *plan.unique(chosen.own({method: {"lr": 1e-3} for method in chosen.methods}))]
    assert {run.part for run in runs} == {VALIDATION}


def test_every_method_sees_the_same_batches() -> None:
    labels = np.repeat(np.arange(10), 4)
    runs = small_plan().final({method: {"lr": 1e-3} for method in ("batch", "xbm", "axbn")})
    for seed in range(2):
        first, *others = (
            [making.make_sampler(c, labels).batch(step) for step in range(3)]
            for c in (of_method[seed].config for of_method in runs.values())
        )
        assert all(first == other for other in others)
    assert {run.config.steps for of_method in runs.values() for run in of_method} == {12}


def test_the_best_on_held_out_classes_is_chosen() -> None:
    def mean_score(runs: list[plan.Run]) -> float:
        c = runs[0].config
        return c.lr * (1 if c.method == "xbm" else -1) + (c.ema_momentum if c.method == "ema" else 0)

    found = small_plan(methods=("batch", "xbm", "axbn", "ema"), momenta=(0.1, 0.3))
    chosen = found.choose_lr(mean_score)  # type: ignore[arg-type]
    assert chosen == {"batch": {"lr": 1e-3}, "xbm": {"lr": 1e-2}, "axbn": {"lr": 1e-3}, "ema": {"lr": 1e-3}}
    chosen = found.choose_own(chosen, mean_score)  # type: ignore[arg-type]
    assert chosen["ema"] == {"lr": 1e-3, "ema_momentum": 0.3} and chosen["xbm"] == {"lr": 1e-2}
    assert {run.part for run in found.final(chosen)["ema"]} == {TEST}
    assert [run.config.ema_momentum for run in found.final(chosen)["ema"]] == [0.3, 0.3]
    assert chosen["axbn"] == {"lr": 1e-3} and found.final(chosen)["axbn"][0].config.process_noise is None


def test_settings_with_several_values_are_shown_and_what_is_estimated_is_one() -> None:
    found = findings.Findings(small_plan(batch_sizes=(8,)), "", {}, {m: {"lr": 1e-3} for m in SMALL_METHODS}, "")
    effects = found.effects()
    assert list(effects) == ["memory_size", "warmup_steps", "process_noise"]
    assert findings.values_of(effects["process_noise"]) == [None, 0.1, 1.0]
    assert [findings.in_words(value) for value in (None, 0.1)] == ["estimated", "0.1"]
    [(method, value, runs), *_] = effects["process_noise"]
    assert (method, value) == ("axbn", None) and runs[0].config.process_noise is None
    assert {run.name for run in runs} <= {run.name for run in found.plan.map()}, "nothing is run twice"
    given = small_plan(base=replace(small_plan().base, process_noise=0.1))
    assert [value for _, value, _ in given.own(found.chosen)["process_noise"]] == [0.1, 1.0]


def test_learning_rates_are_chosen_from_runs_that_there_are() -> None:
    found = study.parse(["--memory-size", "1000", "--memory-sizes", "64,4096"])[1]
    assert found.memory_sizes == (64, 1000, 4096)
    there = {run.name for run in found.map()}
    found.choose_lr(lambda runs: float(all(run.name in there for run in runs) or pytest.fail("a run is missing")))


def test_names_tell_runs_apart() -> None:
    found = small_plan(methods=("batch", "xbm", "xbn", "axbn", "ema"))
    chosen = {method: {"lr": 1e-3} for method in found.methods}
    runs = [*found.map(), *plan.unique(found.own(chosen) | found.effects(chosen))]
    for method, setting in (("xbm", "lr"), ("axbn", "process_noise"), ("ema", "ema_momentum")):
        runs += [found.run(plan.TEST, method, 0, **{setting: value}) for value in (0.25, 0.2500000001)]
    by_name: dict[str, Config] = {}
    for run in runs:
        assert by_name.setdefault(run.name, run.config).settings() == run.config.settings()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--methods xbm,xbn2", "argument --methods: xbm,xbn2: must be different ones of batch, xbm"),
        ("--methods xbm,xbm", "must be different ones"),
        ("--out=", "argument --out: the name of a folder is empty"),
        ("--seeds 0", "argument --seeds: 0: must be a whole number between 1 and 1000"),
        ("--seeds x", "argument --seeds: x: must be a whole number between 1 and 1000"),
        ("--map-seeds 1000000000", "argument --map-seeds: 1000000000: must be a whole number between 1 and 1000"),
        ("--jobs 100000", "argument --jobs: 100000: must be a whole number between 1 and [0-9]+"),
        ("--memory-sizes 8", r"--memory-size 8: must be --batch-size \(16\) or more"),
        ("--memory-sizes 512,99999999999999", "--memory-size 99999999999999: with --embedding-dim .* bytes"),
        ("--device tpu7", "--device tpu7: "),
        ("--noises 0,1", "--process-noise 0.0: must be more than 0"),
        ("--lrs x", "argument --lrs: x: must be numbers with commas between them"),
        ("--lrs=", "argument --lrs: : must be numbers with commas between them"),
        ("--warmups 0,1.5", "argument --warmups: 0,1.5: must be whole numbers with commas between them"),
        (f"--warmups 0,{2**63}", f"--warmup-steps {2**63}: must be below 2\\^63"),
        ("--recipe sop", "--recipe sop needs --data sop:PATH"),
        ("--bath-size 4", "unrecognized arguments: --bath-size 4"),
        ("--seed 3", "argument --seed: a study has its own"),
        ("--validation-share 0.2", "argument --validation-share: a study holds out training classes of its own"),
        ("--wandb mine", "argument --wandb: a study keeps no logs of its runs; leave it out"),
        ("--test-of images", "argument --test-of: a study tests on classes that are not trained on"),
        ("--test-share 0", "argument --test-share: 0 leaves nothing to compare methods on; choose more"),
        ("--see 3", "unrecognized arguments: --see 3"),
        ("--metho xbm", "unrecognized arguments: --metho xbm"),
        ("--overw", "unrecognized arguments: --overw"),
        ("--data folder:runs --out runs/x", "--out runs/x lies in --data folder:runs"),
        ("--out pyproject.toml/x", "pyproject.toml exists and is not a folder"),
        (f"--out {300 * 'x'}", "a name has at most 255 bytes here"),
        ("--overwrite", "argument --overwrite: a study has its own; delete its --out to start again"),
        ("--config=x.yaml", "argument --config: a study decides some settings itself"),
    ],
)
def test_a_setting_that_is_not_allowed_is_named(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        study.parse(arguments.split())
    assert exit.value.code == 2
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(capsys.readouterr().err)


def test_files_in_a_folder_without_a_study_are_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("report.md", "report.html", "final.png", "map.png", "drift.png", "effects.png"):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text("mine")
        (out / "runs").mkdir()  # of runs, not of a study
        (out / "runs" / "axbn").mkdir()
        with pytest.raises(SystemExit, match=r"^2$"):
            study.main(arguments(tmp_path, out))
        said = f"--out {out}: there is no study in it, and a new one would replace {name}: choose another, or move"
        assert said in " ".join(capsys.readouterr().err.split())
        assert {path.name for path in out.iterdir()} == {name, "runs"} and (out / name).read_text() == "mine"
        (out / "runs" / "validation-xbm-lr0.001.json").write_text("{}")
        assert study.parse(arguments(tmp_path, out))[0] == out


# ---- whole studies --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(emoji_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that nothing has disturbed."""
    out = tmp_path_factory.mktemp("a study")
    assert study.main(arguments(emoji_cache, out, jobs=2)) == 0
    return out


@pytest.mark.long
def test_a_study_leaves_a_report_with_its_pictures(whole: Path) -> None:
    text, page = (whole / "report.md").read_text(), (whole / "report.html").read_text()
    assert "python -m train compare --data emoji --max-classes 40" in text
    assert f"--out {shlex.quote(str(whole))}" in text, "a shell takes the command as it stands"
    assert "All at learning rate 0.001: **" in text
    rates = 1 + ("Each method at its own learning rate: **" in text)  # where one has another
    judged = [line for line in text.splitlines() if " against " in line and line.startswith("- ")]
    assert len(judged) == 2 * rates, "axbn against two"
    assert f"corrected for the number of comparisons below, {2 * rates} (" in text
    assert all("significant" in line and "seed by seed" in line for line in judged)
    tested = sum(name.startswith("test-") for name in results(whole))
    assert 6 <= tested <= 12 and f"{len(results(whole)) - tested} + {tested} runs" in text
    for name in ("final", "map", "drift", "effects"):
        assert f"]({name}.png)" in text and f'src="{name}.png"' in page
        with Image.open(whole / f"{name}.png") as image:
            assert image.width > 400 and np.asarray(image.convert("L")).std() > 5
    assert page.count("<table>") == sum(line.startswith("| ---") for line in text.splitlines()) > 4
    scores = {
        method: [
            r["scores"]["map@r"] for name, r in results(whole).items() if name.startswith(f"test-{method}-lr0.001-")
        ]
        for method in ("batch", "xbm")
    }
    for method, values in scores.items():
        assert f"| {method} |" in text and str(statistics.estimate(values)) in text


@pytest.mark.long
def test_a_finished_study_is_only_written_again(
    whole: Path, emoji_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "_do", lambda *_: pytest.fail("trained again"))
    before = (whole / "report.md").read_text()
    assert study.main(arguments(emoji_cache, whole, jobs=2)) == 0
    assert (whole / "report.md").read_text() == before


@pytest.mark.long
def test_a_folder_with_other_settings_is_left_alone(
    whole: Path, emoji_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study.main([*arguments(emoji_cache, whole), "--weight-decay", "0.5"]) == 2
    error = capsys.readouterr().err
    assert "--weight-decay 0.0001 there, 0.5 now" in error and "or delete it" in error


@pytest.mark.long
def test_a_damaged_result_and_too_few_classes_are_told_in_a_line(
    emoji_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_plan().map()[0]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / f"{run.name}.json").write_text("{ no")
    assert study.main(arguments(emoji_cache, tmp_path)) == 2
    assert f"cannot read {run.name}.json" in (error := capsys.readouterr().err) and "delete it" in error
    too_many = [*arguments(emoji_cache, tmp_path / "other"), "--batch-size", "400", "--memory-sizes", "400"]
    assert study.main([*too_many, "--memory-size", "400", "--batch-sizes", "400"]) == 2
    assert "--batch-size 400 with --samples-per-class 2 needs 200 training classes" in capsys.readouterr().err
    assert not any((tmp_path / "other").iterdir()), "nothing is left"


@pytest.mark.long
def test_a_run_of_a_study_that_is_stopped_goes_on_to_the_same_numbers(
    whole: Path, emoji_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = replace(small_plan().base, cache=emoji_cache)
    run = small_plan(base=base).run(VALIDATION, "axbn", 0, lr=1e-3)
    workshop = work.Workshop(tmp_path / "runs", 1, 1, "cpu")
    workshop.folder.mkdir()
    asked = iter([False] * 7 + [True])  # before each step, and of the runs
    monkeypatch.setattr(work, "_stop", SimpleNamespace(is_set=lambda: next(asked)), raising=False)
    assert work._do(workshop, run) is None and not results(tmp_path)
    assert 0 < checkpoint.load(tmp_path / "runs" / run.name / checkpoint.CHECKPOINT)["step"] < 12
    monkeypatch.setattr(work, "_stop", SimpleNamespace(is_set=lambda: False))
    assert work._do(workshop, run) is not None
    assert results(tmp_path)[f"{run.name}.json"] == results(whole)[f"{run.name}.json"]
    assert not (tmp_path / "runs" / run.name).exists(), "no checkpoint left behind"
    (tmp_path / "runs" / run.name).mkdir()  # as if killed right after the result
    with work.Workers(workshop, lambda: False) as workers:
        assert list(workers.carry_out([run], "again")) == [run.name]
    assert not (tmp_path / "runs" / run.name).exists()


def wait_for(found: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while not found():
        assert process.poll() is None and time.monotonic() < end, "the study ended, or hangs"
        time.sleep(0.02)


@pytest.mark.long
def test_a_study_that_is_stopped_then_killed_comes_to_the_same_numbers(
    whole: Path, emoji_cache: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "train.compare", *arguments(emoji_cache, tmp_path, jobs=2)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = f"runs/*/{checkpoint.CHECKPOINT}"
    done = 0
    for how in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(
            command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell starts with & ignores it
        )  # fmt: skip
        wait_for(lambda least=done + 2: any(tmp_path.glob(started)) and len(results(tmp_path)) >= least, process)
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # as Ctrl-C does: the working processes get it, too
            assert process.wait(60) == 130
        else:
            process.kill()
            process.wait(60)
            left = Path("/proc") if sys.platform == "linux" else None
            end = time.monotonic() + 20
            while left and any(group_of(path) == process.pid for path in left.glob("[0-9]*")):
                assert time.monotonic() < end, "working processes outlive the study"
                time.sleep(0.1)
        assert done + 2 <= len(results(tmp_path)) < len(results(whole)) and not (tmp_path / "report.md").exists()
        done = len(results(tmp_path))
    assert study.main(arguments(emoji_cache, tmp_path)) == 0
    assert results(tmp_path) == results(whole)
    assert not any(path.is_dir() for path in (tmp_path / "runs").iterdir()), "no checkpoints left behind"


def group_of(process: Path) -> int | None:
    """The process group of a running process."""
    try:
        after_name = (process / "stat").read_text().rpartition(")")[2].split()
        return int(after_name[2]) if after_name[0] != "Z" else None
    except OSError:
        return None


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are done in this process, as in a working one."""
    monkeypatch.setattr(work, "_stop", type("Never", (), {"is_set": staticmethod(lambda: False)}), raising=False)
    monkeypatch.setattr(work, "_data", {})


def coloured(images: Path, classes: int) -> str:
    """A folder data set of so many classes."""
    for c in range(classes):
        (images / f"c{c}").mkdir(parents=True, exist_ok=True)
        for i in range(2):
            Image.new("RGB", (8, 8), (20 * c, 99 * i, 0)).save(images / f"c{c}" / f"{i}.png")
    return f"folder:{images}"


def test_a_study_does_not_go_on_with_other_data(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop.Trainer, "run", lambda self, *_, **__: self.history["evaluation"].append({"map@r": 1.0}))
    (tmp_path / "runs").mkdir()
    base = replace(small_plan().base, data=coloured(tmp_path / "images", 16), image_size=16)
    runs = small_plan(base=base, map_seeds=4).many(VALIDATION, "xbm")
    workshop = work.Workshop(tmp_path / "runs", 1, 1, "cpu")
    for run in runs[:2]:
        assert work._do(workshop, run)
    coloured(tmp_path / "images", 18)
    work._data.clear()
    with pytest.raises(
        ConfigError, match=rf"--out {tmp_path} holds runs on other data: .* class names, .*; train: 18 images"
    ):
        work._do(workshop, runs[2])
    assert capsys.readouterr().err == ""
    (tmp_path / "data.json").unlink()  # as earlier versions left it
    assert work._do(workshop, runs[2])
    assert "runs of an earlier version, which did not store what data it had" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[]", "it is not a dictionary but of type list"),
        ("{}", "config is missing"),
        ('{"config": {}, "scores": 1}', "scores is of type int"),
    ],
)
def test_a_damaged_result_is_named(content: str, why: str, tmp_path: Path) -> None:
    run, workshop = small_plan().map()[0], work.Workshop(tmp_path, 1, 1, "cpu")
    workshop.path(run).write_text(content)
    with pytest.raises(ConfigError, match=rf"cannot read {workshop.path(run).name} \({why}\); delete it"):
        work.read(workshop, run)


@pytest.mark.parametrize(
    ("classes", "why"),
    [
        (6, "3 training classes, 2 of them held out for validation: two or more have"),
        (16, "with --samples-per-class 2 needs 40 training classes"),
    ],
)
def test_a_run_that_cannot_be_begun_leaves_nothing(here: None, classes: int, why: str, tmp_path: Path) -> None:
    base = replace(small_plan().base, data=coloured(tmp_path / "images", classes), image_size=16)
    base = replace(base, batch_size=80, memory_size=80)
    out = tmp_path / "out"
    with pytest.raises((DataError, ConfigError), match=why), work.Workers(
        work.Workshop(out / "runs", 1, 1, "cpu"), lambda: False
    ) as workers:  # fmt: skip
        workers.workshop.folder.mkdir(parents=True)
        work._do(workers.workshop, small_plan(base=base).run(VALIDATION, "xbm", 0))
    assert not any(out.iterdir())


def test_a_batch_size_with_more_classes_than_there_are_is_named_by_the_first_run(here: None, tmp_path: Path) -> None:
    base = replace(small_plan().base, data=coloured(tmp_path / "images", 16), image_size=16)
    words = [*arguments(tmp_path, tmp_path / "out"), "--batch-sizes", "4,8,16"]
    workshop = study.parse([*words, "--data", base.data, "--image-size", "16"])[2]
    workshop.folder.mkdir(parents=True)
    said = (
        r"--batch-sizes 16 with --samples-per-class 2 needs 8 training classes and there are 6: choose --batch-sizes 12"
    )
    for changes in ({}, {"memory_size": 8}):
        with pytest.raises(ConfigError, match=rf"^{said} or less, .* \(a quarter of the training classes is held out"):
            work._do(workshop, small_plan(base=base).run(VALIDATION, "xbm", 0, **changes))
    assert not any(workshop.folder.iterdir())
    assert work._do(workshop, small_plan(base=base).run(TEST, "xbm", 0)), "there are 8, and the base's batch has 4"


def test_a_file_in_the_place_of_a_run_is_named(here: None, tmp_path: Path) -> None:
    run = small_plan().map()[0]
    (tmp_path / run.name).touch()
    with pytest.raises(ConfigError, match=rf"writing {tmp_path / run.name} failed \(File exists\)"):
        work._do(work.Workshop(tmp_path, 1, 1, "cpu"), run)


def test_a_report_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PICTURES", {"map": lambda path, _: (path / "x").write_bytes(b"")})
    with pytest.raises(ConfigError, match=rf"writing {tmp_path} failed \(No such file or directory\)"):
        report.write(tmp_path, None)  # type: ignore[arg-type]


def test_a_checkpoint_that_is_a_folder_is_named(here: None, tmp_path: Path) -> None:
    base = replace(small_plan().base, data=coloured(tmp_path / "images", 16), image_size=16)
    run = small_plan(base=base).run(VALIDATION, "xbm", 0)
    (tmp_path / "runs" / run.name / checkpoint.CHECKPOINT).mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"{run.name}: cannot read checkpoint.pt \(Is a directory\); delete it"):
        work._do(work.Workshop(tmp_path / "runs", 1, 1, "cpu"), run)


def killed(workshop: work.Workshop, run: plan.Run) -> None:
    """Stands for a run that takes more memory than there is."""
    (workshop.folder / run.name).mkdir()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_killed_by_the_system_ends_the_study_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(work, "_do", killed)
    fork = multiprocessing.get_context("fork")  # the killer is known there
    monkeypatch.setattr(work.multiprocessing, "get_context", lambda _: fork)
    assert study.main(arguments(tmp_path, tmp_path, jobs=1)) == 1
    error = capsys.readouterr().err
    first = small_plan().map()[0].name
    assert "error: the system has ended a working process, most likely because memory ran out" in error
    assert f"unfinished: {first}. The same command continues" in error and "(--jobs, now 1)" in error
    assert "Traceback" not in error


def test_a_signal_to_all_processes_stops_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch system ends a job that way; the working processes end before they can be asked to."""
    monkeypatch.setattr(work, "_do", killed)
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(work.multiprocessing, "get_context", lambda _: fork)
    monkeypatch.setattr(study.run, "stop_signals", lambda: nullcontext(lambda: True))
    assert study.main(arguments(tmp_path, tmp_path, jobs=1)) == 130
    assert capsys.readouterr().err.endswith("stopped; the same command continues from here\n")


def test_training_that_breaks_down_counts_as_nothing_found(
    emoji_cache: Path, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks_down(*_: Any, **__: Any) -> None:
        raise loop.TrainingError("the loss was nan")

    monkeypatch.setattr(loop.Trainer, "run", breaks_down)
    run = small_plan(base=replace(small_plan().base, cache=emoji_cache)).run(VALIDATION, "xbm", 0)
    (tmp_path / "runs").mkdir()
    result = work._do(work.Workshop(tmp_path / "runs", 1, 1, "cpu"), run)
    assert result is not None and result["scores"] is None and result["failure"] == "the loss was nan"
    assert findings.score(result) == 0


# ---- frozen features ------------------------------------------------------------------------------------------------


def frozen(out: Path) -> Config:
    return Config(
        features="frozen", backbone="convnet", weights="none", image_size=32, hidden=16, embedding_dim=8, steps=6,
        batch_size=8, samples_per_class=2, memory_size=16, out=out, threads=1, eval_every=3,
    )  # fmt: skip


def test_frozen_features_are_those_of_the_network(few_emoji: Dataset, tmp_path: Path) -> None:
    config = frozen(tmp_path)
    network, _ = model.build(config)
    found = features.of(few_emoji, network, evaluation_view(32), torch.device("cpu"))
    network.eval()
    images = torch.from_numpy(np.asarray(few_emoji.test.images)[:5]).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = network.features(torch.stack([evaluation_view(32)(image) for image in images]))
    assert torch.allclose(torch.from_numpy(np.asarray(found.test.images)[:5]), expected, atol=1e-6)
    assert found.train.classes == few_emoji.train.classes


def test_only_the_head_learns_from_frozen_features(
    few_emoji: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = frozen(tmp_path)
    network, _ = model.build(config)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trainer = loop.Trainer(config, network, few_emoji, torch.device("cpu"))
    monkeypatch.setattr(network.backbone, "forward", lambda *_: pytest.fail("an image went through the backbone again"))
    embeddings = trainer.run(quiet=True)
    assert embeddings.shape == (len(few_emoji.test.labels), 8)
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("head.")}
    assert isinstance(network, Embedder) and len(list(network.head.parameters())) == 4
    assert len(trainer.history["evaluation"]) == 1 and not (tmp_path / checkpoint.EVENTS).exists(), "quiet"
