"""Hugging Face data sets saved on disk: columns are found by their kind, rows without a label are left out."""

import builtins

import numpy as np
import pytest

from vitalloy.data import load_data, load_labelled
from vitalloy.errors import DataError

datasets = pytest.importorskip("datasets")


def pictures(count):
    from PIL import Image

    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)) for _ in range(count)]


def table(labels, label_feature, name="picture", **more):
    columns = {name: pictures(len(labels)), "answer": labels, **more}
    features = {name: datasets.Image(), "answer": label_feature}
    features |= {key: datasets.ClassLabel(names=["x", "y"]) for key in more}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_class_labels_with_published_parts(tmp_path):
    kind = datasets.ClassLabel(names=["zebra", "ape"])
    splits = {
        "train": table([0, 1] * 4, kind),
        "validation": table([0, 1, -1], kind),
        "test": table([-1, -1], kind),  # a hidden test part
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "animals"))
    made = load_data(f"hf:{tmp_path / 'animals'}")
    assert made.name == "animals" and made.classes == ["zebra", "ape"] and made.native_size == (9, 7)
    assert [s.counts() for s in (made.train, made.val, made.test)] == [[3, 3], [1, 1], [1, 1]]
    assert (np.asarray(made.val[1][0]) == np.asarray(pictures(3)[1])).all() and made.val[1][1] == 1
    assert made.val.describe(1).endswith("val[1]") and made.train.check() == []


def test_one_split_and_plain_labels(tmp_path):
    table(["b", "a", "c"] * 3, datasets.Value("string")).save_to_disk(str(tmp_path / "plain"))
    spec = f"hf:{tmp_path / 'plain'}"
    with pytest.raises(DataError, match=r"picture, answer.*label_column"):
        load_data(spec)
    made = load_data(spec, label_column="answer")
    assert made.classes == ["a", "b", "c"] and made.train.counts() == [1, 1, 1]
    images = load_labelled(spec, label_column="answer")
    assert images.labels == [1, 0, 2] * 3
    with pytest.raises(DataError, match="'answer'"):
        load_data(spec, label_column="anwser")


def test_two_label_columns_must_be_told_apart(tmp_path):
    kind = datasets.ClassLabel(names=["p", "q"])
    table([0, 1] * 3, kind, coarse=[0, 0, 0, 1, 1, 1]).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(DataError, match="label_column"):
        load_data(f"hf:{tmp_path / 'two'}")
    assert load_labelled(f"hf:{tmp_path / 'two'}", label_column="coarse").labels == [0, 0, 0, 1, 1, 1]


def test_broken_image_is_named(tmp_path):
    kind = datasets.ClassLabel(names=["p", "q"])
    rows = {"image": [{"bytes": b"words", "path": None}] * 6, "label": [0, 1] * 3}
    features = datasets.Features(image=datasets.Image(), label=kind)
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "broken"))
    images = load_labelled(f"hf:{tmp_path / 'broken'}")
    with pytest.raises(DataError, match=r"broken train\[2\]: this is not an image"):
        images[2]
    assert len(images.check()) == 6


def test_no_image_column_and_missing_folder(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(str(tmp_path / "words"))
    with pytest.raises(DataError, match=r"no image column.*text, label"):
        load_data(f"hf:{tmp_path / 'words'}")
    with pytest.raises(DataError, match="does not exist"):
        load_data(f"hf:{tmp_path / 'absent'}")


def test_missing_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **options):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install 'vitalloy\[datasets\]'"):
        load_data("hf:owner/name")
