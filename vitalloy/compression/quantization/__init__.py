"""Fewer bits for weights and activations: one published method a file, one face for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vitalloy.compression import methods
from vitalloy.compression.methods import check_options, options_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["METHODS", "check_options", "options_of", "quantize"]
METHODS = {name: method for name, method in methods.METHODS.items() if method.quantizes}


def quantize(
    model: nn.Module,
    calibration: Any,
    method: str,
    *,
    weights: int | None = None,
    activations: int | None = None,
    **options: Any,
) -> nn.Module:
    """A quantized copy of a classifier: the same call, simulated in floating point.

    Args:
        model: any backbone of `vitalloy.list_models()` or of timm with a classifier; not changed.
        calibration: images as the model takes them: a tensor (N, C, H, W), or batches of them.
        method: one of METHODS.
        weights, activations: bits; the method's own when None.
        **options: the method's own options, such as `train` or `seed`.

    Raises:
        CompressionError: an unknown method or option, bits out of its range, images that do not fit, or weights that
            are not finite.
    """
    from vitalloy.compression.calibration import images_for, prepared

    given = {"weights": weights, "activations": activations, **options}
    given = {name: value for name, value in given.items() if value is not None}
    check_options(method, given)
    own = prepared(model)
    return methods.METHODS[method].function(own, images_for(own, calibration), **given).eval()
