"""From a folder to faces to train on: labels, three parts that share no person, faces cut from videos.

Read are the published data sets and class folders that `data.read_layout` knows, and folders of real faces alone. A
data set's own division is kept. Otherwise whole videos and whole folders of pictures are dealt to the parts, since
two frames of one video are nearly the same picture, and a detector that has seen one of them knows the other by heart.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitalloy.applications.deepfake.augmentation import augment
from vitalloy.applications.deepfake.data import LAYOUTS, SPLITS, read_layout
from vitalloy.applications.deepfake.faces import Face, create_detector, crop_face
from vitalloy.applications.deepfake.forgeries import look
from vitalloy.applications.deepfake.model import CLASSES, normalize
from vitalloy.data import IMAGE_SUFFIXES, ImageSet
from vitalloy.data.image_set import CACHE_BYTES, Files
from vitalloy.data.video import VIDEO_SUFFIXES, sample_frames
from vitalloy.errors import DataError

log = logging.getLogger("vitalloy")

FAKE, REAL = (CLASSES.index(name) for name in ("fake", "real"))
SHARES = {"val": 0.15, "test": 0.15}  # of the people or videos, where the data is not divided; at least one each
CANDIDATES = 3  # other faces looked at for one of similar look
SWAPS = 0.3  # share of the forgeries whose source is another person
_PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"} | {
    **dict.fromkeys(("test", "testing"), "test")
}
Forge = Callable[[np.ndarray, np.random.Generator, "np.ndarray | None"], tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Sample:
    """A picture of a face (or a video of one), its class, and the name of the person or video it belongs to."""

    path: Path
    label: int
    group: str


def read_samples(root: str | Path, *, seed: int = 1, grouped: bool = True) -> dict[str, list[Sample]]:
    """What lies below `root`, as the parts "train", "val" and "test"; the last is empty where the data has none.

    Pictures in one folder below their class folder belong together, and so do pictures beside each other whose names
    differ in the last number only (anna_001.png, anna_002.png), real or fake. Without any fake ones in the data, the
    forgeries are to be made.

    Args:
        seed: of the division, where the data has none.
        grouped: False takes every picture for another person's.

    Raises:
        DataError: the folder holds nothing to train on, too little to divide, or a part without one of the classes.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(
            f"{root}: there is no such folder. Give a folder of faces or videos, real and fake or real only."
        )
    known = any(recognise(root) for recognise, _, _ in LAYOUTS.values())
    parts = {name: _division(root, name, grouped) if known else [] for name in SPLITS}
    if not parts["train"]:
        whole = _labelled(root, None, grouped) if known else _real_only(root, grouped)
        parts = _by_folder(root, whole) or _divide(root, whole, SHARES, seed)
    if not parts["val"]:
        parts |= _divide(root, parts["train"], {"val": SHARES["val"]}, seed)
    _check(root, parts)
    return parts


def _division(root: Path, split: str, grouped: bool) -> list[Sample]:
    """A part as the data set itself has it; empty where it is not divided so."""
    try:
        return _labelled(root, split, grouped)
    except DataError as error:
        log.debug("%s", error)
        return []


def _labelled(root: Path, split: str | None, grouped: bool) -> list[Sample]:
    samples = []
    for item in read_layout(root, split=split):
        files = _images(item.path) if item.path.is_dir() else [item.path]
        samples += [_sample(root, file, FAKE if item.fake else REAL, grouped) for file in files]
    return samples


def _real_only(root: Path, grouped: bool) -> list[Sample]:
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES)
    files = [path for path in files if not any(p.startswith((".", "__MACOSX")) for p in path.relative_to(root).parts)]
    if not files:
        raise DataError(
            f"{root}: no images and no videos in this folder. Put real and forged ones into {root.name}/real and "
            f"{root.name}/fake, or real ones alone anywhere below it."
        )
    return [_sample(root, file, REAL, grouped) for file in files]


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != ".")


