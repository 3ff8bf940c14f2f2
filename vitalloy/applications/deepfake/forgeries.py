"""Forgeries made from real faces, so that a detector can be trained where no forged faces are at hand.

The idea is that of "Face X-ray for More General Face Forgery Detection" (Li et al., 2020, arXiv 1912.13458) and
"Detecting Deepfakes with Self-Blended Images" (Shiohara and Yamasaki, 2022, arXiv 2204.08376): most forgeries lay a
foreign or redrawn face into a photograph, and what gives them away is that the two do not quite fit. Here a face, or a
changed copy of the same face, is laid into a face through a soft mask, with a mismatch of geometry, of colour, or of
sharpness.

Departures: no landmarks are needed. The mask is a random smooth outline over the inner face, the eyes or the mouth of a
crop as a face detector makes it, and another face is fitted by its colours, not by its pose. Where the background is to
be the poorer part, the real face of the pair is made poorer first, so that a real and a forged face differ inside the
mask and nowhere else, and a detector cannot go by the traces of the degradation.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from vitalloy.errors import DataError

KINDS = ("geometry", "colour", "sharpness")  # what may not fit; another face as the source is a mismatch by itself

# Ranges are (least, most), drawn evenly; lengths are shares of the crop's side unless they are in pixels.
# Mismatches keep away from zero, since a forgery that changes nothing teaches nothing; their signs are random.
RANGES = {
    "edge": (0.01, 0.06),  # standard deviation of the blur of the mask's edge
    "dent": (0.0, 0.2),  # how far the outline leaves the ellipse, as a share of its radius
    "off_centre": (0.0, 0.05),
    "shift": (0.008, 0.03),
    "scale": (0.01, 0.05),  # enlarged or reduced by this share
    "rotation": (1.0, 5.0),  # degrees
    "brightness": (4.0, 20.0),  # grey levels, as the next
    "tint": (2.0, 8.0),  # of both colour differences; grey faces stay grey
    "contrast": (0.05, 0.2),  # share of the deviation from the mean
    "saturation": (0.1, 0.4),  # share
    "hue": (2.0, 12.0),  # degrees
    "colour_fit": (0.6, 1.0),  # how far another face takes over the colours of the one it is laid into
    "blur": (0.5, 1.5),  # pixels, standard deviation
    "sharpen": (50.0, 180.0),  # percent, unsharp mask of radius 1.5 pixels
    "reduce": (1.4, 3.0),  # reduced by this factor and enlarged again
    "jpeg": (30.0, 80.0),  # quality
}
# centre (x, y) and radii of the outlines, each radius with its range; how often each is drawn
REGIONS = {
    "inner face": ((0.5, 0.52), (0.24, 0.40), (0.28, 0.44), 0.6),
    "mouth": ((0.5, 0.76), (0.16, 0.30), (0.10, 0.18), 0.2),
    "eyes": ((0.5, 0.36), (0.26, 0.38), (0.10, 0.18), 0.2),
}
STRENGTHS = (0.5, 0.75, 1.0, 1.0, 1.0)  # of the mask, one is drawn
CHANCES = {"geometry": 0.6, "colour": 0.7, "sharpness": 0.6, "poorer_background": 0.3}
SOFTENING = ("blur", "reduce", "jpeg")
_VERTICES = 48
_GREY = 2.0  # a face with smaller mean colour differences, in grey levels, is a grey picture


def forge(
    face: np.ndarray, rng: np.random.Generator, other: np.ndarray | None = None, kinds: Sequence[str] = KINDS
) -> tuple[np.ndarray, np.ndarray]:
    """Lay a changed copy of a face, or another face, into `face`.

    Args:
        face: (S, S, 3) uint8, a crop round a real face; any size from 32 on.
        rng: all that is random; the same state gives the same forgery.
        other: another real face of the same size, the source instead of `face` itself.
        kinds: the mismatches that may occur (`KINDS`); at least one does.

    Returns the forgery, (S, S, 3) uint8, and the mask (S, S) float32 of 0..1: the share of the source in each pixel.
    Where it is 0 the forgery is `face`.

    Raises:
        DataError: not such an array, or an unknown mismatch.
    """
    _check(face, other, kinds)
    mask = draw_mask(face.shape[0], rng)
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # half of the work, or less
    chosen = [kind for kind in KINDS if kind in kinds and rng.random() < CHANCES[kind]]
    if not chosen and kinds:
        chosen = [kinds[rng.integers(len(kinds))]]
    source = face if other is None else other
    source = _move(source, box, rng) if "geometry" in chosen else source[box]
    inside, share = face[box], mask[box][..., None]
    if other is not None:
        source = _fit_colours(source, inside, share, _draw(rng, "colour_fit"))
    if "colour" in chosen:
        source = _recolour(source, rng)
    if "sharpness" in chosen:
        source = _sharpen(source, rng) if rng.random() < 0.25 else _soften(source, rng)
    forged = face.copy()
    forged[box] = np.rint(inside + share * (source.astype(np.float32) - inside))
    return forged, mask


def pair(
    face: np.ndarray, rng: np.random.Generator, other: np.ndarray | None = None, kinds: Sequence[str] = KINDS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A real face and its forgery to learn from: (real, forged, mask), as `forge` has them.

    Now and then the real one is made poorer first, while the source is not. Take the real faces of a training set from
    here too, so that poor pictures are as common among them as among the forgeries.
    """
    _check(face, other, kinds)
    if "sharpness" not in kinds or rng.random() >= CHANCES["poorer_background"]:
        return face, *forge(face, rng, other, kinds)
    real = _soften(face, rng)
    return real, *forge(real, rng, face if other is None else other, kinds)


