"""Every setting of a run, in one place: name, default, what it means, and what is not allowed."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from xbn_ext.losses import DISTANCES, LOSSES, PairLoss

from . import allowed, losses, timm_models
from .about import about, folder_path, of_loss, switch
from .allowed import ConfigError as ConfigError
from .data import split

METHODS = {  # name: (drift model of the memory, what it is)
    "batch": ("none", "no memory, pairs within the batch only"),
    "xbm": ("none", "cross-batch memory, kept as it was stored"),
    "xbn": ("xbn", "memory moved to each batch's moments"),
    "axbn": ("axbn", "memory moved to Kalman-filtered moments"),
    "ema": ("ema", "memory moved to exponentially averaged moments"),
    "oracle": ("none", "memory embedded again before each step: slow, to compare with"),
}


IMAGE_SIZE = 64
"""Where neither the command line nor the network says another."""


@dataclass(frozen=True)
class Config:
    """The settings of one run; the command line has an argument for each."""

    data: str = field(
        default="emoji",
        metadata=about(
            "'emoji' or 'icons' (fetched with npm on first use); 'folder:PATH', one sub-folder per class; 'csv:PATH', "
            "a table of images, classes and splits; or your copy of Stanford Online Products, In-Shop or DeepFashion2: "
            "'sop:PATH', 'inshop:PATH' or 'deepfashion2:PATH'",
            group="data",
        ),
    )
    max_classes: int | None = field(
        default=None, metadata=about("use only this many classes, always the same ones", type=int, metavar="N")
    )
    test_share: float | None = field(
        default=None,
        metadata=about(
            "part of the classes that is tested on, if the data have no split of their own; 0: all are trained on, and "
            "there are no scores (default: 0.5)",
            type=float,
            metavar="X",
        ),
    )
    test_of: str = field(
        default="classes",
        metadata=about(
            "classes: those of --test-share are not trained on; images: it is a part of the images of each class",
            choices=(split.CLASSES, split.IMAGES),
        ),
    )
    validation_share: float = field(
        default=0.0,
        metadata=about(
            "part of the training classes that is held out and scored every --eval-every steps; the weights that score "
            "best there are kept, and tested"
        ),
    )
    best: str = field(
        default="map@r",
        metadata=about("score on those classes by which weights are best", choices=("map@r", "recall@1")),
    )
    image_size: int = field(
        default=0,
        metadata=about(
            "images are fed to the network at this width and height (default: what a network of timm was trained on, "
            "64 with others)"
        ),
    )
    augment: str = field(
        default="mild",
        metadata=about(
            "what is seen of an image; mild, for drawings: most of it, slightly moved; photo: a fifth to all of it, in "
            "tests the middle; none: all of it",
            choices=("mild", "photo", "none"),
        ),
    )
    cache: Path | None = field(
        default=None,
        metadata=about(
            "folder for fetched data and indices (default: $XBN_CACHE, else ~/.cache/xbn_ext)",
            type=folder_path,
            metavar="DIR",
            run_only=True,
        ),
    )

    method: str = field(
        default="axbn",
        metadata=about(
            "; ".join(f"{name}: {text}" for name, (_, text) in METHODS.items()), group="loss", choices=tuple(METHODS)
        ),
    )
    memory_size: int = field(default=4096, metadata=about("embeddings kept in the memory"))
    memory_weight: float = field(default=1.0, metadata=about("weight of the loss against the memory"))
    batch_weight: float = field(default=1.0, metadata=about("weight of the loss within the batch"))
    center_gradient: bool = field(
        default=True,
        metadata=switch("take off the memory's gradient what turns all of a batch the same way"),
    )
    warmup_steps: int = field(default=0, metadata=about("steps before the memory takes part in the loss"))
    loss: str = field(default="contrastive", metadata=about("what pairs of images cost", choices=tuple(LOSSES)))
    distance: str | None = of_loss(
        "distance",
        "what margins are of; a Euclidean one has other default margins, those of pytorch-metric-learning",
        type=str,
        choices=("cosine", *DISTANCES),
    )
    pos_margin: float | None = of_loss("pos_margin", "pairs of one class are pulled to this similarity or distance")
    neg_margin: float | None = of_loss(
        "neg_margin", "pairs of two classes are pushed down to this cosine similarity, or away to this distance"
    )
    reduction: str | None = of_loss(
        "reduction",
        "mean: pairs summed per image, averaged over images; avg_nonzero: averaged over pairs not yet right",
        type=str,
        choices=("mean", "avg_nonzero"),
    )
    temperature: float | None = of_loss("temperature", "what similarities are divided by")
    sigma: float | None = of_loss("sigma", "the smaller, the less weigh pairs that are similar already")
    alpha: float | None = of_loss("alpha", "how sharply pairs of one class are weighted by how far apart they are")
    beta: float | None = of_loss(
        "beta", "how sharply pairs of two classes are weighted by how close they are; margin: the boundary of classes"
    )
    bias: float | None = of_loss("bias", "what similarities, divided by the temperature, are shifted by")
    base: float | None = of_loss("base", "the cosine similarity at which a pair weighs 1")
    mining: float | str | None = of_loss(
        "mining",
        "a number: only pairs this close to the hardest of the other kind, all if not given; triplet: hardest or all",
        type=losses.number_or_word,
        metavar="X",
    )
    m: float | None = of_loss("m", "relaxation of the margin")
    gamma: float | None = of_loss("gamma", "scale of similarities")
    softmax_scale: float | None = of_loss("softmax_scale", "what similarities are multiplied by")
    margin: float | None = of_loss(
        "margin",
        "by how much images of one class have to be more similar, or closer; margin: how far from the boundary",
    )
    soft: bool | None = of_loss(
        "soft", "every hardest triplet costs something, less and less", action="store_const", const=True
    )
    update: str = field(
        default="inplace",
        metadata=about(
            "move the memory's rows each step, or keep one pending transform", choices=("inplace", "deferred")
        ),
    )
    process_noise: float | None = field(
        default=None,
        metadata=about("axbn: drift of moments over noise of a batch (default: estimated)", type=float, metavar="X"),
    )
    ema_momentum: float = field(default=0.1, metadata=about("ema: weight of the newest batch's moments"))

    backbone: str = field(
        default="efficientnet-lite0",
        metadata=about(
            "'efficientnet-lite0'; 'convnet', small, for small images; 'timm:NAME', a network of timm; or a classifier "
            "of torchvision such as resnet50",
            group="network",
        ),
    )
    weights: str = field(
        default="auto",
        metadata=about(
            "auto: pretrained, those of timm fetched, others if on this machine, else random; none: random; or the "
            "path of a state dict"
        ),
    )
    features: str = field(
        default="live",
        metadata=about(
            "frozen: the backbone is not trained and sees each image once, not augmented: only the head learns",
            choices=("live", "frozen"),
        ),
    )
    hidden: int = field(default=0, metadata=about("units of a hidden layer of the head; 0: the head is linear"))
    embedding_dim: int = field(default=128, metadata=about("dimension of the embeddings"))
    batchnorm: str = field(
        default="auto",
        metadata=about(
            "batch: normalise by each batch's statistics; frozen: by the pretrained ones; auto: frozen if pretrained",
            choices=("auto", "batch", "frozen"),
        ),
    )
    freeze: float = field(
        default=0.2, metadata=about("part of the pretrained backbone's layers, counted from the input, not trained")
    )

    precision: str = field(
        default="float32",
        metadata=about(
            "what the backbone computes in; 16 bits: weights, head, loss and memory stay float32",
            choices=("float32", "bfloat16", "float16"),
        ),
    )

    steps: int = field(default=650, metadata=about("training steps, of the optimizer", group="training"))
    batch_size: int = field(default=64, metadata=about("images of a batch, of all processes together"))
    accumulate: int = field(
        default=1,
        metadata=about(
            "batches per step: each is ranked and stored, then the optimizer takes the mean of their gradients"
        ),
    )
    samples_per_class: int = field(default=4, metadata=about("images of one class in a batch"))
    optimizer: str = field(
        default="adamw",
        metadata=about("adamw: weight decay apart from the gradient; adam: as a part of it", choices=("adamw", "adam")),
    )
    lr: float = field(default=1e-3, metadata=about("peak learning rate of the embedding head"))
    backbone_lr: float = field(default=0.4, metadata=about("the backbone's learning rate as a fraction of --lr"))
    lr_warmup: int = field(default=30, metadata=about("steps over which learning rates rise"))
    schedule: str = field(
        default="cosine",
        metadata=about(
            "learning rates after that; cosine: fall to 0; step: to a tenth after 0.7 of the steps that are left",
            choices=("cosine", "step", "constant"),
        ),
    )
    weight_decay: float = field(default=1e-4, metadata=about("the optimizer's weight decay"))
    ema: float = field(
        default=0.0,
        metadata=about(
            "tested, kept and exported is an exponential moving average of the weights, of about 1 / (1 - X) steps; 0: "
            "the weights themselves (of the memory's moments: --method ema)"
        ),
    )
    clip_grad: float = field(default=0.0, metadata=about("a gradient of a larger norm is scaled down to it; 0: none"))
    seed: int = field(
        default=0,
        metadata=about("seed of initialisation, batches and augmentation; the test classes do not depend on it"),
    )

    eval_every: int = field(
        default=250,
        metadata=about("steps between evaluations and checkpoints; 0: only at the end", group="running", run_only=True),
    )
    device: str = field(
        default="auto",
        metadata=about(
            "auto: cuda if there is a GPU and xbn_ext has kernels for it, else cpu; or a torch device. Of several "
            "processes each takes a GPU of its own",
            run_only=True,
        ),
    )
    compile: bool = field(
        default=False,
        metadata=about(
            "torch.compile of the network for training; the first step takes as long as that does, up to minutes",
            action="store_true",
            run_only=True,
        ),
    )
    threads: int = field(default=0, metadata=about("CPU threads; 0: torch's choice", run_only=True))
    workers: int | None = field(
        default=None,
        metadata=about(
            "processes that prepare batches, of each that trains; 0: that one does (default: one for each core that "
            "the network does not use, up to 8; 0 for fewer than 1000 images)",
            type=int,
            metavar="N",
            run_only=True,
        ),
    )
    out: Path | None = field(
        default=None,
        metadata=about(
            "folder for results (default: runs/DATA-METHOD-SEED)", type=folder_path, metavar="DIR", run_only=True
        ),
    )
    wandb: str | None = field(
        default=None,
        metadata=about(
            "log to this project of Weights & Biases, too (pip install wandb; WANDB_MODE=offline sends nothing)",
            type=str,
            metavar="PROJECT",
            run_only=True,
        ),
    )
    resume: bool = field(
        default=False,
        metadata=about(
            "continue the run in --out exactly where it stopped, or start it", action="store_true", run_only=True
        ),
    )
    overwrite: bool = field(
        default=False, metadata=about("start again, replacing the run in --out", action="store_true", run_only=True)
    )

    def __post_init__(self) -> None:
        """Raise ConfigError for the first setting that is not allowed."""
        allowed.require(self)
        if timm_models.is_one(self.backbone):
            try:  # other versions of timm may choose other weights
                object.__setattr__(self, "backbone", timm_models.whole_name(self.backbone))
            except ValueError as error:
                raise ConfigError(f"--backbone {self.backbone}: {error}") from error
        if not self.image_size:
            object.__setattr__(self, "image_size", self.input.size if self.input else IMAGE_SIZE)

    @property
    def input(self) -> timm_models.Input | None:
        """What the backbone was trained on, if it is one of timm's."""
        return timm_models.input_of(self.backbone) if timm_models.is_one(self.backbone) else None

    @property
    def interpolation(self) -> str:
        """How images are scaled."""
        return self.input.interpolation if self.input else timm_models.BILINEAR

    @property
    def drift(self) -> str:
        """The memory's drift model."""
        return METHODS[self.method][0]

    def pair_loss(self) -> PairLoss:
        """The loss, with the parameters given."""
        return losses.make(self.loss, {name: getattr(self, name) for name in losses.PARAMETERS})

    @property
    def folder(self) -> Path:
        """Where results go."""
        data = self.data.partition(":")[2] or self.data
        return self.out or Path("runs") / f"{Path(os.path.abspath(data)).name}-{self.method}-{self.seed}"

    @property
    def test(self) -> split.Test:
        """What to test on, where data have no split of their own."""
        return split.Test(self.test_share, self.test_of)

    def settings(self) -> dict[str, Any]:
        """What decides a run's result: every field but those that may change when it is continued.

        Of the parameters of losses, those of this one, given or not.
        """
        chosen = asdict(self.pair_loss())
        left_out = {f.name for f in fields(self) if f.metadata["run_only"]} | set(losses.PARAMETERS) - chosen.keys()
        return {name: value for name, value in (asdict(self) | chosen).items() if name not in left_out}
