"""Searching the grids of one layer: scales and zero points whose output is nearest to the float one.

Every product is treated as rows x (I, K) times rows w (J, K): a linear layer, a convolution on its patches, q kᵀ and
the attention map times v. Quantizing x moves the output by e wᵀ + d, where e is the error of x and d what w's own error
already did; `output_error` sums its square by the cheaper of two ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CANDIDATES = 128
ELEMENTS = 2**22  # values that a chunk of candidates may hold at once
LEAST_SCALE = 1e-4  # of activations
TINY = 1e-12  # a step for values that are all the same


class Grids(NamedTuple):
    """Scales and zero points of one shape: candidates along the first axis, or those chosen."""

    scale: Tensor
    zero_point: Tensor

    def snap(self, x: Tensor, bits: int) -> Tensor:
        """x on the grids, which broadcast against it."""
        zero_point = self.zero_point.round()
        codes = ((x / self.scale).round_().add_(zero_point)).clamp_(0, 2**bits - 1)
        return codes.sub_(zero_point).mul_(self.scale)

    def pick(self, index: Tensor) -> Grids:
        """The candidate `index` of each grid."""
        return Grids(*(values.gather(0, index[None])[0] for values in self))

    def at(self, index: slice | tuple) -> Grids:
        """Both tensors indexed alike."""
        return Grids(self.scale[index], self.zero_point[index])


def quantiles(x: Tensor, shares: Tensor | list[float]) -> Tensor:
    """Linearly interpolated quantiles along the last axis, of any number of values: (shares, ...)."""
    ordered = x.sort(-1).values
    place = torch.as_tensor(shares, dtype=torch.float64, device=x.device) * (x.shape[-1] - 1)
    below = place.floor().long()
    low, high = ordered[..., below], ordered[..., place.ceil().long()]
    return torch.lerp(low, high, (place - below).to(x.dtype)).movedim(-1, 0)


def spread_candidates(x: Tensor, bits: int, count: int = CANDIDATES) -> Grids:
    """Grids (count, rows) for each row of x (rows, values): some widths, each with up to 16 central zero points.

    The widths run from the distance between the first and last decile to the whole range.
    """
    half = 2 ** (bits - 1)
    shifts = min(16, 2 * half)
    widths = int(count / shifts)
    low, high = quantiles(x, [0.1, 0.9])
    narrow, wide = high - low, x.amax(-1) - x.amin(-1)
    share = torch.linspace(0, 1, widths, dtype=x.dtype, device=x.device)[:, None]
    scale = (narrow + share * (wide - narrow)) / (2 * half - 1)
    zero_point = torch.arange(half - shifts // 2, half + shifts // 2, dtype=x.dtype, device=x.device)
    zero_point = zero_point.repeat_interleave(widths)[:, None].expand(-1, len(x))
    return Grids(scale.clamp_min(TINY).repeat(shifts, 1), zero_point)


def activation_candidates(x: Tensor, bits: int, count: int = CANDIDATES) -> Grids:
    """`spread_candidates` with scales of at least 1e-4 and, as published, the last one twice."""
    grids = spread_candidates(x, bits, count)
    return Grids(*(torch.cat([v, v[-1:]]) for v in (grids.scale.clamp_min(LEAST_SCALE), grids.zero_point)))


class Ranges:
    """Candidate ranges [lower, upper] of some rows, and the two ends chosen for each so far.

    Args:
        lower, upper: ends (candidates, rows), the narrowest range first.
        start: number of the candidate to begin with.
    """

    def __init__(self, lower: Tensor, upper: Tensor, bits: int, start: int = -1) -> None:
        self.lower, self.upper, self.bits = lower, upper, bits
        self.low, self.high = lower[start], upper[start]

    def grids(self, vary: str) -> Grids:
        """The candidates when "both" ends vary, or the "lower" or the "upper" one alone; "none": what is chosen."""
        low = self.lower if vary in ("both", "lower") else self.low
        high = self.upper if vary in ("both", "upper") else self.high
        scale = ((high - low) / (2**self.bits - 1)).clamp_min(TINY)
        return Grids(scale, -(low / scale).round())

    def choose(self, vary: str, index: Tensor) -> None:
        if vary in ("both", "lower"):
            self.low = self.lower.gather(0, index[None])[0]
        if vary in ("both", "upper"):
            self.high = self.upper.gather(0, index[None])[0]


def percentile_ranges(x: Tensor, bits: int, count: int = CANDIDATES) -> Ranges:
    """What convolutions try for each row of x (rows, values): symmetric percentiles from 99 % to 99.99 %, and all."""
    steps = torch.arange(count, dtype=torch.float64, device=x.device) / (count - 1)
    shares = torch.cat([0.99 + 0.0099 * steps.sqrt(), steps.new_ones(1)])
    return Ranges(quantiles(x, 1 - shares), quantiles(x, shares), bits)


def tail_ranges(x: Tensor, bits: int, count: int = CANDIDATES) -> Ranges:
    """What products of activations try for each row of x: both ends move from the last percent to nearly all.

    One more range is made than is tried, and the last one tried is the start, as published.
    """
    outer_low, inner_low, inner_high, outer_high = quantiles(x, [0.00001, 0.01, 0.99, 0.99999])
    share = torch.linspace(0, 1, count + 1, dtype=x.dtype, device=x.device)[:count, None]
    return Ranges(outer_low + share * (inner_low - outer_low), inner_high + share * (outer_high - inner_high), bits)


def output_error(e: Tensor, w: Tensor, d: Tensor) -> Tensor:
    """sum over J of (e wᵀ + d)²: e (n, ..., I, K), w (..., J, K), d (..., I, J) -> (n, ..., I)."""
    if w.shape[-1] >= w.shape[-2]:
        return (e @ w.mT).add_(d).square_().sum(-1)
    crossed = ((e @ (w.mT @ w)).add_(2 * (d @ w))).mul_(e)  # through the K x K products, never making the output
    return crossed.sum(-1) + d.square().sum(-1)


def least(error: Callable[[Grids], Tensor], grids: Grids, size: int) -> Tensor:
    """The first candidate of least error for each row.

    Args:
        error: candidates (n, rows) -> their errors (n, rows).
        size: values that one candidate makes.
    """
    chunk = max(ELEMENTS // size, 1)
    errors = [error(grids.at(slice(i, i + chunk))) for i in range(0, len(grids.scale), chunk)]
    return torch.cat(errors).argmin(0)


class Side:
    """One factor of a product whose grid is searched: x (..., I, K), with one grid for each of its groups.

    Args:
        groups: "row": one for each (..., I); "head": one for each index of the third last axis, shared by what is
            before it; "all": one.
    """

    def __init__(self, x: Tensor, bits: int, groups: str) -> None:
        self.x, self.bits, self.groups = x, bits, groups
        self.snapped = x

    def rows(self) -> Tensor:
        """x as (grids, values)."""
        if self.groups == "row":
            return self.x.flatten(0, -2)
        return self.x.movedim(-3, 0).flatten(1) if self.groups == "head" else self.x.flatten()[None]

    def shaped(self, grids: Grids) -> Grids:
        """Grids (n, groups), or (groups,), that broadcast against x."""
        size = {"row": (*self.x.shape[:-1], 1), "head": (*self.x.shape[-3:-2], 1, 1), "all": ()}[self.groups]
        size = (1,) * (self.x.ndim - len(size)) + size
        return Grids(*(values.unflatten(-1, size) for values in grids))

    def summed(self, errors: Tensor) -> Tensor:
        """Errors (n, ..., I) as (n, grids)."""
        if self.groups == "row":
            return errors.flatten(1)
        return errors.movedim(-2, 1).flatten(2).sum(-1) if self.groups == "head" else errors.flatten(1).sum(-1)[:, None]

    def snap(self, grids: Grids) -> None:
        """Take the grids (groups,)."""
        self.snapped = self.shaped(grids).snap(self.x, self.bits)

    def own_error(self, grids: Grids) -> Tensor:
        """How far the grids (n, groups) move x itself."""
        return self.summed((self.shaped(grids).snap(self.x, self.bits) - self.x).square_().sum(-1))

    def best(self, grids: Grids, other: Side | None = None) -> Tensor:
        """The best of the grids (n, groups): by the product with `other` as it is snapped now, or by x itself."""
        if other is None:
            return least(self.own_error, grids, self.x.numel())
        w = other.snapped
        d = self.x @ (w - other.x).mT

        def error(some: Grids) -> Tensor:
            return self.summed(output_error(self.shaped(some).snap(self.x, self.bits).sub_(self.x), w, d))

        return least(error, grids, max(self.x.numel(), d.numel()))

    def search_range(self, ranges: Ranges, vary: str, other: Side) -> None:
        """Choose the ends that vary, and snap."""
        ranges.choose(vary, self.best(ranges.grids(vary), other))
        self.snap(ranges.grids("none"))


def search_linear(
    x: Tensor, weight: Tensor, weight_bits: int, activation_bits: int, rounds: int = 3, count: int = CANDIDATES
) -> tuple[Grids, Grids]:
    """Grids of a linear layer: weight (O,), one for each output channel, and input (1,).

    First each by its own error, then in turns by the output's, until nothing changes or `rounds` are over.

    Args:
        x: input rows (R, K); several groups (G, R, K).
        weight: (O, K), or (G, O / G, K).
    """
    rows, inputs = Side(weight, weight_bits, "row"), Side(x, activation_bits, "all")
    tried = spread_candidates(rows.rows(), weight_bits, count), activation_candidates(inputs.rows(), activation_bits)
    chosen = rows.best(tried[0]), inputs.best(tried[1])
    for _ in range(rounds):
        before = chosen
        inputs.snap(tried[1].pick(chosen[1]))
        rows.snap(tried[0].pick(of_rows := rows.best(tried[0], inputs)))
        chosen = of_rows, inputs.best(tried[1], rows)
        if all(map(torch.equal, before, chosen)):
            break
    return tried[0].pick(chosen[0]), tried[1].pick(chosen[1])


def search_ranges(
    x: Tensor,
    weight: Tensor,
    weight_bits: int,
    activation_bits: int | None,
    count: int = CANDIDATES,
) -> tuple[Grids, Grids | None]:
    """Grids of a convolution on its patches: both ends of the range together, then the lower, then the upper one.

    Args:
        x: patches (R, K), or (G, R, K); `weight` (O, K), or (G, O / G, K).
        activation_bits: None leaves the input in float.
    """
    rows, inputs = Side(weight, weight_bits, "row"), Side(x, activation_bits or 0, "all")
    ranges = percentile_ranges(rows.rows(), weight_bits, count)
    for vary in ("both", "lower", "upper"):
        rows.search_range(ranges, vary, inputs)
    if activation_bits is None:
        return ranges.grids("none"), None
    seen = percentile_ranges(inputs.rows(), activation_bits, count)
    for vary in ("both", "lower", "upper"):
        inputs.search_range(seen, vary, rows)
    return ranges.grids("none"), seen.grids("none")


def search_product(
    a: Tensor, b: Tensor, bits: int | tuple[int, int], rounds: int = 3, count: int = CANDIDATES
) -> tuple[Grids, Grids]:
    """Grids (heads,) of the two factors of a bᵀ: a (B, heads, N, K), b (B, heads, M, K)."""
    bits = (bits, bits) if isinstance(bits, int) else bits
    sides = [Side(x, width, "head") for x, width in zip((a, b), bits, strict=True)]
    ranges = [tail_ranges(side.rows(), side.bits, count) for side in sides]
    for side, tried in zip(sides, ranges, strict=True):
        side.snap(tried.grids("none"))
    for varies in [("both",)] + [("lower", "upper")] * rounds:
        before = [end for tried in ranges for end in (tried.low, tried.high)]
        for i in (0, 1):
            for vary in varies:
                sides[i].search_range(ranges[i], vary, sides[1 - i])
        after = [end for tried in ranges for end in (tried.low, tried.high)]
        if varies != ("both",) and all(map(torch.equal, before, after)):
            break
    return ranges[0].grids("none"), ranges[1].grids("none")


def search_channels(x: Tensor, bits: int, count: int = CANDIDATES) -> Grids:
    """A grid for each channel of x (rows, channels), by its own error: what is folded into the norm before."""
    side = Side(x.mT.contiguous(), bits, "row")
    tried = activation_candidates(side.rows(), bits, count)
    return tried.pick(side.best(tried))
