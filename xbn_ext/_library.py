"""Decides what `torch.ops.xbn_ext` is: the compiled library `xbn_ext._C`, or `xbn_ext.plain` if that is missing. Beside
the library, `plain` is what a device without kernels gets (`_devices.py` says which).

The environment variable `XBN_NATIVE`: `0` never loads the library, `1` insists on it, `auto` (the default) takes it if
it is there. A library that is there and does not load is an error, and not a reason to be slow.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _devices
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
        library = define("xbn_ext")
        _kept.append(library)
        _complete(library)
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


def _complete(library: torch.library.Library) -> None:
    """Makes `plain` what there is for the devices that the compiled library has no kernels for."""
    for name in _with_kernels("CPU"):
        # The kernels go before it: theirs is the key of a device, this one is of all.
        library.impl(name, _in_plain(name), "CompositeExplicitAutograd")
    if torch.version.hip:  # its GPUs, too, are called cuda
        _choose_by_gpu(library)
    elif torch.version.cuda:

        def look() -> None:
            gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
            if any(map(_devices.obstacle, gpus)):
                _choose_by_gpu(library)

        torch.cuda._lazy_call(look)  # when CUDA is initialised, which an import does not do


def _with_kernels(key: str) -> list[str]:
    """The ops that the compiled library has registered for a device."""
    return [op for op in NAMES if torch._C._dispatch_has_kernel_for_dispatch_key(f"xbn_ext::{op}", key)]


def _choose_by_gpu(library: torch.library.Library, key: str = "CUDA") -> None:
    """Replaces the kernels for GPUs by a choice, where one of these has none: a call of Python more on the others."""

    def either(name: str) -> Callable[..., Any]:
        in_plain, kernel = _in_plain(name), torch.library.get_kernel(f"xbn_ext::{name}", key)

        def op(keys: Any, *args: Any) -> Any:
            return in_plain(*args) if _devices.obstacle(_device_of(args)) else kernel.call_boxed(keys, *args)

        return op

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*Overriding a previously registered kernel")
        for name in _with_kernels(key):
            library.impl(name, either(name), key, with_keyset=True)


def _in_plain(name: str) -> Callable[..., Any]:
    """An op of `plain` that says once for each device why it is called."""

    def op(*args: Any) -> Any:
        from . import plain

        device = _device_of(args)
        why = _devices.obstacle(device)
        if why is not None and device not in _told and _devices.has_float64(device):
            _told.add(device)
            warnings.warn(
                f"xbn_ext runs in plain PyTorch on {device}: the same numbers, several times slower; {why}",
                RuntimeWarning,
                stacklevel=2,
            )
        return getattr(plain, name)(*args)

    return op


def _device_of(args: Sequence[Any]) -> torch.device:
    """That of the first tensor. Without one a CPU's kernel says so."""
    return next((t.device for t in args if isinstance(t, Tensor)), torch.device("cpu"))


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
_told: set[torch.device] = set()
native = load()
