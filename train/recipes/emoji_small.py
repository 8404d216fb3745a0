"""Emoji at 32 pixels and a small network trained from random weights, in half a minute on one CPU core.

For comparisons: many runs say more there than a good one. Few images per step, for that is where a memory is needed.
"""

from typing import Any

SETTINGS: dict[str, Any] = {
    "data": "emoji",
    "image_size": 32,
    "augment": "none",  # most of a step's time otherwise
    "method": "axbn",
    "memory_size": 4096,
    "memory_weight": 1.0,
    "center_gradient": True,
    "batch_weight": 1.0,
    "warmup_steps": 0,
    "loss": "contrastive",
    "distance": "cosine",
    "pos_margin": 1.0,
    "neg_margin": 0.5,
    "reduction": "avg_nonzero",
    "update": "inplace",
    "process_noise": None,
    "ema_momentum": 0.1,
    "backbone": "convnet",
    "weights": "none",
    "features": "live",
    "hidden": 0,
    "embedding_dim": 128,
    "batchnorm": "batch",
    "freeze": 0.0,
    "precision": "float32",
    "steps": 1500,
    "batch_size": 16,
    "accumulate": 1,
    "samples_per_class": 4,
    "optimizer": "adamw",
    "lr": 1e-3,
    "backbone_lr": 1.0,
    "lr_warmup": 0,
    "schedule": "cosine",
    "weight_decay": 1e-4,
    "ema": 0.0,
    "clip_grad": 0.0,
    "eval_every": 500,
    "workers": None,  # by the number of cores
}
