"""Fewer bits for weights and activations: one published method a file, one face for all of them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vitalloy.errors import CompressionError, suggest

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Method:
    """A way to quantize.

    Attributes:
        about: what it does, in a sentence.
        kind: "search" (scales, minutes), "reconstruction" (rounding learnt block by block) or "training".
        runs: what executes its result: "integer layers" (exported Q/DQ), "integer only", "binary" or "simulation".
    """

    about: str
    kind: str
    runs: str


METHODS: Mapping[str, Method] = {
    "easyquant": Method("Scales searched layer by layer for the output of least angle.", "search", "integer layers"),
    "fq_vit": Method("Power-of-two factors for norms, log2 attention maps; all is quantized.", "search", "simulation"),
    "ptq4vit": Method("Twin ranges behind softmax and GELU, a curvature-weighted search.", "search", "simulation"),
    "repq_vit": Method("Channel scales folded into the norms, log-sqrt-2 attention maps.", "search", "simulation"),
    "aphq": Method("Rounding learnt block by block by a perturbation Hessian.", "reconstruction", "integer layers"),
    "q_hyvit": Method("Granularity and symmetry chosen per layer, bridge blocks together.", "search", "integer layers"),
    "i_vit": Method("Integers alone from image to logits, trained on.", "training", "integer only"),
    "bivit": Method("One bit a weight, one bit in attention.", "training", "binary"),
    "fliqs": Method("A number format for every layer, searched while training.", "training", "simulation"),
}


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
    return _run(method)(own, images_for(own, calibration), **given).eval()


def options_of(method: str) -> dict[str, Any]:
    """The options of a method and their defaults. Raises CompressionError for a method that is not known."""
    if method not in METHODS:
        raise CompressionError(f"there is no method {method!r}: use {', '.join(METHODS)}.{suggest(method, METHODS)}")
    parameters = list(inspect.signature(_run(method)).parameters.values())[2:]  # behind the model and the images
    return {parameter.name: parameter.default for parameter in parameters}


def check_options(method: str, names: Iterable[str]) -> None:
    """Raises CompressionError for the first name that is no option of the method."""
    known = options_of(method)
    for name in names:
        if name not in known:
            raise CompressionError(f"{method} has no option {name!r}: {', '.join(known)}.{suggest(name, known)}")


def _run(method: str) -> Callable[..., nn.Module]:
    return importlib.import_module(f"vitalloy.compression.quantization.{method}").quantize
