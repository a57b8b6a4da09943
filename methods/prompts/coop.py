"""CoOp: vectors in place of the prompt's words, trained with the class names between or after them; CLIP is frozen.

Source: Zhou et al., "Learning to Prompt for Vision-Language Models" (arXiv 2109.01134), and the code of
KaiyangZhou/CoOp. The prompts are those of `context.py`; the vectors are shared by all classes, or (`csc`) of each
class's own. The class name may also stand in the middle, after the first M // 2 vectors (M rounded down), or in front.
The vectors start at N(0, 0.02^2), or at the token embeddings of the words in `ctx_init`.

Published: lr 0.002, batch 32; 50 epochs at 1 shot, 100 at 2 and 4, 200 at 8 and 16, on ImageNet always 50 (coop.yaml).
16 vectors, the class name at the end, no `csc`. For base-to-new and other datasets CoCoOp's authors run it with 4
vectors that start at "a photo of a" (configs/prompts/coop_ctx4.yaml).

Differences: float32 instead of half precision unless --precision fp16 or bf16; logits are 100 x cosine, the value of
the published models' scale. `--prompts` and `--template` matter only to zero-shot accuracy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common import UserError
from experiment import Experiment
from settings import option

from .context import Context, ContextTraining, prompt_with_vectors, random_vectors


@dataclass(frozen=True)
class Hparams(ContextTraining):
    """The published settings. Epochs for other numbers of shots than the published ones: 200."""

    class_position: str = option("end", "where the class name stands", choices=("end", "middle", "front"))
    csc: bool = option(False, "class-specific contexts: each class has vectors of its own")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.csc and self.ctx_init:
            raise UserError("--ctx_init takes words that shared vectors start at; leave it out with --csc")


class CoOp(Context):
    """`vectors` are [M, D] or, with `csc`, [C x M, D]."""

    def start(self, experiment: Experiment[Hparams]) -> Tensor:
        if not experiment.hparams.csc:
            return super().start(experiment)
        generator = torch.Generator().manual_seed(experiment.settings.seed)
        rows = experiment.hparams.n_ctx * len(experiment.task.class_names)
        return random_vectors(experiment, rows, experiment.model.arch.text_width, generator)

    def own_classes(self, experiment: Experiment[Hparams]) -> Sequence[str] | None:
        return experiment.task.class_names if experiment.hparams.csc else None

    def prompt(self, name: str, label: int) -> tuple[list[int], list[int]]:
        hparams = self.experiment.hparams
        first = hparams.n_ctx * label if hparams.csc else 0
        before = {"end": hparams.n_ctx, "middle": hparams.n_ctx // 2, "front": 0}[hparams.class_position]
        rows = list(range(first, first + hparams.n_ctx))
        return prompt_with_vectors(name, rows, before, self.model.arch.context_length)


def prepare(experiment: Experiment[Hparams]) -> CoOp:
    return CoOp(experiment)
