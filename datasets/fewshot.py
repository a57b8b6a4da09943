"""Few-shot draws: which images a seed picks. Pure functions of (items, shots, seed).

The rules are those of the code published with SO and with CLIP-LoRA, so that one seed picks the same images
there and here: val is drawn before train, both from one generator. CoOp draws train first, which gives other
picks; its order can be chosen, so that runs compare across papers.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import TypeVar

from .task import Item, Task

T = TypeVar("T")

ORDERS = ("released", "coop")
CLASSES = ("all", "base", "new")


def val_shots(shots: int) -> int:
    """Validation images per class for `shots` training images per class."""
    return min(shots, 4)


def draw(
    train: Sequence[Item], val: Sequence[Item], shots: int, seed: int, order: str = "released"
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Draw `shots` items per class from `train` and min(shots, 4) from `val`; return them as (train, val).

    Classes come in the order in which they first appear in their part. By default a class with fewer items than asked
    for is drawn with repeats, so that all classes weigh the same in training; otherwise no item occurs twice.
    `order` "coop" draws train before val, and takes all items of a class that has too few.
    """
    rng = random.Random(seed)
    if order == "coop":
        few_train = _draw_part(train, shots, rng, repeat=False)
        return few_train, _draw_part(val, val_shots(shots), rng, repeat=False)
    few_val = _draw_part(val, val_shots(shots), rng)
    few_train = _draw_part(train, shots, rng)
    return few_train, few_val


def _draw_part(items: Sequence[Item], k: int, rng: random.Random, repeat: bool = True) -> tuple[Item, ...]:
    groups: dict[int, list[Item]] = {}  # a dict keeps the order of first appearance
    for item in items:
        groups.setdefault(item.label, []).append(item)
    drawn: list[Item] = []
    for group in groups.values():
        if len(group) >= k:
            drawn += rng.sample(group, k)
        else:
            drawn += rng.choices(group, k=k) if repeat else group
    return tuple(drawn)


def draw_disjoint(
    images: Sequence[Sequence[T]], shots: int, seed: int, order: str = "released"
) -> tuple[list[Sequence[T]], list[Sequence[T]]]:
    """Draw train and val from one pool per class, as for ImageNet; return (train, val), one list per class.

    `images[label]` are the images of a class; each must have at least shots + min(shots, 4) of them. One
    sample per class in label order: its first `shots` go to train, the rest to val. With `order` "coop" the sample has
    `shots` images and val stays empty: CoOp takes ImageNet's test images for val, which nothing here may do.
    """
    rng = random.Random(seed)
    size = shots + (val_shots(shots) if order == "released" else 0)
    samples = [rng.sample(pool, size) for pool in images]
    return [sample[:shots] for sample in samples], [sample[shots:] for sample in samples]


def base_or_new(task: Task, classes: str) -> Task:
    """The half of `task` that the base-to-new protocol names: "base" is the first ceil(C / 2) classes, "new" the rest
    (Zhou et al. 2022, CoCoOp, section 4.1). Labels count from 0 again."""
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
