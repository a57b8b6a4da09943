"""Layers of the library peft in CLIP, for DoRA and AdaLoRA.

They go on the four matrices of each chosen block that SO trains too (`select_matrices`). The attention's input
projection counts as one matrix [3D, D]: peft does not divide a layer, so query, key and value share a rank and the
matrix A.
"""

import importlib
import re
from collections.abc import Iterator
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.model import Block
from clip.parts import matrices
from common import UserError
from experiment import Experiment

from ..choice import select_blocks
from .matrices import Adapters, LowRank, SeededDropout

ADAPTER = "default"  # peft's name for a model's only adapter


def library(method: str) -> ModuleType:
    """Return peft, which takes seconds to import. Raise UserError if it is not installed."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise UserError(f"--method {method} needs peft ({error}); pip install -r requirements-all.txt") from None


class PeftAdapters(Adapters):
    """The layers that `tuner`, a class of peft, makes from `config`, in the chosen blocks of the model."""

    def __init__(self, experiment: Experiment[LowRank], tuner: type, config: object):
        model, dropout, seed = experiment.model, experiment.hparams.dropout, experiment.settings.seed
        blocks = select_blocks(model, experiment.hparams)
        layers = {layer for block in blocks.values() for layer in matrices(block)}
        names = [name for name, module in model.named_modules() if module in layers]
        if any(isinstance(layer, nn.Conv2d) for layer in layers):
            method = experiment.settings.method
            raise UserError(f"{method} adapts linear layers, and the image tower has convolutions; use --encoder text")
        # A pattern for whole names. Given a list, peft also takes layers whose names only end in one of the list: for
        # the text tower's transformer... the image tower's visual.transformer... too.
        config.target_modules = "|".join(re.escape(name) for name in names)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.tuner = tuner(model, config, ADAPTER)
        self.layers = {name: model.get_submodule(name) for name in names}
        generator = torch.Generator(model.device).manual_seed(seed)
        self.generators = self.noise = (generator,)
        for layer in self.layers.values():
            if dropout > 0:
                layer.lora_dropout[ADAPTER] = SeededDropout(dropout, generator)
            layer.forward = partial(_forward, layer)
        self.attentions = [block.attn for block in blocks.values() if isinstance(block, Block)]
        for attention in self.attentions:
            attention.project = partial(_project, attention)
        # AdaLoRA's constants, which peft makes trainable where it moves them to another device or type, stay frozen.
        parameters = {name: p for name, p in model.named_parameters() if ".lora_" in name}
        model.requires_grad_(False)
        for p in parameters.values():
            p.requires_grad_(True)
        super().__init__(experiment, parameters)

    def merged_weights(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        return ((layer.base_layer.weight, merged(layer)) for layer in self.layers.values())

    def remove(self) -> None:
        for name, layer in self.layers.items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, layer.base_layer)
        for attention in self.attentions:
            del attention.project  # the class's method shows again
        del self.model.peft_config


def _project(attention: nn.Module, x: Tensor, parts: str) -> Tensor:
    """Return what `Attention.project` does, where `in_proj` is a peft layer."""
    return _forward(attention.in_proj, x, attention.rows(parts))


def _forward(layer: nn.Module, x: Tensor, rows: slice = slice(None)) -> Tensor:
    """Return a peft layer's output [..., out] for x [..., in], or only these `rows` of it."""
    if not torch.is_grad_enabled():
        bias = layer.base_layer.bias
        return F.linear(x, merged(layer)[rows], None if bias is None else bias[rows])
    return type(layer).forward(layer, x)[..., rows]


def merged(layer: nn.Module) -> Tensor:
    """Return the weight with which a plain linear layer computes what this peft layer does. Call it without
    gradients."""
    weight = layer.base_layer.weight
    before = weight.data
    with torch.autocast(before.device.type, enabled=False):
        weight.data = before.clone()  # what peft merges into, and may replace
        layer.merge()
    result, weight.data = weight.data, before
    layer.merged_adapters.clear()
    return result
