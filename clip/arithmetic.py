"""Arithmetic of deltas: what several adaptations of one CLIP changed is added, subtracted, multiplied, interpolated.

A delta maps a tensor's name to flat indices and new values (`delta.py`); its difference from the base is value - base
weight. Task arithmetic (Ilharco et al., arXiv 2212.04089) adds and subtracts such differences. WiSE-FT (Wortsman et
al., arXiv 2109.01903) multiplies one by a factor from 0, the base, to 1, the adapted model.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .model import CLIP

Changes = Mapping[str, tuple[Tensor, Tensor]]  # name -> indices int32 [n], ascending, and new values float32 [n]


def combine(
    base: Mapping[str, Tensor], deltas: Sequence[Changes], factors: Sequence[float], mean: bool = False
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the delta base + sum_i factor_i (delta_i - base), computed in float64, over the entries that it changes.

    `base` has the weights that all deltas belong to. With `mean` an entry that n of the deltas change takes 1/n of the
    sum there. An entry that one delta of factor 1 changes keeps its value bit for bit.
    """
    combined = {}
    for name in sorted({name for delta in deltas for name in delta}):
        parts = [(factor, *delta[name]) for factor, delta in zip(factors, deltas) if name in delta]
        indices = torch.cat([own for _, own, _ in parts]).unique()
        before = base[name].detach().cpu().reshape(-1)[indices.long()]
        total, count = torch.zeros(len(indices), dtype=torch.float64), torch.zeros(len(indices))
        places = [torch.searchsorted(indices, own) for _, own, _ in parts]
        for place, (factor, _, values) in zip(places, parts):
            total[place] += factor * (values.double() - before[place].double())
            count[place] += 1
        new = (before.double() + (total / count if mean else total)).float()
        for place, (factor, _, values) in zip(places, parts):
            if factor == 1:
                only = count[place] == 1
                new[place[only]] = values[only]
        changed = new.view(torch.int32) != before.view(torch.int32)
        if changed.any():
            combined[name] = indices[changed], new[changed]
    return combined


def interpolate(
    base: Mapping[str, Tensor], start: Changes, end: Changes, at: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the delta of the model on the line from one adapted model, at 0, to another, at 1.

    With an empty `start` the line begins at the base: WiSE-FT's curve. Values beyond 0 and 1 extrapolate.
    """
    return combine(base, (start, end), (1 - at, at))


def entries(delta: Changes) -> int:
    """Return the number of weights that a delta changes."""
    return sum(len(indices) for indices, _ in delta.values())


def overlap(base: Mapping[str, Tensor], one: Changes, other: Changes) -> dict[str, float]:
    """Return how two deltas of the same base overlap.

    `common` is the number of entries that both change, and `of_smaller` its share of the smaller delta's entries (0 to
    1). `same_sign` is the share of the common entries that both move in the same direction. `cosine` is that of the two
    differences from the base, over all entries (-1 to 1). A share of nothing is NaN.
    """
    moved = [_moved(base, delta) for delta in (one, other)]
    common, agree, product = 0, 0, 0.0
    for name in one.keys() & other.keys():
        x = moved[0][name][torch.isin(one[name][0], other[name][0])]
        y = moved[1][name][torch.isin(other[name][0], one[name][0])]
        common += len(x)
        agree += int((x * y > 0).sum())
        product += float(x @ y)
    length = math.prod(math.sqrt(sum(float(x.square().sum()) for x in each.values())) for each in moved)
    smaller = min(entries(one), entries(other))
    return {
        "common": common,
        "of_smaller": common / smaller if smaller else float("nan"),
        "same_sign": agree / common if common else float("nan"),
        "cosine": product / length if length else float("nan"),
    }


def _moved(base: Mapping[str, Tensor], delta: Changes) -> dict[str, Tensor]:
    """Return each tensor's differences from the base, float64 [n]."""
    return {
        name: values.double() - base[name].detach().cpu().reshape(-1)[indices.long()].double()
        for name, (indices, values) in delta.items()
    }


class Switch:
    """Several adapted models in one: changes between them, and back to the base, in place.

    It costs a write of the two deltas' entries, and memory of one base value per entry of each delta. Nothing else may
    change these weights meanwhile.
    """

    @torch.no_grad()
    def __init__(self, model: CLIP, deltas: Mapping[str, Changes]):
        """`model` has the base weights, `deltas` are the adapted models by name."""
        weights = model.state_dict()
        self.active: str | None = None
        self._changes = {
            name: [
                (weights[tensor].view(-1), indices.long().to(model.device), values.to(model.device))
                for tensor, (indices, values) in delta.items()
            ]
            for name, delta in deltas.items()
        }
        self._base = {
            name: [(weight, indices, weight[indices]) for weight, indices, _ in changes]
            for name, changes in self._changes.items()
        }

    @torch.no_grad()
    def to(self, name: str | None) -> None:
        """Make the model the adapted one of this name, bit for bit; None is the base."""
        new = [] if name is None else self._changes[name]  # an unknown name changes nothing
        for weight, indices, values in (*(self._base[self.active] if self.active else ()), *new):
            weight.index_copy_(0, indices, values)  # on a CPU 2.4 times as fast as [] =
        self.active = name
