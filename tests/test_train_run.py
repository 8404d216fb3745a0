"""Whole runs: settings, results, repetition, continuation. On drawn shapes, and once on real emoji."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import miniatures
import numpy as np
import pytest
import torch
from full_disk import files_end_after
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

import xbn_ext
from train import checkpoint, events, fonts, loop, losses, making, pictures, recipes, results, run
from train.arguments import parse
from train.augment import evaluation_view
from train.config import METHODS, Config, ConfigError
from train.cores import cores
from train.data import PUBLIC, Dataset, Part

pytestmark = pytest.mark.usefixtures("one_thread")

SCORES = ("recall@1", "recall@10", "recall@100", "map@r")


class TinyBackbone(nn.Module):
    """Convolution, batch normalisation and dropout: what a real backbone is made of, in a millisecond."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.dropout, self.fc = nn.Conv2d(3, 12, 3, 2), nn.BatchNorm2d(12), nn.Dropout(0.1), None

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.dropout(torch.relu(self.bn(self.conv(x)))).mean((2, 3))
        return features


@pytest.fixture
def tiny(no_pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes resnet18 tiny, without pictures."""
    make_tiny(monkeypatch)


def make_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "train.backbones._torchvision",
        lambda config: (TinyBackbone(), 12, run.model.Normalisation((0.0,) * 3, (255.0,) * 3), (False, "tiny")),
    )


def settings(shapes: Path, out: Path, **changes: Any) -> Config:
    return miniatures.settings(shapes, out, **{"backbone": "resnet18"} | changes)


def command(*arguments: object) -> list[str]:
    return [str(argument) for argument in arguments]


# ---- settings -------------------------------------------------------------------------------------------------------


def test_cores_where_openmp_binds_its_threads(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0}, raising=False)
    monkeypatch.delenv("OMP_PROC_BIND", raising=False)
    assert cores() == 1
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    assert cores() == os.cpu_count()


def test_defaults_are_allowed_and_every_setting_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse([]) == Config()
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for name in vars(Config()):
        assert f"--{name.replace('_', '-')}" in text
    assert "(default: 4096)" in text and "(default: 0)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data SOP", "--data SOP: expected 'emoji' or 'icons' or 'folder:PATH'"),
        ("--data folder:~no-such-user/x", "--data folder:~no-such-user/x: the home folder ~no-such-user is not known"),
        ("--data sop:x\udcff/y", r"--data 'sop:x\\udcff/y': is not UTF-8: rename it"),
        ("--method xbn2", "argument --method: invalid choice: 'xbn2'"),
        ("--out=", "argument --out: the name of a folder is empty"),
        ("--cache=", "argument --cache: the name of a folder is empty"),
        ("--steps 0", "--steps 0: must be more than 0"),
        ("--steps x", "argument --steps: invalid int value"),
        ("--lr nan", "--lr nan: must be a finite number"),
        ("--lr -1", "--lr -1.0: must be more than 0"),
        ("--lr 1e300", r"--lr 1e\+300: must be within \[-1e15, 1e15\]"),
        ("--workers 100000", "--workers 100000: must be between 0 and [0-9]+, 16 for each core"),
        ("--batch-size 62", r"--batch-size 62: must be a multiple of --samples-per-class \(4\), twice it or more"),
        ("--batch-size 4", "--batch-size 4: must be"),
        ("--samples-per-class 1", "--samples-per-class 1: must be 2 or more"),
        ("--memory-size 32", r"--memory-size 32: must be --batch-size \(64\) or more"),
        ("--memory-weight -1", "--memory-weight -1.0: must be 0 or more"),
        ("--neg-margin 1.5", "--neg-margin 1.5: must be a cosine similarity"),
        ("--threads 100000", "--threads 100000: must be between 0 and 4096"),
        (f"--warmup-steps {2**63}", f"--warmup-steps {2**63}: must be below 2\\^63"),
        ("--freeze 1.1", "--freeze 1.1: must be between 0 and 1"),
        ("--max-classes 3", "--max-classes 3: must be 4 or more"),
        ("--test-share 1", "--test-share 1.0: must be 0 or more and less than 1"),
        ("--test-share -0.1", "--test-share -0.1: must be 0 or more and less than 1"),
        ("--test-share nan", "--test-share nan: must be a finite number"),
        ("--test-of files", "argument --test-of: invalid choice: 'files'"),
        ("--validation-share 1", "--validation-share 1.0: must be 0 or more and less than 1"),
        ("--best loss", "argument --best: invalid choice: 'loss'"),
        ("--ema-momentum 0", "--ema-momentum 0.0: must be more than 0 and at most 1"),
        ("--accumulate 0", "--accumulate 0: must be more than 0"),
        (f"--accumulate 4 --warmup-steps {2**62}", f"--warmup-steps {2**62}: must be below 2\\^63, times --accumulate"),
        ("--ema 1", "--ema 1.0: must be 0 or more and less than 1, such as 0.99"),
        ("--ema -0.1", "--ema -0.1: must be 0 or more and less than 1"),
        ("--batch-weight 0 --method batch", "--batch-weight 0 leaves nothing to train on"),
        ("--batch-weight 0 --warmup-steps 9 --steps 9", "the memory joins in after --warmup-steps 9 of --steps 9"),
        ("--resume --overwrite", "--resume and --overwrite exclude each other"),
        ("--loss ranked", "argument --loss: invalid choice: 'ranked'"),
        ("--temperature 0.2", "--temperature 0.2: --loss contrastive has no such parameter, only --pos-margin, --neg-"),
        ("--loss supcon --neg-margin 0.5", "--neg-margin 0.5: --loss supcon has no such parameter, only --temperature"),
        ("--loss multi_similarity --reduction mean", "--reduction mean: --loss multi_similarity has no such parameter"),
        ("--loss triplet --m 0.1", "--m 0.1: --loss triplet has no such parameter, only --margin, --mining"),
        ("--loss supcon --temperature 0", "--temperature must be positive, got 0.0"),
        ("--loss ntxent --temperature nan", "--temperature nan: must be a finite number"),
        ("--loss multi_similarity --mining -1", "--mining must be .* >= 0, got -1.0"),
        ("--loss multi_similarity --mining hardest", "--mining hardest: must be a number with --loss multi_similarity"),
        ("--loss triplet --mining 0.1", "--mining must be 'hardest' or 'all', got 0.1"),
        ("--loss triplet --mining all --distance euclidean", '--distance "euclidean" goes with mining="hardest"'),
        ("--loss supcon --distance euclidean", "--distance euclidean: --loss supcon has no such parameter"),
        ("--distance euclidean --neg-margin 3", "--neg-margin 3.0: must be a distance of unit vectors, 0 to 2"),
        ("--loss circle --gamma x", "argument --gamma: invalid float value"),
        ("--recipe sop", "--recipe sop needs --data sop:PATH, PATH being your copy of the data set"),
        ("--recipe cars", "argument --recipe: invalid choice: 'cars'"),
        ("--recipe inshop --data inshop:x --memory-size 8", "--memory-size 8: must be --batch-size"),
        ("--precision float64", "argument --precision: invalid choice: 'float64'"),
    ],
)
def test_a_setting_that_is_not_allowed_is_named(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        parse(arguments.split())
    assert exit.value.code == 2
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "loss"),
    [
        ("", xbn_ext.Contrastive(1.0, 0.5, "avg_nonzero")),
        ("--neg-margin 0 --reduction mean", xbn_ext.Contrastive(1.0, 0.0, "mean")),
        ("--loss supcon", xbn_ext.SupCon()),
        ("--loss supcon --temperature 0.2", xbn_ext.SupCon(0.2)),
        ("--loss ntxent", xbn_ext.NTXent()),
        ("--loss ntxent --temperature 0.5", xbn_ext.NTXent(0.5)),
        ("--loss multi_similarity", xbn_ext.MultiSimilarity()),
        ("--loss multi_similarity --alpha 1 --beta 4 --base 0 --mining 0", xbn_ext.MultiSimilarity(1.0, 4.0, 0.0, 0.0)),
        ("--loss circle", xbn_ext.Circle()),
        ("--loss circle --m 0.25 --gamma 256", xbn_ext.Circle(0.25, 256.0)),
        ("--loss triplet", xbn_ext.Triplet()),
        ("--loss triplet --margin 0 --mining hardest", xbn_ext.Triplet(0.0)),
        ("--loss triplet --mining all", xbn_ext.Triplet(mining="all")),
        ("--distance euclidean", xbn_ext.Contrastive(0.0, 1.0, "avg_nonzero", "euclidean")),
        (
            "--recipe emoji --distance squared_euclidean --neg-margin 3",
            xbn_ext.Contrastive(0.0, 3.0, "avg_nonzero", "squared_euclidean"),
        ),
        ("--recipe emoji --distance cosine", xbn_ext.Contrastive(1.0, 0.5, "avg_nonzero")),
        ("--loss triplet --distance euclidean --soft", xbn_ext.Triplet(0.05, soft=True, distance="euclidean")),
    ],
)
def test_the_loss_is_the_one_asked_for_and_settings_hold_its_parameters_alone(arguments: str, loss: Any) -> None:
    config = parse(arguments.split())
    assert config.pair_loss() == making.make_criterion(config).loss == loss
    stored = config.settings()
    assert losses.LOSSES[stored["loss"]] is type(loss)
    assert {name: value for name, value in stored.items() if name in losses.PARAMETERS} == vars(loss)
    assert Config(loss=stored["loss"], **vars(loss)).settings() == stored, "given or not, a value is the same setting"


def test_parameters_of_losses_say_in_help_which_losses_have_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for said in (
        "supcon, ntxent, dcl, siglip: what similarities are divided by (default: 0.1, 0.07, 0.1, 0.1)",
        "(default: avg_nonzero)",
    ):
        assert said in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data folder:/nowhere", "--data folder:/nowhere: no such folder"),
        ("--data sop:/x --test-share 0", "error: --test-share 0: --data sop:/x has a split of its own, that of the"),
        ("--backbone resnet19", "--backbone resnet19: must be"),
        ("--device tpu7", "--device tpu7: "),
        *([] if torch.backends.mps.is_built() else [("--device mps", "'MPS' backend\n")]),
        ("--device cuda:99", "--device cuda:99: "),
        ("--device meta", "--device meta: xbn_ext has kernels for cpu and cuda only"),
        (
            "--memory-size 99999999999999",
            "--memory-size 99999999999999: with --embedding-dim 128 the memory takes 53,599,999,999,999,464 bytes, and",
        ),
        (f"--memory-size {10**30} --method batch", f"--memory-size {10**30}: with --embedding-dim 128"),
        (
            f"--hidden {10**13}",
            f"--hidden {10**13}: the head and its optimizer take 225,280,000,000,000,000 bytes, and",
        ),
        (f"--hidden {10**20} --embedding-dim 1", f"--hidden {10**20}: the head and its optimizer take"),
        (
            f"--embedding-dim {10**8} --memory-size 2 --samples-per-class 2 --method batch --backbone convnet",
            f"--embedding-dim {10**8}: the head and its optimizer take",
        ),
        (f"--image-size {10**9}", f"--image-size {10**9}: a batch of images takes 192,000,000,000,000,000,000 bytes"),
        (f"--image-size {10**20}", f"--image-size {10**20}: a batch of images takes"),
        ("--out {new}/\udcff", "/\\udcff': is not UTF-8; choose another"),
        ("--out {file}", "exists and is not a folder"),
        ("--out {file}/out/x", "file exists and is not a folder"),
        ("--out {link}", "link is a link that leads to nothing"),
        ("--out {link}/out", "link is a link that leads to nothing"),
        (f"--out {{new}}/{300 * 'x'}", "a name has at most 255 bytes here"),
        (f"--out {{new}}/{130 * 'ü'}", "a name has at most 255 bytes here"),
    ],
)
def test_errors_come_before_any_work(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {name: tmp_path / name for name in ("file", "link", "new")}
    places["file"].touch()
    places["link"].symlink_to("nothing")
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    assert run.main(["--image-size", "32", *arguments.format(**places).split(), *out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m train: error: ") and message in error
    assert set(tmp_path.iterdir()) == {places["file"], places["link"]}, "nothing was written"


@pytest.mark.long
def test_a_terminal_that_lacks_characters_ends_no_run(shapes: Path, tmp_path: Path) -> None:
    data = tmp_path / "Bäume"
    data.symlink_to(shapes)
    arguments = command(
        "--data", f"folder:{data}", "--out", tmp_path / "ö", "--steps", 1, "--backbone", "convnet", "--image-size", 32,
        "--batch-size", 8, "--samples-per-class", 2, "--memory-size", 16, "--threads", 1,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "train", *arguments],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert b"folder B\\xe4ume, train: " in done.stdout


@pytest.mark.long
@pytest.mark.parametrize("closed", ["stdout", "stderr", "reader"])
def test_a_closed_output_ends_no_run(closed: str, shapes: Path, tmp_path: Path) -> None:
    arguments = command(
        "--data", f"folder:{shapes}", "--out", tmp_path / "out", "--steps", 4, "--eval-every", 1, "--backbone",
        "convnet", "--image-size", 32, "--batch-size", 8, "--samples-per-class", 2, "--memory-size", 16, "--threads", 1,
    )  # fmt: skip
    words = "".join(f" '{word}'" for word in [sys.executable, "-u", "-m", "train", *arguments])
    redirected = {"stdout": " >&-", "stderr": " 2>&-", "reader": " | head -1"}[closed]
    subprocess.run(["sh", "-c", words + redirected], check=True, stdout=subprocess.DEVNULL)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["steps"] == 4


def test_a_folder_that_is_read_only_is_named_before_any_work(
    shapes: Path, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(shapes, tmp_path / "finished", steps=1)
    run.run(config)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and mode == os.R_OK)  # root may all
    run.run(config)  # which only shows it
    monkeypatch.setattr(run, "_load", lambda config: pytest.fail("data were read"))
    for out in (tmp_path / "new" / "out", tmp_path):
        with pytest.raises(ConfigError, match=rf"--out {out}: {tmp_path} may not be written to; choose another"):
            run.run(replace(config, out=out))


def test_a_folder_that_may_not_be_entered_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "private").mkdir()
    shut_off(tmp_path / "private", monkeypatch)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "private")
    for out in (tmp_path / "private" / "out", tmp_path / "private"):
        with pytest.raises(ConfigError, match=rf"--out {out}: {tmp_path / 'private'} may not be written to"):
            run.run(Config(out=out))


def shut_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the folder may be looked at, as without its x permission; the tests' user may be root, who may all."""
    real = os.stat

    def stat(path: Any, *arguments: Any, **named: Any) -> os.stat_result:
        if isinstance(path, str | Path) and folder in Path(path).parents:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "stat", stat)


