"""PVT v2: the pyramid with overlapping patches, a convolution inside the perceptron and no position tables.

"PVT v2: Improved Baselines with Pyramid Vision Transformer", Wang et al., Computational Visual Media 2022,
arXiv 2106.13797. Loads the authors' classification and detection files, timm's `pvt_v2_*` files and those of the
transformers port. Every stage ends with a norm; the four feature maps are the normalised ones, as published.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from timm.layers import DropPath
from torch import Tensor, nn

from vitalloy.layers.backbone import drop_path_rates, init_convolution, init_weights
from vitalloy.layers.patch_embed import OverlapPatchEmbed
from vitalloy.layers.polyphase import CircularConv2d, PolyphaseAnchor, anchor_input
from vitalloy.layers.pyramid import Pyramid
from vitalloy.layers.spatial_reduction import SpatialReductionAttention, fuse_keys_values
from vitalloy.layers.streaming import may_stream, stream_conv_mlp
from vitalloy.layers.tokens import to_map, to_tokens
from vitalloy.registry import Variant, register


class ConvMlp(nn.Module):
    """Linear, depth-wise 3x3 convolution on the token map, GELU, linear; `relu` puts a ReLU before the convolution."""

    def __init__(self, dim: int, hidden: int, relu: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.relu = nn.ReLU() if relu else nn.Identity()
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        parts = (self.fc1, self.relu, self.dwconv, self.act, self.fc2)
        if may_stream(x, *parts):
            return stream_conv_mlp(x, grid, *parts)
        x = to_map(self.relu(self.fc1(x)), grid)
        return self.fc2(self.act(to_tokens(self.dwconv(x))))


class Block(nn.Module):
    """Pre-norm spatial-reduction attention and convolutional perceptron, each with a residual."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        reduction: int,
        mlp_ratio: float,
        linear: bool,
        qkv_bias: bool,
        attn_drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SpatialReductionAttention(dim, num_heads, reduction, linear, qkv_bias, attn_drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), relu=linear)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x), grid))


def _port_keys() -> list[tuple[str, str]]:
    """The names of timm and of the transformers port under ours; both count stages from 0."""
    names = {
        "layer_norm_1": "norm1",
        "attention.query": "attn.q",
        "attention.key": "attn.k",
        "attention.value": "attn.v",
        "attention.proj": "attn.proj",
        "attention.spatial_reduction": "attn.sr",
        "attention.layer_norm": "attn.norm",
        "layer_norm_2": "norm2",
        "mlp.dense1": "mlp.fc1",
        "mlp.dwconv.dwconv": "mlp.dwconv",
        "mlp.dense2": "mlp.fc2",
    }
    table = [(r"^patch_embed\.", "patch_embed1."), (r"^classifier\.", "head.")]
    for i in range(4):
        timm, port = rf"^stages\.{i}\.", rf"^(?:pvt_v2\.)?encoder\.layers\.{i}\."
        table += [
            (rf"{timm}downsample\.", f"patch_embed{i + 1}."),
            (rf"{timm}blocks\.", f"block{i + 1}."),
            (rf"{timm}norm\.", f"norm{i + 1}."),
            (rf"{port}patch_embedding\.layer_norm\.", f"patch_embed{i + 1}.norm."),
            (rf"{port}patch_embedding\.", f"patch_embed{i + 1}."),
            (rf"{port}layer_norm\.", f"norm{i + 1}."),
        ]
        for theirs, ours in names.items():
            table.append((rf"{port}blocks\.(\d+)\.{re.escape(theirs)}\.", rf"block{i + 1}.\1.{ours}."))
    return table


