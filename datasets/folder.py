"""One's own data: a folder of class folders, with or without train, val and test parts, or a manifest.

    pets/cat/1.jpg, pets/dog/7.png, ...                 split here, always in the same way
    pets/train/cat/1.jpg, ..., pets/test/dog/7.png, ...  val may be missing
    pets/manifest.csv or pets/manifest.json             what `read_manifest` takes; its paths start at pets/

Class names are the folders' names, or come from `classnames.txt` beside them.
"""

from __future__ import annotations

import csv
import json
import os
import random
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

from PIL import Image

from datasets.splits import Split, check_path, parse_json, parse_json_split, read_text
from datasets.task import DatasetError, Item, Task, read_upright_image

TEMPLATES = ("a photo of a {}.",)

_PARTS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
_COLUMNS = ("path", "label", "class_name", "part")
_MANIFESTS = ("manifest.csv", "manifest.json")


class FolderTask(Task):
    """A Task with one's own images: turned upright as their EXIF data say, transparent ones laid on white."""

    parts_to_record = ("train", "val", "test")

    def read(self, item: Item) -> Image.Image:
        """Return the RGB picture of `item`; raise DatasetError if its file is missing or damaged."""
        return read_upright_image(self.image_root / item.path)


def read_folder(root: Path) -> tuple[Split, Path]:
    """Read one's own data set `root`, a folder or a manifest file; return its parts and its image root.

    Labels count up from 0 in the order of the sorted folder names. Every class has at least one training image;
    val may be empty. Raises DatasetError, with the file or folder and the remedy, for anything else.
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
    parts = {name: _PARTS[name.lower()] for name in folders if name.lower() in _PARTS}
    if "train" in parts.values() and len(parts) > 1:
        return _read_parts(root, parts, set(folders) - parts.keys()), root
    return _read_class_folders(root, folders), root


# --- folders


def _read_class_folders(root: Path, folders: list[str]) -> Split:
    images = {folder: _images_below(root, folder) for folder in folders}
    _check_classes(root, images)
    names = _class_names(root, folders)
    parts: tuple[list[Item], list[Item], list[Item]] = ([], [], [])
    _note_division(root)
    for label, (folder, paths) in enumerate(images.items()):
        if len(paths) < 2:
            raise DatasetError(
                f"{root / folder} holds one image; each class needs at least two, one to train and one to test"
            )
        for part, chosen in zip(parts, split_paths(paths, folder)):
            part += [Item(path, label) for path in chosen]
    return Split(names, *map(tuple, parts))


def split_paths(paths: list[str], name: str) -> tuple[list[str], list[str], list[str]]:
    """Divide the images of class `name` into 50 % train, 20 % val and 30 % test, at least one of train and test.

    The proportions are those of CoOp's splits. The division depends on the paths and the class's name alone: not on
    the run's seed, and not on other classes, which may be added later.
    """
    seed = name.encode("utf-8", "surrogateescape")
    shuffled = random.Random(seed).sample(sorted(paths), len(paths))
    test, val = max(1, round(0.3 * len(paths))), round(0.2 * len(paths))
    return shuffled[test + val :], shuffled[test : test + val], shuffled[:test]


def _note_division(source: Path) -> None:
    print(
        f"note: {source} names no train, val and test parts; its images are divided 50/20/30 % per class, always "
        "in the same way, and the run's split.json lists them",
        file=sys.stderr,
    )


def _read_parts(root: Path, parts: dict[str, str], others: set[str]) -> Split:
    if others:
        raise DatasetError(
            f"{root} holds the parts {', '.join(parts)} and other folders beside them ({min(others)}); move these "
            "elsewhere, or say in a manifest.csv what belongs where"
        )
    twice = [part for part, count in Counter(parts.values()).items() if count > 1]
    if twice:
        same = [name for name, part in parts.items() if part == twice[0]]
        raise DatasetError(f"{root} holds the folders {' and '.join(same)}, which mean the same part; keep one")
    listed = {
        part: {folder: _images_below(root, f"{name}/{folder}") for folder in _subfolders(root / name)}
        for name, part in parts.items()
    }
    if "test" not in listed:
        raise DatasetError(f"{root} has train and val but no test folder; rename val to test if it is to be tested on")
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
        raise DatasetError(f"{root}: the test folder holds no images")
    return Split(_class_names(root, list(labels)), items["train"], items.get("val", ()), items["test"])


def _check_classes(root: Path, images: dict[str, list[str]]) -> None:
    """Refuse what cannot be told apart or learned: `images` are the images of each class folder in `root`."""
    if len(images) < 2:
        found = f"one folder ({next(iter(images))})" if images else "no class folders"
        raise DatasetError(f"{root} holds {found}; it needs one folder of images for each of two or more classes")
    for folder, paths in images.items():
        if not paths:
            raise DatasetError(f"class folder {root / folder} holds no images; fill or remove it")


def _class_names(root: Path, folders: list[str]) -> tuple[str, ...]:
    """The names of the class folders, in their order: from classnames.txt if there is one, or their own."""
    file = root / "classnames.txt"
    if not file.is_file():
        return check_names(folders, f"the class folders in {root}")
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    named = dict(pair for pair in (_folder_and_name(line, folders) for line in lines) if pair)
    if named.keys() == set(folders) and len(lines) == len(folders):
        return check_names([named[folder] for folder in folders], str(file))
    if len(lines) != len(folders):
        raise DatasetError(
            f"{file} has {len(lines)} lines for {len(folders)} class folders; write one line for each, `folder name`, "
            "or the names alone in the order of the sorted folders"
        )
    return check_names(lines, str(file))


def _folder_and_name(line: str, folders: list[str]) -> tuple[str, str] | None:
    """A line `folder name` taken apart; folders may hold blanks, so the longest that fits counts."""
    fitting = [folder for folder in folders if line.startswith((f"{folder} ", f"{folder}\t"))]
    if not fitting:
        return None
    folder = max(fitting, key=len)
    return folder, line[len(folder) :].strip()


def check_names(names: list[str], where: str) -> tuple[str, ...]:
    """The class names, if a text encoder can tell them apart; DatasetError says `where` they come from."""
    seen: dict[str, str] = {}
    for name in names:
        prompt = " ".join(name.replace("_", " ").lower().split())
        if not prompt or not name.isprintable():
            raise DatasetError(f"{where}: {name!r} cannot be read as a class name; give it another in classnames.txt")
        if prompt in seen:
            raise DatasetError(
                f"{where}: the classes {seen[prompt]!r} and {name!r} read the same in a prompt; merge or rename them"
            )
        seen[prompt] = name
    return tuple(names)


# --- listings


@lru_cache(maxsize=1)
def _endings() -> tuple[str, ...]:
    """The file name endings of all formats that the installed Pillow reads."""
    return tuple(ending for ending, format_ in Image.registered_extensions().items() if format_ in Image.OPEN)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _subfolders(root: Path) -> list[str]:
    """Sorted names of the folders in `root`; hidden ones are left out, symbolic links are followed."""
    return sorted(entry.name for entry in _scan(root) if not _is_hidden(entry.name) and entry.is_dir())


def _images_below(root: Path, folder: str) -> list[str]:
    """Sorted paths, relative to `root`, of the images in `folder` and its subfolders, judged by their names.

    Files with other endings are counted on stderr. Symbolic links are followed, each folder once on a way down.
    """
    images, others = [], []
    pending = [(folder, frozenset([os.path.realpath(root / folder)]))]
    while pending:
        inner, above = pending.pop()
        for entry in _scan(root / inner):
            path = f"{inner}/{entry.name}"
            if _is_hidden(entry.name):
                continue
            if entry.name.lower().endswith(_endings()):
                images.append(path)
            elif entry.is_dir():
                real = os.path.realpath(entry.path)
                if real in above:
                    raise DatasetError(f"{root / path} links to a folder that it lies in; remove the link")
                pending.append((path, above | {real}))
            else:
                others.append(path)
    if others:
        print(
            f"note: {len(others)} files in {root / folder} are no images by their names and are left out, "
            f"{min(others)} for one",
            file=sys.stderr,
        )
    return sorted(images)


def _scan(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DatasetError(f"folder {folder} cannot be listed ({error.strerror}); change its permissions") from error


# --- manifests


def read_manifest(path: Path) -> Split:
    """Read a manifest: a table with one image a row, as CSV with a header line or as a JSON list of objects.

    Columns: `path` (relative to the manifest's folder, with forward slashes); `class_name`, or `label` (whole numbers
    from 0), or both; `part` (train, val or test). Labels without class names take them from `classnames.txt` beside
    the manifest, class names without labels are numbered in sorted order. Without a column `part` the images are split
    as folders are. A JSON object in the format of CoOp's split files is taken as well. Raises DatasetError with file
    and row.
    """
    if path.suffix.lower() == ".json":
        content = parse_json(path)
        if isinstance(content, dict):
            return parse_json_split(content, path)
        rows = content
    elif path.suffix.lower() == ".csv":
        rows = _read_csv(path)
    else:
        raise DatasetError(f"{path} is neither a folder nor a manifest; a manifest's name ends in .csv or .json")
    if not isinstance(rows, list) or not rows:
        raise DatasetError(f"manifest {path} lists no images")
    rows = [_check_row(row, f"manifest {path}, row {number}") for number, row in enumerate(rows, start=1)]
    for column in ("label", "class_name", "part"):
        lacking = [number for number, row in enumerate(rows, start=1) if row[column] is None]
        if lacking and len(lacking) < len(rows):
            raise DatasetError(f"manifest {path}, row {lacking[0]}: no {column}, but other rows have one")
    return _split_rows(rows, path)


def _read_csv(path: Path) -> list[dict]:
    text = read_text(path).removeprefix("\ufeff")
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    try:
        rows = list(csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise DatasetError(f"manifest {path} is no valid CSV ({error})") from error
    names = [name.strip().lower().replace(" ", "_") for name in rows[0]] if rows else []
    names = ["class_name" if name in ("classname", "class") else name for name in names]
    unknown = [name for name in names if name not in _COLUMNS]
    if unknown or "path" not in names or len(set(names)) < len(names):
        raise DatasetError(
            f"manifest {path}: the first line must name the columns, out of {', '.join(_COLUMNS)}, and path must be "
            f"there; it is {header.strip()[:80]!r}"
        )
    filled = [(number, row) for number, row in enumerate(rows[1:], start=1) if row]
    for number, row in filled:
        if len(row) != len(names):
            raise DatasetError(f"manifest {path}, row {number} has {len(row)} fields instead of {len(names)}")
    return [dict(zip(names, row)) for _, row in filled]


def _check_row(row: object, where: str) -> dict:
    """One row with all of the columns, None where it has nothing, a label as a number."""
    if not isinstance(row, dict) or not row.keys() <= set(_COLUMNS):
        raise DatasetError(f"{where}: expected the fields {', '.join(_COLUMNS)}, found {json.dumps(row)[:80]}")
    row = {name: None if row.get(name) == "" else row.get(name) for name in _COLUMNS}
    if not isinstance(row["path"], str):
        raise DatasetError(f"{where}: no path")
    if "\\" in row["path"]:
        raise DatasetError(f"{where}: {row['path']!r} has backslashes; write forward slashes")
    check_path(row["path"], where)
    if row["label"] is not None:
        try:
            label = int(str(row["label"]))  # through text, so that true and 1.5 are no labels
        except ValueError:
            label = -1
        if label < 0:
            raise DatasetError(
                f"{where}: label {row['label']!r} is no whole number from 0; a name belongs into the column class_name"
            )
        row["label"] = label
    elif not isinstance(row["class_name"], str):
        raise DatasetError(f"{where}: neither label nor class_name")
    if row["part"] is not None:
        part = _PARTS.get(str(row["part"]).strip().lower())
        if part is None:
            raise DatasetError(f"{where}: part {row['part']!r} is none of train, val, test")
        row["part"] = part
    return row


def _split_rows(rows: list[dict], path: Path) -> Split:
    names = _names_of_labels(rows, path)
    seen: set[str] = set()
    for number, row in enumerate(rows, start=1):
        if row["path"] in seen:  # in two parts it would be trained on and tested on
            raise DatasetError(f"manifest {path}, row {number}: {row['path']!r} is listed before; list it once")
        seen.add(row["path"])
    if rows[0]["part"] is None:
        parts: dict[str, list[Item]] = {"train": [], "val": [], "test": []}
        paths_of: list[list[str]] = [[] for _ in names]
        _note_division(path)
        for row in rows:
            paths_of[row["label"]].append(row["path"])
        for label, (name, paths) in enumerate(zip(names, paths_of)):
            if len(paths) < 2:
                raise DatasetError(
                    f"manifest {path}: class {name!r} has one image; each needs two, to train and to test"
                )
            for part, chosen in zip(parts.values(), split_paths(paths, name)):
                part += [Item(image, label) for image in chosen]
        return Split(names, *map(tuple, parts.values()))
    items = {
        part: tuple(Item(row["path"], row["label"]) for row in rows if row["part"] == part)
        for part in ("train", "val", "test")
    }
    untrained = set(range(len(names))) - {item.label for item in items["train"]}
    if untrained:
        raise DatasetError(f"manifest {path}: class {names[min(untrained)]!r} has no image in train")
    if not items["test"]:
        raise DatasetError(f"manifest {path} has no image in test; some rows need the part test")
    return Split(names, items["train"], items["val"], items["test"])


def _names_of_labels(rows: list[dict], path: Path) -> tuple[str, ...]:
    """The class names in label order; rows without labels get them."""
    if rows[0]["label"] is None:
        names = sorted({row["class_name"] for row in rows})
        labels = {name: label for label, name in enumerate(names)}
        for row in rows:
            row["label"] = labels[row["class_name"]]
    else:
        used: dict[int, str | None] = {}
        for number, row in enumerate(rows, start=1):
            if used.setdefault(row["label"], row["class_name"]) != row["class_name"]:
                raise DatasetError(
                    f"manifest {path}, row {number}: label {row['label']} is called {row['class_name']!r} here and "
                    f"{used[row['label']]!r} before"
                )
        missing = set(range(len(used))) - used.keys()
        if missing:
            raise DatasetError(f"manifest {path}: labels must count up from 0 without gaps, {min(missing)} is missing")
        names = [used[label] for label in range(len(used))]
        if rows[0]["class_name"] is None:
            names = _names_beside(path, len(used))
    if len(names) < 2:
        raise DatasetError(f"manifest {path} has one class ({names[0]!r}); it needs two or more")
    return check_names(names, f"manifest {path}")


def _names_beside(path: Path, classes: int) -> list[str]:
    file = path.with_name("classnames.txt")
    if not file.is_file():
        raise DatasetError(f"manifest {path} has labels but no class names; add the column class_name, or {file}")
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if len(lines) != classes:
        raise DatasetError(f"{file} has {len(lines)} lines for the {classes} labels of {path}; write one for each")
    return lines
