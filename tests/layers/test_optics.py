"""The 4f correlator against convolution, signs and photons, tiling, and the arithmetic of shots."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from vitalloy.layers import optics
from vitalloy.layers.optics import Bench, OpticalConv2d


def planes(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("side", [8, 15, 24])
def test_closed_form_is_the_propagation_of_light(side):
    image, kernel = planes(3, side, side), planes(side, side)
    assert torch.allclose(optics.correlate(image, kernel), Bench().propagate(image, kernel), atol=1e-9)
    clipped = Bench(aperture=Bench().pitch(side) * side / 4).propagate(image, kernel)
    assert not torch.allclose(optics.correlate(image, kernel), clipped, rtol=0.01), "the lens has no edge"


def test_a_shot_is_the_rotated_circular_convolution():
    image, kernel = planes(5, 7), planes(5, 7)
    wanted = torch.zeros(5, 7, dtype=torch.float64)
    for i in range(5):
        for j in range(7):
            wanted += image[i, j] * kernel.roll((i, j), (0, 1))
    assert torch.allclose(optics.correlate(image, kernel), wanted.flip(0, 1).roll((1, 1), (0, 1)))


def test_a_plane_that_is_not_square_has_no_pitch():
    with pytest.raises(ValueError, match="5x7 pixels is not square"):
        Bench().propagate(planes(5, 7), planes(5, 7))


def convolution(x: torch.Tensor, layer: OpticalConv2d) -> torch.Tensor:
    return F.conv2d(x, layer.kernel.flip((2, 3)), layer.bias.flatten(), padding=layer.kernel.shape[-1] // 2)


@pytest.mark.parametrize(("size", "kernel"), [((12, 12), 3), ((8, 14), 5), ((10, 10), 9), ((6, 6), 15)])
def test_the_layer_is_a_true_convolution_of_its_own_images(size, kernel):
    layer = OpticalConv2d(3, 5, kernel, upright=True).double()
    torch.nn.init.normal_(layer.bias)
    x = planes(4, 3, *size)
    assert torch.allclose(layer(x), convolution(x, layer), atol=1e-9)
    turned = OpticalConv2d(3, 5, kernel).double()
    turned.load_state_dict(layer.state_dict())
    assert torch.allclose(turned(x).flip((2, 3)), layer(x))


def test_margin_makes_room_for_larger_kernels():
    x = planes(1, 1, 16, 16)
    wraps, fits = (OpticalConv2d(1, 1, 13, upright=True, margin=margin).double() for margin in (2, 4))
    fits.load_state_dict(wraps.state_dict())
    assert not torch.allclose(wraps(x), convolution(x, wraps), atol=1e-6)
    assert torch.allclose(fits(x), convolution(x, fits), atol=1e-9)


def test_inputs_of_both_signs_need_their_parts_shot_apart():
    plain, split = OpticalConv2d(2, 3, 3, upright=True), OpticalConv2d(2, 3, 3, upright=True, split_inputs=True)
    for layer in (plain.double(), split.double()):
        layer.load_state_dict(plain.state_dict())
    x = planes(2, 2, 12, 12) - 0.5
    assert torch.allclose(split(x), convolution(x, split), atol=1e-9)
    assert not torch.allclose(plain(x), convolution(x, plain), atol=1e-3)
    magnitudes = OpticalConv2d(2, 3, 3, bias=False, pseudo_negativity=False)(planes(2, 2, 12, 12).float())
    assert magnitudes.min() >= 0


def test_the_published_roll_takes_other_images_and_channels():
    fair, rolled = OpticalConv2d(3, 5, 3), OpticalConv2d(3, 5, 3, published_roll=True)
    for layer in (fair.double(), rolled.double()):
        layer.load_state_dict(fair.state_dict())
    x = planes(4, 3, 8, 8)
    assert not torch.allclose(rolled(x), fair(x), atol=1e-3)
    # image b - 2, input channels turned by one against the kernels, and for five outputs the one before
    assert torch.allclose(rolled(x), fair(x.roll((2, -1), (0, 1))).roll(4, 1), atol=1e-9)


def test_noise_has_the_mean_of_the_signal_and_fades_with_light():
    torch.manual_seed(0)
    signal = torch.full((200_000,), 0.7, dtype=torch.float64, requires_grad=True)
    dim, bright = optics.shot_noise(signal, 255), optics.shot_noise(signal, 25_500)
    assert dim.mean().item() == pytest.approx(0.7, abs=1e-3)
    assert dim.std().item() == pytest.approx(math.sqrt(0.7 / 255), rel=0.02)
    assert bright.std().item() == pytest.approx(dim.std().item() / 10, rel=0.02)
    assert optics.shot_noise(signal, 255, as_published=True).mean().item() == pytest.approx(1.4, abs=1e-3)
    dim.sum().backward()
    assert torch.equal(signal.grad, torch.ones_like(signal))


def test_a_noisy_layer_comes_near_the_exact_one():
    torch.manual_seed(0)
    exact = OpticalConv2d(2, 3, 3, split_inputs=True)
    x = torch.randn(4, 2, 10, 10)
    errors = []
    for photons in (100, 10_000):
        noisy = OpticalConv2d(2, 3, 3, split_inputs=True, photons=photons)
        noisy.load_state_dict(exact.state_dict())
        errors.append((noisy(x) - exact(x)).std().item())
    assert errors[0] == pytest.approx(10 * errors[1], rel=0.1)
    with pytest.raises(ValueError, match="pseudo_negativity"):
        OpticalConv2d(1, 1, 3, pseudo_negativity=False, photons=255)


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_shots_of_signed_parts_make_a_convolution(padding):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 2, 8, 8, dtype=torch.float64), torch.randn(4, 2, 3, 3, dtype=torch.float64)
    exact = F.conv2d(x, weight, padding=padding)
    assert torch.equal(optics.optical_conv(x, weight, None, padding), exact)
    errors = [(optics.optical_conv(x, weight, p, padding) - exact).std().item() for p in (1e3, 1e5, 1e9)]
    assert errors[0] == pytest.approx(10 * errors[1], rel=0.15) and errors[2] < 1e-3


@pytest.mark.parametrize(("count", "side", "size", "columns"), [(7, 6, 3, 3), (5, 8, 8, 2), (4, 5, 2, 4)])
def test_one_plane_does_what_a_convolution_of_each_map_does(count, side, size, columns):
    maps, weight = planes(2, count, side, side) - 0.5, planes(size, size)
    plane = optics.tile(maps, size, columns)
    read = optics.untile(optics.convolve_plane(plane, weight), count, side, size, columns)
    each = F.conv2d(maps.flatten(0, 1).unsqueeze(1), weight[None, None]).squeeze(1).unflatten(0, (2, count))
    assert torch.allclose(read, each, atol=1e-12)


def test_counting_shots():
    assert optics.maps_per_shot(8, 5) == (2160 // 12) * (3840 // 12)
    assert optics.count_shots(12, 57_600, 8, 5) == 12 * 4  # exactly full
    assert optics.count_shots(12, 57_601, 8, 5, signed_inputs=False) == 12 * 2 * 2
    assert optics.count_shots(12, 1, 8, 5, signed_kernels=False, signed_inputs=False) == 12
    with pytest.raises(ValueError, match="do not fit"):
        optics.count_shots(1, 1, 16, 9, modulator=(20, 100))


def test_speed_is_a_curve_over_rates():
    shots = optics.Shots(1000, electronic_s=0.5, remainder_s=0.1)
    assert shots.break_even_rate() == pytest.approx(2500)
    assert shots.speedup(2500) == pytest.approx(1)
    assert shots.speedup(1e12) == pytest.approx(5)
    assert optics.Shots(1000, 0.1, 0.2).break_even_rate() == math.inf
