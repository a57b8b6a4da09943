"""Partial fine-tuning: all weights of the chosen blocks, and the norms and projections after them.

Source: the subset that SkipTuning trains (Wu et al., "Skip Tuning: Pre-trained Vision-Language Models are Effective and
Efficient Adapters Themselves", CVPR 2025, arXiv 2412.11509), and the code of Koorye/SkipTuning: the upper half of the
blocks of both towers, ln_post, ln_final and both projections, 62,099,456 weights of ViT-B/16. With --position all it is
the full fine-tuning that they compare with, which leaves embeddings, conv1 and ln_pre as they are, 123,540,992
weights: configs/full_fine_tuning.yaml.

Read in that code for the few-shot setting: SGD with lr 1e-5, momentum 0.9 and weight decay 5e-4, 40 epochs (a quarter
of them for ImageNet, SUN397 and Food101), batch 4, a smaller last one left out, crops of 8 to 100 % of the area, flips;
cosine between epochs without warm-up (`epoch_cosine`). Full fine-tuning has 10 epochs.

Base-to-new and other datasets: the text tower makes the classifier of any classes. Their settings for these differ
(lr 2e-5, 20 epochs, first epoch at 1e-6; a second rate for the image tower) and are left out.

Differences: this is the subset alone, not SkipTuning: token states of the frozen lower half are not kept for an epoch,
and all classes are in each softmax. From 4 shots on that code's batches have images of one class only; here they are
drawn from all. Float32 weights instead of float16; the prompts are those of all methods (--prompts); logits are 100 x
cosine.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from clip import CLIP, parts
from experiment import Experiment
from settings import option, with_default

from ..adaptation import Adaptation
from ..choice import Blocks, BlockTraining, dassl_schedule, reached, select_blocks
from .layernorm import trained

MOMENTUM = 0.9


@dataclass(frozen=True)
class Hparams(BlockTraining):
    """SkipTuning's settings of the few-shot setting."""

    drop_last: ClassVar[bool] = True
    position: str = with_default(BlockTraining, "position", "half-up")
    lr: float = with_default(BlockTraining, "lr", 1e-5)
    epochs: int | None = with_default(BlockTraining, "epochs", 40)
    batch_size: int = with_default(BlockTraining, "batch_size", 4)
    early_stop_loss: float = with_default(BlockTraining, "early_stop_loss", 0.0)
    weight_decay: float = option(5e-4, "SGD's weight decay", at_least=0)


def upper_parameters(model: CLIP, hparams: Blocks) -> dict[str, nn.Parameter]:
    """Freeze the model except the chosen blocks, and the norm and projection after each tower whose last block is
    chosen. Return the trained parameters by name."""
    blocks = select_blocks(model, hparams)
    names = [f"{name}.{own}" for name, block in blocks.items() for own, _ in block.named_parameters()]
    for tower in reached(model, blocks, "last"):
        names += [f"{norm}.{kind}" for norm in parts.outer_norms(model, tower, "last") for kind in ("weight", "bias")]
        projection = parts.projection(model)
        names += parts.text_projection(model) if tower == "text" else [projection] if projection else []
    return trained(model, names)


def prepare(experiment: Experiment[Hparams]) -> Adaptation:
    hparams = experiment.hparams
    parameters = upper_parameters(experiment.model, hparams)
    optimizer = torch.optim.SGD(
        parameters.values(), lr=hparams.lr, momentum=MOMENTUM, weight_decay=hparams.weight_decay
    )
    schedule = dassl_schedule(optimizer, hparams, len(experiment.task.train), warmup_lr=None)
    return Adaptation(experiment, parameters, optimizer, schedule)
