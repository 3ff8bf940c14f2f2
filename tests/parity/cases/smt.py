"""How the goldens of smt are computed."""

from __future__ import annotations

import golden
from torch import Tensor, nn

import vitalloy
from cases.common import Model, Outputs, listen
from vitalloy.backbones.smt import ConvValueAttention, ScaleAwareModulation, ScaleAwareModulationTransformer
from vitalloy.layers.tokens import to_map

GRID = (7, 6)
LAYERSCALE_HEAD7 = {
    "num_classes": 21,
    "embed_dims": (48, 96, 192, 384),
    "depths": (2, 1, 3, 2),
}


class Host(ScaleAwareModulationTransformer):
    """One mixer under the name that it has in a model, so that the model's own key table serves it."""

    def __init__(self, mixer: nn.Module) -> None:
        nn.Module.__init__(self)
        self.num_stages = 1
        self.block1 = nn.ModuleList([nn.ModuleDict({"attn": mixer})])


def mixer(module: nn.Module, record: dict) -> tuple[Tensor, Outputs]:
    seen: Outputs = {}
    state = {f"block1.0.attn.{k}": v for k, v in golden.state_of(record).items()}
    vitalloy.load_checkpoint(Host(module.double().eval()), state)
    assert sum(p.numel() for p in module.parameters()) == record["params"]
    listen(module, "out.modulator", "modulator", seen)
    return module(golden.inputs_of(record)["tokens"], GRID), seen


def modulation(record: dict) -> Outputs:
    out, seen = mixer(ScaleAwareModulation(32), record)
    return {"out.out": out, "out.modulator": to_map(seen["out.modulator"], GRID)}


def attention(record: dict) -> Outputs:
    return {"out": mixer(ConvValueAttention(32, 8), record)[0]}


CASES = {
    "smt_tiny_224": Model("smt_tiny"),
    "layerscale_head7_small": Model("smt_large", LAYERSCALE_HEAD7),
    "sam_module": modulation,
    "attention_module": attention,
}
