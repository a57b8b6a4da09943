"""CLAP: ZS-LP's prototypes with a pull back to the text features, stronger for classes that CLIP knows.

Source, settings, base-to-new and differences: zs_lp.py. Added to the cross-entropy is

    1/C sum_c lambda_c |w_c - t_c|^2

on the text features' own scale, with lambda_c the mean zero-shot probability of class c over the views of the training
images of class c. It is fixed for the whole training: the released "l2" constraint, without that code's optional
updates of the multipliers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from common import UserError
from experiment import Experiment

from ..adaptation import Batch
from .zs_lp import Hparams as Hparams
from .zs_lp import Prototypes

AT_ONCE = 4096  # views whose probabilities are in memory


class CLAP(Prototypes):
    """The multipliers lambda [C] are computed in `build`."""

    def build(self) -> None:
        super().build()
        self.multipliers = self.mean_probabilities()

    @torch.no_grad()
    def mean_probabilities(self) -> Tensor:
        """Return, for each class [C], the mean zero-shot probability of it over its own views. Raise UserError if a
        class has none."""
        text = F.normalize(self.start, dim=-1)
        sums = torch.zeros_like(self.start[:, 0])
        for features, labels in zip(self.pool.split(AT_ONCE), self.labels.split(AT_ONCE)):
            probabilities = self.experiment.cosine_logits(self.image_features(features), text).softmax(dim=-1)
            sums.index_add_(0, labels, probabilities.gather(1, labels[:, None])[:, 0])
        counts = self.labels.bincount(minlength=len(sums))
        if not counts.all():
            raise UserError("clap needs training images of every class; use another --method")
        return sums / counts

    def penalty(self, batch: Batch) -> Tensor:
        return (self.multipliers * (self.weight - self.start).square().sum(dim=1)).mean()


def prepare(experiment: Experiment[Hparams]) -> CLAP:
    return CLAP(experiment)
