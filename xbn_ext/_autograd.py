"""What the ops tell autograd: which gradient a value has, what they have written, and what must not be differentiated
or computed a second time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def writes(*tensors: Tensor | None) -> None:
    """Tells autograd that an op is about to write these, so that a backward which has saved one of them raises. What is
    no tensor, the op leaves out or refuses."""
    if not torch.compiler.is_compiling():  # there the op becomes a copy_, which tells it
        torch.autograd.graph.increment_version([t for t in tensors if isinstance(t, Tensor)])


def needs_grad(z: Tensor) -> bool:
    level = getattr(forward_ad, "_current_level", 0)  # private: where it is not, ask always
    if level >= 0 and forward_ad.unpack_dual(z).tangent is not None:
        raise RuntimeError("what xbn_ext computes has no forward-mode derivative")
    return torch.is_grad_enabled() and z.requires_grad


def differentiable_once(grad: Tensor, *others: Tensor) -> Tensor:
    """`grad`, which depends on the others too. A kernel does not know how: a second backward, which would take its
    gradient for a constant and return a wrong number, raises."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # create_graph=True, or perhaps when that code runs
        return torch.ops.xbn_ext._differentiable_once(grad, others)  # type: ignore[no-any-return]
    return grad


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Turns autocast off for a type of device, if that has it."""
    known = device_type in ("cpu", "cuda")
    return torch.autocast(device_type, enabled=False) if known or _has_autocast(device_type) else nullcontext()


def without_saved_tensors_hooks() -> AbstractContextManager[Any]:
    """For a graph whose backward runs within the forward pass: hooks on what autograd saves are for the graphs of the
    caller. Those of activation checkpointing would compute what it wraps a second time."""
    hooks = torch._C._autograd
    if not hooks._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]  # then none can be added
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_itself, _itself)


def _itself(saved: Tensor) -> Tensor:
    return saved


def _has_autocast(device_type: str) -> bool:
    """Meta and some backends have none. torch.amp.is_autocast_available says yes of any backend that is not torch's."""
    try:
        torch.autocast(device_type, enabled=False)
    except (AssertionError, RuntimeError):
        return False
    return True


# A compiled graph takes the answer for a constant. torch.compiler.assume_constant_result says so in these words, but
# imports torch's compiler, which takes as long as all of torch.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_step(step: Tensor, *given: Tensor | None, of_loss: Sequence[Tensor], learns: bool) -> None:
    """Raises RuntimeError, before a memory is written, where its loss has no derivative or would be computed twice.
    What is given are embeddings, labels and the like; `of_loss` is what the loss has that are tensors.

    Activation checkpointing calls what it wraps once more during the backward pass. A memory that has moved since would
    move again and rank another loss than the one returned.
    """
    if torch.compiler.is_compiling():
        torch.ops.xbn_ext._check_not_in_backward(step)  # when the compiled code runs
        return
    _check_not_in_backward(step)
    check_not_transformed(
        "where it writes its memory or something learns: call it in eval() and under no_grad()", *given, *of_loss
    )
    for t in (*given, *of_loss) if learns else ():
        if t is not None and t.is_floating_point() and t.is_inference():
            which = "a parameter of the loss was" if any(t is one for one in of_loss) else "embeddings were"
            raise RuntimeError(f"{which} made in inference mode, and autograd cannot use that: clone it outside")


def check_not_transformed(where: str, *given: Tensor | None) -> None:
    """Raises RuntimeError under `torch.func`, and for tensors with a forward-mode derivative."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(f"a CrossBatchMemory cannot be transformed by torch.func {where}")
    for t in given:
        if t is not None:
            needs_grad(t)


def _check_not_in_backward(step: Tensor) -> None:  # as an op it says that it writes step, see below
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "a CrossBatchMemory was called during a backward pass, as activation checkpointing does: its memory would "
            "move twice, or has moved since. Keep the criterion outside what is checkpointed"
        )


def with_gradient(value: Tensor, z: Tensor, grad_z: Tensor, *others: Tensor) -> Tensor:
    """`value`, which depends on z by a gradient that is known, and that depends on the others too; z may be one."""
    others = tuple(t for t in others if t is not z)  # torch.compile refuses a function that gets one tensor twice
    return _WithGradient.apply(value, z, grad_z, *others)  # type: ignore[no-any-return]


class _WithGradient(torch.autograd.Function):
    # Not the op's own derivative: torch.library would add half of its time to a small call, and allows none to an op
    # that writes its arguments.

    @staticmethod
    def forward(ctx: Any, value: Tensor, z: Tensor, grad_z: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(z, grad_z, *others)
        return value.detach()  # of a view, as of the argument itself, autograd would refuse `loss /= 4`

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        z, grad_z, *others = ctx.saved_tensors
        return None, differentiable_once(grad_value * grad_z, z, *others), None, *(None for _ in others)


def along_rows(grad: Tensor, rows: Tensor, value: Tensor) -> Tensor:
    """The sum of the products of a value's gradient with the rows `[B, D]` that it is by, in float64.

    A value may be finite in spite of rows that are not, as where they are only stored. Their gradient is NaN all the
    same, and left out of the sum.
    """
    products = torch.where(rows.isfinite().all(1), (grad.double() * rows.double()).sum(1), 0)
    return torch.where(value.isfinite(), products.sum(), torch.nan)


def across(grad: Tensor, z: Tensor, anchors: Tensor | None) -> tuple[Tensor, Tensor]:
    """What of a gradient `[B, D]` is across the rows of `z [B, D]`, and so turns them; and which rows have that, `[B]`.
    These are the anchors `[B]` that are True, None: all, as far as they are finite. The other rows are 0."""
    squared = z.square().sum(1)
    along = torch.where(squared > 0, (grad * z).sum(1) / squared, squared)  # NaN, where one of them is no number
    has = ~along.isnan() if anchors is None else anchors & ~along.isnan()
    return torch.where(has[:, None], grad - along[:, None] * z, 0), has


def centered(grad: Tensor, z: Tensor, anchors: Tensor | None) -> Tensor:
    """A gradient `[B, D]` by `z [B, D]` without the mean of what is `across` the anchors. It is taken off theirs only:
    the others have none."""
    parts, has = across(grad, z, anchors)
    return torch.where(has[:, None], grad - parts.sum(0) / has.sum().clamp(min=1), grad)


def with_centered_gradient(z: Tensor, anchors: Tensor | None) -> Tensor:
    """z as it is, with `centered` of the gradient that arrives here."""
    return _WithCenteredGradient.apply(z, anchors)  # type: ignore[no-any-return]


class _WithCenteredGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, anchors: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, anchors)
        return z.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return centered(grad, *ctx.saved_tensors), None


_library = torch.library.Library("xbn_ext", "FRAGMENT")

# It claims to write `step`, or a compiler would leave out a call that gives nothing.
_library.define("_check_not_in_backward(Tensor(a!) step) -> ()")
_library.impl("_check_not_in_backward", _check_not_in_backward, "CompositeExplicitAutograd")
torch.library.register_fake("xbn_ext::_check_not_in_backward")(lambda step: None)

# An op and no torch.autograd.Function: a compiler would look into the backward of that, which only raises.
_library.define("_differentiable_once(Tensor grad, Tensor[] others) -> Tensor")
_library.impl("_differentiable_once", lambda grad, others: grad.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("xbn_ext::_differentiable_once")(lambda grad, others: torch.empty_like(grad))


def _second_backward(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("what xbn_ext computes can be differentiated only once")


torch.library.register_autograd("xbn_ext::_differentiable_once", _second_backward)
