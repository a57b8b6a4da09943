"""ZS-LP: a linear probe that starts at the text classifier; and what CLAP shares with it.

Source: Silva-Rodriguez et al., "A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models" (CVPR 2024,
arXiv 2312.12730), and the code of jusiro/CLAP. A class has a prototype w_c that starts at t_c, the mean over the
templates of CLIP's text features as the encoder gives them; for unit image features f

    logits = 100 f . w_c / |w_c|

Published, the same for all datasets and shots, without any validation images: features of 20 augmented views of each
training image (random crops of 8 to 100 % of the area, flips), 300 epochs of SGD with lr 0.1, momentum 0.9 and no
weight decay, batches of 256; rate 1e-5 in the first epoch, then a cosine between epochs (`epoch_cosine`). An epoch has
as many batches as one pass over the images, without a smaller last one, and draws them from all views in a new order.

Base-to-new: the prototypes belong to their classes, and the authors do not define others. Some of the same classes, as
in ImageNet-A and -R, take their rows, as in that code.

Differences: float32 without TF32. The prompts are those of all methods (--prompts), where that code uses each dataset's
own, for ImageNet eight; with several templates t_c is the mean over all of them, as there. A random start and other
initial multipliers, which that code offers too, are left out.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import datasets
from experiment import Experiment
from settings import with_default

from ..choice import dassl_schedule
from .cached import CachedHead, Viewed

MOMENTUM = 0.9


@dataclass(frozen=True)
class Hparams(Viewed):
    """The published settings."""

    lr: float = with_default(Viewed, "lr", 0.1)
    epochs: int | None = with_default(Viewed, "epochs", 300)


class Prototypes(CachedHead):
    """A prototype [E] for each class, of any length, and the text features [C, E] that they start at."""

    def __init__(self, experiment: Experiment[Hparams]):
        self.start = experiment.text_embeddings().mean(dim=0)
        self.weight = nn.Parameter(self.start.clone())
        super().__init__(experiment, {"weight": self.weight}, by_class=True)
        self.optimizer = torch.optim.SGD([self.weight], lr=experiment.hparams.lr, momentum=MOMENTUM)
        self.scheduler = dassl_schedule(self.optimizer, experiment.hparams, len(experiment.task.train))

    def order(self, epoch: int) -> Tensor:
        return datasets.shuffled(len(self.pool), self.experiment.settings.seed, epoch)

    def classifier(self) -> Tensor:
        return F.normalize(self.weight, dim=-1)


def prepare(experiment: Experiment[Hparams]) -> Prototypes:
    return Prototypes(experiment)
