"""Splits, layouts and few-shot draws, on fabricated datasets with the real folder names and file formats."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
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
    fabricate_variant,
    part_sizes,
)

import datasets
from datasets.fewshot import draw, draw_disjoint
from datasets.specs import SPECS
from datasets.splits import imagenet_classes
from datasets.task import DatasetError, Item, Task

SMALL = tuple(name for name in FOLDERS if name != "imagenet")


# --- names and layouts


def test_available_datasets_are_the_eleven_four_variants_and_two_more():
    names = datasets.available_datasets()
    assert set(names) == {*FOLDERS, *VARIANTS, "digits", "folder"}
    assert len(names) == 17
    assert {name for name in names if datasets.is_test_only(name)} == set(VARIANTS)


@pytest.mark.parametrize("layout", ["coop", "released", "torchvision"])
@pytest.mark.parametrize("name", SMALL)
def test_every_dataset_is_found_in_every_layout(name, layout, tmp_path):
    image_root = fabricate(name, tmp_path, layout, classes=3, per_class=8)
    task = datasets.build(name, tmp_path, shots=2, seed=1)
    assert task.name == name
    assert task.image_root == image_root
    assert task.class_names == tuple(class_name(name, label) for label in range(3))
    for items, per_class in ((task.train, 2), (task.val, 2), (task.test, part_sizes(8)[2])):
        assert Counter(item.label for item in items) == {0: per_class, 1: per_class, 2: per_class}
    paths = [item.path for item in (*task.train, *task.val, *task.test)]
    assert len(set(paths)) == len(paths), "train, val and test share images"
    for item in (task.train[0], task.val[-1], task.test[-1]):
        image = task.read(item)
        assert image.mode == "RGB" and image.size == (40, 32)


@pytest.mark.parametrize("layout", ["coop", "released"])
def test_imagenet_is_listed_from_its_folders(layout, tmp_path):
    image_root = fabricate("imagenet", tmp_path, layout, per_class=3)
    (image_root / "train" / "n01440764" / "README.txt").write_text("not an image")
    task = datasets.build("imagenet", tmp_path, shots=1, seed=1)
    assert (len(task.train), len(task.val), len(task.test)) == (1000, 1000, 1000)
    wnids, names = imagenet_classes()
    assert task.class_names == names
    rng = random.Random(1)
    for label, wnid in enumerate(wnids):  # the picks come from the sorted names, whatever order the disk has
        pick, val_pick = rng.sample([f"train/{wnid}/{wnid}_train_{number}.JPEG" for number in range(3)], 2)
        assert task.train[label] == Item(pick, label)
        assert task.val[label] == Item(val_pick, label)
        assert task.test[label] == Item(f"val/{wnid}/{wnid}_val_0.JPEG", label)
    assert task.image_root == image_root
    assert task.read(task.test[999]).size == (16, 16)
    _imagenet_mistakes(image_root, tmp_path)


def _imagenet_mistakes(image_root: Path, root: Path) -> None:
    """One mistake after the other on the same 1000 folders, which take a second to write."""
    message = error_of_build("imagenet", root, shots=2, seed=1)  # two shots and two for val, but three images
    assert str(image_root / "train" / "n01440764") in message and "4" in message
    folder = image_root / "val" / "n01443537"
    folder.rename(image_root / "val" / "n99999999")
    message = error_of_build("imagenet", root, shots=1, seed=1)
    assert str(image_root / "val") in message and "n01443537" in message
    (image_root / "val").rename(image_root / "sorted")
    assert str(image_root / "val") in error_of_build("imagenet", root, shots=1, seed=1)
    (image_root / "val").mkdir()
    (image_root / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    message = error_of_build("imagenet", root, shots=1, seed=1)
    assert "unsorted" in message and "development kit" in message


def test_sun397_images_and_split_in_different_folders(tmp_path):
    """torchvision gives the image folder the name of the released code's dataset folder."""
    fabricate("sun397", tmp_path, "torchvision")
    (tmp_path / "sun397").mkdir()
    (tmp_path / "SUN397" / SPLIT_FILES["sun397"]).rename(tmp_path / "sun397" / SPLIT_FILES["sun397"])
    task = datasets.build("sun397", tmp_path, shots=1, seed=1)
    assert task.image_root == tmp_path / "SUN397"
    assert task.read(task.train[0]).size == (40, 32)


