"""What one run works with: a model, a task, the settings, and the features that are computed only once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import clip
import datasets
import utils
from clip.preprocess import train_transform
from common import progress
from datasets import Item, Task
from settings import Hparams, Settings

H = TypeVar("H", bound=Hparams)
IMAGES_AT_ONCE = 256  # without gradients


@dataclass
class Experiment(Generic[H]):
    """A model and a task, and how the one is adapted to the other.

    `hparams` are the method's own settings, with everything decided (`Hparams.settled`). `preprocess` maps a PIL image
    to the model's input. `base_sha256` is the hash of the weights before training. `features` holds what was computed
    under these unchanged weights; copies made by `dataclasses.replace` share it.
    """

    settings: Settings
    hparams: H
    task: Task
    model: clip.CLIP
    preprocess: Callable
    base_sha256: str
    features: dict[tuple, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, settings: Settings, hparams: H, task: Task) -> "Experiment[H]":
        """Load the model that the settings name. Raise WeightsError if that is not possible."""
        model, preprocess = clip.load(settings.backbone, settings.device, arch=settings.arch)
        return cls(settings, hparams, task, model, preprocess, clip.weights_sha256(model))

    @property
    def device(self) -> torch.device:
        return self.model.device

    def autocast(self) -> torch.autocast:
        """Return the context of forward passes: bf16 autocast or, for fp32, none. Weights are float32 either way."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def training_batches(self, start: int = 0) -> DataLoader:
        """Return the augmented training batches from iteration `start` (counted from 0) to the end of training.

        Raise DatasetError if a training image is damaged.
        """
        hparams, settings = self.hparams, self.settings
        return datasets.training_loader(
            self.task,
            train_transform(self.model.arch.resolution, hparams.min_area, hparams.flip),
            hparams.batch_size,
            hparams.total_iters,
            settings.seed,
            settings.workers,
            settings.image_cache_mb,
            start,
            pin_memory=self.device.type == "cuda",
            drop_last=hparams.drop_last,
        )

    def image_features(self, items: Sequence[Item], label: str) -> Tensor:
        """Return unit features [N, E] of the items, in main memory, by the model as it is now."""
        pin = self.device.type == "cuda"
        loader = datasets.test_loader(
            items, self.task, self.preprocess, IMAGES_AT_ONCE, self.settings.workers, pin_memory=pin
        )
        with self.autocast():
            return utils.image_features(self.model, loader, label)

    def test_features(self) -> Tensor:
        """Return unit features [N, E] of the test images under the unchanged weights.

        They come from the cache on disk if this very computation was done before. Call it first before training.
        Raise DatasetError if an image is damaged.
        """
        key = ("test", self.task.test)
        if key not in self.features:
            about = (self.base_sha256, self.task.fingerprint(self.task.test), repr(self.preprocess))
            path = utils.cache_file(self.settings.cache_dir, *about, self.settings.precision, self.device.type)
            features = utils.load_features(path)
            if features is None:
                features = self.image_features(self.task.test, "zero-shot")
                utils.save_features(path, features)
            self.features[key] = features
        return self.features[key]

    def train_features(self) -> Tensor:
        """Return unit features [N, E] of the training images, not augmented, under the unchanged weights."""
        key = ("train", self.task.train)
        if key not in self.features:
            self.features[key] = self.image_features(self.task.train, "training features")
        return self.features[key]

    @torch.no_grad()
    def augmented_features(self, views: int) -> Tensor:
        """Return features [views, N, E], as the encoder gives them, of augmented training images under the unchanged
        weights, on the model's device. No view is one of those that training sees."""
        hparams, settings = self.hparams, self.settings
        key = ("augmented", self.task.train, views, hparams.min_area, hparams.flip)
        if key not in self.features:
            loader = datasets.augmented_loader(
                self.task,
                train_transform(self.model.arch.resolution, hparams.min_area, hparams.flip),
                IMAGES_AT_ONCE,
                views,
                settings.seed,
                settings.workers,
                settings.image_cache_mb,
                pin_memory=self.device.type == "cuda",
            )
            with self.autocast():
                parts = [
                    self.model.encode_image(images.to(self.device, non_blocking=True)).float()
                    for images, _ in progress(loader, "augmented views")
                ]
            self.features[key] = torch.cat(parts).unflatten(0, (views, -1))
        return self.features[key]

    def text_classifier(self, templates: Sequence[str]) -> Tensor:
        """Return unit text features [C, E]: for each class the mean over the templates, by the model as it is now."""
        with self.autocast():
            return utils.text_classifier(self.model, self.task.class_names, templates)

    def accuracy(self, features: Tensor, logits: Callable[[Tensor], Tensor]) -> float:
        """Return the per cent of test images, given by their features [N, E], whose largest logit is their label's."""
        labels = [item.label for item in self.task.test]
        return utils.accuracy(lambda part: logits(part.to(self.device)), features, labels)
