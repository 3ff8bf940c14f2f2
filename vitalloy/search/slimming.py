"""Latency-driven slimming: shrink a supernet to a latency target, by the least accuracy lost for a millisecond.

"EfficientFormer: Vision Transformers at MobileNet Speed", Li et al., NeurIPS 2022, arXiv 2206.01191; the joint score of
size and speed is that of EfficientFormerV2, arXiv 2212.08059. The authors published no code for it: this follows the
formulas. The units and exponents of the joint score were not to be had and are arguments.

Train a supernet whose positions are `Choice`s, read their `importance`, measure a `latency_table` on the machine that
counts, and let `slim` walk from the full design to the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitalloy.backbones.efficientformer import Attention, AttentionBlock, PoolMixing
from vitalloy.errors import VitalloyError
from vitalloy.layers.mobile import MixingBlock

STEP = 16  # channels that a stage loses at a time
KINDS = ("pool", "attention")


def soft_choice(outputs: Sequence[Tensor], alpha: Tensor, tau: float, noise: Tensor | None = None) -> Tensor:
    """The mean of what a position's choices return, weighted by softmax((alpha + noise) / tau).

    Args:
        outputs: one tensor a choice, all of one shape.
        alpha: (choices,) learnable.
        tau: temperature; small ones choose.
        noise: (choices,) uniform in 0..1, for exploration.
    """
    weights = ((alpha if noise is None else alpha + noise) / tau).softmax(-1)
    return sum(weight * output for weight, output in zip(weights, outputs, strict=True))


def importance(alpha: Tensor) -> Tensor:
    """How much positions need any block: (positions, choices) with identity as the last choice -> (positions,).

    The importance of a stage is the sum over its positions.
    """
    return alpha[..., :-1].sum(-1) / alpha[..., -1]


class Choice(nn.Module):
    """One position of a supernet: a soft choice between blocks and doing nothing, which comes last.

    Args:
        blocks: modules that keep the shape of their input.
        tau: temperature; lower it while training.
    """

    def __init__(self, blocks: Iterable[nn.Module], tau: float = 1.0) -> None:
        super().__init__()
        self.choices = nn.ModuleList([*blocks, nn.Identity()])
        self.alpha = nn.Parameter(torch.ones(len(self.choices)))
        self.tau = tau

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand_like(self.alpha) if self.training else None
        return soft_choice([choice(x) for choice in self.choices], self.alpha, self.tau, noise)


@dataclass(frozen=True)
class Stage:
    """Width of a stage and the kind of each of its positions: "pool", "attention" or "identity"."""

    width: int
    blocks: tuple[str, ...]


Design = tuple[Stage, ...]
Table = Mapping[tuple[int, str, int], float]  # (stage, kind, width) -> milliseconds


def block(kind: str, width: int, grid: tuple[int, int]) -> nn.Module:
    """A block of EfficientFormer for maps of `width` channels on a grid."""
    if kind == "attention":
        return AttentionBlock(width, Attention(width, grid), mlp_ratio=4.0, layer_scale=1e-5, drop_path=0.0)
    if kind == "pool":
        return MixingBlock(width, PoolMixing(), mlp_ratio=4.0, depthwise=False)
    raise VitalloyError(f"no block is called {kind!r}; choose from {', '.join(KINDS)}")


def latency_table(
    grids: Sequence[tuple[int, int]],
    widths: Sequence[Sequence[int]],
    measure: Callable[[Callable[[], Any]], float],
    kinds: Sequence[str] = KINDS,
) -> dict[tuple[int, str, int], float]:
    """Measured milliseconds of one block on one image, by stage, kind and width.

    Args:
        grids: (H, W) of each stage's map.
        widths: for each stage, the widths that may be asked for.
        measure: the milliseconds that a call takes, such as `lambda call: vitalloy.benchmark.measure(call).median_ms`.
    """
    table = {}
    for stage, (grid, sizes) in enumerate(zip(grids, widths, strict=True)):
        for kind in kinds:
            for width in sizes:
                module = block(kind, width, grid).eval()
                x = torch.randn(1, width, *grid).contiguous(memory_format=torch.channels_last)
                table[stage, kind, width] = measure(_call(module, x))
    return table


def _call(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return torch.inference_mode()(lambda: module(x))


def latency(design: Design, table: Table) -> float:
    """Milliseconds of all blocks of a design."""
    return sum(
        table[i, kind, stage.width] for i, stage in enumerate(design) for kind in stage.blocks if kind != "identity"
    )


def actions(design: Design, scores: Sequence[Tensor], least_width: int = STEP) -> Iterator[Design]:
    """The designs one step smaller.

    They are: without the least important position; with the first attention block turned into a pooling block; with
    the least important stage that can be narrowed narrowed by 16 channels.

    Args:
        scores: the importance of each position, one tensor a stage.
    """
    active = [(float(scores[i][j]), i, j) for i, s in enumerate(design) for j, k in enumerate(s.blocks) if k in KINDS]
    if active:
        _, i, j = min(active)
        yield _turned(design, i, j, "identity")
    attention = [(i, j) for _, i, j in active if design[i].blocks[j] == "attention"]
    if attention:
        yield _turned(design, *min(attention), "pool")
    wide = [(float(scores[i].sum()), i) for i, stage in enumerate(design) if stage.width - STEP >= least_width]
    if wide:
        _, i = min(wide)
        yield _with(design, i, replace(design[i], width=design[i].width - STEP))


def slim(
    design: Design, scores: Sequence[Tensor], table: Table, target_ms: float, evaluate: Callable[[Design], float]
) -> Iterator[Design]:
    """Walk from a design to one whose latency by the table is at most `target_ms`; yields every design on the way.

    Each step is the one of `actions` with the least loss of `evaluate` (an accuracy) for a millisecond saved.

    Raises:
        VitalloyError: no action is left that saves time.
    """
    time, score = latency(design, table), evaluate(design)
    while time > target_ms:
        tried = []
        for smaller in actions(design, scores, least_width=min(width for _, _, width in table)):
            if (saved := time - latency(smaller, table)) > 0:
                value = evaluate(smaller)
                tried.append(((score - value) / saved, len(tried), smaller, value))
        if not tried:
            raise VitalloyError(
                f"nothing is left to slim at {time:.3g} ms; the target of {target_ms:.3g} ms is too low"
            )
        _, _, design, score = min(tried)
        time = latency(design, table)
        yield design


def arch(design: Design) -> dict[str, Any]:
    """Arguments of `create_model("efficientformer_l1", ...)` for a design.

    Raises:
        VitalloyError: attention stands elsewhere than at the end of the last stage.
    """
    kinds = [[kind for kind in stage.blocks if kind != "identity"] for stage in design]
    count = kinds[-1].count("attention")
    tail = ["pool"] * (len(kinds[-1]) - count) + ["attention"] * count
    if kinds[-1] != tail or any("attention" in stage for stage in kinds[:-1]) or not all(kinds):
        raise VitalloyError("an EfficientFormer has a block in every stage and attention only at the end of the last")
    return {
        "embed_dims": tuple(stage.width for stage in design),
        "depths": tuple(len(stage) for stage in kinds),
        "num_attention": count,
    }


def joint_score(
    accuracy: float,
    measured: Mapping[str, float],
    units: Mapping[str, float],
    exponents: Mapping[str, float] | None = None,
) -> float:
    """accuracy * product of (measured / unit) ** -exponent, over size and latency: what EfficientFormerV2 maximises.

    Args:
        measured, units: by metric, such as {"size": 3.6e6, "latency": 0.9}.
        exponents: by metric; 0.5 each when not given.
    """
    for metric, value in measured.items():
        accuracy *= (value / units[metric]) ** -(0.5 if exponents is None else exponents[metric])
    return accuracy


def _turned(design: Design, i: int, j: int, kind: str) -> Design:
    blocks = design[i].blocks
    return _with(design, i, replace(design[i], blocks=(*blocks[:j], kind, *blocks[j + 1 :])))


def _with(design: Design, i: int, stage: Stage) -> Design:
    return (*design[:i], stage, *design[i + 1 :])
