"""Checks the wheel that is installed for the Python that runs this file, `python -I inside.py`.

It runs in an environment that has the wheel and what the wheel requires, so it must not import from this package. The
last line that it prints is JSON: what it ran under and how far it went. An exception, of whatever kind, says that the
wheel does not hold what it claims.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

import xbn_ext
from xbn_ext import Contrastive, CrossBatchMemory, ops, reference


def check() -> dict[str, str]:
    """Checks everything.

    Returns:
        What it ran under and how far it went: `python`, `torch`, `cuda` (that torch was built for) and `kernels`.
    """
    torch.set_num_threads(1)
    assert Path(xbn_ext.__file__).is_relative_to(sys.prefix), f"{xbn_ext.__file__} is not the installed wheel"
    info = xbn_ext.build_info()
    assert info["torch"] == torch.__version__, info
    check_ops("cpu")
    check_training("cpu")
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "kernels": check_cuda(info["cuda"]),
    }


def check_cuda(architectures: list[str]) -> str:
    """Runs the CUDA kernels on a GPU; without one, sees that torch would find them, and they what they need of torch.

    Returns:
        How far it went.
    """
    if torch.version.cuda is None:
        return "not for this torch"
    assert architectures, "the wheel has no CUDA kernels: it was built without a CUDA compiler"
    missing = registered_ops("CPU") - registered_ops("CUDA")
    assert not missing, f"no CUDA kernel is registered for {sorted(missing)}"
    check_torch_functions()
    if not torch.cuda.is_available():
        return "registered, no GPU to run on"
    check_ops("cuda")
    check_training("cuda")
    return f"ran on {torch.cuda.get_device_name()}"


def registered_ops(key: str) -> set[str]:
    """The ops of xbn_ext that have a kernel for a dispatch key of torch."""
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    ours = {name for name in names if name.startswith("xbn_ext::")}
    return {name for name in ours if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)}


def check_torch_functions() -> None:
    """Finds every function of torch's C interface that the library names, those too that it looks up on a GPU only."""
    extension = sys.modules["xbn_ext._C"].__file__
    assert extension is not None
    names = set(re.findall(rb"(?<!\w)aoti_torch_\w+", Path(extension).read_bytes()))
    libraries = [ctypes.CDLL(name) for name in ("libtorch_cpu.so", "libtorch_cuda.so")]  # both loaded by torch
    missing = [name for name in map(bytes.decode, names) if not any(hasattr(library, name) for library in libraries)]
    assert not missing, f"this torch has no {sorted(missing)}"


def check_ops(device: str) -> None:
    """Holds every op against its twin in `xbn_ext.reference`."""
    actual, expected = run_ops(ops, device), run_ops(reference, device)
    unchecked = registered_ops("CPU") - {f"xbn_ext::{op}" for op in actual}
    assert not unchecked, f"there is no check of {sorted(unchecked)}"
    for op, tensors in actual.items():
        assert_close(f"{op} on {device}", tensors, expected[op])


def assert_close(what: str, actual: list[Tensor], expected: list[Tensor]) -> None:
    """Asserts that float32 results agree; how closely, the project's tests say."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, msg=lambda text: f"{what}: {text}")


def run_ops(module: ModuleType, device: str) -> dict[str, list[Tensor]]:
    """Calls each op once, on what the ones before it left behind.

    Args:
        module: which has them, `xbn_ext.ops` or `xbn_ext.reference`.
        device: where.

    Returns:
        For each op all tensors it returned or may have written.
    """
    torch.manual_seed(0)
    first, x = torch.randn(2, 12, 7).add(5).to(device)  # off centre, for standardize_ to have something to do
    z = torch.nn.functional.normalize(torch.randn(12, 7), dim=1).to(device).requires_grad_()
    labels, mask = torch.arange(12, device=device) % 3, torch.arange(12, device=device) != 4
    with torch.device(device):
        m = reference.Memory.empty(16, 7, torch.float32)

    def state(*returned: Tensor) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in (*returned, *vars(m).values())]

    leaf = x.clone().requires_grad_()
    unit = module.normalize(leaf)
    results = {"normalize": [unit.detach()], "normalize_backward": [*torch.autograd.grad(unit, leaf, first)]}
    results["moments"] = state(*module.moments(x, mask))
    ring = (m.bank, m.bank_labels, m.sums, m.head, m.count)
    results["enqueue_"] = state(module.enqueue_(*ring, first, labels, mask, m.scale, m.shift))
    kalman = (m.target_mean, m.target_std, m.variance, m.scale, m.shift)
    module.track_(*kalman, x, mask, m.sums, m.count, 0.01, 1.0)
    results["track_"] = state()
    seen = {"count": m.count, "scale": m.scale, "shift": m.shift}
    loss = module.memory_loss(z, labels, m.bank, m.bank_labels, Contrastive(), **seen)
    results["memory_loss"] = state(loss, *torch.autograd.grad(loss, z))
    module.standardize_(m.bank, m.sums, m.scale, m.shift, m.count)
    results["standardize_"] = state()
    module.transform_(m.bank, m.sums, m.scale, m.shift, m.count)
    results["transform_"] = state()
    module.track_(*kalman, x, mask, m.sums, m.count, 0.01, 1.0)
    moved = (m.bank, m.sums, m.scale, m.shift, m.count)
    loss, pairs = module.transform_memory_loss_(*moved, z, labels, m.bank_labels, Contrastive())
    results["transform_memory_loss_"] = state(loss, *torch.autograd.grad(loss, z), pairs)
    loss = module.batch_loss(z, labels, Contrastive())
    results["batch_loss"] = state(loss, *torch.autograd.grad(loss, z))
    results["batch_sums"] = state(*module.batch_sums((z @ z.T).detach()[1:], labels, Contrastive(), first=1))
    sums, grads = module.memory_sums(z, labels, m.bank, m.bank_labels, Contrastive(), count=m.count)
    results["memory_sums"] = state(sums, grads)
    results["settle_sums"] = state(*module.settle_sums(sums[None], Contrastive(), 1))
    loss = module.step_(m, leaf, labels, Contrastive(), enqueue_mask=mask)
    results["step_"] = state(loss, *torch.autograd.grad(loss, leaf))
    return results


def check_training(device: str) -> None:
    """Trains a layer for three steps with `CrossBatchMemory`; loss, gradient and memory must be the reference's."""
    torch.manual_seed(0)
    network = torch.nn.Linear(9, 7).to(device)
    pair_loss = Contrastive()
    criterion = CrossBatchMemory(pair_loss, embedding_size=7, memory_size=20).to(device)
    with torch.device(device):
        m = reference.Memory.empty(20, 7, torch.float32)
    labels = torch.arange(8, device=device) % 3
    weights = list(network.parameters())
    for _ in range(3):
        embeddings = network(torch.randn(8, 9).to(device))
        loss, expected = criterion(embeddings, labels), reference.step(m, embeddings, labels, pair_loss)
        gradients = torch.autograd.grad(loss, weights, retain_graph=True)
        assert_close(
            f"training on {device}",
            [loss, *gradients, *criterion.state_dict().values()],
            [expected, *torch.autograd.grad(expected, weights), *(getattr(m, name) for name in criterion.state_dict())],
        )
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.sub_(0.1 * gradient)


if __name__ == "__main__":
    print(json.dumps(check()))
