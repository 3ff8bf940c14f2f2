"""Decoding a few frames of a film: the right ones, wherever they lie, reading as little of it as that takes.

Frames are sought through the key frames, so fifteen frames of a two-hour film cost fifteen short runs of decoding. They
come upright (the camera's rotation or mirror mark is applied) and as 8-bit RGB by the colour matrix and range that the
frame states (swscale's default, BT.601 in limited range, where it states none); transparency is laid on white; the
sample aspect ratio is ignored, as OpenCV and decord ignore it. Damaged frames give way to the nearest sound one. Which
frame is the i-th stands in `timelines`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitalloy.data.images import to_rgb
from vitalloy.data.timelines import Timeline, from_index, from_packets, from_times, kind_of, open_film, ranked_stamps
from vitalloy.errors import DataError

LISTED_BYTES = 32 << 20  # a file without a full index is listed packet by packet up to this size: some 0.1 s
_LISTING_KEYS = ("avi", "flv", "matroska", "mov")  # key frames in the index; elsewhere its marks are FFmpeg's guesses


@dataclass(frozen=True)
class Frame:
    """One frame: its number in the video, when it is shown, and its picture.

    Args:
        index: the position asked for, from 0.
        time: seconds from the first frame, as the file states it; None for still images.
        image: (H, W, 3) uint8 RGB, upright.
    """

    index: int
    time: float | None
    image: np.ndarray


@dataclass(frozen=True)
class VideoInfo:
    """What a video is made of.

    Args:
        kind: "video" (a file), "images" (a folder of images) or "image" (one still image).
        width, height: in pixels, upright.
        frames: how many there are to read; `counted` says whether that is exact or estimated.
        duration: seconds; rate: mean frames a second; None for still images or where unknown.
        rotation: degrees counter-clockwise, 0 to 359, by which the coded frames are turned to stand upright.
        problem: what was odd about the file, such as missing its end; None if nothing was.
    """

    path: Path
    kind: str
    codec: str | None
    width: int
    height: int
    frames: int
    counted: bool
    duration: float | None
    rate: float | None
    rotation: int
    problem: str | None = None


def frame_positions(total: int, count: int) -> list[int]:
    """`count` positions evenly spread over `total` frames, first and last included; -1 gives every frame.

    The integer part of numpy's linspace, so positions repeat where `count` is more than `total`.
    """
    if count < -1:
        raise ValueError(f"count is the number of frames or -1 for all, not {count}")
    if total <= 0:
        return []
    if count == -1:
        return list(range(total))
    return np.linspace(0, total - 1, count, dtype=int).tolist()


def probe_film(path: Path) -> tuple[VideoInfo, Timeline] | None:
    """What is in a film; None for a still image, whatever its suffix."""
    import av

    with open_film(path) as (container, stream):
        if stream is None:
            return None
        found = next(_Reader(container, stream).frames, None)
        if found is None:
            with contextlib.suppress(av.FFmpegError, OSError):
                container.seek(stream.start_time or 0, stream=stream)
            found = next(_Reader(container, stream, careful=False).frames, None)
        if found is None:
            raise DataError(f"{path}: no frame can be decoded; the video is empty or damaged. Copy it again.")
        stamp, first = found
        base, codec, turned = float(stream.time_base), stream.codec_context.name, first.rotation % 360
        height, width = _upright(first, np.empty((first.height, first.width))).shape
        rate = next((float(r) for r in (stream.average_rate, stream.guessed_rate) if r and 0 < r <= 1000), None)
        timeline = from_index(path, stream, stamp, rate)
        if timeline is None and rate and path.stat().st_size > LISTED_BYTES:
            timeline = from_times(container, stream, stamp, rate)
    timeline = timeline or from_packets(path, stamp, rate)
    duration = float(timeline.total * timeline.step * (1 / (rate or 25) if timeline.ordinal else base))
    if duration and timeline.counted and not timeline.ordinal:
        rate = timeline.total / duration
    about = (codec, width, height, timeline.total, timeline.counted, duration, rate, turned, timeline.problem)
    return VideoInfo(path, "video", *about), timeline


class _Reader:
    """Finds the frames nearest to rising times in one pass, seeking over what is not needed.

    Args:
        careful: pass over frames that the decoder marks as damaged.
    """

    def __init__(self, container: Any, stream: Any, timeline: Timeline | None = None, careful: bool = True) -> None:
        self.container, self.stream, self.timeline, self.careful = container, stream, timeline, careful
        self.damaged = 0
        self.frames = self._decode()
        self._before = self._after = None
        self._patience = 1.0 / float(stream.time_base)  # go on decoding over this much rather than seek blindly
        self._back = 0.0  # seconds before the wanted time at which to look for a key frame first

    def nearest(self, stamp: float) -> tuple[int, Any] | None:
        """The time and the frame nearest to `stamp`, which may not fall from call to call; None if none decodes."""
        if self._is_far(stamp):
            self._seek(stamp)
        while self._after is None or self._after[0] < stamp:
            found = next(self.frames, None)
            if found is None:
                break
            self._before, self._after = self._after, found
        near = [found for found in (self._before, self._after) if found]
        return min(near, key=lambda found: abs(found[0] - stamp), default=None)

    def _decode(self, from_key: bool = False) -> Iterator[tuple[int, Any]]:
        """Sound frames and their times; `from_key`: of those that need nothing from before the next key frame."""
        import av

        earliest = None
        last, ordinal = None, self.timeline is not None and self.timeline.ordinal
        try:
            for packet in self.container.demux(self.stream):
                if from_key and earliest is None:
                    if not packet.is_keyframe or packet.pts is None:
                        continue
                    earliest = packet.pts
                try:
                    frames = packet.decode()
                except (av.FFmpegError, OSError):
                    self.damaged += 1
                    continue
                for frame in frames:
                    stamp = frame.pts
                    if ordinal or stamp is None:
                        stamp = 0 if last is None else last + 1
                    last = stamp if last is None else max(stamp, last)
                    if frame.is_corrupt and self.careful:
                        self.damaged += 1
                    elif earliest is None or stamp >= earliest:
                        yield stamp, frame
        except (av.FFmpegError, OSError):  # the file ends or is broken here
            self.damaged += 1

    def _is_far(self, stamp: float) -> bool:
        """Whether a key frame lies between here and there, or probably does."""
        if self.timeline.ordinal or (self.timeline.stamps and kind_of(self.container) == "mpeg"):
            return False  # in an MPEG program stream FFmpeg's times are some frames off after a seek
        here, step = self._after[0] if self._after else self.timeline.first, self.timeline.step
        if stamp - here <= 2 * step:
            return self._before is None and here - stamp > 2 * step  # damage brought us too far
        index = getattr(self.stream, "index_entries", ())
        if kind_of(self.container) in _LISTING_KEYS and len(index) and index[-1].timestamp >= stamp:
            key = index.search_timestamp(int(stamp))
            return key >= 0 and index[key].timestamp > here
        return stamp - here > self._patience

    def _seek(self, stamp: float) -> None:
        """Go to a key frame at or before `stamp`; further back where no frame before it can be decoded from there."""
        import av

        here = self._after[0] if self._after else None
        first, second = self.timeline.first, 1 / float(self.stream.time_base)
        for back in (0, 0.5, 1, 2, 4, 8, 16, 64, np.inf):
            if back < self._back:
                continue
            target = int(max(stamp - back * second, first))
            try:
                self.container.seek(target, stream=self.stream)
            except (av.FFmpegError, OSError):
                self._patience = np.inf  # not to be sought in: go on decoding
                return
            self.frames = self._decode(from_key=target > first)
            self._before, self._after = None, next(self.frames, None)
            if target == first:
                self._patience = np.inf  # without key frames: one pass from the start
            elif self._after and self._after[0] <= stamp + 0.5 * self.timeline.step:
                self._back = back  # a transport stream needs about as much the next time
            else:
                continue
            break
        if here is not None and self._after and self._after[0] <= here:  # no gain: groups are longer than thought
            self._patience = max(self._patience, stamp - self._after[0])


class Film:
    """The wanted frames of a film, one after the other, each once; `info.problem` is complete when all were read."""

    def __init__(self, info: VideoInfo, timeline: Timeline, count: int) -> None:
        self.info, self.timeline = info, timeline
        self.positions = frame_positions(timeline.total, count)

    def __iter__(self) -> Iterator[Frame]:
        for careful in (True, False):
            found = 0
            for frame in self._read(careful):
                found += 1
                yield frame
            if found:
                return
        raise DataError(f"{self.info.path}: no frame can be decoded; the video is damaged. Copy it again.")

    def _read(self, careful: bool) -> Iterator[Frame]:
        import av

        path, timeline, stamps = self.info.path, self.timeline, self.timeline.stamps
        last, given, moved, wanted = None, 0, 0, list(dict.fromkeys(self.positions))
        if timeline.ranked:
            with open_film(path) as (container, stream):
                stamps = ranked_stamps(container, stream, wanted)
        with open_film(path, threads=min(2, os.cpu_count() or 1)) as (container, stream):
            base = float(stream.time_base)
            reader = _Reader(container, stream, timeline, careful)
            for index in wanted:
                stamp = stamps[index] if stamps else timeline.first + index * timeline.step
                found = reader.nearest(stamp)
                off = found is not None and timeline.counted and abs(found[0] - stamp) > 0.5 * timeline.step
                if found is None or (found[0] == last and (off or reader.damaged)):
                    continue  # in place of a damaged frame only one that was not given already
                last = found[0]
                time = None if timeline.ordinal else (last - timeline.first) * base
                with contextlib.suppress(av.FFmpegError, ValueError):  # a picture that cannot be made RGB
                    picture = _picture(found[1])
                    given, moved = given + 1, moved + off
                    yield Frame(index, time, picture)
        lost = len(wanted) - given
        if given and (lost or moved):
            problem = f"of {len(wanted)} frames wanted, {lost} were lost to damage and {moved} replaced by a near one"
            self.info = replace(self.info, problem="; ".join(filter(None, (self.info.problem, problem))))


def _picture(frame: Any) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright."""
    if any(part.is_alpha for part in frame.format.components):
        image = np.asarray(to_rgb(Image.fromarray(frame.to_ndarray(format="rgba"))))
    else:
        image = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(_upright(frame, image))


def _upright(frame: Any, image: np.ndarray) -> np.ndarray:
    """Turn and mirror by quarters as the frame's display matrix says: x' = a x + c y, y' = b x + d y."""
    matrix = next((bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None or len(matrix) < 36:
        return image
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(b) > abs(a):
        image, a, d = image.swapaxes(0, 1), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