def draw_mask(size: int, rng: np.random.Generator) -> np.ndarray:
    """A soft-edged random region of the inner face: (size, size) float32, 0 outside."""
    shares = [row[-1] for row in REGIONS.values()]
    (x, y), *radii, _ = list(REGIONS.values())[rng.choice(len(shares), p=shares)]
    centre = np.array([x, y]) + _draw(rng, "off_centre") * rng.uniform(-1, 1, 2)
    wide, high = (rng.uniform(*r) for r in radii)
    turn = np.linspace(0, 2 * math.pi, _VERTICES, endpoint=False)
    waves = np.arange(2, 6)  # the first would only shift the outline
    weights = rng.normal(size=(2, len(waves))) / waves
    dents = weights[0] @ np.cos(np.outer(waves, turn)) + weights[1] @ np.sin(np.outer(waves, turn))
    radius = 1 + _draw(rng, "dent") * dents / max(1.0, float(np.abs(dents).max()))
    if rng.random() < 0.5:  # corners, as the hull of a few points has them
        corners = np.sort(rng.choice(_VERTICES, size=rng.integers(6, 12), replace=False))
        turn, radius = turn[corners], radius[corners]
    outline = (centre + np.stack([wide * np.cos(turn), high * np.sin(turn)], 1) * radius[:, None]) * size
    drawn = Image.new("L", (size, size))
    ImageDraw.Draw(drawn).polygon([tuple(point) for point in outline.tolist()], fill=255)
    drawn = drawn.filter(ImageFilter.GaussianBlur(max(0.5, _draw(rng, "edge") * size)))
    return np.asarray(drawn, np.float32) * (STRENGTHS[rng.integers(len(STRENGTHS))] / 255)


def look(face: np.ndarray) -> np.ndarray:
    """An 8 x 8 picture of a face as numbers (192,): faces that are near in it look alike."""
    return np.asarray(Image.fromarray(face).resize((8, 8), Image.Resampling.BOX), np.float32).ravel()


def _draw(rng: np.random.Generator, name: str, signed: bool = False) -> float:
    value = float(rng.uniform(*RANGES[name]))
    return -value if signed and rng.random() < 0.5 else value


def _check(face: np.ndarray, other: np.ndarray | None, kinds: Sequence[str]) -> None:
    if face.dtype != np.uint8 or face.ndim != 3 or face.shape[0] != face.shape[1] or face.shape[2] != 3:
        raise DataError(f"A face to forge is an array (S, S, 3) of uint8, not {face.shape} of {face.dtype}.")
    if face.shape[0] < 32:
        raise DataError(f"A face of {face.shape[0]} pixels is too small to forge; enlarge it to 32 or more.")
    if other is not None and (other.shape != face.shape or other.dtype != np.uint8):
        raise DataError(f"The other face is {other.shape} of {other.dtype}; make it {face.shape} of uint8.")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise DataError(f"There is no mismatch {unknown[0]!r}; choose among {', '.join(KINDS)}.")


# ---- geometry


