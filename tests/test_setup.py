"""setup.py, with stand-ins for torch, nvcc and nvidia-smi: what it builds for, and that it says what is missing."""

import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools.wheel_check.built import copy_sources

ROOT = Path(__file__).parent.parent
CPP_EXTENSION = """
from setuptools import Extension
from setuptools.command.build_ext import build_ext as BuildExtension
def CppExtension(name, sources, extra_compile_args, **options):
    return Extension(name, sources, extra_compile_args=extra_compile_args["cxx"], **options)
"""
NO_COMPILER = (
    "xbn_ext needs a C++ compiler and there is no {} on PATH: install g++, or name the compiler in CXX. XBN_NATIVE=0 "
    "installs it without kernels: plain PyTorch, several times slower"
)
NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.1" ;;
  --dryrun) echo "#$ TOP={top}" >&2 ;;
  --list-gpu-code) echo sm_75 sm_80 sm_86 sm_90 sm_100 ;;
  --list-gpu-arch) echo compute_75 compute_80 compute_86 compute_90 compute_100 ;;
esac
"""


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def run(tmp_path):
    """Runs setup.py where there are only the programs of tmp_path/bin; its output in the end, one line if it failed."""

    def run(*arguments, torch="2.10.0", **environ):
        modules = tmp_path / "modules"
        for name, text in {
            "torch/__init__.py": f"__version__ = {torch!r}\n",
            "torch/utils/__init__.py": "",
            "torch/utils/cpp_extension.py": CPP_EXTENSION,
        }.items():
            (modules / name).parent.mkdir(parents=True, exist_ok=True)
            (modules / name).write_text(text)
        (tmp_path / "bin").mkdir(exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("XBN_", "CUDA_", "CXX"))}
        done = subprocess.run(
            [sys.executable, "setup.py", "--quiet", *arguments, "--build-temp", tmp_path, "--build-lib", tmp_path],
            cwd=ROOT, capture_output=True, text=True,
            env=kept | {"PATH": str(tmp_path / "bin"), "PYTHONPATH": str(modules)} | environ,
        )  # fmt: skip
        return done.returncode, done.stderr.strip().splitlines()

    return run


def test_no_compiler(run):
    status, lines = run("build_ext", XBN_CUDA="0")
    assert status == 1 and lines[0] == "xbn_ext: building CPU kernels only"
    assert lines[1:] == [NO_COMPILER.format("c++")]
    assert run("build_ext", XBN_CUDA="0", CXX="clang++ -pthread")[1][-1] == NO_COMPILER.format("clang++")


@pytest.mark.parametrize(
    "XBN_NATIVE, says", [("no", "XBN_NATIVE must be 0, 1 or auto, got 'no'"), ("1", "c++ on PATH")]
)
def test_whether_to_build_is_asked_for_clearly(run, XBN_NATIVE, says):
    status, lines = run("build_ext", XBN_CUDA="0", XBN_NATIVE=XBN_NATIVE)
    assert status == 1 and says in lines[-1]


@pytest.mark.long
def test_without_kernels(tmp_path):
    """Where there is neither a compiler nor torch: a wheel for any system. It computes."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "no_torch").mkdir()
    (tmp_path / "no_torch" / "torch.py").write_text("raise ModuleNotFoundError('No module named torch')")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XBN_", "CUDA_", "CXX"))}
    sources = copy_sources(tmp_path / "sources")
    (sources / "xbn_ext" / "_C.abi3.so").write_text("of an earlier build")
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", tmp_path], cwd=sources,
        capture_output=True, text=True,
        env=kept | {"PATH": str(tmp_path / "bin"), "PYTHONPATH": str(tmp_path / "no_torch"), "XBN_NATIVE": "0"},
    )  # fmt: skip
    assert done.returncode == 0 and "xbn_ext: XBN_NATIVE=0, so no kernels are built" in done.stderr, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        file.extractall(tmp_path / "there")
    files = [*ROOT.glob("xbn_ext/**/*.py"), *ROOT.glob("train/**/*.py"), *ROOT.glob("train/pages/*")]
    assert names == {re.sub("^train/", "xbn_train/", path.relative_to(ROOT).as_posix()) for path in files} | {
        "xbn_ext/py.typed"
    }
    code = """
import torch, xbn_ext
criterion = xbn_ext.CrossBatchMemory(xbn_ext.Contrastive(), 8, 16)
print(xbn_ext.__file__, xbn_ext.build_info()["native"], criterion(torch.randn(4, 8), torch.arange(4)).isfinite().item())
"""
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "there", capture_output=True, text=True, env=kept
    )
    assert said.stdout.split() == [str(tmp_path / "there" / "xbn_ext" / "__init__.py"), "False", "True"], said.stderr
    assert said.stderr.count("install a wheel for this platform") == 1


@pytest.mark.long
def test_pip_ends_with_what_is_lacking(tmp_path):
    (tmp_path / "bin").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XBN_", "CUDA_", "CXX"))}
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", tmp_path / "there",
         copy_sources(tmp_path / "sources")],
        capture_output=True, text=True, env=kept | {"PATH": str(tmp_path / "bin"), "XBN_CUDA": "0"},
    )  # fmt: skip
    said = (done.stdout + done.stderr).partition("[end of output]")[0].strip()
    assert done.returncode != 0 and "Traceback" not in said
    assert said.splitlines()[-1].strip() == NO_COMPILER.format("c++")


