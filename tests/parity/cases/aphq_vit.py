"""How the goldens of aphq_vit are computed."""

from __future__ import annotations

from collections.abc import Callable

import golden
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitalloy
from cases.common import Outputs
from vitalloy.backbones.vit import VisionTransformer
from vitalloy.compression.norm_folding import fold
from vitalloy.compression.quantization.aphq import search
from vitalloy.compression.quantization.aphq.adaround import AdaRound, BlockLoss, snap_inner
from vitalloy.compression.quantization.aphq.hessian import perturbation_hessian, unit_mean_square
from vitalloy.compression.quantization.aphq.mlp import mlp_loss, positive_percentile
from vitalloy.compression.quantizers import Uniform, asymmetric

BITS = 3
CALLS = (1, 19, 20, 40, 70, 100)
COUNTS = (1, 19, 20, 21, 50, 100)
Case = Callable[[dict], Outputs]


def ramp(y: Tensor) -> Tensor:
    """The loss whose gradients the records hold."""
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()


def uniform(bits: int, scale: float, zero_point: float, signed: bool) -> Case:
    @torch.enable_grad()
    def run(record: dict) -> Outputs:
        x = golden.inputs_of(record)["x"].requires_grad_()
        quantizer = Uniform(bits, x.new_tensor([scale]), x.new_tensor([zero_point]), signed).requires_grad_(True)
        ramp(y := snap_inner(quantizer, x)).backward()
        out = {"out.y": y, "out.grad_x": x.grad, "out.grad_scale": quantizer.scale.grad}
        return out if signed else {**out, "out.grad_zero_point": quantizer.zero_point.grad}

    return run


def rounding_of(weight: Tensor) -> AdaRound:
    """By row, between the least and the greatest value."""
    return AdaRound(asymmetric(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), BITS), weight)


def moved(rounding: AdaRound) -> AdaRound:
    alpha = rounding.alpha
    with torch.no_grad():
        alpha += torch.linspace(-2, 2, alpha.numel(), dtype=alpha.dtype).view_as(alpha)
    return rounding


@torch.enable_grad()
def adaround(record: dict) -> Outputs:
    weight = golden.inputs_of(record)["x"]
    rounding = rounding_of(weight)
    out = {"out.alpha": rounding.alpha.detach().clone(), "out.soft_init": rounding(weight).detach()}
    soft = moved(rounding)(weight)
    ramp(soft).backward()
    return {
        **out,
        "out.soft_targets": rounding.shares(),
        "out.soft_forward": soft,
        "out.grad_alpha": rounding.alpha.grad,
        "out.hard_forward": rounding.hard(),
        "out.hard_value": rounding.value(),
    }


def block_loss(distance: str) -> Case:
    def run(record: dict) -> Outputs:
        given = golden.inputs_of(record)
        loss, shares = BlockLoss(100, distance), [moved(rounding_of(given["w"])).shares()]
        hessian = given["grad"].mean(0, keepdim=True)
        losses, exponents = {}, {}
        for i in range(1, 101):
            losses[i] = loss(given["pred"] * (1 + 0.01 * i), given["tgt"], hessian, shares)
            exponents[i] = loss.exponent
        exponents = torch.tensor([exponents[i] for i in COUNTS], dtype=torch.float64)
        return {"out.losses": torch.stack([losses[i] for i in CALLS]), "out.b": exponents}

    return run


def mlp(record: dict) -> Outputs:
    given = golden.inputs_of(record)
    hessian = unit_mean_square(given["grad"].abs().mean(0, keepdim=True))
    shown = given["pred"], given["quant_out"], given["tgt"]
    return {
        "out.losses": torch.stack([mlp_loss(*shown, hessian), mlp_loss(*shown)]),
        "out.grad_normalised": hessian,
        "out.ub": torch.stack([positive_percentile(given["fc2_in"], share) for share in (0.99, 0.98, 0.5)]),
    }


def snapped(weight: Tensor, grids: search.Grids) -> Tensor:
    return search.Grids(*(v.view(-1, *[1] * (weight.ndim - 1)) for v in grids)).snap(weight, BITS)


