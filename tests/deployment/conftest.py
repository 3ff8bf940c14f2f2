from __future__ import annotations

import pytest
import torch
from export_samples import build, pictures


@pytest.fixture(scope="session", params=["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet10t"])
def exported(request, tmp_path_factory):
    """(kind, model, the OnnxExport of it), exported once from training mode."""
    from vitalloy.deployment import export_onnx

    model = build(request.param).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # as in fine-tuning with frozen statistics
    path = tmp_path_factory.mktemp("onnx") / f"{request.param}.onnx"
    return request.param, model, export_onnx(model, pictures(1), path)
