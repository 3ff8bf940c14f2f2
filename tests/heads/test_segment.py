"""Semantic FPN: full-size logits over any encoder, learning, its loss, and weights in and out."""

from __future__ import annotations

import pytest
import torch

import vitalloy
from vitalloy.errors import CheckpointError, DataError
from vitalloy.heads import SemanticFPN, segmentation_loss

SMALL = {"neck_channels": 16, "channels": 16}


@pytest.mark.parametrize("encoder", ["pvt_v2_nano", "cvt_nano", "swin_nano", "vit_nano", "resnet18"])
def test_logits_have_the_size_of_the_image(encoder):
    model = SemanticFPN(encoder, 3, in_chans=1, **SMALL).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 1, 52, 75)).shape == (2, 3, 52, 75)


def blobs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a bright disc and a dark one in each image; the label image says which is where."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(count, 3, 32, 32, generator=generator) * 0.3, torch.zeros(count, 32, 32)
    grid = torch.arange(32)
    for i in range(count):
        for label, value in ((1, 1.5), (2, -1.5)):
            y, x = torch.randint(6, 26, (2,), generator=generator)
            disc = (grid[:, None] - y) ** 2 + (grid[None] - x) ** 2 < 30
            images[i, :, disc] += value
            labels[i, disc] = label
    return images, labels.long()


def test_it_learns_to_segment_blobs():
    torch.manual_seed(0)
    images, labels = blobs(16)
    model = SemanticFPN("pvt_v2_nano", 3, neck_channels=16, channels=64, dropout=0.0, depths=(1, 1, 1, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for step in range(30):
        at = torch.arange(4 * step, 4 * step + 4) % len(images)
        loss = model.loss(model(images[at]), labels[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.3 * history[0], (history[0], history[-1])
    model.eval()
    with torch.no_grad():
        answer = model(images).argmax(1)
    iou = [((answer == c) & (labels == c)).sum() / ((answer == c) | (labels == c)).sum() for c in (1, 2)]
    assert min(iou) > 0.5, f"IoU of the bright and the dark discs: {iou}"


def test_loss_is_the_mean_over_labelled_pixels():
    torch.manual_seed(0)
    logits, target = torch.randn(1, 3, 2, 2), torch.tensor([[[0, 255], [2, 255]]])
    log_p = logits.log_softmax(1)
    torch.testing.assert_close(segmentation_loss(logits, target), -(log_p[0, 0, 0, 0] + log_p[0, 2, 1, 0]) / 2)
    nothing = segmentation_loss(logits.requires_grad_(), torch.full((1, 2, 2), 255))
    assert nothing == 0
    nothing.backward()
    assert logits.grad.isfinite().all()


def test_labels_that_do_not_fit_are_named():
    logits = torch.randn(1, 3, 4, 4)
    with pytest.raises(DataError, match=r"\(1, 8, 8\)"):
        segmentation_loss(logits, torch.zeros(1, 8, 8))
    with pytest.raises(DataError, match=r"\[7\]"):
        segmentation_loss(logits, torch.full((1, 4, 4), 7))


def test_weights_come_back():
    model, other = (SemanticFPN("pvt_v2_nano", 3, **SMALL).eval() for _ in range(2))
    vitalloy.load_checkpoint(other, model.state_dict())
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images), other(images))


def test_mmsegmentation_names_are_known_and_foreign_ones_reported():
    model = SemanticFPN("pvt_v2_nano", 3, **SMALL)
    theirs = {
        k.replace("backbone.features.model.", "backbone.")
        .replace("_convs.0.", "_convs.0.conv.")
        .replace("_convs.1.", "_convs.1.conv.")
        .replace("_convs.2.", "_convs.2.conv.")
        .replace("_convs.3.", "_convs.3.conv."): torch.randn_like(v) if v.is_floating_point() else v
        for k, v in model.state_dict().items()
    }
    assert "neck.fpn_convs.3.conv.weight" in theirs and "backbone.patch_embed1.proj.weight" in theirs
    vitalloy.load_checkpoint(model, {"state_dict": theirs})
    assert torch.equal(model.neck.fpn_convs[3].weight, theirs["neck.fpn_convs.3.conv.weight"])
    with pytest.raises(CheckpointError, match=r"auxiliary_head\.x"):
        vitalloy.load_checkpoint(model, {**theirs, "auxiliary_head.x": torch.zeros(1)})
