"""What nvcc made of the CUDA kernels, read from the library that is installed: nothing spills, accesses are wide."""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

import xbn_ext
from xbn_ext import _C

ARCHITECTURES = xbn_ext.build_info()["cuda"]
SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
KERNELS = {  # by their names in the sources
    name
    for source in [*SOURCES.rglob("*.cu"), *SOURCES.rglob("*.cuh")]
    for name in re.findall(r"__global__[^;{]*?(\w+_kernel)\(", source.read_text())
}
MACHINE_CODE = {name for name in ARCHITECTURES if not name.endswith("-ptx")}


def tool(name):
    """A tool of the CUDA toolkit: on PATH, or from its package on PyPI."""
    packaged = Path(sysconfig.get_paths()["purelib"]).glob(f"nvidia/**/bin/{name}")
    return shutil.which(name) or next(map(str, packaged), None)


CUOBJDUMP = tool("cuobjdump")
pytestmark = [
    pytest.mark.skipif(not ARCHITECTURES, reason="built without nvcc"),
    pytest.mark.skipif(
        CUOBJDUMP is None, reason="no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    ),
]


def dump(*options, of=_C.__file__, folder=None):
    path = str(Path(CUOBJDUMP).parent) + os.pathsep + os.environ["PATH"]  # it calls nvdisasm
    command = [CUOBJDUMP, *options, str(of)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path}, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def machine_code(architecture, kernels, folder):
    """{name: listing}, of these kernels and those compiled with them: to list all of the library takes three times as
    long."""
    dump("--extract-elf", f".sm_{architecture}.cubin", folder=folder)
    code = {}
    for cubin in folder.glob("*.cubin"):
        if any(kernel.encode() in cubin.read_bytes() for kernel in kernels):
            for part in dump("--dump-sass", of=cubin).split("Function : ")[1:]:
                name, _, code[name] = part.partition("\n")
    return code


def in_flight(body):
    """The most 16-byte reads of global memory between two instructions that compute, which wait for what was read."""
    between = re.split(r"\b[DF](?:ADD|MUL|FMA)\b", body)
    return max(len(re.findall(r"LDG\.E\.128", part)) for part in between)


def resources():
    """(architecture, kernel, {"REG": …, "STACK": …, "SHARED": …}) of every kernel in the library."""
    architecture = kernel = None
    for line in dump("--dump-resource-usage").splitlines():
        if found := re.search(r"arch = sm_(\w+)", line):
            architecture = found[1]
        elif found := re.search(r"Function (\S+):", line):
            kernel = found[1]
        elif "REG:" in line:
            yield architecture, kernel, {name: int(n) for name, n in re.findall(r"\b([A-Z]+):(\d+)", line)}


def test_every_architecture_is_there():
    assert {architecture for architecture, _, _ in resources()} == MACHINE_CODE
    assert set(re.findall(r"\.sm_(\w+)\.ptx", dump("--list-ptx"))) == {
        name.removesuffix("-ptx") for name in ARCHITECTURES if name.endswith("-ptx")
    }


@pytest.mark.skipif(not MACHINE_CODE, reason="only code that the driver compiles")
def test_nothing_spills():
    """A spilled register, or an array that is indexed at run time, would be a stack frame."""
    found = list(resources())
    names = {kernel for _, kernel, _ in found}
    for kernel in KERNELS:
        assert any(kernel in name for name in names), f"{kernel} is missing"
    for architecture, kernel, use in found:
        assert use["STACK"] == 0 and use["LOCAL"] == 0, f"{kernel} on sm_{architecture}: {use}"
        assert use["SHARED"] <= 48 << 10, f"{kernel} on sm_{architecture}: {use}"  # what every GPU gives without asking


@pytest.mark.long
@pytest.mark.parametrize("architecture", [name for name in ("75", "80", "90a", "120") if name in ARCHITECTURES])
def test_accesses_are_as_wide_as_the_kernels_say(architecture, tmp_path):
    code = machine_code(
        architecture,
        ["sweep_kernel", "rewrite_kernel", "moments_kernel", "store_kernel", "gradient_kernel", "normalize_kernel"],
        tmp_path,
    )
    sweeps = {name: body for name, body in code.items() if "sweep_kernel" in name}
    assert len(sweeps) == 20
    for name, body in sweeps.items():
        if "Lb1E" in name and architecture == "75":  # it has no such tensor cores
            assert len(body.splitlines()) < 50
            continue
        if "Lb1E" in name:
            assert len(re.findall(r"HMMA\.1688\.F32\.TF32", body)) >= 18
            # Anchors and rows, to shared memory, and rows of the gradient.
            assert len(re.findall(r"LDGSTS\.E\.BYPASS\.128", body)) >= (2 if is_narrow(name) else 4)
            assert not is_narrow(name) or len(re.findall(r"LDGSTS\.E\.64", body)) >= 2
            assert has_wide_reads(name, body, 1)
            continue
        assert len(re.findall(r"LDG\.E\.128", body)) >= 6  # anchors and rows of the similarities, rows of the gradient
        assert len(re.findall(r"LDS(?:\.U)?\.128", body)) >= 32
        assert re.search(r"STG\.E\.128", body)
        assert len(re.findall(r"\bFFMA\b", body)) >= 256
    for width in ("IfLi4E", "IdLi2E", "7Float16ELi8E", "8BFloat16ELi8E"):
        rewrites = [body for name, body in code.items() if "rewrite_kernel" in name and width in name]
        assert len(rewrites) == (3 if "IfLi4E" in width else 2)  # transform_, standardize_; of float32 to count, too
        for body in rewrites:
            assert len(re.findall(r"LDG\.E\.128", body)) >= 4 and len(re.findall(r"STG\.E\.128", body)) >= 4
    for kernel, reads in (("usable_kernelIfLi4E", 4), ("moments_kernelIfLb1ELi4E", 8), ("storable_kernelIffLi4E", 4),
                          ("store_kernelIffLi4E", 8), ("gradient_kernelIfLi4E", 4)):  # fmt: skip
        (body,) = [body for name, body in code.items() if kernel in name]
        assert in_flight(body) >= reads, kernel
    for width in ("IfLi4E", "IdLi2E"):
        normalizes = [body for name, body in code.items() if "normalize" in name and width in name]
        assert len(normalizes) == 2  # forward and backward
        for body in normalizes:
            assert re.search(r"LDG\.E\.128", body) and re.search(r"STG\.E\.128", body)


def is_narrow(kernel):
    """Whether its bank is of 16 bits."""
    return "Float16E" in kernel  # in BFloat16E, too


def has_wide_reads(kernel, body, n):
    """Whether it reads four values of a row at once, in so many places."""
    if is_narrow(kernel):
        return len(re.findall(r"LDG\.E\.64", body)) >= n and not re.search(r"LDG\.E\.U16", body)
    return len(re.findall(r"LDG\.E\.128", body)) >= n


def innermost_loop(body, instruction):
    """The instructions of the shortest loop that has this one."""
    code = [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", body)]
    loops = []
    for end, text in code:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) <= end:
            loops.append([text for address, text in code if int(target[1], 16) <= address <= end])
    return min((loop for loop in loops if any(instruction in text for text in loop)), key=len)


@pytest.mark.parametrize("architecture", [name for name in ("80", "86", "90a", "120") if name in ARCHITECTURES])
def test_the_screen_waits_for_memory_only(architecture, tmp_path):
    """Of a warp's 16 rows x 64 columns x 64 anchors: as many products as there must be, wide loads, no barrier, and
    no more other instructions than a multiprocessor issues while such rows come from memory."""
    code = machine_code(architecture, ["screen_kernel", "pair_kernel"], tmp_path)
    screens = {name: body for name, body in code.items() if "screen_kernel" in name}
    assert len(screens) == 16
    for name, body in screens.items():
        loop = innermost_loop(body, "HMMA")
        counted = r"HMMA\.16816\.F32\b", r"LDG\.E\.128", r"STG\.E\.128", "FFMA", "BAR", "LDL", "STL"
        times = {what: sum(bool(re.search(rf"\b{what}", text)) for text in loop) for what in counted}
        products, moves = 16 if "Li1024E" in name else 32, "Lb1E" in name
        assert list(times.values()) == [products, 4 if is_narrow(name) else 8, 8 * moves, 64, 0, 0, 0], times
        assert len(loop) <= (350 if is_narrow(name) else 330 if moves else 300)  # with the conversions, or the stores
    for name, body in code.items():
        if "pair_kernel" not in name:
            continue
        assert has_wide_reads(name, body, 8)
        assert re.search(r"STG\.E\.128", body)


@pytest.mark.parametrize("architecture", [name for name in ("80", "86", "90a", "120") if name in ARCHITECTURES])
def test_products_of_halves_wait_for_memory_only(architecture, tmp_path):
    """Similarities: of a warp's 16 rows x 64 columns against 64 anchors, or 32. The gradient: of its 32 rows x 32
    columns for 64 anchors, with one barrier, after which there are the weights of the next rows."""
    code = machine_code(architecture, ["similarity_kernel", "weighted_rows_kernel"], tmp_path)
    counted = r"HMMA\.16816\.F32\b", r"LDG\.E\.128", r"LDG\.E\.64", "FFMA", "BAR", "LDL", "STL"
    found = {"similarity": 0, "weighted_rows": 0}
    for name, body in code.items():
        kernel = next((kernel for kernel in found if f"{kernel}_kernel" in name), None)
        if kernel is None:
            continue
        found[kernel] += 1
        loop = innermost_loop(body, "HMMA")
        times = [sum(bool(re.search(rf"\b{what}", text)) for text in loop) for what in counted]
        if kernel == "similarity":
            products = 96 if "kernelILi4E" in name else 48  # kBands
            assert times == [products, 4 if is_narrow(name) else 8, 0, 64, 0, 0, 0], (name, times)
            assert len(loop) <= (530 if is_narrow(name) else 460), (name, len(loop))
        else:
            of_weights = 4 if "Li8E" in name else 8  # kWarps
            rows = [0, 8 + of_weights] if is_narrow(name) else [8, of_weights]
            assert times == [96, *rows, 32, 1, 0, 0], (name, times)
            assert len(loop) <= (750 if is_narrow(name) else 670), (name, len(loop))
    assert found == {"similarity": 6, "weighted_rows": 6}