class PyramidVisionTransformerV2(Pyramid):
    """PVT v2: four stages of strides 4, 8, 16 and 32.

    Args:
        embed_dims, num_heads, reductions, mlp_ratios, depths: one entry a stage.
        patch_stride: stride of the first stage; 2 suits small images.
        linear: keys and values from 7x7 averaged cells in every stage, at a cost linear in the number of pixels.
        anchored: a shift-equivariant form of ours, see `anchor_phases`.
        global_pool: "avg", "max" or "".
    """

    key_table = (
        (r"^(?:backbone\.)?(block.+\.dwconv\.)dwconv\.", r"\1"),
        (r"^backbone\.(.+)", r"\1"),
        *_port_keys(),
    )

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        reductions: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        depths: Sequence[int] = (2, 2, 2, 2),
        patch_stride: int = 4,
        linear: bool = False,
        qkv_bias: bool = True,
        anchored: bool = False,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        for i, dim in enumerate(embed_dims):
            stride, width = (2, embed_dims[i - 1]) if i else (patch_stride, in_chans)
            blocks = [
                Block(dim, num_heads[i], reductions[i], mlp_ratios[i], linear, qkv_bias, attn_drop_rate, next(rates))
                for _ in range(depths[i])
            ]
            embed = OverlapPatchEmbed(stride, width, dim)
            self.add_stage(embed, blocks, nn.LayerNorm(dim, eps=1e-6), dim, patch_stride * 2**i)
        self.apply(init_weights)
        self.apply(init_convolution)
        self.anchored = False
        if anchored:
            self.anchor_phases()
        self.build_head(num_classes, global_pool, drop_rate)

    def anchor_phases(self) -> None:
        """Become shift-equivariant, in place: anchors before patches and reductions, circular convolutions.

        The weights stay; those of a trained model saw zeros at the border. `layers/polyphase.py` has the limits.
        """
        self.anchored = True
        for i in range(1, self.num_stages + 1):
            embed = self.get_submodule(f"patch_embed{i}")
            anchor_input(embed, PolyphaseAnchor(embed.proj.stride))
            embed.proj = CircularConv2d.of(embed.proj)
            for block in self.get_submodule(f"block{i}"):
                if block.attn.pool is not None:
                    anchor_input(block, PolyphaseAnchor(cells=block.attn.pool.output_size))
                elif block.attn.sr is not None:
                    anchor_input(block, PolyphaseAnchor(block.attn.sr.stride))
                block.mlp.dwconv = CircularConv2d.of(block.mlp.dwconv)

    def reshape_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return fuse_keys_values(state)


def _deep(*depths: int, **kwargs: object) -> dict:
    return {"depths": depths, **kwargs}


VARIANTS = {
    "pvt_v2_b0": Variant({"embed_dims": (32, 64, 160, 256)}, 70.5, ("pvt_v2_b0.pth",)),
    "pvt_v2_b1": Variant({}, 78.7, ("pvt_v2_b1.pth",)),
    "pvt_v2_b2_li": Variant(_deep(3, 4, 6, 3, linear=True), 82.1, ("pvt_v2_b2_li.pth",)),
    "pvt_v2_b2": Variant(_deep(3, 4, 6, 3), 82.0, ("pvt_v2_b2.pth",)),
    "pvt_v2_b3": Variant(_deep(3, 4, 18, 3), 83.1, ("pvt_v2_b3.pth",)),
    "pvt_v2_b4": Variant(_deep(3, 8, 27, 3), 83.6, ("pvt_v2_b4.pth",)),
    "pvt_v2_b5": Variant(_deep(3, 6, 40, 3, mlp_ratios=(4, 4, 4, 4)), 83.8, ("pvt_v2_b5.pth",)),
    "pvt_v2_nano": Variant(  # ours, for 32-pixel images: strides 2, 4, 8, 16
        {"embed_dims": (16, 32, 80, 128), "reductions": (4, 2, 1, 1), "patch_stride": 2},
        cfg={"input_size": (3, 32, 32), "crop_pct": 1.0},
    ),
}
register(PyramidVisionTransformerV2, VARIANTS, first_conv="patch_embed1.proj")
