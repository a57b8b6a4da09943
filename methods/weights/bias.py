"""Bias tuning (BitFit, arXiv 2106.10199) of CLIP, as the baseline `bitfit` of 2SFS does it.

Source: Farina et al. (CVPR 2025, arXiv 2503.11609) and the code of FarinaMatteo/rethinking_fewshot_vlms. Trained are
the biases of all LayerNorms and of out_proj, c_fc and c_proj in both towers: 124,928 weights of ViT-B/16. The biases of
queries, keys and values have another kind of name in that code, which leaves them frozen; BitFit trains them. With
`qkv_biases` they are trained too: 171,008 weights.

Settings, base-to-new and differences: those of LayerNorm tuning (`layernorm.py`).
"""

from dataclasses import dataclass

from torch import nn

from clip import CLIP
from experiment import Experiment
from settings import option

from ..adaptation import Adaptation
from ..choice import Blocks, select_blocks
from .layernorm import Tuning, layer_norms, trained, tuned


@dataclass(frozen=True)
class Hparams(Tuning):
    """The published settings."""

    qkv_biases: bool = option(False, "train the biases of queries, keys and values too, as BitFit does")


def biases(model: CLIP, hparams: Blocks, qkv: bool) -> dict[str, nn.Parameter]:
    """Freeze the model except biases in and around the chosen blocks, and return these by name."""
    layers = ("attn.out_proj", "mlp.c_fc", "mlp.c_proj", *(["attn.in_proj"] if qkv else []))
    linear = [f"{block}.{layer}" for block in select_blocks(model, hparams) for layer in layers]
    return trained(model, [f"{name}.bias" for name in (*layer_norms(model, hparams, outer=True), *linear)])


def prepare(experiment: Experiment[Hparams]) -> Adaptation:
    return tuned(experiment, biases(experiment.model, experiment.hparams, experiment.hparams.qkv_biases))
