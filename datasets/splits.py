"""Readers of the three kinds of split: CoOp's JSON files, FGVC Aircraft's text files, ImageNet's folders."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PureWindowsPath

from .specs import SPECS, Found
from .task import DatasetError, Item, enumerated

# The extensions that torchvision's ImageFolder accepts; the published draws were made from its listing.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# ImageNet's classes, sorted: one line `WordNet id, space, class name` for each.
CLASSES_FILE = Path(__file__).with_name("imagenet_classes.txt")


@dataclass(frozen=True)
class Split:
    """The whole parts of a dataset, before any draw; `class_names` in label order."""

    class_names: tuple[str, ...]
    train: tuple[Item, ...]
    val: tuple[Item, ...]
    test: tuple[Item, ...]

    @property
    def sizes(self) -> tuple[int, int, int]:
        return len(self.train), len(self.val), len(self.test)

    def labels(self) -> dict[str, int]:
        """Return the labels, by path, of the images that may be drawn."""
        return {item.path: item.label for item in (*self.train, *self.val)}


@dataclass(frozen=True)
class ImageNetListing:
    """ImageNet's folders: `train[label]` are the file names of a class, `test` all images of its val folder; no val."""

    wnids: tuple[str, ...]
    class_names: tuple[str, ...]
    train: tuple[tuple[str, ...], ...]
    test: tuple[Item, ...]
    val: tuple[Item, ...] = ()

    def labels(self) -> dict[str, int]:
        return {item.path: item.label for item in folder_items("train/", self.wnids, self.train)}


def read_split(name: str, found: Found) -> Split:
    """Return the parts of a published dataset except imagenet, which has no val part (see `list_imagenet`)."""
    if found.split is not None:
        return read_json_split(found.split)
    if not SPECS[name].is_test_only:
        return read_fgvc_split(found.folder)
    split, classes = list_imagenet_variant(found.images), SPECS[name].classes
    if len(split.class_names) != classes:  # with fewer classes the accuracy would be too high
        raise DatasetError(
            f"{found.images} has {len(split.class_names)} class folders instead of {classes}; unpack it again"
        )
    return split


def read_json_split(path: Path) -> Split:
    """Read a split in CoOp's format: {"train": [[path, label, class name], ...], "val": ..., "test": ...}.

    Raises DatasetError if the file is not JSON or has another format: paths must stay inside the image folder, labels
    must count up from 0, and each must have one name and at least one training image.
    """
    content = parse_json(path, "download it again")
    if not isinstance(content, dict):
        raise DatasetError(f"split file {path} is not a JSON object with the parts train, val and test")
    names: dict[int, str] = {}
    train, val, test = (_read_part(path, content, part, names) for part in ("train", "val", "test"))
    labels = {item.label for item in train}
    if labels != set(range(len(names))):
        wrong = min(labels ^ set(range(len(names))))
        raise DatasetError(
            f"split file {path}: train must have the labels 0 to {len(names) - 1} without gaps, but label {wrong} is "
            f"{'missing' if wrong < len(names) else 'there'}; get the published file"
        )
    _check_apart(f"split file {path}", train, val, test)
    return Split(tuple(names[label] for label in range(len(names))), train, val, test)


def _check_apart(where: str, *parts: tuple[Item, ...]) -> None:
    """Raise DatasetError if two parts share images, which would be used for training and for testing."""
    paths = [{item.path for item in part} for part in parts]
    shared = (paths[0] & paths[1]) | (paths[0] & paths[2]) | (paths[1] & paths[2])
    if shared:
        raise DatasetError(
            f"{where} lists {min(shared)!r} in two parts ({len(shared)} such images); get the published file"
        )


