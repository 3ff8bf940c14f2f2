"""Real and forged videos in the layouts in which the data sets are published.

For everyone who measures or trains a detector: point `read_layout` at the unpacked data set. How each layout was
checked (nobody here holds the data sets, which need a signed form):

- dfdc: `metadata.json` beside the videos of each `dfdc_train_part_N`, file name -> label (FAKE or REAL), split,
  original: the challenge's own description and public readers of it; `labels.csv` (filename, label, 1 = fake) of the
  public test set: the loader and the layout notes of Self-Blended Images (Shiohara and Yamasaki, 2022).
- faceforensics: FaceForensics++ (Rössler et al., 2019): the folders as its authors' documentation names them, the
  last levels (`c23/videos`) from public loaders; the pairs in `train.json`, `val.json` and `test.json` are those of the
  authors' repository. The official split knows the 1,000 numbered videos only, so it leaves out actors and
  DeepFakeDetection. `c0`, an old name, is read as `raw`.
- celeb: Celeb-DF v2 (Li et al., 2020): the authors' documentation; that 1 means *real* in
  `List_of_testing_videos.txt` is from public loaders, and checked against the folder of every line.
- timit: DeepfakeTIMIT (Korshunov and Marcel, 2018): public loaders and the file names in the GenConViT result files.
  It has no real videos. Put them in a folder `real` or `vidtimit` beside the two; VidTIMIT's frames come without a
  suffix and must be renamed to .jpg first.
- folders: class folders such as `real/` and `fake/` at any depth, or a `labels.csv` with the columns path and label.
"""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitalloy.data.images import IMAGE_SUFFIXES
from vitalloy.data.video import find_videos
from vitalloy.errors import DataError, suggest

_log = logging.getLogger("vitalloy")

SPLITS = ("train", "val", "test")
_SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_COMPRESSIONS = {"raw": "raw", "c0": "raw", "c23": "c23", "c40": "c40"}
_CELEB_FOLDERS = {"celeb-real": False, "youtube-real": False, "celeb-synthesis": True}
_TIMIT_FOLDERS = {"higher_quality": True, "lower_quality": True, "real": False, "vidtimit": False}
_CLASS_FOLDERS = {
    **dict.fromkeys(("real", "original", "0_real"), False),
    **dict.fromkeys(("fake", "manipulated", "1_fake"), True),
    # copies of FaceForensics++ without its upper folders
    **dict.fromkeys(("deepfakedetection", "deepfakes", "face2face", "faceswap", "neuraltextures", "faceshifter"), True),
}
_FAKE_WORDS = {"fake": True, "1": True, "true": True, "real": False, "0": False, "false": False}
_PATH_COLUMNS = ("path", "filename", "file", "video", "name")


@dataclass(frozen=True)
class Labelled:
    """A video (or an image, or a folder of frames) and what is known of it."""

    path: Path
    fake: bool
    kind: str  # the manipulation or source, such as "Deepfakes" or "original"
    compression: str | None = None  # "raw", "c23" or "c40", of FaceForensics++ alone


