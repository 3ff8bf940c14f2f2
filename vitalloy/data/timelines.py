"""When each frame of a film is shown, as far as its container tells, and opening containers safely.

Wherever it can be known cheaply, frame i is the i-th in order of showing, whatever the order of coding or the frame
rate: from the container's index (MP4, MOV, AVI), or by listing the packets, which a file that states no length needs
in any case. In a large file without such an index (Matroska, MPEG-TS, fragmented MP4) the count is estimated from
duration and rate, and the frames are those nearest to evenly spaced times: the same frames at a constant rate.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitalloy.errors import DataError

_LISTS = ("concat", "dash", "hls", "tty")  # lists of other files, and text drawn as pictures
_STATING_DURATION = ("asf", "avi", "flv", "matroska", "mov")  # in a header, true or not
_REORDER = 32  # frames; no codec shows a frame later than this many packets after its own
_MEND = "Convert it to MP4 (H.264), or remove it."


@contextlib.contextmanager
def open_film(path: Path, threads: int = 1) -> Iterator[tuple[Any, Any]]:
    """The container and its main video stream (None for a still image), closed at the end."""
    import av
    from av.stream import Disposition

    try:
        # a list of other files (a playlist called film.mp4) must not make us fetch them
        container = av.open(f"file:{path}", options={"protocol_whitelist": "file"}, metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DataError(f"{path}: {_why_unopened(path, error)}") from None
    with container:
        kind = kind_of(container)
        if kind in _LISTS:
            raise DataError(f"{path}: this is text or a list of other files, not a video. Give the video itself.")
        if kind.endswith("_pipe") or kind == "image2":
            yield container, None
            return
        stream = container.streams.best("video")
        if stream is None or stream.disposition & Disposition.attached_pic:
            what = "only sound" if container.streams.audio else "no video stream"
            raise DataError(f"{path}: the file holds {what}, so there is no picture to look at. Give a video.")
        if stream.codec_context is None:
            raise DataError(f"{path}: its picture is coded in a way that FFmpeg here cannot decode. {_MEND}")
        stream.codec_context.thread_count = threads
        stream.thread_type = "AUTO"
        yield container, stream


def kind_of(container: Any) -> str:
    """The first of FFmpeg's names for the container's format."""
    return container.format.name.split(",")[0]


def _why_unopened(path: Path, error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "the file cannot be opened (permission denied). Check its permissions."
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(8)[4:] in (b"ftyp", b"moov", b"mdat", b"wide", b"free"):
            return "the file is cut short or damaged: its list of frames, often at the end, is missing. Copy it again."
    return f"this is not a video, or of a kind that FFmpeg cannot read. {_MEND}"


@dataclass(frozen=True)
class Timeline:
    """How many frames there are and when each is shown, in the stream's time base, as far as it is known.

    Args:
        total: frames; `counted`, exactly.
        first: when the first frame is shown; step: the mean distance of frames.
        stamps: when each frame is shown, in order; None: at `first + i * step`.
        ranked: frame i is the i-th of the container's index, and `ranked_stamps` finds when it is shown.
        ordinal: the file states no times: frame i has stamp i, and can only be reached from the start.
        problem: what is missing.
    """

    total: int
    counted: bool
    first: int
    step: float
    stamps: list[int] | None = None
    ranked: bool = False
    ordinal: bool = False
    problem: str | None = None


def _entries(stream: Any) -> list[Any]:
    """The container's index of frames that are shown, in order of decoding; PyAV before 17 does not tell it."""
    return [entry for entry in getattr(stream, "index_entries", ()) if entry.size and not entry.is_discard]


def from_index(path: Path, stream: Any, first: int, rate: float | None) -> Timeline | None:
    """The timeline by the container's index, if it lists every frame (many list key frames only, or none)."""
    size = len(getattr(stream, "index_entries", ()))
    if not size or not stream.duration or not rate or size < int(stream.duration * stream.time_base * rate) - 1:
        return None
    entries, end = _entries(stream), path.stat().st_size
    if not entries:
        return None
    total = sum(entry.pos + entry.size <= end for entry in entries)
    problem = f"the file is cut short: {total} of {len(entries)} frames are there" if total < len(entries) else None
    times = np.array([entry.timestamp for entry in entries[: max(total, 1)]])  # of decoding, as far apart as of showing
    step = (times[-1] - times[0]) / (total - 1) if total > 1 else stream.duration / len(entries)
    if abs(first - (stream.start_time or 0)) > _REORDER * step:
        first = stream.start_time or 0  # the first frames are damaged
    steady = bool(np.abs(times - times[0] - step * np.arange(len(times))).max() < 0.25 * step)
    return Timeline(len(times), True, first, step, ranked=not steady, problem=problem)


