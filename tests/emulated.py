"""The CUDA kernels executed on the CPU: the functions of `xbn_ext.ops`, over the very sources of `csrc/cuda`.

Built on first use into `build/emu`, by g++ with the stand-in for <cuda_runtime.h> in `tests/emu/include`.
"""

from pathlib import Path

import torch
from torch.utils.cpp_extension import load

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "emu"


def build():
    FOLDER.mkdir(parents=True, exist_ok=True)
    sources = ["csrc/schema.cpp", "csrc/cpu/cpu.cpp", "csrc/cuda/path.cpp", "csrc/cuda/backend.cpp"]
    sources += ["tests/emu/module.cpp", "tests/emu/torch_cuda.cpp"]
    sources = [str(ROOT / source) for source in sources]
    for kernel in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):  # g++ takes a .cu for a linker script
        wrapper = FOLDER / f"{kernel.stem}_cu.cpp"
        text = f'#include "{kernel}"\n'
        if not wrapper.exists() or wrapper.read_text() != text:
            wrapper.write_text(text)
        sources.append(str(wrapper))
    return load(
        "xbn_emu",
        sources,
        extra_cflags=[
            *(
                "-O3",
                "-std=c++20",
                "-march=native",
                "-Wno-unknown-pragmas",
                "-ffp-contract=fast",
                "-fvisibility=hidden",
            ),
            *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DXBN_LIBRARY=xbn_emu", "-DXBN_CUDA_KEY=CPU"),
        ],
        extra_include_paths=[str(ROOT / "tests" / "emu" / "include")],
        build_directory=str(FOLDER),
        with_cuda=False,
    )


executor = build()

_ops = torch.ops.xbn_emu
moments = _ops.moments
track_ = _ops.track_
transform_ = _ops.transform_
enqueue_ = _ops.enqueue_


def standardize_(bank, sums, scale, shift, count, eps=1e-6):
    return _ops.standardize_(bank, sums, scale, shift, count, eps)


class _MemoryLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, args):
        value, grad_z = _ops.memory_loss(z, *args, ctx.needs_input_grad[0])
        ctx.save_for_backward(grad_z)
        return value

    @staticmethod
    def backward(ctx, grad_value):
        return grad_value * ctx.saved_tensors[0], None


def memory_loss(
    z, labels, bank, bank_labels, loss, *, count=None, scale=None, shift=None, exclude=None, anchors=None,
    renormalize=True, eps=1e-6,
):  # fmt: skip
    args = (
        labels, bank.detach(), bank_labels, count, scale, shift, exclude, anchors, loss.kind, loss.parameters,
        loss.reduction, renormalize, eps,
    )  # fmt: skip
    return _MemoryLoss.apply(z, args)
