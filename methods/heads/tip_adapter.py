"""Tip-Adapter: a cache of the training images' features added to CLIP's classifier; nothing is trained.

Source: Zhang et al., ECCV 2022 (arXiv 2111.03930, later 2207.09519), section 3, and the code of
gaopengcuhk/Tip-Adapter. For unit image features f, text classifier T, keys F (a row per training image) and their
one-hot labels L:

    logits = 100 f T' + alpha exp(-beta (1 - f F')) L

A key is the mean of an image's features, as the encoder gives them, over 10 augmented views (random crops of 50 to
100 % of the area, flips), scaled to unit length, as in that code. alpha = 1 and beta = 5.5 are said to be the base of
the paper's ablations (ImageNet, 16 shots); that was not checked against its text. The code starts at other values
(ImageNet: 1.17 and 1; DTD and EuroSAT: 2 and 1) and searches both on validation images, for ImageNet on the test
images. Nothing is searched here without --search. The prompts are those of all methods (--prompts), where that code
uses each dataset's own. With several prompts (ImageNet's seven) its text classifier is their mean; here it is the first
one's, as for all methods.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from experiment import Experiment
from settings import Hparams as Base
from settings import Views, option

from .head import Head


@dataclass(frozen=True)
class Cache(Base):
    """The base of the paper's ablations, as far as known: alpha 1, beta 5.5."""

    tip_alpha: float = option(1.0, "residual ratio, weight of the cache added to CLIP's logits", at_least=0)
    tip_beta: float = option(5.5, "sharpness of the cache's affinities", at_least=0)
    cache_passes: int = option(10, "augmented views of an image whose mean is its key", at_least=1)


@dataclass(frozen=True)
class Hparams(Views, Cache):
    """The cache's, and the released augmentation."""


class TipAdapter(Head):
    """The cache: keys [N, E] of unit length and labels [N] of the N training images."""

    def __init__(self, experiment: Experiment[Cache], train_keys: bool = False):
        train, width, device = experiment.task.train, experiment.model.arch.embed_dim, experiment.device
        self.keys = torch.zeros(len(train), width, device=device, requires_grad=train_keys)
        self.labels = torch.tensor([item.label for item in train], dtype=torch.int64, device=device)
        super().__init__(experiment, {"keys": self.keys, "labels": self.labels}, varying=("keys", "labels"))

    @cached_property
    def values(self) -> Tensor:
        """One-hot rows [N, C] of the labels."""
        return F.one_hot(self.labels, len(self.experiment.task.class_names)).float()

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        hparams = self.experiment.hparams
        affinities = torch.exp(-hparams.tip_beta * (1 - image_features @ self.keys.T))  # [B, N]
        return (
            self.experiment.cosine_logits(image_features, text_features) + hparams.tip_alpha * affinities @ self.values
        )

    @torch.no_grad()
    def build(self) -> None:
        """Compute the keys from `cache_passes` augmented views of each training image."""
        views = self.experiment.augmented_features(self.experiment.hparams.cache_passes)
        self.keys.copy_(F.normalize(views.mean(dim=0), dim=-1))


def prepare(experiment: Experiment[Hparams]) -> TipAdapter:
    return TipAdapter(experiment)
