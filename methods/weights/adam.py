"""Dense Adam (Kingma and Ba 2015) on the tensors that SO trains: full fine-tuning of the attention and MLP matrices.

The optimizer is torch's. The paper's ablation table (arXiv 2504.12436) gives 4.4 % for it at 1 shot.
"""

from dataclasses import dataclass

import torch

from experiment import Experiment

from ..adaptation import Adaptation
from ..choice import BlockTraining, cosine_schedule, select_matrices


@dataclass(frozen=True)
class Hparams(BlockTraining):
    """SO's released settings, as far as they apply: lr 2e-4 with a cosine schedule, 2000 iterations a shot. Betas are
    (0.9, 0.999), without weight decay."""


def prepare(experiment: Experiment[Hparams]) -> Adaptation:
    parameters = select_matrices(experiment.model, experiment.hparams)
    optimizer = torch.optim.Adam(parameters.values(), lr=experiment.hparams.lr)
    schedule = cosine_schedule(optimizer, experiment.hparams.total_iters)
    return Adaptation(experiment, parameters, optimizer, schedule)
