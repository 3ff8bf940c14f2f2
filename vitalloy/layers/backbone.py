"""What every backbone shares: timm's contract, derived from a few things that the backbone says of itself."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from timm.layers import trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitalloy.errors import ModelError
from vitalloy.layers.fusion import fuse
from vitalloy.layers.pooling import GlobalPool
from vitalloy.layers.tokens import to_tokens

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on


class Level(NamedTuple):
    """One intermediate feature map (B, C, H, W) and, where there are any, its class tokens (B, P, C)."""

    map: Tensor
    prefix: Tensor | None = None


class Backbone(nn.Module, ABC):
    """timm's model contract. A backbone sets the attributes below and defines `forward_levels` and `forward_final`.

    Attributes:
        feature_info: one dict(num_chs, reduction, module) a level.
        num_features: channels of the tokens that `forward_final` returns.
        default_out_indices: the levels that `features_only=True` returns: their numbers, or how many of the last.
        pool, head: global pooling and the classifier (`nn.Identity` when there are no classes).
        key_table: (pattern, replacement) pairs that turn published parameter names into ours, tried in order;
            a replacement of None drops the entry.
    """

    feature_info: list[dict[str, Any]]
    num_features: int
    num_classes: int
    default_out_indices: int | tuple[int, ...]
    num_prefix_tokens = 0
    grad_checkpointing = False
    fused = False
    key_table: Sequence[tuple[str, str | None]] = ()

    @abstractmethod
    def forward_levels(self, x: Tensor, take: Collection[int], stop: int, norm: bool) -> tuple[Any, list[Level]]:
        """Run the first `stop` levels; return the state after them and the levels whose index is in `take`."""

    @abstractmethod
    def forward_final(self, state: Any) -> Tensor:
        """What `forward_levels` left -> normalised tokens (B, prefix + N, C)."""

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> tokens (B, prefix + N, num_features)."""
        return self.forward_final(self.forward_levels(x, (), len(self.feature_info), False)[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens -> logits (B, num_classes), or the pooled features that the classifier would see."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Feature maps of chosen levels, and the final features unless `intermediates_only`.

        Args:
            indices: level numbers (negative ones count from the end), or how many of the last; all when None.
            return_prefix_tokens: return (map, class tokens) pairs.
            norm: apply the final normalisation to each map where the backbone has one for it.
            stop_early: do not run the levels behind the last wanted one.
            output_fmt: "NCHW" maps or "NLC" tokens.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} is neither 'NCHW' nor 'NLC'")
        take, last = feature_take_indices(len(self.feature_info), indices)
        stop = last + 1 if stop_early else len(self.feature_info)
        state, levels = self.forward_levels(x, take, stop, norm)
        maps = [to_tokens(level.map) if output_fmt == "NLC" else level.map for level in levels]
        if return_prefix_tokens and self.num_prefix_tokens:
            maps = [(m, level.prefix) for m, level in zip(maps, levels, strict=True)]
        return maps if intermediates_only else (self.forward_final(state), maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what lies behind the last wanted level; returns the wanted levels as plain indices."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        self.prune_levels(last + 1, prune_norm)
        if prune_head:
            self.reset_classifier(0)
        return take

    @abstractmethod
    def prune_levels(self, keep: int, prune_norm: bool) -> None:
        """Drop the modules behind the first `keep` levels, and the final norm when asked."""

    def build_head(self, num_classes: int, global_pool: str, drop_rate: float = 0.0) -> None:
        """Set `pool`, `head_drop` and `head`; a new classifier starts as a truncated normal of std 0.02."""
        self.num_classes, self.global_pool = num_classes, global_pool
        self.head_hidden_size = self.num_features
        self.pool = GlobalPool(global_pool, self.num_prefix_tokens, self.pool_groups())
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self.make_classifier(num_classes)

    def pool_groups(self) -> int:
        """How many exponents the pooling "ggem" learns: the heads of the last attention, or groups of 32 channels."""
        heads = [module.num_heads for module in self.modules() if isinstance(getattr(module, "num_heads", None), int)]
        groups = heads[-1] if heads else self.num_features // 32
        return math.gcd(groups, self.num_features)

    def make_classifier(self, num_classes: int) -> nn.Module:
        if not num_classes:
            return nn.Identity()
        head = nn.Linear(self.num_features, num_classes)
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for `num_classes` (0: features only), on the device and dtype of the model."""
        like = next(self.parameters())
        self.build_head(num_classes, self.global_pool if global_pool is None else global_pool, self.head_drop.p)
        self.to(device=like.device, dtype=like.dtype)

    def fuse(self) -> Self:
        """Fold norms, scales and parallel branches into the layers beside them, in place, for deployment.

        Same outputs in evaluation mode, fewer passes over memory; what can be folded depends on the backbone. A fused
        model takes no weights and does not train: load first, and keep the model itself for training.
        """
        if not self.fused:
            fuse(self).requires_grad_(False)
            self.fused = True
            self.register_load_state_dict_pre_hook(_refuse_weights)
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: recompute each block in the backward pass."""
        self.grad_checkpointing = enable

    def run(self, block: Callable[..., Tensor], *args: Any) -> Any:
        """Call a block, through gradient checkpointing when it is on."""
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must leave alone, beyond biases and norms."""
        return set()

    def convert_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A published state dict under our names and shapes; entries that no rule touches pass through."""
        return self.reshape_state(rename_keys(state, self.key_table))

    def reshape_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fuse, split or interpolate entries whose form differs from ours; none by default."""
        return state


def rename_keys(state: Mapping[str, Tensor], table: Iterable[tuple[str, str | None]]) -> dict[str, Tensor]:
    """A state dict with each name replaced by the first rule (pattern, replacement or None to drop) that it matches."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        new: str | None = key
        for pattern, replacement in table:
            if re.search(pattern, key):
                new = None if replacement is None else re.sub(pattern, replacement, key)
                break
        if new is not None:
            renamed[new] = value
    return renamed


def _refuse_weights(*_: Any) -> None:
    raise ModelError("a fused model takes no weights: load them into a new model and fuse that")


def init_weights(module: nn.Module) -> None:
    """The transformers' common start: linear weights truncated normal 0.02, zero biases. For `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_convolution(module: nn.Module) -> None:
    """The pyramids' start: convolution weights normal with variance 2 / fan out, zero biases. For `nn.Module.apply`."""
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic-depth rates that grow linearly from 0 in the first block to `rate` in the last."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
