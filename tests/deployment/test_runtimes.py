from __future__ import annotations

import importlib.util
import sys
from collections import Counter

import onnx
import pytest
import torch
from torch import nn

from vitalloy.compression.calibration import prepared, record
from vitalloy.compression.quantizers import asymmetric, symmetric
from vitalloy.compression.simulated import simulate
from vitalloy.deployment import (
    OnnxModel,
    OpenVinoModel,
    compile_int8,
    export_onnx,
    export_qdq,
    quantize_dynamic,
    quantize_openvino,
)
from vitalloy.errors import ExportError
from vitalloy.layers.attention import SelfAttention

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
needs_nncf = pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="nncf is not installed")
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


class Tokens(nn.Module):
    """Patches, one attention, one classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.attention, self.head = nn.Conv2d(3, 32, 8, 8), SelfAttention(32, 4), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).mT
        return self.head((tokens + self.attention(tokens)).mean(1))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Tokens().eval()


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    return export_onnx(model, pictures(2), tmp_path_factory.mktemp("float") / "float.onnx").path


def answers(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images)


class Maps(nn.Module):
    """Linear layers on maps between two permutations, as hybrid backbones have them, and one that must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.narrow = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 24), nn.Linear(24, 8, bias=False)
        self.gain, self.other = nn.Parameter(torch.rand(8)), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        last = self.narrow(nn.functional.gelu(self.wide(x.permute(0, 2, 3, 1)))) * self.gain
        x = x + last.permute(0, 3, 1, 2)
        mixed = self.other(x.permute(0, 2, 3, 1)).softmax(-1)  # no map of each channel to channels
        return (x + mixed.permute(0, 3, 1, 2)).mean((2, 3))


def test_perceptrons_on_maps_become_convolutions(tmp_path):
    torch.manual_seed(0)
    model = Maps().eval()
    path = export_onnx(model, pictures(2), tmp_path / "maps.onnx").path
    operators = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert operators["Conv"] == 3 and operators["MatMul"] == 1 and operators["Transpose"] == 2
    assert torch.allclose(OnnxModel(path)(pictures(3)), answers(model, pictures(3)), atol=1e-5)


@needs_openvino
def test_openvino_runs_a_float_file_at_every_batch_size(model, whole):
    session = OpenVinoModel(whole)
    for count in (1, 3, 1):
        assert torch.allclose(session(pictures(count)), answers(model, pictures(count)), atol=1e-4)
    assert session.batch is None
    with pytest.raises(ExportError, match=r"takes images of shape \(batch, 3, 32, 32\)"):
        session(torch.zeros(1, 3, 16, 16))


@needs_nncf
def test_openvino_int8_has_integer_weights_and_like_answers(model, whole, tmp_path, capfd):
    done = quantize_openvino(whole, tmp_path / "int8.xml", [pictures(16, 1), (pictures(8, 2), "labels")])
    assert capfd.readouterr() == ("", "")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["int8.bin", "int8.xml"]
    assert done.quantized == done.weighted == 4 and done.calibration_images == 24
    assert done.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    images = pictures(16, 3)
    ours, theirs = answers(model, images), OpenVinoModel(done.path)(images)
    off = ours.mean(0)
    assert torch.cosine_similarity((ours - off).flatten(), (theirs - off).flatten(), dim=0) > 0.98


@needs_openvino
def test_openvino_runs_our_own_scales(model, tmp_path):
    own = prepared(model).requires_grad_(False)
    layers = simulate(own)
    for layer, saw in record(own, layers.values(), pictures(8)).items():
        if hasattr(layer, "weight_quantizer"):
            layer.weight_quantizer = symmetric(layer.weight, 4, tuple(range(1, layer.weight.ndim)))
            layer.input_quantizer = asymmetric(saw.inputs[0].amin(), saw.inputs[0].amax(), 8)
    done = export_qdq(own, pictures(2), tmp_path / "q.onnx")
    expected = answers(own, pictures(8))
    assert (OpenVinoModel(done.path)(pictures(8)) - expected).abs().max() < 0.05 * expected.std()


@needs_nncf
def test_misuse_of_openvino_is_named(whole, tmp_path):
    with pytest.raises(ExportError, match=r"does not end in \.xml"):
        quantize_openvino(whole, tmp_path / "int8.onnx", [pictures(2)])
    with pytest.raises(ExportError, match="no ONNX file"):
        quantize_openvino(tmp_path / "missing.onnx", tmp_path / "int8.xml", [pictures(2)])
    with pytest.raises(ExportError, match="without calibration images"):
        quantize_openvino(whole, tmp_path / "int8.xml", [])
    with pytest.raises(ExportError, match="no model file"):
        OpenVinoModel(tmp_path / "missing.xml")
    with pytest.raises(ExportError, match="no precision 'int8'"):
        OpenVinoModel(whole, precision="int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("extra", ["openvino", "torchao"])
def test_a_missing_extra_says_how_to_install_it(extra, model, whole, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == extra]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(ExportError, match=rf"pip install 'vitalloy\[{extra}\]'"):
        if extra == "openvino":
            quantize_openvino(whole, tmp_path / "int8.xml", [pictures(2)])
        else:
            compile_int8(model, pictures(2))


@needs_torchao
def test_without_a_compiler_inductor_says_so(model, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ExportError, match="C\\+\\+ compiler"):
        compile_int8(model, pictures(2))


@needs_torchao
@pytest.mark.slow
def test_inductor_int8_answers_alike():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 5)).eval()
    run = compile_int8(model, pictures(8))
    ours, theirs = answers(model, pictures(1, 3)), run(pictures(1, 3))
    assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.99
    assert not torch.equal(ours, theirs)  # it did round


@needs_torchao
def test_torchao_int8_answers_alike_and_leaves_the_model_alone(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = quantize_dynamic(model)
    ours, theirs = answers(model, pictures(6)), run(pictures(6))
    assert torch.cosine_similarity(ours - ours.mean(0), theirs - theirs.mean(0)).min() > 0.98
    assert not torch.equal(ours, theirs)  # it did round
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ExportError, match="no linear layer"):
        quantize_dynamic(nn.Conv2d(3, 8, 3))


@needs_nncf
def test_openvino_turns_depthwise_weights_into_integers(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Flatten()).eval()
    export_onnx(model, pictures(2), tmp_path / "float.onnx")
    made = quantize_openvino(tmp_path / "float.onnx", tmp_path / "int8.xml", [pictures(8)])
    assert made.quantized == made.weighted == 2
