"""Attention rollout: how much each patch can reach the answer through the attention of all layers.

"Quantifying Attention Flow in Transformers", Abnar and Zuidema, ACL 2020, arXiv 2005.00928. Heads are averaged, the
residual path is the identity at half weight, layers are multiplied. Where tokens are merged, the flow passes through
the mixtures, so that the map is of the image's patches. It shows where information can flow, not what the classifier
made of it, and is the same for every class.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitalloy.errors import ModelError
from vitalloy.layers.attention import Attend, SelfAttention
from vitalloy.layers.slimming import TokenSlimming
from vitalloy.layers.sockets import find, swapped
from vitalloy.layers.timm_border import SocketedAttention


class RecordedAttend(Attend):
    """Attention that appends its weights, averaged over heads (B, N, M), to `record`."""

    def __init__(self, dropout: float, record: list[Tensor]) -> None:
        super().__init__(dropout)
        self.record = record

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None
    ) -> Tensor:
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        weights = (scores if bias is None else scores + bias).softmax(-1)
        self.record.append(weights.mean(1))
        return weights @ v


def supports_rollout(model: nn.Module) -> bool:
    """Whether every block's attention goes over one and the same set of tokens, as rollout needs."""
    info = getattr(model, "feature_info", None)
    blocks = len(info) if isinstance(info, list) else 0
    columnar = blocks > 0 and len({row["reduction"] for row in info}) == 1
    plain = find(model, (SelfAttention, SocketedAttention))
    return columnar and len(find(model, Attend)) == len(plain) == blocks


def roll(layers: Sequence[Tensor]) -> Tensor:
    """Attention weights (B, N, N) of each layer, first layer first -> from each token to each input, rows of sum 1.

    A layer (B, M, N) that merges N tokens into M has no residual path.
    """
    flow = torch.eye(layers[0].shape[-1], dtype=layers[0].dtype, device=layers[0].device)
    for weights in layers:
        same = weights.shape[-1] == weights.shape[-2]
        one = torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)
        flow = (weights + one) / 2 @ flow if same else weights @ flow
    return flow


@torch.no_grad()
def attention_rollout(model: nn.Module, images: Tensor) -> Tensor:
    """Images (B, C, H, W) -> maps (B, h, w) on the patch grid, each scaled to 0..1.

    Raises:
        ModelError: the attention of some layer is over other tokens (pyramids, windows, reduced keys).
    """
    if not supports_rollout(model):
        raise ModelError(f"attention rollout needs plain attention in every block; {type(model).__name__} has another.")
    layers: list[Tensor] = []

    def merge(slimming: TokenSlimming, args: tuple[Tensor], _output: Tensor) -> None:
        layers.append(_beside_prefix(slimming.mixing(args[0][:, slimming.prefix :]), slimming.prefix))

    hooks = [module.register_forward_hook(merge) for module in find(model, TokenSlimming).values()]
    try:
        with swapped(model, Attend, lambda _name, old: RecordedAttend(old.dropout, layers)):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    flow, patch = roll(layers), model.feature_info[0]["reduction"]
    grid = tuple(side // patch for side in images.shape[-2:])
    prefix = flow.shape[-1] - grid[0] * grid[1]
    by_token = prefix and getattr(model, "global_pool", "token") == "token"
    reach = (
        flow[:, 0, prefix:] if by_token else flow[:, model.num_prefix_tokens :, prefix:].mean(1)
    )  # from what the classifier reads
    reach = reach.unflatten(1, grid)
    low, high = reach.amin((1, 2), keepdim=True), reach.amax((1, 2), keepdim=True)
    return (reach - low) / (high - low).clamp_min(1e-12)


def _beside_prefix(mixing: Tensor, prefix: int) -> Tensor:
    """The shares of patches in mixtures (B, M, N), with class tokens in front that stay themselves."""
    whole = mixing.new_zeros(len(mixing), prefix + mixing.shape[1], prefix + mixing.shape[2])
    whole[:, range(prefix), range(prefix)] = 1.0
    whole[:, prefix:, prefix:] = mixing
    return whole
