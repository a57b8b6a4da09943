"""PromptSRC: trained tokens in the first blocks of both towers, held near CLIP in three ways, and averaged over epochs.

Source: Khattak et al., "Self-regulating Prompts: Foundational Model Adaptation without Forgetting" (arXiv 2307.06948),
and the code of muzairkhattak/PromptSRC. Where the tokens stand: `deep.py`. Those of the two towers are independent; the
text tokens of block 0 start at the embeddings of the first words, all others at N(0, 0.02^2).

Let f [E] be the unit feature of an image, t_c those of the classes, and f0, t0_c CLIP's own: f0 of the same augmented
image, t0_c the mean of the unnormalised features over 60 templates (promptsrc_templates.txt), made unit. The loss is
the cross-entropy of z = s f . t_c, with CLIP's factor s = 100, plus

    text_weight mean |t - t0|  +  image_weight mean |f - f0|  +  mean over images and classes of q (log q - log p),

with means over all entries, q = softmax(s f0 . t0_c) and p = softmax(z). After epoch e = 1 ... E the tokens enter an
average with the weight of a normal distribution of mean gpa_mean and deviation gpa_std at e; the average is what is
saved and tested.

Published: 4 tokens, lr 0.0025, batch 4, SGD as in `context.py`; weights 25 and 10. Few shots of all classes: 50 epochs,
depth 9, mean and deviation 30, 30 or 45, 5 by dataset (promptsrc.yaml; the authors do not say on which images they
chose; 30, 30 for others). Base-to-new: 20 epochs, 15, 1 (configs/prompts/promptsrc_base_to_new.yaml). Trained on
ImageNet for other datasets: 20 epochs, depth 3, 6, 10 (configs/prompts/promptsrc_cross_dataset.yaml).

Differences: as in `coop.py`. Only the tokens are averaged: the other weights do not change.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import utils
from common import progress
from experiment import Experiment
from settings import option, with_default

from ..adaptation import Batch
from ..choice import whole_epochs
from .context import random_vectors, word_vectors
from .deep import DeepPrompts, DeepTraining, check_depth, check_towers

# 60 of the 80 templates that OpenAI published with CLIP (MIT licence), those that PromptSRC's authors took.
TEMPLATES = Path(__file__).with_name("promptsrc_templates.txt").read_text().splitlines()


@dataclass(frozen=True)
class Hparams(DeepTraining):
    """The published settings for few shots of all classes."""

    lr: float = with_default(DeepTraining, "lr", 2.5e-3)
    epochs: int | None = with_default(DeepTraining, "epochs", 50)
    batch_size: int = with_default(DeepTraining, "batch_size", 4)
    text_weight: float = option(25.0, "weight of the distance to CLIP's text features", at_least=0)
    image_weight: float = option(10.0, "weight of the distance to CLIP's image features", at_least=0)
    gpa_mean: float = option(30.0, "epoch that weighs most in the average", at_least=0)
    gpa_std: float = option(30.0, "deviation of the weights, in epochs", above=0)


class PromptSRC(DeepPrompts):
    """`text` [J, n, D_t] and `image` [J, n, D_v]: 46,080 weights in ViT-B/16. `average` are their weighted sums so far,
    `share` is the sum of the weights."""

    def __init__(self, experiment: Experiment[Hparams]):
        check_towers(experiment)
        hparams, arch = experiment.hparams, experiment.model.arch
        check_depth(experiment, "depth", hparams.depth)
        self.epochs = whole_epochs("promptsrc", hparams, len(experiment.task.train))
        generator = torch.Generator().manual_seed(experiment.settings.seed)
        text, image = (
            random_vectors(experiment, hparams.depth * hparams.n_ctx, width, generator).view(hparams.depth, -1, width)
            for width in (arch.text_width, arch.vision_width)
        )
        text[0] = word_vectors(experiment, hparams.ctx_init)[: hparams.n_ctx]
        self.text, self.image = nn.Parameter(text), nn.Parameter(image)
        super().__init__(experiment, {"text": self.text, "image": self.image})
        self.average = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.share = 0.0

    def text_tokens(self) -> Tensor:
        return self.text

    def image_tokens(self) -> Tensor:
        return self.image

    def build(self) -> None:
        """Compute the unit text features [C, E] of the frozen prompts."""
        names, total = self.experiment.task.class_names, 0
        for template in progress(TEMPLATES, "frozen prompts"):
            with self.experiment.autocast():
                total = total + utils.text_embeddings(self.model, names, template)
        self.frozen_text = F.normalize(total, dim=-1)

    def penalty(self, batch: Batch) -> Tensor:
        hparams = self.experiment.hparams
        with torch.no_grad(), self.experiment.autocast():
            frozen_image = self.encode_frozen(batch.images.to(self.model.device, non_blocking=True)).float()
        frozen_image = F.normalize(frozen_image, dim=-1)
        frozen_logits = self.experiment.cosine_logits(frozen_image, self.frozen_text)
        log_q, log_p = frozen_logits.log_softmax(dim=-1), batch.logits.log_softmax(dim=-1)
        return (
            hparams.text_weight * F.l1_loss(batch.text_features, self.frozen_text)
            + hparams.image_weight * F.l1_loss(batch.image_features, frozen_image)
            + (log_q.exp() * (log_q - log_p)).mean()
        )

    def epoch_weight(self, epoch: int) -> float:
        """Return the weight of an epoch, counted from 1, relative to that of the epoch that weighs most."""
        hparams = self.experiment.hparams
        nearest = min(max(round(hparams.gpa_mean), 1), self.epochs)
        squares = [(e - hparams.gpa_mean) ** 2 for e in (epoch, nearest)]
        return math.exp((squares[1] - squares[0]) / (2 * hparams.gpa_std**2))

    @torch.no_grad()
    def after_step(self, iteration: int) -> None:
        per_epoch = self.experiment.hparams.batches_per_epoch(len(self.experiment.task.train))
        if iteration % per_epoch == 0:
            weight = self.epoch_weight(iteration // per_epoch)
            self.share += weight
            for name, p in self.parameters.items():
                self.average[name] += weight * p

    @torch.no_grad()
    def finish(self) -> None:
        for name, p in self.parameters.items():
            p.copy_(self.average[name] / self.share)

    def state_dict(self) -> dict:
        average = {name: total.to("cpu", copy=True) for name, total in self.average.items()}
        return super().state_dict() | {"average": average, "share": self.share}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.share = state["share"]
        for name, total in state["average"].items():
            self.average[name].copy_(total)


def prepare(experiment: Experiment[Hparams]) -> PromptSRC:
    return PromptSRC(experiment)
