"""Reading one image file of any common kind into 8-bit RGB, or saying which file is at fault and why.

For everyone who feeds users' files to a model: the suffix is not trusted, rotation marks of cameras are applied,
deep grey images are scaled and not clipped, transparency is laid on white, and a file that would fill the memory is
refused unread.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vitalloy.errors import DataError

MAX_PIXELS = 178_956_970  # where Pillow itself refuses: half a gigabyte as RGB
IMAGE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".dib", ".gif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pcx")
    + (".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp")
)

_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_DEEP_IS_16_BIT = ("PNG", "PPM")  # older Pillow opens these as 32-bit integers that hold 16-bit values
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
_ORIENTATION = 0x0112  # the EXIF tag; from 5 on the picture lies on its side


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Pillow's warnings about odd files from the user: what matters is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in a file, upright, as 8-bit RGB in memory.

    Args:
        path: the file; it is decoded by content, whatever its suffix. Of an animation the first frame is read.
        max_pixels: a larger image is refused before it is decoded (Pillow's own limit holds as well).

    Raises:
        DataError: the file is missing, empty, cut short, not an image or too large; the message names it.
    """
    data = _read_bytes(path)
    return decode_image(data, os.fspath(path), max_pixels)


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """As `read_image`, for the bytes of a file; `name` stands for it in messages."""
    if not data:
        raise DataError(f"{name}: the file is empty (0 bytes). Copy it again, or remove it.")
    with quiet(), _named(name, max_pixels):
        with Image.open(io.BytesIO(data)) as image:
            _check_pixels(image.size, name, max_pixels)
            image.load()
            with contextlib.suppress(Exception):  # a damaged rotation mark does not make the picture useless
                ImageOps.exif_transpose(image, in_place=True)
            rgb = to_rgb(image)
        rgb.info = {}
        return rgb


def image_size(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of an image file as `read_image` would return it, from its header alone."""
    name = os.fspath(path)
    if not os.path.isfile(path) or os.path.getsize(path) == 0:
        _read_bytes(path)  # says what is wrong with a path that is not a file
        raise DataError(f"{name}: the file is empty (0 bytes). Copy it again, or remove it.")
    with quiet(), _named(name, max_pixels), Image.open(path) as image:
        width, height = image.size
        orientation = 1
        with contextlib.suppress(Exception):
            orientation = image.getexif().get(_ORIENTATION, 1)
        return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any decoded Pillow image as a new 8-bit RGB image: transparency on white, deep greys scaled to 0..255."""
    if image.mode in _DEEP_MODES:
        return Image.fromarray(_eight_bits(np.asarray(image), image.mode, image.format)).convert("RGB")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, mode: str, kind: str | None) -> np.ndarray:
    """Grey values of more than 8 bits as 8-bit ones: by the type's range where it is known, else by the data's."""
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if mode.startswith("I;16") or (mode == "I" and kind in _DEEP_IS_16_BIT):
        values = values / 257.0
    elif mode == "F" and low >= 0.0 and high <= 1.0:
        values = values * 255.0
    elif low < 0.0 or high > 65535.0 or (mode == "F" and high > 255.0):
        values = (values - low) * (255.0 / max(high - low, np.finfo(np.float64).tiny))
    elif high > 255.0:
        values = values / 257.0
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _read_bytes(path: str | os.PathLike[str]) -> bytes:
    name = os.fspath(path)
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{name}: there is no such file. Check the path.") from None
    except IsADirectoryError:
        raise DataError(f"{name}: this is a folder where an image file is wanted.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{name}: the file cannot be opened ({reason}). Check its permissions.") from None


def _check_pixels(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise DataError(
            f"{name}: {width} x {height} is {width * height:,} pixels, more than the limit of {max_pixels:,}; "
            "it was not decoded. Make the image smaller, or remove it."
        )


@contextlib.contextmanager
def _named(name: str, max_pixels: int) -> Iterator[None]:
    """Turn whatever a decoder throws at a damaged file into a `DataError` that names the file."""
    try:
        yield
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(
            f"{name}: this is not an image, or of a kind that Pillow cannot read. Save it as PNG or JPEG, or remove it."
        ) from None
    except Image.DecompressionBombError:
        raise DataError(
            f"{name}: the image has more pixels than the limit of {max_pixels:,}; it was not decoded. "
            "Make the image smaller, or remove it."
        ) from None
    except Exception as error:  # decoders raise nearly every kind on broken bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{name}: the image is damaged or cut short ({reason}). Copy or save it again, or remove it."
        ) from None
