"""How the goldens of convshare_vit are computed."""

from __future__ import annotations

import math
from collections.abc import Callable

import golden
import torch
from torch import Tensor

from cases.common import Outputs
from vitalloy.backbones.convshare_vit import ConvAttention, SharedConv
from vitalloy.layers import optics
from vitalloy.layers.attention import Attend


def cropped(plane: Tensor) -> Tensor:
    """As the published layer reads its planes."""
    return torch.fft.fftshift(plane)[4:, 4:]


def signed_kernel(record: dict) -> Outputs:
    planes = golden.inputs_of(record)
    return {
        "out.signed": cropped(optics.signed_shots(planes["image"], planes["kernel"])),
        "out.magnitude": cropped(optics.correlate(planes["image"], planes["kernel"])),
    }


def correlator(record: dict) -> Outputs:
    planes = golden.inputs_of(record).values()
    closed, stepwise = optics.correlate(*planes), optics.Bench().propagate(*planes)
    assert torch.allclose(closed, stepwise, atol=1e-10)
    return {"out": stepwise}


def optical_conv(**kwargs: bool) -> Callable[[dict], Outputs]:
    def run(record: dict) -> Outputs:
        state, image = golden.state_of(record), golden.inputs_of(record)["image"]
        out_chans, in_chans, size, _ = state["kernel"].shape
        layer = optics.OpticalConv2d(in_chans, out_chans, size, **kwargs).double()
        layer.load_state_dict(state)
        assert sum(p.numel() for p in layer.parameters()) == record["params"]
        return {"out": layer(image)}

    return run


def tiled_plane(record: dict) -> Outputs:
    given = golden.inputs_of(record)
    maps, size = given["tokens"], given["weight"].shape[-1]
    columns = math.ceil(math.sqrt(maps.shape[1]))
    plane = optics.tile(maps, size, columns)
    out = optics.convolve_plane(plane, given["weight"])
    return {"out.plane": plane, "out.out": optics.untile(out, maps.shape[1], maps.shape[-1], size, columns)}


def shared(maps: Tensor, weight: Tensor, bias: Tensor | None = None, padding: str = "valid") -> Tensor:
    """Kernels that may fill a token of another width than the layer's, as (B, T, M, d', d')."""
    side, size = maps.shape[-1], weight.shape[-1]
    layer = SharedConv(side, 1, 1, size, "same").double()  # any kernel size
    layer.conv = torch.nn.Conv2d(1, len(weight), size, padding=padding).double()
    layer.load_state_dict({"conv.weight": weight, "conv.bias": weight.new_zeros(len(weight)) if bias is None else bias})
    out = side if padding == "same" else side - size + 1
    return layer(maps.flatten(2)).unflatten(-1, (-1, out, out))


def shared_depthwise(record: dict) -> Outputs:
    given = golden.inputs_of(record)
    maps, weight, bias = given["tokens"], given["weight"], given["bias"]
    return {
        "out.valid": shared(maps, weight, bias),
        "out.same": shared(maps, weight, bias, "same"),
        "out.full_support": shared(maps, given["full"]).flatten(2),
    }


class Recorded(Attend):
    """Keeps the attention weights."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None
    ) -> Tensor:
        self.attention = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)
        return super().forward(q, k, v, scale, bias)


def shared_attention(record: dict) -> Outputs:
    given = golden.inputs_of(record)
    maps, size = given["tokens"], given["wq"].shape[-1]
    side, heads = maps.shape[-1], record["outputs"]["out.attention"]["shape"][1]
    made = ConvAttention(SharedConv(side, 1, 3, size), torch.nn.Identity(), side * side, heads).double()
    made.attend = Recorded()
    weight = torch.cat([given["wq"], given["wk"], given["wv"]])
    made.qkv.load_state_dict({"conv.weight": weight, "conv.bias": weight.new_zeros(len(weight))})
    out = made(maps.flatten(2), (1, maps.shape[1]))
    return {"out.attention": made.attend.attention, "out.out": out}


CASES = {
    "fourf_correlator_20": correlator,
    "fourf_signed_kernel_16": signed_kernel,
    "optical_conv_k3": optical_conv(),
    "optical_conv_published_roll": optical_conv(published_roll=True),
    "shared_attention": shared_attention,
    "shared_depthwise": shared_depthwise,
    "tiled_plane": tiled_plane,
}
