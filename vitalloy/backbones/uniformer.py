"""UniFormer: one block form that relates tokens by convolution in two early stages and by attention in two late ones.

"UniFormer: Unifying Convolution and Self-attention for Visual Recognition", Li et al., TPAMI 2023, arXiv 2201.09450.
The form for clips is `uniformer_video`, the light models with fewer tokens are `uniformer_light`.

Loads the authors' classification files, with and without token labelling, and those of their detectors and segmenters.

Two forms, as published: the classifier has a batch norm behind the last stage; the dense backbone (`dense=True`, what
`features_only=True` builds) a layer norm behind each. Files trained with token labelling hold a second classifier
(`token_labels=True`): its highest logit over all positions counts half, which is in the authors' code alone.

Departures: any input size runs (the published classifier refuses others than its own); patches that do not fill a whole
cell are left out, as in the dense form. With token labels the answer is the same in training, where the published model
returns both classifiers apart for its loss and mixes patches of two images. The published `representation_size`, which
cannot work, is left out.

The width of a head cannot be read from the weights: `uniformer_small_plus` has heads of 32 channels, the other files
for images 64, those with token labels 32 unless their name says dim64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from vitalloy.layers.backbone import drop_path_rates
from vitalloy.layers.uniformer import ConvEmbed, GlobalBlock, LocalBlock, PatchEmbed, UniFormerPyramid
from vitalloy.registry import Variant, register


class UniFormer(UniFormerPyramid):
    """UniFormer for images: four stages of strides 4, 8, 16 and 32.

    Args:
        depths, embed_dims: blocks and channels, one entry a stage.
        head_dim: channels of a head.
        patch_stride: stride of the first stage; 2 suits small images.
        conv_stem: overlapping patches with batch norms instead of disjoint ones with layer norms.
        layer_scale: where the scales of the global blocks' branches start; None for none.
        dense: a norm behind each stage and none behind them all.
        attention: which tokens see each other in stage 3: "global", "windows", or "hybrid" (windows, but for every
            fourth block). The weights are the same.
        window: side of the windows.
        token_labels: a second classifier at each position.
        global_pool: "avg", "max" or "".
    """

    features_arch = {"dense": True}

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (3, 4, 8, 3),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        patch_stride: int = 4,
        conv_stem: bool = False,
        layer_scale: float | None = None,
        dense: bool = False,
        attention: str = "global",
        window: int = 14,
        token_labels: bool = False,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if attention not in ("global", "windows", "hybrid"):
            raise ValueError(f"attention={attention!r} is not one of 'global', 'windows' and 'hybrid'")
        self.token_labels = token_labels
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        for i, dim in enumerate(embed_dims):
            stride, width = (2, embed_dims[i - 1]) if i else (patch_stride, in_chans)
            if not conv_stem:
                embed: nn.Module = PatchEmbed(width, dim, (stride, stride), (stride, stride))
            elif i:
                embed = ConvEmbed((width, dim), (2,))
            else:
                embed = ConvEmbed((width, dim // 2, dim), (2, stride // 2))
            blocks: list[nn.Module] = []
            for j in range(depths[i]):
                if i < 2:
                    blocks.append(LocalBlock(dim, 2, mlp_ratio, next(rates)))
                    continue
                everywhere = i == 3 or attention == "global" or (attention == "hybrid" and j % 4 == 3)
                blocks.append(
                    GlobalBlock(
                        dim,
                        dim // head_dim,
                        mlp_ratio=mlp_ratio,
                        qkv_bias=qkv_bias,
                        attn_drop=attn_drop_rate,
                        drop_path=next(rates),
                        layer_scale=layer_scale,
                        window=None if everywhere else window,
                    )
                )
            norm = LayerNorm2d(dim, eps=1e-6) if dense else nn.Identity()
            self.add_stage(embed, blocks, norm, dim, patch_stride * 2**i)
        self.norm = nn.Identity() if dense else nn.BatchNorm2d(self.num_features)
        self.build_head(num_classes, global_pool, drop_rate)

    def build_head(self, num_classes: int, global_pool: str, drop_rate: float = 0.0) -> None:
        super().build_head(num_classes, global_pool, drop_rate)
        self.aux_head = self.make_classifier(num_classes) if self.token_labels and num_classes else None

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        logits = super().forward_head(x, pre_logits)
        if pre_logits or self.aux_head is None or not self.global_pool:
            return logits
        return logits + 0.5 * self.aux_head(x).amax(1)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        groups = super().group_matcher(coarse)
        fine = [(groups["blocks"], None)] if coarse else groups["blocks"]
        return {**groups, "blocks": [*fine, (r"^aux_head", (99999,))]}


_S: dict[str, Any] = {}
_S_PLUS: dict[str, Any] = {"depths": (3, 5, 9, 3), "conv_stem": True}
_B: dict[str, Any] = {"depths": (5, 8, 20, 7)}
_L: dict[str, Any] = {"depths": (5, 10, 24, 7), "embed_dims": (128, 192, 448, 640), "layer_scale": 1e-6}
_CONV_STEM = {"first_conv": "patch_embed1.proj.0"}


def _published() -> dict[str, Variant]:
    """Rows of (name, arguments, top-1 [, at 384 pixels]): first those from labels of images, then token labels."""
    plain = [
        ("small", _S, 82.9),
        ("small_plus", {**_S_PLUS, "head_dim": 32}, 83.4),
        ("small_plus_dim64", _S_PLUS, 83.4),
        ("base", _B, 83.8),
        ("base_ls", {**_B, "layer_scale": 1e-6}, 83.9),
    ]
    dense_labels = [
        ("small", {**_S, "head_dim": 32}, 83.4, 84.6),
        ("small_dim64", _S, 83.4, None),
        ("small_plus", {**_S_PLUS, "head_dim": 32}, 83.9, 84.9),
        ("small_plus_dim64", _S_PLUS, 83.6, None),
        ("base", {**_B, "head_dim": 32}, 85.1, 86.0),
        ("base_dim64", _B, 84.8, None),
        ("large_ls", _L, 85.6, 86.3),
    ]
    found = {}
    for name, arch, top1 in plain:
        cfg = {"crop_pct": 0.875, **(_CONV_STEM if "plus" in name else {})}
        found[f"uniformer_{name}"] = Variant(arch, top1, (f"uniformer_{name}_in1k.pth",), cfg)
    for name, arch, at_224, at_384 in dense_labels:
        for side, top1 in ((224, at_224), (384, at_384)):
            if top1 is not None:
                cfg = {"input_size": (3, side, side), **(_CONV_STEM if "plus" in name else {})}
                file = f"uniformer_{name}_tl_{side}"
                found[file] = Variant({**arch, "token_labels": True}, top1, (f"{file}.pth",), cfg, "token labelling")
    return found


VARIANTS = {
    "uniformer_nano": Variant(  # ours, for 32-pixel images: strides 2, 4, 8, 16
        {
            "depths": (1, 2, 3, 1),
            "embed_dims": (24, 48, 96, 128),
            "head_dim": 32,
            "patch_stride": 2,
            "conv_stem": True,
        },
        cfg={"input_size": (3, 32, 32), "crop_pct": 1.0, **_CONV_STEM},
    ),
    **_published(),
}
register(UniFormer, VARIANTS, first_conv="patch_embed1.proj")
