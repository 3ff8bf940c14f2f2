"""RetinaNet: outputs and anchors agree over any encoder, matching, loss, learning, and what comes out at the end."""

from __future__ import annotations

import math

import pytest
import torch

import vitalloy
from vitalloy.errors import DataError, ModelError
from vitalloy.heads import LevelOutputs, RetinaNet
from vitalloy.heads.boxes import encode
from vitalloy.heads.detect import BACKGROUND, IGNORED, assign

SMALL = {"neck_channels": 16, "channels": 16, "depth": 1}
EMPTY = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}


@pytest.mark.parametrize("encoder", ["pvt_v2_nano", "cvt_nano", "swin_nano", "vit_nano", "resnet18"])
def test_every_output_has_its_anchor(encoder):
    model = RetinaNet(encoder, 5, **SMALL).eval()
    with torch.no_grad():
        outputs = model(torch.randn(2, 3, 52, 75))
    assert len(outputs.classes) == len(outputs.boxes) == 5
    for classes, boxes, anchors in zip(*outputs, model.anchors(outputs), strict=True):
        assert classes.shape == (2, 9 * 5, *boxes.shape[2:]) and boxes.shape[1] == 9 * 4
        assert anchors.shape == (9 * boxes.shape[2] * boxes.shape[3], 4)
    assert all(b == 2 * a for a, b in zip(model.strides[:-1], model.strides[1:], strict=True))


def test_it_starts_out_seeing_nothing():
    model = RetinaNet("pvt_v2_nano", 5, **SMALL)
    assert math.isclose(model.bbox_head.retina_cls.bias.sigmoid().mean().item(), 0.01, rel_tol=1e-5)


def test_assignment():
    boxes = torch.tensor([[0.0, 0, 10, 10], [100, 100, 120, 120]])
    anchors = torch.tensor(
        [
            [0.0, 0, 10, 10],  # the first box itself
            [0, 0, 10, 6],  # IoU 0.6
            [0, 0, 10, 4.5],  # 0.45: between the bounds
            [0, 0, 10, 2],  # 0.2
            [50, 50, 60, 60],  # nothing there
            [100, 100, 105, 105],  # 0.06, but no anchor suits the second box better
        ]
    )
    assert assign(anchors, boxes).tolist() == [0, 0, IGNORED, BACKGROUND, BACKGROUND, 1]
    assert assign(anchors, boxes[:0]).tolist() == [BACKGROUND] * 6
    far = torch.tensor([[500.0, 500, 510, 510]])
    assert assign(anchors, far).tolist() == [BACKGROUND] * 6, "a box that no anchor touches claims none"


def perfect(model: RetinaNet, box: torch.Tensor, label: int) -> LevelOutputs:
    """Outputs for one 64-pixel image that are sure of one box, at the anchors that it belongs to."""
    with torch.no_grad():
        outputs = model(torch.zeros(1, 3, 64, 64))
    classes, deltas = [], []
    owners = assign(torch.cat(model.anchors(outputs)), box[None])
    for like, anchors, owner in zip(
        outputs.boxes, model.anchors(outputs), owners.split([len(a) for a in model.anchors(outputs)]), strict=True
    ):
        logits = torch.full((len(anchors), model.num_classes), -12.0)
        logits[owner >= 0, label] = 12.0
        for values, into in ((logits, classes), (encode(anchors, box.expand(len(anchors), 4)), deltas)):
            into.append(values.reshape(1, *like.shape[2:], -1).permute(0, 3, 1, 2))
    return LevelOutputs(classes, deltas)


def test_outputs_that_are_right_cost_nothing_and_give_the_box_back():
    model = RetinaNet("pvt_v2_nano", 3, **SMALL).eval()
    box = torch.tensor([10.0, 12.0, 40.0, 50.0])
    outputs = perfect(model, box, 2)
    losses = model.loss(outputs, [{"boxes": box[None], "labels": torch.tensor([2])}])
    assert losses["classes"] < 1e-4 and losses["boxes"] < 1e-4
    (found,) = model.postprocess(outputs, (64, 64))
    assert found.labels.tolist() == [2] and found.scores[0] > 0.99
    torch.testing.assert_close(found.boxes, box[None], rtol=0, atol=1e-3)
    wrong = model.loss(outputs, [{"boxes": box[None], "labels": torch.tensor([1])}])
    assert wrong["classes"] > 1


