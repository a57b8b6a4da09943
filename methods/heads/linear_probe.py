"""Logistic regression on frozen image features: scikit-learn's, with the lbfgs solver and an L2 penalty.

Source: Radford et al. 2021 (CLIP, arXiv 2103.00020), section 3.2 and appendix A.3, and the example in the README of
openai/CLIP: `LogisticRegression(C=0.316, max_iter=1000)`, with the remark that C should come from a sweep on
validation data. Defaults here: that C and that max_iter; scikit-learn's for the rest (tolerance 1e-4, no penalty on
the intercept).

- Images are not augmented: one centre crop each, as in that example.
- The features have length 100, as in CLIP's logits. The example takes them as the encoder gives them, which is shorter,
  so that the same C is a stronger penalty there. For unit features f the logits are W (100 f) + b: with the text
  classifier as W and b = 0 they are zero-shot CLIP's.
- `text_init` starts the solver at that W and b instead of at zero, by scikit-learn's warm start. Nothing else changes:
  the penalty still pulls W towards zero. The problem is strictly convex in W, so the start makes no difference if the
  solver converges, only if it stops earlier, by its tolerance or by `probe_iters`. Related methods: ZS-LP of CLAP
  (arXiv 2312.12730) starts at the text classifier and takes 300 epochs of SGD; LP++ (arXiv 2404.02285) adds the text
  classifier to W, with a learned factor per class.
- With two classes scikit-learn fits one vector w, the difference of the two; the rows of W are then -w/2 and w/2.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common import UserError, note
from experiment import Experiment
from settings import Hparams as Base
from settings import option

from .head import Head


@dataclass(frozen=True)
class Hparams(Base):
    """The values of the example in openai/CLIP."""

    probe_c: float = option(0.316, "inverse strength of the L2 penalty, scikit-learn's C", above=0)
    probe_iters: int = option(1000, "most iterations of the solver", at_least=1)
    text_init: bool = option(False, "start the solver at the text classifier, not at zero")


class LinearProbe(Head):
    """A weight matrix [C, E] and a bias [C] for 100 x unit features."""

    def __init__(self, experiment: Experiment[Hparams]):
        classes, width, device = len(experiment.task.class_names), experiment.model.arch.embed_dim, experiment.device
        self.weight = torch.zeros(classes, width, device=device, requires_grad=True)
        self.bias = torch.zeros(classes, device=device, requires_grad=True)
        super().__init__(experiment, {"weight": self.weight, "bias": self.bias}, by_class=True)

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        return self.experiment.cosine_logits(image_features, self.weight) + self.bias

    def build(self) -> None:
        """Fit the probe to the training images. Raise UserError if a class has none, or if there is only one class."""
        task, hparams = self.experiment.task, self.experiment.hparams
        labels = [item.label for item in task.train]
        if len(set(labels)) != len(task.class_names) or len(task.class_names) < 2:
            raise UserError("linear_probe needs at least two classes, all with training images; use another --method")
        features = self.experiment.train_features()
        text = self.text_classifier().cpu() if hparams.text_init else None
        weight, bias = fit_probe(
            features, labels, hparams.probe_c, hparams.probe_iters, text, self.experiment.model.logit_factor
        )
        with torch.no_grad():
            self.weight.copy_(weight)
            self.bias.copy_(bias)


def fit_probe(
    features: Tensor, labels: list[int], c: float, iterations: int, start: Tensor | None, factor: float = 100.0
) -> tuple[Tensor, Tensor]:
    """Return weight [C, E] and bias [C] of the logistic regression on `factor` x `features` [N, E], labels 0 to C - 1.

    `start` [C, E], if given, is where the solver begins. A note says when it has not converged.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(C=c, max_iter=iterations, warm_start=start is not None)
    if start is not None:
        first = start.double().numpy()
        probe.coef_ = first if len(first) > 2 else first[1:] - first[:1]
        probe.intercept_ = np.zeros(len(probe.coef_))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        probe.fit(factor * features.double().numpy(), labels)
    if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
        reason = f"stopped after {probe.n_iter_[0]} iterations without convergence"
        note(f"the linear probe {reason}; --probe_iters allows more")
    weight, bias = torch.from_numpy(probe.coef_), torch.from_numpy(probe.intercept_)
    if len(weight) == 1:
        return torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return weight, bias


def prepare(experiment: Experiment[Hparams]) -> LinearProbe:
    return LinearProbe(experiment)
