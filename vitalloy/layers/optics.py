"""Optical convolution: the 4f correlator, signs and photons, many maps on one plane, and what it all takes in time.

A 4f system is a lens, a modulator in the Fourier plane and a second lens. It convolves a whole plane with one kernel
in one shot and can do nothing else. Its camera sees magnitudes, rotated by 180 degrees.

After the simulator `optnn` that Ibadulla, Chen and Reyes-Aldasoro published with FatNet (AI 4(2), 2023, arXiv
2210.16914). Departures, each with a switch back: the published layer's Fourier shifts run over batch and channels too,
so that outputs come from other images (`published_roll`); its noise is added to a signal that the sample already
contains (`as_published`). Inputs of both signs, and the rotated-back result, are additions of ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def correlate(image: Tensor, kernel: Tensor) -> Tensor:
    """One shot in closed form: |DFT(DFT(image) DFT(kernel))| / pixels.

    The magnitude of the circular convolution, rotated by 180 degrees (out[-i] in place of out[i]).

    Args:
        image, kernel: (..., H, W), leading axes broadcast.
    """
    spectrum = torch.fft.fft2(image) * torch.fft.fft2(kernel)
    return torch.fft.fft2(spectrum, norm="forward").abs()


@dataclass(frozen=True)
class Bench:
    """The optical table.

    Attributes:
        wavelength: of the laser, in metres.
        focal_length: of both lenses, in metres.
        aperture: radius of the lenses, in metres; light outside of it passes unfocused.
    """

    wavelength: float = 532e-9
    focal_length: float = 10e-3
    aperture: float = 2.5e-3

    def propagate(self, image: Tensor, kernel: Tensor) -> Tensor:
        """One shot step by step: a focal length of free space before and behind each lens, the modulator between.

        Equals `correlate` as long as the plane lies inside the aperture.

        Args:
            image, kernel: (..., n, n), leading axes broadcast.

        Raises:
            ValueError: the plane is not square: pixels have one pitch, and it depends on the side.
        """
        if image.shape[-1] != image.shape[-2]:
            raise ValueError(f"a plane of {image.shape[-2]}x{image.shape[-1]} pixels is not square")
        mask = torch.fft.fftshift(torch.fft.fft2(kernel), dim=(-2, -1))
        return self._through_lens(self._through_lens(image) * mask).abs()

    def pitch(self, side: int) -> float:
        """Size of a pixel at which the planes of the lenses are Fourier planes, in metres."""
        return math.sqrt(self.wavelength * self.focal_length / side)

    def _through_lens(self, field: Tensor) -> Tensor:
        side, pitch = field.shape[-1], self.pitch(field.shape[-1])
        at = (torch.arange(side, device=field.device, dtype=torch.float64) - side / 2) * pitch
        frequency = at / (pitch**2 * side)
        f, wave = self.focal_length, 2 * math.pi / self.wavelength
        space = -math.pi * self.wavelength * f * _square_radius(frequency) + wave * f
        space = torch.fft.ifftshift(torch.polar(torch.ones_like(space), space))
        radius = _square_radius(at)
        lens = torch.polar(torch.ones_like(radius), -wave * radius / (2 * f))
        lens = lens.masked_fill(radius > self.aperture**2, 1)
        field = torch.fft.ifft2(torch.fft.fft2(field) * space) * lens
        return torch.fft.ifft2(torch.fft.fft2(field) * space)


def _square_radius(at: Tensor) -> Tensor:
    return at[:, None] ** 2 + at**2


def signed_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Pseudo-negativity: x as the difference of two tensors without negative entries."""
    return x.clamp(min=0), (-x).clamp(min=0)


def shot_noise(signal: Tensor, photons: float, as_published: bool = False) -> Tensor:
    """What a camera counts where `photons` arrive at intensity 1, as an intensity; gradients pass as if it were exact.

    Args:
        signal: intensities, not negative.
        as_published: add the count to the signal that it already contains, which doubles the mean.
    """
    counted = torch.poisson(signal.detach().clamp(min=0) * photons) / photons  # sums may round to below zero
    counted = counted if as_published else counted - signal.detach()
    return signal + counted


def signed_shots(image: Tensor, kernel: Tensor, photons: float | None = None, as_published: bool = False) -> Tensor:
    """Two shots with the positive and the negative part of the kernel, subtracted; see `correlate`."""
    shots = [correlate(image, part) for part in signed_parts(kernel)]
    if photons is not None:
        shots = [shot_noise(shot, photons, as_published) for shot in shots]
    return shots[0] - shots[1]


