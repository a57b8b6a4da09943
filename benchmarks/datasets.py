"""Large datasets: the time and memory that a list of images takes before any image is opened.

    python -m benchmarks.datasets

ImageNet's 50,000 validation images in 1000 folders, and a user's folder with 100,000 images in one class, 30 % of which
become the test part. The files are hard links to a few JPEGs of 224 x 224 in a temporary folder. Times are medians of
5, after one for the disk's cache. Memory is what Python's allocator holds for the finished Task.
"""

import os
import tempfile
import tracemalloc
from pathlib import Path

import torch
from PIL import Image

import datasets
from benchmarks.timing import median_seconds
from common import Parser, one_line_errors
from datasets.splits import imagenet_classes

PIXELS = 224 * 224 * 3  # bytes of a decoded image
LINKS = 10_000  # hard links per file; some disks allow 65,000


def fill(folder: Path, count: int, source: Path) -> None:
    """Write `count` images into `folder`."""
    folder.mkdir(parents=True)
    for number in range(count):
        if number % LINKS == 0:
            original = folder / f"{number}.jpg"
            original.write_bytes(source.read_bytes())
        else:
            os.link(original, folder / f"{number}.jpg")


def measure(name: str, root: Path, shots: int | None) -> None:
    task = datasets.build(name, root, shots, 1)
    build = median_seconds(lambda: datasets.build(name, root, shots, 1))
    check = median_seconds(lambda: datasets.check_images_exist(task))
    tracemalloc.start()
    task = datasets.build(name, root, shots, 1)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    n = len(task.test)
    print(
        f"{name}: {n} test images listed in {build:.2f} s, all found in {check:.2f} s, {held / 1e6:.1f} MB held, "
        f"{held / n:.0f} bytes an image ({held / (n * PIXELS):.2%} of their pixels)"
    )


def main(argv=None) -> None:
    Parser(description=__doc__).parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        noise = torch.randint(256, (224, 224, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(root / "noise.jpg")
        for wnid in imagenet_classes()[0]:
            fill(root / "imagenet" / "val" / wnid, 50, root / "noise.jpg")
        measure("imagenet", root, None)
        fill(root / "own" / "many", 100_000, root / "noise.jpg")
        fill(root / "own" / "few", 10, root / "noise.jpg")
        measure("folder", root / "own", 16)


if __name__ == "__main__":
    with one_line_errors():
        main()
