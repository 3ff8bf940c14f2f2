"""How the goldens of sit are computed."""

from __future__ import annotations

import ast
import itertools
import re
from typing import Any

import golden
import torch.nn.functional as F
from torch import nn

import vitalloy
from cases.common import Outputs, listen
from vitalloy.backbones.lv_vit import LVViT
from vitalloy.compression.tokens.sit import Recalibration, ReverseSlimming, logit_distance, tapped, token_distance
from vitalloy.compression.trunk import Point
from vitalloy.layers.backbone import rename_keys
from vitalloy.layers.slimming import TokenSlimming


def behind(model: nn.Module, block: int) -> str:
    """The module behind whose output the authors read the tokens of a block: its slimming where it has one."""
    return f"tsm.{model.slim_after.index(block + 1)}" if block + 1 in model.slim_after else f"blocks.{block}"


def network(record: dict) -> Outputs:
    """A model whose tokens are read behind blocks; in training mode what the reverse modules make of them too."""
    state = golden.state_of(record)
    image = golden.inputs_of(record)["image"]
    name, options = described(record["entry"])
    options |= {"img_size": tuple(image.shape[-2:]), "num_classes": len(state["head.bias"])}
    # the published models hold a classifier of single tokens that takes no part in the answer
    model = vitalloy.create_model(name, dense_head=True, **options).double().eval()
    vitalloy.load_checkpoint(model, state)
    full = vitalloy.create_model(name, **{**options, "slim_after": ()}).double().eval()
    taps, ends = ([tap(net, block) for block in range(len(net.blocks))] for net in (model, full))
    with tapped(full, ends) as wide, tapped(model, taps) as narrow:
        full(image[:1])
        model(image[:1])
        reverse = Recalibration(narrow, wide).double()
    held = {k.removeprefix("rtsm."): v for k, v in state.items() if k.startswith("rtsm.")}
    assert sum(p.numel() for p in [*model.parameters(), *reverse.parameters()]) == record["params"]
    reverse.load_state_dict(held)

    seen: Outputs = {}
    listen(model, "out.patch_embed", "patch_embed", seen)
    listen(model, "out.logits", "head", seen)
    with tapped(model.train(record["train"]), taps) as tokens:
        model(image)
    kinds = {"tokens": tokens, "recovered": reverse(tokens), "tsm": [tokens[n - 1] for n in model.slim_after]}
    for wanted in record["outputs"]:
        kind, number = re.fullmatch(r"out\.([a-z_]+)(\d*)", wanted).groups()
        if kind in kinds:
            seen[wanted] = kinds[kind][int(number)]
    return seen


def described(entry: str) -> tuple[str, dict[str, Any]]:
    """Our name and options for the authors' call that a record's entry gives."""
    call = re.search(r"(\w+)\((.*?)\)", entry)
    given = {k: ast.literal_eval(v) for k, v in re.findall(r"(\w+)=(\[[^]]*\]|'[^']*'|[\w.]+)", call[2])}
    names = {"p_emb": "stem", "keeping_ratio": "keep"}
    same = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "skip_lam")
    options = {names.get(k, k): v for k, v in given.items() if k in (*names, *same)}
    if given.get("distillation_type") is None:
        options["slim_after"] = ()
    elif "stage_blocks" in given:
        options["slim_after"] = tuple(itertools.accumulate(given["stage_blocks"][:-1]))
    published = re.fullmatch(r"sit_lvvit_(\w+)", call[1])
    return f"sit_{published[1]}" if published else "lvvit_nano", options


def tap(model: nn.Module, block: int) -> Point:
    """Where the authors read the tokens of a block: behind its slimming where it has one."""
    slim = block + 1 in model.slim_after
    name = f"tsm.{model.slim_after.index(block + 1)}" if slim else f"blocks.{block}"
    return Point(name, "tokens", model.embed_dim, None, prefix=1, macs=0.0)


def number(record: dict, name: str, default: float = 0) -> float:
    """An argument that the record's entry names."""
    found = re.search(rf"\b{name}\s*=\s*([\d.]+)", record["entry"])
    return float(found[1]) if found else default


def token_slimming(record: dict) -> Outputs:
    state = rename_keys({f"tsm.0.{k}": v for k, v in golden.state_of(record).items()}, LVViT.key_table)
    state = {k.removeprefix("tsm.0."): v for k, v in state.items()}
    dim, slots = len(state["score.0.weight"]), len(state["score.3.bias"])
    return module(TokenSlimming(dim, slots), record, state)


def reverse_slimming(record: dict) -> Outputs:
    state = golden.state_of(record)
    places, dim = len(state["mlp1.fc2.bias"]), len(state["norm1.weight"])
    ratio = len(state["mlp1.fc1.bias"]) // places
    return module(ReverseSlimming(dim, state["mlp1.fc1.weight"].shape[1], places, ratio), record, state)


def module(made: nn.Module, record: dict, state: dict) -> Outputs:
    made = made.double().train(record["train"])
    made.load_state_dict(state)
    assert sum(p.numel() for p in made.parameters()) == record["params"]
    return {"out": made(*golden.inputs_of(record).values())}


def frd_loss(record: dict) -> Outputs:
    given = golden.inputs_of(record)
    student, teacher = ([given[k] for k in sorted(given) if k.startswith(s) and k[1:].isdigit()] for s in "st")
    temperature = number(record, "tau", 1)
    by_class = F.cross_entropy(given["sl"], given["target"].softmax(-1))
    by_token = number(record, "lambda_token", 2) * token_distance(student, teacher)
    by_logit = number(record, "lambda_logits", 2) * logit_distance(given["sl"], given["tl"], temperature)
    return {
        "out.loss": by_class + by_token + by_logit,
        "out.cls": by_class,
        "out.token": by_token,
        "out.logits": by_logit,
    }


CASES = {
    "frd_loss": frd_loss,
    "lvvit_tiny_teacher": network,
    "reverse_tsm": reverse_slimming,
    "sit_small": network,
    "sit_tiny": network,
    "sit_tiny_train": network,
    "six_conv_stem": network,
    "tsm": token_slimming,
}
