"""A dataset once it is read: items and a task."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from common import counted, note

from .decoding import USUAL, Reading, read_image
from .errors import DatasetError


@dataclass(frozen=True)
class Item:
    """One labelled image. `path` is relative to the image root, with forward slashes on every system."""

    path: str
    label: int


@dataclass(frozen=True)
class Task:
    """A few-shot classification task.

    `class_names` are in label order and keep their underscores; two classes may share a name. `templates` are format
    strings with one `{}`; the first is used for training. `train` and `val` are few-shot draws. `test` are the images
    that are evaluated: the whole test part of the dataset or, with `test_part` "val", its whole validation part.
    `image_root` is None if the images are not files in a folder. `reading` says how their files are read. Of `train`
    the share `label_noise` has wrong labels, of the kind `noise_kind` (`supports.py`).
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    train: tuple[Item, ...]
    val: tuple[Item, ...]
    test: tuple[Item, ...]
    image_root: Path | None
    test_part: str = "test"
    reading: Reading = USUAL
    label_noise: float = 0.0
    noise_kind: str | None = None

    # The parts that split.json lists. The test part of a published dataset needs no list: it is never drawn.
    parts_to_record = ("train", "val")
    # The SHA-256 of all other data that a result depends on; None if name and split determine them.
    data_sha256 = None
    if_missing = "is the dataset unpacked completely? python -m datasets.doctor says what is missing"

    def read(self, item: Item) -> Image.Image:
        """Return the RGB image of `item`; raise DatasetError if its file is missing or damaged."""
        return read_image(self.image_root / item.path, self.reading)

    @property
    def split_sha256(self) -> str:
        """Return the SHA-256 (64 hex digits) of which images have which labels, in order, in train, val and test.

        Hashed is the UTF-8 text of one line `part TAB label TAB path NEWLINE` per item, where part is train, val or
        test: first all items of train, then val, then test, each in its own order.
        """
        digest = hashlib.sha256()
        for part, items in (("train", self.train), ("val", self.val), ("test", self.test)):
            for item in items:
                line = f"{part}\t{item.label}\t{item.path}\n"
                digest.update(line.encode("utf-8", "surrogateescape"))  # a file name may be no valid text
        return digest.hexdigest()

    @property
    def test_sha256(self) -> str:
        """Return the same hash as `split_sha256`, of `test` only."""
        return replace(self, train=(), val=()).split_sha256

    @property
    def largest_class_share(self) -> float:
        """Return how many per cent of the test images are of the largest class: the accuracy of always naming it."""
        return 100 * max(Counter(item.label for item in self.test).values()) / len(self.test)

    def fingerprint(self, items: Sequence[Item]) -> str:
        """Return the SHA-256 of how images are read and of the items' paths, labels, sizes and modification times."""
        digest = hashlib.sha256(type(self).__name__.encode())
        if self.reading.white_level is not None:
            digest.update(f" white at {self.reading.white_level}".encode())
        image_root = self.image_root.resolve()  # one folder has one fingerprint, whether its path is relative or not
        for item in items:
            path = image_root / item.path
            try:
                status = path.stat()
            except OSError as error:
                raise DatasetError(f"image {path}: {error.strerror}; {self.if_missing}") from error
            line = f"{item.label}\t{path}\t{status.st_size}\t{status.st_mtime_ns}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def check_images_exist(task: Task) -> None:
    """Raise DatasetError, naming the first, if files of the task's images are missing.

    Whole folders are listed instead of asking for each file: this is fast for 50,000 images, also on a network disk.
    """
    if task.image_root is None:
        return
    listed: dict[str, set[str]] = {}
    denied: dict[str, str] = {}
    missing = []
    for path in dict.fromkeys(item.path for item in (*task.train, *task.val, *task.test)):
        folder, _, name = path.rpartition("/")
        if folder not in listed:
            listed[folder] = set()
            try:
                listed[folder] = set(os.listdir(task.image_root / folder))
            except OSError as error:
                denied[folder] = error.strerror if isinstance(error, PermissionError) else ""
        # A disk that ignores letter case lists a file under another name than it can be opened with.
        if name not in listed[folder] and not os.path.exists(task.image_root / path):
            missing.append(path)
    if missing:
        folder = missing[0].rpartition("/")[0]
        if denied.get(folder):
            raise DatasetError(f"folder {task.image_root / folder}: {denied[folder]}; change its permissions")
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DatasetError(
            f"image {task.image_root / missing[0]}{more} of {task.name} cannot be found; {task.if_missing}"
        )


def note_untested(source: object, class_names: Sequence[str], test: Sequence[Item]) -> None:
    """Print a note if no image of some classes is evaluated; `source` is where the images come from."""
    untested = sorted(set(range(len(class_names))) - {item.label for item in test})
    if untested:
        note(
            f"{source}: no images of {counted(len(untested), 'class')} are evaluated, for example "
            f"{class_names[untested[0]]}; "
            "the accuracy is over the images of the others"
        )


def enumerated(things: Sequence[str], most: int = 10) -> str:
    """Return the first things separated by commas, and the number of the others."""
    more = len(things) - most
    return ", ".join(things[:most]) + (f" and {more} more" if more > 0 else "")
