"""Manifests of your own images: tables of the class and the part of each image, as people have them.

A column is known by its name. What is not sure is rejected: two columns that may be the path, a class that
is a number in one row and text in another, a file that fits a path in two ways.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import counted, note

from .classnames import check_names
from .decoding import image_endings
from .division import divide
from .errors import DatasetError
from .places import Wrong, find_root, place_of
from .splits import Split, read_text, scan
from .tables import ENDINGS, Table, read_table
from .task import Item, enumerated

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
# The columns, and other names that they have; the first of each is this program's own.
_NAMES = {
    "path": (
        *("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "imagepath"),
        *("image_file", "image_filename", "image_name", "img", "img_path", "img_name", "picture", "photo", "image_id"),
    ),
    "label": ("label", "labels", "target", "class_id", "class_idx", "class_index", "label_id", "label_idx", "y"),
    "class_name": (
        *("class_name", "classname", "class", "label_name", "class_label", "category", "category_name", "species"),
        "breed",
    ),
    "part": ("part", "split", "set", "subset", "partition", "data_set", "phase"),
}
_SYNONYMS = {"class_name": ("class", "classname")}
_EMPTY = ("", "nan", "null", "none", "na", "n/a")  # of label and part; a class may have one of these names
_IN_FOLDERS = ("manifest.csv", "manifest.json", "manifest.tsv", "manifest.jsonl")
_BESIDE_IMAGES = ("metadata.csv", "metadata.jsonl")  # Hugging Face's, taken where the images lie beside it


def find_manifest(root: Path) -> Path | None:
    """Return the manifest in a folder of images, if there is one. Raise DatasetError if there are several."""
    found = [root / name for name in _IN_FOLDERS if (root / name).is_file()]
    if not found and any(entry.name.lower().endswith(image_endings()) for entry in scan(root)):
        found = [root / name for name in _BESIDE_IMAGES if (root / name).is_file()]
    if len(found) > 1:
        raise DatasetError(f"{root} has a {found[0].name} and a {found[1].name}; remove one of them")
    return found[0] if found else None


def tables_in(root: Path) -> list[str]:
    """Return the names of files in a folder that may be tables of its images."""
    return sorted(entry.name for entry in scan(root) if entry.name.lower().endswith(ENDINGS))


def read_manifest(path: Path, image_root: Path | None = None, to_test: bool = False) -> tuple[Split, Path]:
    """Read a manifest, a table with one image a row; return its split and the folder that its paths start from.

    The columns are those of _NAMES, in any order and spelling: the path; the class, as text, as numbers, or both; and
    perhaps the part. Others are left out with a note. If there are only numbers, class names come from `classnames.txt`
    beside the manifest. If there are only names, they are numbered in sorted order. Without parts, the images are
    divided like those of folders. Paths start from `image_root`, by default the manifest's folder or the only folder in
    it that has these files. `to_test`: nothing is trained, and only test has images, all if there are no parts. Raises
    DatasetError with file and row.
    """
    table = read_table(path)
    columns = _columns(table, path) if table.columns else {}
    if not table.rows:
        raise DatasetError(f"manifest {path} lists no images")
    root = image_root or find_root([row.get(columns["path"]) for _, row in table.rows], path)
    rows = _checked([(where, _picked(row, columns)) for where, row in table.rows], root, path)
    rows = _numbered(rows, path)
    for column in ("label", "class_name", "part"):
        lacking = [row for row in rows if row[column] is None]
        if lacking and len(lacking) < len(rows):
            raise DatasetError(
                f"manifest {path}, {lacking[0]['where']}: no {column}, but other rows have one{_more(lacking)}"
            )
    return _split_rows(_once(rows, root, path), path, to_test), root


def _more(rows: Sequence[object]) -> str:
    return f" ({len(rows)} rows)" if len(rows) > 1 else ""


# --- columns


def _columns(table: Table, path: Path) -> dict[str, str]:
    """Return the table's column for each of ours that it has. Raise DatasetError if that is not clear."""
    plain = {name: re.sub(r"[\s_-]+", "_", name.strip().lower()) for name in table.columns}
    if len(set(table.columns)) < len(table.columns):
        raise DatasetError(f"manifest {path}: the first line names a column twice: {_shown(table.columns)}")
    found = {}
    for ours, names in _NAMES.items():
        fitting = [name for name in table.columns if plain[name] in names]
        own = [name for name in fitting if plain[name] in (ours, *_SYNONYMS.get(ours, ()))]
        if len(fitting) > 1 and not own:
            raise DatasetError(
                f"manifest {path}: the columns {' and '.join(fitting)} may both be the {ours}; call one of them {ours}"
            )
        if len(own) > 1:
            raise DatasetError(
                f"manifest {path}: the first line names the column {ours} twice: {_shown(table.columns)}"
            )
        if fitting:
            found[ours] = (own or fitting)[0]
    if "path" not in found and "id" in plain.values():  # as in Kaggle's tables
        found["path"] = next(name for name in table.columns if plain[name] == "id")
    if "path" not in found:
        raise DatasetError(
            f"manifest {path}: the first line must name the columns, one of them path; it is {_shown(table.columns)}"
        )
    others = [
        name for name in table.columns if name not in found.values() and plain[name] not in ("", "unnamed:_0", "index")
    ]
    hidden = [name for name in others if re.fullmatch(rf"(is_)?({'|'.join(PARTS)})(_image|_set|_data)?", plain[name])]
    if hidden and "part" not in found:
        raise DatasetError(
            f"manifest {path}: the column {hidden[0]} may say the part of each image; replace it by a column part with "
            "train, val and test, or remove it to have the images divided"
        )
    if others:
        note(f"manifest {path}: {counted(len(others), 'column')} not used: {enumerated(others, 5)}")
    return found


