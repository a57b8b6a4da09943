"""The doctor: datasets in every layout are found ready, and each way of being broken gets its diagnosis and remedy."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.fabricate import FOLDERS, SPLIT_FILES, VARIANTS, error_of_build, fabricate, fabricate_variant, picture

import datasets
from datasets.acquire import doctor
from datasets.acquire.sources import SOURCES
from datasets.specs import SPECS
from datasets.splits import imagenet_classes, read_json_split

SMALL = tuple(name for name in FOLDERS if name != "imagenet")
DTD_SPLIT = Path("dtd", SPLIT_FILES["dtd"])

# ImageNet's labels of the classes in ImageNet-A and in ImageNet-R.
A_LABELS = """
6 11 13 15 17 22 23 27 30 37 39 42 47 50 57 70 71 76 79 89 90 94 96 97 99 105 107 108 110 113 124 125 130 132 143 144
150 151 207 234 235 254 277 283 287 291 295 298 301 306 307 308 309 310 311 313 314 315 317 319 323 324 326 327 330 334
335 336 347 361 363 372 378 386 397 400 401 402 404 407 411 416 417 420 425 428 430 437 438 445 456 457 461 462 470 472
483 486 488 492 496 514 516 528 530 539 542 543 549 552 557 561 562 569 572 573 575 579 589 606 607 609 614 626 627 640
641 642 643 658 668 677 682 684 687 701 704 719 736 746 749 752 758 763 765 768 773 774 776 779 780 786 792 797 802 803
804 813 815 820 823 831 833 835 839 845 847 850 859 862 870 879 880 888 890 897 900 907 913 924 932 933 934 937 943 945
947 951 954 956 957 959 971 972 980 981 984 986 987 988
"""
R_LABELS = """
1 2 4 6 8 9 11 13 22 23 26 29 31 39 47 63 71 76 79 84 90 94 96 97 99 100 105 107 113 122 125 130 132 144 145 147 148
150 151 155 160 161 162 163 171 172 178 187 195 199 203 207 208 219 231 232 234 235 242 245 247 250 251 254 259 260 263
265 267 269 276 277 281 288 289 291 292 293 296 299 301 308 309 310 311 314 315 319 323 327 330 334 335 337 338 340 341
344 347 353 355 361 362 365 366 367 368 372 388 390 393 397 401 407 413 414 425 428 430 435 437 441 447 448 457 462 463
469 470 471 472 476 483 487 515 546 555 558 570 579 583 587 593 594 596 609 613 617 621 629 637 657 658 701 717 724 763
768 774 776 779 780 787 805 812 815 820 824 833 847 852 866 875 883 889 895 907 928 931 932 933 934 936 937 943 945 947
948 949 951 953 954 957 963 965 967 980 981 983 988
"""


@pytest.fixture
def examine(capsys):
    """Calls the doctor and returns (exit code, stdout)."""

    def call(names, root, *flags):
        code = doctor.main([*names.split(), "--root_path", str(root), *flags])
        return code, capsys.readouterr().out

    return call


def verdict(out: str) -> str:
    """The last line about the only dataset."""
    *_, last, empty, _ = out.splitlines()
    assert empty == ""
    return last


def is_refused(name: str, root: Path) -> bool:
    """Whether main.py's check of the data ends in an error."""
    try:
        datasets.check_images_exist(datasets.build(name, root, 1, 1))
    except datasets.DatasetError:
        return True
    return False


# --- what is ready


