"""Learning whether each weight rounds up or down, and dropping the quantization of some activations meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.compression.quantizers import Uniform

LOW, HIGH = -0.1, 1.1  # the sigmoid is stretched to these and cut to [0, 1], so that it reaches both ends


class AdaRound(nn.Module):
    """A weight on its grid, each value between the code below and the one above by a learnt share.

    Takes the place of a weight quantizer during reconstruction (Nagel et al., "Up or Down? Adaptive Rounding for
    Post-Training Quantization", ICML 2020, arXiv 2004.10568).

    Args:
        grid: the calibrated unsigned quantizer.
        weight: what it quantizes; the shares start at the weight's own place between two codes.
    """

    def __init__(self, grid: Uniform, weight: Tensor) -> None:
        super().__init__()
        self.grid = grid
        codes = weight.detach() / grid.scale.detach()
        self.register_buffer("below", codes.floor())
        rest = (codes - self.below - LOW) / (HIGH - LOW)
        self.alpha = nn.Parameter((rest / (1 - rest)).log())

    @property
    def bits(self) -> int:
        return self.grid.bits

    def shares(self) -> Tensor:
        """Of the way to the code above, in [0, 1]."""
        return (self.alpha.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        return self._on_grid(self.below + self.shares())

    def hard(self) -> Tensor:
        """Every share rounded to 0 or 1, on the grid."""
        return self._on_grid(self._rounded())

    def value(self) -> Tensor:
        """The weight to keep: the codes chosen, not cut to the range. The grid snaps it to `hard()`."""
        return self._rounded() * self.grid.scale

    def _rounded(self) -> Tensor:
        return self.below + (self.alpha >= 0).to(self.alpha.dtype)

    def _on_grid(self, codes: Tensor) -> Tensor:
        grid = self.grid
        return ((codes + grid.zero_point).clamp(grid.low, grid.high) - grid.zero_point) * grid.scale


def snap_inner(grid: Uniform, x: Tensor) -> Tensor:
    """x on the grid; no gradient passes to x, nor through it to the scale, where the first or last code is taken.

    So it is in the authors' training. `Uniform` itself passes the gradient up to the ends of the range.
    """
    codes = grid.codes(x)
    ends = (codes.detach().round() <= grid.low) | (codes.detach().round() >= grid.high)
    return (torch.where(ends, codes.detach(), codes) - grid.zero_point.round()) * grid.scale


class Drop(nn.Module):
    """Each value quantized with a probability, else as it came: QDrop (Wei et al., ICLR 2022, arXiv 2203.05740)."""

    def __init__(self, grid: Uniform, share: float, generator: torch.Generator) -> None:
        super().__init__()
        self.grid, self.share, self.generator = grid, share, generator

    def forward(self, x: Tensor) -> Tensor:
        return mixed(snap_inner(self.grid, x), x, self.share, self.generator)


def mixed(quantized: Tensor, x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Each value from `quantized` with probability `share`, else from x."""
    if share >= 1:
        return quantized
    return torch.where(torch.rand(x.shape, generator=generator, device=x.device) < share, quantized, x)


class BlockLoss:
    """The loss of a unit's reconstruction: its distance from the float output, and the price of undecided rounding.

    2 * distance / first distance + 0.01 * sum(1 - |2 share - 1|^b). The second term waits for a fifth of the calls;
    then b falls from 20 to 2 linearly, which pushes the shares to 0 or 1.

    Args:
        calls: how many there will be.
        distance: "hessian" (mean of squares weighted by |Hessian|), "mse" (squares summed over axis 1, then the mean)
            or "kl" (of softmax answers, summed and divided by the batch).
    """

    def __init__(self, calls: int, distance: str) -> None:
        self.calls, self.distance, self.count = calls, distance, 0
        self.first: Tensor | None = None

    @property
    def exponent(self) -> float:
        """b after the calls so far."""
        wait = 0.2 * self.calls
        return 2 + 18 * min(max(1 - (self.count - wait) / (self.calls - wait), 0), 1)

    def __call__(
        self, output: Tensor, target: Tensor, hessian: Tensor | None = None, shares: Sequence[Tensor] = ()
    ) -> Tensor:
        self.count += 1
        if self.distance == "kl":
            far = F.kl_div(output.log_softmax(-1), target.softmax(-1), reduction="batchmean")
        elif self.distance == "mse":
            far = (output - target).square().sum(1).mean()
        else:
            far = ((output - target).square() * hessian.abs()).mean()
        if self.first is None:
            self.first = far.detach().clamp_min(torch.finfo(far.dtype).tiny)
        loss = 2 * far / self.first
        if self.count >= 0.2 * self.calls:
            b = self.exponent
            loss = loss + 0.01 * sum((1 - (2 * share - 1).abs().pow(b)).sum() for share in shares)
        return loss
