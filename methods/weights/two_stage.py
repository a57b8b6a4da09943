"""2SFS: two-stage few-shot adaptation. First CLIP's LayerNorms, then a linear classifier on the features they give.

Source: Farina et al., "Rethinking Few-Shot Adaptation of Vision-Language Models in Two Stages" (CVPR 2025, arXiv
2503.11609), and the code of FarinaMatteo/rethinking_fewshot_vlms.

1. `first_share` of all iterations, rounded down: LayerNorm tuning (`layernorm.py`) or bias tuning (`bias.py`) with
   cross-entropy of CLIP's logits.
2. The rest: CLIP is frozen. A row w_c for each class starts at the unit text feature of the tuned text tower; for unit
   features f of augmented images the logits are 100 f . w_c / |w_c|. A new AdamW with the same rate and weight decay
   trains the rows; its cosine goes over the iterations that are left.

Selective inference, for base-to-new and other datasets: a class that was trained, by its name, has its row; the tuned
text tower makes the features of all others.

Published, the same for all datasets and without validation images: 300 iterations a shot, of which 0.6 in the first
stage; the other settings are those of `layernorm.py`. 65,536 + C x 512 weights of ViT-B/16. The released code
leaves ln_pre, ln_post and ln_final frozen (61,440 + C x 512): configs/two_stage_released.yaml.

Differences: those of `layernorm.py`. The second stage continues the epoch of the first, where that code begins a new
one. With --precision fp16 an iteration whose update is skipped counts; there it does not. LoRA in the first stage is
left out.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip import delta
from common import UserError
from experiment import Experiment
from settings import option

from ..adaptation import Adaptation
from ..choice import cosine_schedule
from ..saving import Tensors
from .bias import biases
from .layernorm import Hparams as LayerNorms
from .layernorm import norm_parameters

FORMAT = "clip-two-stage-1"


@dataclass(frozen=True)
class Hparams(LayerNorms):
    """The published settings."""

    first_stage: str = option("layernorm", "what the first stage trains", choices=("layernorm", "bias"))
    first_share: float = option(0.6, "share of the iterations that the first stage has", above=0, below=1)


class Selective(Tensors):
    """Tensors of which "classifier" [C, E] and "trained" [C] have a row for each class. Of a file for other classes,
    those of the same name take their rows; the others count as not trained."""

    BY_CLASS = ("classifier", "trained")

    def load(self, path: Path, base_sha256: str) -> None:
        saved, metadata = delta.read_adapted(path, self.format, base_sha256)
        names, own = json.loads(metadata["class_names"]), self.class_names
        if names != own:
            row = {name: names.index(name) for name in own if names.count(name) == own.count(name) == 1}
            for key in saved.keys() & set(self.BY_CLASS):
                rows = [saved[key][row[name]] if name in row else torch.zeros_like(saved[key][0]) for name in own]
                saved[key] = torch.stack(rows)
        self.take(saved, path)


class TwoStage(Adaptation):
    """`tuned` are the weights of CLIP that the first stage trains, `classifier` [C, E] are the rows of the second, and
    `trained` [C] says which classes have a row."""

    def __init__(self, experiment: Experiment[Hparams], tuned: dict[str, nn.Parameter]):
        model, class_names = experiment.model, experiment.task.class_names
        self.tuned, self.in_second = tuned, False
        self.classifier = nn.Parameter(model.logit_scale.new_zeros(len(class_names), model.arch.embed_dim))
        self.trained = torch.zeros(len(class_names), dtype=torch.bool, device=model.device)
        parameters = tuned | {"classifier": self.classifier}
        super().__init__(
            experiment, parameters, saved=Selective(FORMAT, parameters | {"trained": self.trained}, class_names)
        )
        self.first = int(experiment.hparams.first_share * experiment.hparams.total_iters)
        if not self.first:
            raise UserError(
                f"two_stage: --first_share leaves no iteration of {experiment.hparams.total_iters} to the first stage; "
                "train longer"
            )
        self.begin(tuned.values(), self.first)

    @property
    def trains_text(self) -> bool:
        return any(not name.startswith("visual.") for name in self.tuned)

    def begin(self, parameters: Iterable[nn.Parameter], iterations: int) -> None:
        """Make optimizer, schedule and loss scale of a stage."""
        hparams = self.experiment.hparams
        self.optimizer = torch.optim.AdamW(parameters, lr=hparams.lr, weight_decay=hparams.weight_decay)
        self.scheduler = cosine_schedule(self.optimizer, iterations)
        vars(self).pop("scaler", None)  # the next stage begins with a new one

    @torch.no_grad()
    def begin_second(self) -> None:
        """Freeze CLIP as it is, and start the classifier at its text features."""
        self.in_second = True
        self.classifier.copy_(self.encode_prompts())
        self.trained.fill_(True)
        for p in self.tuned.values():
            p.requires_grad_(False).grad = None
        self.begin([self.classifier], self.experiment.hparams.total_iters - self.first)

    def after_step(self, iteration: int) -> None:
        if iteration == self.first:
            self.begin_second()

    def rows(self) -> Tensor:
        return F.normalize(self.classifier, dim=-1)

    def text_features(self) -> Tensor:
        return self.rows() if self.in_second else super().text_features()

    def text_classifier(self) -> Tensor:
        """Return unit rows [C, E]: of the classes that were trained, and text features of the others."""
        return torch.where(self.trained[:, None], self.rows(), super().text_classifier())

    def load_state_dict(self, state: dict) -> None:
        if state["saved"]["trained"].any():
            self.begin_second()
        super().load_state_dict(state)


def prepare(experiment: Experiment[Hparams]) -> TwoStage:
    model, hparams = experiment.model, experiment.hparams
    if hparams.first_stage == "bias":
        return TwoStage(experiment, biases(model, hparams, qkv=False))
    return TwoStage(experiment, norm_parameters(model, hparams, hparams.outer_norms))
