"""Draw SVG texts as small RGB images, in as many processes as there are cores."""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import resvg_py
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ..cores import cores
from . import DataError, Pixels

SUPERSAMPLING = 2
SMALL_JOB = 200


def wrap(body: str, left: float, top: float, width: float, height: float) -> str:
    """An SVG document around the elements of an icon; icons of no colour of their own become black."""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">'
        f"{body.replace('currentColor', '#000')}</svg>"
    )


def draw(svg: str, size: int) -> Pixels:
    """One SVG text on white, uint8 [size, size, 3]; a drawing that is not square is centred."""
    large = size * SUPERSAMPLING
    png = resvg_py.svg_to_bytes(svg_string=svg, width=large, height=large, skip_system_fonts=True)
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    canvas = Image.new("RGBA", (large, large), "white")
    canvas.alpha_composite(drawing, ((large - drawing.width) // 2, (large - drawing.height) // 2))
    return np.asarray(canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def draw_all(svgs: list[str], size: int) -> NDArray[np.uint8]:
    """Many SVG texts on white, uint8 [N, size, size, 3].

    Raises:
        DataError: the system has ended one of the processes.
    """
    out = np.empty((len(svgs), size, size, 3), np.uint8)
    sizes = [size] * len(svgs)
    if len(svgs) <= SMALL_JOB:
        _collect(map(draw, svgs, sizes), out)
    else:  # spawned, not forked: the caller may have started threads
        try:
            with ProcessPoolExecutor(cores(), mp_context=multiprocessing.get_context("spawn")) as pool:
                _collect(pool.map(draw, svgs, sizes, chunksize=64), out)
        except BrokenProcessPool as error:
            raise DataError(
                "--data emoji: the system has ended a process that draws, most likely because memory ran out; close "
                "other programs and start again"
            ) from error
    return out


def _collect(images: Iterable[Pixels], out: NDArray[np.uint8]) -> None:
    for i, image in enumerate(tqdm(images, "drawing", len(out), unit=" images", leave=False, disable=None)):
        out[i] = image
