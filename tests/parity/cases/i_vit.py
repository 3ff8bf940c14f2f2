"""How the goldens of i_vit are computed."""

from __future__ import annotations

import re

import golden
import torch
from torch import Tensor, nn

import vitalloy
from cases.common import Outputs
from vitalloy.compression.quantization.i_vit import arithmetic, convert, deployed, layers


def pair(record: dict, q: str = "q", scale: str = "scale") -> tuple[Tensor, Tensor]:
    """An integer input of a record and its scale, as a pair (value, scale)."""
    steps = torch.tensor(record["constants"][scale], dtype=torch.float64).reshape(-1)
    return golden.inputs_of(record)[q] * steps, steps


def state(record: dict, prefix: str) -> dict[str, nn.Parameter]:
    found = golden.state_of(record)
    return {name: nn.Parameter(found[f"{prefix}.{name}"]) for name in ("weight", "bias")}


def shiftmax(record: dict) -> Outputs:
    constants = record["constants"]
    exponential, out, scale = arithmetic.shiftmax(*pair(record), constants["output_bit"], constants["n"])
    return {"out.exp_int": exponential, "out.q_out": out, "out.scale_out": scale}


def shiftgelu(record: dict) -> Outputs:
    constants = record["constants"]
    out, scale = arithmetic.shift_gelu(*pair(record), constants["output_bit"], constants["n"])
    return {"out.q_out": out, "out.scale_out": scale, "out.real": out * scale}


def i_layernorm(record: dict) -> Outputs:
    out, bias, scale = arithmetic.layer_norm(*pair(record), **state(record, "norm"))
    return {"out.q_out": out, "out.bias_integer": bias, "out.scale_out": scale, "out.real": out * scale}


def requant(record: dict) -> Outputs:
    constants, residual = record["constants"], "s_id" in record["constants"]
    (x, scale), target = pair(record, scale="sx"), torch.tensor([constants["sz"]], dtype=torch.float64)
    identity = pair(record, "q_id", "s_id") if residual else ()
    mantissa, shift = arithmetic.dyadic((scale / target).view(1, 1, -1))
    out = arithmetic.requantize(x, scale, target, constants["bits"], *identity)
    return {"out.q_out": out, "out.mantissa": mantissa, "out.shift": shift}


def weighted(record: dict, layer: layers.QuantLinear | layers.QuantConv) -> Outputs:
    x = pair(record)
    value, scale = layer(x)
    weight, bias, steps = layer.constants(x[1])
    outputs = {"acc_int": value / scale, "weight_integer": weight, "bias_integer": bias, "scale_out": steps}
    return {f"out.{k}": v for k, v in (outputs | {"weight_scale": layer.weight_scale()}).items()}


def matmul(record: dict) -> Outputs:
    value, scale = layers.QuantMatMul()(pair(record, "a", "sa"), pair(record, "b", "sb"))
    return {"out.acc_int": value / scale, "out.scale_out": scale}


def running(record: dict) -> Outputs:
    act, outputs = layers.QuantAct(8).double(), {}
    inputs = golden.inputs_of(record)
    for i, x in enumerate(inputs.values()):
        value, scale = act(x)
        outputs |= {f"out.q{i}": value / scale, f"out.scale{i}": scale}
    act.running = False
    value, scale = act(inputs["x1"])
    return outputs | {"out.frozen_q": value / scale, "out.frozen_scale": scale}


def mlp_gradients(record: dict) -> Outputs:
    fc1, fc2 = (layers.QuantLinear(**state(record, name)) for name in ("fc1", "fc2"))
    parts = nn.Sequential(
        fc1, layers.QuantAct(8), layers.ShiftGate(word=31), layers.QuantAct(8), fc2, layers.QuantAct(16)
    )
    x, step = pair(record)
    with torch.enable_grad():
        value, scale = parts.double()((x.requires_grad_(), step))
        (value * golden.inputs_of(record)["coeff"]).sum().backward()
    gradients = {f"out.grad_{n}_{k}": p.grad for n, m in (("fc1", fc1), ("fc2", fc2)) for k, p in m.named_parameters()}
    return {"out.y": value.detach(), "out.scale_out": scale, "out.grad_x": x.grad, **gradients}


def deployed_shiftmax(record: dict) -> Outputs:
    constants = record["constants"]
    exponential, out = deployed.deployed_shiftmax(
        golden.inputs_of(record)["q"], constants["scale"], constants.get("n", 16)
    )
    return {"out.exp_int": exponential, "out.q_out": out}


def deployed_layer_norm(record: dict) -> Outputs:
    out, root = deployed.deployed_layer_norm(
        **{{"bias_int": "bias"}.get(k, k): v for k, v in golden.inputs_of(record).items()}
    )
    return {"out.q_out": out, "out.std": root}


