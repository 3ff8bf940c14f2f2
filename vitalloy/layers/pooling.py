"""From a sequence of tokens to one vector an image.

GGeM: "Group Generalized Mean Pooling for Vision Transformer", Ko et al., 2022, arXiv 2212.04114; the generalized mean
is that of Radenovic et al., arXiv 1711.02512. There is no public code by the authors of GGeM and only its abstract
was read. Our inferences: tokens are clamped from below at 1e-6, groups are contiguous channels and as many as heads,
exponents start at 3, class tokens take no part, and the final norm comes before the pooling where a backbone norms
its tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GlobalPool(nn.Module):
    """`token` takes the first token, `avg`, `max`, `gem`, `ggem` pool the others, `""` returns the sequence as it is.

    Args:
        kind: which of them; `gem` learns one exponent, `ggem` one a group of channels.
        prefix: tokens at the front (class, distillation) that are no part of the image grid.
        groups: of channels, for `ggem`.
    """

    KINDS = ("token", "avg", "max", "gem", "ggem", "")

    def __init__(self, kind: str, prefix: int = 0, groups: int = 1) -> None:
        super().__init__()
        if kind not in self.KINDS or (kind == "token" and not prefix):
            usable = [k for k in self.KINDS if k != "token" or prefix]
            raise ValueError(f"global_pool={kind!r} is not one of {usable}")
        self.kind, self.prefix = kind, prefix
        self.mean = GeneralizedMean(groups if kind == "ggem" else 1) if kind in ("gem", "ggem") else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, prefix + N, C) -> (B, C)."""
        if self.kind == "token":
            return x[:, 0]
        if self.kind == "avg":
            return x[:, self.prefix :].mean(1)
        if self.kind == "max":
            return x[:, self.prefix :].amax(1)
        if self.mean is not None:
            return self.mean(x[:, self.prefix :])
        return x

    def extra_repr(self) -> str:
        return f"{self.kind!r}, prefix={self.prefix}"


class GeneralizedMean(nn.Module):
    """(mean over tokens of max(x, eps) ** p) ** (1 / p), with a learned exponent p for each group of channels.

    p = 1 is the mean of the clamped tokens, a large p their maximum. Half precision is pooled in float32.

    Args:
        groups: number of exponents, a divisor of the channels; contiguous channels share one.
        p: where the exponents start.
        eps: tokens are clamped at it from below, and so are the exponents on use.
    """

    def __init__(self, groups: int = 1, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.full((groups,), p))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, C)."""
        p = self.p.clamp(min=self.eps).unsqueeze(-1)  # (groups, 1)
        wide = x if x.dtype == torch.float64 else x.float()
        z = wide.clamp(min=self.eps).unflatten(-1, (len(p), -1))  # (B, N, groups, C / groups)
        top = z.detach().amax(1, keepdim=True)  # powers of z / top cannot overflow
        mean = (z / top).pow(p.to(z.dtype)).mean(1).pow(1 / p.to(z.dtype))
        return (top.squeeze(1) * mean).flatten(1).to(x.dtype)
