"""The deepfake report: every kind of verdict in words, safe with hostile names, bounded in size, honest about demos."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data
from test_html import Page, _contrast

from vitalloy.applications.deepfake.faces import Face
from vitalloy.applications.deepfake.pipeline import FaceScore, Person, Setup, Verdict
from vitalloy.applications.deepfake.weights import Source
from vitalloy.data.video import VideoInfo
from vitalloy.errors import RunError
from vitalloy.report.deepfake import _cards, choose_faces, write_deepfake_report
from vitalloy.report.deepfake_plots import clock, score, timeline

PORTRAIT = data.astronaut()[60:284, 110:334]
SETUP = Setup(
    (Source("a", "mine_a.safetensors", "9f" * 32, "trained on 80 faces"), Source("b", "b.pth", "1c" * 32, "theirs")),
    demo=False, as_published=False, detector="cascade", margin=0.0, frames=15, seed=7, version="0.1.0",
)  # fmt: skip
DEMO = dataclasses.replace(
    SETUP, demo=True, networks=(Source("a", None, None, "untrained"), Source("b", None, None, "untrained"))
)


def face(frame, value, *, time=None, person=0, nets="ab", maps=True, error=0.5):
    """A face on which every network says `value`, a little more and a little less."""
    sure = {net: min(max(value + d, 0.001), 0.999) for net, d in zip(nets, (0.02, -0.02), strict=False)}
    logits = {net: (math.log(v / (1 - v)), math.log((1 - v) / v)) for net, v in sure.items()}
    ramp = np.tile(np.linspace(0, 1, 224, dtype=np.float32), (224, 1))
    pictures = ({net: error * ramp for net in nets}, {net: ramp for net in nets}) if maps else ({}, {})
    return FaceScore(frame, time, Face(5, 5, 60, 60, None), person, logits, value, PORTRAIT, *pictures)


def verdict(file, faces, *, kind="video", problem=None, label=None):
    scores = [f.score for f in faces]
    info = VideoInfo(Path(file), kind, "h264", 640, 360, 300, True, 10.0, 30.0, 0)
    if not faces:
        return Verdict(file, label or "no face", frames=15, info=info, problem=problem)
    people = []
    for number, group in itertools.groupby(sorted(faces, key=lambda f: f.person), key=lambda f: f.person):
        found = [f.score for f in group]
        mean = sum(found) / len(found)
        people.append(Person(number, len(found), mean, "fake" if mean > 0.5 else "real"))
    mean, nets = float(np.mean(scores)), sorted(faces[0].logits)
    alone = {net: min(mean + d, 1.0) for net, d in zip(nets, (0.02, -0.02), strict=False)}
    label = label or ("fake" if mean > 0.5 else "real")
    spread = float(np.std(scores))
    return Verdict(file, label, mean, spread, tuple(faces), tuple(people), 15, info, problem, 2.0, alone)


def clip(file, value, faces=15, **options):
    return verdict(file, [face(10 * k, value, time=k / 3, **options) for k in range(faces)])


FAKE, REAL = clip("/case/fake.mp4", 0.83), clip("/case/real.mp4", 0.12)
NO_FACE = verdict("/case/landscape.mp4", [])
BROKEN = Verdict("/case/broken.mkv", "unreadable", problem="broken.mkv: not a video. Check that the file is whole.")
COUPLE = verdict(
    "/case/couple.mp4", [face(k, v, time=k / 30, person=p) for k in range(10) for p, v in ((0, 0.2), (1, 0.9))],
    problem="2 frames could not be decoded",
)  # fmt: skip


def write(folder, verdicts, setup=SETUP, evaluation=None) -> Page:
    path = write_deepfake_report(verdicts, setup, folder / "out.html", evaluation)
    assert path == folder / "out.html"
    return Page(path.read_text(encoding="utf-8"))


def test_each_kind_of_verdict_is_said_in_words(tmp_path):
    page = write(tmp_path, [FAKE, REAL, NO_FACE, BROKEN, COUPLE])
    assert "2 of 5 videos called fake, 1 real, 1 without a face and 1 unreadable" in page.text
    for said in (
        "Score 0.830 , spread 0.000, from 15 faces in 15 frames; all of the faces lie above 0.5",
        "none of the faces lies above 0.5",
        "No face was found in the 15 frames looked at, so nothing was judged. This is neither real nor fake.",
        "broken.mkv: not a video. Check that the file is whole.",
        "2 frames could not be decoded",
        "network A says 0.850 and network B says 0.810",
        "h264, 640 × 360 pixels, 30 frames a second, 300 frames, 10.0 s long",
    ):
        assert said in page.text, said
    people = re.search(r"2 people.*?</table>", page.html, re.S).group()
    assert "0.200" in people and "0.900" in people and "label real" in people and "label fake" in people
    assert "not proof of authenticity" in page.text and "not a probability" in page.text
    assert "Network A was never trained to redraw the face as it looks" in page.text
    assert "demo" not in page.text.lower()
    levels = [int(t[1]) for t, _ in page.tags if re.fullmatch("h[1-6]", t)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in itertools.pairwise(levels))


@pytest.mark.parametrize("one", [FAKE, REAL, NO_FACE, BROKEN], ids=lambda v: v.label)
def test_a_single_file_gives_the_headline(tmp_path, one):
    said = {"fake": "Called fake: fake.mp4, score 0.830", "real": "Called real: real.mp4, score 0.120"}
    said |= {
        "no face": "No face was found in landscape.mp4",
        "unreadable": "Unreadable: broken.mkv could not be judged",
    }
    assert said[one.label] in write(tmp_path, [one]).text
    assert "nothing was scanned" in write(tmp_path, []).text


def test_page_is_self_contained_and_well_formed(tmp_path):
    page = write(tmp_path, [FAKE, COUPLE, NO_FACE, BROKEN])
    assert not page.wrong and not page.open
    assert "http" not in re.sub(r'src="data:[^"]*"', "", page.html).replace("http-equiv", "")
    assert not re.search(r"url\(|@import|<script|<link|<iframe", page.html) and "default-src 'none'" in page.html
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids)) and all(a["href"][1:] in ids for a in page.all("a"))
    assert all(a["src"].startswith("data:image/jpeg;base64,") and a["alt"] for a in page.all("img"))
    assert all(a["aria-label"] for a in page.all("svg"))
    assert "None" not in page.text and "nan" not in page.text.split() and "Undefined" not in page.text


def test_demo_marks_the_page_and_every_verdict(tmp_path):
    page = write(tmp_path, [FAKE, NO_FACE, COUPLE], DEMO)
    assert "Demo: every number on this page is meaningless" in page.text
    assert "Networks A and B answered with random weights" in page.text
    labels = re.findall(r'<span class="label (?!demo)', page.html)
    assert len(labels) == 3 + 3 + 2 == page.html.count('<span class="label demo">')  # table, sections, people
    assert page.text.count("DEMO: untrained networks, meaningless") == len(page.all("svg")) == 2
    assert re.search("<title>DEMO, meaningless", page.html)
    assert page.html.index('class="alarm"') < page.html.index("<h1")


def test_hostile_names_stay_text(tmp_path):
    nasty = "<script>alert('x')</script>\" & \udcff {{ 7 * 7 }}.mp4"
    hostile = dataclasses.replace(clip(nasty, 0.6, faces=2), problem="<img src=x onerror=alert(1)> \x07")
    setup = dataclasses.replace(SETUP, detector="<b>faces</b>.onnx", networks=(Source("a", nasty, None, "</style>"),))
    page = write(tmp_path, [hostile, NO_FACE], setup, {"degradations": [{"name": "<script>"}]})
    assert not page.wrong and not page.all("script") and "<script" not in page.html and "<b>faces" not in page.html
    assert "<img src=" not in page.html.replace('<img src="data:', "") and page.html.count("</style>") == 1
    shown = nasty.replace("\udcff", "\N{REPLACEMENT CHARACTER}")
    assert shown in page.text and "<b>faces</b>.onnx" in page.text and "\x07" not in page.html
    assert "out.html" in write_deepfake_report([clip(nasty, 0.6)], setup, tmp_path / "out.html").name


def test_six_videos_stay_below_four_megabytes_with_all_pictures(tmp_path):
    page = write(tmp_path, [clip(f"{k}.mp4", 0.1 + 0.15 * k) for k in range(6)])
    assert len(page.html) < 4_000_000 and len(page.all("img")) == 6 * 15 * 5


def test_a_page_of_300_videos_keeps_the_table_and_shows_the_highest_scores(tmp_path):
    base = [clip("x", value) for value in np.linspace(0.02, 0.98, 30)]
    videos = [dataclasses.replace(base[k % 30], file=f"clips/{k:03}.mp4") for k in range(299)] + [BROKEN]
    page = write(tmp_path, videos)
    assert len(page.html) < 4_000_000
    assert len(re.findall('<tr><td class="file">', page.html)) == 300
    shown = len(page.all("article"))
    assert 10 < shown < 100 and f"Pictures and plots are below for {shown} of the 300 videos" in page.text
    lowest = min(float(x) for x in re.findall("Score <b>(.*?)</b>", page.html))
    assert lowest > 0.85
    assert "6 of 15 faces" in page.text


def test_faces_are_shown_by_time_with_the_most_fake_ones_among_them(tmp_path):
    scores = np.random.default_rng(0).permutation(120) / 120
    faces = [face(k, float(s), time=k / 4) for k, s in enumerate(scores)]
    shown = choose_faces(faces[::-1], 24)
    frames = [f.frame for f in shown]
    assert len(frames) == 24 and frames == sorted(set(frames))
    assert set(np.argsort(-scores)[:8]) <= set(frames)
    assert frames[0] < 10 and frames[-1] > 110 and max(np.diff(frames)) < 15
    assert choose_faces(faces[10:0:-1], 24) == faces[1:11]
    page = write(tmp_path, [verdict("long.mp4", faces)])
    assert "24 of 120 faces" in page.text and "96 are left out" in page.text and len(page.all("img")) == 24 * 5


def test_timeline_has_a_dot_a_face_and_a_mark_a_network():
    plot = str(timeline(COUPLE))
    assert plot.count('class="dot face p0"') == plot.count('class="dot face p1"') == 10
    assert plot.count("<title>person 2, frame 3, 0.10 s: score 0.900, A 0.920, B 0.880</title>") == 1
    triangles, squares = (re.search(f'd="([^"]*)" class="net {net}"', plot).group(1) for net in "ab")
    assert triangles.count("M") == squares.count("M") == 20
    plot = str(timeline(clip("a.mp4", 0.7, nets="a")))
    assert plot.count('class="dot face copper"') == 15 and 'class="net' not in plot
    assert str(timeline(REAL)).count('class="dot face teal"') == 15
    heights = [float(cy) for cy in re.findall('cy="([^"]*)"', plot)]
    assert heights == pytest.approx([236 - 0.7 * 198] * 15, abs=0.01)
    stills = verdict("folder", [face(k, 0.3) for k in range(4)], kind="images")
    assert ">frame</text>" in str(timeline(stills)) and "0.00 s" not in str(timeline(stills))
    many = str(timeline(clip("a.mp4", 0.7, faces=2000, maps=False)))
    assert "<circle" not in many and len(many) < 200_000 and 'class="spots copper"' in many
    assert timeline(NO_FACE) is None and timeline(verdict("still.png", [face(0, 0.4)])) is None


def test_error_maps_of_a_network_share_one_scale():
    def brightness(picture):
        raw = base64.b64decode(picture["uri"].split(",")[1])
        return np.asarray(Image.open(io.BytesIO(raw)).convert("L"), float).mean()

    weak, strong = face(0, 0.5, error=0.1), face(1, 0.5, error=1.0)
    cards = _cards(verdict("x.mp4", [weak, strong]), [weak, strong])
    kinds = [(m["net"], m["kind"]) for m in cards[0]["maps"]]
    assert kinds == [("A", "error"), ("B", "error"), ("A", "saliency"), ("B", "saliency")]
    assert brightness(cards[0]["maps"][0]) < 0.6 * brightness(cards[1]["maps"][0])
    broken = dataclasses.replace(weak, errors={"a": np.full((224, 224), np.nan, np.float32)})
    assert len(_cards(verdict("x.mp4", [broken]), [broken])[0]["maps"]) == 3


def test_without_maps_the_page_does_not_explain_them(tmp_path):
    page = write(tmp_path, [clip("x.mp4", 0.7, maps=False)])
    assert len(page.all("img")) == 15 and "Reconstruction error" not in page.text and "Saliency" not in page.text


def test_page_names_weights_and_behaviour(tmp_path):
    ours = write(tmp_path, [FAKE])
    for fact in (
        "mine_a.safetensors",
        "9f" * 32,
        "1c" * 32,
        "trained on 80 faces",
        "cascade",
        "15, evenly spaced",
    ):
        assert fact in ours.text, fact
    command = "vitalloy deepfake VIDEOS --net ab --weights mine_a.safetensors b.pth --frames 15 --seed 7"
    assert command in ours.text and command + " --as-published" not in ours.text
    assert "the same score every time" in ours.text and "is a verdict of its own" in ours.text
    empty = dataclasses.replace(NO_FACE, label="fake", score=0.5)
    theirs = write(tmp_path, [empty, FAKE], dataclasses.replace(SETUP, as_published=True))
    for fact in (
        "red and blue exchanged",
        "with seed 7",
        "counts as fake with score 0.5",
        "At most as many faces as",
        "--as-published",
    ):
        assert fact in theirs.text, fact
    assert "1 of the fake verdicts rests on no face at all" in theirs.text and "and no finding" in theirs.text


def test_disagreement_is_pointed_out(tmp_path):
    split = dataclasses.replace(FAKE, networks={"a": 0.9, "b": 0.3})
    assert "The two networks disagree" in write(tmp_path, [split]).text
    assert "The two networks disagree" not in write(tmp_path, [FAKE]).text
    low = dataclasses.replace(REAL, label="fake")  # the mean for fake is 0.12 and that for real lower still
    assert "Treat this as undecided" in write(tmp_path, [low]).text


def test_evaluation_is_shown_as_far_as_it_goes(tmp_path):
    from vitalloy.applications.deepfake.metrics import frame_metrics, video_metrics

    rows = [
        {
            "fake": k % 2 == 0,
            "score": s,
            "label": "fake" if s > 0.5 else "real",
            "kind": "swap" if k % 2 == 0 else "own",
        }
        for k, s in enumerate((0.9, 0.2, 0.8, 0.6, 0.4, 0.1, 0.7, 0.3))
    ]
    fake, scores = [r["fake"] for r in rows], [r["score"] for r in rows]
    videos = video_metrics(rows, repeats=50)
    found = {
        "videos": videos,
        "faces": frame_metrics(fake, scores, repeats=50),
        "degradations": [{"name": "jpeg 30", **videos, "score_change_fake": -0.25, "score_change_real": 0.125}],
        "rows": rows,
    }
    page = write(tmp_path, [FAKE], evaluation=found)
    assert "Measured on 8 labelled videos: 8 got a verdict (4 fake, 4 real)" in page.text
    assert "75.0%" in page.text and "0.938" in page.text and "swap" in page.text  # 15 of 16 pairs are in order
    assert "jpeg 30" in page.text and "−0.250" in page.text and "+0.125" in page.text
    assert any("ROC" in a["aria-label"] for a in page.all("svg"))
    for part in ({}, {"videos": None}, {"videos": {}, "faces": {}}):
        assert "How often it is right" not in write(tmp_path, [FAKE], evaluation=part).text
    page = write(tmp_path, [FAKE], evaluation={"faces": {"auc": 0.8}})
    assert "0.800" in page.text and "None" not in page.text and not page.wrong


def test_both_colour_schemes_have_every_colour_and_enough_contrast(tmp_path):
    html = write(tmp_path, [FAKE]).html
    light, dark = ({}, {})
    for media, root in re.findall(r"(@media [^{]*\{\s*)?:root \{(.*?)\}", html, re.S):
        if "print" not in media:
            (dark if media else light).update(re.findall(r"--(\w+): (#\w+);", root))
    assert set(light) == set(dark) and {"p0", "p5", "paper", "copper"} <= set(light)
    for scheme in (light, dark):
        for colour in ("copper", *(f"p{k}" for k in range(6))):  # banner, labels and numbers on them
            assert _contrast(scheme[colour], scheme["paper"]) > 4.5, colour
    assert set(re.findall(r"var\(--(\w+)\)", html)) <= set(light) | {"serif", "sans", "mono"}
    assert "@media print" in html


def test_numbers_do_not_round_to_certainty():
    assert [score(x) for x in (0.9999, 0.49996, 0.5, 1.0, 0.1234, None)] == [
        "0.9999", "0.49996", "0.500", "1.000", "0.123", "–",
    ]  # fmt: skip
    assert [clock(t) for t in (3.2, 64.5, 7231, None)] == ["3.20 s", "1:04.5", "2:00:31", "–"]


def test_a_page_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    write(tmp_path, [FAKE])
    before = (tmp_path / "out.html").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RunError, match="No space left"):
        write(tmp_path, [REAL])
    assert (tmp_path / "out.html").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(RunError, match="No such file"):
        write_deepfake_report([REAL], SETUP, tmp_path / "nowhere" / "out.html")