def test_sun397_without_one_letter_folders_is_not_taken_for_the_image_folder(tmp_path):
    """The released code's dataset folder, images not unpacked yet, looks like torchvision's but for those."""
    (tmp_path / "SUN397").mkdir()
    (tmp_path / "SUN397" / SPLIT_FILES["sun397"]).write_text("{}")
    assert str(tmp_path / "SUN397" / "SUN397") in error_of_build("sun397", tmp_path, 1, 1)


def test_a_complete_layout_is_preferred_to_an_earlier_incomplete_one(tmp_path):
    fabricate("caltech101", tmp_path, "torchvision")
    (tmp_path / "caltech-101" / "101_ObjectCategories").mkdir(parents=True)
    task = datasets.build("caltech101", tmp_path, shots=1, seed=1)
    assert task.image_root == tmp_path / "caltech101" / "101_ObjectCategories"


def test_build_needs_no_image_to_exist(tmp_path):
    image_root = fabricate("dtd", tmp_path)
    for path in image_root.rglob("*.jpg"):
        path.unlink()
    task = datasets.build("dtd", tmp_path, shots=1, seed=1)
    with pytest.raises(DatasetError, match="does not exist"):
        task.read(task.train[0])


def test_other_class_names_than_the_published_are_noted(tmp_path, monkeypatch, capsys):
    fabricate("dtd", tmp_path)
    names = "\n".join(class_name("dtd", label) for label in range(3))
    same = dataclasses.replace(
        SPECS["dtd"], classes=3, sizes=(12, 6, 6), names_sha256=hashlib.sha256(names.encode()).hexdigest()
    )
    monkeypatch.setitem(SPECS, "dtd", same)
    datasets.build("dtd", tmp_path, shots=1, seed=1)
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(SPECS, "dtd", dataclasses.replace(same, names_sha256="0" * 64))
    datasets.build("dtd", tmp_path, shots=1, seed=1)
    assert "not the published ones, the first is 'kind_0'" in capsys.readouterr().err


def test_imagenet_is_tested_on_without_its_training_folder(tmp_path):
    image_root = fabricate("imagenet", tmp_path, per_class=1)
    (image_root / "train").rename(tmp_path / "elsewhere")
    task = datasets.build("imagenet", tmp_path, None, 1)
    assert (len(task.train), len(task.val), len(task.test)) == (0, 0, 1000)


def test_a_split_of_other_size_than_the_published_is_noted(tmp_path, capsys):
    fabricate("dtd", tmp_path)
    datasets.build("dtd", tmp_path, shots=1, seed=1)
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "3 classes and 12/6/6" in message and "47 and 2820/1128/1692" in message


# --- the variants of ImageNet


@pytest.mark.parametrize(("name", "layout"), [(name, place) for name, places in VARIANTS.items() for place in places])
def test_variants_are_found_where_their_archives_put_them(name, layout, tmp_path, capsys):
    wnids, names = imagenet_classes()
    # 200 or all; as text, label 100 comes before 20 and 3
    chosen = range(3, 1000, 5)[:200] if SPECS[name].classes == 200 else range(1000)
    folders = [str(label) if name == "imagenet_v2" else wnids[label] for label in chosen]
    image_root = fabricate_variant(tmp_path, layout, folders[::-1])
    (image_root / ".DS_Store").touch()
    (image_root / "README.txt").touch()
    task = datasets.build(name, tmp_path, None, 1)
    assert task.image_root == image_root and task.train == task.val == ()
    assert task.class_names == tuple(names[label] for label in chosen)
    assert task.test == tuple(Item(f"{folder}/0.jpeg", label) for label, folder in enumerate(folders))
    assert task.read(task.test[0]).size == (16, 16)
    assert f"note: {name}" in capsys.readouterr().err and "train on another data set" in error_of_build(
        name, tmp_path, 1, 1
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_that_lacks_classes_is_refused(name, tmp_path):
    wnids, _ = imagenet_classes()
    fabricate_variant(tmp_path, VARIANTS[name][0], wnids[:199])
    message = error_of_build(name, tmp_path, None, 1)
    assert f"199 class folders instead of {SPECS[name].classes}" in message


def test_all_of_imagenet_v2s_unpadded_folders_have_their_own_labels(tmp_path):
    fabricate_variant(tmp_path, VARIANTS["imagenet_v2"][0], [str(label) for label in range(1000)])
    task = datasets.build("imagenet_v2", tmp_path, None, 1)
    assert task.test == tuple(Item(f"{label}/0.jpeg", label) for label in range(1000))
    assert task.class_names == imagenet_classes()[1]


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (("n01440764", "n99999999"), ("n99999999", "none of ImageNet's classes")),
        (("1", "007"), ("007", "none of ImageNet's classes")),
        (("1", "1000"), ("1000", "none of ImageNet's classes")),
        (("1", "n01443537"), ("folders", "1", "n01443537", "same class")),
        ((), ("no class folders",)),
    ],
)
def test_variants_with_other_folders_are_refused(folders, words, tmp_path):
    image_root = tmp_path / VARIANTS["imagenet_a"][0]
    image_root.mkdir(parents=True)
    fabricate_variant(tmp_path, VARIANTS["imagenet_a"][0], folders)
    message = error_of_build("imagenet_a", tmp_path, None, 1)
    assert str(image_root) in message and all(word in message for word in words)


