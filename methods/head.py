"""Classifiers of a method's own on the features of an unchanged CLIP, and how they are saved."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from clip import CLIP, WeightsError
from clip.delta import read_adapted
from clip.weights import save_tensors

from .adaptation import Adaptation

FORMAT = "clip-head-1"


class Head(Adaptation):
    """Tensors beside CLIP that make logits of frozen features. A subclass fills them in `build`, if not by training.

    Saved, it is one safetensors file of its tensors; the metadata name the base weights, whose features it needs, and
    its classes in order. `tensors` that require a gradient count as trainable, and all are weights that CLIP did not
    have, save integers.
    """

    trains_images = trains_text = False
    has_weights = True
    # Whether the tensors have a row for each training image: then saved weights say how many.
    length_varies = False

    def __init__(self, model: CLIP, class_names: Sequence[str], tensors: dict[str, Tensor]):
        model.requires_grad_(False)
        super().__init__(model, {name: tensor for name, tensor in tensors.items() if tensor.requires_grad})
        self.class_names, self.tensors = list(class_names), tensors

    @property
    def own_tensors(self) -> dict[str, Tensor]:
        return self.parameters

    def changed_weights(self) -> int:
        """Number of weights that the head adds to CLIP."""
        return sum(tensor.numel() for tensor in self.tensors.values() if tensor.is_floating_point())

    def save(self, path: Path, base_sha256: str, metadata: dict[str, str]) -> int:
        """Writes the head and what it belongs to; returns the file's size in bytes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        about = {"format": FORMAT, "base_sha256": base_sha256, "class_names": json.dumps(self.class_names)}
        save_tensors(tensors, path, {**metadata, **about})
        return path.stat().st_size

    @torch.no_grad()
    def load(self, path: Path, base_sha256: str) -> None:
        """Takes what `save` wrote. WeightsError, this head unchanged, for other base weights, classes or settings."""
        tensors, metadata = read_adapted(path, FORMAT, base_sha256)
        names = json.loads(metadata["class_names"])
        if names != self.class_names:
            raise WeightsError(
                f"{path} tells apart {len(names)} other classes ({', '.join(names[:3])}, ...); evaluate it on the data "
                "set that it was made for"
            )
        fixed = 1 if self.length_varies else 0  # the first dimension whose size is known
        lengths = {tensor.shape[:1] for tensor in tensors.values()}
        for name, own in self.tensors.items():
            saved = tensors.get(name)
            if saved is None or (saved.shape[fixed:], saved.dtype) != (own.shape[fixed:], own.dtype):
                raise WeightsError(f"{path} has no {name} of the shape {list(own.shape)}; save it again")
            if self.length_varies and (len(lengths) > 1 or saved.dim() != own.dim()):
                raise WeightsError(f"{path} has tensors of different lengths; save it again")
        for name, own in self.tensors.items():
            own.data = tensors[name].to(own.device)
