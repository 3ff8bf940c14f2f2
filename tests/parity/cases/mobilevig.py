"""How the goldens of mobilevig are computed."""

from __future__ import annotations

from collections.abc import Callable

import golden
from torch import Tensor

import vitalloy
from cases.common import Model, Outputs


def part(path: str, place: str, dim: int, hop: int) -> Callable[[dict], Outputs]:
    """A small model's part at `path`, with the record's weights, which the authors' whole model calls `place`."""

    def run(record: dict) -> Outputs:
        args = {"embed_dims": (8, 8, 8, dim), "depths": (1, 1, 1, 1), "hop": hop}
        model = vitalloy.create_model("mobilevig_ti", **args).double()
        state = {f"{place}.{k}": v for k, v in golden.state_of(record).items()}
        assert not model.load_state_dict(model.convert_state(state), strict=False).unexpected_keys
        found = model.get_submodule(path).train(record["train"])
        assert sum(p.numel() for p in found.parameters()) == record["params"]
        return {"out": found(golden.inputs_of(record)["x"])}

    return run


def as_map(x: Tensor) -> Tensor:
    return x[..., None, None]


TWO_GRAPH_STAGES = {
    "embed_dims": (24, 48, 96, 128, 160),
    "depths": (1, 1, 1, 1, 2),
    "graph_stages": 2,
    "head_dim": 64,
    "distilled": False,
    "num_classes": 10,
}
GRAPH_CONV = ("block4.0.grapher.graph_conv", "backbone.0.0.graph_conv")
CASES = {
    "ti_224": Model(
        "mobilevig_ti",
        rename={
            "out.stem": "patch_embed1",
            "out.local0": "block1.0",
            "out.local_stage1": "block1.1",
            "out.down1": "patch_embed2",
            "out.local_end": "patch_embed4",
            "out.global0_grapher": "block4.0.grapher",
            "out.global0": "block4.0",
            "out.global1": "block4.1",
            "out.pooled": "prediction",
        },
        reshape={"out.pooled": as_map},
    ),
    "two_graph_stages_64x96": Model(
        "mobilevig_ti",
        TWO_GRAPH_STAGES,
        rename={"out.local": "patch_embed4", "out.g0": "block4.0", "out.down": "patch_embed5", "out.g2": "block5.1"},
    ),
    "graph_conv_k2": part(*GRAPH_CONV, dim=24, hop=2),
    "graph_conv_k3": part(*GRAPH_CONV, dim=16, hop=3),
    "grapher_train": part("block4.0.grapher", "backbone.0.0", dim=24, hop=2),
}
