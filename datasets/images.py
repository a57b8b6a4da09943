"""The image pipeline: from a Task's items to batches (images, labels). Knows no model and no method.

Training batch i is a pure function of (items, seed, i). A shuffle seeded by (seed, epoch) says which images it has, and
the augmentation of image p of the train list in an epoch depends only on (seed, epoch, p). So the number of workers, a
resumed run, or other random draws of the program do not change the batches. Epochs of training are 0, 1, ...; passes
over augmented images for other purposes are -1, -2, ...
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from common import counted, note, progress

from .task import DatasetError, Item, Task

Transform = Callable[[Image.Image], torch.Tensor]
Own = Callable[[int], Iterable[int]]  # from a number of places to those that this process is to load
SHARED_MEMORY = Path("/dev/shm")


def batches_per_epoch(n_items: int, batch_size: int, drop_last: bool = False) -> int:
    """Return the number of batches in a pass; with `drop_last` a partial one counts only if there is no other."""
    return max(1, n_items // batch_size) if drop_last and n_items else -(-n_items // batch_size)


def shuffled(n_items: int, seed: int, epoch: int) -> torch.Tensor:
    """Return the order [n_items] of the items' positions in an epoch, a pure function of the arguments."""
    generator = torch.Generator().manual_seed(derive_seed("order", seed, epoch))
    return torch.randperm(n_items, generator=generator)


def default_workers(processes: int = 1) -> int:
    """Return a good number of loader processes for each of so many training processes on this machine: usable cores -
    1, at most 8, and 0 up to two cores.

    One core is left to the main process. With two cores or fewer, a worker would compete with training itself (or, on a
    GPU, with the process that feeds it), and loading in the main process is as fast.
    """
    # Not only cpu_count: a container or a batch system often allows fewer cores than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= processes
    return 0 if cores <= 2 else min(cores - 1, 8)


def workers_that_fit(workers: int, batch_bytes: int) -> int:
    """Return how many of these loader processes the shared memory has room for, possibly 0, which needs none.

    A worker hands over its batches of `batch_bytes` in /dev/shm, two ahead, and the batch in use stays there; one that
    finds it full is killed by the system. Containers often have only 64 MB. Other programs may use it too.
    """
    if not workers or not SHARED_MEMORY.is_dir():
        return workers
    free = shutil.disk_usage(SHARED_MEMORY).free
    fitting = min(workers, max(0, free // batch_bytes - 1) // 2)
    if fitting < workers:
        note(
            f"{SHARED_MEMORY} has {free // 10**6} MB free: images are read by {counted(fitting, 'worker')} instead "
            f"of {workers}; enlarge it (docker run --ipc=host)"
        )
    return fitting


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
    own: Own = range,
) -> DataLoader:
    """Return a loader of the training batches `start`, ..., `iterations` - 1.

    A batch is (images [b, ...] as `transform` makes them, labels int64 [b]); b is `batch_size` except in the last batch
    of an epoch. Where several processes share a batch, `own` says which of its places are loaded here. `transform` may
    draw only from torch's CPU generator, as torchvision's do, and must be picklable if workers are spawned.

    All training images are decoded here, once, so that a damaged file is reported (DatasetError) before training
    begins. Up to `cache_mb` MB of pixels stay in memory; the other images are decoded again on every use.
    """
    data = _TrainingData(task, transform, seed, cache_mb)
    batches = _TrainingBatches(len(task.train), batch_size, iterations, seed, start, drop_last, own)
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
    own: Own = range,
) -> DataLoader:
    """Return a loader that passes `passes` times over all training images in order, each time with new augmentations.

    Image p of pass i is item number i * len(task.train) + p, of which those that `own` says are loaded; batches may
    span two passes. The augmentations differ from those of training with the same seed. Images, transform and errors
    are as in `training_loader`.
    """
    data = _TrainingData(task, transform, seed, cache_mb)
    keys = [(-1 - i, position) for i in range(passes) for position in range(len(task.train))]
    return _loader(data, workers, pin_memory, batch_size=batch_size, sampler=[keys[place] for place in own(len(keys))])


