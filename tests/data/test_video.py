"""The frames asked for are the frames given, whatever the codec and container, and little of a long film is read."""

from __future__ import annotations

import av
import numpy as np
import pytest
from clips import barcode, barcodes, carphone, moving, portrait, read_barcode, write, write_audio
from PIL import Image

from vitalloy.data import films
from vitalloy.data.video import find_videos, frame_positions, probe, sample_frames
from vitalloy.errors import DataError

FRAMES = 75
UNEVEN = [n * 0.04 if n < 40 else 1.6 + (n - 40) * 0.1 for n in range(FRAMES)]
KINDS = {
    "h264.mp4": {"gop": 20, "bframes": 3},
    "open_groups.mp4": {"options": {"preset": "veryfast", "x264-params": "open-gop=1:keyint=20:bframes=3:scenecut=0"}},
    "fragments.mp4": {"gop": 20, "bframes": 3, "container": {"movflags": "frag_keyframe"}},
    "h264_longer_sound.mkv": {"gop": 20, "bframes": 3, "audio": 4.0},
    "h264.ts": {"gop": 20, "bframes": 3},
    "no_times.h264": {"gop": 20, "bframes": 3},
    "ten_bits.mp4": {"pixels": "yuv444p10le"},
    "mpeg4.avi": {"codec": "mpeg4", "bframes": 2},
    "mpeg2.mpg": {"codec": "mpeg2video", "bframes": 2},
    "vp9.webm": {"codec": "libvpx-vp9", "gop": 20},
    "mjpeg.avi": {"codec": "mjpeg"},
    "bare.mjpeg": {"codec": "mjpeg"},
    "alpha.mov": {"codec": "qtrle"},
    "grey.mkv": {"codec": "ffv1", "pixels": "gray"},
    "palette.gif": {"codec": "gif"},
    "uneven.mp4": {"gop": 20, "bframes": 3, "times": UNEVEN},
    "uneven.mkv": {"gop": 20, "bframes": 3, "times": UNEVEN},
}


def numbers(frames):
    return [read_barcode(frame.image) for frame in frames]


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        (300, 15, [0, 21, 42, 64, 85, 106, 128, 149, 170, 192, 213, 234, 256, 277, 299]),
        (531, 10, [0, 58, 117, 176, 235, 294, 353, 412, 471, 530]),
        (7, 15, [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5, 6]),
        (5, -1, [0, 1, 2, 3, 4]),
        (9, 1, [0]),
        (1, 3, [0, 0, 0]),
        (0, 15, []),
    ],
)
def test_positions(total, count, expected):
    assert frame_positions(total, count) == expected


@pytest.mark.parametrize("name", KINDS)
def test_exact_frames(tmp_path, name):
    images = barcodes(FRAMES)
    if name == "grey.mkv":
        images = [np.repeat(image.max(axis=2, keepdims=True), 3, axis=2) for image in images]
    path = write(tmp_path / name, images, **KINDS[name])
    info, frames = sample_frames(path, 11)
    assert (info.kind, info.frames, info.counted, info.problem) == ("video", FRAMES, True, None)
    assert (info.width, info.height) == (96, 64)
    positions = [frame.index for frame in frames]
    assert positions == frame_positions(FRAMES, 11)
    if name == "grey.mkv":  # no red corner to find the way up by
        for frame in frames:
            frame.image[:16, :24] = (255, 0, 0)
    assert numbers(frames) == positions
    if name == "no_times.h264":
        assert {frame.time for frame in frames} == {None}
    else:
        times = UNEVEN if name.startswith("uneven") else [n / 25 for n in range(FRAMES)]
        assert [frame.time for frame in frames] == pytest.approx([times[n] for n in positions], abs=0.011)
        assert info.duration == pytest.approx(times[-1], rel=0.05)


