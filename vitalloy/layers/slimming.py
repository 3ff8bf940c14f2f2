"""Token slimming: N tokens become M of their mixtures, and what is known of the mixtures goes back to the N places.

"Self-slimmed Vision Transformer" (SiT), Zong et al., ECCV 2022, arXiv 2111.12624.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.layers.fusion import fold_scale


class TokenSlimming(nn.Module):
    """Each of M mixtures is a learned convex combination of all N patch tokens: (B, P + N, C) -> (B, P + M, C).

    The scores come from the normed tokens, the combination is of the raw ones. The bias of the last layer is the same
    for all tokens of a mixture, so it changes nothing; it is there because the published files hold it.

    Args:
        dim: channels.
        slots: M, the mixtures.
        prefix: P, class tokens in front, which are left as they are.
    """

    def __init__(self, dim: int, slots: int, prefix: int = 0) -> None:
        super().__init__()
        self.slots, self.prefix = slots, prefix
        self.score = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, slots))
        self.scale = nn.Parameter(torch.ones(1, 1, 1))

    def mixing(self, patches: Tensor) -> Tensor:
        """The share of each patch token (B, N, C) in each mixture: (B, M, N), whose rows sum to one."""
        return self.scores(patches).softmax(-1)

    def scores(self, patches: Tensor) -> Tensor:
        scores = self.score(patches).mT  # (B, N, M) -> (B, M, N)
        return scores if self.scale is None else scores * self.scale

    def fuse(self) -> None:
        """Folds the scale into the last layer and drops its bias."""
        if self.scale is not None and type(self.score[-1]) is nn.Linear:  # a quantizer's layer stays as it is
            self.score[-1] = fold_scale(self.score[-1], self.scale)
            self.score[-1].bias = self.scale = None

    def forward(self, x: Tensor) -> Tensor:
        patches = x[:, self.prefix :]
        mixed = self.mixing(patches) @ patches
        return torch.cat([x[:, : self.prefix], mixed], dim=1) if self.prefix else mixed


def slim_counts(count: int, keep: float, times: int) -> list[int]:
    """How many of `count` tokens are left after each of `times` slimmings to the share `keep`; at least one."""
    return [max(int(count * keep**n), 1) for n in range(1, times + 1)]


def put_back(mixtures: Tensor, origins: Tensor) -> Tensor:
    """Features of mixtures (B, M, C) at the places they came from: origins (B, M, N) -> (B, N, C).

    A place takes the mean of the mixtures, weighted by its share in each.
    """
    return F.normalize(origins.mT, p=1, dim=-1) @ mixtures
