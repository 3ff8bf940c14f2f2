"""Where exits go in a model, and what each costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitalloy.compression.tokens.lgvit.heads import ExitHead
from vitalloy.compression.trunk import Point, evaluating, hooked, macs, points
from vitalloy.errors import CompressionError

MOST = 8  # exits, as published
FIRST, LAST, APART = 0.15, 0.95, 0.08  # shares of the multiply-accumulates: where "auto" puts exits


@torch.no_grad()
def exit_points(model: nn.Module, image: Tensor) -> tuple[list[Point], Point]:
    """The points of a model behind which images can leave, and the one whose tokens leave its last layer.

    Of points with nothing to compute between them the last counts, as it is the one behind a norm; of those at the end
    the first, before the final norm.

    Args:
        image: (1, C, H, W); its values do not matter.

    Raises:
        CompressionError: there are none.
    """
    found = points(model, image)
    end = max((point.macs for point in found), default=0)
    last = next((point for point in found if point.macs >= end), None)
    inside = [point for point in found if point.macs < end]
    following = [point.macs for point in inside[1:]] + [end]
    inside = [point for point, next_macs in zip(inside, following, strict=False) if next_macs - point.macs >= 1e-6]
    inside = [point for point in inside if _can_shrink(model, point, image)]
    if not inside or last is None:
        raise CompressionError(
            f"{type(model).__name__} has no block behind which images could leave: nowhere between two of its modules "
            "is the whole state one tensor."
        )
    return inside, last


def chosen(candidates: Sequence[Point], exits: str | Sequence[int | str]) -> list[Point]:
    """The points for exits: "auto", or numbers or names of candidates.

    Raises:
        CompressionError: one that does not exist, none, or "auto" finds none.
    """
    if exits != "auto":
        names = [point.name for point in candidates]
        known = ", ".join(f"{i} {name}" for i, name in enumerate(names))
        try:
            numbers = {names.index(e) if isinstance(e, str) else range(len(names))[e] for e in exits}
        except (ValueError, IndexError, TypeError) as error:
            raise CompressionError(f"exits={exits!r} are not all places for exits; these are: {known}.") from error
        if not numbers:
            raise CompressionError(f"exits={exits!r} names no place for an exit; these are: {known}.")
        return [candidates[i] for i in sorted(numbers)]
    taken: list[Point] = []
    for point in candidates:  # of two near ones the first counts: a stage's end before the embedding behind it
        if FIRST <= point.macs <= LAST and (not taken or point.macs - taken[-1].macs >= APART):
            taken.append(point)
    taken = taken or [min(candidates, key=lambda point: abs(point.macs - 0.5))]
    step = max(len(taken) / MOST, 1)
    return [taken[int(i * step)] for i in range(min(len(taken), MOST))]


@torch.no_grad()
def head_macs(model: nn.Module, places: Sequence[Point], heads: Sequence[ExitHead], image: Tensor) -> list[float]:
    """Multiply-accumulates of each head, as shares of those of the plain model."""
    states: dict[str, object] = {}
    whole = macs(model, image)
    with evaluating(model), hooked(model, {p.name: lambda out, n=p.name: states.__setitem__(n, out) for p in places}):
        model(image)
    shares = []
    for point, head in zip(places, heads, strict=True):
        with evaluating(head), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            head.logits(point.read(states[point.name]))
        shares.append(counter.get_total_flops() / 2 / whole)
    return shares


def _can_shrink(model: nn.Module, point: Point, image: Tensor) -> bool:
    """Whether a pass of two images goes on with the second alone, to that image's own logits."""
    generator = torch.Generator().manual_seed(0)
    pair = torch.randn(2, *image.shape[1:], generator=generator).to(image)
    with evaluating(model):
        wanted = model(pair[1:])
        try:
            with hooked(model, {point.name: lambda out: point.images(out, torch.tensor([1], device=image.device))}):
                got = model(pair)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
            return False
    return got.shape == wanted.shape and torch.allclose(got, wanted, rtol=1e-3, atol=1e-4)
