"""DoRA (Liu et al., arXiv 2402.09353), from the library peft: LoRA on the direction of each row of a weight, and the
row's length as a trained weight of its own.

On the four matrices of each block that SO trains (peft_layers.py). No settings for CLIP are published. These are
CLIP-LoRA's (lora.py), with its scaling alpha / sqrt(r), and without weight decay on the lengths.
"""

from dataclasses import dataclass

import torch

from experiment import Experiment

from ..choice import cosine_schedule
from .matrices import WEIGHT_DECAY, LowRank
from .peft_layers import PeftAdapters, library


@dataclass(frozen=True)
class Hparams(LowRank):
    """CLIP-LoRA's published values."""


class DoRA(PeftAdapters):
    """DoRA in the chosen blocks, trained with AdamW."""

    FORMAT = "clip-dora-1"

    def __init__(self, experiment: Experiment[Hparams]):
        peft, hparams = library("dora"), experiment.hparams
        config = peft.LoraConfig(
            r=hparams.rank,
            lora_alpha=hparams.alpha,
            lora_dropout=hparams.dropout,
            use_rslora=True,
            use_dora=True,
        )
        super().__init__(experiment, peft.LoraModel, config)
        lengths = [p for name, p in self.parameters.items() if "lora_magnitude_vector" in name]
        matrices = [p for name, p in self.parameters.items() if "lora_magnitude_vector" not in name]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": lengths, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=hparams.lr)
        self.scheduler = cosine_schedule(self.optimizer, hparams.total_iters)


def prepare(experiment: Experiment[Hparams]) -> DoRA:
    return DoRA(experiment)
