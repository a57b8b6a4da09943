"""Find a dataset's images in an unpacked archive or in the user's folders, and move them to their place."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from common import note

from ..splits import IMAGE_EXTENSIONS
from .archives import SUFFIXES, is_archive, member_names, unpack, why_no_archive

_DEPTH = 4  # the deepest known nesting, Kaggle's ImageNet: ILSVRC/Data/CLS-LOC/train
_NO_ARCHIVES = (*IMAGE_EXTENSIONS, ".json", ".txt", ".csv", ".xml", ".mat", ".part", ".lock", ".md", ".pdf")


def is_missing(part: Path) -> bool:
    """Return whether a folder of images does not exist, has no images, or has them in an inner folder of its name."""
    return not _holds_images(part) or _innermost(part) != part


def _innermost(folder: Path) -> Path:
    """Return `folder`, or the folder of the same name inside it (cars_train/cars_train), and so on."""
    while (folder / folder.name).is_dir():
        folder /= folder.name
    return folder


def arrange_folder(tree: Path, target: Path, called: tuple[str, ...]) -> None:
    """Find a folder of images below `tree` that has one of the names `called`, and move it to `target`.

    Text files beside it are moved too: Aircraft's split, and the terms of others. The images are moved last, so if they
    are in place, everything is. `target` itself does not count, unless it contains a folder of its own name.
    """
    candidates = [folder / name for folder, names, _ in walk(tree) for name in names if name in called]
    innermost = map(_innermost, sorted(candidates, key=lambda path: len(path.parts)))
    found = next((folder for folder in innermost if folder != target and _holds_images(folder)), None)
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

    An existing `target`, empty or around `found`, is renamed first; after an interruption the images are found there.
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


def _holds_images(folder: Path) -> bool:
    return any(name.lower().endswith(IMAGE_EXTENSIONS) for _, _, names in os.walk(folder) for name in names)


def walk(tree: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield from `os.walk` in sorted order, without hidden entries and not deeper than _DEPTH."""
    for path, folders, files in os.walk(tree):
        folder = Path(path)
        deep = len(folder.relative_to(tree).parts) >= _DEPTH
        folders[:] = [] if deep else sorted(name for name in folders if not name.startswith("."))
        yield folder, folders, sorted(name for name in files if not name.startswith("."))


def archives_below(tree: Path) -> list[Path]:
    """Return the archives in a dataset's folder, by content; print a note on files that have only an archive's name."""
    archives = []
    for folder, _, names in walk(tree):
        for name in names:
            path = folder / name
            if name.lower().endswith(_NO_ARCHIVES) or not path.is_file():
                continue
            if is_archive(path):
                archives.append(path)
            elif name.lower().endswith(SUFFIXES):
                note(why_no_archive(path))
    return archives


def holds(archive: Path, called: tuple[str, ...]) -> bool:
    """Return whether an archive has a folder (or an archive of a folder) with one of the names `called`."""
    for name in member_names(archive):
        *folders, last = PurePosixPath(name.replace("\\", "/")).parts or ("",)
        if name.endswith("/") or last.lower().endswith(SUFFIXES):
            folders.append(last.partition(".")[0])
        if not {*folders}.isdisjoint(called):
            return True
    return False


@contextmanager
def unpacked(archive: Path, folder: Path, called: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield a temporary folder in `folder` with the content of `archive`; delete what is not moved out of it.

    An archive inside it with one of the names `called` is unpacked too. What an interrupted run left is deleted first.
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
