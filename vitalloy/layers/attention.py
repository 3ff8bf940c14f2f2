"""Softmax attention: the socket that every backbone uses, and the plain self-attention around it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Attend(nn.Module):
    """softmax(scale * q kᵀ + bias) v, fused. Methods that need another attention swap this module.

    Args:
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """q (B, heads, N, d); k, v (B, heads, M, d); bias broadcasts to (B, heads, N, M) -> (B, heads, N, d).

        `scale` defaults to d ** -0.5.
        """
        dropout = self.dropout if self.training else 0.0
        if bias is not None and bias.requires_grad and not dropout and q.device.type == "cpu":
            # a bias that learns has no fused form on CPUs, and PyTorch's fallback takes more passes than this
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            return (q * scale @ k.mT + bias).softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)


class SelfAttention(nn.Module):
    """Multi-head self-attention of Dosovitskiy et al. with one fused q, k, v projection."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = fitting_heads(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attend = Attend(dropout)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, N, C)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, d)
        return self.proj(merge_heads(self.attend(q, k, v)))


def fitting_heads(dim: int, num_heads: int) -> int:
    """`num_heads`, if the channels can be shared by them; ValueError otherwise."""
    if dim % num_heads:
        raise ValueError(f"{dim} channels cannot be shared by {num_heads} heads")
    return num_heads


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, C / heads); heads are contiguous groups of channels."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, N, d) -> (B, N, heads * d)."""
    return x.transpose(1, 2).flatten(2)
