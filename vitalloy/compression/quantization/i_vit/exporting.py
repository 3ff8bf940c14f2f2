"""The integer runtime as an ONNX file: `export_integer_onnx`.

Products become MatMulInteger and ConvInteger of unsigned bytes with zero point 128: signed ones fall to a kernel 20
times slower in ONNX Runtime, and unsigned by signed ones saturate on processors without VNNI. An attention map of 16
bits is multiplied as two halves of 8. ONNX shifts only unsigned numbers, so a signed one is lifted above zero before.

On CPUs the file is slower than the float model: the products are as fast, but ONNX Runtime has no kernel that
requantizes in one pass, and the 64-bit product, shift and clip of each value pass over memory one after the other.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from vitalloy.errors import CompressionError

LIFT = 2**62  # makes every number of a shift positive, and is a whole number of steps for every shift


def export_integer_onnx(runtime: fx.GraphModule, example: Tensor, path: str | Path) -> Path:
    """Write an integer runtime to an ONNX file that takes any number of images and gives logits.

    Args:
        runtime: what `to_integer` gave.
        example: images (B, C, H, W), float32.

    Raises:
        CompressionError: something in the model has no form in ONNX.
    """
    example = example[:2] if len(example) > 1 else torch.cat([example, example])
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch's exporter warns of PyTorch
            program = torch.onnx.export(
                runtime,
                (example.float(),),
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                dynamo=True,
                verbose=False,
                optimize=False,
                custom_translation_table=_translations(),
            )
        for node in program.model.graph:  # stack traces with local paths, larger than the weights
            node.metadata_props.clear()
        program.save(str(path), external_data=False)
    except Exception as error:  # the exporter raises anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CompressionError(f"The integer runtime could not be written to {path}: {reason}") from error
    return path


def _translations() -> dict[Any, Any]:
    """How `operators` are written in ONNX; `op.Cast` takes 2 for uint8, 6 for int32, 7 for int64, 13 for uint64."""
    from onnxscript import INT8, opset20 as op

    def unsigned(x):  # int8 v as the byte v + 128
        return op.BitwiseXor(op.Cast(x, to=2), zero())

    def zero():
        return op.Cast(op.Constant(value_int=128), to=2)

    def product(a, b):
        b = unsigned(b)
        if a.dtype == INT8.dtype:
            return op.MatMulInteger(unsigned(a), b, zero(), zero())
        base, none = op.Cast(op.Constant(value_int=256), to=6), op.Cast(op.Constant(value_int=0), to=2)
        upper, lower = (op.MatMulInteger(op.Cast(half(a, base), to=2), b, none, zero()) for half in (op.Div, op.Mod))
        return op.Add(op.Mul(upper, base), lower)

    def convolve(x, weight, stride, padding, dilation, groups):
        pads, x = [*padding, *padding], unsigned(x)
        options = {"strides": stride, "pads": pads, "dilations": dilation, "group": groups}
        return op.ConvInteger(x, unsigned(weight), zero(), zero(), **options)

    def look_up(table, index):  # GatherElements is ten times as fast as Gather for single numbers
        flat = op.GatherElements(table, op.Reshape(index, op.Constant(value_ints=[-1])))
        return op.Reshape(flat, op.Shape(index))

    def shift_right(x, shift):
        count, lift = op.Cast(shift, to=13), op.Constant(value_int=LIFT)
        shifted = op.BitShift(op.Cast(op.Add(x, lift), to=13), count, direction="RIGHT")
        back = op.BitShift(op.Cast(lift, to=13), count, direction="RIGHT")
        return op.Sub(op.Cast(shifted, to=7), op.Cast(back, to=7))

    own = torch.ops.vitalloy
    return {
        own.product.default: product,
        own.convolve.default: convolve,
        own.shift_right.default: shift_right,
        own.quotient.default: lambda a, b: op.Div(a, b),
        own.look_up.default: look_up,
    }