def _shown(columns: Sequence[str]) -> str:
    return repr(",".join(columns)[:80])


def _picked(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Return a row with our names; texts without blanks around them, None for what is empty."""
    picked = {}
    for name in _NAMES:
        value = row.get(columns.get(name))
        if isinstance(value, str) and name != "path":
            value = value.strip()
        is_empty = value == "" or value != value or (name in ("label", "part") and str(value).lower() in _EMPTY)
        picked[name] = None if value is None or is_empty else value
    return picked


# --- rows


def _checked(found: list[tuple[str, dict]], root: Path, path: Path) -> list[dict]:
    """Return the rows with usable paths and parts. Raise DatasetError with each kind of mistake and an example."""
    rows, wrong = [], {}
    for where, row in found:
        try:
            if not isinstance(row["class_name"], (str, type(None))):
                raise Wrong("the class must be one text", f"class_name {row['class_name']!r}")
            place = place_of(row["path"], root, path.parent)
            rows.append({**row, "path": place, "part": _part(row["part"]), "where": where})
        except Wrong as mistake:
            wrong.setdefault(mistake.kind, []).append(f"{where}: {mistake}")
    if wrong:
        kinds = [f"{places[0]}; {kind}{_more(places)}" for kind, places in wrong.items()]
        raise DatasetError(f"manifest {path}, {'; and '.join(kinds)}")
    return rows


def _part(value: Any) -> str | None:
    if value is None:
        return None
    part = PARTS.get(str(value).lower())
    if part is None:
        raise Wrong("a part must be train, val or test: correct it or remove the row", f"part {value!r}")
    return part


def _numbered(rows: list[dict], path: Path) -> list[dict]:
    """Return the rows with labels as numbers; a column of labels that holds text is a column of class names."""
    labels = [row["label"] for row in rows if row["label"] is not None]
    whole = [label for label in labels if re.fullmatch(r"[0-9]{1,9}(\.0+)?", str(label)) and label is not True]
    if labels and not whole and all(isinstance(label, str) for label in labels) and not _are_numbers(labels):
        if any(row["class_name"] is not None for row in rows):
            raise DatasetError(
                f"manifest {path}: label {labels[0]!r} is text, and there is a class_name; leave one out"
            )
        return [{**row, "label": None, "class_name": row["label"]} for row in rows]
    wrong = [row for row in rows if row["label"] is not None and row["label"] not in whole]
    if wrong:
        example = f"{wrong[0]['where']}: label {wrong[0]['label']!r}"
        remedy = "names belong in the column class_name"
        raise DatasetError(f"manifest {path}, {example} is not a whole number from 0{_more(wrong)}; {remedy}")
    nameless = [row for row in rows if row["label"] is None is row["class_name"]]
    if nameless:
        raise DatasetError(
            f"manifest {path}, {nameless[0]['where']}: no label and no class_name{_more(nameless)}; give one of them"
        )
    return [{**row, "label": None if row["label"] is None else int(float(row["label"]))} for row in rows]


def _are_numbers(labels: Sequence[str]) -> bool:
    """Return whether any of these is a number: -1, 0.5."""
    return any(re.fullmatch(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?", label) for label in labels)


def _once(rows: list[dict], root: Path, path: Path) -> list[dict]:
    """Return each image once. Raise DatasetError if it is listed with two classes or parts."""
    seen: dict[object, dict] = {}
    repeats = []
    for row in rows:  # an image in two parts could be used for training and for testing
        file = _identity(root / row["path"])
        first = seen.setdefault(file, row)
        if first is row:
            continue
        if any(first[name] != row[name] for name in ("path", "label", "class_name", "part")):
            name = f" as {first['path']!r}" if first["path"] != row["path"] else ""
            raise DatasetError(
                f"manifest {path}, {row['where']}: {row['path']!r} is listed before{name}, with another class, part or "
                "name; list it once"
            )
        repeats.append(row)
    if repeats:
        note(
            f"manifest {path}: {counted(len(repeats), 'row')} repeated from others and counted once, "
            f"for example {repeats[0]['where']}"
        )
    return list(seen.values())


def _identity(file: Path) -> object:
    """Return a key that is equal for all names of a file, including links; the name if there is no such file."""
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return str(file)
    return (status.st_dev, status.st_ino) if status.st_ino else str(file)


# --- parts and classes


def _split_rows(rows: list[dict], path: Path, to_test: bool) -> Split:
    names = _names_of_labels(rows, path)
    _check_single(names, path)
    if to_test:
        tested = [row for row in rows if row["part"] in (None, "test")]
        if not tested:
            raise DatasetError(f"manifest {path} has no image in test; some rows need the part test, or none a part")
        return Split(names, (), (), tuple(Item(row["path"], row["label"]) for row in tested))
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


def _check_single(names: Sequence[str], path: Path) -> None:
    """Raise DatasetError if a class is several others: cat|dog beside cat and dog."""
    for name in names:
        pieces = [piece.strip() for piece in re.split(r"[|;,]", name)]
        if len(pieces) > 1 and set(pieces) <= set(names):
            raise DatasetError(f"manifest {path}: {name!r} is several classes, but an image can have only one here")


def _names_of_labels(rows: list[dict], path: Path) -> tuple[str, ...]:
    """Return the class names in label order; give labels to rows that have none, and close gaps between labels."""
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
                where = f"manifest {path}, {row['where']}"
                raise DatasetError(
                    f"{where}: label {row['label']} is called {row['class_name']!r} here and {before!r} before"
                )
        numbers = sorted(used)
        if numbers != list(range(len(used))):
            given = enumerated([str(number) for number in numbers], 4)
            note(f"manifest {path}: its labels, {given}, become 0 to {len(used) - 1}, without gaps")
            labels = {number: label for label, number in enumerate(numbers)}
            for row in rows:
                row["label"] = labels[row["label"]]
        names = [used[number] for number in numbers]
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
        raise DatasetError(
            f"{file} has {counted(len(lines), 'line')} for the {classes} labels of {path}; write one for each"
        )
    return lines
