"""The embedded dataset: scikit-learn's 1,797 handwritten digits, real scans of 8x8 pixels in 17 grey levels.

It needs no download. Like the other datasets it has a fixed split and few-shot draws. The digits are light on a dark
background, as in the data. Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
Learning Repository; scikit-learn contains its test part.
"""

import hashlib
import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from .splits import Split
from .task import Item, Task

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("a photo of the number {}.",)

# Part of the dataset's definition: another seed would give another split.
_SPLIT_SEED = 0


class DigitsTask(Task):
    """A Task whose images come from scikit-learn instead of a folder."""

    def read(self, item: Item) -> Image.Image:
        """Return the digit as an 8x8 RGB image; grey level g of 0..16 becomes 255 g / 16, rounded."""
        levels, _ = _data()
        grey = np.rint(levels[int(item.path.removeprefix("digits/"))] * (255 / 16)).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")

    def fingerprint(self, items: Sequence[Item]) -> str:
        """Return the SHA-256 of all digits' pixels and of the items' paths and labels."""
        levels, _ = _data()
        listing = "\n".join(f"{item.label}\t{item.path}" for item in items)
        return hashlib.sha256(levels.tobytes() + listing.encode()).hexdigest()


@lru_cache(maxsize=1)
def _data() -> tuple[np.ndarray, np.ndarray]:
    """Return grey levels, float [1797, 8, 8] with whole numbers from 0 to 16, and labels, int [1797]."""
    from sklearn.datasets import load_digits  # takes more than a second to import

    bunch = load_digits()
    return bunch.images, bunch.target


def split_digits() -> Split:
    """Return the fixed split: 50 % of each class are train, 20 % val, the rest test, shuffled within the class.

    An item's path is `digits/` and its index in load_digits with four digits.
    """
    _, labels = _data()
    rng = random.Random(_SPLIT_SEED)
    train, val, test = [], [], []
    for label in range(len(CLASS_NAMES)):
        items = [Item(f"digits/{index:04d}", label) for index in np.flatnonzero(labels == label)]
        rng.shuffle(items)
        n_train, n_val = round(len(items) * 0.5), round(len(items) * 0.2)
        train += items[:n_train]
        val += items[n_train : n_train + n_val]
        test += items[n_train + n_val :]
    return Split(CLASS_NAMES, tuple(train), tuple(val), tuple(test))
