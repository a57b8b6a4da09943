"""Numerics that training, evaluation and methods share: text features, classifiers, image features.

Shapes: B images, C classes, E embedding size, P prompts.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import clip
from clip.layouts import Prompts
from clip.weights import save_tensors
from common import acquire_lock, note, progress, replacing

PROMPTS_AT_ONCE = 256  # without gradients, to bound memory


def tokenize_classes(tokenize: Callable[[Sequence[str]], Tensor], class_names: Sequence[str], template: str) -> Tensor:
    """Return token ids [C, context] of `template` filled with each class name; underscores become spaces.

    `tokenize` is a model's, from texts to ids. Raise ValueError for a prompt that is too long.
    """
    return tokenize([template.format(name.replace("_", " ")) for name in class_names])


def encode_text(model: clip.CLIP, prompts: Tensor | Prompts, *inside: Any) -> Tensor:
    """Return unit text features [P, E] in float32 of token ids [P, context] or prompts, with gradients where the
    weights have them. `inside`: what else `CLIP.encode_text` takes."""
    return F.normalize(model.encode_text(prompts, *inside).float(), dim=-1)


@torch.no_grad()
def text_embeddings(model: clip.CLIP, class_names: Sequence[str], template: str) -> Tensor:
    """Return text features [C, E] in float32, as the encoder gives them, of `template` with each class name."""
    tokens = tokenize_classes(model.tokenize, class_names, template)
    return torch.cat([model.encode_text(part).float() for part in tokens.split(PROMPTS_AT_ONCE)])


def encode_image(model: clip.CLIP, images: Tensor) -> Tensor:
    """Return unit image features [B, E] in float32, with gradients where the weights have them."""
    return F.normalize(model.encode_image(images.to(model.device, non_blocking=True)).float(), dim=-1)


@torch.no_grad()
def text_classifier(model: clip.CLIP, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return the zero-shot classifier [C, E] (Radford et al. 2021, section 3.1.4): for each class the mean of its unit
    text features over the templates, normalised again."""
    total = 0
    for template in templates:
        tokens = tokenize_classes(model.tokenize, class_names, template)
        total = total + torch.cat([encode_text(model, part) for part in tokens.split(PROMPTS_AT_ONCE)])
    return F.normalize(total, dim=-1)


@torch.no_grad()
def image_features(model: clip.CLIP, batches: Iterable, label: str) -> Tensor:
    """Return unit features [N, E] in float32, in main memory, of all images of batches (images, labels), in order."""
    return torch.cat([encode_image(model, images) for images, _ in progress(batches, label)]).cpu()


def cache_file(folder: str, *key: str) -> Path:
    """Return where features are kept that follow from `key` and from the versions of the libraries that make them."""
    import PIL
    import torchvision

    versions = torch.__version__, torchvision.__version__, PIL.__version__
    digest = hashlib.sha256("\n".join((*key, *versions)).encode()).hexdigest()
    return Path(folder).expanduser() / f"{digest}.safetensors"


def load_features(path: Path) -> tuple[Tensor, float] | None:
    """Return what `save_features` wrote, or None if there is nothing or it is damaged."""
    try:
        saved = load_file(path)
        return saved["features"], saved["seconds"].item()
    except (OSError, KeyError, SafetensorError):
        return None


def save_features(path: Path, features: Tensor, seconds: float) -> None:
    """Write features, and how long they took, atomically. If they cannot be written, a note says so, and the run does
    without a cache."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors({"features": features.cpu(), "seconds": torch.tensor(seconds)}, path)
    except OSError as error:
        note(f"features are not cached in {path.parent} ({error.strerror}); --cache_dir chooses another folder")


def store_pixels(path: Path, loader: Callable[[], Collection], shape: tuple[int, ...]) -> None:
    """Write all images that a loader gives, uint8 [N, 3, R, R], to a file of numpy's, unless it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with acquire_lock(path.with_suffix(".lock"), seconds=-1):  # of the runs of a sweep one writes, the others wait
        if path.is_file():
            return
        for part in path.parent.glob(f"{path.name}.*.part"):  # of a process that was killed
            part.unlink()
        with replacing(path) as part, part.open("wb") as file:  # no memory map: a full disk would kill the process
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for images, _ in progress(loader(), "storing test images"):
                file.write(images.numpy())


def stored_pixels(path: Path, places: Sequence[int], at_once: int) -> list[tuple[Tensor, None]]:
    """Return some of the images that `store_pixels` wrote, in batches; they are read when they are used."""
    pixels = np.load(path, mmap_mode="c")  # torch wants memory that it could write to
    parts = [places[first : first + at_once] for first in range(0, len(places), at_once)]
    return [(torch.from_numpy(pixels[part[0] : part[-1] + 1]), None) for part in parts]
