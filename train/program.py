"""The program from its first word: ``python -m train`` in a checkout, ``xbn-train`` where the package is installed.

Nothing here needs more than Python: what else is missing has to be said.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

NAME = "xbn-train"
FAILED, STOPPED = 2, 130
"""What a command exits with that is in error, or was asked to stop."""
PACKAGE = __name__.partition(".")[0]
"""``train`` in a checkout, ``xbn_train`` where it is installed."""
COMMANDS = {
    "embed": "embed",
    "search": "search",
    "export": "export",
    "report": "report",
    "compare": "compare.study",
}
"""First words of a command line, and the module of each; without one, it is a run."""
NEEDED = (
    "PIL",
    "faiss",
    "jinja2",
    "markdown",
    "matplotlib",
    "resvg_py",
    "safetensors",
    "scipy",
    "tensorboard",
    "timm",
    "torchvision",
    "tqdm",
    "yaml",
)
"""Modules of the extra ``train``, except for the pretrained weights: a run goes without."""


def called(command: str = "") -> str:
    """How this process was called, as a message names it, and a command of it."""
    program = NAME if Path(sys.argv[0]).stem == NAME else f"python -m {PACKAGE}"
    return f"{program} {command}".rstrip()


@contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """While open, Ctrl-C ends the process without a word: for what takes seconds and leaves nothing, as imports do."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    # Threads that wait must not spin: on a machine with anything else to do, spinning costs a factor of ten.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = words.pop(0) if words and words[0] in COMMANDS else ""
    try:
        with ended_by_ctrl_c():
            module = importlib.import_module(f"{PACKAGE}.{COMMANDS.get(command, 'run')}")
        status: int = module.main(words)
        return status
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return STOPPED
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in NEEDED:
            raise
        print(f"{called(command)}: error: there is no module {missing}: pip install 'xbn_ext[train]'", file=sys.stderr)
        return FAILED
