"""The files of a run that are damaged, or are no run's, are named and refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import miniatures
import pytest
from tiny_runs import make_tiny, settings

from train import checkpoint, loop, report, run
from train.config import Config, ConfigError
from train.trained import Trained

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("checkpoint.pt", "{ no", "File is not a zip file"),
        ("checkpoint.pt", "", "File is not a zip file"),
        ("metrics.json", "{ no", "Expecting property name .*"),
        ("metrics.json", "[]", "it is not a dictionary but of type list"),
        ("metrics.json", "null", "it is not a dictionary but of type NoneType"),
        ("metrics.json", "{}", "config is missing"),
        ("metrics.json", '{"config": null}', "config is of type NoneType"),
        ("metrics.json", json.dumps({"config": Config().settings()}), "there is no 'before' in it"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(name: str, content: str, why: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=rf"--out {tmp_path}: cannot read {name} \({why}\); --overwrite starts"):
        run.run(Config(out=tmp_path, resume=True))


@pytest.fixture(scope="module")
def unfinished(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run that was stopped."""
    out = tmp_path_factory.mktemp("unfinished")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(loop.Interrupted):
        make_tiny(patch)
        run.run(settings(shapes, out), asked_to_stop=miniatures.after(1))
    return out / "checkpoint.pt"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda state: [state], "it is not a dictionary but of type list"),
        (lambda state: state.pop("criterion") and state, "criterion is missing"),
        (lambda state: state | {"history": {}}, "loss is missing"),
        (lambda state: state | {"start": {}}, "note is missing"),
        (lambda state: state | {"step": -5}, "step -5 of 12"),
        (lambda state: state | {"step": 13}, "step 13 of 12"),
        (lambda state: state | {"step": True}, "step True of 12"),
        (lambda state: state | {"config": {1: 2}}, "step 1 of None"),
        (lambda state: state | {"data": {"summary": "x"}}, "class names is missing"),
        (lambda state: state["criterion"]["head"].fill_(999) and state, "Error.* for CrossBatchMemory: head .*"),
        (lambda state: state["criterion"].pop("bank_steps").sum() >= 0 and state, "Error.* bank_steps: missing .*"),
        (lambda state: state | {"drift": {}}, "probes is missing"),
        (lambda state: state["drift"]["probes"][0].update(step="a") or state, "step is of type str"),
        (lambda state: state | {"seconds": 10**400}, "seconds is a number of 1329 bits"),
        (lambda state: state | {"recent_losses": ["a"]}, "recent_losses is of type str"),
        (lambda state: state | {"bad_steps": "a"}, "bad_steps is of type str"),
        (lambda state: state["history"]["loss"].append({}) or state, "step is missing"),
        (
            lambda state: state["history"]["evaluation"].append({"step": 1, "seconds": 0}) or state,
            "recall@1 is missing",
        ),
        (lambda state: state["history"]["memory"].append({"step": 1, "gain": ""}) or state, "gain is of type str"),
        (lambda state: state["history"]["drift"].append({"step": 1, "age": 1}) or state, "uncorrected is missing"),
        (lambda state: state | {"before": {"frozen": {}, "untrained_head": {}}}, "recall@1 is missing"),
        (lambda state: state["before"].pop("frozen") and state, "frozen is missing"),
        (lambda state: state["optimizer"]["state"].clear() or state, "the optimizer's state is missing"),
    ],
)
def test_a_checkpoint_that_is_not_one_of_a_run_is_refused(
    change: Callable[[Any], Any], why: str, unfinished: Path, shapes: Path, tmp_path: Path, tiny: None
) -> None:
    checkpoint.save(tmp_path / "checkpoint.pt", change(checkpoint.load(unfinished)))
    with pytest.raises(
        ConfigError, match=rf"--out {tmp_path}: cannot read checkpoint.pt \({why}\); --overwrite starts"
    ):
        run.run(settings(shapes, tmp_path, resume=True))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda state: state["history"].pop("validation") and state, "validation is missing"),
        (lambda state: state["history"].update(validation="") or state, "validation is of type str"),
        (lambda state: state["before"].pop("validation") and state, "validation is missing"),
        (lambda state: state["best"]["scores"].pop("map@r") and state, "map@r is missing"),
    ],
)
def test_a_checkpoint_without_scores_of_validation_is_refused(
    change: Callable[[Any], Any], why: str, shapes: Path, tmp_path: Path, tiny: None
) -> None:
    config = settings(shapes, tmp_path, batch_size=4, eval_every=1, validation_share=0.5, resume=True)
    with pytest.raises(loop.Interrupted):
        run.run(config, asked_to_stop=miniatures.after(2))
    stored = tmp_path / "checkpoint.pt"
    checkpoint.save(stored, change(checkpoint.load(stored)))
    with pytest.raises(ConfigError, match=rf"cannot read checkpoint.pt \({why}\); --overwrite starts"):
        run.run(config)


@pytest.mark.parametrize("name", ["checkpoint.pt", "metrics.json", "config.yaml", "log.csv"])
def test_a_pipe_is_not_waited_for(name: str, shapes: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=f"{name} in it is a pipe or a device, which no run"):
        run.run(settings(shapes, tmp_path, resume=True))
    if name in ("checkpoint.pt", "metrics.json"):
        for read in (lambda: Trained(tmp_path), lambda: report.write(tmp_path, tmp_path / "x.html")):
            with pytest.raises(ConfigError, match=f"RUN {tmp_path}: cannot read"):
                read()


def test_one_bit_of_a_checkpoint_that_is_wrong_is_noticed(unfinished: Path, shapes: Path, tmp_path: Path) -> None:
    content = bytearray(unfinished.read_bytes())
    where = content.index(checkpoint.load(unfinished)["model"]["head.weight"].numpy().tobytes())
    content[where] ^= 1
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"cannot read checkpoint.pt \(damaged: the checksum of .* --overwrite starts"
    ):
        run.run(settings(shapes, tmp_path, resume=True))
