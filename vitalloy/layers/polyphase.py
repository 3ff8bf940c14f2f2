"""Polyphase anchoring: parts that give a transformer the same answer however its input is circularly shifted.

"Reviving Shift Equivariance in Vision Transformers", Ding et al., 2023, arXiv 2306.07470. Patches, windows and
sub-sampled keys are cut along a fixed grid, so a shift by one pixel changes every one of them. An anchor in front of
such an operation rolls the map until its strongest polyphase component (every s-th row and column, for stride s) lies
on that grid: a shifted map is rolled to the same cut. Positions come from a depth-wise convolution on a torus.

What is guaranteed: with anchors before everything that cuts a grid, what is computed from a circularly shifted input
is the same up to a roll by whole cells, and what is pooled from it is the same. What is not: sides that the stride
does not divide (such a map has no phases and is left as it is), ties between components (a constant image), numbers so
coarse that rounding decides between two components (half precision), and real translations, where new content enters
at the border. Maps come out rolled: their origin is the strongest phase, no longer the corner of the image.

Departure: components whose norms agree to within rounding are told apart, see `strongest_phase`; elsewhere the choice
is the published one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.layers.patch_embed import PatchEmbed
from vitalloy.layers.tokens import to_map, to_tokens
from vitalloy.layers.windows import Cut, Windows

Pair = tuple[int, int]
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}  # relative, of a component's norm
COARSE = 2e-3  # the same in half or mixed precision


def phase_norms(x: Tensor, stride: Pair) -> Tensor:
    """L2 norms of the polyphase components of maps (B, C, H, W), (B, stride[0] * stride[1]), row-major.

    Component (i, j) holds the rows i, i + stride[0], ... and the columns j, j + stride[1], ...; the stride divides the
    map. Half precision is summed in float32. No gradient passes.
    """
    return _by_phase(_squares(x).sum(1), stride).sqrt()


def strongest_phase(x: Tensor, stride: Pair) -> Tensor:
    """The component of largest norm, (B,): row-major, the first of equals.

    Tokens that leave a fresh layer norm all have the same norm, so that rounding would choose. Components that agree
    to within rounding are told apart by the norm of the first half of their channels.
    """
    squares = _squares(x)
    cells = torch.stack([squares.sum(1), squares[:, : (x.shape[1] + 1) // 2].sum(1)], 1)
    norms, half = _by_phase(cells, stride).sqrt().unbind(1)
    mixed = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    coarse = mixed or x.dtype not in ROUNDING
    near = norms >= (1 - (COARSE if coarse else ROUNDING[x.dtype])) * norms.amax(1, keepdim=True)
    return half.masked_fill(~near, -1).argmax(1)


def _squares(x: Tensor) -> Tensor:
    x = x.detach()
    return (x if x.dtype == torch.float64 else x.float()).square()


def _by_phase(cells: Tensor, stride: Pair) -> Tensor:
    """(..., H, W) -> (..., phases), summed."""
    return cells.unflatten(-1, (-1, stride[1])).unflatten(-3, (-1, stride[0])).sum((-4, -2)).flatten(-2)


def polyphase_anchor(x: Tensor, stride: int | Pair) -> Tensor:
    """Roll each map of (B, C, H, W) so that its strongest polyphase component starts at the corner.

    The gradient is rolled back; the choice (`strongest_phase`) has none.

    Raises:
        ValueError: the stride does not divide the map.
    """
    stride = (stride, stride) if isinstance(stride, int) else stride
    height, width = x.shape[-2:]
    if height % stride[0] or width % stride[1]:
        raise ValueError(f"a {height}x{width} map has no phases of stride {stride[0]}x{stride[1]}")
    strongest = strongest_phase(x, stride)
    down, right = strongest // stride[1], strongest % stride[1]
    rows = (torch.arange(height, device=x.device) + down[:, None]) % height  # (B, H)
    columns = (torch.arange(width, device=x.device) + right[:, None]) % width
    cells = height * width
    first = cells * torch.arange(x.shape[0], device=x.device)
    source = (first[:, None] + width * rows)[:, :, None] + columns[:, None]  # (B, H, W)
    tokens = to_tokens(x).flatten(0, 1).index_select(0, source.flatten())  # one pass, a whole token at a time
    return to_map(tokens.unflatten(0, (-1, cells)), (height, width))


class PolyphaseAnchor(nn.Module):
    """`polyphase_anchor` for the operation behind it; maps that cannot be anchored pass as they are.

    Args:
        stride: of that operation: its patch or window, (height, width) or a side. A map shorter than that is one cell.
        cells: instead of a stride, how many cells a side is averaged to.
    """

    def __init__(self, stride: int | Pair = 1, cells: int | None = None) -> None:
        super().__init__()
        self.stride, self.cells = (stride, stride) if isinstance(stride, int) else tuple(stride), cells

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape, channels last in memory."""
        stride = self.stride_on((x.shape[-2], x.shape[-1]))
        return x if stride in (None, (1, 1)) else polyphase_anchor(x, stride)

    def stride_on(self, grid: Pair) -> Pair | None:
        """The stride on a map of this size; None where it does not divide the map, so that nothing is guaranteed."""
        if self.cells is not None:
            stride = tuple(max(side // self.cells, 1) for side in grid)
            fits = all(side in (1, self.cells * s) for side, s in zip(grid, stride, strict=True))
        else:
            stride = tuple(min(s, side) for s, side in zip(self.stride, grid, strict=True))
            fits = not any(side % s for side, s in zip(grid, stride, strict=True))
        return stride if fits else None

    def extra_repr(self) -> str:
        return f"stride={self.stride}" if self.cells is None else f"cells={self.cells}"


def anchor_input(module: nn.Module, anchor: PolyphaseAnchor, channels_last: bool = False) -> None:
    """Put an anchor, as `module.anchor`, in front of a module; its parameters keep their names.

    The module takes a map (B, C, H, W), or tokens (B, N, C) and their grid, or with `channels_last` a map
    (B, H, W, C); what else it takes passes through.
    """
    module.anchor = anchor
    module.register_forward_pre_hook(_roll_channels_last if channels_last else _roll)


def _roll(module: nn.Module, args: tuple) -> tuple:
    x = args[0]
    if x.ndim == 4:
        return (module.anchor(x), *args[1:])
    return (to_tokens(module.anchor(to_map(x, args[1]))), *args[1:])


def _roll_channels_last(module: nn.Module, args: tuple) -> tuple:
    return (module.anchor(args[0].movedim(-1, 1)).movedim(1, -1), *args[1:])


class CircularConv2d(nn.Conv2d):
    """A convolution that wraps the map around where another pads it with zeros."""

    @classmethod
    def of(cls, conv: nn.Conv2d) -> CircularConv2d:
        """The circular form of a convolution; it keeps that one's parameters."""
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        new = cls(*shape, conv.groups, bias=conv.bias is not None, device="meta")
        new.weight, new.bias = conv.weight, conv.bias
        return new.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        for dim, pad in zip((2, 3), self.padding, strict=True):
            x = _wrap(x, dim, pad)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def _wrap(x: Tensor, dim: int, pad: int) -> Tensor:
    side = x.shape[dim]
    if pad > side:  # around more than once
        return x.index_select(dim, torch.arange(-pad, side + pad, device=x.device) % side)
    # unlike F.pad, this leaves channels last
    return torch.cat([x.narrow(dim, side - pad, pad), x, x.narrow(dim, 0, pad)], dim) if pad else x


class PositionConv(nn.Module):
    """Positions from a depth-wise 3x3 convolution beside the identity (conditional position encoding).

    The border of a zero-padded map tells where a token is; with `circular`, only its neighbours do.
    """

    def __init__(self, dim: int, circular: bool = False) -> None:
        super().__init__()
        conv = CircularConv2d if circular else nn.Conv2d
        self.proj = conv(dim, dim, 3, padding=1, groups=dim)
        self.residual = True

    def forward(self, x: Tensor, grid: Pair) -> Tensor:
        """x (B, N, C) on a grid of N cells -> the same shape."""
        y = to_tokens(self.proj(to_map(x, grid)))
        return y + x if self.residual else y

    def make_circular(self) -> None:
        """Wrap around instead of padding with zeros; the weights stay."""
        self.proj = CircularConv2d.of(self.proj)

    @torch.no_grad()
    def start_empty(self) -> PositionConv:
        """Zero weights: at first every token passes as it is."""
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        return self

    @torch.no_grad()
    def fuse(self) -> None:
        """The identity joins the middle of the kernel."""
        if self.residual:
            weight = self.proj.weight.clone()
            weight[:, 0, 1, 1] += 1
            self.proj.weight = nn.Parameter(weight, requires_grad=self.proj.weight.requires_grad)
            self.residual = False


class AnchoredPatchEmbed(PatchEmbed):
    """Cuts an image into the patches of its strongest phase, projects and normalises each."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__(patch_size, in_chans, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)  # eps 1e-5, where the blocks have 1e-6
        anchor_input(self, PolyphaseAnchor(patch_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Pair]:
        x, grid = super().forward(x)
        return self.norm(x), grid


class TorusWindows(nn.Module):
    """Shifted windows on a torus: tokens that a shift brings together from two borders are neighbours, not masked."""

    def __init__(self, windows: Windows) -> None:
        super().__init__()
        self.windows = windows

    def forward(self, like: Tensor) -> Cut:
        return self.windows(like)._replace(mask=None)
