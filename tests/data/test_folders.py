"""Folders of class folders become labelled sets; each fault in them is named with the mend."""

import logging

import pytest
from PIL import Image

from vitalloy.data import load_data, load_labelled
from vitalloy.data.sets import split_labels
from vitalloy.errors import DataError


def refused(spec, *words, load=load_data, **options):
    with pytest.raises(DataError) as caught:
        load(str(spec), **options)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def test_classes_are_sorted_and_split(make_folder):
    root = make_folder({"tulip": 10, "red rose": 3, "été 花": 2, "daisy": 20})
    splits = load_data(str(root))
    assert splits.name == "flowers" and splits.classes == ["daisy", "red rose", "tulip", "été 花"]
    assert splits.train.counts() == [14, 1, 6, 1]
    assert splits.val.counts() == [3, 1, 2, 0]
    assert splits.test.counts() == [3, 1, 2, 1]
    assert splits.native_size == (24, 20) and splits.flip
    image, label = splits.train[splits.train.labels.index(3)]
    assert image.mode == "RGB" and label == 3 and "été 花" in splits.train.describe(len(splits.train) - 1)


def test_split_depends_on_the_seed_alone(make_folder):
    root = make_folder({"a1": 12, "b1": 12})

    def files(seed):
        splits = load_data(str(root), seed=seed)
        return [[s.describe(i) for i in range(len(s))] for s in (splits.train, splits.val, splits.test)]

    assert files(0) == files(0) != files(1)
    assert len({name for part in files(0) for name in part}) == 24  # no image in two parts


def test_three_images_reach_every_part_with_any_fractions():
    for fractions in ((0.15, 0.15), (0.45, 0.5), (0.01, 0.9)):
        train, val, test = split_labels([0] * 3 + [1] * 2 + [2], *fractions)
        assert [sum(i < 3 for i in part) for part in (train, val, test)] == [1, 1, 1]
        assert [sum(i in (3, 4) for i in part) for part in (train, val, test)] == [1, 0, 1]
        assert 5 in train


def test_deep_folders_hidden_and_other_files(make_folder, caplog):
    root = make_folder({"cat": 3, "cat/more/deep": 2, "dog": 4, ".ipynb_checkpoints": 3, "__MACOSX": 1})
    (root / "cat" / "notes.txt").write_text("x")
    (root / "cat" / ".hidden.png").write_text("x")
    (root / "readme.md").write_text("x")
    (root / "dog" / "loop").symlink_to(root / "dog")
    elsewhere = make_folder({"a": 2}, "elsewhere")
    (root / "dog" / "linked").symlink_to(elsewhere / "a")
    with caplog.at_level(logging.INFO, "vitalloy"):
        images = load_labelled(root)
    assert images.classes == ["cat", "dog"] and images.counts() == [5, 6]
    (line,) = [r.getMessage() for r in caplog.records]
    assert "3 files" in line


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Validation"])
def test_parts_of_the_owner_are_kept(make_folder, val):
    make_folder({"a b": 4, "c d": 5}, "set/train")
    make_folder({"a b": 1, "c d": 2}, f"set/{val}")
    root = make_folder({"a b": 3, "c d": 3}, "set/test").parent
    splits = load_data(str(root))
    assert splits.name == "set"
    assert (splits.train.counts(), splits.val.counts(), splits.test.counts()) == ([4, 5], [1, 2], [3, 3])
    assert load_labelled(root).counts() == [3, 3]


def test_missing_parts_are_split_from_train(make_folder):
    root = make_folder({"a b": 10, "c d": 10}, "set/train").parent
    splits = load_data(str(root))
    assert [s.counts() for s in (splits.train, splits.val, splits.test)] == [[6, 6], [2, 2], [2, 2]]
    make_folder({"a b": 3, "c d": 3}, "set/test")
    splits = load_data(str(root))
    assert [s.counts() for s in (splits.train, splits.val, splits.test)] == [[8, 8], [2, 2], [3, 3]]


def test_a_class_may_be_called_train(make_folder):
    splits = load_data(str(make_folder({"train": 4, "bus": 4})))
    assert splits.classes == ["bus", "train"]


