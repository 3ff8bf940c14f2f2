"""The classifiers of early exits: local perception for shallow ones, global aggregation for deep ones.

A head takes the tokens of a point in a model, mixes the patches, averages them and classifies. Its kinds:

- "conv1_1": point-wise, depth-wise 3x3 and point-wise convolution, each with batch norm, and a residual;
- "conv2_1": the same without the depth-wise one;
- "attention_rK": self-attention among every K-th token along both sides of the grid;
- "pool": no mixing.

Where there are class tokens, each is added to the average and has a classifier, and their logits are averaged (the form
for ViT and DeiT). Otherwise tokens are normed before they are averaged (the form for Swin).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor, nn

from vitalloy.compression.trunk import Grid, Tokens
from vitalloy.errors import CompressionError
from vitalloy.layers.attention import SelfAttention, merge_heads
from vitalloy.layers.backbone import rename_keys
from vitalloy.layers.fusion import fold_norm_before
from vitalloy.layers.tokens import to_map, to_tokens

KINDS = "conv1_1, conv2_1, attention_rK (K = 1, 2, ...) and pool"
ATTENTION_HEADS = 8
_STEP = re.compile(r"attention_r([1-9]\d*)")
_PUBLISHED = {  # number of exits -> heads
    2: ("conv1_1", "attention_r2"),
    4: ("conv1_1", "conv2_1", "attention_r2", "attention_r3"),
    6: ("conv1_1", "conv2_1", "attention_r2", "attention_r2", "attention_r3", "attention_r3"),
}
KEYS = (  # the authors' names of a head's parameters -> ours
    (r"^cls_classifier\.", "classifier."),
    (r"^distillation_classifier\.", "classifier_dist."),
    (r"^classifier\.layernorm\.", "norm."),
    (r"^classifier\.classifier\.", "classifier."),
)


class LocalPerception(nn.Module):
    """Convolutions over the patches of a grid, and a residual."""

    def __init__(self, dim: int, depthwise: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.GELU(), nn.BatchNorm2d(dim))
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if depthwise else None
        self.proj_bn = nn.BatchNorm2d(dim) if depthwise else None
        self.act = nn.GELU()
        self.conv2 = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim))

    def forward(self, x: Tensor, grid: Grid | None) -> Tensor:
        """x (B, N, C) -> the same shape."""
        y = self.conv1(_shaped(x, grid))
        if self.proj is not None:
            y = self.proj_bn(self.act(self.proj(y)))
        return x + to_tokens(self.conv2(y))

    def average(self, x: Tensor, grid: Grid | None) -> Tensor:
        """The mean of `forward` over the tokens, (B, C), in evaluation mode.

        Behind the last activation all is linear, so the mean comes first: one vector instead of N passes there.
        """
        if self.proj is None:
            y = self.conv1[1](self.conv1[0](_shaped(x, grid)))
            y = self.conv1[2](y.mean((2, 3), keepdim=True))
        else:
            y = self.proj_bn(self.act(self.proj(self.conv1(_shaped(x, grid)))).mean((2, 3), keepdim=True))
        return x.mean(1) + self.conv2(y).flatten(1)

    def fuse(self) -> None:
        """Fold the norm before the last convolution into it; the one before a padded convolution stays."""
        if isinstance(self.proj_bn, nn.BatchNorm2d):
            self.conv2[0], self.proj_bn = fold_norm_before(self.proj_bn, self.conv2[0]), nn.Identity()
        elif self.proj is None and isinstance(self.conv1[2], nn.BatchNorm2d):
            self.conv2[0], self.conv1[2] = fold_norm_before(self.conv1[2], self.conv2[0]), nn.Identity()


class GlobalAggregation(SelfAttention):
    """Attention among every `step`-th token along both sides of the grid; among all where there is no grid."""

    def __init__(self, dim: int, step: int) -> None:
        super().__init__(dim, math.gcd(dim, ATTENTION_HEADS), qkv_bias=False)
        self.step = step

    def forward(self, x: Tensor, grid: Grid | None) -> Tensor:
        """x (B, N, C) -> (B, N', C) with the tokens that were kept."""
        return super().forward(subsampled(x, grid, self.step))

    def average(self, x: Tensor, grid: Grid | None) -> Tensor:
        """The mean of `forward` over the tokens, (B, C); the mean comes before the last projection."""
        qkv = self.qkv(subsampled(x, grid, self.step)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N', d)
        return self.proj(merge_heads(self.attend(q, k, v)).mean(1))


class Unmixed(nn.Module):
    """The tokens as they are."""

    def forward(self, x: Tensor, grid: Grid | None) -> Tensor:
        return x

    def average(self, x: Tensor, grid: Grid | None) -> Tensor:
        return x.mean(1)


def subsampled(x: Tensor, grid: Grid | None, step: int) -> Tensor:
    """Every `step`-th token along both sides of the grid: (B, H * W, C) -> (B, ceil(H/step) * ceil(W/step), C)."""
    return x if grid is None or step == 1 else x.unflatten(1, grid)[:, ::step, ::step].flatten(1, 2)


def _shaped(x: Tensor, grid: Grid | None) -> Tensor:
    return to_map(x, grid or (x.shape[1], 1))  # point-wise layers need no grid


class ExitHead(nn.Module):
    """An exit: tokens -> logits (B, classes).

    Args:
        dim: channels of the tokens.
        kind: "conv1_1", "conv2_1", "attention_rK" or "pool".
        prefix: class tokens before the patches: 0, 1, or 2 with a distillation token.

    Raises:
        CompressionError: an unknown kind.
    """

    def __init__(self, dim: int, num_classes: int, kind: str, prefix: int = 1) -> None:
        super().__init__()
        self.kind = kind
        self.mlp = _mixer(dim, kind)
        self.norm = None if prefix else nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, num_classes)
        self.classifier_dist = nn.Linear(dim, num_classes) if prefix > 1 else None
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def local(self) -> bool:
        """Whether the head is of the convolutional kind."""
        return isinstance(self.mlp, LocalPerception)

    def forward(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Logits, and the mixed patches (B, N', C) that training compares."""
        features = self.mlp(tokens.patches, tokens.grid)
        return self.classify(self.pooled(features), tokens.prefix), features

    def logits(self, tokens: Tokens) -> Tensor:
        """The logits of `forward` in evaluation mode, for less work where there are class tokens."""
        if self.norm is not None:
            return self(tokens)[0]
        return self.classify(self.mlp.average(tokens.patches, tokens.grid), tokens.prefix)

    def pooled(self, features: Tensor) -> Tensor:
        """Mixed patches (B, N', C) -> (B, C)."""
        return (features if self.norm is None else self.norm(features)).mean(1)

    def classify(self, pooled: Tensor, prefix: Tensor | None) -> Tensor:
        if prefix is None or self.norm is not None:
            return self.classifier(pooled)
        logits = self.classifier(pooled + prefix[:, 0])
        if self.classifier_dist is None:
            return logits
        return (logits + self.classifier_dist(pooled + prefix[:, 1])) / 2

    def convert_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' state dict of a head under our names."""
        return rename_keys(state, KEYS)


def _mixer(dim: int, kind: str) -> nn.Module:
    if kind in ("conv1_1", "conv2_1"):
        return LocalPerception(dim, depthwise=kind == "conv1_1")
    if kind == "pool":
        return Unmixed()
    if found := _STEP.fullmatch(kind):
        return GlobalAggregation(dim, int(found[1]))
    raise CompressionError(f"there is no exit head {kind!r}: the kinds are {KINDS}.")


def published_heads(count: int) -> tuple[str, ...]:
    """The kinds of `count` heads from shallow to deep, after the paper; a quarter each where it says nothing."""
    quarters = ("conv1_1", "conv2_1", "attention_r2", "attention_r3")
    return _PUBLISHED.get(count) or tuple(quarters[4 * i // count] for i in range(count))


def fitting(kind: str, grid: Grid | None) -> str:
    """The kind itself, or the next that a grid has room for: two tokens a side remain, 3x3 needs three."""
    if kind == "conv1_1" and (grid is None or min(grid) < 3):
        return "conv2_1"
    if found := _STEP.fullmatch(kind):
        step = 1 if grid is None else max(min(int(found[1]), min(grid) - 1), 1)
        return f"attention_r{step}"
    return kind
