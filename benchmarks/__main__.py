"""Command line of the benchmark."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

from train.cores import bytes_of_memory, cores

from . import machine, peaks
from .compare import compare
from .comparisons import COMPARISONS, OURS
from .implementations import NAMES
from .options import DEFAULTS, PRESETS, Options, cases
from .plot import can_plot, plot
from .problem import DTYPES, KERNELS
from .recorded import Recorded
from .roofline import Machine, measure_machine
from .scaling import add_efficiency, efficiency_table
from .table import LEGEND, Row, described

DESCRIPTION = """How fast a kernel of this library is, compared with what you would use instead and with what this
machine could do at best. All are timed in one run, in turn. step: a whole training step. moments, transform, enqueue,
loss: its parts. memory: peak memory of every loss against a bank, forward and backward, of this library and of
pytorch-metric-learning."""

PRESETS_HELP = "quick: seconds; paper: the tables of docs/benchmarks.md; sweep: up to M = 1,000,000"


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[Options]]:
    """The arguments of the whole run, and the cases to be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=DESCRIPTION)
    default = argparse.SUPPRESS  # what is not given is the preset's
    case = parser.add_argument_group("what is measured")
    case.add_argument("--kernel", choices=[*KERNELS, "memory"], default=default, help="(step)")
    case.add_argument("--loss", choices=list(COMPARISONS), default=default, metavar="LOSS", help=", ".join(COMPARISONS))
    case.add_argument("--drift", choices=["none", "xbn", "axbn", "ema"], default=default, help="of a step (axbn)")
    case.add_argument(
        "--update", choices=["inplace", "deferred", "both"], default=default, help="of this library's step (both)"
    )
    case.add_argument("--dtype", choices=list(DTYPES), default=default, help="of the bank (float32)")
    case.add_argument("--device", choices=["cpu", "cuda"], default=default, help="(cpu)")
    case.add_argument("--batch", type=_positive, default=default, metavar="B", help="anchors (64)")
    case.add_argument("--memory", type=_positive, nargs="+", default=default, metavar="M", help="bank rows (65536)")
    case.add_argument("--dim", type=_positive, default=default, metavar="D", help="dimension (512)")
    case.add_argument("--classes", type=_positive, default=default, help="classes the labels come from (11318)")
    case.add_argument(
        "--density", type=_density, default=default, metavar="SHARE",
        help="of the negatives that are above the margin of a contrastive loss, 0.5 (0.01, as in training)",
    )  # fmt: skip
    case.add_argument(
        "--rows", type=_rows, default=default, metavar="FILE.npz", help="rows and labels of a trained network instead"
    )
    case.add_argument("--repeats", type=_positive, default=default, help="timed rounds (21)")
    case.add_argument(
        "--only", nargs="+", choices=NAMES, default=default, metavar="NAME", help=f"of: {', '.join(NAMES)}"
    )
    parser.add_argument("--preset", choices=list(PRESETS), help=f"defaults for what is measured: {PRESETS_HELP}")
    parser.add_argument(
        "--threads", type=_threads, default=[torch.get_num_threads()], metavar="N[,N...]",
        help="CPU threads; of several numbers, this library is timed with each, all others with the largest",
    )  # fmt: skip
    parser.add_argument("--json", type=_file, metavar="FILE", help="write the rows there")
    parser.add_argument(
        "--plot", type=_picture, metavar="FILE.png", help="time and memory against M, with the roofline"
    )
    args = parser.parse_args(argv)
    _require_different_files(parser, args)
    explicit = {name: value for name, value in vars(args).items() if name in DEFAULTS}
    if "rows" in explicit:
        explicit |= _of_file(parser, explicit)
    chosen = cases(args.preset, explicit)
    for options in chosen:
        if options["device"] == "cuda" and not torch.cuda.is_available():
            parser.error("argument --device: this torch finds no GPU")
        rows = options["batch"] + max(options["memory"]) + options["dim"]  # with those of their rotation
        needed = 4 * options["dim"] * rows
        there = _bytes_of(options["device"])
        if needed > there:
            parser.error(f"arguments --memory, --batch, --dim: they take {needed:,} bytes, and there are {there:,}")
        if options["kernel"] == "memory" and len(options["memory"]) > 1:
            parser.error("argument --memory: takes one size with --kernel memory")
        if options["kernel"] == "memory":
            for name in ("plot", "density", "rows"):
                if getattr(args, name, None) is not None:
                    parser.error(f"argument --{name}: not with --kernel memory")
        if len(args.threads) > 1:
            if options["kernel"] == "memory" or options["device"] != "cpu":
                parser.error("argument --threads: one number with --kernel memory or --device cuda")
            if not _of_this_library(options)["only"]:
                parser.error("argument --threads: several numbers are for this library, which --only leaves out")
    if args.plot and not can_plot():
        parser.error("argument --plot: needs matplotlib: pip install matplotlib")
    return args, chosen


