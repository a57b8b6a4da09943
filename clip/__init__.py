"""CLIP: model, tokenizer, preprocessing, loading and saving of weights.

model, preprocess = clip.load("ViT-B/16", device="cuda")
tokens = clip.tokenize(["a photo of a cat.", "a photo of a dog."])
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .conventions import describe
from .download import MODELS
from .files import WeightsError
from .formats import read_state_dict
from .model import CLIP
from .preprocess import test_transform
from .sources import card_of, find, identity
from .tokenizer import ClipTokenizer, tokenize
from .weights import build_model, weights_sha256

__all__ = [
    "CLIP",
    "WeightsError",
    "available_models",
    "describe",
    "identity",
    "load",
    "tokenize",
    "tokenizer_of",
    "weights_sha256",
]


def available_models() -> list[str]:
    """Return the names of OpenAI's nine models, which `load` downloads. `load` also takes `tiny` and paths of files."""
    return list(MODELS)


def load(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    download_root: str | Path | None = None,
    arch: str | None = None,
) -> tuple[CLIP, Callable]:
    """Return a CLIP in float32 and evaluation mode, and the transform from a PIL image to its input.

    `name_or_path` is one of `available_models()`, downloaded once to `download_root` (default ~/.cache/clip) and
    checked against its SHA-256; or `tiny`, the small model in this package; or a weight file: OpenAI's .pt archive, a
    state dict, also a wrapped one, or safetensors, with OpenAI's or Hugging Face's names; or a folder, a name on the
    Hub, or a model and tag of open_clip's (`clip/sources.py`). For a file, `arch` says what no tensor tells, such as
    the width of attention heads and the activation: a name of open_clip's (ViT-H-14, ViT-B-16-quickgelu), perhaps with
    a tag, whose preprocessing is taken then; the path of a JSON config of open_clip's; or "openai". It may be left out
    where OpenAI published a model of these shapes or where a config lies beside the file.

    The transform returns float32 [3, R, R] for the model's resolution R. The model has `tokenize`, its tokenizer,
    `preprocessing`, and `logit_factor`. Raises WeightsError with the remedy.
    """
    source = find(str(name_or_path), arch, download_root)
    model = build_model(read_state_dict(source.weights), source.weights, device, arch, source.card)
    model.origin = source.known_as or model.origin
    return model, test_transform(model.preprocessing)


def tokenizer_of(name_or_path: str | Path, arch: str | None = None) -> Callable[[Sequence[str]], Tensor]:
    """Return the tokenizer of a model, from texts to token ids [N, context], without loading weights."""
    card = card_of(str(name_or_path), arch)
    return (card and card.tokenizer) or ClipTokenizer(card.context_length if card else 77)
