"""The random changes that GenConViT's authors train with, for faces of both classes alike.

They list eight operations of the albumentations library with their probabilities, under a probability of 0.9 for the
list as a whole; `CHANCES` is that list, and the ranges in `RANGES` are the library's defaults of that time. Written
here on NumPy and Pillow, so that the library is no dependency. Two parts differ in detail: noise is drawn per pixel and
channel in 8 bits, and the adaptive histogram is scikit-image's (on the brightness of HSV, not of Lab).
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageFilter

CHANCE = 0.9  # of the list as a whole
CHANCES = {
    "quarter turn": 0.2,
    "transpose": 0.2,
    "mirror": 0.5,
    "upside down": 0.5,
    "noise": 0.2,
    "move": 0.2,
    "tone": 0.2,
    "colour": 0.2,
}
RANGES = {
    "noise": (10.0, 50.0),  # variance, in grey levels squared
    "shift": (-0.0625, 0.0625),  # share of the side
    "scale": (0.9, 1.1),
    "rotation": (-45.0, 45.0),  # degrees
    "clip": (1.0, 2.0),  # limit of the adaptive histogram, in mean counts of a bin
    "alpha": (0.2, 0.5),  # share of the sharpened or embossed picture
    "lightness": (0.5, 1.0),
    "strength": (0.2, 0.7),  # of the relief
    "brightness": (-0.2, 0.2),  # share of white
    "contrast": (0.8, 1.2),
    "hue": (-20.0, 20.0),  # degrees of 180
    "saturation": (-30.0, 30.0),  # of 255, as the next
    "value": (-20.0, 20.0),
}
TONES = ("adaptive histogram", "sharpen", "emboss", "brightness and contrast")


def augment(face: np.ndarray, rng: np.random.Generator, chance: float = CHANCE) -> np.ndarray:
    """A face (S, S, 3) uint8, changed at random; the same state of `rng` gives the same picture.

    Args:
        chance: of any change at all; 0 leaves the face as it is.
    """
    if rng.random() >= chance:
        return face
    for name, own in CHANCES.items():
        if rng.random() < own:
            face = _OPERATIONS[name](face, rng)
    return np.ascontiguousarray(face)


def _draw(rng: np.random.Generator, name: str) -> float:
    return float(rng.uniform(*RANGES[name]))


def _noise(face: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _eight_bits(face + rng.standard_normal(face.shape, np.float32) * math.sqrt(_draw(rng, "noise")))


def _move(face: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shifted, scaled and turned about the middle; what comes in over the border is a mirror image."""
    size = face.shape[0]
    pad = size // 2 - 1
    angle, scale = math.radians(_draw(rng, "rotation")), _draw(rng, "scale")
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    x, y = (size / 2 + _draw(rng, "shift") * size for _ in range(2))
    middle = size / 2 + pad
    wide = Image.fromarray(np.pad(face, ((pad, pad), (pad, pad), (0, 0)), mode="reflect"))
    how = (cos, sin, middle - cos * x - sin * y, -sin, cos, middle + sin * x - cos * y)
    return np.asarray(wide.transform((size, size), Image.Transform.AFFINE, how, Image.Resampling.BILINEAR))


def _tone(face: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    how = TONES[rng.integers(len(TONES))]
    if how == "adaptive histogram":
        from skimage.exposure import equalize_adapthist

        return _eight_bits(255 * equalize_adapthist(face, clip_limit=_draw(rng, "clip") / 256))
    if how == "brightness and contrast":
        return _eight_bits(face.astype(np.float32) * _draw(rng, "contrast") + 255 * _draw(rng, "brightness"))
    alpha, kernel = _draw(rng, "alpha"), np.zeros((3, 3))
    kernel[1, 1] = 1 - alpha
    if how == "sharpen":
        kernel += alpha * (np.pad([[9 + _draw(rng, "lightness")]], 1) - 1)
    else:
        s = _draw(rng, "strength")
        kernel += alpha * np.array([[-1 - s, -s, 0], [-s, 1, s], [0, s, 1 + s]])
    return np.asarray(Image.fromarray(face).filter(ImageFilter.Kernel((3, 3), kernel.ravel().tolist(), scale=1)))


def _colour(face: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    hue, saturation, value = np.moveaxis(np.asarray(Image.fromarray(face).convert("HSV")).astype(np.float32), 2, 0)
    changed = (
        (hue + _draw(rng, "hue") * 256 / 180) % 256,
        np.where(saturation > 0, saturation + _draw(rng, "saturation"), 0),  # grey stays grey
        value + _draw(rng, "value"),
    )
    return np.asarray(Image.fromarray(_eight_bits(np.stack(changed, 2)), "HSV").convert("RGB"))


def _eight_bits(values: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


_OPERATIONS = {
    "quarter turn": lambda face, rng: np.rot90(face, rng.integers(4)),
    "transpose": lambda face, rng: face.swapaxes(0, 1),
    "mirror": lambda face, rng: face[:, ::-1],
    "upside down": lambda face, rng: face[::-1],
    "noise": _noise,
    "move": _move,
    "tone": _tone,
    "colour": _colour,
}
