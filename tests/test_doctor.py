"""The doctor: datasets in every layout are found ready, and each way of being broken gets its diagnosis and remedy."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.fabricate import FOLDERS, SPLIT_FILES, VARIANTS, fabricate, fabricate_variant, picture, variant_labels

import datasets
from datasets.acquire import doctor
from datasets.acquire.sources import SOURCES
from datasets.specs import SPECS, names_sha256
from datasets.splits import imagenet_classes, read_json_split

DTD_SPLIT = Path("dtd", SPLIT_FILES["dtd"])


@pytest.fixture
def examine(capsys):
    """Call the doctor; return (exit code, the line with the verdict on the only dataset, all of stdout)."""

    def call(names, root, *flags):
        try:
            code = doctor.main([*names.split(), "--root_path", str(root), *flags])
        except SystemExit as stop:
            code = stop.code
        out = capsys.readouterr().out
        return code, out.splitlines()[-3] if out.count("\n") > 2 else "", out

    return call


def is_rejected(name: str, root: Path) -> bool:
    """Return whether main.py's check of the data ends in an error."""
    try:
        datasets.check_images_exist(datasets.build(name, root, 1, 1))
    except datasets.DatasetError:
        return True
    return False


# --- what is ready


@pytest.mark.parametrize("name", [name for name in FOLDERS if name != "imagenet"])
def test_every_dataset_is_ready(name, tmp_path, examine):
    for layout in ("coop", "torchvision"):
        root = tmp_path / layout
        image_root = fabricate(name, root, layout, per_class=4)
        assert not is_rejected(name, root)
        code, verdict, out = examine(name, root)
        assert code == 0 and verdict == f"{name}: ready, 1 warning" and out.endswith("\n1 of 1 ready\n")
        assert f"layout: images in {image_root}\n" in out
        assert "numbers: 3 classes, 6/3/3 train/val/test images\n" in out and f"{SPECS[name].classes} and " in out
        assert "images: all 12 exist\n" in out and "decoded: 9 of 12 (a sample" in out and "up to 2 without" in out
        assert ("split: " in out) == (name in SPLIT_FILES)
        assert ("checksum is not known for certain" in out) == (name in ("food101", "sun397"))


def test_published_data_are_ready_without_a_warning(tmp_path, monkeypatch, examine):
    fabricate("dtd", tmp_path, classes=2, per_class=32)
    published = read_json_split(tmp_path / DTD_SPLIT)
    facts = {"classes": 2, "sizes": published.sizes, "names_sha256": names_sha256(published.class_names)}
    monkeypatch.setitem(SPECS, "dtd", dataclasses.replace(SPECS["dtd"], **facts))
    sha256 = hashlib.sha256((tmp_path / DTD_SPLIT).read_bytes()).hexdigest()
    monkeypatch.setitem(SOURCES, "dtd", dataclasses.replace(SOURCES["dtd"], split_sha256=sha256))
    code, verdict, out = examine("dtd", tmp_path)
    assert code == 0 and verdict == "dtd: ready"
    assert f"split: {tmp_path / DTD_SPLIT} (the published file)\n" in out
    assert "2 classes, 32/16/16 train/val/test images, as published\n" in out
    assert "class names: as published\n" in out and "shots: 16 and more\n" in out
    split = json.loads((tmp_path / DTD_SPLIT).read_text())
    write_split(tmp_path, json.dumps(split, indent=1))  # Google Drive's copy may differ in its bytes
    code, verdict, out = examine("dtd", tmp_path)
    assert code == 0 and verdict == "dtd: ready" and "(other bytes than the published file" in out
    for rows in split.values():
        for row in rows:
            row[1:] = [1 - row[1], row[2]]
    write_split(tmp_path, json.dumps(split))  # labels in another order: the draws are others too
    code, verdict, out = examine("dtd", tmp_path)
    assert code == 0 and verdict == "dtd: ready, 1 warning" and "(not the published file)" in out and "'kind_1'" in out


