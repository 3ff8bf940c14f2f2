"""SMT: early stages modulate values by multi-scale convolutions, the last attends, the third does both in turns.

"Scale-Aware Modulation Meet Transformer", Lin et al., ICCV 2023, arXiv 2307.08579. There is no position table, so any
input size runs. Loads the authors' classification files, and files of their detection and segmentation code.

Where paper and code differ, the code is followed:
- SMT-S has two blocks in its last stage, 22.55 M parameters; the published 20.5 M fit one block (20.43 M), which is
  `depths=(3, 4, 18, 1)`. Weights of another depth than the model's are refused, and the message names both.
- The authors' dense code calls the convolution of the attention `dw_conv` and, loading a classifier's weights, leaves
  it at random values without a word. Here one backbone serves both, and either name loads.
- Their dense code drops elements where stochastic depth is meant, fixes the stem at 64 channels and has no layer
  scale; here the dense form is the classifier without its head.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from functools import partial

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vitalloy.layers.attention import Attend, fitting_heads, merge_heads, split_heads
from vitalloy.layers.backbone import drop_path_rates, init_convolution, init_weights
from vitalloy.layers.conv_norm import ConvNorm
from vitalloy.layers.fusion import fold_norm, fold_scale
from vitalloy.layers.mlp import Mlp
from vitalloy.layers.patch_embed import OverlapPatchEmbed
from vitalloy.layers.pyramid import Pyramid
from vitalloy.layers.streaming import may_stream, stream_conv_mlp
from vitalloy.layers.tokens import to_map, to_tokens
from vitalloy.registry import Variant, register

# the result of the norm is seen by nothing but the ReLU behind it: no second map
relu = partial(nn.ReLU, inplace=True)


class Stem(nn.Module):
    """Two strided convolutions and a norm: (B, C, H, W) -> tokens (B, N, D) and their grid."""

    def __init__(self, in_chans: int, embed_dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = ConvNorm(in_chans, embed_dim, kernel, stride, act=relu)
        self.proj = nn.Conv2d(embed_dim, embed_dim, 2, 2)
        self.norm = nn.LayerNorm(embed_dim)  # eps 1e-5, where the blocks have 1e-6

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.proj(self.conv(x.contiguous(memory_format=torch.channels_last)))
        return self.norm(to_tokens(x)), x.shape[-2:]


class AcrossHeads(nn.Module):
    """Linear map in groups; a group takes one channel of every head and makes `expand` new ones for each.

    Published as a grouped convolution on channels that are interleaved first. Here the groups stand in a full matrix
    whose columns are in the heads' order: more products, but in less time.
    """

    def __init__(self, dim: int, num_heads: int, expand: int) -> None:
        super().__init__()
        self.groups = dim // fitting_heads(dim, num_heads)
        self.weight = nn.Parameter(torch.empty(expand * dim, num_heads))
        self.bias = nn.Parameter(torch.zeros(expand * dim))
        nn.init.normal_(self.weight, std=math.sqrt(2 * self.groups / (expand * dim)))

    def matrix(self) -> Tensor:
        """The whole matrix, (expand * dim, dim)."""
        grouped = self.weight.unflatten(0, (self.groups, -1)).permute(1, 2, 0)  # (outputs, heads, groups)
        return torch.diag_embed(grouped, dim1=0, dim2=3).flatten(2).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> (..., expand * dim)."""
        return nn.functional.linear(x, self.matrix(), self.bias)