def test_parts_with_other_classes(make_folder):
    make_folder({"ant": 4, "bee": 4, "cow": 4}, "set/train")
    make_folder({"ant": 2, "bee": 2}, "set/val")
    root = make_folder({"ant": 2, "bee": 2, "cow": 2, "elk": 1}, "set/test").parent
    refused(root, "val lacks 'cow'", "test has 'elk', which train lacks")


def test_no_train_and_two_vals(make_folder):
    root = make_folder({"ant": 4, "bee": 4}, "set/test").parent
    refused(root, "no train folder")
    make_folder({"ant": 4, "bee": 4}, "set/train")
    make_folder({"ant": 4, "bee": 4}, "set/val")
    make_folder({"ant": 4, "bee": 4}, "set/valid")
    refused(root, "val and valid", "Keep one")


def test_classes_with_one_image_or_none(make_folder):
    refused(make_folder({"ant": 4, "bee": 1}, "one"), "'bee' has one image", "Add images")
    root = make_folder({"ant": 4, "bee": 0, "cow": 1}, "none")
    (root / "bee" / "words.txt").write_text("x")
    refused(root, "'bee' has no image", "'cow' has one image")
    make_folder({"ant": 4, "bee": 4}, "set/train")
    root = make_folder({"ant": 1, "bee": 0}, "set/val").parent
    refused(root, "val", "'bee' has no image")


def test_nothing_left_for_validation(make_folder):
    refused(make_folder({"ant": 2, "bee": 2}), "validation")


def test_one_class_and_one_folder_too_high(make_folder):
    refused(make_folder({"ant": 4}, "one"), "only one class", "'ant'")
    root = make_folder({"ant": 4, "bee": 4}, "outer/inner").parent
    refused(root, "Did you mean", "inner")


def test_empty_flat_file_and_missing(make_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is empty")
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(3):
        Image.new("RGB", (4, 4)).save(flat / f"{i}.jpg")
    refused(flat, "3 images but no class folders", "sub-folder")
    refused(flat / "0.jpg", "is a file")
    make_folder({"ant": 4, "bee": 4}, "insects")
    refused(tmp_path / "insect", "does not exist", "'insects'")
    refused(tmp_path / "nowhere" / "insects", "does not exist", str(tmp_path / "nowhere"))
    (flat / "train").mkdir()
    Image.new("RGB", (4, 4)).save(flat / "train" / "1.png")
    refused(flat, "train has no class folders")


@pytest.mark.parametrize(
    "names", [("0", "1"), ("a", "b"), ("10", "2"), ("turn_left", "turn_right"), ("Left hand", "x y")]
)
def test_signs_and_sides_are_not_mirrored(make_folder, names):
    assert not load_data(str(make_folder(dict.fromkeys(names, 4)))).flip
    assert load_data(str(make_folder({"bright": 4, "cleft": 4}, "other"))).flip


def test_labels_by_the_models_classes(make_folder):
    root = make_folder({"dog": 1})
    images = load_labelled(root, classes=["cat", "cow", "dog"])
    assert images.labels == [2] and images.classes == ["cat", "cow", "dog"]
    refused(root, "no class 'dog'", "'dogs'", load=load_labelled, classes=["cats", "dogs"])


def test_check_names_broken_files(make_folder):
    root = make_folder({"ant": 6, "bee": 6})
    (root / "ant" / "001.png").write_bytes(b"")
    whole = (root / "bee" / "004.png").read_bytes()
    (root / "bee" / "004.png").write_bytes(whole[: len(whole) // 2])
    images = load_labelled(root)
    seen = []
    broken = images.check(lambda done, total: seen.append((done, total)))
    assert [i for i, _ in broken] == [1, 10] and seen[-1] == (12, 12)
    assert images.describe(10).endswith("004.png") and broken[0][1].startswith("the file is empty")
    kept = images.subset([i for i in range(len(images)) if i not in dict(broken)])
    assert kept.check() == [] and kept.counts() == [5, 5]


def test_cached_holds_the_same_images(make_folder):
    images = load_labelled(make_folder({"ant": 3, "bee": 2})).with_transform(lambda image: image.getpixel((1, 2)))
    cached = images.cached()
    assert cached.in_memory and not images.in_memory
    assert [cached[i] for i in range(5)] == [images[i] for i in range(5)]
    assert cached.describe(4) == images.describe(4)
    assert images.cached(limit=1000) is images
