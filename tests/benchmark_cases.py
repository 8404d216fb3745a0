"""Arguments of benchmarks that take a moment, the keys of their rows, and a machine that is not measured."""

from benchmarks import compare, peaks
from benchmarks.implementations import NAMES
from benchmarks.problem import BankProblem

TINY = ["--batch", "20", "--memory", "700", "--dim", "33", "--classes", "30", "--threads", "1"]

KEYS = {
    "implementation", "kernel", "loss", "device", "dtype", "batch", "memory", "dim", "density", "rows", "ms", "ms_low",
    "ms_high", "peak_mb", "pairs", "active", "gflops", "gbs", "roofline", "error",
}  # fmt: skip

MACHINE = {"float32": 100.0, "float64": 50.0, "tf32": 800.0, "read": 20.0, "copy": 16.0}

QUICK = [name for name in NAMES if "compile" not in name]  # compiling takes longer than all other tests


def stay_in_this_process(monkeypatch):
    monkeypatch.setattr(compare, "peak_extra_megabytes", lambda *args: 1.0)
    monkeypatch.setattr("benchmarks.__main__.measure_machine", lambda *args: MACHINE)
    monkeypatch.setattr(peaks, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setattr(peaks, "limit_memory", lambda megabytes: None)
    monkeypatch.setattr(peaks, "SKEWED", BankProblem(16, 200, 24, classes=8, majority=0.35))
