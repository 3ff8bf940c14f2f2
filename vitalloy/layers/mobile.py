"""Parts of backbones made for phones: convolutions with biases and batch norms, residual branches with a layer scale.

Maps are channels-last in memory: on CPUs depth-wise convolutions and pooling run two to nine times as fast so, and
1x1 convolutions are matrix products on a view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from vitalloy.layers.conv_norm import ConvNorm
from vitalloy.layers.fusion import Linear, fold_norm, fold_scale
from vitalloy.layers.streaming import GROUP, may_stream, stream_mlp


class ConvStem(nn.Module):
    """Two 3x3 convolutions, the first of stride 2: an image becomes a map of `dim` channels at stride 2 or 4."""

    def __init__(self, in_chans: int, dim: int, stride: int = 4, act: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_chans, dim // 2, 3, 2, bias=True, act=act)
        self.conv2 = ConvNorm(dim // 2, dim, 3, stride // 2, bias=True, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x.contiguous(memory_format=torch.channels_last)))


class LinearNorm(nn.Module):
    """act(norm(linear(x))) at each pixel of a map: a 1x1 convolution, its batch norm and an activation.

    The matrix product was measured to take up to a third less time than the convolution on one CPU core, and GELU on
    the contiguous view half as much as on the map.
    """

    def __init__(self, in_chans: int, out_chans: int, act: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.linear = nn.Linear(in_chans, out_chans)
        self.norm = nn.BatchNorm2d(out_chans)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_chans, H, W) -> (B, out_chans, H, W)."""
        x = self.norm(self.linear(x.movedim(1, -1)).movedim(-1, 1))
        return self.act(x.movedim(1, -1)).movedim(-1, 1)

    def fuse(self) -> None:
        if isinstance(self.norm, nn.BatchNorm2d):
            self.linear, self.norm = fold_norm(self.linear, self.norm), nn.Identity()