def test_copies_are_named_and_links_are_not_copies(tmp_path, capsys, examine):
    for layout in ("released", "coop"):
        fabricate("oxford_pets", tmp_path, layout, per_class=4)
    code, _, out = examine("oxford_pets", tmp_path)
    assert code == 0 and f"images in {tmp_path / 'oxford_pets' / 'images'}\n" in out
    assert f"note: {tmp_path / 'OxfordPets'} is another copy" in out
    datasets.build("oxford_pets", tmp_path, 1, 1)
    assert f"{tmp_path / 'OxfordPets'} is another copy" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "OxfordPets")
    (tmp_path / "OxfordPets").symlink_to(tmp_path / "oxford_pets", target_is_directory=True)
    code, _, out = examine("oxford_pets", tmp_path)
    assert code == 0 and "another copy" not in out


def test_imagenet(few_imagenet_classes, tmp_path, capsys, examine):
    image_root = fabricate("imagenet", tmp_path, per_class=2)
    assert not is_rejected("imagenet", tmp_path)
    assert "24/0/12 train/val/test images" in capsys.readouterr().err
    code, verdict, out = examine("imagenet", tmp_path)
    assert code == 0 and verdict == "imagenet: ready, 1 warning"
    assert "12 classes, 24/0/12 train/val/test images\n" in out and "1281167/0/50000" in out
    assert "class names: as published\n" in out and "decoded: 36 of 36 (a sample" in out
    assert "up to 1 without repeats; classes with fewer than 20 images: tench 2," in out

    train, val = image_root / "train", image_root / "val"
    (train / "n01440764" / "n01440764_train_0.JPEG").unlink()  # one image is not enough for training and validation
    code, verdict, out = examine("imagenet", tmp_path)
    assert code == 2 and verdict == "imagenet: 1 problem" and "problem: too few training images (tench 1)" in out
    assert is_rejected("imagenet", tmp_path)

    for wnid in ("n01443537", "n01484850"):
        shutil.rmtree(train / wnid)
    flat = [path.rename(val / path.name) for path in val.glob("*/*")]
    code, verdict, out = examine("imagenet", tmp_path)
    assert f"the class folders in {val} are empty" in out
    for folder in val.iterdir():
        if folder.is_dir():
            folder.rmdir()
    flat[0].write_bytes(b"")
    code, verdict, out = examine("imagenet", tmp_path)
    assert code == 2 and verdict == "imagenet: 3 problems"
    assert f"{train} has 10 class folders" in out and "(missing: n01443537, n01484850)" in out
    assert f"{val} has its images unsorted" in out and "run python -m datasets.download imagenet" in out
    assert "images of 0 bytes: 1 of 31" in out and f"\n    val/{flat[0].name}\n" in out
    assert is_rejected("imagenet", tmp_path)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_imagenet(name, few_imagenet_classes, tmp_path, examine):
    wnids, _ = imagenet_classes()
    folders = [wnids[label] for label in variant_labels(name)]
    image_root = fabricate_variant(tmp_path, VARIANTS[name][0], folders)
    code, verdict, out = examine(name, tmp_path)
    assert code == 0 and verdict == f"{name}: ready, 1 warning"
    assert "class names: as published\n" in out and "shots: none" in out
    assert f"numbers: {len(folders)} classes, 0/0/{len(folders)} train/val/test images\n" in out
    (image_root / "n0").mkdir()
    code, verdict, out = examine(name, tmp_path)
    assert code == 2 and verdict == f"{name}: 1 problem" and "the folder n0" in out
    assert f"images: all {len(folders)} exist\n" in out


# --- what is not


def split_text(names: list[str]) -> str:
    parts = {}
    for number, part in enumerate(("train", "val", "test")):
        parts[part] = [[f"{name}/{number}.jpg", label, name] for label, name in enumerate(names)]
    return json.dumps(parts)


def nest(folder: Path) -> None:
    inner = folder.with_name("moving")
    folder.rename(inner)
    folder.mkdir()
    inner.rename(folder / folder.name)


def all_images(root: Path) -> list[Path]:
    return sorted((root / "dtd" / "images").rglob("*.jpg"))


def each(change):
    """A breakage that changes each image."""
    return lambda root: [change(image) for image in all_images(root)]


def truncate(image: Path) -> None:
    image.write_bytes(image.read_bytes()[:-100])


def break_link(image: Path) -> None:
    image.unlink()
    image.symlink_to("nowhere.jpg")


def write_split(root: Path, content: str) -> None:
    (root / DTD_SPLIT).write_text(content, encoding="utf-8")


def with_split(content: str):
    """A breakage that replaces the split."""
    return lambda root: write_split(root, content)


