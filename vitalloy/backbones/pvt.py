"""PVT: the first transformer pyramid, a drop-in for a convolutional backbone in detectors and segmenters.

"Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions", Wang et al., ICCV 2021,
arXiv 2102.12122. Loads the authors' classification and detection files and those of the transformers port.

Two forms, as published: the classifier puts a class token in front of stage 4 and normalises at the end; the dense
backbone (`class_token=False`, what `features_only=True` builds) has neither. Stages end without a norm.

Departure: a stage's position table is resized (bilinearly, corners not aligned) when its own grid differs from the
table's. The published code compares with the first stage's cell count, which fails for 448-pixel input.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import torch
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from vitalloy.layers.backbone import Backbone, Level, drop_path_rates, init_weights
from vitalloy.layers.mlp import Mlp
from vitalloy.layers.polyphase import PolyphaseAnchor, PositionConv, anchor_input
from vitalloy.layers.positions import resample_positions
from vitalloy.layers.spatial_reduction import SpatialReductionAttention, fuse_keys_values
from vitalloy.layers.tokens import to_map, to_tokens
from vitalloy.registry import Variant, register


class PatchEmbed(nn.Module):
    """Cuts a map into patches, projects and normalises each: (B, C, H, W) -> (B, N, D) and the patch grid."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(embed_dim)  # eps 1e-5, where the blocks have 1e-6

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        # an image comes with its channels apart: one small copy of it saves a large one of the patches
        x = self.proj(x.contiguous(memory_format=torch.channels_last))
        return self.norm(to_tokens(x)), x.shape[-2:]


class Block(nn.Module):
    """Pre-norm spatial-reduction attention and perceptron, each with a residual."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        reduction: int,
        mlp_ratio: float,
        qkv_bias: bool,
        attn_drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SpatialReductionAttention(dim, num_heads, reduction, qkv_bias=qkv_bias, dropout=attn_drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def _transformers_keys() -> list[tuple[str, str]]:
    """The transformers port's names under ours; it counts stages from 0 and keeps keys and values apart."""
    names = {
        "layer_norm_1": "norm1",
        "attention.self.query": "attn.q",
        "attention.self.key": "attn.k",
        "attention.self.value": "attn.v",
        "attention.self.sequence_reduction": "attn.sr",
        "attention.self.layer_norm": "attn.norm",
        "attention.output.dense": "attn.proj",
        "layer_norm_2": "norm2",
        "mlp.dense1": "mlp.fc1",
        "mlp.dense2": "mlp.fc2",
    }
    encoder = r"^(?:pvt\.)?encoder\."
    table = [(rf"{encoder}layer_norm\.", "norm."), (r"^classifier\.", "head.")]
    for i in range(4):
        embed = rf"{encoder}patch_embeddings\.{i}\."
        table += [
            (rf"{embed}position_embeddings$", f"pos_embed{i + 1}"),
            (rf"{embed}cls_token$", "cls_token"),
            (rf"{embed}projection\.", f"patch_embed{i + 1}.proj."),
            (rf"{embed}layer_norm\.", f"patch_embed{i + 1}.norm."),
        ]
        for theirs, ours in names.items():
            table.append((rf"{encoder}block\.{i}\.(\d+)\.{re.escape(theirs)}\.", rf"block{i + 1}.\1.{ours}."))
    return table


