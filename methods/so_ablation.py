"""SO with one of its choices replaced, on the matrices that SO trains: see optimizers/ablations.py.

Settings are SO's. configs/ablations/ has a file for each row of the paper's ablation table (arXiv 2504.12436).
"""

from clip import CLIP
from datasets import Task
from optimizers import SOAblation

from .adaptation import TRAINING, Adaptation, cosine_schedule, select_matrices

ABLATED = ("gradient", "moments", "support", "prune_first")
HYPERPARAMETERS = (*TRAINING, "density_ratio", "t", *ABLATED, "encoder", "position")
DEFAULTS: dict = {}


def prepare(model: CLIP, task: Task, settings) -> Adaptation:
    parameters = select_matrices(model, settings.encoder, settings.position)
    optimizer = SOAblation(
        parameters.values(),
        lr=settings.lr,
        density_ratio=settings.density_ratio,
        T=settings.t,
        gradient=settings.gradient,
        moments=settings.moments,
        support=settings.support,
        prune_first=settings.prune_first,
        seed=settings.seed,
    )
    return Adaptation(model, parameters, optimizer, cosine_schedule(optimizer, settings.iterations))
