"""Builds xbn_ext._C: one library for every torch >= 2.10 and Python >= 3.10 (stable ABI, abi3), with CPU kernels and,
if the CUDA compiler is there, with CUDA kernels beside them. The torch it is built with may be a CPU-only one.

XBN_CUDA=0|1|auto   whether to build CUDA kernels; auto (the default): if nvcc is found
XBN_CUDA_ARCHS      for which GPUs, as in "80;90a;120-ptx"; a number is machine code for that architecture, "-ptx" code
                    that the driver compiles for any later one
CUDA_HOME           the toolkit, if nvcc is not on PATH
MAX_JOBS            how many compilers run at once
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

TORCH_2_10 = "0x020a000000000000"
ARCHITECTURES = "75;80;86;89;90a;100;120;80-ptx"  # those of them that the nvcc at hand knows
OLDEST_NVCC = (12, 0)  # of those that know C++20
CUDA_SOURCES = sorted(glob("csrc/cuda/*.cu"))
CUDA_HEADERS = [*glob("csrc/*.h"), *glob("csrc/cuda/*.cuh"), *glob("csrc/cuda/*.h")]


class Nvcc:
    """The CUDA compiler and its static runtime library."""

    def __init__(self, program: str, runtime: Path) -> None:
        self.program = program
        self.runtime = runtime
        release = re.search(r"release (\d+)\.(\d+)", self.ask("--version"))
        self.version = (int(release[1]), int(release[2])) if release else (0, 0)

    def ask(self, *options: str) -> str:
        return subprocess.run([self.program, *options], capture_output=True, text=True).stdout

    def knows(self, architecture: str) -> bool:
        name = architecture.removesuffix("-ptx")
        number = name.rstrip("af")  # it lists 90 and not 90a
        if name != number and int(number) < 90:
            return False
        if architecture.endswith("-ptx"):
            return f"compute_{number}" in self.ask("--list-gpu-arch").split()
        return f"sm_{number}" in self.ask("--list-gpu-code").split()

    @classmethod
    def find(cls) -> "Nvcc | None":
        home = os.environ.get("CUDA_HOME")
        program = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc")
        if program is None or not os.path.exists(program):
            return None
        # nvcc on PATH may be a script that calls the real one somewhere else: ask it where its toolkit is.
        dry_run = subprocess.run([program, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
        if top is None:
            return None
        for folder in ("lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib"):
            runtime = Path(top[1].strip(), folder, "libcudart_static.a")
            if runtime.exists():
                return cls(program, runtime.resolve())
        return None

    def compile(self, source: str, architectures: list[str], folder: Path) -> str:
        """The object of one source, compiled if it is older than what it is made of."""
        target = folder / f"{Path(source).stem}.o"
        made_of = [source, __file__, *CUDA_HEADERS]
        if target.exists() and target.stat().st_mtime > max(os.path.getmtime(path) for path in made_of):
            return str(target)
        part = f"{target}.{os.getpid()}"
        command = [
            self.program, "-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all",
            *targets(architectures), f'-DXBN_CUDA_ARCHITECTURES="{";".join(architectures)}"', "-c", source, "-o", part,
        ]  # fmt: skip
        print(" ".join(command), flush=True)
        subprocess.check_call(command)
        os.replace(part, target)
        return str(target)


def targets(architectures: list[str]) -> list[str]:
    """nvcc's options for them. A third of its time goes into intermediate code, which those of a generation share: that
    of the oldest, for the sources tell none of them apart. 9.0 counts as of 8.0's: through intermediate code of its own
    its machine code comes out the same; that of 10.0 and later comes out shorter."""

    def generation(number: int) -> int:
        return sum(number >= first for first in (80, 100))

    machine_code = {name: int(name.rstrip("af")) for name in architectures if not name.endswith("-ptx")}
    oldest = {generation(number): number for number in sorted(machine_code.values(), reverse=True)}
    codes_through: dict[str, list[str]] = {}
    for name in architectures:
        if name in machine_code:
            through, code = str(oldest[generation(machine_code[name])]), f"sm_{name}"
        else:
            through, code = name.removesuffix("-ptx"), f"compute_{name.removesuffix('-ptx')}"
        codes_through.setdefault(through, []).append(code)
    return [f"-gencode=arch=compute_{through},code=[{','.join(codes)}]" for through, codes in codes_through.items()]


def find_nvcc() -> "Nvcc | None":
    wanted = os.environ.get("XBN_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"XBN_CUDA must be 0, 1 or auto, got {wanted!r}")
    if wanted == "0" or sys.platform != "linux":
        return None
    if not CUDA_SOURCES:
        raise SystemExit("csrc/cuda has no kernels: this is not a whole copy of the sources")
    nvcc = Nvcc.find()
    lacking = None
    if nvcc is None:
        place = f"below CUDA_HOME={os.environ['CUDA_HOME']}" if os.environ.get("CUDA_HOME") else "on PATH"
        lacking = f"nvcc and its libcudart_static.a were not found {place}"
    elif nvcc.version < OLDEST_NVCC:
        lacking = (
            f"nvcc is of CUDA {nvcc.version[0]}.{nvcc.version[1]}, at least {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} is needed"
        )
    if lacking is None:
        return nvcc
    if wanted == "1":
        raise SystemExit(f"XBN_CUDA=1, but {lacking}")
    print(f"xbn_ext: {lacking}", file=sys.stderr)
    return None


def choose_architectures(nvcc: Nvcc) -> list[str]:
    wanted = os.environ.get("XBN_CUDA_ARCHS")
    names = [name for name in re.split(r"[;, ]+", wanted or ARCHITECTURES) if name]
    if not names:
        raise SystemExit(f"XBN_CUDA_ARCHS names no architecture: {wanted!r}")
    for name in names:
        if not re.fullmatch(r"[0-9]+[af]?(-ptx)?", name):
            raise SystemExit(f"XBN_CUDA_ARCHS: {name!r} is not an architecture such as 90a or 80-ptx")
        if wanted and not nvcc.knows(name):
            raise SystemExit(f"XBN_CUDA_ARCHS: this nvcc does not know {name!r}")
    return [name for name in names if nvcc.knows(name)]


nvcc = find_nvcc()
sources = ["csrc/schema.cpp", "csrc/cuda/path.cpp", *glob("csrc/cpu/*.cpp")]
if nvcc is not None:
    sources += ["csrc/cuda/backend.cpp", "csrc/cuda/torch_cuda.cpp"]
else:
    print("xbn_ext: building CPU kernels only", file=sys.stderr)
    sources += ["csrc/cuda/missing.cpp"]


class Build(BuildExtension):
    """Compiles the CUDA kernels first: they include nothing of torch, so nvcc is all they need. What is up to date is
    not compiled again, not even for a wheel after an editable installation."""

    def build_extensions(self) -> None:
        self.build_temp = os.path.join("build", "objects")  # else a temporary folder, for an editable installation
        if nvcc is not None:
            architectures = choose_architectures(nvcc)
            version = ".".join(map(str, nvcc.version))
            folder = Path("build", "cuda", f"{version}_{'_'.join(architectures)}")
            folder.mkdir(parents=True, exist_ok=True)
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            with ThreadPoolExecutor(jobs) as pool:
                # What takes longest first: the two sweeps, a minute each, and then by size.
                sweeps_first = sorted(
                    CUDA_SOURCES, key=lambda s: ("loss_sweep.cuh" in Path(s).read_text(), os.path.getsize(s))
                )
                objects = list(pool.map(lambda source: nvcc.compile(source, architectures, folder), sweeps_first[::-1]))
            for extension in self.extensions:
                extension.extra_objects = [*objects, str(nvcc.runtime)]
                extension.libraries += ["rt", "dl", "pthread"]
                extension.extra_link_args = ["-Wl,--exclude-libs,ALL"]
        super().build_extensions()


extension = CppExtension(
    "xbn_ext._C",
    sorted(sources),
    py_limited_api=True,
    depends=[*CUDA_SOURCES, *CUDA_HEADERS],
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
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
