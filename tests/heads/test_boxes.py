"""Anchors, the box code and suppression, each against a plain reading of its definition."""

from __future__ import annotations

import pytest
import torch

from vitalloy.heads.boxes import base_anchors, decode, encode, grid_anchors, nms, plain_nms


def random_boxes(count: int, side: float = 40.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * side
    return torch.cat([corner, corner + 2 + torch.rand(count, 2, generator=generator, dtype=torch.float64) * side], 1)


def test_anchors_lie_on_their_positions_in_order():
    base = base_anchors(8)
    assert base.shape == (9, 4)
    width, height = base[:, 2] - base[:, 0], base[:, 3] - base[:, 1]
    torch.testing.assert_close(height / width, torch.tensor([0.5, 1, 2], dtype=torch.float64).repeat_interleave(3))
    torch.testing.assert_close((width * height).sqrt()[:3], 32 * 2 ** (torch.arange(3, dtype=torch.float64) / 3))
    anchors = grid_anchors(base, 8, (2, 3)).unflatten(0, (2, 3, 9))
    centre = (anchors[..., :2] + anchors[..., 2:]) / 2
    torch.testing.assert_close(centre[1, 2, 4], torch.tensor([16.0, 8.0], dtype=torch.float64))


def test_the_code_is_undone():
    anchors, boxes = random_boxes(50, seed=1), random_boxes(50, seed=2)
    torch.testing.assert_close(decode(anchors, encode(anchors, boxes)), boxes)


def test_decoding_is_bounded_by_the_image_and_by_a_largest_growth():
    anchor, deltas = torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([[0.0, 0.0, 50.0, -50.0]])
    x1, y1, x2, y2 = decode(anchor, deltas)[0]
    torch.testing.assert_close(torch.stack([x2 - x1, y2 - y1]), torch.tensor([625.0, 0.16]))
    assert decode(anchor, deltas, (20, 30))[0, 2] == 30


def brute_force(boxes, scores, labels, threshold) -> list[int]:
    """One box after another in plain Python."""

    def iou(a, b):
        inside = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
        return inside / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside)

    kept: list[int] = []
    rows = boxes.tolist()
    for i in scores.argsort(descending=True).tolist():
        if all(labels[i] != labels[j] or iou(rows[i], rows[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("suppress", [nms, plain_nms])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_suppression_agrees_with_brute_force(suppress, threshold):
    few = random_boxes(40)
    boxes = torch.cat([few, few + 1, few * 1.02, random_boxes(30, seed=5)])  # near copies, so that every bound matters
    generator = torch.Generator().manual_seed(3)
    scores, labels = torch.rand(150, generator=generator), torch.randint(0, 2, (150,), generator=generator)
    want = brute_force(boxes, scores, labels, threshold)
    assert 3 < len(want) < 150, "a case where nothing or everything goes shows little"
    assert suppress(boxes, scores, labels, threshold, limit=150).tolist() == want
    assert suppress(boxes, scores, labels, threshold, limit=5).tolist() == want[:5]


@pytest.mark.parametrize("suppress", [nms, plain_nms])
def test_suppression_of_nothing_and_of_boxes_without_area(suppress):
    assert suppress(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long)).tolist() == []
    flat = torch.tensor([[3.0, 3, 3, 3], [3, 3, 3, 3]])
    assert suppress(flat, torch.tensor([0.5, 0.9]), torch.zeros(2, dtype=torch.long)).tolist() == [1, 0]
