from __future__ import annotations

import copy
import logging

import numpy as np
import onnx
import pytest
import torch
from export_samples import pictures
from torch import nn

from vitalloy.deployment import OnnxModel, export_onnx, quantize_onnx, verify_onnx
from vitalloy.errors import ExportError


def weights_in_float(path) -> int:
    """Values of matrices that a quantized graph still holds in float."""
    graph = onnx.load(path).graph
    return sum(
        int(np.prod(w.dims)) for w in graph.initializer if w.data_type == onnx.TensorProto.FLOAT and len(w.dims) > 1
    )


def cosine(model, session, images) -> float:
    """Likeness of the logits' deviations from their mean image: a constant output scores 0."""
    with torch.no_grad():
        ours = copy.deepcopy(model).eval()(images)
    theirs = session(images)
    return torch.cosine_similarity((ours - ours.mean(0)).flatten(), (theirs - ours.mean(0)).flatten(), dim=0).item()


def test_weights_become_int8_and_answers_stay(exported, tmp_path, capfd):
    _, model, export = exported
    root = logging.getLogger()
    handlers = list(root.handlers)
    result = quantize_onnx(export.path, tmp_path / "q.onnx", [pictures(16, 1), (pictures(8, 2), "labels")])
    assert capfd.readouterr() == ("", "") and root.handlers == handlers
    assert result.quantized == result.weighted > 5 and result.calibration_images == 24
    assert result.fp32_size_bytes == export.size_bytes and result.size_bytes == result.path.stat().st_size
    assert result.size_bytes < 0.31 * export.size_bytes
    assert weights_in_float(result.path) < 0.02 * sum(p.numel() for p in model.parameters())
    assert list(tmp_path.iterdir()) == [result.path]
    session = OnnxModel(result.path)
    assert cosine(model, session, pictures(24, 3)) > 0.98
    assert verify_onnx(model, session, [pictures(1, 4), pictures(5, 5)], tolerance=None).images == 6


@pytest.mark.parametrize("exported", ["deit_tiny_patch16_224"], indirect=True)
def test_attention_and_the_results_of_products_stay_float(exported, tmp_path):
    _, _, export = exported
    graph = onnx.load(quantize_onnx(export.path, tmp_path / "q.onnx", [pictures(4)]).path).graph
    made = {name: node.op_type for node in graph.node for name in node.output}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    attention = [n for n in products if all(made.get(name) != "DequantizeLinear" for name in n.input)]
    assert len(attention) == 2 * 2  # two products a block
    assert len(products) == 4 * 2 + len(attention)  # qkv, proj and the MLP's two a block
    after = {name for node in graph.node if node.op_type == "QuantizeLinear" for name in node.input}
    assert not any(name in after for node in products for name in node.output)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "percentile"},
        {"method": "entropy"},
        {"per_channel": False},
        {"dynamic_products": True},
        {"reduce_range": True},
    ],
    ids=str,
)
def test_every_option_gives_a_file_that_answers_alike(options, net, tmp_path):
    model, path = net
    result = quantize_onnx(path, tmp_path / "q.onnx", [pictures(7, 1), pictures(4, 2)], **options)
    assert result.quantized == result.weighted == 3 and list(tmp_path.iterdir()) == [result.path]
    assert cosine(model, OnnxModel(result.path), pictures(16, 3)) > 0.97
    weights = [w for w in onnx.load(result.path).graph.initializer if w.data_type == onnx.TensorProto.INT8]
    largest = max(int(abs(onnx.numpy_helper.to_array(w).astype(int)).max()) for w in weights if len(w.dims) > 1)
    assert largest <= (64 if options.get("reduce_range") else 128) and largest > 50


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(16 * 49, 5),
    ).eval()
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    export_onnx(model, pictures(1), path)
    return model, path


def test_excluded_nodes_stay_float(net, tmp_path):
    _, path = net
    first = next(node.name for node in onnx.load(path).graph.node if node.op_type == "Conv")
    result = quantize_onnx(path, tmp_path / "q.onnx", [pictures(4)], exclude=[first])
    assert (result.quantized, result.weighted) == (2, 3)
    everything = [node.name for node in onnx.load(path).graph.node]
    before = result.path.read_bytes()
    with pytest.raises(ExportError, match="every node excluded"):
        quantize_onnx(path, result.path, [pictures(4)], exclude=everything)
    assert result.path.read_bytes() == before


def test_a_file_of_fixed_batch_size_takes_batches_of_any(net, tmp_path):
    model, _ = net
    export = export_onnx(model, pictures(4), tmp_path / "four.onnx", dynamic_batch=False)
    result = quantize_onnx(export.path, tmp_path / "q.onnx", [pictures(10)])
    assert result.calibration_images == 8  # the two left over do not fill a batch
    with pytest.raises(ExportError, match="at least one full batch"):
        quantize_onnx(export.path, tmp_path / "q.onnx", [pictures(3)])


def test_misuse_is_named_and_leaves_the_old_file(net, tmp_path):
    _, path = net
    target = tmp_path / "q.onnx"
    target.write_bytes(b"old")
    with pytest.raises(ExportError, match="calibration method 'mean'"):
        quantize_onnx(path, target, [pictures(2)], method="mean")
    with pytest.raises(ExportError, match="without calibration images"):
        quantize_onnx(path, target, [])
    with pytest.raises(ExportError, match=r"\(2, 3, 16, 16\) do not fit net.onnx, which takes \(any, 3, 32, 32\)"):
        quantize_onnx(path, target, [torch.zeros(2, 3, 16, 16)])
    with pytest.raises(ExportError, match="do not fit"):
        quantize_onnx(path, target, [pictures(2), torch.zeros(2, 3, 16, 16)])
    with pytest.raises(ExportError, match="no ONNX file"):
        quantize_onnx(tmp_path / "missing.onnx", target, [pictures(2)])
    with pytest.raises(ExportError, match="not a readable"):
        quantize_onnx(target, tmp_path / "r.onnx", [pictures(2)])
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]
    quantize_onnx(path, target, [pictures(2)])
    with pytest.raises(ExportError, match="already quantized"):
        quantize_onnx(target, tmp_path / "r.onnx", [pictures(2)])


def test_every_calibration_image_counts(tmp_path):
    """Ranges come from all batches: the one bright batch is the first of many dark ones."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 5)
    ).eval()
    dark = [0.01 * pictures(1, seed) for seed in range(31)]
    bright = 4 * pictures(4, 99)
    export = export_onnx(model, bright[:2], tmp_path / "m.onnx")
    result = quantize_onnx(export.path, tmp_path / "q.onnx", [bright[:1], *dark])
    assert result.calibration_images == 32
    assert cosine(model, OnnxModel(result.path), bright) > 0.98


def test_a_layer_called_twice_is_quantized_once(tmp_path):
    """The exporter leaves the weight of a shared layer behind a transposition, which no quantizer looks through."""

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.head = torch.nn.Linear(1024, 1024), torch.nn.Linear(1024, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = x.flatten(2)  # (B, 3, 1024)
            return self.head(self.wide(self.wide(rows).relu()).mean(1))

    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    whole = export_onnx(Twice(), images[:2], tmp_path / "float.onnx").path
    made = quantize_onnx(whole, tmp_path / "int8.onnx", [images])
    assert made.quantized == made.weighted == 3
    assert made.size_bytes < 0.6 * made.fp32_size_bytes
