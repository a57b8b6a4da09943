"""From an image file to its RGB pixels. Whatever is wrong with a file becomes one line that names it.

A file is judged by its content: its name only says whether a folder's file is meant to be an image.
"""

import contextlib
import importlib.util
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from .errors import DatasetError

MAX_MEGAPIXELS = 179  # Pillow's own limit, above which it takes a file for an attack on the memory
HEIC_ENDINGS = (".heic", ".heif", ".hif")
# Formats of scientific data, and PostScript, which is a program: Pillow opens some of them, but none is a photograph.
_NO_IMAGES = {"EPS", "FITS", "MPEG", "MCIDAS", "SPIDER", "IPTC"}


@dataclass(frozen=True)
class Reading:
    """What the user allows and says about image files.

    `max_megapixels`: larger images are rejected. `white_level`: the value that is white in images of more than 8 bits a
    channel; without it 65535 in those of 16 bits, and the others are rejected.
    """

    max_megapixels: int = MAX_MEGAPIXELS
    white_level: float | None = None


USUAL = Reading()


def read_image(path: str | Path, reading: Reading = USUAL) -> Image.Image:
    """Decode the image file `path` completely and return it in RGB mode, as the published loaders do.

    A missing, empty, truncated, unreadable or too large file raises DatasetError with its name; no other image replaces
    it.
    """
    return _decode(path, lambda image: _loaded(image).convert("RGB"), reading, "unpack or download it again")


def read_upright_image(path: str | Path, reading: Reading = USUAL) -> Image.Image:
    """Decode an image of any origin as `read_image` does: turned upright, without transparency, with 8 bits.

    It is turned as its EXIF data say, transparent areas become white, and more bits are scaled to 8. Only the first
    image of an animation or of a file with several pages is used. An image whose white is unknown, because it has 32
    bits a channel or seems to use only 12 of its 16, raises DatasetError.
    """
    return _decode(path, lambda image: _to_upright_rgb(image, reading.white_level), reading, "replace or remove it")


@contextlib.contextmanager
def opened(path: str | Path, reading: Reading = USUAL) -> Iterator[Image.Image]:
    """Yield the opened image, its pixels not decoded yet. Raise DatasetError if it is too large.

    Also raise it while the image is decoded, if what it contains is larger than it says: a Mac or Windows icon holds
    an image with a size of its own.
    """
    _register_formats()
    try:
        with _SILENCE.with_limit(reading.max_megapixels), Image.open(path) as image:
            yield image
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise DatasetError(
            f"image {path} has {int(pixels[0]) / 1e6:.0f} megapixels, more than the {reading.max_megapixels} that are "
            "read; make it smaller, or raise --max_megapixels"
        ) from error


def _decode(path: str | Path, to_rgb: Callable[[Image.Image], Image.Image], reading: Reading, remedy: str):
    try:
        with opened(path, reading) as image:
            return to_rgb(image)
    except DatasetError:
        raise
    except FileNotFoundError as error:
        raise DatasetError(f"image {path} does not exist; {remedy}") from error
    except PermissionError as error:
        raise DatasetError(f"image {path} may not be read; change its permissions") from error
    except Exception as error:  # Pillow's decoders raise nearly anything
        unidentified = isinstance(error, UnidentifiedImageError)
        kind = _kind(Path(path), unidentified) or ("not an image of a known format" if unidentified else None)
        if kind:
            raise DatasetError(f"image {path} is {kind}; {remedy}") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(f"image {path} cannot be decoded ({reason}); {remedy}") from error


def _loaded(image: Image.Image) -> Image.Image:
    """Return the image with its pixels decoded."""
    by_libtiff = any(tile[0] == "libtiff" for tile in image.tile)
    with _no_stderr() if by_libtiff else contextlib.nullcontext():
        image.load()
    return image


