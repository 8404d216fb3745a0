"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, then under ThreadSanitizer."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="no g++ or clang++")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_kernels(sanitizers, tmp_path):
    sources = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ROOT / "tests" / "native" / "fuzz.cpp"]
    sources = [s for s in sources if s.name != "backend.cpp"]  # the glue needs torch
    program = tmp_path / "fuzz"
    command = [COMPILER, "-std=c++20", "-O1", "-g1", "-fopenmp-simd", "-pthread", f"-fsanitize={sanitizers}"]
    if "undefined" in sanitizers:
        command += ["-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS"]
    built = subprocess.run([*command, *map(str, sources), "-o", str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program), "25"], capture_output=True, text=True)
    assert ran.returncode == 0 and "25 rounds" in ran.stdout, ran.stdout + ran.stderr
