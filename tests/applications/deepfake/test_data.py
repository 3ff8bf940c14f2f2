"""The published layouts, built from empty files with the published names, and the authors' result files."""

from __future__ import annotations

import json
import logging
from datetime import datetime

import pytest

from vitalloy.applications.deepfake.data import Labelled, read_layout
from vitalloy.applications.deepfake.results import read_results, results_name, summarize_results, write_results
from vitalloy.errors import DataError


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def facts(found, root):
    return {item.path.relative_to(root).as_posix(): (item.fake, item.kind, item.compression) for item in found}


def test_dfdc_parts_with_their_metadata(tmp_path, caplog):
    touch(tmp_path, "dfdc_train_part_0/aa.mp4", "dfdc_train_part_0/bb.mp4", "dfdc_train_part_1/cc.mp4")
    first = {
        "aa.mp4": {"label": "FAKE", "split": "train", "original": "bb.mp4"},
        "bb.mp4": {"label": "REAL", "split": "train"},
        "gone.mp4": {"label": "FAKE", "split": "train", "original": "bb.mp4"},
    }
    (tmp_path / "dfdc_train_part_0/metadata.json").write_text(json.dumps(first))
    (tmp_path / "dfdc_train_part_1/metadata.json").write_text('{"cc.mp4": {"label": "REAL", "split": "val"}}')
    with caplog.at_level(logging.WARNING, "vitalloy"):
        found = read_layout(tmp_path)
    assert facts(found, tmp_path) == {
        "dfdc_train_part_0/aa.mp4": (True, "dfdc", None),
        "dfdc_train_part_0/bb.mp4": (False, "dfdc", None),
        "dfdc_train_part_1/cc.mp4": (False, "dfdc", None),
    }
    assert len(caplog.records) == 1 and "1 of the 4" in caplog.text and "gone.mp4" in caplog.text
    assert [item.path.name for item in read_layout(tmp_path, split="val")] == ["cc.mp4"]
    assert len(read_layout(tmp_path / "dfdc_train_part_0", "dfdc")) == 2, "one part alone"

    (tmp_path / "dfdc_train_part_1/metadata.json").write_text('{"cc.mp4": {"label": "maybe"}}')
    with pytest.raises(DataError, match=r"cc\.mp4 is 'MAYBE'"):
        read_layout(tmp_path)


def test_dfdc_public_test_set(tmp_path):
    touch(tmp_path, "videos/aa.mp4", "videos/bb.mp4")
    (tmp_path / "labels.csv").write_text("filename,label\naa.mp4,0\nbb.mp4,1\n")
    expected = {"videos/aa.mp4": (False, "dfdc", None), "videos/bb.mp4": (True, "dfdc", None)}
    assert facts(read_layout(tmp_path), tmp_path) == expected
    assert facts(read_layout(tmp_path, split="test"), tmp_path) == expected


def test_faceforensics_with_its_official_split(tmp_path):
    touch(
        tmp_path,
        "original_sequences/youtube/c23/videos/953.mp4",
        "original_sequences/youtube/c40/videos/001.mp4",
        "original_sequences/actors/raw/videos/01__exit_phone_room.mp4",
        "manipulated_sequences/Deepfakes/c23/videos/953_974.mp4",
        "manipulated_sequences/Deepfakes/masks/videos/953_974.mp4",
        "manipulated_sequences/NeuralTextures/c40/videos/974_953.mp4",
        "manipulated_sequences/FaceShifter/c0/videos/001_870.mp4",
        "manipulated_sequences/DeepFakeDetection/c23/images/01_02__exit_phone_room/0000.png",
    )
    assert facts(read_layout(tmp_path), tmp_path) == {
        "original_sequences/youtube/c23/videos/953.mp4": (False, "original", "c23"),
        "original_sequences/youtube/c40/videos/001.mp4": (False, "original", "c40"),
        "original_sequences/actors/raw/videos/01__exit_phone_room.mp4": (False, "original", "raw"),
        "manipulated_sequences/Deepfakes/c23/videos/953_974.mp4": (True, "Deepfakes", "c23"),
        "manipulated_sequences/NeuralTextures/c40/videos/974_953.mp4": (True, "NeuralTextures", "c40"),
        "manipulated_sequences/FaceShifter/c0/videos/001_870.mp4": (True, "FaceShifter", "raw"),
        "manipulated_sequences/DeepFakeDetection/c23/images/01_02__exit_phone_room": (True, "DeepFakeDetection", "c23"),
    }
    with pytest.raises(DataError, match=r"test\.json"):
        read_layout(tmp_path, split="test")
    (tmp_path / "test.json").write_text('[["953", "974"], ["012", "026"]]')
    assert [i.path.stem for i in read_layout(tmp_path, split="test")] == ["953_974", "974_953", "953"]


