"""Where the images of a manifest are: from the paths that people write to paths below one folder."""

import os
import re
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from common import note

from .decoding import image_endings
from .errors import DatasetError
from .splits import check_path, scan


class Wrong(Exception):
    """A mistake in a row: its kind, which includes the remedy, and the example."""

    def __init__(self, kind: str, example: str):
        super().__init__(example)
        self.kind = kind


def place_of(value: Any, root: Path, folder: Path) -> str:
    """Return the path of an image relative to `root`, with forward slashes. `folder`: where the manifest lies."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # an id
    if not isinstance(value, str):
        raise Wrong("each row needs the path of its image", "no path")
    if re.match(r"[a-z]+://", value):
        raise Wrong("save the images and give their paths", f"{value[:80]!r} is a web address")
    if value != value.strip() and not _exists(root, value) and _exists(root, value.strip()):
        value = value.strip()
    if "\\" in value and not _exists(root, value):
        if not _exists(root, value.replace("\\", "/")):
            raise Wrong("write forward slashes", f"{value!r} has backslashes, and there is no such file")
        value = value.replace("\\", "/")
    place = _inside(value, root, folder)
    if not place.lower().endswith(image_endings()) and not _exists(root, place):
        fitting = [f"{place}{ending}" for ending in image_endings() if _exists(root, f"{place}{ending}")]
        if len(fitting) > 1:
            raise Wrong("write the whole name", f"{value!r} may be {' or '.join(fitting)}")
        place = fitting[0] if fitting else place
    return place


def _exists(root: Path, place: str) -> bool:
    try:
        return os.path.exists(root / place)
    except ValueError:  # a NUL in it
        return False


def _inside(value: str, root: Path, folder: Path) -> str:
    """Return a path below `root`, relative to it. It may be absolute, or lead up from `folder` with .. and down again.

    A path that begins with .. never starts from `root`, because it would not lie below it.
    """
    outside = Wrong("paths must lie inside the image folder: a relative path, or --image_root DIR", repr(value))
    if _rises(value):
        value = os.path.normpath(os.path.abspath(folder / value))
    if not os.path.isabs(value):
        inner = os.path.normpath(value) if value.strip("/.") else ""
    else:
        inner = next(
            (
                os.path.relpath(value, base)
                for base in (os.path.abspath(root), os.path.realpath(root))
                if _below(value, base)
            ),
            "..",
        )
    try:
        check_path(inner, "")
    except DatasetError:
        raise outside from None
    return inner.replace(os.sep, "/")


def _rises(value: str) -> int:
    """Return how many folders a path leads up before it leads down."""
    return 0 if os.path.isabs(value) else Path(os.path.normpath(value)).parts.count("..")


def _below(value: str, base: str) -> bool:
    return not PureWindowsPath(value).drive and os.path.normpath(value).startswith(base + os.sep)


def find_root(paths: Sequence[Any], path: Path) -> Path:
    """Return the folder that these paths start from: the manifest's, the one above it to which they lead with .., or
    the only one in it that has the files (the first 20 of them are looked for)."""
    folder = path.parent

    def has_them(root: Path) -> bool:
        try:
            return all(os.path.exists(root / place_of(value, root, folder)) for value in paths[:20])
        except Wrong:
            return False

    if has_them(folder):
        return folder
    rises = max((_rises(value) for value in paths if isinstance(value, str)), default=0)
    above = Path(os.path.normpath(os.path.join(os.path.abspath(folder), *[".."] * rises)))
    if rises and has_them(above):
        note(f"manifest {path}: its images are in {above}")
        return above
    fitting = [Path(entry.path) for entry in scan(folder) if entry.is_dir() and has_them(Path(entry.path))]
    if len(fitting) > 1:
        raise DatasetError(
            f"manifest {path}: the images may be in {fitting[0].name} or {fitting[1].name}; give one as --image_root"
        )
    if fitting:
        note(f"manifest {path}: its images are in {fitting[0]}")
    return fitting[0] if fitting else folder
