"""Every family keeps timm's contract and goes through PyTorch's tools: one small variant of each registered class."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import safetensors.torch
import torch
from timm.models._manipulate import group_with_matcher
from timm.optim import param_groups_layer_decay
from torch import nn

import vitalloy
from vitalloy import registry
from vitalloy.deployment import export_onnx, verify_onnx
from vitalloy.layers import fusion, streaming
from vitalloy.layers.tokens import to_tokens

vitalloy.list_models()  # fills the registry
FAMILIES = {entry.cls.__name__: entry.cls for entry in registry._ENTRIES.values()}

# shallower and narrower than any variant; a family without a row is tested as its smallest variant is
REDUCED = {
    "ConViT": {"depth": 4, "local_depth": 2},
    "CASViT": {"depths": (1, 1, 1, 1)},
    "ConvNeXt": {"patch_size": 2, "depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64), "layer_scale": 0.1},
    "CrossViT": {"depths": ((1, 1, 0),) * 3},
    "DualTokenViT": {"depths": (1, 1, 1)},
    "DynamicHybridViT": {"embed_dim": 64, "depth": 3},
    "FMViT": {"depths": (1, 1, 2, 1), "init_std": 0.055},
    "PyramidVisionTransformer": {"embed_dims": (16, 32, 48, 64), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4)},
    "PyramidVisionTransformerV2": {"depths": (1, 1, 2, 1)},
    "SwinTransformer": {"depths": (2, 2, 1, 1)},
    "TransNeXt": {"depths": (1, 1, 1, 1)},
    "Twins": {"depths": (2, 2, 1, 1)},
    "UniFormerLight": {"depths": (1, 1, 2, 1)},
    "VisionTransformer": {"depth": 3},
}
# forms of a family that take other paths through its code
FORMS = {
    "CASViT/distilled": {"distilled": True},
    "ConvShareViT/no class token, same padding": {"class_token": False, "global_pool": "avg", "padding": "same"},
    "ConvShareViT/unshared": {"shared": False, "depth": 3},
    "CoSwin/no local branch": {"local_branch": False},
    "CrossViT/average": {"global_pool": "avg"},
    "DualTokenViT/perceptron": {
        "mix": False,
        "fusion": "local",
        "layer_scale": 0.1,
        "token_weight": 0.3,
        "attn_norm": False,
    },
    "DuoFormer/channel": {"scale_token": "channel", "num_scales": 3, "head_norm": True},
    "FMViT/other readings": {"mix": "both", "mixer": "grouped", "shared_kv": True, "identity": False},
    "LVViT/dense": {"stem": "4_2", "dense_head": True},
    "NextViT/dense": {"pooling": "square", "extra_norm": True, "depths": (1, 1, 2, 1), "init_std": 0.065},
    "TransNeXt/linear": {"fixed_pool_size": 3, "position_mode": "interpolate"},
    "UniFormer/scales and windows": {"layer_scale": 0.1, "attention": "hybrid", "window": 3},
    "UniFormer/token labels": {"token_labels": True, "depths": (1, 1, 1, 1)},
    "UniFormerLight/scales": {"layer_scale": 0.1},
    "UniFormerVideo/divided": {"split": True, "std": True},
    "VisionTransformer/distilled": {"distilled": True},
    "VisionTransformer/avg": {"global_pool": "avg"},
    "CvT/no class token": {"class_token": False, "projection": "avg", "depths": (1, 1, 1)},
    "VisionTransformer/anchored": {"anchored": True},
}
CASES = [*FAMILIES, *FORMS]
MERGING = ("SelfSlimmedViT",)


def build(case: str, **kwargs) -> nn.Module:
    family = case.split("/")[0]
    entries = [entry for entry in registry._ENTRIES.values() if entry.cls.__name__ == family]
    smallest = min(entries, key=lambda entry: max(entry.cfg["input_size"]))
    kwargs = {**REDUCED.get(family, {}), **FORMS.get(case, {}), **kwargs}
    torch.manual_seed(0)
    model = vitalloy.create_model(smallest.name, num_classes=5, img_size=side_of(case), **kwargs)
    count = sum(p.numel() for p in model.parameters())
    assert count < 2_000_000, f"{family}: give it a nano variant, or a row in REDUCED ({count} parameters)"
    return model


def side_of(case: str) -> int:
    return 64 if case.split("/")[0] == "PyramidVisionTransformer" else 32


def frames_of(case: str) -> tuple[int, ...]:
    """(frames,) for families that take clips, nothing for those that take images."""
    family = case.split("/")[0]
    sizes = [entry.cfg["input_size"] for entry in registry._ENTRIES.values() if entry.cls.__name__ == family]
    return (4,) if len(sizes[0]) == 4 else ()


def images(case: str, batch: int = 2) -> torch.Tensor:
    shape = (batch, 3, *frames_of(case), side_of(case), side_of(case))
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def answer(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Logits; the mean of both where a model gives two answers in training."""
    logits = model(x)
    return logits if isinstance(logits, torch.Tensor) else torch.stack(logits).mean(0)


