from __future__ import annotations

import collections

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import vitalloy
from vitalloy.compression.calibration import prepared, record
from vitalloy.compression.quantizers import Uniform, asymmetric, symmetric
from vitalloy.compression.simulated import simulate
from vitalloy.deployment import OnnxModel, export_onnx, export_qdq
from vitalloy.errors import ExportError

SMALL = {
    "vit_nano": {"depth": 1},
    "cvt_nano": {},
    "efficientformer_nano": {},
}


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def quantized(model: nn.Module, weights: int, activations: int, attention: bool = False) -> nn.Module:
    """Every layer on grids of minima and maxima."""
    model = prepared(model).requires_grad_(False)
    layers, images = simulate(model), pictures(8)
    seen = record(model, layers.values(), images)
    for layer, saw in seen.items():
        if hasattr(layer, "weight_quantizer"):
            layer.weight_quantizer = symmetric(layer.weight, weights, tuple(range(1, layer.weight.ndim)))
            layer.input_quantizer = asymmetric(saw.inputs[0].amin(), saw.inputs[0].amax(), activations)
        elif attention:
            for place, factor in zip(("query", "key", "value"), saw.inputs, strict=True):
                setattr(layer, f"{place}_quantizer", symmetric(factor, activations))
            layer.map_quantizer = asymmetric(torch.tensor(0.0), torch.tensor(1.0), activations)
    return model


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.GELU(), nn.Flatten(), nn.Linear(784, 5)
    )


