"""MobileViG: inverted residuals, then graph blocks that join each pixel to every k-th pixel of its row and column.

"MobileViG: Graph-Based Sparse Attention for Mobile Vision Applications", Munir et al., CVPR Workshops 2023,
arXiv 2307.00395. For classification and detection on phones. Loads the authors' classification files; with
`averaged=True` their moving average, which their detector starts from.

The graph is the same for every image (Sparse Vision Graph Attention), so nothing is searched or reshaped, and any
size runs. Departures: where the paper puts an activation between the linear layers around the graph convolution, the
authors' code, which made the weights, has a batch norm alone; so it is here. The number of classes is honoured, which
the authors' constructors drop. Feature maps are those behind the last block of each stage, which the index lists of
the authors' detector mean and miss. The convolutions behind the global pooling are linear layers, and
new classifiers start small, as those of every backbone here, where the authors' start Kaiming normal.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from vitalloy.layers.backbone import drop_path_rates
from vitalloy.layers.conv_norm import ConvNorm
from vitalloy.layers.distilled_head import DistilledHead
from vitalloy.layers.mobile import BLOCK_KEYS, ConvBlock, ConvStem, LinearNorm, flatten_published, renamings
from vitalloy.layers.pyramid import Pyramid
from vitalloy.registry import Variant, register


class MaxRelative(nn.Module):
    """How far each channel of a pixel rises above the lowest of its neighbours, 0 where it does not.

    Neighbours are the pixels at multiples of `hop` above it and to its left, around the edge of the map: the largest
    of the differences that the authors form one by one is the difference from the smallest neighbour.
    """

    def __init__(self, hop: int = 2) -> None:
        super().__init__()
        self.hop = hop

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same shape, 0 or more."""
        return x - torch.minimum(self.lowest(x, 2), self.lowest(x, 3))

    def lowest(self, x: Tensor, axis: int) -> Tensor:
        """The smallest of each pixel and its neighbours along one axis; log2 of their number in steps."""
        wanted, covered = -(-int(x.shape[axis]) // self.hop), 1
        while covered < wanted:
            step = min(covered, wanted - covered)
            x = torch.minimum(x, x.roll(step * self.hop, axis))
            covered += step
        return x


class GraphConv(nn.Module):
    """Max-relative graph convolution: each pixel and its `MaxRelative`, projected together: C -> 2C channels."""

    def __init__(self, dim: int, hop: int = 2) -> None:
        super().__init__()
        self.relate = MaxRelative(hop)
        self.proj = LinearNorm(2 * dim, 2 * dim, act=nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat([x, self.relate(x)], dim=1))


class Grapher(nn.Module):
    """Graph convolution between two linear layers, with a residual."""

    def __init__(self, dim: int, hop: int = 2, drop_path: float = 0.0) -> None:
        super().__init__()
        self.fc1 = LinearNorm(dim, dim)
        self.graph_conv = GraphConv(dim, hop)
        self.fc2 = LinearNorm(2 * dim, dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.fc2(self.graph_conv(self.fc1(x))))


class FeedForward(nn.Module):
    """A perceptron at each pixel, with a residual."""

    def __init__(self, dim: int, hidden: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.fc1 = LinearNorm(dim, hidden, act=nn.GELU)
        self.fc2 = LinearNorm(hidden, dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.fc2(self.fc1(x)))


class GraphBlock(nn.Module):
    """`Grapher`, then `FeedForward`."""

    def __init__(self, dim: int, hop: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.grapher = Grapher(dim, hop, drop_path)
        self.ffn = FeedForward(dim, int(dim * mlp_ratio), drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.grapher(x))


class MobileViG(DistilledHead, Pyramid):
    """MobileViG: stages of strides 4, 8, 16 and 32 (and on, if there are more).

    Args:
        embed_dims, depths: channels and blocks, one entry a stage.
        graph_stages: how many of the last stages are made of graph blocks; the others of inverted residuals.
        hop: distance between neighbours in the graph.
        head_dim: channels of the layer between the global pooling and the classifiers.
        patch_stride: stride of the first stage, 4 or 2; 2 suits small images.
        layer_scale: where the scales of the inverted residuals start.
        distilled: a second classifier for a teacher's answers; see `set_distilled_training`.
        global_pool: "avg", "max" or "".
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (42, 84, 168, 256),
        depths: Sequence[int] = (2, 2, 6, 2),
        graph_stages: int = 1,
        hop: int = 2,
        mlp_ratio: float = 4.0,
        head_dim: int = 512,
        patch_stride: int = 4,
        layer_scale: float = 1e-5,
        distilled: bool = True,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.distilled, self.head_dim = distilled, head_dim
        self.key_table = published_names(depths, graph_stages)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        for i, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            embed: nn.Module = ConvStem(in_chans, dim, patch_stride)
            if i:
                embed = ConvNorm(embed_dims[i - 1], dim, 3, 2, bias=True)
            if i < len(depths) - graph_stages:
                blocks = [ConvBlock(dim, mlp_ratio, True, layer_scale, next(rates)) for _ in range(depth)]
            else:
                blocks = [GraphBlock(dim, hop, mlp_ratio, next(rates)) for _ in range(depth)]
            self.add_stage(embed, blocks, nn.Identity(), dim, patch_stride * 2**i)
            self.feature_info[i]["module"] = f"block{i + 1}.{depth - 1}"
        self.prediction = nn.Sequential(
            OrderedDict(fc=nn.Linear(self.num_features, head_dim), norm=nn.BatchNorm1d(head_dim), act=nn.GELU())
        )
        self.apply(init_weights)
        self.build_head(num_classes, global_pool, drop_rate)

    def build_head(self, num_classes: int, global_pool: str, drop_rate: float = 0.0) -> None:
        super().build_head(num_classes, global_pool, drop_rate)
        self.head_hidden_size = self.head_dim

    def make_classifier(self, num_classes: int) -> nn.Module:
        if not num_classes:
            return nn.Identity()
        head = nn.Linear(self.head_dim, num_classes)
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        x = self.pool(x)
        if x.ndim == 3:  # not pooled: every token is predicted from
            x = self.prediction(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        else:
            x = self.prediction(x)
        x = self.head_drop(x)
        return x if pre_logits else self.answer(x, x)

    def prune_levels(self, keep: int, prune_norm: bool) -> None:
        super().prune_levels(keep, prune_norm)
        self.prediction = nn.Identity()
        self.head_dim = self.num_features = self.feature_info[keep - 1]["num_chs"]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        groups = super().group_matcher(coarse)
        blocks = [(groups["blocks"], None)] if coarse else groups["blocks"]
        return {**groups, "blocks": [*blocks, (r"^prediction", (99999,))]}

    def reshape_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        linear = ("prediction.fc.weight", "head.weight", "head_dist.weight")  # published as 1x1 convolutions
        return {k: v.flatten(1) if k in linear else v for k, v in flatten_published(state).items()}


def init_weights(module: nn.Module) -> None:
    """The published start: Kaiming normal weights (fan in), zero biases. For `nn.Module.apply`."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(module.bias)


def published_names(depths: Sequence[int], graph_stages: int) -> list[tuple[str, str]]:
    """The key table: the authors count blocks and down-samplings together, in two lists."""
    graph = {
        r"0\.graph_conv\.nn\.0\.": "grapher.graph_conv.proj.linear.",
        r"0\.graph_conv\.nn\.1\.": "grapher.graph_conv.proj.norm.",
        r"0\.(fc\d)\.0\.": r"grapher.\2.linear.",
        r"0\.(fc\d)\.1\.": r"grapher.\2.norm.",
        r"1\.(fc\d)\.0\.": r"ffn.\2.linear.",
        r"1\.(fc\d)\.1\.": r"ffn.\2.norm.",
    }
    table = [
        (r"^stem\.stem\.0\.", "patch_embed1.conv1.conv."),
        (r"^stem\.stem\.1\.", "patch_embed1.conv1.norm."),
        (r"^stem\.stem\.3\.", "patch_embed1.conv2.conv."),
        (r"^stem\.stem\.4\.", "patch_embed1.conv2.norm."),
        (r"^prediction\.1\.", "prediction.fc."),
        (r"^prediction\.2\.", "prediction.norm."),
        (r"^dist_head\.", "head_dist."),
    ]
    where, at, locals_ = "local_backbone", 0, len(depths) - graph_stages
    for i, depth in enumerate(depths):
        if i:
            table.append((rf"^{where}\.{at}\.conv\.0\.", f"patch_embed{i + 1}.conv."))
            table.append((rf"^{where}\.{at}\.conv\.1\.", f"patch_embed{i + 1}.norm."))
            at += 1
        if i == locals_:  # the down-sampling to the first graph stage ends the list before
            where, at = "backbone", 0
        for j in range(depth):
            place, ours = rf"{where}\.({at})\.", f"block{i + 1}.{j}."
            table += renamings({place: ours}, BLOCK_KEYS if i < locals_ else graph)
            at += 1
    return table


def _sizes(embed_dims: Sequence[int], depths: Sequence[int], head_dim: int) -> dict:
    return {"embed_dims": embed_dims, "depths": depths, "head_dim": head_dim}


_NOTE = "distilled from RegNetY-16GF"
VARIANTS = {
    "mobilevig_ti": Variant(_sizes((42, 84, 168, 256), (2, 2, 6, 2), 512), note=_NOTE),
    "mobilevig_s": Variant(
        _sizes((42, 84, 176, 256), (3, 3, 9, 3), 512), 78.2, ("MobileViG_S_78_2.pth.tar",), note=_NOTE
    ),
    "mobilevig_m": Variant(
        _sizes((42, 84, 224, 400), (3, 3, 9, 3), 768), checkpoints=("MobileViG_M_80_7.pth.tar",), note=_NOTE
    ),
    "mobilevig_b": Variant(
        _sizes((42, 84, 240, 464), (5, 5, 15, 5), 768), 82.6, ("MobileViG_B_82_6.pth.tar",), note=_NOTE
    ),
    "mobilevig_nano": Variant(  # ours, for 32-pixel images: strides 2, 4, 8, 16
        {
            **_sizes((16, 32, 64, 96), (1, 1, 2, 2), 128),
            "hop": 1,
            "patch_stride": 2,
            "layer_scale": 0.1,
        },
        cfg={"input_size": (3, 32, 32), "crop_pct": 1.0},
    ),
}
register(MobileViG, VARIANTS, first_conv="patch_embed1.conv1.conv")
