"""CLIP: model, tokenizer, preprocessing, loading and saving of weights.

model, preprocess = clip.load("ViT-B/16", device="cuda")
tokens = clip.tokenize(["a photo of a cat.", "a photo of a dog."])
"""

from collections.abc import Callable
from pathlib import Path

import torch

from .conventions import describe
from .download import MODELS, fetch_model
from .files import WeightsError
from .formats import read_state_dict
from .model import CLIP
from .preprocess import test_transform
from .tokenizer import tokenize
from .weights import build_model, weights_sha256

__all__ = ["CLIP", "WeightsError", "available_models", "describe", "load", "tokenize", "weights_sha256"]

TINY = Path(__file__).parent / "tiny.safetensors"


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
    checked against its SHA-256; or `tiny`, the small model in this package; or the path of a weight file with OpenAI's
    names: OpenAI's .pt archive, a state dict, also a wrapped one, or safetensors. For a file, `arch` says what no
    tensor tells, the width of attention heads and the activation: a name of open_clip's (ViT-H-14, ViT-B-16-quickgelu),
    the path of a JSON config of open_clip's, or "openai". It may be left out where OpenAI published a model of these
    shapes or where an open_clip_config.json lies beside the file.

    The transform returns float32 [3, R, R] for the model's resolution R. Raises WeightsError with the remedy.
    """
    if arch is not None and (name_or_path in MODELS or name_or_path == "tiny"):
        raise WeightsError(f"--arch is for weight files; {name_or_path} is a known model, leave it out")
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
    model = build_model(read_state_dict(path), path, device, arch)
    return model, test_transform(model.arch.resolution)
