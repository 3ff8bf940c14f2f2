"""The published methods by name: what each does, what runs its result, and its options."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vitalloy.errors import CompressionError, suggest


@dataclass(frozen=True)
class Method:
    """A way to compress.

    Attributes:
        about: what it does, in a sentence.
        kind: "search" (scales, minutes), "reconstruction" (rounding learnt block by block) or "training".
        runs: what executes its result: "integer layers" (exported Q/DQ), "integer only", "binary", "simulation", or
            "float" (fewer operations of the same kind).
        module: its module below `vitalloy.compression`; the part before the dot is its room.
    """

    about: str
    kind: str
    runs: str
    module: str

    @property
    def quantizes(self) -> bool:
        """Whether it gives values fewer bits; otherwise it leaves operations out."""
        return self.module.startswith("quantization.")

    @property
    def function(self) -> Callable[..., Any]:
        """What runs it: (model, images, **options) -> model."""
        module = importlib.import_module(f"vitalloy.compression.{self.module}")
        return module.quantize if self.quantizes else module.compress


METHODS: Mapping[str, Method] = {
    "easyquant": Method(
        "Scales searched layer by layer for the output of least angle.",
        "search",
        "integer layers",
        "quantization.easyquant",
    ),
    "fq_vit": Method(
        "Power-of-two factors for norms, log2 attention maps; all is quantized.",
        "search",
        "simulation",
        "quantization.fq_vit",
    ),
    "ptq4vit": Method(
        "Twin ranges behind softmax and GELU, a curvature-weighted search.",
        "search",
        "simulation",
        "quantization.ptq4vit",
    ),
    "repq_vit": Method(
        "Channel scales folded into the norms, log-sqrt-2 attention maps.",
        "search",
        "simulation",
        "quantization.repq_vit",
    ),
    "aphq": Method(
        "Rounding learnt block by block by a perturbation Hessian.",
        "reconstruction",
        "integer layers",
        "quantization.aphq",
    ),
    "q_hyvit": Method(
        "Granularity and symmetry chosen per layer, bridge blocks together.",
        "search",
        "integer layers",
        "quantization.q_hyvit",
    ),
    "i_vit": Method(
        "Integers alone from image to logits, trained on.", "training", "integer only", "quantization.i_vit"
    ),
    "bivit": Method("One bit a weight, one bit in attention.", "training", "binary", "quantization.bivit"),
    "fliqs": Method(
        "A number format for every layer, searched while training.", "training", "simulation", "quantization.fliqs"
    ),
    "sit": Method("Tokens merged by learned weights, taught by the full model.", "training", "float", "tokens.sit"),
    "sparsifiner": Method(
        "Attention between the pairs of tokens that a small predictor keeps.", "training", "float", "tokens.sparsifiner"
    ),
    "lgvit": Method("Images leave at the depth that suffices for them.", "training", "float", "tokens.lgvit"),
    "lpvit": Method(
        "Blocks of weights removed, shared out among the layers by the damage they do.",
        "training",
        "float",
        "pruning.lpvit",
    ),
}


def options_of(method: str) -> dict[str, Any]:
    """The options of a method and their defaults. Raises CompressionError for a method that is not known."""
    if method not in METHODS:
        raise CompressionError(f"there is no method {method!r}: use {', '.join(METHODS)}.{suggest(method, METHODS)}")
    parameters = list(inspect.signature(METHODS[method].function).parameters.values())[2:]  # behind model and images
    return {parameter.name: parameter.default for parameter in parameters}


def check_options(method: str, names: Iterable[str]) -> None:
    """Raises CompressionError for the first name that is no option of the method."""
    known = options_of(method)
    for name in names:
        if name not in known:
            raise CompressionError(f"{method} has no option {name!r}: {', '.join(known)}.{suggest(name, known)}")
