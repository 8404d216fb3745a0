"""The report of a study: what a method recovers, what broke down, and which settings it shows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
from studies import SMALL_METHODS, small_plan

from train.compare import drift, findings, pictures, plan, report, work
from train.compare.plan import TEST
from train.config import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize(
    ("ks", "broken"), [((1, 10, 20, 30, 40, 50), False), ((1, 10, 20), False), ((1, 100, 10), False), ((1,), True)]
)
def test_the_table_has_the_recalls_of_the_data(ks: tuple[int, ...], broken: bool) -> None:
    """In-Shop has others than Stanford Online Products."""
    study = small_plan(methods=("batch", "xbm"), seeds=2)
    chosen = {method: {"lr": 1e-3} for method in study.methods}
    scores = {"map@r": 5.0} | {f"recall@{k}": float(k) for k in ks}
    runs = [run for of_method in study.final(chosen).values() for run in of_method]
    results = {run.name: {"scores": None if broken else scores} for run in runs}
    header, _, *rows = report._final(findings.Findings(study, "", results, chosen, ""))[-1].splitlines()
    assert header == "| method | settings | MAP@R | " + " | ".join(f"Recall@{k}" for k in sorted(ks)) + " |"
    assert len(rows) == 2 and all(row.count("|") == header.count("|") for row in rows)
    assert ("broke down" in rows[0]) == broken and (broken or f"{max(ks)}.00" in rows[0])


def test_what_does_something_about_staleness_is_compared_with_what_does_nothing() -> None:
    methods = ("batch", "xbm", "axbn", "xbm-centred", "axbn-centred", "oracle", "oracle-centred")
    found = findings.Findings(small_plan(methods=methods), "", {}, {}, "")
    others = ("axbn", "xbm-centred", "axbn-centred")
    assert report._pairs(found) == [(method, other) for method in others for other in ("batch", "xbm")]
    added = {other: [method for method in methods if report._adds(method, other)] for other in methods}
    assert added == {
        "batch": [*others, "oracle", "oracle-centred"], "xbm": [*others, "oracle", "oracle-centred"],
        "axbn": ["axbn-centred"], "xbm-centred": ["axbn-centred", "oracle-centred"], "axbn-centred": [],
        "oracle": ["oracle-centred"], "oracle-centred": [],
    }  # fmt: skip


@pytest.mark.long
def test_what_broke_down_is_marked_and_does_not_win(tmp_path: Path) -> None:
    scores = ("map@r", "recall@1", "recall@10")

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
            run.name: {"scores": None if failed(run) else dict.fromkeys(scores, 10.0 + run.config.seed),
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


def test_a_report_names_the_weights_that_the_networks_began_from() -> None:
    study = small_plan()
    runs = study.map()[:3]

    def named(*notes: dict[str, str]) -> str:
        results: dict[str, work.Result] = {run.name: note for run, note in zip(runs, notes, strict=True)}
        return report._networks(findings.Findings(study, "", results, {}, ""))

    before, of_a_file, random = {}, {"network": "lite0: weights of a: b"}, {"network": "lite0: random weights"}
    assert named(before, before, before) == study.base.backbone
    assert named(of_a_file, of_a_file, of_a_file) == "lite0, weights of a: b"
    assert named(of_a_file, random, of_a_file) == "lite0, random weights; lite0, weights of a: b"


def test_a_study_without_a_memory_has_no_drift_and_leaves_no_picture_of_another(tmp_path: Path) -> None:
    study = small_plan(methods=("batch",), memory_sizes=(), batch_sizes=())
    found = findings.Findings(study, "", {}, {"batch": {"lr": 1e-3}}, "")
    assert report._drift(found) == [] == report._effects(found)
    for draw in (pictures.drift, pictures.effects):
        (tmp_path / "old.png").write_bytes(b"another's")
        draw(tmp_path / "old.png", found)
        assert not (tmp_path / "old.png").exists()


@pytest.mark.parametrize(
    "name", ["folder:/we|ird <b>x`*_/__x__ _y_", "`", "``a` b", r"back\slash \* `", "a&lt;b", "[x](y) ![z](w)", "emoji"]
)
def test_names_are_shown_as_they_are(name: str) -> None:
    """On the page, whatever Markdown and HTML would make of them."""
    for shown in (f"Data: {report._plain(name)}. ", report._code(name)):
        html = report.page(shown).partition("</style>")[2]
        text = unescape(re.sub("<[^>]*>", "", html)).strip()
        assert text == (name.strip() if shown == report._code(name) else f"Data: {name}.")


def test_a_report_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PICTURES", {"map": lambda path, _: (path / "x").write_bytes(b"")})
    with pytest.raises(ConfigError, match=rf"writing {tmp_path} failed \(No such file or directory\)"):
        report.write(tmp_path, None)  # type: ignore[arg-type]
