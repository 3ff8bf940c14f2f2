"""Reading videos: what is in a file, and a few of its frames spread evenly over its length, without reading it all.

For everyone who feeds users' films to a model for images. A video is a file of any container and codec that FFmpeg
(through PyAV) knows, a folder of images, or one still image. How films are sought and decoded, and what "frame i"
means where a container does not say, stand in `films` and `timelines`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from vitalloy.data.films import Film, Frame, VideoInfo, frame_positions, probe_film
from vitalloy.data.images import IMAGE_SUFFIXES, read_image
from vitalloy.errors import DataError

__all__ = [
    "VIDEO_SUFFIXES",
    "Frame",
    "VideoInfo",
    "find_videos",
    "frame_positions",
    "open_frames",
    "probe",
    "sample_frames",
]

_log = logging.getLogger("vitalloy")

VIDEO_SUFFIXES = frozenset(
    (".3g2", ".3gp", ".amv", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".h264", ".h265", ".hevc", ".ivf")
    + (".m1v", ".m2ts", ".m2v", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mpv")
    + (".mts", ".mxf", ".nut", ".ogg", ".ogm", ".ogv", ".qt", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv", ".y4m")
)

_STILL_SUFFIXES = IMAGE_SUFFIXES - VIDEO_SUFFIXES
_SYSTEM_FOLDERS = ("__MACOSX", "__pycache__", "lost+found", "@eaDir")


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """What is in a video file, a folder of images or a still image; of a film only the first frame is decoded.

    Raises:
        DataError: the path is missing, or holds no picture that can be decoded; the message says why.
    """
    path = Path(path)
    if path.is_dir():
        return _probe_folder(path)
    _check_file(path)
    film = None if path.suffix.lower() in _STILL_SUFFIXES else probe_film(path)
    return film[0] if film else _probe_still(path)


def open_frames(path: str | os.PathLike[str], count: int = 15) -> Film | Stills:
    """`count` frames spread evenly over a video (-1 for all), to be read one after the other.

    Of a folder of images the first `count` are read, in natural order of their names; of a still image, the one. A
    damaged file gives the frames that can be had, and `info.problem` then says what is missing.

    Returns:
        an iterable of `Frame`, each frame once; `info` is what `probe` says, and `positions` the frames wanted, some of
        them more than once in a short video.

    Raises:
        DataError: as `probe`; when read, also if no frame can be decoded.
    """
    path = Path(path)
    if count < 1 and count != -1:
        raise ValueError(f"count is the number of frames, at least 1, or -1 for all, not {count}")
    if path.is_dir():
        return Stills(_probe_folder(path), _images_in(path)[: None if count == -1 else count])
    _check_file(path)
    film = None if path.suffix.lower() in _STILL_SUFFIXES else probe_film(path)
    return Film(*film, count) if film else Stills(_probe_still(path), [path])


def sample_frames(path: str | os.PathLike[str], count: int = 15) -> tuple[VideoInfo, list[Frame]]:
    """What `open_frames` gives, read at once: a position that comes twice gives the same frame twice."""
    frames = open_frames(path, count)
    found = {frame.index: frame for frame in frames}
    return frames.info, [found[i] for i in frames.positions if i in found]


def find_videos(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The videos below the files and folders that a person names, in order, each once.

    A file is taken as it is. In a folder and those below it every video file is taken, by suffix; a folder that
    directly holds images and no video file is taken itself, as one video. Hidden and system folders are passed over.

    Raises:
        DataError: a path is missing, or a folder holds neither videos nor images.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            below = list(_walk(path))
            if not below:
                kinds = ", ".join(sorted(VIDEO_SUFFIXES))
                raise DataError(f"{path}: the folder holds no video and no image. Videos are told by suffix: {kinds}.")
        elif path.exists():
            below = [path]
        else:
            raise DataError(f"{path}: there is no such file or folder. Check the path.")
        for one in below:
            found.setdefault(os.path.realpath(one), one)
    if not found:
        raise DataError("No video was named. Give video files, or folders that hold some.")
    return list(found.values())


# --- folders and still images -----------------------------------------------------------------------------------------


def _walk(root: Path) -> Iterator[Path]:
    seen = set()
    for where, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(where)
        folders[:] = sorted((n for n in folders if not n.startswith(".") and n not in _SYSTEM_FOLDERS), key=_natural)
        if real in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        names = sorted((n for n in names if not n.startswith(".")), key=_natural)
        videos = [n for n in names if os.path.splitext(n)[1].lower() in VIDEO_SUFFIXES]
        images = sum(os.path.splitext(n)[1].lower() in _STILL_SUFFIXES for n in names)
        if videos and images:
            _log.info("%s: %d images beside %d videos are not looked at", where, images, len(videos))
        elif images:
            yield Path(where)
        yield from (Path(where, name) for name in videos)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that puts frame 10 after frame 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _images_in(folder: Path) -> list[Path]:
    try:
        names = [p.name for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder} cannot be listed ({error.strerror}). Check its permissions.") from None
    if not names:
        raise DataError(f"{folder}: the folder holds no image, so it is not a video. Name a video or images' folder.")
    return [folder / name for name in sorted(names, key=_natural)]


def _probe_folder(folder: Path) -> VideoInfo:
    files = _images_in(folder)
    for file in files:
        with contextlib.suppress(DataError):
            width, height = read_image(file).size
            return VideoInfo(folder, "images", None, width, height, len(files), True, None, None, 0)
    raise DataError(f"{folder}: none of its {len(files)} images can be read. Copy or save them again.")


def _probe_still(path: Path) -> VideoInfo:
    width, height = read_image(path).size
    return VideoInfo(path, "image", None, width, height, 1, True, None, None, 0)


class Stills:
    """Images as the frames of a video, one after the other; `info.problem` is complete when all were read."""

    def __init__(self, info: VideoInfo, files: list[Path]) -> None:
        self.info, self.files = info, files
        self.positions = list(range(len(files)))

    def __iter__(self) -> Iterator[Frame]:
        bad = []
        for index, file in enumerate(self.files):
            try:
                image = np.asarray(read_image(file))
            except DataError:
                bad.append(file.name)
                continue
            yield Frame(index, None, image)
        if len(bad) == len(self.files):
            raise DataError(f"{self.info.path}: none of its first {len(bad)} images can be read. Save them again.")
        if bad:
            problem = f"{len(bad)} of its images cannot be read, the first of them {bad[0]}"
            self.info = replace(self.info, problem=problem)


def _check_file(path: Path) -> None:
    if not path.exists():
        raise DataError(f"{path}: there is no such file. Check the path.")
    if not path.is_file():
        raise DataError(f"{path}: this is neither a file nor a folder. Give a video file.")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes). Copy it again, or remove it.")
