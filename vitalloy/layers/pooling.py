"""From a sequence of tokens to one vector an image."""

from __future__ import annotations

from torch import Tensor, nn


class GlobalPool(nn.Module):
    """`token` takes the first token, `avg` and `max` pool the others, `""` returns the sequence as it is.

    Args:
        kind: which of them.
        prefix: tokens at the front (class, distillation) that are no part of the image grid.
    """

    KINDS = ("token", "avg", "max", "")

    def __init__(self, kind: str, prefix: int = 0) -> None:
        super().__init__()
        if kind not in self.KINDS or (kind == "token" and not prefix):
            usable = [k for k in self.KINDS if k != "token" or prefix]
            raise ValueError(f"global_pool={kind!r} is not one of {usable}")
        self.kind, self.prefix = kind, prefix

    def forward(self, x: Tensor) -> Tensor:
        """(B, prefix + N, C) -> (B, C)."""
        if self.kind == "token":
            return x[:, 0]
        if self.kind == "avg":
            return x[:, self.prefix :].mean(1)
        if self.kind == "max":
            return x[:, self.prefix :].amax(1)
        return x

    def extra_repr(self) -> str:
        return f"{self.kind!r}, prefix={self.prefix}"
