"""Tip-Adapter-F: Tip-Adapter's cache with its keys trained (tip_adapter.py has the source and the logits).

Settings of the released code: the keys start as Tip-Adapter's and are trained, the labels and CLIP stay; cross-entropy
on augmented images, AdamW with lr 1e-3, eps 1e-4 and weight decay 0.01 (torch's default), cosine schedule to 0,
batches of 256, 20 epochs (for EuroSAT 100: `--epochs 100`). The keys keep no unit length. That code evaluates the test
images after each epoch and reports the best; here the keys after the last epoch count.
"""

import torch

from clip import CLIP
from datasets import Task

from . import tip_adapter
from .adaptation import TRAINING, cosine_schedule
from .tip_adapter import TipAdapter

HYPERPARAMETERS = (*TRAINING, "tip_alpha", "tip_beta", "cache_passes")
DEFAULTS: dict = {**tip_adapter.DEFAULTS, "lr": 1e-3, "epochs": 20, "batch_size": 256, "early_stop_loss": 0.0}


def prepare(model: CLIP, task: Task, settings) -> TipAdapter:
    adaptation = TipAdapter(model, task, settings, train_keys=True)
    adaptation.optimizer = torch.optim.AdamW([adaptation.keys], lr=settings.lr, eps=1e-4, weight_decay=0.01)
    adaptation.scheduler = cosine_schedule(adaptation.optimizer, settings.iterations, lowest=0.0)
    return adaptation
