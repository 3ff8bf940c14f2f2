"""Self-made forgeries differ from the real face where the mask says so and nowhere else."""

import numpy as np
import pytest
from PIL import Image
from skimage.data import astronaut, lfw_subset

from vitalloy.applications.deepfake import augmentation
from vitalloy.applications.deepfake.augmentation import augment
from vitalloy.applications.deepfake.forgeries import KINDS, draw_mask, forge, look, pair
from vitalloy.errors import DataError


def portrait(size: int = 96) -> np.ndarray:
    return np.asarray(Image.fromarray(astronaut()[40:230, 130:320]).resize((size, size)))


def grey(index: int, size: int = 96) -> np.ndarray:
    face = np.rint(lfw_subset()[index] * 255).astype(np.uint8)
    return np.asarray(Image.fromarray(face).convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("other", [None, grey(3)], ids=["itself", "another"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_forgery_differs_inside_the_mask_only(kind, other):
    face = portrait()
    changed = 0
    for seed in range(20):
        forged, mask = forge(face, rng(seed), other, (kind,))
        assert forged.dtype == np.uint8 and forged.shape == face.shape and mask.dtype == np.float32
        assert 0 < mask.max() <= 1 and (mask == 0).mean() > 0.1
        assert np.array_equal(forged[mask == 0], face[mask == 0])
        changed += np.abs(forged[mask > 0.3].astype(int) - face[mask > 0.3]).mean() > 1
    assert changed >= 18


def test_a_pair_differs_inside_the_mask_only_though_its_real_face_may_be_poorer():
    face, poorer = portrait(), 0
    for seed in range(40):
        real, forged, mask = pair(face, rng(seed))
        assert np.array_equal(real[mask == 0], forged[mask == 0])
        poorer += not np.array_equal(real, face)
    assert 5 <= poorer <= 20  # three of ten
    assert all(np.array_equal(pair(face, rng(seed), kinds=("colour",))[0], face) for seed in range(20))


def test_the_generator_decides_everything():
    face, other = portrait(), grey(0)
    first, again, next_one = (pair(face, rng(seed), other) for seed in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[1], next_one[1])


def test_a_grey_face_stays_grey_even_with_a_coloured_source():
    for seed in range(20):
        for other in (None, portrait()):
            forged, _ = forge(grey(1), rng(seed), other)
            assert np.ptp(forged.astype(int), axis=2).max() <= 2  # JPEG rounds


def test_another_face_takes_over_the_colours_of_the_face_it_is_laid_into():
    face, dark = portrait(), (portrait()[:, ::-1] // 4).astype(np.uint8)
    for seed in range(10):
        forged, mask = forge(face, rng(seed), dark, ("geometry",))
        pasted = face + mask[..., None] * (dark.astype(float) - face)
        inside = mask > 0.3
        gap, raw = (abs(view[inside].mean() - face[inside].mean()) for view in (forged, pasted))
        assert gap < 0.6 * raw


def test_masks_lie_inside_the_face_and_differ():
    masks = np.stack([draw_mask(64, rng(seed)) for seed in range(60)])
    corners = masks[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.max() == 0
    areas = (masks > 0.25).mean((1, 2))
    assert areas.min() > 0.005 and areas.max() < 0.75 and areas.std() > 0.05
    assert len({round(float(top), 2) for top in masks.max((1, 2))}) >= 3  # strengths


def test_like_faces_look_alike():
    assert np.abs(look(portrait()) - look(portrait())).sum() == 0
    near = np.abs(look(grey(0)) - look(np.clip(grey(0) * 0.95, 0, 255).astype(np.uint8))).sum()
    assert near < np.abs(look(grey(0)) - look(grey(9))).sum()


@pytest.mark.parametrize(
    ("face", "other", "kinds", "message"),
    [
        (portrait().astype(float), None, KINDS, "uint8"),
        (portrait()[:90], None, KINDS, r"\(S, S, 3\)"),
        (portrait(16), None, KINDS, "too small"),
        (portrait(), portrait(64), KINDS, "other face"),
        (portrait(), None, ("smell",), "no mismatch 'smell'"),
    ],
)
def test_what_cannot_be_forged_is_refused(face, other, kinds, message):
    with pytest.raises(DataError, match=message):
        forge(face, rng(0), other, kinds)


def test_augmentation_follows_its_table_and_its_generator(monkeypatch):
    face = portrait()
    assert np.array_equal(augment(face, rng(3)), augment(face, rng(3)))
    assert all(augment(face, rng(seed), 0.0) is face for seed in range(5))
    unchanged = sum(np.array_equal(augment(face, rng(seed)), face) for seed in range(200))
    expected = 0.1 + 0.9 * np.prod([1 - chance for chance in augmentation.CHANCES.values()])
    assert abs(unchanged / 200 - expected) < 0.08
    for name in augmentation.CHANCES:  # each one alone does something and keeps the form
        monkeypatch.setattr(augmentation, "CHANCES", {name: 1.0})
        views = [augment(face, rng(seed), 1.0) for seed in range(8)]
        assert all(view.shape == face.shape and view.dtype == np.uint8 for view in views)
        assert any(not np.array_equal(view, face) for view in views), name
    monkeypatch.setattr(augmentation, "CHANCES", {"mirror": 1.0})
    assert np.array_equal(augment(face, rng(0), 1.0), face[:, ::-1])