class Modulator(nn.Module):
    """What values are multiplied by: heads of depth-wise convolutions of growing kernels, mixed across the heads.

    Args:
        dim: channels in and out; each head takes a contiguous share.
        kernels: side of each head's kernel.
        expand: channels of the mixture, as a multiple of `dim`.
    """

    def __init__(self, dim: int, kernels: Sequence[int] = (3, 5, 7, 9), expand: int = 2) -> None:
        super().__init__()
        width = dim // fitting_heads(dim, len(kernels))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, k, padding=k // 2, groups=width) for k in kernels)
        self.mix = AcrossHeads(dim, len(kernels), expand)
        self.norm = nn.BatchNorm2d(expand * dim)
        self.act = nn.GELU()
        self.proj = nn.Linear(expand * dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) -> modulator (B, N, C)."""
        parts = to_map(x, grid).chunk(len(self.convs), 1)
        x = torch.cat([to_tokens(conv(part)) for conv, part in zip(self.convs, parts, strict=True)], -1)
        return self.proj(self.act(to_tokens(self.norm(to_map(self.mix(x), grid)))))

    @torch.no_grad()
    def fused(self) -> FusedModulator:
        """The same in evaluation mode: one convolution for all heads, then a perceptron.

        Kernels are padded to the largest: more products, but the map is neither split nor joined.
        """
        side, width = max(conv.kernel_size[0] for conv in self.convs), sum(conv.in_channels for conv in self.convs)
        conv = nn.Conv2d(width, width, side, padding=side // 2, groups=width).to(self.mix.weight)
        rims = [(side - head.kernel_size[0]) // 2 for head in self.convs]
        kernels = [nn.functional.pad(head.weight, [rim] * 4) for head, rim in zip(self.convs, rims, strict=True)]
        conv.weight.copy_(torch.cat(kernels))
        conv.bias.copy_(torch.cat([head.bias for head in self.convs]))
        matrix = self.mix.matrix()
        mlp = Mlp(matrix.shape[1], matrix.shape[0]).to(matrix)
        mlp.fc1.weight.copy_(matrix)
        mlp.fc1.bias.copy_(self.mix.bias)
        mlp.fc1, mlp.act, mlp.fc2 = fold_norm(mlp.fc1, self.norm), self.act, self.proj
        return FusedModulator(conv, mlp).train(self.training)


class FusedModulator(nn.Module):
    """What `Modulator` becomes for deployment."""

    def __init__(self, conv: nn.Conv2d, mlp: Mlp) -> None:
        super().__init__()
        self.conv, self.mlp = conv, mlp

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) -> modulator (B, N, C)."""
        return self.mlp(to_tokens(self.conv(to_map(x, grid))))


class ScaleAwareModulation(nn.Module):
    """proj(modulator(s(x)) * v(x)): mixes tokens by convolutions at several scales, at a linear cost."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.v = nn.Linear(dim, dim)
        self.s = nn.Linear(dim, dim)
        self.modulator = Modulator(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (B, N, C) -> the same shape."""
        return self.proj(self.modulator(self.s(x), grid) * self.v(x))

    def fuse(self) -> None:
        if isinstance(self.modulator, Modulator):
            self.modulator = self.modulator.fused()


class ConvValueAttention(nn.Module):
    """Self-attention plus a depth-wise convolution of the values.

    Args:
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = fitting_heads(dim, num_heads)
        self.qk = nn.Linear(dim, 2 * dim)
        self.v = nn.Linear(dim, dim)  # apart from q and k, so that the convolution reads a dense map
        self.attend = Attend(dropout)
        self.local_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (B, N, C) -> the same shape."""
        qk = self.qk(x).unflatten(-1, (2, self.num_heads, -1))  # (B, N, 2, heads, d)
        q, k = qk.permute(2, 0, 3, 1, 4).unbind(0)
        v = self.v(x)
        near = to_tokens(self.local_conv(to_map(v, grid)))
        return self.proj(merge_heads(self.attend(q, k, split_heads(v, self.num_heads))) + near)


class ConvMlp(nn.Module):
    """Linear, depth-wise 3x3 convolution added to its input, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.residual = True

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (B, N, C) -> the same shape."""
        if may_stream(x, self.fc1, self.dwconv, self.act, self.fc2):
            return stream_conv_mlp(x, grid, self.fc1, nn.Identity(), self.conv_and_input(), self.act, self.fc2)
        wide = self.fc1(x)
        mixed = to_tokens(self.dwconv(to_map(wide, grid)))
        if self.residual:
            mixed += wide
        return self.fc2(self.act(mixed))

    @torch.no_grad()
    def conv_and_input(self) -> nn.Conv2d:
        """The convolution with the residual in its kernel's centre."""
        if not self.residual:
            return self.dwconv
        conv = copy.deepcopy(self.dwconv)
        conv.weight[:, :, 1, 1] += 1
        return conv

    def fuse(self) -> None:
        self.dwconv, self.residual = self.conv_and_input(), False


