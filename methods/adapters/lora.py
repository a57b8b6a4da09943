"""LoRA (Hu et al., arXiv 2106.09685) on CLIP's attention, as CLIP-LoRA does it (Zanella and Ben Ayed, arXiv
2405.18541).

A frozen matrix W [out, in] becomes W + s B A with A [r, in] and B [out, r]. Queries, keys and values each have their
own A and B, although CLIP stacks their matrices in one. A starts Kaiming-uniform with a = sqrt(5), B at zero, s = alpha
/ sqrt(r), and dropout acts on the branch's input.

Published: rank 2 on q, k and v of every block of both towers, alpha 1, dropout 0.25, AdamW with lr 2e-4 and weight
decay 1e-2, cosine to 1e-6, 500 iterations a shot, batch 32, half precision autocast. Here float32 unless --precision
bf16. Where each value is: rank, alpha, dropout, n_iters and early stop in LowRank (matrices.py), lr and batch size in
Training (settings.py), weight decay in WEIGHT_DECAY (matrices.py); configs/clip_lora.yaml repeats them.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.parts import attention
from common import UserError
from experiment import Experiment
from settings import option

from ..choice import cosine_schedule, select_attention
from .matrices import WEIGHT_DECAY, Adapters, LowRank, SeededDropout


@dataclass(frozen=True)
class Hparams(LowRank):
    """CLIP-LoRA's published values."""

    lora_on: str = option("q,k,v", "which of the attention's projections q, k, v and o have an update")

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = [part.strip() for part in self.lora_on.split(",")]
        if len(set(parts)) < len(parts) or not set(parts) <= set("qkvo"):
            raise UserError(f"--lora_on must name some of q,k,v,o, comma-separated, not {self.lora_on!r}")
        object.__setattr__(self, "lora_on", ",".join(part for part in "qkvo" if part in parts))  # one order, one run


class Branches:
    """LoRA on some of the equal parts, such as "qkv", into which a linear layer's output rows are divided."""

    def __init__(
        self, layer: nn.Linear, parts: str, chosen: Iterable[str], rank: int, scaling: float, dropout: nn.Module
    ):
        self.layer, self.parts, self.scaling, self.dropout = layer, parts, scaling, dropout
        self.height = layer.out_features // len(parts)  # rows of a part
        new = layer.weight.new_zeros
        self.A = {part: nn.Parameter(new(rank, layer.in_features)) for part in parts if part in chosen}
        self.B = {part: nn.Parameter(new(self.height, rank)) for part in self.A}

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """Set A to random numbers and B to zero. `generator` is the CPU's, so that all devices start alike."""
        for part in self.A:
            A = nn.init.kaiming_uniform_(torch.empty(self.A[part].shape), a=math.sqrt(5), generator=generator)
            self.A[part].copy_(A)
            self.B[part].zero_()

    def scaled_B(self, parts: str) -> Tensor:
        """Return s B of these parts as one matrix [rows of the parts, r x number of branches]; rows without a branch
        are zero."""
        none = self.layer.weight.new_zeros(self.height, 0)
        return self.scaling * torch.block_diag(*(self.B.get(part, none) for part in parts))

    def merged(self) -> Tensor:
        """Return W + s B A, in the weight's own precision."""
        weight = self.layer.weight
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.scaled_B(self.parts) @ torch.cat(list(self.A.values()))

    def forward(self, x: Tensor, parts: str | None = None) -> Tensor:
        """Return the layer's output [..., out] for x [..., in], or only these neighbouring `parts` of it."""
        parts = self.parts if parts is None else parts
        start = self.parts.index(parts) * self.height
        rows = slice(start, start + len(parts) * self.height)
        bias = None if self.layer.bias is None else self.layer.bias[rows]
        if not torch.is_grad_enabled():
            return F.linear(x, self.merged()[rows], bias)
        y = F.linear(x, self.layer.weight[rows], bias)
        inner = [F.linear(self.dropout(x), self.A[part]) for part in parts if part in self.A]
        return y + F.linear(torch.cat(inner, dim=-1), self.scaled_B(parts)) if inner else y


class LoRA(Adapters):
    """LoRA in the chosen blocks, trained with AdamW."""

    FORMAT = "clip-lora-1"

    def __init__(self, experiment: Experiment[Hparams]):
        hparams, seed = experiment.hparams, experiment.settings.seed
        self.generator = torch.Generator().manual_seed(seed)
        dropout = SeededDropout(hparams.dropout, torch.Generator(experiment.device).manual_seed(seed))
        self.generators, self.noise = (self.generator, dropout.generator), (dropout.generator,)
        scaling = hparams.alpha / math.sqrt(hparams.rank)
        chosen = hparams.lora_on.split(",")
        self.branches, self.replaced, parameters = [], [], {}
        for name, block in select_attention(experiment.model, hparams).items():
            for layer, parts, owner, method in attention(block):
                if not set(parts) & set(chosen):
                    continue
                branches = Branches(layer, parts, chosen, hparams.rank, scaling, dropout)
                branches.start(self.generator)
                setattr(owner, method, branches.forward)
                self.replaced.append((owner, method))
                self.branches.append(branches)
                for part in branches.A:
                    parameters[f"{name}.attn.{part}.lora_A"] = branches.A[part]
                    parameters[f"{name}.attn.{part}.lora_B"] = branches.B[part]
        super().__init__(experiment, parameters)
        self.optimizer = torch.optim.AdamW(parameters.values(), lr=hparams.lr, weight_decay=WEIGHT_DECAY)
        self.scheduler = cosine_schedule(self.optimizer, hparams.total_iters)

    def merged_weights(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        return ((branches.layer.weight, branches.merged()) for branches in self.branches)

    def remove(self) -> None:
        for owner, method in self.replaced:
            delattr(owner, method)  # the class's method shows again


def prepare(experiment: Experiment[Hparams]) -> LoRA:
    return LoRA(experiment)
