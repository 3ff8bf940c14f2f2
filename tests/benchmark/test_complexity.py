from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import nn

from vitalloy.benchmark import count

timm = pytest.importorskip("timm")


def test_deit_tiny_costs_what_its_authors_print():
    model = timm.create_model("deit_tiny_patch16_224")
    result = count(model, (3, 224, 224))
    assert result.params == 5_717_416
    assert result.macs == pytest.approx(1.26e9, rel=0.01)  # with attention's products: 1.07e9 without


def test_convolutions_and_fused_attention_are_counted_to_the_unit():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1, groups=1)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x):
            x = self.norm(self.conv(x)).flatten(2).transpose(1, 2)[:, None]  # (B, 1, 16, 8)
            return F.scaled_dot_product_attention(x, x, x)

    model = Net().train()
    model.norm.eval()
    result = count(model, (3, 4, 4))
    assert result.macs == 16 * 8 * 27 + 2 * 16 * 16 * 8
    assert result.params == 8 * 27 + 8 + 16
    assert model.training and model.conv.training and not model.norm.training