@pytest.mark.parametrize("version", ["2.9.1+cu128", "1.13.0"])
def test_old_torch(run, version):
    status, lines = run("build_ext", torch=version)
    assert status == 1 and lines == [f'building xbn_ext needs torch >= 2.10, not {version}: pip install "torch>=2.10"']


@pytest.mark.long
@pytest.mark.parametrize(
    "release, has_runtime, says",
    [
        (None, False, "nvcc is not on PATH: install the CUDA toolkit, or name its folder in CUDA_HOME"),
        ("11.8", True, "nvcc is of CUDA 11.8 and at least 12.0 is needed: install a later toolkit"),
        ("13.0", False, "nvcc has no static runtime, libcudart_static.a: install the package of its toolkit that has"),
    ],
)
def test_no_nvcc_to_build_with(run, tmp_path, release, has_runtime, says):
    if release is not None:
        program(tmp_path / "bin" / "nvcc", NVCC.format(release=release, top=tmp_path))
    if has_runtime:
        program(tmp_path / "lib64" / "libcudart_static.a", "")
    status, lines = run("build_ext", XBN_CUDA="1")
    assert status == 1 and len(lines) == 1 and lines[0].startswith("XBN_CUDA=1, but ") and says in lines[0]
    _, lines = run("build_ext")  # without CUDA, then: it is the C++ compiler that is missing in the end
    assert lines[0].startswith("xbn_ext: ") and says in lines[0]
    assert lines[1] == "xbn_ext: building CPU kernels only" and len(lines) == 3


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("xbn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_targets(setup):
    """Where the sources ask for the architecture, it is that of the GPU or an older one of its generation."""
    assert setup.targets(setup.ARCHITECTURES.split(";")) == [
        "-gencode=arch=compute_75,code=[sm_75]",
        "-gencode=arch=compute_80,code=[sm_80,sm_86,compute_80]",
        "-gencode=arch=compute_90a,code=[sm_90a]",
        "-gencode=arch=compute_100,code=[sm_100,sm_120]",
    ]
    assert setup.targets(["86", "90", "90a", "120a", "90-ptx"]) == [
        "-gencode=arch=compute_86,code=[sm_86]",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
        "-gencode=arch=compute_90a,code=[sm_90a]",
        "-gencode=arch=compute_120a,code=[sm_120a]",
    ]


@pytest.mark.parametrize(
    "answer, names",
    [
        ("9.0", ["90a"]),
        ("8.6\n7.5\n8.6", ["75", "86"]),
        ("12.0", ["100-ptx"]),  # later than this nvcc
        ("8.9\n10.0", ["86-ptx", "100"]),
        ("7.0", ["80"]),
        ("No devices were found", ["80"]),
        (None, ["80"]),
    ],
)
def test_native(setup, tmp_path, monkeypatch, answer, names):
    program(tmp_path / "bin" / "nvcc", NVCC.format(release="13.0", top=tmp_path))
    program(tmp_path / "lib64" / "libcudart_static.a", "")
    if answer is not None:
        program(tmp_path / "bin" / "nvidia-smi", f"#!/bin/sh\necho '{answer}'\n")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XBN_CUDA_ARCHS", "native")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert setup.choose_architectures(setup.Nvcc.find()) == names


@pytest.mark.parametrize(
    "top, folder",
    [
        ("/usr/local/cuda/bin/..", "/usr/local/cuda/targets/x86_64-linux/lib"),
        ("/usr/lib/nvidia-cuda-toolkit/bin/..", "/usr/lib/x86_64-linux-gnu"),
        ("/usr/lib/nvidia-cuda-toolkit", "/usr/lib/aarch64-linux-gnu"),
    ],
)
def test_runtime_folders(setup, top, folder):
    folders = setup.runtime_folders(f"#$ _HERE_=x\n#$ TOP={top}\n#$ LIBRARIES=y\n")
    assert Path(folder) in folders
    debian = [name for name in folders if name.parent == Path("/usr/lib")]
    assert bool(debian) == ("nvidia-cuda-toolkit" in top)


@pytest.mark.long
@pytest.mark.parametrize("free_threaded", [False, pytest.param(True, marks=pytest.mark.long)])
def test_stable_abi(free_threaded, tmp_path):
    """Not where Python has none; setuptools refuses it there."""
    code = f"""
import sysconfig
get = sysconfig.get_config_var
sysconfig.get_config_var = lambda name: {free_threaded} if name == "Py_GIL_DISABLED" else get(name)
from setuptools import Distribution
from distutils.core import run_setup
wheel = run_setup("setup.py", ["bdist_wheel"], stop_after="commandline").get_command_obj("bdist_wheel")
wheel.ensure_finalized()
[extension] = wheel.distribution.ext_modules
print(wheel.py_limited_api, extension.py_limited_api)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"XBN_CUDA": "0"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ("False False" if free_threaded else "cp310 True")
