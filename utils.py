"""Numerics that training, evaluation and methods share: prompts, classifiers, features, accuracy.

Shapes: B images, C classes, E embedding size, P prompts.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import clip

LOGIT_FACTOR = 100.0  # logits are 100 x cosine, as published, not the model's own logit_scale
PROMPTS_AT_ONCE = 256  # without gradients, to bound memory


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of forward passes: bf16 autocast or, for fp32, none. Weights are float32 either way."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def tokenize_classes(class_names: Sequence[str], template: str) -> Tensor:
    """Token ids [C, 77] of `template` filled with each class name; underscores become spaces."""
    return clip.tokenize([template.format(name.replace("_", " ")) for name in class_names])


def encode_text(model: clip.CLIP, tokens: Tensor) -> Tensor:
    """Unit text features [P, E] in float32, with gradients where the weights have them."""
    return F.normalize(model.encode_text(tokens.to(model.device)).float(), dim=-1)


def encode_image(model: clip.CLIP, images: Tensor) -> Tensor:
    """Unit image features [B, E] in float32, with gradients where the weights have them."""
    return F.normalize(model.encode_image(images.to(model.device, non_blocking=True)).float(), dim=-1)


@torch.no_grad()
def text_classifier(model: clip.CLIP, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Zero-shot classifier [C, E] (Radford et al. 2021, section 3.1.4): for each class the mean of its unit
    text features over the templates, normalised again."""
    total = 0
    for template in templates:
        tokens = tokenize_classes(class_names, template)
        total = total + torch.cat([encode_text(model, part) for part in tokens.split(PROMPTS_AT_ONCE)])
    return F.normalize(total, dim=-1)


@torch.no_grad()
def accuracy(model: clip.CLIP, classifier: Tensor, loader: DataLoader, precision: str, label: str) -> float:
    """Per cent of the loader's images whose nearest row of `classifier` [C, E] is their label's."""
    correct = torch.zeros((), dtype=torch.int64, device=model.device)
    seen = 0
    for images, labels in tqdm(loader, desc=label, unit="batch", leave=False):
        with autocast(model.device, precision):
            features = encode_image(model, images)
        predictions = (features @ classifier.T).argmax(dim=-1)
        correct += (predictions == labels.to(model.device)).sum()
        seen += len(labels)
    return 100 * correct.item() / seen
