"""How the goldens of pvt are computed."""

from __future__ import annotations

import golden

from cases.common import Model, Outputs, features, whole
from vitalloy.heads import RetinaNet, SemanticFPN, boxes


def semantic_fpn(record: dict) -> Outputs:
    paths = {f"out.neck.{i}": f"neck.{i}" for i in range(4)} | {"out.logits_stride4": "decode_head"}
    logits, seen = whole(SemanticFPN("pvt_tiny", num_classes=150), record, paths)
    return {**seen, "out.logits_full": logits}


def retinanet(record: dict) -> Outputs:
    paths = {f"out.neck.{i}": f"neck.{i}" for i in range(5)}
    levels, seen = whole(RetinaNet("pvt_tiny", num_classes=80), record, paths)
    return {**seen, **golden.flatten({"cls": levels.classes, "reg": levels.boxes})}


def retinanet_anchors(record: dict) -> Outputs:
    base = boxes.base_anchors(8)
    anchors = boxes.grid_anchors(base, 8, (4, 5))
    first, noise = anchors[:40], golden.make_input((40, 4), "uniform", seed=13, low=-3, high=3)
    return {
        "base_anchors_stride8": base,
        "anchors_level0_4x5": anchors,
        "anchors_level1_2x3": boxes.grid_anchors(boxes.base_anchors(16), 16, (2, 3)),
        "decoded": boxes.decode(first, 0.3 * golden.make_input((40, 4), seed=12), (32, 40)),
        "encoded": boxes.encode(first.float(), (first + noise).float()),  # mmdetection encodes in float32
    }


CASES = {
    "pvt_tiny_224": Model("pvt_tiny"),
    "pvt_tiny_cls_192x160": Model("pvt_tiny"),
    "pvt_tiny_features_256x320": features("pvt_tiny"),
    "pvt_v2_b0_224": Model("pvt_v2_b0"),
    "pvt_v2_linear_small_224": Model("pvt_v2_b0", {"linear": True, "depths": (1, 1, 2, 1)}),
    "pvt_v2_b0_features_200x264": features("pvt_v2_b0"),
    "semantic_fpn_pvt_tiny_128x160": semantic_fpn,
    "retinanet_pvt_tiny_128x160": retinanet,
    "retinanet_anchors": retinanet_anchors,
}