def _read_part(path: Path, content: dict, part: str, names: dict[int, str]) -> tuple[Item, ...]:
    """Check one part of a JSON split and return its items; add its class names to `names`."""
    rows = content.get(part)
    if not isinstance(rows, list) or not rows:
        raise DatasetError(f"split file {path} has no list of images under {part!r}; get the published file")
    items = []
    for number, row in enumerate(rows):
        where = f"split file {path}, {part} row {number}"
        # `type() is int` and not isinstance: JSON's true would pass as the integer 1.
        if not (isinstance(row, list) and [type(field) for field in row] == [str, int, str]):
            raise DatasetError(f"{where}: expected [path, label, class name], found {json.dumps(row)[:80]}")
        image, label, name = row
        check_path(image, where)
        if names.setdefault(label, name) != name:
            raise DatasetError(f"{where}: label {label} is called {name!r} here and {names[label]!r} before")
        items.append(Item(image, label))
    return tuple(items)


def parse_json(path: Path, remedy: str) -> object:
    """Return the content of a JSON file; raise DatasetError with this remedy if it is not JSON."""
    text = read_text(path)
    if text.lstrip().startswith("<"):
        raise DatasetError(f"file {path} is a web page (perhaps about a quota) and not JSON; {remedy}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        where = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DatasetError(f"file {path} is not JSON ({where}); {remedy}") from error


def check_path(path: str, where: str) -> None:
    """Raise DatasetError if a path leaves the folder it starts from; `where` names the file that lists it."""
    # A Windows path recognises all dangerous forms: both slashes, drives and roots.
    parsed = PureWindowsPath(path)
    is_name = "\0" not in path and not any("\ud800" <= c < "\udc80" for c in path)  # JSON can contain such characters
    if not parsed.parts or parsed.anchor or ".." in parsed.parts or not is_name:
        raise DatasetError(f"{where}: {path!r} is not a relative path inside the image folder")


def read_text(path: Path) -> str:
    """Return the UTF-8 text of a file, without a byte order mark; raise DatasetError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DatasetError(f"file {path} does not exist; see DATASETS.md for what belongs there") from error
    except OSError as error:
        raise DatasetError(f"file {path} cannot be read ({error.strerror}); change its permissions") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"file {path} is not UTF-8 text; save it as UTF-8 or get it again") from error


def read_fgvc_split(folder: Path) -> Split:
    """Read FGVC Aircraft's own split: `variants.txt` and `images_variant_{train,val,test}.txt` in `folder`.

    A label is the number of its line in variants.txt, from 0. The other files have one line per image: its id, a space,
    and the variant's name, which may contain spaces. Raises DatasetError with file and line.
    """
    files = ["variants.txt", *(f"images_variant_{part}.txt" for part in ("train", "val", "test"))]
    lacking = [file for file in files if not (folder / file).is_file()]
    if lacking:
        raise DatasetError(f"{folder} lacks {', '.join(lacking)}; copy them from data/ of the dataset's archive")
    names = tuple(line.strip() for line in read_text(folder / "variants.txt").splitlines() if line.strip())
    labels = {name: label for label, name in enumerate(names)}
    parts = []
    for part in ("train", "val", "test"):
        path = folder / f"images_variant_{part}.txt"
        items = []
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            if not line.strip():
                continue
            image, _, name = line.strip().partition(" ")
            where = f"file {path}, line {number}"
            if name not in labels:
                raise DatasetError(f"{where}: {name!r} is not in variants.txt; unpack both files again")
            check_path(image, where)
            items.append(Item(f"{image}.jpg", labels[name]))
        if not items:
            raise DatasetError(f"file {path} lists no images; unpack the dataset again")
        parts.append(tuple(items))
    missing = set(labels.values()) - {item.label for item in parts[0]}
    if missing:
        path, name = folder / "images_variant_train.txt", names[min(missing)]
        raise DatasetError(f"file {path} has no image of {name!r}; unpack it again")
    _check_apart(f"{folder}/images_variant_*.txt", *parts)
    return Split(names, *parts)


def imagenet_classes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return ImageNet's 1000 WordNet ids, sorted, and their class names; two pairs of classes share a name."""
    lines = CLASSES_FILE.read_text(encoding="utf-8").splitlines()
    wnids, names = zip(*(line.split(" ", 1) for line in lines))
    return wnids, names


def list_imagenet(image_root: Path, with_train: bool = True) -> ImageNetListing:
    """List `image_root`/val, and `image_root`/train unless `with_train` is False; each has one folder per WordNet id.

    Raises DatasetError if the folders are not exactly the 1000 classes or if val is not sorted into folders.
    """
    wnids, names = imagenet_classes()
    train = list_imagenet_part(image_root / "train") if with_train else ()
    val = list_imagenet_part(image_root / "val")
    return ImageNetListing(wnids, names, train, folder_items("val/", wnids, val))


def folder_items(inside: str, folders: Sequence[str], images: Sequence[Sequence[str]]) -> tuple[Item, ...]:
    """Return the images of class folders as items; labels count the folders, paths begin with `inside`."""
    return tuple(
        Item(f"{inside}{folder}/{name}", label)
        for label, (folder, names) in enumerate(zip(folders, images))
        for name in names
    )


def list_imagenet_part(folder: Path) -> tuple[tuple[str, ...], ...]:
    """Return the image names of each class in `folder`, ImageNet's train or val; errors as in `list_imagenet`."""
    wnids, _ = imagenet_classes()
    _check_class_folders(folder, wnids)
    listed = tuple(_list_images(folder / wnid) for wnid in wnids)
    if not any(listed):
        raise DatasetError(f"the class folders in {folder} are empty; unpack the archive again")
    return listed


def list_imagenet_variant(image_root: Path) -> Split:
    """List a variant of ImageNet, one folder per class in `image_root`, as a split that has only a test part.

    The folders are WordNet ids or, in ImageNetV2's archive, the labels 0 to 999. If there are fewer than 1000
    (ImageNet-A and -R), labels count up over the classes that exist, in WordNet order. Raises DatasetError if a folder
    has another name.
    """
    wnids, names = imagenet_classes()
    folders = {entry.name for entry in scan(image_root) if not entry.name.startswith(".") and entry.is_dir()}
    labels = {wnid: label for label, wnid in enumerate(wnids)} | {str(label): label for label in range(len(wnids))}
    unknown = folders - labels.keys()
    if unknown:
        raise DatasetError(f"{image_root}: the folder {min(unknown)} is not a class of ImageNet; unpack it again")
    present = sorted(folders, key=labels.__getitem__)  # by number: as text, 10 would come before 2
    for first, second in pairwise(present):
        if labels[first] == labels[second]:
            raise DatasetError(f"{image_root}: the folders {first} and {second} are the same class; remove one")
    test = folder_items("", present, [_list_images(image_root / folder) for folder in present])
    if not test:
        raise DatasetError(f"{image_root} has no class folders with images; unpack the archive again")
    return Split(tuple(names[labels[folder]] for folder in present), (), (), test)


def _check_class_folders(folder: Path, wnids: tuple[str, ...]) -> None:
    folders, images = [], 0
    for entry in scan(folder):
        if entry.name.lower().endswith(IMAGE_EXTENSIONS):
            images += 1
        elif not entry.name.startswith(".") and entry.is_dir():
            folders.append(entry.name)
    if images and not folders:
        raise DatasetError(
            f"{folder} has its images unsorted; move them into one folder per WordNet id (n01440764, ...): the "
            "ILSVRC2012 development kit has the labels in its ground-truth file, and their WordNet ids in meta.mat"
        )
    missing, unknown = set(wnids) - set(folders), set(folders) - set(wnids)
    if missing or unknown:
        wrong = sorted(missing or unknown)
        example = f"{'missing' if missing else 'unknown'}: {enumerated(wrong)}"
        raise DatasetError(
            f"{folder} has {len(folders)} class folders instead of ImageNet's {len(wnids)} ({example}); unpack it again"
        )


def _list_images(folder: Path) -> tuple[str, ...]:
    """Return the sorted names of the images in a folder. Only names are checked: a stat per file takes minutes."""
    return tuple(sorted(e.name for e in scan(folder) if e.name.lower().endswith(IMAGE_EXTENSIONS)))


def scan(folder: Path) -> list[os.DirEntry]:
    """Return what a folder contains; raise DatasetError if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError as error:
        raise DatasetError(f"folder {folder} does not exist; DATASETS.md says what belongs there") from error
    except OSError as error:
        raise DatasetError(f"folder {folder} cannot be listed ({error.strerror}); change its permissions") from error
