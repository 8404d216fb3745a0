"""The glue compiles with the headers of the oldest torch that pyproject.toml lets build it, and registers its ops."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch

from xbn_ext.schemas import SCHEMAS

ROOT = Path(__file__).parent.parent
OLDEST = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
COMPILER = shutil.which("g++") or shutil.which("clang++")
FLAGS = ["-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", "-Wall", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
GLUE = [
    *("extension.cpp", "cpu/backend.cpp", "cuda/backend.cpp", "cuda/torch_cuda.cpp", "cuda/missing.cpp"),
    *("cuda/loss/memory_loss.cpp", "loss_way.cpp"),
]
# A library of these and of a device that computes nothing needs no kernel. It registers all ops, under its own name.
LIBRARY = ["extension.cpp", "cuda/missing.cpp", "loss_way.cpp", "cpu/cpu.cpp"]
NO_DEVICE = """
#include "glue/ops.h"

struct NoDevice {
  NoDevice(const char*, const xbn::Tensor&) {}
  void check_counter(const char*, const xbn::Tensor&, int64_t) const {}
  template <typename Ranking>
  void check_way(const Ranking&, const xbn::LossSpec&) const {}
  template <typename Kernel>
  void run(const Kernel&) const {}
  void multiply(const xbn::Tensor&, const xbn::Tensor&, const xbn::Tensor&) const {}
};

XBN_TORCH_LIBRARY_IMPL(XBN_LIBRARY, XBN_CUDA_KEY, m) { xbn::glue::register_ops<NoDevice>(m); }
"""
NAMES = """
import sys, torch
library = torch.library.Library("xbn_oldest", "DEF")
for schema in sys.argv[2:]:
    library.define(schema)
torch.ops.load_library(sys.argv[1])
names = [op for op in torch._C._dispatch_get_all_op_names() if op.startswith("xbn_oldest::")]
keys = ("CUDA", "CompositeExplicitAutograd")
print(*(op for op in names if any(torch._C._dispatch_has_kernel_for_dispatch_key(op, key) for key in keys)))
assert torch.ops.xbn_oldest.cuda_architectures() == ""
"""

pytestmark = [pytest.mark.long, pytest.mark.skipif(COMPILER is None, reason="no g++ or clang++")]


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def headers():
    """The folder of torch's headers, kept in build/. They are the same on every machine, and the wheel for aarch64,
    without CUDA, is the smallest: 146 MB."""
    kept = ROOT / "build" / f"torch-{OLDEST}-headers"
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            which = ["--platform", "manylinux_2_28_aarch64", "--python-version", "3.11", f"torch=={OLDEST}"]
            done = subprocess.run([*pip, *which, "--dest", folder], capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"pip finds no torch {OLDEST}: {done.stderr.strip()[-200:]}")
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith("torch/include/")])
            os.replace(Path(folder, "torch", "include"), kept)
    return kept


def test_glue(headers, tmp_path):
    include = [f"-I{headers}", f"-I{sysconfig.get_paths()['include']}", f"-I{ROOT / 'csrc'}"]

    def compile(source):
        target = tmp_path / f"{source.replace('/', '_')}.o"
        options = ["-DXBN_LIBRARY=xbn_oldest", "-DXBN_CUDA_KEY=CUDA", "-c", folders[source] / source, "-o", target]
        assert "warning" not in run(COMPILER, *FLAGS, *include, *options)
        return target

    (tmp_path / "no_device.cpp").write_text(NO_DEVICE)
    folders = dict.fromkeys([*GLUE, *LIBRARY], ROOT / "csrc") | {"no_device.cpp": tmp_path}
    objects = {source: compile(source) for source in folders}
    parts = [objects[source] for source in [*LIBRARY, "no_device.cpp"]]
    library = tmp_path / "xbn_oldest.so"
    torch_libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    run(COMPILER, "-shared", *parts, *torch_libraries, "-o", library)
    registered = run(sys.executable, "-c", NAMES, library, *SCHEMAS).splitlines()[-1]
    defined = {schema.partition("(")[0] for schema in SCHEMAS}
    assert set(registered.split()) == {f"xbn_oldest::{op}" for op in defined - {"_peak_fma"}}