def several(root: Path) -> None:
    images = all_images(root)
    images[0].write_bytes(b"")
    for image in images[4:8]:
        image.unlink()
    for image in images[8:]:
        truncate(image)
    write_split(root, (root / DTD_SPLIT).read_text().replace("kind_2", "sort_2"))


RUN = "run python -m datasets.download dtd --root_path {root}\n"
MOVE_IMAGES = "move {root}/dtd/images away and " + RUN
MOVE_SPLIT = "move {root}/dtd/split_zhou_DescribableTextures.json away and " + RUN
ALL_EXIST = "images: all 12 exist"


def breakage(change, *said: str, problems: int = 1, rejected: bool = True) -> tuple:
    """What is done to a good dtd, what the doctor must print, how many problems, and whether main.py rejects it too."""
    return change, said, problems, rejected


BREAKAGES = {
    "no root": breakage(shutil.rmtree, "data folder {root} does not exist", RUN),
    "no folder": breakage(lambda r: shutil.rmtree(r / "dtd"), "no dataset folder in {root}", RUN),
    "no images": breakage(lambda r: shutil.rmtree(r / "dtd" / "images"), "{root}/dtd/images", RUN, "classes, 6/3/3"),
    "no split": breakage(lambda r: (r / DTD_SPLIT).unlink(), "Textures.json not found in {root}/dtd", RUN, ALL_EXIST),
    "neither": breakage(
        lambda r: [shutil.rmtree(r / "dtd" / "images"), (r / DTD_SPLIT).unlink()], "split file", RUN, problems=2
    ),
    "web page": breakage(with_split("\n<!DOCTYPE html><p>Quota"), "web page", MOVE_SPLIT),
    "half a split": breakage(lambda r: write_split(r, (r / DTD_SPLIT).read_text()[:300]), MOVE_SPLIT, ALL_EXIST),
    "another split": breakage(with_split(split_text(imagenet_classes()[1])), "class names of imagenet", ALL_EXIST),
    "emptied": breakage(
        lambda r: [shutil.rmtree(r / "dtd" / "images"), (r / "dtd" / "images").mkdir()],
        "images missing: 12 of 12; {root}/dtd/images is empty; " + MOVE_IMAGES,
        "and 7 more; --all names",
    ),
    "nested": breakage(
        lambda r: nest(r / "dtd" / "images"),
        "missing: 12 of 12; those of {root}/dtd/images are one folder too deep, in {root}/dtd/images/images",
    ),
    "nested class": breakage(
        lambda r: nest(r / "dtd" / "images" / "kind-1"),
        "missing: 4 of 12; those of {root}/dtd/images/kind-1 are one folder too deep",
    ),
    "lost": breakage(
        lambda r: [image.unlink() for image in all_images(r)[:2]],
        "missing: 2 of 12; " + MOVE_IMAGES,
        "\n    kind-0/kind-0_0001.jpg\n    kind-0/kind-0_0002.jpg\n",
    ),
    "upper case": breakage(
        each(lambda image: image.rename(image.with_suffix(".JPG"))), "missing: 12 of 12", "(kind-0_0001.JPG exists)"
    ),
    "empty files": breakage(
        lambda r: [image.write_bytes(b"") for image in all_images(r)[::8]],
        "images of 0 bytes: 2 of 12; " + MOVE_IMAGES,
        "\n    kind-0/kind-0_0001.jpg\n    kind-2/kind-2_0009.jpg\n",
        rejected=False,
    ),
    "truncated": breakage(each(truncate), "damaged images: 9 among 9 of 12 (a sample", "/images/kind-", rejected=False),
    "links to nothing": breakage(
        each(break_link),
        "images that cannot be opened: 12 of 12",
        "kind-0/kind-0_0001.jpg (No such file or directory)",
        rejected=False,
    ),
    "several": breakage(
        several, "missing: 4 of 12", "0 bytes: 1 of 12", "damaged images: 3 among 6", "warning: ", problems=3
    ),
}


@pytest.mark.parametrize(("change", "said", "problems", "rejected"), BREAKAGES.values(), ids=BREAKAGES)
def test_each_breakage_gets_its_diagnosis_and_remedy(change, said, problems, rejected, tmp_path, examine):
    root = tmp_path / "data"
    fabricate("dtd", root, per_class=4)
    change(root)
    code, verdict, out = examine("dtd", root)
    assert code == 2 and verdict == f"dtd: {problems} problem{'s' * (problems > 1)}"
    assert out.count("  problem: ") == problems
    for part in said:
        assert part.format(root=root) in out
    assert is_rejected("dtd", root) == rejected
    assert out.endswith("\n0 of 1 ready; not ready: dtd\n")


