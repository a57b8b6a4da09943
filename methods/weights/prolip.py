"""ProLIP: the projection at the end of the image encoder, trained with a pull back to its start.

Source: Fahes et al., "CLIP's Visual Embedding Projector is a Few-shot Cornucopia" (arXiv 2410.05270), and the code of
astra-vision/ProLIP. Trained is the matrix that maps the encoder's output to the embedding: `visual.proj` of a ViT, and
of a ResNet `attnpool.c_proj.weight` without its bias. The text classifier is frozen.

    loss = cross-entropy of 100 x cosines + lambda |W - W_0|^2 (squared Frobenius norm),  lambda = 1 / shots

Read in that code: Adam with eps 1e-4; 300 updates, each from all training images at once, augmented again (random crops
of 50 to 100 % of the area, flips); cosine schedule to 0. Its configurations have lr 1e-5, 1e-4, 1e-3 and 1e-2 with this
lambda. The default here is 1e-5, which that code uses for the weights that it evaluates on other datasets. It also has
lambda = 1 / shots^2, and a search of lr and lambda on validation images. It was not checked which tables of the paper
use which.

Differences: features are computed during training instead of beforehand, in float32 instead of half precision, and the
prompts are those of all methods (--prompts), where that code uses each dataset's own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clip import parts
from common import UserError
from experiment import Experiment
from settings import Training, option, with_default

from ..adaptation import Adaptation, Batch
from ..choice import cosine_schedule, whole_epochs


@dataclass(frozen=True)
class Hparams(Training):
    """The released settings without validation images."""

    lr: float = with_default(Training, "lr", 1e-5)
    epochs: int | None = with_default(Training, "epochs", 300)  # an update each
    batch_size: int = with_default(Training, "batch_size", 256)  # images that are read at a time
    early_stop_loss: float = with_default(Training, "early_stop_loss", 0.0)
    min_area: float = with_default(Training, "min_area", 0.5)
    prolip_lambda: float = option(1.0, "lambda = this value / shots", at_least=0)


class ProLIP(Adaptation):
    """The projection, and lambda times its squared distance to what it was."""

    full_batch = True

    def __init__(self, experiment: Experiment[Hparams], name: str, projection: nn.Parameter):
        super().__init__(experiment, {name: projection})
        self.projection, self.initial = projection, projection.detach().clone()
        self.weight = experiment.hparams.prolip_lambda / experiment.settings.shots

    def penalty(self, batch: Batch) -> Tensor:
        return self.weight * (self.projection - self.initial).square().sum()


def prepare(experiment: Experiment[Hparams]) -> ProLIP:
    model, hparams = experiment.model, experiment.hparams
    epochs = whole_epochs("prolip", hparams, len(experiment.task.train))
    name = parts.projection(model)
    if name is None:
        raise UserError(
            f"prolip needs a projection at the end of the image tower, and {experiment.settings.backbone} has none"
        )
    projection = model.get_parameter(name)
    model.requires_grad_(False)
    projection.requires_grad_(True)
    adaptation = ProLIP(experiment, name, projection)
    adaptation.optimizer = torch.optim.Adam([projection], lr=hparams.lr, eps=1e-4)
    adaptation.scheduler = cosine_schedule(adaptation.optimizer, epochs, lowest=0.0)
    return adaptation
