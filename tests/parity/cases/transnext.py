"""How the goldens of transnext are computed."""

from __future__ import annotations

from collections.abc import Callable

import golden
import torch
from torch import Tensor, nn

import vitalloy
from cases.common import Model, Outputs
from vitalloy.backbones import transnext
from vitalloy.layers import focal

SMALL = {"embed_dims": (24, 48, 96, 192), "depths": (1, 1, 2, 1)}


def dense(mode: str) -> Callable[[dict], Outputs]:
    def run(record: dict) -> Outputs:
        args = {**SMALL, "img_size": 128, "pretrain_size": 96, "position_mode": mode}
        model = vitalloy.create_model("transnext_micro", features_only=True, **args).double().eval()
        vitalloy.load_checkpoint(model, golden.state_of(record))
        assert sum(p.numel() for p in model.parameters()) == record["params"]
        return {f"out.stage{i + 1}": m for i, m in enumerate(model(*golden.inputs_of(record).values()))}

    return run


def part(record: dict, module: nn.Module, grid: tuple[int, int]) -> Outputs:
    """One part of a block, under the author's names, on the record's tokens."""
    prefix = "block1.0.attn." if isinstance(module, transnext.AggregatedAttention) else "block1.0.mlp."
    model = vitalloy.create_model("transnext_nano", num_classes=0)
    state = model.convert_state({prefix + k: v for k, v in golden.state_of(record).items()})
    module = module.double().eval()
    vitalloy.load_checkpoint(module, {k.removeprefix(prefix): v for k, v in state.items()})
    assert sum(p.numel() for p in module.parameters()) == record["params"]
    return {"out": module(golden.inputs_of(record)["tokens"], grid)}


def aggregated_attention(record: dict) -> Outputs:
    views = focal.Views((8, 8), reduction=2, window=3)
    return part(record, transnext.AggregatedAttention(32, 4, views, pretrain=(7, 7)), (8, 8))


def convolutional_glu(record: dict) -> Outputs:
    return part(record, transnext.ConvGlu(20, 80), (5, 7))


def tables(record: dict) -> Outputs:
    def relative(queries: tuple[int, int], keys: tuple[int, int], pretrain: tuple[int, int]) -> Tensor:
        view = focal.make_view(queries, keys)
        rows = focal.coordinates(view, pretrain, torch.float64)[view.index]
        return rows.unflatten(0, (queries[0] * queries[1], keys[0] * keys[1]))

    def local(grid: tuple[int, int], window: int) -> dict[str, Tensor]:
        outside = focal.make_view(grid, (1, 1), window).outside
        name = f"{grid[0]}x{grid[1]}_w{window}"
        length = (~outside).sum(-1).unflatten(0, grid)
        return {f"local_length_{name}": length.double(), f"outside_{name}": outside.double()}

    return {
        "q7x5_k3x2_p7": relative((7, 5), (3, 2), (7, 7)),
        "q14x14_k7x7_none": relative((14, 14), (7, 7), (14, 14)),
        "q9x9_k4x4_p7": relative((9, 9), (4, 4), (7, 7)),
        **local((5, 6), 3),
        **local((7, 7), 5),
    }


CASES = {
    "micro_224": Model("transnext_micro"),
    "micro_288_extrapolated": Model("transnext_micro", {"img_size": 288, "pretrain_size": 224}),
    "micro_256_linear": Model("transnext_micro", {"img_size": 256, "pretrain_size": 224, "fixed_pool_size": 7}),
    "aggregated_all_stages_128": Model("transnext_micro_aaaa", {**SMALL, "img_size": 128, "num_classes": 10}),
    "backbone_extrapolated_160x224": dense("extrapolate"),
    "backbone_interpolated_160x224": dense("interpolate"),
    "aggregated_attention": aggregated_attention,
    "convolutional_glu": convolutional_glu,
    "tables": tables,
}
