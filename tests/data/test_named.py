"""Data sets by name: the digits, torchvision's from local files, and names that are not known."""

import gzip
import pickle
import struct
import urllib.error

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from vitalloy.data import load_data, load_labelled
from vitalloy.errors import DataError


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("VITALLOY_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def write_idx(folder, prefix, images, labels):
    folder.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">BBBBIII", 0, 0, 8, 3, *images.shape)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(
        struct.pack(">BBBBI", 0, 0, 8, 1, len(labels)) + labels.tobytes()
    )


def test_digits():
    splits = load_data("digits")
    assert len(splits.classes) == 10 and splits.native_size == (8, 8) and not splits.flip
    assert (len(splits.train), len(splits.val), len(splits.test)) == (1259, 269, 269)
    image, label = splits.train[0]
    assert image.size == (8, 8) and splits.train.describe(0) == "digits[0]" and label == 0
    assert max(np.asarray(splits.train[i][0]).max() for i in range(20)) == 255
    assert splits.train.check() == []
    assert len(load_labelled("digits")) == 1797


@pytest.mark.parametrize("spec", ["MNIST", "mnist", "torchvision:MNIST"])
def test_mnist_from_local_files(root, spec):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 28, 28), dtype=np.uint8)
    labels = (np.arange(60) % 10).astype(np.uint8)
    write_idx(root / "MNIST" / "raw", "train", images[:40], labels[:40])
    write_idx(root / "MNIST" / "raw", "t10k", images[40:], labels[40:])
    splits = load_data(spec)
    assert splits.name == "MNIST" and not splits.flip and splits.native_size == (28, 28)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (30, 10, 20)
    assert (np.asarray(splits.test[3][0]) == images[43][..., None]).all() and splits.test.labels[3] == 3
    assert splits.test.describe(3) == "MNIST test[3]"
    assert len(load_labelled(spec)) == 20


def test_fashion_mnist_from_debians_package(root, tmp_path, monkeypatch):
    package = tmp_path / "package"
    monkeypatch.setattr("vitalloy.data.named.DEBIAN", package)
    images = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    labels = (np.arange(60) % 10).astype(np.uint8)
    write_idx(package, "train", images[:40], labels[:40])
    write_idx(package, "t10k", images[40:], labels[40:])
    for file in [*package.iterdir()]:
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    splits = load_data("FashionMNIST")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (30, 10, 20) and splits.flip
    assert splits.classes[9] == "Ankle boot" and splits.test.labels[3] == 3
    assert (np.asarray(splits.test[3][0])[..., 0] == images[43]).all()
    (package / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError, match="damaged or missing"):
        load_data("FashionMNIST")


def test_cifar10_from_local_files(root, monkeypatch):
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = [f"thing {i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    # the files are ours, so their checksums are not the published ones
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    splits = load_data("cifar10")
    assert splits.classes == names and splits.flip and splits.native_size == (32, 32)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (80, 20, 20)
    first = np.frombuffer(batch["data"][0].tobytes(), np.uint8).reshape(3, 32, 32)
    assert (np.asarray(splits.test[0][0]).transpose(2, 0, 1) == first).all()


def test_eurosat_keeps_files_and_is_split(root):
    for label, name in enumerate(["Forest", "River"]):
        folder = root / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (64, 64), (label * 200, i, 0)).save(folder / f"{name}_{i}.jpg")
    splits = load_data("EuroSAT")
    assert splits.classes == ["Forest", "River"]
    assert [s.counts() for s in (splits.train, splits.val, splits.test)] == [[3, 3], [1, 1], [1, 1]]
    assert splits.train.describe(0).endswith(".jpg") and splits.train[5][0].getpixel((0, 0))[0] > 190


def test_imagenette_classes_and_its_val_as_test(root):
    for part in ("train", "val"):
        for name in ("n01440764", "n03000684"):
            folder = root / "imagenette2-320" / part / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (40, 30)).save(folder / f"{name}_{i}.JPEG")
    splits = load_data("imagenette")
    assert splits.classes == ["tench", "chain saw"] and len(splits.test) == 8 and splits.native_size == (30, 40)


def test_missing_without_download(root):
    with pytest.raises(DataError, match=r"FashionMNIST.*VITALLOY_DATA"):
        load_data("fashionmnist")


def test_failed_download_is_one_line(root, monkeypatch):
    def no_network(*args, **options):
        raise urllib.error.URLError("no route\nto host")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", no_network)
    with pytest.raises(DataError, match=r"CIFAR100.*download.*failed.*no route to host") as caught:
        load_data("CIFAR100", download=True)
    assert "\n" not in str(caught.value)


def test_damaged_local_copy(root):
    write_idx(root / "MNIST" / "raw", "train", np.zeros((4, 28, 28), np.uint8), np.zeros(4, np.uint8))
    write_idx(root / "MNIST" / "raw", "t10k", np.zeros((4, 28, 28), np.uint8), np.zeros(4, np.uint8))
    (root / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(gzip.compress(b"no"))
    with pytest.raises(DataError, match="damaged"):
        load_data("MNIST")


@pytest.mark.parametrize(
    "spec, words",
    [
        ("digit", ["'digits'", "hf:owner/name"]),
        ("cifar-10", ["'CIFAR10'"]),
        ("torchvision:CIFAR11", ["'CIFAR10'", "Known"]),
        ("torchvision:KITTI", ["Known"]),
        ("", ["No data set"]),
        ("hf:", ["owner/name"]),
    ],
)
def test_unknown_names(spec, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        load_data(spec)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("fractions", [(0.0, 0.1), (0.6, 0.5), (-0.1, 0.2)])
def test_fractions_that_make_no_sense(fractions):
    with pytest.raises(DataError, match="val_fraction"):
        load_data("digits", val_fraction=fractions[0], test_fraction=fractions[1])
