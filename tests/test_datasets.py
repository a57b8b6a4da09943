"""Splits, layouts and few-shot draws, on fabricated datasets with the real folder names and file formats."""

import ast
import dataclasses
import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from support.fabricate import (
    FOLDERS,
    SPLIT_FILES,
    VARIANTS,
    class_name,
    error_of_build,
    fabricate,
    fabricate_own,
    fabricate_variant,
    variant_labels,
)

import datasets
from datasets.acquire.sources import SOURCES
from datasets.specs import SPECS, names_sha256
from datasets.splits import imagenet_classes
from datasets.task import Item, Task

SMALL = tuple(name for name in FOLDERS if name != "imagenet")


# --- names and layouts


def test_available_datasets_are_the_eleven_four_variants_and_two_more():
    names = datasets.available_datasets()
    assert set(names) == {*FOLDERS, *VARIANTS, "digits", "folder"} and len(names) == 17
    assert {name for name in names if datasets.is_test_only(name)} == set(VARIANTS)


@pytest.mark.parametrize("layout", ["coop", "released", "torchvision"])
@pytest.mark.parametrize("name", SMALL)
def test_every_dataset_is_found_in_every_layout(name, layout, tmp_path):
    image_root = fabricate(name, tmp_path, layout, classes=2, per_class=4)
    task = datasets.build(name, tmp_path, shots=1, seed=1)
    assert task.name == name and task.image_root == image_root
    assert task.class_names == tuple(class_name(name, label) for label in range(2))
    parts = (task.train, task.val, task.test)
    assert all(Counter(item.label for item in items) == {0: 1, 1: 1} for items in parts)
    assert len({item.path for items in parts for item in items}) == 6, "train, val and test share images"
    for items in parts:
        image = task.read(items[-1])
        assert image.mode == "RGB" and image.size == (40, 32)


def test_quirks_of_the_real_splits(tmp_path):
    """Names with slashes and spaces, a folder spelt unlike its files, labels that do not first appear in order."""
    for name in ("fgvc", "ucf101", "stanford_cars"):
        fabricate(name, tmp_path, per_class=4)
    aircraft, frames, cars = (datasets.build(name, tmp_path, 1, 1) for name in ("fgvc", "ucf101", "stanford_cars"))
    assert aircraft.class_names[1] == "Type-1/A 1"
    assert all(len(item.path) == len("0000001.jpg") for item in aircraft.test)
    assert frames.class_names[1] == "Handstand_Pushups"
    assert frames.train[1].path.startswith("Handstand_Pushups/v_HandStandPushups_")
    assert [item.label for item in cars.train] == [2, 1, 0]
    assert cars.train[0].path.startswith("cars_train/") and cars.test[0].path.startswith("cars_test/")


