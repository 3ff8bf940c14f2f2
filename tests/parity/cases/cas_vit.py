"""How the goldens of cas_vit are computed."""

from __future__ import annotations

from typing import Any

import golden
from torch import nn

import vitalloy
from cases.common import Model, Outputs
from vitalloy.backbones.cas_vit import AdditiveAttention, Block, CASViT
from vitalloy.layers.tokens import to_map, to_tokens

PATHS = {"out.stem": "stages.0.embed", "out.block0": "stages.0.blocks.0", "out.down1": "stages.1.embed"}
PATHS |= {f"out.stage{i + 1}": f"stages.{i}" for i in range(4)}


def pair(result: Any) -> Outputs:
    return golden.flatten(result, "out.logits")


class Host(CASViT):
    """One block under the name that it has in a model, so that the model's own key table serves it."""

    def __init__(self, block: nn.Module) -> None:
        nn.Module.__init__(self)
        self.distilled = False
        self.stages = nn.ModuleList([nn.ModuleDict({"blocks": nn.ModuleList([block])})])


def load(part: nn.Module, host: nn.Module, record: dict, prefix: str) -> None:
    vitalloy.load_checkpoint(host, {prefix + k: v for k, v in golden.state_of(record).items()})
    assert sum(p.numel() for p in part.parameters()) == record["params"]
    part.train(record["train"])


def token_mixer(record: dict) -> Outputs:
    mixer = AdditiveAttention(48).double()
    load(mixer, Host(nn.ModuleDict({"attn": mixer})), record, "network.0.0.attn.")
    image = golden.inputs_of(record)["image"]
    grid = image.shape[-2:]
    q, k = mixer.gate(to_map(mixer.qk(to_tokens(image)), grid))
    return {"out.q_gated": to_map(q, grid), "out.k_gated": to_map(k, grid), "out.out": mixer(image)}


def block_train(record: dict) -> Outputs:
    block = Block(32, 4).double()
    load(block, Host(block), record, "network.0.0.")
    return {"out": block(golden.inputs_of(record)["image"])}


def features(record: dict) -> Outputs:
    model = vitalloy.create_model("cas_vit_xs", features_only=True).double().eval()
    vitalloy.load_checkpoint(model, golden.state_of(record))
    assert sum(p.numel() for p in model.parameters()) == record["params"]
    return {f"out.p{i + 2}": level for i, level in enumerate(model(golden.inputs_of(record)["image"]))}


CASES = {
    "xs_224": Model("cas_vit_xs", rename=PATHS),
    "xs_dist_eval": Model("cas_vit_xs", {"num_classes": 10, "distilled": True}, rename=PATHS),
    "s_dist_train": Model(
        "cas_vit_s",
        {"num_classes": 10, "distilled": True},
        rename=PATHS,
        result=pair,
        prepare=lambda model: model.set_distilled_training(True),
    ),
    "xs_features_128": features,
    "token_mixer": token_mixer,
    "block_train": block_train,
}
