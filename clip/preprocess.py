"""From RGB PIL images to a CLIP's input tensors [3, size, size]."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, float32

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """How a CLIP's images are prepared; the defaults are OpenAI's.

    `size`: pixels of each side. `mean`, `std`: of red, green and blue between 0 and 1. `interpolation`: "bicubic" or
    "bilinear". `resize` for tests: "shortest" scales the shorter side to `size` and crops the centre, "squash" scales
    both sides.
    """

    size: int
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    interpolation: str = "bicubic"
    resize: str = "shortest"

    def to_tensor(self) -> list[Callable]:
        from torchvision.transforms import v2

        return [v2.PILToTensor(), v2.ToDtype(float32, scale=True), v2.Normalize(self.mean, self.std)]


# torchvision takes a second to import, so the functions import it when they are called.


def test_transform(preprocessing: Preprocessing) -> Callable:
    """Return the transform of test images: resized, cropped in the centre if need be, normalised."""
    from torchvision.transforms import InterpolationMode, v2

    size, interpolation = preprocessing.size, InterpolationMode(preprocessing.interpolation)
    if preprocessing.resize == "squash":
        resized = [v2.Resize((size, size), interpolation)]
    else:
        resized = [v2.Resize(size, interpolation), v2.CenterCrop(size)]
    return v2.Compose([*resized, v2.RGB(), *preprocessing.to_tensor()])


def pixels_of(transform: Callable) -> Callable:
    """Return a transform of this module without its last steps: it gives uint8 [3, size, size], a quarter of the bytes,
    for `normalise`."""
    from torchvision.transforms import v2

    return v2.Compose(transform.transforms[:-2])


def normalise_table(transform: Callable) -> Tensor:
    """Return what the last steps of a transform of this module make of each value of a channel: float32 [3, 256]."""
    from torchvision.transforms import v2

    values = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    return v2.Compose(transform.transforms[-2:])(values)[:, 0]


def normalise(pixels: Tensor, table: Tensor) -> Tensor:
    """Return uint8 images [B, 3, R, R] as the table's transform would give them, bit for bit, on the table's device."""
    channels = zip(table, pixels.to(table.device, non_blocking=True).unbind(dim=1))
    return torch.stack([row.index_select(0, x.flatten().int()).view(x.shape) for row, x in channels], dim=1)


def mirror(transform: Callable) -> Callable:
    """Return `transform` followed by a horizontal flip of every image."""
    from torchvision.transforms import v2

    return v2.Compose([transform, v2.functional.horizontal_flip])


def train_transform(preprocessing: Preprocessing, min_area: float = 0.08, flip: bool = True) -> Callable:
    """Return the published augmentation: a random crop, resized, and a flip.

    The crop covers a random part of the image's area between `min_area` and 1. Every other image is flipped
    horizontally, unless `flip` is False, for images such as digits.
    """
    from torchvision.transforms import InterpolationMode, v2

    interpolation = InterpolationMode(preprocessing.interpolation)
    crop = v2.RandomResizedCrop(preprocessing.size, scale=(min_area, 1.0), interpolation=interpolation)
    return v2.Compose([crop, *([v2.RandomHorizontalFlip()] if flip else []), v2.RGB(), *preprocessing.to_tensor()])
