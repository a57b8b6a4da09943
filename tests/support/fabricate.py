"""Fabricated datasets: the real folder layouts and split formats of the eleven, with few small pictures.

The tables here are written down a second time on purpose, so that a mistake in datasets/specs.py shows.
"""

from __future__ import annotations

import colorsys
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import datasets

# name -> layout -> (folder of the split, folder that the split's paths are relative to)
FOLDERS = {
    "imagenet": {
        "coop": ("imagenet", "imagenet/images"),
        "released": ("imagenet", "imagenet"),
        "torchvision": ("imagenet", "imagenet"),
    },
    "sun397": {
        "coop": ("sun397", "sun397/SUN397"),
        "released": ("SUN397", "SUN397/SUN397"),
        "torchvision": ("SUN397", "SUN397"),
    },
    "fgvc": {
        "coop": ("fgvc_aircraft", "fgvc_aircraft/images"),
        "released": ("fgvc_aircraft", "fgvc_aircraft/images"),
        "torchvision": ("fgvc-aircraft-2013b/data", "fgvc-aircraft-2013b/data/images"),
    },
    "eurosat": {
        "coop": ("eurosat", "eurosat/2750"),
        "released": ("eurosat", "eurosat/2750"),
        "torchvision": ("eurosat", "eurosat/2750"),
    },
    "stanford_cars": {
        "coop": ("stanford_cars", "stanford_cars"),
        "released": ("StanfordCars", "StanfordCars"),
        "torchvision": ("stanford_cars", "stanford_cars"),
    },
    "food101": {
        "coop": ("food-101", "food-101/images"),
        "released": ("Food101", "Food101/images"),
        "torchvision": ("food-101", "food-101/images"),
    },
    "oxford_pets": {
        "coop": ("oxford_pets", "oxford_pets/images"),
        "released": ("OxfordPets", "OxfordPets/images"),
        "torchvision": ("oxford-iiit-pet", "oxford-iiit-pet/images"),
    },
    "oxford_flowers": {
        "coop": ("oxford_flowers", "oxford_flowers/jpg"),
        "released": ("Flower102", "Flower102/jpg"),
        "torchvision": ("flowers-102", "flowers-102/jpg"),
    },
    "caltech101": {
        "coop": ("caltech-101", "caltech-101/101_ObjectCategories"),
        "released": ("Caltech101", "Caltech101/101_ObjectCategories"),
        "torchvision": ("caltech101", "caltech101/101_ObjectCategories"),
    },
    "dtd": {
        "coop": ("dtd", "dtd/images"),
        "released": ("DTD", "DTD/images"),
        "torchvision": ("dtd", "dtd/dtd/images"),  # the split lies one level above the unpacked archive
    },
    "ucf101": {
        "coop": ("ucf101", "ucf101/UCF-101-midframes"),
        "released": ("UCF101", "UCF101/UCF-101-midframes"),
        "torchvision": ("ucf101", "ucf101/UCF-101-midframes"),
    },
}

# The variants of ImageNet: image roots, the first as CoOp has it, then archives unpacked and left as they were.
VARIANTS = {
    "imagenet_v2": ("imagenetv2/imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency-format-val"),
    "imagenet_sketch": ("imagenet-sketch/images", "imagenet-sketch/sketch", "sketch"),
    "imagenet_a": ("imagenet-adversarial/imagenet-a", "imagenet-a"),
    "imagenet_r": ("imagenet-rendition/imagenet-r", "imagenet-r"),
}

SPLIT_FILES = {
    "sun397": "split_zhou_SUN397.json",
    "eurosat": "split_zhou_EuroSAT.json",
    "stanford_cars": "split_zhou_StanfordCars.json",
    "food101": "split_zhou_Food101.json",
    "oxford_pets": "split_zhou_OxfordPets.json",
    "oxford_flowers": "split_zhou_OxfordFlowers.json",
    "caltech101": "split_zhou_Caltech101.json",
    "dtd": "split_zhou_DescribableTextures.json",
    "ucf101": "split_zhou_UCF101.json",
}

# name -> pattern of a path ({c}: class, {i}: running number), as the real splits have them
_PATHS = {
    "sun397": "a/kind_{c}/sun_{i:06d}.jpg",
    "eurosat": "Kind{c}/Kind{c}_{i}.jpg",
    "food101": "kind_{c}/{i:07d}.jpg",
    "oxford_pets": "Kind_{c}_{i}.jpg",
    "oxford_flowers": "image_{i:05d}.jpg",
    "caltech101": "kind_{c}/image_{i:04d}.jpg",
    "dtd": "kind-{c}/kind-{c}_{i:04d}.jpg",
    "ucf101": "Kind_{c}/v_Kind{c}_g01_c{i:02d}.jpg",
}

# One class of UCF101 has a folder that is not spelt like its files.
_ODD_CLASS = {"ucf101": (1, "Handstand_Pushups", "Handstand_Pushups/v_HandStandPushups_g01_c{i:02d}.jpg")}

# In these two splits the classes do not first appear in label order.
_UNORDERED = ("oxford_flowers", "stanford_cars")

