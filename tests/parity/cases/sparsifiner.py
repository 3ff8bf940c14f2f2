"""How the goldens of sparsifiner are computed."""

from __future__ import annotations

import re
from collections.abc import Callable

import golden
import torch
from torch import Tensor, nn

import vitalloy
from cases.common import Outputs
from vitalloy.compression.tokens import sparsifiner
from vitalloy.compression.tokens.sparsifiner import losses

HEAD_DIM = 32  # of the small records; their widths stand in the weights


def numbers(record: dict, name: str, default: float | list[float]) -> list[float]:
    """The numbers behind a name in the record's entry: "dim 96", "attn keep [.5,.4]"."""
    found = re.search(rf"{name} ?\[?((?:[\d.]+,?\s?)+)", record["entry"])
    if not found:
        return default if isinstance(default, list) else [default]
    return [float(part.strip(". ") if part.count(".") > 1 else part) for part in found[1].strip(" ,").split(",")]


def predictor_options(record: dict) -> dict:
    threshold = numbers(record, "coefficient threshold", -1)[0]
    return {
        "n_factor": numbers(record, "n factor", 4)[0],
        "c_factor": numbers(record, "c factor", 2)[0],
        "basis_threshold": numbers(record, "basis threshold", 0.02)[0],
        "coefficients": int(numbers(record, "coefficient top-", 8)[0]),
        "coefficient_threshold": threshold if threshold >= 0 else None,
    }


def small(record: dict) -> dict:
    """Arguments of create_model, as the shapes of the recorded weights tell them."""
    shapes = {name: shape for name, shape, _ in record["state"]}
    dim = shapes["cls_token"][2]
    return {
        "img_size": record["inputs"]["image"]["shape"][-1],
        "embed_dim": dim,
        "depth": len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        "num_heads": dim // HEAD_DIM,
        "num_classes": shapes["head.weight"][0],
    }


def run(model: nn.Module, record: dict, **options: object) -> Outputs:
    """The sparse model's answer, its features, the maps of the recorded blocks and the shares of zeros."""
    images = golden.inputs_of(record)["image"]
    model = model.double().eval()
    settings, left = sparsifiner.plan(model, images, **predictor_options(record), **options)
    assert not left
    sparsifiner.rebuild(model, **settings)
    vitalloy.load_checkpoint(model, sparsifiner.from_published(golden.state_of(record)))
    assert sum(p.numel() for p in model.parameters()) == record["params"]
    model.train(record["train"])
    phase = sparsifiner.reconstructing(model) if "RECON" in record["entry"] else torch.no_grad()
    dead: dict[str, Tensor] = {}
    for name, block in model.named_modules():
        if hasattr(block, "prune_tokens"):
            block.register_forward_hook(
                lambda m, _a, _o, name=name: dead.__setitem__(name, m.prune_tokens.state.dead), prepend=False
            )
    with phase, sparsifiner.watched(model) as seen:
        tokens = model.forward_features(images)
        logits = model.forward_head(tokens)
    patches = tokens[:, 1:]
    aux = getattr(model, "aux_head", None)
    found = {"out.logits": logits, "out.features": patches if aux is None else aux(patches)}
    for name, maps in seen.items():
        block = name.split(".")[1]
        found |= {
            f"out.basis_coef{block}": maps[0].coefficients,
            f"out.approx_attn{block}": maps[0].approximate,
            f"out.attn_mask{block}": maps[0].mask,
            f"out.masked_attn{block}": maps[0].masked,
            f"out.unmasked_attn{block}": maps[0].unmasked,
        }
    for name, mask in dead.items():
        if mask is not None:
            found[f"out.token_mask{name.split('.')[1]}"] = (~mask[:, 1:]).double()
    shares = sparsifiner.sparsity(model, images)
    names = {"basis": "basis", "coefficients": "basis_coef", "mask": "attn_mask"}
    return found | {f"out.{names[part]}_sparsity": torch.tensor([share]) for part, share in shares.items()}


def plain(**options: object) -> Callable[[dict], Outputs]:
    def case(record: dict) -> Outputs:
        model = vitalloy.create_model("deit_small_patch16_224", **small(record))
        return run(model, record, keep=numbers(record, "attn keep", [0.5, 0.4, 0.3, 0.2]), **options)

    return case


def published(record: dict) -> Outputs:
    model = vitalloy.create_model("deit_small_patch16_224")
    return run(model, record, keep=numbers(record, "keep rate", 0.25)[0])


def threshold(record: dict) -> Outputs:
    record = record | {
        "entry": record["entry"].replace("coefficient threshold 0.06 and score", "coefficient threshold 0.06, score")
    }
    return plain(score_threshold=numbers(record, "score threshold", 0.02)[0])(record)


def token_pruning(record: dict) -> Outputs:
    where = [int(n) for n in re.findall(r"\d+", re.search(r"of blocks ([\d, and]+)", record["entry"])[1])]
    shares = numbers(record, "token keep", [])
    return plain(tokens=[shares[i] for i in where], locations=where, drop=False)(record)


def lv_vit(record: dict) -> Outputs:
    options = small(record) | {"stem": "4_2", "dense_head": True}
    return run(vitalloy.create_model("lvvit_small", **options), record, keep=numbers(record, "keep", 0.25)[0])


def mask_predictor(record: dict) -> Outputs:
    q, k = golden.inputs_of(record).values()
    state = sparsifiner.from_published(
        {
            name.replace("p.", "blocks.0.attn.mask_predictor.", 1): value
            for name, value in golden.state_of(record).items()
        }
    )
    predictor = sparsifiner.MaskPredictor(k.shape[2], k.shape[1], k.shape[3], **predictor_options(record)).double()
    predictor.load_state_dict({name.split("predictor.")[1]: value for name, value in state.items()})
    assert sum(p.numel() for p in predictor.parameters()) == record["params"]
    attend = sparsifiner.SparseAttend(predictor, keep=numbers(record, "keep", 0.3)[0], prefix=1).eval()
    attend.watched = []
    attend(q, k, k)
    maps = attend.watched[0]
    return {"out.basis_coef": maps.coefficients, "out.approx_attn": maps.approximate, "out.attn_mask": maps.mask}


def terms(distance: str) -> Callable[[dict], Outputs]:
    def case(record: dict) -> Outputs:
        x = golden.inputs_of(record)
        taught = [x["u0"].softmax(-1), x["u1"].softmax(-1)]
        guesses, masks = [x["a0"], x["a1"]], [x["u0"].abs(), x["u1"].abs()]
        found = {
            "cls_loss": 1.0 * losses.cross_entropy(x["logits"], x["target"].softmax(-1)),
            "cls_distill_loss": 0.5 * losses.answer_distance(x["logits"], x["tl"]),
            "token_distill_loss": 0.5 * losses.token_distance(x["ts"], x["tt"], distance),
            "attn_recon_loss": 0.01 * losses.reconstruction(guesses, taught, distance),
            "attn_self_distill_loss": 0.002 * losses.reconstruction(guesses, taught[::-1]),
            "least_k_loss": 0.01 * losses.least_entries(masks, 4),
            "ratio_loss": 2.0 * losses.kept_ratio(masks, 0.25),
        }
        return {f"out.{name}": value for name, value in found.items()} | {"out.total": sum(found.values())}

    return case


CASES = {
    "sparsifiner_s": published,
    "small_token_pruning": token_pruning,
    "small_threshold": threshold,
    "small_recon_train": plain(),
    "lvvit_small": lv_vit,
    "mask_predictor": mask_predictor,
    "losses": terms("mse"),
    "losses_kl": terms("kl"),
}
