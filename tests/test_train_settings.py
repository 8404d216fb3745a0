"""Settings on the command line: defaults, help, recipes, the loss that they ask for, and what is not allowed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import xbn_ext
from train import data, losses, making, recipes, run
from train.arguments import parse
from train.config import Config
from train.cores import cores
from train.data import PUBLIC

pytestmark = pytest.mark.usefixtures("one_thread")


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
        ("--best recall@1", "--best recall@1: must be map@r without --validation-share"),
        ("--out ~no-one-here/x", "argument --out: '~no-one-here/x' cannot be found, as there is no such home folder"),
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
        ("--loss dclw --sigma 0.3", xbn_ext.DCLW(0.1, 0.3)),
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
        "supcon, ntxent, dcl, dclw, siglip: what similarities are divided by (default: 0.1, 0.07, 0.1, 0.1, 0.1)",
        "(default: avg_nonzero)",
    ):
        assert said in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data folder:/nowhere", "--data folder:/nowhere: no such folder"),
        *((f"--data {kind}:{{circle}}{below}", "--data " + kind) for kind in data.KINDS for below in ("", "/x")),
        ("--out {circle}", "circle is a link that leads to nothing"),
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
        (f"--out {{new}}{400 * '/123456789'}", "its path may have 3,584 bytes here; choose a shorter one"),
    ],
)
def test_errors_come_before_any_work(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {name: tmp_path / name for name in ("file", "link", "new", "circle")}
    places["file"].touch()
    places["link"].symlink_to("nothing")
    places["circle"].symlink_to("circle")
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    assert run.main(["--image-size", "32", *arguments.format(**places).split(), *out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m train: error: ") and message in error
    assert set(tmp_path.iterdir()) == {places[name] for name in ("file", "link", "circle")}, "nothing was written"


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
