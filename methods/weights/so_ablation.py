"""SO with one of its choices replaced, on the matrices that SO trains. The update itself: optimizers/ablations.py.

configs/ablations/ has a file for each row of the paper's ablation table (arXiv 2504.12436).
"""

from dataclasses import dataclass

from experiment import Experiment
from optimizers import SOAblation
from optimizers.ablations import GRADIENTS, MOMENTS, SUPPORTS
from settings import option

from ..adaptation import Adaptation
from ..choice import cosine_schedule, select_matrices
from .so import Sparse


@dataclass(frozen=True)
class Hparams(Sparse):
    """The three choices are SO's by default: random, importance, dynamic."""

    gradient: str = option("random", "which entries have a gradient", choices=GRADIENTS)
    moments: str = option("importance", "which entries keep moments", choices=MOMENTS)
    support: str = option("dynamic", "entries with a gradient are drawn every t iterations, or once", choices=SUPPORTS)


def prepare(experiment: Experiment[Hparams]) -> Adaptation:
    hparams = experiment.hparams
    parameters = select_matrices(experiment.model, hparams)
    optimizer = SOAblation(
        parameters.values(),
        lr=hparams.lr,
        density_ratio=hparams.density_ratio,
        T=hparams.t,
        gradient=hparams.gradient,
        moments=hparams.moments,
        support=hparams.support,
        prune_first=hparams.prune_first,
        seed=experiment.settings.seed,
    )
    return Adaptation(experiment, parameters, optimizer, cosine_schedule(optimizer, hparams.total_iters))
