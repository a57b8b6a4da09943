"""Vectors in place of the words around a class name: what CoOp and the methods that followed it share.

The prompt of a class is [start] v_1 ... v_M [class name] . [end], with trained vectors v_m [D] in place of token
embeddings. Positions are added afterwards, as to any prompt. CLIP is frozen. The training is that of the authors'
common library, Dassl: SGD with momentum 0.9 and weight decay 5e-4, also on the vectors; a rate that changes between
epochs only, 1e-5 in the first and then along a cosine (`epoch_cosine`); an epoch leaves out its last, smaller batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
STD = 0.02  # of random vectors at the start
FORMAT = "clip-prompt-1"


@dataclass(frozen=True)
class DasslTraining(Training):
    """Settings of methods that are trained as in Dassl, with CoOp's learning rate."""

    drop_last: ClassVar[bool] = True
    lr: float = with_default(Training, "lr", 2e-3)
    epochs: int | None = with_default(Training, "epochs", 200)
    early_stop_loss: float = with_default(Training, "early_stop_loss", 0.0)


@dataclass(frozen=True)
class ContextTraining(DasslTraining):
    n_ctx: int = option(16, "number of trained vectors", at_least=1)
    ctx_init: str = option("", "words whose embeddings the vectors start at, instead of n_ctx random ones")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ctx_init:
            object.__setattr__(self, "n_ctx", number_of_words(self.ctx_init))


def number_of_words(ctx_init: str) -> int:
    """Return the number of tokens in the words that vectors start at. Raise UserError if there are none, or braces."""
    words = len(tokenizer().encode(ctx_init))
    if not words or set("{}") & set(ctx_init):
        raise UserError(
            f"--ctx_init takes the words before the class name, for example 'a photo of a', not {ctx_init!r}"
        )
    return words


def check_tokenizer(experiment: Experiment) -> None:
    """Raise UserError if the model does not read CLIP's tokens."""
    if not isinstance(experiment.model.tokenize, ClipTokenizer):
        settings = experiment.settings
        raise UserError(f"{settings.method} needs CLIP's own tokenizer, which {settings.backbone} does not have")


def word_vectors(experiment: Experiment, words: str) -> Tensor:
    """Return the token embeddings [M, D] of words."""
    ids = torch.tensor(tokenizer().encode(words), device=experiment.device)
    return experiment.model.token_embedding(ids).detach().clone()


def random_vectors(experiment: Experiment, rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Return vectors [rows, width] of N(0, 0.02^2), drawn on the CPU."""
    return (STD * torch.randn(rows, width, generator=generator)).to(experiment.model.logit_scale)


def linear_start(
    experiment: Experiment, inputs: int, outputs: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return weight [outputs, inputs] and bias [outputs] as torch's linear layers start, uniform within
    1 / sqrt(inputs), drawn on the CPU."""
    bound = inputs**-0.5
    tensors = torch.empty(outputs, inputs), torch.empty(outputs)
    weight, bias = (t.uniform_(-bound, bound, generator=generator).to(experiment.model.logit_scale) for t in tensors)
    return weight, bias


def prompt_with_vectors(name: str, rows: Sequence[int], before: int, context: int) -> tuple[list[int], list[int]]:
    """Return the token ids of [start] vectors [class name] vectors . [end], padded to `context`, and the vectors' rows.

    The vectors are `rows`, of which the first `before` stand before the name. The second list has the row of the
    vector in each place, or -1. Raise UserError for a name that is too long.
    """
    bpe, words = tokenizer(), tokenizer().encode(f"{name}.")
    end = words[len(bpe.encode(name)) :]  # the full stop, unless it is one token with the name's last character
    words = words[: len(words) - len(end)]
    places = [-1, *rows[:before], *[-1] * len(words), *rows[before:], *[-1] * len(end), -1]
    if len(places) > context:
        raise UserError(
            f"the class name {name!r} and {len(rows)} vectors take {len(places)} tokens, and CLIP has {context}; "
            "lower --n_ctx or shorten the name"
        )
    filler = bpe.encode("x")[0]  # any token: the vectors replace it
    ids = [bpe.ids[START], *[filler] * before, *words, *[filler] * (len(rows) - before), *end]
    padding = context - len(places)
    return [*ids, bpe.ids[END], *[0] * padding], [*places, *[-1] * padding]


class Context(Adaptation):
    """Trained vectors [M, D] before the class names. `others` are further tensors that a method trains.

    The vectors start at the words of `ctx_init`, or at random. They belong to all classes, so that a saved file serves
    others too.
    """

    def __init__(self, experiment: Experiment[ContextTraining], others: dict[str, nn.Parameter] | None = None):
        check_tokenizer(experiment)
        experiment.model.requires_grad_(False)
        self.vectors = nn.Parameter(self.start(experiment))
        parameters = {"vectors": self.vectors} | (others or {})
        super().__init__(experiment, parameters, saved=Tensors(FORMAT, parameters, self.own_classes(experiment)))
        hparams = experiment.hparams
        self.optimizer = torch.optim.SGD(
            parameters.values(), lr=hparams.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        self.scheduler = dassl_schedule(self.optimizer, hparams, len(experiment.task.train))
        _ = self.prompts  # class names that are too long are found now

    def start(self, experiment: Experiment[ContextTraining]) -> Tensor:
        """Return the vectors that training starts from."""
        hparams = experiment.hparams
        if hparams.ctx_init:
            return word_vectors(experiment, hparams.ctx_init)
        generator = torch.Generator().manual_seed(experiment.settings.seed)
        return random_vectors(experiment, hparams.n_ctx, experiment.model.arch.text_width, generator)

    def own_classes(self, experiment: Experiment) -> Sequence[str] | None:
        """Return the classes that the vectors belong to: None, all."""
        return None

    def prompts_of(self, classes: Sequence[int]) -> Prompts:
        """Return the prompts of some classes, with the places of the vectors."""
        names = self.experiment.task.class_names
        ids, places = zip(*(self.prompt(names[label].replace("_", " "), label) for label in classes))
        prompts = self.model.prompts(torch.tensor(ids), vector_at=torch.tensor(places))
        return prompts.to(self.experiment.device)

    def prompt(self, name: str, label: int) -> tuple[list[int], list[int]]:
        """Return a class's `prompt_with_vectors`."""
        rows = list(range(self.experiment.hparams.n_ctx))
        return prompt_with_vectors(name, rows, len(rows), self.model.arch.context_length)

    def encode_own_prompts(self) -> Tensor:
        with self.experiment.autocast():
            return utils.encode_text(self.model, self.prompts, self.vectors)

    @torch.no_grad()
    def text_classifier(self) -> Tensor:
        return self.encode_prompts()
