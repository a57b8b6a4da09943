"""Tip-Adapter-F: Tip-Adapter's cache with its keys trained (tip_adapter.py has the source and the logits).

Settings of the released code: the keys start as Tip-Adapter's and are trained, the labels and CLIP stay; cross-entropy
on augmented images, AdamW with lr 1e-3, eps 1e-4 and weight decay 0.01 (torch's default), cosine schedule to 0,
batches of 256, 20 epochs (for EuroSAT 100: `--epochs 100`). The keys keep no unit length. That code evaluates the test
images after each epoch and reports the best; here the keys after the last epoch count.
"""

from dataclasses import dataclass

import torch

from experiment import Experiment
from settings import Training, with_default

from ..choice import cosine_schedule
from .tip_adapter import Cache, TipAdapter


@dataclass(frozen=True)
class Hparams(Training, Cache):
    """The released settings."""

    lr: float = with_default(Training, "lr", 1e-3)
    epochs: int | None = with_default(Training, "epochs", 20)
    batch_size: int = with_default(Training, "batch_size", 256)
    early_stop_loss: float = with_default(Training, "early_stop_loss", 0.0)
    min_area: float = with_default(Training, "min_area", 0.5)


def prepare(experiment: Experiment[Hparams]) -> TipAdapter:
    hparams, adaptation = experiment.hparams, TipAdapter(experiment, train_keys=True)
    adaptation.optimizer = torch.optim.AdamW([adaptation.keys], lr=hparams.lr, eps=1e-4, weight_decay=0.01)
    adaptation.scheduler = cosine_schedule(adaptation.optimizer, hparams.total_iters, lowest=0.0)
    return adaptation
