"""A classifier whose images leave at different depths."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitalloy.compression.tokens.lgvit.heads import KEYS as HEAD_KEYS, ExitHead
from vitalloy.compression.tokens.lgvit.policies import Policy, totals
from vitalloy.compression.trunk import Point, Segment, Tokens, evaluating, hooked, points
from vitalloy.layers.backbone import rename_keys

KEYS = (  # the authors' names, which are those of Hugging Face's DeiT, and ours
    (r"^(?:deit|vit)\.pooler\.", None),  # no answer depends on it
    (r"^(?:deit|vit)\.encoder\.highway\.(\d+)\.", r"heads.\1."),
    (r"^(?:deit|vit)\.encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"model.blocks.\1.attn.proj."),
    (r"^(?:deit|vit)\.encoder\.layer\.(\d+)\.intermediate\.dense\.", r"model.blocks.\1.mlp.fc1."),
    (r"^(?:deit|vit)\.encoder\.layer\.(\d+)\.output\.dense\.", r"model.blocks.\1.mlp.fc2."),
    (r"^(?:deit|vit)\.encoder\.layer\.(\d+)\.layernorm_before\.", r"model.blocks.\1.norm1."),
    (r"^(?:deit|vit)\.encoder\.layer\.(\d+)\.layernorm_after\.", r"model.blocks.\1.norm2."),
    (r"^(?:deit|vit)\.embeddings\.cls_token", "model.cls_token"),
    (r"^(?:deit|vit)\.embeddings\.distillation_token", "model.dist_token"),
    (r"^(?:deit|vit)\.embeddings\.position_embeddings", "model.pos_embed"),
    (r"^(?:deit|vit)\.embeddings\.patch_embeddings\.projection\.", "model.patch_embed.proj."),
    (r"^(?:deit|vit)\.layernorm\.", "model.norm."),
    (r"^(?:cls_)?classifier\.", "model.head."),
    (r"^distillation_classifier\.", "model.head_dist."),
)
_QUERY = re.compile(r"^(?:deit|vit)\.encoder\.layer\.(\d+)\.attention\.attention\.query\.(weight|bias)$")
_HEAD = re.compile(r"^(heads\.\d+\.)(.+)$")
_one_pass = threading.RLock()  # hooks sit on the model itself while a pass lasts


class Answers(NamedTuple):
    """What all exits say of a batch: for training and calibration.

    Attributes:
        final: logits (B, classes) of the end.
        exits: logits of each exit.
        features: the mixed patches (B, N', C) of each exit.
        last: the tokens that leave the last layer, before the final norm.
    """

    final: Tensor
    exits: list[Tensor]
    features: list[Tensor]
    last: Tokens


class EarlyExit(nn.Module):
    """A classifier with exits: images (B, C, H, W) -> logits (B, classes), in the order they came in.

    In evaluation mode each image leaves at the first exit whose logits its policy accepts. The images that stay are
    gathered into a smaller batch, and nothing behind the last departure is computed. In training mode, and inside
    `staying`, all images go to the end; the heads learn through `answers`. A traced graph cannot end early: it computes
    every exit and picks the same answers.

    Args:
        model: the classifier; not edited: hooks sit on it while a call lasts. Calls from several threads take turns.
        points: where the exits are, in order of execution.
        kinds: of their heads.
        last: the point whose tokens leave the last layer.
        policy: with a threshold for each exit.
        head_macs: multiply-accumulates of each head, as shares of those of the plain model.

    Attributes:
        depths: the exits at which the images of the last call left, (B,), counted from 0; `len(heads)` is the end.
    """

    def __init__(
        self,
        model: nn.Module,
        points: Sequence[Point],
        kinds: Sequence[str],
        last: Point,
        policy: Policy,
        num_classes: int,
        head_macs: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.model, self.points, self.last = model, tuple(points), last
        self.num_classes, self.policy, self.head_macs = num_classes, policy, tuple(head_macs)
        self._leaves = True
        like = next(model.parameters())
        made = [ExitHead(p.channels, num_classes, kind, p.prefix) for p, kind in zip(points, kinds, strict=True)]
        self.heads = nn.ModuleList(made).to(like)
        self.depths: Tensor | None = None
        self.train(model.training)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            return self.model(images)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.picked(images)
        if not self._leaves:
            return self.every_exit(images)[-1]
        logits, self.depths = self.exit_with_depths(images)
        return logits

    def exit_with_depths(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, classes), and the exit at which each image left, (B,)."""
        leaving = _Pass(self, images)
        looks = {p.name: partial(leaving.at, i) for i, p in enumerate(self.points) if self.policy.asks(i)}
        with _one_pass, suppress(_AllLeft), hooked(self.model, looks):
            leaving.end(self.model(images))
        return leaving.result()

    def picked(self, images: Tensor) -> Tensor:
        """The same logits by computing all exits: for graphs, which cannot end early."""
        every = self.every_exit(images)
        depths = self.policy.depths(self.policy.reading(every[:-1]))
        return every.gather(0, depths[None, :, None].expand(1, -1, every.shape[2]))[0]

    def every_exit(self, images: Tensor) -> Tensor:
        """The logits of all exits and of the end, (exits + 1, B, classes); nothing leaves."""
        said: list[Tensor] = []
        looks = {
            point.name: lambda out, p=point, h=head: said.append(h.logits(p.read(out)))
            for point, head in zip(self.points, self.heads, strict=True)
        }
        with _one_pass, hooked(self.model, looks):
            final = self.model(images)
        return torch.stack([*said, final])

    def answers(self, images: Tensor, *, backbone: bool = True) -> Answers:
        """What all exits say, with what the losses compare.

        Args:
            backbone: let gradients reach the classifier; otherwise its activations are constants for the heads.
        """
        states: dict[str, Any] = {}
        names = [*(p.name for p in self.points), self.last.name]
        with (
            _one_pass,
            torch.set_grad_enabled(backbone and torch.is_grad_enabled()),
            hooked(self.model, {name: partial(states.__setitem__, name) for name in names}),
        ):
            final = self.model(images)
        said = [head(p.read(states[p.name])) for p, head in zip(self.points, self.heads, strict=True)]
        return Answers(final, [z for z, _ in said], [f for _, f in said], self.last.read(states[self.last.name]))

    @contextmanager
    def staying(self) -> Iterator[EarlyExit]:
        """Inside the block no image leaves early, and every head is computed: each layer sees all images."""
        before, self._leaves = self._leaves, False
        try:
            yield self
        finally:
            self._leaves = before

    def segments(self, image_shape: Sequence[int], exits: Sequence[int]) -> list[ExitSegment]:
        """The model in pieces that end at some of the exits, for images (C, H, W); they share its weights."""
        known = points(self.model, next(self.model.parameters()).new_zeros(1, *image_shape))
        cuts, heads = [None, *(self.points[i] for i in exits), None], [*(self.heads[i] for i in exits), None]
        return [
            ExitSegment(Segment(self.model, start, end, image_shape, known), head)
            for start, end, head in zip(cuts, cuts[1:], heads, strict=False)
        ]

    @property
    def settings(self) -> dict[str, Any]:
        """What `rebuild` needs beside a plain model, as JSON values."""
        return {
            "exits": [asdict(point) for point in self.points],
            "heads": [head.kind for head in self.heads],
            "last": asdict(self.last),
            "policy": self.policy.name,
            "thresholds": list(self.policy.thresholds),
            "num_classes": self.num_classes,
            "head_macs": list(self.head_macs),
        }

    @property
    def costs(self) -> tuple[float, ...]:
        """Multiply-accumulates when an image leaves at each exit and at the end, as shares of the plain model's."""
        return totals(self.trunk_macs, self.head_macs, self.policy)

    @property
    def trunk_macs(self) -> tuple[float, ...]:
        """The same without heads."""
        return (*(point.macs for point in self.points), 1.0)

    def times(self, image: Tensor) -> tuple[list[float], list[float], float]:
        """Milliseconds for one image (1, C, H, W) up to each exit and the end; of each head; and of the plain model."""
        from vitalloy.benchmark import compare

        states: dict[str, Any] = {}
        names = [point.name for point in self.points]
        with torch.no_grad(), evaluating(self):
            with _one_pass, hooked(self.model, {name: partial(states.__setitem__, name) for name in names}):
                self.model(image)
            memory = self.policy.start(1, image.device)

            def reach(name: str) -> None:
                with suppress(_AllLeft), hooked(self.model, {name: _stop}):
                    self.model(image)

            def ask(exit: int) -> bool:
                logits = self.heads[exit].logits(self.points[exit].read(states[names[exit]]))
                return bool(self.policy.leaving(exit, self.policy.reading(logits), memory)[0])

            calls = {f"to {name}": partial(reach, name) for name in names}
            calls |= {f"at {exit}": partial(ask, exit) for exit in range(len(names))}
            timed = compare({**calls, "plain": partial(self.model, image)}, repeats=50, budget_s=0.3)
        plain = timed["plain"].median_ms
        reached = [min(timed[f"to {name}"].median_ms, plain) for name in names]
        return [*reached, plain], [timed[f"at {exit}"].median_ms for exit in range(len(names))], plain

    @property
    def default_cfg(self) -> Any:
        return getattr(self.model, "default_cfg", None)

    @property
    def num_prefix_tokens(self) -> int:
        return int(getattr(self.model, "num_prefix_tokens", 0) or 0)

    def convert_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' state dict, or one of a model like this, under our names."""
        state = rename_keys(_fused_projections(state), KEYS)
        heads: dict[str, dict[str, Tensor]] = {}
        for key in [key for key in state if _HEAD.match(key)]:
            prefix, own = _HEAD.match(key).groups()
            heads.setdefault(prefix, {})[own] = state.pop(key)
        for prefix, own in heads.items():
            state |= {f"{prefix}{key}": value for key, value in rename_keys(own, HEAD_KEYS).items()}
        return state


class ExitSegment(nn.Module):
    """A piece of a model and the exit at its end: a state -> (logits, next state), or logits alone at the end."""

    def __init__(self, piece: Segment, head: ExitHead | None) -> None:
        super().__init__()
        self.piece, self.end, self.head = piece, piece.end, head
        self.train(piece.model.training)

    def forward(self, state: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        state = self.piece(state)
        if self.end is None or self.head is None:
            return state
        output = (state, self.end.grid) if self.end.layout == "pair" else state
        return self.head.logits(self.end.read(output)), state


def _stop(output: Any) -> None:
    raise _AllLeft


class _AllLeft(Exception):
    """Nobody is left in a pass."""


class _Pass:
    """One batch on its way: who is still there, and what was answered."""

    def __init__(self, model: EarlyExit, images: Tensor) -> None:
        self.model = model
        self.here = torch.arange(len(images), device=images.device)  # numbers of the images that are left
        self.memory = model.policy.start(len(images), images.device)
        self.left: list[tuple[Tensor, int, Tensor]] = []  # numbers, exit, logits

    def at(self, exit: int, output: Any) -> Any:
        """At an exit: who stays goes on."""
        point = self.model.points[exit]
        logits = self.model.heads[exit].logits(point.read(output))
        policy = self.model.policy
        gone, memory = policy.leaving(exit, policy.reading(logits), self.memory)
        count = int(gone.sum())
        if count == 0:
            self.memory = memory
            return None
        if count == len(gone):
            self.left.append((self.here, exit, logits))
            raise _AllLeft
        self.left.append((self.here[gone], exit, logits[gone]))
        stay = (~gone).nonzero()[:, 0]
        self.here, self.memory = self.here[stay], memory[stay]
        return point.images(output, stay)

    def end(self, logits: Tensor) -> None:
        self.left.append((self.here, len(self.model.heads), logits))

    def result(self) -> tuple[Tensor, Tensor]:
        numbers, exits, logits = zip(*self.left, strict=True)
        if len(exits) == 1:
            return logits[0], torch.full_like(numbers[0], exits[0])
        order = torch.cat(numbers).argsort()
        depths = torch.cat([torch.full_like(n, exit) for n, exit in zip(numbers, exits, strict=True)])
        return torch.cat(logits)[order], depths[order]


def _fused_projections(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' separate projections of queries, keys and values as one."""
    fused = dict(state)
    for key in state:
        if found := _QUERY.match(key):
            parts = [key.replace("query", part) for part in ("query", "key", "value")]
            fused[f"model.blocks.{found[1]}.attn.qkv.{found[2]}"] = torch.cat([fused.pop(part) for part in parts])
    return fused


@torch.no_grad()
def depth_of(model: EarlyExit, images: Tensor) -> list[dict[str, float | int]]:
    """For each image the exit at which it leaves, and the answer and its probability there: for a report."""
    with evaluating(model):
        logits, depths = model.exit_with_depths(images)
    top = logits.softmax(-1).max(-1)
    rows = zip(depths.tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
    return [{"exit": depth, "answer": answer, "confidence": value} for depth, answer, value in rows]
