"""Where skipping pays on this machine: the whole sparse attention against PyTorch's dense one, timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitalloy.compression.tokens.sparsifiner.attend import SparseAttend
from vitalloy.compression.tokens.sparsifiner.kernels import gathered
from vitalloy.compression.tokens.sparsifiner.predictor import MaskPredictor

TOKENS, KEEPS, GROUP = (197, 785, 1025, 3137), (0.5, 0.25, 0.1, 0.05), 128


def crossover(
    heads: int = 6,
    dim: int = 64,
    tokens: Sequence[int] = TOKENS,
    keep: Sequence[float] = KEEPS,
    *,
    groups: Sequence[int] = (GROUP,),
    batch: int = 1,
    seconds: float = 1.0,
) -> list[dict[str, Any]]:
    """Time dense and skipping self-attention on this machine at the thread count in force.

    Args:
        heads, dim: of the attention; `dim` is that of one head.
        tokens: sequence lengths, the class token among them.
        keep: shares of the keys.
        groups: sizes of the groups of queries that share their keys; 1 is the published form.
        seconds: to spend on each row.

    Returns:
        A row for each combination with tokens, keep, group; milliseconds of `dense` (fused attention without any mask),
        `skip` (the kernel alone, its keys given) and `layer` (prediction, choice and kernel together); and `speedup`,
        dense over layer: above 1 it pays.
    """
    generator = torch.Generator().manual_seed(0)
    rows = []
    for count in tokens:
        q, k, v = torch.randn(3, batch, heads, count, dim, generator=generator).unbind()
        for group in groups:
            for share in keep:
                times = timed(q, k, v, prefix=1, keep=share, group=min(group, count - 1), seconds=seconds)
                rows.append({"tokens": count, "keep": share, "group": group, **times})
    return rows


def pays_below(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[int, int], float | None]:
    """For each (tokens, group) the largest measured keep rate from which on skipping is faster; None where it never is.

    Noise may make a row win between rows that lose: only what holds for all smaller rates counts.
    """
    found: dict[tuple[int, int], float | None] = {}
    lost: set[tuple[int, int]] = set()
    for row in sorted(rows, key=lambda row: row["keep"]):
        key = row["tokens"], row["group"]
        found.setdefault(key, None)
        if row["speedup"] <= 1:
            lost.add(key)
        elif key not in lost:
            found[key] = row["keep"]
    return found


@torch.no_grad()
def timed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    prefix: int,
    keep: float,
    group: int,
    scale: float | None = None,
    bias: Tensor | None = None,
    predictor: MaskPredictor | None = None,
    seconds: float = 0.5,
) -> dict[str, float]:
    """Milliseconds of dense attention, of the skipping kernel and of the whole sparse layer for these tensors."""
    own = MaskPredictor(k.shape[2], q.shape[1], q.shape[3]).to(q) if predictor is None else predictor
    attend = SparseAttend(own, keep=keep, prefix=prefix, group=group, kernel="gather").eval()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    patches, rest = q[:, :, prefix:], None if bias is None else bias[..., prefix:, :]
    index = attend.choose(patches, k)
    found = _medians(
        {
            "dense": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale),
            "skip": lambda: gathered(patches, k, v, index, group, scale, rest),
            "layer": lambda: attend(q, k, v, scale, bias),
        },
        seconds,
    )
    return {**found, "speedup": found["dense"] / found["layer"]}


def _medians(calls: Mapping[str, Callable[[], Any]], seconds: float, least: int = 5) -> dict[str, float]:
    """Median milliseconds of each call, run in turn so that their ratios hold on a noisy machine."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    deadline = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < least or time.perf_counter() < deadline:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}
