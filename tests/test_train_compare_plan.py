"""The plan of a study: which runs it has, what each is chosen on, and which arguments are not allowed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from studies import arguments, small_plan

from train import making
from train.compare import plan, study
from train.compare.plan import TEST, VALIDATION
from train.config import Config
from train.data import Dataset, validation

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_oracle_s_images_count_as_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("train.run.bytes_of_memory", lambda: 10_000_000)
    assert study.parse(["--methods", "xbm,axbn"])
    with pytest.raises(SystemExit):
        study.parse(["--methods", "xbm,oracle"])
    assert "the memory, with its images, takes" in capsys.readouterr().err


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


@pytest.mark.parametrize("recipe", ["emoji-small", "icons"])
def test_a_method_s_name_says_whether_its_gradients_are_centred(recipe: str) -> None:
    found = study.parse(["--recipe", recipe, "--methods", "batch,xbm,axbn-centred"])[1]
    runs = found.map()
    assert {(run.config.method, run.config.center_gradient) for run in runs} == {
        ("batch", False), ("xbm", False), ("axbn", True),
    }  # fmt: skip
    assert all(run.name.startswith("validation-axbn-centred-lr") == run.config.center_gradient for run in runs)


def test_each_variant_chooses_of_what_it_alone_has() -> None:
    found = small_plan(methods=("ema", "ema-centred", "axbn-centred"), momenta=(0.1, 0.3))
    chosen = {method: {"lr": 1e-3} for method in found.methods}
    best = {"ema": 0.1, "ema-centred": 0.3}
    own = found.choose_own(
        chosen,
        lambda runs: float(
            best["ema-centred" if runs[0].config.center_gradient else "ema"] == runs[0].config.ema_momentum
        ),
    )
    assert {method: settings.get("ema_momentum") for method, settings in own.items()} == best | {"axbn-centred": None}
    assert {method for method, *_ in found.own(chosen)["process_noise"]} == {"axbn-centred"}


def test_what_only_one_method_has_is_tried_at_the_base_too() -> None:
    for own, tried in ((0.5, [0.5, 0.1, 0.3]), (0.3, [0.1, 0.3])):
        found = study.parse(["--methods", "ema", "--ema-momentum", str(own), "--momenta", "0.1,0.3"])[1]
        rows = found.own({"ema": {"lr": 1e-3}})["ema_momentum"]
        assert [value for _, value, _ in rows] == tried


def test_learning_rates_are_chosen_from_runs_that_there_are() -> None:
    found = study.parse(["--memory-size", "1000", "--memory-sizes", "64,4096"])[1]
    assert found.memory_sizes == (64, 1000, 4096)
    there = {run.name for run in found.map()}
    found.choose_lr(lambda runs: float(all(run.name in there for run in runs) or pytest.fail("a run is missing")))


def test_names_tell_runs_apart() -> None:
    found = small_plan(methods=tuple(plan.STUDIED))
    chosen = {method: {"lr": 1e-3} for method in found.methods}
    runs = [*found.map(), *plan.unique(found.own(chosen) | found.effects(chosen))]
    for method, setting in (("xbm", "lr"), ("axbn-centred", "process_noise"), ("ema", "ema_momentum")):
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
        ("--no-center-gradient", "argument --center-gradient: a study has methods with and without it: see --methods"),
        (
            "--methods batch-centred",
            "argument --methods: batch-centred: must be different ones of batch, .*, xbm-centred,",
        ),
        ("--see 3", "unrecognized arguments: --see 3"),
        ("--metho xbm", "unrecognized arguments: --metho xbm"),
        ("--overw", "unrecognized arguments: --overw"),
        ("--data folder:runs --out runs/x", "--out runs/x lies in --data folder:runs"),
        ("--out pyproject.toml/x", "pyproject.toml exists and is not a folder"),
        (f"--out {300 * 'x'}", "a name has at most 255 bytes here"),
        (f"--out x{400 * '/123456789'}", "its path may have 3,584 bytes here; choose a shorter one"),
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
