"""From a Pillow image to a normalized tensor, with random changes in training and without them in evaluation.

The parts are torchvision's and timm's; here is how they are put together. Images of a few dozen pixels are treated
apart: cutting a tenth out of an 8 x 8 digit leaves nothing to learn from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.data import create_transform, str_to_interp_mode, str_to_pil_interp
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torchvision import transforms

SMALL = 64  # pixels: up to this native side `small=True` is meant
_TRANSLATE = 0.45  # of the shorter side, the farthest that RandAugment moves an image: timm's share
_STRONGEST = 9.999  # at a full 10 "posterize" keeps no bit at all: a black image, and an error in newer Pillow


def train_transform(
    size: tuple[int, int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
    flip: bool = True,
    randaugment: float = 9.0,
    crop_scale: tuple[float, float] = (0.08, 1.0),
    color_jitter: float = 0.0,
    random_erasing: float = 0.0,
    small: bool = False,
) -> transforms.Compose:
    """Random crop, mirror, RandAugment, colour jitter and erasing, then a tensor.

    Args:
        size: (H, W) of the result in pixels.
        mean, std: of each channel, for values in 0..1; a single value makes a grey image of one channel.
        flip: mirror every other image.
        randaugment: magnitude 0..10 of timm's policy `rand-m9-mstd0.5-inc1`; 0 leaves it out.
        crop_scale: least and largest share of the image's area that a crop keeps; not used with `small`.
        color_jitter: strength of random brightness, contrast and saturation; 0 leaves it out.
        random_erasing: the probability that a random rectangle is replaced by noise.
        small: for images of up to 64 pixels: resize whole, pad by an eighth, and crop back at a random place.

    Returns:
        A picklable transform: Pillow RGB image -> (C, H, W) float32.
    """
    height, width = size
    mode = str_to_interp_mode(interpolation)
    if small:
        padding = [width // 8, height // 8]  # left and right, top and bottom
        steps = [transforms.Resize((height, width), mode), transforms.RandomCrop((height, width), padding)]
    else:
        steps = [transforms.RandomResizedCrop((height, width), scale=crop_scale, interpolation=mode)]
    if flip:
        steps.append(transforms.RandomHorizontalFlip())
    if randaugment > 0:
        options = {
            "translate_const": int(min(size) * _TRANSLATE),
            "img_mean": tuple(min(255, round(255 * m)) for m in _three(mean)),
            "interpolation": str_to_pil_interp(interpolation),
            "magnitude_max": _STRONGEST,
        }
        steps.append(rand_augment_transform(f"rand-m{round(randaugment)}-mstd0.5-inc1", options))
    if color_jitter > 0:
        steps.append(transforms.ColorJitter(color_jitter, color_jitter, color_jitter))
    steps += _to_tensor(mean, std)
    if random_erasing > 0:
        steps.append(RandomErasing(random_erasing, mode="pixel", device="cpu"))
    return transforms.Compose(steps)


def eval_transform(
    size: tuple[int, int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
    crop_pct: float = 0.875,
    small: bool = False,
) -> transforms.Compose:
    """Resize so that the image covers `size / crop_pct`, keep its centre, make a tensor; with `small` resize it whole.

    Args:
        size: (H, W) of the result in pixels.
        mean, std: of each channel, for values in 0..1; a single value makes a grey image of one channel.

    Returns:
        A picklable transform: Pillow RGB image -> (C, H, W) float32.
    """
    height, width = size
    if small:
        steps = [transforms.Resize((height, width), str_to_interp_mode(interpolation))]
    else:
        usual = create_transform(
            (3, height, width), interpolation=interpolation, crop_pct=crop_pct, mean=(0.0,) * 3, std=(1.0,) * 3
        )
        steps = usual.transforms[:2]  # the resize and the crop
    return transforms.Compose([*steps, *_to_tensor(mean, std)])


def _to_tensor(mean: Sequence[float], std: Sequence[float]) -> list:
    grey = [transforms.Grayscale()] if len(mean) == 1 else []
    return [*grey, transforms.ToTensor(), transforms.Normalize(torch.tensor(mean), torch.tensor(std))]


def _three(mean: Sequence[float]) -> list[float]:
    return list(mean) * 3 if len(mean) == 1 else list(mean)
