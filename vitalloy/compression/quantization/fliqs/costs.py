"""What a choice of formats costs, counted from the model itself.

"bops": multiply-adds x weight bits x activation bits, in GBOPs (10^9), the paper's cost; multiply-adds are measured in
one pass of one image. "memory": weights x weight bits, in MiB (2^20 bytes). "code_compute": what the authors' open code
counts and calls GBOPs: weights (not multiply-adds) x the squared mean of both widths, in millions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitalloy.errors import CompressionError
from vitalloy.layers.attention import Attend

from .controller import named
from .formats import parse, parse_pair
from .layers import Layer

Count = float | Tensor


def gbops(macs: Count, weight_bits: Count, activation_bits: Count) -> Count:
    """Bit operations of `macs` multiply-adds, in 10^9."""
    return macs * weight_bits * activation_bits / 1e9


def mebibytes(weights: Count, weight_bits: Count) -> Count:
    """Storage of `weights` values, in 2^20 bytes."""
    return weights * weight_bits / 8 / 2**20


def code_compute(weights: Count, weight_bits: Count, activation_bits: Count) -> Count:
    """The compute cost of the authors' open code, in 10^6."""
    return weights * ((weight_bits + activation_bits) / 2) ** 2 / 1e6


@dataclass(frozen=True)
class Work:
    """Of one layer: number of weights, and multiply-adds for one image (0: it never runs)."""

    weights: int
    macs: int


COSTS: dict[str, tuple[str, Callable[[Work, int, int], float]]] = {
    "bops": ("GBOPs", lambda work, w, a: gbops(work.macs, w, a)),
    "memory": ("MiB", lambda work, w, a: mebibytes(work.weights, w)),
    "code_compute": ("million weight bit²", lambda work, w, a: code_compute(work.weights, w, a)),
}


@torch.no_grad()
def measure(model: nn.Module, layers: Mapping[str, Layer], image: Tensor) -> tuple[dict[str, Work], int]:
    """The work of every layer, and the multiply-adds of attention (q kᵀ and the map times v), for one image.

    Args:
        image: (1, C, H, W). The model is run once in eval mode and left as it was.
    """
    macs = dict.fromkeys(layers.values(), 0)
    attention = 0

    def weigh(layer: Layer, _args: Any, out: Tensor) -> None:
        macs[layer] += out.numel() * layer.weight[0].numel()

    def attend(_module: nn.Module, args: Any, kwargs: dict[str, Any], out: Tensor) -> None:
        nonlocal attention
        q, k = (args[i] if i < len(args) else kwargs[n] for i, n in enumerate("qk"))
        attention += (q.numel() + out.numel()) * k.shape[-2]

    hooks = [layer.register_forward_hook(weigh) for layer in macs]
    hooks += [m.register_forward_hook(attend, with_kwargs=True) for m in model.modules() if isinstance(m, Attend)]
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        model(image)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return {name: Work(layer.weight.numel(), macs[layer]) for name, layer in layers.items()}, attention


@dataclass
class CostTable:
    """The cost of every option of every decision.

    Attributes:
        unit: "GBOPs", "MiB" or the unit of the open code.
        table: (decisions, options), float64.
        fixed: the cost of what has no choice.
        one_bit: the cost if every layer had formats of one bit; b bits cost that times b^2 (memory: times b).
        quadratic: whether the cost grows with the square of the width.
    """

    unit: str
    table: Tensor
    fixed: float = 0.0
    one_bit: float = 0.0
    quadratic: bool = True

    @classmethod
    def of(
        cls,
        work: Mapping[str, Work],
        groups: Mapping[str, Sequence[str]],
        options: Sequence[str],
        cost: str = "bops",
        attention_macs: int = 0,
        attention: str | None = None,
    ) -> CostTable:
        """The table for groups of layers; `attention` names the format in which attention's products are counted."""
        unit, each = COSTS[named(cost, "cost", COSTS)]
        bits = [tuple(f.bits for f in parse_pair(option)) for option in options]
        rows = [[sum(each(work[n], *pair) for n in names) for pair in bits] for names in groups.values()]
        fixed = 0.0
        if attention is not None and cost == "bops":
            fixed = gbops(attention_macs, parse(attention).bits, parse(attention).bits)
        one_bit = sum(each(work[n], 1, 1) for names in groups.values() for n in names)
        return cls(unit, torch.tensor(rows, dtype=torch.float64), fixed, one_bit, cost != "memory")

    def cost(self, choice: Tensor) -> float:
        """The cost of an option (decisions,) a decision."""
        return float(self.table.gather(1, choice.unsqueeze(1)).sum()) + self.fixed

    def uniform(self, bits: float) -> float:
        """The cost if every layer had formats of `bits` bits, a fraction allowed."""
        return self.one_bit * bits ** (2 if self.quadratic else 1) + self.fixed

    def average_bits(self, cost: float) -> float:
        """The inverse of `uniform`."""
        return max((cost - self.fixed) / self.one_bit, 0.0) ** (1 / 2 if self.quadratic else 1)

    @property
    def reach(self) -> tuple[float, float]:
        """The cheapest and the dearest choice."""
        low, high = self.table.amin(1).sum(), self.table.amax(1).sum()
        return float(low) + self.fixed, float(high) + self.fixed

    def target(self, wanted: float | None) -> float:
        """`wanted`, if some choice can be as cheap or dear; None: the geometric mean of the ends.

        Raises:
            CompressionError: out of reach, as a target in another unit would be.
        """
        low, high = self.reach
        if wanted is None:
            return (low * high) ** 0.5
        if not low * (1 - 1e-9) <= wanted <= high * (1 + 1e-9):
            raise CompressionError(
                f"The target cost of {wanted:g} {self.unit} cannot be reached: these formats cost this model from "
                f"{low:.4g} to {high:.4g} {self.unit}, which is {self.average_bits(low):.3g} to "
                f"{self.average_bits(high):.3g} bits on average."
            )
        return float(wanted)
