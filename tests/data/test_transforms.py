"""Sizes, values and options of the transforms."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomHorizontalFlip

from vitalloy.data import eval_transform, train_transform
from vitalloy.data.loading import seeded

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def photo():
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg"))  # 640 wide, 427 high


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_train_gives_the_size_and_varies(photo, small, size):
    transform = train_transform(size, mean=MEAN, std=STD, small=small, color_jitter=0.4, random_erasing=0.5)
    transform = pickle.loads(pickle.dumps(transform))
    outcomes = []
    for seed in (1, 1, 2):
        with seeded(seed):
            outcomes.append(transform(photo))
    assert outcomes[0].shape == (3, *size) and outcomes[0].dtype == torch.float32
    assert torch.equal(outcomes[0], outcomes[1]) and not torch.equal(outcomes[0], outcomes[2])


def test_strongest_augmentation_never_fails():
    transform = train_transform((8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, small=True, randaugment=10)
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    for seed in range(400):  # every operation comes up some fifty times
        with seeded(seed):
            assert transform(image).isfinite().all()


def test_options_leave_parts_out(photo):
    def kinds(**options):
        return [type(t).__name__ for t in train_transform((32, 32), mean=MEAN, std=STD, **options).transforms]

    assert kinds(flip=False, randaugment=0) == ["RandomResizedCrop", "ToTensor", "Normalize"]
    assert kinds(small=True, color_jitter=0.1, random_erasing=0.1) == [
        *("Resize", "RandomCrop", "RandomHorizontalFlip", "RandAugment", "ColorJitter"),
        *("ToTensor", "Normalize", "RandomErasing"),
    ]


def test_without_flip_and_augmentation_small_images_are_only_shifted():
    digit = np.zeros((8, 8, 3), np.uint8)
    digit[:, :4] = 255  # white on the left
    transform = train_transform(
        (32, 32), mean=(0,) * 3, std=(1,) * 3, flip=False, randaugment=0, small=True, interpolation="bilinear"
    )
    assert not any(isinstance(t, RandomHorizontalFlip) for t in transform.transforms)
    for seed in range(20):
        with seeded(seed):
            out = transform(Image.fromarray(digit))
        assert out[0, :, 4:10].mean() > 5 * out[0, :, -8:].mean()  # never mirrored
        assert out.mean() > 0.3  # never cut away


def test_eval_keeps_the_centre_and_normalizes(photo):
    transform = eval_transform((64, 64), mean=MEAN, std=STD, crop_pct=0.5)
    out = transform(photo)
    assert out.shape == (3, 64, 64) and torch.equal(out, transform(photo))
    # the shorter side becomes 128, so the middle half of it is seen
    side = 427 // 2
    left, top = (640 - side) // 2, (427 - side) // 2
    middle = photo.crop((left, top, left + side, top + side)).resize((64, 64), Image.Resampling.BICUBIC)
    expected = (torch.tensor(np.asarray(middle) / 255.0).permute(2, 0, 1) - torch.tensor(MEAN)[:, None, None]) / (
        torch.tensor(STD)[:, None, None]
    )
    assert (out - expected).abs().mean() < 0.15
    assert eval_transform((48, 80), mean=MEAN, std=STD)(photo).shape == (3, 48, 80)


def test_eval_small_resizes_whole():
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("RGB")
    out = eval_transform((16, 16), mean=(0,) * 3, std=(1,) * 3, small=True, interpolation="nearest")(image)
    expected = torch.arange(64.0).reshape(8, 8).repeat_interleave(2, 0).repeat_interleave(2, 1) / 255
    assert torch.allclose(out, expected.expand(3, -1, -1))


def test_one_channel():
    image = Image.new("RGB", (8, 8), (100, 100, 100))
    out = eval_transform((8, 8), mean=(0.5,), std=(0.5,), small=True)(image)
    assert out.shape == (1, 8, 8) and torch.allclose(out, torch.tensor((100 / 255 - 0.5) / 0.5))
    assert train_transform((8, 8), mean=(0.5,), std=(0.5,), small=True)(image).shape == (1, 8, 8)
