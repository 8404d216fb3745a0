"""The ops that the functions of this package call, and what registers a fake kernel for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import _library  # noqa: F401  registers torch.ops.xbn_ext

called: Any = torch.ops.xbn_ext
arguments_of: dict[str, list[str]] = {}  # of each op with a fake kernel: those of its schema, in its order


@contextmanager
def over(namespace: Any) -> Iterator[None]:
    """Within it the functions here call the ops of another namespace than `torch.ops.xbn_ext`, or a module's functions
    with their arguments. In all threads, and in the backward of what was computed, which must be within it, too. For
    the project's tests and benchmark."""
    global called
    before, called = called, namespace
    try:
        yield
    finally:
        called = before


def call(op: str, arguments: dict[str, Any]) -> Any:
    """An op of arguments by name, all of its schema and no others: torch takes half of the time where they come in the
    order of the schema."""
    names = arguments_of[op]
    if len(arguments) != len(names):
        raise TypeError(f"{op} takes no {', '.join(sorted(arguments.keys() - set(names)))}")
    return getattr(called, op)(*[arguments[name] for name in names])


def fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what gives the results' shapes. One tensor on the meta device brings a call here: of others on a CPU it
    would make numbers that nothing has computed, or write nothing, so here too all must be on one device."""
    names = [argument.name for argument in getattr(torch.ops.xbn_ext, op).default._schema.arguments]
    arguments_of[op] = names

    def register(shapes: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any) -> Any:
            tensors = [(name, t) for name, t in zip(names, args, strict=False) if isinstance(t, Tensor)]
            for name, t in tensors:
                if t.device != tensors[0][1].device:
                    raise RuntimeError(f"{op}: {name} is on another device than the other arguments")
            return shapes(*args)

        torch.library.register_fake(f"xbn_ext::{op}")(checked)
        return shapes

    return register
