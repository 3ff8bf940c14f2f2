"""How the goldens of efficientformer are computed."""

from __future__ import annotations

import golden
import torch
from torch import Tensor, nn

import vitalloy
from cases.common import Model, Outputs
from vitalloy.layers.tokens import to_map, to_tokens
from vitalloy.search import slimming
from vitalloy.training.objectives.distillation.deit import DistillationLoss


def part(record: dict, place: str, name: str, path: str, **kwargs) -> nn.Module:
    """A small model's part at `path`, with the record's weights, which the authors' whole model calls `place`."""
    model = vitalloy.create_model(name, **kwargs).double()
    state = {f"{place}.{k}": v for k, v in golden.state_of(record).items()}
    assert not vitalloy.load_checkpoint(model, state, strict=False).unexpected
    found = model.get_submodule(path)
    assert sum(p.numel() for p in found.parameters()) == record["params"]
    return found.train(record["train"])


def attention(record: dict) -> Outputs:
    args = {"embed_dims": (8, 8, 8, 64), "depths": (1, 1, 1, 1), "num_heads": 4, "key_dim": 16, "img_size": 160}
    mixer = part(record, "network.6.1.token_mixer", "efficientformer_l1", "block4.0.token_mixer", **args)
    tokens = golden.inputs_of(record)["tokens"]
    return {"out": mixer(tokens, to_map(tokens, (5, 5)))}


def last_stage(record: dict) -> Outputs:
    args = {"embed_dims": (8, 8, 8, 128), "depths": (1, 1, 1, 6), "num_attention": 4}
    x = golden.inputs_of(record)["image"]
    for block in part(record, "network.6", "efficientformer_l3", "block4", **args):
        x = block(x)
    return {"out": to_tokens(x)}


def pool_block(record: dict) -> Outputs:
    args = {"embed_dims": (24, 8, 8, 8), "depths": (1, 1, 1, 1)}
    return {"out": part(record, "network.0.0", "efficientformer_l1", "block1.0", **args)(*image(record))}


V2_SMALL = {"embed_dims": (8, 8, 48, 64), "depths": (1, 1, 1, 1), "mlp_ratios": (4, 4, 4, 4), "num_attention": 1}


def attention_stride2(record: dict) -> Outputs:
    args = {**V2_SMALL, "num_heads": 4, "key_dim": 16, "img_size": 7 * 16}
    place, path = "network.4.0.token_mixer", "block3.0.token_mixer"
    return {"out": part(record, place, "efficientformerv2_s0", path, **args)(*image(record))}


def attention_downsample(record: dict) -> Outputs:
    args = {**V2_SMALL, "img_size": 7 * 16}
    return {"out": part(record, "network.5.attn", "efficientformerv2_s0", "patch_embed4.attn", **args)(*image(record))}


def image(record: dict) -> tuple[Tensor, ...]:
    return tuple(golden.inputs_of(record).values())


def distillation_loss(record: dict) -> Outputs:
    logits, taught, teacher, raw = golden.inputs_of(record).values()
    labels = raw.softmax(-1)
    losses = {
        "out.hard": DistillationLoss("hard", alpha=0.5),
        "out.soft": DistillationLoss("soft", alpha=0.5, tau=3.0),
        "out.none": DistillationLoss("hard", alpha=0.0),
    }
    return {name: loss((logits, taught), labels, teacher) for name, loss in losses.items()}


def slimming_scores(record: dict) -> Outputs:
    alpha, noise, *choices = golden.inputs_of(record).values()
    late = slimming.importance(alpha)
    mixes = {f"out.mix_tau{t}": slimming.soft_choice(choices, alpha[0], t, noise[0]) for t in (1.0, 0.3)}
    early = slimming.importance(alpha[:, [0, 2]])  # where attention is no choice
    return {**mixes, "out.importance_early": early, "out.importance_late": late, "out.stage_score": torch.sum(late)}


STAGES = {
    "out.stem": "patch_embed1",
    "out.block0": "block1.0",
    "out.down1": "patch_embed2",
}
CASES = {
    "l1_224": Model(
        "efficientformer_l1",
        rename={**STAGES, "out.stage1": "block1.2", "out.stage2": "block2.1", "out.stage3": "block3.5"}
        | {"out.stage4": "block4.3"},
        reshape={"out.stage4": to_tokens},
    ),
    "v2_s0_224": Model(
        "efficientformerv2_s0",
        rename={**STAGES, "out.stage1": "block1.1", "out.stage2": "block2.1", "out.stage3": "block3.5"}
        | {"out.stage4": "block4.3"},
    ),
    "attention": attention,
    "l3_stage4": last_stage,
    "pool_block_train": pool_block,
    "v2_attention_stride2": attention_stride2,
    "v2_attention_downsample": attention_downsample,
    "distillation_loss": distillation_loss,
    "slimming_scores": slimming_scores,
}
