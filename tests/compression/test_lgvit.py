"""Early exits: images leave at different depths, answers return in order, and the two stages teach the exits."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import vitalloy
from vitalloy.compression.tokens import lgvit
from vitalloy.compression.tokens.lgvit import Policy
from vitalloy.compression.trunk import hooked
from vitalloy.errors import CompressionError

HYBRIDS = ("swin_nano", "cvt_nano", "pvt_v2_nano", "efficientformer_nano")


def pictures(count: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def untrained(name: str, **options: object) -> lgvit.EarlyExit:
    torch.manual_seed(0)
    args = {"distilled": True} if name == "deit" else {}
    model = vitalloy.create_model("vit_nano" if name == "deit" else name, num_classes=10, img_size=32, **args).eval()
    return lgvit.compress(model, pictures(8), **{"epochs": 0, **options})


def spread(model: lgvit.EarlyExit, images: torch.Tensor) -> None:
    """Thresholds with which a part of the images leaves at every exit."""
    with torch.no_grad():
        readings = lgvit.confidence(model.every_exit(images)[:-1])
    model.policy = Policy("confidence", tuple(readings.quantile(0.6, dim=1).tolist()))


def tinted(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with one of three channels a little brighter, under much or little noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    noise = torch.randn(count, 3, 8, 8, generator=generator) * (
        0.2 + 8 * torch.rand(count, 1, 1, 1, generator=generator)
    )
    return noise + nn.functional.one_hot(labels, 3)[:, :, None, None], labels


def tiny() -> nn.Module:
    size = {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 4, "num_heads": 2}
    return vitalloy.create_model("vit_nano", num_classes=3, **size).eval()


@pytest.fixture(scope="module")
def trained() -> lgvit.EarlyExit:
    torch.manual_seed(0)
    images, labels = tinted(512, 0)
    train = list(zip(images.split(64), labels.split(64), strict=True))
    return lgvit.compress(tiny(), images[:64], train=train, epochs=(8, 2), lr=3e-3, backbone_lr=3e-3)


def accuracies(model: lgvit.EarlyExit, images: torch.Tensor, labels: torch.Tensor) -> list[float]:
    with torch.no_grad():
        return (model.every_exit(images).argmax(-1) == labels).float().mean(1).tolist()


@pytest.mark.parametrize("name", ["vit_nano", "deit", *HYBRIDS])
def test_a_batch_answers_as_its_images_do_one_by_one(name):
    model, images = untrained(name), pictures(12, seed=1)
    spread(model, images)
    with torch.no_grad():
        logits, depths = model.exit_with_depths(images)
        alone = [model.exit_with_depths(image) for image in images.split(1)]
        picked = model.picked(images)
    assert len(model.heads) >= 3 and len(depths.unique()) >= 3  # images do leave at different depths
    assert torch.equal(depths, torch.cat([depth for _, depth in alone]))
    torch.testing.assert_close(logits, torch.cat([one for one, _ in alone]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, picked, rtol=1e-4, atol=1e-5)
    assert list(model.costs) == sorted(model.costs) and model.costs[-1] < 1.25


def test_no_threshold_is_reached_or_all_are():
    model, images = untrained("vit_nano"), pictures(5)
    for name in ("confidence", "entropy", "patience", "patient_and_confident"):
        never = {"confidence": 2.0, "entropy": -1.0, "patience": 99, "patient_and_confident": -1.0}[name]
        model.policy = lgvit.policies.policy_of(name, never, len(model.heads))
        with torch.no_grad():
            assert torch.equal(model(images), model.model(images))
        assert model.depths.tolist() == [len(model.heads)] * 5
    ran = []
    model.policy = lgvit.policies.policy_of("confidence", 0.0, len(model.heads))
    with torch.no_grad(), hooked(model.model, {"blocks.2": ran.append}):
        logits = model(images)
        torch.testing.assert_close(logits, model.every_exit(images)[0])
    assert model.depths.tolist() == [0] * 5
    assert len(ran) == 1  # by `every_exit`: nothing behind the first exit was computed before


def test_images_that_are_no_numbers_stay_and_disturb_nobody():
    model, images = untrained("vit_nano"), pictures(6)
    images[2] = float("nan")
    for name, always in (("confidence", 0.0), ("entropy", 50.0), ("patience", 1), ("patient_and_confident", 50.0)):
        model.policy = lgvit.policies.policy_of(name, always, len(model.heads))
        with torch.no_grad():
            logits = model(images)
        depths = model.depths.tolist()
        assert depths.pop(2) == len(model.heads) and len(set(depths)) == 1 and depths[0] < 2
        assert logits.isnan().any(1).tolist() == [False, False, True, False, False, False]
    with pytest.raises(CompressionError, match="not finite"):
        lgvit.calibrate(model, [images])


def test_an_error_on_the_way_leaves_no_hook():
    model = untrained("vit_nano")

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    handle = model.model.blocks[3].register_forward_hook(fail)
    model.policy = Policy("confidence", (0.99999,) * 5)
    with pytest.raises(ZeroDivisionError):
        model(pictures(2))
    handle.remove()
    assert not any(module._forward_hooks for module in model.modules())


def test_policies_count_as_published():
    said = torch.tensor([[0, 1, 1, 1, 2], [3, 3, 3, 0, 0]])  # answers of two images at five exits
    logits = nn.functional.one_hot(said.T, 4).float() * 9  # (exits, images, classes)
    assert Policy("patience", (3,) * 5).depths(Policy("patience").reading(logits)).tolist() == [3, 2]
    unsure = logits * torch.tensor([1, 0, 1, 1, 1]).view(5, 1, 1)  # the second exit says nothing
    rule = Policy("patient_and_confident", (0.5,) * 5)
    assert rule.depths(rule.reading(unsure)).tolist() == [3, 3]
    rule = Policy("entropy", (-1.0, 0.5, 0.5, 0.5, 0.5))
    assert rule.depths(rule.reading(unsure)).tolist() == [2, 2]


def test_two_stages_teach_the_exits(trained):
    assert min(accuracies(trained, *tinted(300, 1))) > 0.75


@pytest.mark.parametrize("labelled", [True, False])
def test_the_second_stage_teaches_exits_alone(trained, labelled):
    """Without labels they learn the model's own answers."""
    images, labels = tinted(512, 0)
    plain = copy.deepcopy(trained.model)
    train = list(zip(images.split(64), labels.split(64), strict=True)) if labelled else None
    own = lgvit.compress(plain, images, train=train, epochs=(0, 3), lr=3e-3)
    own_state, before = own.model.state_dict(), trained.model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in own_state.items())
    assert min(accuracies(own, *tinted(300, 1))) > 0.7


