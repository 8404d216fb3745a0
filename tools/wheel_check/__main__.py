"""Command line: which checks run, in what order, and what is printed at the end."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from .audit import check_abi
from .built import check_build
from .environments import Folder
from .pairs import NEWEST, Pair, check_pair, choose_pairs
from .report import CUDA_BUILD, SECOND_PYTHON, Outcome, attempt, parts_not_covered, print_table
from .wheel import Wheel


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.wheel_check",
        description="Imports and runs one wheel under several versions of Python and torch, builds another with the "
        "oldest torch, and audits the ABI.",
        epilog="The first --python is paired with the first --torch, the second with the second, and so on; "
        "the last of the shorter list goes with all that remain of the other.",
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", action="append", default=[], metavar="PATH",
                        help="a Python (the oldest and the newest found)")  # fmt: skip
    parser.add_argument("--torch", action="append", default=[], metavar="VERSION",
                        help=f"of torch (the oldest supported, and {NEWEST})")  # fmt: skip
    parser.add_argument("--index-url", metavar="URL", help="the package index from which pip takes torch")
    parser.add_argument("--folder", type=Path, help="where the environments are made (a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="keep them, so that the next run in the folder is quick")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs everything that the command line asks for and returns the exit status."""
    args = parse(argv)
    try:
        wheel = Wheel.read(args.wheel)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    index = ["--index-url", args.index_url] if args.index_url else []
    with Folder.open(args.folder, args.keep) as folder:
        pairs = choose_pairs(args.python, args.torch, wheel)
        outcomes = [attempt(str(pair), partial(check_pair, pair, wheel, folder, index)) for pair in pairs]
        if not args.torch or wheel.oldest_torch in args.torch:
            oldest = Pair(pairs[0].program, wheel.oldest_torch)
            outcomes.append(attempt(f"built with {oldest}", partial(check_build, oldest, wheel, folder, index)))
        outcomes.append(attempt("abi3audit", partial(check_abi, wheel, folder)))

    missing = parts_not_covered(outcomes)
    wanted = {SECOND_PYTHON: not args.python, CUDA_BUILD: not args.torch}
    outcomes += [
        Outcome(part, "no environment above has shown it", "UNAVAILABLE") for part in missing if wanted.get(part)
    ]
    print_table(outcomes, wheel)
    if missing:
        print(f"not covered by this run: {', '.join(missing)}")
    return 0 if all(outcome.result == "ok" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
