"""KgCoOp: CoOp whose text features are held near those of CLIP's own prompts.

Source: Yao et al., "Visual-Language Prompt Tuning with Knowledge-guided Context Optimization" (arXiv 2303.13283), and
the code of htyao89/KgCoOp. The prompts are those of `context.py`. With unit text features t_c and those of the frozen
prompts t_c^0, the loss is the cross-entropy plus

    kgcoop_weight (1 - mean over classes of cos(t_c, t_c^0)).

The frozen prompts are the task's: `--prompts specific` gives the dataset's own, as published, except for two sets:
configs/prompts/kgcoop_released.yaml.

Published: weight 8; 4 vectors that start at "a photo of a"; batch 128, 100 epochs, at 16 shots for base-to-new and 4
for other datasets; the training of `context.py` with lr 0.002. The same for all datasets; the paper shows test results
for other weights.

Differences: as in `coop.py`. The meta-net and the adapter in the released code are never trained; they are left out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from experiment import Experiment
from settings import option, with_default

from ..adaptation import Batch
from .context import Context, ContextTraining


@dataclass(frozen=True)
class Hparams(ContextTraining):
    """The published settings."""

    epochs: int | None = with_default(ContextTraining, "epochs", 100)
    batch_size: int = with_default(ContextTraining, "batch_size", 128)
    n_ctx: int = with_default(ContextTraining, "n_ctx", 4)
    ctx_init: str = with_default(ContextTraining, "ctx_init", "a photo of a")
    kgcoop_weight: float = option(8.0, "weight of the distance to the frozen prompts' text features", at_least=0)


class KgCoOp(Context):
    def build(self) -> None:
        """Compute the unit text features [C, E] of the task's first template."""
        self.frozen = self.experiment.text_classifier(self.experiment.task.templates[:1])

    def penalty(self, batch: Batch) -> Tensor:
        cosines = torch.cosine_similarity(batch.text_features, self.frozen)
        return self.experiment.hparams.kgcoop_weight * (1 - cosines.mean())


def prepare(experiment: Experiment[Hparams]) -> KgCoOp:
    return KgCoOp(experiment)
