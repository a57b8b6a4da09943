"""Finds the parts train, val and test, or the classes, among the folders of your own images.

Recognised is only what is sure; anything else is rejected with the flag that decides.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import note

from .decoding import image_endings
from .errors import DatasetError
from .manifest import PARTS, tables_in
from .splits import scan
from .task import enumerated

# Folders that macOS, Windows, disks and tools add. Those that begin with a full stop are left out as well.
_SYSTEM_FOLDERS = {
    *("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"),
    *("__pycache__", "node_modules"),
}
_FILLERS = {"set", "sets", "image", "images", "img", "imgs", "picture", "pictures", "photo", "photos"}
_FILLERS |= {"data", "dataset", "split", "part", "folder", "dir", "files", "seg", "jpg", "png"}
# Images without classes, which competitions add.
_UNLABELLED = {"pred", "predict", "prediction", "predictions", "unlabeled", "unlabelled", "submission"}


@dataclass(frozen=True)
class OwnImages:
    """What you say about your own images beside their folder; every field is a flag of the same name."""

    train_dir: str | None = None
    val_dir: str | None = None
    test_dir: str | None = None
    classnames: str | None = None
    image_root: str | None = None
    drop_copies: bool = False

    @property
    def part_dirs(self) -> dict[str, str]:
        """The folders that were named, by part."""
        named = {"train": self.train_dir, "val": self.val_dir, "test": self.test_dir}
        return {part: folder for part, folder in named.items() if folder is not None}


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def subfolders(root: Path) -> list[str]:
    """Return the sorted names of the folders in `root`, without hidden ones; symbolic links are followed."""
    return sorted(entry.name for entry in scan(root) if not is_hidden(entry.name) and is_folder(entry))


def class_folders(root: Path) -> list[str]:
    """Return the sorted names of the folders in `root` that may be classes or parts. A note names those of programs."""
    folders = subfolders(root)
    programs = [name for name in folders if _is_of_a_program(root / name)]
    if programs:
        note(f"{root}: left out {', '.join(programs)}, which this program or another has written")
    return [name for name in folders if name not in programs]


def _is_of_a_program(folder: Path) -> bool:
    """Return whether a folder holds results, adapted weights or cached features of this program, or Python packages."""
    names = {entry.name for entry in scan(folder)}
    if "pyvenv.cfg" in names or any(name.startswith(".") and name.endswith(".lock") for name in names):
        return True
    if names and all(re.fullmatch(r"[0-9a-f]{64}\.safetensors", name) for name in names):
        return True
    saved = folder.glob("*/*/*shots/seed*/*.safetensors")
    return any((folder / name / "result.json").is_file() for name in subfolders(folder)) or any(saved)


def has_images(folder: Path) -> bool:
    """Return whether images lie directly in a folder."""
    return any(entry.name.lower().endswith(image_endings()) and not is_folder(entry) for entry in scan(folder))


def unwrapped(root: Path) -> Path:
    """Return the folder that holds parts or classes: `root`, or the only folder in it, and so on."""
    inner = root
    while (only := _only_folder(inner)) and not _meaning(only):
        inner = inner / only
    if inner != root:
        note(f"{root} holds only the folder {inner.relative_to(root)}; the images are read from there")
    return inner


def _only_folder(folder: Path) -> str | None:
    """Return the name of the only folder in a folder without images, if it has folders inside in its turn."""
    inner = subfolders(folder)
    return inner[0] if len(inner) == 1 and not has_images(folder) and subfolders(folder / inner[0]) else None


def named_parts(root: Path, own: OwnImages) -> dict[str, str]:
    """Return the folders, relative to `root`, that --train_dir and so on name. Raise DatasetError if one is wrong."""
    found = {}
    for part, named in own.part_dirs.items():
        folder = root / Path(named).expanduser()
        if not folder.is_dir():
            raise DatasetError(f"--{part}_dir {named}: there is no folder {folder}")
        if not folder.resolve().is_relative_to(root.resolve()):
            raise DatasetError(f"--{part}_dir {named} is not below --root_path {root}; name the folder above both")
        found[part] = os.path.relpath(folder.resolve(), root.resolve())
    lacking = [f"--{part}_dir" for part in ("train", "test") if part not in found]
    if lacking:
        raise DatasetError(f"--{min(found)}_dir needs {' and '.join(lacking)} as well")
    if len(set(found.values())) < len(found):
        raise DatasetError(f"--train_dir, --val_dir and --test_dir name a folder twice: {', '.join(found.values())}")
    return found


def find_parts(root: Path, folders: Sequence[str]) -> dict[str, str] | None:
    """Return the folder of each part among `folders`, or None if these are classes.

    Raise DatasetError, with the flags that decide, where both is possible.
    """
    known = {name: meaning for name in folders if (meaning := _meaning(name))}
    parts = {name: part for name, (part, rest) in known.items() if not rest or _has_partner(known, rest)}
    others = [name for name in folders if name not in parts and not _is_unlabelled(root / name)]
    # A single folder with the name of a part, but with images in it and classes beside it, is a class: trains, perhaps.
    if others and (len(parts) > 1 or any(subfolders(root / name) for name in parts)):
        raise DatasetError(
            f"{root} has folders that look like parts ({', '.join(parts)}) and other folders beside them "
            f"({others[0]}); name the parts with --train_dir and --test_dir, move the others elsewhere, or, if all are "
            "classes, list them in --classnames"
        )
    if others or not parts:
        _check_layout(root, folders)
        return None
    left_out = [name for name in folders if name not in parts]
    if left_out:
        note(f"{root}: left out {', '.join(left_out)}, which has no class folders")
    found: dict[str, str] = {}
    for name, part in parts.items():
        if found.setdefault(part, name) != name:
            raise DatasetError(
                f"{root} has the folders {found[part]} and {name}, which mean the same part; choose with --{part}_dir"
            )
    _check_class_folders(root, found)
    for part in ("train", "test"):
        if part not in found:
            instead = "name it with --train_dir and --test_dir"
            if part == "test" and "val" in found:
                flags = f"--root_path {root} --train_dir {found['train']} --test_dir {found['val']}"
                instead = f"test on {found['val']} with {flags}"
            raise DatasetError(
                f"{root} has {' and '.join(parts)} but no {part} folder; add it, {instead}, or move the class folders "
                f"into {root} itself, where they are divided automatically"
            )
    return {part: _deepest(root, name) for part, name in found.items()}


def _meaning(name: str) -> tuple[str, tuple[str, ...]] | None:
    """Return the part that a folder's name means, and what else the name says; None if it means none."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    words = [piece for word in words for piece in _split_set(word)]
    meant = {PARTS[word] for word in words if word in PARTS}
    rest = tuple(word for word in words if word not in PARTS and word not in _FILLERS)
    return (min(meant), rest) if len(meant) == 1 else None


