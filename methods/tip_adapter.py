"""Tip-Adapter: a cache of the training images' features beside CLIP's text classifier; nothing is trained.

Source: Zhang et al., ECCV 2022 (arXiv 2111.03930, later 2207.09519), section 3, and the code of
gaopengcuhk/Tip-Adapter. For unit image features f, text classifier T, keys F (a row per training image) and their
one-hot labels L:

    logits = 100 f T' + alpha exp(-beta (1 - f F')) L

A key is the mean of an image's features, as the encoder gives them, over 10 augmented views (random crops of 50 to
100 % of the area, flips), then of unit length: so in that code. alpha = 1 and beta = 5.5 are known as the base of the
paper's ablations (ImageNet, 16 shots); that could not be checked against its text. The code starts at other values
(ImageNet: 1.17 and 1; DTD and EuroSAT: 2 and 1) and searches both on validation images, for ImageNet on the test
images. Nothing is searched here, and the prompts are those of all methods (--prompts), where that code uses each data
set's own. With several prompts (ImageNet's seven) its text classifier is their mean; here the first one's, as for all
methods.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import datasets
import utils
from clip import CLIP
from clip.preprocess import train_transform
from datasets import Task

from .head import Head

HYPERPARAMETERS = ("tip_alpha", "tip_beta", "cache_passes", "min_area", "flip")
DEFAULTS: dict = {"min_area": 0.5}
IMAGES_AT_ONCE = 256


class TipAdapter(Head):
    """The cache: keys [N, E] of unit length and labels [N] of the N training images."""

    length_varies = True

    def __init__(self, model: CLIP, task: Task, settings, train_keys: bool = False):
        self.keys = torch.zeros(len(task.train), model.arch.embed_dim, device=model.device, requires_grad=train_keys)
        self.labels = torch.tensor([item.label for item in task.train], dtype=torch.int64, device=model.device)
        super().__init__(model, task.class_names, {"keys": self.keys, "labels": self.labels})
        self.task, self.settings = task, settings
        self._one_hot()

    def _one_hot(self) -> None:
        self.values = F.one_hot(self.labels, len(self.class_names)).float()  # [N, C]

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        affinities = torch.exp(-self.settings.tip_beta * (1 - image_features @ self.keys.T))  # [B, N]
        return utils.cosine_logits(image_features, text_features) + self.settings.tip_alpha * affinities @ self.values

    @torch.no_grad()
    def build(self) -> None:
        """Computes the keys from `cache_passes` augmented views of each training image."""
        settings, device = self.settings, self.model.device
        augment = train_transform(self.model.arch.resolution, settings.min_area, settings.flip)
        loader = datasets.augmented_loader(
            self.task,
            augment,
            IMAGES_AT_ONCE,
            settings.cache_passes,
            settings.seed,
            settings.workers,
            settings.image_cache_mb,
            pin_memory=device.type == "cuda",
        )
        parts = []
        for images, _ in utils.progress(loader, "cache"):
            with utils.autocast(device, settings.precision):
                parts.append(self.model.encode_image(images.to(device, non_blocking=True)).float())
        views = torch.cat(parts).view(settings.cache_passes, *self.keys.shape)
        self.keys.copy_(F.normalize(views.mean(dim=0), dim=-1))

    def load(self, path, base_sha256: str) -> None:
        super().load(path, base_sha256)
        self._one_hot()


def prepare(model: CLIP, task: Task, settings) -> TipAdapter:
    return TipAdapter(model, task, settings)
