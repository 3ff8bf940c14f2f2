"""Taking a trained model elsewhere: ONNX, int8, TorchScript and PT2 files, each verified against its model."""

from vitalloy.deployment.int8 import Int8Export, quantize_onnx
from vitalloy.deployment.onnx import OnnxExport, OnnxModel, Verification, export_onnx, verify_onnx
from vitalloy.deployment.torch_formats import TorchExport, export_pt2, export_torchscript

__all__ = [
    "Int8Export",
    "OnnxExport",
    "OnnxModel",
    "TorchExport",
    "Verification",
    "export_onnx",
    "export_pt2",
    "export_torchscript",
    "quantize_onnx",
    "verify_onnx",
]
