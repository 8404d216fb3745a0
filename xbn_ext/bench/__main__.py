"""Command line of the benchmark."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from . import peaks, step
from .baselines import IMPLEMENTATIONS
from .problem import Problem

KERNELS = {"step": step.run, "memory": peaks.run}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m xbn_ext.bench",
        description="step: one training step (AXBN, contrastive, float32): loss, gradient, transform and enqueue, of "
        "this library and of PyTorch, in one run. memory: peak memory of every loss against a bank, forward and "
        "backward, of this library and of pytorch-metric-learning.",
    )
    default = Problem()
    parser.add_argument("--kernel", choices=list(KERNELS), default="step", help="what is measured (step)")
    parser.add_argument("--batch", type=_positive, default=default.batch, metavar="B", help="anchors (64)")
    parser.add_argument("--memory", type=_positive, default=default.memory, metavar="M", help="bank rows (65536)")
    parser.add_argument("--dim", type=_positive, default=default.dim, metavar="D", help="dimension (512)")
    parser.add_argument("--classes", type=_positive, default=default.classes, help="classes the labels come from")
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--repeats", type=_positive, default=21, help="timed rounds of a step (21)")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(IMPLEMENTATIONS),
        default=list(IMPLEMENTATIONS),
        metavar="NAME",
        help=f"implementations of a step to run, of: {', '.join(IMPLEMENTATIONS)}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(argv: list[str] | None = None) -> list[dict[str, object]]:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    rows = KERNELS[args.kernel](args)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
