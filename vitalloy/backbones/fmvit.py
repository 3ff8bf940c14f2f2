"""FMViT: blocks that mix high frequencies (convolution) and low ones (attention), trained with branches that merge.

"FMViT: A multiple-frequency mixing Vision Transformer", Tan et al., 2023, arXiv 2311.05707.

This is a reconstruction. The authors published neither code nor weights, and only the abstract's facts were at hand:
the names of the parts (gMLP, RLMHSA, CFB), that several groups and branches are re-parameterised, and that features of
several frequencies are mixed. Nothing here is claimed to agree with the authors' models. What is inferred, all of it in
the simplest form that is consistent with the abstract and with Next-ViT, the work it continues:
- the layout: Next-ViT's stem, patch embedding, widths that are multiples of 32, heads of 32 channels, batch norms and
  ReLUs, and the place of the mixing blocks (last of stages 2 and 4, every fifth of stage 3);
- gMLP: each 1x1 layer is a sum of 1x1 convolutions of 1, 2 and 4 groups, each with a norm (`groups`), and of the
  normed input where the channels stay the same (`identity`);
- CFB: a depth-wise 3x3 convolution with a 1x1 and an identity branch, ReLU, a 1x1 convolution, then a gMLP of ratio 3;
  `mixer="grouped"` takes Next-ViT's grouped convolution instead;
- RLMHSA: keys and values from means over squares of the map (those cut off at the border average what they have),
  projections in branches; `shared_kv=True` makes keys and values by one projection;
- the mixing block: about 75 % of the channels from attention, the others from those by convolution, and a gMLP of
  ratio 2 over both; `mix="both"` also feeds the convolution with the block's input, a reading of "varying frequencies";
- stochastic depth as in Next-ViT, and the same start of the weights;
- the four sizes, of which only the names are published.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vitalloy.layers.attention import Attend, fitting_heads, merge_heads, split_heads
from vitalloy.layers.fusion import fold_norm_before
from vitalloy.layers.hybrid_pyramid import (
    HEAD_DIM,
    ConvMixer,
    HybridPyramid,
    average_pool,
    divisible32,
    patch_embed,
    relu,
    split_width,
)
from vitalloy.layers.reparam import MultiGroupLinear, RepDepthwise
from vitalloy.layers.tokens import to_map, to_tokens
from vitalloy.registry import Variant, register

Layer = partial[MultiGroupLinear]


class RepMlp(nn.Module):
    """gMLP: two multi-group layers and a ReLU between them, on maps."""

    def __init__(self, dim: int, hidden: int, layer: Layer) -> None:
        super().__init__()
        self.fc1 = layer(dim, hidden)
        self.act = relu()
        self.fc2 = layer(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class RepAttention(nn.Module):
    """RLMHSA: self-attention with multi-group projections, its keys and values averaged over squares of the map.

    Args:
        reduction: side of the squares.
        layer: makes a projection.
        shared_kv: keys and values are the same projection.
    """

    def __init__(self, dim: int, reduction: int, layer: Layer, shared_kv: bool = False) -> None:
        super().__init__()
        self.num_heads = fitting_heads(dim, dim // HEAD_DIM)
        self.pool = average_pool(reduction) if reduction > 1 else nn.Identity()
        self.q = layer(dim, dim)
        self.k = layer(dim, dim)
        self.v = None if shared_kv else layer(dim, dim)
        self.attend = Attend()
        self.proj = layer(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same shape."""
        pooled = self.pool(x)
        q, k = self.heads(self.q(x)), self.heads(self.k(pooled))
        v = k if self.v is None else self.heads(self.v(pooled))
        return self.proj(to_map(merge_heads(self.attend(q, k, v)), x.shape[-2:]))

    def heads(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, heads, N, d)."""
        return split_heads(to_tokens(x), self.num_heads)

    def absorb(self, norm: nn.BatchNorm2d) -> None:
        """Merge the projections and fold the norm in front of the attention into them."""
        for layer in (self.q, self.k, self.v):
            if layer is not None:
                _absorb(norm, layer)


def _absorb(norm: nn.BatchNorm2d, layer: MultiGroupLinear) -> None:
    layer.fuse()
    layer.linear = fold_norm_before(norm, layer.linear)


class ConvFusionBlock(nn.Module):
    """CFB: a convolutional mixer and a gMLP, each with a residual.

    Args:
        local: makes the mixer's first part from its channels.
        layer: makes the layers of the gMLP.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        stride: int = 1,
        drop_path: float = 0.0,
        *,
        local: partial[nn.Module | None],
        layer: Layer,
        mlp_ratio: float = 3.0,
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed(in_chans, out_chans, stride)
        self.mixer = ConvMixer(out_chans, local(out_chans))
        self.norm = nn.BatchNorm2d(out_chans)
        self.mlp = RepMlp(out_chans, divisible32(mlp_ratio * out_chans), layer)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_chans, H, W) -> (B, out_chans, H', W')."""
        x = self.patch_embed(x)
        x = x + self.drop_path(self.mixer(x))
        return x + self.drop_path(self.mlp(self.norm(x)))

    def fuse(self) -> None:
        if isinstance(self.norm, nn.BatchNorm2d):
            _absorb(self.norm, self.mlp.fc1)
            self.norm = nn.Identity()


class FrequencyMixingBlock(nn.Module):
    """Attention makes the low frequencies, convolution the high ones from them, a gMLP mixes both.

    Args:
        mix: "low" makes the high branch from the attention's output, "both" from that and the attention's input.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        stride: int = 1,
        reduction: int = 1,
        drop_path: float = 0.0,
        *,
        local: partial[nn.Module | None],
        layer: Layer,
        mlp_ratio: float = 2.0,
        mix: str = "low",
        shared_kv: bool = False,
    ) -> None:
        super().__init__()
        if mix not in ("low", "both"):
            raise ValueError(f"mix={mix!r} is neither 'low' nor 'both'")
        low, high = split_width(out_chans)
        self.patch_embed = patch_embed(in_chans, low, stride)
        self.norm1 = nn.BatchNorm2d(low)
        self.attn = RepAttention(low, reduction, layer, shared_kv)
        self.embed_low = patch_embed(low, high)
        self.embed_input = patch_embed(low, high) if mix == "both" else None
        self.mixer = ConvMixer(high, local(high))
        self.norm2 = nn.BatchNorm2d(out_chans)
        self.mlp = RepMlp(out_chans, divisible32(mlp_ratio * out_chans), layer)
        self.drop_attn, self.drop_conv, self.drop_mlp = (
            DropPath(share * drop_path) if drop_path else nn.Identity() for share in (0.75, 0.25, 1.0)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_chans, H, W) -> (B, out_chans, H', W')."""
        x = self.patch_embed(x)
        low = x + self.drop_attn(self.attn(self.norm1(x)))
        high = self.embed_low(low)
        if self.embed_input is not None:
            high = high + self.embed_input(x)
        high = high + self.drop_conv(self.mixer(high))
        z = torch.cat([low, high], dim=1)
        return z + self.drop_mlp(self.mlp(self.norm2(z)))

    def fuse(self) -> None:
        if isinstance(self.norm1, nn.BatchNorm2d):
            self.attn.absorb(self.norm1)
            _absorb(self.norm2, self.mlp.fc1)
            self.norm1, self.norm2 = nn.Identity(), nn.Identity()


def _local(dim: int, mixer: str, identity: bool) -> nn.Module | None:
    """The first part of a convolutional mixer; None for the grouped convolution that `ConvMixer` has by itself."""
    return nn.Sequential(RepDepthwise(dim, identity=identity), relu()) if mixer == "depthwise" else None


class FMViT(HybridPyramid):
    """FMViT, a reconstruction: four stages of strides 4, 8, 16 and 32.

    Args:
        groups: of the parallel 1x1 convolutions in each layer of perceptrons and attention; (1,) with
            `identity=False` is a plain layer.
        identity: add a branch that is the normed input, where a layer keeps the number of channels.
        mixer: "depthwise" (3x3, 1x1 and identity in parallel) or "grouped" (3x3 within 32 channels).
        mix: what the convolution of mixing blocks sees: "low" (the attention's output) or "both" (its input too).
        shared_kv: one projection makes keys and values.
        mlp_ratios: widths of the perceptrons in convolutional and in mixing blocks.
        **layout: depths, dims, ..., num_classes, drop_path_rate of `HybridPyramid`.
    """

    def __init__(
        self,
        *,
        groups: Sequence[int] = (1, 2, 4),
        identity: bool = True,
        mixer: str = "depthwise",
        mix: str = "low",
        shared_kv: bool = False,
        mlp_ratios: tuple[float, float] = (3.0, 2.0),
        **layout: Any,
    ) -> None:
        if mixer not in ("depthwise", "grouped"):
            raise ValueError(f"mixer={mixer!r} is neither 'depthwise' nor 'grouped'")
        layer = partial(MultiGroupLinear, groups=tuple(groups), identity=identity)
        local = partial(_local, mixer=mixer, identity=identity)
        convolving = partial(ConvFusionBlock, local=local, layer=layer, mlp_ratio=mlp_ratios[0])
        mixing = partial(FrequencyMixingBlock, local=local, layer=layer, mlp_ratio=mlp_ratios[1])
        super().__init__(convolving, partial(mixing, mix=mix, shared_kv=shared_kv), **layout)


def _sized(depths: Sequence[int], dims: Sequence[int], mixing_dims: Sequence[int], **more: Any) -> dict[str, Any]:
    return {"depths": depths, "dims": dims, "mixing_dims": mixing_dims, **more}


VARIANTS = {  # the published names, at sizes of ours
    "fmvit_nano": Variant(  # ours altogether, for 32-pixel images: strides 2, 4, 8, 16
        _sized(
            (1, 2, 2, 2),
            (32, 64, 96, 128),
            (128, 128, 160),
            reductions=(4, 2, 2, 1),
            stem_dims=(32, 16, 32, 32),
            stem_strides=(1, 1, 1, 2),
            init_std=0.05,
        ),
        cfg={"input_size": (3, 32, 32), "crop_pct": 1.0},
    ),
    "fmvit_tiny": Variant(_sized((2, 2, 5, 2), (64, 96, 192, 384), (128, 256, 512))),
    "fmvit_small": Variant(_sized((3, 4, 10, 3), (64, 128, 256, 512), (192, 384, 768))),
    "fmvit_base": Variant(_sized((3, 4, 10, 3), (96, 192, 384, 768), (256, 512, 1024))),
    "fmvit_large": Variant(_sized((3, 4, 20, 3), (96, 192, 384, 768), (256, 512, 1024))),
}
register(FMViT, VARIANTS, first_conv="stem.0.conv", crop_pct=0.875)