@pytest.mark.parametrize("name", ["h264_longer_sound.mkv", "h264.ts", "vp9.webm", "fragments.mp4"])
def test_estimated_count(tmp_path, monkeypatch, name):
    monkeypatch.setattr(films, "LISTED_BYTES", 0)  # as a large file is read
    path = write(tmp_path / name, barcodes(FRAMES), **KINDS[name])
    info, frames = sample_frames(path, 11)
    assert info.frames == FRAMES
    assert numbers(frames) == frame_positions(FRAMES, 11)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_long_film_is_sought_in(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(films, "LISTED_BYTES", 0)
    total, size = 2000, (32, 32)
    path = write(tmp_path / f"long.{suffix}", barcodes(total, size), gop=20, bframes=2)
    decoded = []
    decode = films._Reader._decode
    monkeypatch.setattr(
        films._Reader,
        "_decode",
        lambda self, *given, **named: (decoded.append(1) or f for f in decode(self, *given, **named)),
    )
    info, frames = sample_frames(path, 8)
    assert numbers(frames) == frame_positions(total, 8)
    assert info.duration == pytest.approx(80.0, abs=0.1)
    assert len(decoded) < 8 * 40 < total / 5


def test_neighbours_are_decoded_in_one_run(tmp_path, monkeypatch):
    path = write(tmp_path / "one_group.mp4", barcodes(FRAMES), gop=1000)
    sought = []
    seek = films._Reader._seek
    monkeypatch.setattr(films._Reader, "_seek", lambda self, stamp: sought.append(stamp) or seek(self, stamp))
    assert numbers(sample_frames(path, -1)[1]) == list(range(FRAMES))
    assert numbers(sample_frames(path, 9)[1]) == frame_positions(FRAMES, 9)
    assert not sought


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_rotation_mark(tmp_path, turn):
    lying = [np.rot90(barcode(n, (64, 96)), -turn // 90) for n in range(10)]
    path = write(tmp_path / "phone.mp4", lying, rotation=turn)
    info, frames = sample_frames(path, 4)
    assert (info.width, info.height, info.rotation) == (96, 64, turn)
    assert [frame.image.shape for frame in frames] == [(64, 96, 3)] * 4
    assert numbers(frames) == [0, 3, 6, 9]
    assert probe(path) == info


def test_repeated_positions_and_odd_sizes(tmp_path):
    path = write(tmp_path / "short.mkv", barcodes(3, (65, 97)), codec="ffv1", pixels="yuv444p")
    frames = sample_frames(path, 7)[1]
    assert numbers(frames) == frame_positions(3, 7)
    assert frames[0] is frames[1]
    assert frames[0].image.shape == (65, 97, 3)


def test_colours(tmp_path):
    image = moving(portrait(), 1, (128, 128))[0]
    for codec, pixels in (("libx264", "yuv420p"), ("mjpeg", "yuvj444p"), ("libx264", "yuv422p10le")):
        path = write(tmp_path / "colours.mkv", [image] * 3, codec=codec, pixels=pixels)
        shown = sample_frames(path, 1)[1][0].image.astype(int)
        assert np.abs(shown.mean((0, 1)) - image.mean((0, 1))).max() < 2.5


def test_real_clip():
    info, frames = sample_frames(carphone(), 5)
    assert (info.codec, info.width, info.height, info.frames) == ("h264", 176, 144, 120)
    assert info.rate == pytest.approx(29.97, abs=0.01)
    with av.open(str(carphone())) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert all(np.array_equal(frame.image, every[frame.index]) for frame in frames)


@pytest.mark.parametrize("movflags", ["faststart", "frag_keyframe+empty_moov", None])
def test_cut_short(tmp_path, movflags):
    suffix, container = (".mp4", {"movflags": movflags}) if movflags else (".mkv", None)
    noise = np.random.default_rng(0).integers(0, 256, (FRAMES, 64, 96, 3), dtype=np.uint8)
    path = write(tmp_path / f"cut{suffix}", noise, codec="mpeg4", gop=10, container=container)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    info, frames = sample_frames(path, 9)
    assert 20 < info.frames < 60
    assert len(frames) >= 8
    assert "cut short" in info.problem
    assert frames[-1].time < 2.4


def test_damage_in_the_middle(tmp_path):
    path = write(tmp_path / "damaged.mp4", barcodes(FRAMES), codec="mjpeg")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        spoilt = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size][30:40]
    for start, size in spoilt:
        data[start : start + size] = bytes(size)
    path.write_bytes(data)
    info, frames = sample_frames(path, FRAMES)
    assert numbers(frames) == [*range(30), *range(40, FRAMES)]
    assert "10 were lost" in info.problem
    info, frames = sample_frames(path, 3)  # the middle one is frame 37
    assert numbers(frames) == [0, 40, 74]
    assert "1 replaced" in info.problem


def test_what_cannot_be_read(tmp_path, capfd):
    sound = write_audio(tmp_path / "sound.mp4")
    text = tmp_path / "text.mp4"
    text.write_text("This is not a film.\n" * 50)
    playlist = tmp_path / "list.mp4"
    playlist.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    empty = tmp_path / "empty.mp4"
    empty.touch()
    whole = write(tmp_path / "whole.mp4", barcodes(20))
    late_index = tmp_path / "late_index.mp4"
    late_index.write_bytes(whole.read_bytes()[:2000])
    spoilt = tmp_path / "spoilt.mp4"
    with av.open(str(whole)) as container:
        end = max(packet.pos + packet.size for packet in container.demux(video=0) if packet.size)
    data = bytearray(whole.read_bytes())
    data[48:end] = bytes(end - 48)
    spoilt.write_bytes(data)
    no_frames = write(tmp_path / "no_frames.avi", [], codec="mjpeg")
    hidden = tmp_path / "folder"
    hidden.mkdir()
    for path, words in (
        (sound, "only sound"),
        (text, "not a video"),
        (playlist, "not a video|list of other files"),
        (empty, "empty"),
        (late_index, "cut short"),
        (spoilt, "no frame can be decoded"),
        (no_frames, "no frame|no video|not a video"),
        (tmp_path / "missing.mp4", "no such file"),
        (hidden, "no image"),
    ):
        with pytest.raises(DataError, match=words) as error:
            sample_frames(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_folder_of_images_and_still_image(tmp_path):
    for number in range(12):
        Image.fromarray(barcode(number)).save(tmp_path / f"frame{number}.png")
    (tmp_path / "frame4.png").write_bytes(b"broken")
    info, frames = sample_frames(tmp_path, 11)
    assert numbers(frames) == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert (info.kind, info.frames, frames[-1].index, frames[-1].time) == ("images", 12, 10, None)
    assert "frame4.png" in info.problem
    assert probe(tmp_path).frames == 12
    (tmp_path / "frame7.png").rename(tmp_path / "photo.mp4")
    for name in ("frame8.png", "photo.mp4"):
        info, frames = sample_frames(tmp_path / name)
        assert (info.kind, info.frames, info.width, len(frames)) == ("image", 1, 96, 1)
        assert numbers(frames) == [int(name[5]) if name[5].isdigit() else 7]


def test_find_videos(tmp_path):
    for name in ("b10.mp4", "b9.MP4", "deep/a.webm", "deep/cover.jpg", "frames/1.png", ".hidden.mp4", "__MACOSX/x.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    found = find_videos([tmp_path / "b10.mp4", tmp_path, tmp_path / "frames"])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["b10.mp4", "b9.MP4", "deep/a.webm", "frames"]
    assert find_videos([tmp_path / "notes.txt"]) == [tmp_path / "notes.txt"]
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"\.mp4"):
        find_videos([tmp_path / "none"])
    with pytest.raises(DataError, match="no such file"):
        find_videos([tmp_path / "gone"])