class PyramidVisionTransformer(Backbone):
    """PVT v1: four stages of strides 4, 8, 16 and 32.

    Args:
        img_size: the (height, width) or side that the position tables are made for; other inputs resize them.
        embed_dims, num_heads, reductions, mlp_ratios, depths: one entry a stage.
        class_token: False makes the dense form. The last stage's table keeps its first row, the class token's, in
            both forms, as in the published files.
        anchored: a shift-equivariant form of ours, see `anchor_phases`.
        global_pool: "token", "avg", ...; by default the class token where there is one, else the mean.
    """

    key_table = ((r"^backbone\.(.+)", r"\1"), *_transformers_keys())
    default_out_indices = (0, 1, 2, 3)
    features_arch = {"class_token": False}

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        reductions: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        depths: Sequence[int] = (2, 2, 2, 2),
        qkv_bias: bool = True,
        class_token: bool = True,
        anchored: bool = False,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.num_stages = 4
        self.num_features = embed_dims[-1]
        self.num_prefix_tokens = int(class_token)
        self.grids: list[tuple[int, int]] = []
        self.feature_info = []
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        stride = 1
        for i in range(4):
            last = i == 3
            patch, dim = (2 if i else 4), embed_dims[i]
            stride *= patch
            height, width = height // patch, width // patch
            self.grids.append((height, width))
            embed = PatchEmbed(patch, embed_dims[i - 1] if i else in_chans, dim)
            blocks = nn.ModuleList(
                Block(dim, num_heads[i], reductions[i], mlp_ratios[i], qkv_bias, attn_drop_rate, next(rates))
                for _ in range(depths[i])
            )
            table = nn.Parameter(torch.zeros(1, height * width + last, dim))
            trunc_normal_(table, std=0.02)
            self.register_module(f"patch_embed{i + 1}", embed)
            self.register_parameter(f"pos_embed{i + 1}", table)
            self.register_module(f"block{i + 1}", blocks)
            self.feature_info.append({"num_chs": dim, "reduction": stride, "module": f"block{i + 1}.{depths[i] - 1}"})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.num_features)) if class_token else None
        if class_token:
            trunc_normal_(self.cls_token, std=0.02)
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6)
        self.apply(init_weights)
        self.anchored = False
        if anchored:
            self.anchor_phases()
        self.build_head(num_classes, global_pool or ("token" if class_token else "avg"), drop_rate)

    @torch.no_grad()
    def anchor_phases(self) -> None:
        """Become shift-equivariant, in place: anchors before patches and reductions, convolutions for tables.

        The patches lose their positions, so trained weights need fine-tuning. `layers/polyphase.py` has the limits.
        """
        self.anchored = True
        if self.cls_token is not None:
            self.cls_token += self.pos_embed4[:, :1]
        for i in range(self.num_stages):
            embed, table = self.get_submodule(f"patch_embed{i + 1}"), self.get_parameter(f"pos_embed{i + 1}")
            anchor_input(embed, PolyphaseAnchor(embed.proj.stride))
            for block in self.get_submodule(f"block{i + 1}"):
                if block.attn.sr is not None:
                    anchor_input(block, PolyphaseAnchor(block.attn.sr.stride))
            delattr(self, f"pos_embed{i + 1}")
            positions = PositionConv(table.shape[-1], circular=True).start_empty()
            self.register_module(f"pos_conv{i + 1}", positions.to(table))

    def forward_levels(self, x: Tensor, take: Collection[int], stop: int, norm: bool) -> tuple[Tensor, list[Level]]:
        levels = []
        for i in range(min(stop, self.num_stages)):
            x, grid = self.get_submodule(f"patch_embed{i + 1}")(x)
            last = i == 3
            if self.anchored:
                x = self.get_submodule(f"pos_conv{i + 1}")(x, grid)
            if last and self.cls_token is not None:
                x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
            if not self.anchored:
                positions = self.positions(i, grid)
                x = x + (positions[:, 1:] if last and self.cls_token is None else positions)
            for block in self.get_submodule(f"block{i + 1}"):
                x = self.run(block, x, grid)
            prefix = self.num_prefix_tokens if last else 0
            tokens = self.norm(x) if last and norm else x
            level = Level(to_map(tokens[:, prefix:], grid), tokens[:, :prefix] if prefix else None)
            if i in take:
                levels.append(level)
            x = x if last else level.map
        return x, levels

    def forward_final(self, state: Tensor) -> Tensor:
        return self.norm(state) if state.ndim == 3 else to_tokens(state)  # a map: stopped before the last stage

    def positions(self, stage: int, grid: tuple[int, int]) -> Tensor:
        """A stage's position table for a patch grid, (1, N, D); the last one has the class token's row in front."""
        table = self.get_parameter(f"pos_embed{stage + 1}")
        prefix = int(stage == 3)
        return resample_positions(
            table, grid, old_grid=self.grids[stage], prefix=prefix, mode="bilinear", antialias=False
        )

    def prune_levels(self, keep: int, prune_norm: bool) -> None:
        for i in range(keep, self.num_stages):
            for part in ("patch_embed", "pos_conv" if self.anchored else "pos_embed", "block"):
                delattr(self, f"{part}{i + 1}")
        if keep < self.num_stages:
            self.cls_token = None
        self.num_stages = min(keep, self.num_stages)
        if prune_norm:
            self.norm = nn.Identity()

    def no_weight_decay(self) -> set[str]:
        return {"cls_token"}  # the position tables do decay, as published

    def group_matcher(self, coarse: bool = False) -> dict:
        """How layer-wise learning rates group the parameters."""
        if coarse:
            blocks = [(r"^(?:patch_embed|pos_(?:embed|conv)|block)(\d)", None), (r"^cls_token", (4,))]
            blocks.append((r"^norm", (99999,)))
            return {"stem": r"^patch_embed1|pos_(?:embed|conv)1", "blocks": blocks}
        return {
            "stem": r"^patch_embed1|pos_(?:embed|conv)1",
            "blocks": [
                (r"^block(\d)\.(\d+)", None),
                (r"^(?:patch_embed|pos_(?:embed|conv))(\d)", (0,)),
                (r"^cls_token", (4, 0)),
                (r"^norm", (99999,)),
            ],
        }

    def reshape_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = fuse_keys_values(state)
        for i in range(0 if self.anchored else self.num_stages):
            name = f"pos_embed{i + 1}"
            if name in state and state[name].shape != self.get_parameter(name).shape:
                state[name] = resample_positions(
                    state[name], self.grids[i], prefix=int(i == 3), mode="bilinear", antialias=False
                )
        return state


VARIANTS = {
    "pvt_tiny": Variant({}, 75.1, ("pvt_tiny.pth",)),
    "pvt_small": Variant({"depths": (3, 4, 6, 3)}, 79.8, ("pvt_small.pth",)),
    "pvt_medium": Variant({"depths": (3, 4, 18, 3)}, 81.2, ("pvt_medium.pth",)),
    "pvt_large": Variant({"depths": (3, 8, 27, 3)}, 81.7, ("pvt_large.pth",)),
    "pvt_huge_v2": Variant(  # v2 of the first design: in the authors' code, without results
        {"embed_dims": (128, 256, 512, 768), "num_heads": (2, 4, 8, 12), "depths": (3, 10, 60, 3)}
    ),
}
register(PyramidVisionTransformer, VARIANTS, first_conv="patch_embed1.proj")
