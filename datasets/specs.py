"""The table of datasets: the folders, the split file, the prompts and the published numbers of each."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .task import DatasetError

RELEASED_TEMPLATES = ("a photo of a {}.",)


@dataclass(frozen=True)
class Layout:
    """One place below the data root where a dataset may be.

    `images` is the image folder inside `folder`; it is "" if the split's paths start at `folder` itself. With `holds`,
    a folder is accepted as the image folder only if it has a subfolder of this name.
    """

    folder: str
    images: str
    holds: str = ""


@dataclass(frozen=True)
class Spec:
    """One dataset. `layouts` are tried in order: CoOp's, the released SO code's, torchvision's.

    `classes` and `sizes` (images in train, val and test before any draw) are those of the published split; ImageNet's
    are those of its folders. `names_sha256` is that of the published class names, see `names_sha256`. `split_file` is
    CoOp's split (None: the dataset has its own). `templates` are the dataset-specific prompts.
    """

    layouts: tuple[Layout, ...]
    classes: int
    sizes: tuple[int, int, int]
    names_sha256: str
    split_file: str | None = None
    templates: tuple[str, ...] = RELEASED_TEMPLATES

    @property
    def is_test_only(self) -> bool:
        """Return whether there are no training images, as in the variants of ImageNet that test its models."""
        return self.sizes[0] == 0


def _layouts(images: str, *folders: str) -> tuple[Layout, ...]:
    return tuple(Layout(folder, images) for folder in folders)


SPECS = {
    "imagenet": Spec(
        layouts=(Layout("imagenet", "images", holds="val"), Layout("imagenet", "", holds="val")),
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
        sizes=(1281167, 0, 50000),
        names_sha256="571ae1c583b4be7da87519494c52bf405a46af05d5815627c7a0dee997068b60",
    ),
    "sun397": Spec(
        # $DATA/SUN397 is the dataset folder of the released code, but the image folder of torchvision.
        # Images are in one-letter folders, so a subfolder `a` identifies torchvision's.
        layouts=(*_layouts("SUN397", "sun397", "SUN397"), Layout("SUN397", "", holds="a")),
        split_file="split_zhou_SUN397.json",
        classes=397,
        sizes=(15880, 3970, 19850),
        names_sha256="583c0fad85d22c563fc88e49462efce4c5a08aec1e0b8020f325224af67cb040",
    ),
    "fgvc": Spec(
        layouts=_layouts("images", "fgvc_aircraft", "fgvc-aircraft-2013b/data"),
        templates=("a photo of a {}, a type of aircraft.",),
        classes=100,
        sizes=(3334, 3333, 3333),
        names_sha256="e1c9e72060e63d526dce032008262a95f573b02e802be7be42f0cb6ccd5b4217",
    ),
    "eurosat": Spec(
        layouts=_layouts("2750", "eurosat"),
        split_file="split_zhou_EuroSAT.json",
        templates=("a centered satellite photo of {}.",),
        classes=10,
        sizes=(13500, 5400, 8100),
        names_sha256="bcff3a8022b63397730ecbb798e13cf58822547521ea94ed2975f05971b28da3",
    ),
    "stanford_cars": Spec(
        layouts=_layouts("", "stanford_cars", "StanfordCars"),
        split_file="split_zhou_StanfordCars.json",
        classes=196,
        sizes=(6509, 1635, 8041),
        names_sha256="2caca90b5c02b65fcd9542cc2c934aa40c56ded5cb5b72e6e0b8e6b023cf81f9",
    ),
    "food101": Spec(
        layouts=_layouts("images", "food-101", "Food101"),
        split_file="split_zhou_Food101.json",
        templates=("a photo of {}, a type of food.",),
        classes=101,
        sizes=(50500, 20200, 30300),
        names_sha256="efe7060c0e6aa88c98d3ad9532240013747f6b2179d45e1f750527890437c59d",
    ),
    "oxford_pets": Spec(
        layouts=_layouts("images", "oxford_pets", "OxfordPets", "oxford-iiit-pet"),
        split_file="split_zhou_OxfordPets.json",
        templates=("a photo of a {}, a type of pet.",),
        classes=37,
        sizes=(2944, 736, 3669),
        names_sha256="8e35ab44db27d55ab1a062c8af3308606560f9f3e3a6bf698b19e4ea54212d6d",
    ),
    "oxford_flowers": Spec(
        layouts=_layouts("jpg", "oxford_flowers", "Flower102", "flowers-102"),
        split_file="split_zhou_OxfordFlowers.json",
        templates=("a photo of a {}, a type of flower.",),
        classes=102,
        sizes=(4093, 1633, 2463),
        names_sha256="0d27092c2140383d4f002dc99d20c184d58ffdc454e5f4d12f0475b4e23480ee",
    ),
    "caltech101": Spec(
        layouts=_layouts("101_ObjectCategories", "caltech-101", "Caltech101", "caltech101"),
        split_file="split_zhou_Caltech101.json",
        classes=100,
        sizes=(4128, 1649, 2465),
        names_sha256="84f9ff49dce58ae6e74754fd578f6dd6bb9c1b711758e7c3da3888216d0630ca",
    ),
    "dtd": Spec(
        layouts=_layouts("images", "dtd", "DTD", "dtd/dtd"),
        split_file="split_zhou_DescribableTextures.json",
        templates=("{} texture.",),
        classes=47,
        sizes=(2820, 1128, 1692),
        names_sha256="681d23b9cd3c2edec8ff7ea1fd6f5dd92f3b8d1dfb5a43fd0faee72a116c1130",
    ),
    "ucf101": Spec(
        layouts=_layouts("UCF-101-midframes", "ucf101", "UCF101"),
        split_file="split_zhou_UCF101.json",
        templates=("a photo of a person doing {}.",),
        classes=101,
        sizes=(7639, 1898, 3783),
        names_sha256="d22e81fba7ebebf0fb154d6bc7c3b2c11a31a31d102b6873aa4f37413abaefc1",
    ),
    # The four variants of ImageNet, to test its models on: one folder per class, no split file. An archive unpacked
    # into the data root itself is found too.
    "imagenet_v2": Spec(
        layouts=(
            Layout("imagenetv2", "imagenetv2-matched-frequency-format-val"),
            Layout("imagenetv2-matched-frequency-format-val", ""),
        ),
        classes=1000,
        sizes=(0, 0, 10000),
        names_sha256="571ae1c583b4be7da87519494c52bf405a46af05d5815627c7a0dee997068b60",
    ),
    "imagenet_sketch": Spec(
        layouts=(Layout("imagenet-sketch", "images"), Layout("imagenet-sketch", "sketch"), Layout("sketch", "")),
        classes=1000,
        sizes=(0, 0, 50889),
        names_sha256="571ae1c583b4be7da87519494c52bf405a46af05d5815627c7a0dee997068b60",
    ),
    "imagenet_a": Spec(
        layouts=(Layout("imagenet-adversarial", "imagenet-a"), Layout("imagenet-a", "")),
        classes=200,
        sizes=(0, 0, 7500),
        names_sha256="4b36c17b1b1bba6c18f01853a5cec90f5a342594ef1e9cfd7b64f374db61ccfc",
    ),
    "imagenet_r": Spec(
        layouts=(Layout("imagenet-rendition", "imagenet-r"), Layout("imagenet-r", "")),
        classes=200,
        sizes=(0, 0, 30000),
        names_sha256="79cac199a91468418c879d1cc78ed06512c6ad13ed7e2cda4d550decccd6f7a1",
    ),
}


@dataclass(frozen=True)
class Found:
    """Where a dataset was found. `split` is None for a dataset that has its own split.

    `copies` are the folders of other complete copies, which are not used. `problems` says what is missing, with the
    remedy; the path of what is missing is None. What `locate` returns has no problems.
    """

    folder: Path | None = None
    images: Path | None = None
    split: Path | None = None
    copies: tuple[Path, ...] = ()
    problems: tuple[str, ...] = ()


def locate(name: str, root: Path) -> Found:
    """Find dataset `name` below `root`; raise DatasetError with what was looked for if it is not there."""
    found = search(name, root)
    if found.problems:
        raise DatasetError(found.problems[0])
    return found


def search(name: str, root: Path) -> Found:
    """Find the folders and the split file of dataset `name` below `root`, as far as they exist.

    The first layout that has both the image folder and the split file is used. If none has both, the split file may be
    in any of the candidate folders, and the first image folder is used.
    """
    if not root.is_dir():
        problem = f"data folder {root} does not exist; --root_path names the folder that holds the datasets"
        return Found(problems=(problem,))
    spec = SPECS[name]
    names = list(dict.fromkeys(layout.folder for layout in spec.layouts))
    folders = [root / folder for folder in names if (root / folder).is_dir()]
    if not folders:
        problem = f"{name}: no dataset folder in {root}; looked for {', '.join(names)} (see DATASETS.md)"
        return Found(problems=(problem,))

    problems = []
    places = [(root / layout.folder, root / layout.folder / layout.images, layout.holds) for layout in spec.layouts]
    existing = [(folder, images) for folder, images, holds in places if (images / holds).is_dir()]
    if not existing:
        tried = ", ".join(dict.fromkeys(str(images / holds) for _, images, holds in places))
        problems.append(f"{name}: image folder not found; looked for {tried}; unpack the images there")
    splits = []
    if spec.split_file:
        splits = [folder / spec.split_file for folder in folders if (folder / spec.split_file).is_file()]
        if not splits:
            problems.append(
                f"{name}: split file {spec.split_file} not found in {', '.join(map(str, folders))}; "
                "it was published with CoOp, and DATASETS.md says where to get it"
            )
    complete = [place for place in existing if not spec.split_file or place[0] / spec.split_file in splits]
    folder, images = (complete or existing or [(folders[0], None)])[0]
    split = folder / spec.split_file if complete and spec.split_file else next(iter(splits), None)
    # Different copies, such as dtd and DTD on a disk that distinguishes upper and lower case.
    copies = tuple(other for other, inside in complete[1:] if not inside.samefile(images))
    return Found(folder, images, split, copies, tuple(problems))


def names_sha256(class_names: Sequence[str]) -> str:
    """Return the SHA-256 of class names in label order, joined by newlines."""
    return hashlib.sha256("\n".join(class_names).encode("utf-8", "surrogatepass")).hexdigest()


def departure(name: str, class_names: Sequence[str], sizes: tuple[int, int, int]) -> str | None:
    """Return how a split differs from the published one in classes or numbers of images; None if it does not."""
    spec = SPECS[name]
    classes = len(class_names)
    if (classes, sizes) == (spec.classes, spec.sizes):
        if names_sha256(class_names) == spec.names_sha256:
            return None
        return (
            f"other class names than the published ones, or another order (the first is {class_names[0]!r}); results "
            "cannot be compared with published ones"
        )
    here, published = ("/".join(map(str, three)) for three in (sizes, spec.sizes))
    return (
        f"{classes} classes and {here} train/val/test images, but the published split has {spec.classes} and "
        f"{published}; results cannot be compared with published ones"
    )
