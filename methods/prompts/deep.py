"""Trained tokens inside both towers: what MaPLe and PromptSRC share.

In the first J blocks ("depth") of each tower n tokens are trained ones. Text: the prompt of a class is [start] ctx_init
[class name] . [end]; before block 0 the tokens stand in place of the embeddings of its first n words, and before each
of the blocks 1 ... J-1 new ones replace what the block before made of them. Images: n tokens follow the patches, after
positions were added and before the first LayerNorm, and are replaced in the same way. From block J on they are left to
themselves. The features are computed from the end of the prompt and the class token, as in CLIP, which is frozen.

All prompts have the text tokens in the same places, in their common beginning. So packed prompts stay exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import utils
from clip.layouts import Layout, Prompts
from common import UserError
from experiment import Experiment
from settings import option

from ..adaptation import Adaptation
from ..choice import dassl_schedule
from ..saving import Tensors
from .context import MOMENTUM, WEIGHT_DECAY, DasslTraining, check_tokenizer, number_of_words

FORMAT = "clip-deep-prompt-1"


@dataclass(frozen=True)
class DeepTraining(DasslTraining):
    n_ctx: int = option(4, "number of trained tokens in each block", at_least=1)
    ctx_init: str = option("a photo of a", "words before the class name; the first n_ctx of them are replaced")
    depth: int = option(9, "number of blocks, from the first, that have trained tokens", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if number_of_words(self.ctx_init) < self.n_ctx:
            raise UserError(f"--ctx_init {self.ctx_init!r} has fewer tokens than --n_ctx {self.n_ctx}; use more words")


def check_towers(experiment: Experiment) -> None:
    """Raise UserError if the model has no class token or no causal text tower."""
    conventions, settings = experiment.model.arch.conventions, experiment.settings
    check_tokenizer(experiment)
    plain_vit = experiment.model.arch.is_vit and conventions.trunk is None and conventions.vision_pool == "token"
    if not plain_vit or not conventions.causal:
        raise UserError(
            f"{settings.method} puts tokens into CLIP's vision transformer, beside its class token, and into a causal "
            f"text tower; {settings.backbone} has others"
        )


def check_depth(experiment: Experiment, flag: str, depth: int) -> None:
    """Raise UserError if a tower has fewer blocks than `depth`, the value of `flag`."""
    arch = experiment.model.arch
    fewest = min(arch.vision_layers, arch.text_layers)
    if depth > fewest:
        raise UserError(
            f"--{flag} {depth} is more than the {fewest} blocks of a tower of {experiment.settings.backbone}"
        )


def insert(x: Tensor, tokens: Tensor, first: int, replaced: int) -> Tensor:
    """Return x [..., T, D] with tokens [n, D] from place `first` on, in place of the `replaced` ones there."""
    tokens = tokens.to(x.dtype).expand(*x.shape[:-2], -1, -1)
    return torch.cat([x[..., :first, :], tokens, x[..., first + replaced :, :]], dim=-2)


class DeepPrompts(Adaptation):
    """`parameters` are the method's. A subclass says which tokens they make, [J, n, width] for each tower."""

    trains_images = True

    def __init__(self, experiment: Experiment[DeepTraining], parameters: dict[str, nn.Parameter]):
        model, hparams = experiment.model, experiment.hparams
        model.requires_grad_(False)
        super().__init__(experiment, parameters, saved=Tensors(FORMAT, parameters))
        self.optimizer = torch.optim.SGD(
            parameters.values(), lr=hparams.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        self.scheduler = dassl_schedule(self.optimizer, hparams, len(experiment.task.train))
        self.encode_frozen = model.encode_image  # without the trained tokens
        model.encode_image = self.encode_image
        _ = self.prompts  # class names that are too long are found now

    def text_tokens(self) -> Tensor:
        """Return the tokens [J, n, D] of the text tower's blocks."""
        raise NotImplementedError

    def image_tokens(self) -> Tensor:
        """Return the tokens [J, n, D] of the image tower's blocks."""
        raise NotImplementedError

    def prompts_of(self, classes: Sequence[int]) -> Prompts:
        """Return the prompts of some classes, with the places of the first block's tokens."""
        task, hparams = self.experiment.task, self.experiment.hparams
        names = [task.class_names[label] for label in classes]
        try:
            ids = utils.tokenize_classes(self.model.tokenize, names, f"{hparams.ctx_init} {{}}.")
        except ValueError as error:
            raise UserError(f"{error}; shorten the class name or --ctx_init") from None
        rows = torch.full_like(ids, -1)
        rows[:, 1 : 1 + hparams.n_ctx] = torch.arange(hparams.n_ctx)
        return self.model.prompts(ids, vector_at=rows).to(self.experiment.device)

    def encode_own_prompts(self) -> Tensor:
        tokens = self.text_tokens()

        def enter(index: int, x: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
            return (insert(x, tokens[index], 1, tokens.shape[1]) if 0 < index < len(tokens) else x), layout

        with self.experiment.autocast():
            return utils.encode_text(self.model, self.prompts, tokens[0], enter)

    def encode_image(self, images: Tensor) -> Tensor:
        """Map preprocessed images [B, 3, R, R] to embeddings [B, E], not normalised."""
        visual, tokens = self.model.visual, self.image_tokens()
        x = visual.embed(images)  # [B, T, D]
        last = x.shape[1]
        x = visual.ln_pre(insert(x, tokens[0], last, 0))

        def enter(index: int, x: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
            return (insert(x, tokens[index], last, tokens.shape[1]) if 0 < index < len(tokens) else x), layout

        return visual.ln_post(visual.transformer(x, visual.layout, enter)) @ visual.proj

    @torch.no_grad()
    def text_classifier(self) -> Tensor:
        return self.encode_prompts()
