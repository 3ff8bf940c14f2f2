"""Scores against scikit-learn and by hand, their intervals, degradations, and an evaluation that survives a kill."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from skimage.data import astronaut
from sklearn.metrics import f1_score, log_loss, roc_auc_score

from vitalloy.applications.deepfake.data import Labelled
from vitalloy.applications.deepfake.evaluation import (
    DEGRADATIONS,
    evaluate,
    result_rows,
)
from vitalloy.applications.deepfake.faces import Face
from vitalloy.applications.deepfake.metrics import METRICS, frame_metrics, video_metrics
from vitalloy.applications.deepfake.pipeline import FaceScore, Setup, Verdict
from vitalloy.applications.deepfake.results import read_results, summarize_results, write_results
from vitalloy.applications.deepfake.weights import Source
from vitalloy.errors import CheckpointError, DataError


def made_up(videos=60, faces=8, seed=0):
    """Faces whose score depends on the video far more than on the face: (fake, scores, groups)."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(videos), faces)
    fake = group % 2 == 0
    scores = 0.5 + 0.15 * np.where(fake, 1, -1) + 0.2 * rng.standard_normal(videos)[group]
    return fake, np.clip(scores + 0.03 * rng.standard_normal(len(group)), 0, 1), group


def test_metrics_are_those_of_scikit_learn_with_and_without_ties():
    fake, scores, _ = made_up()
    for values in (scores, np.round(scores, 1)):
        got = frame_metrics(fake, values, repeats=0)
        assert got["auc"] == pytest.approx(roc_auc_score(fake, values), abs=1e-12)
        assert got["accuracy"] == pytest.approx(np.mean((values > 0.5) == fake))
        assert got["f1"] == pytest.approx(f1_score(fake, values > 0.5))
        clipped = np.clip(values, 1e-6, 1 - 1e-6)
        assert got["log_loss"] == pytest.approx(log_loss(fake, clipped))
        assert all(got[f"{name}_interval"] is None for name in METRICS)


def test_a_resample_is_measured_as_if_its_videos_were_copied():
    from vitalloy.applications.deepfake.metrics import _measure

    fake, scores, group = made_up(videos=10, faces=3)
    scores = np.round(scores, 1)
    times = np.random.default_rng(1).integers(0, 4, 10)[group]
    assert fake[times > 0].any() and not fake[times > 0].all()
    weighted = _measure(fake, scores, scores > 0.5)(times[None].astype(float))
    copied = frame_metrics(np.repeat(fake, times), np.repeat(scores, times), repeats=0)
    for name in METRICS:
        assert weighted[name][0] == pytest.approx(copied[name], abs=1e-12), name


def test_equal_error_rate_by_hand():
    # thresholds between 0.4 and 0.6: one of four fakes missed, one of four reals accused
    fake = [1, 1, 1, 1, 0, 0, 0, 0]
    assert frame_metrics(fake, [0.9, 0.8, 0.7, 0.3, 0.1, 0.2, 0.4, 0.6], repeats=0)["eer"] == pytest.approx(0.25)
    # 2 fakes, 1 real between them: from (missed 1/2, alarms 1) the curve falls straight to (1/2, 0)
    assert frame_metrics([1, 0, 1], [0.2, 0.5, 0.8], repeats=0)["eer"] == pytest.approx(0.5)
    # one score for all: the straight line from (0, 1) to (1, 0)
    assert frame_metrics([1, 1, 0], [0.5, 0.5, 0.5], repeats=0)["eer"] == pytest.approx(0.5)
    assert frame_metrics([1, 0], [0.9, 0.1], repeats=0)["eer"] == 0.0
    assert frame_metrics([1, 0], [0.1, 0.9], repeats=0)["eer"] == 1.0


def test_intervals_hold_the_value_and_are_wider_for_faces_of_few_videos():
    fake, scores, group = made_up()
    alone, grouped = frame_metrics(fake, scores), frame_metrics(fake, scores, group)
    assert grouped["n_groups"] == 60 and alone["n_groups"] == len(fake)
    for name in METRICS:
        assert alone[name] == grouped[name]
        low, high = grouped[f"{name}_interval"]
        assert low <= grouped[name] <= high
        narrow = alone[f"{name}_interval"]
        assert high - low > 1.5 * (narrow[1] - narrow[0]), name
    assert frame_metrics(fake, scores, group) == grouped, "the same seed, the same interval"
    assert frame_metrics(fake, scores, group, seed=1)["auc_interval"] != grouped["auc_interval"]


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    # normal scores one standard deviation to each side: the true area is Phi(sqrt(2)) = 0.9214
    rng, covered = np.random.default_rng(2), 0
    fake = np.arange(80) % 2 == 0
    for trial in range(100):
        scores = np.where(fake, 1.0, -1.0) + rng.standard_normal(80)
        low, high = frame_metrics(fake, scores, repeats=300, seed=trial)["auc_interval"]
        covered += low <= 0.9214 <= high
    assert 84 <= covered <= 100