@pytest.mark.parametrize("layout", ["coop", "released"])
def test_imagenet_is_listed_from_its_folders(layout, few_imagenet_classes, tmp_path):
    image_root = fabricate("imagenet", tmp_path, layout, per_class=3)
    (image_root / "train" / "n01440764" / "README.txt").write_text("not an image")
    task = datasets.build("imagenet", tmp_path, shots=1, seed=1)
    wnids, names = imagenet_classes()
    assert task.class_names == names and task.image_root == image_root
    rng = random.Random(1)
    for label, wnid in enumerate(wnids):  # drawn from the sorted names, whatever order the disk has
        train, val = rng.sample([f"train/{wnid}/{wnid}_train_{number}.JPEG" for number in range(3)], 2)
        assert task.train[label] == Item(train, label) and task.val[label] == Item(val, label)
        assert task.test[label] == Item(f"val/{wnid}/{wnid}_val_0.JPEG", label)
    assert (len(task.train), len(task.val), len(task.test)) == (12, 12, 12)
    assert task.read(task.test[11]).size == (16, 16)

    message = error_of_build("imagenet", tmp_path, 2, 1)  # two shots and two for val, but three images
    assert str(image_root / "train" / "n01440764") in message and "4" in message
    (image_root / "train").rename(tmp_path / "elsewhere")
    task = datasets.build("imagenet", tmp_path, None, 1)  # the training folder is not needed
    assert (len(task.train), len(task.val), len(task.test)) == (0, 0, 12)
    val = image_root / "val"
    (val / "n01443537").rename(val / "n99999999")
    message = error_of_build("imagenet", tmp_path, None, 1)
    assert str(val) in message and "n01443537" in message
    val.rename(image_root / "sorted")
    assert str(val) in error_of_build("imagenet", tmp_path, None, 1)
    val.mkdir()
    (val / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    message = error_of_build("imagenet", tmp_path, None, 1)
    assert str(val) in message and "development kit" in message


def test_sun397s_folders_of_one_name(tmp_path):
    """torchvision gives the image folder the name of the released code's dataset folder."""
    fabricate("sun397", tmp_path, "torchvision", per_class=4)
    (tmp_path / "sun397").mkdir()
    split = (tmp_path / "SUN397" / SPLIT_FILES["sun397"]).rename(tmp_path / "sun397" / SPLIT_FILES["sun397"])
    task = datasets.build("sun397", tmp_path, shots=1, seed=1)
    assert task.image_root == tmp_path / "SUN397" and task.read(task.train[0]).size == (40, 32)
    # The released code's folder before its images are unpacked has no one-letter folders.
    (tmp_path / "SUN397" / "a").rename(tmp_path / "elsewhere")
    split.rename(tmp_path / "SUN397" / split.name)
    assert str(tmp_path / "SUN397" / "SUN397") in error_of_build("sun397", tmp_path, 1, 1)


def test_a_complete_layout_is_preferred_and_no_image_needs_to_exist(tmp_path):
    image_root = fabricate("caltech101", tmp_path, "torchvision", per_class=4)
    (tmp_path / "caltech-101" / "101_ObjectCategories").mkdir(parents=True)
    for path in image_root.rglob("*.jpg"):
        path.unlink()
    task = datasets.build("caltech101", tmp_path, shots=1, seed=1)
    assert task.image_root == image_root
    with pytest.raises(datasets.DatasetError, match="does not exist"):
        task.read(task.train[0])


def test_a_split_unlike_the_published_one_is_noted(tmp_path, monkeypatch, capsys):
    fabricate("dtd", tmp_path, classes=2, per_class=4)

    def note():
        datasets.build("dtd", tmp_path, shots=1, seed=1)
        return capsys.readouterr().err

    other_numbers = note()
    assert other_numbers.count("\n") == 1
    assert "2 classes and 4/2/2" in other_numbers and "47 and 2820/1128/1692" in other_numbers
    names = hashlib.sha256(b"kind_0\nkind_1").hexdigest()
    published = dataclasses.replace(SPECS["dtd"], classes=2, sizes=(4, 2, 2), names_sha256=names)
    monkeypatch.setitem(SPECS, "dtd", published)
    assert note() == ""
    monkeypatch.setitem(SPECS, "dtd", dataclasses.replace(published, names_sha256="0" * 64))
    assert "'kind_0'" in note()


# --- the variants of ImageNet


@pytest.mark.parametrize(("name", "layout"), [(name, place) for name, places in VARIANTS.items() for place in places])
def test_variants_are_found_where_their_archives_put_them(name, layout, few_imagenet_classes, tmp_path, capsys):
    wnids, names = imagenet_classes()
    labels = variant_labels(name)  # as text, label 10 comes before 2
    folders = [str(label) if name == "imagenet_v2" else wnids[label] for label in labels]
    image_root = fabricate_variant(tmp_path, layout, folders[::-1])
    (image_root / ".DS_Store").touch()
    (image_root / "README.txt").touch()
    task = datasets.build(name, tmp_path, None, 1)
    assert task.image_root == image_root and task.train == task.val == ()
    assert task.class_names == tuple(names[label] for label in labels)
    assert task.test == tuple(Item(f"{folder}/0.jpeg", label) for label, folder in enumerate(folders))
    assert task.read(task.test[0]).size == (16, 16)
    assert f"note: {name}" in capsys.readouterr().err
    assert "train on another dataset" in error_of_build(name, tmp_path, 1, 1)
    (image_root / folders[2] / "0.jpeg").unlink()
    (image_root / folders[2]).rmdir()
    message = error_of_build(name, tmp_path, None, 1)
    assert f"{len(labels) - 1} class folders instead of {len(labels)}" in message and str(image_root) in message


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (("n01440764", "n99999999"), ["n99999999"]),
        (("1", "007"), ["007"]),
        (("1", "1000"), ["1000"]),
        (("1", "n01443537"), ["1", "n01443537", "same class"]),
        ((), ["no class folders"]),
    ],
)
def test_variants_with_other_folders_are_rejected(folders, words, tmp_path):
    image_root = tmp_path / VARIANTS["imagenet_a"][0]
    image_root.mkdir(parents=True)
    fabricate_variant(tmp_path, VARIANTS["imagenet_a"][0], folders)
    message = error_of_build("imagenet_a", tmp_path, None, 1)
    assert str(image_root) in message and all(word in message for word in words)


