"""One's own data: a folder of class folders, with or without train, val and test parts, or a manifest.

    pets/cat/1.jpg, pets/dog/7.png, ...                  divided here, always in the same way
    pets/train/cat/1.jpg, ..., pets/test/dog/7.png, ...  val may be missing
    pets/manifest.csv or pets/manifest.json              what `read_manifest` takes; its paths start at pets/

Class names are the folders' names, or come from `classnames.txt` beside them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

from PIL import Image

from .manifest import PARTS, check_names, divide, likewise, read_manifest
from .splits import Split, read_text
from .task import DatasetError, Item, Task, note, read_upright_image

TEMPLATES = ("a photo of a {}.",)

_MANIFESTS = ("manifest.csv", "manifest.json")
# Beside hidden files, what macOS and Synology put beside one's own: names like those of the images, thumbnails in them.
_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir")


class FolderTask(Task):
    """A Task with one's own images: turned upright as their EXIF data say, transparent ones laid on white."""

    parts_to_record = ("train", "val", "test")
    if_missing = "put it there, or correct the manifest or --split that lists it"

    def read(self, item: Item) -> Image.Image:
        """Return the RGB picture of `item`; raise DatasetError if its file is missing or damaged."""
        return read_upright_image(self.image_root / item.path)

    @property
    def data_sha256(self) -> str:
        """SHA-256 of the class names and of the files' fingerprint: one's own data change under the same name."""
        names = json.dumps(self.class_names)
        return hashlib.sha256(f"{names}\n{self.fingerprint((*self.train, *self.val, *self.test))}".encode()).hexdigest()


def read_folder(root: Path) -> tuple[Split, Path]:
    """Read one's own data set `root`, a folder or a manifest file; return its parts and its image root.

    Labels count up from 0 in the order of the sorted folder names. Every class has at least one training image;
    val may be empty. Raises DatasetError, with the file or folder and the remedy, for anything else.
    """
    if root.is_file():
        return _note_untested(read_manifest(root), root), root.parent
    if not root.is_dir():
        raise DatasetError(
            f"--root_path {root} does not exist; for --dataset folder it names the folder of your images"
        )
    manifests = [root / name for name in _MANIFESTS if (root / name).is_file()]
    if len(manifests) == 2:
        raise DatasetError(f"{root} has a {_MANIFESTS[0]} and a {_MANIFESTS[1]}; remove one of them")
    if manifests:
        return _note_untested(read_manifest(manifests[0]), root), root
    folders = _subfolders(root)
    parts = {name: PARTS[name.lower()] for name in folders if name.lower() in PARTS}
    others = [name for name in folders if name not in parts]
    # One folder named like a part, with images in it and beside other classes, is a class: trains, for one.
    if others and (len(parts) > 1 or any(_subfolders(root / name) for name in parts)):
        raise DatasetError(
            f"{root} holds what looks like parts ({', '.join(parts)}) and other folders beside them ({others[0]}); "
            "move these elsewhere, or say in a manifest.csv what belongs where"
        )
    split = _read_parts(root, parts) if parts and not others else _read_class_folders(root, folders)
    return _note_untested(split, root), root


def _read_class_folders(root: Path, folders: list[str]) -> Split:
    listing = _Listing(root)
    images = listing.class_folders(folders)
    listing.note()
    _check_classes(root, images)
    names = _class_names(root, folders)
    return Split(names, *divide(images, str(root)))


def _read_parts(root: Path, parts: dict[str, str]) -> Split:
    twice = [part for part, count in Counter(parts.values()).items() if count > 1]
    if twice:
        same = [name for name, part in parts.items() if part == twice[0]]
        raise DatasetError(f"{root} holds the folders {' and '.join(same)}, which mean the same part; keep one")
    for part in ("train", "test"):
        if part not in parts.values():
            raise DatasetError(
                f"{root} has {' and '.join(parts)} but no {part} folder; add it, or move the class folders into {root} "
                "itself to have them divided"
            )
    listing = _Listing(root)
    listed = {part: listing.class_folders(_subfolders(root / name), f"{name}/") for name, part in parts.items()}
    listing.note()
    train_folder = root / next(name for name, part in parts.items() if part == "train")
    _check_classes(train_folder, listed["train"])
    labels = {folder: label for label, folder in enumerate(listed["train"])}
    for name, part in parts.items():
        unknown = listed[part].keys() - labels.keys()
        if unknown:
            raise DatasetError(
                f"{root / name / min(unknown)}: {train_folder} has no class of this name; the parts must have the "
                "same class folders"
            )
    items = {
        part: tuple(Item(path, labels[folder]) for folder, paths in folders.items() for path in paths)
        for part, folders in listed.items()
    }
    if not items["test"]:
        raise DatasetError(f"{root}: the test folder holds no images in class folders")
    return Split(_class_names(root, list(labels)), items["train"], items.get("val", ()), items["test"])


def _check_classes(root: Path, images: dict[str, list[str]]) -> None:
    """Refuse what cannot be told apart or learned: `images` are the images of each class folder in `root`."""
    if len(images) < 2:
        found = f"one folder ({next(iter(images))})" if images else "no class folders"
        raise DatasetError(f"{root} holds {found}; it needs one folder of images for each of two or more classes")
    empty = [str(root / folder) for folder, paths in images.items() if not paths]
    if empty:
        raise DatasetError(f"class folder {empty[0]} holds no images{likewise(empty)}; fill or remove it")


