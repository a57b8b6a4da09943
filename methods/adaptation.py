"""What a method hands to the training loop, and the choice of weights that methods share."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from clip import CLIP, delta
from clip.model import Block
from utils import cosine_logits

MINIMUM_LR = 1e-6
# The settings that matter to every method that is trained by train.fit.
TRAINING = ("lr", "n_iters", "total_iters", "batch_size", "early_stop_loss", "min_area", "flip", "eval_every")


class MethodError(Exception):
    """A setting that does not fit this model; the message is one line with the remedy."""


class Adaptation:
    """Parameters that are trained in place, what updates them, and the weights that changed since.

    `parameters` are the model's by name; all others must be frozen. Without an optimizer train.fit is not called.
    """

    # One update per epoch, from the mean loss of all its images: batch_size is then how many are read at a time.
    full_batch = False
    # What the method draws from while it trains.
    generators: Sequence[torch.Generator] = ()

    def __init__(
        self,
        model: CLIP,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    ):
        self.model, self.parameters, self.optimizer, self.scheduler = model, parameters, optimizer, scheduler
        self.before = delta.snapshot(model)

    @property
    def trainable_weights(self) -> int:
        return sum(p.numel() for p in self.parameters.values())

    @property
    def shares_prefix(self) -> bool:
        """Whether all prompts may share the activations of their common beginning while training: not if a method
        draws something at random for every token."""
        return True

    @property
    def optimizer_bytes(self) -> int:
        """Size of the tensors in the optimizer's state, as it is now: nothing before the first step."""
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def trains_images(self) -> bool:
        """Whether the image tower changes; if not, image features stay what they are."""
        return any(name.startswith("visual.") for name in self.parameters)

    @property
    def trains_text(self) -> bool:
        """Whether the text tower changes; if not, text features stay what they are."""
        return any(not name.startswith("visual.") for name in self.parameters)

    @property
    def own_tensors(self) -> dict[str, Tensor]:
        """What training changes and is no weight of CLIP's, by name."""
        return {}

    @property
    def has_weights(self) -> bool:
        """Whether there is anything to save."""
        return bool(self.parameters)

    def build(self) -> None:
        """Called once before training, but not where saved weights are evaluated: for what a method computes from the
        training images without the training loop."""

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Logits [B, C] of unit image features [B, E] and the classes' unit text features [C, E]: as CLIP's, unless a
        method has a classifier of its own."""
        return cosine_logits(image_features, text_features)

    def penalty(self) -> Tensor | float:
        """What is added to the cross-entropy before backward; the recorded loss is without it."""
        return 0.0

    def after_step(self, iteration: int) -> None:
        """Called after the update of `iteration` (from 1), for what a method does now and then."""

    def state_dict(self) -> dict:
        """All that training has changed so far, for `load_state_dict`; between two epochs, where no gradient waits.
        A method that keeps more than weights, optimizer, scheduler and generators adds it."""
        return {
            "changes": delta.difference(self.before, self.model),
            "own_tensors": {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.own_tensors.items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generators": [generator.get_state() for generator in self.generators],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Makes this adaptation, fresh from the method's `prepare` and built, go on from there, bit for bit."""
        delta.apply_changes(self.model, state["changes"])
        for name, tensor in self.own_tensors.items():
            tensor.copy_(state["own_tensors"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        for generator, drawn in zip(self.generators, state["generators"]):
            generator.set_state(drawn)

    def changed_weights(self) -> int:
        """Number of weights that differ from those at the start, bit for bit."""
        return sum(len(indices) for indices, _ in delta.difference(self.before, self.model).values())

    def save(self, path: Path, base_sha256: str, metadata: dict[str, str]) -> int:
        """Writes what changed as a sparse delta on the base weights; returns the file's size in bytes."""
        delta.save_delta(delta.difference(self.before, self.model), path, base_sha256, metadata)
        return path.stat().st_size

    def load(self, path: Path, base_sha256: str) -> None:
        """Applies what `save` wrote to the model. WeightsError if it belongs to other base weights."""
        delta.apply_delta(self.model, path, base_sha256)


def cosine_schedule(
    optimizer: torch.optim.Optimizer, iterations: int, lowest: float = MINIMUM_LR
) -> torch.optim.lr_scheduler.LRScheduler:
    """From the optimizer's learning rate down to `lowest` along half a cosine, one step an iteration."""
    lowest = min(lowest, *(group["lr"] for group in optimizer.param_groups))
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, eta_min=lowest)


def chosen_blocks(position: str, layers: int) -> range:
    """Indices of the blocks that `position` names in a tower of `layers` blocks: all; bottom, mid, up (thirds);
    half-bottom, half-up; top1, top2, top3 (the last ones). MethodError if the tower is too small for it."""
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
        raise MethodError(f"--position {position} needs more blocks than the {layers} of a tower; use --position all")
    return blocks


POSITIONS = ("all", "bottom", "mid", "up", "half-bottom", "half-up", "top1", "top2", "top3")
ENCODERS = ("text", "vision", "both")


def select_matrices(model: CLIP, encoder: str, position: str) -> dict[str, nn.Parameter]:
    """Freezes the model but for the matrices that the paper trains, and returns these by name.

    They are, in the chosen blocks of the chosen towers, the attention's input projection (query, key and value
    stacked) and output projection, and the two matrices of the MLP: 96 tensors, 122,683,392 weights in ViT-B/16.
    """
    for block in select_blocks(model, encoder, position).values():
        for linear in (block.attn.in_proj, block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
            linear.weight.requires_grad_(True)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def select_blocks(model: CLIP, encoder: str, position: str) -> dict[str, Block]:
    """Freezes the model, and returns the chosen blocks of the chosen towers by name."""
    towers = {"vision": model.visual, "text": model}
    if encoder != "text" and not model.arch.is_vit:
        raise MethodError("a ResNet image encoder has no transformer blocks to adapt; use --encoder text")
    model.requires_grad_(False)
    chosen = set()
    for name in ("text", "vision") if encoder == "both" else (encoder,):
        blocks = towers[name].transformer.resblocks
        chosen |= {blocks[index] for index in chosen_blocks(position, len(blocks))}
    return {name: module for name, module in model.named_modules() if module in chosen}