@pytest.mark.parametrize("layout", ["coop", "released", "torchvision"])
@pytest.mark.parametrize("name", SMALL)
def test_every_dataset_is_ready_in_every_layout(name, layout, tmp_path, examine):
    image_root = fabricate(name, tmp_path, layout)
    assert not is_refused(name, tmp_path)
    code, out = examine(name, tmp_path)
    assert code == 0 and verdict(out) == f"{name}: ready, 1 warning" and out.endswith("\n1 of 1 ready\n")
    assert f"layout: images in {image_root}\n" in out
    assert "numbers: 3 classes, 12/6/6 train/val/test images\n" in out
    assert f"the published split {SPECS[name].classes} and " in out and "do not compare" in out
    assert "images: all 24 are there\n" in out and "decoded: 9 of 24 (a sample" in out
    assert "up to 4 without repeats" in out
    assert ("split: " in out) == (name in SPLIT_FILES)


def test_quirks_of_the_real_splits_are_fabricated(tmp_path):
    """Names with slashes and blanks, a folder spelt otherwise than its files, labels that do not appear in order."""
    for name in ("fgvc", "ucf101", "stanford_cars"):
        fabricate(name, tmp_path)
    assert datasets.build("fgvc", tmp_path, 1, 1).class_names[1] == "Type-1/A 1"
    frames = datasets.build("ucf101", tmp_path, 1, 1)
    assert frames.class_names[1] == "Handstand_Pushups"
    assert frames.train[1].path.startswith("Handstand_Pushups/v_HandStandPushups_")
    cars = datasets.build("stanford_cars", tmp_path, 1, 1)
    assert [item.label for item in cars.train] == [2, 1, 0]
    assert cars.train[0].path.startswith("cars_train/") and cars.test[0].path.startswith("cars_test/")


def test_published_data_are_ready_without_a_warning(tmp_path, monkeypatch, examine):
    fabricate("dtd", tmp_path, classes=3, per_class=80)
    as_if_published(monkeypatch, tmp_path)
    code, out = examine("dtd", tmp_path)
    assert code == 0 and verdict(out) == "dtd: ready"
    assert f"split: {tmp_path / DTD_SPLIT} (the published file)\n" in out
    assert "3 classes, 120/60/60 train/val/test images, as published\n" in out
    assert "class names: as published\n" in out and "shots: 16 and more\n" in out
    # Google Drive's copy may differ in its bytes.
    split = json.loads((tmp_path / DTD_SPLIT).read_text())
    (tmp_path / DTD_SPLIT).write_text(json.dumps(split, indent=1))
    code, out = examine("dtd", tmp_path)
    assert code == 0 and verdict(out) == "dtd: ready" and "(other bytes than the copy that is known" in out
    # Labels in another order: the draws are others too.
    for part in split.values():
        for row in part:
            row[1:] = [2 - row[1], row[2]]
    (tmp_path / DTD_SPLIT).write_text(json.dumps(split))
    code, out = examine("dtd", tmp_path)
    assert code == 0 and verdict(out) == "dtd: ready, 1 warning" and "(not the published file)" in out
    assert "class names, or an order of them, that are not the published ones, the first is 'kind_2'" in out


def as_if_published(monkeypatch, root: Path) -> None:
    """Take the fabricated dtd for the published one."""
    split = read_json_split(root / DTD_SPLIT)
    names_sha256 = hashlib.sha256("\n".join(split.class_names).encode()).hexdigest()
    sizes = (len(split.train), len(split.val), len(split.test))
    spec = dataclasses.replace(SPECS["dtd"], classes=len(split.class_names), sizes=sizes, names_sha256=names_sha256)
    monkeypatch.setitem(SPECS, "dtd", spec)
    sha256 = hashlib.sha256((root / DTD_SPLIT).read_bytes()).hexdigest()
    source = dataclasses.replace(SOURCES["dtd"], split=dataclasses.replace(SOURCES["dtd"].split, sha256=sha256))
    monkeypatch.setitem(SOURCES, "dtd", source)


@pytest.mark.parametrize("name", ["food101", "sun397"])
def test_checksums_that_are_not_known_for_certain_are_said_so(name, tmp_path, examine):
    fabricate(name, tmp_path)
    assert f"{SPLIT_FILES[name]} (checksum not known for certain)\n" in examine(name, tmp_path)[1]


