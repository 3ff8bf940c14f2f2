"""How the goldens of lgvit are computed."""

from __future__ import annotations

import re
from collections.abc import Callable

import golden
import torch
from torch import Tensor

import vitalloy
from cases.common import Outputs, listen
from vitalloy.compression.tokens import lgvit
from vitalloy.compression.tokens.lgvit import losses
from vitalloy.compression.trunk import Tokens

KIND = re.compile(r"conv\d_\d|attention_r\d+")
HEADS = re.compile(r"(\d+) heads")


def tokens_of(x: Tensor, prefix: int) -> Tokens:
    side = round((x.shape[1] - prefix) ** 0.5)
    return Tokens(x[:, prefix:], x[:, :prefix] if prefix else None, (side, side))


def head(record: dict) -> Outputs:
    state = {key.removeprefix("h."): value for key, value in golden.state_of(record).items()}
    x = golden.inputs_of(record)["tokens"]
    prefix = 2 if "cls_classifier.weight" in state else 0 if "classifier.layernorm.weight" in state else 1
    classes = next(value.shape[0] for key, value in state.items() if key.endswith("classifier.weight"))
    made = lgvit.ExitHead(x.shape[2], classes, KIND.search(record["entry"])[0], prefix)
    made = made.double().train(record["train"])
    vitalloy.load_checkpoint(made, state)
    assert sum(p.numel() for p in made.parameters()) == record["params"]
    logits, features = made(tokens_of(x, prefix))
    outputs = {"out.logits": logits, "out.features": features, "out.pooled": made.pooled(features)}
    if not record["train"]:
        assert torch.allclose(made.logits(tokens_of(x, prefix)), logits)
    return outputs


def whole(record: dict) -> lgvit.EarlyExit:
    """A reduced ViT or DeiT with its published exits, of the sizes that the recorded weights have."""
    state = {key.removeprefix("m."): value for key, value in golden.state_of(record).items()}
    image = golden.inputs_of(record)["image"]
    shapes = {key: value.shape for key, value in state.items()}
    width = shapes["deit.layernorm.weight"][0]
    classifier = "cls_classifier.weight" if "cls_classifier.weight" in shapes else "classifier.weight"
    classes = shapes[classifier][0]
    backbone = vitalloy.create_model(
        "vit_tiny_patch16_224",
        img_size=image.shape[-1],
        patch_size=shapes["deit.embeddings.patch_embeddings.projection.weight"][-1],
        num_classes=classes,
        embed_dim=width,
        depth=sum(key.endswith("layernorm_before.weight") for key in shapes),
        num_heads=int(found[1]) if (found := HEADS.search(record["entry"])) else 3,
        mlp_ratio=shapes["deit.encoder.layer.0.intermediate.dense.weight"][0] / width,
        distilled="deit.embeddings.distillation_token" in shapes,
    ).double()
    model = lgvit.published(backbone, image[:1]).train(record["train"])
    vitalloy.load_checkpoint(model, state)
    pooler = sum(value.numel() for key, value in state.items() if "pooler" in key)
    assert sum(p.numel() for p in model.parameters()) + pooler == record["params"]
    return model


def model(score: Callable[[Tensor], Tensor]) -> Callable[[dict], Outputs]:
    def run(record: dict) -> Outputs:
        made, seen = whole(record), {}
        for wanted in record["outputs"]:
            if wanted.startswith("out.hidden"):
                listen(made, wanted, f"model.blocks.{int(wanted.removeprefix('out.hidden')) - 1}", seen)
        image = golden.inputs_of(record)["image"]
        said = made.answers(image)
        for i, (logits, features) in enumerate(zip(said.exits, said.features, strict=True)):
            seen |= {f"out.exit{i}.logits": logits, f"out.exit{i}.features": features}
            seen[f"out.exit{i}.score"] = score(logits)
        if not record["train"]:
            with made.staying():
                assert torch.equal(made(image), said.final)
        return {**seen, "out.logits": said.final}

    return run


def scores(record: dict) -> Outputs:
    logits = torch.cat([*golden.inputs_of(record).values()])
    return {"out.entropy": lgvit.entropy(logits), "out.confidence_per_row": lgvit.confidence(logits)}


def stage1(step: int, strategy: str) -> Callable[[dict], Outputs]:
    def run(record: dict) -> Outputs:
        made, inputs = whole(record), golden.inputs_of(record)
        loss = lgvit.stage1_loss(made, inputs["image"], inputs["labels"], step, strategy)
        return {"out.loss": loss[None]}

    return run


def stage2(record: dict) -> Outputs:
    made, inputs = whole(record), golden.inputs_of(record)
    return {"out.loss": lgvit.stage2_loss(made, inputs["image"], inputs["labels"], as_published=True)[None]}


def stage2_terms(record: dict) -> Outputs:
    """From given tensors, subsampled as the heads r2, r2, r3, r3 do."""
    given = golden.inputs_of(record)
    local, attentive, exits = ([given[f"{part}{i}"] for i in range(n)] for part, n in (("f", 4), ("a", 4), ("l", 8)))
    last = tokens_of(given["last"], 0)
    hete = losses.heterogeneous_losses(local, attentive, last, (2, 2, 3, 3))
    homo = losses.homogeneous_losses(local, attentive)
    prediction = losses.prediction_loss(exits, given["labels"], given["teacher"])
    names = ("hete_conv_first", "hete_conv_last", "hete_attn_last_r3", "hete_attn_first_r2")
    return {
        "out.prediction": prediction,
        **{f"out.{name}": term for name, term in zip(names, hete, strict=True)},
        "out.homo_conv": homo[0],
        "out.homo_attn": homo[1],
        "out.total": prediction + losses.BETA * sum(hete) + losses.GAMMA * sum(homo),
    }


CASES = {
    "deit_small_eval": model(lgvit.confidence),
    "vit_small_eval": model(lgvit.entropy),
    "vit_small_train": model(lgvit.entropy),
    "head_conv1_1": head,
    "head_conv2_1": head,
    "head_attention_r2": head,
    "head_attention_r3": head,
    "swin_head_conv1_1": head,
    "swin_head_attention_r2": head,
    "scores": scores,
    "stage1_loss_odd": stage1(1, "alternating_weighted"),
    "stage2_full": stage2,
    "stage2_loss": stage2_terms,
}