@pytest.fixture(params=CASES)
def case(request) -> str:
    return request.param


@pytest.fixture(params=list(FAMILIES))
def family(request) -> str:
    return request.param


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def grad_of(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    answer(model, x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_forward_is_features_then_head(case):
    model, x = build(case).eval(), images(case)
    kept = x.clone()
    logits = model(x)
    assert logits.shape == (2, 5) and torch.equal(x, kept)
    features = model.forward_features(x)
    assert features.shape[::2] == (2, model.num_features)
    assert torch.equal(model.forward_head(features), logits)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert not close(logits[0], logits[1], 1e-4), "the answer does not depend on the image"


def test_inference_and_batch_size_do_not_change_the_answer(case, monkeypatch):
    monkeypatch.setattr(streaming, "WORTHWHILE", 1000)  # or these models would be too small for the way in pieces
    model, x = build(case).eval(), images(case, 9)
    with torch.inference_mode():
        together, alone = model(x), model(x[4:5])
    assert close(together, model(x).detach())
    assert close(together[4:5], alone)


def test_intermediates(case):
    model, x = build(case).eval(), images(case)
    final, maps = model.forward_intermediates(x)
    info = model.feature_info
    assert torch.equal(final, model.forward_features(x))
    side, frames = x.shape[-1], [t // 2 for t in frames_of(case)]
    assert [tuple(m.shape) for m in maps] == [
        (2, row["num_chs"], *frames, side // row["reduction"], side // row["reduction"]) for row in info
    ]
    last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(last_two, maps[-2:], strict=True))
    tokens = model.forward_intermediates(x, indices=[0, -1], output_fmt="NLC", intermediates_only=True)
    assert all(torch.equal(t, to_tokens(m)) for t, m in zip(tokens, (maps[0], maps[-1]), strict=True))
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_stop_early_runs_nothing_behind_the_last_wanted_level(case):
    model, x = build(case).eval(), images(case)
    wanted = model.forward_intermediates(x, indices=[0], intermediates_only=True)[0]
    behind = [row["module"] for row in model.feature_info[1:]]
    ran = [model.get_submodule(name).register_forward_pre_hook(lambda *_: pytest.fail("ran")) for name in behind]
    got = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)[0]
    assert ran and torch.equal(got, wanted)


def test_norm_and_prefix_tokens_of_the_last_level_are_the_final_features(case):
    model, x = build(case).eval(), images(case)
    final, levels = model.forward_intermediates(x, indices=1, norm=True, return_prefix_tokens=True, output_fmt="NLC")
    prefix = model.num_prefix_tokens
    patches, tokens = levels[0] if prefix else (levels[0], None)
    if prefix:
        assert close(tokens, final[:, :prefix])
    if case in MERGING:  # a map has a place for every patch, the final tokens are fewer
        assert patches.shape[1] > final.shape[1] - prefix
    else:
        assert close(patches, final[:, prefix:])


def test_features_only(case):
    model, x = build(case, features_only=True).eval(), images(case)
    maps = model(x)
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [x.shape[-1] // m.shape[-1] for m in maps] == model.feature_info.reduction()
    assert not any("head" in name for name, _ in model.named_parameters())
    picked = build(case, features_only=True, out_indices=(1,)).eval()
    whole = build(case).eval()
    vitalloy.load_checkpoint(whole, {f"module.{k}": v for k, v in picked.state_dict().items()}, strict=False)
    form = getattr(type(whole), "features_arch", {})
    if not form:  # otherwise the dense form is another network
        assert close(picked(x)[0], whole.forward_intermediates(x, [1], intermediates_only=True)[0])
    assert len(picked.state_dict()) < len(model.state_dict()), "levels behind the last wanted one were kept"


def test_the_classifier_can_be_replaced(case):
    model, x = build(case).double().eval(), images(case).double()
    before = model.forward_features(x)
    model.reset_classifier(7)
    assert model.num_classes == 7 and model(x).shape == (2, 7) and model(x).dtype == torch.float64
    assert model.get_classifier().out_features == 7
    model.reset_classifier(0)
    assert torch.equal(model.forward_features(x), before)
    assert torch.equal(model(x), model.forward_head(before, pre_logits=True))


def test_gradient_checkpointing_changes_no_gradient(case):
    model, x = build(case).train(), images(case)
    plain = grad_of(model, x)
    assert all(g.isfinite().all() for g in plain.values())
    missing = {name for name, _ in model.named_parameters()} - set(plain)
    assert not missing, f"no gradient reaches {missing}"
    calls = []
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.Conv2d):
            module.register_forward_hook(lambda *_: calls.append(1))
    state = {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "tracked" in k}
    grad_of(model, x)
    once = len(calls)
    model.set_grad_checkpointing()
    for key, value in state.items():
        model.state_dict()[key].copy_(value)
    again = grad_of(model, x)
    assert len(calls) > 2.5 * once, "the blocks were not computed anew"
    assert all(close(again[name], plain[name]) for name in plain)


def test_mixed_and_double_precision(case):
    model, x = build(case).eval(), images(case)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x)
        assert close(mixed.float(), exact, 0.1)
        assert close(copy.deepcopy(model).double()(x.double()).float(), exact)
        assert close(model.bfloat16()(x.bfloat16()).float(), exact, 0.1)


@pytest.mark.parametrize("case", FORMS)  # ONNX files begin with an export of every family
def test_export_with_a_free_batch(case):
    model, x = build(case).eval(), images(case)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=False).module()
    more = images(case, 5)
    with torch.no_grad():
        assert close(program(more), model(more))


