"""ReLoRA (Lialin et al., arXiv 2307.05695): LoRA that is merged into the weights and started again several times, so
that the sum of its updates may have a high rank.

Every `merge_every` iterations W becomes W + s B A, A is drawn again, B is set to zero, and the optimizer's state is
dropped. The learning rate, a cosine over the whole run, drops and climbs back to the cosine in a tenth of the cycle.
Published: cycles of 1,000 to 5,000 iterations, 50 to 100 of them to climb. Layers, rank and everything else are LoRA's
(lora.py).

Differences from the paper, which trains language models from scratch: all weights are not trained first, and the whole
state of the optimizer is dropped, with its step count, where the paper keeps the largest 1 % of the moments. With
cycles shorter than Adam's memory (1,000 iterations at beta2 0.999), moments near zero with an old step count would make
steps several times too long.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from experiment import Experiment
from settings import option

from ..choice import MINIMUM_LR
from ..saving import Delta
from . import lora

CLIMB = 0.1  # part of a cycle in which the learning rate comes back


@dataclass(frozen=True)
class Hparams(lora.Hparams):
    """CLIP-LoRA's published values. The 125 iterations between two merges are this project's choice."""

    merge_every: int = option(125, "iterations between two merges", at_least=1)


class ReLoRA(lora.LoRA):
    """LoRA with restarts. It changes all entries of the adapted matrices, and is saved as a delta."""

    def __init__(self, experiment: Experiment[Hparams]):
        super().__init__(experiment)
        self.merge_every, self.iterations = experiment.hparams.merge_every, experiment.hparams.total_iters
        adapted = {id(branches.layer.weight) for branches in self.branches}
        weights = self.model.state_dict(keep_vars=True)
        before = {name: t.detach().to("cpu", copy=True) for name, t in weights.items() if id(t) in adapted}
        self.saved = Delta(self.model, before)
        factor = jagged_cosine(experiment.hparams.lr, self.iterations, self.merge_every)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def after_step(self, iteration: int) -> None:
        if iteration % self.merge_every == 0 and iteration < self.iterations:
            self.finish()
            for branches in self.branches:
                branches.start(self.generator)
            self.optimizer.state.clear()

    @torch.no_grad()
    def finish(self) -> None:
        """Add the branches to the weights and set B to zero: the model computes what it did before."""
        for branches in self.branches:
            branches.layer.weight.copy_(branches.merged())
            for B in branches.B.values():
                B.zero_()

    def state_dict(self) -> dict:
        return super().state_dict() | {"matrices": {name: p.detach().cpu() for name, p in self.parameters.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        for name, p in self.parameters.items():
            p.copy_(state["matrices"][name])


def jagged_cosine(lr: float, iterations: int, cycle: int) -> Callable[[int], float]:
    """Return a map from an iteration, counted from 0, to the factor on `lr`: half a cosine down to 1e-6 over all
    iterations and, after each restart, a linear climb back to it."""
    lowest, climb = min(MINIMUM_LR, lr) / lr, math.ceil(CLIMB * cycle)

    def factor(iteration: int) -> float:
        cosine = lowest + (1 - lowest) * (1 + math.cos(math.pi * iteration / iterations)) / 2
        return cosine * min(1.0, (iteration % cycle + 1) / climb) if iteration >= cycle else cosine

    return factor


def prepare(experiment: Experiment[Hparams]) -> ReLoRA:
    return ReLoRA(experiment)
