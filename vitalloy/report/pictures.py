"""Pictures of the work that a model leaves out: merged patches, attention links, the depth at which images left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDE = 224  # pixels of a picture's longer side
TILE = 56  # pixels of an image among others
INK, PAPER = (34, 40, 49), (255, 255, 255)


def merged(image: Image.Image, owner: NDArray[np.int_], strength: float = 0.45) -> Image.Image:
    """An image whose patches are coloured by the token that they went into; lines where the token changes.

    Args:
        owner: for each patch (h, w) the number of the token that took most of it.
    """
    picture = _enlarged(image)
    colours = matplotlib.colormaps["hsv"]((owner * 0.618034) % 1.0)[..., :3] * 255  # neighbours in number far in hue
    shown = _blend(picture, colours, np.full(owner.shape, strength))
    edges = _spread(owner, picture.size)
    line = np.zeros(edges.shape, bool)
    line[1:] |= edges[1:] != edges[:-1]
    line[:, 1:] |= edges[:, 1:] != edges[:, :-1]
    pixels = np.asarray(shown).copy()
    pixels[line] = PAPER
    return Image.fromarray(pixels)


def links(image: Image.Image, share: NDArray[np.floating], query: int) -> Image.Image:
    """An image darkened where no attention goes from one patch, which is framed.

    Args:
        share: of the heads that keep the link to each patch, (h, w), 0 to 1.
        query: the patch that looks, counted row by row.
    """
    picture = _enlarged(image)
    dark = np.broadcast_to(np.asarray(INK, float), (*share.shape, 3))
    shown = _blend(picture, dark, 0.85 * (1 - share))
    height, width = share.shape
    row, column = divmod(query, width)
    box = [
        column * picture.width // width,
        row * picture.height // height,
        (column + 1) * picture.width // width - 1,
        (row + 1) * picture.height // height - 1,
    ]
    ImageDraw.Draw(shown).rectangle(box, outline=(217, 119, 66), width=3)
    return shown


def departures(
    images: Sequence[Image.Image], exits: Sequence[int], names: Sequence[str], most: int = 10
) -> Image.Image:
    """A row of images for each exit at which any left, shallow to deep.

    Args:
        exits: the number of each image's exit.
        names: of the exits.
        most: images in a row.
    """
    taken = sorted(set(exits))
    left, gap = 8 + 7 * max(len(name) for name in names), 4
    sheet = Image.new("RGB", (left + most * (TILE + gap), len(taken) * (TILE + gap) + gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, number in enumerate(taken):
        top = gap + row * (TILE + gap)
        draw.text((4, top + TILE // 2 - 6), names[number], fill=INK)
        mine = [image for image, out in zip(images, exits, strict=True) if out == number][:most]
        for column, image in enumerate(mine):
            sheet.paste(
                image.convert("RGB").resize((TILE, TILE), _filter(image, TILE)), (left + column * (TILE + gap), top)
            )
    return sheet


def _enlarged(image: Image.Image) -> Image.Image:
    scale = SIDE / max(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.convert("RGB").resize(size, _filter(image, SIDE))


def _filter(image: Image.Image, side: int) -> Image.Resampling:
    return Image.Resampling.NEAREST if side > 3 * max(image.size) else Image.Resampling.BICUBIC


def _spread(values: NDArray, size: tuple[int, int]) -> NDArray:
    """Values of patches (h, w, ...) for every pixel of a picture of (width, height)."""
    rows = np.arange(size[1]) * values.shape[0] // size[1]
    columns = np.arange(size[0]) * values.shape[1] // size[0]
    return values[rows][:, columns]


def _blend(picture: Image.Image, colours: NDArray, weight: NDArray) -> Image.Image:
    alpha = _spread(weight, picture.size)[..., None]
    return Image.fromarray(np.uint8(np.asarray(picture, float) * (1 - alpha) + _spread(colours, picture.size) * alpha))
