"""Cross-modal adaptation: a linear head that is trained on image features and text features alike.

Source: Lin et al., "Multimodality Helps Unimodality: Cross-Modal Few-Shot Learning with Multimodal Models" (CVPR 2023,
arXiv 2301.06267), and the code of linzhiqiu/cross_modal_adaptation. A prompt is one more labelled sample of its class.
For unit features f, of images or texts, the logits are 100 W f, without a bias. The rows of W start at the classes'
text features (mean over the templates, unit length) and keep no length.

Read in that code: the centre crop of each training image and its mirror image, the prompts of all templates; every
batch is half images, half texts, each drawn from a shuffled pass over its samples without a smaller last batch; AdamW,
12,800 iterations; the rate is 1e-5 in iteration 0, lr i / 50 in iterations i < 50, and then a cosine (`warmed_cosine`).
With `wise_ft` (published: 0.5) the rows after training are averaged with those at the start.

The authors choose, on few-shot validation images, lr out of 1e-3 and 1e-4, weight decay out of 0, 0.01 and 1e-4, a
batch of 8 or 32, and the best of every 100 iterations. Here nothing is chosen: lr 1e-4, weight decay 0.01, 4 images and
4 texts (their batch of 8), and the last iteration counts, which that code never evaluates. `--batch_size` is the number
of images; as many texts are added. configs/cross_modal_search.yaml chooses lr, weight decay and batch size as they do.

Base-to-new: the rows belong to their classes, and the authors do not define others. Some of the same classes, as in
ImageNet-A and -R, take their rows, as in that code.

Differences: if there are fewer texts or images than asked for, all of them are in every batch, where that code leaves
such batch sizes out. Loss and accuracy of the curve count the texts too; its epochs have as many batches as a pass over
the images without their mirror images. The prompts are those of all methods (--prompts), where that code uses each
dataset's own. The variants that train CLIP's last block or an adapter are left out.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import datasets
from experiment import Experiment
from settings import Loop, option, with_default

from .cached import CachedHead

WARMUP, WARMUP_LR = 50, 1e-5  # iterations; rate of the first


@dataclass(frozen=True)
class Hparams(Loop):
    """Of the values that the authors search, those that move W least; the other settings are theirs."""

    drop_last: ClassVar[bool] = True
    lr: float = with_default(Loop, "lr", 1e-4)
    total_iters: int | None = with_default(Loop, "total_iters", 12800)
    batch_size: int = with_default(Loop, "batch_size", 4)
    early_stop_loss: float = with_default(Loop, "early_stop_loss", 0.0)
    flip: bool = option(True, "train on the mirror image of each training image too", group="training")
    weight_decay: float = option(0.01, "AdamW's weight decay", at_least=0)
    wise_ft: float = option(0.0, "share of the text classifier in the rows after training", at_least=0, at_most=1)


class CrossModal(CachedHead):
    """W [C, E]. `texts` [T x C, E] are the texts' unit features."""

    def __init__(self, experiment: Experiment[Hparams]):
        hparams, embeddings = experiment.hparams, experiment.text_embeddings()
        self.texts, self.start = F.normalize(embeddings, dim=-1).flatten(0, 1), F.normalize(embeddings.mean(0), dim=-1)
        self.weight = nn.Parameter(self.start.clone())
        super().__init__(experiment, {"weight": self.weight}, by_class=True)
        self.optimizer = torch.optim.AdamW([self.weight], lr=hparams.lr, weight_decay=hparams.weight_decay)
        factor = warmed_cosine(hparams.lr, hparams.total_iters)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def build(self) -> None:
        sides = (False, True) if self.experiment.hparams.flip else (False,)
        features = [self.experiment.train_features(mirrored) for mirrored in sides]
        self.fill(torch.cat(features).to(self.experiment.device))

    def batches(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        classes, hparams = len(self.start), self.experiment.hparams
        of_texts = torch.arange(len(self.texts), device=self.labels.device) % classes
        for iteration in range(start, hparams.total_iters):
            images, texts = self.drawn(len(self.pool), iteration, 1), self.drawn(len(self.texts), iteration, -1)
            yield torch.cat([self.pool[images], self.texts[texts]]), torch.cat([self.labels[images], of_texts[texts]])

    def drawn(self, samples: int, iteration: int, sign: int) -> Tensor:
        """Return which of so many samples are in an iteration. `sign` tells apart the orders of images and texts."""
        size = min(self.experiment.hparams.batch_size, samples)
        epoch, batch = divmod(iteration, samples // size)
        order = datasets.shuffled(samples, self.experiment.settings.seed, sign * (epoch + 1))
        return order[batch * size : (batch + 1) * size].to(self.labels.device)

    def classifier(self) -> Tensor:
        return self.weight

    @torch.no_grad()
    def finish(self) -> None:
        self.weight.lerp_(self.start, self.experiment.hparams.wise_ft)


def warmed_cosine(lr: float, iterations: int) -> Callable[[int], float]:
    """Return that code's schedule: a map from an iteration, counted from 0, to the factor on `lr`. The cosine begins
    after the warm-up and is cut off by the end of training, so that the rate does not reach 0."""

    def factor(iteration: int) -> float:
        if iteration < WARMUP:
            return iteration / WARMUP if iteration else WARMUP_LR / lr
        return (1 + math.cos(math.pi * (iteration - WARMUP) / iterations)) / 2

    return factor


def prepare(experiment: Experiment[Hparams]) -> CrossModal:
    return CrossModal(experiment)
