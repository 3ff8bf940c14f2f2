"""Reading the face detectors that people have as ONNX files: which kind a file is, what it eats, where its boxes are.

For whoever has a detector better than the built-in ones. Recognised by their outputs:
- YuNet (Wu et al., "YuNet: A Tiny Millisecond-level Face Detector", 2023; OpenCV zoo `face_detection_yunet_2023mar`):
  cls_*, obj_*, bbox_*, kps_* for the strides 8, 16, 32; BGR 0..255; one box a cell as offset and log size in cells.
- SCRFD (Guo et al., 2021, arXiv 2105.04714; insightface `det_10g`, `scrfd_*`): 6 outputs, or 9 with landmarks, of
  widths 1, 4 (and 10) for the strides 8, 16, 32; RGB (x - 127.5) / 128; two boxes a cell as distances from its corner
  to the four sides, in cells.
- RetinaFace (Deng et al., 2019, arXiv 1905.00641; the PyTorch version's export): three outputs of widths 4, 2, 10; BGR
  minus (104, 117, 123); offsets to two prior boxes a cell.

Landmarks are not used. Departure from the publishers' own scripts: a frame is put into the upper left of the input,
shrunk to fit, or enlarged at most twice, the rest black; inputs of free size become 640 pixels on the longer side.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from vitalloy.errors import DataError

STRIDES = (8, 16, 32)
PRIOR_SIDES = ((16, 32), (64, 128), (256, 512))  # RetinaFace's square prior boxes at each stride, in pixels
OVERLAP = {"yunet": 0.3, "scrfd": 0.4, "retinaface": 0.4}  # boxes that overlap more are one face, as their authors say


class FaceGraph:
    """An ONNX face detector: `graph(image)` -> boxes (N, 4) in pixels of the image and scores (N,) 0..1, best first.

    Args:
        path: the .onnx file.
        score: the least score of a box that is kept.

    Raises:
        DataError: where the file is missing, cannot be read, or is none of the three kinds.
    """

    def __init__(self, path: str | Path, score: float = 0.6) -> None:
        import onnxruntime

        if not Path(path).is_file():
            raise DataError(f"There is no face detector file {path}.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # insightface's files declare wrong output sizes, with a warning for each run
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            self.input = self.session.get_inputs()[0]
            size = tuple(self.input.shape[2:])  # whole numbers, or names where the size is free
            self.size = size if all(isinstance(n, int) and n > 0 for n in size) else None
            trial = self._run(np.zeros((3, *(self.size or (64, 64))), np.float32))
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{path} cannot be used as a face detector: {reason}") from error
        self.kind = _recognise(trial)
        if self.kind is None:
            outputs = ", ".join(f"{name} {array.shape}" for name, array in trial.items())
            raise DataError(f"{path} is none of YuNet, SCRFD and RetinaFace; its outputs are {outputs}.")
        self.score = score

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        height, width = image.shape[:2]
        room_h, room_w = self.size or (640, 640)
        ratio = min(room_h / height, room_w / width, 2.0)
        new_h, new_w = max(1, round(height * ratio)), max(1, round(width * ratio))
        if self.size is None:
            room_h, room_w = -(-new_h // 32) * 32, -(-new_w // 32) * 32
        if (new_h, new_w) != (height, width):
            image = np.asarray(Image.fromarray(image).resize((new_w, new_h), Image.BILINEAR))
        canvas = np.zeros((room_h, room_w, 3), np.uint8)
        canvas[:new_h, :new_w] = image
        decode = {"yunet": _decode_yunet, "scrfd": _decode_scrfd, "retinaface": _decode_retinaface}[self.kind]
        boxes, scores = decode(self._run(_normalise(canvas, self.kind)), room_h, room_w)
        boxes, scores = boxes[scores >= self.score], scores[scores >= self.score]
        kept = suppress(boxes, scores, OVERLAP[self.kind])
        scale = new_w / width, new_h / height
        return boxes[kept] / (scale * 2), scores[kept]

    def _run(self, planes: np.ndarray) -> dict[str, np.ndarray]:
        """(3, H, W) float32 -> every output by name, without the batch axis: (rows, width)."""
        outputs = self.session.run(None, {self.input.name: np.ascontiguousarray(planes[None])})
        names = [output.name for output in self.session.get_outputs()]
        return {name: array[0] if array.ndim == 3 else array for name, array in zip(names, outputs, strict=True)}


def suppress(boxes: np.ndarray, scores: np.ndarray, overlap: float) -> list[int]:
    """Indices of boxes, best first, whose intersection over union with every better one kept is at most `overlap`."""
    area = (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(-1)
    order, kept = np.argsort(-scores, kind="stable"), []
    while order.size:
        best, order = order[0], order[1:]
        kept.append(int(best))
        sides = np.minimum(boxes[best, 2:], boxes[order, 2:]) - np.maximum(boxes[best, :2], boxes[order, :2])
        common = sides.clip(0).prod(-1)
        order = order[common <= overlap * (area[best] + area[order] - common)]
    return kept


def _recognise(outputs: dict[str, np.ndarray]) -> str | None:
    """ "yunet", "scrfd" or "retinaface" by the names and widths of the outputs."""
    if {f"{part}_{stride}" for part in ("cls", "obj", "bbox") for stride in STRIDES} <= set(outputs):
        return "yunet"
    if any(array.ndim != 2 for array in outputs.values()):
        return None
    widths = sorted(array.shape[1] for array in outputs.values())
    if widths in ([1, 1, 1, 4, 4, 4], [1, 1, 1, 4, 4, 4, 10, 10, 10]):
        return "scrfd"
    return "retinaface" if widths == [2, 4, 10] else None


def _normalise(image: np.ndarray, kind: str) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (3, H, W) float32 as the kind was trained."""
    planes = image.transpose(2, 0, 1).astype(np.float32)
    if kind == "scrfd":
        return (planes - 127.5) / 128
    planes = planes[::-1]
    return planes if kind == "yunet" else planes - np.array([104, 117, 123], np.float32)[:, None, None]


