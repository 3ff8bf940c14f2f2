"""From a video file to a verdict: frames, faces, scores, and one answer that says what it rests on.

The course is the published one: evenly spaced frames, every face cropped to its box, 224 pixels, both networks, the
mean of their answers. Where the published code would mislead we depart from it by default: network B takes the mean of
its latent instead of a draw, a video without a face is "no face" and not fake, one network alone runs when one was
asked for, faces in all frames count and not the first so many, frames are not repeated in short clips, and the face
detector sees colours in their order. `as_published=True` gives the authors' behaviour back, with a seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import vitalloy
from vitalloy.applications.deepfake.faces import (
    DlibDetector,
    Face,
    FaceDetector,
    create_detector,
    crop_face,
    link_faces,
)
from vitalloy.applications.deepfake.inspection import Inspection, inspect
from vitalloy.applications.deepfake.model import CLASSES, Network, normalize
from vitalloy.applications.deepfake.weights import Source
from vitalloy.data.films import Film, Frame, VideoInfo
from vitalloy.data.video import Stills, open_frames
from vitalloy.errors import DataError, ModelError

FRAMES = 15
BATCH = 16  # faces at a time
PICTURES = 120  # frames of a video whose faces keep their pictures
NO_FACE, UNREADABLE = "no face", "unreadable"


class Vote(NamedTuple):
    """The authors' aggregate of logits: mean sigmoids (2,) of fake and real, the class they favour, the score."""

    means: Tensor
    index: int
    score: float


def vote(logits: Tensor) -> Vote:
    """Logits (N, 2) of all faces and networks -> one answer, as the published code aggregates them.

    The sigmoids of fake and real are averaged one by one, so that they need not sum to one. The score is the mean for
    fake where that is larger, otherwise one minus the mean for real: near 1 for fakes, near 0 for genuine videos.
    """
    means = logits.sigmoid().mean(0)
    fake, real = means.tolist()
    return Vote(means, int(real > fake), fake if fake > real else abs(1 - real))


@dataclass(frozen=True)
class FaceScore:
    """One face of one frame and what the networks said of it.

    Attributes:
        frame, time: number of the frame, and its time in seconds where it has one.
        person: number that faces at the same place share.
        logits: network -> (fake, real).
        score: the vote on this face alone.
        crop: what the networks saw, (S, S, 3) uint8 RGB; in a scan of very many frames only some faces keep it.
        errors, saliency: network -> maps (S, S) of `Inspection`, where they were asked for and the crop was kept.
    """

    frame: int
    time: float | None
    face: Face
    person: int
    logits: dict[str, tuple[float, float]]
    score: float
    crop: np.ndarray | None = field(default=None, repr=False, compare=False)
    errors: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    saliency: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        plain = {k: getattr(self, k) for k in ("frame", "time", "person", "score", "logits")}
        return plain | {"face": asdict(self.face)}


@dataclass(frozen=True)
class Person:
    """The vote on the faces that were found at one place."""

    number: int
    faces: int
    score: float
    label: str


