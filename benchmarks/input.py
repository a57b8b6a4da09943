"""The input pipeline without training: augmented training images per second, and how many a training step needs.

    python -m benchmarks.input
    python -m benchmarks.input --workers 8

Images are noise of the size of a typical photograph, saved as JPEG, 400 of 100 classes. "cached" keeps them decoded in
memory, as training does by default; "decoded" reads the files every time. A step of 15 ms with 32 images needs 2,133
images per second.
"""

import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

import datasets
from clip.preprocess import Preprocessing, pixels_of, train_transform
from common import Parser, one_line_errors
from experiment import Normalised


def photographs(folder: Path, count: int) -> tuple[datasets.Item, ...]:
    """Write JPEG files of 500 x 375 smooth noise; return their items."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for number in range(count):
        coarse = torch.randint(256, (48, 64, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(coarse.numpy()).resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
        items.append(datasets.Item(f"{number}.jpg", number % 100))
    return tuple(items)


def images_per_second(task: datasets.Task, workers: int, cache_mb: int, batches: int) -> float:
    transform = train_transform(Preprocessing(224))
    loader = datasets.training_loader(task, pixels_of(transform), 32, batches + 2, 0, workers, cache_mb)
    iterator = iter(Normalised(loader, transform, torch.device("cpu")))
    next(iterator)  # the time to start the workers does not count
    start, seen = time.perf_counter(), 0
    for images, _ in iterator:
        seen += len(images)
    return seen / (time.perf_counter() - start)


def main(argv=None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--workers", type=int, default=datasets.default_workers())
    parser.add_argument("--batches", type=int, default=100)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        items = photographs(Path(folder), 400)
        task = datasets.Task("noise", ("thing",) * 100, ("{}",), items, (), (), Path(folder))
        torch.set_num_threads(1)
        for name, cache_mb in (("cached", 2048), ("decoded", 0)):
            pace = images_per_second(task, args.workers, cache_mb, args.batches)
            print(f"{name:8} {pace:7.0f} images/s with {args.workers} workers: 32 images in {32000 / pace:.1f} ms")


if __name__ == "__main__":
    with one_line_errors():
        main()
