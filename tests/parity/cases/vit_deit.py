"""How the goldens of vit_deit are computed."""

from __future__ import annotations

import golden
from torch import Tensor

from cases.common import Model, Outputs
from vitalloy.layers.positions import resample_positions
from vitalloy.training.objectives.distillation.deit import DistillationLoss


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


CASES = {
    "deit_tiny_224": Model("deit_tiny_patch16_224"),
    "deit_tiny_distilled_224": Model("deit_tiny_distilled_patch16_224"),
    "deit_tiny_distilled_train_outputs": Model(
        "deit_tiny_distilled_patch16_224",
        result=distilled_pair,
        prepare=lambda model: model.train().set_distilled_training(True),
    ),
    "vit_small_patch32_gap": Model("vit_small_patch32_224", {"global_pool": "avg", "num_classes": 10}),
    "resample_pos_embed": position_tables,
    "distillation_losses": distillation_losses,
}
