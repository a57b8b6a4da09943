"""Your own images: a folder of class folders, with or without the parts train, val and test, or a manifest.

    pets/cat/1.jpg, pets/dog/7.png, ...                  divided here, always in the same way
    pets/train/cat/1.jpg, ..., pets/test/dog/7.png, ...  val may be missing
    pets/manifest.csv or pets/manifest.json              see `read_manifest`; its paths start at pets/

Class names are the folders' names, unless `classnames.txt` beside the folders or --classnames has others.
"""

import difflib
import hashlib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from common import counted, note

from .classnames import also, check_names, note_odd_names, renamed
from .copies import find_copies, note_copies, without_copies
from .decoding import HEIC_ENDINGS, image_endings, read_upright_image
from .division import divide
from .manifest import PARTS, find_manifest, read_manifest, tables_in
from .parts import OwnImages, class_folders, find_parts, is_folder, is_hidden, named_parts, unwrapped
from .splits import Split, scan
from .task import DatasetError, Item, Task, enumerated


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


ONLY_IMAGES = OwnImages()


def read_folder(root: Path, own: OwnImages = ONLY_IMAGES) -> tuple[Split, Path]:
    """Read your own images `root`, a folder or a manifest file; return their parts and the image root.

    Labels count up from 0 in the order of the sorted folder names. Every class has at least one training image; val may
    be empty. Notes say what was recognised, what looks odd, and which images are there twice. Raises DatasetError, with
    the file or folder and the remedy, for anything else.
    """
    split, image_root, names_file = _read(root, own)
    if own.classnames:
        file = Path(own.classnames).expanduser()
        split = replace(split, class_names=renamed(split.class_names, file, f"the classes of {root}"))
    elif names_file is None:
        note_odd_names(split.class_names)
    copies = find_copies(split, image_root)
    if own.drop_copies:
        split = without_copies(split, copies)
    else:
        note_copies(copies, split)
    return split, image_root


def read_to_test(root: Path) -> tuple[tuple[str, ...], tuple[Item, ...], Path]:
    """Return class names, labelled images and image root of images on which a model is only tested.

    `root` is a folder of class folders, or a manifest. Of one with parts the images of test are taken, else all. Raise
    DatasetError as `read_folder` does.
    """
    if not root.exists():
        raise DatasetError(f"{root} does not exist")
    manifest = root if root.is_file() else find_manifest(root)
    if manifest:
        split, image_root = read_manifest(manifest, to_test=True)
        return split.class_names, split.test, image_root
    root = unwrapped(root)
    folders = class_folders(root)
    if len(folders) == 1 and PARTS.get(folders[0].lower()) == "test":
        root = root / folders[0]
        folders = class_folders(root)
    if parts := find_parts(root, folders):
        split, image_root, _ = _read_parts(root, parts, ONLY_IMAGES)
        return split.class_names, split.test, image_root
    listing = _Listing(root)
    images = listing.class_folders(folders)
    listing.note()
    _check_classes(root, images)
    names, _ = _class_names(root, folders, ONLY_IMAGES)
    items = tuple(Item(path, label) for label, paths in enumerate(images.values()) for path in paths)
    return names, items, root


def _read(root: Path, own: OwnImages) -> tuple[Split, Path, Path | None]:
    """Return the parts, the image root, and the file beside the images that gave the class names, if there is one."""
    if not root.exists():
        raise DatasetError(
            f"--root_path {root} does not exist; for --dataset folder it names the folder of your images"
        )
    manifest = root if root.is_file() else find_manifest(root)
    if manifest and own.part_dirs:
        raise DatasetError(f"--{min(own.part_dirs)}_dir is for folders; {manifest} says which images are in which part")
    if manifest:
        return (*read_manifest(manifest, Path(own.image_root).expanduser() if own.image_root else None), manifest)
    if own.image_root:
        raise DatasetError(f"--image_root is for manifests, and {root} has none; leave it out")
    if own.part_dirs:
        return _read_parts(root, named_parts(root, own), own)
    root = unwrapped(root)
    folders = class_folders(root)
    parts = None if _are_named(root, folders, own) else find_parts(root, folders)
    if parts:
        return _read_parts(root, parts, own)
    listing = _Listing(root)
    images = listing.class_folders(folders)
    listing.note()
    _check_classes(root, images)
    names, file = _class_names(root, folders, own)
    return Split(names, *divide(images, str(root))), root, file


def _are_named(root: Path, folders: list[str], own: OwnImages) -> bool:
    """Return whether names are given for exactly these folders: then they are classes, whatever they are called."""
    file = Path(own.classnames).expanduser() if own.classnames else root / "classnames.txt"
    if not file.is_file():
        return False
    try:
        return bool(renamed(folders, file, str(root)))
    except DatasetError:
        return False


