"""Whether a product with a block-sparse weight is faster than the dense one on this machine: measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitalloy.compression.pruning.lpvit.costs import ROUNDS, medians
from vitalloy.compression.pruning.lpvit.masks import Block, block_sums

DENSITIES = (0.75, 0.5, 0.25, 0.1, 0.05)


def bsr_product(weight: Tensor, block: Block) -> Tensor:
    """The weight in block-compressed rows, for `torch.sparse` products: its empty blocks are not stored."""
    return weight.to_sparse_bsr(block)


def gathered(weight: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """The blocks of each block row side by side (block rows, n * columns, rows), and where their inputs stand.

    Rows with fewer blocks than the fullest are filled up with empty ones.
    """
    rows, columns = block
    full = block_sums(weight.abs(), block) > 0
    most = max(int(full.sum(1).max()), 1)
    chosen = full.float().argsort(dim=1, descending=True, stable=True)[:, :most]
    tiles = weight.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2)  # (R, C, rows, columns)
    packed = tiles.gather(1, chosen[:, :, None, None].expand(-1, -1, rows, columns))
    places = (chosen.unsqueeze(2) * columns + torch.arange(columns)).flatten(1)
    return packed.movedim(2, 3).flatten(1, 2), places


def gathered_product(x: Tensor, packed: Tensor, places: Tensor) -> Tensor:
    """x (tokens, in) -> (tokens, out): one small dense product for every block row."""
    pieces = x.t()[places].transpose(1, 2)  # (block rows, tokens, n * columns)
    return torch.bmm(pieces, packed).transpose(0, 1).flatten(1)


@torch.no_grad()
def crossover(
    out_features: int,
    in_features: int,
    tokens: int,
    *,
    block: Block = (16, 16),
    densities: Sequence[float] = DENSITIES,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Seconds of the dense product and of each block-sparse one at these densities, on this machine.

    Returns:
        Rows of density, "dense", "bsr" and "gather" (median seconds), and "pays": whether a sparse one was faster.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, in_features, generator=generator)
    weight = torch.randn(out_features, in_features, generator=generator)
    count = block_sums(weight, block).numel()
    rows = []
    for density in densities:
        grid = torch.zeros(count).index_fill_(
            0, torch.randperm(count, generator=generator)[: round(density * count)], 1
        )
        grid = grid.view(-1, -(-in_features // block[1]))
        mask = grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:out_features, :in_features]
        sparse = weight * mask
        bsr, (packed, places) = bsr_product(sparse, block), gathered(sparse, block)
        calls = {
            "dense": lambda sparse=sparse: F.linear(x, sparse),
            "bsr": lambda bsr=bsr: bsr @ x.t(),
            "gather": lambda packed=packed, places=places: gathered_product(x, packed, places),
        }
        times = dict(zip(calls, medians(list(calls.values()), rounds), strict=True))
        rows.append({"density": density, **times, "pays": min(times["bsr"], times["gather"]) < times["dense"]})
    return rows
