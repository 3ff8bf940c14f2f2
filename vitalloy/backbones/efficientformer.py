"""EfficientFormer: pooling blocks on maps, then a few attention blocks at the very end, sized by measured latency.

"EfficientFormer: Vision Transformers at MobileNet Speed", Li et al., NeurIPS 2022, arXiv 2206.01191. For people who
ship on phones. Loads the authors' files and timm's.

Departures. The authors' attention knows 224x224 pixels only; here every size runs, because the table of position
biases is resampled for other grids, at loading and in the forward pass. Their bias is cached when the mode changes,
so that weights loaded in evaluation mode meet a stale one; here it is read at every forward. Where they flatten the
map before the first attention block, every block here takes and returns maps, which costs nothing in this memory
format. The last feature map is the normalised one. Published weights were distilled: without a teacher, training
reaches less.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from vitalloy.layers.attention import Attend, merge_heads
from vitalloy.layers.backbone import drop_path_rates, init_weights
from vitalloy.layers.conv_norm import ConvNorm
from vitalloy.layers.distilled_head import DistilledHead
from vitalloy.layers.mlp import Mlp
from vitalloy.layers.mobile import (
    BLOCK_KEYS,
    ConvStem,
    MixingBlock,
    ScaledSum,
    flatten_published,
    init_perceptron,
    renamings,
)
from vitalloy.layers.offset_bias import OffsetBias, fit_offsets, offset_biases
from vitalloy.layers.pyramid import Pyramid
from vitalloy.layers.tokens import to_map, to_tokens
from vitalloy.registry import Variant, register


class PoolMixing(nn.Module):
    """How the mean of the 3x3 neighbourhood differs from the pixel: mixing without weights, as in PoolFormer."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x).sub_(x)


class Attention(nn.Module):
    """Self-attention whose values are wider than its keys, with a bias by distance.

    Args:
        dim: channels in and out; the heads' widths do not depend on it.
        grid: (H, W) that the table of biases is made for.
        key_dim: channels of a query and a key of one head; a value has `value_ratio` times as many.
    """

    def __init__(
        self, dim: int, grid: tuple[int, int], num_heads: int = 8, key_dim: int = 32, value_ratio: int = 4
    ) -> None:
        super().__init__()
        self.num_heads, self.widths = num_heads, (key_dim, key_dim, key_dim * value_ratio)
        self.qkv = nn.Linear(dim, num_heads * sum(self.widths))
        self.bias = OffsetBias(num_heads, grid)
        self.attend = Attend()
        self.proj = nn.Linear(num_heads * self.widths[2], dim)

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        """x (B, N, C), the tokens of a map `like` -> (B, N, C)."""
        qkv = self.qkv(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, 2 key + value)
        q, k, v = qkv.split(self.widths, dim=-1)
        return self.proj(merge_heads(self.attend(q, k, v, bias=self.bias(like))))


