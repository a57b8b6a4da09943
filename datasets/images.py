"""The image pipeline: from a Task's items to batches (images, labels). Knows no model and no method.

Training batch i is a pure function of (items, seed, i). Which images it holds follows from a shuffle seeded
by (seed, epoch), and how image p of the train list is augmented in an epoch from (seed, epoch, p) alone. So
neither the number of workers, nor a resumed run, nor other random draws of the program change the batches.
Epochs of training are 0, 1, ...; passes over augmented images for other purposes are -1, -2, ...
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from tqdm import tqdm

from .task import DatasetError, Item, Task, read_image

# read_image is defined beside Task, which needs it too.
__all__ = ["augmented_loader", "batches_per_epoch", "default_workers", "read_image", "test_loader", "training_loader"]

Transform = Callable[[Image.Image], torch.Tensor]

_MANY_IMAGES = 500  # from here on decoding takes seconds, and a progress bar is welcome


def batches_per_epoch(n_items: int, batch_size: int, drop_last: bool = False) -> int:
    """Return the number of batches in one pass over `n_items`, including the last, partial one.

    With `drop_last` a partial one does not count, unless it is the only one.
    """
    return max(1, n_items // batch_size) if drop_last and n_items else -(-n_items // batch_size)


def default_workers() -> int:
    """Number of loader processes that suits this machine: usable cores - 1, at most 8, and 0 up to two cores.

    One core is left to the main process. With two cores or less a worker would compete with the arithmetic of
    training itself (or, on a GPU, with the process that feeds it); loading in the main process is as fast.
    """
    # Not cpu_count: a container or a batch system often grants fewer cores than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cores <= 2 else min(cores - 1, 8)


def training_loader(
    task: Task,
    transform: Transform,
    batch_size: int,
    iterations: int,
    seed: int,
    workers: int,
    cache_mb: int = 2048,
    start: int = 0,
    pin_memory: bool = False,
    drop_last: bool = False,
) -> DataLoader:
    """Return a loader of the training batches `start`, ..., `iterations` - 1.

    A batch is (images [b, ...] as `transform` makes them, labels int64 [b]); b is `batch_size` except in the
    last batch of an epoch. `transform` may draw from torch's CPU generator only, as torchvision's do, and
    must be picklable where workers are spawned.

    All training images are decoded here, once, so that a damaged file is reported (DatasetError) before
    training begins. Up to `cache_mb` MB of pixels stay in memory; the rest is decoded anew on every use.
    """
    if not 0 <= start <= iterations:
        raise ValueError(f"start must lie between 0 and iterations = {iterations}, not at {start}")
    data = _TrainingData(task, transform, seed, _ImageCache(task, cache_mb * 10**6))
    batches = _TrainingBatches(len(task.train), batch_size, iterations, seed, start, drop_last)
    return _loader(data, workers, pin_memory, batch_sampler=batches)


def augmented_loader(
    task: Task,
    transform: Transform,
    batch_size: int,
    passes: int,
    seed: int,
    workers: int,
    cache_mb: int = 2048,
    pin_memory: bool = False,
) -> DataLoader:
    """Return a loader of all training images in order, `passes` times over, augmented anew in each pass.

    Image p of pass i is item number i * len(task.train) + p; batches may span two passes. No augmentation is that
    of a training epoch with the same seed. Images, transform and errors are as in `training_loader`.
    """
    data = _TrainingData(task, transform, seed, _ImageCache(task, cache_mb * 10**6))
    keys = [(-1 - i, position) for i in range(passes) for position in range(len(task.train))]
    return _loader(data, workers, pin_memory, batch_size=batch_size, sampler=keys)


def test_loader(
    items: Sequence[Item],
    task: Task,
    transform: Transform,
    batch_size: int,
    workers: int,
    pin_memory: bool = False,
) -> DataLoader:
    """Return a loader of `items` (any of `task`'s) in order: batches (images [b, ...], labels int64 [b])."""
    return _loader(_OrderedData(items, task, transform), workers, pin_memory, batch_size=batch_size)


def _derive_seed(*parts: str | int) -> int:
    """A 63-bit seed that is a fixed function of `parts` (unlike Python's hash())."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class _ImageCache:
    """Decoded training images: as many as fit in `limit` bytes, three bytes a pixel."""

    def __init__(self, task: Task, limit: int):
        self.task = task
        self.places: dict[str, tuple[int, int, int]] = {}  # path -> (first byte, width, height)
        pixels = bytearray()
        paths = {item.path: item for item in task.train}  # an image drawn twice is kept once
        no_bar = True if len(paths) < _MANY_IMAGES else None  # None: a bar if stderr is a terminal
        for item in tqdm(paths.values(), desc="decoding", disable=no_bar):
            image = task.read(item)
            if len(pixels) + 3 * image.width * image.height <= limit:
                self.places[item.path] = (len(pixels), image.width, image.height)
                pixels += image.tobytes()
        # One tensor for all images: spawned workers get a tensor as shared memory, not as a copy each.
        # (frombuffer refuses an empty buffer.)
        self.pixels = torch.frombuffer(pixels or bytearray(1), dtype=torch.uint8)
        left_out = len(paths) - len(self.places)
        if left_out:
            print(
                f"note: {left_out} of {len(paths)} training images do not fit in the image cache of "
                f"{limit // 10**6} MB and are decoded on every use",
                file=sys.stderr,
            )

    def read(self, item: Item) -> Image.Image:
        if item.path not in self.places:
            return self.task.read(item)
        first, width, height = self.places[item.path]
        pixels = self.pixels[first : first + 3 * width * height].view(height, width, 3)
        return Image.fromarray(pixels.numpy())


class _TrainingData(Dataset):
    """Augmented training images, addressed by (epoch, position in the train list)."""

    def __init__(self, task: Task, transform: Transform, seed: int, cache: _ImageCache):
        self.items = task.train
        self.transform = transform
        self.seed = seed
        self.cache = cache

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int] | DatasetError:
        epoch, position = key
        item = self.items[position]
        try:
            image = self.cache.read(item)
        except DatasetError as error:
            return error
        # Only the CPU generator: torch.manual_seed would also reseed every GPU, where dropout draws.
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(_derive_seed("augment", self.seed, epoch, position))
        try:
            return self.transform(image), item.label
        finally:
            torch.set_rng_state(state)


class _OrderedData(Dataset):
    """Items as they come, transformed without randomness."""

    def __init__(self, items: Sequence[Item], task: Task, transform: Transform):
        self.items = items
        self.task = task
        self.transform = transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int] | DatasetError:
        item = self.items[position]
        try:
            image = self.task.read(item)
        except DatasetError as error:
            return error
        return self.transform(image), item.label


class _TrainingBatches(Sampler):
    """The keys (epoch, position) of all batches of a run: one sampler, so that workers never restart."""

    def __init__(self, n_items: int, batch_size: int, iterations: int, seed: int, start: int, drop_last: bool):
        self.n_items = n_items
        self.batch_size = batch_size
        self.per_epoch = batches_per_epoch(n_items, batch_size, drop_last)
        self.iterations = iterations
        self.seed = seed
        self.start = start

    def __len__(self) -> int:
        return self.iterations - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        ordered_epoch, order = None, []
        for iteration in range(self.start, self.iterations):
            epoch, batch = divmod(iteration, self.per_epoch)
            if epoch != ordered_epoch:
                ordered_epoch, order = epoch, self._order(epoch)
            positions = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(epoch, position) for position in positions]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(_derive_seed("order", self.seed, epoch))
        return torch.randperm(self.n_items, generator=generator).tolist()


# A DataLoader raises a worker's exception anew with the worker's traceback as its message. The one line of a
# DatasetError would be lost, so the error travels as a value through the batch, to be raised here.


def _collate(samples: list) -> list | DatasetError:
    for sample in samples:
        if isinstance(sample, DatasetError):
            return sample
    return default_collate(samples)


class _Loader(DataLoader):
    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        for batch in super().__iter__():
            if isinstance(batch, DatasetError):
                raise batch
            yield batch


def _loader(data: Dataset, workers: int, pin_memory: bool, **batching: object) -> DataLoader:
    # A DataLoader draws a seed for its workers whenever it is iterated. From a generator of its own, so that
    # the program's global generator is the same with and without an evaluation in between.
    generator = torch.Generator().manual_seed(0)
    return _Loader(
        data,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_collate,
        generator=generator,
        **batching,
    )