def test_a_folder_that_cannot_be_made_is_named(
    shapes: Path, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(path: Path, **_: Any) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(ConfigError, match=rf"writing {tmp_path / 'out'} failed \(Operation not permitted\)"):
        run.run(settings(shapes, tmp_path / "out"))


def test_results_are_not_written_among_the_images(shapes: Path, tmp_path: Path, tiny: None) -> None:
    images = tmp_path / "images"
    shutil.copytree(shapes, images)
    for out in (images / "runs", images / "corners-03"):
        with pytest.raises(ConfigError, match=rf"--out {out} lies in --data folder:{images}: its pictures would be"):
            run.run(settings(images, out))
        assert not (images / "runs").exists()
    assert run.run(settings(images, images / ".runs", steps=1))["steps"] == 1
    pool = tmp_path / "pool"
    (images / "corners-03").rename(pool)
    (images / "corners-03").symlink_to(pool)
    for out in (pool, pool / "runs"):
        with pytest.raises(ConfigError, match=rf"--out {out} lies in --data folder:{images}: its pictures would be"):
            run.run(settings(images, out))
    assert run.run(settings(images, pool / ".runs", steps=1))["steps"] == 1


def test_more_classes_per_batch_than_there_are(shapes: Path, tmp_path: Path, tiny: None) -> None:
    with pytest.raises(ConfigError, match=r"--batch-size 16 with --samples-per-class 2 needs 8 training classes .* 4"):
        run.run(settings(shapes, tmp_path / "out", batch_size=16))


def test_the_learning_rate_rises_then_falls_to_nothing() -> None:
    config = Config(steps=100, lr_warmup=10)
    rates = [making.learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 1e-3
    assert making.learning_rate(Config(steps=1, lr_warmup=0), 0) == 1


@pytest.mark.parametrize("method", METHODS)
def test_methods_differ_in_the_criterion_alone(method: str) -> None:
    criterion = making.make_criterion(Config(method=method, memory_weight=0.7))
    assert criterion.drift == {"batch": "none", "xbm": "none", "oracle": "none"}.get(method, method)
    assert criterion.memory_weight == (0 if method == "batch" else 0.7)


def test_the_bytes_of_the_memory_are_those_of_its_rows() -> None:
    small, large = (Config(memory_size=size, embedding_dim=24) for size in (100, 1100))
    found = [sum(t.nbytes for t in making.make_criterion(config).state_dict().values()) for config in (small, large)]
    assert (
        found[1] - found[0]
        == making.memory_bytes(large) - making.memory_bytes(small)
        == making.memory_bytes(small) * 10
    )


def test_the_default_filter_follows_the_network_within_a_step() -> None:
    criterion = making.make_criterion(Config(memory_size=64, embedding_dim=8, batch_size=16))
    for _ in range(10):
        criterion(torch.randn(16, 8), torch.arange(16) // 2)
    assert float(criterion.stats()["gain"]) > 0.5, "of a jump more than half is made up for in one step"


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_what_it_promises(
    method: str, shapes: Path, tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run.run(settings(shapes, tmp_path, method=method))
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["method"] == method and metrics["steps"] == 12 and metrics["seed"] == 0 and metrics["seconds"] > 0
    for scores in (metrics, metrics["before"], metrics["untrained_head"]):
        assert all(0 <= scores[name] <= 100 for name in SCORES)
    assert [entry["step"] for entry in metrics["history"]["evaluation"]] == [5, 10, 12]
    assert metrics["history"]["evaluation"][-1]["map@r"] == metrics["map@r"]
    assert [entry["step"] for entry in metrics["history"]["loss"]] == [10, 12]
    assert {entry["age"] for entry in metrics["history"]["drift"]} == {1, 2, 3}
    memory = metrics["history"]["memory"]
    assert [entry["step"] for entry in memory] == [10, 12]
    names = {"step", "fill", "age", "gap_before", "gap_after"}
    of_pairs, of_filter = {"positives", "negatives"}, {"gain"}
    names |= {"batch": set(), "xbm": of_pairs, "oracle": of_pairs}.get(method, of_pairs | of_filter)
    assert all(set(entry) == names for entry in memory)
    assert method != "xbn" or memory[-1]["gap_after"] < 1e-3 < memory[-1]["gap_before"]
    assert metrics["data"]["train_classes"] == metrics["data"]["test_classes"] == 4
    assert metrics["config"]["memory_size"] == 24 and "out" not in metrics["config"]
    assert (tmp_path / "curves.png").exists() and (tmp_path / "neighbours.png").exists()
    assert list((tmp_path / "tensorboard").glob("events.*"))
    printed = capsys.readouterr().out
    assert "backbone alone" in printed and f"trained, {method}" in printed and str(tmp_path / "curves.png") in printed


@pytest.mark.parametrize("augment", ["mild", "photo", "none"])
def test_the_search_example_sees_a_picture_as_the_run_was_tested(
    augment: str, shapes: Path, tmp_path: Path, tiny: None
) -> None:
    from examples import search

    run.run(settings(shapes, tmp_path, augment=augment, steps=1))
    searcher = search.Searcher(tmp_path, shapes)
    image = torch.arange(48 * 64 * 3, dtype=torch.int64).remainder(251).to(torch.uint8).view(3, 48, 64)
    assert torch.equal(searcher.trained.view(image), evaluation_view(32, augment)(image))


def test_the_search_example_leaves_hidden_files_alone_and_says_where_it_shows(
    shapes: Path, tmp_path: Path, tiny: None
) -> None:
    from examples import search

    run.run(settings(shapes, tmp_path / "run", steps=1))
    folder = Path(shutil.copytree(shapes, tmp_path / "folder"))
    (folder / "._picture.png").write_text("what macOS leaves beside a picture")
    (folder / ".thumbnails").mkdir()
    Image.new("RGB", (4, 4)).save(folder / ".thumbnails" / "1.png")
    searcher = search.Searcher(tmp_path / "run", folder)
    assert len(searcher.paths) == 8 * 4  # classes, images of each
    query = searcher.paths[0]
    search.show(query, searcher.nearest(query), tmp_path / "found")
    assert (tmp_path / "found").exists()


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_loss_trains(
    name: str, shapes: Path, tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps on one batch bring its loss down, and a whole run writes down which loss it was."""
    reduction = {"reduction": "mean"} if name == "contrastive" else {}  # avg_nonzero leaves out pairs that become right
    config = settings(shapes, tmp_path, loss=name, method="batch", lr=0.01, backbone_lr=1.0, steps=30, **reduction)
    trainer = loop.Trainer(config, run.model.build(config)[0], run._load(config), torch.device("cpu"))
    images, labels = trainer.batches[0]
    values = [trainer.train_step([(images, labels)]) for _ in range(config.steps)]
    assert all(map(math.isfinite, values)) and (min(values) >= 0 or name == "dcl")
    assert np.mean(values[-5:]) < 0.85 * np.mean(values[:5])

    metrics = run.run(settings(shapes, tmp_path, loss=name))
    assert f"axbn, {name.replace('_', '-')} loss, on cpu" in capsys.readouterr().out
    assert all(math.isfinite(point["loss"]) for point in metrics["history"]["loss"])
    stored = checkpoint.load(tmp_path / "checkpoint.pt")["config"]
    assert stored == metrics["config"] and stored["loss"] == name
    assert losses.defaults(name).items() <= stored.items()


def test_losses_differ_from_one_another(shapes: Path, tmp_path: Path, tiny: None) -> None:
    """From one seed on, in what they cost and in what the network becomes."""
    ends = {}
    for name in losses.LOSSES:
        metrics = run.run(settings(shapes, tmp_path / name, loss=name, steps=4, eval_every=0))
        bias = checkpoint.load(tmp_path / name / "checkpoint.pt")["model"]["head.bias"]
        ends[metrics["history"]["loss"][-1]["loss"]] = tuple(bias.tolist())
    assert len(ends) == len(set(ends.values())) == len(losses.LOSSES)


def test_the_curves_name_the_loss() -> None:
    axes = Figure().subplots()
    pictures._loss(axes, [{"step": 1, "loss": 2.0}], Config(loss="multi_similarity", batch_weight=0.5).settings())
    assert axes.get_ylabel() == "multi-similarity loss, 0.5 batch + 1 memory"
    pictures._loss(axes, [{"step": 1, "loss": 2.0}], Config(method="batch").settings())
    assert axes.get_ylabel() == "contrastive loss, 1 batch"


def test_the_curve_of_a_loss_below_zero_is_in_the_picture() -> None:
    for values, bottom in (([2.0, 0.5], 0.0), ([-7.0, -8.0], None)):
        axes = Figure().subplots()
        points = [{"step": step, "loss": loss} for step, loss in enumerate(values)]
        pictures._loss(axes, points, Config(loss="dcl").settings())
        low, high = axes.get_ylim()
        assert low <= min(values) < max(values) <= high and bottom in (None, low)


def test_a_single_point_of_a_curve_is_seen() -> None:
    of_memory = {"step": 4, "positives": 1.0, "negatives": 2.0, "gap_before": 0.2, "gap_after": 0.1}
    draw_loss = partial(pictures._loss, config=Config().settings())
    for draw, point in (
        (draw_loss, {"step": 4, "loss": 2.0}),
        (pictures._pairs, of_memory),
        (pictures._gap, of_memory),
    ):
        for count, marker in ((1, "o"), (2, "")):
            axes = Figure().subplots()
            draw(axes, [point] * count)
            assert {line.get_marker() for line in axes.get_lines()} == {marker}


def test_curves_without_a_measurement_say_so(
    shapes: Path, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    drift = {"step": 4, "age": 2, "uncorrected": 0.2, "in_memory": 0.1}
    metrics = run.run(settings(shapes, tmp_path, steps=4))
    monkeypatch.undo()
    said: list[str] = []
    monkeypatch.setattr(pictures, "_say", lambda axes, words: said.append(words))
    monkeypatch.setattr(pictures.Figure, "savefig", lambda *_: None)
    for points, times in (([], 2), ([drift], 0)):
        metrics["history"]["drift"] = points
        said.clear()
        pictures.curves(tmp_path / "x.png", metrics)
        assert said == times * ["not measured: the run was too short"]


def test_a_name_with_dollars_is_no_formula(tmp_path: Path) -> None:
    part = Part([np.zeros((8, 8, 3), np.uint8)] * 4, np.array([0, 0, 1, 1]), ("$\\frac{$", "a $5"), ("", "", "", ""))
    data = Dataset("$\\frac{$", part, part, mirror=True)
    nearest = np.array([[1, 2], [3, 0]])
    pictures.neighbours(tmp_path / "x.png", data, np.array([0, 2]), nearest, evaluation_view(8))
    assert (tmp_path / "x.png").exists()


def test_fonts_of_other_scripts_come_after_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts.font_manager, "get_font_names", lambda: ["Comic Sans MS", "Malgun Gothic", "Yu Gothic"])
    assert fonts.families() == ["DejaVu Sans", "Yu Gothic", "Malgun Gothic"]
    drawn = []
    monkeypatch.setattr(pictures.Figure, "savefig", lambda *_, **__: drawn.append(matplotlib.rcParams["font.family"]))
    monkeypatch.setattr(fonts, "families", lambda: ["DejaVu Sans", "Another"])
    part = Part([np.zeros((8, 8, 3), np.uint8)] * 4, np.array([0, 0, 1, 1]), ("猫", "犬"), ("", "", "", ""))
    nearest = np.array([[1, 2], [3, 0]])
    pictures.neighbours(
        Path("x.png"), Dataset("動物", part, part, mirror=True), nearest[:, 0], nearest, evaluation_view(8)
    )
    assert drawn == [["DejaVu Sans", "Another"]]


@pytest.mark.parametrize("name", recipes.NAMES)
def test_a_recipe_says_every_setting_and_the_command_line_overrides_it(name: str) -> None:
    """All that decides a result, except the seed, the images, and what they are for."""
    recipe = recipes.load(name)
    place = [] if recipes.load(name)["data"] in PUBLIC else ["--data", f"{name}:/somewhere"]
    config = parse(["--recipe", name, *place])
    which = {"seed", "max_classes", "test_share", "test_of", "validation_share", "best"}
    assert recipe.keys() | which == config.settings().keys() | {"eval_every", "workers"}
    assert {key: getattr(config, key) for key in recipe if key != "data"} == {
        key: value for key, value in recipe.items() if key != "data"
    }
    changed = parse(
        ["--recipe", name, "--data", "folder:/mine", "--steps", "7", "--neg-margin", "0.3", "--method", "xbm"]
    )
    assert (changed.data, changed.steps, changed.neg_margin, changed.method) == ("folder:/mine", 7, 0.3, "xbm")
    differs = {key for key, value in changed.settings().items() if config.settings()[key] != value}
    assert differs == {"data", "steps", "neg_margin", "method"}
    other = parse(["--recipe", name, *place, "--loss", "supcon"])
    assert other.pair_loss() == xbn_ext.SupCon() and other.memory_size == recipe["memory_size"]


def test_the_recipe_of_the_emoji_is_the_defaults() -> None:
    assert parse(["--recipe", "emoji"]).settings() == Config().settings()


def test_learning_rates() -> None:
    def rates(schedule: str, warmup: int = 4) -> list[float]:
        return [making.learning_rate(Config(schedule=schedule, steps=24, lr_warmup=warmup), step) for step in range(24)]

    assert all(rates(schedule)[:4] == [0.25, 0.5, 0.75, 1.0] for schedule in ("cosine", "step", "constant"))
    assert rates("constant")[4:] == [1.0] * 20
    assert rates("step")[4:] == [1.0] * 14 + [0.1] * 6
    assert "0.7 of the steps that are left" in Config.__dataclass_fields__["schedule"].metadata["help"]
    assert rates("cosine")[4] == 1 and rates("cosine")[14] == pytest.approx(0.5) and rates("cosine")[23] < 0.01
    assert rates("constant", warmup=0) == [1.0] * 24


@pytest.mark.parametrize("changes", [{}, {"features": "frozen"}])
def test_working_processes_change_nothing(
    changes: dict[str, Any], shapes: Path, tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, workers in (("none", 0), ("two", 2)):
        run.run(settings(shapes, tmp_path / name, workers=workers, augment="photo", eval_every=6, **changes))
        assert " images/s prepared, " in (said := capsys.readouterr().out) and ("2 processes" in said) == (
            name == "two"
        )
    ends = [checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("none", "two")]
    assert miniatures.same(*ends)


def test_a_run_writes_its_settings_and_is_found_by_them(shapes: Path, tmp_path: Path, tiny: None) -> None:
    config = settings(shapes, tmp_path / "out", steps=2)
    metrics = run.run(config)
    again = parse(["--config", str(tmp_path / "out" / "config.yaml"), "--out", str(tmp_path / "out")])
    assert again.settings() == config.settings()
    assert run.run(again) == metrics  # finished
    other = settings(shapes, tmp_path / "out", steps=3, overwrite=True)
    run.run(other)
    assert parse(["--config", str(tmp_path / "out" / "config.yaml")]).steps == 3


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_large_gradient_is_scaled_down(precision: str, shapes: Path, tmp_path: Path, tiny: None) -> None:
    """All of it by one factor, after 16 bits have been scaled back."""
    found = []
    for clip in (0.0, 1e-3, 1e6):
        config = settings(shapes, tmp_path, clip_grad=clip, precision=precision)
        trainer = loop.Trainer(config, run.model.build(config)[0], run._load(config), torch.device("cpu"))
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, enabled=precision == "float16")
        images, labels = next(trainer._batches())
        trainer.train_step([(images, labels)])
        gradient = [p.grad for group in trainer.optimizer.param_groups for p in group["params"]]
        found.append(torch.cat([g.flatten() for g in gradient if g is not None]))
    whole, clipped, left = found
    assert whole.norm() > 1e-3
    torch.testing.assert_close(clipped, 1e-3 * whole / whole.norm(), rtol=1e-3, atol=0)
    torch.testing.assert_close(left, whole)


def test_weight_decay_is_beside_adam_or_part_of_the_gradient(shapes: Path, tmp_path: Path, tiny: None) -> None:
    """Without a gradient AdamW only shrinks weights; Adam takes the decay for a gradient, of whatever size."""
    shrunk = {}
    for name in ("adamw", "adam"):
        config = settings(shapes, tmp_path, optimizer=name, weight_decay=0.5, lr=0.01)
        network = run.model.build(config)[0]
        optimizer = making.make_optimizer(config, network)
        before = network.head.weight.detach().clone()
        network.head.weight.grad = torch.zeros_like(before)
        optimizer.step()
        shrunk[name] = before - network.head.weight.detach()
    torch.testing.assert_close(shrunk["adamw"], 0.01 * 0.5 * before)
    torch.testing.assert_close(shrunk["adam"], 0.01 * before.sign(), rtol=1e-3, atol=1e-5)


@pytest.mark.singly
@pytest.mark.parametrize(
    ("method", "update"), [("axbn", "inplace"), ("axbn", "deferred"), ("xbm", "inplace"), ("oracle", "inplace")]
)
@pytest.mark.parametrize("stop", [1, 4, 6])  # 4: an evaluation is due
def test_a_continued_run_ends_where_an_uninterrupted_one_does(
    method: str, update: str, stop: int, shapes: Path, tmp_path: Path, tiny: None
) -> None:
    straight = run.run(settings(shapes, tmp_path / "straight", method=method, update=update, eval_every=4))
    part = settings(shapes, tmp_path / "parts", method=method, update=update, eval_every=4, resume=True)
    with pytest.raises(loop.Interrupted):
        run.run(part, asked_to_stop=miniatures.after(stop))
    assert checkpoint.load(tmp_path / "parts" / "checkpoint.pt")["step"] == stop
    torch.manual_seed(100)  # whatever happened in between
    continued = run.run(part)
    ends = [checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("straight", "parts")]
    assert ends[0]["step"] == 12
    assert miniatures.same(*ends)
    for name in (*SCORES, "before", "history"):
        assert miniatures.same(straight[name], continued[name])


@pytest.mark.singly
@pytest.mark.parametrize("changes", [{"freeze": 0.0}, {"freeze": 0.5}, {"features": "frozen"}])
@pytest.mark.parametrize("pretrained", [(False, True), (True, False), (True, True)])
def test_a_continued_run_keeps_the_weights_that_it_began_with(
    changes: dict[str, Any], pretrained: tuple[bool, bool], shapes: Path, tmp_path: Path, tiny: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also if pretrained ones have come to the machine since, have gone or are others."""
    straight, parts = (settings(shapes, tmp_path / name, **changes) for name in ("straight", "parts"))
    for now in range(2):

        def build(config: Config, now: int = now) -> Any:
            backbone = TinyBackbone()
            with torch.no_grad():
                backbone.conv.weight.add_(now)
            return backbone, 12, run.model.Normalisation((0.0,) * 3, (255.0,) * 3), (pretrained[now], f"weights {now}")

        monkeypatch.setattr("train.backbones._torchvision", build)
        if now == 0:
            run.run(straight)
            with pytest.raises(loop.Interrupted):
                run.run(parts, asked_to_stop=miniatures.after(6))
    assert run.run(replace(parts, resume=True))["backbone"] == "resnet18: weights 0"
    assert miniatures.same(*(checkpoint.load(config.folder / "checkpoint.pt") for config in (straight, parts)))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_run_in_16_bits_trains_and_continues_exactly(
    precision: str, shapes: Path, tmp_path: Path, tiny: None
) -> None:
    changes = {"precision": precision, "optimizer": "adam", "schedule": "step", "augment": "photo", "eval_every": 4}
    straight = run.run(settings(shapes, tmp_path / "straight", **changes))
    part = settings(shapes, tmp_path / "parts", resume=True, **changes)
    with pytest.raises(loop.Interrupted):
        run.run(part, asked_to_stop=miniatures.after(5))
    run.run(part)
    ends = [checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("straight", "parts")]
    assert miniatures.same(*ends)
    assert bool(ends[0]["scaler"]) == (precision == "float16")
    assert all(value.dtype == torch.float32 for name, value in ends[0]["model"].items() if "batches" not in name)
    assert all(math.isfinite(point["loss"]) for point in straight["history"]["loss"])
    full = run.run(settings(shapes, tmp_path / "full", **changes | {"precision": "float32"}))
    assert full["history"]["loss"] != straight["history"]["loss"]
    assert full["history"]["loss"][0]["loss"] == pytest.approx(straight["history"]["loss"][0]["loss"], rel=0.05)


def test_gradients_that_overflow_are_skipped_and_scaled_less(shapes: Path, tmp_path: Path, tiny: None) -> None:
    config = settings(shapes, tmp_path, precision="float16")
    trainer = loop.Trainer(config, run.model.build(config)[0], run._load(config), torch.device("cpu"))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    images, labels = trainer.batches[0]
    before = trainer.model.head.weight.detach().clone()
    assert math.isfinite(trainer.train_step([(images, labels)]))
    assert torch.equal(before, trainer.model.head.weight) and trainer.scaler.get_scale() == 2.0**99
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer.train_step([(images, labels)])
    assert not torch.equal(before, trainer.model.head.weight)


def test_two_runs_of_the_same_settings_agree_and_another_seed_does_not(
    shapes: Path, tmp_path: Path, tiny: None
) -> None:
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        run.run(settings(shapes, tmp_path / name, seed=seed, eval_every=0))
    one, two, other = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("one", "two", "other"))
    assert miniatures.same(one, two)
    assert not miniatures.same(one["model"], other["model"])


def test_a_finished_run_is_not_repeated(
    shapes: Path, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run.run(settings(shapes, tmp_path))
    monkeypatch.setattr(run.model, "build", lambda config: pytest.fail("did work"))
    capsys.readouterr()
    for changes in ({}, {"resume": True}, {"eval_every": 3, "threads": 0}):
        assert run.run(settings(shapes, tmp_path, **changes)) == first
        assert "finished" in (printed := capsys.readouterr().out) and "trained, axbn" in printed
    with pytest.raises(ConfigError, match=r"a finished run with other settings \(--lr 0.001 there, 0.5 now\)"):
        run.run(settings(shapes, tmp_path, lr=0.5))


def test_an_unfinished_run_is_neither_lost_nor_mixed_up(shapes: Path, tmp_path: Path, tiny: None) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(loop.Interrupted):
        run.run(settings(shapes, tmp_path), asked_to_stop=miniatures.after(3))
    with pytest.raises(ConfigError, match="holds an unfinished run: continue it with --resume, or --overwrite it"):
        run.run(settings(shapes, tmp_path))
    with pytest.raises(ConfigError, match=r"an unfinished run with other settings .*--seed 0 there, 1 now"):
        run.run(settings(shapes, tmp_path, seed=1, resume=True))
    with pytest.raises(ConfigError, match=r"--loss contrastive there, supcon now; .*--temperature None there, 0.1 now"):
        run.run(settings(shapes, tmp_path, loss="supcon", resume=True))
    with pytest.raises(ConfigError, match=r"an unfinished run with other settings \(--neg-margin 0.5 there, 0.4 now\)"):
        run.run(settings(shapes, tmp_path, neg_margin=0.4, resume=True))
    others = tmp_path / "tensorboard" / "mine"
    others.mkdir()
    (others / "events.out.tfevents.0").touch()
    before = set((tmp_path / "tensorboard").rglob("events.*"))
    assert len(before) == 4, "the run's, those of its two curves in one chart, and another's"
    metrics = run.run(settings(shapes, tmp_path, seed=1, overwrite=True))
    assert metrics["seed"] == 1
    assert (tmp_path / "notes.txt").read_text() == "mine", "--overwrite removes what runs write and nothing else"
    now = set((tmp_path / "tensorboard").rglob("events.*"))
    assert before & now == set(others.iterdir()) and len(now) == 4, "of the earlier run no curve is left"


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda path: shutil.rmtree(path / "corners-05"), "its class names, "),
        (lambda path: (path / "corners-05").rename(path / "corners-11"), "class names, image names"),
        (lambda path: swap(path / "corners-03" / "red.png", path / "corners-08" / "red.png"), "its images \\("),
        (lambda path: (path / "corners-05" / "red.png").rename(path / "corners-05" / "a.png"), "its image names"),
        (
            lambda path: shutil.copy(path / "corners-05" / "red.png", path / "corners-05" / "a.png"),
            "its labels, image names, images",
        ),
    ],
)
def test_a_run_does_not_go_on_with_other_data(
    change: Callable[[Path], Any], where: str, shapes: Path, tmp_path: Path, tiny: None
) -> None:
    path, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(shapes, path)
    config = settings(path, out, batch_size=4)
    with pytest.raises(loop.Interrupted):
        run.run(config, asked_to_stop=miniatures.after(3))
    before = (out / "checkpoint.pt").read_bytes()
    change(path)
    with pytest.raises(ConfigError, match=rf"an unfinished run on other data: .* has changed since in .*{where}"):
        run.run(replace(config, resume=True))
    assert (out / "checkpoint.pt").read_bytes() == before
    assert run.run(replace(config, overwrite=True))["steps"] == 12


def swap(one: Path, other: Path) -> None:
    """Of two files each gets the content of the other."""
    first, second = one.read_bytes(), other.read_bytes()
    assert len(first) != len(second)
    one.write_bytes(second)
    other.write_bytes(first)


def test_a_checkpoint_of_an_earlier_version_goes_on_with_a_note(
    shapes: Path, tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(loop.Interrupted):
        run.run(settings(shapes, tmp_path), asked_to_stop=miniatures.after(3))
    stored = checkpoint.load(tmp_path / "checkpoint.pt")
    del stored["data"], stored["start"]
    checkpoint.save(tmp_path / "checkpoint.pt", stored)
    assert run.run(settings(shapes, tmp_path, resume=True))["steps"] == 12
    assert f"make sure that --data folder:{shapes} has not changed since" in capsys.readouterr().err
    assert set(checkpoint.load(tmp_path / "checkpoint.pt")["data"]) >= {"class names", "labels", "images"}


def test_resume_without_a_run_starts_one(shapes: Path, tmp_path: Path, tiny: None) -> None:
    assert run.run(settings(shapes, tmp_path / "new", resume=True))["steps"] == 12


@pytest.fixture
def full_disk() -> Iterator[None]:
    with files_end_after(100_000):
        yield


@pytest.mark.parametrize(
    ("name", "write", "content"),
    [
        ("checkpoint.pt", checkpoint.save, {"model": torch.zeros(200_000)}),
        ("metrics.json", checkpoint.write_json, {"history": "." * 200_000}),
    ],
)
def test_what_cannot_be_written_is_named_and_leaves_the_old_file_whole(
    name: str, write: Callable[..., None], content: dict[str, Any], full_disk: None, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(ConfigError, match=rf"writing {tmp_path / name} failed \(File too large\): make sure .* room"):
        write(tmp_path / name, content)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"old")]


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
        (lambda state: state | {"drift": {}}, "there is no 'probes' in it"),
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


def test_one_bit_of_a_checkpoint_that_is_wrong_is_noticed(unfinished: Path, shapes: Path, tmp_path: Path) -> None:
    content = bytearray(unfinished.read_bytes())
    where = content.index(checkpoint.load(unfinished)["model"]["head.weight"].numpy().tobytes())
    content[where] ^= 1
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"cannot read checkpoint.pt \(damaged: the checksum of .* --overwrite starts"
    ):
        run.run(settings(shapes, tmp_path, resume=True))


@pytest.mark.parametrize("name", ["curves.png", "tensorboard"])
def test_a_picture_or_a_log_that_cannot_be_written_is_named(
    name: str, shapes: Path, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        *{"curves.png": (results.pictures, "curves"), "tensorboard": (events.SummaryWriter, "__init__")}[name], fail
    )
    with pytest.raises(ConfigError, match=rf"writing {tmp_path}.* failed \(No space left on device\)"):
        run.run(settings(shapes, tmp_path, steps=1))
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("last_step", [True, False])
def test_a_log_that_cannot_be_written_to_later_is_named(
    last_step: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    log = events.Events(tmp_path, 0)
    monkeypatch.setattr(log.file_writer.event_writer._async_writer._writer, "write", fail)
    log.add_scalar("loss", 0.5, 1)
    with pytest.raises(ConfigError, match=rf"writing {tmp_path} failed \(No space left on device\)"):
        if not last_step:
            log.file_writer.event_writer._async_writer._byte_queue.join()
            log.add_scalar("loss", 0.5, 2)
        log.close()
    assert not capsys.readouterr().err, "of the thread no traceback"


@pytest.mark.parametrize("changes", [{}, {"resume": True}, {"overwrite": True}])
def test_what_no_run_makes_is_not_removed(changes: dict[str, bool], tmp_path: Path) -> None:
    for name, kind in (("checkpoint.pt", "a folder"), ("metrics.json", "a folder"), ("tensorboard", "a file")):
        out = tmp_path / name
        out.mkdir()
        (out / name).mkdir() if kind == "a folder" else (out / name).touch()
        with pytest.raises(ConfigError, match=rf"--out {out}: {name} in it is {kind}, which no run makes: move it"):
            run.run(Config(out=out, **changes))


def test_a_loss_that_is_not_finite_changes_nothing_and_ends_the_run_after_a_while(
    shapes: Path, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, _ = run.model.build(settings(shapes, tmp_path))
    trainer = loop.Trainer(
        settings(shapes, tmp_path), network, run._load(settings(shapes, tmp_path)), torch.device("cpu")
    )
    images, labels = trainer.batches[0]
    with torch.no_grad():
        trainer.model.head.bias[0] = math.nan
    before = {name: value.clone() for name, value in trainer.model.state_dict().items() if "running" not in name}
    for _ in range(loop.MAX_BAD_STEPS - 1):
        assert not math.isfinite(trainer.train_step([(images, labels)]))
    assert all(np.array_equal(value, trainer.model.state_dict()[name], equal_nan=True) for name, value in before.items()
               if "num_batches" not in name)  # fmt: skip
    assert int(trainer.criterion.count) == 0 and not trainer.drift.probes
    with pytest.raises(loop.TrainingError, match=r"the loss was nan in each of the 10 steps up to step 9: lower --lr"):
        trainer.train_step([(images, labels)])


def test_embeddings_that_are_not_finite_have_no_scores(shapes: Path, tmp_path: Path, tiny: None) -> None:
    config = settings(shapes, tmp_path)
    trainer = loop.Trainer(config, run.model.build(config)[0], run._load(config), torch.device("cpu"))
    with torch.no_grad():
        trainer.model.head.bias[0] = math.inf
    with pytest.raises(loop.TrainingError, match=r"after 0 steps: embeddings must be finite.*--lr"):
        trainer.scores(trainer.test_embeddings())


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_ctrl_c_leaves_a_run_that_can_be_continued(shapes: Path, tmp_path: Path) -> None:
    small = command(
        "--data", f"folder:{shapes}", "--image-size", 32, "--batch-size", 8, "--samples-per-class", 2, "--memory-size",
        16,
    )  # fmt: skip
    arguments = [*small, "--steps", "100000", "--eval-every", "100000", "--threads", "1", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "train", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell starts with & ignores it
    )  # fmt: skip  # -u: into a pipe it would write by the page, so next to nothing before its end
    assert process.stdout is not None
    for line in process.stdout:
        if "results in" in line:
            break
    while not (tmp_path / "checkpoint.pt").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "with --resume continues" in error
    assert 0 < checkpoint.load(tmp_path / "checkpoint.pt")["step"] < 100000


@pytest.mark.parametrize("begun", [True, False])
def test_ctrl_c_outside_of_training_ends_in_a_line(
    begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: Config) -> None:
        if begun:
            (tmp_path / "checkpoint.pt").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_load", interrupted)
    assert run.main(command("--backbone", "convnet", "--image-size", 32, "--out", tmp_path)) == 130
    goes_on = f"; the same command with --resume continues from {tmp_path}"
    assert capsys.readouterr().err == f"stopped{goes_on if begun else ''}\n"


@pytest.mark.long
def test_a_killed_run_continues_from_its_last_checkpoint_to_the_same_numbers(
    shapes: Path, tmp_path: Path, no_pictures: None
) -> None:
    small = command(
        "--data", f"folder:{shapes}", "--image-size", 32, "--batch-size", 8, "--samples-per-class", 2, "--memory-size",
        16, "--backbone", "convnet", "--steps", 100, "--eval-every", 20, "--threads", 1, "--resume", "--out",
    )  # fmt: skip
    arguments = [sys.executable, "-m", "train", *small, str(tmp_path / "killed")]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stored = tmp_path / "killed" / "checkpoint.pt"
    while not (stored.exists() and checkpoint.load(stored)["step"] > 0):
        assert process.poll() is None
    process.kill()
    process.wait(60)
    assert not (tmp_path / "killed" / "metrics.json").exists()
    found = []
    for name in ("whole", "killed"):
        assert run.main([*small, str(tmp_path / name)]) == 0
        history = json.loads((tmp_path / name / "metrics.json").read_text())["history"]
        found.append(history | {"evaluation": [{**point, "seconds": 0} for point in history["evaluation"]]})
    assert found[0] == found[1]


@pytest.mark.long
def test_two_methods_on_real_emoji(emoji_cache: Path, tmp_path: Path) -> None:
    """The whole program as a user runs it, with a pretrained network, on the smallest data that mean something."""
    small = command("--max-classes", 40, "--batch-size", 24, "--memory-size", 96, "--steps", 12, "--eval-every", 6)
    common = [*small, *command("--image-size", 32, "--threads", 1, "--cache", emoji_cache, "--resume")]
    metrics = {}
    for method in ("xbm", "axbn"):
        assert run.main([*common, "--method", method, "--out", str(tmp_path / method)]) == 0
        metrics[method] = json.loads((tmp_path / method / "metrics.json").read_text())
    assert metrics["xbm"]["before"] == metrics["axbn"]["before"]
    assert metrics["xbm"]["history"]["loss"] != metrics["axbn"]["history"]["loss"]
    assert len(metrics["axbn"]["data"]["credit"]) == 8
    for picture in ("xbm/curves.png", "axbn/neighbours.png"):
        with Image.open(tmp_path / picture) as image:
            assert min(image.size) > 400 and np.asarray(image.convert("L")).std() > 5
    stale = metrics["xbm"]["history"]["drift"]
    assert stale and all(entry["in_memory"] == pytest.approx(entry["uncorrected"], abs=1e-6) for entry in stale)
