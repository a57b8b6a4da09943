"""The table of datasets: where each one lies, what its split looks like, how its prompts read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datasets.task import DatasetError

RELEASED_TEMPLATES = ("a photo of a {}.",)


@dataclass(frozen=True)
class Layout:
    """One place where a dataset may lie below the data root.

    `images` is the image folder inside `folder`, "" where the split's paths start at `folder` itself.
    With `holds`, a folder counts as the image folder only if it has a subfolder of this name.
    """

    folder: str
    images: str
    holds: str = ""


@dataclass(frozen=True)
class Spec:
    """One dataset. `layouts` are tried in order: CoOp's, the released SO code's, torchvision's.

    `split_file` is CoOp's split (None: the dataset brings its own). `templates` are the dataset-specific
    prompts. `classes` and `sizes` (images in train, val and test before any draw) are those of the published
    split.
    """

    layouts: tuple[Layout, ...]
    split_file: str | None
    templates: tuple[str, ...]
    classes: int
    sizes: tuple[int, int, int] | None


def _layouts(images: str, *folders: str) -> tuple[Layout, ...]:
    return tuple(Layout(folder, images) for folder in folders)


SPECS = {
    "imagenet": Spec(
        layouts=(Layout("imagenet", "images", holds="train"), Layout("imagenet", "", holds="train")),
        split_file=None,
        templates=(
            "itap of a {}.",
            "a bad photo of the {}.",
            "a origami {}.",
            "a photo of the large {}.",
            "a {} in a video game.",
            "art of the {}.",
            "a photo of the small {}.",
        ),
        classes=1000,
        sizes=None,
    ),
    "sun397": Spec(
        # $DATA/SUN397 is the dataset folder of the released code, but torchvision's image folder.
        # The images lie in one-letter folders, so a subfolder `a` tells the second from the first.
        layouts=(*_layouts("SUN397", "sun397", "SUN397"), Layout("SUN397", "", holds="a")),
        split_file="split_zhou_SUN397.json",
        templates=("a photo of a {}.",),
        classes=397,
        sizes=(15880, 3970, 19850),
    ),
    "fgvc": Spec(
        layouts=_layouts("images", "fgvc_aircraft", "fgvc-aircraft-2013b/data"),
        split_file=None,
        templates=("a photo of a {}, a type of aircraft.",),
        classes=100,
        sizes=(3334, 3333, 3333),
    ),
    "eurosat": Spec(
        layouts=_layouts("2750", "eurosat"),
        split_file="split_zhou_EuroSAT.json",
        templates=("a centered satellite photo of {}.",),
        classes=10,
        sizes=(13500, 5400, 8100),
    ),
    "stanford_cars": Spec(
        layouts=_layouts("", "stanford_cars", "StanfordCars"),
        split_file="split_zhou_StanfordCars.json",
        templates=("a photo of a {}.",),
        classes=196,
        sizes=(6509, 1635, 8041),
    ),
    "food101": Spec(
        layouts=_layouts("images", "food-101", "Food101"),
        split_file="split_zhou_Food101.json",
        templates=("a photo of {}, a type of food.",),
        classes=101,
        sizes=(50500, 20200, 30300),
    ),
    "oxford_pets": Spec(
        layouts=_layouts("images", "oxford_pets", "OxfordPets", "oxford-iiit-pet"),
        split_file="split_zhou_OxfordPets.json",
        templates=("a photo of a {}, a type of pet.",),
        classes=37,
        sizes=(2944, 736, 3669),
    ),
    "oxford_flowers": Spec(
        layouts=_layouts("jpg", "oxford_flowers", "Flower102", "flowers-102"),
        split_file="split_zhou_OxfordFlowers.json",
        templates=("a photo of a {}, a type of flower.",),
        classes=102,
        sizes=(4093, 1633, 2463),
    ),
    "caltech101": Spec(
        layouts=_layouts("101_ObjectCategories", "caltech-101", "Caltech101", "caltech101"),
        split_file="split_zhou_Caltech101.json",
        templates=("a photo of a {}.",),
        classes=100,
        sizes=(4128, 1649, 2465),
    ),
    "dtd": Spec(
        layouts=_layouts("images", "dtd", "DTD", "dtd/dtd"),
        split_file="split_zhou_DescribableTextures.json",
        templates=("{} texture.",),
        classes=47,
        sizes=(2820, 1128, 1692),
    ),
    "ucf101": Spec(
        layouts=_layouts("UCF-101-midframes", "ucf101", "UCF101"),
        split_file="split_zhou_UCF101.json",
        templates=("a photo of a person doing {}.",),
        classes=101,
        sizes=(7639, 1898, 3783),
    ),
}


@dataclass(frozen=True)
class Found:
    """Where a dataset was found. `split` is None for a dataset that brings its own split."""

    folder: Path
    images: Path
    split: Path | None


def locate(name: str, root: Path) -> Found:
    """Find dataset `name` below `root`; raise DatasetError with what was looked for if it is not there.

    The first layout that has both the image folder and the split file wins. If none has both, the split file
    may lie in any of the candidate folders, and the first image folder is taken.
    """
    spec = SPECS[name]
    folders = _existing_folders(name, root)
    complete, images_only = [], []
    for layout in spec.layouts:
        folder, images = root / layout.folder, root / layout.folder / layout.images
        if not (images / layout.holds).is_dir():
            continue
        split = folder / spec.split_file if spec.split_file else None
        has_split = split is None or split.is_file()
        (complete if has_split else images_only).append(Found(folder, images, split))
    if complete:
        return complete[0]
    if not images_only:
        tried = [root / layout.folder / layout.images / layout.holds for layout in spec.layouts]
        raise DatasetError(f"{name}: image folder not found; looked for {_listed(tried)}; unpack the images there")
    for folder in folders:
        if (folder / spec.split_file).is_file():
            return Found(images_only[0].folder, images_only[0].images, folder / spec.split_file)
    raise DatasetError(
        f"{name}: split file {spec.split_file} not found in {_listed(folders)}; "
        "it is one of the split files published with CoOp, DATASETS.md says where to get it"
    )


def _existing_folders(name: str, root: Path) -> list[Path]:
    """The dataset folders that exist below `root`, in the order of the layouts."""
    if not root.is_dir():
        raise DatasetError(f"data folder {root} does not exist; --root_path names the folder that holds the datasets")
    names = list(dict.fromkeys(layout.folder for layout in SPECS[name].layouts))
    folders = [root / folder for folder in names if (root / folder).is_dir()]
    if not folders:
        raise DatasetError(f"{name}: no dataset folder in {root}; looked for {_listed(names)} (see DATASETS.md)")
    return folders


def _listed(things: list) -> str:
    return ", ".join(dict.fromkeys(str(thing) for thing in things))
