"""How the goldens of cvt are computed."""

from __future__ import annotations

import golden

import vitalloy
from cases.common import Model, Outputs, listen
from vitalloy.backbones import cvt


def cvt_block(record: dict) -> Outputs:
    block = cvt.Block(48, 3, class_token=True).double().eval()
    vitalloy.load_checkpoint(block, golden.state_of(record))
    seen: Outputs = {}
    listen(block, "out.attn", "attn", seen)
    return {"out.out": block(golden.inputs_of(record)["tokens"], (7, 9)), **seen}


CVT_SMALL = {
    "embed_dims": (32, 48, 64),
    "num_heads": (1, 2, 4),
    "depths": (1, 1, 2),
    "class_token": False,
    "projection": "avg",
    "qkv_bias": (False, True, False),
    "kv_strides": (2, 2, 1),
    "num_classes": 10,
}


CASES = {
    "cvt13_224": Model("cvt_13"),
    "avg_nocls_small": Model("cvt_13", CVT_SMALL),
    "block_clstoken": cvt_block,
}
