from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vitalloy.data  # noqa: F401  before torchvision, which some tests import by itself


def picture(seed: int, height: int = 24, width: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def make_folder(tmp_path):
    """Write {"class name": number of images} below a folder and return it."""

    def make(counts: dict[str, int], below: str = "flowers") -> Path:
        root = tmp_path / below
        for place, (name, count) in enumerate(counts.items()):
            (root / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                picture(1000 * place + i).save(root / name / f"{i:03d}.png")
        return root

    return make
