"""Faces: found where they are and nowhere else, cropped as OpenCV crops, followed from frame to frame."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest
from clips import carphone_frames
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from skimage import data

from vitalloy.applications.deepfake.faces import (
    CascadeDetector,
    DlibDetector,
    Face,
    create_detector,
    crop_face,
    link_faces,
)
from vitalloy.errors import DataError

PORTRAIT = (179, 83, 266, 170)  # the astronaut's face, brow to chin, as dlib 20.0 draws it


def overlap(face, box) -> float:
    """Intersection over union of a face and (left, top, right, bottom)."""
    wide = min(face.right, box[2]) - max(face.left, box[0])
    high = min(face.bottom, box[3]) - max(face.top, box[1])
    common = max(wide, 0) * max(high, 0)
    areas = (face.right - face.left) * (face.bottom - face.top) + (box[2] - box[0]) * (box[3] - box[1])
    return common / (areas - common)


@pytest.fixture(scope="module", params=["cascade", "dlib"])
def detector(request):
    if request.param == "dlib":
        pytest.importorskip("dlib")
        return DlibDetector(any_size=True)
    return create_detector("cascade")


def test_a_portrait_has_one_face_and_two_side_by_side_have_two(detector):
    (face,) = detector(data.astronaut())
    assert overlap(face, PORTRAIT) > 0.6
    assert face.confidence > 0
    pair = detector(np.concatenate([data.astronaut()[:300, 100:400], data.astronaut()[:300, 80:380]], 1))
    places = sorted(pair, key=lambda face: face.left)
    assert [overlap(f, b) > 0.6 for f, b in zip(places, [(79, 83, 166, 170), (399, 83, 486, 170)], strict=True)] == [
        1,
        1,
    ]


@pytest.mark.parametrize("scene", ["coffee", "brick"])
def test_no_face_where_there_is_none(detector, scene):
    assert detector(getattr(data, scene)()) == []  # bricks are grey: (H, W)


def test_the_small_tilted_face_of_a_talking_head_is_found(detector):
    frames = carphone_frames(30)[::6]
    found = [detector(frame) for frame in frames]
    assert sum(len(faces) > 0 for faces in found) >= 4
    for faces in found:
        assert all(overlap(face, (63, 40, 115, 93)) > 0.35 for face in faces)  # 52 pixels wide


@pytest.mark.parametrize("angle", [-20, 20])
def test_a_leaning_face_is_found_where_it_is(detector, angle):
    leaning = Image.fromarray(data.astronaut()).rotate(angle, Image.Resampling.BILINEAR, center=(222, 126))
    face, *_ = detector(np.asarray(leaning))
    assert overlap(face, PORTRAIT) > 0.5


def test_frames_of_any_size(detector):
    assert detector(np.zeros((12, 15, 3), np.uint8)) == []
    assert detector(np.zeros((1, 400, 3), np.uint8)) == []
    huge = np.asarray(Image.fromarray(data.astronaut()).resize((2560, 2560)))
    face, *_ = detector(huge)
    assert overlap(face, [5 * n for n in PORTRAIT]) > 0.5
    with pytest.raises(DataError, match="uint8"):
        detector(np.zeros((64, 64, 3), np.float32))


def test_dlib_as_published():
    dlib = pytest.importorskip("dlib")
    image = data.astronaut()
    box = dlib.get_frontal_face_detector()(np.ascontiguousarray(image[..., ::-1]), 0)[0]
    (face,) = DlibDetector(bgr=True)(image)
    assert (face.left, face.top, face.right, face.bottom) == (box.left(), box.top(), box.right(), box.bottom())
    assert create_detector("dlib")(carphone_frames(1)[0]) == []  # no second look: the face is too small for dlib


def test_detectors_that_cannot_be_had(monkeypatch, tmp_path):
    with pytest.raises(DataError, match=r"cascade, dlib, auto or a path to an \.onnx file"):
        create_detector("haar")
    with pytest.raises(DataError, match="no face detector file"):
        create_detector(str(tmp_path / "absent.onnx"))
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(DataError, match="cannot be used"):
        create_detector(str(tmp_path / "broken.onnx"))
    save(tmp_path / "other.onnx", (64, 64), {"logits": np.zeros((1, 1000), np.float32)}, {})
    with pytest.raises(DataError, match="none of YuNet, SCRFD and RetinaFace"):
        create_detector(str(tmp_path / "other.onnx"))
    monkeypatch.setitem(sys.modules, "dlib", None)
    with pytest.raises(DataError, match="pip install dlib-bin"):
        create_detector("dlib")
    assert isinstance(create_detector("auto"), CascadeDetector)


def save(path, size, outputs, lit):
    """A graph that returns `outputs`, those in `lit` times its first input value (channel 0) times lit[name]."""
    nodes = [
        helper.make_node("Slice", ["input", "zeros", "ones"], ["corner"]),
        helper.make_node("Reshape", ["corner", "one"], ["value"]),
    ]
    constants = {"zeros": np.zeros(4, np.int64), "ones": np.ones(4, np.int64), "one": np.ones(1, np.int64)}
    results = []
    for name, array in outputs.items():
        constants[f"{name}.whole"], constants[f"{name}.lit"] = array, np.float32([lit.get(name, 1)])
        if name in lit:
            nodes.append(helper.make_node("Mul", ["value", f"{name}.lit"], [f"{name}.factor"]))
            nodes.append(helper.make_node("Mul", [f"{name}.whole", f"{name}.factor"], [name]))
        else:
            nodes.append(helper.make_node("Identity", [f"{name}.whole"], [name]))
        results.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * array.ndim))
    entry = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, *size])
    weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "faces", [entry], results, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


# Faces as pixels of the detector's input: box, score, stride. The third is the first again, the fourth too faint.
KNOWN = [
    ((32, 40, 96, 128), 0.9, 16),
    ((180, 72, 204, 100), 0.8, 8),
    ((36, 42, 98, 130), 0.7, 32),
    ((96, 8, 120, 32), 0.3, 8),
]


def yunet(height, width):
    out = {}
    for s in (8, 16, 32):
        rows, columns = height // s, width // s
        cls, box = np.zeros((1, rows * columns, 1), np.float32), np.zeros((1, rows * columns, 4), np.float32)
        for (x0, y0, x1, y1), score, stride in KNOWN:
            if stride == s:
                x, y = (x0 + x1) / 2 / s, (y0 + y1) / 2 / s
                cell = int(y) * columns + int(x)
                cls[0, cell] = score**2
                box[0, cell] = x % 1, y % 1, np.log((x1 - x0) / s), np.log((y1 - y0) / s)
        out |= {f"cls_{s}": cls, f"obj_{s}": np.ones_like(cls), f"bbox_{s}": box}
        out[f"kps_{s}"] = np.zeros((1, rows * columns, 10), np.float32)
    return out, {f"obj_{s}": 1 / 255 for s in (8, 16, 32)}  # blue, 0..255


def scrfd(height, width):
    parts = {"score": [], "box": [], "points": []}
    for s in (8, 16, 32):
        count = (height // s) * (width // s) * 2
        score, box = np.zeros((count, 1), np.float32), np.zeros((count, 4), np.float32)
        for number, ((x0, y0, x1, y1), value, stride) in enumerate(KNOWN):
            if stride == s:
                column, row = (x0 + 8) // s, (y0 + 8) // s
                index = (row * (width // s) + column) * 2 + number % 2
                score[index] = value
                box[index] = [column - x0 / s, row - y0 / s, x1 / s - column, y1 / s - row]
        parts["score"].append(score)
        parts["box"].append(box)
        parts["points"].append(np.zeros((count, 10), np.float32))
    arrays = parts["score"] + parts["box"] + parts["points"]
    out = {str(440 + 3 * number): array for number, array in enumerate(arrays)}
    return out, dict.fromkeys(list(out)[:3], 128 / 127.5)  # red, (x - 127.5) / 128


def scrfd_without_landmarks(height, width):
    out, lit = scrfd(height, width)
    return {name: array[None] for name, array in list(out.items())[:6]}, lit  # and with a batch axis


def retinaface(height, width):
    boxes, scores = [], []
    for s, sides in ((8, (16, 32)), (16, (64, 128)), (32, (256, 512))):
        for row in range(height // s):
            for column in range(width // s):
                for side in sides:
                    boxes.append([0, 0, 0, 0])
                    scores.append([1, 0])
                    for (x0, y0, x1, y1), score, stride in KNOWN:
                        x, y = (x0 + x1) / 2, (y0 + y1) / 2
                        if stride == s and side == sides[1] and (x // s, y // s) == (column, row):
                            shift = (x - (column + 0.5) * s) / side / 0.1, (y - (row + 0.5) * s) / side / 0.1
                            boxes[-1] = [*shift, np.log((x1 - x0) / side) / 0.2, np.log((y1 - y0) / side) / 0.2]
                            scores[-1] = [1 - score, score]
    out = {
        "loc": np.array([boxes], np.float32),
        "conf": np.array([scores], np.float32),
        "landms": np.zeros((1, len(boxes), 10), np.float32),
    }
    return out, {"conf": 1 / (255 - 104)}  # blue, less the mean


@pytest.mark.parametrize("encode", [yunet, scrfd, scrfd_without_landmarks, retinaface])
@pytest.mark.parametrize("fixed", [True, False])
def test_onnx_detectors_put_boxes_back_to_the_pixel(tmp_path, encode, fixed):
    # fixed: 150x80 doubles to 300x160 inside 256x320; free: 1280x800 halves to 640x400, padded to 640x416
    height, width, ratio, input_size = (80, 150, 2, (256, 320)) if fixed else (800, 1280, 0.5, (416, 640))
    save(tmp_path / "model.onnx", input_size if fixed else ("height", "width"), *encode(*input_size))
    detector = create_detector(str(tmp_path / "model.onnx"))
    assert encode.__name__.startswith(detector.name.split()[0])
    colour = (255, 0, 0) if "scrfd" in detector.name else (0, 0, 255)  # the scores are lit by channel 0 alone
    faces = detector(np.full((height, width, 3), colour, np.uint8))
    assert [(f.left, f.top, f.right, f.bottom) for f in faces] == [tuple(n / ratio for n in b) for b, *_ in KNOWN[:2]]
    assert [f.confidence for f in faces] == pytest.approx([0.9, 0.8], abs=1e-5)


# What cv2.resize(pattern(height, width), (size, size), interpolation=cv2.INTER_AREA)[..., 0] gave, OpenCV 5.0.0
OPENCV = {
    (7, 5, 3): [[71, 104, 75], [109, 133, 113], [191, 136, 160]],
    (8, 8, 4): [[71, 90, 109, 142], [110, 131, 127, 173], [149, 147, 131, 26], [138, 85, 174, 71]],
    (9, 9, 3): [[100, 102, 150], [139, 132, 85], [111, 122, 116]],
    (3, 3, 5): [[0, 30, 91, 152, 182], [12, 46, 113, 123, 128], [37, 77, 157, 66, 21], [62, 108, 201, 123, 84]]
    + [[74, 124, 223, 152, 116]],
    (7, 3, 4): [[16, 85, 117, 113], [69, 165, 176, 102], [137, 99, 98, 134], [206, 204, 170, 106]],
    (8, 6, 3): [[91, 83, 121], [114, 138, 96], [147, 118, 188]],
}


def pattern(height, width):
    y, x, c = np.mgrid[:height, :width, :3]
    return ((y * 37 + x * 91 + c * 53 + (y * x) % 7 * 29) % 256).astype(np.uint8)


@pytest.mark.parametrize("case", OPENCV)
def test_crops_are_resized_as_opencv_does(case):
    height, width, size = case
    frame = np.zeros((20, 30, 3), np.uint8)
    frame[4 : 4 + height, 6 : 6 + width] = pattern(height, width)
    crop = crop_face(frame, Face(6, 4, 6 + width, 4 + height), size)
    assert crop.dtype == np.uint8
    assert crop[..., 0].tolist() == OPENCV[case]


def test_a_crop_of_the_published_size_equals_opencv():
    crop = crop_face(pattern(300, 260), Face(0, 0, 260, 300)).astype(int)
    assert crop.shape == (224, 224, 3)
    assert (crop.sum(), (crop * (np.arange(crop.size).reshape(crop.shape) % 251)).sum()) == (19189468, 2397049262)


def test_a_margin_widens_the_crop_as_far_as_the_frame_goes():
    frame = pattern(60, 60)
    face = Face(20, 4, 40, 24)
    assert (crop_face(frame, face, 20) == frame[4:24, 20:40]).all()
    assert (crop_face(frame, face, 32, margin=0.3) == crop_face(frame[:30, 14:46], Face(0, 0, 32, 30), 32)).all()
    assert crop_face(frame[..., 0], face, 20).shape == (20, 20, 3)
    with pytest.raises(DataError, match="outside"):
        crop_face(frame, Face(70, 4, 90, 24))


def test_people_are_followed_by_position():
    def at(x, y=100, side=80):
        return Face(x, y, x + side, y + side)

    frames = [
        [at(100), at(400)],
        [at(420), at(110)],  # the order of the boxes does not matter
        [at(130)],  # the right one leaves,
        [],
        [at(135), at(415), at(700)],  # comes back, and a third appears
        [at(135, side=20), at(700)],  # a far smaller face in the same place is somebody else
    ]
    assert link_faces(frames) == [[0, 1], [1, 0], [0], [], [0, 1, 2], [3, 2]]
    assert link_faces([]) == []
    assert link_faces([[at(0), at(60)], [at(50), at(110)]]) == [[0, 1], [1, 2]]  # nearest wins, one face a person
