"""The embedded dataset: scikit-learn's 1,797 handwritten digits, real scans of 8x8 pixels in 17 grey levels.

It needs no download. Like the other datasets it has a fixed split and few-shot draws; the ink is light on
dark ground, as in the data. Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits",
UCI Machine Learning Repository, of which scikit-learn carries the test part.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from .splits import Split
from .task import Item, Task

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("a photo of the number {}.",)

# Part of the definition of the dataset: another seed would be another split.
_SPLIT_SEED = 0


class DigitsTask(Task):
    """A Task whose pictures come from scikit-learn instead of a folder."""

    def read(self, item: Item) -> Image.Image:
        """Return the digit as an 8x8 RGB picture; grey level g of 0..16 becomes 255 g / 16, rounded."""
        levels, _ = _data()
        grey = np.rint(levels[int(item.path.removeprefix("digits/"))] * (255 / 16)).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")

    def fingerprint(self, items: Sequence[Item]) -> str:
        """SHA-256 of the chosen digits' pixels, paths and labels."""
        levels, _ = _data()
        listing = "\n".join(f"{item.label}\t{item.path}" for item in items)
        return hashlib.sha256(levels.tobytes() + listing.encode()).hexdigest()


@lru_cache(maxsize=1)
def _data() -> tuple[np.ndarray, np.ndarray]:
    """Grey levels, float [1797, 8, 8] with whole numbers from 0 to 16, and labels, int [1797]."""
    bunch = load_digits()
    return bunch.images, bunch.target


def split_digits() -> Split:
    """The fixed split: of each class 50 % train, 20 % val, the rest test, shuffled within the class.

    An item's path is `digits/` and its index in load_digits in four digits.
    """
    _, labels = _data()
    rng = random.Random(_SPLIT_SEED)
    parts: tuple[list[Item], list[Item], list[Item]] = ([], [], [])
    for label in range(len(CLASS_NAMES)):
        items = [Item(f"digits/{index:04d}", label) for index in np.flatnonzero(labels == label)]
        rng.shuffle(items)
        n_train, n_val = round(len(items) * 0.5), round(len(items) * 0.2)
        parts[0].extend(items[:n_train])
        parts[1].extend(items[n_train : n_train + n_val])
        parts[2].extend(items[n_train + n_val :])
    return Split(CLASS_NAMES, *map(tuple, parts))
