"""Datasets for few-shot adaptation: `build` makes a Task from a name, a folder, a number of shots and a seed.

Example: `build("dtd", "/data", shots=4, seed=1)`. The loaders of batches are in `images.py`.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from datasets.digits import CLASS_NAMES, TEMPLATES, DigitsTask, split_digits
from datasets.fewshot import draw, draw_disjoint, val_shots
from datasets.images import (
    augmented_loader,
    batches_per_epoch,
    default_workers,
    read_image,
    test_loader,
    training_loader,
)
from datasets.specs import RELEASED_TEMPLATES, SPECS, Found, locate
from datasets.splits import Split, list_imagenet, read_fgvc_split, read_json_split
from datasets.task import DatasetError, Item, Task

__all__ = [
    "DatasetError",
    "Item",
    "Task",
    "augmented_loader",
    "available_datasets",
    "batches_per_epoch",
    "build",
    "default_workers",
    "read_image",
    "test_loader",
    "training_loader",
]


def available_datasets() -> tuple[str, ...]:
    """The names that `build` knows; the embedded `digits` is the last."""
    return (*SPECS, "digits")


def build(name: str, root_path: str | Path | None, shots: int, seed: int, prompts: str = "released") -> Task:
    """Read dataset `name` below `root_path` and draw `shots` training images per class.

    Validation images are drawn too, min(shots, 4) per class. The test part stays whole.
    `prompts` is "released" (`a photo of a {}.` for every dataset, as in the published runs) or "specific"
    (the dataset's own templates). `digits` needs no folder and ignores `root_path`. No image is opened here.
    Raises ValueError for bad arguments and DatasetError for data that are missing, misplaced or malformed.
    """
    if name not in available_datasets():
        raise ValueError(f"unknown dataset {name!r}; known are {', '.join(available_datasets())}")
    if shots < 1:
        raise ValueError(f"shots must be at least 1, not {shots}")
    if prompts not in ("released", "specific"):
        raise ValueError(f"prompts must be 'released' or 'specific', not {prompts!r}")
    specific = TEMPLATES if name == "digits" else SPECS[name].templates
    templates = specific if prompts == "specific" else RELEASED_TEMPLATES
    if name == "digits":
        split = split_digits()
        _note_repeats(name, split, shots)
        train, val = draw(split.train, split.val, shots, seed)
        return DigitsTask(name, CLASS_NAMES, templates, train, val, split.test, image_root=None)
    found = locate(name, Path(root_path).expanduser())
    if name == "imagenet":
        return _build_imagenet(found.images, templates, shots, seed)
    split = read_fgvc_split(found.folder) if name == "fgvc" else read_json_split(found.split)
    _note_departure(name, found, split)
    _note_repeats(name, split, shots)
    train, val = draw(split.train, split.val, shots, seed)
    return Task(name, split.class_names, templates, train, val, split.test, found.images)


def _build_imagenet(image_root: Path, templates: tuple[str, ...], shots: int, seed: int) -> Task:
    """ImageNet has no split file: train and val come from its train folder, test is its val folder."""
    listing = list_imagenet(image_root)
    needed = shots + val_shots(shots)
    for wnid, names in zip(listing.wnids, listing.train):
        if len(names) < needed:
            raise DatasetError(
                f"{image_root / 'train' / wnid} holds {len(names)} images, but {shots} shots take {needed} "
                f"({shots} train, {val_shots(shots)} val); unpack the class again or ask for fewer shots"
            )
    train, val = (
        tuple(
            Item(f"train/{wnid}/{name}", label)
            for label, (wnid, names) in enumerate(zip(listing.wnids, drawn))
            for name in names
        )
        for drawn in draw_disjoint(listing.train, shots, seed)
    )
    return Task("imagenet", listing.class_names, templates, train, val, listing.test, image_root)


def _note_departure(name: str, found: Found, split: Split) -> None:
    """Say on stderr that a split is not the published one: that may be meant, but figures don't compare."""
    spec = SPECS[name]
    here = (len(split.class_names), len(split.train), len(split.val), len(split.test))
    published = (spec.classes, *spec.sizes)
    if here != published:
        print(
            f"note: {name} in {found.split or found.folder} has {here[0]} classes and "
            f"{here[1]}/{here[2]}/{here[3]} train/val/test images, the published split {published[0]} and "
            f"{published[1]}/{published[2]}/{published[3]}; results do not compare with published ones",
            file=sys.stderr,
        )


def _note_repeats(name: str, split: Split, shots: int) -> None:
    """Say on stderr that classes have fewer images than shots, so that the draw repeats some of them."""
    counts = Counter(item.label for item in split.train)
    label, fewest = min(counts.items(), key=lambda pair: pair[1])
    if fewest < shots:
        print(
            f"note: {sum(n < shots for n in counts.values())} classes of {name} have fewer than {shots} training "
            f"images ({split.class_names[label]} has {fewest}); as in the published code some are drawn twice or more",
            file=sys.stderr,
        )
