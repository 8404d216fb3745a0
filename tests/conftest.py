"""One thread (two on busy cores can be ten times slower than one), and every test on every device with kernels."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import xbn_ext

torch.set_num_threads(1)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and xbn_ext.build_info()["cuda"] else [])]


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["f32", "f64"])
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