def test_celeb_df_counts_one_as_real(tmp_path):
    touch(
        tmp_path,
        "Celeb-real/id0_0000.mp4",
        "Celeb-real/id0_0001.mp4",
        "YouTube-real/00170.mp4",
        "Celeb-synthesis/id0_id1_0000.mp4",
        "Celeb-synthesis/id0_id1_0001.mp4",
    )
    everything = facts(read_layout(tmp_path), tmp_path)
    assert len(everything) == 5 and everything["YouTube-real/00170.mp4"] == (False, "YouTube-real", None)
    assert everything["Celeb-synthesis/id0_id1_0000.mp4"] == (True, "Celeb-synthesis", None)

    listing = tmp_path / "List_of_testing_videos.txt"
    listing.write_text("1 YouTube-real/00170.mp4\n1 Celeb-real/id0_0000.mp4\n0 Celeb-synthesis/id0_id1_0001.mp4\n")
    test = {(item.path.name, item.fake) for item in read_layout(tmp_path, split="test")}
    assert test == {("00170.mp4", False), ("id0_0000.mp4", False), ("id0_id1_0001.mp4", True)}
    assert len(read_layout(tmp_path, split="train")) == 2
    listing.write_text("0 YouTube-real/00170.mp4\n")  # the other reading of the labels
    with pytest.raises(DataError, match=r"line 1.*1 for the real"):
        read_layout(tmp_path, split="test")


def test_timit_is_all_forged_without_the_reals_beside(tmp_path, caplog):
    touch(tmp_path, "higher_quality/fadg0/sa1-video-fram1.avi", "lower_quality/fadg0/sa1-video-fram1.avi")
    with caplog.at_level(logging.WARNING, "vitalloy"):
        assert [(item.fake, item.kind) for item in read_layout(tmp_path)] == [
            (True, "higher_quality"),
            (True, "lower_quality"),
        ]
    assert "forged videos only" in caplog.text
    touch(tmp_path, "vidtimit/fadg0/video/sa1/001.jpg", "vidtimit/fadg0/video/sa1/002.jpg")
    reals = [item for item in read_layout(tmp_path) if not item.fake]
    assert reals == [Labelled(tmp_path / "vidtimit/fadg0/video/sa1", False, "real")]


def test_class_folders_at_any_depth(tmp_path):
    touch(
        tmp_path,
        "train/fake/crop_1.jpg",
        "train/fake/crop_2.png",
        "train/real/a.mov",
        "valid/1_fake/clip/0.png",
        "valid/1_fake/clip/1.png",
        "valid/0_real/.hidden.mp4",
        "test/fake/FaceSwap/b.mp4",
        "test/original/c.MP4",
        "notes/d.mp4",
    )
    assert facts(read_layout(tmp_path), tmp_path) == {
        "train/fake/crop_1.jpg": (True, "fake", None),
        "train/fake/crop_2.png": (True, "fake", None),
        "train/real/a.mov": (False, "real", None),
        "valid/1_fake/clip": (True, "1_fake", None),
        "test/fake/FaceSwap/b.mp4": (True, "FaceSwap", None),
        "test/original/c.MP4": (False, "original", None),
    }
    assert len(read_layout(tmp_path, split="val")) == 1


def test_labels_csv(tmp_path):
    touch(tmp_path, "x/a.mp4", "x/b.mp4")
    (tmp_path / "labels.csv").write_text("path,label,kind\nx/a.mp4,fake,lip sync\nx/b.mp4,Real,\n")
    assert facts(read_layout(tmp_path), tmp_path) == {
        "x/a.mp4": (True, "lip sync", None),
        "x/b.mp4": (False, "real", None),
    }
    (tmp_path / "labels.csv").write_text("path,label\nx/a.mp4,2\n")
    with pytest.raises(DataError, match="line 2"):
        read_layout(tmp_path)
    (tmp_path / "labels.csv").write_text("x/a.mp4,1\n")
    with pytest.raises(DataError, match="columns path and label"):
        read_layout(tmp_path)