# --- evaluating the validation part


def test_the_val_part_can_be_evaluated_instead_of_test(tmp_path):
    for name in ("dtd", "fgvc"):
        fabricate(name, tmp_path, classes=4)
    pets = fabricate_own(tmp_path / "pets", ("ant", "bee", "cat", "dog"))
    for name, root in (("digits", None), ("dtd", tmp_path), ("fgvc", tmp_path), ("folder", pets)):
        usual, same, on_val = (
            datasets.build(name, root, 1, 1, **options) for options in ({}, {"test_part": "test"}, {"test_part": "val"})
        )
        parts, _ = datasets._read(name, Path(root or "."), datasets.OwnImages())
        assert usual == same and usual.test == parts.test and usual.test_part == "test"
        assert on_val.test == parts.val and on_val.test_part == "val" and on_val.test
        assert (on_val.train, on_val.val) == (usual.train, usual.val), "the draws stay"
        assert on_val.split_sha256 != usual.split_sha256 and on_val.test_sha256 != usual.test_sha256
        assert (on_val.data_sha256 != usual.data_sha256) == (name == "folder")
        without_draw = datasets.build(name, root, None, 1, test_part="val")
        assert without_draw.test == parts.val and without_draw.train == without_draw.val == ()
        half = datasets.build(name, root, 1, 1, test_part="val", classes="new")
        first = len(usual.class_names) // 2
        assert [(i.path, i.label + first) for i in half.test] == [
            (i.path, i.label) for i in parts.val if i.label >= first
        ]


def test_datasets_without_a_val_part(few_imagenet_classes, tmp_path, capsys):
    fabricate("imagenet", tmp_path, per_class=2)
    fabricate_variant(tmp_path, VARIANTS["imagenet_a"][0], [imagenet_classes()[0][label] for label in (1, 4, 7, 10)])
    for part in ("train", "test"):
        fabricate_own(tmp_path / "pets" / part)
    for name, root, shots in (
        ("imagenet", tmp_path, 1),
        ("imagenet_a", tmp_path, None),
        ("folder", tmp_path / "pets", 1),
    ):
        message = error_of_build(name, root, shots, 1, test_part="val")
        assert name in message and "--test_part" in message
    fabricate_own(tmp_path / "pets" / "val", ("dog",))
    capsys.readouterr()
    datasets.build("folder", tmp_path / "pets", 1, 1, test_part="val")
    assert "for example cat" in capsys.readouterr().err


# --- prompts and class names


def test_prompts(tmp_path):
    fabricate("eurosat", tmp_path, per_class=4)
    for options, templates in (
        ({}, ("a photo of a {}.",)),
        ({"prompts": "specific"}, ("a centered satellite photo of {}.",)),
        ({"templates": ["{} from above", "{}"]}, ("{} from above", "{}")),
    ):
        assert datasets.build("eurosat", tmp_path, 1, 1, **options).templates == templates
    assert datasets.build("digits", None, 1, 1, prompts="specific").templates != ("a photo of a {}.",)