class AttentionBlock(nn.Module):
    """Pre-norm attention and perceptron, each with a scaled residual; maps (B, C, H, W) in and out."""

    def __init__(
        self, dim: int, token_mixer: Attention, mlp_ratio: float, layer_scale: float, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.token_mixer = token_mixer
        self.mix = ScaledSum(dim, layer_scale, drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.add = ScaledSum(dim, layer_scale, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        tokens = to_tokens(x)
        tokens = self.mix(tokens, self.token_mixer(self.norm1(tokens), x))
        tokens = self.add(tokens, self.mlp(self.norm2(tokens)))
        return to_map(tokens, x.shape[-2:])

    def fuse(self) -> None:
        self.token_mixer.proj = self.mix.fold_into(self.token_mixer.proj)
        self.mlp.fc2 = self.add.fold_into(self.mlp.fc2)


class EfficientFormer(DistilledHead, Pyramid):
    """EfficientFormer V1: four stages of strides 4, 8, 16 and 32.

    Args:
        img_size: the (height, width) or side that the position biases are made for; other inputs resample them.
        embed_dims, depths: channels and blocks, one entry a stage.
        num_attention: how many blocks at the end of the last stage attend; the others pool.
        num_heads, key_dim: of attention; values have four times the width of keys.
        patch_stride: stride of the first stage, 4 or 2; 2 suits small images.
        layer_scale: where the scales of the residual branches start.
        distilled: a second classifier for a teacher's answers; see `set_distilled_training`.
        global_pool: "avg", "max" or "".
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (48, 96, 224, 448),
        depths: Sequence[int] = (3, 2, 6, 4),
        num_attention: int = 1,
        num_heads: int = 8,
        key_dim: int = 32,
        mlp_ratio: float = 4.0,
        patch_stride: int = 4,
        layer_scale: float = 1e-5,
        distilled: bool = True,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.distilled = distilled
        self.key_table = published_names(depths[-1], num_attention)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        last = patch_stride * 2 ** (len(depths) - 1)
        grid = (-(-height // last), -(-width // last))
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        for i, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            first, final = i == 0, i == len(depths) - 1
            embed = (
                ConvStem(in_chans, dim, patch_stride, nn.ReLU)
                if first
                else ConvNorm(embed_dims[i - 1], dim, 3, 2, bias=True)
            )
            blocks: list[nn.Module] = []
            for j in range(depth):
                if final and j >= depth - num_attention:
                    mixer = Attention(dim, grid, num_heads, key_dim)
                    blocks.append(AttentionBlock(dim, mixer, mlp_ratio, layer_scale, next(rates)))
                else:
                    blocks.append(MixingBlock(dim, PoolMixing(), mlp_ratio, False, layer_scale, next(rates)))
            norm = LayerNorm2d(dim, eps=1e-5) if final else nn.Identity()
            self.add_stage(embed, blocks, norm, dim, patch_stride * 2**i)
            if not final:
                self.feature_info[i]["module"] = f"block{i + 1}.{depth - 1}"
        self.apply(init_weights)
        self.apply(init_perceptron)
        self.build_head(num_classes, global_pool, drop_rate)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in offset_biases(self)}

    def reshape_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return fit_offsets(self, flatten_published(state))


def published_names(depth: int, num_attention: int) -> list[tuple[str, str | None]]:
    """The key table for a last stage of `depth` blocks: where attention begins, a flatten takes an index."""
    table: list[tuple[str, str | None]] = [
        (r"attention_bias_idxs$", None),
        (r"^(?:patch_embed\.0|stem\.conv1)\.", "patch_embed1.conv1.conv."),
        (r"^(?:patch_embed\.1|stem\.norm1)\.", "patch_embed1.conv1.norm."),
        (r"^(?:patch_embed\.3|stem\.conv2)\.", "patch_embed1.conv2.conv."),
        (r"^(?:patch_embed\.4|stem\.norm2)\.", "patch_embed1.conv2.norm."),
        (r"^norm\.", "norm4."),
        (r"^dist_head\.", "head_dist."),
    ]
    for i in range(1, 4):
        table += [
            (rf"^network\.{2 * i - 1}\.proj\.", f"patch_embed{i + 1}.conv."),
            (rf"^network\.{2 * i - 1}\.norm\.", f"patch_embed{i + 1}.norm."),
            (rf"^stages\.{i}\.downsample\.", f"patch_embed{i + 1}."),
        ]
    attention = {
        r"token_mixer\.attention_biases$": "token_mixer.bias.table",
        r"(?:layer_scale_1|ls1\.gamma)$": "mix.scale",
        r"(?:layer_scale_2|ls2\.gamma)$": "add.scale",
        "": "",  # the other names are ours
    }
    for j in range(depth - num_attention, depth):
        table += renamings({rf"(?:network\.6|stages\.3\.blocks)\.{j + 1}\.": f"block4.{j}."}, attention)
    places = {rf"(?:network\.{2 * i}|stages\.{i}\.blocks)\.(\d+)\.": rf"block{i + 1}.\1." for i in range(4)}
    return table + renamings(places, BLOCK_KEYS)


def _sizes(embed_dims: Sequence[int], depths: Sequence[int], num_attention: int) -> dict:
    return {"embed_dims": embed_dims, "depths": depths, "num_attention": num_attention}


_DISTILLED = "distilled from RegNetY-16GF"
VARIANTS = {
    "efficientformer_l1": Variant(
        _sizes((48, 96, 224, 448), (3, 2, 6, 4), 1),
        79.2,
        ("efficientformer_l1_300d.pth",),
        note=f"{_DISTILLED}; 80.2 with 1000 epochs",
    ),
    "efficientformer_l3": Variant(_sizes((64, 128, 320, 512), (4, 4, 12, 6), 4), 82.4, note=_DISTILLED),
    "efficientformer_l7": Variant(_sizes((96, 192, 384, 768), (6, 6, 18, 8), 8), 83.3, note=_DISTILLED),
    "efficientformer_nano": Variant(  # ours, for 32-pixel images: strides 2, 4, 8, 16
        {
            **_sizes((24, 48, 80, 112), (1, 1, 3, 2), 1),
            "num_heads": 4,
            "key_dim": 16,
            "patch_stride": 2,
            "layer_scale": 0.1,
        },
        cfg={"input_size": (3, 32, 32), "crop_pct": 1.0},
    ),
}
register(EfficientFormer, VARIANTS, first_conv="patch_embed1.conv1.conv")
