"""Image files of every mode become the RGB that a viewer shows, or are refused by name."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image

from train.data import DataError, formats, images

RAMP = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
"""0 .. 65,520."""


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.jp2", "x.pgm"])
def test_grey_of_16_bits_stays_a_ramp(name: str, tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / name, **({"irreversible": False} if name == "x.jp2" else {}))
    images.check(tmp_path / name)
    assert np.array_equal(images.decode(tmp_path / name), np.repeat(RAMP[:, :, None] >> 8, 3, axis=2))
    box = images.decode(tmp_path / name, (60, 2, 99, 4))
    assert np.array_equal(box[:, :, 1], RAMP[2:4, 60:] >> 8)


@pytest.mark.parametrize(("order", "white_is_zero"), [("<", False), (">", False), ("<", True)])
def test_a_tiff_says_which_end_is_white(order: str, white_is_zero: bool, tmp_path: Path) -> None:
    write_tiff(tmp_path / "x.tif", RAMP.astype(f"{order}u2").tobytes(), 16, order, white_is_zero)
    expected = RAMP >> 8
    assert np.array_equal(images.decode(tmp_path / "x.tif")[:, :, 0], 255 - expected if white_is_zero else expected)


def test_grey_of_12_bits_reaches_white(tmp_path: Path) -> None:
    pairs = (RAMP >> 4).reshape(-1, 2).astype(np.uint32)
    packed = (pairs[:, 0] << 12 | pairs[:, 1]).astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:]
    write_tiff(tmp_path / "x.tif", packed.tobytes(), 12, "<", False)
    assert np.array_equal(images.decode(tmp_path / "x.tif")[:, :, 0], RAMP >> 8)


def write_tiff(path: Path, pixels: bytes, bits: int, order: str, white_is_zero: bool) -> None:
    """64 x 64 of grey in one strip, not compressed."""
    tags = {256: 64, 257: 64, 258: bits, 259: 1, 262: int(not white_is_zero), 277: 1, 278: 64, 279: len(pixels)}
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries = sorted((tags | {273: start}).items())
    header = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(entries))
    body = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in entries)
    path.write_bytes(header + body + bytes(4) + pixels)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_grey_without_a_fixed_white_is_refused(kind: Any, tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(kind)).save(tmp_path / "x.tif")
    mode = {np.int32: "I", np.float32: "F"}[kind]
    for read in (images.check, images.decode):
        with pytest.raises(DataError, match=rf"x\.tif: grey values of mode '{mode}' have no fixed white"):
            read(tmp_path / "x.tif")


RED = (255, 0, 0)


@pytest.mark.parametrize(
    ("name", "image", "options", "expected"),
    [
        ("x.png", Image.new("1", (4, 2), 1), {}, (255, 255, 255)),
        ("x.png", Image.new("LA", (4, 2), (0, 128)), {}, (127, 127, 127)),
        ("x.png", Image.new("RGB", (4, 2), RED).quantize(2), {"transparency": 0}, (255, 255, 255)),
        ("x.png", Image.new("L", (4, 2), 3), {"transparency": 3}, (255, 255, 255)),
        ("x.png", Image.new("RGB", (4, 2), RED), {"transparency": RED}, (255, 255, 255)),
        ("x.png", Image.fromarray(np.full((2, 4), 770, np.uint16)), {"transparency": 770}, (255, 255, 255)),
        ("x.png", Image.fromarray(np.full((2, 4), 770, np.uint16)), {"transparency": 771}, (3, 3, 3)),
        ("x.jpg", Image.new("CMYK", (4, 2), (0, 255, 255, 0)), {"quality": 100}, RED),
        ("x.tif", Image.new("CMYK", (4, 2), (0, 255, 255, 0)), {}, RED),
        ("x.gif", Image.new("RGB", (4, 2), RED),
         {"save_all": True, "append_images": [Image.new("RGB", (4, 2), "blue")]}, RED),
    ],
)  # fmt: skip
def test_modes(name: str, image: Image.Image, options: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    image.save(tmp_path / name, **options)
    assert images.check(tmp_path / name) == (4, 2)
    pixels = images.decode(tmp_path / name)
    assert pixels.shape == (2, 4, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).max() <= 2


def orientation(turned: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turned
    return exif


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tif"])
def test_the_size_is_that_of_the_upright_image(name: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 4)).save(tmp_path / name, exif=orientation(6))  # turned by a quarter
    assert images.check(tmp_path / name) == (4, 8)
    assert images.decode(tmp_path / name).shape == (8, 4, 3)


def png(depth: int, colour: int, row: bytes, key: bytes) -> bytes:
    """Of one row of four pixels, those of a colour transparent."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = struct.pack(">IIBBBBB", 4, 1, depth, colour, 0, 0, 0)
    parts = (b"IHDR", header), (b"tRNS", key), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    ("depth", "colour", "row", "key", "expected"),
    [
        (2, 0, bytes([0b01001110]), (1,), [255, 0, 255, 170]),
        (4, 0, bytes([0x70, 0xF3]), (7,), [255, 0, 255, 51]),
        (8, 0, bytes([7, 0, 255, 3]), (7,), [255, 0, 255, 3]),
        (16, 0, struct.pack(">4H", 0x8000, 0, 0xFFFF, 0x8001), (0x8000,), [255, 0, 255, 128]),
        (8, 2, bytes([7] * 3 + [0] * 3 + [255] * 3 + [3] * 3), (7, 7, 7), [255, 0, 255, 3]),
        (16, 2, struct.pack(">12H", *[0x8012] * 3, *[0] * 3, *[0xFFFF] * 3, *[0x4000] * 3), (0x8012,) * 3,
         [255, 0, 255, 64]),
    ],
)  # fmt: skip
def test_a_colour_that_is_transparent_is_white(
    depth: int, colour: int, row: bytes, key: tuple[int, ...], expected: list[int], tmp_path: Path
) -> None:
    (tmp_path / "x.png").write_bytes(png(depth, colour, row, struct.pack(f">{len(key)}H", *key)))
    assert images.decode(tmp_path / "x.png")[0].tolist() == [[grey] * 3 for grey in expected]


