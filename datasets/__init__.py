"""Datasets for few-shot adaptation: `build` makes a Task from a name, a folder, a number of shots and a seed.

Example: `build("dtd", "/data", shots=4, seed=1)`. The loaders of batches are in `images.py`; `acquire/` downloads
datasets and examines them.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from common import counted, note

from .decoding import MAX_MEGAPIXELS, USUAL, Reading, read_image
from .digits import TEMPLATES as DIGITS_TEMPLATES
from .digits import DigitsTask, split_digits
from .fewshot import CLASSES, ORDERS, base_or_new, draw, draw_disjoint, val_shots
from .folder import ONLY_IMAGES, FolderTask, OwnImages, read_folder, summary
from .images import (
    augmented_loader,
    batches_per_epoch,
    default_workers,
    shuffled,
    test_loader,
    training_loader,
    workers_that_fit,
)
from .recorded import importer, replay, to_json
from .specs import RELEASED_TEMPLATES, SPECS, Found, departure, locate
from .splits import ImageNetListing, Split, folder_items, list_imagenet, read_split
from .supports import BALANCED, IMBALANCES, NOISES, Support, class_sizes, with_label_noise
from .task import DatasetError, Item, Task, check_images_exist, note_untested

__all__ = [
    "CLASSES",
    "IMBALANCES",
    "MAX_MEGAPIXELS",
    "NOISES",
    "ORDERS",
    "DatasetError",
    "Item",
    "OwnImages",
    "Reading",
    "Support",
    "Task",
    "augmented_loader",
    "available_datasets",
    "batches_per_epoch",
    "build",
    "check_images_exist",
    "default_workers",
    "is_test_only",
    "read_image",
    "shuffled",
    "test_loader",
    "to_json",
    "training_loader",
    "workers_that_fit",
]

_TASKS = {"digits": DigitsTask, "folder": FolderTask}
_TEMPLATES = {"digits": DIGITS_TEMPLATES, "folder": RELEASED_TEMPLATES}


def available_datasets() -> tuple[str, ...]:
    """Return the names that `build` knows: published datasets, the embedded `digits`, and `folder` (your images)."""
    return (*SPECS, "digits", "folder")


def is_test_only(name: str) -> bool:
    """Return whether dataset `name` has no training images."""
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
    test_part: str = "test",
    reading: Reading = USUAL,
    own: OwnImages = ONLY_IMAGES,
    support: Support = BALANCED,
) -> Task:
    """Read dataset `name` below `root_path` and draw `shots` training images per class.

    min(shots, 4) validation images per class are drawn too. The test part is never reduced. With `shots` None, it is
    the only part in the task. `digits` needs no folder and ignores `root_path`; for `folder`, `root_path` is your own
    folder or manifest. No image is opened here.

    `prompts` is "released" (`a photo of a {}.` for every dataset, as in the published runs) or "specific" (the
    dataset's own templates); `templates`, if any, replace them. `order` "coop" draws as CoOp does, "all" takes every
    training image. `classes` keeps only the "base" or the "new" half of the classes, after the draw. `split` is a file
    with the images of an earlier run, or of others, used instead of a draw. `support` makes classes unequal or labels
    wrong. `test_part` "val" evaluates the whole validation part instead of the test part: settings can
    be chosen on it without touching the test images. `reading` says how image files are read, `own` what you say about
    your own images.

    Raises DatasetError for data that are missing, misplaced or malformed.
    """
    specific = _TEMPLATES[name] if name in _TEMPLATES else SPECS[name].templates
    templates = tuple(templates) or (specific if prompts == "specific" else RELEASED_TEMPLATES)
    root = Path(root_path or "").expanduser()

    parts, image_root = _list_imagenet(root, shots) if name == "imagenet" else _read(name, root, own)
    train, val = _draw(name, parts, image_root, shots, seed, order, support) if shots else ((), ())
    test = parts.val if test_part == "val" else parts.test
    if not test:
        raise DatasetError(f"--test_part {test_part}: {name} has no validation part; use --test_part test")
    if name == "folder":
        note(summary(parts, templates))
    note_untested(image_root or name, parts.class_names, test)
    kind = _TASKS.get(name, Task)
    task = kind(name, parts.class_names, templates, train, val, test, image_root, test_part, reading)
    task = _choose(task, parts.labels, classes, split, shots)
    return with_label_noise(task, seed, support) if shots and support.label_noise else task


def _draw(
    name: str,
    parts: Split | ImageNetListing,
    image_root: Path | None,
    shots: int,
    seed: int,
    order: str,
    support: Support,
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Return the training and validation images that the seed selects."""
    if not parts.train:
        raise DatasetError(f"{name} has only a test part; train on another dataset and evaluate on this one")
    if name == "imagenet":
        counts = [len(names) - (0 if order == "coop" else val_shots(shots)) for names in parts.train]
        sizes = None if support.imbalance == "none" else class_sizes(counts, shots, seed, support)
        _check_imagenet(
            parts, image_root, [0] * len(counts) if order == "all" else sizes or [shots] * len(counts), shots
        )
        drawn = draw_disjoint(parts.train, shots, seed, order, sizes)
        return tuple(folder_items("train/", parts.wnids, names) for names in drawn)
    counts = Counter(item.label for item in parts.train)
    if support.imbalance != "none":
        sizes = class_sizes([counts[label] for label in range(len(parts.class_names))], shots, seed, support)
        return draw(parts.train, parts.val, shots, seed, order, dict(enumerate(sizes)))
    if order != "all":
        _note_repeats(name, parts, shots, order)
    return draw(parts.train, parts.val, shots, seed, order)


def _read(name: str, root: Path, own: OwnImages) -> tuple[Split, Path | None]:
    """Return the parts of a dataset other than imagenet, and its image root."""
    if name == "digits":
        return split_digits(), None
    if name == "folder":
        return read_folder(root, own)
    found = locate(name, root)
    parts = read_split(name, found)
    _note_departure(name, found, parts.class_names, parts.sizes)
    return parts, found.images


def _choose(
    task: Task, labels: Callable[[], dict[str, int]], classes: str, split: str | Path | None, shots: int | None
) -> Task:
    """Keep the chosen half of the classes, and replace the draw by a recorded split if there is one.

    `labels()` are the labels, by path, of all images that may be drawn. The files of others have all classes, a
    split.json has those of its run.
    """
    path = Path(split).expanduser() if split else None
    if path and not path.is_file():
        raise DatasetError(f"--split {path} is not a file; every run that draws images writes a split.json")
    imports = importer(path) if path else None
    if imports:
        task = imports(task, path, labels())
    if classes != "all":
        task = base_or_new(task, classes)
        if len(task.class_names) < 2 or not task.test:
            found = f"{counted(len(task.class_names), 'class')} and {counted(len(task.test), 'test image')}"
            raise DatasetError(f"--classes {classes}: this half of {task.name} has {found}; use --classes all")
    if path and not imports:
        task = replay(task, path)
    if path:
        used = task.train if task.test_part == "val" else (*task.train, *task.val)
        tested = {item.path for item in task.test} & {item.path for item in used}
        if tested:
            raise DatasetError(
                f"--split {path} trains on images of the {task.test_part} part, for example {min(tested)}; use another"
            )
        most = max(Counter(item.label for item in task.train).values(), default=0)
        if task.label_noise:  # wrong labels make some classes larger
            most = math.ceil(len(task.train) / len(task.class_names))
        if most != shots:
            raise DatasetError(f"--split {path} has up to {most} training images per class; give --shots {most}")
        if {item.label for item in task.train} != set(range(len(task.class_names))):
            raise DatasetError(
                f"--split {path} has no training images for some classes of {task.name}; check --classes"
            )
    return task


def _list_imagenet(root: Path, shots: int | None) -> tuple[ImageNetListing, Path]:
    """List ImageNet, which has no split file: train and val are drawn from its train folder, test is its val folder."""
    found = locate("imagenet", root)
    image_root = found.images
    listing = list_imagenet(image_root, with_train=shots is not None)
    n_train = sum(map(len, listing.train)) if shots else SPECS["imagenet"].sizes[0]
    _note_departure("imagenet", found, listing.class_names, (n_train, 0, len(listing.test)))
    return listing, image_root


def _check_imagenet(listing: ImageNetListing, image_root: Path, sizes: Sequence[int], shots: int) -> None:
    """Raise DatasetError if a class has too few images for its part of train, `sizes`, and for val."""
    for wnid, names, size in zip(listing.wnids, listing.train, sizes):
        needed = size + val_shots(shots)
        if len(names) < needed:
            raise DatasetError(
                f"{image_root / 'train' / wnid} has {counted(len(names), 'image')}, but "
                f"{counted(shots, 'shot')} need {needed} "
                f"({size} train, {val_shots(shots)} val); unpack the class again or ask for fewer shots"
            )


def _note_departure(name: str, found: Found, class_names: Sequence[str], sizes: tuple[int, int, int]) -> None:
    """Print a note if there are two copies of the dataset, or if its split is not the published one."""
    if found.copies:
        note(f"{name} is read from {found.folder}; {found.copies[0]} is another copy")
    unlike = departure(name, class_names, sizes)
    if unlike:
        note(f"{name} in {found.split or found.folder} has {unlike}")


def _note_repeats(name: str, split: Split, shots: int, order: str) -> None:
    """Print a note if classes have fewer images than shots."""
    counts = Counter(item.label for item in split.train)
    label = min(counts, key=counts.get)
    if counts[label] < shots:
        rule = "some are drawn twice or more" if order == "released" else "all of them are used, each once"
        note(
            f"{counted(sum(n < shots for n in counts.values()), 'class')} of {name} with fewer than {shots} training "
            f"images ({split.class_names[label]} has {counts[label]}); as in the published code, {rule}"
        )
