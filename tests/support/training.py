"""Methods on the tiny CLIP, trained on noise: no images are read, and float64 leaves no room for rounding."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import clip
import train
from clip.model import Architecture
from datasets import Task
from methods import METHODS
from methods.adaptation import Adaptation
from settings import Loop
from support.runs import NAMES, TASK, experiment_of

VIT_B16 = Architecture(512, 224, 768, 12, 16, context_length=77, vocab_size=49408, text_width=512, text_layers=12)
TOKENS = clip.tokenize([name.replace("_", " ") for name in NAMES])  # of TASK's only template


def prepared(method: str, task: Task = TASK, model: clip.CLIP | None = None, **values) -> Adaptation:
    """Return a method on the tiny CLIP in float64 or on `model`. `values` are as for `experiment_of`."""
    model = clip.load("tiny")[0].double() if model is None else model
    if issubclass(METHODS[method].Hparams, Loop):
        values = {"early_stop_loss": 0.0} | values
    return METHODS[method].prepare(experiment_of(method, task, model, **values))


def noise(iterations: int, images: int = 3, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Return batches of random images, labelled 0, 1, 2, 0, 1, ..."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % len(NAMES)
    return [(torch.randn(images, 3, 32, 32, generator=generator, dtype=dtype), labels) for _ in range(iterations)]


def fitted(adaptation: Adaptation, batches: list | None = None) -> train.Fit:
    """Train an adaptation on noise, or on `batches`."""
    iterations, dtype = adaptation.experiment.hparams.total_iters, adaptation.model.logit_scale.dtype
    return train.fit(adaptation.experiment, adaptation, noise(iterations, dtype=dtype) if batches is None else batches)


def filled(adaptation: Adaptation) -> Adaptation:
    """Return an adaptation with random numbers added to all that it trains: no matrix is zero any more."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adaptation.parameters.values():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return adaptation


def features(model: clip.CLIP) -> tuple[Tensor, Tensor]:
    """Return a model's features of three images of noise and of three prompts of different lengths."""
    images = noise(1)[0][0].to(model.logit_scale.dtype)
    return model.encode_image(images), model.encode_text(clip.tokenize(["a cat.", "a small dog.", "a"]))


def plain_loss(model: clip.CLIP, images: Tensor, labels: Tensor) -> Tensor:
    """Return the training loss of CLIP itself on one batch, as written in the paper."""
    image_features, text_features = (
        F.normalize(x.float()) for x in (model.encode_image(images), model.encode_text(TOKENS))
    )
    return F.cross_entropy(100 * image_features @ text_features.T, labels)


def cosine(lr: float, step: int, steps: int, lowest: float = 1e-6) -> float:
    """Return the learning rate of iteration `step`, counted from 0, on half a cosine over `steps`."""
    return lowest + (lr - lowest) * (1 + math.cos(math.pi * step / steps)) / 2


class AdamW:
    """Loshchilov and Hutter 2019, algorithm 2, a tensor at a time."""

    def __init__(self, parameters, decay=0.0):
        self.decay, self.t, self.moments = decay, 0, [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]

    @torch.no_grad()
    def step(self, parameters, gradients, lr):
        self.t += 1
        for i, (p, g) in enumerate(zip(parameters, gradients)):
            m, v = self.moments[i]
            m, v = self.moments[i] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            p -= lr * self.decay * p
            p -= lr * (m / (1 - 0.9**self.t)) / ((v / (1 - 0.999**self.t)).sqrt() + 1e-8)


class SGD:
    """With momentum 0.9, a tensor at a time."""

    def __init__(self, parameters, decay):
        self.decay, self.velocity = decay, [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, parameters, gradients, lr):
        for p, g, u in zip(parameters, gradients, self.velocity):
            u.mul_(0.9).add_(g + self.decay * p)
            p -= lr * u
