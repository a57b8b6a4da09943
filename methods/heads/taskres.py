"""TaskRes: a trained residual added to each class's text feature; CLIP is frozen.

Source: Yu et al., "Task Residual for Tuning Vision-Language Models" (CVPR 2023, arXiv 2211.10277), and the code of
geekyutao/TaskRes. With t_c the mean over the templates of CLIP's text features as the encoder gives them, and unit
image features f

    logits = 100 f . r_c / |r_c|,  r_c = t_c + alpha x_c,  x_c trained from zero

Read in that code: alpha 0.5, for Oxford Flowers 1; Adam with lr 2e-3, for ImageNet 2e-4, and weight decay 5e-4 as L2 in
the gradient (Dassl's default); batches of 256; 100 epochs at 1, 2 and 4 shots, 200 at 8 and 16; random crops of 8 to
100 % of the area, flips. The rate is 1e-5 in the first epoch, in which Adam's moments advance already, then a cosine
between epochs (`epoch_cosine`). An epoch leaves out its last, smaller batch. What the values for the two datasets
(taskres.yaml) were chosen on is not said; `--taskres_alpha 0.5` and `--lr 2e-3` are the common ones.

Base-to-new: the residuals belong to their classes, and the authors do not define others. Some of the same classes, as
in ImageNet-A and -R, take their rows, as in that code.

Differences: that code augments images again in every epoch. Here epoch e has view e modulo 20 of each image, so that
features are computed once; with as many `--views` as epochs it is the same (configs/taskres_released.yaml). Float32
without TF32. The prompts are those of all methods (--prompts), where that code uses each dataset's own, for ImageNet
eight. The "enhanced base", text features of a projection tuned before, is left out.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiment import Experiment
from settings import option, with_default

from ..choice import dassl_schedule
from .cached import CachedHead, Viewed

WEIGHT_DECAY = 5e-4


@dataclass(frozen=True)
class Hparams(Viewed):
    """The published settings. Epochs for other numbers of shots than the published ones: 200."""

    lr: float = with_default(Viewed, "lr", 2e-3)
    epochs: int | None = with_default(Viewed, "epochs", 200)
    taskres_alpha: float = option(0.5, "factor on the residuals", above=0)


class TaskRes(CachedHead):
    """The residuals x [C, E], and the text features t [C, E] that they are added to."""

    def __init__(self, experiment: Experiment[Hparams]):
        self.base = experiment.text_embeddings().mean(dim=0)
        self.residual = nn.Parameter(torch.zeros_like(self.base))
        super().__init__(experiment, {"residual": self.residual}, by_class=True)
        hparams = experiment.hparams
        self.optimizer = torch.optim.Adam([self.residual], lr=hparams.lr, weight_decay=WEIGHT_DECAY)
        self.scheduler = dassl_schedule(self.optimizer, hparams, len(experiment.task.train))

    def classifier(self) -> Tensor:
        return F.normalize(self.base + self.experiment.hparams.taskres_alpha * self.residual, dim=-1)


def prepare(experiment: Experiment[Hparams]) -> TaskRes:
    return TaskRes(experiment)
