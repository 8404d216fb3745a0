"""The CPU kernels by another compiler than g++, and for another processor: fuzzed, with the results that g++ has."""

import importlib.util
import platform
import re
import shutil

import pytest
from fuzzers import CPU_KERNELS, FUZZ, ROOT, compile, link, run

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


def build(folder, compiler, *flags):
    """The fuzz, with the objects that it is linked of beside it."""
    objects = compile(folder, compiler, [*CPU_KERNELS, FUZZ], "-pthread", *flags)
    return link(folder / "fuzz", compiler, objects, "-pthread", *flags)


def result(*fuzz, **environ):
    """On its best instruction set: which that is, and the sum of all losses and gradients."""
    output = run(*fuzz, "16", "best", **environ)
    isa, total = re.match(r"16 rounds, best instruction set (\w+), sum (.+)", output).groups()
    return isa, float(total)


@pytest.fixture(scope="module")
def expected(trusted_kernels, tmp_path_factory):
    """The sum by g++, for the baseline."""
    folder = tmp_path_factory.mktemp("gcc")
    fuzz = compile(folder, "g++", [FUZZ], "-std=c++20", "-O1")
    isa, total = result(link(folder / "fuzz", "g++", [*fuzz, *trusted_kernels], "-pthread"))
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
    listing = run(objdump, "--disassemble", "--demangle", tmp_path / "memory_loss_cpp.o")
    products = re.findall(
        r"<void xbn::baseline::(?:similarity_kernel<[18], |gradient_kernel<)6, 4.*?>:\n(.*?)\n\n", listing, re.DOTALL
    )
    assert len(products) == 5  # of float32 in one chain and in eight, of float64; gradients of either
    for body in products:
        assert len(re.findall(r"\tfmla\t", body)) == 24
        assert not re.search(r"\tst[rp]\tq.*\[sp", body), "an accumulator is on the stack"
    listing = run(objdump, "--disassemble", "--demangle", tmp_path / "screen_neon_cpp.o")
    of_bytes = re.findall(r"\tsdot\t.*\tsdot\t", listing, re.DOTALL)
    assert len(of_bytes) == 1 and of_bytes[0].count("\tsdot\t") == 96
    assert "[sp" not in of_bytes[0], "an accumulator is on the stack"