def _bytes_of(device: str) -> int:
    """All that a device has, not only what is free."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return bytes_of_memory()


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"must be below 2^63, got {value}")
    return value


def _threads(text: str) -> list[int]:
    values = sorted({_positive(number) for number in text.split(",")})
    if values[-1] > 4096:  # OpenMP crashes on many more
        raise argparse.ArgumentTypeError(f"must be at most 4096, got {values[-1]}")
    return values


def _density(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 0.5:
        raise argparse.ArgumentTypeError(f"must be within [0, 0.5], got {text}")
    return value


def _rows(text: str) -> str:
    try:
        Recorded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _of_file(parser: argparse.ArgumentParser, explicit: Options) -> Options:
    """The options that the file of `--rows` decides."""
    recorded = Recorded(explicit["rows"])
    dim = recorded.rows.shape[1]
    if explicit.get("dim", dim) != dim:
        parser.error(f"argument --dim: the rows of {explicit['rows']} have {dim} numbers, not {explicit['dim']}")
    for name in ("classes", "density"):
        if name in explicit:
            parser.error(f"argument --{name}: not with --rows, which has its own")
    return {"dim": dim, "classes": recorded.classes}


def _of_this_library(options: Options) -> Options:
    return options | {"only": [name for name in options["only"] if name.startswith(OURS)]}


def _file(text: str) -> Path:
    """A path that can be written. Checked first, since it is written at the end of what may take an hour."""
    path = Path(text)
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except OSError as error:  # the name is too long, or a folder on the way may not be entered
        raise argparse.ArgumentTypeError(f"{path}: {error.strerror}") from None
    if not text or path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} may not be written")
    return path


def _picture(text: str) -> Path:
    path = _file(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{path}: its name must end in .png")
    return path


def _require_different_files(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    seen: dict[Path, str] = {}
    for name in ("rows", "json", "plot"):
        if getattr(args, name, None) is not None:
            other = seen.setdefault(Path(getattr(args, name)).resolve(), name)
            if other != name:
                parser.error(f"argument --{name}: {getattr(args, name)} is the file of --{other}")


def main(argv: list[str] | None = None) -> list[Row]:
    """Runs the command and returns its rows."""
    args, chosen = parse(argv)
    most = args.threads[-1]
    torch.set_num_threads(most)
    if most > cores():
        print(f"{most} threads take turns on {cores()} processors: no measure of what more would gain")
    rows: list[Row] = []
    machines: dict[tuple[str, int], Machine] = {}
    for options in chosen:
        if options["kernel"] == "memory":
            rows += peaks.run(argparse.Namespace(**options, threads=most))
            continue
        device, case = options["device"], []
        for threads in args.threads:
            torch.set_num_threads(threads)
            if (device, threads) not in machines:
                machines[device, threads] = measure_machine(device, threads)
                print(f"{machine.named(device, threads)}")
                print(f"roofline, measured now: {described(machines[device, threads])}")
            wanted = options if threads == most else _of_this_library(options)
            case += compare(wanted, machines[device, threads], threads)
        if len(args.threads) > 1:
            add_efficiency(case)
            print(efficiency_table(case))
        rows += case
    if machines:
        print(LEGEND)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.plot:
        plot([row for row in rows if row["threads"] == most], args.plot)
    return rows


if __name__ == "__main__":
    main()
