"""What no tensor of a CLIP tells: the width of attention heads and the activation. Tables of published models, configs.

Every head width in use divides its tower's width by 64, too, and GELU and quick GELU have no weights. Taken wrongly,
they give features that look right and are not. So they come from OpenAI's published shapes, from --arch, or from a
config of open_clip's beside the weights; other weights are rejected.
"""

import dataclasses
import difflib
from pathlib import Path

from .configs import Card
from .files import WeightsError
from .model import CLIP, Architecture, Conventions

# Models with OpenAI's names and the numbers that open_clip publishes for them. Vision: width, layers, width of a head;
# text: width, layers (its heads have 64).
NAMED = {
    "RN50": (64, (3, 4, 6, 3), 64, 512, 12),
    "RN101": (64, (3, 4, 23, 3), 64, 512, 12),
    "RN50x4": (80, (4, 6, 10, 6), 64, 640, 12),
    "RN50x16": (96, (6, 8, 18, 8), 64, 768, 12),
    "RN50x64": (128, (3, 15, 36, 10), 64, 1024, 12),
    "ViT-S-32": (384, 12, 64, 384, 12),
    "ViT-S-32-alt": (384, 12, 64, 256, 10),
    "ViT-S-16": (384, 12, 64, 384, 12),
    "ViT-S-16-alt": (384, 12, 64, 256, 10),
    "ViT-M-32": (512, 12, 64, 512, 12),
    "ViT-M-32-alt": (512, 12, 64, 384, 12),
    "ViT-M-16": (512, 12, 64, 512, 12),
    "ViT-B-32": (768, 12, 64, 512, 12),
    "ViT-B-32-256": (768, 12, 64, 512, 12),
    "ViT-B-32-plus-256": (896, 12, 64, 640, 12),
    "ViT-B-16": (768, 12, 64, 512, 12),
    "ViT-B-16-plus": (896, 12, 64, 640, 12),
    "ViT-B-16-plus-240": (896, 12, 64, 640, 12),
    "ViT-L-16": (1024, 24, 64, 768, 12),
    "ViT-L-16-320": (1024, 24, 64, 768, 12),
    "ViT-L-14": (1024, 24, 64, 768, 12),
    "ViT-L-14-280": (1024, 24, 64, 768, 12),
    "ViT-L-14-336": (1024, 24, 64, 768, 12),
    "ViT-H-16": (1280, 32, 80, 1024, 24),
    "ViT-H-14": (1280, 32, 80, 1024, 24),
    "ViT-H-14-378": (1280, 32, 80, 1024, 24),
    "ViT-g-14": (1408, 40, 88, 1024, 24),
    "ViT-bigG-14": (1664, 48, 104, 1280, 32),
    "ViT-e-14": (1792, 56, 112, 1280, 36),
}
QUICK = "-quickgelu"  # the end of a name, as in open_clip
OPENAI = "openai"  # as --arch: OpenAI's conventions, whatever the shapes
# OpenAI's nine among them, and the tiny one: resolution and patch; the tiny one's other numbers.
PUBLISHED = {
    **{
        "RN50": (224, None),
        "RN101": (224, None),
        "RN50x4": (288, None),
        "RN50x16": (384, None),
        "RN50x64": (448, None),
    },
    **{"ViT-B-32": (224, 32), "ViT-B-16": (224, 16), "ViT-L-14": (224, 14), "ViT-L-14-336": (336, 14)},
}
TINY = (32, 8, 128, 4, 64, 2)


