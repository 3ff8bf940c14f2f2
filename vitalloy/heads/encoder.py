"""A backbone as dense heads see it: a list of maps, their channels and their strides. Nothing else is asked of it.

A plain transformer has one stride in all its blocks; its maps are brought to a pyramid here, finer ones by transposed
convolutions and coarser ones by pooling, much as in "Exploring Plain Vision Transformer Backbones for Object Detection"
(Li et al., ECCV 2022, arXiv 2203.16527), but from four depths as segmenters do it, where that paper takes the last map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.layers import LayerNorm2d
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from vitalloy.checkpoints import load_checkpoint
from vitalloy.errors import ModelError
from vitalloy.registry import create_model

PYRAMID = 4  # levels that heads expect at most
FINEST = 4  # stride of the first level that is made from a plain transformer's maps


class Encoder(nn.Module):
    """Images -> maps from fine to coarse.

    Args:
        encoder: a name of the registry, or a module that returns a list of maps (B, C, H, W) and whose `feature_info`
            says num_chs and reduction of each, as `create_model(..., features_only=True)` gives.
        img_size, in_chans: for an encoder by name, as in `create_model`.
        weights: a classifier's checkpoint for the backbone; what belongs to its head is left over and logged.
        **kwargs: further arguments of `create_model`. Without `out_indices` the last map of each of the four coarsest
            strides is taken, or maps from four depths where all have one stride.

    Attributes:
        channels, strides: one entry a map.

    Raises:
        ModelError: an unknown name, or a module that does not say its channels and strides.
    """

    def __init__(
        self,
        encoder: str | nn.Module,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        weights: str | Path | Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if isinstance(encoder, str):
            encoder = _by_name(encoder, {"img_size": img_size, "in_chans": in_chans, **kwargs})
        self.features = encoder
        self.channels, self.strides = _describe(encoder)
        self.rescale: nn.Module | None = None
        if len(self.strides) > 1 and len(set(self.strides)) == 1:
            self.rescale = Rescale(self.channels, self.strides[0])
            self.channels, self.strides = self.rescale.channels, self.rescale.strides
        if weights is not None:
            load_checkpoint(self.model, weights, strict=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = list(self.features(x))
        return maps if self.rescale is None else self.rescale(maps)

    @property
    def model(self) -> nn.Module:
        """The backbone itself, without the wrapper that picks its maps."""
        return self.features.model if isinstance(self.features, FeatureGetterNet) else self.features

    def convert_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' names of a backbone under ours; a state dict of this class passes through."""
        if any(k.startswith("features.") for k in state):
            return dict(state)
        convert = getattr(self.model, "convert_state", dict)
        prefix = "features." if self.model is self.features else "features.model."
        return {prefix + k: v for k, v in convert(state).items()}


class Rescale(nn.Module):
    """Maps of one stride -> strides 4, 8, 16, ..., each a power of two away from that stride."""

    def __init__(self, channels: Sequence[int], stride: float) -> None:
        super().__init__()
        finer = [round(math.log2(stride / (FINEST * 2**i))) for i in range(len(channels))]  # doublings of the size
        self.levels = nn.ModuleList(_resize(dim, n) for dim, n in zip(channels, finer, strict=True))
        self.channels = [dim >> max(n, 0) for dim, n in zip(channels, finer, strict=True)]
        self.strides = [stride / 2**n for n in finer]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [level(x) for level, x in zip(self.levels, maps, strict=True)]


def _resize(dim: int, doublings: int) -> nn.Module:
    """Double a map's sides so many times, halving its channels each time; a negative number halves the sides."""
    if doublings < 0:
        return nn.MaxPool2d(2**-doublings, ceil_mode=True)  # no map is too small
    layers: list[nn.Module] = []
    for i in range(doublings):
        layers += [LayerNorm2d(dim), nn.GELU()] if i else []
        layers.append(nn.ConvTranspose2d(dim, dim // 2, 2, 2))
        dim //= 2
    return nn.Sequential(*layers)


def _by_name(name: str, kwargs: dict[str, Any]) -> nn.Module:
    model = create_model(name, features_only=True, **kwargs)
    if "out_indices" in kwargs:
        return model
    wanted = _choose([level["reduction"] for level in model.feature_info.info])
    if wanted == tuple(model.feature_info.out_indices):
        return model
    return create_model(name, features_only=True, out_indices=wanted, **kwargs)


def _choose(strides: Sequence[float]) -> tuple[int, ...]:
    """Which of a backbone's levels make the pyramid."""
    last = {stride: i for i, stride in enumerate(strides)}  # of a repeated stride its last level
    if len(last) > 1:
        return tuple(sorted(last.values())[-PYRAMID:])
    count = min(PYRAMID, len(strides))
    return tuple((i + 1) * len(strides) // count - 1 for i in range(count))


def _describe(encoder: nn.Module) -> tuple[list[int], list[float]]:
    info = getattr(encoder, "feature_info", None)
    if info is None:
        raise ModelError(
            f"{type(encoder).__name__} does not say the channels and strides of its maps: give it a `feature_info` "
            "list of dict(num_chs, reduction), or build it with create_model(..., features_only=True)."
        )
    if hasattr(info, "channels"):
        return list(info.channels()), list(info.reduction())
    return [level["num_chs"] for level in info], [level["reduction"] for level in info]
