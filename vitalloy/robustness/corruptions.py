"""Common corruptions: noise, blur, weather and digital damage at five severities, for images of 8 to 512 pixels.

In the manner of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (2019, arXiv 1903.12261). The families are theirs; the strengths are our own, chosen to scale with the
image, so a score here is *not* an ImageNet-C score: blur lengths are shares of the shorter side, and noise is weaker
on small images, where a pixel carries more of the picture. Left out are corruptions that need texture files (frost,
spatter, snow) and those that glass and elastic shifts make.

Every corruption is `fn(image, severity, rng) -> image` on a PIL RGB image; `Corrupt` makes a pure function of the
image of it.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.signal import fftconvolve

from vitalloy.errors import DataError, RecipeError, suggest

SEVERITIES = (1, 2, 3, 4, 5)
_REFERENCE_SIDE = 224  # pixels of the shorter side at which noise has its full strength


def gaussian_noise(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """Normal noise on every channel: a sensor in the dark."""
    sigma = (0.06, 0.10, 0.15, 0.21, 0.28)[severity - 1] * _noise_scale(image)
    pixels = _pixels(image)
    return _image(pixels + sigma * rng.standard_normal(pixels.shape))


def shot_noise(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """Poisson noise: light that arrives as few photons."""
    photons = (60, 30, 15, 8, 4)[severity - 1] / _noise_scale(image) ** 2
    return _image(rng.poisson(_pixels(image) * photons) / photons)


def impulse_noise(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """Salt and pepper on single channels: bit errors."""
    share = (0.03, 0.06, 0.10, 0.17, 0.26)[severity - 1] * _noise_scale(image)
    pixels = _pixels(image)
    # one uniform field decides where and one what, so that a higher severity keeps the spots of a lower one
    hit, salt = rng.random(pixels.shape) < share, rng.random(pixels.shape) < 0.5
    return _image(np.where(hit, salt.astype(pixels.dtype), pixels))


def defocus_blur(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """A disc blur: a lens out of focus."""
    share = (0.012, 0.018, 0.026, 0.035, 0.045)[severity - 1]
    radius = max(share * min(image.size), 0.55 + 0.13 * severity)  # pixels; below half a pixel a disc does nothing
    half, fine = int(np.ceil(radius)), 9
    # coverage of each pixel by the disc, from `fine` x `fine` points in it
    points = (np.arange((2 * half + 1) * fine) + 0.5) / fine - half - 0.5
    inside = (points[:, None] ** 2 + points[None, :] ** 2 <= radius**2).astype(np.float64)
    side = 2 * half + 1
    return _image(_blur(_pixels(image), inside.reshape(side, fine, side, fine).sum((1, 3))))


def motion_blur(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """A straight smear within 45 degrees of the horizontal: a camera that moved."""
    share = (0.04, 0.06, 0.085, 0.11, 0.14)[severity - 1]
    length = max(share * min(image.size), 0.8 + 0.5 * severity)  # pixels
    angle = rng.uniform(-np.pi / 4, np.pi / 4)
    half = int(np.ceil(length / 2))
    kernel = np.zeros((2 * half + 2, 2 * half + 2))
    steps = np.linspace(-length / 2, length / 2, 8 * half + 1)
    xs, ys = half + steps * np.cos(angle), half + steps * np.sin(angle)
    left, top = np.floor(xs).astype(int), np.floor(ys).astype(int)
    for dy in (0, 1):  # each point is shared among its four pixels
        for dx in (0, 1):
            weight = (1 - abs(xs - left - dx)) * (1 - abs(ys - top - dy))
            np.add.at(kernel, (top + dy, left + dx), weight)
    return _image(_blur(_pixels(image), kernel[:-1, :-1]))


def haze(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """A bright, uneven veil: fog."""
    strength = (0.25, 0.35, 0.45, 0.55, 0.65)[severity - 1]
    veil = np.zeros((image.height, image.width))
    for cells, weight in ((2, 0.5), (4, 0.3), (8, 0.2)):  # coarse to fine clouds
        field = Image.fromarray(rng.random((cells + 1, cells + 1)).astype(np.float32))
        veil += weight * np.asarray(field.resize(image.size, Image.Resampling.BICUBIC))
    cover = np.clip(strength * (0.5 + veil), 0, 1)[..., None]
    return _image(_pixels(image) * (1 - cover) + 0.9 * cover)


def brightness(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """Overexposure: the value of HSV raised, hue and saturation kept."""
    rise = (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]
    pixels = _pixels(image)
    value = pixels.max(-1, keepdims=True)
    brighter = np.minimum(value + rise, 1)
    return _image(np.where(value > 0, pixels / np.maximum(value, 1e-6) * brighter, brighter))


def contrast(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """Every channel pulled towards its mean."""
    keep = (0.5, 0.4, 0.3, 0.2, 0.1)[severity - 1]
    pixels = _pixels(image)
    mean = pixels.mean((0, 1), keepdims=True)
    return _image(mean + keep * (pixels - mean))


def pixelate(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """Shrunk and blown up again without smoothing."""
    share = (0.6, 0.5, 0.4, 0.32, 0.25)[severity - 1]
    small = tuple(min(side, max(2, round(side * share))) for side in image.size)
    shrunk = image.convert("RGB").resize(small, Image.Resampling.BOX)
    return shrunk.resize(image.size, Image.Resampling.NEAREST)


def jpeg_compression(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """Saved as a JPEG of low quality."""
    quality = (25, 18, 13, 9, 6)[severity - 1]
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


Corruption = Callable[[Image.Image, int, np.random.Generator], Image.Image]

CORRUPTIONS: dict[str, Corruption] = {
    function.__name__: function
    for function in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        defocus_blur,
        motion_blur,
        haze,
        brightness,
        contrast,
        pixelate,
        jpeg_compression,
    )
}
DEFAULT_NAMES = tuple(CORRUPTIONS)


@dataclass(frozen=True)
class Corrupt:
    """A transform, PIL image to PIL image, to put before an evaluation transform. It pickles.

    Args:
        name: a key of `CORRUPTIONS`.
        severity: 1 (slight) to 5 (severe).
        seed: the noise is a function of (`seed`, `name`, the image's own pixels) alone: the same image gets the same
            damage in every epoch, order and worker, and severities differ in strength, not in pattern.

    Raises:
        RecipeError: for an unknown name or severity.
    """

    name: str
    severity: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in CORRUPTIONS:
            raise RecipeError(
                f"There is no corruption {self.name!r}.{suggest(self.name, CORRUPTIONS)} "
                f"Choose among {', '.join(CORRUPTIONS)}."
            )
        if self.severity not in SEVERITIES:
            raise RecipeError(f"Corruption severity {self.severity!r} is not one of 1, 2, 3, 4, 5.")

    def __call__(self, image: Image.Image) -> Image.Image:
        image = image.convert("RGB")
        rng = np.random.default_rng([abs(self.seed), zlib.crc32(self.name.encode()), zlib.crc32(image.tobytes())])
        return CORRUPTIONS[self.name](image, self.severity, rng)


@torch.no_grad()
def evaluate_corruptions(
    predict: Callable[[torch.Tensor], torch.Tensor],
    images: Sequence[Image.Image],
    labels: Sequence[int],
    transform: Callable[[Image.Image], torch.Tensor],
    *,
    names: Sequence[str] = DEFAULT_NAMES,
    severity: int = 3,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Top-1 accuracy under each corruption.

    Args:
        predict: a normalised batch (B, C, H, W) -> logits (B, classes); the caller puts the model in eval mode and
            moves the batch to its device.
        images: PIL images as they come, before `transform`.
        labels: the class index of each.
        transform: the evaluation transform, PIL image -> tensor (C, H, W).
        names, severity, seed: see `Corrupt`.
        progress: called after each corruption with (done, all).

    Returns one `{"name", "severity", "top1"}` a corruption, `top1` between 0 and 1, in the order of `names`.

    Raises:
        DataError: without images, or when images and labels differ in number.
        RecipeError: for an unknown corruption or severity.
    """
    if len(images) == 0 or len(images) != len(labels):
        raise DataError(
            f"Corruptions are measured on labelled images, but there are {len(images)} images and {len(labels)} labels."
        )
    damages = [Corrupt(name, severity, seed) for name in names]
    results = []
    for done, damage in enumerate(damages, start=1):
        correct = 0
        for start in range(0, len(images), batch_size):
            chunk = range(start, min(start + batch_size, len(images)))
            batch = torch.stack([transform(damage(images[index])) for index in chunk])
            guesses = predict(batch).argmax(-1).tolist()
            correct += sum(guess == int(labels[index]) for guess, index in zip(guesses, chunk, strict=True))
        results.append({"name": damage.name, "severity": severity, "top1": correct / len(images)})
        if progress is not None:
            progress(done, len(damages))
    return results


def _noise_scale(image: Image.Image) -> float:
    """1 from 224 pixels on, falling slowly to 0.5 on tiny images."""
    return float(np.clip((min(image.size) / _REFERENCE_SIDE) ** 0.25, 0.5, 1.0))


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float64) / 255  # (H, W, 3), 0 to 1


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8))


def _blur(pixels: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve every channel with an odd-sized kernel, made to sum to one; the border is mirrored."""
    half = kernel.shape[0] // 2
    padded = np.pad(pixels, ((half, half), (half, half), (0, 0)), mode="symmetric")
    return fftconvolve(padded, (kernel / kernel.sum())[..., None], mode="valid", axes=(0, 1))
