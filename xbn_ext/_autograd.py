"""What the ops tell autograd: which gradient a value has, what they have written, and what must not be differentiated
or computed a second time."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def writes(*tensors: Tensor | None) -> None:
    """Tells autograd that an op is about to write these, so that a backward which has saved one of them raises."""
    if not torch.compiler.is_compiling():  # there the op becomes a copy_, which tells it
        torch.autograd.graph.increment_version([t for t in tensors if t is not None])


def needs_grad(z: Tensor) -> bool:
    level = getattr(forward_ad, "_current_level", 0)  # private: where it is not, ask always
    if level >= 0 and forward_ad.unpack_dual(z).tangent is not None:
        raise RuntimeError("what xbn_ext computes has no forward-mode derivative")
    return torch.is_grad_enabled() and z.requires_grad


class _DifferentiableOnce(torch.autograd.Function):
    """Passes `grad` on and raises in the second backward. The kernel's gradient does not know how it depends on
    `others`; without this node a second backward would take it for a constant and return a wrong number."""

    @staticmethod
    def forward(grad: Tensor, *others: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("what xbn_ext computes can be differentiated only once")


def differentiable_once(grad: Tensor, *others: Tensor) -> Tensor:
    """`grad`, which depends on the others too."""
    if torch.is_grad_enabled():  # create_graph=True
        grad = _DifferentiableOnce.apply(grad, *others)
    return grad


def scaled_gradient(grad_loss: Tensor, z: Tensor, grad_z: Tensor) -> Tensor:
    return differentiable_once(grad_loss * grad_z, z)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Turns autocast off for a type of device. Meta has none; torch.amp.is_autocast_available would say so, but dynamo
    traces that from torch 2.12 on only."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def check_step(step: Tensor, *given: Tensor | None) -> None:
    """Raises RuntimeError, before a memory is written, where its loss has no derivative or would be computed twice.

    Activation checkpointing calls what it wraps once more during the backward pass. A memory that has moved since would
    move again and rank another loss than the one returned.
    """
    if torch.compiler.is_compiling():
        torch.ops.xbn_ext._check_not_in_backward(step)  # when the compiled code runs
        return
    _check_not_in_backward(step)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "a CrossBatchMemory cannot be transformed by torch.func where it writes its memory or something learns: "
            "call it in eval() and under no_grad()"
        )
    for t in given:
        if t is not None:
            needs_grad(t)


def _check_not_in_backward(step: Tensor) -> None:
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "a CrossBatchMemory was called during a backward pass, as activation checkpointing does: its memory would "
            "move twice, or has moved since. Keep the criterion outside what is checkpointed"
        )


def with_gradient(value: Tensor, z: Tensor, grad_z: Tensor) -> Tensor:
    """`value`, which depends on z by a gradient that is known: with as little autograd overhead as possible."""
    if torch.compiler.is_compiling():
        return torch.ops.xbn_ext._with_gradient(value, z, grad_z)  # type: ignore[no-any-return]
    return _WithGradient.apply(value, z, grad_z)  # type: ignore[no-any-return]


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, z: Tensor, grad_z: Tensor) -> Tensor:
        ctx.save_for_backward(z, grad_z)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        return None, scaled_gradient(grad_value, *ctx.saved_tensors), None


_library = torch.library.Library("xbn_ext", "FRAGMENT")

# It claims to write `step`, or a compiler would leave out a call that gives nothing.
_library.define("_check_not_in_backward(Tensor(a!) step) -> ()")
_library.impl("_check_not_in_backward", _check_not_in_backward, "CompositeExplicitAutograd")
torch.library.register_fake("xbn_ext::_check_not_in_backward")(lambda step: None)

# An op that writes its arguments has no derivative in torch; this one, which writes nothing, has it.
_library.define("_with_gradient(Tensor value, Tensor z, Tensor grad_z) -> Tensor")


@torch.library.impl(_library, "_with_gradient", "CompositeExplicitAutograd")
def _(value: Tensor, z: Tensor, grad_z: Tensor) -> Tensor:
    return value.clone()


@torch.library.register_fake("xbn_ext::_with_gradient")
def _(value: Tensor, z: Tensor, grad_z: Tensor) -> Tensor:
    return torch.empty_like(value)


def _with_gradient_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


torch.library.register_autograd("xbn_ext::_with_gradient", _WithGradient.backward, setup_context=_with_gradient_setup)
