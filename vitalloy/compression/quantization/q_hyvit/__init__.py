"""Q-HyViT: hybrids of convolutions and transformers in 8 or 6 bits, from a few images and without training.

"Q-HyViT: Post-Training Quantization of Hybrid Vision Transformers with Bridge Block Reconstruction for IoT Systems",
Lee et al., IEEE Internet of Things Journal 2024, arXiv 2303.12557. For people who ship small hybrids on integer
runtimes: granularity (a step a layer or a channel), scheme (symmetric or asymmetric) and steps are chosen layer by
layer, and for the blocks that join the two halves together, by a curvature-weighted error.

No code of the authors can be reached: what the paper leaves open is our reading. Departures. The importance of an
output is the square of its gradient under labels drawn from the model's own answer; the gradient of the divergence from
that answer, which related methods name, is zero there. The search looks at every eighth of its factors first and then
at those around the best, at no more than 256 positions of a layer, 64 where the layer is large. The layers of a bridge
block are searched alone under each combination; at the end of the block the combinations are compared, and the steps of
the best two searched together, at nine factors about what the layers found, on fewer images where these are large. A
zero point that the codes cannot name is not saturated blindly: what leaves the least error is taken.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from vitalloy.compression.calibration import Seen, fisher_loss, record, some
from vitalloy.compression.quantization.q_hyvit.bridges import Block, Flow, find_bridges, trace
from vitalloy.compression.quantization.q_hyvit.choice import COMBINATIONS, Chosen, Product, grids, overflows
from vitalloy.compression.quantization.q_hyvit.joint import choose_attention, choose_block, install
from vitalloy.compression.quantization.q_hyvit.norms import choose_output, quantize_output
from vitalloy.compression.quantizers import check_bits
from vitalloy.compression.simulated import simulate
from vitalloy.errors import CompressionError
from vitalloy.layers.attention import Attend

IMAGES = 32  # that the search looks at, as in the paper's comparison
PIXELS = 32 * 64 * 64  # of all images that bridge blocks are measured on
HELD = 2**26  # numbers that are recorded at a time
REMEDIES = ("choose", "any", "stretched", "saturated", "unbounded")
NORMS = (nn.LayerNorm, nn.GroupNorm)
Unit = tuple[list[str], Block | None]


def quantize(
    model: nn.Module,
    images: Tensor,
    *,
    weights: int = 8,
    activations: int = 8,
    choose: bool = True,
    zero_point: str = "choose",
    symmetric_weights: bool = False,
    fully: bool = False,
    sequential: bool = False,
    rounds: int = 3,
    steps: int = 100,
    progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Quantize the linear maps and both products of attention of a model, in place.

    Args:
        images: (N, C, H, W); 32 of them are looked at.
        weights, activations: bits, 2 to 16.
        choose: False takes one asymmetric step a tensor, from its least to its greatest value: what the choice is
            compared with.
        zero_point: where a range on one side of zero needs a zero point that no code names: "choose" the better of
            "stretched" (the range is widened to zero) and "saturated" (its far end is cut off), or one of these;
            "unbounded" keeps it, which integer runtimes do not take, and "any" chooses from all three. With
            `choose=False` it is "saturated" unless one is named.
        symmetric_weights: no asymmetric grids for weights, which some integer kernels do not take.
        fully: softmax maps and the outputs of layer and group norms too.
        sequential: later layers see what the quantized ones before them answer, not the float ones.
        rounds, steps: of the search for the step of a weight and of its input by turns.
        progress: is told (units done, units); a bridge block is one unit.

    Returns:
        The model. Its `choices` are a row (a dict of plain values) a layer: `layer`, `bridge` (the number of its block
        or None), `granularity`, `weight_scheme`, `activation_scheme`, `overflow` (inputs whose asymmetric zero point
        no code names), `remedy` (what was done to those, "" where there was nothing to do), `error` (at the end of the
        block for a bridge) and `errors` by combination.

    Raises:
        CompressionError: bits outside 2 to 16, or an unknown remedy.
    """
    check_bits(2, 16, weights=weights, activations=activations)
    if zero_point not in REMEDIES:
        raise CompressionError(f"q_hyvit knows no zero_point={zero_point!r}: use {', '.join(REMEDIES)}.")
    images = some(images, min(IMAGES, len(images)))
    few = some(images, min(max(PIXELS // images[0, 0].numel(), 4), len(images)))
    flow = trace(model, few) if choose else None
    blocks = find_bridges(flow) if flow else []
    reference = copy.deepcopy(model) if sequential else model
    layers = simulate(model)
    if fully:
        layers |= {name: m for name, m in model.named_modules() if isinstance(m, NORMS)}
    seen = record(model, layers.values(), images[:1])
    sizes = {
        name: len(images) * sum(x.numel() for x in (*seen[layer].inputs, seen[layer].output, seen[layer].output))
        for name, layer in layers.items()
        if layer in seen
    }
    remedy = zero_point if choose or zero_point not in ("choose", "any") else "saturated"
    combinations = [c for c in COMBINATIONS if c[1] == "symmetric" or not symmetric_weights]
    search = _Search(weights, activations, remedy, combinations, fully, rounds, steps, seed)
    if choose:
        targets = _targets(flow, blocks, few, seed) if blocks else {}
        units = _units(list(sizes), blocks, [*flow.layer.values()] if flow else [])
    else:
        units = [([name], None) for name in sizes]

    rows: list[dict[str, Any]] = []
    final: dict[str, Chosen] = {}
    done = 0
    for group in _groups(units, sizes, 0 if sequential else HELD):
        names = [name for unit, _ in group for name in unit]
        saw = _record(reference, names, images, seed)
        if sequential:
            now = _record(model, names, images, None)
            saw = {n: Seen(now[n].inputs, now[n].options, s.output, s.gradient) for n, s in saw.items()}
        for unit, block in group:
            found = {name: search(layers[name], saw[name], choose) for name in unit}
            if block is None:
                best = {name: min(f, key=lambda label, f=f: f[label].error) for name, f in found.items()}
                errors = {name: {label: c.error for label, c in f.items()} for name, f in found.items()}
            else:
                with torch.no_grad():
                    values = flow.run(few, block.inputs)
                joint = choose_block(flow, block, values, targets, found, rounds)
                left = {label: c[unit[0]].error for label, c in joint.items()}
                best, errors = dict.fromkeys(unit, min(left, key=left.get)), dict.fromkeys(unit, left)
                found = {name: {label: joint[label][name] for label in joint} for name in unit}
            number = blocks.index(block) if block else None
            for name in unit:
                final[name] = found[name][best[name]]
                row = search.row(layers[name], saw[name], best[name], final[name], errors[name])
                rows.append({"layer": name, "bridge": number, **row})
            if sequential:
                for name in unit:
                    _put(layers[name], final[name])
            done += 1
            if progress:
                progress(done, len(units))
    for name, chosen in final.items():
        _put(layers[name], chosen)
    model.choices = rows
    return model


@dataclass(frozen=True)
class _Search:
    """The search for one layer alone, and how its outcome is told."""

    weights: int
    activations: int
    zero_point: str
    combinations: list[tuple[str, str, str]]
    fully: bool
    rounds: int
    steps: int
    seed: int

    def __call__(self, layer: nn.Module, seen: Seen, choose: bool) -> dict[str, Chosen]:
        """What is best under each combination; without `choose` the plain one alone."""
        if not choose:
            return {f"layer/{self.combinations[-1][1]}/asymmetric": self.plain(layer, seen)}
        if isinstance(layer, Attend):
            ranges = self.ranges(layer, seen)
            return choose_attention(layer, seen, ranges, self.activations, self.zero_point, self.steps, self.rounds)
        if isinstance(layer, NORMS):
            return choose_output(seen, self.activations, self.zero_point, self.steps)
        product = Product.of(layer, seen, torch.Generator().manual_seed(self.seed))
        bits = (self.weights, self.activations)
        return product.choose(*bits, self.combinations, self.zero_point, self.steps, self.rounds)

    def plain(self, layer: nn.Module, seen: Seen) -> Chosen:
        made = [grids(*r, self.activations, "asymmetric", self.zero_point)[0] for r in self.ranges(layer, seen)]
        weight = None
        if not isinstance(layer, (Attend, *NORMS)):
            scheme = self.combinations[-1][1]
            weight = grids(*layer.weight.detach().aminmax(), self.weights, scheme, self.zero_point)[0]
        return Chosen(weight, tuple(made), math.nan)

    def ranges(self, layer: nn.Module, seen: Seen) -> list[tuple[Tensor, Tensor]]:
        """The least and the greatest value of each activation that is quantized."""
        if isinstance(layer, NORMS):
            return [seen.output.aminmax()]
        if not isinstance(layer, Attend):
            return [seen.inputs[0].aminmax()]
        maps = torch.arange(2.0, device=seen.output.device).aminmax()  # a softmax answers between 0 and 1
        return [x.aminmax() for x in seen.inputs[:3]] + [maps] * self.fully

    def row(self, layer: nn.Module, seen: Seen, label: str, chosen: Chosen, errors: dict[str, float]) -> dict[str, Any]:
        granularity, of_weight, of_x = label.split("/") if chosen.weight else ("", "", label.split("/")[-1])
        over = [overflows(*r, self.activations) for r in self.ranges(layer, seen)]
        remedies = [grid.remedy or of_x for grid, is_over in zip(chosen.inputs, over, strict=True) if is_over]
        return {
            "granularity": granularity,
            "weight_scheme": of_weight,
            "activation_scheme": of_x,
            "overflow": sum(over),
            "remedy": ", ".join(dict.fromkeys(remedies)),
            "error": chosen.error,
            "errors": errors,
        }


def _record(model: nn.Module, names: list[str], images: Tensor, seed: int | None) -> dict[str, Seen]:
    """What the named layers see, with gradients where there is a seed for them."""
    layers = {name: model.get_submodule(name) for name in names}
    generator = torch.Generator().manual_seed(seed or 0)
    loss = None if seed is None else lambda logits: fisher_loss(logits, generator)
    seen = record(model, layers.values(), images, loss=loss)
    return {name: seen[layer] for name, layer in layers.items()}


def _targets(flow: Flow, blocks: list[Block], images: Tensor, seed: int) -> dict[fx.Node, tuple[Tensor, Tensor]]:
    """Values and gradients of what the blocks end with, in the float model."""
    ends = [node for block in blocks for node in block.outputs]
    values = flow.run(images, ends)
    loss = fisher_loss(values[flow.answer], torch.Generator().manual_seed(seed))
    gradients = torch.autograd.grad(loss, [values[node] for node in ends])
    return {node: (values[node].detach(), g) for node, g in zip(ends, gradients, strict=True)}


def _units(names: list[str], blocks: list[Block], order: list[str]) -> list[Unit]:
    """Blocks, and all other layers alone, in the order in which they run."""
    place = {name: i for i, name in enumerate(dict.fromkeys([*order, *names]))}
    inside = {name for block in blocks for name in block.layers}
    units: list[Unit] = [([name for name in block.layers if name in names], block) for block in blocks]
    units += [([name], None) for name in names if name not in inside]
    return sorted((unit for unit in units if unit[0]), key=lambda unit: place[unit[0][0]])


def _groups(units: list[Unit], sizes: dict[str, int], limit: int) -> Iterator[list[Unit]]:
    """Neighbouring units that together hold no more than `limit` numbers, one at least."""
    group: list[Unit] = []
    held = 0
    for unit in units:
        size = sum(sizes[name] for name in unit[0])
        if group and held + size > limit:
            yield group
            group, held = [], 0
        group.append(unit)
        held += size
    if group:
        yield group


def _put(layer: nn.Module, chosen: Chosen) -> None:
    if isinstance(layer, NORMS):
        quantize_output(layer, chosen)
    else:
        install(layer, chosen)