def test_what_cannot_be_known_is_none():
    only_fake = frame_metrics([1, 1, 1], [0.9, 0.8, 0.2])
    assert only_fake["accuracy"] == pytest.approx(2 / 3) and only_fake["accuracy_interval"] is not None
    assert only_fake["auc"] is None and only_fake["eer"] is None and only_fake["auc_interval"] is None
    assert frame_metrics([0, 0], [0.1, 0.2])["f1"] is None
    one_real = frame_metrics([1, 1, 0], [0.9, 0.3, 0.4])
    assert one_real["auc"] == 0.5 and one_real["auc_interval"] is None, "one real video cannot be resampled"
    assert one_real["accuracy_interval"] == pytest.approx([0.2077, 0.9385], abs=1e-4)  # Wilson, two of three
    two_fakes = frame_metrics([1, 1, 0, 0, 0, 0], [0.9, 0.3, 0.4, 0.1, 0.2, 0.35])
    assert np.isfinite(two_fakes["auc_interval"]).all(), "every resample has both classes"
    perfect = frame_metrics([1, 1, 0, 0], [0.9, 0.8, 0.2, 0.1])
    assert perfect["auc"] == 1.0 and perfect["auc_interval"] is None
    low, high = perfect["accuracy_interval"]  # Wilson: four of four says little
    assert high == 1.0 and 0.4 < low < 0.6
    assert frame_metrics([], [])["accuracy"] is None
    with pytest.raises(DataError, match="2 meet 1"):
        frame_metrics([1], [0.1, 0.2])
    with pytest.raises(DataError, match="1 of 2"):
        frame_metrics([1, 0], [0.1, float("nan")])


def test_a_thousand_resamples_of_five_thousand_faces_are_quick():
    fake, scores, group = made_up(videos=500, faces=10)
    start = time.process_time()
    frame_metrics(fake, scores, group)
    assert time.process_time() - start < 6  # about 0.7 s on a free core


def row(label, score, fake, kind):
    return {"label": label, "score": score, "fake": fake, "kind": kind}


def test_videos_without_a_face_are_counted_apart():
    rows = [
        row("fake", 0.9, True, "Deepfakes"),
        row("real", 0.3, True, "Deepfakes"),
        row("no face", None, True, "FaceSwap"),
        row("real", 0.1, False, "original"),
        row("real", 0.2, False, "original"),
        row("no face", None, False, "original"),
        row("unreadable", None, False, "original"),
    ]
    got = video_metrics(rows, repeats=50)
    assert (got["videos"], got["n"], got["no_face"], got["unreadable"]) == (7, 4, 2, 1)
    assert got["accuracy"] == 0.75 and got["auc"] == 1.0
    published = got["as_published"]  # both missing faces are called fake with 0.5
    assert published["n"] == 6 and published["accuracy"] == pytest.approx(4 / 6)
    assert published["auc"] == pytest.approx(roc_auc_score([1, 1, 1, 0, 0, 0], [0.9, 0.3, 0.5, 0.1, 0.2, 0.5]))
    kinds = {line["kind"]: line for line in got["by_kind"]}
    assert kinds["Deepfakes"]["accuracy"] == 0.5
    assert kinds["FaceSwap"]["accuracy"] is None and kinds["FaceSwap"]["no_face"] == 1
    assert kinds["original"]["videos"] == 4 and kinds["original"]["correct"] == 2


def test_degradations_keep_the_shape_and_grow():
    photo = astronaut()[:201, 100:253]  # both sides odd
    untouched = photo.copy()
    harm = {}
    for name, degrade in DEGRADATIONS.items():
        got = degrade(photo)
        assert got.shape == photo.shape and got.dtype == np.uint8, name
        assert abs(float(got.mean()) - float(photo.mean())) < 3, "brightness and colour stay"
        harm[name] = np.abs(got.astype(float) - photo).mean()
        assert degrade(photo[:1, :3]).shape == (1, 3, 3)
    np.testing.assert_array_equal(photo, untouched)
    for family in ("jpeg", "h264", "blur"):
        steps = [value for name, value in harm.items() if name.startswith(family)]
        assert len(steps) == 3 and 0.5 < steps[0] < steps[1] < steps[2], family
    assert 0.5 < harm["half size"] < harm["quarter size"]


def verdict(path, label, score):
    crop, face = np.zeros((2, 2, 3), np.uint8), Face(0, 0, 2, 2, None)
    each = () if score is None else (score - 0.05, score + 0.05)
    faces = tuple(FaceScore(i, None, face, 0, {"a": (one, -one)}, one, crop) for i, one in enumerate(each))
    return Verdict(str(path), label, score, faces=faces, frames=2, seconds=2.0)


