"""The grids: what each represents, their limits, gradients, and the ranges that are read from values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vitalloy.compression.norm_folding import fold, norms_and_layers
from vitalloy.compression.observers import (
    in_groups,
    percentile_grid,
    percentile_log_sqrt2,
    power_of_two_grid,
    quantiles,
    range_grid,
)
from vitalloy.compression.quantizers import Log2, LogSqrt2, TwinGelu, TwinSoftmax, Uniform, check_bits
from vitalloy.errors import CompressionError


def test_uniform_has_its_codes_and_a_straight_through_gradient():
    grid = Uniform(3, torch.tensor(0.5), 2)
    x = torch.tensor([-9.0, -0.6, 0.2, 0.3, 9.0], requires_grad=True)
    y = grid(x)
    assert y.tolist() == [-1.0, -0.5, 0.0, 0.5, 2.5]
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    with torch.no_grad():
        assert torch.equal(grid(x), y)


def test_log_grids_keep_their_powers_and_drop_the_rest():
    x = torch.tensor([1.0, 0.5, 0.13, 2.0**-3, 2.0**-9, 0.0])
    assert Log2(2)(x).tolist() == [1, 0.5, 0.125, 0.125, 0, 0]
    root = LogSqrt2(3, 0.8)
    powers = 0.8 * 2.0 ** (-torch.arange(8) / 2)
    assert torch.allclose(root(powers), powers)
    assert root(torch.tensor([0.8 / 17, 0.0])).tolist() == [0, 0]
    worst = (LogSqrt2(8, 1.0)(x := torch.linspace(1e-4, 1, 999)) / x).log2().abs().max()
    assert worst <= 0.25 + 1e-5  # half a step
    x = torch.tensor([0.3, 0.0], requires_grad=True)
    Log2(4)(x).sum().backward()
    assert x.grad.isfinite().all() and x.grad[0] > 0


def test_twin_softmax_divides_the_interval_and_the_published_sum_does_not():
    x = torch.linspace(0, 1, 400)
    split = 1 / 8
    grid = TwinSoftmax(6, split)
    error = (grid(x) - x).abs()
    assert error[x < split].max() <= split / 31 / 2 + 1e-6
    assert error.max() <= 1 / 31 / 2 + 1e-6
    published = TwinSoftmax(6, split, as_published=True)(x)
    assert (published - x - split).abs().max() <= 1 / 31 / 2 + split / 31 / 2 + 1e-6


def test_twin_gelu_is_finer_below_zero():
    x = nn.functional.gelu(torch.linspace(-6, 6, 500))
    grid = TwinGelu(6, 6 / 31)
    error = (grid(x) - x).abs()
    assert error[x < 0].max() <= grid.negative_scale / 2 + 1e-6 < error[x > 0].max() <= 3 / 31 + 1e-6


def test_bits_out_of_range_are_named():
    check_bits(2, 8, weights=2, activations=8)
    with pytest.raises(CompressionError, match=r"activations=9 .* 2 to 8"):
        check_bits(2, 8, weights=2, activations=9)


def test_quantiles_are_those_of_torch():
    x = torch.randn(3, 401, generator=torch.Generator().manual_seed(0))
    at = [0.001, 0.5, 0.999, 1.0]
    assert torch.allclose(quantiles(x, at), torch.quantile(x, torch.tensor(at), dim=-1), atol=1e-6)


def test_percentiles_cut_an_outlier_where_that_pays():
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    x[0] = 20.0
    cut, full = percentile_grid(x, 4), range_grid(x, 4)
    assert cut.scale < 0.5 * full.scale
    body = slice(1, None)
    assert (cut(x) - x)[body].square().mean() < 0.2 * (full(x) - x)[body].square().mean()
    channels = percentile_grid(torch.stack([x[1:101], 100 * x[1:101], torch.full((100,), -3.0)], 1)[None], 8, -1)
    assert channels.scale.shape == (1, 1, 3)
    assert channels.scale.flatten()[1] == pytest.approx(100 * channels.scale.flatten()[0].item(), rel=1e-4)
    constant = torch.full((1, 1, 3), -3.0)
    assert channels(constant)[0, 0, 2].item() == pytest.approx(-3.0)  # a range without width
    attention = (4 * x[1:1001].view(10, 100)).softmax(-1)
    grid = percentile_log_sqrt2(attention, 4)
    assert (grid(attention) - attention).square().mean() < (Log2(4)(attention) - attention).square().mean()


def test_a_range_beside_zero_is_stretched_or_clipped_as_published():
    x = torch.linspace(2, 7, 100)
    assert (range_grid(x, 8)(x) - x).abs().max() <= 7 / 255
    assert range_grid(x, 8, as_published=True)(x).max() == pytest.approx(5.0)


def test_power_of_two_factors_follow_the_channels():
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([8.0, 4.0, 2.0, 0.1])
    grid = power_of_two_grid(x, 8)
    factors = (grid.scale / grid.scale.min()).log2()
    assert factors[0] == 3 and factors[-1] == 0 and (factors.diff() <= 0).all()
    assert (grid(x) - x).square().mean() < (range_grid(x, 8)(x) - x).square().mean()


class Tangled(nn.Module):
    """A norm that two linear layers share, one whose output is added too, and one before a padded convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.added, self.padded = nn.LayerNorm(6), nn.LayerNorm(6), nn.LayerNorm(6)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        x = x.flatten(2).mT  # (B, N, 6)
        y = self.shared(x)
        x = self.a(y) + self.b(y.roll(1, 1))
        y = self.added(x)
        x = y + self.c(y)
        return self.conv(self.padded(x).mT.unflatten(2, (4, 4))).mean((2, 3))


def test_only_norms_without_other_readers_are_folded_and_the_answer_stays():
    torch.manual_seed(0)
    model, images = Tangled().eval(), torch.randn(3, 6, 4, 4)
    assert norms_and_layers(model, images) == [(model.shared, [model.a, model.b])]
    with torch.no_grad():
        before, outputs = model(images), model.shared(images.flatten(2).mT)
        scale, zero_point = torch.rand(6) + 0.1, torch.randint(0, 16, (6,)).float()
        codes = Uniform(4, scale, zero_point).codes(outputs)
        step, zero = fold(model.shared, [model.a, model.b], scale, zero_point)
        assert step.shape == zero.shape == () and math.isclose(step, scale.mean(), rel_tol=1e-6)
        assert torch.allclose(model(images), before, atol=1e-5)
        now = Uniform(4, step, zero).codes(model.shared(images.flatten(2).mT))
    assert (now != codes).float().mean() < 0.01  # every channel has the codes that it had on its own grid


def test_layers_come_in_groups_that_fit(monkeypatch):
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(12, 12) for _ in range(4)))
    images = torch.randn(8, 3, 2, 2)
    whole = dict(in_groups(model, model[1:], images))
    monkeypatch.setattr("vitalloy.compression.observers.HELD", 300)
    apart = dict(in_groups(model, model[1:], images))
    assert list(apart) == list(whole) == list(model[1:])
    assert all(torch.allclose(apart[layer].output, whole[layer].output) for layer in whole)