def _cells(height: int, width: int, stride: int, boxes: int) -> np.ndarray:
    """(rows * columns * boxes, 2): x and y of each cell of the grid, row by row, repeated for the boxes of a cell."""
    y, x = np.mgrid[: -(-height // stride), : -(-width // stride)]
    return np.stack([x.ravel(), y.ravel()], 1).repeat(boxes, 0)


def _corners(centre: np.ndarray, side: np.ndarray) -> np.ndarray:
    return np.concatenate([centre - side / 2, centre + side / 2], 1)


def _decode_yunet(outputs: dict[str, np.ndarray], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    boxes, scores = [], []
    for stride in STRIDES:
        box = outputs[f"bbox_{stride}"].reshape(-1, 4)
        cell = _cells(height, width, stride, 1)
        boxes.append(_corners((cell + box[:, :2]) * stride, np.exp(box[:, 2:]) * stride))
        parts = [outputs[f"{part}_{stride}"].ravel().clip(0, 1) for part in ("cls", "obj")]
        scores.append(np.sqrt(parts[0] * parts[1]))
    return np.concatenate(boxes), np.concatenate(scores)


def _decode_scrfd(outputs: dict[str, np.ndarray], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    # Names are numbers that differ from file to file; width says what an output is, length which stride (finest first).
    arrays = sorted(outputs.values(), key=lambda array: -len(array))
    scores = [array[:, 0] for array in arrays if array.shape[1] == 1]
    boxes = []
    for stride, side in zip(STRIDES, (array for array in arrays if array.shape[1] == 4), strict=True):
        cell = _cells(height, width, stride, 2)
        boxes.append(np.concatenate([cell - side[:, :2], cell + side[:, 2:]], 1) * stride)
    return np.concatenate(boxes), np.concatenate(scores)


def _decode_retinaface(outputs: dict[str, np.ndarray], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    by_width = {array.shape[1]: array for array in outputs.values()}
    centre, side = [], []
    for stride, sides in zip(STRIDES, PRIOR_SIDES, strict=True):
        cell = _cells(height, width, stride, 2)
        centre.append((cell + 0.5) * stride)
        side.append(np.tile(sides, len(cell) // 2)[:, None])
    centre, side = np.concatenate(centre), np.concatenate(side)
    offset = by_width[4]  # in tenths of the prior box, and a fifth of the log of the size
    boxes = _corners(centre + 0.1 * offset[:, :2] * side, np.exp(0.2 * offset[:, 2:]) * side)
    return boxes, by_width[2][:, 1]
