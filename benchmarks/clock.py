"""Time of a call. On a GPU: calls that share no memory, one after the other, as replays of one CUDA graph where that
works. On a CPU: plain calls by the wall clock."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import quantiles

import torch

Call = Callable[[], object]

LEAST, MOST = 30, 100  # samples


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, and the quartiles around it."""

    ms: float
    ms_low: float
    ms_high: float
    samples: int = 1
    how: str = "wall"  # "graph": CUDA-graph replays; "events": launched one by one, the host's time is in it
    why_no_graph: str = ""
    fresh_process: bool = False  # a capture failed half-way, and torch's allocator does not recover from that


class Timer:
    """Times one call. A sample is the mean over `calls` in turn: give each its own bank, so that caches are cold."""

    how, why_no_graph, is_broken = "wall", "", False

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.warm_up()

    def warm_up(self) -> None:
        for _ in range(2):
            self.call_all()

    def call_all(self) -> None:
        for call in self.calls:
            call()

    def run(self, samples: int) -> list[float]:
        """Seconds of a call, of every sample."""
        result = []
        for _ in range(samples):
            begin = time.perf_counter()
            self.call_all()
            result.append((time.perf_counter() - begin) / len(self.calls))
        return result

    def run_for(self, seconds: float) -> list[float]:
        """The same, in about so many seconds in all; up to 8 times that to reach 30 samples, and fewer samples where
        even that is not enough."""
        once = max(min(self.run(2)) * len(self.calls), 1e-7)
        samples = int(min(MOST, max(LEAST, seconds / once)))
        if once * samples > 8 * seconds:
            samples = max(5, int(8 * seconds / once))
        return self.run(samples)

    def timing(self, seconds: list[float]) -> Timing:
        """What to say about samples of this timer."""
        spread = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * seconds
        low, median, high = (round(1e3 * q, 6) for q in spread)
        return Timing(median, low, high, len(seconds), self.how, self.why_no_graph, self.is_broken)


class DeviceTimer(Timer):
    """Events around replays of a graph of all calls, or around the calls if they cannot be captured."""

    def warm_up(self) -> None:
        self.side = _side_stream()
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):  # warmed up where it is going to run
            super().warm_up()
        torch.cuda.synchronize()
        self.graph = self._capture()
        self.how = "events" if self.graph is None else "graph"
        self.run(1)

    def run(self, samples: int) -> list[float]:
        pairs = []
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            if self.graph is not None:
                torch.cuda._sleep(2_000_000)  # about a millisecond, so that the host gets ahead of the device
            for _ in range(samples):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                if self.graph is not None:
                    self.graph.replay()
                else:
                    self.call_all()
                end.record()
                pairs.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 / len(self.calls) for begin, end in pairs]

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        if not self._never_waits():
            self.why_no_graph = "it waits for the device"
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.side):
                self.call_all()
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


def timer(calls: Sequence[Call], device: str) -> Timer:
    return Timer(calls) if device == "cpu" else DeviceTimer(calls)


def interleaved(timers: Mapping[str, Timer], rounds: int, renew: Callable[[int], object]) -> dict[str, Timing]:
    """Times one thing after the other, round after round, so that a busy moment of the machine hits them all; every
    round in another order, so that none always pays for the caches that another leaves behind, and garbage collected
    between rounds only. `renew(round)` comes before each."""
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    order = random.Random(0)
    gc.disable()
    for round in range(rounds):
        renew(round)
        gc.collect()
        for name in order.sample(list(timers), len(timers)):
            seconds[name] += timers[name].run(1)
    gc.enable()
    return {name: timers[name].timing(values) for name, values in seconds.items()}
