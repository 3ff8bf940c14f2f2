"""The plain vision transformer and DeiT: baseline and host of most methods in this library.

- "An Image is Worth 16x16 Words", Dosovitskiy et al., ICLR 2021, arXiv 2010.11929.
- "Training data-efficient image transformers & distillation through attention" (DeiT), Touvron et al., ICML 2021,
  arXiv 2012.12877.

Loads the authors' DeiT files and timm's ViT/DeiT files of the same shape; the parameter names are theirs. A model with
another grid resizes the position table (bicubic with antialiasing, as timm does) at loading, and for an input of
another size in the forward pass. The authors' own fine-tuning at 384 resized without antialiasing.

PolyViT is the shift-equivariant form (`anchored=True`): "Reviving Shift Equivariance in Vision Transformers", Ding et
al., 2023, arXiv 2306.07470; see `layers/polyphase.py` for what is guaranteed. Its position convolution starts at zero
(our choice), and `drop_rate` acts before the classifier only.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from vitalloy.layers.backbone import Level, drop_path_rates, init_weights
from vitalloy.layers.distilled_head import DistilledHead
from vitalloy.layers.patch_embed import PatchEmbed
from vitalloy.layers.polyphase import AnchoredPatchEmbed, PositionConv
from vitalloy.layers.positions import resample_positions
from vitalloy.layers.tokens import to_map
from vitalloy.layers.transformer_block import TransformerBlock
from vitalloy.registry import Variant, register


class VisionTransformer(DistilledHead):
    """ViT / DeiT.

    Args:
        img_size: the (height, width) or side that the position table is made for; other inputs resize it.
        anchored: the shift-equivariant form, PolyViT: patches of the image's strongest phase, normalised, and a
            circular position convolution in place of the table.
        distilled: a distillation token and a second head. In training after `set_distilled_training(True)` the
            model returns (class logits, distillation logits); otherwise their mean.
        global_pool: "token" (the class token), or "avg", "max", "gem", "ggem" of the patches.
        norm_pooled: norm what was pooled (`fc_norm`) instead of the tokens before it; when not given, with "avg" and
            "max" alone.
    """

    key_table = (
        (r"^pre_logits\.", None),
        (r"^(?:backbone|encoder)\.(.+)", r"\1"),
    )
    default_out_indices = 3
    shared_features = False  # the heads read a token each

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        distilled: bool = False,
        anchored: bool = False,
        global_pool: str = "token",
        norm_pooled: bool | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid = (height // patch_size, width // patch_size)
        if not all(self.grid):
            raise ValueError(f"img_size={img_size} is smaller than one patch of {patch_size}")
        self.patch_size, self.distilled = patch_size, distilled
        self.num_features = self.embed_dim = embed_dim
        self.num_prefix_tokens = 2 if distilled else 1
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if distilled else None
        rows = self.num_prefix_tokens + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, embed_dim))
        self.pos_conv: nn.Module | None = None
        self.norm_pre = nn.Identity()  # where hooks see the token sequence that enters the blocks
        rates = drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(
            TransformerBlock(embed_dim, num_heads, mlp_ratio, qkv_bias, attn_drop_rate, rate) for rate in rates
        )
        pooled = global_pool in ("avg", "max") if norm_pooled is None else norm_pooled
        self.norm = nn.Identity() if pooled else nn.LayerNorm(embed_dim, eps=1e-6)
        self.fc_norm = nn.LayerNorm(embed_dim, eps=1e-6) if pooled else nn.Identity()
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]
        for table in (self.cls_token, self.dist_token, self.pos_embed):
            if table is not None:
                trunc_normal_(table, std=0.02)
        self.apply(init_weights)
        self.anchored = False
        if anchored:
            self.anchor_phases()
        self.build_head(num_classes, global_pool, drop_rate)

    @torch.no_grad()
    def anchor_phases(self) -> None:
        """Become shift-equivariant, in place. The patches lose their positions, so trained weights need fine-tuning."""
        self.anchored = True
        old, table = self.patch_embed.proj, self.pos_embed
        self.patch_embed = AnchoredPatchEmbed(self.patch_size, old.in_channels, self.embed_dim).to(table)
        self.patch_embed.proj = old
        self.pos_conv, self.pos_embed = PositionConv(self.embed_dim, circular=True).start_empty().to(table), None
        for token, position in zip((self.cls_token, self.dist_token), table.unbind(1), strict=False):
            if token is not None:
                token += position  # what these tokens were in the sequence they stay

    def forward_levels(self, x: Tensor, take: Collection[int], stop: int, norm: bool) -> tuple[Tensor, list[Level]]:
        x, grid = self.patch_embed(x)
        if self.pos_conv is not None:
            x = self.pos_conv(x, grid)
        prefix = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.dist_token) if t is not None]
        x = torch.cat([*prefix, x], dim=1)
        x = self.norm_pre(x if self.pos_embed is None else x + self.positions(grid))
        levels = []
        for i, block in enumerate(self.blocks[:stop]):
            x = self.run(block, x)
            if i in take:
                tokens = self.norm(x) if norm else x
                patches = tokens[:, self.num_prefix_tokens :]
                levels.append(Level(to_map(patches, grid), tokens[:, : self.num_prefix_tokens]))
        return x, levels

    def forward_final(self, state: Tensor) -> Tensor:
        return self.norm(state)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        if not self.distilled or self.global_pool != "token":
            x = self.head_drop(self.fc_norm(self.pool(x)))
            return x if pre_logits else self.head(x)
        tokens = self.head_drop(x[:, :2])
        if pre_logits:
            return tokens.mean(1)
        return self.answer(tokens[:, 0], tokens[:, 1])

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table for a patch grid, (1, prefix + N, D)."""
        return resample_positions(self.pos_embed, grid, old_grid=self.grid, prefix=self.num_prefix_tokens)

    def prune_levels(self, keep: int, prune_norm: bool) -> None:
        self.blocks = self.blocks[:keep]
        if prune_norm:
            self.norm = nn.Identity()

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "dist_token"} | (set() if self.anchored else {"pos_embed"})

    def group_matcher(self, coarse: bool = False) -> dict:
        """How layer-wise learning rates group the parameters."""
        return {
            "stem": r"^cls_token|dist_token|pos_embed|pos_conv|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def reshape_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        table = state.get("pos_embed")
        if table is not None and self.pos_embed is not None and table.shape != self.pos_embed.shape:
            state["pos_embed"] = resample_positions(table, self.grid, prefix=self.num_prefix_tokens)
        return state


def _tiny(**kwargs: object) -> dict:
    return {"embed_dim": 192, "depth": 12, "num_heads": 3, **kwargs}


def _small(**kwargs: object) -> dict:
    return {"embed_dim": 384, "depth": 12, "num_heads": 6, **kwargs}


def _base(**kwargs: object) -> dict:
    return {"embed_dim": 768, "depth": 12, "num_heads": 12, **kwargs}


_384 = {"input_size": (3, 384, 384), "crop_pct": 1.0}
_AUGREG = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
VARIANTS = {
    "deit_tiny_patch16_224": Variant(_tiny(), 72.2, ("deit_tiny_patch16_224-a1311bcf.pth",)),
    "deit_small_patch16_224": Variant(_small(), 79.9, ("deit_small_patch16_224-cd65a155.pth",)),
    "deit_base_patch16_224": Variant(_base(), 81.8, ("deit_base_patch16_224-b5f2ef4d.pth",)),
    "deit_base_patch16_384": Variant(_base(), 82.9, ("deit_base_patch16_384-8de9b5d1.pth",), cfg=_384),
    "deit_tiny_distilled_patch16_224": Variant(
        _tiny(distilled=True), 74.5, ("deit_tiny_distilled_patch16_224-b40b3cf7.pth",)
    ),
    "deit_small_distilled_patch16_224": Variant(
        _small(distilled=True), 81.2, ("deit_small_distilled_patch16_224-649709d9.pth",)
    ),
    "deit_base_distilled_patch16_224": Variant(
        _base(distilled=True), 83.4, ("deit_base_distilled_patch16_224-df68dfff.pth",)
    ),
    "deit_base_distilled_patch16_384": Variant(
        _base(distilled=True), 85.2, ("deit_base_distilled_patch16_384-d0272ac0.pth",), cfg=_384
    ),
    "vit_nano": Variant(
        {"embed_dim": 96, "depth": 6, "num_heads": 3, "patch_size": 4},
        cfg={"input_size": (3, 32, 32), "crop_pct": 1.0},
    ),
    "vit_tiny_patch16_224": Variant(_tiny(), cfg=_AUGREG),
    "vit_small_patch16_224": Variant(_small(), cfg=_AUGREG),
    "vit_small_patch32_224": Variant(_small(patch_size=32), cfg=_AUGREG),
    "vit_base_patch16_224": Variant(_base(), cfg=_AUGREG),
    "vit_base_patch32_224": Variant(_base(patch_size=32), cfg=_AUGREG),
    "vit_large_patch16_224": Variant({"embed_dim": 1024, "depth": 24, "num_heads": 16}, cfg=_AUGREG),
    "polyvit_small_patch16_224": Variant(_small(anchored=True), cfg={**_AUGREG, "crop_pct": 0.875}),
    "polyvit_base_patch16_224": Variant(_base(anchored=True), cfg={**_AUGREG, "crop_pct": 0.875}),
}
register(VisionTransformer, VARIANTS)