def test_onnx_files_take_any_batch_and_agree(family, tmp_path):
    """What is written is the folded form; it is held against the model as it is."""
    model, x = build(family).eval(), images(family)
    exported = export_onnx(model, x, tmp_path / "model.onnx")
    found = verify_onnx(model, exported.path, [images(family, 3), x[:1]], tolerance=1e-3)
    assert found.images == 4 and not getattr(model, "fused", False)


def test_trace(case):
    model, x = build(case).eval(), images(case)
    traced = torch.jit.trace(model, x, check_trace=False)
    other = images(case).flip(0) + 0.1
    assert close(traced(other), model(other))


def test_compile_without_graph_breaks(case):
    model, x = build(case).eval(), images(case)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert close(compiled(x), model(x))


def test_copies_and_pickles_are_independent_and_equal(case):
    model, x = build(case).eval(), images(case)
    wanted = model(x)
    copied, revived = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(copied(x), wanted) and torch.equal(revived(x), wanted)
    assert torch.equal(model(x), torch.zeros(2, 5)), "a stale cache"


def test_state_round_trip(case, tmp_path):
    model, x = build(case).eval(), images(case)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
    fresh = build(case).eval()
    assert not close(fresh(x), model(x))  # also fills whatever the model may keep for inference
    assert vitalloy.load_checkpoint(fresh, tmp_path / "w.safetensors") == vitalloy.checkpoints.Loaded()
    assert torch.equal(fresh(x), model(x))


def test_layer_wise_learning_rates_know_every_parameter(case):
    model = build(case)
    names = [name for name, _ in model.named_parameters()]
    for coarse in (False, True):
        groups = group_with_matcher(model.named_parameters(), model.group_matcher(coarse), reverse=True)
        assert sorted(groups) == sorted(names)
        patterns = [
            p for part in model.group_matcher(coarse).values() for p in ([part] if isinstance(part, str) else part)
        ]
        patterns = [p if isinstance(p, str) else p[0] for p in patterns]
        unknown = {name.split(".")[0] for name in names if not any(re.match(p, name) for p in patterns)}
        assert unknown <= {"head", "head_dist", "norm", "fc_norm"}, "they would learn as fast as the classifier"
        levels = [min(_of(groups, row["module"])) for row in model.feature_info]
        assert levels == sorted(levels) and levels[0] < levels[-1]
        stem = registry.entry(model.build_args["name"]).cfg["first_conv"]
        assert groups[f"{stem}.weight"] == 0
    rates = param_groups_layer_decay(model, layer_decay=0.5, weight_decay=0.05)
    assert sum(len(g["params"]) for g in rates) == len(names)
    scale = {id(p): g["lr_scale"] for g in rates for p in g["params"]}
    assert scale[id(model.get_classifier().weight)] == 1 > scale[id(model.get_parameter(f"{stem}.weight"))]


