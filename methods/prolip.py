"""ProLIP: the projection at the end of the image encoder, trained with a pull back to its start.

Source: Fahes et al., "CLIP's Visual Embedding Projector is a Few-shot Cornucopia" (arXiv 2410.05270), and the code of
astra-vision/ProLIP, whose settings without validation images are the defaults. Trained is the matrix that maps the
encoder's output to the embedding (`visual.proj` of a ViT; of a ResNet `attnpool.c_proj.weight`, its bias stays),
against the frozen text classifier:

    loss = cross-entropy of 100 x cosines + lambda |W - W_0|^2 (squared Frobenius norm),  lambda = 1 / shots

Read in that code: Adam with eps 1e-4; 300 updates, each from all training images at once, augmented anew (random crops
of 50 to 100 % of the area, flips); cosine schedule to 0. Its configurations have lr 1e-5, 1e-4, 1e-3 and 1e-2 with this
lambda; the default is 1e-5, with which it trains the weights that it evaluates on other data sets. Its other variants
are lambda = 1 / shots^2 and a search of lr and lambda on validation images. Which tables of the paper use which was not
checked. Here the features are computed as training goes instead of beforehand, in float32 instead of half precision,
and the prompts are those of all methods (--prompts), where that code uses each data set's own.
"""

import torch
from torch import Tensor, nn

from clip import CLIP
from datasets import Task, batches_per_epoch

from .adaptation import TRAINING, Adaptation, MethodError, cosine_schedule

HYPERPARAMETERS = (*TRAINING, "prolip_lambda")
DEFAULTS: dict = {
    "lr": 1e-5,
    "epochs": 300,  # an update each
    "batch_size": 256,  # images that are read at a time
    "early_stop_loss": 0.0,
    "min_area": 0.5,
}


class ProLIP(Adaptation):
    """The projection, and lambda times its squared distance to what it was."""

    full_batch = True

    def __init__(self, model: CLIP, name: str, projection: nn.Parameter, penalty_weight: float):
        super().__init__(model, {name: projection})
        self.projection, self.penalty_weight = projection, penalty_weight
        self.initial = projection.detach().clone()

    def penalty(self) -> Tensor:
        return self.penalty_weight * (self.projection - self.initial).square().sum()


def prepare(model: CLIP, task: Task, settings) -> ProLIP:
    per_epoch = max(1, batches_per_epoch(len(task.train), settings.batch_size))  # no images where nothing is trained
    if settings.iterations % per_epoch and not settings.eval_only:
        raise MethodError(
            f"prolip trains in whole epochs, here of {per_epoch} iterations, and {settings.iterations} are none; "
            "use --epochs"
        )
    name = "visual.proj" if model.arch.is_vit else "visual.attnpool.c_proj.weight"
    projection = model.get_parameter(name)
    model.requires_grad_(False)
    projection.requires_grad_(True)
    adaptation = ProLIP(model, name, projection, settings.prolip_lambda / settings.shots)
    adaptation.optimizer = torch.optim.Adam([projection], lr=settings.lr, eps=1e-4)
    adaptation.scheduler = cosine_schedule(adaptation.optimizer, settings.iterations // per_epoch, lowest=0.0)
    return adaptation