def test_copies_are_named(tmp_path, capsys, examine):
    fabricate("dtd", tmp_path, "released")
    fabricate("dtd", tmp_path, "coop")
    code, out = examine("dtd", tmp_path)
    assert code == 0 and f"images in {tmp_path / 'dtd' / 'images'}\n" in out
    if not (tmp_path / "dtd").samefile(tmp_path / "DTD"):  # they are one on a disk that ignores letter case
        assert f"note: {tmp_path / 'DTD'} is another copy, which is not used" in out
        datasets.build("dtd", tmp_path, 1, 1)
        assert (
            f"note: dtd is read from {tmp_path / 'dtd'}; {tmp_path / 'DTD'} is another copy" in capsys.readouterr().err
        )


def test_a_link_to_a_dataset_is_no_copy(tmp_path, examine):
    fabricate("food101", tmp_path, "coop")
    (tmp_path / "Food101").symlink_to(tmp_path / "food-101", target_is_directory=True)
    code, out = examine("food101", tmp_path)
    assert code == 0 and "another copy" not in out


def test_imagenet(tmp_path, capsys, examine):
    image_root = fabricate("imagenet", tmp_path, per_class=2)
    assert not is_refused("imagenet", tmp_path)
    assert "2000/0/1000 train/val/test images, the published split 1000 and 1281167/0/50000;" in capsys.readouterr().err
    code, out = examine("imagenet", tmp_path)
    assert code == 0 and verdict(out) == "imagenet: ready, 1 warning"
    assert "1000 classes, 2000/0/1000 train/val/test images\n" in out and "1281167/0/50000" in out
    assert (
        "class names: as published\n" in out
        and "up to 1 without repeats; classes with fewer than 20 images: tench 2," in out
    )
    assert "decoded: 3000 of 3000 (a sample" in out

    train, val = image_root / "train", image_root / "val"
    (train / "n01440764" / "n01440764_train_0.JPEG").unlink()  # one image cannot both be trained on and validate
    code, out = examine("imagenet", tmp_path)
    assert (
        code == 2 and verdict(out) == "imagenet: 1 problem" and "problem: too few training images, in tench 1;" in out
    )
    assert is_refused("imagenet", tmp_path)

    for wnid in ("n01443537", "n01484850"):
        shutil.rmtree(train / wnid)
    flat = [path.rename(val / path.name) for path in val.glob("*/*")]
    assert f"the class folders in {val} are empty" in error_of_build("imagenet", tmp_path, None, 1)
    for folder in val.iterdir():
        if folder.is_dir():
            folder.rmdir()
    flat[0].write_bytes(b"")
    code, out = examine("imagenet", tmp_path)
    assert code == 2 and verdict(out) == "imagenet: 3 problems"
    assert f"{train} holds 998 class folders" in out and "(missing: n01443537, n01484850)" in out
    assert f"{val} holds its images unsorted" in out and "run python -m datasets.download imagenet" in out
    assert f"images of 0 bytes: 1 of {1995 + 1000}" in out and f"\n    val/{flat[0].name}\n" in out
    assert is_refused("imagenet", tmp_path)