def _of(groups: dict[str, int], module: str) -> list[int]:
    return [group for name, group in groups.items() if name.startswith(f"{module}.")]


def test_names_that_weight_decay_spares_exist(case):
    model = build(case)
    names, spared = {name for name, _ in model.named_parameters()}, set(model.no_weight_decay())
    tokens = ("cls_token", "dist_token")
    assert {name for name in spared if not name.endswith(tokens)} <= names
    assert {name for name in names if name.endswith(tokens)} <= spared
    listed = [name for name in spared if name.endswith((".weight", ".bias"))]
    assert not any(model.get_parameter(name).ndim < 2 for name in listed), "these are spared without being named"


def test_names_that_the_configuration_gives_exist(case):
    model = build(case)
    cfg = model.default_cfg
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv3d if frames_of(case) else nn.Conv2d)
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    for row in model.feature_info:
        model.get_submodule(row["module"])


def test_fused_models_answer_the_same(case):
    model, x = build(case), images(case, 8)
    for _ in range(3):
        model.train()(x)  # running statistics that are not the initial ones
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.05 * torch.randn_like(p))
            if p.ndim < 2 and not name.endswith(("bias", "p")):
                p.mul_(1.5)
    model = model.double().eval()
    kept = copy.deepcopy(model)
    fused, x = model.fuse(), x.double()
    assert fused is model and fused.fuse() is model and not model.training
    with pytest.raises(vitalloy.VitalloyError, match="fused"):
        fused.load_state_dict(kept.state_dict())
    with torch.no_grad():
        assert close(fused(x), kept(x), 1e-9)
        assert close(fusion.fuse(fused)(x), kept(x), 1e-9), "fusing again changed the model"
        assert close(copy.deepcopy(fused).float()(x.float()).double(), kept(x), 1e-4)
        other = torch.nn.functional.interpolate(x, scale_factor=1.5)
        assert close(fused(other), kept(other), 1e-9)


def test_generalized_mean_pooling(family):
    model, x = build(family, global_pool="ggem"), images(family)
    groups = len(model.pool.mean.p)
    assert groups > 1 and model.num_features % groups == 0
    grads = grad_of(model, x)
    assert grads["pool.mean.p"].isfinite().all() and grads["pool.mean.p"].abs().sum() > 0
    assert {name for name, _ in model.named_parameters()} == set(grads)
    assert "pool.mean.p" in model.no_weight_decay() or model.pool.mean.p.ndim < 2
    features = model.forward_features(x)
    p, pooled = model.pool.mean.p.repeat_interleave(model.num_features // groups), model.pool(features)
    wanted = features[:, model.num_prefix_tokens :].clamp(min=1e-6).pow(p).mean(1).pow(1 / p)
    assert close(pooled, wanted, 1e-4)


def test_a_few_steps_learn_a_batch(case):
    model, x = build(case).train(), images(case, 8)
    labels = torch.arange(8) % 5
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(answer(model, x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses


@pytest.mark.parametrize("size", [(40, 56), (45, 70)])
def test_another_input_size_runs(family, size):
    model = build(family).train()
    x = torch.randn(2, 3, *frames_of(family), *(s * side_of(family) // 32 for s in size))
    final, maps = model.forward_intermediates(x)
    assert answer(model, x).shape == (2, 5) and final.isfinite().all()
    for row, level in zip(model.feature_info, maps, strict=True):
        wanted = [s / row["reduction"] for s in x.shape[-2:]]
        assert all(w - 1 < got < w + 1 for got, w in zip(level.shape[-2:], wanted, strict=True))
    grads = grad_of(model, x)
    assert all(g.isfinite().all() for g in grads.values())
