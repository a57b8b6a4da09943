"""What the harness knows of a dataset once it is read: items, a task, and how an item becomes a picture."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


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

    # The parts that split.json lists. The test part of a published dataset needs no list: it is never drawn.
    parts_to_record = ("train", "val")

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
                line = f"{part}\t{item.label}\t{item.path}\n"
                digest.update(line.encode("utf-8", "surrogateescape"))  # a file name may be no valid text
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
            line = f"{item.label}\t{path}\t{status.st_size}\t{status.st_mtime_ns}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def check_images_exist(task: Task) -> None:
    """Raise DatasetError, naming the first, if files of the task's images are missing.

    Whole folders are listed instead of asking for each file: 50,000 images take a moment, on a network disk too.
    """
    if task.image_root is None:
        return
    folders: dict[str, set[str]] = {}
    missing = []
    for item in dict.fromkeys((*task.train, *task.val, *task.test)):
        folder, _, name = item.path.rpartition("/")
        if folder not in folders:
            try:
                folders[folder] = set(os.listdir(task.image_root / folder))
            except OSError:
                folders[folder] = set()
        # A disk that ignores letter case lists a file under another name than it can be opened with.
        if name not in folders[folder] and not (task.image_root / item.path).exists():
            missing.append(item.path)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DatasetError(
            f"image {task.image_root / missing[0]}{more} of {task.name} cannot be found; is the dataset unpacked "
            "completely?"
        )


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
    """Decode the image file `path` completely and return it in RGB mode, as the published loaders do.

    A missing, empty, truncated or unreadable file raises DatasetError with its name; no other image takes its
    place.
    """
    return _decode(path, lambda image: image.convert("RGB"))


def read_upright_image(path: str | Path) -> Image.Image:
    """As `read_image`, for images of any origin: turned as the EXIF data say, transparency laid on white, 16 bits
    scaled to 8. Of animations and of files with several pages the first picture counts. Images of 32 bits a
    channel, whose range of values nothing tells, raise DatasetError.
    """
    return _decode(path, _to_upright_rgb)


def _to_upright_rgb(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        levels = np.asarray(image).astype(np.int64)  # convert would cut off everything above 255
        return Image.fromarray((levels // 256).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("nothing tells which of its 32-bit values is white; save it with 8 bits a channel")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")


def _decode(path: str | Path, to_rgb: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except FileNotFoundError as error:
        raise DatasetError(f"image {path} does not exist; is the dataset unpacked completely?") from error
    except PermissionError as error:
        raise DatasetError(f"image {path} may not be read; change its permissions") from error
    except UnidentifiedImageError as error:
        raise DatasetError(f"image {path} is empty or no image; unpack or download it again") from error
    except _DECODE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(f"image {path} cannot be decoded ({reason}); replace or remove it") from error