def _note_untested(split: Split, source: Path) -> Split:
    """The same split; said on stderr if it has classes that nothing is tested on."""
    untested = sorted(set(range(len(split.class_names))) - {item.label for item in split.test})
    if untested:
        note(
            f"{source} has no test images of {len(untested)} classes, {split.class_names[untested[0]]} for one; the "
            "accuracy is over the others' images"
        )
    return split


# --- class names


def _class_names(root: Path, folders: list[str]) -> tuple[str, ...]:
    """The names of the class folders, in their order: from classnames.txt if there is one, or their own."""
    file = root / "classnames.txt"
    if not file.is_file():
        return check_names(folders, f"the class folders in {root}")
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    named = [pair for pair in (_folder_and_name(line, folders) for line in lines) if pair]
    if dict(named).keys() == set(folders) and len(lines) == len(folders):
        names = dict(named)
        return check_names([names[folder] for folder in folders], str(file))
    remedy = "write one line for each, `folder name`"
    starts = tuple(f"{folder}{sign}" for folder in folders for sign in ",;:=")
    odd = [line for line in lines if line.startswith(starts)]
    if odd:
        raise DatasetError(f"{file}: the line {odd[0]!r} begins with a folder, but no blank follows; {remedy}")
    if named:  # some lines of this kind: as names alone the others would go to wrong folders
        wrong = next((f"{line!r} names none" for line in lines if not _folder_and_name(line, folders)), "named twice")
        raise DatasetError(f"{file} names {len(dict(named))} of the {len(folders)} class folders ({wrong}); {remedy}")
    if len(lines) != len(folders):
        remedy += ", or the names alone in the order of the sorted folders"
        raise DatasetError(f"{file} has {len(lines)} lines for {len(folders)} class folders; {remedy}")
    if folders != sorted(folders, key=_as_people_sort):
        raise DatasetError(f"{file} has names alone, but folders like these can be sorted in several ways; {remedy}")
    return check_names(lines, str(file))


def _folder_and_name(line: str, folders: list[str]) -> tuple[str, str] | None:
    """A line `folder name` taken apart; folders may hold blanks, so the longest that fits counts."""
    fitting = [folder for folder in folders if line.startswith((f"{folder} ", f"{folder}\t"))]
    if not fitting:
        return None
    folder = max(fitting, key=len)
    return folder, line[len(folder) :].strip()


def _as_people_sort(name: str) -> list[tuple[int, str]]:
    """Sort key that ignores letter case and puts 2 before 10, as file managers do."""
    pieces = re.split(r"([0-9]+)", name.casefold())
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces]


# --- listings


@lru_cache(maxsize=1)
def image_endings() -> tuple[str, ...]:
    """The file name endings of all formats that the installed Pillow reads; not PostScript, which is a program."""
    endings = Image.registered_extensions()  # first: it loads the formats
    formats = Image.OPEN.keys() - {"EPS"}
    return tuple(ending for ending, format_ in endings.items() if format_ in formats)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _subfolders(root: Path) -> list[str]:
    """Sorted names of the folders in `root`; hidden ones are left out, symbolic links are followed."""
    return sorted(entry.name for entry in _scan(root) if not _is_hidden(entry.name) and _is_folder(entry))


def _scan(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DatasetError(f"folder {folder} cannot be listed ({error.strerror}); change its permissions") from error


class _Listing:
    """The images below `root`, judged by their names: each file may be there once. What is left out is counted."""

    def __init__(self, root: Path):
        self.root = root
        self.paths: dict[str, str] = {}  # of each file, links followed -> as it was found
        self.others: list[str] = []

    def class_folders(self, folders: list[str], part: str = "") -> dict[str, list[str]]:
        """The images in each class folder of the root or, with a slash at its end, of a part's folder."""
        names = [entry.name for entry in _scan(self.root / part)]
        self.others += [f"{part}{n}" for n in names if n.lower().endswith(image_endings()) and n not in folders]
        return {folder: self._images(f"{part}{folder}") for folder in folders}

    def _images(self, folder: str) -> list[str]:
        """Sorted paths, relative to `root`, of the images in `folder` and its subfolders, links followed."""
        images = []
        pending = [(folder, os.path.realpath(self.root / folder), frozenset([os.path.realpath(self.root)]))]
        while pending:
            inner, real, above = pending.pop()
            if real in above:
                raise DatasetError(f"{self.root / inner} links to a folder that it lies in; remove the link")
            for entry in _scan(self.root / inner):
                path = f"{inner}/{entry.name}"
                if _is_hidden(entry.name):
                    continue
                target = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                if _is_folder(entry):
                    pending.append((path, target, above | {real}))
                elif entry.name.lower().endswith(image_endings()):
                    images.append(path)
                    self._check_new(path, target)
                else:
                    self.others.append(path)
        return sorted(images)

    def _check_new(self, path: str, target: str) -> None:
        before = self.paths.setdefault(target, path)
        if before != path:  # else it might be trained on and tested on
            first, second = sorted((before, path))
            raise DatasetError(f"{self.root / first} and {self.root / second} are the same file; remove the link")

    def note(self) -> None:
        """Say on stderr what was left out."""
        if self.others:
            note(
                f"{len(self.others)} files in {self.root} are left out, no images by their names or not in a class "
                f"folder; {min(self.others)} for one"
            )
