"""Builds xbn_ext._C: one library for every torch >= 2.10 and Python >= 3.10 (stable ABI, abi3).

XBN_CUDA=0|1|auto   whether to build CUDA kernels. This version has CPU kernels only: `auto` (the default) and
                    `0` build those, `1` says so and stops.
"""

import os
from glob import glob

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

TORCH_2_10 = "0x020a000000000000"

cuda = os.environ.get("XBN_CUDA", "auto")
if cuda not in ("0", "1", "auto"):
    raise SystemExit(f"XBN_CUDA must be 0, 1 or auto, got {cuda!r}")
if cuda == "1":
    raise SystemExit("XBN_CUDA=1: this version of xbn_ext has no CUDA kernels yet; use XBN_CUDA=0 or auto")

extension = CppExtension(
    "xbn_ext._C",
    sorted([*glob("csrc/*.cpp"), *glob("csrc/cpu/*.cpp")]),
    py_limited_api=True,
    extra_compile_args={
        "cxx": [
            "-O3",
            "-g0",
            "-std=c++20",
            "-fvisibility=hidden",
            "-fopenmp-simd",
            "-ffp-contract=fast",
            "-fno-math-errno",
            "-Wall",
            f"-DTORCH_TARGET_VERSION={TORCH_2_10}",
        ]
    },
)

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
