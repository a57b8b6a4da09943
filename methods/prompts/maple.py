"""MaPLe: trained tokens in the first blocks of the text tower, and images of them in those of the image tower.

Source: Khattak et al., "MaPLe: Multi-modal Prompt Learning" (arXiv 2210.03117), and the code of
muzairkhattak/multimodal-prompt-learning. Where the tokens stand: `deep.py`. The text tokens of block j are u_j [n,
D_t], trained; the image tokens are the linear map P_j(u_j) [n, D_v] of them, with a P_j of each block. u_0 starts at
the embeddings of the first words, the other u_j at N(0, 0.02^2); P_0 starts as torch's linear layers do, and so does
P_1, of which all further P_j are copies.

Published: 2 tokens in place of "a photo" in "a photo of a {}."; batch 4, SGD as in `context.py`. Base-to-new at 16
shots: lr 0.0035, 5 epochs, depth 9 (configs/prompts/maple_base_to_new.yaml). Other datasets, trained on ImageNet: lr
0.0026, 2 epochs, depth 3 (configs/prompts/maple_cross_dataset.yaml). The same for all datasets. The authors have no
few-shot setting for all classes; the default here is that of SkipTuning's authors (arXiv 2412.11509): lr 0.0035, 50
epochs, depth 9.

Differences: as in `coop.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiment import Experiment
from settings import with_default

from .context import linear_start, random_vectors, word_vectors
from .deep import DeepPrompts, DeepTraining, check_depth, check_towers


@dataclass(frozen=True)
class Hparams(DeepTraining):
    """SkipTuning's settings for few shots of all classes."""

    lr: float = with_default(DeepTraining, "lr", 3.5e-3)
    epochs: int | None = with_default(DeepTraining, "epochs", 50)
    batch_size: int = with_default(DeepTraining, "batch_size", 4)
    n_ctx: int = with_default(DeepTraining, "n_ctx", 2)


class MaPLe(DeepPrompts):
    """`vectors` [n, D_t] are u_0, `deeper` [J-1, n, D_t] the other u_j; `weight` [J, D_v, D_t] and `bias` [J, D_v] are
    the maps. 3,555,072 weights in ViT-B/16."""

    def __init__(self, experiment: Experiment[Hparams]):
        check_towers(experiment)
        hparams, arch = experiment.hparams, experiment.model.arch
        check_depth(experiment, "depth", hparams.depth)
        generator = torch.Generator().manual_seed(experiment.settings.seed)
        deeper = random_vectors(experiment, (hparams.depth - 1) * hparams.n_ctx, arch.text_width, generator)
        first, second = (linear_start(experiment, arch.text_width, arch.vision_width, generator) for _ in range(2))
        weight, bias = (torch.stack([a, *[b] * (hparams.depth - 1)]) for a, b in zip(first, second))
        self.vectors = nn.Parameter(word_vectors(experiment, hparams.ctx_init)[: hparams.n_ctx])
        self.deeper = nn.Parameter(deeper.view(hparams.depth - 1, hparams.n_ctx, -1))
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        named = ("vectors", "deeper", "weight", "bias")
        super().__init__(experiment, {name: getattr(self, name) for name in named})

    def text_tokens(self) -> Tensor:
        return torch.cat([self.vectors[None], self.deeper])

    def image_tokens(self) -> Tensor:
        return torch.baddbmm(self.bias[:, None], self.text_tokens(), self.weight.mT)


def prepare(experiment: Experiment[Hparams]) -> MaPLe:
    return MaPLe(experiment)
