"""The connectivity predictor: which keys each query should attend to, guessed from a low-rank form of the attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskPredictor(nn.Module):
    """Guesses an attention map as coefficients times a basis of maps; its weights are shared by all heads.

    The published form projects queries and keys to fewer channels and the keys to fewer tokens. Here the products are
    taken in another order, which gives the same numbers with fewer operations: keys are pooled first.

    Args:
        keys: how many keys the attention has, m; the weights are tied to it.
        heads, dim: of the attention; `dim` is that of one head.
        n_factor: keys per basis map: there are r = m // n_factor of them.
        c_factor: by how much the channels shrink.
        coefficients: how many basis maps a query may mix; the others count nothing.
        basis_threshold: basis entries up to it count nothing.
        coefficient_threshold: keep the coefficients above it instead of the largest.
    """

    def __init__(
        self,
        keys: int,
        heads: int,
        dim: int,
        *,
        n_factor: float = 6,
        c_factor: float = 2,
        coefficients: int = 8,
        basis_threshold: float = 0.02,
        coefficient_threshold: float | None = None,
    ) -> None:
        super().__init__()
        rank, width = max(int(keys // n_factor), 1), max(int(dim // c_factor), 1)
        self.keys, self.heads = keys, heads
        self.coefficients, self.basis_threshold = coefficients, basis_threshold
        self.coefficient_threshold = coefficient_threshold
        self.pool = nn.Parameter(torch.empty(keys, rank))  # proj_n of the authors
        self.maps = nn.Parameter(torch.empty(keys, rank))  # proj_back_n
        self.query_weight, self.query_bias = nn.Parameter(torch.empty(width, dim)), nn.Parameter(torch.zeros(width))
        self.key_weight, self.key_bias = nn.Parameter(torch.empty(width, dim)), nn.Parameter(torch.zeros(width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as attention between queries and neighbouring keys taken together (our choice; none is published)."""
        rank, (width, dim) = self.pool.shape[1], self.query_weight.shape
        places = torch.arange(self.keys, device=self.pool.device) * rank // self.keys
        member = F.one_hot(places, rank).to(self.pool)
        self.pool.copy_(member / member.sum(0))
        slope = torch.linspace(0, 0.01, self.keys, device=self.pool.device, dtype=self.pool.dtype)
        self.maps.copy_(member + 0.05 + slope[:, None])  # no zeros, which could not learn, and no equal keys
        self.set_directions(torch.eye(dim, device=self.pool.device, dtype=self.pool.dtype)[:width])

    @torch.no_grad()
    def set_directions(self, directions: Tensor) -> None:
        """Compare queries and keys along orthonormal directions (width, dim), as sharply as attention does."""
        dim = directions.shape[1]
        directions = directions * (self.heads / dim) ** 0.25  # the published scale is heads ** -0.5
        self.query_weight.copy_(directions)
        self.key_weight.copy_(directions)

    def mixture(self, q: Tensor, k: Tensor, alive: Tensor | None = None, dead: Tensor | None = None) -> Tensor:
        """Basis coefficients (B, heads, N, r), each row a softmax, of q (B, heads, N, d) and k (B, heads, M, d).

        Args:
            alive: (B, M), which of the m keys those of `k` are; all when None.
            dead: (B, m), true for keys that stand in their places but count nothing.
        """
        pool = self.pool if alive is None else self.pool[alive].unsqueeze(1)
        if dead is not None:
            pool = self.pool.masked_fill(dead[..., None], 0).unsqueeze(1)
        pooled = pool.mT @ k  # (B, heads, r, d)
        narrow = pooled @ self.key_weight.mT + pool.sum(-2).unsqueeze(-1) * self.key_bias
        logits = q @ (narrow @ self.query_weight).mT + (narrow @ self.query_bias).unsqueeze(-2)
        return (logits * self.heads**-0.5).softmax(-1)

    def few(self, mixture: Tensor) -> Tensor:
        """The coefficients that count; the rest become zero, and what stays is not scaled up."""
        if self.coefficient_threshold is not None:
            return mixture.masked_fill(mixture <= self.coefficient_threshold, 0)
        if self.coefficients >= mixture.shape[-1]:
            return mixture
        top = mixture.topk(self.coefficients, dim=-1)
        return torch.zeros_like(mixture).scatter(-1, top.indices, top.values)

    def basis(self, alive: Tensor | None = None) -> Tensor:
        """Basis maps, (r, m), or (B, 1, r, M) for the keys `alive` (B, M); entries up to the threshold are zero."""
        size = self.maps.abs()
        maps = size.masked_fill(size <= self.basis_threshold, 0)
        return maps.mT if alive is None else maps[alive].mT.unsqueeze(1)
