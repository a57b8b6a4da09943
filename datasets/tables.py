"""Reads tables of images as people have them: CSV with any usual delimiter, TSV, JSON, JSON lines; UTF-8 or UTF-16."""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DatasetError

ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")
_NO_TABLES = {
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"PK\x03\x04": "an Excel workbook or another ZIP archive; save the table as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook; save the table as CSV UTF-8",
    b"PAR1": "a Parquet file; save the table as CSV",
    b"SQLite format": "a database; save the table as CSV",
    b"version https://git-lfs": "a Git LFS pointer and not the table itself; git lfs pull fetches it",
}


@dataclass(frozen=True)
class Table:
    """A table: the names of its columns, and its rows with where each stands in the file ("line 5", "row 3")."""

    columns: list[str]
    rows: list[tuple[str, dict[str, Any]]]


def read_table(path: Path) -> Table:
    """Return the table in a file. Raise DatasetError with file, line and remedy."""
    text = _text(path)
    start = text.lstrip()[:1]
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return _from_lines(text, path)
    if path.suffix.lower() == ".json" or start in ("{", "["):
        return _from_json(text, path)
    return _from_csv(text, path)


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"manifest {path} cannot be read ({error.strerror}); change its permissions") from error
    for beginning, kind in _NO_TABLES.items():
        if content.startswith(beginning):
            raise DatasetError(f"manifest {path} is {kind}")
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DatasetError(
            f"manifest {path}, line {line}: not UTF-8 text; save it as UTF-8 (in Excel: CSV UTF-8)"
        ) from error
    if text.lstrip()[:9].lower() in ("<!doctype", "<html>", "<html lan"):
        raise DatasetError(f"manifest {path} is a web page, not JSON or CSV; get the file again")
    return text


def _from_csv(text: str, path: Path) -> Table:
    header = text.lstrip("\r\n").partition("\n")[0]
    delimiter = max(",;\t|", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        lines = [(reader.line_num, row) for row in reader if any(field.strip() for field in row)]
    except csv.Error as error:
        raise DatasetError(f"manifest {path}, line {reader.line_num} is not valid CSV ({error})") from error
    if not lines:
        raise DatasetError(f"manifest {path} is empty; its first line must name the columns, such as path,class_name")
    columns = lines[0][1]
    for number, row in lines[1:]:
        if len(row) != len(columns):
            raise DatasetError(f"manifest {path}, line {number} has {len(row)} fields instead of {len(columns)}")
    return Table(columns, [(f"line {number}", dict(zip(columns, row))) for number, row in lines[1:]])


def _from_lines(text: str, path: Path) -> Table:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows.append((f"line {number}", _parsed(line, path, f"line {number}")))
    return _of_objects(rows, path)


def _from_json(text: str, path: Path) -> Table:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [line for line in text.split("\n") if line.strip()]
        if len(lines) > 1 and all(line.strip()[:1] == "{" and line.strip()[-1:] == "}" for line in lines):
            return _from_lines(text, path)  # JSON lines in a file called .json
        where = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DatasetError(f"manifest {path} is not JSON ({where}); correct it there") from error
    if isinstance(content, list):
        return _of_objects([(f"row {number}", row) for number, row in enumerate(content, start=1)], path)
    if isinstance(content, dict) and isinstance(content.get("columns"), list) and isinstance(content.get("data"), list):
        columns = [str(name) for name in content["columns"]]  # pandas' orient="split"
        rows = [(f"row {number}", dict(zip(columns, row))) for number, row in enumerate(content["data"], start=1)]
        return Table(columns, rows)
    if isinstance(content, dict) and {"images", "annotations"} <= set(content):
        raise DatasetError(
            f"manifest {path} has COCO's format, in which an image may have several classes; write a table with an "
            "image and its class in each row"
        )
    if isinstance(content, dict) and content and all(isinstance(column, dict) for column in content.values()):
        return _of_columns(content)
    if isinstance(content, dict) and all(isinstance(rows, list) for rows in content.values()):
        return _of_parts(content, path)
    raise DatasetError(f"manifest {path} must be a list of objects, or an object with the lists train, val and test")


def _parsed(line: str, path: Path, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"manifest {path}, {where} is not JSON ({' '.join(str(error).split())[:80]})") from error


def _of_objects(rows: list[tuple[str, Any]], path: Path) -> Table:
    for where, row in rows:
        if not isinstance(row, dict):
            raise DatasetError(f"manifest {path}, {where}: expected the fields of an image, found {str(row)[:80]}")
    return Table(list(dict.fromkeys(name for _, row in rows for name in row)), rows)


def _of_columns(content: dict[str, dict[str, Any]]) -> Table:
    """Return pandas' usual JSON, an object for each column, as rows."""
    keys = dict.fromkeys(key for column in content.values() for key in column)
    rows = [(f"row {key}", {name: column.get(key) for name, column in content.items()}) for key in keys]
    return Table(list(content), rows)


def _of_parts(content: dict[str, list], path: Path) -> Table:
    """Return {part: images} as rows; an image is CoOp's [path, label, class name], or an object."""
    rows = []
    for part, images in content.items():
        for number, row in enumerate(images, start=1):
            where = f"{part} row {number}"
            if isinstance(row, list) and len(row) == 3:
                row = dict(zip(("path", "label", "class_name"), row))
            elif not isinstance(row, dict):
                expected = "expected [path, label, class name] or the fields of an image"
                raise DatasetError(f"manifest {path}, {where}: {expected}, found {json.dumps(row)[:80]}")
            rows.append((where, {**row, "part": part}))
    return _of_objects(rows, path)
