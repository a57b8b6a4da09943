"""Manifests of your own images: tables of the class and the part of each image, as CSV or JSON."""

import csv
import io
import json
import os
import random
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from common import note

from .splits import Split, check_path, parse_json, read_text
from .task import DatasetError, Item, enumerated

# The accepted names of the parts, in manifests and as folders.
PARTS = {
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


def find_manifest(root: Path) -> Path | None:
    """Return the manifest in a folder of images. Raise DatasetError if there are several."""
    found = [root / name for name in _MANIFESTS if (root / name).is_file()]
    if len(found) > 1:
        raise DatasetError(f"{root} has a {found[0].name} and a {found[1].name}; remove one of them")
    return found[0] if found else None


def read_manifest(path: Path, image_root: Path | None = None) -> tuple[Split, Path]:
    """Read a manifest: a table with one image per row, as CSV with a header line or as a JSON list of objects.

    Columns: `path` (relative to the manifest's folder, with forward slashes); `class_name`, or `label` (whole numbers
    from 0), or both; `part` (train, val or test). If there are only labels, class names come from `classnames.txt`
    beside the manifest. If there are only class names, they are numbered in sorted order. Without a column `part`, the
    images are divided like those of folders. A JSON object in the format of CoOp's split files is accepted too. Raises
    DatasetError with file and row.
    """
    if path.suffix.lower() not in (".csv", ".json"):
        raise DatasetError(f"{path} is not a folder and not a manifest; the name of a manifest ends in .csv or .json")
    found = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    if not found:
        raise DatasetError(f"manifest {path} lists no images")
    rows, wrong = [], []
    for where, row in found:
        try:
            rows.append(_check_row(row, where))
        except DatasetError as error:
            wrong.append(str(error))
    if wrong:
        raise DatasetError(f"{wrong[0]}{also([reason.removeprefix(f'manifest {path}, ') for reason in wrong])}")
    for column in ("label", "class_name", "part"):
        lacking = [row for row in rows if row[column] is None]
        if lacking and len(lacking) < len(rows):
            raise DatasetError(f"{lacking[0]['where']}: no {column}, but other rows have one")
    seen: dict[object, str] = {}
    for row in rows:  # an image in two parts could be used for training and for testing
        file = _identity(path.parent / row["path"])
        if file in seen:
            name = f" as {seen[file]!r}" if seen[file] != row["path"] else ""
            raise DatasetError(f"{row['where']}: {row['path']!r} is listed before{name}; list it once")
        seen[file] = row["path"]
    return _split_rows(rows, path), image_root or path.parent


def _identity(file: Path) -> object:
    """Return a key that is equal for all names of a file, including links; the name if there is no such file."""
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return str(file)
    return (status.st_dev, status.st_ino) if status.st_ino else str(file)


def _csv_rows(path: Path) -> list[tuple[str, dict]]:
    """Return (where, row) for each row of a table with commas, semicolons or tabs, without empty rows."""
    text = read_text(path)
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        lines = [(reader.line_num, row) for row in reader if any(field.strip() for field in row)]
    except csv.Error as error:
        raise DatasetError(f"manifest {path}, line {reader.line_num} is not valid CSV ({error})") from error
    names = [name.strip().lower().replace(" ", "_") for name in lines[0][1]] if lines else []
    names = ["class_name" if name in ("classname", "class") else name for name in names]
    if "path" not in names or not set(names) <= set(_COLUMNS) or len(set(names)) < len(names):
        raise DatasetError(
            f"manifest {path}: the first line must name the columns: path and some of {', '.join(_COLUMNS[1:])}, each "
            f"once; it is {header.strip()[:80]!r}"
        )
    for number, row in lines:
        if len(row) != len(names):
            raise DatasetError(f"manifest {path}, line {number} has {len(row)} fields instead of {len(names)}")
    return [(f"manifest {path}, line {number}", dict(zip(names, row))) for number, row in lines[1:]]


def _json_rows(path: Path) -> list[tuple[str, object]]:
    """Return (where, row) for each row of a list of objects, or of CoOp's {part: [[path, label, class name], ...]}."""
    content = parse_json(path, "correct it there")
    if isinstance(content, list):
        return [(f"manifest {path}, row {number}", row) for number, row in enumerate(content, start=1)]
    if not isinstance(content, dict) or not all(isinstance(rows, list) for rows in content.values()):
        raise DatasetError(
            f"manifest {path} must be a list of objects, or an object with the lists train, val and test"
        )
    found = []
    for part, rows in content.items():
        for number, row in enumerate(rows, start=1):
            where = f"manifest {path}, {part} row {number}"
            if not (isinstance(row, list) and len(row) == 3):
                raise DatasetError(f"{where}: expected [path, label, class name], found {json.dumps(row)[:80]}")
            found.append((where, dict(zip(_COLUMNS, row), part=part)))
    return found


def _check_row(row: object, where: str) -> dict:
    """Return one row with `where` and all columns: None for empty ones, and a label as a number."""
    if not isinstance(row, dict) or not row.keys() <= set(_COLUMNS):
        raise DatasetError(f"{where}: expected the fields {', '.join(_COLUMNS)}, found {json.dumps(row)[:80]}")
    row = {name: value.strip() if isinstance(value, str) and name != "path" else value for name, value in row.items()}
    row = {name: None if row.get(name) == "" else row.get(name) for name in _COLUMNS} | {"where": where}
    if not isinstance(row["path"], str):
        raise DatasetError(f"{where}: no path")
    if "\\" in row["path"]:
        raise DatasetError(f"{where}: {row['path']!r} has backslashes; write forward slashes")
    check_path(row["path"], where)
    row["path"] = str(PurePosixPath(row["path"]))  # ./a.jpg is a.jpg
    if not isinstance(row["class_name"], (str, type(None))):
        raise DatasetError(f"{where}: class_name {json.dumps(row['class_name'])[:80]} is not text")
    if row["label"] is not None:
        if not re.fullmatch("[0-9]{1,9}", str(row["label"])):  # int() alone would accept true and 1.5
            raise DatasetError(
                f"{where}: label {row['label']!r} is not a whole number from 0; names belong in the column class_name"
            )
        row["label"] = int(row["label"])
    elif row["class_name"] is None:
        raise DatasetError(f"{where}: no label and no class_name; give one of them")
    if row["part"] is not None:
        part = PARTS.get(str(row["part"]).lower())
        if part is None:
            raise DatasetError(f"{where}: part {row['part']!r} must be train, val or test")
        row["part"] = part
    return row


def _split_rows(rows: list[dict], path: Path) -> Split:
    names = _names_of_labels(rows, path)
    if rows[0]["part"] is None:
        images: dict[str, list[str]] = {name: [] for name in names}
        for row in rows:
            images[names[row["label"]]].append(row["path"])
        return Split(names, *divide(images, f"manifest {path}"))
    items = {
        part: tuple(Item(row["path"], row["label"]) for row in rows if row["part"] == part)
        for part in ("train", "val", "test")
    }
    untrained = set(range(len(names))) - {item.label for item in items["train"]}
    if untrained:
        raise DatasetError(f"manifest {path}: class {names[min(untrained)]!r} has no image in train; add one")
    if not items["test"]:
        raise DatasetError(f"manifest {path} has no image in test; some rows need the part test")
    return Split(names, items["train"], items["val"], items["test"])


def _names_of_labels(rows: list[dict], path: Path) -> tuple[str, ...]:
    """Return the class names in label order; give labels to rows that have none."""
    if rows[0]["label"] is None:
        names = sorted({row["class_name"] for row in rows})
        labels = {name: label for label, name in enumerate(names)}
        for row in rows:
            row["label"] = labels[row["class_name"]]
    else:
        used: dict[int, str | None] = {}
        for row in rows:
            before = used.setdefault(row["label"], row["class_name"])
            if before != row["class_name"]:
                raise DatasetError(
                    f"{row['where']}: label {row['label']} is called {row['class_name']!r} here and {before!r} before"
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


# --- shared with folder.py


def check_names(names: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the class names; raise DatasetError, with `where` they come from, if two of them make the same prompt."""
    seen: dict[str, str] = {}
    same = []
    for name in names:
        prompt = " ".join(unicodedata.normalize("NFC", name).replace("_", " ").lower().split())
        if not prompt or not name.isprintable():
            raise DatasetError(f"{where}: {name!r} is not usable as a class name; write another in classnames.txt")
        if prompt in seen:
            look_alike = unicodedata.normalize("NFC", seen[prompt]) == unicodedata.normalize("NFC", name)
            show = ascii if look_alike else repr
            same.append(f"{show(seen[prompt])} and {show(name)}")
        seen[prompt] = name
    if same:
        raise DatasetError(f"{where}: the classes {same[0]} give the same prompt{also(same)}; merge or rename them")
    return tuple(names)


def also(wrong: Sequence[str]) -> str:
    """Return, in brackets, what has the same mistake as the first, so that all can be corrected at once."""
    return f" (also {enumerated(wrong[1:])})" if len(wrong) > 1 else ""


def divide(images: Mapping[str, Sequence[str]], source: str) -> tuple[tuple[Item, ...], ...]:
    """Divide the images of each class into train, val and test as `divide_class` does, and print a note about it.

    The keys of `images` are the class names in label order; `source` is where they come from, for messages.
    """
    parts: tuple[list[Item], ...] = ([], [], [])
    single = [repr(name) for name, paths in images.items() if len(paths) < 2]
    if single:
        raise DatasetError(
            f"{source}: class {single[0]} has one image{also(single)}; each needs two, for training and for testing"
        )
    for label, paths in enumerate(images.values()):
        for part, chosen in zip(parts, divide_class(paths)):
            part += [Item(path, label) for path in chosen]
    note(
        f"{source} has no train, val and test parts; its images are divided 50/20/30 % per class, always in the same "
        "way, and the run's split.json lists them"
    )
    return tuple(map(tuple, parts))


def divide_class(paths: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Divide the images of a class, two or more, into 50 % train, 20 % val and 30 % test.

    The proportions are those of CoOp's splits. The division depends only on the paths: not on the run's seed, on their
    order, on the class name, or on other classes, which may be added later.
    """
    shuffled = random.Random(0).sample(sorted(paths), len(paths))
    test, val = round(0.3 * len(paths)), round(0.2 * len(paths))
    return shuffled[test + val :], shuffled[test : test + val], shuffled[:test]
