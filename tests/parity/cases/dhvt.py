"""How the goldens of dhvt are computed."""

from __future__ import annotations

import golden
from torch import Tensor, nn

import vitalloy
from cases.common import Model, Outputs
from vitalloy.backbones.dhvt import AggregationFeedForward, DynamicHybridViT, HeadTokenAttention, OverlapPatchEmbed

PATHS = {"out.attn0": "blocks.0.attn", "out.daff0": "blocks.0.mlp"}
PATHS |= {f"out.block{i}": f"blocks.{i}" for i in (0, 5, 11)}


class Host(DynamicHybridViT):
    """One part under the name that it has in a model, so that the model's own key table serves it."""

    def __init__(self, name: str, part: nn.Module) -> None:
        nn.Module.__init__(self)
        if name == "patch_embed":
            self.patch_embed = part
        else:
            self.blocks = nn.ModuleList([nn.ModuleDict({name: part})])


def loaded(name: str, part: nn.Module, record: dict) -> nn.Module:
    prefix = "patch_embed." if name == "patch_embed" else f"blocks.0.{name}."
    vitalloy.load_checkpoint(Host(name, part.double()), {prefix + k: v for k, v in golden.state_of(record).items()})
    assert sum(p.numel() for p in part.parameters()) == record["params"]
    return part.train(record["train"])


def patch_embedding(patch_size: int, dim: int):
    def run(record: dict) -> Outputs:
        embed = loaded("patch_embed", OverlapPatchEmbed(patch_size, 3, dim), record)
        return {"out": embed(golden.inputs_of(record)["image"])[0]}

    return run


def attention(record: dict) -> Outputs:
    tokens = golden.inputs_of(record)["tokens"]
    return {"out": loaded("attn", HeadTokenAttention(64, 4), record)(tokens)}


def feed_forward(dim: int, side: int):
    def run(record: dict) -> dict[str, Tensor]:
        part = loaded("mlp", AggregationFeedForward(dim, 4 * dim), record)
        return {"out": part(golden.inputs_of(record)["tokens"], (side, side))}

    return run


CASES = {
    "tiny_cifar_patch4": Model("dhvt_tiny_cifar_patch4", {"num_classes": 100}, rename=PATHS),
    "tiny_imagenet_patch16": Model("dhvt_tiny", rename=PATHS),
    "sope_patch2": patch_embedding(2, 48),
    "sope_patch16": patch_embedding(16, 64),
    "head_token_attention": attention,
    "daff": feed_forward(48, 5),
    "daff_train": feed_forward(16, 4),
}