def read_layout(root: str | os.PathLike[str], layout: str = "auto", split: str | None = None) -> list[Labelled]:
    """The videos below `root` with their labels, in the order of their paths.

    Args:
        root: the unpacked data set.
        layout: "dfdc", "faceforensics", "celeb", "timit" or "folders"; "auto" tells them by the names of files and
            folders.
        split: "train", "val" or "test" as the data set's authors have it; without it everything is read. Class
            folders are split by folders of these names, DeepfakeTIMIT has no official split.

    Raises:
        DataError: nothing fits, a label file is broken, or the data set has no such split.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder. Give the folder that holds the unpacked data set.")
    if split is not None and split not in SPLITS:
        raise DataError(f"There is no split {split!r}.{suggest(split, SPLITS)} Choose among {', '.join(SPLITS)}.")
    if layout == "auto":
        layout = next((name for name, (recognise, _, _) in LAYOUTS.items() if recognise(root)), "")
        if not layout:
            known = "; ".join(f"{name}: {about}" for name, (_, _, about) in LAYOUTS.items())
            raise DataError(
                f"{root}: the folder is laid out in none of the known ways ({known}). Rename to one of them."
            )
    if layout not in LAYOUTS:
        raise DataError(
            f"There is no layout {layout!r}.{suggest(layout, LAYOUTS)} Choose among auto, {', '.join(LAYOUTS)}."
        )
    _, read, about = LAYOUTS[layout]
    found = sorted(read(root, split), key=lambda item: item.path)
    if not found:
        part = f" of the split {split!r}" if split else ""
        raise DataError(f"{root}: read as {layout}, it holds no labelled video{part}. Expected is {about}.")
    return found


# Finding


def _videos(folder: Path) -> list[Path]:
    """Video files below a folder, and folders of images, each of which counts as one video."""
    try:
        return find_videos([folder])
    except DataError:  # an empty folder; that nothing at all was found is said at the end
        return []


def _images(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]


def _folders(folder: Path) -> dict[str, Path]:
    """Lower-case name -> sub-folder."""
    return {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()} if folder.is_dir() else {}


def _first(folder: Path, name: str) -> Path | None:
    """Where a listed video lies: in `folder` or in its sub-folder `videos`."""
    return next((path for path in (folder / name, folder / "videos" / name) if path.exists()), None)


def _label_files(root: Path, name: str) -> list[Path]:
    """Files of this name in `root` and up to two levels below."""
    return sorted(path for pattern in (name, f"*/{name}", f"*/*/{name}") for path in root.glob(pattern))


def _warn_missing(root: Path, missing: Sequence[str], listed: int) -> None:
    if missing:
        _log.warning(
            "%s: %d of the %d listed videos are not there and are left out (%s%s)",
            *(root, len(missing), listed, ", ".join(missing[:3]), ", ..." if len(missing) > 3 else ""),
        )


def _no_split(root: Path, name: str, split: str, mend: str) -> DataError:
    return DataError(f"{root}: {name} has no split {split!r} here. {mend}")


# DFDC


def _is_dfdc(root: Path) -> bool:
    if any(_has_labels(path) for path in _label_files(root, "metadata.json")):
        return True
    return any("filename" in _csv_header(path) for path in _label_files(root, "labels.csv"))


def _has_labels(path: Path) -> bool:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return isinstance(entries, dict) and any(isinstance(e, dict) and "label" in e for e in entries.values())
    except (OSError, ValueError):
        return False


def _read_dfdc(root: Path, split: str | None) -> list[Labelled]:
    found, missing, listed = [], [], 0
    for file in _label_files(root, "metadata.json"):
        try:
            entries = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise DataError(f"{file}: this is not JSON of file names and labels. Unpack the file again.") from None
        for name, entry in entries.items():
            label = str(entry.get("label") if isinstance(entry, dict) else "").upper()
            if label not in ("FAKE", "REAL"):
                raise DataError(f"{file}: the label of {name} is {label!r}, not FAKE or REAL. Unpack the file again.")
            if split is None or entry.get("split", "train") == split:
                path, listed = _first(file.parent, name), listed + 1
                missing.append(name) if path is None else found.append(Labelled(path, label == "FAKE", "dfdc"))
    if split in (None, "test"):
        for file in _label_files(root, "labels.csv"):
            rows = _read_csv(file, "dfdc")
            listed += len(rows)
            missing += [name for name, path, _, _ in rows if path is None]
            found += [Labelled(path, fake, kind) for _, path, fake, kind in rows if path is not None]
    _warn_missing(root, missing, listed)
    return list({item.path: item for item in found}.values())


def _csv_header(path: Path) -> list[str]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return [cell.strip().lower() for cell in next(csv.reader(file), [])]
    except (OSError, ValueError):
        return []


def _read_csv(path: Path, kind: str = "") -> list[tuple[str, Path | None, bool, str]]:
    """(name as written, where it lies, fake, kind) of each line."""
    header = _csv_header(path)
    column = next((name for name in _PATH_COLUMNS if name in header), None)
    if column is None or "label" not in header:
        raise DataError(f"{path}: the first line must name the columns path and label; it is {','.join(header)!r}.")
    rows = []
    with open(path, newline="", encoding="utf-8-sig") as file:
        for number, cells in enumerate(csv.reader(file), start=1):
            if number == 1 or not any(cell.strip() for cell in cells):
                continue
            row = dict(zip(header, (cell.strip() for cell in cells), strict=False))
            fake = _FAKE_WORDS.get(row.get("label", "").lower())
            if fake is None or not row[column]:
                raise DataError(
                    f"{path}, line {number}: {','.join(cells)!r} has no path or no label among 1, fake, 0 and real."
                )
            where = _first(path.parent, row[column])
            rows.append((row[column], where, fake, row.get("kind") or kind or ("fake" if fake else "real")))
    return rows


# FaceForensics++


def _read_faceforensics(root: Path, split: str | None) -> list[Labelled]:
    top, found = _folders(root), []
    for side, fake in (("original_sequences", False), ("manipulated_sequences", True)):
        for source in _folders(top.get(side, root / side)).values():
            for name, folder in _folders(source).items():
                if name in _COMPRESSIONS:  # masks and models lie beside
                    inside = _folders(folder)
                    videos = inside.get("videos", inside.get("images", folder / "videos"))
                    kind = source.name if fake else "original"
                    found += [Labelled(path, fake, kind, _COMPRESSIONS[name]) for path in _videos(videos)]
    if split is None:
        return found
    names = _split_names(root, split)
    kept = [item for item in found if item.path.stem in names]
    if len(kept) < len(found):
        _log.info("%s: %d of %d videos are in the official split %s", root, len(kept), len(found), split)
    return kept


def _split_names(root: Path, split: str) -> set[str]:
    """Names, without suffix, of the originals and the forgeries of an official split."""
    file = next((path for path in (root / f"{split}.json", root / "splits" / f"{split}.json") if path.is_file()), None)
    if file is None:
        mend = f"Put the authors' {split}.json (pairs of numbers) beside original_sequences."
        raise _no_split(root, "FaceForensics++", split, mend)
    try:
        pairs = [(str(a), str(b)) for a, b in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError):
        raise DataError(f"{file}: this is not a list of pairs of numbers. Fetch the authors' file again.") from None
    return {name for a, b in pairs for name in (a, b, f"{a}_{b}", f"{b}_{a}")}


# Celeb-DF


def _read_celeb(root: Path, split: str | None) -> list[Labelled]:
    found = {}
    for name, folder in _folders(root).items():
        if name in _CELEB_FOLDERS:
            for path in _videos(folder):
                found[name, path.stem.lower()] = Labelled(path, _CELEB_FOLDERS[name], folder.name)
    if split is None:
        return list(found.values())
    if split == "val":
        raise _no_split(root, "Celeb-DF", split, "Choose train or test.")
    listed = _celeb_tests(root)
    _warn_missing(root, ["/".join(key) for key in listed if key not in found], len(listed))
    return [item for key, item in found.items() if (key in listed) == (split == "test")]


def _celeb_tests(root: Path) -> set[tuple[str, str]]:
    """(folder, name without suffix) of the official test videos, in lower case."""
    file = root / "List_of_testing_videos.txt"
    if not file.is_file():
        raise _no_split(root, "Celeb-DF", "test", f"Put the authors' {file.name} beside the folders of videos.")
    listed = set()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        label, _, name = line.strip().partition(" ")
        folder, _, video = name.strip().lower().replace("\\", "/").partition("/")
        if not line.strip():
            continue
        # 1 is real in this file
        if folder not in _CELEB_FOLDERS or not video or label != str(int(not _CELEB_FOLDERS[folder])):
            raise DataError(
                f'{file}, line {number}: {line!r} is not of the form "1 YouTube-real/00170.mp4" with 1 for the real '
                "and 0 for Celeb-synthesis. Fetch the authors' file again."
            )
        listed.add((folder, Path(video).stem))
    return listed


# DeepfakeTIMIT


def _read_timit(root: Path, split: str | None) -> list[Labelled]:
    if split is not None:
        raise _no_split(root, "DeepfakeTIMIT", split, "It has no official split: leave the split out.")
    found = [
        Labelled(path, _TIMIT_FOLDERS[name], folder.name if _TIMIT_FOLDERS[name] else "real")
        for name, folder in _folders(root).items()
        if name in _TIMIT_FOLDERS
        for path in _videos(folder)
    ]
    if all(item.fake for item in found):
        _log.warning("%s: DeepfakeTIMIT has forged videos only; put real ones in a folder `real` beside them", root)
    return found


# Class folders


def _is_folders(root: Path) -> bool:
    return (root / "labels.csv").is_file() or any(
        name.lower() in _CLASS_FOLDERS for _, folders, _ in os.walk(root) for name in folders
    )


def _read_folders(root: Path, split: str | None) -> list[Labelled]:
    if (root / "labels.csv").is_file():
        rows = _read_csv(root / "labels.csv")
        _warn_missing(root, [name for name, path, _, _ in rows if path is None], len(rows))
        found = [Labelled(path, fake, kind) for _, path, fake, kind in rows if path is not None]
    else:
        found = []
        for path in _videos(root):
            parts = [part for part in path.relative_to(root).parts if part.lower() in _CLASS_FOLDERS]
            if parts:  # the innermost decides
                loose = path.is_dir() and path.name == parts[-1]  # crops right in a class folder are of many people
                each = _images(path) if loose else [path]
                found += [Labelled(item, _CLASS_FOLDERS[parts[-1].lower()], parts[-1]) for item in each]
    if split is None:
        return found
    wanted = _SPLIT_FOLDERS[split]
    return [item for item in found if any(part.lower() in wanted for part in _parents(item.path, root))]


def _parents(path: Path, root: Path) -> Sequence[str]:
    return path.relative_to(root).parts[:-1] if path.is_relative_to(root) else ()


_Layout = tuple[Callable[[Path], bool], Callable[[Path, "str | None"], list[Labelled]], str]

# name -> how it is told, how it is read, and what it looks like; told in this order
LAYOUTS: dict[str, _Layout] = {
    "faceforensics": (
        lambda root: bool({"original_sequences", "manipulated_sequences"} & set(_folders(root))),
        _read_faceforensics,
        "original_sequences/youtube/c23/videos/*.mp4 and manipulated_sequences/Deepfakes/c23/videos/*.mp4",
    ),
    "celeb": (
        lambda root: bool(set(_CELEB_FOLDERS) & set(_folders(root))),
        _read_celeb,
        "Celeb-real, YouTube-real and Celeb-synthesis with *.mp4",
    ),
    "timit": (
        lambda root: bool({"higher_quality", "lower_quality"} & set(_folders(root))),
        _read_timit,
        "higher_quality/<person>/*.avi and lower_quality/<person>/*.avi",
    ),
    "dfdc": (_is_dfdc, _read_dfdc, "*.mp4 with a metadata.json beside them, or with a labels.csv of filename,label"),
    "folders": (_is_folders, _read_folders, "folders real and fake, or a labels.csv of path,label"),
}