def linear(groups: int = 1, relu: bool = False) -> Case:
    def run(record: dict) -> Outputs:
        state, x = golden.state_of(record), golden.inputs_of(record)["x"]
        x = x.relu() if relu else x
        weight, rows = state["fc.weight"], x.flatten(0, 1)
        of_input = search.activation_candidates(rows.flatten()[None], BITS)
        of_rows, inputs = search.search_linear(rows, weight, BITS, BITS)
        shape = (groups, len(weight) // groups, 1)
        return {
            "out.w_scale_candidates": search.spread_candidates(weight, BITS).scale.unflatten(1, shape),
            "out.a_scale_candidates": of_input.scale.mT,
            "out.a_zero_candidates": of_input.zero_point.mT,
            "out.w_scale": of_rows.scale.view(shape),
            "out.w_zero": of_rows.zero_point.view(shape),
            "out.a_scale": inputs.scale,
            "out.a_zero": inputs.zero_point,
            "out.y": F.linear(inputs.snap(x, BITS), snapped(weight, of_rows), state["fc.bias"]),
        }

    return run


def reparam(record: dict) -> Outputs:
    state, x = golden.state_of(record), golden.inputs_of(record)["x"]
    norm, layer = nn.LayerNorm(24).double(), nn.Linear(24, 20).double()
    nn.ModuleDict({"norm": norm, "fc": layer}).load_state_dict(state)
    channels = search.search_channels(norm(x).flatten(0, 1), BITS)
    fold(norm, [layer], *channels)
    x = norm(x)
    rows, inputs = search.search_linear(x.flatten(0, 1), layer.weight, BITS, BITS)
    return {
        "out.channel_scale": channels.scale,
        "out.channel_zero": channels.zero_point,
        "out.norm_weight": norm.weight,
        "out.norm_bias": norm.bias,
        "out.weight": layer.weight,
        "out.bias": layer.bias,
        "out.a_scale": inputs.scale,
        "out.a_zero": inputs.zero_point,
        "out.w_scale": rows.scale.view(1, -1, 1),
        "out.w_zero": rows.zero_point.view(1, -1, 1),
        "out.y_float": layer(x),
        "out.y_quant": F.linear(inputs.snap(x, BITS), snapped(layer.weight, rows), layer.bias),
    }


def product(softmax: bool) -> Case:
    def run(record: dict) -> Outputs:
        a, b = golden.inputs_of(record).values()
        a = a.softmax(-1) if softmax else a
        made = [search.Grids(*(v.view(1, -1, 1, 1) for v in g)) for g in search.search_product(a, b.mT, BITS)]
        return {
            "out.A_scale": made[0].scale,
            "out.B_scale": made[1].scale,
            "out.A_then_B_zero": torch.cat([made[0].zero_point, made[1].zero_point]),
            "out.y": made[0].snap(a, BITS) @ made[1].snap(b, BITS),
        }

    return run


def conv(record: dict) -> Outputs:
    state, x = golden.state_of(record), golden.inputs_of(record)["x"]
    weight = state["proj.weight"]
    patches = F.unfold(x, 4, stride=4).mT.flatten(0, 1)
    grids, _ = search.search_ranges(patches, weight.flatten(1), BITS, None)
    return {
        "out.w_scale": grids.scale[:, None],
        "out.w_zero": grids.zero_point[:, None],
        "out.y": F.conv2d(x, snapped(weight, grids), state["proj.bias"], stride=4),
    }


class Affine(nn.Module):
    """What the record has in the place of its norms."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


def hessian(record: dict) -> Outputs:
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=10).double()
    vitalloy.layers.sockets.replace(model, nn.LayerNorm, lambda name, norm: Affine(norm))
    model.load_state_dict(golden.state_of(record))
    assert sum(p.numel() for p in model.parameters()) == record["params"]
    model.eval().requires_grad_(False)
    images = golden.inputs_of(record)["images"]
    out = {"softmax": (model(images) / 20).softmax(-1)}
    for name in ("patch_embed", "blocks.0", "blocks.1"):
        layer = model.patch_embed.proj if name == "patch_embed" else model.get_submodule(name)
        found = perturbation_hessian(model, layer, images, "ones", batch_size=4)
        out[f"block.{name}"] = found.flatten(2).mT if found.ndim == 4 else found
    for name in ("blocks.0", "blocks.1"):
        layer = model.get_submodule(f"{name}.mlp")
        out[f"mlp.{name}"] = unit_mean_square(perturbation_hessian(model, layer, images, "ones", batch_size=4))
    return out


CASES = {
    "adaround": adaround,
    "block_loss_hessian_perturb": block_loss("hessian"),
    "block_loss_kl_div": block_loss("kl"),
    "block_loss_mse": block_loss("mse"),
    "calib_conv": conv,
    "calib_linear": linear(),
    "calib_linear_post_relu": linear(relu=True),
    "calib_linear_qkv": linear(groups=3),
    "calib_matmul_qk": product(softmax=False),
    "calib_matmul_softmax": product(softmax=True),
    "calib_reparam": reparam,
    "mlp_loss": mlp,
    "perturbation_hessian": hessian,
    "uniform_asym": uniform(3, 0.31, 3.4, signed=False),
    "uniform_sym": uniform(4, 0.21, 0.0, signed=True),
}
