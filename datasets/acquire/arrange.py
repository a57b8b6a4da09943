"""Finding a dataset's images in what an archive or the user brought, and moving them where they belong."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ..splits import IMAGE_EXTENSIONS
from .archives import SUFFIXES, is_archive, member_names, unpack, why_no_archive

_DEPTH = 4  # Kaggle's ImageNet lies as deep as this: ILSVRC/Data/CLS-LOC/train
_NO_ARCHIVES = (*IMAGE_EXTENSIONS, ".json", ".txt", ".csv", ".xml", ".mat", ".part", ".lock", ".md", ".pdf")


def is_missing(part: Path) -> bool:
    """Whether a folder of images is not there, holds none, or lies in a folder of its own name."""
    return not _holds_images(part) or _innermost(part) != part


def _innermost(folder: Path) -> Path:
    """`folder`, or the folder of the same name inside it (cars_train/cars_train), and so on."""
    while (folder / folder.name).is_dir():
        folder /= folder.name
    return folder


def arrange_folder(tree: Path, target: Path, called: tuple[str, ...]) -> None:
    """Move the folder of images that lies below `tree` under one of the names `called`, if there is one, to `target`.

    Text files beside it come along: they are Aircraft's split and others' terms. The images come last, so if they are
    in place, all is. `target` itself is no find, unless it is nested in itself.
    """
    found = _find_folder(tree, target, called)
    if found is None:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    for text in sorted(found.parent.glob("*.txt")):
        if not (target.parent / text.name).exists():
            text.rename(target.parent / text.name)
    emptied = put(found, target).parent
    while emptied not in (tree, target.parent) and not any(emptied.iterdir()):
        emptied.rmdir()
        emptied = emptied.parent
    print(f"images arranged in {target}")


def put(found: Path, target: Path) -> Path:
    """Rename folder `found` to `target` and return where it came from.

    What is in the way, be it an empty folder or one around `found`, is set aside; interrupted, the search finds the
    images there.
    """
    if target.is_dir():
        aside = target.with_name(f"{target.name}.aside")
        target.rename(aside)
        if found.is_relative_to(target):
            found = aside / found.relative_to(target)
        elif not any(aside.iterdir()):
            aside.rmdir()
    found.rename(target)
    return found


def _find_folder(tree: Path, target: Path, called: tuple[str, ...]) -> Path | None:
    candidates = [folder / name for folder, names, _ in walk(tree) for name in names if name in called]
    for candidate in sorted(candidates, key=lambda path: len(path.parts)):
        inner = _innermost(candidate)
        if inner != target and _holds_images(inner):
            return inner
    return None


def _holds_images(folder: Path) -> bool:
    return any(name.lower().endswith(IMAGE_EXTENSIONS) for _, _, names in os.walk(folder) for name in names)


def walk(tree: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`os.walk` in sorted order, without hidden entries, and not deeper than the nesting that occurs."""
    for path, folders, files in os.walk(tree):
        folder = Path(path)
        deep = len(folder.relative_to(tree).parts) >= _DEPTH
        folders[:] = [] if deep else sorted(name for name in folders if not name.startswith("."))
        yield folder, folders, sorted(name for name in files if not name.startswith("."))


def archives_below(tree: Path) -> list[Path]:
    """The archives in a dataset's folder, by content; a file that only has an archive's name is told on stderr."""
    archives = []
    for folder, _, names in walk(tree):
        for name in names:
            path = folder / name
            if name.lower().endswith(_NO_ARCHIVES) or not path.is_file():
                continue
            if is_archive(path):
                archives.append(path)
            elif name.lower().endswith(SUFFIXES):
                print(f"note: {why_no_archive(path)}", file=sys.stderr)
    return archives


def holds(archive: Path, called: tuple[str, ...]) -> bool:
    """Whether an archive has a folder (or an archive of a folder) under one of the names `called`."""
    for name in member_names(archive):
        *folders, last = PurePosixPath(name.replace("\\", "/")).parts or ("",)
        if name.endswith("/") or last.lower().endswith(SUFFIXES):
            folders.append(last.partition(".")[0])
        if not {*folders}.isdisjoint(called):
            return True
    return False


@contextmanager
def unpacked(archive: Path, folder: Path, called: tuple[str, ...] = ()) -> Iterator[Path]:
    """A temporary folder in `folder` with the content of `archive`; what is not moved out of it is deleted.

    An archive inside, that of a folder `called` so, is unpacked too. What an interrupted run left is deleted first.
    """
    tree = folder / ".unpacking"
    shutil.rmtree(tree, ignore_errors=True)
    try:
        tree.mkdir(parents=True)
        unpack(archive, tree)
        for inner in archives_below(tree):
            if inner.name.partition(".")[0] in called:
                unpack(inner, tree)
        yield tree
    finally:
        shutil.rmtree(tree, ignore_errors=True)
