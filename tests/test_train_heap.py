"""What a step has freed goes back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from train import heap


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="of glibc")
def test_what_was_freed_between_blocks_that_stay_is_given_back() -> None:
    blocks = [torch.ones(16_384) for _ in range(2000)]  # of 64 KiB, from the heap
    kept = blocks[::2]
    full = resident()
    del blocks
    gc.collect()
    heap.trim(heap.EVERY - 1)
    assert resident() > full - 10_000_000, "between two of these steps nothing is done"
    heap.trim(heap.EVERY)
    assert resident() < full - 40_000_000 and all(bool((block == 1).all()) for block in kept)


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (AttributeError, OSError, TypeError):
        monkeypatch.setattr(ctypes, "CDLL", mock.Mock(side_effect=error))
        heap._trim.cache_clear()
        heap.trim(0)
    monkeypatch.undo()
    heap._trim.cache_clear()
