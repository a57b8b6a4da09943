"""SHiRA: a fixed sparse set of entries in each matrix is trained, with Adam.

Source: Bhardwaj et al., "Sparse High Rank Adapters" (NeurIPS 2024, arXiv 2406.13175). A mask chooses entries of each
matrix W before training and stays; their values v are trained, all other entries keep theirs. Beside SO it shows what
choosing the entries again and again adds: same matrices, same Adam, and a fixed support.

Masks (`mask`), of k = max(1, int(numel x density_ratio)) entries in each matrix:

- random: uniform without replacement, from the run's seed;
- magnitude: the largest |W|;
- gradient: the largest |G|; G is the gradient of the mean training loss over all training images, one centre crop of
  each, under the unchanged weights in float32;
- snip: the largest |W G| (Lee et al., SNIP, arXiv 1810.02340).

The paper trains 1 to 2 % of the weights of language and diffusion models; it has no settings for CLIP. Here the density
is 1 %, and lr, schedule, iterations and batch are SO's, which the paper of SO uses for all its ablations.

Base-to-new and other datasets: the text tower makes the classifier of any classes.

Differences: which values of G its authors add up, in how many batches, was not checked in their code. peft's SHiRA
counts r (m + n) entries of an m x n matrix and has only the random mask; a scale on the change, for mixing several
adapters, is left out, and so is the mask of rows, columns and diagonals.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import utils
from experiment import IMAGES_AT_ONCE, Experiment
from optimizers.SparseOptimizer import draw_support
from settings import option

from ..adaptation import Adaptation
from ..choice import BlockTraining, cosine_schedule, select_matrices

MASKS = ("random", "magnitude", "gradient", "snip")


@dataclass(frozen=True)
class Hparams(BlockTraining):
    """SO's released settings, with the paper's share of the weights."""

    density_ratio: float = option(
        0.01, "fraction of each matrix's entries that are trained", above=0, at_most=1, complement="s"
    )
    mask: str = option("random", "how these entries are chosen", choices=MASKS)


class SHiRA(Adaptation):
    """Values at the masks of the matrices; `indices` are the masks, flat and ascending."""

    def __init__(self, experiment: Experiment[Hparams]):
        self.matrices = select_matrices(experiment.model, experiment.hparams)
        ratio = experiment.hparams.density_ratio
        self.counts = {name: max(1, int(W.numel() * ratio)) for name, W in self.matrices.items()}
        values = {name: nn.Parameter(W.new_zeros(self.counts[name])) for name, W in self.matrices.items()}
        optimizer = torch.optim.Adam(values.values(), lr=experiment.hparams.lr)
        super().__init__(experiment, values, optimizer, cosine_schedule(optimizer, experiment.hparams.total_iters))

    def build(self) -> None:
        """Choose the masks, and let each matrix give its gradient there to the values."""
        self.indices = self.masks()
        self.gather()
        for name, W in self.matrices.items():
            W.register_post_accumulate_grad_hook(lambda W, name=name: self.take_gradient(W, name))

    def masks(self) -> dict[str, Tensor]:
        """Return the chosen entries of each matrix."""
        kind = self.experiment.hparams.mask
        if kind == "random":
            generator = torch.Generator().manual_seed(self.experiment.settings.seed)
            drawn = (draw_support(W.numel(), self.counts[n], generator, W.device) for n, W in self.matrices.items())
        else:
            scores = {name: W.detach().abs() for name, W in self.matrices.items()} if kind != "gradient" else {}
            if kind != "magnitude":
                gradients = self.loss_gradients()
                scores = {name: scores.get(name, 1.0) * G.abs() for name, G in gradients.items()}
            drawn = (scores[name].flatten().topk(k).indices for name, k in self.counts.items())
        return {name: indices.sort().values for name, indices in zip(self.matrices, drawn)}

    def loss_gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the mean loss over all training images, not augmented, in float32."""
        experiment, task = self.experiment, self.experiment.task
        size = min(IMAGES_AT_ONCE, experiment.hparams.batch_size)
        prompts = self.prompts_of(range(len(task.class_names)))
        sums = {name: torch.zeros_like(W) for name, W in self.matrices.items()}
        for images, labels in experiment.test_batches(task.train, size):
            logits = self.logits(utils.encode_image(self.model, images), utils.encode_text(self.model, prompts))
            loss = F.cross_entropy(logits, labels.to(experiment.device), reduction="sum") / len(task.train)
            gradients = torch.autograd.grad(loss, self.matrices.values())
            for total, G in zip(sums.values(), gradients):
                total += G
        return sums

    def take_gradient(self, W: Tensor, name: str) -> None:
        """Keep the entries of a matrix's gradient that its values need, and free it."""
        gradient = W.grad.view(-1)[self.indices[name]]
        values = self.parameters[name]
        values.grad = gradient if values.grad is None else values.grad + gradient
        W.grad = None

    @torch.no_grad()
    def gather(self) -> None:
        """Set the values to what the matrices have."""
        for name, W in self.matrices.items():
            self.parameters[name].copy_(W.view(-1)[self.indices[name]])

    @torch.no_grad()
    def after_step(self, iteration: int) -> None:
        for name, W in self.matrices.items():
            W.view(-1)[self.indices[name]] = self.parameters[name]

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.gather()


def prepare(experiment: Experiment[Hparams]) -> SHiRA:
    return SHiRA(experiment)