def kernels(path, tmp_path) -> collections.Counter:
    """The operators that ONNX Runtime really runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    onnxruntime.InferenceSession(str(path), options)
    return collections.Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)


def layer_ends(graph) -> dict[str, tuple[str, str, tuple[str, str] | None]]:
    """For each layer with an integer weight the tensors that hold its rounded input and its result with bias, and the
    step and zero point of that result where it is rounded."""
    makers = {name: node for node in graph.node for name in node.output}
    users = {name: [node for node in graph.node if name in node.input] for name in makers}
    ends = {}
    for node in graph.node:
        weight = makers.get(node.input[1]) if node.op_type in ("MatMul", "Gemm", "Conv") else None
        if weight is None or weight.op_type != "DequantizeLinear" or ".codes" not in weight.input[0]:
            continue
        result, grid = node.output[0], None
        if node.op_type == "MatMul" and users[result][0].op_type == "Add":
            result = users[result][0].output[0]
        elif node.op_type == "Conv":
            (rounding,) = users[result]
            assert rounding.op_type == "QuantizeLinear"
            result, grid = users[rounding.output[0]][0].output[0], tuple(rounding.input[1:])
        ends[weight.input[0].split(".weight_quantizer")[0]] = (node.input[0], result, grid)
    return ends


@pytest.mark.parametrize(("name", "bits"), [("vit_nano", 8), ("cvt_nano", 8), ("efficientformer_nano", 4)])
def test_every_layer_computes_what_its_simulation_computes(name, bits, tmp_path):
    """Each layer of the file, given the input that the file gave it: the same product, or half a step of its result
    away where the result is rounded for an integer convolution."""
    torch.manual_seed(0)
    model = quantized(vitalloy.create_model(name, num_classes=10, img_size=32, **SMALL[name]), bits, 8)
    done = export_qdq(model, pictures(2), tmp_path / "q.onnx", calibration=pictures(8))
    file = onnx.load(done.path)
    ends = layer_ends(file.graph)
    assert set(ends) == set(done.integer) and len(ends) > 4
    have = {output.name for output in file.graph.output}
    for tensor in {tensor for given, result, _ in ends.values() for tensor in (given, result)} - have:
        file.graph.output.append(helper.make_empty_tensor_value_info(tensor))
    constants = {w.name: float(numpy_helper.to_array(w)) for w in file.graph.initializer if not w.dims}
    session = onnxruntime.InferenceSession(file.SerializeToString())
    values = session.run(None, {"image": pictures(8).numpy()})
    values = {output.name: torch.from_numpy(value) for output, value in zip(session.get_outputs(), values, strict=True)}
    for layer, (given, result, grid) in ends.items():
        module, x = model.get_submodule(layer), values[given]
        assert (module.input_quantizer(x) - x).abs().max() <= 1e-5 * x.abs().max(), layer
        module.input_quantizer = nn.Identity()
        expected = module(x)
        allowed = 1e-5 * expected.abs().max()
        if grid is not None:
            step, zero_point = (constants[name] for name in grid)
            expected = expected.clamp(-zero_point * step, (255 - zero_point) * step)
            allowed = 0.6 * step  # half for the result, the rest for its bias in 32-bit integers
        assert (values[result] - expected).abs().max() <= allowed, layer


def test_four_bits_are_stored_in_four_bits_and_computed_exactly(tmp_path):
    torch.manual_seed(0)
    model = vitalloy.create_model("vit_nano", num_classes=10, img_size=32, depth=1)
    whole = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    model = quantized(model, 4, 6, attention=True)
    done = export_qdq(model, pictures(2), tmp_path / "q.onnx")
    assert done.simulated == () and len(done.integer) == 7
    packed = [w for w in onnx.load(done.path).graph.initializer if w.data_type == TensorProto.INT4]
    assert len(packed) == 6 and sum(len(w.raw_data) for w in packed) < 0.5 * whole
    with torch.no_grad():
        expected = model(pictures(8, 1))
    assert (OnnxModel(done.path)(pictures(8, 1)) - expected).abs().max() < 1e-4 * expected.std()
    ran = kernels(done.path, tmp_path)
    assert ran["MatMulIntegerToFloat"] + ran["QLinearMatMul"] == 6 and ran["QGemm"] == 1


def test_convolutions_run_on_integers_once_their_results_are_rounded(tmp_path):
    model = quantized(net(), 8, 8)
    exact = export_qdq(model, pictures(2), tmp_path / "exact.onnx")
    fast = export_qdq(model, pictures(2), tmp_path / "fast.onnx", calibration=pictures(8))
    assert kernels(exact.path, tmp_path)["QLinearConv"] == 1  # the first: the second's own grid rounds its result
    assert kernels(fast.path, tmp_path)["QLinearConv"] == 2
    with torch.no_grad():
        expected = model(pictures(8))
    assert (OnnxModel(exact.path)(pictures(8)) - expected).abs().max() < 0.02 * expected.std()
    assert (OnnxModel(fast.path)(pictures(8)) - expected).abs().max() < 0.1 * expected.std()
    assert exact.size_bytes < 0.4 * export_onnx(net().eval(), pictures(2), tmp_path / "float.onnx").size_bytes


class Cubes(nn.Module):
    """A grid that ONNX does not know."""

    bits = 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 8).round() ** 3 / 512


@pytest.mark.parametrize(
    "grid",
    [
        Cubes(),
        Uniform(12, 0.001, signed=True),
        Uniform(8, torch.full((3, 1, 1), 0.02), 100.0),
        Uniform(8, 0.02, -40.0),
        nn.Identity(),
    ],
    ids=["cubes", "12 bits", "a step a channel", "0 is no code", "float"],
)
def test_other_grids_stay_exact_and_are_named(grid, tmp_path):
    model = quantized(net(), 8, 8)
    model[0].input_quantizer = grid
    done = export_qdq(model, pictures(2), tmp_path / "q.onnx")
    assert done.simulated == ("0",) and done.integer == ("2", "5")
    with torch.no_grad():
        expected = model(pictures(8))
    assert (OnnxModel(done.path)(pictures(8)) - expected).abs().max() < 0.02 * expected.std()
    with pytest.raises(ExportError, match="layer 0"):
        export_qdq(model, pictures(2), tmp_path / "strict.onnx", strict=True)
    assert not (tmp_path / "strict.onnx").exists()


def test_weights_off_centre_are_shifted(tmp_path):
    model = quantized(net(), 8, 8)
    weight = model[5].weight
    model[5].weight_quantizer = asymmetric(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True) * 2, 8)
    done = export_qdq(model, pictures(2), tmp_path / "q.onnx")
    assert done.integer == ("0", "2", "5")
    with torch.no_grad():
        expected = model(pictures(8))
    assert (OnnxModel(done.path)(pictures(8)) - expected).abs().max() < 0.02 * expected.std()


def test_a_float_model_is_refused(tmp_path):
    with pytest.raises(ExportError, match="no layer with quantizers"):
        export_qdq(net(), pictures(2), tmp_path / "q.onnx")