@dataclass(frozen=True)
class Verdict:
    """What was found in one video.

    Attributes:
        label: "fake", "real", "no face" or "unreadable".
        score: the vote on all faces, near 1 for fake; None where there was nothing to judge.
        spread: standard deviation of the faces' scores.
        people: a row for each place at which faces were found.
        frames: how many frames were looked at.
        problem: what was odd, or why nothing could be read.
        networks: the score that each network alone would have given.
    """

    file: str
    label: str
    score: float | None = None
    spread: float | None = None
    faces: tuple[FaceScore, ...] = ()
    people: tuple[Person, ...] = ()
    frames: int = 0
    info: VideoInfo | None = None
    problem: str | None = None
    seconds: float = 0.0
    networks: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without pictures."""
        plain = {k: getattr(self, k) for k in ("file", "label", "score", "spread", "frames", "problem", "networks")}
        video = None if self.info is None else {**asdict(self.info), "path": str(self.info.path)}
        return plain | {
            "seconds": round(self.seconds, 3),
            "people": [asdict(p) for p in self.people],
            "faces": [f.as_dict() for f in self.faces],
            "video": video,
        }


@dataclass(frozen=True)
class Setup:
    """What made the verdicts; with the weight files it repeats them."""

    networks: tuple[Source, ...]
    demo: bool
    as_published: bool
    detector: str
    margin: float
    frames: int
    seed: int
    version: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Scanner:
    """Looks at videos: `scanner(path)` is the verdict on one.

    Args:
        networks: from `open_networks`.
        detector: "auto", "cascade", "dlib", the path of an ONNX face detector, or a detector.
        frames: how many evenly spaced frames to look at; -1 for all.
        margin: how much of a face's side to add around it; the published networks were trained with 0.
        as_published: repeat what the authors' code does, see above.
        inspect: keep the redrawing's error and the saliency of each face, for the report.
        seed: of network B's draws, `as_published` only.
    """

    def __init__(
        self,
        networks: Iterable[tuple[Network, Source]],
        *,
        detector: str | FaceDetector = "auto",
        frames: int = FRAMES,
        margin: float = 0.0,
        as_published: bool = False,
        inspect: bool = False,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        opened = list(networks)
        if not opened:
            raise ValueError("a scanner needs one network or two")
        if frames == 0 or frames < -1:
            raise DataError(f"frames={frames}: give 1 or more, or -1 for all.")
        sizes = {network.img_size for network, _ in opened}
        if len(sizes) > 1:
            raise ModelError(f"these networks take faces of different sizes ({sizes} pixels): run them one at a time.")
        try:
            self.networks = [network.to(device) for network, _ in opened]
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"device {device!r} cannot be used here ({reason}). Leave it out for the CPU.") from error
        self.device, self.inspect, self.as_published = device, inspect, as_published
        if as_published and detector == "auto":
            detector = DlibDetector(bgr=True)
        self.detector = create_detector(detector) if isinstance(detector, str) else detector
        sources = tuple(source for _, source in opened)
        demo = any(source.file is None for source in sources)
        self.setup = Setup(sources, demo, as_published, self.detector.name, margin, frames, seed, vitalloy.__version__)

    def __call__(self, path: str | Path, perturb: Callable[[np.ndarray], np.ndarray] | None = None) -> Verdict:
        """The verdict on a video, an image, or a folder of images that counts as a video.

        Args:
            perturb: changes each frame (H, W, 3) before anything looks at it.
        """
        start = time.perf_counter()
        try:
            frames = open_frames(path, self.setup.frames)
            looked, found = self._look(frames, perturb)
        except DataError as error:
            return Verdict(str(path), UNREADABLE, problem=str(error), seconds=time.perf_counter() - start)
        known: dict[str, Any] = {"frames": looked, "info": frames.info, "problem": frames.info.problem}
        if found:
            known |= self._judged(found)
        elif self.as_published:
            known |= {"label": CLASSES[0], "score": 0.5}
        else:
            known["label"] = NO_FACE
        return Verdict(str(path), **known, seconds=time.perf_counter() - start)

    def _look(self, frames: Film | Stills, perturb: Callable | None) -> tuple[int, list[FaceScore]]:
        """How many frames there were, and their faces with what the networks say of them."""
        looked, boxes, found, waiting = 0, [], [], []
        most, size = len(frames.positions), self.networks[0].img_size
        draws = torch.Generator().manual_seed(self.setup.seed)  # the same for every video, in whatever order
        stride = -(-most // PICTURES)
        for frame in frames:
            image = frame.image if perturb is None else perturb(frame.image)
            faces, keep = self.detector(image), looked % stride == 0
            looked += 1
            boxes.append(faces)
            repeats = frames.positions.count(frame.index) if self.as_published else 1
            waiting += [
                (frame, face, crop_face(image, face, size, self.setup.margin), keep) for face in faces
            ] * repeats
            while len(waiting) >= BATCH:
                found += self._ask(waiting[:BATCH], draws)
                waiting = waiting[BATCH:]
        found += self._ask(waiting, draws) if waiting else []
        if self.as_published:
            return looked, found[:most]
        people = (number for numbers in link_faces(boxes) for number in numbers)
        return looked, [replace(face, person=number) for face, number in zip(found, people, strict=True)]

    def _ask(self, batch: list[tuple[Frame, Face, np.ndarray, bool]], draws: torch.Generator) -> list[FaceScore]:
        """What each network says of faces (frame, face, crop, whether to keep pictures)."""
        image = normalize(np.stack([crop for _, _, crop, _ in batch])).to(self.device)
        logits: dict[str, Tensor] = {}
        maps: dict[str, Inspection] = {}
        for network in self.networks:
            eps = ()
            if self.as_published and network.net == "b":
                eps = (torch.randn(len(batch), network.latent_dims, generator=draws).to(self.device),)
            if self.inspect and isinstance(network, Network) and any(keep for *_, keep in batch):
                maps[network.net] = inspect(network, image, *eps)
                logits[network.net] = maps[network.net].logits.float().cpu()
            else:
                with torch.inference_mode():
                    logits[network.net] = network(image, *eps).float().cpu()
        return [
            FaceScore(
                frame.index,
                frame.time,
                face,
                0,
                {net: tuple(rows[i].tolist()) for net, rows in logits.items()},
                vote(torch.stack([rows[i] for rows in logits.values()])).score,
                crop if keep else None,
                {net: found.errors[i].cpu().numpy() for net, found in maps.items() if keep},
                {net: found.saliency[i].cpu().numpy() for net, found in maps.items() if keep},
            )
            for i, (frame, face, crop, keep) in enumerate(batch)
        ]

    def _judged(self, faces: list[FaceScore]) -> dict[str, Any]:
        """Label, score and the rest of a verdict by its faces."""
        rows = {net.net: torch.tensor([face.logits[net.net] for face in faces]) for net in self.networks}
        whole, numbers = vote(torch.cat(list(rows.values()))), torch.tensor([face.person for face in faces])
        people = []
        for number in numbers.unique().tolist():
            theirs = vote(torch.cat([logits[numbers == number] for logits in rows.values()]))
            people.append(Person(number, int((numbers == number).sum()), theirs.score, CLASSES[theirs.index]))
        return {
            "label": CLASSES[whole.index],
            "score": whole.score,
            "spread": float(np.std([face.score for face in faces])),
            "faces": tuple(faces),
            "people": tuple(people),
            "networks": {net: vote(logits).score for net, logits in rows.items()},
        }
