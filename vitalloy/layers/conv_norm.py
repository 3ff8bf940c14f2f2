"""A convolution, its batch norm and an activation: the brick of the convolutional halves."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vitalloy.layers.fusion import fold_norm


class ConvNorm(nn.Module):
    """act(norm(conv(x))); one convolution and the activation after `fuse()`.

    Args:
        in_chans, out_chans: channels in and out.
        kernel: side of the kernel.
        stride: of the convolution.
        padding: of the convolution; kernel // 2 when not given.
        groups: of the convolution; `in_chans` makes it depth-wise.
        bias: the convolution has a bias of its own, as in some published files.
        act: makes the activation; none when not given.
        eps: of the norm.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel: int = 1,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        bias: bool = False,
        act: Callable[[], nn.Module] = nn.Identity,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(in_chans, out_chans, kernel, stride, padding, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(out_chans, eps=eps)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_chans, H, W) -> (B, out_chans, H', W')."""
        return self.act(self.norm(self.conv(x)))

    def fuse(self) -> None:
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv, self.norm = fold_norm(self.conv, self.norm), nn.Identity()
