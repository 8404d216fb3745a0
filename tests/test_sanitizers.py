"""The CPU kernels, and the CUDA kernels executed on the CPU, fuzzed under AddressSanitizer with
UndefinedBehaviorSanitizer, then under ThreadSanitizer: to that a CUDA thread is a thread, a missing barrier a race."""

import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from fuzzers import CPU_KERNELS, CUDA_FUZZ, CUDA_KERNELS, EMU, FUZZ, compile, link, run
from shapes import SHAPES, SIZES

pytestmark = pytest.mark.long

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
def test_cuda_kernels(sanitizers, largest, options, trusted_kernels, tmp_path):
    """Every kind of round at random once, and the shapes of the other tests. What threads share is the same in the
    fifth tile as in the ninth, so ThreadSanitizer, half as fast, is spared the largest two sizes."""
    flags = [*FLAGS, *SANITIZERS[sanitizers], "-march=native", "-Wno-unknown-pragmas", "-I", EMU, *options]
    # The headers of the stand-in for CUDA are compiled once: they are half of what a small kernel takes.
    run("g++", *flags, "-x", "c++-header", EMU / "cuda_runtime.h", "-o", tmp_path / "cuda_runtime.h.gch")
    included = ("-include", tmp_path / "cuda_runtime.h")
    sanitized = compile(tmp_path, "g++", [*CUDA_KERNELS, CUDA_FUZZ], *flags, *included)
    # The CPU's kernels come last, so that of an inline function that both have the linker keeps the sanitized one.
    program = link(tmp_path / "fuzz", "g++", [*sanitized, *trusted_kernels], *flags)
    by_size = sorted((shape for shape in SHAPES if max(shape) <= largest), key=math.prod, reverse=True)

    def fuzz(part):
        shapes = by_size[part::PARTS]
        output = run(program, part, ROUNDS, *(",".join(map(str, shape)) for shape in shapes))
        assert output.startswith(f"{ROUNDS} rounds, {len(shapes)} shapes"), output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fuzz, range(PARTS)))


@pytest.mark.skipif(COMPILER is None, reason="no g++ or clang++")
@pytest.mark.parametrize("sanitizers, isas", [("address,undefined", []), ("thread", ["best"])])
def test_cpu_kernels(sanitizers, isas, tmp_path):
    """ThreadSanitizer sees the best instruction set only: what threads share is the same for all."""
    flags = [*FLAGS, *SANITIZERS[sanitizers]]
    program = link(tmp_path / "fuzz", COMPILER, compile(tmp_path, COMPILER, [*CPU_KERNELS, FUZZ], *flags), *flags)
    assert "16 rounds" in run(program, "16", *isas)
