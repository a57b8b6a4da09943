"""SO with one of its choices replaced, on the matrices that SO trains. The update itself: optimizers/ablations.py.

configs/ablations/ has a file for each row of the paper's ablation table (arXiv 2504.12436).
"""

from dataclasses import dataclass

from experiment import Experiment
from optimizers import SOAblation
from optimizers.ablations import GRADIENTS, MOMENTS, SUPPORTS
from settings import option

from ..adaptation import Adaptation
from .so import Sparse, sparse_adaptation


@dataclass(frozen=True)
class Hparams(Sparse):
    """The three choices are SO's by default: random, importance, dynamic."""

    gradient: str = option("random", "which entries have a gradient", choices=GRADIENTS)
    moments: str = option("importance", "which entries keep moments", choices=MOMENTS)
    support: str = option("dynamic", "entries with a gradient are drawn every t iterations, or once", choices=SUPPORTS)


def prepare(experiment: Experiment[Hparams]) -> Adaptation:
    choices = {name: getattr(experiment.hparams, name) for name in ("gradient", "moments", "support")}
    return sparse_adaptation(experiment, SOAblation, **choices)
