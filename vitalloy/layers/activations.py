"""Activations that PyTorch has no module for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the cheap stand-in for GELU that several released models were trained with."""

    SCALE = 1.702

    def forward(self, x: Tensor) -> Tensor:
        # as SiLU it needs fewer passes over memory, most of all backwards; without gradients one temporary is enough
        if torch.is_grad_enabled():
            return F.silu(self.SCALE * x) * (1 / self.SCALE)
        return F.silu(self.SCALE * x, inplace=True).mul_(1 / self.SCALE)


ACTIVATIONS = {"gelu": nn.GELU, "quick_gelu": QuickGELU, "relu": nn.ReLU, "silu": nn.SiLU}