class _Silence:
    """While entered, by one thread or several: Pillow prints no warnings, and has our limit on sizes.

    Not warnings.catch_warnings for each image: threads that enter and leave it in turns would undo each other.
    """

    def __init__(self):
        self.lock, self.inside = threading.Lock(), 0

    @contextlib.contextmanager
    def with_limit(self, max_megapixels: int) -> Iterator[None]:
        with self.lock:
            if self.inside == 0:
                self.filters, self.limit = warnings.catch_warnings(), Image.MAX_IMAGE_PIXELS
                self.filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\b")
                Image.MAX_IMAGE_PIXELS = max_megapixels * 500_000  # Pillow raises an error above twice this number
            self.inside += 1
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.filters.__exit__(None, None, None)
                Image.MAX_IMAGE_PIXELS = self.limit


_SILENCE = _Silence()
_STDERR = threading.Lock()


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """Discard what is written to the process's stderr: libtiff prints there, in C, what is damaged, without a name."""
    with _STDERR:
        stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 2)
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            os.close(nowhere)


logging.getLogger("PIL").addHandler(logging.NullHandler())  # else Python prints what Pillow logs, without a file's name


# --- formats


@lru_cache(maxsize=1)
def _register_formats() -> None:
    Image.init()
    if importlib.util.find_spec("pillow_heif"):
        import pillow_heif  # optional

        pillow_heif.register_heif_opener()


@lru_cache(maxsize=1)
def image_endings() -> tuple[str, ...]:
    """Return the file name endings, in lower case, of all image formats that can be decoded here."""
    _register_formats()
    formats = {name for name, (opener, *_) in Image.OPEN.items() if name not in _NO_IMAGES and not _is_stub(opener)}
    formats.add("MPO")  # several JPEGs in one file, which the reader of JPEG recognises
    return tuple(ending for ending, name in Image.registered_extensions().items() if name in formats)


def _is_stub(opener: type | Callable) -> bool:
    """Return whether Pillow only knows the size of such files, and nobody has registered a decoder for them."""
    stub = isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)
    return stub and getattr(sys.modules[opener.__module__], "_handler", None) is None


# How files begin that are taken for images and cannot be decoded, and what they are.
_BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer and not the image itself, which git lfs pull fetches",
    b"%PDF": "a PDF document",
    b"%!PS": "a PostScript program",
    b"\xc5\xd0\xd3\xc6": "a PostScript program",
    b"\xd7\xcd\xc6\x9a": "a drawing in Windows' WMF format",
    b"\x1aE\xdf\xa3": "a video",
    b"\x00\x00\x01\xba": "a video",
    b"\x00\x00\x01\xb3": "a video",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"\x89HDF": "an HDF5 file of data",
    b"SIMPLE  =": "a FITS file of data",
    b"GRIB": "a GRIB file of data",
    b"BUFR": "a BUFR file of data",
    b"\x93NUMPY": "a NumPy array",
    b"\xff\x0a": "a JPEG XL image, which cannot be read here (save it as JPEG or PNG)",
    b"\x00\x00\x00\x0cJXL ": "a JPEG XL image, which cannot be read here (save it as JPEG or PNG)",
    b"FUJIFILMCCD-RAW": "a raw file of a camera (develop it to JPEG or PNG)",
    b"\x00\x05\x16\x07": "what macOS stores beside a file, and not the image",
}
_HEIC = "a HEIC photograph (pip install pillow-heif to read it, or save it as JPEG or PNG)"
_BRANDS = {  # of the container that HEIC, AVIF and videos share
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"), _HEIC),
    **dict.fromkeys((b"avif", b"avis"), "an AVIF image that is damaged or that this Pillow cannot read"),
}
_DAMAGED = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"GIF8": "GIF", b"BM": "BMP", b"RIFF": "WebP"}
_TIFF = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")