def with_conventions(
    arch: Architecture, source: Path, asked: str | None = None, card: Card | None = None
) -> tuple[Architecture, str]:
    """Return the architecture with its conventions, and in a few words where they are from.

    `card` is what a config says. Without one `asked` is --arch: an architecture, perhaps with `-quickgelu`, or
    "openai". Raise WeightsError if the conventions are not known, or belong to other shapes.
    """
    if card is not None:
        conventions, where = card.conventions, card.where
    elif asked is not None:
        conventions, where = _of_name(arch, asked, source), f"--arch {asked}"
    else:
        conventions, where = _of_shapes(arch, source)
    arch = dataclasses.replace(arch, conventions=conventions)
    for tower, width, head in (
        ("image", arch.attention_width, conventions.vision_head_width),
        ("text", arch.text_width, conventions.text_head_width),
    ):
        if width % head:
            raise WeightsError(f"{source}: the {tower} tower's width {width} has no heads of {head}; check {where}")
    return arch, where


def describe(model: CLIP) -> str:
    """Return in one line what kind of CLIP this is, and where what no tensor tells is known from."""
    arch, conventions = model.arch, model.arch.conventions
    packed = "causal, packed" if conventions.causal else "not causal, padded"
    return (
        f"{_image_tower(arch)}, {arch.resolution} pixels; text of width {arch.text_width}, {packed}, "
        f"{_SPELLED[conventions.text_activation]} (known from: {model.origin})"
    )


def _image_tower(arch: Architecture) -> str:
    conventions = arch.conventions
    if conventions.trunk is not None:
        return f"timm's {conventions.trunk.name}"
    heads = conventions.vision_head_width
    attention = f"width {arch.vision_width}, {arch.attention_width // heads} heads of {heads}"
    return f"ViT of {attention}, {_SPELLED[conventions.vision_activation]}" if arch.is_vit else f"ResNet of {attention}"


_SPELLED = {"quick_gelu": "quick GELU", "gelu": "GELU", "gelu_tanh": "GELU by tanh"}


def _of_shapes(arch: Architecture, source: Path) -> tuple[Conventions, str]:
    towers = (arch.vision_width, arch.vision_layers, arch.text_width, arch.text_layers)
    fitting = [name for name, (width, layers, _, *text) in NAMED.items() if (width, layers, *text) == towers]
    if arch.vision_mlp is None and arch.text_mlp is None:  # MLPs four times as wide as the towers
        if (arch.resolution, arch.patch_size, *towers) == TINY:
            return Conventions(), "the tiny CLIP has these shapes"
        published = [name for name in fitting if PUBLISHED.get(name) == (arch.resolution, arch.patch_size)]
        if published:
            also = f"--arch {published[0]} if they were trained with GELU, as LAION's"
            return Conventions(), f"OpenAI's {published[0]} has these shapes; {also}"
    if fitting:
        remedy = f"{', '.join(fitting)}, with {QUICK} behind it for quick GELU"
    else:
        remedy = f"a config of open_clip, FILE.json, or {OPENAI} for heads of 64 and quick GELU"
    raise WeightsError(
        f"{source} does not tell the width of its attention heads and its activation, and its shapes are none of "
        f"OpenAI's models; give them as --arch: {remedy}"
    )


def _of_name(arch: Architecture, asked: str, source: Path) -> Conventions:
    if asked == OPENAI:
        return Conventions()
    name = asked.removesuffix(QUICK)
    if name not in NAMED:
        close = difflib.get_close_matches(name, NAMED, n=1, cutoff=0.5)
        known = f"meant {close[0]}? " if close else ""
        raise WeightsError(
            f"--arch {asked} is unknown; {known}use {', '.join(NAMED)}, each perhaps with {QUICK}; {OPENAI}; or a "
            "config of open_clip, FILE.json"
        )
    width, layers, head, text_width, text_layers = NAMED[name]
    found = (arch.vision_width, arch.vision_layers, arch.text_width, arch.text_layers)
    if found != (width, layers, text_width, text_layers):
        raise WeightsError(
            f"{source} does not have the shapes of --arch {asked}: vision width and layers, text width and layers are "
            f"{', '.join(map(str, found))}, not {width}, {layers}, {text_width}, {text_layers}"
        )
    activation = "quick_gelu" if asked.endswith(QUICK) else "gelu"
    return Conventions(activation, activation, vision_head_width=head)