def test_loss_against_its_formula():
    """Focal loss over all anchors and L1 over the matched ones, both per matched anchor, written out anew."""
    torch.manual_seed(0)
    model = RetinaNet("pvt_v2_nano", 2, **SMALL).eval()
    box = torch.tensor([[4.0, 6.0, 30.0, 28.0]])
    with torch.no_grad():
        outputs = model(torch.randn(2, 3, 32, 32))
    losses = model.loss(outputs, [{"boxes": box, "labels": torch.tensor([1])}, EMPTY])
    anchors = torch.cat(model.anchors(outputs))
    owner = assign(anchors, box)
    focal = l1 = 0.0
    for i in range(2):
        logits = torch.cat([x[i].permute(1, 2, 0).reshape(-1, 2) for x in outputs.classes])
        deltas = torch.cat([x[i].permute(1, 2, 0).reshape(-1, 4) for x in outputs.boxes])
        p, truth = logits.sigmoid(), torch.zeros_like(logits)
        if i == 0:
            truth[owner == 0, 1] = 1
            hit = owner == 0
            l1 += (deltas[hit] - encode(anchors[hit], box.expand(int(hit.sum()), 4))).abs().sum()
        each = -truth * 0.25 * (1 - p) ** 2 * p.log() - (1 - truth) * 0.75 * p**2 * (1 - p).log()
        focal += each[owner != IGNORED].sum() if i == 0 else each.sum()
    matched = int((owner == 0).sum()) + 1  # an image without boxes counts as one
    torch.testing.assert_close(losses["classes"], focal / matched)
    torch.testing.assert_close(losses["boxes"], l1 / matched)


def squares(count: int) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Noise with one square: bright ones are class 0, dark ones class 1."""
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(count, 3, 32, 32, generator=generator) * 0.2, []
    for i in range(count):
        x, y = torch.randint(0, 16, (2,), generator=generator).tolist()
        images[i, :, y : y + 14, x : x + 14] += 2.0 if i % 2 == 0 else -2.0
        box = torch.tensor([[x, y, x + 14.0, y + 14.0]])
        targets.append({"boxes": box, "labels": torch.tensor([i % 2])})
    return images, targets


def test_it_learns_to_find_a_square():
    torch.manual_seed(0)
    images, targets = squares(6)
    model = RetinaNet("pvt_v2_nano", 2, start_level=2, num_levels=3, depths=(1, 1, 1, 1), **SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    history = []
    for _ in range(30):
        losses = model.loss(model(images), targets)
        total = losses["classes"] + losses["boxes"]
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history.append(total.item())
    assert history[-1] < 0.3 * history[0], (history[0], history[-1])
    model.eval()
    with torch.no_grad():
        found = model.postprocess(model(images), (32, 32))
    right = [
        len(f.labels) > 0 and f.labels[0] == t["labels"][0] and (f.boxes[0] - t["boxes"][0]).abs().max() < 6
        for f, t in zip(found, targets, strict=True)
    ]
    assert sum(right) >= 5, f"the best box of {sum(right)} of 6 images is right"


def test_postprocess_keeps_its_limits():
    torch.manual_seed(0)
    model = RetinaNet("pvt_v2_nano", 2, **SMALL).eval()
    with torch.no_grad():
        outputs = model(torch.randn(2, 3, 64, 48))
    assert all(len(found.scores) == 0 for found in model.postprocess(outputs, (64, 48))), "0.01 is below 0.05"
    for found in model.postprocess(outputs, (64, 48), min_score=0.0, limit=7):
        assert len(found.scores) == 7 and (found.scores.diff() <= 0).all()
        assert (found.boxes >= 0).all() and (found.boxes <= torch.tensor([48.0, 64.0, 48.0, 64.0])).all()
    few = model.postprocess(outputs, (64, 48), min_score=0.0, per_level=1)
    assert all(len(found.scores) <= 5 for found in few)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"boxes": torch.tensor([[4.0, 4, 4, 9]]), "labels": torch.tensor([0])}, "no area"),
        ({"boxes": torch.tensor([[4.0, 4, 8, 9]]), "labels": torch.tensor([2])}, "label 2"),
        ({"boxes": torch.zeros(3, 4), "labels": torch.tensor([0])}, r"\(3, 4\)"),
    ],
)
def test_targets_that_cannot_be_are_named(target, said):
    model = RetinaNet("pvt_v2_nano", 2, **SMALL)
    with torch.no_grad():
        outputs = model(torch.zeros(1, 3, 32, 32))
    with pytest.raises(DataError, match=said):
        model.loss(outputs, [target])
    with pytest.raises(DataError, match="0 targets for 1 images"):
        model.loss(outputs, [])


def test_too_few_levels_are_refused():
    with pytest.raises(ModelError, match="outputs"):
        RetinaNet("pvt_v2_nano", 2, num_levels=2, **SMALL)


def test_mmdetection_names_are_known():
    model = RetinaNet("pvt_v2_nano", 2, neck_channels=16, channels=16)
    theirs = {}
    for key, value in model.state_dict().items():
        part, _, rest = key.partition(".")
        if part == "backbone":
            key = f"backbone.{rest.removeprefix('features.model.')}"
        elif part == "neck":
            name, index, leaf = rest.split(".")
            key = f"neck.{name}.{index}.conv.{leaf}"
        theirs[key] = torch.randn_like(value)
    assert "bbox_head.cls_convs.3.conv.weight" in theirs and "neck.fpn_convs.4.conv.bias" in theirs
    vitalloy.load_checkpoint(model, {"state_dict": theirs})
    assert torch.equal(model.neck.fpn_convs[4].bias, theirs["neck.fpn_convs.4.conv.bias"])
