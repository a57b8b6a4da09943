"""What a run saves of an adaptation: changed weights of CLIP as a sparse delta, or tensors of the method's own."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from clip import CLIP, WeightsError, delta
from clip.weights import save_tensors


class Saved(Protocol):
    """What an adaptation leaves behind: it can be counted, saved, loaded, and kept in a checkpoint."""

    def changed_weights(self) -> int:
        """Return how many of CLIP's weights differ from those at the start, or how many the method adds to them."""

    def save(self, path: Path, base_sha256: str, metadata: dict[str, str]) -> None:
        """Write one safetensors file, with what it belongs to in its metadata."""

    def load(self, path: Path, base_sha256: str) -> None:
        """Take over what `save` wrote. Raise WeightsError, with nothing changed, if it does not fit."""

    def state_dict(self) -> dict:
        """Return the same for a checkpoint, in main memory."""

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` returned."""


class Delta:
    """The weights of CLIP that differ, bit for bit, from those at the start."""

    def __init__(self, model: CLIP, before: dict[str, Tensor]):
        self.model, self.before = model, before

    @classmethod
    def of_trained(cls, model: CLIP) -> "Delta":
        """Watch all weights that require a gradient now."""
        return cls(model, delta.snapshot(model))

    def changed_weights(self) -> int:
        return sum(len(indices) for indices, _ in self.state_dict().values())

    def save(self, path: Path, base_sha256: str, metadata: dict[str, str]) -> None:
        delta.save_delta(self.state_dict(), path, base_sha256, metadata)

    def load(self, path: Path, base_sha256: str) -> None:
        delta.apply_delta(self.model, path, base_sha256)

    def state_dict(self) -> dict:
        return delta.difference(self.before, self.model)

    def load_state_dict(self, state: dict) -> None:
        delta.apply_changes(self.model, state)


class Tensors:
    """Tensors that are not CLIP's: matrices of adapters, a head, prompt vectors.

    `format` names the kind of file. With `class_names` the tensors belong to these classes in this order, and a file
    for others is rejected. With `by_class` every tensor has a row for each of them, and a file for more classes than
    these serves too: ImageNet's for ImageNet-A, which has 200 of its 1000 classes. The tensors in `varying` have a row
    for each training image, so that the saved file decides how many rows there are.
    """

    def __init__(
        self,
        format: str,
        tensors: dict[str, Tensor],
        class_names: Sequence[str] | None = None,
        varying: Iterable[str] = (),
        by_class: bool = False,
    ):
        self.format, self.tensors, self.varying, self.by_class = format, tensors, set(varying), by_class
        self.class_names = None if class_names is None else list(class_names)

    def changed_weights(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values() if tensor.is_floating_point())

    def save(self, path: Path, base_sha256: str, metadata: dict[str, str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"format": self.format, "base_sha256": base_sha256}
        if self.class_names is not None:
            about["class_names"] = json.dumps(self.class_names)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        save_tensors(tensors, path, {**metadata, **about})

    def load(self, path: Path, base_sha256: str) -> None:
        saved, metadata = delta.read_adapted(path, self.format, base_sha256)
        if self.class_names is not None:
            names, own = json.loads(metadata["class_names"]), self.class_names
            if self.by_class and all(names.count(name) == own.count(name) == 1 for name in own):
                rows = [names.index(name) for name in own]
                saved = {name: tensor[rows] for name, tensor in saved.items()}
            elif names != own:
                raise WeightsError(
                    f"{path} was made for {len(names)} other classes ({', '.join(names[:3])}, ...); evaluate it on the "
                    "dataset that it was made for"
                )
        self.take(saved, path)

    def take(self, saved: dict[str, Tensor], path: Path) -> None:
        """Copy tensors that were read from `path`. Raise WeightsError, with nothing changed, if they do not fit."""
        rows = {saved[name].shape[:1] for name in self.varying & saved.keys()}
        for name in sorted(saved.keys() | self.tensors.keys()):
            found, own = saved.get(name), self.tensors.get(name)
            first = 1 if name in self.varying else 0  # the first dimension whose size is known
            if found is None or own is None or (found.shape[first:], found.dtype) != (own.shape[first:], own.dtype):
                raise WeightsError(f"{path} does not fit these settings: {name} differs; use those it was saved with")
            if found.dim() != own.dim() or len(rows) > 1:
                raise WeightsError(f"{path} has tensors of different lengths; save it again")
        for name, own in self.tensors.items():
            if own.shape == saved[name].shape:
                with torch.no_grad():
                    own.copy_(saved[name])
            else:
                own.data = saved[name].to(own.device)

    def state_dict(self) -> dict:
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])
