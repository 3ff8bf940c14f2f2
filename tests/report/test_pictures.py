"""Pictures of the work that a model left out."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vitalloy.report import pictures, plots


def grey(side: int = 28) -> Image.Image:
    return Image.new("L", (side, side), 128)


def test_patches_of_one_token_share_a_colour_and_tokens_are_divided_by_lines():
    owner = np.array([[0, 0], [0, 1]])
    shown = np.asarray(pictures.merged(grey(), owner)).astype(int)
    quarter = shown.shape[0] // 4
    corners = [shown[quarter * r, quarter * c] for r, c in ((1, 1), (1, 3), (3, 1), (3, 3))]
    assert (corners[0] == corners[1]).all() and (corners[0] == corners[2]).all()
    assert np.abs(corners[3] - corners[0]).sum() > 60
    edge = shown[quarter * 3, shown.shape[1] // 2]
    assert (edge == 255).all() and not (shown[quarter, shown.shape[1] // 2] == 255).all()


def test_links_that_were_dropped_are_dark_and_the_query_is_framed():
    shown = np.asarray(pictures.links(grey(), np.array([[1.0, 0.0], [0.5, 1.0]]), query=3)).astype(int)
    side = shown.shape[0]
    kept, dropped, half = shown[side // 4, side // 4], shown[side // 4, 3 * side // 4], shown[3 * side // 4, side // 4]
    assert (kept == 128).all() and dropped.sum() < half.sum() < kept.sum()
    assert tuple(shown[-2, -2]) == (217, 119, 66)


def test_images_stand_in_the_row_of_their_exit():
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    sheet = pictures.departures(images, [2, 0, 2], ["exit 1", "exit 2", "end"])
    colours = np.asarray(sheet).reshape(-1, 3)
    assert sheet.height < 3 * (pictures.TILE + 8)  # two exits were taken
    for colour in ((255, 0, 0), (0, 128, 0), (0, 0, 255)):
        assert (colours == colour).all(1).sum() == pictures.TILE**2


def test_the_curve_of_exits_marks_what_was_chosen_and_layers_have_their_shares():
    rows = [{"thresholds": [t, t], "accuracy": a, "macs": m} for t, a, m in ((0.9, 0.8, 0.9), (0.5, 0.7, 0.4))]
    drawn = plots.exits(rows, {"thresholds": [0.6, 0.8], "accuracy": 0.75, "macs": 0.5})
    assert "threshold 0.600, 0.800: 75.0% with 50.0% of the work" in drawn and drawn.count("chosen") == 1
    assert plots.exits(rows[:1], rows[0]) is None
    drawn = plots.kept([{"layer": "blocks.0.mlp.fc1", "kept": 0.25, "macs_before": 1000}])
    assert "blocks.0.mlp.fc1: 25.0% of 1,000 multiply-adds stay" in drawn