def _read_parts(root: Path, folders: dict[str, str], own: OwnImages) -> tuple[Split, Path, Path | None]:
    """Read the parts in `folders`, which are relative to `root`. Their classes are those of train."""
    listing = _Listing(root)
    listed = {}
    for part in ("train", "val", "test"):
        if part in folders:
            found = listing.class_folders(class_folders(root / folders[part]), f"{folders[part]}/")
            listed[part] = {name: paths for name, paths in found.items() if paths or part == "train"}
    listing.note()
    train_folder = root / folders["train"]
    _check_classes(train_folder, listed["train"])
    labels = {_composed(name): label for label, name in enumerate(listed["train"])}
    if len(labels) < len(listed["train"]):
        check_names(list(listed["train"]), f"the class folders in {train_folder}")
    for part, classes in listed.items():
        unknown = [name for name in classes if _composed(name) not in labels]
        if unknown:
            raise DatasetError(_unknown_class(root / folders[part] / unknown[0], train_folder, list(listed["train"])))
    items = {
        part: tuple(Item(path, labels[_composed(name)]) for name, paths in classes.items() for path in paths)
        for part, classes in listed.items()
    }
    if not items["test"]:
        raise DatasetError(f"{root}: the test folder has no images in class folders; add some")
    names, file = _class_names(root, list(listed["train"]), own)
    return Split(names, items["train"], items.get("val", ()), items["test"]), root, file


def _composed(name: str) -> str:
    """Return a name in the Unicode form that is the same for all that look the same: macOS writes others than Linux."""
    return unicodedata.normalize("NFC", name)


def _unknown_class(folder: Path, train_folder: Path, known: list[str]) -> str:
    """Return the message on a class folder that train lacks, with what differs from a similar name."""
    similar = [name for name in known if _loosely(name) == _loosely(folder.name)]
    if similar:
        return (
            f"{folder}: {train_folder} has no class of this name, but {similar[0]!a} instead of "
            f"{folder.name!a}; rename one of them"
        )
    nearest = difflib.get_close_matches(folder.name, known, n=1)
    shown = f" ({folder.name!a}; its nearest is {nearest[0]!a})" if nearest else ""
    return f"{folder}: {train_folder} has no class of this name{shown}; the parts must have the same class folders"


def _loosely(name: str) -> str:
    """Return a name without case, blanks, underscores and signs that are not shown."""
    text = unicodedata.normalize("NFKC", name).casefold()
    return "".join(sign for sign in text if sign.isalnum())


def _class_names(root: Path, folders: list[str], own: OwnImages) -> tuple[tuple[str, ...], Path | None]:
    """Return the class names in the order of `folders`, and the classnames.txt beside them that they are from."""
    file = root / "classnames.txt"
    if own.classnames or not file.is_file():  # --classnames replaces the names later
        return check_names([_composed(name) for name in folders], f"the class folders in {root}"), None
    return renamed(folders, file, f"the class folders in {root}"), file


def _check_classes(root: Path, images: dict[str, list[str]]) -> None:
    """Raise DatasetError for fewer than two classes, or a class without images; `images` has those of each folder."""
    if len(images) < 2:
        found = f"one folder ({next(iter(images))})" if images else "no class folders"
        tables = tables_in(root)
        also_table = f", or name a table of the images as --root_path: {root / tables[0]}" if tables else ""
        raise DatasetError(f"{root} has {found}; it needs two or more classes, each in a folder{also_table}")
    empty = [str(root / folder) for folder, paths in images.items() if not paths]
    if empty:
        raise DatasetError(f"class folder {empty[0]} has no images{also(empty)}; add images or remove the folder")


# --- listings


def summary(split: Split, templates: Sequence[str]) -> str:
    """Return in one line the classes of a split, the numbers of their images, and the first prompts."""
    counts = {part: Counter(item.label for item in getattr(split, part)) for part in ("train", "val", "test")}
    classes = [
        f"{name} {'/'.join(str(count[label]) for count in counts.values())}"
        for label, name in enumerate(split.class_names)
    ]
    prompts = [templates[0].format(name.replace("_", " ")) for name in split.class_names[:2]]
    return (
        f"train/val/test images of {counted(len(classes), 'class')}: {enumerated(classes)}; "
        f"prompts: {', '.join(prompts)} ..."
    )


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
                if is_hidden(entry.name):
                    continue
                target = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                if is_folder(entry):
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
                f"{counted(len(self.others), 'file')} in {self.root} ignored: the name does not end "
                "like an image, or the file "
                f"is in no class folder; for example {min(self.others)}"
            )
        heic = [path for path in self.others if path.lower().endswith(HEIC_ENDINGS)]
        if heic and HEIC_ENDINGS[0] not in image_endings():
            note(
                f"{len(heic)} of them are HEIC photographs, for example {min(heic)}: pip install pillow-heif reads them"
            )
