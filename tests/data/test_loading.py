"""Order and augmentation are functions of the seed and the epoch, with any number of workers."""

import random

import numpy as np
import pytest
import torch

from vitalloy.data import ImageSet, SeededImages, SeededSampler, load_labelled, make_loader, train_transform
from vitalloy.errors import DataError


@pytest.fixture(scope="module")
def images():
    arrays = np.random.default_rng(0).integers(0, 256, (50, 10, 12, 3), dtype=np.uint8)
    transform = train_transform(
        (16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, small=True, color_jitter=0.4, random_erasing=0.5
    )
    return ImageSet.from_arrays(arrays, [i % 3 for i in range(50)], ["a", "b", "c"]).with_transform(transform)


def epochs(loader, numbers):
    out = []
    for number in numbers:
        loader.sampler.set_epoch(number)
        out.append([torch.cat(parts) for parts in zip(*loader, strict=True)])
    return out


def test_workers_do_not_change_a_bit(images):
    alone = epochs(make_loader(images, 8, train=True, seed=5, workers=0), (0, 1))
    helped = epochs(make_loader(images, 8, train=True, seed=5, workers=2), (0, 1))
    for one, other in zip(alone, helped, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert len(alone[0][2]) == 48  # the last two do not fill a batch
    assert not torch.equal(alone[0][2], alone[1][2])  # another order


def test_a_restart_repeats_the_epoch(images):
    straight = epochs(make_loader(images, 8, train=True, seed=5, workers=0), (0, 1, 2))[2]
    torch.rand(7), random.random()  # whatever else drew numbers
    resumed = epochs(make_loader(images, 8, train=True, seed=5, workers=0), (2,))[0]
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    other = epochs(make_loader(images, 8, train=True, seed=6, workers=0), (2,))[0]
    assert not torch.equal(straight[0], other[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_models_random_numbers_are_left_alone(images, workers):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    epochs(make_loader(images, 8, train=True, seed=5, workers=workers), (0,))
    assert states() == before


def test_sampler_is_fair_between_ranks():
    for length, world in ((10, 3), (2, 4), (12, 4)):
        ranks = [SeededSampler(length, seed=1, rank=r, world=world) for r in range(world)]
        seen = [[i for i, _ in sampler] for sampler in ranks]
        assert {len(s) for s in seen} == {len(ranks[0])} == {-(-length // world)}
        assert {i for s in seen for i in s} == set(range(length))
    cut = [list(SeededSampler(10, seed=1, rank=r, world=3, drop_last=True)) for r in range(3)]
    assert [len(c) for c in cut] == [3, 3, 3] and len({i for c in cut for i, _ in c}) == 9
    with pytest.raises(ValueError, match="rank 3"):
        SeededSampler(10, seed=1, rank=3, world=3)


def test_sample_seeds_belong_to_seed_epoch_and_index():
    one, two = SeededSampler(20, seed=1), SeededSampler(20, seed=1, shuffle=False, rank=1, world=2)
    assert dict(two).items() <= dict(one).items() and [i for i, _ in two] == list(range(1, 20, 2))
    assert list(one) == list(one)
    first = dict(one)
    one.set_epoch(1)
    assert all(first[i] != s for i, s in one) and len(set(first.values())) == 20


def test_plain_index_and_pair(images):
    seeded = SeededImages(images)
    image, label, index = seeded[7, 99]
    assert label == 1 and index == 7 and torch.equal(image, seeded[7, 99][0])
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    assert not torch.equal(seeded[7][0], seeded[7][0])


def test_evaluation_keeps_the_order(images):
    loader = make_loader(images, 16, train=False)
    assert torch.cat([b[2] for b in loader]).tolist() == list(range(50)) and len(loader) == 4
    shares = [make_loader(images, 16, train=False, rank=r, world=2) for r in range(2)]
    assert sum(len(b[1]) for loader in shares for b in loader) == 50


def test_a_batch_larger_than_the_set(images):
    (batch,) = make_loader(images, 64, train=True)
    assert batch[0].shape == (50, 3, 16, 16)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named_from_any_process(make_folder, workers):
    root = make_folder({"ant": 3, "bee": 3})
    (root / "bee" / "001.png").write_bytes(b"not an image")
    images = load_labelled(root).with_transform(train_transform((8, 8), mean=(0.5,) * 3, std=(0.5,) * 3))
    with pytest.raises(DataError) as caught:
        list(make_loader(images, 2, train=False, workers=workers))
    assert str(root / "bee" / "001.png") in str(caught.value) and "Traceback" not in str(caught.value)


def test_auto_takes_no_workers_for_small_sets(images):
    assert make_loader(images, 8, train=True).num_workers == 0
    many = ImageSet.from_arrays([np.zeros((1024, 1024), np.uint8)] * 32, [0, 1] * 16, ["a", "b"])
    assert 1 <= make_loader(many, 8, train=True).num_workers <= 4