@pytest.mark.parametrize("width", [8, 512])
def test_a_png_may_say_behind_its_pixels_that_it_is_turned(width: int, tmp_path: Path) -> None:
    """As exiftool writes it, and more behind it."""
    pixels = np.random.default_rng(0).integers(256, size=(256, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=orientation(6))
    content = (tmp_path / "x.png").read_bytes()
    at = content.index(b"eXIf") - 4
    behind = 12 + int.from_bytes(content[at : at + 4], "big")
    chunk = content[at : at + behind]
    text = b"tEXt" + bytes(100_000)
    chunk += (len(text) - 4).to_bytes(4, "big") + text + zlib.crc32(text).to_bytes(4, "big")
    end = len(content) - 12
    (tmp_path / "x.png").write_bytes(content[:at] + content[at + behind : end] + chunk + content[end:])
    assert images.check(tmp_path / "x.png") == (256, width)
    assert np.array_equal(images.decode(tmp_path / "x.png"), np.rot90(pixels, -1))


TURNED: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    1: np.asarray, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a.swapaxes(0, 1), 2), 8: np.rot90,
}  # fmt: skip
"""By the number of an orientation, what a viewer makes of the pixels."""


@pytest.mark.singly
@pytest.mark.parametrize("turned", TURNED)
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "P", "1", "I;16"])
@pytest.mark.parametrize("others", [{}, {"compression": "tiff_lzw"}, {"tiffinfo": {700: b"<x/>"}}], ids=str)
def test_a_turned_tiff_is_as_a_viewer_shows_it(others: dict[str, Any], mode: str, turned: int, tmp_path: Path) -> None:
    """Also where its pixels could be mapped, and where it has metadata of another kind."""
    grey = np.kron(np.arange(0, 240, 40, dtype=np.uint8).reshape(2, 3), np.ones((8, 8), np.uint8))
    image = Image.fromarray(grey.astype(np.uint16) << 8) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    image.save(tmp_path / "upright.tif")
    if "tiffinfo" in others:
        image.save(tmp_path / "turned.tif", tiffinfo=others["tiffinfo"] | {ExifTags.Base.Orientation.value: turned})
    else:
        image.save(tmp_path / "turned.tif", exif=orientation(turned), **others)
    shown = TURNED[turned](images.decode(tmp_path / "upright.tif"))
    assert np.array_equal(images.decode(tmp_path / "turned.tif"), shown)
    assert images.check(tmp_path / "turned.tif") == (shown.shape[1], shown.shape[0])


@pytest.mark.parametrize("behind", [b"", b"\0\0\0\x06tEXtdate\0x\x96\xd9\x9d\x84"])
def test_a_png_is_not_decoded_to_be_checked(behind: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where it says something else behind its pixels."""
    Image.new("RGB", (8, 4)).save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(content[:-12] + behind + content[-12:])
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda *_: pytest.fail("decoded"))
    assert images.check(tmp_path / "x.png") == (8, 4)


def test_formats_are_those_that_are_decoded() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm"} <= formats.SUFFIXES
    assert not {".pdf", ".h5", ".hdf", ".mpg", ".mpeg", ".grib", ".bufr", ".palm", ".emf"} & formats.SUFFIXES


@pytest.mark.parametrize("wrong", [RuntimeError, NotImplementedError, struct.error, KeyError])
def test_whatever_a_decoder_raises_names_the_file(
    wrong: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise wrong("broken")

    Image.new("RGB", (8, 4)).save(tmp_path / "x.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(DataError, match=r"cannot read image .*x\.png: .*broken"):
        images.decode(tmp_path / "x.png")