def optical_conv(x: Tensor, weight: Tensor, photons: float | None, padding: str = "valid") -> Tensor:
    """A convolution (cross-correlation) whose signed inputs and kernels were shot in their parts: four shots each.

    The rotation is undone. Without noise this is `F.conv2d`. The sum of Poisson counts is a Poisson count, so the
    shots that are added are drawn as one.

    Args:
        x: (B, C, H, W).
        weight: (M, C, K, K).
        photons: per pixel at intensity 1; None for no noise.
    """
    if photons is None:
        return F.conv2d(x, weight, padding=padding)
    parts, (positive, negative) = torch.cat(signed_parts(x), 1), signed_parts(weight)
    plus = F.conv2d(parts, torch.cat([positive, negative], 1), padding=padding)
    minus = F.conv2d(parts, torch.cat([negative, positive], 1), padding=padding)
    return shot_noise(plus, photons) - shot_noise(minus, photons)


class OpticalConv2d(nn.Module):
    """A convolution layer of the same size, one plane for each pair of an output and an input channel.

    Gives the true convolution (the kernel is turned), rotated by 180 degrees; the offset is (K - 1) / 2 for odd kernels
    on maps of even side and one pixel off where the parities differ, as published. What lies behind the margin of the
    plane wraps around: nothing does for kernels up to 9, more margin makes room for larger ones.

    Args:
        in_chans, out_chans, kernel_size: of the convolution.
        bias: a bias for each output.
        pseudo_negativity: shoot the positive and the negative part of the kernels apart; otherwise each shot gives a
            magnitude.
        split_inputs: shoot the parts of the inputs apart as well: without it inputs must not be negative.
        photons: per pixel at intensity 1, for shot noise; None for none. Only with `pseudo_negativity`.
        upright: rotate the result back.
        margin: pixels around the input; the plane is at least as large as the kernel.
        published_roll: mix up batch and channels as the published layer does.
        as_published: noise as `shot_noise` has it.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel_size: int,
        bias: bool = True,
        pseudo_negativity: bool = True,
        split_inputs: bool = False,
        photons: float | None = None,
        upright: bool = False,
        margin: int = 2,
        published_roll: bool = False,
        as_published: bool = False,
    ) -> None:
        super().__init__()
        if photons is not None and not pseudo_negativity:
            raise ValueError("shot noise needs pseudo_negativity=True")
        self.kernel = nn.Parameter(torch.empty(out_chans, in_chans, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_chans, 1, 1)) if bias else None
        nn.init.kaiming_uniform_(self.kernel, a=math.sqrt(5))
        self.pseudo_negativity, self.split_inputs, self.photons = pseudo_negativity, split_inputs, photons
        self.upright, self.margin = upright, margin
        self.published_roll, self.as_published = published_roll, as_published

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_chans, H, W) -> (B, out_chans, H, W)."""
        size, kernel = x.shape[-2:], self.kernel
        plane = [max(side + 2 * self.margin, kernel.shape[-1]) for side in size]
        before = [(p - side) // 2 for p, side in zip(plane, size, strict=True)]
        if self.published_roll:
            outputs, inputs = kernel.shape[:2]
            kernel = kernel.roll((2 * (outputs // 2), inputs // 2), (0, 1))
            x = x.roll(x.shape[0] // 2, 0)
        x, kernel = _centred(x, plane), _centred(kernel, plane)
        out = self._shoot(x, kernel)
        out = torch.fft.fftshift(out, dim=(-2, -1))
        first = [b + 2 for b in before]
        out = out.roll([-f for f in first], (-2, -1))[..., : size[0], : size[1]]
        out = out.flip((-2, -1)) if self.upright else out
        return out if self.bias is None else out + self.bias

    def _shoot(self, x: Tensor, kernel: Tensor) -> Tensor:
        """Planes (B, C, h, w) and (M, C, h, w) -> (B, M, h, w), summed over the inputs behind the camera."""
        if self.split_inputs and self.pseudo_negativity and self.photons is None:
            # all shots are exact and their differences are linear: one sum before the second transform
            spectrum = torch.einsum("bchw,mchw->bmhw", torch.fft.fft2(x), torch.fft.fft2(kernel))
            return torch.fft.fft2(spectrum, norm="forward").real
        if self.split_inputs:
            positive, negative = signed_parts(x)
            return self._pairs(positive, kernel) - self._pairs(negative, kernel)
        return self._pairs(x, kernel)

    def _pairs(self, x: Tensor, kernel: Tensor) -> Tensor:
        x = x.unsqueeze(1)  # (B, 1, C, h, w) against (M, C, h, w)
        if not self.pseudo_negativity:
            return correlate(x, kernel).sum(2)
        return signed_shots(x, kernel, self.photons, self.as_published).sum(2)


def _centred(x: Tensor, plane: list[int]) -> Tensor:
    """Zeros around the last two axes, the odd one behind."""
    pad = []
    for side, p in zip(reversed(x.shape[-2:]), reversed(plane), strict=True):
        pad += [(p - side) // 2, p - side - (p - side) // 2]
    return F.pad(x, pad)


def tile(maps: Tensor, kernel_size: int, columns: int) -> Tensor:
    """Put maps (B, T, d, d) on one plane (B, rows * pitch, columns * pitch), kernel_size - 1 zeros behind each."""
    pitch, rows = maps.shape[-1] + kernel_size - 1, math.ceil(maps.shape[1] / columns)
    guard = kernel_size - 1
    cells = F.pad(maps, (0, guard, 0, guard, 0, rows * columns - maps.shape[1]))
    cells = cells.unflatten(1, (rows, columns)).transpose(2, 3)  # (B, rows, pitch, columns, pitch)
    return cells.reshape(-1, rows * pitch, columns * pitch)


def untile(plane: Tensor, count: int, side: int, kernel_size: int, columns: int) -> Tensor:
    """The valid part of each tile of a plane after a full convolution with a K x K kernel, cut to the plane's size.

    Returns (B, count, d - K + 1, d - K + 1) for maps of side d.
    """
    pitch = side + kernel_size - 1
    cells = plane.unflatten(-1, (columns, pitch)).unflatten(-3, (-1, pitch)).transpose(-3, -2)
    valid = slice(kernel_size - 1, side)
    return cells[..., valid, valid].flatten(1, 2)[:, :count]


def convolve_plane(plane: Tensor, weight: Tensor) -> Tensor:
    """A linear shot over planes (B, H, W) with one (K, K) kernel as deep learning turns it, cut to the plane's size."""
    size = weight.shape[-1]
    padded = F.pad(plane.unsqueeze(1), (size - 1, 0, size - 1, 0))
    return F.conv2d(padded, weight[None, None]).squeeze(1)


def maps_per_shot(side: int, kernel_size: int, modulator: tuple[int, int] = (2160, 3840)) -> int:
    """How many maps of a side, with their guard bands, a modulator of (height, width) pixels takes at once."""
    pitch = side + kernel_size - 1
    return (modulator[0] // pitch) * (modulator[1] // pitch)


@dataclass(frozen=True)
class Shots:
    """What one forward pass asks of the optics, and how its time compares with an electronic one.

    Attributes:
        count: shots in all.
        electronic_s: seconds that the electronic model takes.
        remainder_s: seconds of what stays electronic.
    """

    count: int
    electronic_s: float
    remainder_s: float = 0.0

    def seconds(self, rate: float) -> float:
        """Time of a pass at `rate` shots a second: the slower of modulator and camera sets it."""
        return self.count / rate + self.remainder_s

    def speedup(self, rate: float) -> float:
        """How many times faster than the electronic model; below 1 the optics lose."""
        return self.electronic_s / self.seconds(rate)

    def break_even_rate(self) -> float:
        """Shots a second from which the optics win; infinite where the remainder alone takes longer."""
        gain = self.electronic_s - self.remainder_s
        return self.count / gain if gain > 0 else math.inf


def count_shots(
    kernels: int,
    maps: int,
    side: int,
    kernel_size: int,
    modulator: tuple[int, int] = (2160, 3840),
    signed_kernels: bool = True,
    signed_inputs: bool = True,
) -> int:
    """Shots of one layer: each kernel over `maps` maps (tokens of all images of the batch), signs apart.

    Raises:
        ValueError: not even one map fits on the modulator.
    """
    room = maps_per_shot(side, kernel_size, modulator)
    if not room:
        raise ValueError(f"maps of {side}x{side} with {kernel_size}x{kernel_size} kernels do not fit on {modulator}")
    return kernels * (1 + signed_kernels) * (1 + signed_inputs) * math.ceil(maps / room)
