"""Finding, cropping and following faces in video frames, for the deepfake detector.

Detectors, all called alike (`detector(image) -> list[Face]`):
- `dlib`: the HOG detector that the published pipeline runs through face_recognition (King, "Max-Margin Object
  Detection", 2015, arXiv 1502.00046). Optional: `pip install dlib-bin`.
- `cascade`: the LBP frontal-face cascade inside scikit-image (Liao et al., 2007); nothing to download.
- an ONNX file: YuNet, SCRFD or RetinaFace, see `onnx_faces.py`.

Departures from the published pipeline: detectors are given RGB (the authors hand BGR to a detector that expects RGB;
`DlibDetector(bgr=True)` repeats that), and `auto` shrinks huge frames and looks again, enlarged, at small ones in which
dlib finds nothing (`DlibDetector()` alone does what face_recognition does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from vitalloy.errors import DataError

if TYPE_CHECKING:
    from scipy.sparse import csr_array


@dataclass(frozen=True)
class Face:
    """A face's box in frame pixels, inside the frame; `right` and `bottom` are exclusive.

    `confidence` is in the detector's own units and compares faces of one detector only: windows that agree (cascade),
    margin (dlib), 0..1 (ONNX).
    """

    left: int
    top: int
    right: int
    bottom: int
    confidence: float | None = None


class FaceDetector(Protocol):
    """Finds the faces of one image, (H, W, 3) uint8 RGB or (H, W) uint8 grey; best first."""

    name: str

    def __call__(self, image: np.ndarray) -> list[Face]: ...


def create_detector(spec: str = "auto") -> FaceDetector:
    """A detector by name: "cascade", "dlib", a path to an .onnx file, or "auto" (dlib where installed, else cascade).

    Raises:
        DataError: for an unknown name, a package that is not installed, or an ONNX file of another kind.
    """
    if spec == "auto":
        return DlibDetector(any_size=True) if find_spec("dlib") else CascadeDetector()
    if spec == "cascade":
        return CascadeDetector()
    if spec == "dlib":
        return DlibDetector()
    if str(spec).lower().endswith(".onnx"):
        return OnnxDetector(spec)
    raise DataError(f"Unknown face detector {spec!r}: give cascade, dlib, auto or a path to an .onnx file.")


class CascadeDetector:
    """scikit-image's LBP cascade: frontal faces, upright or leaning up to about 20 degrees.

    Frames are brought to 640 pixels on the longer side (enlarged at most three times) and searched for faces from a
    twelfth of the square root of their area. Windows that agree are merged; a face needs `agree` of them. A frame
    without an upright face is looked at again turned by 15 degrees either way, for faces from an eighth.

    Measured on the pictures by which the constants were chosen: found 92 of 100 LFW faces of 70 to 160 pixels pasted
    into photographs (dlib: 95) and 51 of 60 frames of the carphone clip (dlib, doubled: 59); false alarms 4 in 68
    pictures and frames without a large face (dlib: 3).
    """

    name = "cascade"
    longest = 640
    turns = (-15.0, 15.0)

    def __init__(self, agree: int = 4) -> None:
        try:
            from skimage.data import lbp_frontal_face_cascade_filename
            from skimage.feature import Cascade
        except ImportError as error:
            raise DataError(
                "The face detector 'cascade' needs scikit-image, which is not installed: pip install scikit-image"
            ) from error
        self.agree = agree
        self.cascade = Cascade(lbp_frontal_face_cascade_filename())

    def __call__(self, image: np.ndarray) -> list[Face]:
        image = _as_rgb(image)
        height, width = image.shape[:2]
        ratio = min(3.0, self.longest / max(height, width))
        scene = Image.fromarray(image).convert("L")
        scene = scene.resize((max(1, round(width * ratio)), max(1, round(height * ratio))), Image.BILINEAR)
        least, side = 24 * max(ratio, 1.0), (scene.width * scene.height) ** 0.5  # the cascade's own window is 24
        boxes, counts = self._search(scene, max(least, side / 12))
        if not len(boxes):
            found = [self._search(scene, max(least, side / 8), turn) for turn in self.turns]
            boxes, counts = max(found, key=lambda pair: pair[1].max(initial=0))
        return _clip(_like_dlib(boxes / ratio), counts, width, height)

    def _search(self, image: Image.Image, smallest: float, turn: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Merged boxes (N, 4) in pixels of `image` and how many windows agree on each, in an image turned by `turn`."""
        smallest = round(smallest)
        if min(image.size) < smallest:
            return np.zeros((0, 4)), np.zeros(0)
        turned = np.asarray(image.rotate(turn, Image.BILINEAR) if turn else image)
        found = self.cascade.detect_multi_scale(
            turned,
            scale_factor=1.1,
            step_ratio=1.5,
            min_size=(smallest, smallest),
            max_size=(min(turned.shape),) * 2,
            min_neighbor_number=1,
            intersection_score_threshold=2.0,  # more than any overlap: windows come unmerged, so that we can count them
        )
        windows = np.array(sorted((w["c"], w["r"], w["width"]) for w in found), float).reshape(-1, 3)
        centres, side = windows[:, :2] + windows[:, 2:] / 2, windows[:, 2:]
        boxes, counts = _merge(np.concatenate([centres - side / 2, centres + side / 2], 1))
        boxes, counts = boxes[counts >= self.agree], counts[counts >= self.agree]
        if turn:
            cos, sin = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))
            middle = np.array(image.size) / 2
            centres, half = (boxes[:, :2] + boxes[:, 2:]) / 2 - middle, (boxes[:, 2:] - boxes[:, :2]) / 2
            centres = centres @ np.array([[cos, sin], [-sin, cos]]) + middle
            boxes = np.concatenate([centres - half, centres + half], 1)
        return boxes, counts


