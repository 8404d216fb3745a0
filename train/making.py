"""What a run is made of besides its network and its data, by its settings."""

from __future__ import annotations

import math
import re

import numpy as np
import torch
from numpy.typing import NDArray

import xbn_ext

from .config import Config, ConfigError
from .model import Embedder
from .ranks import ALONE, Ranks

LR_DROP, LR_DROP_AT = 0.1, 0.7
"""--schedule step: what learning rates are multiplied by, and after which part of the steps after --lr-warmup."""


def make_criterion(config: Config, ranks: Ranks = ALONE) -> xbn_ext.CrossBatchMemory:
    """The loss and the memory of a run, the same in all its processes."""
    return xbn_ext.CrossBatchMemory(
        config.pair_loss(),
        config.embedding_dim,
        config.memory_size,
        drift=config.drift,  # type: ignore[arg-type]
        process_noise=config.process_noise,
        center_gradient=config.center_gradient,
        ema_momentum=config.ema_momentum,
        update=config.update,  # type: ignore[arg-type]
        batch_weight=config.batch_weight,
        memory_weight=0.0 if config.method == "batch" else config.memory_weight,
        warmup_steps=config.warmup_steps * config.accumulate,  # it counts batches
        process_group=ranks.group,
    )


def memory_bytes(config: Config) -> int:
    """What the criterion's memory takes: of each row the embedding in float32, its label, its id and its step; of the
    oracle's its image, too."""
    image = 3 * config.image_size**2 if config.method == "oracle" else 0
    return config.memory_size * (4 * config.embedding_dim + 3 * 8 + image)


def make_sampler(config: Config, labels: NDArray[np.int64]) -> xbn_ext.ClassBalancedSampler:
    """Which images make up each step, the same in all processes; raises ConfigError if there are too few classes."""
    try:
        return xbn_ext.ClassBalancedSampler(labels, config.batch_size, config.samples_per_class, seed=config.seed)
    except ValueError as error:
        options = r"\b(batch_size|samples_per_class|seed)\b"  # as the command line has them
        raise ConfigError(re.sub(options, lambda name: f"--{name[0].replace('_', '-')}", str(error))) from error


def make_optimizer(config: Config, model: Embedder) -> torch.optim.Optimizer:
    """Adam, its weight decay as --optimizer says; each group's ``peak`` is its highest learning rate."""
    groups = [
        {"params": list(model.head.parameters()), "peak": config.lr},
        {"params": [p for p in model.backbone.parameters() if p.requires_grad], "peak": config.lr * config.backbone_lr},
    ]
    make = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return make([group for group in groups if group["params"]], lr=config.lr, weight_decay=config.weight_decay)


def limit_gradient(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, most: float) -> bool:
    """Scale a gradient with a larger norm down to ``most``, unless that is 0; returns False if it is not finite.

    In float16 that happens now and then: the scaler sees it itself, leaves the step out and scales less.
    """
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if most:
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trained, most)
    elif not scaler.is_enabled():
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    return scaler.is_enabled() or bool(norm.isfinite())


def learning_rate(config: Config, step: int) -> float:
    """The part of the peak rate used at a step: a linear rise, then as --schedule says."""
    if step < config.lr_warmup:
        return (step + 1) / config.lr_warmup
    progress = (step - config.lr_warmup) / max(1, config.steps - config.lr_warmup)
    if config.schedule != "cosine":
        return LR_DROP if config.schedule == "step" and progress >= LR_DROP_AT else 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rates(optimizer: torch.optim.Optimizer, config: Config, step: int) -> None:
    """Those of a step, of each group the part of its peak."""
    scale = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = scale * group["peak"]
