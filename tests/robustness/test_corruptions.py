from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from vitalloy.errors import DataError, RecipeError
from vitalloy.robustness import CORRUPTIONS, DEFAULT_NAMES, Corrupt, evaluate_corruptions

PHOTO = Image.fromarray(load_sample_image("flower.jpg")).resize((96, 64))
DIGIT = Image.fromarray((load_digits().images[3] * 15.9).astype("uint8")).convert("RGB")  # 8 x 8


def damage(image, name, severity):
    before, after = np.asarray(image, float), np.asarray(Corrupt(name, severity)(image), float)
    return np.abs(after - before).mean()


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("image", [PHOTO, DIGIT], ids=["photo", "digit"])
def test_damage_is_visible_and_grows_with_severity(name, image):
    damages = [damage(image, name, severity) for severity in range(1, 6)]
    assert damages[0] > 0.5 and damages[-1] > 1.5 * damages[0]
    assert all(later >= earlier for earlier, later in itertools.pairwise(damages))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_size_and_mode_stay_and_the_original_is_not_touched(name):
    for size in ((8, 8), (9, 31), (200, 130)):
        image = PHOTO.resize(size)
        before = image.tobytes()
        result = Corrupt(name, 5)(image)
        assert result.size == size and result.mode == "RGB" and image.tobytes() == before
    assert Corrupt(name)(PHOTO.convert("L")).mode == "RGB"


def test_damage_is_a_function_of_seed_and_image_alone():
    noisy = Corrupt("gaussian_noise", 3, seed=1)
    other = pickle.loads(pickle.dumps(noisy))
    first = noisy(PHOTO).tobytes()
    noisy(DIGIT)
    assert noisy(PHOTO).tobytes() == first == other(PHOTO.copy()).tobytes()
    assert Corrupt("gaussian_noise", 3, seed=2)(PHOTO).tobytes() != first
    flat = [np.asarray(noisy(Image.new("RGB", (16, 16), (shade,) * 3)), int) - shade for shade in (120, 121)]
    assert not np.array_equal(*flat)  # two images, two noises


def test_blurs_keep_the_mean_and_contrast_keeps_it_too():
    mean = np.asarray(PHOTO, float).mean()
    for name in ("defocus_blur", "motion_blur", "contrast"):
        assert np.asarray(Corrupt(name, 3)(PHOTO), float).mean() == pytest.approx(mean, abs=1.5)
    flat = Image.new("RGB", (40, 40), (10, 100, 200))
    assert damage(flat, "defocus_blur", 5) == 0 and damage(flat, "motion_blur", 5) == 0


def test_brightness_raises_the_value_by_its_step():
    result = np.asarray(Corrupt("brightness", 2)(Image.new("RGB", (8, 8), (0, 51, 153))))
    assert result[0, 0].tolist() == [0, 68, 204]  # value 0.6 -> 0.8: hue and saturation stay


def test_accuracy_is_counted_over_all_batches_and_falls_under_damage():
    digits = load_digits()
    images = [Image.fromarray((image * 15.9).astype("uint8")).convert("RGB") for image in digits.images[:150]]
    labels = digits.target[:150].tolist()

    def transform(image):
        return torch.from_numpy(np.asarray(image, np.float32) / 255).movedim(-1, 0)

    known = torch.stack([transform(image) for image in images]).flatten(1)

    def predict(batch):  # nearest neighbour among the clean images: right on each of them
        nearest = torch.cdist(batch.flatten(1), known).argmin(1)
        return torch.nn.functional.one_hot(torch.tensor(labels)[nearest], 10).float()

    seen = []
    names = ["contrast", "pixelate", "gaussian_noise"]
    results = evaluate_corruptions(
        predict,
        images,
        labels,
        transform,
        names=names,
        severity=5,
        batch_size=64,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [row["name"] for row in results] == names and all(row["severity"] == 5 for row in results)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for row in results:
        batch = torch.stack([transform(Corrupt(row["name"], 5)(image)) for image in images])
        expected = (predict(batch).argmax(-1) == torch.tensor(labels)).float().mean().item()
        assert row["top1"] == pytest.approx(expected)
    assert results[0]["top1"] < 0.9 and len(DEFAULT_NAMES) == 10


def test_misuse_is_named():
    with pytest.raises(RecipeError, match="gaussian_noise"):
        Corrupt("gausian_noise")
    with pytest.raises(RecipeError, match="severity 6"):
        Corrupt("haze", 6)
    with pytest.raises(DataError, match="0 images"):
        evaluate_corruptions(lambda x: x, [], [], lambda x: x)