PATHS = (  # the authors' activation grids -> ours
    (r"^qact_input$", "image_act"),
    (r"^qact_pos$", "pos_embed_act"),
    (r"^patch_embed\.(?:qact|qact_before_norm)$", "patch_embed.proj.conv2d_act"),
    (r"^qact1$", "add_act"),
    (r"\.mlp\.qact_gelu$", ".mlp.fc1.linear_act"),
    (r"\.mlp\.qact1$", ".mlp.act.gelu_act"),
    (r"\.mlp\.qact2$", ".mlp.fc2.linear_act"),
    (r"\.attn\.qact1$", ".attn.qkv.linear_act"),
    (r"\.attn\.qact_attn1$", ".attn.attend.logits_act"),
    (r"\.attn\.(?:int|log_int)_softmax$", ".attn.attend.softmax"),
    (r"\.qact1$", ".norm1.layer_norm_act"),
    (r"\.qact2$", ".add_act"),
    (r"\.qact3$", ".norm2.layer_norm_act"),
    (r"\.qact4$", ".add_act_1"),
)
DEIT = (
    (r"\.attn\.qact2$", ".attn.attend.scaled_dot_product_attention_act"),
    (r"\.attn\.qact3$", ".attn.proj.linear_act"),
    (r"^qact2$", "pool.select_act"),
)
SWIN = (
    (r"\.downsample\.qact1$", ".downsample.norm.layer_norm_act"),
    (r"\.downsample\.qact2$", ".downsample.reduction.linear_act"),
    (r"^patch_embed\.qact$", "patch_embed.norm.layer_norm_act"),
    (r"^qact1$", None),  # the same grid a second time
    (r"\.attn\.qact_table$", ".attn.attend_bias_act"),
    (r"\.attn\.qact2$", ".attn.attend_sum_act"),
    (r"\.attn\.qact3$", ".attn.attend.scaled_dot_product_attention_act"),
    (r"\.attn\.qact4$", ".attn.proj.linear_act"),
    (r"^qact2$", "norm.layer_norm_act"),
    (r"^qact3$", "pool.mean_act"),
)


def path_in(rows: tuple, name: str) -> str | None:
    """Our name of a grid; theirs merges patches at the end of a level, ours at the start of the next."""
    name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", name)
    pattern, ours = next((p, o) for p, o in (*rows, *PATHS) if re.search(p, name))
    return ours and re.sub(pattern, ours, name)


def in_their_order(whole: Tensor, shape: list[int]) -> Tensor:
    """Channels last, heads merged and maps flattened, as the authors' grids see them."""
    if whole.ndim == 4 and whole.numel() == torch.Size(shape).numel() and list(whole.shape) != shape:
        if whole.shape[1] == shape[-1]:  # a convolution's map
            return whole.flatten(2).mT
        if whole.shape[-1] != shape[-1]:  # heads
            return whole.transpose(1, 2).flatten(2)
    return whole.reshape(shape)


def whole(record: dict, name: str, rows: tuple, softmax_bits: int, **arguments: object) -> Outputs:
    model = vitalloy.create_model(name, **arguments).double().eval()
    vitalloy.load_checkpoint(model, golden.state_of(record))
    assert sum(p.numel() for p in model.parameters()) == record["params"]
    image = golden.inputs_of(record)["image"]
    made = convert(model, image, softmax_bits=softmax_bits, as_published=True)
    grids = {n: m for n, m in made.named_modules() if isinstance(m, layers.QuantAct)}
    for theirs, scale in record["scales"].items():
        if ours := path_in(rows, theirs):
            grids.pop(ours).set_scale(scale)
    assert not grids, f"grids that the authors do not have: {sorted(grids)}"
    outputs: Outputs = {}

    def keep(wanted: str, shape: list[int]):
        def hook(_module, _inputs, pair):
            outputs[wanted] = in_their_order(pair[0] / pair[1], shape)

        return hook

    for wanted, expected in record["outputs"].items():
        if wanted != "logits" and (ours := path_in(rows, wanted)):
            made.get_submodule(ours).register_forward_hook(keep(wanted, expected["shape"]))
    outputs["logits"] = made(image)
    if "qact1" not in outputs:
        outputs["qact1"] = outputs["patch_embed.qact"]  # the same grid twice, which is once here
    return outputs


SWIN_MINI = {"num_classes": 100, "img_size": 112, "embed_dim": 32, "depths": (2, 2, 2), "num_heads": (1, 2, 4)}

CASES = {
    "shiftmax16": shiftmax,
    "shiftmax8": shiftmax,
    "shiftgelu": shiftgelu,
    "shiftgelu_negative_rows": shiftgelu,
    "i_layernorm": i_layernorm,
    "requant8": requant,
    "requant16_residual": requant,
    "quant_linear": lambda record: weighted(record, layers.QuantLinear(**state(record, "fc"))),
    "quant_conv": lambda record: weighted(
        record, layers.QuantConv(**state(record, "proj"), stride=[4, 4], padding=[0, 0], dilation=[1, 1], groups=1)
    ),
    "quant_matmul": matmul,
    "quant_act_running": running,
    "mlp_ste_grad": mlp_gradients,
    "int32_shiftmax8": deployed_shiftmax,
    "int32_i_layernorm": deployed_layer_norm,
    "deit_tiny_w8a8": lambda record: whole(record, "deit_tiny_patch16_224", DEIT, 16),
    "swin_mini_w8a8": lambda record: whole(record, "swin_tiny_patch4_window7_224", SWIN, 8, **SWIN_MINI),
}
