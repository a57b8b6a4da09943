"""Divides your own images into train, val and test where they have no parts, always in the same way."""

import random
from collections.abc import Mapping, Sequence

from common import note

from .classnames import also
from .errors import DatasetError
from .task import Item


def divide(images: Mapping[str, Sequence[str]], source: str) -> tuple[tuple[Item, ...], ...]:
    """Divide the images of each class into train, val and test as `divide_class` does, and print a note about it.

    The keys of `images` are the class names in label order; `source` is where they come from, for messages.
    """
    parts: tuple[list[Item], ...] = ([], [], [])
    single = [repr(name) for name, paths in images.items() if len(paths) < 2]
    if single:
        raise DatasetError(
            f"{source}: class {single[0]} has one image{also(single)}; each needs two, for training and for testing"
        )
    for label, paths in enumerate(images.values()):
        for part, chosen in zip(parts, divide_class(paths)):
            part += [Item(path, label) for path in chosen]
    note(
        f"{source} has no train, val and test parts; its images are divided 50/20/30 % per class, always in the same "
        "way, and the run's split.json lists them"
    )
    return tuple(map(tuple, parts))


def divide_class(paths: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Divide the images of a class, two or more, into 50 % train, 20 % val and 30 % test.

    The proportions are those of CoOp's splits. The division depends only on the paths: not on the run's seed, on their
    order, on the class name, or on other classes, which may be added later.
    """
    shuffled = random.Random(0).sample(sorted(paths), len(paths))
    test, val = round(0.3 * len(paths)), round(0.2 * len(paths))
    return shuffled[test + val :], shuffled[test : test + val], shuffled[:test]
