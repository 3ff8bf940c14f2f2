"""system/case -> how the public API computes what the golden record holds.

A row is a callable from the record to named outputs. `Model` covers the usual case: build by name, load the authors'
state dict, run, and read inner tensors with hooks on modules of the recorded names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import golden
import torch
from torch import Tensor, nn

import vitalloy
from vitalloy.backbones import convit, cvt
from vitalloy.heads import RetinaNet, SemanticFPN, boxes
from vitalloy.layers.positions import resample_positions
from vitalloy.training.objectives.distillation.deit import DistillationLoss

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


def distilled_pair(result: tuple[Tensor, Tensor]) -> Outputs:
    return {"out.class": result[0], "out.distillation": result[1]}


def position_tables(record: dict) -> Outputs:
    table = golden.inputs_of(record)["pos"].float()  # the record was computed in float32
    grids = {"out.to_24x24_1prefix": (24, 24), "out.to_7x10_1prefix": (7, 10), "out.same": (14, 14)}
    return {name: resample_positions(table, grid, prefix=1) for name, grid in grids.items()}


def distillation_losses(record: dict) -> Outputs:
    cls, dist, teacher, target = golden.inputs_of(record).values()
    labels = target.argmax(1)
    terms = {
        "out.base": DistillationLoss("hard", alpha=0.0),
        "out.soft_tau3": DistillationLoss("soft", alpha=1.0, tau=3.0),
        "out.hard": DistillationLoss("hard", alpha=1.0),
        "out.total_hard_alpha0.5": DistillationLoss("hard", alpha=0.5),
        "out.total_soft_alpha0.1": DistillationLoss("soft", alpha=0.1, tau=3.0),
    }
    return {k: loss((cls, dist), labels, teacher).reshape(1) for k, loss in terms.items()}


def cvt_block(record: dict) -> Outputs:
    block = cvt.Block(48, 3, class_token=True).double().eval()
    vitalloy.load_checkpoint(block, golden.state_of(record))
    seen: Outputs = {}
    listen(block, "out.attn", "attn", seen)
    return {"out.out": block(golden.inputs_of(record)["tokens"], (7, 9)), **seen}


def convit_tiny(record: dict) -> Outputs:
    maps: Outputs = {}

    def watch(model: nn.Module) -> None:
        attention = model.blocks[0].attn
        attention.register_forward_pre_hook(
            lambda m, args: maps.__setitem__("out.blocks.0.attention_map", m.attention_map(*args))
        )

    return {**Model("convit_tiny", prepare=watch)(record), **maps}


def convit_gpsa(record: dict) -> Outputs:
    attention = convit.GatedPositionalAttention(72, 9, qkv_bias=True).double().eval()
    vitalloy.load_checkpoint(attention, golden.state_of(record))
    tokens, grid = golden.inputs_of(record)["tokens"], (6, 6)
    full = attention.attention_map(tokens, grid)
    distance = convit.mean_distance(full, grid)
    return {"out.out": attention(tokens, grid), "out.attention": full, "out.nonlocality": distance}


def convit_local_init(record: dict) -> Outputs:
    out: Outputs = {}
    for dim, heads, strength in ((16, 4, 1.0), (18, 9, 0.5), (24, 12, 1.0)):
        attention = convit.GatedPositionalAttention(dim, heads)
        attention.init_local(strength)
        case, rows = f"dim{dim}_heads{heads}_strength{strength}", int(heads**0.5) ** 2
        out[f"{case}.pos_proj_weight_rows_set"] = attention.pos_proj.weight[:rows]
        out[f"{case}.v_weight"] = attention.v.weight
    return out


def pyramid_features(name: str) -> Callable[[dict], Outputs]:
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


def semantic_fpn(record: dict) -> Outputs:
    paths = {f"out.neck.{i}": f"neck.{i}" for i in range(4)} | {"out.logits_stride4": "decode_head"}
    logits, seen = whole(SemanticFPN("pvt_tiny", num_classes=150), record, paths)
    return {**seen, "out.logits_full": logits}


def retinanet(record: dict) -> Outputs:
    paths = {f"out.neck.{i}": f"neck.{i}" for i in range(5)}
    levels, seen = whole(RetinaNet("pvt_tiny", num_classes=80), record, paths)
    return {**seen, **golden.flatten({"cls": levels.classes, "reg": levels.boxes})}


def retinanet_anchors(record: dict) -> Outputs:
    base = boxes.base_anchors(8)
    anchors = boxes.grid_anchors(base, 8, (4, 5))
    first, noise = anchors[:40], golden.make_input((40, 4), "uniform", seed=13, low=-3, high=3)
    return {
        "base_anchors_stride8": base,
        "anchors_level0_4x5": anchors,
        "anchors_level1_2x3": boxes.grid_anchors(boxes.base_anchors(16), 16, (2, 3)),
        "decoded": boxes.decode(first, 0.3 * golden.make_input((40, 4), seed=12), (32, 40)),
        "encoded": boxes.encode(first.float(), (first + noise).float()),  # mmdetection encodes in float32
    }


CVT_SMALL = {
    "embed_dims": (32, 48, 64),
    "num_heads": (1, 2, 4),
    "depths": (1, 1, 2),
    "class_token": False,
    "projection": "avg",
    "qkv_bias": (False, True, False),
    "kv_strides": (2, 2, 1),
    "num_classes": 10,
}

CASES: dict[str, Callable[[dict], Outputs]] = {
    "vit_deit/deit_tiny_224": Model("deit_tiny_patch16_224"),
    "vit_deit/deit_tiny_distilled_224": Model("deit_tiny_distilled_patch16_224"),
    "vit_deit/deit_tiny_distilled_train_outputs": Model(
        "deit_tiny_distilled_patch16_224",
        result=distilled_pair,
        prepare=lambda model: model.train().set_distilled_training(True),
    ),
    "vit_deit/vit_small_patch32_gap": Model("vit_small_patch32_224", {"global_pool": "avg", "num_classes": 10}),
    "vit_deit/resample_pos_embed": position_tables,
    "vit_deit/distillation_losses": distillation_losses,
    "convnext_swin_baselines/convnext_tiny_224": Model(
        "convnext_tiny",
        rename={"out.head.norm": "norm"},
        result="out.out",
        reshape={"out.head.norm": lambda t: t[:, :, None, None]},
    ),
    "convnext_swin_baselines/swin_tiny_224": Model("swin_tiny_patch4_window7_224", result="out.out"),
    "convnext_swin_baselines/swin_tiny_w4_96": Model(
        "swin_tiny_patch4_window7_224", {"img_size": 96, "window_size": 4, "num_classes": 10}, result="out.out"
    ),
    "convit/tiny_224": convit_tiny,
    "convit/gpsa_module": convit_gpsa,
    "convit/local_init": convit_local_init,
    "pvt/pvt_tiny_224": Model("pvt_tiny"),
    "pvt/pvt_tiny_cls_192x160": Model("pvt_tiny"),
    "pvt/pvt_tiny_features_256x320": pyramid_features("pvt_tiny"),
    "pvt/pvt_v2_b0_224": Model("pvt_v2_b0"),
    "pvt/pvt_v2_linear_small_224": Model("pvt_v2_b0", {"linear": True, "depths": (1, 1, 2, 1)}),
    "pvt/pvt_v2_b0_features_200x264": pyramid_features("pvt_v2_b0"),
    "pvt/semantic_fpn_pvt_tiny_128x160": semantic_fpn,
    "pvt/retinanet_pvt_tiny_128x160": retinanet,
    "pvt/retinanet_anchors": retinanet_anchors,
    "cvt/cvt13_224": Model("cvt_13"),
    "cvt/avg_nocls_small": Model("cvt_13", CVT_SMALL),
    "cvt/block_clstoken": cvt_block,
}
