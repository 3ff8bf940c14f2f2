"""FLIQS: a number format for every layer, searched while the model trains once.

For those whose hardware runs several formats: which layers may have 4 bits, and which need 8, at a given cost?
Dotzel, Wu, Li, Umar, Ni, Abdelfattah, Zhang, Cheng, Dixon, Jouppi, Le, Li: "FLIQS: One-Shot Mixed-Precision
Floating-Point and Integer Quantization Search", AutoML 2024, arXiv 2308.03290.

    found = search(model, loader, formats="fliqs-l-int", target=2.5, steps=3000)   # GBOPs
    found.formats   # {"blocks.0.attn.qkv": "INT5", ...}

Departures. The controller, rewards, schedule and integer quantizer follow the authors' open code (integers only); the
floating-point formats, whose code is not public, their standard definitions. The cost is the paper's, multiply-adds
times bits (the open code counts weights; cost="code_compute"). At the end every decision takes its likeliest option;
the code goes on sampling. Its 2500 steps of delay become a tenth of the search, and its controller's learning rate is
raised in short searches. A target that no choice can reach is refused: it is most often in another unit.
The search of the architecture together with the formats (FLIQNAS) is not part of this module. Products inside attention
and everything that is no linear layer or convolution compute in float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from vitalloy.errors import CompressionError

from .controller import REWARDS, Controller, entropy_weight
from .costs import COSTS, CostTable, code_compute, gbops, measure, mebibytes
from .formats import SPACES, Format, fake_quantize, parse
from .layers import FormatQuantizer, freeze, grouped, searchable, set_format, set_formats
from .search import Batches, Found, Progress, Search, search, without_model

__all__ = [
    "COSTS",
    "REWARDS",
    "SPACES",
    "Controller",
    "CostTable",
    "Format",
    "FormatQuantizer",
    "Found",
    "Search",
    "code_compute",
    "entropy_weight",
    "fake_quantize",
    "freeze",
    "gbops",
    "grouped",
    "measure",
    "mebibytes",
    "parse",
    "quantize",
    "search",
    "searchable",
    "set_format",
    "set_formats",
]


def quantize(
    model: nn.Module,
    images: Tensor,
    *,
    weights: int | None = None,
    activations: int | None = None,
    formats: Mapping[str, str] | None = None,
    train: Batches | None = None,
    space: str | Sequence[str] = ("INT4", "INT8"),
    target_bits: float | None = None,
    cost: str = "bops",
    steps: int = 1000,
    lr: float = 5e-5,
    per: str | Sequence[str] = "layer",
    exclude: Sequence[str] = (),
    weight_scale: str = "tensor",
    activation_scale: str = "tensor",
    static: bool = False,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> nn.Module:
    """Give every plain linear layer and convolution a number format, in place; the first and the last layer too.

    One of three: `formats` applies a given map; `train` searches one; without both every layer gets INT`weights` and
    its input INT`activations`, 8 when None. Nothing is trained unless `train` is given.

    Args:
        images: calibration images (N, C, H, W); used to measure the layers' work, and for `static`.
        weights, activations: bits of the uniform map, 2 to 8, 16 (BF16) or 32 (float).
        formats: name of a layer -> format, such as "INT4", "E4M3", "BF16", or "INT4/INT8" for weights and activations;
            layers that are not named stay float. `Found.formats` is such a map.
        train: batches (images, labels), iterated once an epoch: a DataLoader or a list. The weights are trained too.
        space: what the search chooses from: a preset of SPACES, or a list of formats.
        target_bits: the wanted cost, as the width of uniform formats that would cost as much; None: the geometric mean
            of what `space` can reach.
        cost: "bops" or "memory".
        steps, lr: of the search; per: "layer", "block", "model", or patterns; one decision each.
        exclude: names of layers that stay float; `*` stands for anything.
        weight_scale: "tensor" or "channel"; activation_scale: "tensor" or "token" (`layers.searchable`).
        static: constant scales, measured on `images`, in layers whose formats are integers, so that they can be
            exported; otherwise every batch sets its own.
        checkpoint: a file by which an interrupted search goes on.
        progress: is told (steps done, steps).

    Returns:
        The model. Its quantized layers have `format`, `weight_bits` and `activation_bits`; after a search its attribute
        `search_record` is the `Found` without the model.

    Raises:
        CompressionError: contradictory options, unknown layers or formats, bits out of range, a target out of reach.
    """
    if formats is not None and train is not None:
        raise CompressionError("Give `formats` to apply a map, or `train` to search one, not both.")
    if target_bits is not None and train is None:
        raise CompressionError("target_bits needs training images to search with: give `train`, or leave it out.")
    if (weights, activations) != (None, None) and (formats is not None or train is not None):
        raise CompressionError("weights and activations are for one format everywhere: a search takes target_bits.")
    scales = {"weight_scale": weight_scale, "activation_scale": activation_scale}
    if train is not None:
        found = search(
            model,
            train,
            image=images[:1],
            formats=space,
            target_bits=target_bits,
            cost=cost,
            steps=steps,
            lr=lr,
            per=per,
            exclude=exclude,
            checkpoint=checkpoint,
            progress=progress,
            seed=seed,
            **scales,
        )
        model.search_record = without_model(found)
        layers = {name: layer for name, layer in model.named_modules() if name in found.formats}
    else:
        layers = searchable(model, exclude, **scales)
        bits = {"weights": weights, "activations": activations}
        uniform = "/".join(_of_bits(8 if count is None else count, what) for what, count in bits.items())
        set_formats(layers, dict.fromkeys(layers, uniform) if formats is None else formats)
    if static:
        freeze(model.eval(), layers.values(), images)
    return model.eval()


def _of_bits(bits: int, what: str) -> str:
    if bits in (16, 32):
        return "BF16" if bits == 16 else "float"
    if bits not in range(2, 9):
        raise CompressionError(f"{what}={bits}: formats have 2 to 8 bits, 16 (BF16) or 32 (float).")
    return f"INT{bits}"
