"""Labelled images from folders: one folder a class, either at the top or below `train/`, `val/` and `test/`."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from pathlib import Path

from vitalloy.data.image_set import Files, ImageSet, Parts
from vitalloy.data.images import IMAGE_SUFFIXES
from vitalloy.errors import DataError

_log = logging.getLogger("vitalloy")

_PART_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_SYSTEM_FOLDERS = ("__MACOSX", "__pycache__", "lost+found", "@eaDir")
_SHOWN = 8  # names listed in a message before "and n more"
_MEND = "Lay the folder out as one sub-folder of images a class, such as flowers/rose/1.jpg and flowers/tulip/2.jpg."


def read_folder(root: Path, *, for_training: bool = True) -> Parts:
    """The labelled images below `root`; each class folder is searched to its depths.

    Args:
        for_training: refuse what cannot be trained on (a single class, a class with one image, parts whose
            classes differ); otherwise one class and one image are enough.

    Raises:
        DataError: with what is wrong in the folder and how to mend it.
    """
    if not root.is_dir():
        raise DataError(f"{root} is a file, not a folder. Unpack it first if it is an archive. {_MEND}")
    folders = {_part_of(root, folder): folder for folder in _part_folders(root)}
    if not folders:
        return _whole(root, for_training)
    found = {part: _class_files(folder) for part, folder in folders.items()}
    if "train" not in found and for_training:
        raise DataError(
            f"{root} has {' and '.join(sorted(found))} but no train folder. Add train/ with the same class folders, "
            "or give a folder of class folders, which is split for you."
        )
    _check_same_classes(folders, found, for_training)
    for part, files in found.items():
        _check_counts(folders[part], files, fewest=2 if part == "train" and for_training else 1)
    classes = sorted(set().union(*found.values()))
    _check_classes(root, classes, for_training)
    sets = {part: _image_set(files, classes) for part, files in found.items()}
    first = sets.get("train") or next(iter(sets.values()))
    return Parts(
        name=root.resolve().name,
        train=first,
        val=sets.get("val"),
        test=sets.get("test"),
        flip=flip_keeps_class(classes),
    )


def flip_keeps_class(classes: list[str]) -> bool:
    """False if the names look like digits or letters, or tell left from right: a mirror would change the class."""
    signs = all(len(name) == 1 or name.isdigit() for name in classes)
    sided = any(re.search(r"(?<![^\W_])(left|right)(?![^\W_])", name.lower()) for name in classes)
    if signs or sided:
        _log.info("the class names look like digits, letters or sides: images will not be mirrored in training")
    return not (signs or sided)


def _whole(root: Path, for_training: bool) -> Parts:
    files = _class_files(root)
    classes = sorted(files)
    _check_classes(root, classes, for_training)
    _check_counts(root, files, fewest=2 if for_training else 1)
    return Parts(name=root.resolve().name, train=_image_set(files, classes), flip=flip_keeps_class(classes))


def _part_folders(root: Path) -> list[Path]:
    """The train, val and test folders, if `root` is divided so and these are not classes of their own."""
    below = _subfolders(root)
    parts = [folder for folder in below if folder.name.lower() in _PART_NAMES]
    others = [folder.name for folder in below if folder not in parts]
    divided = [folder for folder in parts if _subfolders(folder)]
    if not parts or (others and not divided):
        return []  # a class may be called "train"
    if flat := [folder for folder in parts if folder not in divided]:
        raise DataError(f"{flat[0]} has no class folders. {_MEND}")
    if others:
        _log.warning("%s: ignored beside its train, val and test folders: %s", root, _listed(others))
    return parts


def _part_of(root: Path, folder: Path) -> str:
    part = _PART_NAMES[folder.name.lower()]
    same = [f.name for f in _subfolders(root) if _PART_NAMES.get(f.name.lower()) == part]
    if len(same) > 1:
        raise DataError(f"{root} has {' and '.join(same)}, which mean the same part. Keep one of them.")
    return part


def _subfolders(folder: Path) -> list[Path]:
    try:
        below = [p for p in folder.iterdir() if p.is_dir()]
    except OSError as error:
        raise DataError(f"{folder} cannot be listed ({error.strerror}). Check its permissions.") from None
    return sorted(p for p in below if not p.name.startswith(".") and p.name not in _SYSTEM_FOLDERS)


def _class_files(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its image files in a fixed order, for each class folder in `folder`."""
    files: dict[str, list[Path]] = {}
    ignored = sum(1 for p in folder.iterdir() if not p.is_dir())
    for class_folder in _subfolders(folder):
        images, others = _walk(class_folder)
        ignored += others
        # one form for é written in one or in two code points, which differ between systems
        files.setdefault(unicodedata.normalize("NFC", class_folder.name), []).extend(images)
    if ignored:
        _log.info("%s: %d files that are hidden, not images or outside a class folder were ignored", folder, ignored)
    return files


def _walk(folder: Path) -> tuple[list[Path], int]:
    """The image files below a folder, sorted, and the number of other files."""
    images, others, seen = [], 0, set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n not in _SYSTEM_FOLDERS)
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                images.append(Path(where, name))
            else:
                others += 1
    return sorted(images, key=lambda p: p.relative_to(folder).parts), others


def _image_set(files: dict[str, list[Path]], classes: list[str]) -> ImageSet:
    paths = [(path, label) for label, name in enumerate(classes) for path in files.get(name, [])]
    return ImageSet(Files(p for p, _ in paths), [label for _, label in paths], classes)


def _check_classes(root: Path, classes: list[str], for_training: bool) -> None:
    if not classes:
        flat = sum(1 for p in root.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
        if flat:
            raise DataError(f"{root} holds {flat} images but no class folders. {_MEND}")
        raise DataError(f"{root} is empty: it holds no class folders and no images. {_MEND}")
    if len(classes) == 1 and for_training:
        inner = root / classes[0]
        hint = f" Did you mean {inner}?" if inner.is_dir() and len(_subfolders(inner)) > 1 else ""
        raise DataError(f"{root} has only one class, {classes[0]!r}; training needs two or more.{hint} {_MEND}")


def _check_counts(folder: Path, files: dict[str, list[Path]], fewest: int) -> None:
    few = [f"{name!r} has {_images(len(paths))}" for name, paths in sorted(files.items()) if len(paths) < fewest]
    if few:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        why = "at least two are needed, to train on one and test on another" if fewest == 2 else "one is needed"
        raise DataError(
            f"{folder}: class folder {_listed(few, quoted=False)}; {why}. Add images ({kinds}) or remove the folder."
        )


def _images(count: int) -> str:
    return {0: "no image", 1: "one image"}.get(count, f"{count} images")


def _check_same_classes(folders: dict[str, Path], found: dict[str, dict[str, list[Path]]], for_training: bool) -> None:
    if not for_training or "train" not in found:
        return
    wanted, problems = set(found["train"]), []
    for part, files in found.items():
        if missing := sorted(wanted - set(files)):
            problems.append(f"{folders[part].name} lacks {_listed(missing)}")
        if extra := sorted(set(files) - wanted):
            problems.append(f"{folders[part].name} has {_listed(extra)}, which {folders['train'].name} lacks")
    if problems:
        where = folders["train"].parent
        raise DataError(f"{where}: the class folders differ: {'; '.join(problems)}. Give every part the same ones.")


def _listed(names: list[str], quoted: bool = True) -> str:
    shown = [repr(n) if quoted else n for n in names[:_SHOWN]]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
