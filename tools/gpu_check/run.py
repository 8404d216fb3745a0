"""Sections: each runs in a process of its own, so that a crash, a hang or a broken CUDA context costs one case.

A worker is a function `worker(job)` that iterates over its cases with `job.each`; every case becomes one row, written
at once. The parent collects the rows; where a process died it records that for the case at hand and goes on with the
next.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.table import Row

ROOT = Path(__file__).resolve().parents[2]
MAX_DEATHS = 5  # of the processes of a section
RESTART = 75  # exit code of a worker that asks for a fresh process for the cases that are left


def tail(text: str, characters: int = 1500) -> str:
    """The end of an output, without paths of this machine."""
    return text.replace(str(ROOT), ".").replace(sys.prefix, "<python>").strip()[-characters:]


@dataclass
class Job:
    """What a worker is given: the device, its options, and until when it may work."""

    device: str
    until: float  # time.time()
    options: dict[str, Any] = field(default_factory=dict)
    start: int = 0  # cases before this one are done
    emit: Callable[[Row], None] = print

    def each(self, cases: Iterable[Row], function: Callable[..., Row]) -> None:
        """A row per case: the case, what `function(**case)` returns or its error. `index` numbers the cases.

        A function whose result has `fresh_process` has spoilt this process: the next case gets another.
        """
        for index, case in enumerate(cases):
            if index < self.start:
                continue
            row: Row = {"index": index, **case}
            if time.time() > self.until:
                self.emit(row | {"skipped": "no time left"})
                continue
            try:
                row |= function(**case)
                self.emit(row)
                if row.get("fresh_process"):
                    sys.exit(RESTART)
            except Exception as error:
                self.emit(row | {"ok": False, "error": tail(f"{type(error).__name__}: {error}", 600)})
                if not _is_harmless(error):
                    traceback.print_exc()
                    sys.exit("the CUDA context may be broken: leaving")


def _is_harmless(error: Exception) -> bool:
    """Whether the next case can run in the same process: not after a CUDA error other than lack of memory."""
    return "out of memory" in str(error) or "CUDA" not in f"{type(error).__name__} {error}"


@dataclass
class Section:
    """What became of one thing that was looked at."""

    name: str
    correctness: bool = False  # its failure is a failure of the whole check
    status: str = "ok"  # ok, failed, skipped, timeout
    note: str = ""
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)

    @property
    def is_wrong(self) -> bool:
        return self.correctness and self.status in ("failed", "timeout")


class Runner:
    """Runs sections until its time is over, and hands every finished one to `record`."""

    def __init__(self, device: str, seconds: float, record: Callable[[Section], None]) -> None:
        self.device = device
        self.until = time.time() + seconds
        self.record = record
        self._one_at_a_time = threading.Lock()  # printing and recording

    def left(self) -> float:
        """Seconds until the end."""
        return self.until - time.time()

    def section(self, name: str, function: Callable[[Section], None], correctness: bool = False) -> Section:
        """Runs `function(section)`, which fills in rows and status. Whatever it raises becomes a failure."""
        section = Section(name, correctness)
        begin = time.time()
        print(f"--- {name} ({max(self.left(), 0):.0f} s left)", flush=True)
        if self.left() < 5:
            section.status, section.note = "skipped", "no time left"
        else:
            try:
                function(section)
            except subprocess.TimeoutExpired as error:
                section.status = "timeout"
                section.note = tail(f"ended after {error.timeout:.0f} s; its last words:\n{error.output}", 600)
            except Exception as error:
                section.status, section.note = "failed", tail(f"{type(error).__name__}: {error}")
        section.seconds = round(time.time() - begin, 1)
        with self._one_at_a_time:
            print(f"{section.name:>12}: {section.status} {section.note[-400:]}", flush=True)
            self.record(section)
        return section

    def together(self, *sections: Callable[[], object]) -> None:
        """Runs sections side by side: those that time nothing."""
        with ThreadPoolExecutor(len(sections)) as pool:
            for done in [pool.submit(section) for section in sections]:
                done.result()

    def work(self, name: str, worker: str, *, correctness: bool = False, limit: float | None = None,
             **options: Any) -> Section:  # fmt: skip
        """Runs `worker` (".module:function" of this package) as a section of at most `limit` seconds."""
        run = self._in_children if self.device == "cuda" else self._in_process

        def function(section: Section) -> None:
            until = time.time() + min(self.left(), limit or self.left())
            run(section, worker, Job(self.device, until - 2, options))
            _judge(section)

        return self.section(name, function, correctness)

    def _in_process(self, section: Section, worker: str, job: Job) -> None:
        job.emit = section.rows.append
        load(worker)(job)

    def _in_children(self, section: Section, worker: str, job: Job) -> None:
        deaths = 0
        while deaths < MAX_DEATHS:
            rows, code, words = _child(worker, job)
            section.rows += rows
            if code == 0:
                return
            job.start = rows[-1]["index"] + 1 if rows else job.start
            if code == RESTART and rows:
                continue
            deaths += 1
            if not rows or "error" not in rows[-1]:  # it died in the case after the last row
                section.rows.append({"index": job.start, "ok": False, "error": words or f"exit code {code}"})
                job.start += 1
            if time.time() > job.until:
                section.status, section.note = "timeout", words
                return
        section.status, section.note = "failed", f"died {deaths} times; cases from {job.start} on did not run"


def _judge(section: Section) -> None:
    """Sums up the rows of a section in its status and note."""
    skipped = sum("skipped" in row for row in section.rows)
    failed = [row for row in section.rows if row.get("ok") is False]
    done = len(section.rows) - skipped
    words = [f"{done - len(failed)} of {done} good"]
    if skipped:
        words.append(f"{skipped} skipped")
    if failed:
        words.append(f"first failure: {failed[0]}")
    section.note = "; ".join([*([section.note] if section.note else []), *words])
    if section.status == "ok" and (failed or not section.rows):
        section.status = "failed"
    if section.status == "ok" and done == 0:
        section.status = "skipped"


def _child(worker: str, job: Job) -> tuple[list[Row], int, str]:
    """Runs a worker in a process of its own. Returns its rows, its exit code and its last words."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        file.touch()
        settings = {"device": job.device, "until": job.until, "options": job.options, "start": job.start}
        arguments = ["--worker", worker, "--job", json.dumps(settings), "--rows", str(file)]
        try:
            grace = 15
            done = command([sys.executable, "-m", "tools.gpu_check", *arguments], job.until - time.time() + grace)
            code, words = done.returncode, tail(done.stdout)
        except subprocess.TimeoutExpired as error:
            code, words = -signal.SIGKILL, tail(f"ran past its time and was ended; its last words:\n{error.output}")
        lines = file.read_text().splitlines()
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut off in the middle
            break
    return rows, code, words


def load(worker: str) -> Callable[[Job], None]:
    """`.module:function` of this package, or of any other without the dot."""
    module, function = worker.split(":")
    found: Callable[[Job], None] = getattr(importlib.import_module(module, __package__), function)
    return found


def run_worker(worker: str, settings: str, file: str) -> None:
    """The child's side of `_child`."""
    with open(file, "a") as rows:

        def emit(row: Row) -> None:
            rows.write(json.dumps(row) + "\n")
            rows.flush()

        load(worker)(Job(**json.loads(settings), emit=emit))


def command(arguments: list[str], timeout: float, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program in the repository's root, its output (stderr in it, too) captured.

    When its time is over it is ended together with everything that it started, and TimeoutExpired has the output.
    """
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=os.environ | environment, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(timeout, 1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise subprocess.TimeoutExpired(arguments, timeout, output) from None
    return subprocess.CompletedProcess(arguments, process.returncode, output)


def find_toolkit() -> None:
    """Puts the usual places of the CUDA toolkit at the end of PATH."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    places = [os.path.join(home, "bin") for home in homes if home and os.path.isdir(os.path.join(home, "bin"))]
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), *places])
