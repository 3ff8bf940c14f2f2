from __future__ import annotations

import logging
import warnings

import numpy as np
import onnx
import pytest
import torch
from export_samples import pictures
from torch import nn

from vitalloy.deployment import OnnxModel, export_onnx, verify_onnx
from vitalloy.errors import ExportError


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))  # images of 8 x 8


def test_one_file_computes_what_the_model_computes_for_any_batch(exported):
    _, model, export = exported
    result = verify_onnx(model, export.path, [pictures(1, 1), pictures(3, 2), (pictures(6, 3), "labels")])
    assert result.images == 10 and result.agreement == 1 and result.max_abs_diff < 1e-3
    graph = onnx.load(export.path)
    assert [entry.name for entry in graph.graph.input] == ["image"]
    assert [entry.name for entry in graph.graph.output] == ["logits"]
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert export.opset >= 18 and export.size_bytes == export.path.stat().st_size
    assert list(export.path.parent.iterdir()) == [export.path]  # weights inside, nothing left behind
    weights = sum(p.numel() for p in model.parameters()) * 4
    assert weights * 0.95 < export.size_bytes < weights * 1.15
    assert b".py" not in export.path.read_bytes()  # no stack traces of this machine


def test_training_flags_come_back(exported):
    _, model, _ = exported
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert model.training and not any(module.training for module in norms)
    assert sum(module.training for module in model.modules()) == len(list(model.modules())) - len(norms)


def test_export_is_quiet_and_can_be_of_one_batch_size(tmp_path, capfd):
    root = logging.getLogger()
    handlers, disabled = list(root.handlers), root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export = export_onnx(small(), torch.zeros(2, 3, 8, 8), tmp_path / "a.onnx", opset=18, dynamic_batch=False)
    assert capfd.readouterr() == ("", "")
    assert root.handlers == handlers and root.manager.disable == disabled
    session = OnnxModel(export.path)
    assert export.opset == 18 and session.batch == 2 and session(np.zeros((2, 3, 8, 8))).shape == (2, 5)
    with pytest.raises(ExportError, match=r"\(2, 3, 8, 8\), not \(3, 3, 8, 8\)"):
        session(torch.zeros(3, 3, 8, 8))


def test_a_file_of_another_model_does_not_pass(tmp_path):
    torch.manual_seed(0)
    model = small()
    export = export_onnx(model, torch.zeros(1, 3, 8, 8), tmp_path / "a.onnx")
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        model[2].bias[1] += 0.01
    assert verify_onnx(model, export.path, [images], tolerance=None).max_abs_diff == pytest.approx(0.01, abs=1e-5)
    with pytest.raises(ExportError, match=r"differ by up to 0\.01"):
        verify_onnx(model, export.path, [images])
    with pytest.raises(ExportError, match="differ by up to nan"):
        verify_onnx(model, export.path, [images * float("nan")])
    with pytest.raises(ExportError, match="without images"):
        verify_onnx(model, export.path, [])


def test_failures_are_one_readable_line_and_leave_the_old_file(tmp_path):
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    path = tmp_path / "a.onnx"
    path.write_bytes(b"old")
    model = Branching().train()
    with pytest.raises(ExportError, match="Branching could not be exported") as caught:
        export_onnx(model, torch.zeros(2, 3, 8, 8), path)
    assert "\n" not in str(caught.value) and model.training
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ExportError, match="cannot be loaded"):
        OnnxModel(path)
    with pytest.raises(ExportError, match="no ONNX file"):
        OnnxModel(tmp_path / "b.onnx")
    with pytest.raises(ExportError, match="opset 11"):
        export_onnx(model, torch.zeros(2, 3, 8, 8), path, opset=11)
    with pytest.raises(ExportError, match="must be a batch"):
        export_onnx(model, torch.zeros(0, 3, 8, 8), path)
