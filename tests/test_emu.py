"""The stand-in for CUDA that runs kernels on the CPU: sound kernels compute what they should, wrong ones are caught."""

import fcntl
import functools
import shutil
import subprocess
from pathlib import Path

import pytest

EMU = Path(__file__).parent / "emu"
SELFTEST = EMU / "selftest.cu"
COMPILER = shutil.which("g++")
FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-g1", "-pthread", "-I", str(EMU / "include"), "-x", "c++"]
VARIANTS = {
    "plain": ["-O2"],
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"],  # reports without callers
}
SEEDS = [0, 1]
ALL_LANES = 32  # of a warp are threads to ThreadSanitizer; with fewer, several lanes are one


def long(*sets):
    return [pytest.param(*each, marks=pytest.mark.long) for each in sets]


pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++")


def compile_to(output, *options):
    built = subprocess.run(
        [COMPILER, *FLAGS, str(SELFTEST), "-o", str(output), *options], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return output


@pytest.fixture(scope="module")
def run(of_this_run):
    @functools.cache
    def build(variant):
        built = of_this_run / f"selftest-{variant}"
        with open(f"{built}.lock", "w") as building:
            fcntl.flock(building, fcntl.LOCK_EX)
            return built if built.exists() else compile_to(built, *VARIANTS[variant])

    def run(variant, *arguments, program=None):
        command = [str(program or build(variant)), *map(str, arguments)]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)

    return run


@functools.cache
def line_of(kernel, text):
    """The number of the first line that holds `text` in `kernel`."""
    lines = SELFTEST.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if f"void {kernel}(" in line)
    return next(i for i, line in enumerate(lines) if i >= start and text in line) + 1


@pytest.mark.long
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "variant, identities",
    [
        ("plain", ALL_LANES),
        *long(("address", ALL_LANES), ("thread", ALL_LANES), ("thread", 2), ("thread", 1)),
    ],
)
def test_sound_kernels(run, variant, identities, seed):
    ran = run(variant, "sound", seed, identities)
    assert ran.returncode == 0 and "many_blocks done" in ran.stdout, ran.stdout
    assert "WARNING" not in ran.stdout and "ERROR" not in ran.stdout, ran.stdout


@pytest.mark.long
def test_two_translation_units(run, tmp_path):
    first, second = tmp_path / "first.o", tmp_path / "second.o"
    compile_to(first, "-O0", "-c")
    compile_to(second, "-O0", "-c", "-Dmain=second_main")
    program = tmp_path / "both"
    linked = subprocess.run([COMPILER, first, second, "-pthread", "-o", program], capture_output=True, text=True)
    assert linked.returncode == 0, linked.stderr
    for arguments in (["sound", 1], ["second", "sound", 1]):
        ran = run("plain", *arguments, program=program)
        assert ran.returncode == 0 and "many_blocks done" in ran.stdout, ran.stdout


@pytest.mark.long
@pytest.mark.parametrize("identities, seed", [(ALL_LANES, 0), *long((ALL_LANES, 1), (2, 1))])
@pytest.mark.parametrize(
    "case, function",
    [
        ("no_barrier", "block_sum"),
        *long(
            ("reuse_too_early", "reuse_too_early"),
            ("race_dynamically", "race_dynamically"),
            ("order_warps_by_syncwarp", "order_warps_by_syncwarp"),
            ("skip_syncwarp", "skip_syncwarp"),
            ("order_by_shuffle", "order_by_shuffle"),
            ("read_next_block", "read_next_block"),
            ("no_fence_every_thread", "sum_grid"),
            ("no_fence_one_thread", "sum_grid"),
            ("no_writer_fence_every_thread", "sum_grid"),
            ("no_writer_fence_one_thread", "sum_grid"),
            ("no_reader_fence_every_thread", "sum_grid"),
            ("no_reader_fence_one_thread", "sum_grid"),
        ),
    ],
)
def test_races(run, case, function, seed, identities):
    ran = run("thread", case, seed, identities)
    races = [line for line in ran.stdout.splitlines() if line.startswith("SUMMARY: ThreadSanitizer: data race")]
    assert ran.returncode != 0 and races, ran.stdout
    assert all(f" in {function}" in race for race in races), ran.stdout


@pytest.mark.long
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", ["reuse_too_early", "order_warps_by_syncwarp", "read_next_block"])
def test_races_of_warps(run, case, seed):
    ran = run("thread", case, seed, 1)  # no race within a warp is seen so, any other is
    assert ran.returncode != 0 and "SUMMARY: ThreadSanitizer: data race" in ran.stdout, ran.stdout


@pytest.mark.long
def test_overrun_of_shared_memory(run):
    ran = run("address", "overrun", 0)
    assert ran.returncode != 0 and "selftest.cu" in ran.stdout, ran.stdout
    # UndefinedBehaviorSanitizer does not see the array's size here; AddressSanitizer sees what lies behind it.
    ran = run("address", "overrun_by_pointer", 0)
    assert ran.returncode != 0 and "global-buffer-overflow" in ran.stdout, ran.stdout
    ran = run("address", "overrun_dynamically", 0)
    assert ran.returncode != 0 and "heap-buffer-overflow" in ran.stdout, ran.stdout


@pytest.mark.long
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("variant", ["plain", *long(["address"], ["thread"])])
@pytest.mark.parametrize(
    "case, message, places",
    [
        ("diverge", "divergent barrier", ["// one place", "// the other place"]),
        ("lock_up", "deadlock", ["// one place", "// the other place"]),
        ("call_out_of_mask", "not in the mask", ["// one place"]),
    ],
)
def test_failures(run, variant, case, message, places, seed):
    ran = run(variant, case, seed)
    assert ran.returncode == 0 and f"{case} done" in ran.stdout, ran.stdout
    assert message in ran.stdout and "block (0, " in ran.stdout, ran.stdout
    for place in places:
        assert f"selftest.cu:{line_of(case, place)}" in ran.stdout
