"""Few-shot draws: which images a seed selects. Pure functions of (items, shots, seed).

The rules are those of the code published with SO and with CLIP-LoRA, so that a seed selects the same images there and
here: val is drawn before train, both from one generator. CoOp draws train first, which selects other images; the order
"coop" does so too, for comparisons with papers that use it. "all" takes every training image.
"""

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence

from .task import Item, Task

ORDERS = ("released", "coop", "all")
CLASSES = ("all", "base", "new")


def val_shots(shots: int) -> int:
    """Return the number of validation images per class for `shots` training images per class."""
    return min(shots, 4)


def draw(
    train: Sequence[Item],
    val: Sequence[Item],
    shots: int,
    seed: int,
    order: str = "released",
    sizes: Mapping[int, int] | None = None,
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Draw `shots` items per class from `train` and min(shots, 4) from `val`; return (train, val).

    Classes are in the order in which they first appear in their part. A class with enough items is drawn without
    repeats. A class with too few is drawn with repeats, so that all classes have the same weight in training. `order`
    "coop" draws train before val, and takes all items of a class with too few; "all" takes all items of all. `sizes`
    are, by label, the items to draw from `train` instead of `shots`, never with repeats.
    """
    rng = random.Random(seed)
    if order == "coop":
        few_train = _draw_part(train, sizes or shots, rng, repeat=False)
        return few_train, _draw_part(val, val_shots(shots), rng, repeat=False)
    few_val = _draw_part(val, val_shots(shots), rng)
    few_train = tuple(train) if order == "all" else _draw_part(train, sizes or shots, rng, repeat=sizes is None)
    return few_train, few_val


def _draw_part(
    items: Sequence[Item], sizes: int | Mapping[int, int], rng: random.Random, repeat: bool = True
) -> tuple[Item, ...]:
    groups: dict[int, list[Item]] = {}  # a dict keeps the order of first appearance
    for item in items:
        groups.setdefault(item.label, []).append(item)
    drawn: list[Item] = []
    for label, group in groups.items():
        k = sizes if isinstance(sizes, int) else sizes[label]
        if len(group) >= k:
            drawn += rng.sample(group, k)
        else:
            drawn += rng.choices(group, k=k) if repeat else group
    return tuple(drawn)


def draw_disjoint(
    images: Sequence[Sequence[str]],
    shots: int,
    seed: int,
    order: str = "released",
    sizes: Sequence[int] | None = None,
) -> tuple[list[list[str]], list[list[str]]]:
    """Draw train and val from one pool per class, as for ImageNet; return (train, val), one list per class.

    `images[label]` are the images of a class; each must have at least shots + min(shots, 4). In label order, one sample
    is drawn per class: its first `shots` images go to train, the rest to val. With `order` "coop" the sample has only
    `shots` images, and val is empty: CoOp uses ImageNet's test images as val, which this project never does. `sizes`
    are the images of each class to draw for train instead of `shots`; with `order` "all" these are all but val's.
    """
    rng = random.Random(seed)
    val_size = 0 if order == "coop" else val_shots(shots)
    if order == "all":
        sizes = [len(pool) - val_size for pool in images]
    sizes = sizes or [shots] * len(images)
    samples = [rng.sample(pool, size + val_size) for pool, size in zip(images, sizes)]
    train = [sample[:size] for sample, size in zip(samples, sizes)]
    return train, [sample[size:] for sample, size in zip(samples, sizes)]


def base_or_new(task: Task, classes: str) -> Task:
    """Return the half of `task` that the base-to-new protocol uses (Zhou et al. 2022, CoCoOp, section 4.1).

    "base" is the first ceil(C / 2) of the C classes, "new" the rest. Labels start from 0 again.
    """
    middle = math.ceil(len(task.class_names) / 2)
    first, end = (0, middle) if classes == "base" else (middle, len(task.class_names))
    parts = {
        part: tuple(
            dataclasses.replace(item, label=item.label - first)
            for item in getattr(task, part)
            if first <= item.label < end
        )
        for part in ("train", "val", "test")
    }
    return dataclasses.replace(task, class_names=task.class_names[first:end], **parts)
