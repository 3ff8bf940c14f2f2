"""How the goldens of dualtoken_vit are computed: the parts that it shares with LightViT, under LightViT's names."""

from __future__ import annotations

import re

import golden
import torch
from torch import Tensor, nn

import vitalloy
from cases.common import Outputs
from vitalloy.backbones import dualtoken_vit


def load(part: nn.Module, record: dict) -> nn.Module:
    """The record's weights in a part; the model's own conversion translates them."""
    part = part.to(getattr(torch, record["dtype"])).train(record["train"])
    state = vitalloy.create_model("dualtoken_vit_nano").convert_state(golden.state_of(record))
    loaded = part.load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys and all(k.endswith("num_batches_tracked") for k in loaded.missing_keys)
    assert sum(p.numel() for p in part.parameters()) == record["params"]
    return part


def shapes(record: dict) -> dict[str, list[int]]:
    return {key: shape for key, shape, _ in record["state"]}


def stem(record: dict) -> Outputs:
    width, in_chans = shapes(record)["proj.weight"][0], record["inputs"]["image"]["shape"][1]
    part = load(dualtoken_vit.Stem(in_chans, width), record)
    return {"out": part(golden.inputs_of(record)["image"])[0]}


def bidim_attention(record: dict) -> Outputs:
    part = load(dualtoken_vit.BidimAttention(shapes(record)["norm.weight"][0]), record)
    return {"out": part(golden.inputs_of(record)["tokens"])}


def ffn_with_bidim(record: dict) -> Outputs:
    hidden, dim = shapes(record)["fc1.weight"]
    return {"out": load(dualtoken_vit.BidimMlp(dim, hidden), record)(golden.inputs_of(record)["tokens"])}


def merge_patch(record: dict) -> Outputs:
    count, height, width = map(int, re.search(r"(\d+) global tokens .* (\d+)x(\d+) map", record["entry"]).groups())
    out_dim, dim = shapes(record)["proj.weight"]
    both: Tensor = golden.inputs_of(record)["tokens"]
    part = load(dualtoken_vit.MergePatch(dim, out_dim), record)
    tokens, image, _ = part(both[:, :count], both[:, count:], (height, width))
    return {"out": torch.cat([tokens, image], dim=1)}


CASES = {
    "stem": stem,
    "bidim_attention": bidim_attention,
    "ffn_with_bidim": ffn_with_bidim,
    "merge_patch": merge_patch,
}