def _move(face: np.ndarray, box: tuple[slice, slice], rng: np.random.Generator) -> np.ndarray:
    """What is in the box after the face was shifted, scaled and turned a little about the middle of the box."""
    size = face.shape[0]
    pad = size // 8  # more than any of it moves; beyond the border the border repeats
    angle = math.radians(_draw(rng, "rotation", signed=True))
    zoom = 1 + _draw(rng, "scale", signed=True)
    direction, length = rng.uniform(0, 2 * math.pi), _draw(rng, "shift") * size
    wide = np.pad(face, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    wide = Image.fromarray(wide[tuple(slice(s.start, s.stop + 2 * pad) for s in box)])
    width, height = wide.width - 2 * pad, wide.height - 2 * pad
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    x, y = width / 2, height / 2
    # the inverse map: where in the padded box each pixel comes from
    left = x + pad - cos * x - sin * y + length * math.cos(direction)
    top = y + pad + sin * x - cos * y + length * math.sin(direction)
    how = (cos, sin, left, -sin, cos, top)
    return np.asarray(wide.transform((width, height), Image.Transform.AFFINE, how, Image.Resampling.BICUBIC))


# ---- colour


_TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)
_TO_RGB = np.linalg.inv(_TO_YCC).astype(np.float32)


def _recolour(face: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Other brightness, contrast, hue, saturation or tint: one to three of them."""
    names = ("brightness", "contrast", "hue", "saturation", "tint")
    grey = _is_grey(face)
    names = names[:2] if grey else names
    chosen = rng.permutation(names)[: rng.integers(1, len(names) + 1 if grey else 4)]
    change, offset = np.eye(3, dtype=np.float32), np.zeros(3, np.float32)
    for name in chosen:
        amount = _draw(rng, str(name), signed=True)
        if name == "brightness":
            offset[0] += amount
        elif name == "contrast":
            mean = float(face.mean(dtype=np.float64))
            change[0, 0] *= 1 + amount
            offset[0] -= amount * mean
        elif name == "saturation":
            change[1:] *= 1 + amount
        elif name == "hue":
            cos, sin = math.cos(math.radians(amount)), math.sin(math.radians(amount))
            change[1:] = np.array([[cos, -sin], [sin, cos]], np.float32) @ change[1:]
        else:
            direction = rng.uniform(0, 2 * math.pi)
            offset[1:] += amount * np.array([math.cos(direction), math.sin(direction)], np.float32)
    whole = _TO_RGB @ change @ _TO_YCC  # one matrix for all
    return _eight_bits(face.astype(np.float32) @ whole.T + _TO_RGB @ offset)


def _fit_colours(source: np.ndarray, target: np.ndarray, mask: np.ndarray, share: float) -> np.ndarray:
    """`source` with mean and spread of each channel moved by `share` towards those of `target`, both under the mask."""
    weights = mask.ravel() / mask.sum()
    a, b = (region.reshape(-1, 3).astype(np.float32) for region in (source, target))
    if _is_grey(target):  # a coloured face in a grey picture would give itself away
        a = np.repeat(a @ _TO_YCC[:1].T, 3, axis=1)
    (mean_a, spread_a), (mean_b, spread_b) = (_moments(region, weights) for region in (a, b))
    gain = 1 + share * (np.clip(spread_b / spread_a, 0.5, 2.0) - 1)
    return _eight_bits((a - mean_a) * gain + (mean_a + share * (mean_b - mean_a))).reshape(source.shape)


def _moments(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean and standard deviation (plus a grey level) of (N, 3)."""
    mean = weights @ values
    return mean, np.sqrt(np.maximum(weights @ np.square(values) - mean**2, 0)) + 1


def _is_grey(face: np.ndarray) -> bool:
    thin = face[::4, ::4].astype(np.int16)
    return float(np.abs(thin - thin.mean(axis=2, keepdims=True)).mean()) < _GREY


# ---- sharpness


def _sharpen(face: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    amount = round(_draw(rng, "sharpen"))
    return np.asarray(Image.fromarray(face).filter(ImageFilter.UnsharpMask(1.5, amount, 0)))


def _soften(face: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blurred, reduced and enlarged again, or compressed as JPEG."""
    image, how = Image.fromarray(face), SOFTENING[rng.integers(len(SOFTENING))]
    amount = _draw(rng, how)
    if how == "blur":
        return np.asarray(image.filter(ImageFilter.GaussianBlur(amount)))
    if how == "reduce":
        small = image.resize([max(8, round(side / amount)) for side in image.size], Image.Resampling.BOX)
        return np.asarray(small.resize(image.size, Image.Resampling.BICUBIC))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=round(amount))
    return np.asarray(Image.open(file))


def _eight_bits(values: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)
