"""From videos to verdicts: what is looked at, how scores come about, and every answer that is not fake or real."""

from __future__ import annotations

import json

import clips
import numpy as np
import pytest
import torch
from PIL import Image

from vitalloy.applications.deepfake import NetworkA, NetworkB, Scanner, Source, vote
from vitalloy.applications.deepfake.faces import Face
from vitalloy.applications.deepfake.model import normalize
from vitalloy.data.video import sample_frames
from vitalloy.errors import DataError, ModelError

SIZE = 64


class Boxes:
    """Finds the same faces in every frame."""

    name = "boxes"

    def __init__(self, *boxes: tuple[int, int, int, int]) -> None:
        self.faces, self.seen = [Face(*box) for box in boxes], []

    def __call__(self, image: np.ndarray) -> list[Face]:
        self.seen.append(image)
        return self.faces


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    made = [NetworkA("pvt_v2_nano", SIZE), NetworkB("pvt_v2_nano", SIZE)]
    for network in made:
        torch.nn.init.normal_(network.fc2.weight)  # scores that differ from face to face
    return [(network.eval(), Source(network.net, "file", "0" * 64, "nothing")) for network in made]


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Forty frames of the portrait, panned over."""
    path = tmp_path_factory.mktemp("film") / "portrait.mp4"
    clips.write(path, clips.moving(clips.portrait(), 40, (256, 256), "pan"))
    return path


def test_the_score_is_the_vote_on_the_faces_of_evenly_spaced_frames(networks, film):
    box = (70, 20, 170, 130)
    verdict = Scanner(networks, detector=Boxes(box), frames=5)(film)
    _, frames = sample_frames(film, 5)
    assert [face.frame for face in verdict.faces] == [0, 9, 19, 29, 39]
    for face, frame in zip(verdict.faces, frames, strict=True):
        cut = frame.image[box[1] : box[3], box[0] : box[2]]
        shrunk = np.asarray(Image.fromarray(cut).resize((SIZE, SIZE), Image.Resampling.BOX), float)
        assert np.abs(face.crop - shrunk).mean() < 3
        assert face.time == pytest.approx(frame.time)
    image = normalize(np.stack([face.crop for face in verdict.faces]))
    with torch.no_grad():
        rows = [network(image) for network, _ in networks]
    assert verdict.score == pytest.approx(vote(torch.cat(rows)).score, abs=1e-4)
    assert verdict.networks == pytest.approx({"a": vote(rows[0]).score, "b": vote(rows[1]).score}, abs=1e-4)
    assert verdict.label == ("fake", "real")[vote(torch.cat(rows)).index]
    assert verdict.spread == pytest.approx(np.std([face.score for face in verdict.faces]))
    assert verdict.spread > 0


def test_a_verdict_is_the_same_every_time_and_in_any_order(networks, film, tmp_path):
    other = tmp_path / "other.mp4"
    clips.write(other, clips.carphone_frames(20))
    for as_published in (False, True):
        options = {"detector": Boxes((10, 10, 90, 90)), "frames": 3, "as_published": as_published}
        first, again = Scanner(networks, **options), Scanner(networks, **options)
        again(other)
        assert first(film).score == again(film).score
        assert first.setup == again.setup


def test_real_faces_are_found_by_the_detector_of_the_house(networks, film):
    verdict = Scanner(networks[:1], detector="cascade", frames=4)(film)
    assert verdict.label in ("fake", "real")
    assert len(verdict.faces) == 4
    assert verdict.people[0].faces == 4
    assert list(verdict.networks) == ["a"]


def test_no_face_is_an_answer_of_its_own(networks, tmp_path):
    path = tmp_path / "bricks.mp4"
    clips.write(path, clips.no_face(20))
    verdict = Scanner(networks, detector="cascade", frames=5)(path)
    assert (verdict.label, verdict.score, verdict.frames) == ("no face", None, 5)


def test_as_published_a_missing_face_is_fake(networks, film):
    verdict = Scanner(networks, detector=Boxes(), frames=3, as_published=True)(film)
    assert (verdict.label, verdict.score, verdict.faces) == ("fake", 0.5, ())


def test_as_published_network_b_draws_with_the_seed(networks, film):
    def score(**options):
        return Scanner(networks[1:], detector=Boxes((60, 20, 180, 140)), frames=3, **options)(film).score

    assert score(as_published=True, seed=1) == score(as_published=True, seed=1)
    assert score(as_published=True, seed=1) != score(as_published=True, seed=2)
    assert score(seed=1) == score(seed=2)


def test_two_people_and_the_published_limit(networks, film):
    two = Boxes((10, 20, 90, 110), (150, 20, 240, 110))
    verdict = Scanner(networks, detector=two, frames=4)(film)
    assert [(person.number, person.faces) for person in verdict.people] == [(0, 4), (1, 4)]
    assert len({person.score for person in verdict.people}) == 2
    published = Scanner(networks, detector=two, frames=4, as_published=True)(film)
    assert [face.frame for face in published.faces] == [0, 0, 13, 13]  # as many faces as frames, then no more


def test_a_short_clip_is_not_counted_twice(networks, tmp_path):
    path = tmp_path / "short.mp4"
    clips.write(path, clips.moving(clips.portrait(), 3, (128, 128)))
    box = Boxes((20, 20, 100, 100))
    assert [f.frame for f in Scanner(networks[:1], detector=box, frames=7)(path).faces] == [0, 1, 2]
    published = Scanner(networks[:1], detector=box, frames=7, as_published=True)(path)
    assert [f.frame for f in published.faces] == [0, 0, 0, 1, 1, 1, 2]
    assert len(Scanner(networks[:1], detector=box, frames=-1)(path).faces) == 3


def test_one_face_of_a_still_image_and_a_folder(networks, tmp_path):
    for i in range(3):
        Image.fromarray(clips.portrait()).save(tmp_path / f"{i}.png")
    box = Boxes((150, 50, 300, 200))
    still = Scanner(networks[:1], detector=box)(tmp_path / "0.png")
    assert len(still.faces) == 1
    assert still.faces[0].time is None
    assert len(Scanner(networks[:1], detector=box, frames=2)(tmp_path).faces) == 2


def test_pictures_for_the_report(networks, film):
    plain = Scanner(networks, detector=Boxes((60, 20, 180, 140)), frames=3)(film)
    shown = Scanner(networks, detector=Boxes((60, 20, 180, 140)), frames=3, inspect=True)(film)
    assert shown.score == pytest.approx(plain.score, abs=1e-4)
    for face in shown.faces:
        assert {net: maps.shape for net, maps in face.errors.items()} == {"a": (SIZE, SIZE), "b": (SIZE, SIZE)}
        assert set(face.saliency) == {"a", "b"}
    assert plain.faces[0].errors == {}


def test_frames_are_perturbed_before_anything_looks_at_them(networks, film):
    box = Boxes((60, 20, 180, 140))
    dark = Scanner(networks, detector=box, frames=2)(film, perturb=np.zeros_like)
    assert not any(image.any() for image in box.seen)
    assert not dark.faces[0].crop.any()


def test_what_cannot_be_read_is_a_verdict_too(networks, tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("no film")
    scanner = Scanner(networks)
    verdict = scanner(text)
    assert verdict.label == "unreadable"
    assert "not a video" in verdict.problem
    assert scanner(clips.write_audio(tmp_path / "sound.mp4")).label == "unreadable"


def test_a_verdict_is_plain_json(networks, film):
    scanner = Scanner(networks, detector=Boxes((60, 20, 180, 140)), frames=2)
    text = json.loads(json.dumps({"setup": scanner.setup.as_dict(), "verdict": scanner(film).as_dict()}))
    box = {"left": 60, "top": 20, "right": 180, "bottom": 140, "confidence": None}
    assert text["verdict"]["faces"][1]["face"] == box
    assert text["setup"]["networks"][0]["sha256"] == "0" * 64


def test_options_that_make_no_sense(networks):
    with pytest.raises(DataError, match="frames=0"):
        Scanner(networks, frames=0)
    with pytest.raises(ModelError, match="different sizes"):
        Scanner([networks[0], (NetworkB("pvt_v2_nano", 96), networks[1][1])])
