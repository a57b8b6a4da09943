"""What heads share that are trained on features: these are computed once, from augmented views of the training images.

Training then costs seconds on a CPU, and so does a search, whose candidates have the same views. The runs of a sweep
share them too, through the cache on disk (--cache_dir): `clap`, `zs_lp`, `taskres` and `clip_adapter` ask for the same
20 views. A run's train_seconds count the time that its features took, whenever it was.

With several templates the text classifier is the mean over all of them, as for zero-shot accuracy.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import datasets
from settings import Training, option, with_default

from .head import Head


@dataclass(frozen=True)
class Viewed(Training):
    """What CLAP, ZS-LP, TaskRes and CLIP-Adapter have in common: Dassl's recipe, on cached views."""

    drop_last: ClassVar[bool] = True
    batch_size: int = with_default(Training, "batch_size", 256)
    early_stop_loss: float = with_default(Training, "early_stop_loss", 0.0)
    views: int = option(20, "augmented views of each training image, computed once", at_least=1)


class CachedHead(Head):
    """A head on the views' features; its settings are `Viewed`, unless it overrides `build` and `order`.

    `pool` are the features [P, E] that batches are drawn from, as the encoder gives them, and `labels` [P] theirs.
    """

    pool: Tensor
    labels: Tensor
    replicated = True

    def build(self) -> None:
        views = self.experiment.hparams.views
        self.fill(self.experiment.augmented_features(views).flatten(0, 1))

    def fill(self, pool: Tensor) -> None:
        """Take features [P, E]: those of all training images in order, once or several times."""
        task = self.experiment.task
        labels = torch.tensor([item.label for item in task.train], device=self.experiment.device)
        self.pool, self.labels = pool, labels.repeat(len(pool) // len(labels))

    def order(self, epoch: int) -> Tensor:
        """Return the rows of the pool that an epoch takes its batches from, in order: one view of each image, the next
        in each epoch, and the first again after the last."""
        hparams, images = self.experiment.hparams, len(self.experiment.task.train)
        return epoch % hparams.views * images + datasets.shuffled(images, self.experiment.settings.seed, epoch)

    def batches(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        hparams = self.experiment.hparams
        per_epoch, shuffled = hparams.batches_per_epoch(len(self.experiment.task.train)), None
        for iteration in range(start, hparams.total_iters):
            epoch, batch = divmod(iteration, per_epoch)
            if epoch != shuffled:
                shuffled, order = epoch, self.order(epoch).to(self.experiment.device)
            rows = order[batch * hparams.batch_size : (batch + 1) * hparams.batch_size]
            yield self.pool[rows], self.labels[rows]

    def image_features(self, images: Tensor) -> Tensor:
        return F.normalize(images, dim=-1)

    @cached_property
    def zero_shot(self) -> Tensor:
        """Unit text features [C, E]: for each class the mean over the templates, as for zero-shot accuracy."""
        return F.normalize(F.normalize(self.experiment.text_embeddings(), dim=-1).sum(dim=0), dim=-1)

    def classifier(self) -> Tensor:
        """Return the rows [C, E] that `logits` multiplies with image features, with gradients if they are trained."""
        return self.zero_shot

    def text_features(self) -> Tensor:
        return self.classifier()

    @torch.no_grad()
    def text_classifier(self) -> Tensor:
        return self.classifier()
