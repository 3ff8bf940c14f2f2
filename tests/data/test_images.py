"""Odd image files are read rightly, and bad ones are named with a reason."""

import io
import os
import warnings

import numpy as np
import pytest
from PIL import Image

from vitalloy.data import read_image
from vitalloy.data.images import image_size
from vitalloy.errors import DataError

RAMP = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(4, 16)


@pytest.fixture(autouse=True)
def no_warning_leaks():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def values(path, **options):
    image = read_image(path, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def refused(path, *words, **options):
    with pytest.raises(DataError) as caught:
        read_image(path, **options)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message


def test_grey_and_one_bit(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "grey.png")
    assert (values(tmp_path / "grey.png") == RAMP[..., None]).all()
    Image.fromarray(RAMP > 127).save(tmp_path / "bit.png")
    assert (values(tmp_path / "bit.png") == np.where(RAMP > 127, 255, 0)[..., None]).all()


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_is_scaled_not_clipped(tmp_path, suffix):
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(path)
    assert (values(path) == RAMP[..., None]).all()


def test_dark_16_bit_stays_dark(tmp_path):
    Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / "dark.png")  # at most 255 of 65535
    assert values(tmp_path / "dark.png").max() == 1


@pytest.mark.parametrize(
    "stored, shown",
    [
        (RAMP.astype(np.float32) / 255, RAMP),  # 0..1
        (RAMP.astype(np.float32), RAMP),  # 0..255
        (RAMP.astype(np.float32) * 4000 - 7e5, RAMP),  # any range: stretched
        (RAMP.astype(np.int32), RAMP),
        (RAMP.astype(np.int32) * 257, RAMP),  # 16 bits in 32
        (RAMP.astype(np.int32) * 1000 - 9, RAMP),
        (np.full((4, 16), np.nan, np.float32), np.zeros_like(RAMP)),
    ],
)
def test_32_bit(tmp_path, stored, shown):
    Image.fromarray(stored).save(tmp_path / "deep.tif")
    assert np.abs(values(tmp_path / "deep.tif").astype(int) - shown[..., None]).max() <= 1


def test_cmyk(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "ink.jpg", quality=95)
    red, green, blue = values(tmp_path / "ink.jpg").mean((0, 1))
    assert red > 240 and green < 15 and blue < 15


def test_palette_and_transparency_on_white(tmp_path):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.save(tmp_path / "palette.png")
    assert (values(tmp_path / "palette.png") == (200, 100, 50)).all()
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "clear.png", transparency=0)
    assert tuple(values(tmp_path / "clear.png")[0, 0]) == (255, 255, 255)
    assert tuple(values(tmp_path / "clear.png")[1, 1]) == (200, 100, 50)
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(tmp_path / "rgba.png")
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "la.png")
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    half.save(tmp_path / "half.png")
    assert (values(tmp_path / "rgba.png") == 255).all() and (values(tmp_path / "la.png") == 255).all()
    assert (values(tmp_path / "half.png") == 127).all()


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (6, 6), c) for c in ("red", "lime", "blue")]
    for suffix in ("gif", "png", "webp"):
        path = tmp_path / f"moving.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        assert np.abs(values(path).astype(int) - (255, 0, 0)).max() < 10


def test_camera_rotation_is_applied(tmp_path):
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = np.zeros((4, 10, 3), np.uint8)
    wide[:, :5] = 255  # its left half is white: upright, its top half
    Image.fromarray(wide).save(path, exif=exif)
    upright = values(path)
    assert upright.shape == (10, 4, 3) and (upright[:5] == 255).all() and (upright[5:] == 0).all()
    assert image_size(path) == (10, 4)


def test_wrong_suffix_is_read_by_content(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "really_png.jpg", format="PNG")
    assert (values(tmp_path / "really_png.jpg") == RAMP[..., None]).all()


def test_missing_empty_folder_and_no_image(tmp_path):
    refused(tmp_path / "absent.png", "no such file")
    (tmp_path / "empty.png").touch()
    refused(tmp_path / "empty.png", "empty", "0 bytes")
    refused(tmp_path, "folder")
    (tmp_path / "notes.png").write_text("these are words, not an image")
    refused(tmp_path / "notes.png", "not an image")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    refused(tmp_path / "dangling.png", "no such file")


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "locked.png"
    Image.fromarray(RAMP).save(path)
    if os.geteuid() != 0:
        path.chmod(0)
    else:  # root may read everything

        def deny(self):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr("pathlib.Path.read_bytes", deny)
    refused(path, "Permission denied")


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "webp", "tiff"])
def test_truncated_file(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, format=kind)
    data = whole.getvalue()
    path = tmp_path / f"cut.{kind}"
    path.write_bytes(data[: len(data) // 2])
    refused(path)


def test_damaged_bytes_never_raise_another_kind(tmp_path):
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    path = tmp_path / "damaged"
    for kind in ("png", "jpeg", "gif", "tiff", "webp"):
        whole = io.BytesIO()
        Image.fromarray(noise).save(whole, format=kind)
        for _ in range(40):
            data = bytearray(whole.getvalue())
            for place in rng.integers(0, min(len(data), 200), 4):
                data[place] = rng.integers(256)
            path.write_bytes(data)
            try:
                read_image(path, max_pixels=10**6)
            except DataError as error:
                assert str(path) in str(error)


def test_decompression_bomb_is_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("1", (20000, 20000)).save(path)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    refused(path, "178,956,970")
    Image.new("1", (3000, 2000)).save(path)
    refused(path, "3000 x 2000", "6,000,000", "5,000,000", max_pixels=5_000_000)
