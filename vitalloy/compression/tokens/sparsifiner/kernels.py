"""Three ways to compute attention between kept pairs alone; all give the same numbers.

`masked` computes every pair and forgets most: what the authors do, and the reference. `gathered` skips: neighbouring
queries that share their keys form a group, the group's keys and values are copied together, and fused attention runs
on them. `flex` is FlexAttention with a block mask, for CUDA: it skips blocks in which nothing is kept.

Measured on one CPU thread (heads 6, width 64): a list of keys for every single query never pays. Choosing the keys
takes longer than the whole dense attention does, and so does gathering them; PyTorch's sparse matrices (sampled_addmm,
then a product) are slower still. Groups of 64 and more pay from some hundred tokens on; see `crossover`.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def allowed(index: Tensor, keys: int, group: int, queries: int) -> Tensor:
    """Which pairs a choice of keys stands for, (B, heads, queries, keys) bool.

    Args:
        index: (B, heads, groups, b), the keys of each group of `group` queries in a row.
    """
    mask = torch.zeros(*index.shape[:3], keys, dtype=torch.bool, device=index.device)
    mask = mask.scatter(-1, index, torch.ones_like(index, dtype=torch.bool))
    return mask if group == 1 else mask.repeat_interleave(group, 2)[:, :, :queries]


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Attention where `mask` (B, heads, N, M) is true, all pairs computed; a query without keys gets zeros.

    The mask is added, not chosen by: PyTorch's fused attention takes half the time with a float mask.
    """
    if bias is not None and bias.requires_grad:  # has no fused form
        logits = (q * scale @ k.mT + bias).masked_fill(~mask, -torch.inf)
        weights = logits.softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0)
        return weights @ v
    base = torch.zeros((), dtype=q.dtype, device=q.device) if bias is None else bias
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.where(mask, base, -torch.inf), scale=scale)


def gathered(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, group: int, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Attention of groups of `group` neighbouring queries to the keys `index` (B, heads, groups, b) of each group."""
    batch, heads, queries, dim = q.shape
    groups, kept = index.shape[2:]
    short = groups * group - queries
    grouped = F.pad(q, (0, 0, 0, short)).reshape(-1, 1, group, dim)
    first = torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1) * k.shape[2]
    rows = (index + first).flatten()
    near = [x.reshape(-1, x.shape[-1]).index_select(0, rows).view(-1, 1, kept, x.shape[-1]) for x in (k, v)]
    if bias is not None:
        bias = bias.expand(batch, heads, queries, k.shape[2])
        bias = F.pad(bias, (0, 0, 0, short)).unflatten(2, (groups, group))
        bias = bias.gather(-1, index.unsqueeze(3).expand(-1, -1, -1, group, -1)).reshape(-1, 1, group, kept)
    out = F.scaled_dot_product_attention(grouped, *near, attn_mask=bias, scale=scale)
    return out.view(batch, heads, groups * group, -1)[:, :, :queries]


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """FlexAttention on the blocks that hold a kept pair of `mask` (B, heads, N, M); a query without keys gets zeros.

    Compiled on CUDA, where it skips empty blocks. Elsewhere it runs uncompiled and skips nothing. It was tested for its
    numbers on CPUs alone; no time on a GPU is claimed.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    batch, heads, queries, keys = mask.shape
    blocks = create_block_mask(lambda b, h, i, j: mask[b, h, i, j], batch, heads, queries, keys, device=str(q.device))
    added = None
    if bias is not None:
        bias = bias.expand(batch, heads, queries, keys)
        added = lambda score, b, h, i, j: score + bias[b, h, i, j]  # noqa: E731 - FlexAttention traces a function
    return _flex_attention(q.is_cuda)(q, k, v, score_mod=added, block_mask=blocks, scale=scale)


@cache
def _flex_attention(compiled: bool):
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
