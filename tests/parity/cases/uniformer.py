"""How the goldens of uniformer are computed."""

from __future__ import annotations

import golden

import vitalloy
from cases.common import Model, Outputs, listen
from vitalloy.backbones.uniformer_video import inflate, inflate_kernel


def blocks(depths: tuple[int, ...], stages: str = "", first: str = "") -> dict[str, str]:
    """Recorded names of what embeddings, whole stages and their first blocks return -> our modules."""
    names = {f"out.embed{i + 1}": f"patch_embed{i + 1}" for i in range(4)}
    names |= {f"out.stage{i + 1}": f"block{i + 1}.{depth - 1}" for i, depth in enumerate(depths)}
    return names | {"out.local0": "block1.0", "out.global0": "block3.0"}


SMALL, PLUS = blocks((3, 4, 8, 3)), blocks((3, 5, 9, 3))
TINY = {"depths": (1, 1, 2, 1), "num_classes": 10}
LAYER_SCALE = {**TINY, "embed_dims": (64, 64, 128, 128), "layer_scale": 1e-6}
DIVIDED = {**TINY, "embed_dims": (32, 64, 128, 128), "split": True, "std": True}
LIGHT = {"out.first_global": "block3.0", "out.first_pruned": "block3.1", "out.stage3": "block3.7"}
LIGHT = {f"{name}{end}": f"{path}.{i}" for name, path in LIGHT.items() for i, end in enumerate(("_cls", ""))}


def dense(record: dict) -> Outputs:
    arch = {"depths": (1, 1, 4, 1), "embed_dims": (32, 64, 128, 128), "head_dim": 32}
    model = vitalloy.create_model("uniformer_small", features_only=True, attention="hybrid", window=5, **arch)
    model = model.double().eval()
    vitalloy.load_checkpoint(model, golden.state_of(record))
    assert sum(p.numel() for p in model.parameters()) == record["params"]
    return {f"out.p{i + 2}": m for i, m in enumerate(model(*golden.inputs_of(record).values()))}


def kernels(record: dict) -> Outputs:
    (weight,) = golden.inputs_of(record).values()
    spread = {f"out.t{frames}": inflate_kernel(weight, frames) for frames in (1, 3, 5)}
    return {**spread, "out.t3_center": inflate_kernel(weight, 3, centre=True)}


def inflated(record: dict) -> Outputs:
    model = vitalloy.create_model("uniformer_video_small").double().eval()
    state = golden.state_of(record)
    assert sum(t.numel() for k, t in state.items() if "running" not in k) == record["params"]
    vitalloy.load_checkpoint(model, inflate(state, model))
    seen: Outputs = {}
    for wanted in record["outputs"]:
        listen(model, wanted, SMALL.get(wanted, "head"), seen)
    model(*golden.inputs_of(record).values())
    return seen


CASES = {
    "small_224": Model("uniformer_small", rename=SMALL),
    "small_plus_96": Model("uniformer_small_plus", {"num_classes": 100}, rename=PLUS),
    "layer_scale_tiny_64": Model("uniformer_small", LAYER_SCALE, result="out"),
    "dense_hybrid_window5": dense,
    "video_small_8x96": Model("uniformer_video_small", {"num_classes": 400}, rename=SMALL),
    "video_split_std": Model("uniformer_video_small", DIVIDED, rename=blocks((1, 1, 2, 1))),
    "inflate": kernels,
    "inflated_small_8x64": inflated,
    "light_xxs_128": Model("uniformer_xxs_128", rename=LIGHT),
}
