"""Your own images: a folder of class folders, with or without the parts train, val and test, or a manifest.

    pets/cat/1.jpg, pets/dog/7.png, ...                  divided here, always in the same way
    pets/train/cat/1.jpg, ..., pets/test/dog/7.png, ...  val may be missing
    pets/manifest.csv or pets/manifest.json              see `read_manifest`; its paths start at pets/

Class names are the folders' names, unless `classnames.txt` beside the folders has others.
"""

import hashlib
import json
import os
import re
from pathlib import Path

from PIL import Image

from common import note

from .decoding import HEIC_ENDINGS, image_endings, read_upright_image
from .manifest import PARTS, also, check_names, divide, read_manifest
from .splits import Split, read_text, scan
from .task import DatasetError, Item, Task

_MANIFESTS = ("manifest.csv", "manifest.json")
# Folders that macOS and Synology add: they contain thumbnails with the names of your images.
_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir")


class FolderTask(Task):
    """A Task of your own images, read by `read_upright_image`."""

    parts_to_record = ("train", "val", "test")
    if_missing = "put it there, or correct the manifest or --split that lists it"

    def read(self, item: Item) -> Image.Image:
        """Return the RGB image of `item`; raise DatasetError if its file is missing or damaged."""
        return read_upright_image(self.image_root / item.path, self.reading)

    @property
    def data_sha256(self) -> str:
        """Return the SHA-256 of class names and files: your images may change under the same name."""
        names = json.dumps(self.class_names)
        return hashlib.sha256(f"{names}\n{self.fingerprint((*self.train, *self.val, *self.test))}".encode()).hexdigest()


def read_folder(root: Path) -> tuple[Split, Path]:
    """Read your own images `root`, a folder or a manifest file; return their parts and the image root.

    Labels count up from 0 in the order of the sorted folder names. Every class has at least one training image; val may
    be empty. Raises DatasetError, with the file or folder and the remedy, for anything else.
    """
    if root.is_file():
        return read_manifest(root), root.parent
    if not root.is_dir():
        raise DatasetError(
            f"--root_path {root} does not exist; for --dataset folder it names the folder of your images"
        )
    manifests = [root / name for name in _MANIFESTS if (root / name).is_file()]
    if len(manifests) == 2:
        raise DatasetError(f"{root} has a {_MANIFESTS[0]} and a {_MANIFESTS[1]}; remove one of them")
    if manifests:
        return read_manifest(manifests[0]), root
    folders = _subfolders(root)
    parts = {name: PARTS[name.lower()] for name in folders if name.lower() in PARTS}
    others = [name for name in folders if name not in parts]
    # A single folder with the name of a part, but with images in it and classes beside it, is a class: trains, perhaps.
    if others and (len(parts) > 1 or any(_subfolders(root / name) for name in parts)):
        raise DatasetError(
            f"{root} has folders that look like parts ({', '.join(parts)}) and other folders beside them "
            f"({others[0]}); move these elsewhere, or write a manifest.csv"
        )
    if parts and not others:
        return _read_parts(root, parts), root
    listing = _Listing(root)
    images = listing.class_folders(folders)
    listing.note()
    _check_classes(root, images)
    return Split(_class_names(root, folders), *divide(images, str(root))), root


def _read_parts(root: Path, parts: dict[str, str]) -> Split:
    names: dict[str, str] = {}
    for name, part in parts.items():
        if names.setdefault(part, name) != name:
            raise DatasetError(f"{root} has the folders {names[part]} and {name}, which mean the same part; keep one")
    for part in ("train", "test"):
        if part not in names:
            raise DatasetError(
                f"{root} has {' and '.join(parts)} but no {part} folder; add it, or move the class folders into {root} "
                "itself, where they are divided automatically"
            )
    listing = _Listing(root)
    listed = {part: listing.class_folders(_subfolders(root / name), f"{name}/") for part, name in names.items()}
    listing.note()
    train_folder = root / names["train"]
    _check_classes(train_folder, listed["train"])
    labels = {folder: label for label, folder in enumerate(listed["train"])}
    for part, name in names.items():
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
        raise DatasetError(f"{root}: the test folder has no images in class folders; add some")
    return Split(_class_names(root, list(labels)), items["train"], items.get("val", ()), items["test"])


