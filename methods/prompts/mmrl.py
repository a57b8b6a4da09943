"""MMRL: tokens made from one shared space in the upper blocks of both towers, and a second image feature from them.

Source: Guo and Gu, "MMRL: Multi-Modal Representation Learning for Vision-Language Models" (arXiv 2503.08497), and the
code of yunncheng/MMRL. The space is R [n, rep_dim], trained. From block `first_block` on, counted from 1, each block of
each tower has a linear map of its own that makes n tokens of R. Before the first of these blocks they are inserted
after the class token or [start]; before each further one they replace what the block before made of them. Text tokens
before them are unchanged, so that the prompts' places move by n.

The class token gives the unit image feature f, as in CLIP; the mean of the n image tokens after the last LayerNorm
gives f_r by a second projection, trained. With text features t_c, CLIP's own f0 and t0_c, and CLIP's factor s = 100, z
= s f . t_c and z_r = s f_r . t_c, the loss is

    mmrl_alpha CE(z) + (1 - mmrl_alpha) CE(z_r) + reg_weight (2 - mean cos(f, f0) - mean cos(t_c, t0_c)).

The logits of classes that were trained are mmrl_alpha z + (1 - mmrl_alpha) z_r; those of new classes and other datasets
are z alone.

Starts: R at N(0, 0.02^2); the maps of all blocks of a tower at copies of one layer, as torch's start; the second
projection at N(0, 1 / width), not at CLIP's.

Published: n 5, alpha 0.7; AdamW, lr 1e-3, weight decay 5e-4, the schedule of `context.py`; crops from half of the area;
the dataset's own prompt (`--prompts specific`). Few shots of all classes: batch 32, 50 epochs, on ImageNet 5.
reg_weight by dataset, from 0.01 to 7, and rep_dim 2048 for EuroSAT (mmrl.yaml): on which images they were chosen is not
said. configs/prompts/mmrl_common.yaml has one value for all. Base-to-new: batch 4, 10 epochs, on ImageNet as above
(configs/prompts/mmrl_base_to_new.yaml). Other datasets: 1 epoch without warm-up, batch 32, reg_weight 0.2
(configs/prompts/mmrl_cross_dataset.yaml).

Differences: as in `coop.py`. Classes count as trained if they are the same names in the same order, unless the images
are those of another dataset.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import utils
from clip import delta
from clip.layouts import Images, Layout, Prompts
from clip.model import Enter
from experiment import Experiment
from settings import option, with_default

from ..adaptation import Adaptation, Batch
from ..choice import WARMUP_LR, dassl_schedule
from ..saving import Tensors
from .context import DasslTraining, linear_start, random_vectors
from .deep import check_depth, check_towers, insert

WEIGHT_DECAY = 5e-4
FORMAT = "clip-mmrl-1"


@dataclass(frozen=True)
class Hparams(DasslTraining):
    """The published settings for few shots of all classes; `reg_weight` is that of the authors' file for these."""

    lr: float = with_default(DasslTraining, "lr", 1e-3)
    epochs: int | None = with_default(DasslTraining, "epochs", 50)
    min_area: float = with_default(DasslTraining, "min_area", 0.5)
    n_tokens: int = option(5, "number of tokens in each block", at_least=1)
    rep_dim: int = option(512, "width of the shared space", at_least=1)
    first_block: int = option(6, "block, counted from 1, from which on there are tokens", at_least=1)
    mmrl_alpha: float = option(0.7, "weight of CLIP's logits beside the second ones", at_least=0, at_most=1)
    reg_weight: float = option(0.5, "weight of the distances to CLIP's features", at_least=0)
    warmup: bool = option(True, "begin with an epoch at a rate of 1e-5")


class ImagesWithTokens(Images):
    """The layout of the last block: its class token and the `n` tokens after it are used, [B, 1 + n, D]."""

    pools = True

    def __init__(self, n: int):
        self.n = n

    def used(self, x: Tensor) -> Tensor:
        return x[:, : 1 + self.n]


class KnowsClasses(Tensors):
    """Tensors that serve all classes; `same_classes` says whether they were trained on the classes of this task."""

    def __init__(self, tensors: dict[str, Tensor], task_classes: Sequence[str]):
        super().__init__(FORMAT, tensors)
        self.task_classes, self.same_classes = list(task_classes), True

    def save(self, path: Path, base_sha256: str, metadata: dict[str, str]) -> None:
        super().save(path, base_sha256, metadata | {"class_names": json.dumps(self.task_classes)})

    def load(self, path: Path, base_sha256: str) -> None:
        super().load(path, base_sha256)
        self.same_classes = json.loads(delta.checkpoint_metadata(path)["class_names"]) == self.task_classes


