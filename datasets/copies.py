"""Finds images that are there twice, byte for byte, in two parts or in two classes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common import counted, file_sha256, note, progress

from .errors import DatasetError
from .splits import Split
from .task import Item

_ENDS = 4096  # bytes at both ends of a file that are compared before the whole
Place = tuple[str, Item]  # a part, and an image in it


@dataclass(frozen=True)
class Copies:
    """Images with the same content: `across_parts` in one class, `across_classes` in several."""

    across_parts: tuple[tuple[Place, ...], ...]
    across_classes: tuple[tuple[Place, ...], ...]


def find_copies(split: Split, image_root: Path) -> Copies:
    """Return the copies among all images of a split. Missing files are left to others."""
    places = [(part, item) for part in ("train", "val", "test") for item in getattr(split, part)]
    groups = [places]
    for key in (_size, _ends, file_sha256):
        groups = [same for group in groups for same in _grouped(group, image_root, key)]
    across_classes = [group for group in groups if len({item.label for _, item in group}) > 1]
    across_parts = [group for group in groups if group not in across_classes and len({part for part, _ in group}) > 1]
    return Copies(tuple(across_parts), tuple(across_classes))


def _grouped(places: Sequence[Place], image_root: Path, key: Callable[[Path], object]) -> list[tuple[Place, ...]]:
    """Return those of the places that share a key with another one of another part or class, in groups."""
    found: dict[object, list[Place]] = {}
    for part, item in progress(places, "looking for copies", "image", delay=1):
        try:
            found.setdefault(key(image_root / item.path), []).append((part, item))
        except OSError:
            continue
    return [tuple(group) for group in found.values() if len({(part, item.label) for part, item in group}) > 1]


def _size(path: Path) -> int:
    return path.stat().st_size


def _ends(path: Path) -> tuple[bytes, bytes]:
    with path.open("rb") as file:
        start = file.read(_ENDS)
        file.seek(max(0, path.stat().st_size - _ENDS))
        return start, file.read(_ENDS)


def note_copies(copies: Copies, split: Split) -> None:
    """Print notes on copies, each with an example."""
    if copies.across_parts:
        (first, one), (second, other), *_ = copies.across_parts[0]
        note(
            f"{counted(len(copies.across_parts), 'image')} in two parts, for example {one.path} "
            f"({first}) and {other.path} "
            f"({second}): results are too good; --drop_copies leaves them out of train and val"
        )
    if copies.across_classes:
        (_, one), (_, other), *_ = copies.across_classes[0]
        names = split.class_names
        note(
            f"{counted(len(copies.across_classes), 'image')} in two classes, for example {one.path} "
            f"({names[one.label]}) and "
            f"{other.path} ({names[other.label]}); --drop_copies leaves them out, because their class is unknown"
        )


def without_copies(split: Split, copies: Copies) -> Split:
    """Return the split without copies: of images in two parts the one in test stays, else that in val; images in two
    classes are left out everywhere. Raise DatasetError if a class has no training image then."""
    left_out = {place for group in copies.across_classes for place in group}
    for group in copies.across_parts:
        stays = "test" if any(part == "test" for part, _ in group) else "val"
        left_out |= {(part, item) for part, item in group if part != stays}
    parts = {
        part: tuple(item for item in getattr(split, part) if (part, item) not in left_out)
        for part in ("train", "val", "test")
    }
    note(
        f"--drop_copies left out {sum(split.sizes) - sum(map(len, parts.values()))} of "
        f"{counted(sum(split.sizes), 'image')}"
    )
    empty = set(range(len(split.class_names))) - {item.label for item in parts["train"]}
    if empty:
        raise DatasetError(
            f"--drop_copies leaves no training image of {split.class_names[min(empty)]!r}: all are copies of test "
            "images or in two classes; add others"
        )
    if not parts["test"]:
        raise DatasetError("--drop_copies leaves no test image: all are in two classes; correct the classes")
    return replace(split, **parts)
