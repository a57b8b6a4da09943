"""What the harness knows of a dataset once it is read: items, a task, and how an item becomes a picture."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError


class DatasetError(Exception):
    """A mistake in the data that the user can mend: its message, one line, names the file and the remedy."""


@dataclass(frozen=True)
class Item:
    """One labelled image. `path` is relative to the image root and has forward slashes on every system."""

    path: str
    label: int


@dataclass(frozen=True)
class Task:
    """A few-shot classification task.

    `class_names` stand in label order and keep their underscores; two classes may share a name. `templates`
    are format strings with one `{}`; the first is the one to train with. `train` and `val` are few-shot
    draws, `test` is the whole test part. `image_root` is None where the images do not lie in a folder.
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    train: tuple[Item, ...]
    val: tuple[Item, ...]
    test: tuple[Item, ...]
    image_root: Path | None

    def read(self, item: Item) -> Image.Image:
        """Return the RGB picture of `item`; raise DatasetError if its file is missing or damaged."""
        return read_image(self.image_root / item.path)

    @property
    def split_sha256(self) -> str:
        """SHA-256 (64 hex digits) over which images carry which labels, in order, in the three parts.

        Hashed is the UTF-8 text made of one line `part TAB label TAB path NEWLINE` per item, where part is
        train, val or test: first all train items, then val, then test, each in its own order.
        """
        digest = hashlib.sha256()
        for part, items in (("train", self.train), ("val", self.val), ("test", self.test)):
            for item in items:
                digest.update(f"{part}\t{item.label}\t{item.path}\n".encode())
        return digest.hexdigest()

    def fingerprint(self, items: Sequence[Item]) -> str:
        """SHA-256 of paths, labels, sizes and times of change of the images: another one if any of them changes.

        Raises DatasetError if an image is missing.
        """
        digest = hashlib.sha256()
        for item in items:
            path = self.image_root / item.path
            try:
                status = path.stat()
            except OSError as error:
                raise DatasetError(f"image {path}: {error.strerror}; is the dataset unpacked completely?") from error
            digest.update(f"{item.label}\t{path}\t{status.st_size}\t{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()


# What Pillow's decoders raise on damaged files, for want of a common base class.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def read_image(path: str | Path) -> Image.Image:
    """Decode the image file `path` completely and return it in RGB mode.

    A missing, empty, truncated or unreadable file raises DatasetError with its name; no other image takes its
    place.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise DatasetError(f"image {path} does not exist; is the dataset unpacked completely?") from error
    except PermissionError as error:
        raise DatasetError(f"image {path} may not be read; change its permissions") from error
    except UnidentifiedImageError as error:
        raise DatasetError(f"image {path} is empty or no image; unpack or download it again") from error
    except _DECODE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(f"image {path} is damaged ({reason}); unpack or download it again") from error
