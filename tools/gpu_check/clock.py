"""Time on a GPU: calls that share no memory, one after the other, as replays of one CUDA graph where that works."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import quantiles

import torch

Call = Callable[[], object]

LEAST, MOST = 30, 100  # samples


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, and the quartiles around it."""

    us: float
    us_low: float
    us_high: float
    samples: int
    how: str  # "graph": CUDA-graph replays; "events": launched one by one, the host's time is in it; "wall": a CPU
    why_no_graph: str = ""
    fresh_process: bool = False  # a capture failed half-way, and torch's allocator does not recover from that


def measure(calls: Sequence[Call], device: str, seconds: float = 0.5) -> Timing:
    """Times one call. A sample is the time of all `calls` in turn: give each its own bank, so that caches are cold.

    Takes about `seconds`; up to 8 times that to reach 30 samples, and fewer samples where even that is not enough.
    """
    timer = HostTimer(calls) if device == "cpu" else DeviceTimer(calls)
    once = max(min(timer.run(2)), 1e-7)
    samples = int(min(MOST, max(LEAST, seconds / once)))
    if once * samples > 8 * seconds:
        samples = max(5, int(8 * seconds / once))
    low, median, high = (round(1e6 * q / len(calls), 2) for q in quantiles(timer.run(samples), n=4))
    return Timing(median, low, high, samples, timer.how, timer.why_no_graph, timer.is_broken)


class HostTimer:
    """The wall clock, for a dry run on a CPU."""

    how, why_no_graph, is_broken = "wall", "", False

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.run(1)

    def run(self, samples: int) -> list[float]:
        """Seconds of every sample."""
        result = []
        for _ in range(samples):
            begin = time.perf_counter()
            for call in self.calls:
                call()
            result.append(time.perf_counter() - begin)
        return result


class DeviceTimer:
    """Events around replays of a graph of all calls, or around the calls if they cannot be captured."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.why_no_graph, self.is_broken = "", False
        self.side = _side_stream()
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):  # warmed up where it is going to run
            for _ in range(2):
                self._call_all()
        torch.cuda.synchronize()
        self.graph = self._capture()
        self.run(1)

    @property
    def how(self) -> str:
        return "events" if self.graph is None else "graph"

    def run(self, samples: int) -> list[float]:
        """Seconds of every sample."""
        pairs = []
        with torch.cuda.stream(self.side):
            if self.graph is not None:
                torch.cuda._sleep(2_000_000)  # about a millisecond, so that the host gets ahead of the device
            for _ in range(samples):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                if self.graph is not None:
                    self.graph.replay()
                else:
                    self._call_all()
                end.record()
                pairs.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]

    def _call_all(self) -> None:
        for call in self.calls:
            call()

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        if not self._never_waits():
            self.why_no_graph = "it waits for the device"
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.side):
                self._call_all()
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.why_no_graph, self.is_broken = str(error)[:300], True
            return None
        return graph

    def _never_waits(self) -> bool:
        """Whether a call never waits for the device. To be found out before a capture: one that
        fails half-way leaves torch's allocator in disorder."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(self.side):
                self.calls[0]()
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            return False
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        return True


@cache
def _side_stream() -> torch.cuda.Stream:
    """Graphs cannot be captured on the default stream. One for all, as torch caches memory by stream."""
    return torch.cuda.Stream()


def peak_megabytes(call: Call, device: str) -> float | None:
    """Most device memory that a call holds beyond what was there before it."""
    if device == "cpu":
        return None
    call()  # libraries take a workspace once
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
