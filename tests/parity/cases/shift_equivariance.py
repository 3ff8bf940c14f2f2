"""How the goldens of shift_equivariance are computed."""

from __future__ import annotations

from collections.abc import Callable

import golden

import vitalloy
from cases.common import Model, Outputs
from vitalloy.layers import polyphase

ROLLS = ((1, 1), (5, 3), (-7, 11))


def twins(name: str) -> Model:
    depths = vitalloy.registry.entry(name).variant.arch.get("depths", (3, 4, 6, 3))
    stages = {f"out.stage{i}": f"blocks.{i}.{depth - 1}" for i, depth in enumerate(depths)}
    return Model(name, rename={**stages, "out.pos_block0": "pos_block.0"})


def anchored(name: str) -> Callable[[dict], Outputs]:
    def run(record: dict) -> Outputs:
        model = vitalloy.create_model(name).double().eval()
        vitalloy.load_checkpoint(model, golden.state_of(record))
        assert sum(p.numel() for p in model.parameters()) == record["params"]
        image = golden.inputs_of(record)["image"]
        tokens = model.forward_features(image)
        rolled = {f"out.logits_roll_{y}_{x}": model(image.roll((y, x), (2, 3))) for y, x in ROLLS}
        return {"out.tokens": tokens, "out.logits": model.forward_head(tokens), **rolled}

    return run


def poly_order(stride: int) -> Callable[[dict], Outputs]:
    def run(record: dict) -> Outputs:
        x = golden.inputs_of(record)["x"]
        return {
            "out.anchored": polyphase.polyphase_anchor(x, stride),
            "out.phase_norms": polyphase.phase_norms(x, (stride, stride)),
        }

    return run


def poly_patch_embed(record: dict) -> Outputs:
    embed = polyphase.AnchoredPatchEmbed(4, 3, 12).double()
    vitalloy.load_checkpoint(embed, golden.state_of(record))
    return {"out": embed(golden.inputs_of(record)["x"])[0]}


def pos_conv(record: dict) -> Outputs:
    conv = polyphase.PositionConv(10, circular=True).double()
    vitalloy.load_checkpoint(conv, golden.state_of(record))
    return {"out": conv(golden.inputs_of(record)["x"], (6, 6))}


CASES = {
    "twins_pcpvt_small": twins("twins_pcpvt_small"),
    "twins_svt_small": twins("twins_svt_small"),
    "poly_order_4": poly_order(4),
    "poly_order_7": poly_order(7),
    "poly_patch_embed": poly_patch_embed,
    "pos_conv": pos_conv,
    "polyvit_small16": anchored("polyvit_small_patch16_224"),
    "polytwins_svt_small": anchored("polytwins_svt_small"),
}
