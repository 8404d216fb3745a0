"""Draw SVG texts as small RGB images, in as many processes as there are cores."""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import NamedTuple, NoReturn

import numpy as np
import resvg_py
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ..cores import cores
from .part import DataError, Pixels

SUPERSAMPLING = 2
SMALL_JOB = 200


class Sketch(NamedTuple):
    """What is to be drawn."""

    name: str
    """For messages."""
    svg: str


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


def draw_all(sketches: Sequence[Sketch], size: int) -> NDArray[np.uint8]:
    """Many SVG texts on white, uint8 [N, size, size, 3]; raises as ``drawn``."""
    out = np.empty((len(sketches), size, size, 3), np.uint8)
    for i, image in enumerate(drawn(sketches, size)):
        out[i] = image
    return out


def drawn(sketches: Sequence[Sketch], size: int, *, grey: bool = False) -> Iterator[NDArray[np.uint8]]:
    """Each SVG text on white in order, uint8 [size, size, 3], or [size, size] if ``grey``.

    Raises:
        DataError: names the icon that cannot be drawn; or the system has ended one of the processes.
    """
    one = partial(_draw_named, size=size, grey=grey)
    bar = tqdm(total=len(sketches), desc="drawing", unit=" images", leave=False, disable=None)
    with bar:
        if len(sketches) <= SMALL_JOB:
            yield from _counted(map(one, sketches), bar)
            return
        try:  # spawned, not forked: the caller may have started threads
            with ProcessPoolExecutor(cores(), mp_context=multiprocessing.get_context("spawn")) as pool:
                try:
                    yield from _counted(pool.map(one, sketches, chunksize=64), bar)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        except BrokenProcessPool as error:
            raise DataError(
                "--data: the system has ended a process that draws, most likely because memory ran out; close "
                "other programs and start again"
            ) from error


def _draw_named(sketch: Sketch, size: int, grey: bool) -> NDArray[np.uint8]:
    try:
        pixels = draw(sketch.svg, size)
    except (ValueError, OSError) as error:  # resvg's, Pillow's
        raise DataError(f"--data: {sketch.name} cannot be drawn: {error}") from error
    return np.asarray(Image.fromarray(pixels).convert("L")) if grey else pixels


def _counted(images: Iterable[NDArray[np.uint8]], bar: tqdm[NoReturn]) -> Iterator[NDArray[np.uint8]]:
    for image in images:
        yield image
        bar.update()
