"""How the goldens of crossvit are computed."""

from __future__ import annotations

import golden

import vitalloy
from cases.common import Model, Outputs, listen
from vitalloy.backbones import crossvit


def cross_attention_block(record: dict) -> Outputs:
    block = crossvit.CrossBlock(48, 3, qkv_bias=True, attn_drop=0.0, drop_path=0.0).double().eval()
    owner = vitalloy.create_model("crossvit_nano", num_classes=0)  # knows the authors' names
    state = owner.convert_state({f"blocks.0.fusion.0.{k}": v for k, v in golden.state_of(record).items()})
    vitalloy.load_checkpoint(block, {k.removeprefix("blocks.0.fusion.0.0."): v for k, v in state.items()})
    assert sum(p.numel() for p in block.parameters()) == record["params"]
    seen: Outputs = {}
    listen(block, "out.attn", "attn", seen)
    return {"out.out": block(golden.inputs_of(record)["tokens"]), **seen}


MULTI_FUSION = {
    "img_size": 60,
    "image_scales": (1.0, 48 / 60),
    "embed_dims": (24, 36),
    "depths": ((2, 1, 2), (1, 2, 1)),
    "num_heads": (2, 3),
    "mlp_ratios": (3, 2),
    "num_classes": 11,
}

CASES = {
    "crossvit_tiny_224": Model("crossvit_tiny_224"),
    "crossvit_9_dagger_224": Model("crossvit_9_dagger_224"),
    "crossvit_9_input_224": Model("crossvit_9_224"),
    "multi_fusion_small": Model("crossvit_tiny_224", MULTI_FUSION),
    "cross_attention_block": cross_attention_block,
}
