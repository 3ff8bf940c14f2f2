"""What the rows of all systems share: building by name, loading the authors' weights, reading inner tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import golden
import torch
from torch import Tensor, nn

import vitalloy

Outputs = dict[str, Tensor]


@dataclass
class Model:
    """Build `name`, load the record's weights, run it on the record's image.

    Attributes:
        kwargs: arguments of create_model beyond the name.
        rename: recorded output -> our module path, where the names differ.
        result: the recorded name of what the forward pass returns ("out.logits"), or a function that names its parts.
        reshape: recorded output -> function from our tensor to the authors' layout.
        train: run in training mode (the record says so where it matters).
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    rename: dict[str, str] = field(default_factory=dict)
    result: str | Callable[[Any], Mapping[str, Tensor]] = "out.logits"
    reshape: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    prepare: Callable[[nn.Module], Any] = lambda model: None

    def __call__(self, record: dict) -> Outputs:
        model = vitalloy.create_model(self.name, **self.kwargs).to(getattr(torch, record["dtype"]))
        vitalloy.load_checkpoint(model, golden.state_of(record))
        assert sum(p.numel() for p in model.parameters()) == record["params"]
        model.train(record["train"])
        self.prepare(model)
        seen: Outputs = {}
        for wanted in record["outputs"]:
            listen(model, wanted, self.rename.get(wanted, wanted.removeprefix("out.")), seen)
        result = model(*golden.inputs_of(record).values())
        seen.update({self.result: result} if isinstance(self.result, str) else self.result(result))
        return {k: self.reshape.get(k, lambda t: t)(v) for k, v in seen.items()}


def listen(model: nn.Module, wanted: str, path: str, seen: Outputs) -> None:
    """Keep what the module at `path` returns; a trailing number that names no module picks from a tuple."""
    modules = dict(model.named_modules())
    parent, _, index = path.rpartition(".")
    if path in modules:
        modules[path].register_forward_hook(
            lambda _m, _i, out: seen.__setitem__(wanted, out if isinstance(out, Tensor) else out[0])
        )
    elif parent in modules and index.isdigit():
        modules[parent].register_forward_hook(lambda _m, _i, out: seen.__setitem__(wanted, out[int(index)]))


def features(name: str) -> Callable[[dict], Outputs]:
    def run(record: dict) -> Outputs:
        model = vitalloy.create_model(name, features_only=True).double().eval()
        vitalloy.load_checkpoint(model, golden.state_of(record))
        assert sum(p.numel() for p in model.parameters()) == record["params"]
        return {f"out.stage{i + 1}": m for i, m in enumerate(model(*golden.inputs_of(record).values()))}

    return run


def whole(model: nn.Module, record: dict, paths: dict[str, str]) -> tuple[Any, Outputs]:
    """Load a whole dense model, run it, and read the outputs of its parts."""
    model = model.double().eval()
    vitalloy.load_checkpoint(model, golden.state_of(record))
    assert sum(p.numel() for p in model.parameters()) == record["params"]
    seen: Outputs = {}
    for wanted, path in paths.items():
        listen(model, wanted, path, seen)
    return model(golden.inputs_of(record)["image"]), seen