def test_images_in_a_folder_without_permissions_are_named(tmp_path, monkeypatch, examine):
    image_root = fabricate("dtd", tmp_path, per_class=4)
    locked = str(image_root / "kind-1")

    def lock(function):
        def locked_function(path=".", **options):
            if str(path).startswith(locked):
                raise PermissionError(13, "Permission denied", locked)
            return function(path, **options)

        return locked_function

    monkeypatch.setattr(os, "listdir", lock(os.listdir))
    assert not is_rejected("dtd", tmp_path)  # its files can be opened, only not listed
    assert examine("dtd", tmp_path)[0] == 0
    monkeypatch.setattr(os, "stat", lock(os.stat))
    code, verdict, out = examine("dtd", tmp_path)
    assert code == 2 and verdict == "dtd: 1 problem" and "cannot be opened: 4 of 12; correct their links or perm" in out
    assert "\n    kind-1/kind-1_0005.jpg (Permission denied)\n" in out and is_rejected("dtd", tmp_path)


def test_images_listed_twice_are_a_problem_or_a_warning(tmp_path, examine):
    fabricate("dtd", tmp_path, per_class=4)
    split = json.loads((tmp_path / DTD_SPLIT).read_text())
    write_split(tmp_path, json.dumps(split | {"test": split["test"] + split["train"][:2]}))
    code, _, out = examine("dtd", tmp_path)
    assert code == 2 and "in two parts (2 such images)" in out
    write_split(tmp_path, json.dumps(split | {"test": split["test"] + split["test"][:2]}))
    code, verdict, out = examine("dtd", tmp_path)
    assert code == 0 and verdict == "dtd: ready, 2 warnings" and "warning: 2 images listed more than once" in out


def test_the_sample_takes_three_images_of_each_class_and_all_takes_every_one(tmp_path, examine):
    fabricate("dtd", tmp_path, classes=2, per_class=5)
    found = {(): [], ("--all",): []}
    for image in all_images(tmp_path):
        good = image.read_bytes()
        truncate(image)
        for flags, names in found.items():
            code, _, out = examine("dtd", tmp_path, *flags)
            if code == 2:
                names.append(image)
                assert f"\n    image {image} cannot be decoded" in out
        image.write_bytes(good)
    assert found[("--all",)] == all_images(tmp_path)
    assert [image.parent.name for image in found[()]] == ["kind-0"] * 3 + ["kind-1"] * 3
    each(lambda image: image.write_bytes(b""))(tmp_path)
    out = examine("dtd", tmp_path, "--all")[2]
    assert out.count("\n    kind-") == 10 and "--all" not in out


def test_one_dataset_does_not_stop_the_others(tmp_path, examine):
    fabricate("dtd", tmp_path, per_class=4)
    fabricate("eurosat", tmp_path, per_class=4)
    write_split(tmp_path, "{")
    code, _, out = examine("dtd eurosat dtd", tmp_path)
    assert code == 2 and "\ndtd: 1 problem\n" in out and "\neurosat: ready, 1 warning\n" in out
    assert out.endswith("\n1 of 2 ready; not ready: dtd\n")
    code, _, out = examine("all", tmp_path)
    assert code == 2 and "\n1 of 15 ready; not ready: " in out
    assert all(f"\n{name}: 1 problem\n" in out for name in SPECS if name != "eurosat")


