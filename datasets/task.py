"""A dataset once it is read: items, a task, and how the file of an item becomes an image."""

import hashlib
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from common import UserError, note


class DatasetError(UserError):
    """A mistake in the data that the user can correct. The message is one line that names the file and the remedy."""


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
    `image_root` is None if the images are not files in a folder.
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    train: tuple[Item, ...]
    val: tuple[Item, ...]
    test: tuple[Item, ...]
    image_root: Path | None
    test_part: str = "test"

    # The parts that split.json lists. The test part of a published dataset needs no list: it is never drawn.
    parts_to_record = ("train", "val")
    # The SHA-256 of all other data that a result depends on; None if name and split determine them.
    data_sha256 = None
    if_missing = "is the dataset unpacked completely? python -m datasets.doctor says what is missing"

    def read(self, item: Item) -> Image.Image:
        """Return the RGB image of `item`; raise DatasetError if its file is missing or damaged."""
        return read_image(self.image_root / item.path)

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
            f"{source}: no images of {len(untested)} classes are evaluated, for example {class_names[untested[0]]}; "
            "the accuracy is over the images of the others"
        )


def enumerated(things: Sequence[str], most: int = 10) -> str:
    """Return the first things separated by commas, and the number of the others."""
    more = len(things) - most
    return ", ".join(things[:most]) + (f" and {more} more" if more > 0 else "")


# --- decoding

# Pillow's decoders raise all of these on damaged files; they have no common base class.
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

    A missing, empty, truncated or unreadable file raises DatasetError with its name; no other image replaces it.
    """
    return _decode(path, lambda image: image.convert("RGB"), "unpack or download it again")


def read_upright_image(path: str | Path) -> Image.Image:
    """Decode an image of any origin as `read_image` does: turned upright, without transparency, with 8 bits.

    It is turned as its EXIF data say, transparent areas become white, and 16 bits are scaled to 8. Only the first
    image of an animation or of a file with several pages is used. An image with 32 bits a channel, whose range of
    values is unknown, raises DatasetError.
    """
    return _decode(path, _to_upright_rgb, "replace or remove it")


# EXIF's orientation -> how to turn the image back.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _to_upright_rgb(image: Image.Image) -> Image.Image:
    image.load()  # Pillow turns a TIFF itself while loading, and then removes its orientation
    # Not ImageOps.exif_transpose: it also rewrites the other EXIF data, and fails on unusual ones.
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    upright = _eight_bits(image)
    return upright if turn is None else upright.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    if has_16_bits(image):
        levels = np.asarray(image).astype(np.int64)  # convert() would clip everything above 255
        return Image.fromarray((levels // 256).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("it has 32 bits a channel, and which value is white is unknown; save it with 8 bits")
    if is_transparent(image):
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")


def has_16_bits(image: Image.Image) -> bool:
    """Return whether an image has 16 bits a channel; Pillow's mode I has more, except from these formats."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def is_transparent(image: Image.Image) -> bool:
    """Return whether areas of an image may be transparent."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _decode(path: str | Path, to_rgb: Callable[[Image.Image], Image.Image], remedy: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except FileNotFoundError as error:
        raise DatasetError(f"image {path} does not exist; {remedy}") from error
    except PermissionError as error:
        raise DatasetError(f"image {path} may not be read; change its permissions") from error
    except UnidentifiedImageError as error:
        raise DatasetError(f"image {path} is empty or not an image; {remedy}") from error
    except _DECODE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(f"image {path} cannot be decoded ({reason}); {remedy}") from error
