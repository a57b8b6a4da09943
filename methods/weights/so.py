"""SO on the attention and MLP matrices of CLIP (arXiv 2504.12436). The update itself: optimizers/SparseOptimizer.py."""

from dataclasses import dataclass

from experiment import Experiment
from optimizers import SO, attach
from settings import option

from ..adaptation import Adaptation
from ..choice import BlockTraining, cosine_schedule, select_matrices


@dataclass(frozen=True)
class Sparse(BlockTraining):
    """What SO and its ablations share. The defaults are the released settings: lr 2e-4 with a cosine schedule to 1e-6,
    batch 32, 2000 iterations a shot, early stop at an epoch's loss of 0.01, s = 0.99995, T = 5. The paper's text has
    other ones: configs/so_paper.yaml."""

    density_ratio: float = option(
        5e-5, "fraction of each matrix's entries that have a gradient and moments", above=0, at_most=1, complement="s"
    )
    t: int = option(5, "iterations between two random draws of the entries that get a gradient", at_least=1)
    prune_first: bool = option(False, "prune before the update, as in the paper's equation; released: after it")


@dataclass(frozen=True)
class Hparams(Sparse):
    """SO's released settings."""

    sampled_gradients: bool = option(True, "compute weight gradients only at the support; the same to rounding")


def sparse_adaptation(experiment: Experiment[Sparse], kind: type, **choices: str) -> Adaptation:
    """Return an adaptation by an optimizer of this kind, SO or its ablation with the `choices` that replace SO's."""
    hparams = experiment.hparams
    parameters = select_matrices(experiment.model, hparams)
    optimizer = kind(
        parameters.values(),
        lr=hparams.lr,
        density_ratio=hparams.density_ratio,
        T=hparams.t,
        prune_first=hparams.prune_first,
        seed=experiment.settings.seed,
        **choices,
    )
    return Adaptation(experiment, parameters, optimizer, cosine_schedule(optimizer, hparams.total_iters))


def prepare(experiment: Experiment[Hparams]) -> Adaptation:
    adaptation = sparse_adaptation(experiment, SO)
    if experiment.hparams.sampled_gradients:
        attach(experiment.model, adaptation.optimizer)
    return adaptation
