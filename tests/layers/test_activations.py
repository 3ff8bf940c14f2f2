"""QuickGELU: its formula, its gradient, and an inference path that leaves its input alone."""

from __future__ import annotations

import torch

from vitalloy.layers.activations import QuickGELU


def test_values_and_gradients_are_those_of_the_formula():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    wanted = x * torch.sigmoid(1.702 * x)
    assert torch.allclose(QuickGELU()(x), wanted, atol=1e-14)
    (grad,) = torch.autograd.grad(QuickGELU()(x).sum(), x)
    assert torch.allclose(grad, torch.autograd.grad(wanted.sum(), x)[0], atol=1e-14)


def test_without_gradients_the_value_is_the_same_and_the_input_untouched():
    x = torch.randn(50)
    kept = x.clone()
    with torch.no_grad():
        out = QuickGELU()(x)
    assert torch.equal(x, kept)
    assert torch.allclose(out, x * torch.sigmoid(1.702 * x), atol=1e-6)