class MMRL(Adaptation):
    """`space` [n, rep_dim] is R; the maps are `image_weight` [blocks, D_v, rep_dim], `image_bias` [blocks, D_v] and the
    same of the text tower; `projection` [D_v, E] is the second one. 4,992,256 weights in ViT-B/16.

    Image features are [B, 2, E]: f and f_r.
    """

    trains_images = True

    def __init__(self, experiment: Experiment[Hparams]):
        check_towers(experiment)
        model, hparams, arch = experiment.model, experiment.hparams, experiment.model.arch
        check_depth(experiment, "first_block", hparams.first_block)
        generator = torch.Generator().manual_seed(experiment.settings.seed)
        tensors = {"space": random_vectors(experiment, hparams.n_tokens, hparams.rep_dim, generator)}
        for tower, width, layers in (
            ("image", arch.vision_width, arch.vision_layers),
            ("text", arch.text_width, arch.text_layers),
        ):
            blocks = layers - hparams.first_block + 1
            weight, bias = linear_start(experiment, hparams.rep_dim, width, generator)
            tensors |= {f"{tower}_weight": weight.repeat(blocks, 1, 1), f"{tower}_bias": bias.repeat(blocks, 1)}
        second = torch.randn(arch.vision_width, arch.embed_dim, generator=generator)
        tensors["projection"] = arch.vision_width**-0.5 * second
        parameters = {name: nn.Parameter(tensor.to(model.logit_scale)) for name, tensor in tensors.items()}
        model.requires_grad_(False)
        super().__init__(experiment, parameters, saved=KnowsClasses(parameters, experiment.task.class_names))
        self.optimizer = torch.optim.AdamW(parameters.values(), lr=hparams.lr, weight_decay=WEIGHT_DECAY)
        warmup_lr = WARMUP_LR if hparams.warmup else None
        self.scheduler = dassl_schedule(self.optimizer, hparams, len(experiment.task.train), warmup_lr)
        self.encode_frozen = model.encode_image
        model.encode_image = self.encode_image

    def tokens(self, tower: str) -> Tensor:
        """Return the tokens [blocks, n, width] of a tower, "image" or "text"."""
        weight, bias = (self.parameters[f"{tower}_{kind}"] for kind in ("weight", "bias"))
        return torch.einsum("nr,bdr->bnd", self.parameters["space"], weight) + bias[:, None]

    def enter(self, tower: str, inside: Layout, at_last: Layout) -> Enter:
        """Return what puts the tokens of a tower into its blocks; the layout is `inside` from the first of them on, and
        `at_last` in the last block."""
        tokens, first = self.tokens(tower), self.experiment.hparams.first_block - 1

        def enter(index: int, x: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
            block = index - first
            if block < 0:
                return x, layout
            x = insert(x, tokens[block], 1, tokens.shape[1] if block else 0)
            return x, at_last if block == len(tokens) - 1 else inside

        return enter

    def encode_image(self, images: Tensor) -> Tensor:
        """Map preprocessed images [B, 3, R, R] to both embeddings [B, 2, E], not normalised."""
        visual = self.model.visual
        enter = self.enter("image", visual.layout, ImagesWithTokens(self.experiment.hparams.n_tokens))
        x = visual.ln_post(visual.transformer(visual.ln_pre(visual.embed(images)), visual.layout, enter))
        return torch.stack([x[:, 0] @ visual.proj, x[:, 1:].mean(dim=1) @ self.parameters["projection"]], dim=1)

    @cached_property
    def longer_prompts(self) -> Prompts:
        """The layout of the prompts with the tokens behind [start]."""
        task, n = self.experiment.task, self.experiment.hparams.n_tokens
        names = [task.class_names[label] for label in self.encoded_classes]
        ids = utils.tokenize_classes(self.model.tokenize, names, task.templates[0])
        places = torch.ones(len(ids), n, dtype=ids.dtype)  # any token: only the layout is used
        longer = torch.cat([ids[:, :1], places, ids[:, 1:]], dim=1)
        return self.model.prompts(longer).to(self.experiment.device)

    def encode_own_prompts(self) -> Tensor:
        with self.experiment.autocast():
            enter = self.enter("text", self.longer_prompts, self.longer_prompts)
            return utils.encode_text(self.model, self.prompts, None, enter)

    @torch.no_grad()
    def text_classifier(self) -> Tensor:
        return self.encode_prompts()

    def build(self) -> None:
        """Compute the frozen unit text features [C, E]."""
        self.frozen_text = self.experiment.text_classifier(self.experiment.task.templates[:1])

    @property
    def fuses(self) -> bool:
        """Whether the logits are those of trained classes, made from both image features."""
        return self.saved.same_classes and self.experiment.settings.eval_datasets is None

    def both_logits(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        """Return z and z_r [B, C]."""
        first, second = (self.experiment.cosine_logits(f, text_features) for f in image_features.unbind(dim=1))
        return first, second

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        first, second = self.both_logits(image_features, text_features)
        alpha = self.experiment.hparams.mmrl_alpha
        return alpha * first + (1 - alpha) * second if self.fuses else first

    def loss(self, batch: Batch) -> Tensor:
        alpha, both = self.experiment.hparams.mmrl_alpha, self.both_logits(batch.image_features, batch.text_features)
        first, second = (F.cross_entropy(logits, batch.labels) for logits in both)
        return alpha * first + (1 - alpha) * second

    def penalty(self, batch: Batch) -> Tensor:
        with torch.no_grad(), self.experiment.autocast():
            frozen = self.encode_frozen(batch.images.to(self.model.device, non_blocking=True)).float()
        image = torch.cosine_similarity(batch.image_features[:, 0], frozen)
        text = torch.cosine_similarity(batch.text_features, self.frozen_text)
        return self.experiment.hparams.reg_weight * (2 - image.mean() - text.mean())


def prepare(experiment: Experiment[Hparams]) -> MMRL:
    return MMRL(experiment)
