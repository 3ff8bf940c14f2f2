"""Taking a trained model elsewhere: ONNX, cascades, int8, OpenVINO, TorchScript, PT2 and compiled models, measured."""

from vitalloy.deployment.cascade import CascadeModel, export_cascade, quantize_cascade, verify_cascade
from vitalloy.deployment.dynamic import quantize_dynamic
from vitalloy.deployment.inductor import compile_int8
from vitalloy.deployment.int8 import Int8Export, quantize_onnx
from vitalloy.deployment.onnx import OnnxExport, OnnxModel, Verification, export_onnx, verify_onnx
from vitalloy.deployment.openvino import OpenVinoModel, quantize_openvino
from vitalloy.deployment.qdq import QdqExport, export_qdq
from vitalloy.deployment.torch_formats import TorchExport, export_pt2, export_torchscript

__all__ = [
    "CascadeModel",
    "Int8Export",
    "OnnxExport",
    "OnnxModel",
    "OpenVinoModel",
    "QdqExport",
    "TorchExport",
    "Verification",
    "compile_int8",
    "export_cascade",
    "export_onnx",
    "export_pt2",
    "export_qdq",
    "export_torchscript",
    "quantize_cascade",
    "quantize_dynamic",
    "quantize_onnx",
    "quantize_openvino",
    "verify_cascade",
    "verify_onnx",
]
