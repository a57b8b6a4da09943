"""SO on the attention and MLP matrices of CLIP, as published (arXiv 2504.12436): see optimizers/SparseOptimizer.py.

Released settings: density ratio 5e-5 (s = 0.99995), T = 5, lr 2e-4 with a cosine schedule, 2000 iterations a shot.
"""

from clip import CLIP
from datasets import Task
from optimizers import SO, attach

from .adaptation import TRAINING, Adaptation, cosine_schedule, select_matrices

HYPERPARAMETERS = (*TRAINING, "density_ratio", "t", "prune_first", "sampled_gradients", "encoder", "position")
DEFAULTS: dict = {}  # those in configs/settings.py are SO's


def prepare(model: CLIP, task: Task, settings) -> Adaptation:
    parameters = select_matrices(model, settings.encoder, settings.position)
    optimizer = SO(
        parameters.values(),
        lr=settings.lr,
        density_ratio=settings.density_ratio,
        T=settings.t,
        prune_first=settings.prune_first,
        seed=settings.seed,
    )
    if settings.sampled_gradients:
        attach(model, optimizer)
    return Adaptation(model, parameters, optimizer, cosine_schedule(optimizer, settings.iterations))