# --- prompts and class names


def test_prompts():
    assert datasets.build("digits", None, 1, 1).templates == ("a photo of a {}.",)
    assert datasets.build("digits", None, 1, 1, prompts="specific").templates != ("a photo of a {}.",)
    with pytest.raises(ValueError, match="prompts"):
        datasets.build("digits", None, 1, 1, prompts="other")


def test_specific_templates_and_published_sizes(tmp_path):
    fabricate("eurosat", tmp_path)
    assert datasets.build("eurosat", tmp_path, 1, 1).templates == ("a photo of a {}.",)
    specific = datasets.build("eurosat", tmp_path, 1, 1, prompts="specific").templates
    assert specific == ("a centered satellite photo of {}.",)
    templates = {name: spec.templates[0].format("x") for name, spec in SPECS.items() if not spec.is_test_only}
    assert templates == {
        "imagenet": "itap of a x.",
        "sun397": "a photo of a x.",
        "fgvc": "a photo of a x, a type of aircraft.",
        "eurosat": "a centered satellite photo of x.",
        "stanford_cars": "a photo of a x.",
        "food101": "a photo of x, a type of food.",
        "oxford_pets": "a photo of a x, a type of pet.",
        "oxford_flowers": "a photo of a x, a type of flower.",
        "caltech101": "a photo of a x.",
        "dtd": "x texture.",
        "ucf101": "a photo of a person doing x.",
    }
    assert len(SPECS["imagenet"].templates) == 7
    assert all(SPECS[name].templates == ("a photo of a {}.",) for name in VARIANTS)
    totals = {name: sum(spec.sizes) for name, spec in SPECS.items()}
    assert totals == {
        "imagenet": 1331167,
        "sun397": 39700,
        "fgvc": 10000,
        "eurosat": 27000,
        "stanford_cars": 16185,
        "food101": 101000,
        "oxford_pets": 7349,
        "oxford_flowers": 8189,
        "caltech101": 8242,
        "dtd": 5640,
        "ucf101": 13320,
        "imagenet_v2": 10000,
        "imagenet_sketch": 50889,
        "imagenet_a": 7500,
        "imagenet_r": 30000,
    }


def test_fgvc_names_keep_blanks_and_slashes_and_ids_their_zeros(tmp_path):
    fabricate("fgvc", tmp_path)
    task = datasets.build("fgvc", tmp_path, 1, 1)
    assert task.class_names[2] == "Type-2/A 2"
    assert all(len(item.path) == len("0000001.jpg") for item in task.test)


def test_imagenet_classes_are_the_published_ones_with_their_two_duplicates():
    wnids, names = imagenet_classes()

    def digest(lines):
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    assert digest(names) == "571ae1c583b4be7da87519494c52bf405a46af05d5815627c7a0dee997068b60"
    assert digest(wnids) == "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
    assert [label for label, name in enumerate(names) if name == "missile"] == [657, 744]
    assert [label for label, name in enumerate(names) if name == "sunglasses"] == [836, 837]


# --- draws