def test_errors_of_the_disk_are_problems_and_unforeseen_ones_keep_their_traceback(tmp_path, monkeypatch, examine):
    def fail(error):
        def search(name, root):
            raise error

        monkeypatch.setattr(doctor, "search", search)

    fail(OSError(5, "Input/output error", "/data/dtd"))
    code, verdict, out = examine("dtd", tmp_path)
    assert code == 2 and verdict == "dtd: 1 problem" and "problem: /data/dtd: Input/output error" in out
    fail(KeyboardInterrupt())
    assert examine("dtd", tmp_path)[0] == 130
    fail(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        examine("dtd", tmp_path)


# --- your own images


def own(root: Path, classes: dict[str, int]) -> Path:
    for label, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            picture(label, number).save(root / name / f"{number}.jpg")
    return root


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_own_images_are_ready_and_their_conversions_are_counted(tmp_path, examine):
    root = own(tmp_path / "pets", {"cat": 12, "dog": 20})
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(0, 0).save(root / "cat" / "0.jpg", exif=turned)
    picture(0, 1).convert("RGBA").save(root / "cat" / "clear.png")
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(root / "cat" / "deep.png")
    pages = [picture(0, number) for number in range(3)]
    pages[0].save(root / "cat" / "scan.tiff", save_all=True, append_images=pages[1:])
    scan = root / "cat" / "scan.tiff"
    scan.write_bytes(scan.read_bytes()[: scan.stat().st_size // 2])  # damaged further pages do not matter
    (root / "dog" / "notes\n.txt").write_text("not an image")
    code, verdict, out = examine("folder", root, "--all")
    assert code == 0 and verdict == "folder: ready"
    assert "numbers: 2 classes, 18/7/10 train/val/test images\n" in out
    assert "up to 8 without repeats; classes with fewer than 16 images: cat 8, dog 10\n" in out
    assert f"note: {root} has no train, val and test parts" in out and "note: 1 file in" in out
    assert "decoded: 35 of 35, none damaged\n" in out
    for kind in ("turned", "transparent", "16 bits", "several images"):
        (line,) = [line for line in out.splitlines() if kind in line]
        assert line.startswith("  note: of the decoded images, 1 ")


def test_own_parts_and_manifests(tmp_path, examine):
    own(tmp_path / "pets" / "train", {"cat": 3, "dog": 2})
    own(tmp_path / "pets" / "test", {"cat": 3})
    code, _, out = examine("folder", tmp_path / "pets")
    assert code == 0 and "numbers: 2 classes, 5/0/3 train/val/test images\n" in out and "up to 2 without" in out
    assert f"note: {tmp_path / 'pets'}: no images of 1 class are" in out
    manifest = tmp_path / "pets" / "manifest.csv"
    rows = ("path,class_name,part", "train/cat/0.jpg,cat,train", "train/dog/0.jpg,dog,train", "test/cat/9.jpg,cat,test")
    manifest.write_text("\n".join(rows))
    code, verdict, out = examine("folder", manifest)
    assert code == 2 and verdict == "folder: 1 problem"
    assert "images missing: 1 of 3; " in out and "\n    test/cat/9.jpg\n" in out
    manifest.write_text("path,class_name\n/a,cat\nb\\c,dog\n,dog\n")
    code, _, out = examine("folder", manifest)
    assert code == 2 and "line 2: '/a'" in out and "line 3: " in out and "line 4: no path" in out


def test_problems_of_own_images(tmp_path, examine):
    for number, (classes, said) in enumerate(
        (
            ({"cat": 3, "dog": 0, "cow": 3, "hen": 0}, "class folder {root}/dog has no images (also {root}/hen)"),
            ({"cat": 3, "dog": 1, "cow": 1}, "{root}: class 'cow' has one image (also 'dog')"),
            ({"a_cat": 3, "a cat": 3, "Dog": 3, "dog": 3}, "'a cat' and 'a_cat' give the same prompt (also 'Dog' and"),
        )
    ):
        root = own(tmp_path / str(number), classes)
        min(root.rglob("*.jpg")).write_bytes(b"")  # reported too, though the folder cannot be read
        code, verdict, out = examine("folder", root)
        assert code == 2 and verdict == "folder: 2 problems"
        assert said.format(root=root) in out and "images of 0 bytes: 1 of" in out
    assert examine("folder", tmp_path / "nowhere")[1] == "folder: 1 problem"


def test_own_damaged_images_are_named(tmp_path, examine):
    root = own(tmp_path / "pets", {"cat": 3, "dog": 3})
    truncate(root / "cat" / "1.jpg")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(root / "dog" / "x.tiff")
    (root / "dog" / "y\n.jpg").write_bytes(b"")
    code, verdict, out = examine("folder", root, "--all")
    assert code == 2 and verdict == "folder: 2 problems"
    assert "images of 0 bytes: 1 of 8; " in out and "\n    dog/y\\n.jpg\n" in out
    assert "damaged images: 2 among 7 of 8; " in out
    assert f"image {root / 'cat' / '1.jpg'} cannot be decoded" in out and "x.tiff" in out and "32 bits" in out
