"""EfficientFormerV2: depth-wise perceptrons, talking-head attention with local values, attention that down-samples.

"Rethinking Vision Transformers for MobileNet Size and Speed", Li et al., ICCV 2023, arXiv 2212.08059. For people who
ship on phones and count megabytes. Loads the authors' files and timm's.

Departures. The authors' models take one resolution; here every size runs, because the tables of position biases are
resampled for other grids, at loading and in the forward pass, and because the map that half-resolution attention
returns is brought back to its size, where theirs is doubled (the same unless a side is odd). Their bias is cached
when the mode changes; here it is read at every forward. Queries and keys have one projection. The last feature map
is the normalised one. Published weights were distilled.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.layers.attention import Attend, merge_heads, split_heads
from vitalloy.layers.backbone import drop_path_rates
from vitalloy.layers.conv_norm import ConvNorm
from vitalloy.layers.distilled_head import DistilledHead
from vitalloy.layers.fusion import fold_scale
from vitalloy.layers.mobile import (
    BLOCK_KEYS,
    ConvBlock,
    ConvStem,
    LinearNorm,
    MixingBlock,
    flatten_published,
    init_perceptron,
    renamings,
)
from vitalloy.layers.offset_bias import OffsetBias, fit_offsets, offset_biases
from vitalloy.layers.pyramid import Pyramid
from vitalloy.layers.tokens import to_map, to_tokens
from vitalloy.registry import Variant, register


class TalkingAttend(nn.Module):
    """Softmax attention whose heads exchange their logits before the softmax and their weights behind it.

    Not an `Attend`: what stands there would have to mix heads too.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.before = nn.Conv2d(num_heads, num_heads, 1)
        self.behind = nn.Conv2d(num_heads, num_heads, 1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """q (already scaled), k (B, heads, N, d), v (B, heads, N, e), bias (heads, N, N) -> (B, heads, N, e)."""
        return self.behind(self.before(q @ k.mT + bias).softmax(-1)) @ v


class TalkingAttention(nn.Module):
    """Attention between the pixels of a map, with talking heads and a depth-wise convolution of the values beside it.

    Args:
        dim: channels in and out; the heads' widths do not depend on it.
        grid: (H, W) of the map that the table of biases is made for.
        key_dim: channels of a query and a key of one head; a value has four times as many.
        stride: 2 attends on a map of half the side, and brings the result back to the full one.
    """

    def __init__(self, dim: int, grid: tuple[int, int], num_heads: int = 8, key_dim: int = 32, stride: int = 1) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, key_dim**-0.5
        values = 4 * key_dim * num_heads
        self.stride_conv = nn.Identity()
        if stride > 1:
            self.stride_conv = ConvNorm(dim, dim, 3, stride, groups=dim, bias=True)
        self.qk = LinearNorm(dim, 2 * key_dim * num_heads)
        self.v = LinearNorm(dim, values)
        self.v_local = ConvNorm(values, values, 3, groups=values, bias=True)
        self.bias = OffsetBias(num_heads, (-(-grid[0] // stride), -(-grid[1] // stride)))
        self.talk = TalkingAttend(num_heads)
        self.act = nn.GELU()
        self.proj = LinearNorm(values, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same shape."""
        size = x.shape[-2:]
        x = self.stride_conv(x)
        qk = to_tokens(self.qk(x)).unflatten(-1, (2, self.num_heads, -1))  # (B, N, 2, heads, d)
        q, k = qk.permute(2, 0, 3, 1, 4).unbind(0)
        v = self.v(x)
        q = q if self.scale is None else q * self.scale
        out = self.talk(q, k, split_heads(to_tokens(v), self.num_heads), self.bias(x))
        out = to_map(merge_heads(out), x.shape[-2:]) + self.v_local(v)
        if isinstance(self.stride_conv, ConvNorm):
            out = F.interpolate(out, size, mode="bilinear", align_corners=False)
        return self.proj(self.act(out))

    def fuse(self) -> None:
        if self.scale is not None:
            scale = torch.ones(self.qk.linear.out_features)
            scale[: len(scale) // 2] = self.scale  # queries come first
            self.qk.linear, self.scale = fold_scale(self.qk.linear, scale), None


class AttentionDownsample(nn.Module):
    """Attention from every second row and column of a map to all of its pixels: (B, C, H, W) -> (B, D, H/2, W/2).

    Args:
        grid: (H, W) of the map that comes in, for the table of biases.
        key_dim: channels of a query and a key of one head; a value has four times as many.
    """

    def __init__(self, dim: int, out_dim: int, grid: tuple[int, int], num_heads: int = 8, key_dim: int = 16) -> None:
        super().__init__()
        self.num_heads, self.subsampled = num_heads, True
        keys, values = key_dim * num_heads, 4 * key_dim * num_heads
        self.q_local = nn.Conv2d(dim, dim, 3, 2, 1, groups=dim)
        self.q = LinearNorm(dim, keys)
        self.k = LinearNorm(dim, keys)
        self.v = LinearNorm(dim, values)
        self.v_local = ConvNorm(values, values, 3, 2, groups=values, bias=True)
        self.bias = OffsetBias(num_heads, grid, stride=2)
        self.attend = Attend()
        self.act = nn.GELU()
        self.proj = LinearNorm(values, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        local = self.q_local(x)
        q = self.q(local + x[:, :, ::2, ::2] if self.subsampled else local)
        v = self.v(x)
        heads = (split_heads(to_tokens(part), self.num_heads) for part in (q, self.k(x), v))
        out = merge_heads(self.attend(*heads, bias=self.bias(x)))
        return self.proj(self.act(to_map(out, q.shape[-2:]) + self.v_local(v)))

    def fuse(self) -> None:
        if self.subsampled:
            with torch.no_grad():  # the pixel itself is the centre of the convolution's window
                self.q_local.weight[:, :, 1, 1] += 1
            self.subsampled = False


class AttentionEmbed(nn.Module):
    """The embedding of the last stage: a strided convolution and, beside it, attention that down-samples."""

    def __init__(self, dim: int, out_dim: int, grid: tuple[int, int], num_heads: int, key_dim: int) -> None:
        super().__init__()
        self.conv = ConvNorm(dim, out_dim, 3, 2, bias=True)
        self.attn = AttentionDownsample(dim, out_dim, grid, num_heads, key_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.attn(x)


def _published_names() -> list[tuple[str, str | None]]:
    """The authors' names and timm's under ours."""
    mixer = {r"attention_biases$": "bias.table", r"talking_head1\.": "talk.before.", r"talking_head2\.": "talk.behind."}
    for part in ("stride_conv", "q", "k", "v", "v_local"):
        ours = "linear" if part in "qkv" else "conv"
        mixer |= {rf"{part}\.(?:0|conv)\.": f"{part}.{ours}.", rf"{part}\.(?:1|bn)\.": f"{part}.norm."}
    mixer |= {r"proj\.(?:1|conv)\.": "proj.linear.", r"proj\.(?:2|bn)\.": "proj.norm."}
    down = {k: v for k, v in mixer.items() if "talk" not in v} | {
        r"q\.local\.(?:0\.)?": "q_local.",
        r"q\.proj\.(?:0|conv)\.": "q.linear.",
        r"q\.proj\.(?:1|bn)\.": "q.norm.",
    }
    blocks = {rf"(?:network\.{2 * i}|stages\.{i}\.blocks)\.(\d+)\.": rf"block{i + 1}.\1." for i in range(4)}
    return [
        (r"attention_bias_idxs$", None),
        (r"^(?:patch_embed\.0|stem\.conv1\.conv)\.", "patch_embed1.conv1.conv."),
        (r"^(?:patch_embed\.1|stem\.conv1\.bn)\.", "patch_embed1.conv1.norm."),
        (r"^(?:patch_embed\.3|stem\.conv2\.conv)\.", "patch_embed1.conv2.conv."),
        (r"^(?:patch_embed\.4|stem\.conv2\.bn)\.", "patch_embed1.conv2.norm."),
        (r"^network\.(?:1)\.proj\.|^stages\.1\.downsample\.conv\.conv\.", "patch_embed2.conv."),
        (r"^network\.(?:1)\.norm\.|^stages\.1\.downsample\.conv\.bn\.", "patch_embed2.norm."),
        (r"^network\.(?:3)\.proj\.|^stages\.2\.downsample\.conv\.conv\.", "patch_embed3.conv."),
        (r"^network\.(?:3)\.norm\.|^stages\.2\.downsample\.conv\.bn\.", "patch_embed3.norm."),
        (r"^(?:network\.5|stages\.3\.downsample\.conv)\.conv\.", "patch_embed4.conv.conv."),
        (r"^(?:network\.5|stages\.3\.downsample\.conv)\.bn\.", "patch_embed4.conv.norm."),
        *renamings({r"(?:network\.5|stages\.3\.downsample)\.attn\.": "patch_embed4.attn."}, down),
        *renamings({f"{k}token_mixer\\.": f"{v}token_mixer." for k, v in blocks.items()}, mixer),
        *renamings(blocks, BLOCK_KEYS),
        (r"^norm\.", "norm4."),
        (r"^dist_head\.", "head_dist."),
    ]


class EfficientFormerV2(DistilledHead, Pyramid):
    """EfficientFormerV2: four stages of strides 4, 8, 16 and 32.

    Args:
        img_size: the (height, width) or side that the position biases are made for; other inputs resample them.
        embed_dims, depths: channels and blocks, one entry a stage.
        mlp_ratios: expansion of each block, a row a stage; one number a stage is taken by all of its blocks.
        num_attention: how many blocks at the end of the third and of the fourth stage attend.
        num_heads, key_dim: of attention; values have four times the width of keys, down-sampling half of both.
        patch_stride: stride of the first stage, 4 or 2; 2 suits small images.
        layer_scale: where the scales of the residual branches start.
        distilled: a second classifier for a teacher's answers; see `set_distilled_training`.
        global_pool: "avg", "max" or "".
    """

    key_table = _published_names()

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (32, 48, 96, 176),
        depths: Sequence[int] = (2, 2, 6, 4),
        mlp_ratios: Sequence[float | Sequence[float]] = (4, 4, 4, 4),
        num_attention: int = 2,
        num_heads: int = 8,
        key_dim: int = 32,
        patch_stride: int = 4,
        layer_scale: float = 1e-5,
        distilled: bool = True,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.distilled = distilled
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        for i, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            stride, before = patch_stride * 2**i, embed_dims[i - 1]
            grid = (-(-height // stride), -(-width // stride))
            if i == 0:
                embed: nn.Module = ConvStem(in_chans, dim, patch_stride)
            elif i < 3:
                embed = ConvNorm(before, dim, 3, 2, bias=True)
            else:
                finer = (-(-height // (stride // 2)), -(-width // (stride // 2)))
                embed = AttentionEmbed(before, dim, finer, num_heads, key_dim // 2)
            ratios = mlp_ratios[i] if isinstance(mlp_ratios[i], Sequence) else [mlp_ratios[i]] * depth
            blocks = []
            for j, ratio in zip(range(depth), ratios, strict=True):
                if i >= 2 and j >= depth - num_attention:
                    mixer = TalkingAttention(dim, grid, num_heads, key_dim, stride=2 if i == 2 else 1)
                    blocks.append(MixingBlock(dim, mixer, ratio, True, layer_scale, next(rates)))
                else:
                    blocks.append(ConvBlock(dim, ratio, True, layer_scale, next(rates)))
            self.add_stage(embed, blocks, nn.BatchNorm2d(dim) if i == 3 else nn.Identity(), dim, stride)
            if i < 3:
                self.feature_info[i]["module"] = f"block{i + 1}.{depth - 1}"
        self.apply(init_perceptron)
        self.build_head(num_classes, global_pool, drop_rate)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in offset_biases(self)}

    def reshape_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return fit_offsets(self, flatten_published(join_queries_keys(state)))


def join_queries_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The separate projections `q` and `k` of the blocks' attention as one, `qk`, queries first."""
    joined = {}
    for name, value in state.items():
        match = re.match(r"(block\d\.\d+\.token_mixer)\.([qk])\.(.+)", name)
        if match is None:
            joined[name] = value
        elif match[2] == "q":
            other = state[f"{match[1]}.k.{match[3]}"]
            joined[f"{match[1]}.qk.{match[3]}"] = torch.cat([value, other]) if value.ndim else value
    return joined


def _sizes(embed_dims: Sequence[int], depths: Sequence[int], num_attention: int, stage3: str, stage4: str) -> dict:
    """`stage3` and `stage4` hold the expansion of each block, a digit each; the first two stages expand by 4."""
    ratios = (4, 4, tuple(map(int, stage3)), tuple(map(int, stage4)))
    return {
        "embed_dims": embed_dims,
        "depths": depths,
        "num_attention": num_attention,
        "mlp_ratios": ratios,
    }


_LONGER = "distilled from RegNetY-16GF, 300 epochs; {} after 450"
VARIANTS = {
    "efficientformerv2_s0": Variant(
        _sizes((32, 48, 96, 176), (2, 2, 6, 4), 2, "433344", "4334"), 75.7, note=_LONGER.format(76.2)
    ),
    "efficientformerv2_s1": Variant(
        _sizes((32, 48, 120, 224), (3, 3, 9, 6), 2, "443333444", "443344"), 79.0, note=_LONGER.format(79.7)
    ),
    "efficientformerv2_s2": Variant(
        _sizes((32, 64, 144, 288), (4, 4, 12, 8), 4, "443333334444", "44333344"),
        81.6,
        note=_LONGER.format("82.0"),
    ),
    "efficientformerv2_l": Variant(
        _sizes((40, 80, 192, 384), (5, 5, 15, 10), 6, "444433333334444", "4443333444"),
        83.3,
        ("eformer_l_450.pth",),
        note=_LONGER.format(83.5),
    ),
    "efficientformerv2_nano": Variant(  # ours, for 32-pixel images: strides 2, 4, 8, 16
        {
            "embed_dims": (16, 32, 64, 96),
            "depths": (1, 1, 3, 2),
            "num_attention": 1,
            "num_heads": 4,
            "key_dim": 16,
            "patch_stride": 2,
            "layer_scale": 0.1,
        },
        cfg={"input_size": (3, 32, 32), "crop_pct": 1.0},
    ),
}
register(EfficientFormerV2, VARIANTS, first_conv="patch_embed1.conv1.conv")
