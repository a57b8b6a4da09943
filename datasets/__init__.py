"""Datasets for few-shot adaptation: `build` makes a Task from a name, a folder, a number of shots and a seed.

Example: `build("dtd", "/data", shots=4, seed=1)`. The loaders of batches are in `images.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from .digits import TEMPLATES as DIGITS_TEMPLATES
from .digits import DigitsTask, split_digits
from .fewshot import CLASSES, ORDERS, base_or_new, draw, draw_disjoint, val_shots
from .folder import TEMPLATES as FOLDER_TEMPLATES
from .folder import FolderTask, read_folder
from .images import (
    augmented_loader,
    batches_per_epoch,
    default_workers,
    read_image,
    test_loader,
    training_loader,
)
from .recorded import import_coop, replay, to_json
from .specs import RELEASED_TEMPLATES, SPECS, Found, departure, locate
from .splits import ImageNetListing, Split, list_imagenet, read_split
from .task import DatasetError, Item, Task, check_images_exist, note, printable

__all__ = [
    "CLASSES",
    "ORDERS",
    "DatasetError",
    "Item",
    "Task",
    "augmented_loader",
    "available_datasets",
    "batches_per_epoch",
    "build",
    "check_images_exist",
    "default_workers",
    "is_test_only",
    "note",
    "printable",
    "read_image",
    "test_loader",
    "to_json",
    "training_loader",
]

_TASKS = {"digits": DigitsTask, "folder": FolderTask}
_TEMPLATES = {"digits": DIGITS_TEMPLATES, "folder": FOLDER_TEMPLATES}


def available_datasets() -> tuple[str, ...]:
    """The names that `build` knows: published ones, the embedded `digits`, and `folder`, the user's own."""
    return (*SPECS, "digits", "folder")


def is_test_only(name: str) -> bool:
    """Whether dataset `name` has nothing to train with."""
    return name in SPECS and SPECS[name].is_test_only


def build(
    name: str,
    root_path: str | Path | None,
    shots: int | None,
    seed: int,
    prompts: str = "released",
    *,
    templates: Sequence[str] = (),
    order: str = "released",
    classes: str = "all",
    split: str | Path | None = None,
) -> Task:
    """Read dataset `name` below `root_path` and draw `shots` training images per class.

    Validation images are drawn too, min(shots, 4) per class. The test part stays whole. With `shots` None it is all
    that is read. `digits` needs no folder and ignores `root_path`; for `folder` it is one's own folder or manifest.
    No image is opened here.

    `prompts` is "released" (`a photo of a {}.` for every dataset, as in the published runs) or "specific"
    (the dataset's own templates); `templates`, if any, replace them. `order` "coop" draws as CoOp does. `classes`
    restricts the task to the "base" or the "new" half of its classes, after the draw. `split` is the file of an
    earlier run's images, to take instead of a draw.

    Raises ValueError for bad arguments and DatasetError for data that are missing, misplaced or malformed.
    """
    known = {"name": available_datasets(), "prompts": ("released", "specific"), "order": ORDERS, "classes": CLASSES}
    for argument, value in {"name": name, "prompts": prompts, "order": order, "classes": classes}.items():
        if value not in known[argument]:
            word = "dataset" if argument == "name" else argument
            raise ValueError(f"unknown {word} {value!r}; known are {', '.join(known[argument])}")
    if shots is not None and shots < 1:
        raise ValueError(f"shots must be at least 1, not {shots}")
    specific = _TEMPLATES[name] if name in _TEMPLATES else SPECS[name].templates
    templates = tuple(templates) or (specific if prompts == "specific" else RELEASED_TEMPLATES)
    root = Path(root_path or "").expanduser()

    if name == "imagenet":
        listing, image_root = _list_imagenet(root, shots)
        train, val = _draw_imagenet(listing, shots, seed, order)
        task = Task(name, listing.class_names, templates, train, val, listing.test, image_root)
        pool = listing.labels
    else:
        parts, image_root = _read(name, root)
        if shots and not parts.train:
            raise DatasetError(f"{name} has a test part alone; train on another data set and evaluate on this one")
        if shots:
            _note_repeats(name, parts, shots, order)
        train, val = draw(parts.train, parts.val, shots, seed, order) if shots else ((), ())
        kind = _TASKS.get(name, Task)
        task = kind(name, parts.class_names, templates, train, val, parts.test, image_root)
        pool = parts.labels
    return _choose(task, pool, classes, split, shots)


