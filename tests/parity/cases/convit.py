"""How the goldens of convit are computed."""

from __future__ import annotations

import golden
from torch import nn

import vitalloy
from cases.common import Model, Outputs
from vitalloy.backbones import convit


def convit_tiny(record: dict) -> Outputs:
    maps: Outputs = {}

    def watch(model: nn.Module) -> None:
        attention = model.blocks[0].attn
        attention.register_forward_pre_hook(
            lambda m, args: maps.__setitem__("out.blocks.0.attention_map", m.attention_map(*args))
        )

    return {**Model("convit_tiny", prepare=watch)(record), **maps}


def convit_gpsa(record: dict) -> Outputs:
    attention = convit.GatedPositionalAttention(72, 9, qkv_bias=True).double().eval()
    vitalloy.load_checkpoint(attention, golden.state_of(record))
    tokens, grid = golden.inputs_of(record)["tokens"], (6, 6)
    full = attention.attention_map(tokens, grid)
    distance = convit.mean_distance(full, grid)
    return {"out.out": attention(tokens, grid), "out.attention": full, "out.nonlocality": distance}


def convit_local_init(record: dict) -> Outputs:
    out: Outputs = {}
    for dim, heads, strength in ((16, 4, 1.0), (18, 9, 0.5), (24, 12, 1.0)):
        attention = convit.GatedPositionalAttention(dim, heads)
        attention.init_local(strength)
        case, rows = f"dim{dim}_heads{heads}_strength{strength}", int(heads**0.5) ** 2
        out[f"{case}.pos_proj_weight_rows_set"] = attention.pos_proj.weight[:rows]
        out[f"{case}.v_weight"] = attention.v.weight
    return out


CASES = {
    "tiny_224": convit_tiny,
    "gpsa_module": convit_gpsa,
    "local_init": convit_local_init,
}
