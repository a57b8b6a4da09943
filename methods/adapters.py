"""What LoRA, DoRA and AdaLoRA share: small matrices beside frozen weights, saved apart and merged into them.

Two rules hold for all of them. A forward pass that records gradients computes the weights' and the matrices' parts
side by side, with dropout; one without gradients, as in evaluation, uses the merged weights, at the plain model's speed
and with the very numbers that it has after `merge`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from clip import CLIP, WeightsError, weights_sha256
from clip.delta import read_adapted
from clip.weights import save_tensors

from .adaptation import Adaptation

WEIGHT_DECAY = 1e-2  # of all the matrices, as in CLIP-LoRA


class SeededDropout(nn.Module):
    """`nn.Dropout` whose draws come from `generator`, so that nothing else that is random disturbs them. It acts in
    every forward pass that it takes part in; those without gradients do without it."""

    def __init__(self, p: float, generator: torch.Generator):
        super().__init__()
        self.p, self.generator = p, generator

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0:
            return x
        dropped = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(self.p, generator=self.generator)
        return x.masked_fill(dropped, 0) / (1 - self.p)


class Adapters(Adaptation):
    """Trains matrices beside the model's weights. `settings` are as in configs/settings.py.

    A subclass sets FORMAT, which its files bear, calls `__init__` after it has put its matrices into the model, and
    implements `merged_weights` and `remove`.
    """

    FORMAT: str

    def __init__(self, model: CLIP, settings, parameters: dict[str, nn.Parameter]):
        super().__init__(model, parameters)
        self.before = {}  # the weights stay what they are
        self.dropout = settings.dropout

    @property
    def shares_prefix(self) -> bool:
        """With dropout each prompt draws for itself, as published."""
        return self.dropout == 0

    @property
    def own_tensors(self) -> dict[str, Tensor]:
        return self.parameters

    def merged_weights(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The frozen weights that have matrices beside them, each with the weight that replaces both."""
        raise NotImplementedError

    def remove(self) -> None:
        """Takes the matrices out of the model, whose computation is the plain one again."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> CLIP:
        """Makes the model a plain CLIP with the same outputs, ready for `clip.weights.save_weights`, and returns it."""
        for weight, merged in self.merged_weights():
            weight.copy_(merged)
        self.remove()
        return self.model

    @torch.no_grad()
    def changed_weights(self) -> int:
        """Number of CLIP's weights that differ once the matrices are merged."""
        return sum(int((weight != merged).sum()) for weight, merged in self.merged_weights())

    def save(self, path: Path, base_sha256: str, metadata: dict[str, str]) -> int:
        """Writes the matrices alone, with the hash of the weights they belong to; returns the file's size in bytes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.parameters.items()}
        save_tensors(tensors, path, {**metadata, "format": self.FORMAT, "base_sha256": base_sha256})
        return path.stat().st_size

    def load(self, path: Path, base_sha256: str) -> None:
        """Takes over the matrices that `save` wrote. WeightsError, with nothing changed, if they belong to other base
        weights or to other settings."""
        self._take(read_adapted(path, self.FORMAT, base_sha256)[0], path)

    @torch.no_grad()
    def _take(self, tensors: dict[str, Tensor], path: Path) -> None:
        for name in sorted(tensors.keys() | self.parameters.keys()):
            found, wanted = tensors.get(name), self.parameters.get(name)
            if found is None or wanted is None or (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
                raise WeightsError(f"{path} does not fit these settings: {name} differs; use those it was saved with")
        for name, p in self.parameters.items():
            p.copy_(tensors[name])

    @classmethod
    def merge_file(cls, model: CLIP, path: str | Path) -> CLIP:
        """Merges matrices that main.py saved into `model`, which has the weights they belong to, and returns it: a
        plain CLIP. WeightsError, the model untouched, if they belong to others or the file is damaged."""
        path = Path(path)
        tensors, metadata = read_adapted(path, cls.FORMAT, weights_sha256(model))
        try:
            stored = json.loads(metadata["settings"])
            iterations = stored["total_iters"] or stored["n_iters"] * stored["shots"]
        except (KeyError, TypeError, ValueError):
            raise WeightsError(f"{path} does not say how it was trained; save it again") from None
        adaptation = cls(model, SimpleNamespace(**stored, iterations=iterations))
        try:
            adaptation._take(tensors, path)
        except WeightsError:
            adaptation.remove()
            raise
        return adaptation.merge()