def _read(name: str, root: Path) -> tuple[Split, Path | None]:
    """The parts of a dataset and its image root."""
    if name == "digits":
        return split_digits(), None
    if name == "folder":
        return read_folder(root)
    found = locate(name, root)
    parts = read_split(name, found)
    _note_departure(name, found, parts.class_names, (len(parts.train), len(parts.val), len(parts.test)))
    return parts, found.images


def _choose(
    task: Task, pool: Callable[[], dict[str, int]], classes: str, split: str | Path | None, shots: int | None
) -> Task:
    """The chosen half of the classes, and a recorded split if there is one; `pool()` are the labels of all images
    that may be drawn. CoOp's files know all classes, this program's those of the run."""
    path = Path(split).expanduser() if split else None
    if path and not path.is_file():
        raise DatasetError(f"--split {path} is no file; every run writes a split.json into its folder")
    from_coop = path is not None and path.suffix == ".pkl"
    if from_coop:
        task = import_coop(task, path, pool())
    if classes != "all":
        task = base_or_new(task, classes)
        if len(task.class_names) < 2 or not task.test:
            found = f"{len(task.class_names)} classes and {len(task.test)} test images"
            raise DatasetError(f"--classes {classes}: this half of {task.name} has {found}; use --classes all")
    if path and not from_coop:
        task = replay(task, path)
    if path:
        tested = {item.path for item in task.test} & {item.path for item in (*task.train, *task.val)}
        if tested:
            raise DatasetError(f"--split {path} trains on images of the test part, {min(tested)} for one")
        most = max(Counter(item.label for item in task.train).values(), default=0)
        if most != shots:
            raise DatasetError(f"--split {path} has up to {most} training images per class; give --shots {most}")
        if {item.label for item in task.train} != set(range(len(task.class_names))):
            raise DatasetError(f"--split {path} has no training images for some of the classes of {task.name}")
    return task


def _list_imagenet(root: Path, shots: int | None) -> tuple[ImageNetListing, Path]:
    """ImageNet has no split file: train and val come from its train folder, test is its val folder."""
    found = locate("imagenet", root)
    image_root = found.images
    listing = list_imagenet(image_root, with_train=shots is not None)
    n_train = sum(map(len, listing.train)) if shots else SPECS["imagenet"].sizes[0]
    _note_departure("imagenet", found, listing.class_names, (n_train, 0, len(listing.test)))
    needed = shots + val_shots(shots) if shots else 0
    for wnid, names in zip(listing.wnids, listing.train):
        if len(names) < needed:
            raise DatasetError(
                f"{image_root / 'train' / wnid} holds {len(names)} images, but {shots} shots take {needed} "
                f"({shots} train, {val_shots(shots)} val); unpack the class again or ask for fewer shots"
            )
    return listing, image_root


def _draw_imagenet(
    listing: ImageNetListing, shots: int | None, seed: int, order: str
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    train, val = draw_disjoint(listing.train, shots, seed, order) if shots else ((), ())
    return tuple(
        tuple(
            Item(f"train/{wnid}/{name}", label)
            for label, (wnid, names) in enumerate(zip(listing.wnids, drawn))
            for name in names
        )
        for drawn in (train, val)
    )


def _note_departure(name: str, found: Found, class_names: Sequence[str], sizes: tuple[int, int, int]) -> None:
    """Say on stderr what the user may not expect: there are two copies, or the split is not the published one."""
    if found.copies:
        note(f"{name} is read from {found.folder}; {found.copies[0]} is another copy")
    unlike = departure(name, class_names, sizes)
    if unlike:
        note(f"{name} in {found.split or found.folder} has {unlike}")


def _note_repeats(name: str, split: Split, shots: int, order: str) -> None:
    """Say on stderr that classes have fewer images than shots, so that the draw repeats some of them."""
    counts = Counter(item.label for item in split.train)
    label, fewest = min(counts.items(), key=lambda pair: pair[1], default=(0, shots))
    if fewest < shots:
        rule = "some are drawn twice or more" if order == "released" else "these classes have fewer"
        note(
            f"{sum(n < shots for n in counts.values())} classes of {name} have fewer than {shots} training "
            f"images ({split.class_names[label]} has {fewest}); as in the published code {rule}"
        )