def reference_draw(train, val, shots, seed):
    """The published procedure spelled out with Python's global generator: seed it, draw val, draw train."""
    before = random.getstate()
    random.seed(seed)
    drawn = []
    for part, k in ((val, min(shots, 4)), (train, shots)):
        labels = []
        for item in part:
            if item.label not in labels:
                labels.append(item.label)
        picks = []
        for label in labels:
            rows = [item for item in part if item.label == label]
            picks += random.sample(rows, k) if len(rows) >= k else random.choices(rows, k=k)
        drawn.append(tuple(picks))
    random.setstate(before)
    return drawn[1], drawn[0]


def make_items(part: str, sizes: dict[int, int]) -> tuple[Item, ...]:
    return tuple(Item(f"{part}/{label}_{i}.jpg", label) for label, size in sizes.items() for i in range(size))


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16])
def test_draws_equal_the_published_procedure(shots, seed):
    # Class order 2, 0, 1 as in the flowers and cars splits; class 1 is short of 8 and 16 shots.
    train, val = make_items("train", {2: 20, 0: 60, 1: 5}), make_items("val", {2: 9, 1: 3, 0: 24})
    few_train, few_val = draw(train, val, shots, seed)
    assert (few_train, few_val) == reference_draw(train, val, shots, seed)
    assert [item.label for item in few_train] == [2] * shots + [0] * shots + [1] * shots
    enough = [item.path for item in few_train if item.label != 1]
    assert len(set(enough)) == len(enough)


def test_draws_are_those_written_down_here():
    """Seed 1 on ten images a class, worked out in an interpreter with random.seed and random.sample."""
    few_train, few_val = draw(make_items("train", {0: 10, 1: 10}), make_items("val", {0: 10, 1: 10}), 2, 1)
    assert [item.path for item in few_val] == ["val/0_2.jpg", "val/0_1.jpg", "val/1_4.jpg", "val/1_1.jpg"]
    assert [item.path for item in few_train] == [
        "train/0_7.jpg",
        "train/0_9.jpg",
        "train/1_7.jpg",
        "train/1_6.jpg",
    ]


def test_draws_leave_the_global_generator_alone_and_do_not_read_it():
    train, val = make_items("train", {0: 10}), make_items("val", {0: 10})
    random.seed(5)
    first = draw(train, val, 4, 1)
    state = random.getstate()
    assert draw(train, val, 4, 1) == first
    assert random.getstate() == state
    assert draw(train, val, 4, 2) != first


def test_imagenet_draws_train_and_val_from_one_sample_per_class():
    pools = [[f"{label}_{i}" for i in range(20)] for label in range(3)]
    train, val = draw_disjoint(pools, shots=8, seed=3)
    rng = random.Random(3)
    for label in range(3):
        sample = rng.sample(pools[label], 12)
        assert list(train[label]) == sample[:8]
        assert list(val[label]) == sample[8:]


def test_shots_above_the_supply_repeat_images_and_val_stays_at_four(tmp_path):
    fabricate("dtd", tmp_path, classes=2, per_class=8)  # four train and two val images per class
    task = datasets.build("dtd", tmp_path, shots=16, seed=1)
    assert Counter(item.label for item in task.train) == {0: 16, 1: 16}
    assert Counter(item.label for item in task.val) == {0: 4, 1: 4}


def test_split_sha256_is_the_documented_hash_and_sees_seed_and_order(tmp_path):
    task = Task("x", ("a", "b"), ("{}",), (Item("p", 0),), (Item("q", 1),), (Item("r", 0), Item("s", 1)), None)
    text = "train\t0\tp\nval\t1\tq\ntest\t0\tr\ntest\t1\ts\n"
    assert task.split_sha256 == hashlib.sha256(text.encode()).hexdigest()
    fabricate("dtd", tmp_path)
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
    sizes = np.bincount(target)
    assert np.array_equal(np.bincount([item.label for item in whole.train]), [round(n * 0.5) for n in sizes])
    assert np.array_equal(np.bincount([item.label for item in whole.val]), [round(n * 0.2) for n in sizes])
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


def test_the_package_imports_no_other_part_of_the_project():
    imported = set()
    for path in Path(datasets.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            imported |= {name.split(".")[0] for name in names}
    assert {"torch", "filelock"} <= imported
    assert not imported & {"clip", "optimizers", "methods", "main", "train", "utils", "run_utils"}
