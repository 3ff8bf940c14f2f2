"""Swin: attention in windows that shift from block to block, on four levels of shrinking maps.

"Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", Liu et al., ICCV 2021, arXiv 2103.14030.

Loads the authors' files and timm's. The parameter names are timm's: a level starts with its patch merging, where the
authors' level ends with the merging that follows it; the classifier is `head`.

Departures: any input size runs. The window is no longer than the grid and a grid of one window is not shifted, decided
by the map that comes in; the authors and timm decide it by the image size of the constructor. A grid that the window
does not divide is padded behind the shift, as in timm; the authors' detection code pads before it. As published,
padding takes part in attention, and what a shift brings together is held apart by -100, not by minus infinity; by -60
once folded.
"""

from __future__ import annotations

from timm.layers import DropPath
from torch import Tensor, nn

from vitalloy.layers.mlp import Mlp
from vitalloy.layers.polyphase import PolyphaseAnchor, TorusWindows, anchor_input
from vitalloy.layers.window_attention import WindowAttention
from vitalloy.layers.window_pyramid import WindowPyramid
from vitalloy.layers.windows import Cut, Pair
from vitalloy.registry import Variant, register


class Block(nn.Module):
    """Pre-norm window attention and perceptron, each with a residual."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Pair,
        mlp_ratio: float,
        qkv_bias: bool,
        attn_drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window, qkv_bias, attn_drop)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        """x (B, H, W, C) -> the same shape."""
        windows = self.attn(cut.split(self.norm1(x)), cut)
        x = x + self.drop_path(cut.join(windows, x))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SwinTransformer(WindowPyramid):
    """Swin.

    Args:
        img_size: the (height, width) or side that windows are made for: a level whose grid is smaller than
            `window_size` has a table of relative positions for that grid. Other inputs run too.
        window_size: side of the windows, or (height, width).
        depths, num_heads: one number a level; channels double from level to level, starting at `embed_dim`.
        anchored: a shift-equivariant form of ours, see `anchor_phases`.
    """

    key_table = (
        (r"\.(?:relative_position_index|attn_mask)$", None),
        (r"^(?:backbone|encoder)\.(.+)", r"\1"),
        (r"^head\.fc\.", "head."),
    )
    default_out_indices = (0, 1, 2, 3)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window_size: int | tuple[int, int] = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        anchored: bool = False,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        def block(dim: int, heads: int, window: Pair, rate: float) -> Block:
            return Block(dim, heads, window, mlp_ratio, qkv_bias, attn_drop_rate, rate)

        super().__init__(
            block,
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )
        self.anchored = False
        if anchored:
            self.anchor_phases()

    def anchor_phases(self) -> None:
        """Become shift-equivariant, in place: anchors before patches, merging and windows, no masks.

        The weights stay; those of a trained model were trained with masks. `layers/polyphase.py` has the limits.
        """
        self.anchored = True
        anchor_input(self.patch_embed, PolyphaseAnchor(self.patch_embed.proj.stride))
        for i, stage in enumerate(self.layers):
            if i:
                anchor_input(stage.downsample, PolyphaseAnchor(2), channels_last=True)
            for block in stage.blocks:
                anchor_input(block, PolyphaseAnchor(block.attn.window), channels_last=True)
            stage.windows = nn.ModuleList(TorusWindows(windows) for windows in stage.windows)


_384 = {"input_size": (3, 384, 384), "crop_pct": 1.0}
_TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
_SMALL = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
_BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
_LARGE = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)}
VARIANTS = {
    "swin_nano": Variant(
        {"patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": (2, 2, 2, 1), "num_heads": (1, 2, 4, 8)},
        cfg={"input_size": (3, 32, 32), "crop_pct": 1.0},
    ),
    "swin_tiny_patch4_window7_224": Variant(_TINY, 81.2, ("swin_tiny_patch4_window7_224.pth",)),
    "swin_small_patch4_window7_224": Variant(_SMALL, 83.2, ("swin_small_patch4_window7_224.pth",)),
    "swin_base_patch4_window7_224": Variant(_BASE, 83.5, ("swin_base_patch4_window7_224.pth",)),
    "swin_base_patch4_window12_384": Variant(
        {**_BASE, "window_size": 12}, 84.5, ("swin_base_patch4_window12_384.pth",), cfg=_384
    ),
    # pre-trained on ImageNet-22k
    "swin_large_patch4_window7_224": Variant(_LARGE, 86.3, ("swin_large_patch4_window7_224_22kto1k.pth",)),
    "swin_large_patch4_window12_384": Variant(
        {**_LARGE, "window_size": 12}, 87.3, ("swin_large_patch4_window12_384_22kto1k.pth",), cfg=_384
    ),
}
register(SwinTransformer, VARIANTS)
