"""Decides what `torch.ops.xbn_ext` is: the compiled library `xbn_ext._C`, or `xbn_ext.plain` if that is missing.

The environment variable `XBN_NATIVE`: `0` never loads the library, `1` insists on it, `auto` (the default) takes it if
it is there. A library that is there and does not load is an error, and not a reason to be slow.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch

from .schemas import NAMES, SCHEMAS


def load() -> bool:
    """Registers the ops; returns whether they are compiled.

    Raises:
        ImportError: the library is there and does not load, or is not there and `XBN_NATIVE` is 1.
        ValueError: `XBN_NATIVE` is something else.
    """
    wanted = os.environ.get("XBN_NATIVE") or "auto"
    if wanted not in ("0", "1", "auto"):
        raise ValueError(f"XBN_NATIVE must be 0, 1 or auto, got {wanted!r}")
    if wanted != "0" and _is_there():
        try:
            importlib.import_module("xbn_ext._C")
        except ImportError as error:
            raise ImportError(
                f"the compiled library of xbn_ext does not load: {error}. Install xbn_ext again for this Python and "
                "this torch, or set XBN_NATIVE=0 to run without the library, slowly"
            ) from error
        _kept.append(define("xbn_ext"))
        return True
    way_out = "unset XBN_NATIVE to have the kernels"
    if wanted != "0":
        way_out = _hidden() or (
            "install a wheel for this platform, or build one with a C++20 compiler: pip install from a checkout"
        )
    if wanted == "1":
        raise ImportError(f"XBN_NATIVE=1, but xbn_ext has no compiled library here: {way_out}")
    warnings.warn(
        "xbn_ext runs without its compiled library: the same numbers in plain PyTorch, several times slower; "
        + way_out,
        RuntimeWarning,
        stacklevel=4,  # where xbn_ext is imported
    )
    from . import plain

    _kept.append(register("xbn_ext", plain))
    return False


def define(namespace: str) -> torch.library.Library:
    """Makes the schemas those of `torch.ops.<namespace>`, as long as what it returns is kept. Kernels for them may be
    registered before or after."""
    library = torch.library.Library(namespace, "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    return library


def register(namespace: str, module: ModuleType) -> torch.library.Library:
    """Makes the functions of a module the ops of `torch.ops.<namespace>`, as long as what it returns is kept."""
    library = define(namespace)
    for name in NAMES:
        library.impl(name, getattr(module, name), "CompositeExplicitAutograd")
    return library


def _is_there() -> bool:
    """Whether there is a library in this folder; one that is for another Python raises."""
    folder = Path(__file__).parent
    if PathFinder.find_spec("xbn_ext._C", [str(folder)]) is not None:
        return True
    others = [path.name for path in folder.glob("_C.*") if path.suffix in (".so", ".pyd")]
    if others:
        raise ImportError(
            f"the compiled library of xbn_ext, {', '.join(others)}, is for another Python: install xbn_ext again for "
            "this one, or set XBN_NATIVE=0 to run without the library, slowly"
        )
    return False


def _hidden() -> str | None:
    """What to do if this folder is a checkout's and hides an installed one that has a library: a Python that is started
    in a checkout finds the checkout's folder first."""
    here = Path(__file__).parent.resolve()
    for entry in sys.path:
        folder = Path(entry or ".", "xbn_ext").resolve()
        if folder != here and (folder / "__init__.py").exists() and any(folder.glob("_C.*")):
            return f"{folder} has it, but {here} is imported in its place: start Python in another folder"
    return None


_kept: list[torch.library.Library] = []
native = load()
