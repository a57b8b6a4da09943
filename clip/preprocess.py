"""From RGB PIL images to CLIP's input tensors [3, resolution, resolution]."""

from torch import float32
from torchvision.transforms import InterpolationMode, v2

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def _to_tensor() -> list[v2.Transform]:
    return [v2.PILToTensor(), v2.ToDtype(float32, scale=True), v2.Normalize(MEAN, STD)]


def test_transform(resolution: int) -> v2.Compose:
    """OpenAI's preprocessing: shorter side to `resolution` pixels (bicubic), centre crop, normalisation."""
    return v2.Compose(
        [v2.Resize(resolution, InterpolationMode.BICUBIC), v2.CenterCrop(resolution), v2.RGB(), *_to_tensor()]
    )


def train_transform(resolution: int, min_area: float = 0.08, flip: bool = True) -> v2.Compose:
    """The published augmentation: a random crop of `min_area` to all of the image, resized (bicubic), and a
    horizontal flip of every other image; `flip=False` leaves that out, for images such as digits."""
    crop = v2.RandomResizedCrop(resolution, scale=(min_area, 1.0), interpolation=InterpolationMode.BICUBIC)
    return v2.Compose([crop, *([v2.RandomHorizontalFlip()] if flip else []), v2.RGB(), *_to_tensor()])
