"""Bias tuning (BitFit, arXiv 2106.10199) of CLIP, as the baseline `bitfit` of 2SFS does it.

Source: Farina et al. (CVPR 2025, arXiv 2503.11609) and the code of FarinaMatteo/rethinking_fewshot_vlms. Trained are
the biases of all LayerNorms and of out_proj, c_fc and c_proj in both towers: 124,928 weights of ViT-B/16. The biases of
queries, keys and values have another kind of name in that code, which leaves them frozen; BitFit trains them. With
`qkv_biases` they are trained too: 171,008 weights.

Settings, base-to-new and differences: those of LayerNorm tuning (`layernorm.py`).
"""

from dataclasses import dataclass

from torch import nn

from clip import CLIP, parts
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
    norms = layer_norms(model, hparams, outer=True)
    inputs, linear = set(), []
    for name, block in select_blocks(model, hparams).items():
        inputs |= {layer for layer, kinds, *_ in parts.attention(block) if kinds != "o"}
        names = {module: f"{name}.{own}" for own, module in block.named_modules()}
        layers = [layer for layer in parts.matrices(block) if layer.bias is not None]
        linear += [names[layer] for layer in layers if qkv or layer not in inputs]
    with_bias = [name for name, norm in norms.items() if norm.bias is not None]
    return trained(model, [f"{name}.bias" for name in (*with_bias, *linear)])


def prepare(experiment: Experiment[Hparams]) -> Adaptation:
    return tuned(experiment, biases(experiment.model, experiment.hparams, experiment.hparams.qkv_biases))