class ConvMlp(nn.Module):
    """A perceptron at each position of a map, with batch norms; `depthwise` puts a 3x3 convolution into its middle.

    Fused and at inference it takes a piece of the batch at a time where that pays; see `layers/streaming.py`.
    """

    def __init__(self, dim: int, hidden: int, depthwise: bool) -> None:
        super().__init__()
        self.fc1 = LinearNorm(dim, hidden, act=nn.GELU)
        self.mid = ConvNorm(hidden, hidden, 3, groups=hidden, bias=True) if depthwise else None
        self.act = nn.GELU() if depthwise else None
        self.fc2 = LinearNorm(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same shape."""
        if self.may_stream(x):
            return self.stream(x)
        x = self.fc1(x)
        if self.mid is not None:
            x = self.act(self.mid(x).movedim(1, -1)).movedim(-1, 1)
        return self.fc2(x)

    def may_stream(self, x: Tensor) -> bool:
        bricks = [m for m in (self.fc1, self.mid, self.fc2) if m is not None]
        parts = [part for brick in bricks for part in brick.children()]
        acts = [self.fc1.act] if self.act is None else [self.fc1.act, self.act]
        return (
            all(type(act) is nn.GELU for act in acts)
            and not any(brick._forward_hooks or brick._forward_pre_hooks for brick in bricks)
            and may_stream(x.movedim(1, -1), *parts, *acts)
        )

    def stream(self, x: Tensor) -> Tensor:
        x, fc1, fc2 = x.movedim(1, -1), self.fc1.linear, self.fc2.linear
        if self.mid is None:
            return stream_mlp(x, fc1, self.fc1.act, fc2).movedim(-1, 1)
        images = min(len(x), max(1, GROUP // (x.shape[1] * x.shape[2] * fc1.out_features)))
        out = x.new_empty(*x.shape[:-1], fc2.out_features)
        buffer = x.new_empty(images, *x.shape[1:-1], fc1.out_features)
        gelu_ = torch.ops.aten.gelu_
        for piece, result in zip(x.split(images), out.split(images), strict=True):
            wide = buffer[: len(piece)]
            torch.addmm(fc1.bias, piece.flatten(0, 2), fc1.weight.t(), out=wide.flatten(0, 2))
            mixed = self.mid.conv(gelu_(wide).movedim(-1, 1)).movedim(1, -1)
            torch.addmm(fc2.bias, gelu_(mixed).flatten(0, 2), fc2.weight.t(), out=result.flatten(0, 2))
        return out.movedim(-1, 1)


class ScaledSum(nn.Module):
    """x + drop_path(scale * branch), in one pass: layer scale, one learned factor a channel."""

    def __init__(self, dim: int, init: float, drop_path: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), init))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """x, branch: maps (B, C, H, W) or tokens (B, N, C)."""
        branch = self.drop_path(branch)
        if self.scale is None:
            return x + branch
        return torch.addcmul(x, branch, self.scale if x.ndim == 3 else self.scale.view(-1, 1, 1))

    def fold_into(self, layer: Linear) -> Linear:
        """The layer that ends the branch, with the scale in its weights; nothing is left to scale here."""
        if self.scale is not None:
            layer, self.scale = fold_scale(layer, self.scale), None
        return layer


class ConvBlock(nn.Module):
    """A residual `ConvMlp`: the inverted residual, or a pointwise perceptron.

    Args:
        mlp_ratio: hidden channels of the perceptron, in channels.
        depthwise: a 3x3 convolution in the middle of the perceptron.
        layer_scale: where the scale of the branch starts.
    """

    def __init__(
        self, dim: int, mlp_ratio: float, depthwise: bool = True, layer_scale: float = 1e-5, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), depthwise)
        self.add = ScaledSum(dim, layer_scale, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.mlp(x))

    def fuse(self) -> None:
        self.mlp.fc2.linear = self.add.fold_into(self.mlp.fc2.linear)


class MixingBlock(ConvBlock):
    """A `ConvBlock` behind a residual branch of its own that mixes positions.

    Args:
        token_mixer: (B, C, H, W) -> the same shape. Where it ends in a `LinearNorm` called `proj`, `fuse()` puts
            the layer scale there.
    """

    def __init__(
        self,
        dim: int,
        token_mixer: nn.Module,
        mlp_ratio: float,
        depthwise: bool = True,
        layer_scale: float = 1e-5,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(dim, mlp_ratio, depthwise, layer_scale, drop_path)
        self.token_mixer = token_mixer
        self.mix = ScaledSum(dim, layer_scale, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.mix(x, self.token_mixer(x)))

    def fuse(self) -> None:
        super().fuse()
        last = getattr(self.token_mixer, "proj", None)
        if isinstance(last, LinearNorm):
            last.linear = self.mix.fold_into(last.linear)


def init_perceptron(module: nn.Module) -> None:
    """EfficientFormer's start of a `ConvMlp`: weights truncated normal 0.02, zero biases. For `nn.Module.apply`."""
    if isinstance(module, ConvMlp):
        for layer in (m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)):
            trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


# the published names of a block's parameters, timm's beside them -> ours
BLOCK_KEYS = {
    r"mlp\.fc1\.(?:conv\.)?(weight|bias)$": r"mlp.fc1.linear.\2",
    r"mlp\.mid\.(?:conv\.)?(weight|bias)$": r"mlp.mid.conv.\2",
    r"mlp\.fc2\.(?:conv\.)?(weight|bias)$": r"mlp.fc2.linear.\2",
    r"mlp\.(?:norm1|fc1\.bn)\.": "mlp.fc1.norm.",
    r"mlp\.(?:mid_norm|mid\.bn)\.": "mlp.mid.norm.",
    r"mlp\.(?:norm2|fc2\.bn)\.": "mlp.fc2.norm.",
    r"(?:layer_scale_1|ls1\.gamma)$": "mix.scale",
    r"(?:layer_scale_2|ls2\.gamma)$": "add.scale",
}


def renamings(places: Mapping[str, str], parts: Mapping[str, str]) -> list[tuple[str, str]]:
    """Rows of a key table: every published place and part (regular expressions) joined, and ours likewise."""
    return [(f"^{place}{part}", ours + ends) for place, ours in places.items() for part, ends in parts.items()]


def flatten_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """1x1 convolutions as the weights of linear layers, and layer scales of shape (C, 1, 1) as (C,)."""
    flat = {}
    for name, value in state.items():
        if name.endswith(".linear.weight"):
            value = value.flatten(1)
        elif name.endswith((".mix.scale", ".add.scale")):
            value = value.flatten()
        flat[name] = value
    return flat
