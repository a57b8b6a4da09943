"""Damages image files at random and reads them as training does: every file is read, or rejected in one line.

    python -m benchmarks.fuzz_images --damages 12000 --seed 1

Prints a row per format: how many damaged files were read, and how many rejected. Exit code 1 if anything else than a
DatasetError was raised, a message did not name its file in one line, or something was printed. A damage that a format
has no checksum for changes pixels, which nobody can notice.
"""

import argparse
import contextlib
import io
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from common import progress
from datasets import DatasetError
from datasets.decoding import image_endings, read_upright_image

FORMATS = (
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "HEIF", "ICNS", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM"),
    *("QOI", "SGI", "TGA", "TIFF", "WEBP", "XBM"),
)
OPTIONS = {"TIFF": {"compression": "tiff_lzw"}, "MPO": {"save_all": True}}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz_images", description=__doc__)
    parser.add_argument("--damages", type=int, default=12_000, help="damaged files in all")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    rng, faults = random.Random(arguments.seed), []
    image_endings()  # registers all formats
    whole = {name: encoded(name) for name in FORMATS if name in Image.SAVE}
    counts, slowest = {name: Counter() for name in whole}, 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.jpg"
        for number in progress(range(arguments.damages), "fuzzing", "file"):
            name = FORMATS[number % len(FORMATS)]
            if name not in whole:
                continue
            path.write_bytes(damaged(whole[name], rng))
            start = time.perf_counter()
            outcome, fault = read_once(path)
            slowest = max(slowest, time.perf_counter() - start)
            counts[name][outcome] += 1
            faults += [f"{name}, file {number}: {fault}"] if fault else []
    for name, count in counts.items():
        print(f"{name:9} read {count['read']:5}  rejected {count['rejected']:5}")
    print(f"slowest {slowest:.2f} s; {len(faults)} faults")
    print(*faults, sep="\n")
    return 1 if faults else 0


def encoded(image_format: str) -> bytes:
    """Return a photograph-like picture of 64 x 64 pixels in a format of Pillow's."""
    slope = np.arange(64, dtype=np.uint8)[:, None, None]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 64, (64, 64, 3), dtype=np.uint8) + slope)
    buffer = io.BytesIO()
    image.convert("1" if image_format == "XBM" else "RGB").save(buffer, image_format, **OPTIONS.get(image_format, {}))
    return buffer.getvalue()


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return a file with one to eight bytes changed, its end cut off, a part zeroed, or two parts exchanged."""
    content = bytearray(content)
    kind, place = rng.choice(("flip", "flip", "head", "cut", "zero", "swap")), rng.randrange(len(content))
    if kind in ("flip", "head"):
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(len(content) if kind == "flip" else min(64, len(content)))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[place:]
    elif kind == "zero":
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    else:
        content = content[place:] + content[:place]
    return bytes(content)


def read_once(path: Path) -> tuple[str, str | None]:
    """Read an image and return whether it was read or rejected, and what is wrong with how that was done."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        try:
            read_upright_image(path)
            outcome, fault = "read", None
        except DatasetError as error:
            outcome, fault = "rejected", None
            if str(path) not in str(error) or "\n" in str(error):
                fault = f"message {str(error)!r}"
        except BaseException as error:
            outcome, fault = "raised", f"{type(error).__name__}: {error}"
    return outcome, fault or (f"printed {printed.getvalue()!r}" if printed.getvalue() else None)


if __name__ == "__main__":
    raise SystemExit(main())
