"""Few-shot draws: which images a seed picks. Pure functions of (items, shots, seed).

The rules are those of the code published with SO and with CLIP-LoRA, so that one seed picks the same images
there and here: val is drawn before train, both from one generator. CoOp draws train first: other picks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from datasets.task import Item

T = TypeVar("T")


def val_shots(shots: int) -> int:
    """Validation images per class for `shots` training images per class."""
    return min(shots, 4)


def draw(
    train: Sequence[Item], val: Sequence[Item], shots: int, seed: int
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Draw `shots` items per class from `train` and min(shots, 4) from `val`; return them as (train, val).

    Classes come in the order in which they first appear in their part. A class with fewer items than asked
    for is drawn with repeats, so that all classes weigh the same in training; otherwise no item occurs twice.
    """
    rng = random.Random(seed)
    few_val = _draw_part(val, val_shots(shots), rng)
    few_train = _draw_part(train, shots, rng)
    return few_train, few_val


def _draw_part(items: Sequence[Item], k: int, rng: random.Random) -> tuple[Item, ...]:
    groups: dict[int, list[Item]] = {}  # a dict keeps the order of first appearance
    for item in items:
        groups.setdefault(item.label, []).append(item)
    drawn: list[Item] = []
    for group in groups.values():
        drawn += rng.sample(group, k) if len(group) >= k else rng.choices(group, k=k)
    return tuple(drawn)


def draw_disjoint(images: Sequence[Sequence[T]], shots: int, seed: int) -> tuple[list[Sequence[T]], list[Sequence[T]]]:
    """Draw train and val from one pool per class, as for ImageNet; return (train, val), one list per class.

    `images[label]` are the images of a class; each must have at least shots + min(shots, 4) of them. One
    sample per class in label order: its first `shots` go to train, the rest to val.
    """
    rng = random.Random(seed)
    samples = [rng.sample(pool, shots + val_shots(shots)) for pool in images]
    return [sample[:shots] for sample in samples], [sample[shots:] for sample in samples]
