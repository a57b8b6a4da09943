"""CoCoOp: CoOp whose vectors are shifted by each image.

Source: Zhou et al., "Conditional Prompt Learning for Vision-Language Models" (arXiv 2203.05557), and the code of
KaiyangZhou/CoOp. The prompts are those of `context.py`. For an image with the unit feature f, every vector is v_m +
h(f), with the meta-net

    h(f) = W_2 relu(W_1 f + b_1) + b_2,    W_1 [E / 16, E], W_2 [D, E / 16],

the same for all m. So every image has text features of its own: a batch encodes B x C prompts, and a test pass one set
of C prompts for each image. That is the method's cost; packed prompts save some of it.

Published, for base-to-new and other datasets at 16 shots: 4 vectors that start at "a photo of a"; batch 1, 10 epochs;
the training of `context.py` with lr 0.002. The same for all datasets.

Differences: as in `coop.py`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distributed
import utils
from common import progress
from experiment import Experiment
from settings import with_default

from .context import Context, ContextTraining, linear_start

REDUCTION = 16


@dataclass(frozen=True)
class Hparams(ContextTraining):
    """The published settings."""

    epochs: int | None = with_default(ContextTraining, "epochs", 10)
    batch_size: int = with_default(ContextTraining, "batch_size", 1)
    n_ctx: int = with_default(ContextTraining, "n_ctx", 4)
    ctx_init: str = with_default(ContextTraining, "ctx_init", "a photo of a")


class CoCoOp(Context):
    """`net` has the meta-net's tensors: 35,360 weights with the vectors in ViT-B/16. They start as torch's linear
    layers do."""

    shares_prompts = False  # each image has its own

    def __init__(self, experiment: Experiment[Hparams]):
        arch = experiment.model.arch
        generator = torch.Generator().manual_seed(experiment.settings.seed + 1)  # not that of random vectors
        hidden = arch.embed_dim // REDUCTION
        first = linear_start(experiment, arch.embed_dim, hidden, generator)
        second = linear_start(experiment, hidden, arch.text_width, generator)
        self.net = dict(zip(("weight_1", "bias_1", "weight_2", "bias_2"), map(nn.Parameter, (*first, *second))))
        super().__init__(experiment, self.net)

    def offsets(self, image_features: Tensor) -> Tensor:
        """Return h(f) [B, D] of unit image features [B, E]."""
        weight_1, bias_1, weight_2, bias_2 = self.net.values()
        return F.linear(F.relu(F.linear(image_features, weight_1, bias_1)), weight_2, bias_2)

    def text_features(self) -> Tensor:
        """Return none, [0, E]: each image has its own."""
        return self.vectors.new_empty(0, self.model.arch.embed_dim)

    def text_classifier(self) -> Tensor:
        return self.text_features()

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Return logits [B, C], each image's from its own text features. In an evaluation several processes share the
        images."""
        training = torch.is_grad_enabled()  # it has a bar of its own, and its own images
        own = image_features if training else image_features[distributed.mine_or_one(len(image_features))]
        pairs, rows = zip(own, self.offsets(own)), []
        for feature, offset in progress(pairs, "prompts", "image", total=len(own), disable=training):
            with self.experiment.autocast():
                text = utils.encode_text(self.model, self.prompts, self.vectors + offset)
            rows.append(self.experiment.cosine_logits(feature, text))
        return torch.stack(rows) if training else distributed.rows_of_all(torch.stack(rows), len(image_features))


def prepare(experiment: Experiment[Hparams]) -> CoCoOp:
    return CoCoOp(experiment)
