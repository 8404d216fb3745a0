"""Image files as sequences of pixels, decoded when asked for: memory holds file names only."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin

from .formats import DECODED
from .part import DataError, Pixels

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are just outside."""
_ORIENTATION = 0x0112
_QUARTER_TURNS = (5, 6, 7, 8)
_UNSIGNED = ("PNG", "TIFF", "PPM", "JPEG2000")
"""Formats whose grey of 16 bits goes from black, 0, to white, 65535 (a TIFF may say otherwise)."""
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
"""The last bytes of a whole file."""
_WIDTH, _HEIGHT = TiffImagePlugin.IMAGEWIDTH, TiffImagePlugin.IMAGELENGTH
_ORIENTED = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
"""What may say how a camera was held, in Pillow's ``info``; below, in a PNG."""
_ORIENTED_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_LONGEST = max(map(len, _ORIENTED_TEXTS))
SHOWN = 3
"""Files that a message names."""


class Files(Sequence[Pixels]):
    """Image files, or a box in each, as pixels uint8 [height, width, 3], decoded at every access."""

    def __init__(self, paths: Sequence[Path], boxes: NDArray[np.int64] | None = None) -> None:
        """Read nothing.

        Args:
            paths: N files; a file may come several times.
            boxes: [N, 4], of each image its ``Box``, which is clipped to the image; None: all of each image.
        """
        if boxes is not None and boxes.shape != (len(paths), 4):
            raise ValueError(f"{len(paths)} files and boxes of shape {boxes.shape}")
        self.paths, self.boxes = tuple(paths), boxes

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Pixels: ...
    @overload
    def __getitem__(self, index: slice) -> Files: ...
    def __getitem__(self, index: int | slice) -> Pixels | Files:
        if isinstance(index, slice):
            return Files(self.paths[index], None if self.boxes is None else self.boxes[index])
        if self.boxes is None:
            return decode(self.paths[index])
        left, top, right, bottom = self.boxes[index].tolist()
        return decode(self.paths[index], (left, top, right, bottom))


class Picked(Sequence[Pixels]):
    """Some images of a sequence, in their order there or in another."""

    def __init__(self, images: Sequence[Pixels], where: NDArray[np.int64]) -> None:
        self.images, self.where = images, where

    def __len__(self) -> int:
        return len(self.where)

    @overload
    def __getitem__(self, index: int) -> Pixels: ...
    @overload
    def __getitem__(self, index: slice) -> Picked: ...
    def __getitem__(self, index: int | slice) -> Pixels | Picked:
        if isinstance(index, slice):
            return Picked(self.images, self.where[index])
        return self.images[int(self.where[index])]


def decode(path: Path, box: Box | None = None) -> Pixels:
    """Pixels as a viewer shows them: turned as the camera says, transparency on white; then ``box``, clipped.

    Of grey of 16 bits the upper 8.

    Raises:
        DataError: names a file that is not an image, whose grey values have no fixed range (32 bits, floating point),
            or that holds no part of the box.
    """
    try:
        # By its name, Pillow 13 maps an uncompressed TIFF as if it were not turned.
        with open(path, "rb") as stream, Image.open(stream, formats=DECODED) as file:
            wide, key = _wide_grey(file), _key(file)
            image = ImageOps.exif_transpose(file)
            if box is not None:
                inside = clip(box, image.size)
                if inside is None:
                    raise DataError(f"--data: {path}: the box {list(box)} is outside its {image.size} pixels")
                image = image.crop(inside)
            if wide is not None:
                return _narrow(image, wide)
            if key is not None:
                image.info["transparency"] = key
            if image.mode == "P" or "transparency" in image.info or image.mode in ("LA", "PA", "RGBA", "La", "RGBa"):
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB"))
    except DataError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever a broken file makes of them
        raise _unreadable(path, error) from error


class _WideGrey(NamedTuple):
    """Grey of more than 8 bits."""

    bits: int
    white_is_zero: bool


def _wide_grey(file: ImageFile.ImageFile) -> _WideGrey | None:
    """How grey of more than 8 bits is stored, None of any other image; Pillow would clip it at 255.

    Raises:
        ValueError: names a mode whose white is not known.
    """
    if not file.mode.startswith(("I", "F")):
        return None
    tiff = file.tag_v2 if isinstance(file, TiffImagePlugin.TiffImageFile) else {}
    known = file.format in _UNSIGNED and file.mode != "F" and not (tiff and file.mode == "I")
    if not known:
        raise ValueError(f"grey values of mode {file.mode!r} have no fixed white; convert it to a PNG of 8 or 16 bits")
    (bits,) = tiff.get(TiffImagePlugin.BITSPERSAMPLE, (16,))
    white_is_zero = tiff.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    return _WideGrey(bits, white_is_zero)


