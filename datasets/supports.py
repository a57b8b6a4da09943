"""Support sets as they are in life: every image, classes of unequal size, wrong labels. Pure functions of their seed.

Classes of unequal size follow one of two published recipes. "natural": shots x classes images, divided as the classes
of the training part are, at least one each ("relaxed" in arXiv 2506.17500, Few-Shot, Now for Real). "long_tail": from
`shots` images in the largest class down to shots / ratio in the smallest, exponentially (as the long-tailed CIFAR of
arXiv 1901.05555); which class is large is drawn.

Wrong labels, as in arXiv 2412.01256 (NLPrompt): the given share of all support images, drawn at random, gets another
label: any other class with equal probability ("symmetric"), or the next class, and the first after the last
("pair_flip").
"""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import DatasetError
from .task import Item, Task

IMBALANCES = ("none", "natural", "long_tail")
NOISES = ("symmetric", "pair_flip")


@dataclass(frozen=True)
class Support:
    """How a support set differs from equally many, rightly labelled images of each class."""

    imbalance: str = "none"
    imbalance_ratio: float = 10.0
    label_noise: float = 0.0
    noise_kind: str = "symmetric"


BALANCED = Support()


def class_sizes(counts: Sequence[int], shots: int, seed: int, support: Support) -> list[int]:
    """Return how many images to draw of each class, of which the training part has `counts` images."""
    if support.imbalance == "natural":
        return _natural_sizes(counts, shots * len(counts))
    ranks = random.Random(f"long tail {seed}").sample(range(len(counts)), len(counts))
    last = max(len(counts) - 1, 1)
    wanted = [max(1, int(shots * support.imbalance_ratio ** (-rank / last) + 1e-9)) for rank in ranks]
    return [min(size, count) for size, count in zip(wanted, counts)]


def _natural_sizes(counts: Sequence[int], images: int) -> list[int]:
    """Divide `images` as `counts` are. What rounding up the smallest classes costs is taken from the largest."""
    total = sum(counts)
    sizes = [max(1, round(images * count / total)) for count in counts]
    while sum(sizes) > images and max(sizes) > 1:
        sizes[sizes.index(max(sizes))] -= 1
    return [min(size, count) for size, count in zip(sizes, counts)]


def with_label_noise(task: Task, seed: int, support: Support) -> Task:
    """Return the task with wrong labels among its training images; val and test keep theirs.

    Raise DatasetError if no label would change, if a class is left without images, or if labels are wrong already.
    """
    rate, classes = support.label_noise, len(task.class_names)
    wrong = int(rate * len(task.train))
    if task.label_noise:
        raise DatasetError(f"--split has {task.label_noise:.0%} wrong labels already; leave --label_noise out")
    if not wrong:
        raise DatasetError(
            f"--label_noise {rate} of {len(task.train)} images is none; give a higher rate or more shots"
        )
    rng = random.Random(f"label noise {seed}")
    chosen = set(rng.sample(range(len(task.train)), wrong))
    train = tuple(
        Item(item.path, _other(item.label, classes, support.noise_kind, rng)) if position in chosen else item
        for position, item in enumerate(task.train)
    )
    empty = set(range(classes)) - {item.label for item in train}
    if empty:
        raise DatasetError(
            f"--label_noise {rate} leaves no image with the label {task.class_names[min(empty)]!r}; lower it, or give "
            "more --shots or another --seed"
        )
    return dataclasses.replace(task, train=train, label_noise=rate, noise_kind=support.noise_kind)


def _other(label: int, classes: int, kind: str, rng: random.Random) -> int:
    if kind == "pair_flip":
        return (label + 1) % classes
    return (label + rng.randrange(1, classes)) % classes
