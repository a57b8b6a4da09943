"""Preprocessing beside open_clip's; the training augmentation's crops and flips, measured on marked images."""

import random

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from clip import preprocess

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def image_of(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Return seeded noise over a gradient, so that every shift or other filter shows."""
    rng = np.random.default_rng(width * 1000 + height)
    x, y = np.meshgrid(np.linspace(0, 160, width), np.linspace(0, 160, height))
    channels = np.stack([x, y, 160 - x, 40 + y], axis=-1) + rng.integers(0, 90, (height, width, 4))
    return Image.fromarray(channels.astype(np.uint8), "RGBA").convert(mode)


SIZES = [(301, 223), (224, 224), (113, 500), (64, 64), (37, 29), (225, 224)]
MODES = ["RGBA", "L", "P", "LA", "1", "CMYK"]


@pytest.mark.parametrize("resolution", [224, 48])
def test_equals_open_clip(resolution):
    ours = preprocess.test_transform(preprocess.Preprocessing(resolution))
    theirs = open_clip.image_transform(resolution, is_train=False)
    for image in [image_of(*size) for size in SIZES] + [image_of(61, 83, mode) for mode in MODES]:
        pixels = ours(image)
        assert pixels.shape == (3, resolution, resolution) and pixels.dtype == torch.float32
        assert (pixels - theirs(image)).abs().max() < 1e-6
        assert preprocess.train_transform(preprocess.Preprocessing(resolution))(image).shape == (
            3,
            resolution,
            resolution,
        )


@pytest.mark.parametrize("level", [0, 128, 255])
@pytest.mark.parametrize("make", [preprocess.test_transform, preprocess.train_transform])
def test_normalisation_by_hand(make, level):
    pixels = make(preprocess.Preprocessing(16))(Image.new("RGB", (20, 30), (level, level, level)))
    assert torch.allclose(pixels, ((level / 255 - MEAN) / STD).expand(3, 16, 16), atol=1e-6)


def test_augmentation_is_random_and_follows_the_seed():
    transform, image = preprocess.train_transform(preprocess.Preprocessing(64)), image_of(150, 101)

    def draw(seed):
        torch.manual_seed(seed)
        random.seed(0)
        return torch.stack([transform(image) for _ in range(3)])

    first = draw(1)
    assert first.shape == (3, 3, 64, 64) and first.dtype == torch.float32
    assert torch.equal(first, draw(1))
    assert not torch.equal(first, draw(2)) and not torch.equal(first[0], first[1])


def map_image(side: int = 256) -> Image.Image:
    """Return an image whose red is the column and green the row, so that a crop shows where it was cut."""
    row, column = np.mgrid[0:side, 0:side]
    return Image.fromarray(np.stack([column, row, 0 * row], axis=-1).astype(np.uint8), "RGB")


def crops(transform, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for `count` draws the share of the image's area that was cut, and whether it was flipped."""
    torch.manual_seed(0)
    pixels = torch.stack([transform(map_image()) for _ in range(count)]) * STD + MEAN  # [count, 3, R, R] in 0..1
    columns, rows = pixels[:, 0], pixels[:, 1]
    extent = [x.flatten(1).amax(1) - x.flatten(1).amin(1) for x in (columns, rows)]
    assert (rows[:, -1].mean(1) > rows[:, 0].mean(1)).all()  # never upside down
    return extent[0] * extent[1], columns[:, :, 0].mean(1) > columns[:, :, -1].mean(1)


def test_flips():
    _, flipped = crops(preprocess.train_transform(preprocess.Preprocessing(32)), 100)
    assert 30 < flipped.sum() < 70
    _, flipped = crops(preprocess.train_transform(preprocess.Preprocessing(32), flip=False), 100)
    assert not flipped.any()


def test_crop_area():
    area, _ = crops(preprocess.train_transform(preprocess.Preprocessing(64)), 200)
    assert 0.06 < area.min() < 0.15 and area.max() > 0.9
    area, _ = crops(preprocess.train_transform(preprocess.Preprocessing(64), min_area=0.5), 200)
    assert 0.45 < area.min() < 0.6 and area.max() > 0.9
    area, _ = crops(preprocess.train_transform(preprocess.Preprocessing(64), min_area=1.0), 20)
    assert area.min() > 0.9


@pytest.mark.parametrize("interpolation, resize", [("bicubic", "shortest"), ("bilinear", "squash")])
def test_bytes_that_are_normalised_later_give_the_same_bits(interpolation, resize):
    ours = preprocess.Preprocessing(48, (0.5, 0.4, 0.3), (0.21, 0.22, 0.23), interpolation, resize)
    images = [image_of(width, height, mode) for (width, height), mode in zip(SIZES, MODES)]
    for transform in (preprocess.test_transform(ours), preprocess.train_transform(ours)):
        results = []
        for step in (transform, preprocess.pixels_of(transform)):
            torch.manual_seed(3)
            results.append(torch.stack([step(image) for image in images]))
        whole, pixels = results
        assert pixels.dtype == torch.uint8
        assert torch.equal(preprocess.normalise(pixels, preprocess.normalise_table(transform)), whole)
