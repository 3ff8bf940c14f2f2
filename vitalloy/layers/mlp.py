"""The two-layer perceptron of a transformer block."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vitalloy.layers.streaming import may_stream, stream_mlp


class Mlp(nn.Module):
    """Linear, activation, linear; a piece of the tokens at a time where that is possible and pays.

    Args:
        dim: channels in and out.
        hidden: channels between.
        act: makes the activation; exact GELU unless a paper says otherwise.
    """

    def __init__(self, dim: int, hidden: int, act: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> the same shape."""
        parts = (self.fc1, self.act, self.fc2)
        # a ReLU works in place, so that there is no second wide map to avoid
        if not isinstance(self.act, nn.ReLU) and may_stream(x, *parts):
            return stream_mlp(x, *parts)
        return self.fc2(self.act(self.fc1(x)))
