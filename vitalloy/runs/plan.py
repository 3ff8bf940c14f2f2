"""What `compress` is asked to do: one method, or several joined by "+" such as "sit+lpvit+int8", and their options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vitalloy.compression.methods import METHODS, check_options, options_of
from vitalloy.errors import CompressionError, suggest
from vitalloy.runs.trials import RUNTIMES

AUTO = "auto"


@dataclass(frozen=True)
class Plan:
    """Methods that leave work out, in order, and what then gives values fewer bits or runs the result.

    Attributes:
        reducers: (method, its options).
        last: "auto", a runtime of RUNTIMES, a quantizer, or None: the reduced model in float.
        options: of `last`.
    """

    reducers: tuple[tuple[str, dict[str, Any]], ...] = ()
    last: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        method: str | Iterable[str],
        weights: int | None = None,
        activations: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Plan:
        """Read what was asked for, and refuse what would fail only after the work has begun.

        Args:
            method: names, joined by "+" or in a list.
            options: by name, for every step that has an option of that name, or as "sit.keep" for one step.
        """
        names = tuple(method.split("+") if isinstance(method, str) else method)
        known = (AUTO, *RUNTIMES, *METHODS)
        for name in names:
            if name not in known:
                raise CompressionError(f"there is no method {name!r}: use {', '.join(known)}.{suggest(name, known)}")
        for place, name in enumerate(names):
            leaves_out = name in METHODS and not METHODS[name].quantizes
            if not leaves_out and place + 1 < len(names):
                raise CompressionError(f"{name} comes last, for what it makes cannot be changed: {'+'.join(names)}.")
            if name == "lgvit" and any(n in METHODS and not METHODS[n].quantizes for n in names[place + 1 :]):
                raise CompressionError("lgvit comes behind the methods that change the model: its exits fit one model.")
            if name in names[:place]:
                raise CompressionError(f"{name} is named twice: {'+'.join(names)}.")
        bits = {k: v for k, v in (("weights", weights), ("activations", activations)) if v is not None}
        shared = _shared(names, dict(options or {}))
        last = names[-1]
        if last in METHODS and not METHODS[last].quantizes:
            if bits:
                raise CompressionError(f"{last} leaves bits as they are: name a quantizer behind it: {last}+int8.")
            return cls(tuple((name, shared[name]) for name in names))
        for name, value in bits.items():
            if last not in METHODS and value != 8:
                raise CompressionError(f"{name}={value}: {last} works in 8 bits; name a published method for others.")
        own = {**bits, **shared[last]} if last in METHODS else {}
        return cls(tuple((name, shared[name]) for name in names[:-1]), last, own)

    @property
    def name(self) -> str:
        """The steps joined by "+", with the bits where they are a choice."""
        names = [name for name, _ in self.reducers]
        return "+".join([*names, self.last] if self.last else names)

    def learns(self) -> list[str]:
        """The steps that learn from training images, where these are given."""
        return [name for name in self.name.split("+") if name in METHODS and "train" in options_of(name)]

    def with_training(self, train: Any) -> Plan:
        """The same plan whose learning steps get `train`, batches (images, labels)."""
        reducers = tuple((n, {"train": train, **o} if n in self.learns() else o) for n, o in self.reducers)
        options = {"train": train, **self.options} if self.last in self.learns() else self.options
        return Plan(reducers, self.last, options)


def _shared(names: tuple[str, ...], options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each option with the steps that it is meant for."""
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in options.items():
        step, dot, name = key.rpartition(".")
        if dot:
            if step not in names:
                raise CompressionError(f"option {key}: {step} is none of {', '.join(names)}.")
            _refuse_unknown(step, name)
            found[step][name] = value
            continue
        takers = [n for n in names if n in METHODS and name in options_of(n)]
        if not takers:
            _refuse_unknown(names[-1], name)
        for taker in takers:
            found[taker].setdefault(name, value)
    return found


def _refuse_unknown(step: str, name: str) -> None:
    if step not in METHODS:
        raise CompressionError(f"{step} has no options, but got {name}: they belong to a method.")
    check_options(step, [name])