def _key(file: ImageFile.ImageFile) -> int | tuple[int, ...] | None:
    """The grey or the colour that a PNG calls transparent, in 8 bits, where Pillow 13 leaves it as the file has it and
    pixels are of 8; of 16 bits the upper ones."""
    key = file.info.get("transparency")
    stored = file.tile[0].args if file.format == "PNG" and file.tile else None
    if stored in ("L;2", "L;4") and isinstance(key, int):
        return key * (255 // (3 if stored == "L;2" else 15))
    if stored == "RGB;16B" and isinstance(key, tuple):
        return tuple(number >> 8 for number in key)
    return None


def _narrow(image: Image.Image, wide: _WideGrey) -> Pixels:
    """The upper 8 bits of wide grey, as RGB, where transparent white."""
    values = np.asarray(image).astype(np.int64)
    grey = values >> (wide.bits - 8)
    grey = 255 - grey if wide.white_is_zero else grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)


def check(path: Path) -> tuple[int, int]:
    """Width and height that ``decode`` would give; reads the file's beginning, its end and the heads of a PNG's
    chunks, and more where they look odd.

    Raises:
        DataError: names the file that does not start like an image, that ``decode`` would refuse, or that is cut short.
    """
    try:
        if path.is_fifo():
            raise OSError("it is a pipe")  # to open it would wait for a writer
        with open(path, "rb") as stream, Image.open(stream, formats=DECODED) as file:
            _wide_grey(file)
            end, tail, header = _ENDS.get(file.format or ""), b"", stream.tell()
            if end is not None:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - len(end)))
                tail = stream.read()
            says_more = file.format == "PNG" and _says_more(stream)
            stream.seek(header)
            tiff = isinstance(file, TiffImagePlugin.TiffImageFile)
            size = (file.tag_v2[_WIDTH], file.tag_v2[_HEIGHT]) if tiff else file.size  # Pillow turns that of a TIFF
            # A PNG that is asked in vain is decoded.
            told = tiff or says_more or any(name in file.info for name in _ORIENTED)
            if told and file.getexif().get(_ORIENTATION) in _QUARTER_TURNS:
                size = size[::-1]
            if end is not None and not tail.endswith(end):  # cut short; or there is something behind the image
                file.draft("L", (1, 1))
                file.load()
            return size
    except Exception as error:
        raise _unreadable(path, error) from error


def _says_more(stream: BinaryIO) -> bool:
    """Whether a PNG has behind its pixels what may say how a camera was held; reads the head of each chunk."""
    at, pixels = 8, False
    while len(head := stream.read(8 + _LONGEST) if stream.seek(at) else b"") >= 8:
        kind, content = head[4:8], head[8:]
        pixels = pixels or kind == b"IDAT"
        if pixels and (kind == b"eXIf" or content.startswith(_ORIENTED_TEXTS)):
            return True
        at += 12 + int.from_bytes(head[:4], "big")
    return False


def check_all(paths: Iterable[Path]) -> list[tuple[int, int]]:
    """``check`` each; raises DataError that counts those that cannot be read and names a few."""
    wrong: list[tuple[Path, DataError]] = []
    sizes = []
    for path in paths:
        try:
            sizes.append(check(path))
        except DataError as error:
            wrong.append((path, error))
    if wrong:
        others = f"; nor {few([path for path, _ in wrong[1:]])} ({len(wrong)} in all)" if wrong[1:] else ""
        raise DataError(f"{wrong[0][1]}{others}")
    return sizes


def clip(box: Box, size: tuple[int, int]) -> Box | None:
    """The part of a box inside an image of this width and height, or None."""
    left, top = max(0, box[0]), max(0, box[1])
    right, bottom = min(size[0], box[2]), min(size[1], box[3])
    return (left, top, right, bottom) if left < right and top < bottom else None


def missing(paths: Iterable[Path]) -> list[Path]:
    """Those that are not there, or empty, in order: each folder is listed once, so 100,000 files take a second.

    Raises DataError if a folder may not be looked into.
    """
    by_folder: dict[Path, dict[str, Path]] = defaultdict(dict)
    for path in paths:
        by_folder[path.parent][path.name] = path
    absent: list[Path] = []
    for folder, wanted in by_folder.items():
        try:
            with os.scandir(folder) as entries:
                there = {entry.name for entry in entries if entry.name in wanted and _has_content(entry)}
        except PermissionError as error:
            raise DataError(f"--data: cannot look at {error.filename}: {error.strerror}") from error
        except OSError:
            there = set()
        absent += [path for name, path in wanted.items() if name not in there]
    return absent


def _has_content(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.stat().st_size > 0
    except PermissionError:
        raise
    except OSError:  # a link to nothing
        return False


def few(names: Sequence[object]) -> str:
    """The first of some names, in quotes, for what a name may hold."""
    return ", ".join([*(repr(str(name)) for name in names[:SHOWN]), *(["..."] if len(names) > SHOWN else [])])


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"--data: cannot read image {path}: {error}")