def variant_folders(name: str) -> tuple[list[str], list[str]]:
    """The class folders of a variant of ImageNet and their class names."""
    wnids, names = imagenet_classes()
    labels = {"imagenet_a": map(int, A_LABELS.split()), "imagenet_r": map(int, R_LABELS.split())}
    chosen = list(labels.get(name, range(1000)))
    return [wnids[label] for label in chosen], [names[label] for label in chosen]


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name in VARIANTS for layout in VARIANTS[name]])
def test_variants_of_imagenet(name, layout, tmp_path, examine):
    folders, names = variant_folders(name)
    if layout.startswith("imagenetv2/"):  # one packaging has the labels for folders, not padded, the other WordNet ids
        folders = [str(label) for label in range(1000)]
    image_root = fabricate_variant(tmp_path, layout, folders)
    (image_root / "README.txt").write_text("ImageNet's authors and ours")
    task = datasets.build(name, tmp_path, None, 1)
    assert task.class_names == tuple(names) and [item.label for item in task.test] == list(range(len(names)))
    assert [item.path for item in task.test] == [f"{folder}/0.jpeg" for folder in folders]
    code, out = examine(name, tmp_path)
    assert code == 0 and verdict(out) == f"{name}: ready, 1 warning"
    assert "class names: as published\n" in out and "shots: none" in out
    assert f"numbers: {len(names)} classes, 0/0/{len(names)} train/val/test images\n" in out
    shutil.rmtree(image_root / folders[7])
    code, out = examine(name, tmp_path)
    assert code == 2 and f"holds {len(names) - 1} class folders instead of {len(names)}" in out
    (image_root / "n0").mkdir()
    code, out = examine(name, tmp_path)
    assert code == 2 and verdict(out) == f"{name}: 1 problem" and "the folder n0 is none of ImageNet's classes" in out
    assert f"images: all {len(names) - 1} are there\n" in out


# --- what is not


def rows(count: int, names: list[str]) -> str:
    parts = {}
    for first, part in enumerate(("train", "val", "test")):
        numbers = range(count * first, count * (first + 1))
        parts[part] = [[f"{name}/{number}.jpg", label, name] for label, name in enumerate(names) for number in numbers]
    return json.dumps(parts)


EUROSAT_NAMES = [
    *("Annual Crop Land", "Forest", "Herbaceous Vegetation Land", "Highway or Road", "Industrial Buildings"),
    *("Pasture Land", "Permanent Crop Land", "Residential Buildings", "River", "Sea or Lake"),
]


def nest(folder: Path) -> None:
    inner = folder.with_name("moving")
    folder.rename(inner)
    folder.mkdir()
    inner.rename(folder / folder.name)


def all_images(root: Path) -> list[Path]:
    return sorted((root / "dtd" / "images").rglob("*.jpg"))


def each(root: Path, change) -> None:
    for image in all_images(root):
        change(image)


def truncate(image: Path) -> None:
    image.write_bytes(image.read_bytes()[:-100])


def break_link(image: Path) -> None:
    image.unlink()
    image.symlink_to("nowhere.jpg")


def write_split(root: Path, content: str) -> None:
    (root / DTD_SPLIT).write_text(content, encoding="utf-8")


MOVE_IMAGES = "move {root}/dtd/images away and run python -m datasets.download dtd --root_path {root}\n"
RUN = "; or run python -m datasets.download dtd --root_path {root}\n"
MOVE_SPLIT = "move {root}/dtd/split_zhou_DescribableTextures.json away and run python -m datasets.download dtd"

