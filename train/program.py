"""The program from its first word: ``python -m train`` in a checkout, ``xbn-train`` where the package is installed.

Nothing here needs more than Python: what else is missing has to be said.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

NAME = "xbn-train"
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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    # Threads that wait must not spin: on a machine with anything else to do, spinning costs a factor of ten.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = words.pop(0) if words and words[0] in COMMANDS else ""
    try:
        module = importlib.import_module(f"{PACKAGE}.{COMMANDS.get(command, 'run')}")
        status: int = module.main(words)
        return status
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in NEEDED:
            raise
        print(f"{called(command)}: error: there is no module {missing}: pip install 'xbn_ext[train]'", file=sys.stderr)
        return 2