class Block(nn.Module):
    """Pre-norm token mixer and convolutional perceptron, each with a residual.

    Args:
        num_heads: of the attention; None mixes by modulation.
        layer_scale: where the scales of the two branches start; None or 0 for none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None,
        mlp_ratio: float,
        layer_scale: float | None = None,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ScaleAwareModulation(dim) if num_heads is None else ConvValueAttention(dim, num_heads, attn_drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.gamma_1, self.gamma_2 = (
            nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None for _ in range(2)
        )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.add(x, self.attn(self.norm1(x), grid), self.gamma_1)
        return self.add(x, self.mlp(self.norm2(x), grid), self.gamma_2)

    def add(self, x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
        branch = self.drop_path(branch)
        return x + branch if scale is None else torch.addcmul(x, branch, scale)

    def fuse(self) -> None:
        if self.gamma_1 is not None:
            self.attn.proj = fold_scale(self.attn.proj, self.gamma_1)
            self.mlp.fc2 = fold_scale(self.mlp.fc2, self.gamma_2)
            self.gamma_1, self.gamma_2 = None, None


_BLOCK = r"^(?:backbone\.)?(block\d+\.\d+\.)"


class ScaleAwareModulationTransformer(Pyramid):
    """SMT: four stages of strides 4, 8, 16 and 32.

    Args:
        embed_dims, depths, mlp_ratios: one entry a stage.
        num_heads: attention heads of each stage; None for a stage of modulation alone.
        alternate: for each stage with heads, whether modulation and attention take turns, modulation first.
        stem_kernel: side of the first convolution.
        patch_stride: stride of the first stage, an even number; 2 suits small images.
        layer_scale: where the scales of the residual branches start; None or 0 for none.
        global_pool: "avg", "max" or "".
    """

    key_table = (
        (r"^(?:backbone\.)?patch_embed1\.conv\.0\.", "patch_embed1.conv.conv."),
        (r"^(?:backbone\.)?patch_embed1\.conv\.1\.", "patch_embed1.conv.norm."),
        (r"^(?:backbone\.)?patch_embed1\.conv\.3\.", "patch_embed1.proj."),
        (_BLOCK + r"mlp\.dwconv\.dwconv\.", r"\1mlp.dwconv."),
        (_BLOCK + r"attn\.dw_conv\.", r"\1attn.local_conv."),
        *((_BLOCK + rf"attn\.local_conv_{i}\.", rf"\1attn.modulator.convs.{i - 1}.") for i in range(1, 5)),
        (_BLOCK + r"attn\.proj0\.", r"\1attn.modulator.mix."),
        (_BLOCK + r"attn\.bn\.", r"\1attn.modulator.norm."),
        (_BLOCK + r"attn\.proj1\.", r"\1attn.modulator.proj."),
        (r"^backbone\.(.+)", r"\1"),
    )

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 1),
        num_heads: Sequence[int | None] = (None, None, 8, 16),
        alternate: Sequence[bool] = (False, False, True, False),
        mlp_ratios: Sequence[float] = (4, 4, 4, 2),
        stem_kernel: int = 3,
        patch_stride: int = 4,
        layer_scale: float | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if patch_stride % 2:
            raise ValueError(f"patch_stride={patch_stride} is not even")
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        for i, dim in enumerate(embed_dims):
            blocks = [
                Block(
                    dim,
                    None if alternate[i] and j % 2 == 0 else num_heads[i],
                    mlp_ratios[i],
                    layer_scale,
                    attn_drop_rate,
                    next(rates),
                )
                for j in range(depths[i])
            ]
            embed: nn.Module = OverlapPatchEmbed(2, embed_dims[i - 1], dim)
            if not i:
                embed = Stem(in_chans, dim, stem_kernel, patch_stride // 2)
            self.add_stage(embed, blocks, nn.LayerNorm(dim, eps=1e-6), dim, patch_stride * 2**i)
        self.apply(init_weights)
        self.apply(init_convolution)
        self.apply(init_modulator)
        self.build_head(num_classes, global_pool, drop_rate)

    def reshape_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        self.compare_depths(state)
        converted = {}
        for name, value in state.items():
            if ".attn.q." in name:
                keys = state[name.replace(".q.", ".kv.")].chunk(2)[0]
                converted[name.replace(".q.", ".qk.")] = torch.cat([value, keys])
            elif ".attn.kv." in name:
                converted[name.replace(".kv.", ".v.")] = value.chunk(2)[1]
            elif name.endswith((".modulator.mix.weight", ".modulator.proj.weight")):
                converted[name] = value.flatten(1)  # 1x1 convolutions
            else:
                converted[name] = value
        return converted

    def compare_depths(self, state: dict[str, Tensor]) -> None:
        """ValueError where a stage of the weights has more or fewer blocks than ours, naming the depths that fit."""
        theirs = depths_of(state)
        ours = tuple(len(self.get_submodule(f"block{i + 1}")) for i in range(self.num_stages))
        if any(a != b for a, b in zip(theirs, ours, strict=False)):
            raise ValueError(f"the weights have depths={theirs}, the model {ours}; build it with depths={theirs}")


def init_modulator(module: nn.Module) -> None:
    """A modulator's projection starts as the 1x1 convolution that it is in the authors' code. For `nn.Module.apply`."""
    if isinstance(module, Modulator):
        nn.init.normal_(module.proj.weight, std=math.sqrt(2 / module.proj.out_features))


def depths_of(state: dict[str, Tensor]) -> tuple[int, ...]:
    """How many blocks each stage of a state dict has, read off its names."""
    found = [re.match(r"(?:backbone\.)?block(\d+)\.(\d+)\.", name) for name in state]
    blocks = {(int(match[1]), int(match[2])) for match in found if match}
    return tuple(sum(stage == i + 1 for stage, _ in blocks) for i in range(max(blocks)[0] if blocks else 0))


_LARGE = {
    "embed_dims": (96, 192, 384, 768),
    "depths": (4, 6, 28, 4),
    "mlp_ratios": (8, 6, 4, 2),
    "stem_kernel": 7,
    "layer_scale": 1e-4,
}
_22K = "pre-trained on ImageNet-22k"
VARIANTS = {
    "smt_nano": Variant(  # ours, for 32-pixel images: strides 2, 4, 8, 16
        {
            "embed_dims": (16, 32, 64, 128),
            "depths": (1, 1, 2, 1),
            "num_heads": (None, None, 4, 8),
            "patch_stride": 2,
        },
        cfg={"input_size": (3, 32, 32), "crop_pct": 1.0},
    ),
    "smt_tiny": Variant({}, 82.2, ("smt_tiny.pth",)),
    "smt_small": Variant({"depths": (3, 4, 18, 2)}, 83.7, ("smt_small.pth",)),
    "smt_base": Variant(
        {"depths": (4, 6, 28, 2), "mlp_ratios": (8, 6, 4, 2), "stem_kernel": 7}, 84.3, ("smt_base.pth",)
    ),
    "smt_large": Variant(_LARGE, 87.1, ("smt_large_22k_224_ft.pth", "smt_large_22k.pth"), note=_22K),
    "smt_large_384": Variant(
        _LARGE, 88.1, ("smt_large_22k_384_ft.pth",), cfg={"input_size": (3, 384, 384), "crop_pct": 1.0}, note=_22K
    ),
}
register(ScaleAwareModulationTransformer, VARIANTS, first_conv="patch_embed1.conv.conv")
