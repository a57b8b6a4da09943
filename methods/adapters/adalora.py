"""AdaLoRA (Zhang et al., arXiv 2303.10512), from the library peft: B diag(E) A added to each weight, with A and B kept
nearly orthogonal by a penalty, and a budget of ranks that falls from 1.5 `rank` to `rank` a matrix on average while the
least important entries of E are set to zero.

On the four matrices of each block that SO trains (peft_layers.py). No settings for CLIP are published. These are those
of the authors' run with the least data (RTE): alpha 32, lr 1.2e-3, penalty 0.3, betas 0.85, no dropout. Of its 3,900
iterations the first 600 keep the whole budget and the last 1,800 the final one; here it is the same fractions of the
run. The other values, such as 500 iterations a shot, are CLIP-LoRA's. The scaling is alpha / (1.5 rank).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from common import UserError
from experiment import Experiment
from settings import option, with_default

from ..adaptation import Batch
from ..choice import cosine_schedule
from .matrices import WEIGHT_DECAY, LowRank
from .peft_layers import ADAPTER, PeftAdapters, library

INITIAL_RANK = 1.5  # times the final one
WHOLE_BUDGET, FINAL_BUDGET = 600 / 3900, 1800 / 3900  # parts of the run
PENALTY = 0.3
BETAS = 0.85, 0.85  # of the moving averages of importance
IMPORTANCE = "ipt", "exp_avg_ipt", "exp_avg_unc"  # where peft keeps it: by name of a parameter


@dataclass(frozen=True)
class Hparams(LowRank):
    """The values of the authors' run on RTE, as far as they are named above; the others are CLIP-LoRA's."""

    lr: float = with_default(LowRank, "lr", 1.2e-3)
    rank: int = option(2, "mean rank of the updates at the end", at_least=1)
    alpha: float = option(32.0, "updates are scaled by alpha / (1.5 rank)", above=0)
    dropout: float = with_default(LowRank, "dropout", 0.0)


class AdaLoRA(PeftAdapters):
    """AdaLoRA in the chosen blocks, trained with AdamW."""

    FORMAT = "clip-adalora-1"
    instead_of_fp16 = "--precision bf16"  # the importance of ranks is read from gradients, also of skipped updates

    def __init__(self, experiment: Experiment[Hparams]):
        hparams = experiment.hparams
        if hparams.total_iters < 2:
            raise UserError("--method adalora needs at least 2 iterations to choose ranks in; raise --total_iters")
        peft = library("adalora")
        config = peft.AdaLoraConfig(
            init_r=math.ceil(INITIAL_RANK * hparams.rank),
            target_r=hparams.rank,
            lora_alpha=hparams.alpha,
            lora_dropout=hparams.dropout,
            total_step=hparams.total_iters,
            tinit=int(WHOLE_BUDGET * hparams.total_iters),
            tfinal=int(FINAL_BUDGET * hparams.total_iters),
            deltaT=1,
            beta1=BETAS[0],
            beta2=BETAS[1],
            orth_reg_weight=PENALTY,
        )
        super().__init__(experiment, peft.AdaLoraModel, config)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=hparams.lr, weight_decay=WEIGHT_DECAY)
        self.scheduler = cosine_schedule(self.optimizer, hparams.total_iters)

    def penalty(self, batch: Batch) -> Tensor:
        """Return 0.3 times the mean over all A and B of the distance |A A^T - I| or |B^T B - I| (Frobenius norm)."""
        distances = []
        for layer in self.layers.values():
            for P in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER].T):  # [r, in] and [r, out]
                distances.append(torch.linalg.norm(P @ P.T - torch.eye(len(P), device=P.device, dtype=P.dtype)))
        return PENALTY * torch.stack(distances).mean()

    def after_step(self, iteration: int) -> None:
        """Lower the budget, from the gradients of the step that was done."""
        # peft takes a k-th value. On CUDA torch counts that as not deterministic, although the value always is.
        mode = torch.get_deterministic_debug_mode()
        torch.set_deterministic_debug_mode("default")
        try:
            self.tuner.update_and_allocate(iteration)
        finally:
            torch.set_deterministic_debug_mode(mode)

    def state_dict(self) -> dict:
        allocator = self.tuner.rankallocator
        importance = {name: getattr(allocator, name) for name in IMPORTANCE}
        return super().state_dict() | {"importance": importance, "ranks": self.tuner.peft_config[ADAPTER].rank_pattern}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        for name, tensors in state["importance"].items():
            tensors = {of: tensor.to(self.model.device) for of, tensor in tensors.items()}
            setattr(self.tuner.rankallocator, name, tensors)
        self.tuner.peft_config[ADAPTER].rank_pattern = state["ranks"]


def prepare(experiment: Experiment[Hparams]) -> AdaLoRA:
    return AdaLoRA(experiment)
