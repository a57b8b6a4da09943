"""What one run works with: a model, a task, the settings, and the features that are computed only once."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

import clip
import datasets
import distributed
import utils
from clip import trunks
from clip.preprocess import mirror, normalise, normalise_table, pixels_of, train_transform
from common import progress
from datasets import Item, Task
from predictions import Predictions, predict
from settings import Hparams, Settings

H = TypeVar("H", bound=Hparams)
IMAGES_AT_ONCE = 256  # without gradients


class Normalised:
    """A loader's batches (images, labels), with the images as the model reads them, on its device.

    They come as bytes from the processes that read them; `transform` says how bytes become numbers. A GPU copies and
    normalises a batch on a stream of its own, while it still computes with the batch before, unless the host waits for
    that.
    """

    def __init__(self, loader: Collection, transform: Callable, device: torch.device):
        self.loader, self.table = loader, normalise_table(transform).to(device)
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.side is not None:
            yield from self._on_the_side()
            return
        for images, labels in self.loader:
            yield normalise(images, self.table), labels

    def _on_the_side(self) -> Iterator[tuple[Tensor, Tensor]]:
        current = torch.cuda.current_stream(self.side.device)
        before: list[torch.cuda.Event] = []  # when the batches before are computed with
        for images, labels in self.loader:
            if len(before) == 2:  # no third batch in memory, however fast the loader is
                before.pop(0).synchronize()
            with torch.cuda.stream(self.side):
                images = normalise(images, self.table)
            current.wait_stream(self.side)
            images.record_stream(current)  # its memory is not used again before `current` is done with it
            yield images, labels
            before.append(current.record_event())


@dataclass
class Experiment(Generic[H]):
    """A model and a task, and how the one is adapted to the other.

    `hparams` are the method's own settings, with everything decided (`Hparams.settled`). `preprocess` maps a PIL image
    to the model's input. `base_sha256` is the hash of the weights before training. `features` holds what was computed
    under these unchanged weights, `seconds` how long it took; copies made by `dataclasses.replace` share them.
    `seconds_spared` counts the seconds of features that were asked for and were there already.
    """

    settings: Settings
    hparams: H
    task: Task
    model: clip.CLIP
    preprocess: Callable
    base_sha256: str
    features: dict[tuple, Tensor] = field(default_factory=dict, repr=False)
    seconds: dict[tuple, float] = field(default_factory=dict, repr=False)
    seconds_spared: float = 0.0

    @classmethod
    def load(cls, settings: Settings, hparams: H, task: Task) -> "Experiment[H]":
        """Load the model that the settings name. Raise WeightsError if that is not possible."""
        model, preprocess = clip.load(settings.backbone, settings.device, arch=settings.arch)
        return cls(settings, hparams, task, model, preprocess, clip.weights_sha256(model))

    @property
    def device(self) -> torch.device:
        return self.model.device

    def autocast(self) -> torch.autocast:
        """Return the context of forward passes: autocast to bf16 or fp16, or none. Weights are always float32."""
        dtype = torch.float16 if self.settings.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.settings.precision != "fp32")

    def training_batches(self, start: int = 0) -> "Normalised":
        """Return the augmented training batches from iteration `start` (counted from 0) to the end of training.

        Raise DatasetError if a training image is damaged.
        """
        hparams, settings = self.hparams, self.settings
        loader = datasets.training_loader(
            self.task,
            pixels_of(self._train_transform),
            hparams.batch_size,
            hparams.total_iters,
            settings.seed,
            self._workers(-(-hparams.batch_size // distributed.size())),
            self._image_cache_mb,
            start,
            pin_memory=self.device.type == "cuda",
            drop_last=hparams.drop_last,
            own=distributed.mine_or_one,
        )
        return Normalised(loader, self._train_transform, self.device)

    @property
    def _train_transform(self) -> Callable:
        return train_transform(self.model.preprocessing, self.hparams.min_area, self.hparams.flip)

    def test_batches(self, items: Sequence[Item], batch_size: int, mirrored: bool = False) -> "Normalised":
        """Return batches of the items, or of their mirror images, in order, not augmented."""
        transform = pixels_of(self.preprocess)
        loader = datasets.test_loader(
            items,
            self.task,
            mirror(transform) if mirrored else transform,
            batch_size,
            self._workers(batch_size),
            pin_memory=self.device.type == "cuda",
        )
        return Normalised(loader, self.preprocess, self.device)

    def _workers(self, batch_size: int) -> int:
        """Return the number of processes that read images, for batches of this many images, a byte a value. The
        machine's other processes need the same."""
        batch_bytes = batch_size * 3 * self.model.preprocessing.size**2 * distributed.local_size()
        return datasets.workers_that_fit(self.settings.workers, batch_bytes)

    @property
    def _image_cache_mb(self) -> int:
        """MB of decoded images that this process may keep."""
        return self.settings.image_cache_mb // distributed.local_size()

    def image_features(self, items: Sequence[Item], label: str, mirrored: bool = False) -> Tensor:
        """Return unit features [N, E] of the items, or of their mirror images, in main memory, by the model as it is
        now. Several processes share the batches."""
        own = distributed.mine_or_one(len(items), IMAGES_AT_ONCE)
        if self.settings.cache_test_pixels and items is self.task.test and not mirrored:
            batches = self._stored_test_batches(own)
        else:
            batches = self.test_batches([items[place] for place in own], IMAGES_AT_ONCE, mirrored)
        with self.autocast():
            features = utils.image_features(self.model, batches, label)
        return distributed.rows_of_all(features, len(items), IMAGES_AT_ONCE)

    def _stored_test_batches(self, places: Sequence[int]) -> "Normalised":
        """Return batches of some test images from the cache on disk, where the first run that asks puts all of them."""
        items, size = self.task.test, self.model.preprocessing.size
        about = "pixels", self.task.fingerprint(items), repr(pixels_of(self.preprocess))
        path = utils.cache_file(self.settings.cache_dir, *about).with_suffix(".npy")
        loader = lambda: self.test_batches(items, IMAGES_AT_ONCE).loader  # noqa: E731
        distributed.from_first(lambda: utils.store_pixels(path, loader, (len(items), 3, size, size)))
        return Normalised(utils.stored_pixels(path, places, IMAGES_AT_ONCE), self.preprocess, self.device)

    def test_features(self) -> Tensor:
        """Return unit features [N, E] of the test images under the unchanged weights.

        They come from the cache on disk if this very computation was done before. Call it first before training.
        Raise DatasetError if an image is damaged.
        """
        about = repr(self.preprocess), self.settings.precision, self.device.type
        compute = partial(self.image_features, self.task.test, "zero-shot")
        return self._once(("test", self.task.test), compute, self.task.test, about)

    def train_features(self, mirrored: bool = False) -> Tensor:
        """Return unit features [N, E] of the training images, or of their mirror images, not augmented, under the
        unchanged weights."""
        compute = partial(self.image_features, self.task.train, "training features", mirrored)
        return self._once(("train", self.task.train, mirrored), compute)

    def text_embeddings(self) -> Tensor:
        """Return features [T, C, E], as the encoder gives them, of the class names in all T templates, under the
        unchanged weights."""
        names, templates = self.task.class_names, self.task.templates
        return self._once(("text", names, templates), lambda: self._text_embeddings(names, templates))

    def _text_embeddings(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        with self.autocast():
            return torch.stack([utils.text_embeddings(self.model, names, template) for template in templates])

    def augmented_features(self, views: int) -> Tensor:
        """Return features [views, N, E], as the encoder gives them, of augmented training images under the unchanged
        weights, on the model's device. No view is one of those that training sees.

        They come from the cache on disk if another run computed them on such a machine.
        """
        processor = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else torch.get_num_threads()
        transform, device = repr(self._train_transform), self.device.type
        about = transform, self.settings.precision, device, f"{processor}", f"{self.settings.seed}"
        key = ("augmented", self.task.train, views, self.hparams.min_area, self.hparams.flip)
        compute = partial(self._augmented_features, views)
        return self._once(key, compute, self.task.train, (*about, f"{views} views")).to(self.device)

    @torch.no_grad()
    def _augmented_features(self, views: int) -> Tensor:
        loader = datasets.augmented_loader(
            self.task,
            pixels_of(self._train_transform),
            IMAGES_AT_ONCE,
            views,
            self.settings.seed,
            self._workers(IMAGES_AT_ONCE),
            self._image_cache_mb,
            pin_memory=self.device.type == "cuda",
            own=partial(distributed.mine_or_one, at_once=IMAGES_AT_ONCE),
        )
        with self.autocast():
            batches = Normalised(loader, self._train_transform, self.device)
            parts = [self.model.encode_image(images).float() for images, _ in progress(batches, "augmented views")]
        number = views * len(self.task.train)
        return distributed.rows_of_all(torch.cat(parts), number, IMAGES_AT_ONCE).unflatten(0, (views, -1))

    def _once(
        self,
        key: tuple,
        compute: Callable[[], Tensor],
        items: Sequence[Item] = (),
        about: Sequence[str] = (),
    ) -> Tensor:
        """Return the features that `compute` returns, computed once a process; features of `items` also once for all
        runs with the same weights, images and `about`, which share the cache on disk."""
        if key in self.features:
            self.seconds_spared += self.seconds.get(key, 0.0)
            return self.features[key]
        path = kept = None
        if about:
            about = (*about, trunks.version()) if self.model.arch.conventions.trunk is not None else about
            path = utils.cache_file(self.settings.cache_dir, self.base_sha256, self.task.fingerprint(items), *about)
            kept = distributed.from_first(lambda: utils.load_features(path))
        if kept is None:
            start = time.perf_counter()
            kept = compute(), time.perf_counter() - start
            if path and distributed.is_first():
                utils.save_features(path, *kept)
        else:
            self.seconds_spared += kept[1]
        self.features[key], self.seconds[key] = kept
        return self.features[key]

    def cosine_logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Return CLIP's logits [B, C]: the cosines of unit image features [B, E] and unit text features [C, E], times
        the model's factor."""
        return self.model.logit_factor * image_features @ text_features.T

    def text_classifier(self, templates: Sequence[str]) -> Tensor:
        """Return unit text features [C, E]: for each class the mean over the templates, by the model as it is now."""
        with self.autocast():
            return utils.text_classifier(self.model, self.task.class_names, templates)

    def predictions(
        self, features: Tensor, logits: Callable[[Tensor], Tensor], temperature: float | None = None
    ) -> Predictions:
        """Return what `logits`, a function of features [B, E], says of the test images, given by features [N, E]."""
        labels = [item.label for item in self.task.test]
        on_device = lambda part: logits(part.to(self.device))  # noqa: E731
        return predict(on_device, features, labels, self.settings.save_logits, temperature)
