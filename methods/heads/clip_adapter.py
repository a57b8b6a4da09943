"""CLIP-Adapter: a bottleneck of two layers after the image encoder, blended with its output; CLIP is frozen.

Source: Gao et al., "CLIP-Adapter: Better Vision-Language Models with Feature Adapters" (arXiv 2110.04544), and the code
of gaopengcuhk/CLIP-Adapter. For image features x, text features t_c and W1 [E / 4, E], W2 [E, E / 4] without biases

    x' = ratio relu(W2 relu(W1 x)) + (1 - ratio) x,  logits = 100 cos(x', t_c)

In that code x is as the encoder gives it. Here it has unit length, which is the same: without biases x' scales with x.
W1 and W2 start as torch's linear layers do, uniform between -1/sqrt(n) and 1/sqrt(n) for n inputs.

Read in that code: ratio 0.2, the adapter of images only, and "follow CoOp's command": SGD with momentum 0.9 and weight
decay 5e-4, lr 0.002, batch 32, 50, 100 or 200 epochs by shots and always 50 on ImageNet (clip_adapter.yaml), rate 1e-5
in the first epoch, then a cosine between epochs (`epoch_cosine`), random crops of 8 to 100 % of the area, flips. The
paper is said to search the ratio for each dataset; that, and on which images, was not checked against its text. Nothing
is searched here; configs/clip_adapter_search.yaml chooses the ratio on the few-shot validation images.

Base-to-new: the authors do not define it. Nothing in the adapter belongs to a class, so it is applied to the images of
other classes and datasets, with their text features.

Differences: that code augments images again in every epoch. Here epoch e has view e modulo 20 of each image, so that
features are computed once; `--views 200` has a new one in each of 200 epochs. The prompts are those of all methods
(--prompts), where that code uses each dataset's own; with several templates t_c is their mean. The paper's second
adapter, of text features, is not in that code and left out.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiment import Experiment
from settings import option, with_default

from ..choice import dassl_schedule
from .cached import CachedHead, Viewed

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
REDUCTION = 4  # of the width, in the bottleneck


@dataclass(frozen=True)
class Hparams(Viewed):
    """The released settings. Epochs for other numbers of shots than the published ones: 200."""

    lr: float = with_default(Viewed, "lr", 2e-3)
    epochs: int | None = with_default(Viewed, "epochs", 200)
    batch_size: int = with_default(Viewed, "batch_size", 32)
    adapter_ratio: float = option(0.2, "share of the adapter in the image features", at_least=0, at_most=1)


class CLIPAdapter(CachedHead):
    """The matrices W1 (down) and W2 (up)."""

    def __init__(self, experiment: Experiment[Hparams]):
        generator, text = torch.Generator().manual_seed(experiment.settings.seed), experiment.text_embeddings()[0]
        width = text.shape[1]
        self.down = nn.Parameter(linear_start(width // REDUCTION, width, generator).to(text))
        self.up = nn.Parameter(linear_start(width, width // REDUCTION, generator).to(text))
        super().__init__(experiment, {"down": self.down, "up": self.up}, of_classes=False)
        hparams = experiment.hparams
        self.optimizer = torch.optim.SGD(
            [self.down, self.up], lr=hparams.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        self.scheduler = dassl_schedule(self.optimizer, hparams, len(experiment.task.train))

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        ratio = self.experiment.hparams.adapter_ratio
        adapted = F.relu(F.relu(image_features @ self.down.T) @ self.up.T)
        blended = ratio * adapted + (1 - ratio) * image_features
        return self.experiment.cosine_logits(F.normalize(blended, dim=-1), text_features)


def linear_start(outputs: int, inputs: int, generator: torch.Generator) -> Tensor:
    """Return a matrix [outputs, inputs] as torch's linear layers start."""
    return (2 * torch.rand(outputs, inputs, generator=generator) - 1) / math.sqrt(inputs)


def prepare(experiment: Experiment[Hparams]) -> CLIPAdapter:
    return CLIPAdapter(experiment)
