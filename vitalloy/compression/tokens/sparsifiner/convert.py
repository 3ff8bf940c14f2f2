"""Which attention of a model becomes sparse, and the change itself."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitalloy.compression.tokens.sparsifiner.attend import KERNELS, SparseAttend
from vitalloy.compression.tokens.sparsifiner.predictor import MaskPredictor
from vitalloy.compression.tokens.sparsifiner.pruning import PruneTokens, TokenState, begin, prune
from vitalloy.compression.trunk import evaluating
from vitalloy.errors import CompressionError
from vitalloy.layers.attention import Attend
from vitalloy.layers.sockets import find

LEAST_KEYS = 32
_TO_OURS = {
    "proj_n": "pool",
    "proj_back_n": "maps",
    "proj_c_q.weight": "query_weight",
    "proj_c_q.bias": "query_bias",
    "proj_c_k.weight": "key_weight",
    "proj_c_k.bias": "key_bias",
}


def plan(
    model: nn.Module,
    image: Tensor,
    *,
    keep: float | Sequence[float] = 0.25,
    coefficients: int = 8,
    basis_threshold: float = 0.02,
    coefficient_threshold: float | None = None,
    score_threshold: float | None = None,
    n_factor: float = 6,
    c_factor: float = 2,
    tokens: float | Sequence[float] | None = None,
    locations: Sequence[int] | None = None,
    drop: bool = True,
    group: int = 1,
    kernel: str = "dense",
    least_keys: int = LEAST_KEYS,
) -> tuple[dict[str, Any], dict[str, str]]:
    """What `rebuild` takes for a model, and which attention layers it leaves alone.

    Args:
        image: one (1, C, H, W) or more; the sizes that the layers see are read from it.
        keep: share of the keys, one number, or one for each sparse layer.
        tokens: share of the patch tokens that live on, for each of `locations`; one number r stands for r, r^2, r^3...
        locations: numbers of the blocks, counted from 0, behind whose attention tokens are dropped; at a quarter, a
            half and three quarters of the depth when None.
        drop: whether dead tokens leave the sequence; otherwise they become zeros, as published.
        least_keys: layers with fewer keys stay as they are.

    Returns:
        Settings, and the layers left alone by name, each with the reason.

    Raises:
        CompressionError: an option out of range, or no attention that could be sparse.
    """
    _check(coefficients=coefficients, n_factor=n_factor, c_factor=c_factor, group=group)
    if kernel not in KERNELS:
        raise CompressionError(f"sparsifiner takes kernel={', '.join(map(repr, KERNELS))}; it got {kernel!r}.")
    if score_threshold is not None and kernel == "gather":
        raise CompressionError("kernel='gather' needs as many keys for each query: leave score_threshold out.")
    sizes, left, blocks = _look(model, image, least_keys)
    shares = [*keep] if isinstance(keep, Sequence) else [keep] * len(sizes)
    if len(shares) != len(sizes):
        raise CompressionError(f"keep has {len(shares)} shares for {len(sizes)} sparse attention layers.")
    for share in shares:
        if not 0 < share <= 1:
            raise CompressionError(f"sparsifiner keeps a share of the keys above 0 and up to 1; it got keep={share!r}.")
    layers = {
        name: {**size, "keep": float(share), "group": min(group, size["queries"] - size["prefix"]), "kernel": kernel}
        for (name, size), share in zip(sizes.items(), shares, strict=True)
    }
    settings: dict[str, Any] = {
        "layers": layers,
        "coefficients": coefficients,
        "basis_threshold": basis_threshold,
        "coefficient_threshold": coefficient_threshold,
        "score_threshold": score_threshold,
        "n_factor": n_factor,
        "c_factor": c_factor,
        "tokens": None,
    }
    if tokens is not None:
        if group > 1 and not drop:
            raise CompressionError("groups of queries are not defined where dead tokens stay as zeros: use group=1.")
        settings["tokens"] = _plan_tokens(layers, blocks, tokens, locations, drop)
    elif locations is not None:
        raise CompressionError("locations say where tokens are dropped: give tokens, the share that lives on, too.")
    return settings, left


def rebuild(
    model: nn.Module,
    *,
    layers: Mapping[str, Mapping[str, Any]],
    score_threshold: float | None = None,
    tokens: Mapping[str, Any] | None = None,
    **predictor: Any,
) -> nn.Module:
    """A plain model with sparse attention in place; predictors are at their start.

    Arguments as `plan` gives them; `predictor` are the options of every `MaskPredictor`.
    """
    like = next(model.parameters())
    state = None
    if tokens is not None:
        state = TokenState(tokens["prefix"], tokens["patches"], tokens["drop"])
    for name, layer in layers.items():
        old = model.get_submodule(name)
        new = SparseAttend(
            MaskPredictor(layer["keys"], layer["heads"], layer["dim"], **predictor).to(like),
            keep=layer["keep"],
            score_threshold=score_threshold,
            prefix=layer["prefix"],
            group=layer["group"],
            kernel=layer["kernel"],
            dropout=old.dropout,
        )
        new.tokens = state
        for known, module in find(model, Attend).items():  # a layer under several names stays one
            if module is old:
                model.set_submodule(known, new.train(old.training))
    whole = True  # up to the first drop each block may be where a piece of the model begins
    for name, count in (tokens or {}).get("blocks", {}).items():
        block = model.get_submodule(name)
        block.prune_tokens = PruneTokens(state, count)
        block.register_forward_hook(prune)
        if whole:
            block.register_forward_pre_hook(begin)
        whole &= count is None
    model.settings = {"layers": layers, "score_threshold": score_threshold, "tokens": tokens, **predictor}
    return model


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict under our names: `attn.mask_predictor.*` lies in the attention socket here."""
    pattern = re.compile(r"(.*)\.mask_predictor\.(.+)")
    found = {}
    for name, value in state.items():
        match = pattern.fullmatch(name)
        found[f"{match[1]}.attend.predictor.{_TO_OURS[match[2]]}" if match else name] = value
    return found


