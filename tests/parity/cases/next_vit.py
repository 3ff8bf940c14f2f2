"""How the goldens of next_vit are computed."""

from __future__ import annotations

from collections.abc import Callable

import golden
from torch import nn

import vitalloy
from cases.common import Model, Outputs
from vitalloy.backbones.next_vit import ConvBlock, ReducedAttention, TransformerBlock


def load(part: nn.Module, record: dict, path: str = "") -> nn.Module:
    """A part alone, with the recorded weights under their names in the whole model."""
    state = {f"features.0.{path}{k}": v for k, v in golden.state_of(record).items()}
    ours = vitalloy.create_model("nextvit_nano").convert_state(state)
    prefix = "features.0." + ("attn." if path else "")
    vitalloy.load_checkpoint(part, {k.removeprefix(prefix): v for k, v in ours.items()})
    assert sum(p.numel() for p in part.parameters()) == record["params"]
    return part.double().train(record["train"])


def block(make: Callable[[], nn.Module]) -> Callable[[dict], Outputs]:
    return lambda record: {"out": load(make().double(), record)(golden.inputs_of(record)["x"])}


def e_mhsa_train(record: dict) -> Outputs:
    part = load(ReducedAttention(64, 2).double(), record, "e_mhsa.")
    return {"out": part(golden.inputs_of(record)["tokens"], (4, 8))}


def ntb_merge(record: dict) -> Outputs:
    part, x = load(TransformerBlock(96, 128, reduction=2).double(), record), golden.inputs_of(record)["x"]
    before = part(x)
    part.fuse()
    (k, v), (kb, vb) = part.attn.kv.weight.chunk(2), part.attn.kv.bias.chunk(2)
    weights = {
        "out.q_weight": part.attn.q.weight,
        "out.q_bias": part.attn.q.bias,
        "out.k_weight": k,
        "out.k_bias": kb,
        "out.v_weight": v,
        "out.v_bias": vb,
        "out.mlp_weight": part.mlp.fc1.weight[..., None, None],
        "out.mlp_bias": part.mlp.fc1.bias,
    }
    return {"out.before": before, "out.after": part(x), **weights}


CASES = {
    "small_224": Model(
        "nextvit_small",
        rename={
            "out.ncb0": "features.0",
            "out.stage1": "features.2",
            "out.ntb6": "features.6",
            "out.stage3": "features.16",
            "out.stage4": "features.19",
        },
    ),
    "ncb": block(lambda: ConvBlock(64, 96, 2)),
    "ntb_merge": ntb_merge,
    "ntb_sr4_odd": block(lambda: TransformerBlock(64, 128, 2, 4)),
    "e_mhsa_train": e_mhsa_train,
}
