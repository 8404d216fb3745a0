"""The library: built beforehand or now, what the compiler made of its kernels, and the project's tests of it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

from benchmarks.table import Row

from .run import ROOT, Runner, Section, command, tail

TESTS = ["test_normalize", "test_moments", "test_track", "test_transform", "test_standardize", "test_enqueue",
         "test_step", "test_transform_memory_loss", "test_memory_sums", "test_memory_loss", "test_losses_reference",
         "test_losses_distances", "test_losses_triplets", "test_losses_learned", "test_losses_training",
         "test_batch_loss", "test_batch_sums", "test_memory_reference", "test_memory_training",
         "test_memory_not_finite", "test_memory_checkpoints", "test_memory_fill", "test_memory_batches",
         "test_memory_arguments", "test_memory_stats", "test_distributed_cuda", "test_cuda"]  # fmt: skip


def architecture(capability: str) -> str:
    """The name under which setup.py knows the GPUs of a compute capability such as "9.0"."""
    number = capability.replace(".", "")
    return f"{number}a" if number == "90" else number


def library(runner: Runner, facts: Row) -> Section:
    """The library that is there, if it has machine code for this GPU; else it is built, in place, for this GPU only."""
    wanted = architecture(facts["capability"])

    def function(section: Section) -> None:
        if wanted in facts["library"]:
            section.note = f"built beforehand, for {', '.join(facts['library'])}"
            return
        done = command(
            [sys.executable, "setup.py", "build_ext", "--inplace"], runner.left(), XBN_CUDA="1", XBN_CUDA_ARCHS=wanted
        )
        warnings = [line for line in done.stdout.splitlines() if "warning" in line.lower() or "ptxas" in line]
        section.rows.append({"ok": done.returncode == 0, "warnings": [tail(line, 300) for line in warnings[:20]]})
        section.note = f"built for sm_{wanted}, {len(warnings)} lines with warnings"
        if done.returncode != 0:
            section.status, section.note = "failed", tail(done.stdout)

    return runner.section("library", function, correctness=True)


def registers(runner: Runner) -> Section:
    """Registers and stack of every kernel: nothing may spill."""

    def function(section: Section) -> None:
        program = shutil.which("cuobjdump")
        if program is None:
            section.status, section.note = "skipped", "cuobjdump is not on PATH"
            return
        libraries = [str(path) for path in Path(ROOT, "xbn_ext").glob("_C*.so")]
        section.rows = read_registers(command([program, "--dump-resource-usage", *libraries], runner.left()).stdout)
        spilling = [row["kernel"] for row in section.rows if not row["ok"]]
        section.note = f"{len(section.rows)} kernels; spilling: {', '.join(spilling) or 'none'}"
        if spilling or not section.rows:
            section.status = "failed"

    return runner.section("registers", function, correctness=True)


def read_registers(text: str) -> list[Row]:
    """The kernels in what `cuobjdump --dump-resource-usage` prints."""
    rows: list[Row] = []
    for name, usage in re.findall(r"Function (\S+?):\s*\n\s*(REG:.*)", text):
        values = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
        kernel = re.search(r"\d([a-z_]+_kernel)(\w*?)EEv", name)
        short = kernel[1] if kernel else name
        row = {key.lower(): values.get(key, 0) for key in ("REG", "STACK", "SHARED", "LOCAL")}
        ok = row["local"] == row["stack"] == 0
        rows.append({"kernel": short + (kernel[2] if kernel else ""), **row, "ok": ok})
    return rows


def tests(runner: Runner, every: bool, limit: float) -> Section:
    """The project's own tests of the kernels, on the GPU: a selection, or every one."""

    def function(section: Section) -> None:
        files = [f"tests/{module}.py" for module in TESTS if Path(ROOT, "tests", f"{module}.py").exists()]
        done = command(
            [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider", "-k", "cuda",
             *(["--all"] if every else []), *in_parallel(), *files],
            min(limit, runner.left()), OMP_NUM_THREADS="1",
        )  # fmt: skip
        numbers = read_closing_line(done.stdout)
        failures = [tail(line, 300) for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        good = done.returncode == 0 and numbers.get("passed", 0) > 0
        section.rows.append({"ok": good, "files": files, **numbers, "failures": failures[:40]})
        section.note = ", ".join(f"{n} {word}" for word, n in numbers.items())
        if not good:
            section.status = "failed"
            section.note += "\n" + ("\n".join(failures[:10]) or tail(done.stdout))
            section.rows[0]["output"] = tail(done.stdout, 30_000)

    return runner.section("tests", function, correctness=True)


def in_parallel() -> list[str]:
    """pytest's options for several processes, if it has xdist: a few contexts fit any GPU."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["--numprocesses", str(max(1, min(8, (os.cpu_count() or 1) // 2))), "--dist", "worksteal"]


def read_closing_line(text: str) -> dict[str, int]:
    """`3 failed, 20 passed in 1.2s` as numbers."""
    words = r"(\d+) (passed|failed|errors?|skipped|deselected|xfailed|xpassed)"
    for line in reversed(text.splitlines()):
        found = re.findall(words, line)
        if found and " in " in line:
            return {word.removesuffix("s") if word == "errors" else word: int(n) for n, word in found}
    return {}
