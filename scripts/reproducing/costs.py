"""How long a run takes on a GPU, by counting. Nothing here was measured, except where LAUNCH says so.

seconds = START + iterations x max(LAUNCH, FLOP of a step / rate) + images read / READ + FLOP of features / rate

FLOP of a step: the image tower's for each image of the batch, the text tower's for each class, times the passes of the
method (1 forward; 1 more for gradients of what flows through a layer, 1 more for those of its weights). The rate is
SHARE of what the maker states for the GPU. Training that stops early takes less.
"""

from dataclasses import dataclass

import torch

from arguments import Config
from common import UserError
from datasets.specs import SPECS
from methods import METHODS
from settings import Loop

GPUS = {  # the makers' TFLOP/s: float32, and half precision on dense tensor cores
    "T4": (8.1, 65),
    "V100": (15.7, 125),
    "A100": (19.5, 312),
    "H100": (67, 989),
    "H200": (67, 989),
    "RTX 3090": (35.6, 71),
    "RTX 4090": (82.6, 165),
    "RTX A6000": (38.7, 155),
    "L40S": (91.6, 362),
}
SHARE = 0.4  # of these that is reached: an assumption
LAUNCH = (
    0.15  # s a step that launching kernels takes at least, as on the one GPU that was measured (benchmarks/RESULTS.md)
)
READ = 500  # images read and decoded a second: an assumption
START = 20.0  # s to import, load weights and write the record: an assumption
PER_IMAGE = {"ViT-B/16": 35e9, "RN50": 12e9, "tiny": 0.2e9}  # FLOP of a forward pass of the image tower, counted
PER_TOKEN = 2 * 37.8e6  # FLOP of a text tower of width 512: two for each weight of its blocks
TOKENS = 8  # a class, packed: an assumption
# Passes of a training step through (image tower, text tower). Methods that are not here train on cached features.
PASSES = {
    "so": (2, 2),  # weight gradients only at the support
    "so_ablation": (3, 3),
    "lora": (2, 2),
    "relora": (2, 2),
    "two_stage": (2, 2),
    "coop": (1, 2),
    "cocoop": (1, 2),
    "kgcoop": (1, 2),
    "prograd": (1, 3),
    "maple": (2, 2),
    "promptsrc": (3, 2),
    "mmrl": (3, 2),
    "tip_adapter_f": (1, 0),
}
FOR_EACH_IMAGE = ("cocoop",)  # prompts of their own
BASIS = (
    f"Counted, not measured: FLOP of towers and passes / ({SHARE:g} x the maker's TFLOP/s), at least {LAUNCH} s a "
    f"step, {READ} images read a second, {START:.0f} s a run; no early stop (scripts/reproducing/costs.py)"
)


@dataclass(frozen=True)
class Gpu:
    """A GPU by its name in `GPUS`."""

    name: str

    def rate(self, precision: str) -> float:
        """Return the FLOP/s that are assumed."""
        return SHARE * 1e12 * GPUS[self.name][precision != "fp32"]


def gpu_named(name: str | None) -> Gpu:
    """Return the named GPU; without a name the one of this machine, or an A100. Raise UserError if it is not known."""
    if name is None and torch.cuda.is_available():
        here = torch.cuda.get_device_name()
        name = next((known for known in GPUS if known in here), here)
    name = name or "A100"
    if name not in GPUS:
        raise UserError(f"--gpu {name}: its speed is not known here; name one of {', '.join(GPUS)}")
    return Gpu(name)


def seconds(config: Config, gpu: Gpu) -> float:
    """Return the estimated time of a run that trains, if its method trains, and tests on its own dataset."""
    settings, own = config.settings, config.hparams
    if settings.backbone not in PER_IMAGE:
        raise UserError(
            f"--dry_run counts the work of {', '.join(PER_IMAGE)}, not of {settings.backbone}; leave it out"
        )
    classes = class_count(settings.dataset, settings.classes)
    images = settings.shots * classes
    own = own.settled(settings.shots, images)
    iterations = own.total_iters if isinstance(own, Loop) and settings.method in PASSES else 0
    step = 0.0
    if iterations:
        for_image, for_text = PASSES[settings.method]
        prompts = classes * (own.batch_size if settings.method in FOR_EACH_IMAGE else 1)
        step = for_image * own.batch_size * PER_IMAGE[settings.backbone] + for_text * prompts * TOKENS * PER_TOKEN
    training = iterations * max(LAUNCH, step / gpu.rate(settings.precision)) * len(config.candidates() or [None])
    views = getattr(own, "views", getattr(own, "cache_passes", 0)) if METHODS[settings.method].prepare else 0
    return START + training + features(views * images, config, gpu) + testing(config, settings.dataset, gpu)


def testing(config: Config, dataset: str, gpu: Gpu) -> float:
    """Return the estimated time of testing on a dataset, with features of the unchanged model already kept."""
    whole, part = class_count(dataset, "all"), class_count(dataset, config.settings.classes)
    return features(test_images(dataset) * part / whole, config, gpu)


def features(images: float, config: Config, gpu: Gpu) -> float:
    """Return the estimated time of reading so many images and computing their features."""
    settings = config.settings
    return images / READ + images * PER_IMAGE[settings.backbone] / gpu.rate(settings.precision)


def class_count(dataset: str, half: str) -> int:
    """Return the number of classes of a dataset, or of the base or new half of them."""
    number = SPECS[dataset].classes if dataset in SPECS else 10
    return {"all": number, "base": (number + 1) // 2, "new": number // 2}[half]


def test_images(dataset: str) -> int:
    return SPECS[dataset].sizes[2] if dataset in SPECS else 540
