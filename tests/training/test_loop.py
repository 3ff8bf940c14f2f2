"""Protects: which parameters learn how fast, the schedule, and the losses."""

import random

import numpy as np
import pytest
import small_run
import torch
import torch.nn.functional as F

from vitalloy.errors import RecipeError
from vitalloy.training.loop import Classifier, lr_factor, make_optimizer, seed_epoch
from vitalloy.training.objectives.distillation.deit import DistillationLoss, hard_distillation, soft_distillation
from vitalloy.training.objectives.supervised import SupervisedLoss, soft_target_cross_entropy, soft_targets


def test_layer_decay_slows_the_layers_near_the_input():
    model = small_run.tiny_vit()
    recipe = small_run.recipe(layer_decay=0.5, lr=1.0, weight_decay=0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    rate, decay = {}, {}
    for group in make_optimizer(model, recipe).param_groups:
        for p in group["params"]:
            rate[names[id(p)]], decay[names[id(p)]] = group["lr"], group["weight_decay"]
    assert rate.keys() == set(names.values())
    layers = ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight", "head.weight"]
    slow = [rate[n] for n in layers]
    assert slow == sorted(slow) and slow[0] < slow[1] < slow[2] and rate["head.weight"] == 1.0
    assert slow[1] / slow[2] == pytest.approx(0.5)
    assert decay["head.weight"] == 0.1
    assert decay["pos_embed"] == decay["cls_token"] == decay["head.bias"] == decay["norm.weight"] == 0.0


def test_betas_reach_the_optimizer_and_a_wrong_name_is_told():
    model = small_run.tiny_vit()
    groups = make_optimizer(model, small_run.recipe(betas=(0.8, 0.95))).param_groups
    assert groups[0]["betas"] == (0.8, 0.95)
    make_optimizer(model, small_run.recipe(optimizer="sgd"))
    with pytest.raises(RecipeError, match="optimizer 'adamww'"):
        make_optimizer(model, small_run.recipe(optimizer="adamww"))


def test_the_schedule_rises_and_falls():
    factor = lr_factor("cosine", total=100, warmup=10, floor=0.01)
    values = [factor(i) for i in range(101)]
    assert values[0] == pytest.approx(1 / 11) and max(values) == values[10] == 1.0
    assert values[:11] == sorted(values[:11]) and values[10:] == sorted(values[10:], reverse=True)
    assert values[55] == pytest.approx(0.505) and values[100] == pytest.approx(0.01) and factor(500) == values[100]
    assert lr_factor("linear", 100, 0, 0.0)(25) == 0.75 and lr_factor("constant", 100, 0, 0.0)(99) == 1.0


def test_every_generator_follows_seed_and_epoch():
    def draw(*key):
        seed_epoch(*key)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(0, 3) == draw(0, 3)
    draws = [draw(0, 3), draw(0, 4), draw(1, 3), draw(0, 3, 1)]
    assert all(len(set(column)) == 4 for column in zip(*draws, strict=True))


def test_an_unresolved_recipe_is_refused():
    with pytest.raises(RecipeError, match=r"not resolved: .*epochs"):
        Classifier(small_run.tiny_vit(), small_run.Recipe(), 10)


def logits(seed, grad=False):
    return torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


LABELS = torch.tensor([0, 3, 8, 8, 1, 5])


def test_soft_and_hard_targets_agree():
    z = logits(1)
    smooth = SupervisedLoss(0.1)
    assert smooth(z, LABELS) == pytest.approx(float(smooth(z, soft_targets(LABELS, 9, 0.1).double())), abs=1e-7)
    assert smooth(z, LABELS) == pytest.approx(float(F.cross_entropy(z, LABELS, label_smoothing=0.1)))
    assert smooth((z, 2 * z), LABELS) == pytest.approx(float(smooth(z, LABELS) + smooth(2 * z, LABELS)) / 2)
    assert smooth(z.half(), LABELS).dtype == torch.float32
    assert soft_target_cross_entropy(z, F.one_hot(LABELS, 9)) == pytest.approx(float(F.cross_entropy(z, LABELS)))


def test_soft_distillation_is_zero_with_zero_gradient_at_the_teacher():
    z = logits(1, grad=True)
    loss = soft_distillation(z, z.detach() + 7.0, tau=3.0)  # a shift of all logits changes no probability
    loss.backward()
    assert abs(float(loss.detach())) < 1e-12 and z.grad.abs().max() < 1e-12


def test_soft_distillation_gradient_and_its_two_readings():
    z, teacher = logits(1, grad=True), logits(2)
    soft_distillation(z, teacher, tau=2.0).backward()
    expected = 2.0 * ((z / 2).softmax(-1) - (teacher / 2).softmax(-1)) / z.numel()
    assert torch.allclose(z.grad, expected.detach())
    per_sample, published = soft_distillation(z, teacher, per_sample=True), soft_distillation(z, teacher)
    assert torch.allclose(per_sample, 9 * published)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_each_head_learns_from_its_own_teacher(kind):
    one, two = logits(1, grad=True), logits(2, grad=True)
    DistillationLoss(kind, alpha=1.0)((one, two), LABELS, logits(3)).backward()
    assert one.grad.abs().max() == 0 and two.grad.abs().max() > 0
    one, two = logits(1, grad=True), logits(2, grad=True)
    DistillationLoss(kind, alpha=0.0)((one, two), LABELS, logits(3)).backward()
    assert two.grad.abs().max() == 0 and one.grad.abs().max() > 0


def test_distillation_with_one_head_and_mixed_targets():
    z, teacher, target = logits(1), logits(2), logits(3).softmax(-1)
    loss = DistillationLoss("hard")(z, target, teacher)
    assert loss == pytest.approx(
        float(0.5 * soft_target_cross_entropy(z, target) + 0.5 * hard_distillation(z, teacher))
    )


def test_distillation_refuses_what_cannot_be():
    with pytest.raises(RecipeError, match="'hard' or 'soft'"):
        DistillationLoss("medium")
    with pytest.raises(RecipeError, match="teacher answers 4 classes and the student 9"):
        DistillationLoss("soft")(logits(1), LABELS, torch.zeros(6, 4))
