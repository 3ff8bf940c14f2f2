"""Ranges read from values: which grid represents what a layer saw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from vitalloy.compression.calibration import Seen, record
from vitalloy.compression.quantizers import TINY, LogSqrt2, Uniform, asymmetric

PERCENTILES = (0.999, 0.9999, 0.99999)
FACTORS = 4  # channels take steps of 1, 2, 4 or 8 times the least
HELD = 2**28  # values of layers that are held at a time, a gigabyte


def in_groups(
    model: nn.Module, layers: Iterable[nn.Module], images: Tensor, loss: Callable[[Tensor], Tensor] | None = None
) -> Iterator[tuple[nn.Module, Seen]]:
    """What `record` returns, layer after layer, with as many layers in a pass as memory bears.

    Layers that a pass never calls are left out. The model must answer all passes alike: change it afterwards.
    """
    sizes = {
        layer: len(images) * (sum(x.numel() for x in seen.inputs) + (1 if loss is None else 2) * seen.output.numel())
        for layer, seen in record(model, layers, images[:1]).items()
    }
    group, held = [], 0
    for layer, size in sizes.items():
        if group and held + size > HELD:
            yield from record(model, group, images, loss=loss).items()
            group, held = [], 0
        group.append(layer)
        held += size
    yield from record(model, group, images, loss=loss).items()


def quantiles(x: Tensor, at: Sequence[float]) -> Tensor:
    """Quantiles along the last axis, interpolated linearly, of any number of values: (..., n) -> (len(at), ...)."""
    ordered = torch.from_numpy(np.sort(x.detach().cpu().numpy(), axis=-1)).to(x.device)
    places = torch.tensor(at, dtype=torch.float64, device=x.device) * (x.shape[-1] - 1)
    below = places.long()
    low, high = ordered[..., below], ordered[..., (below + 1).clamp_max(x.shape[-1] - 1)]
    return torch.lerp(low, high, (places - below).to(x.dtype)).movedim(-1, 0)


def percentile_grid(x: Tensor, bits: int, channel: int | None = None) -> Uniform:
    """The unsigned grid of least squared error among those between pairs of percentiles.

    A range without width is stretched to contain 0; the zero point is not bounded.

    Args:
        channel: the axis that keeps a range for each of its entries; one range for all when None.
    """
    rows = x.reshape(1, -1) if channel is None else x.movedim(channel, 0).flatten(1)  # (channels, n)
    ends = quantiles(rows, [*PERCENTILES, *(1 - p for p in PERCENTILES)])
    best = None
    for high, low in zip(*ends.chunk(2), strict=True):
        flat = high - low < TINY
        low, high = torch.where(flat, low.clamp_max(0), low), torch.where(flat, high.clamp_min(0), high)
        step = ((high - low) / (2**bits - 1)).clamp_min(TINY)[:, None]
        grid = Uniform(bits, step, (-low[:, None] / step).round())
        error = (grid(rows) - rows).square().mean(1, keepdim=True)
        if best is None:
            best = error, grid.scale, grid.zero_point
        else:
            found = zip((error, grid.scale, grid.zero_point), best, strict=True)
            better = error < best[0]
            best = tuple(torch.where(better, new, old) for new, old in found)
    shape = [1] * x.ndim if channel is not None else []
    if channel is not None:
        shape[channel] = -1
    return Uniform(bits, best[1].view(shape), best[2].view(shape))


def percentile_log_sqrt2(x: Tensor, bits: int) -> LogSqrt2:
    """The log-sqrt-2 grid of least squared error among those that begin at a percentile."""
    grids = [LogSqrt2(bits, top.clamp_min(TINY)) for top in quantiles(x.flatten(), PERCENTILES)]
    return min(grids, key=lambda grid: (grid(x) - x).square().mean().item())


def range_grid(x: Tensor, bits: int, as_published: bool = False) -> Uniform:
    """The unsigned grid over all values, stretched to contain 0.

    Args:
        as_published: neither stretch the range nor let the zero point leave the codes, which clips a range that
            leaves 0 out.
    """
    return _between(*x.aminmax(), bits, as_published)


def _between(low: Tensor, high: Tensor, bits: int, as_published: bool) -> Uniform:
    if not as_published:
        return asymmetric(low, high, bits)
    step = ((high - low) / (2**bits - 1)).clamp_min(TINY)
    return Uniform(bits, step, -(low / step).round().clamp(1 - 2**bits, 0))


def power_of_two_grid(x: Tensor, bits: int, as_published: bool = False) -> Uniform:
    """Steps s, 2s, 4s or 8s for the channels on the last axis, each with the least squared error; one zero point.

    8s is the step over the whole range. `as_published` is that of `range_grid`.
    """
    rows = x.reshape(-1, x.shape[-1])
    whole = _between(*rows.aminmax(), bits, as_published)
    steps = torch.stack([whole.scale / 2**k for k in reversed(range(FACTORS))])
    errors = torch.stack([(Uniform(bits, s, whole.zero_point)(rows) - rows).square().mean(0) for s in steps])
    return Uniform(bits, steps[errors.argmin(0)], whole.zero_point)