class DlibDetector:
    """dlib's frontal-face HOG detector as face_recognition runs it; it misses faces under about 80 pixels.

    Args:
        upsample: how often the frame is doubled first (the published pipeline: 0).
        bgr: hand the channels over in the wrong order, as the published pipeline does.
        any_size: shrink frames of more than 1920 pixels, and look once more, doubled, at frames of at most 640 pixels
            in which nothing was found; faces with a margin below `sure` count only if the cascade finds them too.
    """

    sure = 0.3

    def __init__(self, upsample: int = 0, bgr: bool = False, any_size: bool = False) -> None:
        try:
            import dlib
        except ImportError as error:
            raise DataError(
                "The face detector 'dlib' needs the dlib package, which is not installed: pip install dlib-bin"
            ) from error
        self.upsample, self.bgr, self.any_size = upsample, bgr, any_size
        self.name = "dlib" + (", any size" if any_size else "") + (", channels exchanged" if bgr else "")
        self.second = CascadeDetector() if any_size else None
        self.detector = dlib.get_frontal_face_detector()

    def __call__(self, image: np.ndarray) -> list[Face]:
        image = original = _as_rgb(image)
        height, width = image.shape[:2]
        ratio, longer = 1.0, max(height, width)
        if self.any_size and longer > 1920:
            ratio = 1920 / longer
            size = max(1, round(width * ratio)), max(1, round(height * ratio))
            image = np.asarray(Image.fromarray(image).resize(size, Image.BILINEAR))
        image = np.ascontiguousarray(image[..., ::-1] if self.bgr else image)
        boxes, scores, _ = self.detector.run(image, self.upsample, 0.0)
        if self.any_size and not boxes and longer <= 640:
            boxes, scores, _ = self.detector.run(image, self.upsample + 1, 0.0)
        # face_recognition takes dlib's last column and row as if they were exclusive; so does the crop the weights saw
        corners = np.array([(b.left(), b.top(), b.right(), b.bottom()) for b in boxes], float).reshape(-1, 4)
        found = _clip(corners / ratio, np.array(scores), width, height)
        if self.second is None or all(face.confidence >= self.sure for face in found):
            return found
        others = [_box(face) for face in self.second(original)]
        return [f for f in found if f.confidence >= self.sure or any(_share(_box(f), o) > 0.5 for o in others)]


class OnnxDetector:
    """A YuNet, SCRFD or RetinaFace model in an ONNX file, on the processor; `score` is the least confidence kept."""

    def __init__(self, path: str | Path, score: float = 0.6) -> None:
        from vitalloy.applications.deepfake.onnx_faces import FaceGraph

        self.graph = FaceGraph(path, score)
        self.name = f"{self.graph.kind} ({Path(path).name})"

    def __call__(self, image: np.ndarray) -> list[Face]:
        image = _as_rgb(image)
        return _clip(*self.graph(image), image.shape[1], image.shape[0])