@torch.no_grad()
def _look(
    model: nn.Module, image: Tensor, least_keys: int
) -> tuple[dict[str, dict[str, int]], dict[str, str], dict[str, str]]:
    """Sizes of the layers that can be sparse, why others cannot, and the block around each layer of plain tokens."""
    sockets = {name: m for name, m in model.named_modules() if isinstance(m, Attend)}
    if any(isinstance(m, SparseAttend) for m in sockets.values()):
        raise CompressionError("this model's attention is sparse already: start from the model it was made from.")
    calls: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in sockets}
    outputs: dict[str, Any] = {}
    hooks = [
        m.register_forward_pre_hook(
            lambda _m, args, kw, name=name: calls[name].append((*args, *kw.values())[:3]), with_kwargs=True
        )
        for name, m in sockets.items()
    ]
    above = {part for name in sockets for part in _ancestors(name)}
    hooks += [
        model.get_submodule(name).register_forward_hook(lambda _m, _a, out, name=name: outputs.update({name: out}))
        for name in above
    ]
    try:
        with evaluating(model):
            model(image[:1])
    finally:
        for hook in hooks:
            hook.remove()
    sizes, left, blocks = {}, {}, {}
    for name, seen in calls.items():
        shapes = {tuple((x.shape[2], y.shape[2]) for x, y, _ in seen)} if seen else set()
        reason = _reason(sockets[name], [pair for shape in shapes for pair in shape], least_keys)
        if reason:
            left[name] = reason
            continue
        q, k, _ = seen[0]
        prefix = _prefix(int(getattr(model, "num_prefix_tokens", 0) or 0), q.shape[2])
        sizes[name] = {"queries": q.shape[2], "keys": k.shape[2], "heads": q.shape[1], "dim": q.shape[3]}
        sizes[name] |= {"prefix": prefix}
        for part in _ancestors(name):
            alone = sum(other.startswith(f"{part}.") for other in sockets) == 1
            out = outputs.get(part)
            if alone and isinstance(out, Tensor) and out.ndim == 3 and out.shape[1] == q.shape[2] == k.shape[2]:
                blocks[name] = part
                break
    if not sizes:
        reasons = (
            "; ".join(sorted(set(left.values()))) or "none has our socket, which create_model gives to timm's models"
        )
        raise CompressionError(f"{type(model).__name__} has no attention that could be sparse: {reasons}.")
    return sizes, left, blocks


def _reason(socket: nn.Module, pairs: list[tuple[int, int]], least_keys: int) -> str | None:
    if type(socket) is not Attend:
        return f"{type(socket).__name__} computes its own attention"
    if not pairs:
        return "not called"
    if len(set(pairs)) > 1:
        return "called with different numbers of tokens"
    (queries, keys), *_ = pairs
    if queries == 1:
        return "one query"
    return f"{keys} keys, fewer than {least_keys}" if keys < least_keys else None


def _ancestors(name: str) -> list[str]:
    """The names of the modules around one, outermost first."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _prefix(prefix: int, queries: int) -> int:
    """Class tokens among the queries; stages of a pyramid may have none, and then the queries are a square map."""
    square = math.isqrt(queries) ** 2 == queries
    return 0 if square or prefix >= queries else prefix


def _plan_tokens(
    layers: Mapping[str, Mapping[str, Any]],
    blocks: Mapping[str, str],
    tokens: float | Sequence[float],
    locations: Sequence[int] | None,
    drop: bool,
) -> dict[str, Any]:
    first = next(iter(layers.values()))
    plain = all((one["queries"], one["prefix"]) == (first["queries"], first["prefix"]) for one in layers.values())
    if not plain or len(blocks) < len(layers) or not first["prefix"]:
        raise CompressionError(
            "tokens can be dropped from blocks on plain tokens with a class token alone: leave it out."
        )
    depth = len(blocks)
    where = sorted({depth * part // 4 for part in (1, 2, 3)}) if locations is None else [*locations]
    shares = [*tokens] if isinstance(tokens, Sequence) else [tokens ** (i + 1) for i in range(len(where))]
    patches = first["queries"] - first["prefix"]
    if sorted(set(where)) != where or not where or where[0] < 0 or where[-1] >= depth:
        raise CompressionError(f"locations={where} are not rising numbers of blocks from 0 to {depth - 1}.")
    if len(shares) != len(where):
        raise CompressionError(f"tokens has {len(shares)} shares for {len(where)} locations.")
    counts = [math.ceil(share * patches) for share in shares]
    if not all(0 < share <= 1 for share in shares) or sorted(counts, reverse=True) != counts:
        raise CompressionError(f"tokens={tokens!r} are not falling shares of the tokens above 0 and up to 1.")
    chosen = dict(zip(where, counts, strict=True))
    places = {name: chosen.get(i) for i, name in enumerate(blocks.values())}
    if drop:  # the first block begins a pass; the others do something where tokens leave
        places = {name: count for i, (name, count) in enumerate(places.items()) if count or not i}
    return {"prefix": first["prefix"], "patches": patches, "drop": drop, "blocks": places}


def _check(**options: float) -> None:
    for name, value in options.items():
        if not value >= 1:
            raise CompressionError(f"sparsifiner takes {name} of 1 or more; it got {value!r}.")
