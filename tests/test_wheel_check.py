"""The checks of a wheel and of a source archive: they know every op and the state of a memory, and name what they can't
read."""

import tarfile
import zipfile

import pytest

from tools.package_check import __main__ as package
from tools.wheel_check import __main__ as one_wheel
from tools.wheel_check import inside


def test_every_op_has_a_check():
    inside.check_ops("cpu")


def test_training_is_compared_with_the_reference():
    inside.check_training("cpu")


def make_wheel(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.dist-info/METADATA", "Requires-Dist: torch>=2.10\nRequires-Python: >=3.10\n")
    return path


@pytest.mark.parametrize("bad", ["missing", "folder", "text", "truncated"])
def test_a_file_that_cannot_be_checked_is_named(bad, tmp_path, capsys):
    wheel, file = make_wheel(tmp_path / "x.whl"), tmp_path / bad
    if bad == "folder":
        file.mkdir()
    elif bad == "text":
        file.write_text("text")
    elif bad == "truncated":
        with tarfile.open(file, "w:gz") as tar:
            tar.add(__file__)
        file.write_bytes(file.read_bytes()[:-100])
    assert package.main([str(wheel), str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"{file} is not a source archive: ")
    for main in (package.main, one_wheel.main):
        assert main([str(file), str(file)][: 2 if main is package.main else 1]) == 2
        assert capsys.readouterr().err.startswith(f"{file} is not a wheel: ")
