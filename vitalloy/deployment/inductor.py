"""Int8 inside PyTorch: static quantization by PT2E, compiled for x86 CPUs by Inductor.

Needs torchao (`vitalloy[torchao]`) and a C++ compiler at run time. Linear layers and convolutions compute on int8;
attention, norms and activations stay float. Every process compiles anew (half a minute for a small transformer), so
this suits a server that starts once; a file for elsewhere is better made by `export_qdq` or `quantize_openvino`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitalloy.deployment._common import at_rest, deployable, quiet, reason
from vitalloy.errors import ExportError


def compile_int8(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """A compiled int8 copy of a model for batches of one size.

    Args:
        model: takes (B, C, H, W) and returns one tensor; on the CPU; not changed.
        images: real images (N, C, H, W); activations get the ranges seen here.

    Returns:
        images (1, C, H, W) -> logits (1, classes), without gradients; already compiled. Its `batch` is 1.

    Raises:
        ExportError: torchao or a C++ compiler is missing, or the model cannot be traced, quantized or compiled.
    """
    try:
        with quiet():
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
            from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    except ImportError as error:
        raise ExportError(f"torchao is not installed ({error}): pip install 'vitalloy[torchao]'.") from error
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None and shutil.which("clang++") is None:
        raise ExportError(f"Compiling needs a C++ compiler and there is no {compiler}: install one, or set CXX.")
    if next(model.parameters()).device.type != "cpu":
        raise ExportError("The int8 kernels of Inductor are for CPUs: move the model there.")
    from torch._inductor import config

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    try:
        with at_rest(model), quiet():
            graph = torch.export.export(deployable(model), (images[:1],)).module()
            graph = prepare_pt2e(graph, quantizer)
            for image in images.split(1):
                graph(image)
            graph = convert_pt2e(graph)
            compiled = torch.compile(graph)

            def run(batch: Tensor) -> Tensor:
                with torch.no_grad(), config.patch(freezing=True):
                    return compiled(batch)

            run.batch = 1
            run(images[:1])
    except Exception as error:  # any step of three compilers may fail
        raise ExportError(f"{type(model).__name__} could not be compiled for int8: {reason(error)}.") from error
    return run