def crop_face(image: np.ndarray, face: Face, size: int = 224, margin: float = 0.0) -> np.ndarray:
    """The face's box of `image` as (size, size, 3) uint8 RGB, resized as OpenCV's INTER_AREA does.

    `margin` widens the box on every side by that share of its width and height, as far as the frame goes (the published
    pipeline: 0). Raises `DataError` for a box that does not touch the image.
    """
    image = _as_rgb(image)
    wide, high = round(margin * (face.right - face.left)), round(margin * (face.bottom - face.top))
    top, left = max(0, face.top - high), max(0, face.left - wide)
    crop = image[top : max(0, face.bottom + high), left : max(0, face.right + wide)]
    if not crop.size:
        raise DataError(f"{face} lies outside its image of {image.shape[1]}x{image.shape[0]} pixels.")
    return resize_area(crop, size)


def resize_area(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, C) uint8 -> (size, size, C) uint8 as OpenCV's `resize(..., INTER_AREA)`.

    The true average over each new pixel's area when neither axis grows; otherwise OpenCV's fixed-point bilinear with
    weights by area. Sums along x first and rounds as OpenCV does (half to even; half up for exact halving).
    """
    height, width, channels = image.shape
    if (height, width) == (size, size):
        return image.copy()
    if height < size or width < size:
        columns = _turn(image.astype(np.int32).reshape(height, -1), channels)  # (H, W * C) -> (W, H * C)
        rows = _turn(_bilinear_weights(width, size) @ columns, channels) >> 4  # (H, size * C)
        weights = _bilinear_weights(height, size)
        first, pair = weights.indices.reshape(size, 2), weights.data.reshape(size, 2, 1)
        out = ((rows[first[:, 0]] * pair[:, 0]) >> 16) + ((rows[first[:, 1]] * pair[:, 1]) >> 16)
        out = (out + 2) >> 2
    else:
        whole = height % size == 0 and width % size == 0
        columns = _turn(image.astype(np.float32).reshape(height, -1), channels)
        rows = _turn(_area_weights(width, size, whole) @ columns, channels)
        out = _area_weights(height, size, whole) @ rows
        if whole:
            out *= np.float32(1) / np.float32(height * width // size**2)
        out = np.floor(out + 0.5) if (height, width) == (2 * size, 2 * size) else np.rint(out)
    return np.clip(out, 0, 255).astype(np.uint8).reshape(size, size, channels)


def _turn(rows: np.ndarray, channels: int) -> np.ndarray:
    """(N, M * C) -> (M, N * C); whole pixels are moved as one item, three times as fast as their channels."""
    pixels = rows.view(f"V{rows.itemsize * channels}")
    return np.ascontiguousarray(pixels.T).view(rows.dtype)


def _area_weights(length: int, size: int, whole: bool) -> csr_array:
    """Sparse (size, length) float32: each new pixel's share of the old ones on an axis that shrinks; `whole`: ones."""
    from scipy.sparse import csr_array

    scale = 1 / (size / length)  # as OpenCV computes it; length / size may differ in the last bit
    start = np.arange(size) * scale
    end = np.minimum(start + scale, length)
    pixel = np.floor(start + 1e-3).astype(int)[:, None] + np.arange(int(np.ceil(scale)) + 1)
    overlap = np.minimum(pixel + 1, end[:, None]) - np.maximum(pixel, start[:, None])
    used = (overlap > 1e-3) & (pixel < length)  # OpenCV drops overlaps of less than a thousandth of a pixel
    share = np.ones_like(overlap) if whole else overlap.clip(0, 1) / np.minimum(scale, length - start)[:, None]
    bounds = np.concatenate([[0], used.sum(1).cumsum()])
    return csr_array((share[used].astype(np.float32), pixel[used], bounds), shape=(size, length))


def _bilinear_weights(length: int, size: int) -> csr_array:
    """Sparse (size, length) int32 in 1/2048, two entries a row: OpenCV's weights for INTER_AREA where an axis grows."""
    from scipy.sparse import csr_array

    place = np.arange(size)
    first = np.minimum(np.floor(place * (1 / (size / length))).astype(int), length - 1)
    part = ((place + 1) - (first + 1) * (size / length)).astype(np.float32)
    part = np.where(part <= 0, np.float32(0), part - np.floor(part))
    part[first == length - 1] = 0
    pair = np.rint(np.stack([np.float32(1) - part, part], 1) * np.float32(2048)).astype(np.int32)
    second = np.minimum(first + 1, length - 1)
    entries = pair.ravel(), np.stack([first, second], 1).ravel(), np.arange(size + 1) * 2
    return csr_array(entries, shape=(size, length))