def _split_set(word: str) -> list[str]:
    """Split trainset and testset."""
    start = word.removesuffix("set").removesuffix("data").removesuffix("images")
    return [start] if start in PARTS else [word]


def _has_partner(known: dict[str, tuple], rest: tuple[str, ...]) -> bool:
    """Return whether two parts have this rest in their names, as animals_train and animals_test."""
    return len({part for part, other in known.values() if other == rest}) > 1


def _is_unlabelled(folder: Path) -> bool:
    """Return whether a folder has images without classes, as its name says."""
    words = set(re.split(r"[^a-z0-9]+", folder.name.lower()))
    if not words & _UNLABELLED:
        return False
    inner = subfolders(folder)
    return not inner or (len(inner) == 1 and not subfolders(folder / inner[0]))


def _deepest(root: Path, name: str) -> str:
    """Return the folder with the classes of a part: `name`, or the only folder in it, as in seg_train/seg_train."""
    while only := _only_folder(root / name):
        name = f"{name}/{only}"
    return name


def _check_class_folders(root: Path, found: dict[str, str]) -> None:
    """Raise DatasetError if a part, of `found`, has images but no folders of classes."""
    flat = [name for name in found.values() if has_images(root / name) and not subfolders(root / name)]
    if not flat:
        return
    tables = [folder / name for folder in (root, root / flat[0]) for name in tables_in(folder)]
    remedy = f"name a table of the images and their classes as --root_path{f', perhaps {tables[0]}' if tables else ''}"
    if "train" in found and found["train"] not in flat:
        remedy += f"; or use --root_path {root / found['train']}, whose images are divided automatically"
    raise DatasetError(
        f"{root / flat[0]} has images but no class folders; move the images of each class into a folder, or {remedy}"
    )


def _check_layout(root: Path, folders: Sequence[str]) -> None:
    """Look at the folders in class folders. Raise DatasetError if they are parts; note if they may be the classes."""
    inner = {name: subfolders(root / name) for name in folders if not has_images(root / name)}
    inner = {name: names for name, names in inner.items() if names}
    if not inner:
        return
    first, names = next(iter(inner.items()))
    if all(name.lower() in PARTS for names in inner.values() for name in names):
        raise DatasetError(
            f"{root} has the parts inside the classes ({first}/{names[0]}); move them to {names[0]}/{first}, or write "
            "a manifest.csv"
        )
    common = set.intersection(*map(set, inner.values())) if len(inner) > 1 else set()
    if len(common) > 1 and len(inner) == len(folders):
        second = list(inner)[1]
        note(
            f"{root}: all folders have the same folders inside ({enumerated(sorted(common), 3)}). If these are the "
            f"classes and {first} and {second} are domains, use --root_path {root / first}, or --root_path {root} "
            f"--train_dir {first} --test_dir {second}; now {first}, {second} are the classes"
        )
    else:
        note(f"{root}: images in {first}/{names[0]} and other inner folders count for their class, {first}")