def _sample(root: Path, path: Path, label: int, grouped: bool) -> Sample:
    inside = path.relative_to(root) if path.is_relative_to(root) else path
    folders = [name for name in inside.parts[:-1] if name.lower() not in _PARTS and name.lower() not in CLASSES]
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return Sample(path, label, "/".join([*folders, path.stem]))
    if not grouped:
        return Sample(path, label, inside.as_posix())
    return Sample(path, label, "/".join(folders) or re.sub(r"[_\-. ]+\d+$", "", path.stem))


def _by_folder(root: Path, samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """The parts of real faces alone that lie in folders train, val and test; empty where they do not."""
    parts: dict[str, list[Sample]] = {name: [] for name in SPLITS}
    for sample in samples:
        top = sample.path.relative_to(root).parts[0].lower() if sample.path.is_relative_to(root) else ""
        if top in _PARTS:
            parts[_PARTS[top]].append(sample)
    return parts if parts["train"] else {}


def _divide(root: Path, samples: Sequence[Sample], shares: dict[str, float], seed: int) -> dict[str, list[Sample]]:
    """Whole groups dealt to the parts; groups with real, with fake and with both are dealt apart."""
    labels: dict[str, set[int]] = {}
    for sample in samples:
        labels.setdefault(sample.group, set()).add(sample.label)
    part_of: dict[str, str] = {}
    for kind in ({REAL}, {FAKE}, {REAL, FAKE}):
        groups = sorted(group for group, found in labels.items() if found == kind)
        dealt = np.random.default_rng([seed, len(kind), min(kind)]).permutation(groups).tolist()
        for name, share in shares.items():
            count = max(1, round(share * len(groups))) if len(groups) > len(shares) else 0
            part_of |= dict.fromkeys(dealt[:count], name)
            dealt = dealt[count:]
        part_of |= dict.fromkeys(dealt, "train")
    parts = {name: [s for s in samples if part_of[s.group] == name] for name in ("train", *shares)}
    for label in sorted({sample.label for sample in samples}):
        if not all(any(sample.label == label for sample in part) for part in parts.values()):
            groups = sorted(group for group, found in labels.items() if label in found)
            raise DataError(
                f"{root}: the {CLASSES[label]} faces are of {len(groups)} videos or people ({', '.join(groups[:3])}), "
                f"too few to train on some and judge on others; at least {len(shares) + 1} are needed. If each picture "
                "shows another person, say so (--ungrouped, grouped=False); else add people, or a division into parts."
            )
    return parts


def _check(root: Path, parts: dict[str, list[Sample]], empty: Sequence[str] = ()) -> None:
    found = {name: {sample.label for sample in part} for name, part in parts.items() if part or name in empty}
    self_made = not any(FAKE in labels for labels in found.values())
    if self_made and (folders := [p for p in (*root.glob("*"), *root.glob("*/*")) if p.name.lower() == "fake"]):
        raise DataError(f"{folders[0]}: no forged faces in it. Add some, or remove it to train on self-made forgeries.")
    for name, labels in found.items():
        for label in (REAL,) if self_made else (REAL, FAKE):
            if label not in labels:
                raise DataError(f"{root}: no {CLASSES[label]} faces in the part {name}. Add some, or leave it out.")


# ---- faces from videos


def crop_videos(
    parts: dict[str, list[Sample]],
    root: Path,
    folder: Path,
    *,
    size: int,
    frames: int,
    detector: str,
    reuse: bool,
    advance: Callable[[int, int], None] | None = None,
) -> dict[str, list[Sample]]:
    """The parts with each video replaced by the best face of some of its frames, kept as PNG files in `folder`.

    A video whose faces are there already is not read again if `reuse`. Videos that cannot be read, or without a face,
    are left out with a warning.

    Raises:
        DataError: no video shows a face, or a part has lost a class so.
    """
    videos = [sample for samples in parts.values() for sample in samples if _is_video(sample)]
    if not videos:
        return parts
    find = create_detector(detector)
    faces: dict[Sample, list[Path]] = {}
    for done, sample in enumerate(videos, start=1):
        inside = sample.path.relative_to(root) if sample.path.is_relative_to(root) else Path(*sample.path.parts[1:])
        if not (reuse and (folder / inside).is_dir()):
            _crop_video(sample.path, folder / inside, find, size, frames)
        faces[sample] = _images(folder / inside)
        if advance is not None:
            advance(done, len(videos))
    if not any(faces.values()):
        raise DataError(
            f"{root}: no face was found in any of its {len(videos)} videos. Give another detector, or crops of faces."
        )
    cropped = {
        name: [replace(sample, path=path) for sample in samples for path in faces.get(sample, [sample.path])]
        for name, samples in parts.items()
    }
    _check(root, cropped, empty=[name for name in parts if parts[name] and not cropped[name]])
    return cropped


def _is_video(sample: Sample) -> bool:
    return sample.path.suffix.lower() in VIDEO_SUFFIXES


def _crop_video(path: Path, where: Path, find: Callable, size: int, count: int) -> None:
    """Write the faces of a video into the folder `where`, which appears when it is complete."""
    part = where.with_name(where.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(where, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        frames = sample_frames(path, count)[1]
    except DataError as error:
        log.warning("%s; the video is left out", error)
        frames = []
    found = 0
    for frame in frames:
        if faces := find(frame.image):
            Image.fromarray(crop_face(frame.image, faces[0], size)).save(part / f"{frame.index:06d}.png")
            found += 1
    if frames and not found:
        log.warning("%s: no face in %d frames; the video is left out", path, len(frames))
    os.replace(part, where)


# ---- faces as tensors


class FaceSet(ImageSet):
    """Faces as normalized tensors (3, S, S) with their labels; or, with a forge, as pairs (2, 3, S, S) of a forgery and
    the real face it was made from, labels (2,), under one and the same augmentation.

    Args:
        samples: pictures of faces, all of one part: the sources of forgeries are taken from here.
        size: S.
        forge: makes forgeries, as `forgeries.pair` does.
        repeats: how often each sample comes; each time the forgery is another one.
        seed: fixes what is random about the items; None draws anew each time, from NumPy's own generator.
        chance: of augmentation.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        size: int,
        *,
        forge: Forge | None = None,
        repeats: int = 1,
        seed: int | None = None,
        chance: float = 0.0,
    ) -> None:
        indices = [index for index in range(len(samples)) for _ in range(repeats)]
        labels = [samples[index].label for index in indices]
        super().__init__(Files([sample.path for sample in samples]), labels, CLASSES, indices=indices)
        self.side, self.forge, self.seed, self.chance = size, forge, seed, chance
        self._people = [sample.group for sample in samples]
        self._kept: dict[int, np.ndarray] | None = {} if len(samples) * size**2 * 3 <= CACHE_BYTES else None

    @property
    def groups(self) -> list[str]:
        """The person or video of each item."""
        return [self._people[index] for index in self.indices]

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        key = [self.seed, index] if self.seed is not None else np.random.randint(2**31, size=2).tolist()
        rng, which = np.random.default_rng(key), self.indices[index]
        face = self.face(which)
        if self.forge is None:
            return normalize(np.stack([augment(face, rng, self.chance)]))[0], self.labels[index]
        real, forged, _ = self.forge(face, rng, self._another(which, rng))
        alike = rng.integers(2**32)
        both = [augment(view, np.random.default_rng(alike), self.chance) for view in (forged, real)]
        return normalize(np.stack(both)), torch.tensor([FAKE, REAL])

    def face(self, index: int) -> np.ndarray:
        """The face of a sample, (S, S, 3) uint8, scaled as faces of videos are."""
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        image = np.asarray(self.source.read(index))
        height, width = image.shape[:2]
        face = image if height == width == self.side else crop_face(image, Face(0, 0, width, height, None), self.side)
        if self._kept is not None:
            self._kept[index] = face
        return face

    def _another(self, index: int, rng: np.random.Generator) -> np.ndarray | None:
        """Now and then the face of another person of this set, of a few the one that looks most like this."""
        if rng.random() >= SWAPS:
            return None
        drawn = rng.integers(len(self._people), size=CANDIDATES).tolist()
        others = [self.face(other) for other in drawn if self._people[other] != self._people[index]]
        own = look(self.face(index))
        return min(others, key=lambda other: float(np.abs(look(other) - own).sum()), default=None)
