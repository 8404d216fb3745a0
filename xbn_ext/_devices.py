"""Decides which path a device takes: the kernels of the compiled library, or `xbn_ext.plain` where it has none."""

from __future__ import annotations

import functools
import re
from typing import Literal, NamedTuple

import torch
from torch import Tensor

WITHOUT_FLOAT64 = {"mps"}  # by type; a GPU of Intel's says for itself


class Path(NamedTuple):
    """What `path_of` says."""

    name: Literal["kernels", "plain", "unknown"]
    why: str


def path_of(where: Tensor | torch.device | str) -> Path:
    """Which path the ops take for a tensor, or for those on a device, and why: `Path(name, why)`.

    `name` is "kernels", "plain" (the same in plain PyTorch, several times slower) or "unknown": torch finds no such
    GPU, or the device is meta, where nothing is computed. A device without float64 takes the CPU's path: a memory that
    is moved there stays on the CPU. For a GPU it initialises CUDA.

    Raises:
        ValueError: `where` is neither a tensor nor a device.
    """
    try:
        device = where.device if isinstance(where, Tensor) else torch.device(where)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"where must be a tensor or a device, got {where!r}") from error
    if device.type == "meta":
        return Path("unknown", "on meta there are shapes only, and nothing is computed")
    if device.type in ("cuda", "xpu"):
        module = torch.get_device_module(device.type)
        if not module.is_available() or (device.index or 0) >= module.device_count():
            return Path("unknown", "torch finds no such GPU here")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if not has_float64(device):
        return Path(path_of("cpu").name, f"{device.type} has no float64: a memory that is moved there stays on the CPU")
    why = obstacle(device)
    return Path("kernels", f"the library has kernels for {device}") if why is None else Path("plain", why)


def paths() -> dict[str, Path]:
    """`path_of` the CPU and each GPU or other accelerator here, by their names, without initialising CUDA."""
    found = {"cpu": path_of("cpu")}
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        for i in range(torch.get_device_module(accelerator).device_count()):
            device = torch.device(accelerator.type, i)
            if device.type == "cuda" and not torch.cuda.is_initialized():
                found[str(device)] = Path("unknown", "CUDA is not initialised; xbn_ext.path_of does that")
            else:
                found[str(device)] = path_of(device)
    return found


@functools.cache
def obstacle(device: torch.device) -> str | None:
    """Why there are no kernels for a device; None: there are."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("xbn_ext::step_", "CPU"):
        return "xbn_ext runs without its compiled library"
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip:
        return f"xbn_ext has no kernels for {'AMD GPUs' if device.type == 'cuda' else device.type}"
    architectures = torch.ops.xbn_ext.cuda_architectures()
    if not architectures:
        return "this build of xbn_ext has no CUDA kernels: install the CUDA toolkit (nvcc) and build it with XBN_CUDA=1"
    major, minor = torch.cuda.get_device_capability(device)
    if any(runs(name, major, minor) for name in architectures.split(";")):
        return None
    return (
        f"this build of xbn_ext has kernels for {architectures} and none for {device} (compute capability "
        f"{major}.{minor}): from 7.5 on, build it from source on that machine with XBN_CUDA=1 XBN_CUDA_ARCHS=native"
    )


def runs(architecture: str, major: int, minor: int) -> bool:
    """Whether a GPU of this compute capability runs code for an architecture, as in 80, 90a or 80-ptx."""
    found = re.fullmatch(r"(\d+)(\d)([af]?)(-ptx)?", architecture)
    assert found is not None, architecture
    own_major, own_minor, kind, ptx = int(found[1]), int(found[2]), found[3], found[4]
    if kind == "a":
        return (own_major, own_minor) == (major, minor)
    if ptx and not kind:
        return (own_major, own_minor) <= (major, minor)
    return own_major == major and own_minor <= minor


def has_float64(device: torch.device) -> bool:
    """Whether it computes in float64, as the statistics of a memory are."""
    if device.type == "xpu" and torch.xpu.is_available():
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type not in WITHOUT_FLOAT64
