"""Builds xbn_ext._C: one library for every torch >= 2.10 and Python >= 3.10 (stable ABI, abi3), with CPU kernels and,
if the CUDA compiler is there, CUDA kernels. The torch it is built with may be a CPU-only one. A
free-threaded Python has no abi3: a library built with one is for that version of Python.

XBN_NATIVE=0        builds no library: a package for any system, py3-none-any, that computes in plain PyTorch. It takes
                    neither a compiler nor torch
XBN_CUDA=0|1|auto   whether to build CUDA kernels; auto (the default): if nvcc is found
XBN_CUDA_ARCHS      for which GPUs, as in "80;90a;120-ptx"; a number is machine code for that architecture, "-ptx" code
                    that the driver compiles for any later one. "native": for the GPUs of this machine; where there is
                    none, for one architecture that the tests can look at. Not set: for all that the nvcc at hand knows
CUDA_HOME           the toolkit, if nvcc is not on PATH
CXX                 the C++ compiler, if it is not c++
MAX_JOBS            how many compilers run at once
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import setup

OLDEST_TORCH = (2, 10)
ARCHITECTURES = "75;80;86;90a;100;120;80-ptx"  # those of them that the nvcc at hand knows; an 89 takes code for 86
OLDEST_CAPABILITY = 75
WITHOUT_GPU = "80"  # that every nvcc knows, and that has all ways of the loss
OLDEST_NVCC = (12, 0)  # of those that know C++20
CUDA_SOURCES = sorted(glob("csrc/cuda/**/*.cu", recursive=True))
CUDA_HEADERS = [
    *glob("csrc/*.h"), *glob("csrc/math/*.h"), *glob("csrc/cuda/**/*.h", recursive=True),
    *glob("csrc/cuda/**/*.cuh", recursive=True),
]  # fmt: skip


def import_torch() -> None:
    """Says in a sentence what is wrong with the torch at hand."""
    wanted = ".".join(map(str, OLDEST_TORCH))
    try:
        import torch
    except ModuleNotFoundError:
        raise SystemExit(
            f'xbn_ext is built with torch, which this Python lacks: pip install "torch>={wanted}"'
        ) from None
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version and (int(version[1]), int(version[2])) < OLDEST_TORCH:
        raise SystemExit(
            f'building xbn_ext needs torch >= {wanted}, not {torch.__version__}: pip install "torch>={wanted}"'
        )


def wants_library() -> bool:
    """By XBN_NATIVE, which xbn_ext/_library.py reads the same way. Without a compiler that takes asking for: a package
    that is slow by accident would go unnoticed."""
    wanted = os.environ.get("XBN_NATIVE") or "auto"
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"XBN_NATIVE must be 0, 1 or auto, got {wanted!r}")
    return wanted != "0"


if wants_library():
    import_torch()
    from torch.utils.cpp_extension import BuildExtension, CppExtension
else:
    BuildExtension = CppExtension = object  # they stay unused


class Lacking(Exception):
    """Why there is no nvcc to build with, and what to do."""


class Nvcc:
    """The CUDA compiler and its static runtime library."""

    def __init__(self, program: str) -> None:
        self.program = program
        release = re.search(r"release (\d+)\.(\d+)", self.ask("--version"))
        if release is None:
            raise Lacking(f"{program} does not work: `{program} --version` names no release")
        self.version = (int(release[1]), int(release[2]))
        if self.version < OLDEST_NVCC:
            needed, found = (".".join(map(str, version)) for version in (OLDEST_NVCC, self.version))
            raise Lacking(
                f"{program} is of CUDA {found} and at least {needed} is needed: install a later toolkit and name it "
                "in CUDA_HOME"
            )
        # nvcc on PATH may be a script that calls the real one somewhere else: ask it where its toolkit is.
        dry_run = subprocess.run([program, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        runtimes = [folder / "libcudart_static.a" for folder in runtime_folders(dry_run.stderr)]
        runtime = next(filter(Path.exists, runtimes), None)
        if runtime is None:
            raise Lacking(
                f"{program} has no static runtime, libcudart_static.a: install the package of its toolkit that has it "
                "(cuda-cudart-dev, cuda-cudart-static or nvidia-cuda-dev)"
            )
        self.runtime = runtime.resolve()

    def ask(self, *options: str) -> str:
        return subprocess.run([self.program, *options], capture_output=True, text=True).stdout

    def numbers(self, prefix: str) -> list[int]:
        """Of the architectures it knows, which it lists as compute_90 or sm_90."""
        listed = self.ask("--list-gpu-arch" if prefix == "compute" else "--list-gpu-code")
        return [int(number) for number in re.findall(rf"\b{prefix}_(\d+)\b", listed)]

    def knows(self, architecture: str) -> bool:
        name = architecture.removesuffix("-ptx")
        number = name.rstrip("af")  # it lists 90 and not 90a
        if name != number and int(number) < 90:
            return False
        return int(number) in self.numbers("compute" if architecture.endswith("-ptx") else "sm")

    @classmethod
    def find(cls) -> "Nvcc":
        home = os.environ.get("CUDA_HOME")
        program = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc")
        if program is None:
            raise Lacking("nvcc is not on PATH: install the CUDA toolkit, or name its folder in CUDA_HOME")
        if not os.path.exists(program):
            raise Lacking(f"CUDA_HOME names {home}, which has no bin/nvcc: name the toolkit's folder")
        return cls(program)

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


def runtime_folders(dry_run: str) -> list[Path]:
    """Where the libraries of a toolkit may be, from what `nvcc --dryrun` says."""
    top = re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE)
    if top is None:
        return []
    folder = Path(os.path.normpath(top[1].strip()))
    found = [folder / name for name in ("lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib")]
    if folder.is_relative_to("/usr/lib"):  # Debian's
        found += [Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib/aarch64-linux-gnu")]
    return found


def targets(architectures: list[str]) -> list[str]:
    """nvcc's options for them. A third of its time goes into intermediate code, which those of a generation share: that
    of the oldest, and only what that has is there for the sources to use. What is for one architecture alone, as 90a,
    has intermediate code of its own."""

    def generation(number: int) -> int:
        return sum(number >= first for first in (80, 90, 100))

    shared = sorted((int(name) for name in architectures if name.isdigit()), reverse=True)
    oldest = {generation(number): number for number in shared}
    codes_through: dict[str, list[str]] = {}
    for name in architectures:
        through = name.removesuffix("-ptx")
        code = f"compute_{through}" if name.endswith("-ptx") else f"sm_{name}"
        if name.isdigit():
            through = str(oldest[generation(int(name))])
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
    try:
        return Nvcc.find()
    except Lacking as lacking:
        if wanted == "1":
            raise SystemExit(f"XBN_CUDA=1, but {lacking}") from None
        print(f"xbn_ext: {lacking}", file=sys.stderr)
        return None


def capabilities() -> list[int]:
    """Of the GPUs in this machine: 90 is compute capability 9.0."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return []
    return sorted({int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)\s*$", answer, re.MULTILINE)})


def native(nvcc: Nvcc) -> list[str]:
    """The architectures of the GPUs in this machine; of one later than nvcc, the newest that the driver can compile."""
    names = []
    for number in capabilities():
        if number < OLDEST_CAPABILITY:
            print(f"xbn_ext: no kernels for a GPU of compute capability {number / 10}", file=sys.stderr)
            continue
        name = "90a" if number == 90 else str(number)
        names.append(name if nvcc.knows(name) else f"{max(filter(number.__gt__, nvcc.numbers('compute')))}-ptx")
    return list(dict.fromkeys(names)) or [WITHOUT_GPU]


def choose_architectures(nvcc: Nvcc) -> list[str]:
    wanted = os.environ.get("XBN_CUDA_ARCHS")
    if wanted == "native":
        return native(nvcc)
    names = [name for name in re.split(r"[;, ]+", wanted or ARCHITECTURES) if name]
    if not names:
        raise SystemExit(f"XBN_CUDA_ARCHS names no architecture: {wanted!r}")
    for name in names:
        if not re.fullmatch(r"[0-9]+[af]?(-ptx)?", name):
            raise SystemExit(f"XBN_CUDA_ARCHS: {name!r} is not an architecture such as 90a or 80-ptx, nor is it native")
        if wanted and not nvcc.knows(name):
            raise SystemExit(f"XBN_CUDA_ARCHS: this nvcc does not know {name!r}")
    return [name for name in names if nvcc.knows(name)]


def cpu_flags(machine: str) -> list[str]:
    """Of the C++ compiler, what makes the kernels fast."""
    flags = ["-O3", "-std=c++20", "-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno", "-Wall"]
    # Before it has assigned registers, gcc moves loads so far ahead that the accumulators of a product do not fit.
    return [*flags, "-fno-schedule-insns"] if machine == "aarch64" else flags


class Build(BuildExtension):
    """Compiles the CUDA kernels first: they include nothing of torch, so nvcc is all they need. What is up to date is
    not compiled again, not even for a wheel after an editable installation."""

    nvcc: "Nvcc | None" = None

    def build_extensions(self) -> None:
        self.check_compiler()
        self.build_temp = os.path.join("build", "objects")  # else a temporary folder, for an editable installation
        if self.nvcc is not None:
            objects = self.compile_cuda(self.nvcc, choose_architectures(self.nvcc))
            for extension in self.extensions:
                extension.extra_objects = [*objects, str(self.nvcc.runtime)]
                extension.libraries += ["rt", "dl", "pthread"]
                extension.extra_link_args = ["-Wl,--exclude-libs,ALL"]
        super().build_extensions()

    def check_compiler(self) -> None:
        """torch compiles with CXX or c++, setuptools links with CXX or the compiler that Python was built with."""
        for command in (os.environ.get("CXX") or "c++", *getattr(self.compiler, "compiler_cxx", [])[:1]):
            program = shlex.split(command)[0]
            if shutil.which(program) is None:
                raise SystemExit(
                    f"xbn_ext needs a C++ compiler and there is no {program} on PATH: install g++, or name the "
                    "compiler in CXX. XBN_NATIVE=0 installs it without kernels: plain PyTorch, several times slower"
                )

    def compile_cuda(self, nvcc: Nvcc, architectures: list[str]) -> list[str]:
        version = ".".join(map(str, nvcc.version))
        folder = Path("build", "cuda", f"{version}_{'_'.join(architectures)}")
        folder.mkdir(parents=True, exist_ok=True)
        # What takes longest first: the sweeps, up to two minutes each, and then by size.
        sweeps_first = sorted(CUDA_SOURCES, key=lambda s: ('"sweep.cuh"' in Path(s).read_text(), os.path.getsize(s)))
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            return list(pool.map(lambda source: nvcc.compile(source, architectures, folder), sweeps_first[::-1]))


def main() -> None:
    if not wants_library():
        print("xbn_ext: XBN_NATIVE=0, so no kernels are built", file=sys.stderr)
        setup()
        return
    Build.nvcc = find_nvcc()
    sources = ["csrc/extension.cpp", "csrc/loss_way.cpp", *glob("csrc/cpu/**/*.cpp", recursive=True)]
    if Build.nvcc is not None:
        sources += ["csrc/cuda/backend.cpp", "csrc/cuda/torch_cuda.cpp", "csrc/cuda/loss/memory_loss.cpp"]
    else:
        print("xbn_ext: building CPU kernels only", file=sys.stderr)
        sources += ["csrc/cuda/missing.cpp"]
    has_abi = not sysconfig.get_config_var("Py_GIL_DISABLED")
    target = "-DTORCH_TARGET_VERSION=" + "0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)
    extension = CppExtension(
        "xbn_ext._C",
        sorted(sources),
        py_limited_api=has_abi,
        depends=[*CUDA_SOURCES, *CUDA_HEADERS],
        extra_compile_args={"cxx": [*cpu_flags(platform.machine()), "-g0", "-fvisibility=hidden", target]},
    )
    setup(
        ext_modules=[extension],
        cmdclass={"build_ext": Build},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if has_abi else {},
    )


if __name__ == "__main__":
    main()
