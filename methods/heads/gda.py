"""GDA: Gaussian discriminant analysis of augmented views' features, added to CLIP's classifier. Nothing is trained.

Source: Wang et al., "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation" (ICLR 2024, arXiv 2402.04087),
and the code of mrflogs/ICLR24. X are the unit features [N, E] of the training images' views, 10 of each (random crops
of 50 to 100 % of the area, flips), and mu_c the mean of class c's. S is the scatter of X about the class means. The
covariance is S / (N - 1), and the precision P is the shrunk estimate of Kubokawa and Srivastava:

    P = E pinv(S + tr(S / (N - 1)) I),  W_c = P mu_c,  b_c = -log C - mu_c' P mu_c / 2
    logits = 100 f T' + alpha (f W' + b)

T is the text classifier. N counts views, so more views weaken the shrinkage.

Base-to-new as in that code: on the base classes (`--classes base`) P is the pseudo-inverse of the mean of the classes'
own covariances. For a new class with text feature w the base views nearest to w, 64 of them, stand in for its images:
mu is the mean of these and of 16 copies of w, and P is the mean over the new classes of the shrunk precisions of the 64
about w. Therefore the file of a head that was fitted on base classes holds its views.

Difference: that code chooses alpha out of 1e-4, 1e-3, ..., 100 by the accuracy on the full validation part, for
ImageNet on the test images. Here alpha is 1 unless it is given; configs/gda_search.yaml has the same choice by the
few-shot validation images. The prompts are those of all methods (--prompts), where that code uses each dataset's own.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clip.delta import read_adapted
from common import UserError
from experiment import Experiment
from settings import Views, option

from ..saving import Tensors
from .head import FORMAT, Head

NEAREST, TEXT_COPIES = 64, 16  # for a new class: base views, and copies of its text feature


@dataclass(frozen=True)
class Hparams(Views):
    """The released settings, except alpha."""

    gda_alpha: float = option(1.0, "weight of the Gaussian classifier added to CLIP's logits", at_least=0)
    views: int = option(10, "augmented views of each training image", at_least=1)


class GDA(Head):
    """A weight matrix [C, E] and a bias [C] for unit features."""

    def __init__(self, experiment: Experiment[Hparams]):
        classes, width, device = len(experiment.task.class_names), experiment.model.arch.embed_dim, experiment.device
        self.weight, self.bias = torch.zeros(classes, width, device=device), torch.zeros(classes, device=device)
        super().__init__(experiment, {"weight": self.weight, "bias": self.bias})
        if experiment.settings.classes != "all":
            self.saved = WithViews(self)

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        gaussian = image_features @ self.weight.T + self.bias
        return (
            self.experiment.cosine_logits(image_features, text_features) + self.experiment.hparams.gda_alpha * gaussian
        )

    def build(self) -> None:
        """Fit the classifier to augmented views of the training images. Raise UserError if a class has too few."""
        task, hparams = self.experiment.task, self.experiment.hparams
        labels = torch.tensor([item.label for item in task.train], device=self.experiment.device)
        if len(labels.unique()) != len(task.class_names) or hparams.views * labels.bincount().min() < 2:
            raise UserError("gda needs at least two views of every class; raise --views or --shots")
        features = F.normalize(self.experiment.augmented_features(hparams.views), dim=-1).flatten(0, 1)
        views, labels = features.double(), labels.repeat(hparams.views)
        means = torch.stack([views[labels == label].mean(dim=0) for label in range(len(task.class_names))])
        if isinstance(self.saved, WithViews):
            self.saved.tensors["views"] = features
            covariances = (views[labels == label].T.cov() for label in range(len(means)))  # one at a time: memory
            precision = torch.linalg.pinv(sum(covariances) / len(means))
        else:
            precision = shrunk_precision(views - means[labels])
        self.take(means, precision)

    def build_new(self, views: Tensor) -> None:
        """Make the classifier of new classes from the base classes' views [N, E] and the new classes' text features."""
        views, means, precisions = views.double().to(self.experiment.device), [], []
        for text in self.text_classifier().double():
            nearest = views[(views @ text).topk(min(NEAREST, len(views))).indices]
            means.append(torch.cat([nearest, text.expand(TEXT_COPIES, -1)]).mean(dim=0))
            precisions.append(shrunk_precision(nearest - text))
        self.take(torch.stack(means), torch.stack(precisions).mean(dim=0))

    @torch.no_grad()
    def take(self, means: Tensor, precision: Tensor) -> None:
        """Set weight and bias from the class means [C, E] and the precision [E, E]."""
        weight = means @ precision
        self.weight.copy_(weight)
        self.bias.copy_(-math.log(len(means)) - (weight * means).sum(dim=1) / 2)


def shrunk_precision(centred: Tensor) -> Tensor:
    """Return the inverse [E, E] of the covariance of `centred` [N, E], shrunk as Kubokawa and Srivastava do."""
    views, width = centred.shape
    scatter = centred.T @ centred
    shrinkage = scatter.trace() / (views - 1) * torch.eye(width, dtype=centred.dtype, device=centred.device)
    return width * torch.linalg.pinv(scatter + shrinkage)


class WithViews(Tensors):
    """The file of a head on one half of the classes: with the base classes' views, for the new classes."""

    def __init__(self, head: GDA):
        super().__init__(FORMAT, head.saved.tensors | {"views": head.weight.new_zeros(0, head.weight.shape[1])})
        self.head, self.class_names, self.varying = head, head.saved.class_names, {"views"}

    def changed_weights(self) -> int:
        return sum(self.tensors[name].numel() for name in ("weight", "bias"))

    def load(self, path: Path, base_sha256: str) -> None:
        saved, _ = read_adapted(path, self.format, base_sha256)
        if self.head.experiment.settings.classes == "new" and "views" in saved:
            self.head.build_new(saved["views"])
        else:
            super().load(path, base_sha256)


def prepare(experiment: Experiment[Hparams]) -> GDA:
    return GDA(experiment)
