"""Programs that fuzz the kernels, built of the sources in `csrc`."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
CPU_KERNELS = [s for s in sorted((ROOT / "csrc" / "cpu").rglob("*.cpp")) if s.name != "backend.cpp"]  # glue needs torch
CUDA_KERNELS = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
FUZZ, CUDA_FUZZ = ROOT / "tests" / "native" / "fuzz.cpp", ROOT / "tests" / "emu" / "fuzz.cpp"
EMU = ROOT / "tests" / "emu" / "include"
TRUSTED = (  # sources, and how they are compiled
    [*CPU_KERNELS, ROOT / "tests" / "emu" / "products.cpp"],
    *("-std=c++20", "-O1", "-march=native", "-fopenmp-simd", "-pthread", "-DXBN_BASELINE_ONLY"),
)


def run(*command, **environ):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=os.environ | environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compile(folder, compiler, sources, *flags):
    """Their objects, in that folder; as many compilers run at once as there are processors."""

    def of(source):
        target = folder / f"{source.stem}_{source.suffix[1:]}.o"
        run(compiler, *flags, "-x", "c++", "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(of, sources))


def link(program, compiler, objects, *flags):
    run(compiler, *flags, *objects, "-o", program)
    return program