def test_what_fits_nowhere_is_told_what_would(tmp_path):
    touch(tmp_path, "a.mp4")
    with pytest.raises(DataError, match=r"faceforensics.*celeb.*timit.*dfdc.*folders"):
        read_layout(tmp_path)
    with pytest.raises(DataError, match="Did you mean 'celeb'"):
        read_layout(tmp_path, "celebs")
    with pytest.raises(DataError, match="no labelled video"):
        read_layout(tmp_path, "celeb")
    with pytest.raises(DataError, match="no such folder"):
        read_layout(tmp_path / "gone")


ROWS = [
    ("a.mp4", 0.99, "Deepfakes", "FAKE", "FAKE"),
    ("b.mp4", 0.50, "Deepfakes", "FAKE", "FAKE"),  # no face, as the authors write it
    ("c.mp4", 0.40, "Face2Face", "REAL", "FAKE"),
    ("d.mp4", 0.45, "original", "REAL", "REAL"),
    ("e.mp4", 0.01, "original", "REAL", "REAL"),
]


def test_result_files_round_trip_and_recompute(tmp_path):
    rows = [
        dict(zip(("name", "pred", "klass", "pred_label", "correct_label"), row, strict=True), compression="c23")
        for row in ROWS
    ]
    file = tmp_path / results_name("faceforensics", "genconvit", datetime(2023, 7, 15, 8, 41, 22))
    assert file.name == "prediction_faceforensics_genconvit_July_15_2023_08_41_22.json"
    write_results(file, rows)
    raw = json.loads(file.read_text())["video"]
    assert set(raw) == {"name", "pred", "klass", "pred_label", "correct_label", "compression"}
    assert raw["klass"][0] == "deepfakes" and raw["correct_label"][3] == "REAL"
    read = read_results(file)
    assert read == [{**row, "klass": row["klass"].lower()} for row in rows]

    summary = summarize_results(read)
    assert (summary["n"], summary["n_fake"], summary["n_real"]) == (5, 3, 2)
    assert summary["accuracy"] == pytest.approx(4 / 5)
    assert summary["fake_accuracy"] == pytest.approx(2 / 3) and summary["real_accuracy"] == 1.0
    assert summary["auc"] == pytest.approx(5 / 6)  # of the six pairs only c < d is the wrong way round
    assert summary["f1"] == pytest.approx(4 / 5)  # two caught, one missed, no false alarm
    assert {row["kind"]: row["accuracy"] for row in summary["by_kind"]} == {
        "deepfakes": 1.0,
        "face2face": 0.0,
        "original": 1.0,
    }


def test_result_files_as_they_are_found(tmp_path):
    file = tmp_path / "found.json"
    video = {
        "name": ["a", "b", "c"],
        "pred": [0.9, 0.5, 0.2],
        "klass": [["Celeb-synthesis"], ["Celeb-real", "Celeb-synthesis"], "real"],  # as in the published Celeb-DF file
        "correct_label": ["fake", "Real", None],
        "pred_label": [],
    }
    file.write_text(json.dumps({"video": video}))
    rows = read_results(file)
    assert [row["klass"] for row in rows] == ["celeb-synthesis", "celeb-real", "real"]
    assert [row["correct_label"] for row in rows] == ["FAKE", "REAL", "REAL"]
    assert [row["pred_label"] for row in rows] == ["FAKE", "FAKE", "REAL"]
    assert summarize_results(rows)["accuracy"] == pytest.approx(2 / 3)

    file.write_text('{"video": {"name": [], "pred": [], "klass": [], "pred_label": [], "correct_label": []}}')
    assert read_results(file) == [] and summarize_results([])["accuracy"] is None

    file.write_text('{"video": {"name": ["a"], "pred": [0.1, 0.2]}}')
    with pytest.raises(DataError, match="'name' has 1 entries where 2"):
        read_results(file)
    file.write_text('{"video": {"pred": ["high"]}}')
    with pytest.raises(DataError, match="'high', not a number"):
        read_results(file)
    file.write_text("[]")
    with pytest.raises(DataError, match="not a result file"):
        read_results(file)