class Recorded:
    """Five hundred images whose three exits and end are right on the first 300, 400, 450 and 490, and know it."""

    def __init__(self) -> None:
        self.policy = Policy("confidence", (0.5,) * 3)
        self.trunk_macs, self.head_macs = (0.25, 0.5, 0.75, 1.0), (0.02, 0.02, 0.02)
        self.labels = torch.zeros(500, dtype=torch.long)
        right = torch.tensor([300, 400, 450, 490])[:, None] > torch.arange(500)
        sure = torch.linspace(4, 0.5, 500) + 0.5 * torch.arange(4)[:, None]
        self.logits = torch.stack([right * sure, ~right * sure * 0.3], -1)

    def every_exit(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[:, images[:, 0, 0, 0].long()]

    def times(self, image: torch.Tensor) -> tuple[list[float], list[float], float]:
        return [1.0, 2.0, 3.0, 4.0], [0.1, 0.1, 0.1], 4.0

    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        numbers = torch.arange(500.0)[:, None, None, None]
        return list(zip(numbers.split(100), self.labels.split(100), strict=True))


def test_calibration_keeps_its_target_and_draws_the_curve():
    model = Recorded()
    curve = lgvit.calibrate(model, model.batches(), loss=0.02)
    careful, hasty = curve.rows[0], curve.rows[-1]
    assert (careful.accuracy, careful.shares[-1], careful.macs, careful.latency_ms) == (0.98, 1, 1, 4)
    assert (hasty.accuracy, hasty.shares[0]) == (0.6, 1) and hasty.macs == pytest.approx(0.27)
    assert all(row.low < row.accuracy < row.high for row in curve.rows)
    assert curve.exit_accuracy == pytest.approx((0.6, 0.8, 0.9, 0.98)) and curve.images == 500
    assert curve.chosen.accuracy >= 0.96 and model.policy.thresholds == curve.chosen.thresholds
    alike = lgvit.calibrate(model, model.batches(), loss=0.02, refine=False).chosen
    assert len(set(alike.thresholds)) == 1 and alike.latency_ms > curve.chosen.latency_ms  # a threshold each is better
    best = 0.6 * 1.1 + 0.2 * 2.2 + 0.1 * 3.3 + 0.1 * 4.3  # if each image left at the first exit that is right
    assert best * 0.9 < curve.chosen.latency_ms < 1.15 * best
    assert json.loads(json.dumps(curve.as_dict()))["chosen"]["thresholds"] == list(curve.chosen.thresholds)


def test_calibration_by_work_time_accuracy_and_other_policies():
    model = Recorded()
    for target in ("macs", "latency_ms"):
        wanted = 0.5 if target == "macs" else 2.0
        chosen = lgvit.calibrate(model, model.batches(), **{target: wanted}).chosen
        assert getattr(chosen, target) <= wanted and chosen.accuracy > 0.85
    assert lgvit.calibrate(model, model.batches(), top1=0.9, policy="entropy").chosen.accuracy >= 0.9
    unlabelled = lgvit.calibrate(model, [images for images, _ in model.batches()], policy="patience")
    assert not unlabelled.labelled and unlabelled.rows[0].accuracy == 1


def test_targets_out_of_reach_name_the_nearest():
    model = Recorded()
    for target, nearest in (({"macs": 0.1}, "0.27"), ({"top1": 0.999}, "0.98"), ({"latency_ms": 0.5}, "1.1")):
        with pytest.raises(CompressionError, match=f"out of reach: the nearest is {nearest}"):
            lgvit.calibrate(model, model.batches(), **target)
    with pytest.raises(CompressionError, match="one target"):
        lgvit.calibrate(model, model.batches(), macs=0.5, loss=0.1)
    with pytest.raises(CompressionError, match="no images"):
        lgvit.calibrate(model, [])
    with pytest.raises(CompressionError, match=r"macs=0\.1 is out of reach"):
        untrained("vit_nano", macs=0.1)


def test_what_calibration_counted_happens(trained):
    images, labels = tinted(200, 2)
    spread(trained, images)
    curve = lgvit.calibrate(trained, list(zip(images.split(50), labels.split(50), strict=True)), macs=0.6)
    with torch.no_grad():
        logits, depths = trained.exit_with_depths(images)
    assert (logits.argmax(1) == labels).float().mean().item() == pytest.approx(curve.chosen.accuracy)
    assert torch.tensor(trained.costs)[depths].mean().item() == pytest.approx(curve.chosen.macs)


def test_settings_rebuild_the_structure(trained):
    images = tinted(40, 3)[0]
    spread(trained, images)
    again = lgvit.rebuild(tiny(), **json.loads(json.dumps(trained.settings)))
    vitalloy.load_checkpoint(again, trained.state_dict())
    with torch.no_grad():
        for mine, other in zip(trained.exit_with_depths(images), again.exit_with_depths(images), strict=True):
            assert torch.equal(mine, other)
    assert again.settings == trained.settings
    rows = lgvit.depth_of(trained, images)
    assert [row["exit"] for row in rows] == again.exit_with_depths(images)[1].tolist()
    assert all(0 < row["confidence"] <= 1 for row in rows)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"exits": [99]}, "places for exits; these are: 0 "),
        ({"exits": []}, "no place"),
        ({"heads": "conv9"}, "exit head 'conv9'"),
        ({"heads": ["pool"]}, "1 heads for 5 exits"),
        ({"policy": "confident"}, "exit policy 'confident'.*Did you mean"),
        ({"threshold": [0.5, 0.5]}, "2 thresholds"),
        ({"epochs": (1, 2, 3)}, "epochs"),
        ({"epochs": 1, "strategy": "fast"}, "strategy 'fast'"),
        ({"epochs": 1, "train": []}, "no training images"),
        ({"epochs": 8, "lr": 1e30}, "use a smaller lr"),
    ],
)
def test_mistakes_are_named(options, says):
    with pytest.raises(CompressionError, match=says):
        untrained("vit_nano", **options)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(CompressionError, match="no block behind which images could leave"):
        lgvit.compress(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).eval(), pictures(8))
