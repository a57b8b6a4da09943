"""Which blocks a CLIP's towers have, and which matrices and attention layers are in them, for methods to adapt.

A ViT's and the text tower's blocks have four matrices. Bottlenecks of a ResNet have convolutions, and blocks of timm's
towers whatever timm put there: all their linear layers and their convolutions with kernels of 1 x 1.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from . import trunks
from .model import CLIP, Attention, Block
from .resnet import Bottleneck


class Projection(NamedTuple):
    """A linear layer of attention, the `parts` ("q", "k", "v", "o") its output rows are, and what applies it.

    A change of what the layer computes replaces the `method` of `owner`.
    """

    layer: nn.Linear
    parts: str
    owner: nn.Module
    method: str


def blocks(model: CLIP, tower: str) -> dict[str, nn.Module]:
    """Return the blocks of a tower, "text" or "vision", by their names in state dicts and in order."""
    if tower == "text":
        return {f"transformer.resblocks.{i}": block for i, block in enumerate(model.transformer.resblocks)}
    if model.arch.conventions.trunk is not None:
        return {f"visual.{name}": block for name, block in trunks.blocks(model.visual).items()}
    if model.arch.is_vit:
        resblocks = model.visual.transformer.resblocks
        return {f"visual.transformer.resblocks.{i}": block for i, block in enumerate(resblocks)}
    return {name: module for name, module in model.named_modules() if isinstance(module, Bottleneck)}


def matrices(block: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    """Return the layers whose weights SO trains: attention and MLP, or the convolutions of a ResNet's bottleneck."""
    if isinstance(block, Block):
        return [block.attn.in_proj, block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj]
    if isinstance(block, Bottleneck):
        return [module for module in block.modules() if isinstance(module, nn.Conv2d)]
    return [module for module in block.modules() if isinstance(module, nn.Linear) or _is_pointwise(module)]


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1


def norms(block: nn.Module) -> dict[str, nn.LayerNorm]:
    """Return the LayerNorms in a block by their names there: none in a ResNet's bottlenecks, which have batch norm."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.LayerNorm)}


def outer_norms(model: CLIP, tower: str, end: str) -> list[str]:
    """Return the names of the LayerNorms before the first block of a tower (`end` "first") or behind the last one."""
    if tower == "text":
        return ["ln_final"] if end == "last" else []
    inside = set(blocks(model, tower).values())
    inner = {norm for block in inside for norm in norms(block).values()}
    outside = [name for name, norm in norms(model.visual).items() if norm not in inner]
    before = ("ln_pre", "norm_pre", "patch_embed", "stem")
    return [f"visual.{name}" for name in outside if any(word in name for word in before) == (end == "first")]


def attention(block: nn.Module) -> Iterator[Projection]:
    """Yield the linear layers of a block's attention: none in ConvNeXt, ResNets and some blocks of MobileCLIP."""
    for module in block.modules():
        if isinstance(module, Attention):
            yield Projection(module.in_proj, "qkv", module, "project")
            yield Projection(module.out_proj, "o", module.out_proj, "forward")
            continue
        known = {"qkv": "qkv", "q_proj": "q", "k_proj": "k", "v_proj": "v"}
        found = {name: getattr(module, name, None) for name in known}
        layers = [(layer, known[name]) for name, layer in found.items() if isinstance(layer, nn.Linear)]
        if layers and isinstance(getattr(module, "proj", None), nn.Linear):
            layers.append((module.proj, "o"))
        yield from (Projection(layer, parts, layer, "forward") for layer, parts in layers)


def text_projection(model: CLIP) -> list[str]:
    """Return the names of the parameters of the text tower's projection."""
    kinds = {"matrix": ["text_projection"], "linear": ["text_projection.weight", "text_projection.bias"], "none": []}
    return kinds[model.arch.conventions.text_projection]


def projection(model: CLIP) -> str | None:
    """Return the name of the matrix that maps the image tower's output to the embedding; None if there is none."""
    if model.arch.conventions.trunk is not None:
        name = trunks.projection(model.visual)
        return None if name is None else f"visual.{name}"
    return "visual.proj" if model.arch.is_vit else "visual.attnpool.c_proj.weight"