def _check_classes(root: Path, images: dict[str, list[str]]) -> None:
    """Raise DatasetError for fewer than two classes, or a class without images; `images` has those of each folder."""
    if len(images) < 2:
        found = f"one folder ({next(iter(images))})" if images else "no class folders"
        raise DatasetError(f"{root} has {found}; it needs two or more classes, each in a folder")
    empty = [str(root / folder) for folder, paths in images.items() if not paths]
    if empty:
        raise DatasetError(f"class folder {empty[0]} has no images{also(empty)}; add images or remove the folder")


# --- class names


def _class_names(root: Path, folders: list[str]) -> tuple[str, ...]:
    """Return the class names in the order of `folders`: from classnames.txt if it exists, else the folders' names."""
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
        raise DatasetError(f"{file}: the line {odd[0]!r} begins with a folder, but no space follows; {remedy}")
    if named:  # only some lines begin with a folder; it is unclear which folders the other lines mean
        wrong = next((f"{line!r} names none" for line in lines if not _folder_and_name(line, folders)), "named twice")
        raise DatasetError(f"{file} names {len(dict(named))} of the {len(folders)} class folders ({wrong}); {remedy}")
    if len(lines) != len(folders):
        remedy += ", or only the names in the order of the sorted folders"
        raise DatasetError(f"{file} has {len(lines)} lines for {len(folders)} class folders; {remedy}")
    if folders != sorted(folders, key=_natural_order):
        raise DatasetError(f"{file} has only names, but these folders can be sorted in several ways; {remedy}")
    return check_names(lines, str(file))


def _folder_and_name(line: str, folders: list[str]) -> tuple[str, str] | None:
    """Split a line `folder name`; folder names may contain spaces, so the longest that fits is used."""
    fitting = [folder for folder in folders if line.startswith((f"{folder} ", f"{folder}\t"))]
    if not fitting:
        return None
    folder = max(fitting, key=len)
    return folder, line[len(folder) :].strip()


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that ignores upper and lower case and puts 2 before 10, as file managers do."""
    pieces = re.split(r"([0-9]+)", name.casefold())
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces]


# --- listings


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _subfolders(root: Path) -> list[str]:
    """Return the sorted names of the folders in `root`, without hidden ones; symbolic links are followed."""
    return sorted(entry.name for entry in scan(root) if not _is_hidden(entry.name) and _is_folder(entry))


class _Listing:
    """The images below `root`, recognised by their names. Each file may be there once. What is left out is counted."""

    def __init__(self, root: Path):
        self.root = root
        self.paths: dict[str, str] = {}  # real path of each file -> the path by which it was found
        self.others: list[str] = []

    def class_folders(self, folders: list[str], part: str = "") -> dict[str, list[str]]:
        """Return the images of each class folder in the root or in `part`, a part's folder with a slash at its end."""
        names = [entry.name for entry in scan(self.root / part)]
        self.others += [f"{part}{n}" for n in names if n.lower().endswith(image_endings()) and n not in folders]
        return {folder: self._images(f"{part}{folder}") for folder in folders}

    def _images(self, folder: str) -> list[str]:
        """Return sorted paths, relative to `root`, of the images in `folder` and its subfolders; links are followed."""
        images = []
        pending = [(folder, os.path.realpath(self.root / folder), frozenset([os.path.realpath(self.root)]))]
        while pending:
            inner, real, above = pending.pop()
            if real in above:
                raise DatasetError(f"{self.root / inner} links to a folder that contains it; remove the link")
            for entry in scan(self.root / inner):
                path = f"{inner}/{entry.name}"
                if _is_hidden(entry.name):
                    continue
                target = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                if _is_folder(entry):
                    pending.append((path, target, above | {real}))
                elif entry.name.lower().endswith(image_endings()):
                    images.append(path)
                    before = self.paths.setdefault(target, path)
                    if before != path:  # the file could be used for training and for testing
                        first, second = sorted(self.root / p for p in (before, path))
                        raise DatasetError(f"{first} and {second} are the same file; remove the link")
                else:
                    self.others.append(path)
        return sorted(images)

    def note(self) -> None:
        """Print how many files were left out."""
        if self.others:
            note(
                f"{len(self.others)} file(s) in {self.root} ignored: the name does not end like an image, or the file "
                f"is in no class folder; for example {min(self.others)}"
            )
        heic = [path for path in self.others if path.lower().endswith(HEIC_ENDINGS)]
        if heic and HEIC_ENDINGS[0] not in image_endings():
            note(
                f"{len(heic)} of them are HEIC photographs, for example {min(heic)}: pip install pillow-heif reads them"
            )