def from_times(container: Any, stream: Any, first: int, rate: float) -> Timeline | None:
    """The timeline by rate and the last packet of the file, if its end is where the file says."""
    import av

    last, seen, step = first, 0.0, 1 / (rate * stream.time_base)
    if not container.duration:
        return None
    stated = ((container.start_time or 0) + container.duration) / av.time_base
    try:
        container.seek(int((stated - 1) / stream.time_base), stream=stream)  # earlier, for frames shown out of order
        for packet in container.demux():
            if packet.pts is not None:
                seen = max(seen, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                last = max(last, packet.pts) if packet.stream is stream else last
    except (av.FFmpegError, OSError):
        return None
    if last == first or _cut(container, seen):
        return None
    total = round((last - first) / step) + 1
    counted = abs(stream.frames - total) <= max(2, 0.05 * total)  # the header of a fragmented file counts a part
    total = stream.frames if counted else total
    return Timeline(total, counted, first, (last - first) / (total - 1))


def from_packets(path: Path, first: int, rate: float | None) -> Timeline:
    """The timeline by listing every packet, without decoding."""
    import av

    stamps, seen, problem = [], 0.0, None
    with open_film(path) as (container, stream):
        with contextlib.suppress(av.FFmpegError, OSError):
            for packet in container.demux():
                if packet.pts is not None:
                    seen = max(seen, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream is stream and packet.size and not packet.is_discard:
                    stamps.append(packet.pts)
        if cut := _cut(container, seen):
            problem = f"the file is cut short: {cut[0]:.1f} of {cut[1]:.1f} s are there"
        base = float(stream.time_base)
    if None in stamps:
        return Timeline(len(stamps), True, 0, 1, ordinal=True, problem=problem)
    stamps = sorted(set(stamps)) or [first]
    late = bisect.bisect_left(stamps, first)  # packets before the first frame belong to a group that lacks its start
    stamps = stamps[late if late < len(stamps) / 2 else 0 :]
    first = stamps[0]
    step = (stamps[-1] - first) / (len(stamps) - 1) if len(stamps) > 1 else 1 / (base * (rate or 25))
    return Timeline(len(stamps), True, first, step, stamps, problem=problem)


def _cut(container: Any, seen: float) -> tuple[float, float] | None:
    """The seconds seen and the seconds stated, where a container that states its length has lost its end."""
    import av

    if not container.duration or kind_of(container) not in _STATING_DURATION:
        return None
    start, stated = (container.start_time or 0) / av.time_base, container.duration / av.time_base
    return (max(seen - start, 0.0), stated) if start + stated - seen > max(1.0, 0.05 * stated) else None


def ranked_stamps(container: Any, stream: Any, positions: list[int]) -> dict[int, int]:
    """When the frames at these positions in order of showing are shown, by the packets from their key frames on.

    The index tells when packets are decoded. All before a key frame are shown before it, so the i-th frame shown is,
    from the k-th packet on, a key frame, the one with the (i - k)-th smallest time of showing.
    """
    import av

    entries = _entries(stream)
    times = [entry.timestamp for entry in entries]
    keys = [0] + [number for number, entry in enumerate(entries) if entry.is_keyframe and number]
    packets, start, shown, delay, found = container.demux(stream), 0, [], 0, {}
    with contextlib.suppress(av.FFmpegError, OSError):
        for i in sorted(set(positions)):
            key = keys[bisect.bisect_right(keys, i) - 1]
            if key > start + len(shown):
                container.seek(times[key] + delay, stream=stream)
                packets, start, shown = container.demux(stream), None, []
            while start is None or len(shown) <= i - start + _REORDER:
                packet = next(packets, None)
                if packet is None or not packet.size or packet.pts is None or packet.dts is None:
                    break
                start = bisect.bisect_left(times, packet.dts) if start is None else start
                delay = delay if shown else packet.pts - packet.dts
                bisect.insort(shown, packet.pts)
            if start is None:
                break
            if 0 <= i - start < len(shown):
                found[i] = shown[i - start]
    return {i: found.get(i, times[i] + delay) for i in positions}
