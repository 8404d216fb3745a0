"""Settings in a file: what a run writes is what it was told, and what is wrong with a file is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from train import recipes, settings_file
from train.arguments import parse
from xbn_ext.losses import LOSSES

PLACES = {"sop": "sop:x", "inshop": "inshop:x", "deepfashion2": "deepfashion2:x"}
COMMANDS = [
    "",
    "--method xbn --lr 1e-5 --seed 7 --max-classes 40 --test-share 0.25 --validation-share 0.2 --best recall@1",
    "--loss triplet --soft --margin 0.2 --no-center-gradient",
    "--loss triplet --mining all",
    "--loss multi_similarity --mining 0.1",
    "--loss contrastive --distance euclidean --reduction mean",
    *(f"--loss {name}" for name in LOSSES),
    *(f"--recipe {name} --data {PLACES.get(name, 'emoji')}" for name in recipes.NAMES),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_s_own_settings_are_read_as_they_were(command: str, tmp_path: Path) -> None:
    config, file = parse(command.split()), tmp_path / "config.yaml"
    file.write_text(settings_file.text(config), encoding="utf-8")
    again = parse(["--config", str(file)])
    assert again.settings() == config.settings()
    assert (again.out, again.resume, again.eval_every) == (None, False, config.eval_every)


def test_the_command_line_overrides_the_file_and_that_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("recipe: emoji-small\nbatch-size: 32\nlr: 1e-4\nsteps: 70\nout: runs/é\nhidden: null\n")
    config = parse([f"--config={file}", "--steps", "80"])
    assert (config.backbone, config.batch_size, config.lr, config.steps) == ("convnet", 32, 1e-4, 80)
    assert config.out == Path("runs/é") and config.hidden == 0
    assert parse(["--config", str(file), "--recipe", "emoji"]).backbone == "efficientnet-lite0"
    file.write_text("center_gradient: false\n")
    assert not parse(["--config", str(file)]).center_gradient
    assert parse(["--config", str(file), "--center-gradient"]).center_gradient
    file.write_text("# nothing yet\n")
    assert parse(["--config", str(file)]) == parse([])


def test_another_loss_than_the_file_s_has_its_own_parameters(tmp_path: Path) -> None:
    """As with a recipe: a margin of similarities is not one of distances."""
    file = tmp_path / "c.yaml"
    file.write_text(settings_file.text(parse(["--neg-margin", "0.3", "--steps", "7"])))
    euclidean = parse(["--config", str(file), "--distance", "euclidean"])
    assert euclidean.pair_loss() == parse(["--distance", "euclidean"]).pair_loss() and euclidean.steps == 7
    assert parse(["--config", str(file), "--loss", "supcon"]).pair_loss() == parse(["--loss", "supcon"]).pair_loss()
    same = parse(["--config", str(file), "--distance", "cosine", "--loss", "contrastive", "--pos-margin", "0.9"])
    assert (same.pair_loss().parameters, same.reduction) == ([0.9, 0.3], "avg_nonzero")
    of_another = [
        ("temperature: 0.2", "--loss supcon"), ("distance: euclidean\nmargin: 0.3", "--loss triplet"),
        ("neg_margin: 0.4", "--distance euclidean"),
    ]  # fmt: skip
    for content, command in of_another:  # what names no loss is for that of the command line
        file.write_text(content)
        said = [f"--{line.replace(': ', '=').replace('_', '-')}" for line in content.split("\n")]
        words = command.split()
        assert parse(["--config", str(file), *words]).pair_loss() == parse([*said, *words]).pair_loss()
    file.write_text("loss: contrastive\nneg_margin: 0.3\n")
    assert parse(["--config", str(file), "--distance", "euclidean"]).neg_margin is None, "it is of a cosine"
    assert parse(["--config", str(file), "--distance", "cosine"]).neg_margin == 0.3
    file.write_text("loss: triplet\nsoft: true\n")
    assert parse(["--config", str(file), "--loss", "triplet"]).soft
    assert parse(["--config", str(file), "--loss", "ntxent"]).soft is None


@pytest.mark.parametrize("name", ["a\x85b", "a\u2028b", "a\nb", "a\tb", "é", "a: b", "~", "a #b"])
def test_a_name_of_any_characters_is_read_as_it_was(name: str, tmp_path: Path) -> None:
    config, file = parse(["--data", f"folder:{name}"]), tmp_path / "config.yaml"
    file.write_text(settings_file.text(config), encoding="utf-8")
    assert parse(["--config", str(file)]).data == config.data


def test_numbers_and_dates_are_what_is_written(tmp_path: Path) -> None:
    """As on the command line; in YAML they are 1.1, 8, 1000, a date."""
    file = tmp_path / "c.yaml"
    file.write_text("out: 1.10\nseed: 010\nsteps: 1_000\ndata: folder:2026_12_03\ncache: 2026-12-03\nlr: 1e-3\n")
    config = parse(["--config", str(file)])
    assert (str(config.out), config.data, str(config.cache)) == ("1.10", "folder:2026_12_03", "2026-12-03")
    assert (config.seed, config.steps, config.lr) == (10, 1000, 0.001)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- lr", r"--config .*c\.yaml: must have lines such as 'batch_size: 64'"),
        ("lr: !!float abc", "argument --lr: invalid float value: 'abc'"),
        ("soft: !!bool abc", r"--config .*c\.yaml: cannot be read: 'abc'"),
        ("steps: 2024-13-45", "argument --steps: invalid int value: '2024-13-45'"),
        ("lr: " + "[" * 3000, r"--config .*c\.yaml: cannot be read: maximum recursion depth exceeded"),
        ('out: "a\\0b"', r"argument --out: 'a\\x00b' has a null character, which no name has"),
        ('data: "folder:a\\0b"', r"--data 'folder:a\\x00b': has a null character, which no name has"),
        ("lr: 1\nlr: 2", r"--config .*c\.yaml: cannot be read: lr is there twice"),
        ("eval_every: 1\neval-every: 2", r"--config .*c\.yaml: eval.every and eval.every are one setting"),
        ("lr: [1", r"--config .*c\.yaml: cannot be read: while parsing a flow sequence"),
        ("learning_rate: 1", r"--config .*c\.yaml: there is no setting learning_rate; --help lists them"),
        ("config: c.yaml", r"--config .*c\.yaml: there is no setting config"),
        ("1: 2", r"--config .*c\.yaml: there is no setting 1"),
        ("overwrite: true", r"--config .*c\.yaml: overwrite belongs on the command line"),
        ("lr: [1, 2]", r"--config .*c\.yaml: lr must be a number or a text, got \['1', '2'\]"),
        ("data: no", r"--config .*c\.yaml: data must be a number or a text, got False"),
        ("soft: 1", r"--config .*c\.yaml: soft must be true or false, got '1'"),
        ("lr: fast", "argument --lr: invalid float value: 'fast'"),
        ("lr: -1", "--lr -1.0: must be more than 0"),
        (b"\xff", r"--config .*c\.yaml: cannot be read: .*utf-8"),
        (None, r"--config .*c\.yaml: cannot be read: .*No such file"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(
    content: str | bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit, match=r"^2$"):
        parse(["--config", str(file)])
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
