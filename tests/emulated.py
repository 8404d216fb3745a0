"""The CUDA kernels executed on the CPU, from the sources in `csrc/cuda`: `ops`, what `xbn_ext.ops` is put over.

Built on first use into `build/xbn_emu`, by g++ with the stand-in for <cuda_runtime.h> in `tests/emu/include`.
"""

import fcntl
from pathlib import Path

import torch
from torch.utils.cpp_extension import load

from xbn_ext import _library

ROOT = Path(__file__).parent.parent
FLAGS = [
    *("-O1", "-std=c++20", "-march=native", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-unknown-pragmas"),
    *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DXBN_CUDA_KEY=CPU"),
]  # fmt: skip
MODULE = ["csrc/extension.cpp", "csrc/cpu/cpu.cpp", "csrc/loss_way.cpp"]
defined = {}


def build(name, sources):
    """Loads a library of kernels as `torch.ops.<name>`, built if need be."""
    if name not in defined:
        defined[name] = _library.define(name)
    folder = ROOT / "build" / name
    folder.mkdir(parents=True, exist_ok=True)

    def compilable(source):
        if not source.endswith(".cu"):
            return str(ROOT / source)
        wrapper = folder / f"{Path(source).stem}_cu.cpp"  # g++ takes a .cu for a linker script
        text = f'#include "{ROOT / source}"\n'
        if not wrapper.exists() or wrapper.read_text() != text:
            wrapper.write_text(text)
        return str(wrapper)

    with open(folder / "building", "w") as building:
        fcntl.flock(building, fcntl.LOCK_EX)  # tests run in several processes
        (folder / "lock").unlink(missing_ok=True)  # torch's, of a process that was stopped: it would wait for ever
        return load(
            name,
            [compilable(source) for source in [*MODULE, *sources]],
            extra_cflags=[*FLAGS, f"-DXBN_LIBRARY={name}"],
            extra_include_paths=[str(ROOT / "tests" / "emu" / "include")],
            build_directory=str(folder),
            with_cuda=False,
        )


KERNELS = sorted(str(kernel.relative_to(ROOT)) for kernel in (ROOT / "csrc" / "cuda").rglob("*.cu"))
GLUE = ["csrc/cuda/backend.cpp", "csrc/cuda/loss/memory_loss.cpp", "tests/emu/module.cpp", "tests/emu/torch_cuda.cpp"]
executor = build("xbn_emu", [*GLUE, *KERNELS])

ops = torch.ops.xbn_emu  # for `xbn_ext.ops.over`


def screen(
    z, labels, bank, bank_labels, margin, *, count=None, scale=None, shift=None, anchors=None, renormalize=True,
    eps=1e-6, bounded=True, moved=None,
):  # fmt: skip
    """Which pairs may have a weight, `[B, M]` bool, and how many it counted. Not `bounded`: as if fp16 were exact.
    `moved`: how many rows of the bank the map is written into."""
    (B, D), M = z.shape, len(bank)
    mask = torch.full((B, (M + 31) // 32), -1, dtype=torch.int32)  # of rows beyond the count it stays so
    tensors = (z, labels, bank, bank_labels, count, scale, shift, anchors, moved)
    assert all(t is None or t.is_contiguous() for t in tensors)
    addresses = (0 if t is None else t.data_ptr() for t in tensors)
    of_dtype = getattr(executor, f"screen_{str(bank.dtype).removeprefix('torch.')}")
    found = of_dtype(*addresses, B, M, D, renormalize, eps, margin, bounded, mask.data_ptr())
    bits = mask[:, :, None] >> torch.arange(32, dtype=torch.int32) & 1
    return bits.reshape(B, -1)[:, :M].bool(), found
