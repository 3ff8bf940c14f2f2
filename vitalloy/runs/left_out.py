"""What a reduced model left out of some test images, as pictures for the report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vitalloy.compression.reduction import steps_of
from vitalloy.compression.tokens.lgvit import EarlyExit, depth_of
from vitalloy.compression.tokens.sit import origins
from vitalloy.compression.tokens.sparsifiner import links
from vitalloy.compression.trunk import points
from vitalloy.report import pictures
from vitalloy.runs.stages import as_picture

LOOKED_AT = 40  # test images that are sorted by their exit
SHOWN = 4  # of them, of which patches or links are drawn


def pictures_of(model: nn.Module, images: Tensor, preprocessing: dict[str, Any], folder: Path) -> list[dict[str, str]]:
    """Draw what was merged, which attention links stayed, and where each image left.

    Args:
        model: what `reduce` made.
        images: of the test set, (N, C, H, W), as the model takes them.
        preprocessing: of the bundle: mean and std.
        folder: where the files go, two below the run.

    Returns:
        Rows of file (below the run), method and caption.
    """
    steps = {step["method"]: step["settings"] for step in steps_of(model)}
    plain = model.model if isinstance(model, EarlyExit) else model
    shown = images[torch.linspace(0, len(images) - 1, SHOWN).long()]
    originals = [as_picture(image, preprocessing) for image in shown]
    drawn: list[tuple[str, Image.Image, str]] = []
    if "sit" in steps:
        last = origins(plain, shown)[-1]  # (B, M, N)
        grid = tuple(steps["sit"]["slims"][0]["before"])
        for original, shares in zip(originals, last, strict=True):
            owner = (shares / shares.sum(1, keepdim=True)).argmax(0).numpy().reshape(grid)
            drawn.append(("sit", pictures.merged(original, owner), f"{len(np.unique(owner))} of {len(shares)} tokens"))
    if "sparsifiner" in steps:
        name, mask = list(links(plain, shown).items())[-1]  # (B, heads, N, M)
        grid = _grid(plain, shown, mask.shape[-1])
        skip = mask.shape[-1] - grid[0] * grid[1]
        for original, kept in zip(originals, mask.float().mean(1), strict=True):
            query = grid[0] // 2 * grid[1] + grid[1] // 2
            share = kept[-grid[0] * grid[1] + query, skip:].numpy().reshape(grid)
            drawn.append(("sparsifiner", pictures.links(original, share, query), f"{share.mean():.0%} in {name}"))
    if isinstance(model, EarlyExit):
        rows = depth_of(model, images)
        names = [f"exit {number + 1}" for number in range(len(model.heads))] + ["end"]
        sheet = pictures.departures(
            [as_picture(image, preprocessing) for image in images], [int(row["exit"]) for row in rows], names
        )
        drawn.append(("lgvit", sheet, f"{len(rows)} test images by the exit at which they left"))
    found = []
    if drawn:
        folder.mkdir(parents=True, exist_ok=True)
    for number, (method, picture, caption) in enumerate(drawn):
        file = folder / f"{method}-{number:02d}.png"
        picture.save(file)
        found.append({"file": f"{folder.parent.name}/{folder.name}/{file.name}", "method": method, "caption": caption})
    return found


def _grid(model: nn.Module, images: Tensor, count: int) -> tuple[int, int]:
    """The sides of the grid of patches that `count` tokens are, class tokens in front of them or not."""
    grids = [p.grid for p in points(model, images[:1]) if p.grid]
    fitting = [g for g in grids if 0 <= count - g[0] * g[1] <= 2]
    side = math.isqrt(count)
    return fitting[0] if fitting else (side, side) if side * side == count else (1, count)