# what is done to a good dtd -> the number of problems, whether main.py refuses it too, and what the doctor must say
BREAKAGES = {
    "no root": (shutil.rmtree, 1, True, ["data folder {root} does not exist", RUN]),
    "no folder": (lambda r: shutil.rmtree(r / "dtd"), 1, True, ["no dataset folder in {root}", RUN]),
    "no images": (
        lambda r: shutil.rmtree(r / "dtd" / "images"),
        1,
        True,
        ["image folder not found; looked for {root}/dtd/images", RUN, "numbers: 3 classes, 12/6/6"],
    ),
    "no split": (
        lambda r: (r / DTD_SPLIT).unlink(),
        1,
        True,
        ["split_zhou_DescribableTextures.json not found in {root}/dtd", RUN, "images: all 24 are there"],
    ),
    "neither": (
        lambda r: [shutil.rmtree(r / "dtd" / "images"), (r / DTD_SPLIT).unlink()],
        2,
        True,
        ["image folder not found", "split file split_zhou_DescribableTextures.json not found"],
    ),
    "web page": (lambda r: write_split(r, "\n<!DOCTYPE html><p>Quota"), 1, True, ["is a web page", MOVE_SPLIT]),
    "half a split": (
        lambda r: write_split(r, (r / DTD_SPLIT).read_text()[:500]),
        1,
        True,
        ["is not JSON", MOVE_SPLIT, "images: all 24 are there"],
    ),
    "malformed split": (
        lambda r: write_split(r, '{"train": [["a.jpg", "0", "a"]]}'),
        1,
        True,
        ["train row 0: expected [path, label, class name]", MOVE_SPLIT],
    ),
    "a path that leaves the folder": (
        lambda r: write_split(r, rows(1, ["../a", "b"])),
        1,
        True,
        ["'../a/0.jpg' is not a relative path inside the image folder"],
    ),
    "a path with a zero byte": (
        lambda r: write_split(r, rows(1, ["a\0", "b"])),
        1,
        True,
        ["'a\\x00/0.jpg' is not a relative path inside the image folder"],
    ),
    "another dataset's split": (
        lambda r: write_split(r, rows(2, EUROSAT_NAMES)),
        1,
        True,
        ["has the class names of eurosat, another dataset; move it away and run", "images: all 24 are there"],
    ),
    "emptied": (
        lambda r: [shutil.rmtree(r / "dtd" / "images"), (r / "dtd" / "images").mkdir()],
        1,
        True,
        ["images missing: 24 of 24; {root}/dtd/images is empty; " + MOVE_IMAGES, "and 19 more; --all names them"],
    ),
    "nested": (
        lambda r: nest(r / "dtd" / "images"),
        1,
        True,
        ["images missing: 24 of 24; those of {root}/dtd/images lie one folder too deep, in {root}/dtd/images/images"],
    ),
    "nested class": (
        lambda r: nest(r / "dtd" / "images" / "kind-1"),
        1,
        True,
        ["images missing: 8 of 24; those of {root}/dtd/images/kind-1 lie one folder too deep"],
    ),
    "lost": (
        lambda r: [image.unlink() for image in all_images(r)[:2]],
        1,
        True,
        ["images missing: 2 of 24; " + MOVE_IMAGES, "\n    kind-0/kind-0_0001.jpg\n    kind-0/kind-0_0002.jpg\n"],
    ),
    "upper case": (
        lambda r: each(r, lambda image: image.rename(image.with_suffix(".JPG"))),
        1,
        True,
        ["missing: 24 of 24; file names differ in upper and lower case (kind-0_0001.JPG lies there)"],
    ),
    "empty files": (
        lambda r: [image.write_bytes(b"") for image in all_images(r)[::12]],
        1,
        False,
        [
            "images of 0 bytes: 2 of 24; " + MOVE_IMAGES,
            "\n    kind-0/kind-0_0001.jpg\n",
            "\n    kind-1/kind-1_0013.jpg\n",
        ],
    ),
    "truncated": (
        lambda r: each(r, truncate),
        1,
        False,
        ["damaged images: 9 among 9 of 24 (a sample", "cannot be decoded (image file is truncated", "/images/kind-"],
    ),
    "web pages for images": (
        lambda r: each(r, lambda image: image.write_text("<html>")),
        1,
        False,
        ["damaged images: 9 among 9 of 24", "is empty or no image"],
    ),
    "links to nothing": (
        lambda r: each(r, break_link),
        1,
        False,
        ["images that cannot be opened: 24 of 24", "kind-0/kind-0_0001.jpg (No such file or directory)"],
    ),
    "several at once": (
        lambda r: [
            all_images(r)[0].write_bytes(b""),
            *[image.unlink() for image in all_images(r)[8:16]],
            *[truncate(image) for image in all_images(r)[8:]],
            write_split(r, (r / DTD_SPLIT).read_text().replace("kind_2", "sort_2")),
        ],
        3,
        True,
        ["images missing: 8 of 24", "images of 0 bytes: 1 of 24", "damaged images: 3 among 6 of 24", "warning: "],
    ),
}