def link_faces(frames: Sequence[Sequence[Face]]) -> list[list[int]]:
    """For each face of each frame the number of the person it belongs to, 0.. in order of appearance.

    A heuristic of position only; it knows nothing of identity. A face belongs to the person last seen nearest to it, if
    the centres are less than one face apart and the sizes within a factor of two; nearest pairs first, one face a
    person and frame. Someone who leaves and comes back to the same place keeps the number; elsewhere it is a new one.
    """
    last: list[np.ndarray] = []  # per person: centre x, centre y, side where last seen
    numbers = []
    for faces in frames:
        now = [
            np.array([(f.left + f.right) / 2, (f.top + f.bottom) / 2, (f.right - f.left + f.bottom - f.top) / 2])
            for f in faces
        ]
        pairs = []
        for person, seen in enumerate(last):
            for index, here in enumerate(now):
                apart = np.hypot(*(here - seen)[:2]) / ((here[2] + seen[2]) / 2)
                if apart < 1 and 0.5 <= here[2] / seen[2] <= 2:
                    pairs.append((apart, person, index))
        row: list[int | None] = [None] * len(now)
        for _, person, index in sorted(pairs):
            if row[index] is None and person not in row:
                row[index] = person
        for index, here in enumerate(now):
            if row[index] is None:
                row[index] = len(last)
                last.append(here)
            else:
                last[row[index]] = here
        numbers.append(row)
    return numbers


def _as_rgb(image: np.ndarray) -> np.ndarray:
    """`image` as (H, W, 3) uint8; grey is repeated."""
    if image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3))) and image.size:
        return image if image.shape[2:] == (3,) else np.repeat(image.reshape(*image.shape[:2], 1), 3, 2)
    raise DataError(f"A frame must be (H, W, 3) uint8 RGB or (H, W) grey; got {image.shape} {image.dtype}.")


def _merge(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Windows (N, 4) -> means of those that overlap (M, 4), none half inside another, and how many went into each."""
    area = (windows[:, 2:] - windows[:, :2]).prod(-1)
    first, second = windows[:, None], windows[None]
    common = (
        (np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(first[..., :2], second[..., :2])).clip(0).prod(-1)
    )
    near = common > 0.4 * (area[:, None] + area - common)  # intersection over union
    alive, boxes, counts = np.ones(len(windows), bool), [], []
    while alive.any():
        members = near[((near & alive).sum(1) * alive).argmax()] & alive
        boxes.append(windows[members].mean(0))
        counts.append(members.sum())
        alive &= ~members
    kept: list[int] = []
    for index in np.argsort(-np.array(counts, int), kind="stable"):
        if all(_share(boxes[index], boxes[other]) <= 0.5 for other in kept):
            kept.append(index)
    return np.array(boxes).reshape(-1, 4)[kept], np.array(counts, float)[kept]


def _box(face: Face) -> np.ndarray:
    return np.array([face.left, face.top, face.right, face.bottom], float)


def _share(a: np.ndarray, b: np.ndarray) -> float:
    """The common area of two boxes over that of the smaller one."""
    common = (np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).clip(0).prod()
    return common / min((a[2:] - a[:2]).prod(), (b[2:] - b[:2]).prod())


# From a cascade box of side 1 to dlib's: how far down the centre moves, and the side. Means over 159 faces that both
# found (astronaut, carphone, LFW); sideways they differ by 0.01. It lifts the overlap (IoU) from 0.75 to 0.83.
CASCADE_TO_DLIB = (0.05, 0.9)


def _like_dlib(boxes: np.ndarray) -> np.ndarray:
    down, grow = CASCADE_TO_DLIB
    side = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + side * np.array([0, down])
    return np.concatenate([centre - side * grow / 2, centre + side * grow / 2], 1)


def _clip(boxes: np.ndarray, scores: np.ndarray, width: int, height: int) -> list[Face]:
    """Boxes (N, 4) and scores (N,) as faces inside the frame, best first."""
    corners = np.rint(boxes).clip(0, [width, height, width, height]).astype(int)
    order = np.argsort(-np.asarray(scores, float), kind="stable")
    faces = [Face(*map(int, corners[i]), float(scores[i])) for i in order]
    return [face for face in faces if face.right > face.left and face.bottom > face.top]
