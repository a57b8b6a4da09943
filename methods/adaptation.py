"""The contract between a method and the training loop: what is trained, and what is saved of it (`saving.py`)."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distributed
import utils
from clip.layouts import Prompts
from experiment import Experiment

from .saving import Delta, Saved


class Batch(NamedTuple):
    """A training batch, and what the adapted model makes of it.

    `images` are what `batches` gives (images [B, 3, R, R], or features of them) and `labels` [B] their classes, on the
    model's device. `image_features` [B, E] and `text_features` [C, E] are unit features, `logits` [B, C]. `share` is
    the images' part of the whole batch: below 1 where several processes share a step.
    """

    images: Tensor
    labels: Tensor
    image_features: Tensor
    text_features: Tensor
    logits: Tensor
    share: float = 1.0


class Adaptation:
    """What a method trains: tensors, the optimizer that updates them, logits and loss terms.

    `parameters` are the trained tensors by name: weights of CLIP, changed in place (all others must be frozen), or the
    method's own. Without an optimizer the training loop is not used, and `build` does all the work. A method overrides
    what differs from training weights of CLIP with cross-entropy.
    """

    # One update per epoch, from the mean loss of all its images: batch_size is then how many are read at a time.
    full_batch = False
    # False if prompts must not share the computation of their common first words in training: a method that draws
    # something at random for every token (dropout).
    shares_prefix = True
    # What to use instead of --precision fp16, for a method that uses gradients from which the optimizer's step does not
    # take the scale of the loss.
    instead_of_fp16: str | None = None
    # The random generators that the method draws from in training. Of these, `noise` are the ones for single images
    # and tokens (dropout): each of several processes that share a step draws its own.
    generators: Sequence[torch.Generator] = ()
    noise: Sequence[torch.Generator] = ()
    # Whether each of several processes does all of the training, because this takes no longer than to share it, and
    # whether each encodes all prompts.
    replicated = False
    shares_prompts = True

    def __init__(
        self,
        experiment: Experiment,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        saved: Saved | None = None,
    ):
        self.experiment, self.model = experiment, experiment.model
        self.parameters, self.optimizer, self.scheduler = parameters, optimizer, scheduler
        self.saved = saved or Delta.of_trained(self.model)

    # --- what is trained

    @property
    def trainable_weights(self) -> int:
        return sum(p.numel() for p in self.parameters.values())

    @property
    def trains_images(self) -> bool:
        """Whether the image tower changes. If not, image features stay the same."""
        return any(name.startswith("visual.") for name in self.parameters)

    @property
    def trains_text(self) -> bool:
        """Whether text features change."""
        return any(not name.startswith("visual.") for name in self.parameters)

    @property
    def optimizer_bytes(self) -> int:
        """Size of the tensors in the optimizer's state as it is now: 0 before the first step."""
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    # --- how it is trained

    @cached_property
    def scaler(self) -> torch.amp.GradScaler:
        """What scales the loss with --precision fp16 if towers are trained, and does nothing otherwise."""
        half = self.experiment.settings.precision == "fp16"
        return torch.amp.GradScaler(self.model.device.type, enabled=half and (self.trains_images or self.trains_text))

    def build(self) -> None:
        """Compute from the training images what does not need the training loop. Called once, before training, and not
        when saved weights are evaluated."""

    def batches(self, start: int) -> Iterable[tuple[Tensor, Tensor]]:
        """Return the training batches from iteration `start` on: what `image_features` takes, and labels. They are
        not asked for before `build`. Raise DatasetError if a training image is damaged."""
        return self.experiment.training_batches(start)

    def image_features(self, images: Tensor) -> Tensor:
        """Return the unit image features [B, E] of a training batch, with gradients if they are trained."""
        with self.experiment.autocast():
            return utils.encode_image(self.model, images)

    @property
    def encoded_classes(self) -> list[int]:
        """The classes whose prompts this process encodes: all, unless several share the step."""
        classes = len(self.experiment.task.class_names)
        return distributed.mine_or_one(classes) if self.shares_prompts else list(range(classes))

    @cached_property
    def prompts(self) -> Prompts:
        """The prompts of `encoded_classes` for training."""
        return self.prompts_of(self.encoded_classes)

    def prompts_of(self, classes: Sequence[int]) -> Prompts:
        """Return the prompts of some classes: the task's first template."""
        task = self.experiment.task
        names = [task.class_names[label] for label in classes]
        tokens = utils.tokenize_classes(self.model.tokenize, names, task.templates[0])
        return self.model.prompts(tokens, self.shares_prefix).to(self.model.device)

    @cached_property
    def _frozen_text(self) -> Tensor:
        return self.encode_prompts().detach()

    def encode_prompts(self) -> Tensor:
        """Return unit text features [C, E] of all classes by the text tower as it is now."""
        return distributed.rows_of_all(self.encode_own_prompts(), len(self.experiment.task.class_names))

    def encode_own_prompts(self) -> Tensor:
        """Return unit text features of `prompts`. The blocks below the first trained one are computed only once."""
        block = self.first_text_block
        if not block:
            with self.experiment.autocast():
                return utils.encode_text(self.model, self.prompts)
        with self.experiment.autocast():
            return F.normalize(self.model.encode_text_from(self._below_block, self.prompts, block).float(), dim=-1)

    @cached_property
    def first_text_block(self) -> int:
        """The number of blocks of the text tower before the first whose output training changes."""
        blocks = [
            int(name.split(".")[2]) if name.startswith("transformer.resblocks.") else 0
            for name in self.parameters
            if not name.startswith(("visual.", "ln_final.", "text_projection"))
        ]
        return min(blocks, default=0)

    @cached_property
    def _below_block(self) -> Tensor:
        with self.experiment.autocast():
            return self.model.below_block(self.prompts, self.first_text_block)

    def text_features(self) -> Tensor:
        """Return the unit text features [C, E] of a training step, with gradients if they are trained."""
        return self.encode_prompts() if self.trains_text else self._frozen_text

    def text_classifier(self) -> Tensor:
        """Return the unit text features [C, E] of an evaluation: those of the task's first template."""
        return self.experiment.text_classifier(self.experiment.task.templates[:1])

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Return logits [B, C] of unit image features [B, E] and unit text features [C, E]: CLIP's, unless a method has
        a classifier of its own."""
        return self.experiment.cosine_logits(image_features, text_features)

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss that is recorded, a mean over the batch's images: the cross-entropy of the logits."""
        return F.cross_entropy(batch.logits, batch.labels)

    def penalty(self, batch: Batch) -> Tensor | float:
        """Return what is added to the loss before backward, and not recorded: means over the batch's images, and terms
        that do not depend on them."""
        return 0.0

    def after_step(self, iteration: int) -> None:
        """Do what happens after some updates only. Called after the update of each `iteration`, counted from 1; with
        `full_batch` after the last one of each epoch."""

    def finish(self) -> None:
        """Do what happens once, after the last update."""

    # --- how a stopped run resumes

    def state_dict(self) -> dict:
        """Return all that training has changed so far, for `load_state_dict`; called between two epochs."""
        return {
            "saved": self.saved.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
            "scaler": self.scaler.state_dict(),
            "generators": [generator.get_state() for generator in self.generators],
        }

    def load_state_dict(self, state: dict) -> None:
        """Bring this adaptation, which was only prepared and built, to that state, bit for bit."""
        self.saved.load_state_dict(state["saved"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        for generator, drawn in zip(self.generators, state["generators"]):
            generator.set_state(drawn)
