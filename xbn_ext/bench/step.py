"""`--kernel step`: one training step of the memory, in milliseconds and peak megabytes, of every implementation."""

from __future__ import annotations

import platform
from argparse import Namespace
from dataclasses import asdict

import torch

from .. import build_info
from .baselines import IMPLEMENTATIONS
from .measure import interleaved, peak_extra_megabytes
from .problem import Problem
from .truth import errors


def run(args: Namespace) -> list[dict[str, object]]:
    """Prints the table and returns its rows."""
    problem = Problem(args.batch, args.memory, args.dim, args.classes)
    info = build_info()
    print(
        f"step: AXBN, contrastive, float32, B={problem.batch} M={problem.memory} D={problem.dim}, "
        f"{problem.classes} classes, bank {4e-6 * problem.memory * problem.dim:.0f} MB\n"
        f"{platform.processor() or platform.machine()}, {info['cpu_isa']}, {args.threads} threads, "
        f"torch {torch.__version__}\n"
    )
    peak = {name: peak_extra_megabytes(name, problem, args.threads) for name in args.only}
    off = errors(problem, args.only)
    steps = {name: IMPLEMENTATIONS[name](problem) for name in args.only}
    for step in steps.values():  # compile, page in
        for seed in (2, 3):
            step(*problem.embeddings(problem.batch, seed))
    times = interleaved(steps, problem, args.repeats)

    rows: list[dict[str, object]] = []
    ours = times.get("xbn_ext")
    print(f"{'implementation':18}{'ms':>9}{'quartiles':>18}{'x ours':>8}{'peak MB':>9}{'GFLOP/s':>9}{'error':>10}")
    for name in args.only:
        t = times[name]
        ratio = f"{t.ms / ours.ms:.2f}" if ours else "-"
        quartiles = f"{t.ms_low:.2f} - {t.ms_high:.2f}"
        gflops = 1e3 * problem.gflop / t.ms
        print(f"{name:18}{t.ms:9.2f}{quartiles:>18}{ratio:>8}{peak[name]:9.1f}{gflops:9.1f}{off[name]:10.1e}")
        rows.append(
            {
                "implementation": name,
                "kernel": "step",
                "loss": "contrastive",
                "device": "cpu",
                "dtype": "float32",
                "batch": problem.batch,
                "memory": problem.memory,
                "dim": problem.dim,
                **asdict(t),
                "peak_mb": peak[name],
                "gflops": gflops,
                "error": off[name],
                "threads": args.threads,
                "torch": torch.__version__,
                "cpu_isa": info["cpu_isa"],
            }
        )
    print(
        "\nx ours: times the in-place step of this library. peak MB: most memory a step holds besides the bank.\n"
        "GFLOP/s: of the two dense products, whether or not an implementation skips part of them.\n"
        "error: against the float64 reference, relative, the larger of loss and gradient."
    )
    return rows