def _kind(path: Path, unidentified: bool) -> str | None:
    """Return what a file that could not be decoded is, if its content tells. `unidentified`: Pillow does not know."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
            only_zeros = not any(head) and not any(map(any, iter(lambda: file.read(1 << 20), b"")))
    except OSError:
        return None
    if only_zeros:
        return "nothing but zero bytes, as after an interrupted copy" if head else "empty (0 bytes)"
    for beginning, kind in _BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "a video")
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "a video"
    if head[128:132] == b"DICM":
        return "a DICOM file (save its image as PNG)"
    return _kind_of_text(head) or (_kind_of_image(head) if unidentified else None)


def _kind_of_image(head: bytes) -> str | None:
    if head.startswith(_TIFF):
        return "a damaged TIFF, or one whose channels, bits or compression cannot be read here (save it as 8-bit RGB)"
    return next((f"a damaged {name} file" for start, name in _DAMAGED.items() if head.startswith(start)), None)


def _kind_of_text(head: bytes) -> str | None:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<script")):
        return "a web page and not an image, perhaps from a failed download"
    if start.startswith(b"<") and b"<svg" in start:
        return "an SVG drawing (save it as PNG)"
    if all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in head) and not start.startswith(_PLAIN):
        return "a text file and not an image"
    return None


_PLAIN = (b"p1", b"p2", b"p3", b"/* xpm", b"#define", b"! xpm", b"image type")  # image formats that are text


# --- your own images

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
_WHITE = "if you know which value is white, give it as --white_level"


def _to_upright_rgb(image: Image.Image, white_level: float | None) -> Image.Image:
    halved = any(";16" in str(tile[3]) for tile in image.tile) and not image.mode.startswith("I")
    _loaded(image)  # Pillow turns a TIFF itself while loading, and then removes its orientation
    if halved:
        _check_halved(image, white_level)
    turn = _TURNS.get(orientation(image))
    upright = _eight_bits(image, white_level)
    return upright if turn is None else upright.transpose(turn)


def orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 if there is none or the EXIF data are damaged."""
    # Not ImageOps.exif_transpose: it also rewrites the other EXIF data, and fails on unusual ones.
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata raise nearly anything; the pixels are whole
        return 1


def _eight_bits(image: Image.Image, white_level: float | None) -> Image.Image:
    if has_16_bits(image) or image.mode in ("I", "F"):
        return Image.fromarray(_scaled(image, white_level)).convert("RGB")
    if is_transparent(image):
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")


def _scaled(image: Image.Image, white_level: float | None) -> np.ndarray:
    """Return levels of more than 8 bits as uint8 [height, width]. Raise ValueError if it is unknown which is white."""
    levels = np.asarray(image)
    if white_level is not None:
        if not (levels.min() >= 0 and levels.max() <= white_level):  # also False for NaN
            found = f"its levels, {levels.min():g} to {levels.max():g}"
            raise ValueError(f"{found}, do not lie between 0 and --white_level {white_level:g}")
        return np.minimum(levels * (256 / (white_level + (levels.dtype.kind != "f"))), 255).astype(np.uint8)
    if not has_16_bits(image):
        raise ValueError(f"it has 32 bits a channel; {_WHITE}, or save it with 8 bits")
    levels = levels.astype(np.int64)  # convert() would clip everything above 255
    if 0 < levels.max() < 4096:
        raise ValueError(
            f"it has 16 bits a channel, but no level above {levels.max()}, as if 12 bits or fewer were stored in them; "
            f"{_WHITE} (4095 with 12 bits, 65535 for an image that is dark)"
        )
    return (levels // 256).astype(np.uint8)


def _check_halved(image: Image.Image, white_level: float | None) -> None:
    """Raise ValueError if an image of 16 bits a channel, of which Pillow keeps the upper 8, is not bright enough for
    them, or if another level than 65535 is white."""
    if white_level not in (None, 65535):
        raise ValueError(
            "it has several channels of 16 bits, for which --white_level does not work; save it with 8 bits"
        )
    brightest = max(high for _, high in image.convert("RGB").getextrema())
    if white_level is None and 0 < brightest < 16:
        raise ValueError(
            "it has 16 bits a channel, but is nearly black, as if 12 bits or fewer were stored in them; save it with 8 "
            "bits, or, if it is dark, give --white_level 65535"
        )


def has_16_bits(image: Image.Image) -> bool:
    """Return whether an image has 16 bits a channel; Pillow's mode I has more, except from these formats."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def is_transparent(image: Image.Image) -> bool:
    """Return whether areas of an image may be transparent."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
