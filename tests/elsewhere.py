"""Tensors on a device that is not here: what they hold is on the CPU.

Within `Elsewhere("xpu")` torch makes such tensors where it is asked for that device. An op of ours is what the
dispatcher has for the device, and what that calls of torch is computed on the CPU.
"""

from contextlib import ExitStack
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class There(torch.Tensor):
    """`held`, as if it were on a device. C++ takes it for a meta tensor, whose device needs no driver."""

    @staticmethod
    def __new__(cls, held, device):
        t = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device="meta", requires_grad=held.requires_grad,
        )  # fmt: skip
        t.held, t.where = held, device
        return t

    device = property(lambda self: self.where)
    is_meta = is_cpu = False
    __torch_function__ = torch._C._disabled_torch_function_impl

    def data_ptr(self):
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} of a tensor that is {args[0].where}, outside of Elsewhere")


class Elsewhere(TorchDispatchMode):
    """`called` are the ops of ours, in turn. Without `float64` there are no such tensors there."""

    def __init__(self, type, float64=True):
        super().__init__()
        self.device, self.float64 = torch.device(type, 0), float64
        self.keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, type.upper()))
        self.called = []
        self.patches = ExitStack()

    def __enter__(self):
        if self.device.type == "xpu":  # torch looks for a driver before it asks a mode
            self.patches.enter_context(mock.patch("torch.xpu._lazy_init"))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        mine = [t for t in tensors if isinstance(t, There)]
        if func.namespace == "xbn_ext" and mine:
            self.called.append(func.__name__.partition(".")[0])
            with self:
                return func.redispatch(self.keys, *args, **kwargs)
        to = kwargs.get("device")
        is_there = bool(mine) if to is None else to.type in (self.device.type, "meta")  # for C++ it is meta
        if to is not None and is_there:
            kwargs = kwargs | {"device": torch.device("cpu")}
        held = {id(t.held): t for t in mine}

        def put(t):
            if not self.float64 and t.dtype == torch.float64:
                raise TypeError(f"{self.device} has no float64")
            return held[id(t)] if id(t) in held else There(t, self.device)

        result = func(*tree_map_only(There, lambda t: t.held, args), **tree_map_only(There, lambda t: t.held, kwargs))
        return tree_map_only(torch.Tensor, put, result) if is_there else result
