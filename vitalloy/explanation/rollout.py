"""Attention rollout: how much each patch can reach the answer through the attention of all layers.

"Quantifying Attention Flow in Transformers", Abnar and Zuidema, ACL 2020, arXiv 2005.00928. Heads are averaged, the
residual path is the identity at half weight, layers are multiplied. It shows where information can flow, not what the
classifier made of it, and is the same for every class.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitalloy.errors import ModelError
from vitalloy.layers.attention import Attend
from vitalloy.layers.sockets import find, swapped


class RecordedAttend(Attend):
    """Attention that keeps its weights, averaged over heads: (B, N, M)."""

    weights: Tensor | None = None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None
    ) -> Tensor:
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        weights = (scores if bias is None else scores + bias).softmax(-1)
        self.weights = weights.mean(1)
        return weights @ v


def supports_rollout(model: nn.Module) -> bool:
    """Whether every block's attention goes over one and the same set of tokens, as rollout needs."""
    info = getattr(model, "feature_info", None)
    blocks = len(info) if isinstance(info, list) else 0
    columnar = blocks > 0 and len({row["reduction"] for row in info}) == 1
    return columnar and len(find(model, Attend)) == blocks


@torch.no_grad()
def attention_rollout(model: nn.Module, images: Tensor) -> Tensor:
    """Images (B, C, H, W) -> maps (B, h, w) on the patch grid, each scaled to 0..1.

    Raises:
        ModelError: the attention of some layer is over other tokens (pyramids, windows, reduced keys).
    """
    if not supports_rollout(model):
        raise ModelError(f"attention rollout needs plain attention in every block; {type(model).__name__} has another.")
    with swapped(model, Attend, lambda _name, old: RecordedAttend(old.dropout)) as recorders:
        grid = model.forward_intermediates(images, indices=1, intermediates_only=True)[0].shape[-2:]
        layers = [recorder.weights for recorder in recorders.values()]
    size = layers[0].shape[-1]
    flow = torch.eye(size, dtype=layers[0].dtype, device=images.device)
    for weights in layers:
        flow = (weights + torch.eye(size, dtype=weights.dtype, device=weights.device)) / 2 @ flow
    prefix = size - grid[0] * grid[1]
    reach = flow[:, 0, prefix:] if prefix else flow.mean(1)  # from the class token, or from all tokens
    reach = reach.unflatten(1, tuple(grid))
    low, high = reach.amin((1, 2), keepdim=True), reach.amax((1, 2), keepdim=True)
    return (reach - low) / (high - low).clamp_min(1e-12)
