"""The CPU kernels by another compiler than g++, and for another processor: fuzzed, with the results that g++ has."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CPU_KERNELS = [s for s in sorted((ROOT / "csrc" / "cpu").rglob("*.cpp")) if s.name != "backend.cpp"]  # glue needs torch
AARCH64 = ["aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump", "qemu-aarch64"]

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("g++") is None, reason="no g++ for x86-64"),
]


def cpu_flags(machine):
    spec = importlib.util.spec_from_file_location("xbn_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    return setup.cpu_flags(machine)


def run(*command, **environ):
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(folder, compiler, *flags):
    """The fuzz, with the objects that it is linked of beside it."""

    def compile(source):
        target = folder / f"{source.stem}.o"
        run(compiler, "-pthread", *flags, "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, [*CPU_KERNELS, ROOT / "tests" / "native" / "fuzz.cpp"]))
    run(compiler, "-pthread", *flags, *objects, "-o", folder / "fuzz")
    return folder / "fuzz"


def result(*fuzz, **environ):
    """On its best instruction set: which that is, and the sum of all losses and gradients."""
    output = run(*fuzz, "16", "best", **environ)
    isa, total = re.match(r"16 rounds, best instruction set (\w+), sum (.+)", output).groups()
    return isa, float(total)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The sum by g++, for any x86-64."""
    flags = ["-O1", "-std=c++20", "-fopenmp-simd", "-DXBN_BASELINE_ONLY"]
    isa, total = result(build(tmp_path_factory.mktemp("gcc"), "g++", *flags))
    assert isa == "baseline"
    return pytest.approx(total, rel=1e-6)  # most of it is float32


@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++")
def test_clang(expected, tmp_path):
    """clang does not vectorize all that it is asked to, and warns."""
    fuzz = build(tmp_path, "clang++", *cpu_flags("x86_64"), "-Werror", "-Wno-pass-failed")
    every_isa = run(fuzz, "16")
    best = re.search(r"instruction set (\w+)", every_isa)[1]
    isas = ["baseline", "avx2", "avx512", "avx512_vnni"]
    for isa in isas[: isas.index(best) + 1] if best in isas else ["baseline", "avx2", best]:
        assert result(fuzz, XBN_CPU_ISA=isa) == (isa, expected)


@pytest.mark.skipif(not all(map(shutil.which, AARCH64)), reason=f"not all there: {', '.join(AARCH64)}")
def test_aarch64(expected, tmp_path):
    compiler, objdump, emulator = AARCH64
    fuzz = build(tmp_path, compiler, *cpu_flags("aarch64"), "-Werror", "-static")
    assert result(emulator, fuzz) == ("neon", expected)
    listing = run(objdump, "--disassemble", "--demangle", tmp_path / "memory_loss.o")
    products = re.findall(
        r"<void xbn::baseline::(?:similarity_kernel<[18], |gradient_kernel<)6, 4.*?>:\n(.*?)\n\n", listing, re.DOTALL
    )
    assert len(products) == 5  # of float32 in one chain and in eight, of float64; gradients of either
    for body in products:
        assert len(re.findall(r"\tfmla\t", body)) == 24
        assert not re.search(r"\tst[rp]\tq.*\[sp", body), "an accumulator is on the stack"
    listing = run(objdump, "--disassemble", "--demangle", tmp_path / "screen_neon.o")
    of_bytes = re.findall(r"\tsdot\t.*\tsdot\t", listing, re.DOTALL)
    assert len(of_bytes) == 1 and of_bytes[0].count("\tsdot\t") == 96
    assert "[sp" not in of_bytes[0], "an accumulator is on the stack"
