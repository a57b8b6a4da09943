"""What LoRA, DoRA and AdaLoRA share: small matrices added to frozen weights, saved without the weights, and merged into
them.

Two rules hold for all of them. A forward pass that records gradients computes the parts of the weights and of the
matrices side by side, with dropout. A forward pass without gradients, as in evaluation, uses the merged weights, at the
plain model's speed and with exactly the numbers that the model has after `merge`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clip import CLIP
from experiment import Experiment
from settings import option, with_default

from ..adaptation import Adaptation
from ..choice import BlockTraining
from ..saving import Tensors

WEIGHT_DECAY = 1e-2  # of all matrices, as in CLIP-LoRA


@dataclass(frozen=True)
class LowRank(BlockTraining):
    """CLIP-LoRA's values (arXiv 2405.18541), except which layers are adapted: 500 iterations a shot without early stop,
    AdamW with lr 2e-4 and weight decay 1e-2, cosine to 1e-6, batch 32. `methods.merge_file` knows by this class which
    files hold matrices."""

    n_iters: int | None = with_default(BlockTraining, "n_iters", 500)
    early_stop_loss: float = with_default(BlockTraining, "early_stop_loss", 0.0)
    rank: int = option(2, "rank of each update", at_least=1)
    alpha: float = option(1.0, "updates are scaled by alpha / sqrt(rank)", above=0)
    dropout: float = option(0.25, "dropout rate at the input of the added matrices", at_least=0, below=1)


class SeededDropout(nn.Module):
    """`nn.Dropout` that draws from its own `generator`. It always drops: forward passes without gradients, which use
    merged weights, do not call it."""

    def __init__(self, p: float, generator: torch.Generator):
        super().__init__()
        self.p, self.generator = p, generator

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0:
            return x
        dropped = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(self.p, generator=self.generator)
        return x.masked_fill(dropped, 0) / (1 - self.p)


class Matrices(Tensors):
    """A file with only the matrices. The weights that count as changed are CLIP's, once the matrices are merged."""

    def __init__(self, adapters: "Adapters"):
        super().__init__(adapters.FORMAT, adapters.parameters)
        self.adapters = adapters

    @torch.no_grad()
    def changed_weights(self) -> int:
        return sum(int((weight != merged).sum()) for weight, merged in self.adapters.merged_weights())


class Adapters(Adaptation):
    """Matrices that are trained and added to the model's weights.

    A subclass sets FORMAT, the kind of its files, puts its matrices into the model before it calls `__init__`, and
    implements `merged_weights` and `remove`.
    """

    FORMAT: str

    def __init__(self, experiment: Experiment[LowRank], parameters: dict[str, nn.Parameter]):
        self.parameters = parameters  # now, because `Matrices` reads them
        super().__init__(experiment, parameters, saved=Matrices(self))
        self.shares_prefix = experiment.hparams.dropout == 0  # with dropout each prompt draws for itself, as published

    def merged_weights(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each frozen weight that has matrices added to it, with the weight that replaces both."""
        raise NotImplementedError

    def remove(self) -> None:
        """Take the matrices out of the model, which then computes plainly again."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> CLIP:
        """Make the model a plain CLIP with the same outputs, ready for `clip.weights.save_weights`, and return it."""
        for weight, merged in self.merged_weights():
            weight.copy_(merged)
        self.remove()
        return self.model
