"""Fabricated datasets: the real folder layouts and split formats of the eleven, with few small images.

The tables here are written a second time on purpose, so that a mistake in datasets/specs.py shows.
"""

import colorsys
import dataclasses
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import datasets
from datasets import splits
from datasets.specs import SPECS, names_sha256
from support.runs import error_of


def _layouts(coop: tuple, released: tuple, torchvision: tuple) -> dict[str, tuple[str, str]]:
    return {"coop": coop, "released": released, "torchvision": torchvision}


# name -> layout -> (folder of the split, folder that the split's paths are relative to)
FOLDERS = {
    "imagenet": _layouts(("imagenet", "imagenet/images"), ("imagenet", "imagenet"), ("imagenet", "imagenet")),
    "sun397": _layouts(("sun397", "sun397/SUN397"), ("SUN397", "SUN397/SUN397"), ("SUN397", "SUN397")),
    "fgvc": _layouts(
        ("fgvc_aircraft", "fgvc_aircraft/images"),
        ("fgvc_aircraft", "fgvc_aircraft/images"),
        ("fgvc-aircraft-2013b/data", "fgvc-aircraft-2013b/data/images"),
    ),
    "eurosat": _layouts(*[("eurosat", "eurosat/2750")] * 3),
    "stanford_cars": _layouts(*[(folder, folder) for folder in ("stanford_cars", "StanfordCars", "stanford_cars")]),
    "food101": _layouts(
        ("food-101", "food-101/images"), ("Food101", "Food101/images"), ("food-101", "food-101/images")
    ),
    "oxford_pets": _layouts(*[(pets, f"{pets}/images") for pets in ("oxford_pets", "OxfordPets", "oxford-iiit-pet")]),
    "oxford_flowers": _layouts(
        *[(folder, f"{folder}/jpg") for folder in ("oxford_flowers", "Flower102", "flowers-102")]
    ),
    "caltech101": _layouts(
        *[(folder, f"{folder}/101_ObjectCategories") for folder in ("caltech-101", "Caltech101", "caltech101")]
    ),
    "dtd": _layouts(("dtd", "dtd/images"), ("DTD", "DTD/images"), ("dtd", "dtd/dtd/images")),
    "ucf101": _layouts(*[(folder, f"{folder}/UCF-101-midframes") for folder in ("ucf101", "UCF101", "ucf101")]),
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


@pytest.fixture
def few_imagenet_classes(monkeypatch, tmp_path_factory):
    """Give ImageNet, -V2 and -Sketch 12 classes, and -A and -R 4, to be quick."""
    lines = splits.CLASSES_FILE.read_text(encoding="utf-8").splitlines()[:12]
    file = tmp_path_factory.mktemp("classes") / "imagenet_classes.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(splits, "CLASSES_FILE", file)
    for name in ("imagenet", *VARIANTS):
        labels = variant_labels(name)
        names = names_sha256([splits.imagenet_classes()[1][label] for label in labels])
        spec = dataclasses.replace(SPECS[name], classes=len(labels), names_sha256=names)
        monkeypatch.setitem(SPECS, name, spec)


def variant_labels(name: str) -> list[int]:
    """Return ImageNet's labels of the classes that a variant (or imagenet) has with `few_imagenet_classes`."""
    return [1, 4, 7, 10] if name in ("imagenet_a", "imagenet_r") else list(range(12))


def class_name(name: str, label: int) -> str:
    """Return the class name of `label` in a fabricated dataset other than imagenet."""
    odd, odd_name, _ = _ODD_CLASS.get(name, (None, "", ""))
    if label == odd:
        return odd_name
    return f"Type-{label}/A {label}" if name == "fgvc" else f"kind_{label}"


def picture(label: int, number: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """Return a noisy RGB image of `size` (width, height) in the colour of its class; no hidden randomness."""
    rng = np.random.default_rng((label, number))
    colour = 255 * np.array(colorsys.hsv_to_rgb((label * 0.381966) % 1.0, 0.8, 0.9))
    noise = rng.normal(scale=20.0, size=(size[1], size[0], 3))
    return Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8))


def part_sizes(per_class: int) -> tuple[int, int, int]:
    """Return how many of a class's images go to train, val and test (imagenet: per_class to train, one to test)."""
    train, val = per_class // 2, per_class // 4
    return train, val, per_class - train - val


def fabricate(name: str, root: Path, layout: str = "coop", classes: int = 3, per_class: int = 8) -> Path:
    """Write dataset `name` below `root` in the layout coop, released or torchvision; return its image root.

    `per_class` images per class are divided as in `part_sizes`. imagenet has all of its classes, with `per_class`
    images per class in train and one in val.
    """
    split_folder, image_root = (Path(root) / folder for folder in FOLDERS[name][layout])
    if name == "imagenet":
        _write_imagenet(image_root, per_class)
    elif name == "fgvc":
        _write_fgvc(split_folder, image_root, classes, per_class)
    else:
        _write_json(name, split_folder, image_root, classes, per_class)
    return image_root


def _numbered(labels: Iterable[int], per_class: int) -> Iterator[tuple[int, str, int]]:
    """Yield the running number, part and label of each image."""
    parts = [part for part, count in zip(("train", "val", "test"), part_sizes(per_class)) for _ in range(count)]
    for number, (label, part) in enumerate(itertools.product(labels, parts), start=1):
        yield number, part, label


def _write_json(name: str, split_folder: Path, image_root: Path, classes: int, per_class: int) -> None:
    parts: dict[str, list] = {"train": [], "val": [], "test": []}
    labels = reversed(range(classes)) if name in _UNORDERED else range(classes)
    for number, part, label in _numbered(labels, per_class):
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
    """Write a user's own images: `per_class` small ones 0.png, 1.png, ... in a folder for each class; return `root`."""
    for label, name in enumerate(classes):
        for number in range(per_class):
            _save(picture(label, number, size=(12, 12)), Path(root) / name / f"{number}.png")
    return Path(root)


def _write_fgvc(folder: Path, image_root: Path, classes: int, per_class: int) -> None:
    names = [class_name("fgvc", label) for label in range(classes)]
    lines: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for number, part, label in _numbered(range(classes), per_class):
        _save(picture(label, number), image_root / f"{number:07d}.jpg")
        lines[part].append(f"{number:07d} {names[label]}\n")
    (folder / "variants.txt").write_text("".join(f"{variant}\n" for variant in names))
    for part, text in lines.items():
        (folder / f"images_variant_{part}.txt").write_text("".join(text))


def _write_imagenet(image_root: Path, per_class: int) -> None:
    for label, wnid in enumerate(splits.imagenet_classes()[0]):
        buffer = io.BytesIO()
        picture(label, 0, size=(16, 16)).save(buffer, "JPEG")  # one encoding per class
        for part, count in (("train", per_class), ("val", 1)):
            folder = image_root / part / wnid
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{wnid}_{part}_{number}.JPEG").write_bytes(buffer.getvalue())


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def error_of_build(*arguments, **options) -> str:
    """Return the message of the DatasetError that build raises; it must be one line."""
    return error_of(datasets.DatasetError, datasets.build, *arguments, **options)