IMAGENET_CLASSES = 1000


def class_name(name: str, label: int) -> str:
    """The class name that a fabricated dataset (other than imagenet) gives to `label`."""
    odd, odd_name, _ = _ODD_CLASS.get(name, (None, "", ""))
    if label == odd:
        return odd_name
    return f"Type-{label}/A {label}" if name == "fgvc" else f"kind_{label}"


def picture(label: int, number: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """A noisy RGB picture of `size` (width, height) in the colour of its class; no hidden randomness."""
    rng = np.random.default_rng((label, number))
    colour = 255 * np.array(colorsys.hsv_to_rgb((label * 0.381966) % 1.0, 0.8, 0.9))
    noise = rng.normal(scale=20.0, size=(size[1], size[0], 3))
    return Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8))


def part_sizes(per_class: int) -> tuple[int, int, int]:
    """How many of a class's images go to train, val and test (imagenet: per_class to train, one to test)."""
    train, val = per_class // 2, per_class // 4
    return train, val, per_class - train - val


def fabricate(name: str, root: Path, layout: str = "coop", classes: int = 3, per_class: int = 8) -> Path:
    """Write dataset `name` below `root` in the layout coop, released or torchvision; return its image root.

    `per_class` images per class are dealt out as in `part_sizes`. imagenet always has its 1000 classes, with
    `per_class` images per class in train and one in val.
    """
    split_folder, image_root = (Path(root) / folder for folder in FOLDERS[name][layout])
    if name == "imagenet":
        _write_imagenet(image_root, per_class)
    elif name == "fgvc":
        _write_fgvc(split_folder, image_root, classes, per_class)
    else:
        _write_json(name, split_folder, image_root, classes, per_class)
    return image_root


def _write_json(name: str, split_folder: Path, image_root: Path, classes: int, per_class: int) -> None:
    parts: dict[str, list] = {"train": [], "val": [], "test": []}
    number = 0
    for label in reversed(range(classes)) if name in _UNORDERED else range(classes):
        for part, count in zip(parts, part_sizes(per_class)):
            for _ in range(count):
                number += 1
                if name == "stanford_cars":
                    path = f"cars_{'test' if part == 'test' else 'train'}/{number:05d}.jpg"
                else:
                    odd, _, odd_path = _ODD_CLASS.get(name, (None, "", ""))
                    path = (odd_path if label == odd else _PATHS[name]).format(c=label, i=number)
                _save(picture(label, number), image_root / path)
                parts[part].append([path, label, class_name(name, label)])
    split_folder.mkdir(parents=True, exist_ok=True)
    (split_folder / SPLIT_FILES[name]).write_text(json.dumps(parts))


def fabricate_variant(root: Path, image_root: str, folders: Sequence[str], per_class: int = 1) -> Path:
    """Write a variant of ImageNet below `root`: in `image_root`, `per_class` images in each of `folders`."""
    for number, folder in enumerate(folders):
        buffer = io.BytesIO()
        picture(number, 0, size=(16, 16)).save(buffer, "JPEG")
        for image in range(per_class):
            path = Path(root) / image_root / folder / f"{image}.jpeg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(buffer.getvalue())
    return Path(root) / image_root


def fabricate_own(root: Path, classes: Sequence[str] = ("cat", "dog"), per_class: int = 6) -> Path:
    """Write one's own data: `per_class` small pictures 0.png, 1.png, ... in a folder for each class; return `root`."""
    for label, name in enumerate(classes):
        for number in range(per_class):
            _save(picture(label, number, size=(12, 12)), Path(root) / name / f"{number}.png")
    return Path(root)


def _write_fgvc(folder: Path, image_root: Path, classes: int, per_class: int) -> None:
    names = [class_name("fgvc", label) for label in range(classes)]
    lines: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    number = 0
    for label, variant in enumerate(names):
        for part, count in zip(lines, part_sizes(per_class)):
            for _ in range(count):
                number += 1
                _save(picture(label, number), image_root / f"{number:07d}.jpg")
                lines[part].append(f"{number:07d} {variant}\n")
    (folder / "variants.txt").write_text("".join(f"{variant}\n" for variant in names))
    for part, text in lines.items():
        (folder / f"images_variant_{part}.txt").write_text("".join(text))


def _write_imagenet(image_root: Path, per_class: int) -> None:
    table = Path(__file__).parents[2] / "datasets" / "imagenet_classes.txt"
    wnids = [line.split()[0] for line in table.read_text(encoding="utf-8").splitlines()]
    for label, wnid in enumerate(wnids):
        buffer = io.BytesIO()
        picture(label, 0, size=(16, 16)).save(buffer, "JPEG")  # one encoding per class: 1000 classes take a while
        for part, count in (("train", per_class), ("val", 1)):
            folder = image_root / part / wnid
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{wnid}_{part}_{number}.JPEG").write_bytes(buffer.getvalue())


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def error_of_build(*arguments, **options) -> str:
    """The message of the DatasetError that build raises; it must be one line."""
    with pytest.raises(datasets.DatasetError) as caught:
        datasets.build(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message