@pytest.mark.parametrize("kind", BREAKAGES)
def test_each_breakage_gets_its_diagnosis_and_remedy(kind, tmp_path, examine):
    do, problems, refused, said = BREAKAGES[kind]
    root = tmp_path / "data"
    fabricate("dtd", root)
    do(root)
    code, out = examine("dtd", root)
    assert code == 2 and verdict(out) == f"dtd: {problems} problem{'s' * (problems > 1)}"
    assert out.count("  problem: ") == problems
    for part in said:
        assert part.format(root=root) in out
    assert is_refused("dtd", root) == refused
    assert out.endswith("\n0 of 1 ready; not ready: dtd\n")


def test_nested_folders_of_cars_as_in_kaggles_copy(tmp_path, examine):
    image_root = fabricate("stanford_cars", tmp_path)
    nest(image_root / "cars_train")
    code, out = examine("stanford_cars", tmp_path)
    assert code == 2 and verdict(out) == "stanford_cars: 1 problem"
    assert f"images missing: 18 of 24; those of {image_root / 'cars_train'} lie one folder too deep, in" in out
    assert "run python -m datasets.download stanford_cars" in out


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda f: [(f / "variants.txt").unlink(), (f / "images_variant_val.txt").unlink()],
            "lacks variants.txt, images_",
        ),
        (
            lambda f: (f / "images_variant_test.txt").write_text("0000001 Concorde\n"),
            "'Concorde' is not in variants.txt",
        ),
        (lambda f: (f / "images_variant_val.txt").write_text(""), "images_variant_val.txt lists no images"),
        (lambda f: (f / "images").rename(f / "pictures"), "image folder not found"),
    ],
)
def test_text_files_of_fgvc(change, complaint, tmp_path, examine):
    fabricate("fgvc", tmp_path)
    folder = tmp_path / "fgvc_aircraft"
    change(folder)
    code, out = examine("fgvc", tmp_path)
    assert code == 2 and verdict(out) == "fgvc: 1 problem" and complaint in out and str(folder) in out
    assert "run python -m datasets.download fgvc" in out
    assert ("images: all 24 are there" in out) == (folder / "images").is_dir()
    assert is_refused("fgvc", tmp_path)


def test_folders_that_cannot_be_listed_are_named(tmp_path, monkeypatch, examine):
    image_root = fabricate("dtd", tmp_path)
    locked = str(image_root / "kind-1")
    real_list, real_exists = os.listdir, os.path.exists

    def listdir(path="."):
        if str(path) == locked:
            raise PermissionError(13, "Permission denied", locked)
        return real_list(path)

    monkeypatch.setattr(os, "listdir", listdir)
    assert not is_refused("dtd", tmp_path)  # its files may be opened, only not listed
    assert examine("dtd", tmp_path)[0] == 0
    monkeypatch.setattr(os.path, "exists", lambda path: not str(path).startswith(locked) and real_exists(path))
    code, out = examine("dtd", tmp_path)
    assert code == 2 and verdict(out) == "dtd: 1 problem"
    assert f"folder {locked} cannot be listed (Permission denied); change its permissions" in out
    with pytest.raises(datasets.DatasetError, match=r"kind-1 cannot be listed \(Permission denied\)"):
        datasets.check_images_exist(datasets.build("dtd", tmp_path, 1, 1))


def test_images_listed_twice_are_a_problem_or_a_warning(tmp_path, examine):
    fabricate("dtd", tmp_path)
    split = json.loads((tmp_path / DTD_SPLIT).read_text())
    write_split(tmp_path, json.dumps(split | {"test": split["test"] + split["train"][:2]}))
    code, out = examine("dtd", tmp_path)
    assert code == 2 and "in two parts (2 images in all)" in out
    split["test"] += split["test"][:2]
    write_split(tmp_path, json.dumps(split))
    code, out = examine("dtd", tmp_path)
    assert (
        code == 0 and verdict(out) == "dtd: ready, 2 warnings" and "warning: 2 images are listed more than once" in out
    )


