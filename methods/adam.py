"""Dense Adam (Kingma and Ba 2015) on the tensors that SO trains: full fine-tuning of the attention and MLP matrices.

The optimizer is torch's. Its settings are SO's, as far as it has them: lr 2e-4 with a cosine schedule, betas (0.9,
0.999), no weight decay, 2000 iterations a shot. The paper's ablation table (arXiv 2504.12436) gives 4.4 % for it at 1
shot.
"""

import torch

from clip import CLIP
from datasets import Task

from .adaptation import TRAINING, Adaptation, cosine_schedule, select_matrices

HYPERPARAMETERS = (*TRAINING, "encoder", "position")
DEFAULTS: dict = {}


def prepare(model: CLIP, task: Task, settings) -> Adaptation:
    parameters = select_matrices(model, settings.encoder, settings.position)
    optimizer = torch.optim.Adam(parameters.values(), lr=settings.lr)
    return Adaptation(model, parameters, optimizer, cosine_schedule(optimizer, settings.iterations))
