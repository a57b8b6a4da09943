"""Which blocks of CLIP a method adapts, and the learning rate's schedules."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from clip import CLIP, parts
from common import UserError
from settings import Hparams, Loop, Training, option

MINIMUM_LR = 1e-6
WARMUP_LR = 1e-5  # Dassl's, of the first epoch
POSITIONS = ("all", "bottom", "mid", "up", "half-bottom", "half-up", "top1", "top2", "top3")
ENCODERS = ("text", "vision", "both")


@dataclass(frozen=True)
class Blocks(Hparams):
    """Which transformer blocks are adapted."""

    encoder: str = option("both", "towers that are adapted", choices=ENCODERS)
    position: str = option("all", "blocks that are adapted in each tower", choices=POSITIONS)


@dataclass(frozen=True)
class BlockTraining(Training, Blocks):
    """Hyperparameters of methods that train something in chosen blocks. The defaults are SO's."""


def chosen_blocks(position: str, layers: int) -> range:
    """Return the indices of the blocks that `position` names in a tower of `layers` blocks.

    all; bottom, mid, up: thirds; half-bottom, half-up: halves; top1, top2, top3: the last ones. Raise UserError if the
    tower is too small for it.
    """
    third, half = layers // 3, layers // 2
    blocks = {
        "all": range(layers),
        "bottom": range(third),
        "mid": range(third, 2 * layers // 3),
        "up": range(2 * layers // 3, layers),
        "half-bottom": range(half),
        "half-up": range(half, layers),
        "top1": range(layers - 1, layers),
        "top2": range(layers - 2, layers),
        "top3": range(layers - 3, layers),
    }[position]
    if len(blocks) == 0 or blocks.start < 0:
        raise UserError(f"--position {position} needs more blocks than the {layers} of a tower; use --position all")
    return blocks


def select_blocks(model: CLIP, hparams: Blocks) -> dict[str, nn.Module]:
    """Freeze the model, and return the chosen blocks of the chosen towers by name."""
    model.requires_grad_(False)
    chosen = {}
    for tower in ("vision", "text") if hparams.encoder == "both" else (hparams.encoder,):
        blocks = list(parts.blocks(model, tower).items())
        chosen |= dict(blocks[index] for index in chosen_blocks(hparams.position, len(blocks)))
    return chosen


def select_attention(model: CLIP, hparams: Blocks) -> dict[str, nn.Module]:
    """Freeze the model, and return those of the chosen blocks that have attention, by name.

    Raise UserError if a chosen tower has none.
    """
    blocks = {name: block for name, block in select_blocks(model, hparams).items() if any(parts.attention(block))}
    for tower in ("vision", "text") if hparams.encoder == "both" else (hparams.encoder,):
        if not blocks.keys() & parts.blocks(model, tower).keys():
            other = "text" if tower == "vision" else "vision"
            raise UserError(f"the chosen blocks of the {tower} tower have no attention to adapt; use --encoder {other}")
    return blocks


def reached(model: CLIP, blocks: dict[str, nn.Module], end: str) -> list[str]:
    """Return the towers, out of "vision" and "text", whose block at an `end`, "first" or "last", is one of `blocks`."""
    index = {"first": 0, "last": -1}[end]
    return [tower for tower in ("vision", "text") if list(parts.blocks(model, tower))[index] in blocks]


def select_matrices(model: CLIP, hparams: Blocks) -> dict[str, nn.Parameter]:
    """Freeze the model except the matrices that SO's paper trains, and return these by name.

    In the chosen blocks of the chosen towers they are the attention's input projection (query, key and value stacked)
    and output projection, and the two matrices of the MLP: 96 tensors, 122,683,392 weights in ViT-B/16. Image towers
    that the paper does not have are our choice (`parts.matrices`): the convolutions of a ResNet's bottlenecks, and in
    timm's blocks all linear layers and convolutions of 1 x 1.
    """
    for block in select_blocks(model, hparams).values():
        for layer in parts.matrices(block):
            layer.weight.requires_grad_(True)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def cosine_schedule(
    optimizer: torch.optim.Optimizer, iterations: int, lowest: float = MINIMUM_LR
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a schedule, a step an iteration, from the optimizer's rate down to `lowest` along half a cosine."""
    lowest = min(lowest, *(group["lr"] for group in optimizer.param_groups))
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, eta_min=lowest)


def epoch_cosine(lr: float, epochs: int, per_epoch: int, warmup_lr: float | None) -> Callable[[int], float]:
    """Return Dassl's schedule: a map from an iteration, counted from 0, to the factor on `lr`.

    The rate changes only between epochs of `per_epoch` iterations. Epoch 0 has `warmup_lr`; epoch e >= 1 has
    lr (1 + cos(pi (e - 1) / epochs)) / 2, so the last epoch does not reach 0. Without `warmup_lr` epoch e has
    lr (1 + cos(pi e / epochs)) / 2. (Dassl's own class depends on the version of torch; this is what its published runs
    used.)
    """

    def factor(iteration: int) -> float:
        epoch = iteration // per_epoch
        if warmup_lr is None:
            return (1 + math.cos(math.pi * epoch / epochs)) / 2
        return warmup_lr / lr if epoch == 0 else (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2

    return factor


def dassl_schedule(
    optimizer: torch.optim.Optimizer, hparams: Loop, images: int, warmup_lr: float | None = WARMUP_LR
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return Dassl's schedule (`epoch_cosine`) for a training set of so many images, with one epoch at `warmup_lr`, or
    without warm-up."""
    per_epoch = hparams.batches_per_epoch(images)
    epochs = -(-hparams.total_iters // per_epoch)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, epoch_cosine(hparams.lr, epochs, per_epoch, warmup_lr))


def whole_epochs(method: str, hparams: Loop, images: int) -> int:
    """Return the number of epochs. Raise UserError if the training ends within one; without images there are none."""
    per_epoch = hparams.batches_per_epoch(images)
    if images and hparams.total_iters % per_epoch:
        raise UserError(
            f"{method} trains in whole epochs, here of {per_epoch} iterations, but {hparams.total_iters} were asked "
            "for; use --epochs"
        )
    return hparams.total_iters // per_epoch
