"""Stanford Online Products: the settings of XBM, where they are public.

"XBM" marks what the public code of XBM (github.com/msight-tech/research-xbm, sample_config.yaml and its defaults) sets,
"ours" what we chose. Neither has been tried on the data set here.
"""

from typing import Any

SETTINGS: dict[str, Any] = {
    "data": "sop:PATH",
    "image_size": 224,  # XBM; of a short side of 256 in tests, as augment "photo" does
    "augment": "photo",  # XBM: crops of 20 to 100 %, mirrored
    "method": "axbn",  # ours; "xbm" for XBM itself
    "memory_size": 55000,  # XBM, nearly all of the 59,551 training images
    "memory_weight": 1.0,  # XBM
    "center_gradient": True,  # ours
    "batch_weight": 1.0,  # XBM
    "warmup_steps": 1000,  # XBM, whose memory is empty then; here it fills meanwhile
    "loss": "contrastive",  # XBM
    "distance": "cosine",
    "pos_margin": 1.0,  # XBM
    "neg_margin": 0.5,  # XBM; there a negative costs its similarity, which has the same gradient
    "reduction": "mean",  # XBM
    "update": "inplace",  # ours
    "process_noise": None,
    "ema_momentum": 0.1,  # ours
    "backbone": "resnet50",  # XBM, which pools by the maximum; torchvision's by the mean
    "weights": "auto",  # XBM: ImageNet; here the newest that torchvision publishes
    "features": "live",
    "hidden": 0,
    "embedding_dim": 128,  # XBM
    "batchnorm": "batch",  # XBM
    "freeze": 0.0,  # XBM
    "precision": "float32",  # XBM
    "steps": 35000,  # XBM
    "batch_size": 64,  # XBM
    "accumulate": 1,
    "samples_per_class": 4,  # XBM
    "optimizer": "adam",  # XBM
    "lr": 1e-4,  # XBM
    "backbone_lr": 1.0,  # XBM: one rate for all
    "lr_warmup": 0,  # XBM
    "schedule": "step",  # ours; XBM lowers the rate when Recall@1 of the test classes stalls, which is to look at them
    "weight_decay": 5e-4,  # XBM
    "ema": 0.0,
    "clip_grad": 0.0,
    "eval_every": 1000,  # XBM
    "workers": None,  # by the number of cores
}
