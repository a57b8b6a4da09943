"""LayerNorm tuning: weights and biases of CLIP's LayerNorms; and what bias tuning and 2SFS share with it.

Source: the baseline `ln_only` of Farina et al., "Rethinking Few-Shot Adaptation of Vision-Language Models in Two
Stages" (CVPR 2025, arXiv 2503.11609), and the code of FarinaMatteo/rethinking_fewshot_vlms. Trained are all LayerNorms
of both towers, 65,536 weights of ViT-B/16, with cross-entropy of CLIP's logits.

Published, the same for all datasets and without validation images: AdamW, lr 2e-4, betas 0.9 and 0.999, weight decay
0.01 on everything that is trained; 300 iterations a shot, batch 32, crops of 8 to 100 % of the area, flips; cosine in
each iteration to 1e-6; "a photo of a {}." for all datasets; float16 autocast with loss scaling.

That code lists ln_pre, ln_post and ln_final as trained and freezes them again, so that it trains 61,440 weights of
ViT-B/16. `outer_norms` False does the same.

Base-to-new and other datasets: the text tower makes the classifier of any classes.

Differences: float32 unless --precision fp16; logits are 100 x cosine, the value of the published weights' logit_scale;
an epoch is a pass over the images without replacement, and its last batch is kept.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from clip import CLIP, parts
from common import UserError
from experiment import Experiment
from settings import option, with_default

from ..adaptation import Adaptation
from ..choice import Blocks, BlockTraining, cosine_schedule, reached, select_blocks


@dataclass(frozen=True)
class Tuning(BlockTraining):
    """The published settings of 2SFS and its baselines."""

    n_iters: int | None = with_default(BlockTraining, "n_iters", 300)
    early_stop_loss: float = with_default(BlockTraining, "early_stop_loss", 0.0)
    weight_decay: float = option(0.01, "AdamW's weight decay", at_least=0)


@dataclass(frozen=True)
class Hparams(Tuning):
    """The published settings."""

    outer_norms: bool = option(True, "train ln_pre, ln_post and ln_final too; the released code leaves them frozen")


def layer_norms(model: CLIP, hparams: Blocks, outer: bool) -> dict[str, nn.LayerNorm]:
    """Freeze the model, and return the LayerNorms of the chosen blocks by name.

    With `outer` they include ln_pre if an image tower's first block is chosen, and ln_post and ln_final if the last
    block of their tower is. Raise UserError if a chosen tower has none, as a ResNet, which has batch norm.
    """
    blocks = select_blocks(model, hparams)
    norms = {f"{name}.{norm}": module for name, block in blocks.items() for norm, module in parts.norms(block).items()}
    if hparams.encoder != "text" and not any(name.startswith("visual.") for name in norms):
        raise UserError("the chosen blocks of the vision tower have no LayerNorm; use --encoder text")
    if outer:
        for end in ("first", "last"):
            for tower in reached(model, blocks, end):
                norms |= {name: model.get_submodule(name) for name in parts.outer_norms(model, tower, end)}
    return norms


def trained(model: CLIP, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Let these parameters have gradients, and return them by name."""
    return {name: model.get_parameter(name).requires_grad_() for name in names}


def norm_parameters(model: CLIP, hparams: Blocks, outer: bool) -> dict[str, nn.Parameter]:
    """Freeze the model except its LayerNorms, as `layer_norms` chooses them, and return their parameters by name."""
    return trained(model, [f"{name}.{kind}" for name in layer_norms(model, hparams, outer) for kind in KINDS])


KINDS = ("weight", "bias")


def tuned(experiment: Experiment[Tuning], parameters: dict[str, nn.Parameter]) -> Adaptation:
    """Return an adaptation that trains these parameters of CLIP with AdamW and a cosine schedule."""
    hparams = experiment.hparams
    optimizer = torch.optim.AdamW(parameters.values(), lr=hparams.lr, weight_decay=hparams.weight_decay)
    return Adaptation(experiment, parameters, optimizer, cosine_schedule(optimizer, hparams.total_iters))


def prepare(experiment: Experiment[Hparams]) -> Adaptation:
    return tuned(experiment, norm_parameters(experiment.model, experiment.hparams, experiment.hparams.outer_norms))
