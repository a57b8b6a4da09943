"""ProGrad: CoOp whose gradient may not work against what CLIP's own prompts say.

Source: Zhu et al., "Prompt-aligned Gradient for Prompt Tuning" (arXiv 2205.14865), and the code of
BeierZhu/Prompt-align. The prompts are those of `context.py`. Two losses of the same batch have the gradients

    g  of the cross-entropy, and
    k  of T^2 mean over images of -sum_c p_c log q_c, with p = softmax(z0 / T) of the frozen prompts' logits z0 and
       q = softmax(z / T) of the trained ones' z.

Where they disagree, g . k < 0 over all vectors together, g loses its part along k and becomes

    g - prograd_lambda (g . k / k . k) k.

SGD then steps along g; k is not added.

Published: lambda 1, T 1; 16 vectors, of which the last ones start at the words of the set's template and the others at
zero; the set's template is also that of the frozen prompts, with the class name at its end (prograd.yaml); lr 0.002,
batch 32, epochs as CoOp's for RN50: 50 at 1 shot, 100 at 2 and 4, 200 at 8 and 16, on ImageNet 50. Base-to-new: 4
shots, 100 epochs. The same lambda for all datasets.

Differences: as in `coop.py`. The authors' frozen prompts put the words of `ctx_init` before the class name, and so does
this program, whatever `--prompts` and `--template` say.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import distributed
from common import UserError
from experiment import Experiment
from settings import option

from ..adaptation import Batch
from .context import Context, ContextTraining, DasslTraining, number_of_words, word_vectors


@dataclass(frozen=True)
class Hparams(ContextTraining):
    """The published settings; `ctx_init` is that of most datasets."""

    ctx_init: str = option("a photo of a", "words before the class name in the frozen prompts; the vectors start there")
    prograd_lambda: float = option(1.0, "share of the conflicting part that the gradient loses", at_least=0)
    prograd_t: float = option(1.0, "temperature of the distillation loss", above=0)

    def __post_init__(self) -> None:
        DasslTraining.__post_init__(self)  # n_ctx is not the number of words here
        if number_of_words(self.ctx_init) > self.n_ctx:
            raise UserError(f"--ctx_init has more than {self.n_ctx} tokens; raise --n_ctx or take fewer words")


class ProGrad(Context):
    """`direction` [M, D] is k of the last batch, times any positive factor."""

    def __init__(self, experiment: Experiment[Hparams]):
        super().__init__(experiment)
        self.direction = torch.zeros_like(self.vectors)
        self.optimizer.register_step_pre_hook(lambda *_: self.project())

    def build(self) -> None:
        """Compute the unit text features [C, E] of the frozen prompts."""
        self.frozen = self.experiment.text_classifier([f"{self.experiment.hparams.ctx_init} {{}}."])

    def start(self, experiment: Experiment[Hparams]) -> Tensor:
        words = word_vectors(experiment, experiment.hparams.ctx_init)
        return torch.cat([words.new_zeros(experiment.hparams.n_ctx - len(words), words.shape[1]), words])

    def loss(self, batch: Batch) -> Tensor:
        """Return the cross-entropy, and keep the direction that its gradient is compared with."""
        T = self.experiment.hparams.prograd_t
        teacher = self.experiment.cosine_logits(batch.image_features, self.frozen)
        distillation = T**2 * F.cross_entropy(batch.logits / T, (teacher / T).softmax(dim=-1))
        scaled = self.scaler.scale(batch.share * distillation)
        (direction,) = torch.autograd.grad(scaled, self.vectors, retain_graph=True)
        self.direction = distributed.total(direction)
        return super().loss(batch)

    @torch.no_grad()
    def project(self) -> None:
        """Take from the gradient what points against `direction`."""
        gradient, k = self.vectors.grad, self.direction
        disagreement = (gradient * k).sum().clamp(max=0) / k.square().sum().clamp(min=torch.finfo(k.dtype).tiny)
        gradient.sub_(self.experiment.hparams.prograd_lambda * disagreement * k)


def prepare(experiment: Experiment[Hparams]) -> ProGrad:
    return ProGrad(experiment)