def test_the_sample_takes_three_images_of_each_class_and_all_takes_every_one(tmp_path, examine):
    fabricate("dtd", tmp_path, classes=2, per_class=6)
    found = {(): [], ("--all",): []}
    for image in all_images(tmp_path):
        good = image.read_bytes()
        truncate(image)
        for flags, names in found.items():
            code, out = examine("dtd", tmp_path, *flags)
            if code == 2:
                names.append(image)
                assert f"\n    image {image} cannot be decoded" in out
        image.write_bytes(good)
    assert found[("--all",)] == all_images(tmp_path)
    assert [image.parent.name for image in found[()]] == ["kind-0"] * 3 + ["kind-1"] * 3
    each(tmp_path, lambda image: image.write_bytes(b""))
    out = examine("dtd", tmp_path, "--all")[1]
    assert out.count("\n    kind-") == 12 and "--all" not in out


def test_one_dataset_does_not_stop_the_others(tmp_path, examine):
    fabricate("dtd", tmp_path)
    fabricate("eurosat", tmp_path)
    (tmp_path / DTD_SPLIT).write_text("{")
    code, out = examine("dtd eurosat dtd", tmp_path)
    assert code == 2 and "\ndtd: 1 problem\n" in out and "\neurosat: ready, 1 warning\n" in out
    assert out.endswith("\n1 of 2 ready; not ready: dtd\n")
    code, out = examine("all", tmp_path)
    assert code == 2 and "\n1 of 15 ready; not ready: " in out
    assert all(f"\n{name}: 1 problem\n" in out for name in SPECS if name != "eurosat")


