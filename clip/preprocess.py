"""From RGB PIL images to CLIP's input tensors [3, resolution, resolution]."""

from collections.abc import Callable

from torch import float32

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# torchvision takes a second to import, so the functions import it when they are called.


def _to_tensor() -> list[Callable]:
    from torchvision.transforms import v2

    return [v2.PILToTensor(), v2.ToDtype(float32, scale=True), v2.Normalize(MEAN, STD)]


def test_transform(resolution: int) -> Callable:
    """Return OpenAI's preprocessing: shorter side to `resolution` pixels (bicubic), centre crop, normalisation."""
    from torchvision.transforms import InterpolationMode, v2

    return v2.Compose(
        [v2.Resize(resolution, InterpolationMode.BICUBIC), v2.CenterCrop(resolution), v2.RGB(), *_to_tensor()]
    )


def mirror(transform: Callable) -> Callable:
    """Return `transform` followed by a horizontal flip of every image."""
    from torchvision.transforms import v2

    return v2.Compose([transform, v2.functional.horizontal_flip])


def train_transform(resolution: int, min_area: float = 0.08, flip: bool = True) -> Callable:
    """Return the published augmentation: a random crop, resized to `resolution` pixels (bicubic), and a flip.

    The crop covers a random part of the image's area between `min_area` and 1. Every other image is flipped
    horizontally, unless `flip` is False, for images such as digits.
    """
    from torchvision.transforms import InterpolationMode, v2

    crop = v2.RandomResizedCrop(resolution, scale=(min_area, 1.0), interpolation=InterpolationMode.BICUBIC)
    return v2.Compose([crop, *([v2.RandomHorizontalFlip()] if flip else []), v2.RGB(), *_to_tensor()])
