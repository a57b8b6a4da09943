"""DoRA (Liu et al., arXiv 2402.09353), from the library peft: LoRA on the direction of each row of a weight, and the
row's length as a trained weight beside it.

On the four matrices of each block that SO trains (methods/peft_adapters.py). No settings for CLIP are published: they
are CLIP-LoRA's (methods/lora.py), with its scaling alpha / sqrt(r); weight decay spares the lengths.
"""

import torch

from clip import CLIP
from datasets import Task

from . import lora
from .adaptation import TRAINING, Adaptation, cosine_schedule
from .adapters import WEIGHT_DECAY
from .peft_adapters import PeftAdapters, library

HYPERPARAMETERS = (*TRAINING, "rank", "alpha", "dropout", "encoder", "position")
DEFAULTS = lora.DEFAULTS


class DoRA(PeftAdapters):
    FORMAT = "clip-dora-1"

    def __init__(self, model: CLIP, settings):
        peft = library("dora")
        config = peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            use_rslora=True,
            use_dora=True,
        )
        super().__init__(model, settings, peft.LoraModel, config)
        lengths = [p for name, p in self.parameters.items() if "lora_magnitude_vector" in name]
        matrices = [p for name, p in self.parameters.items() if "lora_magnitude_vector" not in name]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": lengths, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr)
        self.scheduler = cosine_schedule(self.optimizer, settings.iterations)


def prepare(model: CLIP, task: Task, settings) -> Adaptation:
    return DoRA(model, settings)
