"""The CPU kernels, and the CUDA kernels executed on the CPU, fuzzed under AddressSanitizer with
UndefinedBehaviorSanitizer, then under ThreadSanitizer: to that a CUDA thread is a thread, a missing barrier a race."""

import math
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from shapes import SHAPES, SIZES

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
FLAGS = ["-std=c++20", "-O1", "-g1", "-fopenmp-simd", "-pthread"]
SANITIZERS = {
    # What ASan sees of itself, the use of a null pointer and what lies beyond an object, goes unchecked by UBSan. -Og
    # with the cheaper of -O1's passes takes 60 % of the time of -O1 to compile, and as long to run.
    "address,undefined": [
        *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        *("-fno-sanitize=null,object-size,pointer-overflow", "-D_GLIBCXX_ASSERTIONS"),
        *("-Og", "-ftree-sra", "-ftree-dse", "-fmove-loop-invariants"),
    ],
    "thread": ["-fsanitize=thread"],
}
CPU_KERNELS = [s for s in sorted((ROOT / "csrc" / "cpu").rglob("*.cpp")) if s.name != "backend.cpp"]  # glue needs torch
CUDA_KERNELS = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))


def build(program, sources, sanitizers, *flags, trusted=()):
    """The trusted sources are compiled without sanitizers, for the baseline alone. They come last, so that of an inline
    function that both have the linker keeps the sanitized one."""
    sanitized = [*FLAGS, *SANITIZERS[sanitizers], *flags]

    def compile(source):
        target = program.parent / f"{source.stem}_{source.suffix[1:]}.o"
        options = [*FLAGS, *flags, "-DXBN_BASELINE_ONLY"] if source in trusted else sanitized
        run(COMPILER, *options, "-x", "c++", "-c", str(source), "-o", str(target))
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, [*sources, *trusted]))
    run(COMPILER, *sanitized, *objects, "-o", str(program))


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


PARTS = 8  # programs; as many run at once as there are processors
ROUNDS = 3  # at random in each part: by size, dtypes and identities of a warp there are 24 kinds


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize(
    "sanitizers, largest, options",
    [
        ("address,undefined", max(SIZES), []),
        ("thread", 257, ["--param=tsan-instrument-func-entry-exit=0"]),  # a report has the line, not who called it
    ],
)
def test_cuda_kernels(sanitizers, largest, options, tmp_path):
    """Every kind of round at random once, and the shapes of the other tests. What threads share is the same in the
    fifth tile as in the ninth, so ThreadSanitizer, half as fast, is spared the largest two sizes."""
    program = tmp_path / "fuzz"
    sources = [*CUDA_KERNELS, ROOT / "tests" / "emu" / "fuzz.cpp"]
    flags = ["-march=native", "-Wno-unknown-pragmas", "-I", str(ROOT / "tests" / "emu" / "include"), *options]
    build(program, sources, sanitizers, *flags, trusted=[*CPU_KERNELS, ROOT / "tests" / "emu" / "products.cpp"])
    by_size = sorted((shape for shape in SHAPES if max(shape) <= largest), key=math.prod, reverse=True)

    def fuzz(part):
        shapes = by_size[part::PARTS]
        output = run(str(program), str(part), str(ROUNDS), *(",".join(map(str, shape)) for shape in shapes))
        assert output.startswith(f"{ROUNDS} rounds, {len(shapes)} shapes"), output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fuzz, range(PARTS)))


@pytest.mark.skipif(COMPILER is None, reason="no g++ or clang++")
@pytest.mark.parametrize("sanitizers, isas", [("address,undefined", []), ("thread", ["best"])])
def test_cpu_kernels(sanitizers, isas, tmp_path):
    """ThreadSanitizer sees the best instruction set only: what threads share is the same for all."""
    program = tmp_path / "fuzz"
    build(program, [*CPU_KERNELS, ROOT / "tests" / "native" / "fuzz.cpp"], sanitizers)
    assert "16 rounds" in run(str(program), "16", *isas)
