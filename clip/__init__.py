"""CLIP: model, tokenizer, preprocessing, loading and saving of weights.

model, preprocess = clip.load("ViT-B/16", device="cuda")
tokens = clip.tokenize(["a photo of a cat.", "a photo of a dog."])
"""

from collections.abc import Callable
from pathlib import Path

import torch

from .download import MODELS, fetch_model
from .model import CLIP
from .preprocess import test_transform
from .tokenizer import tokenize
from .weights import WeightsError, build_model, read_state_dict, weights_sha256

__all__ = ["CLIP", "WeightsError", "available_models", "load", "tokenize", "weights_sha256"]

TINY = Path(__file__).parent / "tiny.safetensors"


def available_models() -> list[str]:
    """Return the names of OpenAI's nine models, which `load` downloads. `load` also takes `tiny` and paths of files."""
    return list(MODELS)


def load(
    name_or_path: str | Path, device: str | torch.device = "cpu", download_root: str | Path | None = None
) -> tuple[CLIP, Callable]:
    """Return a CLIP in float32 and evaluation mode, and the transform from a PIL image to its input.

    `name_or_path` is one of `available_models()`, downloaded once to `download_root` (default ~/.cache/clip) and
    checked against its SHA-256; or `tiny`, the small model in this package; or the path of an OpenAI .pt archive, a
    saved state dict or a .safetensors file with OpenAI's names. The weights must have been trained with the quick GELU,
    as all of OpenAI's were.

    The transform returns float32 [3, R, R] for the model's resolution R. Raises WeightsError with the remedy.
    """
    if name_or_path in MODELS:
        path = fetch_model(str(name_or_path), download_root)
    elif name_or_path == "tiny":
        path = TINY
    else:
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise WeightsError(
                f"{name_or_path} is neither a file nor a known model; use a file, tiny, {', '.join(MODELS)}"
            )
    model = build_model(read_state_dict(path), str(path), device)
    return model, test_transform(model.arch.resolution)