def test_loader(
    items: Sequence[Item], task: Task, transform: Transform, batch_size: int, workers: int, pin_memory: bool = False
) -> DataLoader:
    """Return a loader of some items of `task`, in order, in batches (images [b, ...], labels int64 [b])."""
    return _loader(_OrderedData(items, task, transform), workers, pin_memory, batch_size=batch_size)


def derive_seed(*parts: str | int) -> int:
    """Return a 63-bit seed that is a fixed function of `parts` (unlike Python's hash())."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class _ImageCache:
    """Decoded training images: as many as fit into `limit` bytes, three bytes a pixel."""

    def __init__(self, task: Task, limit: int):
        self.task = task
        self.places: dict[str, tuple[int, int, int]] = {}  # path -> (first byte, width, height)
        pixels = bytearray()
        paths = {item.path: item for item in task.train}  # an image drawn twice is kept once
        for item in progress(paths.values(), "decoding", "image", delay=1):
            image = task.read(item)
            if len(pixels) + 3 * image.width * image.height <= limit:
                self.places[item.path] = (len(pixels), image.width, image.height)
                pixels += image.tobytes()
        # One tensor for all images: spawned workers share its memory instead of copying it.
        # (frombuffer rejects an empty buffer.)
        self.pixels = torch.frombuffer(pixels or bytearray(1), dtype=torch.uint8)
        left_out = len(paths) - len(self.places)
        if left_out:
            note(
                f"{left_out} of {len(paths)} training images do not fit into the image cache of {limit // 10**6} MB "
                "and are decoded each time; --image_cache_mb enlarges it"
            )

    def read(self, item: Item) -> Image.Image:
        if item.path not in self.places:
            return self.task.read(item)
        first, width, height = self.places[item.path]
        pixels = self.pixels[first : first + 3 * width * height].view(height, width, 3)
        return Image.fromarray(pixels.numpy())


class _OrderedData(Dataset):
    """Transformed images, addressed by their position in `items`; `source` reads them."""

    def __init__(self, items: Sequence[Item], source: Task | _ImageCache, transform: Transform):
        self.items = items
        self.source = source
        self.transform = transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int] | DatasetError:
        item = self.items[position]
        try:
            image = self.source.read(item)
        except DatasetError as error:
            return error
        return self.transform(image), item.label


class _TrainingData(_OrderedData):
    """Augmented training images, addressed by (epoch, position in the train list)."""

    def __init__(self, task: Task, transform: Transform, seed: int, cache_mb: int):
        super().__init__(task.train, _ImageCache(task, cache_mb * 10**6), transform)
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int] | DatasetError:
        # Only the CPU generator: torch.manual_seed would also reseed every GPU, from which dropout draws.
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(derive_seed("augment", self.seed, *key))
        try:
            return super().__getitem__(key[1])
        finally:
            torch.set_rng_state(state)


class _TrainingBatches(Sampler):
    """The keys (epoch, position) of all batches of a run, of each only what `own` says.

    One sampler for all epochs, so that workers never restart.
    """

    def __init__(
        self, n_items: int, batch_size: int, iterations: int, seed: int, start: int, drop_last: bool, own: Own = range
    ):
        self.n_items, self.own = n_items, own
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
                ordered_epoch, order = epoch, shuffled(self.n_items, self.seed, epoch).tolist()
            positions = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(epoch, positions[place]) for place in self.own(len(positions))]


# A DataLoader raises a worker's exception again with the worker's traceback as its message. The single line of a
# DatasetError would be lost, so datasets return the error as a value, and the loader raises it in the main process.


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
    # A DataLoader draws a seed for its workers whenever it is iterated. It has its own generator, so that an evaluation
    # does not change the program's global generator.
    generator = torch.Generator().manual_seed(0)
    return _Loader(
        data, num_workers=workers, pin_memory=pin_memory, collate_fn=_collate, generator=generator, **batching
    )
