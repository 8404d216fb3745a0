"""A good call of every op, and lists of ops, from their schemas: an op that is new is in all of them."""

import state
import torch

from xbn_ext.ops.step import STATE
from xbn_ext.schemas import NAMES

B, M, D = 5, 11, 7


def schema_of(op):
    return getattr(torch.ops.xbn_ext, op).default._schema


def tensors_of(op):
    return [a.name for a in schema_of(op).arguments if "Tensor" in str(a.type)]


def written_by(op):
    """The names of the tensors that it writes."""
    return [a.name for a in schema_of(op).arguments if a.alias_info is not None and a.alias_info.is_write]


OPS = [op for op in NAMES if tensors_of(op)]  # those that have kernels
WRITING = [op for op in OPS if written_by(op)]


def loss_arguments(**changes):
    arguments = {
        "z": torch.randn(B, D),
        "labels": torch.arange(B),
        "bank": torch.randn(M, D),
        "bank_labels": torch.arange(M) % 3,
        "count": torch.tensor(9),
        "scale": torch.ones(D, dtype=torch.float64),
        "shift": torch.zeros(D, dtype=torch.float64),
        "bank_ids": torch.arange(M) % 7,
        "exclude": torch.arange(B),
        "anchors": torch.ones(B, dtype=torch.bool),
        "loss": "contrastive",
        "parameters": [1.0, 0.5],
        "renormalize": True,
        "eps": 1e-6,
        "need_grad": True,
    }
    return arguments | changes


def track_arguments(**changes):
    m = state.filled(M, D, 9)
    arguments = {
        "target_mean": m.target_mean,
        "target_std": m.target_std,
        "variance": m.variance,
        "scale": m.scale,
        "shift": m.shift,
        "x": torch.randn(B, D),
        "mask": torch.ones(B, dtype=torch.bool),
        "sums": m.sums,
        "count": m.count,
        "process_noise": 0.01,
        "measurement_noise": 1.0,
        "fixed_gain": None,
        "eps": 1e-6,
        "stats": torch.zeros(3, dtype=torch.float64),
        "innovation": m.innovation,
    }
    return arguments | changes


def transform_arguments(**changes):
    m = state.filled(M, D, 9, pending=True)
    return {"bank": m.bank, "sums": m.sums, "scale": m.scale, "shift": m.shift, "count": m.count} | changes


def standardize_arguments(**changes):
    return transform_arguments() | {"eps": 1e-6, "ring_sums": None, "ring_count": None} | changes


def enqueue_arguments(**changes):
    m = state.filled(M, D, 9, pending=True)
    arguments = {
        "bank": m.bank,
        "bank_labels": m.bank_labels,
        "sums": m.sums,
        "head": m.head,
        "count": m.count,
        "z": torch.randn(B, D),
        "labels": torch.arange(B),
        "mask": torch.ones(B, dtype=torch.bool),
        "scale": m.scale,
        "shift": m.shift,
        "bank_ids": m.bank_ids,
        "ids": torch.arange(B),
        "bank_steps": m.bank_steps,
        "step": m.step,
        "first": 0,
        "ring_size": None,
    }
    return arguments | changes


def transform_loss_arguments(**changes):
    options = loss_arguments()
    for name in ("bank", "count", "scale", "shift"):
        del options[name]
    m = transform_arguments(bank=torch.randn(M, D))
    z, labels, bank_labels = (options.pop(name) for name in ("z", "labels", "bank_labels"))
    arguments = m | {"z": z, "labels": labels, "bank_labels": bank_labels, "ranked": torch.tensor(8)} | options
    return arguments | changes


def batch_loss_arguments(**changes):
    z = torch.randn(B, D)
    rows = {"dots": z @ z.T, "labels": torch.arange(B), "ids": torch.arange(B), "anchors": torch.arange(B) > 0}
    options = {name: loss_arguments()[name] for name in ("loss", "parameters", "renormalize", "eps", "need_grad")}
    return rows | options | changes


def batch_sums_arguments(**changes):
    arguments = batch_loss_arguments()
    of_loss = {name: arguments[name] for name in ("labels", "ids", "anchors", "loss", "parameters")}
    of_loss["anchors"] = of_loss["anchors"][:3]
    return {"dots": arguments["dots"][1:4]} | of_loss | {"first": 1, "need_grad": True} | changes


def memory_sums_arguments(**changes):
    arguments = loss_arguments()
    options = {name: arguments.pop(name) for name in ("loss", "parameters", "renormalize", "eps", "need_grad")}
    last = {name: options.pop(name) for name in ("renormalize", "eps", "need_grad")}
    return arguments | {"given": None} | options | {"number": 0, "first": 3} | last | changes


def settle_sums_arguments(**changes):
    parts = torch.rand(3, 2, B, 4, dtype=torch.float64)
    of_loss = {"loss": "contrastive", "parameters": [1.0, 0.5], "passes": 1}
    return {"parts": parts, "anchors": torch.arange(B) > 0} | of_loss | changes


def normalize_arguments(**changes):
    return {"x": torch.randn(B, D), "eps": 1e-6} | changes


def normalize_backward_arguments(**changes):
    x = torch.randn(B, D)
    z, norm = torch.ops.xbn_ext.normalize(x, 1e-6)
    return {"grad_z": torch.randn(B, D), "z": z, "norm": norm, "eps": 1e-6} | changes


def moments_arguments(**changes):
    return {"x": torch.randn(B, D), "mask": torch.ones(B, dtype=torch.bool)} | changes


def step_arguments(**changes):
    m = state.filled(M, D, 9, pending=True)
    arguments = {
        **{name: getattr(m, name) for name in STATE},
        "pairs": torch.zeros(2, dtype=torch.float64),
        "drift_stats": torch.zeros(3, dtype=torch.float64),
        "x": torch.randn(B, D),
        "sides": None,
        "labels": torch.arange(B),
        "mask": torch.arange(B) > 0,
        "ids": torch.arange(B),
        "loss": "contrastive",
        "parameters": [1.0, 0.5],
        "follows": True,
        "process_noise": 0.01,
        "measurement_noise": 1.0,
        "fixed_gain": None,
        "deferred": False,
        "stores_first": False,
        "normalizes": True,
        "renormalize": True,
        "batch_weight": 1.0,
        "memory_weight": 0.5,
        "center_gradient": False,
        "warmup_steps": 0,
        "eps": 1e-6,
        "need_grad": True,
    }
    return arguments | changes


ARGUMENTS = {
    "normalize": normalize_arguments,
    "normalize_backward": normalize_backward_arguments,
    "moments": moments_arguments,
    "track_": track_arguments,
    "transform_": transform_arguments,
    "standardize_": standardize_arguments,
    "enqueue_": enqueue_arguments,
    "memory_loss": loss_arguments,
    "transform_memory_loss_": transform_loss_arguments,
    "memory_sums": memory_sums_arguments,
    "settle_sums": settle_sums_arguments,
    "batch_loss": batch_loss_arguments,
    "batch_sums": batch_sums_arguments,
    "step_": step_arguments,
}
