"""Short programs that use xbn_ext, to be read and copied. Run one from the checkout: `python -m examples.moco`."""

from train import vision as _vision  # noqa: F401  # torchvision must be imported here first: that module says why