def test_published_facts_never_change():
    """Sizes, prompts and class names of all datasets, and the checksums of their splits."""
    facts = {name: [spec.classes, spec.sizes, spec.templates, spec.names_sha256] for name, spec in SPECS.items()}
    checksums = {name: source.split_sha256 for name, source in SOURCES.items()}
    text = json.dumps([facts, checksums], sort_keys=True)
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "d93591ddeb3befb9d17c75739699e11b96bec4b784a9c8ade260b124d7904dd5"
    )


def test_imagenet_classes_are_the_published_ones_with_their_two_duplicates():
    wnids, names = imagenet_classes()
    assert names_sha256(names) == SPECS["imagenet"].names_sha256
    assert names_sha256(wnids) == "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
    assert [label for label, name in enumerate(names) if name == "missile"] == [657, 744]
    assert [label for label, name in enumerate(names) if name == "sunglasses"] == [836, 837]


def test_split_sha256_is_the_documented_hash_and_sees_seed_and_order(tmp_path):
    task = Task("x", ("a", "b"), ("{}",), (Item("p", 0),), (Item("q", 1),), (Item("r", 0), Item("s", 1)), None)
    text = "train\t0\tp\nval\t1\tq\ntest\t0\tr\ntest\t1\ts\n"
    assert task.split_sha256 == hashlib.sha256(text.encode()).hexdigest()
    fabricate("dtd", tmp_path, per_class=16)
    first, again, other = (datasets.build("dtd", tmp_path, 1, seed).split_sha256 for seed in (1, 1, 2))
    assert first == again != other


# --- digits


def test_digits_split_is_fixed_and_stratified():
    task = datasets.build("digits", None, shots=4, seed=1)
    assert task.class_names[0] == "zero" and task.class_names[9] == "nine" and len(task.class_names) == 10
    assert (len(task.train), len(task.val), len(task.test)) == (40, 40, 540)
    whole = datasets.digits.split_digits()
    indices = [int(item.path.removeprefix("digits/")) for item in (*whole.train, *whole.val, *whole.test)]
    assert sorted(indices) == list(range(1797))
    assert task.test == whole.test
    assert set(task.train) <= set(whole.train) and set(task.val) <= set(whole.val)
    target = load_digits().target
    assert all(target[int(item.path[-4:])] == item.label for item in (*task.train, *task.test))
    assert Counter(item.label for item in whole.train) == {label: round(n / 2) for label, n in Counter(target).items()}
    # Changes only if the definition of the dataset or the rule of the draws does.
    assert task.split_sha256 == "79c539458fd985fb9434489684ebca68dff09780f596604678b60129eca58d47"


def test_digits_pictures_are_the_data():
    task = datasets.build("digits", "/ignored", shots=1, seed=2)
    data = load_digits().images
    seen = set()
    for item in task.test[:20]:
        image = task.read(item)
        assert image.mode == "RGB" and image.size == (8, 8)
        levels = data[int(item.path[-4:])]
        grey = np.asarray(image)
        assert all(np.array_equal(np.rint(grey[..., channel] * (16 / 255)), levels) for channel in range(3))
        seen |= set(grey.flatten().tolist())
    assert {0, 16, 32, 48, 64, 239, 255} <= seen  # levels 0 to 4, 15 and 16 of 16


# --- structure


def test_the_package_imports_no_other_part_of_the_project_and_heavy_packages_only_in_functions():
    imported, at_import = set(), set()
    for path in Path(datasets.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for names, nodes in ((imported, ast.walk(tree)), (at_import, tree.body)):
            for node in nodes:
                if isinstance(node, ast.Import):
                    names |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    names.add(node.module.partition(".")[0])
    assert {"torch", "common", "fetching", "sklearn", "scipy", "gdown"} <= imported
    project = {path.stem for path in Path(datasets.__file__).parents[1].iterdir() if path.suffix in ("", ".py")}
    assert imported & project == {"common", "fetching"}
    assert at_import & {"sklearn", "scipy", "gdown", "torchvision", "pandas"} == set()
