"""Names for the classes of your own images, from a file, and hints where the names at hand make poor prompts."""

import csv
import io
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from common import counted, note

from .errors import DatasetError
from .splits import parse_json, read_text
from .task import enumerated


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


def renamed(classes: Sequence[str], file: Path, source: str) -> tuple[str, ...]:
    """Return other names for `classes`, in their order, from a file.

    The file is text with a line `class name` for each class, or only the names in the order of the classes; a table
    (.csv, .tsv) with a row for each class, its present name and the other one; or a JSON object from the one to the
    other. `source` says in messages whose classes these are. Raise DatasetError if a class is missing, unknown or there
    twice, or if two names give the same prompt.
    """
    if not file.is_file():
        raise DatasetError(f"--classnames {file} is not a file")
    ending = file.suffix.lower()
    if ending in (".csv", ".tsv", ".json"):
        pairs = _json_pairs(file) if ending == ".json" else _table_pairs(file, classes)
        names = dict(pairs)
        wrong = [name for name in names if name not in classes] or [name for name in classes if name not in names]
        if wrong or len(pairs) > len(names):
            twice = [name for name in names if [one for one, _ in pairs].count(name) > 1]
            what = f"names {wrong[0]!r}, which is no class" if wrong and wrong[0] not in classes else ""
            what = what or (f"lacks {wrong[0]!r}" if wrong else f"names {twice[0]!r} twice")
            raise DatasetError(f"{file} {what} ({source}: {', '.join(classes[:5])}{', ...' * (len(classes) > 5)})")
        return check_names([names[name] for name in classes], str(file))
    return _from_lines(list(classes), file)


def _json_pairs(file: Path) -> list[tuple[str, str]]:
    content = parse_json(file, "correct it there")
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content.values()):
        raise DatasetError(f"{file} must be an object from each class to its name")
    return list(content.items())


def _table_pairs(file: Path, classes: Sequence[str]) -> list[tuple[str, str]]:
    text = read_text(file)
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(map(str.strip, row))]
    odd = next((row for row in rows if len(row) != 2), None)
    if odd or not rows:
        raise DatasetError(f"{file} must have two columns, class and name; found {(odd or [''])!r}")
    pairs = [(one.strip(), other.strip()) for one, other in rows]
    return pairs[1:] if pairs[0][0] not in classes else pairs  # the first line may name the columns


def _from_lines(classes: list[str], file: Path) -> tuple[str, ...]:
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    named = [pair for pair in (_class_and_name(line, classes) for line in lines) if pair]
    if dict(named).keys() == set(classes) and len(lines) == len(classes):
        names = dict(named)
        return check_names([names[name] for name in classes], str(file))
    remedy = "write one line for each, `folder name`"
    starts = tuple(f"{name}{sign}" for name in classes for sign in ",;:=")
    odd = [line for line in lines if line.startswith(starts)]
    if odd:
        raise DatasetError(f"{file}: the line {odd[0]!r} begins with a folder, but no space follows; {remedy}")
    if named:  # only some lines begin with a folder; it is unclear which folders the other lines mean
        wrong = next((f"{line!r} names none" for line in lines if not _class_and_name(line, classes)), "named twice")
        raise DatasetError(f"{file} names {len(dict(named))} of the {len(classes)} class folders ({wrong}); {remedy}")
    if len(lines) != len(classes):
        remedy += ", or only the names in the order of the sorted folders"
        raise DatasetError(f"{file} has {counted(len(lines), 'line')} for {len(classes)} class folders; {remedy}")
    if classes != sorted(classes, key=_natural_order):
        raise DatasetError(f"{file} has only names, but these folders can be sorted in several ways; {remedy}")
    return check_names(lines, str(file))


def _class_and_name(line: str, classes: list[str]) -> tuple[str, str] | None:
    """Split a line `class name`; the names of folders may contain spaces, so the longest that fits is used."""
    fitting = [name for name in classes if line.startswith((f"{name} ", f"{name}\t"))]
    if not fitting:
        return None
    name = max(fitting, key=len)
    return name, line[len(name) :].strip()


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that ignores upper and lower case and puts 2 before 10, as file managers do."""
    pieces = re.split(r"([0-9]+)", name.casefold())
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces]


_ODD = {
    "a number": re.compile(r"[\W\d_]+"),
    "a number at its beginning": re.compile(r"\d+[ ._-].*"),
    "a WordNet id": re.compile(r"n\d{8}\b.*"),
    "an id": re.compile(r"(?=.*\d)([0-9a-fA-F]{8,}|[0-9a-fA-F]{4,}(-[0-9a-fA-F]{2,})+)"),
    "a counter": re.compile(r"(class|cls|category|cat|label|c|k)[ ._-]?\d+", re.IGNORECASE),
}


def note_odd_names(names: Sequence[str]) -> None:
    """Print a note if many class names are numbers or ids, or begin with one: the prompts are made of them."""
    found = [(name, kind) for name in names for kind, pattern in _ODD.items() if pattern.fullmatch(name)]
    if len({name for name, _ in found}) * 2 > len(names):
        name, kind = found[0]
        note(
            f"class names such as {name!r} look like {kind}, and the prompts are made of them; --classnames FILE gives "
            "other names"
        )
