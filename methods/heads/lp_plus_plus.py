"""LP++: a linear probe plus the text classifier, blended by a trained factor for each class.

Source: Huang et al., "LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP" (CVPR 2024, arXiv 2404.02285), and
the code of FereshteShakeri/FewShot-CLIP-Strong-Baseline. For unit image features f and text features t_c, without
CLIP's factor 100,

    logits = w_c . f + b_c + alpha_c (f . t_c)

Read in that code: one augmented view of each of the N training images (random crops of 50 to 100 % of the area, flips).
w_c starts at the *sum* of its class's features, b as in torch's linear layers (random; it is trained too), and every
alpha_c at 250 times the mean over the classes of the mean cosine between a class's images and its text. 300 updates,
each from all images. The step sizes follow from the features, F [N, E]:

    lr_w = 4 N / (largest eigenvalue of F' F),  lr_alpha = N / (4 max_c sum_i (f_i . t_c)^2)

w and b are updated by SGD with momentum 0.9, alpha by one plain step after every 10th update. The code never clears
alpha's gradient, so that this step takes the sum of the gradients of all updates so far; so does this one. `--lr` is a
factor on both step sizes. The curve's lr is that of w.

The authors take the update with the best accuracy on few-shot validation images, and report 10 draws. Here the last
update counts; configs/lp_plus_plus_search.yaml chooses the number of updates on the few-shot validation images.

Base-to-new: w, b and alpha belong to their classes, and the authors do not define others. Some of the same classes, as
in ImageNet-A and -R, take their rows.

Differences: float32 instead of half precision. The prompts are those of all methods (--prompts), where that code uses
each dataset's own; with several templates t_c is their mean, as there. The updates are summed up over parts of
`--batch_size` images, to bound memory.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import UserError
from experiment import Experiment
from settings import Training, option, with_default

from ..choice import whole_epochs
from .cached import CachedHead
from .clip_adapter import linear_start

MOMENTUM = 0.9
ALPHA_EVERY = 10  # updates of w between two of alpha
ALPHA_START = 250.0  # times the mean cosine


@dataclass(frozen=True)
class Hparams(Training):
    """The released settings, without the choice of an update."""

    lr: float = option(1.0, "factor on the step sizes that follow from the features", group="training", above=0)
    epochs: int | None = with_default(Training, "epochs", 300)  # an update each
    batch_size: int = with_default(Training, "batch_size", 256)  # features at a time
    early_stop_loss: float = with_default(Training, "early_stop_loss", 0.0)
    min_area: float = with_default(Training, "min_area", 0.5)


class LPPlusPlus(CachedHead):
    """w [C, E], b [C] and alpha [C]."""

    full_batch = True

    def __init__(self, experiment: Experiment[Hparams]):
        whole_epochs("lp_plus_plus", experiment.hparams, len(experiment.task.train))
        generator, text = torch.Generator().manual_seed(experiment.settings.seed), experiment.text_embeddings()[0]
        self.weight = nn.Parameter(torch.zeros_like(text))
        self.bias = nn.Parameter(linear_start(*text.shape, generator)[:, 0].to(text))
        self.alpha = nn.Parameter(torch.zeros_like(text[:, 0]))
        tensors = {"weight": self.weight, "bias": self.bias, "alpha": self.alpha}
        super().__init__(experiment, tensors, by_class=True)
        self.optimizer = torch.optim.SGD([self.weight, self.bias], lr=experiment.hparams.lr, momentum=MOMENTUM)

    @torch.no_grad()
    def build(self) -> None:
        """Compute the features, the start and the step sizes. Raise UserError if a class has no training images."""
        self.fill(self.experiment.augmented_features(1)[0])
        classes, features = len(self.zero_shot), self.image_features(self.pool)
        if len(self.labels.unique()) != classes:
            raise UserError("lp_plus_plus needs training images of every class; use another --method")
        own = F.one_hot(self.labels, classes).to(features)  # [N, C]
        cosines = features @ self.zero_shot.T
        self.weight.copy_(own.T @ features)
        self.alpha.fill_(ALPHA_START * ((own * cosines).sum(dim=0) / own.sum(dim=0)).mean())
        self.alpha.grad = torch.zeros_like(self.alpha)
        largest = torch.linalg.eigvalsh((features.T @ features).double())[-1].item()
        factor = self.experiment.hparams.lr * len(features)
        self.optimizer.param_groups[0]["lr"] = 4 * factor / largest
        self.alpha_lr = factor / (4 * cosines.square().sum(dim=0).max().item())

    def order(self, epoch: int) -> Tensor:
        return torch.arange(len(self.pool))

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        return image_features @ self.weight.T + self.bias + self.alpha * (image_features @ text_features.T)

    @torch.no_grad()
    def after_step(self, iteration: int) -> None:
        updates = iteration // self.experiment.hparams.batches_per_epoch(len(self.pool))
        if updates % ALPHA_EVERY == 0:
            self.alpha -= self.alpha_lr * self.alpha.grad

    def state_dict(self) -> dict:
        return super().state_dict() | {"alpha_gradient": self.alpha.grad.cpu().clone()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.alpha.grad.copy_(state["alpha_gradient"])


def prepare(experiment: Experiment[Hparams]) -> LPPlusPlus:
    return LPPlusPlus(experiment)