class Scan:
    """A stand-in for the pipeline: the score is in the file's name, and degrading pulls it towards 0.5."""

    def __init__(self, dies_after=None, frames=15):
        self.calls, self.dies_after = [], dies_after
        source = Source("a", "a.safetensors", "1f", "made up")
        self.setup = Setup((source,), False, False, "cascade", 0.0, frames, 0, "1")

    def __call__(self, path, perturb=None):
        if len(self.calls) == self.dies_after:
            raise KeyboardInterrupt
        self.calls.append((path.name, perturb))
        kind, _, text = path.stem.partition("_")
        if kind == "damaged":
            raise OSError("the index is missing")
        if kind == "landscape":
            return verdict(path, "no face", None)
        score = float(text.split("_")[0])
        if perturb is not None:
            assert perturb(np.zeros((9, 7, 3), np.uint8)).shape == (9, 7, 3)
            score = 0.5 + (score - 0.5) / 2
        return verdict(path, "fake" if score > 0.5 else "real", score)


@pytest.fixture
def videos(tmp_path):
    names = ["v_0.9_a", "v_0.8_b", "v_0.4_c", "damaged_d", "v_0.1_e", "v_0.3_f", "v_0.6_g", "landscape_h"]
    kinds = ["Deepfakes", "FaceSwap", "FaceSwap", "FaceSwap", "original", "original", "original", "original"]
    return [
        Labelled(tmp_path / f"{name}.mp4", kind != "original", kind) for name, kind in zip(names, kinds, strict=True)
    ]


def test_evaluate_measures_videos_faces_time_and_robustness(videos, tmp_path):
    seen, scan = [], Scan()
    got = evaluate(
        videos, scan, degradations=["jpeg 50", "blur 2 px"], repeats=100, advance=lambda *step: seen.append(step)
    )
    assert seen == [(i, 24) for i in range(1, 25)] and len(scan.calls) == 24
    assert got["setup"]["networks"][0]["sha256"] == "1f"
    assert (got["videos"]["n"], got["videos"]["no_face"], got["videos"]["unreadable"]) == (6, 1, 1)
    assert got["videos"]["accuracy"] == pytest.approx(4 / 6) and got["videos"]["auc"] == pytest.approx(8 / 9)
    assert (got["faces"]["n"], got["faces"]["n_groups"]) == (12, 6)
    assert got["time"] == {"n": 7, "median": 2.0, "p90": 2.0}
    assert got["rows"][3]["problem"] == "the index is missing" and got["rows"][3]["label"] == "unreadable"
    for line, name in zip(got["degradations"], ("jpeg 50", "blur 2 px"), strict=True):
        assert line["name"] == name and line["no_face"] == 1 and line["auc"] == pytest.approx(8 / 9)
        assert line["score_change_fake"] == pytest.approx(-(0.4 + 0.3 - 0.1) / 2 / 3)
        assert line["score_change_real"] == pytest.approx((0.4 + 0.2 - 0.1) / 2 / 3)
    assert json.loads(json.dumps(got)) == got

    file = tmp_path / "prediction.json"
    write_results(file, result_rows(got["rows"]))
    summary = summarize_results(read_results(file))
    assert summary["n"] == 7 and summary["accuracy"] == pytest.approx(got["videos"]["as_published"]["accuracy"])
    assert summary["auc"] == pytest.approx(got["videos"]["as_published"]["auc"])


def test_a_killed_evaluation_goes_on_where_it_was(videos, tmp_path):
    file = tmp_path / "run" / "verdicts.jsonl"
    whole = evaluate(videos, Scan(), degradations=["half size"], repeats=50)
    with pytest.raises(KeyboardInterrupt):
        evaluate(videos, Scan(dies_after=6), degradations=["half size"], results=file, repeats=50)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0] == {"setup": whole["setup"]} and len(lines) == 6  # five verdicts; the damaged one is tried again
    assert lines[1]["verdict"]["file"] == str(videos[0].path)
    file.write_bytes(file.read_bytes() + b'{"path": "v_0.3')  # killed in the middle of a line

    scan = Scan()
    assert evaluate(videos, scan, degradations=["half size"], results=file, repeats=50) == whole
    assert len(scan.calls) == 16 - 5 and "v_0.9_a.mp4" not in [name for name, perturb in scan.calls if perturb is None]
    again = Scan()
    evaluate(videos, again, degradations=["half size"], results=file, repeats=50)
    assert {name for name, _ in again.calls} == {"damaged_d.mp4"}

    before = file.read_bytes()
    with pytest.raises(DataError, match=r"frames: 15 there, 30 now.*Give another file"):
        evaluate(videos, Scan(frames=30), results=file)
    assert file.read_bytes() == before
    other = tmp_path / "notes.txt"
    other.write_text("not ours")
    with pytest.raises(DataError, match="not a file of results"):
        evaluate(videos, Scan(), results=other)
    assert other.read_text() == "not ours"


def test_what_cannot_be_evaluated_is_refused(videos):
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate([], Scan())
    with pytest.raises(DataError, match="Did you mean 'jpeg 50'"):
        evaluate(videos, Scan(), degradations=["jpeg50"])

    def without_weights(path):
        raise CheckpointError("the weights are gone")

    with pytest.raises(CheckpointError):
        evaluate(videos, without_weights)
