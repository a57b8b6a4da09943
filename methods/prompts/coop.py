"""CoOp: vectors in place of the prompt's words, trained with the class names between or after them; CLIP is frozen.

Source: Zhou et al., "Learning to Prompt for Vision-Language Models" (arXiv 2109.01134), and the code of
KaiyangZhou/CoOp. The prompt of a class is

    [start] v_1 ... v_M [class name] . [end]

with v_m [D] trained and shared by all classes, or (`csc`) of each class's own. The class name may also stand in the
middle, after the first M // 2 vectors (M rounded down), or in front. The vectors start at N(0, 0.02^2), or at the token
embeddings of the words in `ctx_init`. Positions are added afterwards, as to any prompt.

Published: SGD with momentum 0.9 and weight decay 5e-4, lr 0.002, batch 32; 50 epochs at 1 shot, 100 at 2 and 4, 200 at
8 and 16, on ImageNet always 50 (coop.yaml). The rate changes between epochs only: 1e-5 in the first, then a cosine
(`epoch_cosine`). An epoch leaves out its last, smaller batch. 16 vectors, the class name at the end, no `csc`. For
base-to-new and other datasets CoCoOp's authors run it with 4 vectors that start at "a photo of a" (coop_ctx4.yaml in
configs/).

Differences: float32 instead of half precision unless --precision bf16; logits are 100 x cosine, the value of the
published models' scale. `--prompts` and `--template` matter only to zero-shot accuracy.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

import utils
from clip.layouts import Prompts
from clip.tokenizer import END, START, ClipTokenizer, tokenizer
from common import UserError
from experiment import Experiment
from settings import Training, option, with_default

from ..adaptation import Adaptation
from ..choice import dassl_schedule
from ..saving import Tensors

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
STD = 0.02  # of the vectors at the start
FORMAT = "clip-prompt-1"


@dataclass(frozen=True)
class Hparams(Training):
    """The published settings. Epochs for other numbers of shots than the published ones: 200."""

    drop_last: ClassVar[bool] = True
    lr: float = with_default(Training, "lr", 2e-3)
    epochs: int | None = with_default(Training, "epochs", 200)
    early_stop_loss: float = with_default(Training, "early_stop_loss", 0.0)
    n_ctx: int = option(16, "number of trained vectors", at_least=1)
    ctx_init: str = option("", "words whose embeddings the vectors start at, instead of n_ctx random ones")
    class_position: str = option("end", "where the class name stands", choices=("end", "middle", "front"))
    csc: bool = option(False, "class-specific contexts: each class has vectors of its own")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ctx_init:
            words = len(tokenizer().encode(self.ctx_init))
            if self.csc or not words:
                raise UserError("--ctx_init takes words that shared vectors start at; leave it out with --csc")
            object.__setattr__(self, "n_ctx", words)


class CoOp(Adaptation):
    def __init__(self, experiment: Experiment[Hparams]):
        model, hparams = experiment.model, experiment.hparams
        if not isinstance(model.tokenize, ClipTokenizer):
            raise UserError(f"coop needs CLIP's own tokenizer, which {experiment.settings.backbone} does not have")
        model.requires_grad_(False)
        classes = len(experiment.task.class_names)
        if hparams.ctx_init:
            words = torch.tensor(tokenizer().encode(hparams.ctx_init), device=experiment.device)
            start = model.token_embedding(words)
        else:
            generator = torch.Generator().manual_seed(experiment.settings.seed)
            rows = hparams.n_ctx * (classes if hparams.csc else 1)
            start = STD * torch.randn(rows, model.arch.text_width, generator=generator)
        self.vectors = nn.Parameter(start.detach().clone().to(experiment.device))  # [M or C x M, D]
        self.length = len(self.vectors) // (classes if hparams.csc else 1)  # M
        class_names = experiment.task.class_names if hparams.csc else None
        parameters = {"vectors": self.vectors}
        super().__init__(experiment, parameters, saved=Tensors(FORMAT, parameters, class_names))
        self.optimizer = torch.optim.SGD(
            parameters.values(), lr=hparams.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        self.scheduler = dassl_schedule(self.optimizer, hparams, len(experiment.task.train))
        _ = self.prompts  # class names that are too long are found now

    @cached_property
    def prompts(self) -> Prompts:
        """The classes' prompts, with the places of the vectors."""
        task, hparams = self.experiment.task, self.experiment.hparams
        ids, places = zip(
            *(
                self._prompt(name.replace("_", " "), self.length * label if hparams.csc else 0)
                for label, name in enumerate(task.class_names)
            )
        )
        prompts = self.model.prompts(torch.tensor(ids), vector_at=torch.tensor(places))
        return prompts.to(self.experiment.device)

    def _prompt(self, name: str, first: int) -> tuple[list[int], list[int]]:
        """Return a prompt's token ids and, for each token, the row of the vector in its place or -1, to full length.

        `first` is the row of the class's first vector. Raise UserError for a name that is too long.
        """
        bpe, longest = tokenizer(), self.model.arch.context_length
        vectors, words = list(range(first, first + self.length)), bpe.encode(f"{name}.")
        end = words[len(bpe.encode(name)) :]  # the full stop, unless it is one token with the name's last character
        words = words[: len(words) - len(end)]
        before = {"end": self.length, "middle": self.length // 2, "front": 0}[self.experiment.hparams.class_position]
        places = [-1, *vectors[:before], *[-1] * len(words), *vectors[before:], *[-1] * len(end), -1]
        if len(places) > longest:
            raise UserError(
                f"the class name {name!r} and {self.length} vectors take {len(places)} tokens, and CLIP has {longest}; "
                "lower --n_ctx or shorten the name"
            )
        filler = bpe.encode("x")[0]  # any token: the vectors replace it
        ids = [bpe.ids[START], *[filler] * before, *words, *[filler] * (self.length - before), *end]
        padding = longest - len(places)
        return [*ids, bpe.ids[END], *[0] * padding], [*places, *[-1] * padding]

    def encode_prompts(self) -> Tensor:
        with self.experiment.autocast():
            return utils.encode_text(self.model, self.prompts, self.vectors)

    @torch.no_grad()
    def text_classifier(self) -> Tensor:
        return self.encode_prompts()


def prepare(experiment: Experiment[Hparams]) -> CoOp:
    return CoOp(experiment)