def test_errors_of_the_disk_are_problems_and_unforeseen_ones_keep_their_traceback(tmp_path, monkeypatch, examine):
    fabricate("dtd", tmp_path)

    def fail(error):
        def search(name, root):
            raise error

        monkeypatch.setattr(doctor, "search", search)

    fail(OSError(5, "Input/output error", "/data/dtd"))
    code, out = examine("dtd", tmp_path)
    assert code == 2 and "problem: /data/dtd: Input/output error" in out and verdict(out) == "dtd: 1 problem"
    fail(KeyboardInterrupt())
    assert examine("dtd", tmp_path)[0] == 130
    fail(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        examine("dtd", tmp_path)


def test_bad_arguments(tmp_path, capsys):
    for argv in (["cifar", "--root_path", "."], ["dtd"], ["folder", "dtd", "--root_path", "."], ["--root_path", "."]):
        with pytest.raises(SystemExit) as stop:
            doctor.main(argv)
        assert stop.value.code == 2 and "error: " in capsys.readouterr().err


# --- one's own images


def own(root: Path, classes: dict[str, int]) -> Path:
    for label, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            picture(label, number).save(root / name / f"{number}.jpg")
    return root


def test_own_images_are_ready_and_what_is_done_to_them_is_said(tmp_path, examine):
    root = own(tmp_path / "pets", {"cat": 12, "dog": 40})
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(0, 0).save(root / "cat" / "0.jpg", exif=turned)
    picture(0, 1).convert("RGBA").save(root / "cat" / "clear.png")
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(root / "cat" / "deep.png")
    frames = [picture(0, number).convert("P") for number in range(3)]
    frames[0].save(root / "cat" / "moving.gif", save_all=True, append_images=frames[1:])
    (root / "dog" / "notes\n.txt").write_text("no image")
    code, out = examine("folder", root, "--all")
    assert code == 0 and verdict(out) == "folder: ready"
    assert "numbers: 2 classes, 28/11/16 train/val/test images\n" in out
    assert "up to 8 without repeats; classes with fewer than 16 images: cat 8\n" in out
    assert f"note: {root} names no train, val and test parts" in out and "note: 1 files in" in out
    assert "decoded: 55 of 55, all whole\n" in out
    for kind in ("turned", "transparent", "16 bits", "several pictures"):
        (line,) = [line for line in out.splitlines() if kind in line]
        assert line.startswith("  note: of the images decoded 1 ")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_further_pages_do_not_matter(tmp_path, examine):
    root = own(tmp_path / "pets", {"cat": 3, "dog": 3})
    scan = root / "cat" / "scan.tiff"
    pages = [picture(0, number) for number in range(3)]
    pages[0].save(scan, save_all=True, append_images=pages[1:])
    scan.write_bytes(scan.read_bytes()[: scan.stat().st_size // 2])
    code, out = examine("folder", root, "--all")
    assert code == 0 and "note: of the images decoded 1 have several pictures" in out


def test_own_parts_and_manifests(tmp_path, examine):
    for part in ("train", "test"):
        own(tmp_path / "pets" / part, {"cat": 3, "dog": 2})
    code, out = examine("folder", tmp_path / "pets")
    assert code == 0 and "numbers: 2 classes, 5/0/5 train/val/test images\n" in out and "up to 2 without" in out
    manifest = tmp_path / "pets" / "manifest.csv"
    manifest.write_text(
        "path,class_name,part\ntrain/cat/0.jpg,cat,train\ntrain/dog/0.jpg,dog,train\ntest/cat/9.jpg,cat,test\n"
    )
    code, out = examine("folder", manifest)
    assert code == 2 and verdict(out) == "folder: 1 problem"
    assert "images missing: 1 of 3; put the right files there" in out and "\n    test/cat/9.jpg\n" in out
    manifest.write_text("path,class_name\n/a,cat\nb\\c,dog\n,dog\n")
    code, out = examine("folder", manifest)
    assert (
        code == 2
        and "line 2: '/a' is not a relative path" in out
        and "likewise line 3: " in out
        and "line 4: no path" in out
    )


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ({"cat": 3, "dog": 0, "cow": 3, "hen": 0}, ["class folder {root}/dog holds no images (likewise {root}/hen)"]),
        ({"cat": 3, "dog": 1, "cow": 1}, ["{root}: class 'cow' has one image (likewise 'dog')"]),
        (
            {"a_cat": 3, "a cat": 3, "Dog": 3, "dog": 3},
            ["'a cat' and 'a_cat' read the same in a prompt (likewise 'Dog' and 'dog')"],
        ),
        ({"cat": 3}, ["one folder (cat); it needs one folder of images for each of two or more classes"]),
        ({}, ["{root} does not exist"]),
    ],
)
def test_problems_of_own_images(classes, said, tmp_path, examine):
    root = own(tmp_path / "pets", classes)
    images = sorted(root.rglob("*.jpg"))
    if images:
        images[0].write_bytes(b"")  # told as well, though the folder cannot be read
    code, out = examine("folder", root)
    assert code == 2 and verdict(out) == ("folder: 2 problems" if images else "folder: 1 problem")
    for part in said:
        assert part.format(root=root) in out
    assert ("images of 0 bytes: 1 of" in out) == bool(images)


def test_own_damaged_images_are_named(tmp_path, examine):
    root = own(tmp_path / "pets", {"cat": 3, "dog": 3})
    truncate(root / "cat" / "1.jpg")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(root / "dog" / "x.tiff")
    (root / "dog" / "y\n.jpg").write_bytes(b"")
    code, out = examine("folder", root, "--all")
    assert code == 2 and verdict(out) == "folder: 2 problems"
    assert "images of 0 bytes: 1 of 8; " in out and "\n    dog/y\\n.jpg\n" in out
    assert "damaged images: 2 among 7 of 8; " in out
    assert f"image {root / 'cat' / '1.jpg'} cannot be decoded" in out and "x.tiff" in out and "32-bit" in out
