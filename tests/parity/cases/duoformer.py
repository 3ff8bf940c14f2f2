"""How the goldens of duoformer are computed; sizes are read from the record's shapes."""

from __future__ import annotations

import re
from typing import Any

import golden
import torch
from torch import Tensor, nn

import vitalloy
from cases.common import Outputs
from vitalloy.backbones import duoformer


def arguments(record: dict) -> dict[str, Any]:
    """The arguments of create_model that make a model of the record's shapes."""
    shapes = {k.removeprefix("vision_transformer."): shape for k, shape, _ in record["state"]}
    classes, dim = shapes["head.weight"]
    return {
        "num_classes": classes,
        "embed_dim": dim,
        "num_heads": int(re.search(r"heads (\d+)", record["entry"])[1]),  # shapes do not show them
        "depth": sum(bool(re.match(r"blocks\.\d+\.attn\.qkv\.weight", k)) for k in shapes),
        "num_scales": {6: 2, 22: 3, 86: 4}[shapes["pos_embed_for_scale"][2]],
        "trunk": "resnet50" if "resnet_projector.4.0.conv3.weight" in shapes else "resnet18",
        "scale_token": "channel" if "chann_proj1.conv1.weight" in shapes else "random",
    }


def whole(record: dict) -> Outputs:
    """Trunk, projections, gathered tokens, scale blocks (all of their tokens), patch blocks, logits."""
    args = arguments(record)
    model = vitalloy.create_model("duoformer_r50_s4_random", **args).to(getattr(torch, record["dtype"]))
    vitalloy.load_checkpoint(model, golden.state_of(record))
    ignored = 2 * args["embed_dim"]  # the norm that the authors' code computes for nothing
    assert sum(p.numel() for p in model.parameters()) == record["params"] - ignored
    model.train(record["train"])
    seen: Outputs = {}

    def keep(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _m, _i, out: seen.__setitem__(f"out.{name}", out))

    for i, project in enumerate(model.project):
        keep(f"proj{3 - i}", project)
    keep("patch0", model.transformer.patch_blocks[0])
    keep("patch_out", model.transformer)
    model.transformer.register_forward_pre_hook(lambda _m, args: seen.__setitem__("out.tokens", args[0]))
    if model.channel_token is not None:
        keep("channel_token", model.channel_token)
    seen["out.logits"] = model(golden.inputs_of(record)["image"])
    if "out.channel_token" in seen:
        seen["out.channel_token"] = seen["out.channel_token"].flatten(2)
    x = seen["out.tokens"] + model.transformer.scale_pos
    for block in model.transformer.scale_blocks:  # the model reads one token of the last one
        x = block(x)
    return {**seen, "out.scale_out": x}


def transformer(record: dict) -> Outputs:
    model = vitalloy.create_model("duoformer_nano", small_images=False, img_size=224, **_inner(record)).double().eval()
    state = {f"vision_transformer.{k}": v for k, v in golden.state_of(record).items()}
    loaded = vitalloy.load_checkpoint(model, state, strict=False)
    assert not loaded.unexpected and not [k for k in loaded.missing if k.startswith(("transformer", "head"))]
    return {"out": model.forward_head(model.transformer(golden.inputs_of(record)["tokens"], (7, 7)))}


def _inner(record: dict) -> dict[str, Any]:
    return {k: v for k, v in arguments(record).items() if k not in ("trunk", "scale_token")}


def channel_reducers(record: dict) -> Outputs:
    widths = [shape[1] for shape in (spec["shape"] for spec in record["inputs"].values())]
    names = vitalloy.create_model("duoformer_nano", scale_token="channel").convert_state(golden.state_of(record))
    token = duoformer.ChannelToken([*widths, 2 * widths[-1]], 8).double().eval()
    token.reduce.load_state_dict({k.removeprefix("channel_token.reduce."): v for k, v in names.items()})
    maps = golden.inputs_of(record).values()
    return {f"out.{i}": reduce(x) for i, (reduce, x) in enumerate(zip(token.reduce, maps, strict=True))}


def region_index(record: dict) -> Outputs:
    def positions(scale: int) -> Tensor:
        cells = torch.arange((7 * 2**scale) ** 2, dtype=torch.float64).view(1, 1, 7 * 2**scale, -1)
        return duoformer.region_tokens(cells, 2**scale, by_columns=scale == 1)[0, :, :, 0]

    return {f"out.{3 - scale}": positions(scale) for scale in range(4)}


CASES = {
    "r18_random_s4": whole,
    "r50_random_s3": whole,
    "r50_channel_s2": whole,
    "transformer_s4": transformer,
    "channel_reducers": channel_reducers,
    "region_index": region_index,
}
