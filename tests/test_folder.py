"""One's own images: class folders, parts and manifests from the disk to a row of results."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from support.fabricate import error_of_build, fabricate_own, picture
from support.runs import refused

import datasets
import datasets.folder
from configs.settings import own_data_name
from datasets.manifest import check_names, divide_class, read_manifest
from datasets.task import DatasetError, Item, check_images_exist

PROJECT = Path(datasets.__file__).resolve().parents[1]
OWN = ("--dataset", "folder", "--backbone", "tiny", "--shots", 1, "--total_iters", 2, "--workers", 0)


def own(root, shots=1, **options) -> datasets.Task:
    return datasets.build("folder", root, shots, 1, **options)


def whole(root) -> dict[str, list[tuple[str, int]]]:
    """Path and label of all images in each part."""
    split, _ = datasets.folder.read_folder(Path(root))
    return {part: [(i.path, i.label) for i in getattr(split, part)] for part in ("train", "val", "test")}


def lines(name: str, *rows: str) -> Path:
    """Writes a text file."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


# --- from the disk to a row of results.csv


def test_images_of_all_formats_are_found_in_a_fresh_process(tmp_path):
    """Pillow knows no format at its start, and one that a test wrote a picture in from then on."""
    for number, ending in enumerate("png jpg jpeg webp bmp JPG".split() * 2):
        for label, name in enumerate(("cat", "dog")):
            path = tmp_path / "photos" / name / f"{number}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(label, number).save(path)
    (tmp_path / "photos" / "cat" / "notes.txt").touch()
    command = [sys.executable, "-m", "datasets.doctor", "folder", "--root_path", tmp_path / "photos"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 classes, 12/4/8 train/val/test images" in done.stdout
    assert "1 files" in done.stdout and "notes.txt" in done.stdout


def test_every_form_goes_through_training_to_a_row(run_main):
    fabricate_own("folders", per_class=10)
    parts = whole("folders")
    rows = [(path, label, ("cat", "dog")[label], part) for part in parts for path, label in parts[part]]
    for path, _, _, part in rows:
        target = Path("parts", part, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(Path("folders", path).read_bytes())
    forms = {"folders": "folders", "parts": "parts"}
    for form in ("csv", "json", "coop"):
        forms[form] = f"folders/{form}.{'csv' if form == 'csv' else 'json'}"
    with open(forms["csv"], "w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "class_name", "part"), *rows])
    Path(forms["json"]).write_text(
        json.dumps([dict(zip(("path", "label", "class_name", "part"), row)) for row in rows])
    )
    coop = {part: [[path, label, name] for path, label, name, p in rows if p == part] for part in parts}
    Path(forms["coop"]).write_text(json.dumps(coop))
    accuracies, splits = set(), {}
    for form, root in forms.items():
        code, record, _, err = run_main(*OWN, "--root_path", root, "--shots", 2)
        assert code == 0 and ("divided" in err) == (form == "folders")
        assert (record["dataset"], record["root_path"]) == ("folder", str(Path(root).resolve()))
        split = json.loads(Path("results", record["run_id"], "split.json").read_text())
        assert [len(split[part]) for part in ("train", "val", "test")] == [4, 4, 6]
        assert split["class_names"] == ["cat", "dog"]
        splits[form] = [[[path.split("/", 1)[1] if form == "parts" else path, label] for path, label in split[part]]
                        for part in ("train", "val", "test")]  # fmt: skip
        accuracies.add((record["zero_shot_accuracy"], record["test_accuracy"], record["final_loss"]))
    table = pd.read_csv("results/results.csv")
    assert sorted(table.root_path) == sorted(str(Path(root).resolve()) for root in forms.values())
    assert set(table.dataset) == set(table.test_dataset) == {"folder"} and table.run_id.is_unique
    drawn = {form: [sorted(part) for part in split] for form, split in splits.items()}
    assert drawn["csv"] == drawn["json"] == drawn["coop"] == drawn["folders"]
    assert len({json.dumps(split) for form, split in splits.items() if form in ("csv", "json", "coop", "folders")}) == 1
    assert drawn["parts"][2] == drawn["csv"][2], "the test parts hold the same images"
    assert len(accuracies) <= 2, "the same images in the same order give the same results"


def test_a_finished_run_is_run_again_when_names_or_images_changed(run_main):
    fabricate_own("pets")
    flags = (*OWN, "--root_path", "pets")
    _, first, _, _ = run_main(*flags)
    assert "already done" in run_main(*flags)[2]
    assert "already done" in run_main(*OWN, "--root_path", Path("pets").resolve())[2]
    lines("pets/classnames.txt", "cat small lion", "dog tame wolf")
    _, renamed, out, _ = run_main(*flags)
    assert "already done" not in out
    assert renamed["run_id"] == first["run_id"] and renamed["split_sha256"] == first["split_sha256"]
    assert renamed["data_sha256"] != first["data_sha256"]
    drawn = json.loads(Path("results", first["run_id"], "split.json").read_text())
    for part in ("train", "test"):
        picture(5, 5, (13, 13)).save(Path("pets", drawn[part][0][0]))
        assert "already done" not in run_main(*flags)[2], f"an image of {part} changed"
    assert "already done" in run_main(*flags)[2]


def test_two_folders_of_one_name_are_two_data_sets(run_main):
    for place in ("here", "there"):
        fabricate_own(f"{place}/pets", per_class=6 if place == "here" else 8)
    records = [run_main(*OWN, "--root_path", f"{place}/pets")[1] for place in ("here", "there")]
    assert records[0]["run_id"] != records[1]["run_id"] and len(pd.read_csv("results/results.csv")) == 2


def test_weights_of_ones_own_data_have_a_place_of_their_own(tmp_path):
    for name in ("pets.v1", "pets.v2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.csv").touch()
    names = {own_data_name(str(tmp_path / name)) for name in ("pets.v1", "pets.v2", "pets.v1/manifest.csv")}
    assert names == {"pets.v1", "pets.v2", "pets.v1-manifest"}
    assert own_data_name(str(tmp_path / "pets.v1" / ".." / "my pets\n\udcff/é")) == "é"
    assert own_data_name(str(tmp_path / "my pets\n\udcff")) == "my_pets__"


def test_weights_evaluated_on_another_division_are_called_out(run_main):
    fabricate_own("pets")
    flags = (*OWN, "--root_path", "pets", "--save_path", "saved")
    _, trained, _, _ = run_main(*flags)
    _, same, _, err = run_main(*flags, "--eval_only")
    assert same["test_accuracy"] == trained["test_accuracy"] and "another split" not in err
    split = Path("results", trained["run_id"], "split.json").read_bytes()
    picture(0, 9, (12, 12)).save("pets/cat/new.png")  # and every image of the class may change its part
    _, moved, _, err = run_main(*flags, "--eval_only")
    assert moved["split_sha256"] != trained["split_sha256"] and "another split of pets" in err and "--split" in err
    Path("old.json").write_bytes(split)
    _, replayed, _, err = run_main(*flags, "--eval_only", "--split", "old.json")
    assert replayed["split_sha256"] == trained["split_sha256"] and "another split" not in err
    assert replayed["test_accuracy"] == trained["test_accuracy"]


def test_odd_file_names_go_all_the_way(run_main):
    root = fabricate_own(os.fsdecode(b"my \xff pets"))
    for number, name in enumerate(["größe 1.png", "new\nline.png", os.fsdecode(b"bad\xfe.png"), "tab\t.png", "猫.PNG"]):
        picture(0, number, (12, 12)).save(root / "cat" / name, "PNG")
    flags = (*OWN, "--root_path", root, "--shots", 8)
    code, record, _, _ = run_main(*flags, "--save_path", "saved")
    assert code == 0 and record["root_path"].endswith("my \\xff pets")
    assert pd.read_csv("results/results.csv").root_path[0].endswith("my \\xff pets")
    assert [p.name for p in Path("saved/tiny").iterdir()] == ["folder-my___pets"]
    split = Path("results", record["run_id"], "split.json")
    assert "bad\\udcfe.png" in split.read_text(encoding="utf-8")
    code, again, _, _ = run_main(*flags, "--split", split)
    assert code == 0 and again["split_sha256"] == record["split_sha256"]
    (root / "cat" / "new\nline.png").write_bytes(b"")
    code, _, _, err = run_main(*flags, "--force")
    assert code == 2 and "new\\nline.png is empty" in err


# --- folders


def test_folders_are_divided_as_coop_divides_and_always_in_the_same_way(tmp_path, monkeypatch, capsys):
    fabricate_own(tmp_path, ("cat", "dog", "eel"), per_class=10)
    parts = whole(tmp_path)
    assert "divided 50/20/30 %" in capsys.readouterr().err
    counts = {part: Counter(label for _, label in items) for part, items in parts.items()}
    assert counts == {part: {0: n, 1: n, 2: n} for part, n in (("train", 5), ("val", 2), ("test", 3))}
    assert len({path for items in parts.values() for path, _ in items}) == 30
    assert all(path.startswith(("cat/", "dog/", "eel/")[label]) for items in parts.values() for path, label in items)
    assert own(tmp_path).test == datasets.build("folder", tmp_path, 2, seed=7).test
    scan = datasets.folder._scan
    monkeypatch.setattr(datasets.folder, "_scan", lambda folder: scan(folder)[::-1])
    assert whole(tmp_path) == parts, "the disk's order shows"
    fabricate_own(tmp_path, ("ant",), per_class=4)
    lines(tmp_path / "classnames.txt", "ant x", "cat y", "dog z", "eel w")
    assert [path for path, label in whole(tmp_path)["test"] if label == 1] == [
        p for p, label in parts["test"] if not label
    ]


def test_the_division_of_a_class():
    for n in range(2, 40):
        paths = [f"{i:02d}" for i in range(n)]
        train, val, test = divide_class(paths[::-1])
        assert sorted(train + val + test) == paths and train and test
        assert (len(val), len(test)) == (round(n / 5), round(0.3 * n))
    # Written down once: another rule would silently make other parts of old data.
    assert divide_class(list("0123456789")) == (list("35187"), list("24"), list("690"))


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "valid", "TESTING"), ("train", None, "test")])
def test_parts_are_known_by_their_usual_names(names, tmp_path, monkeypatch):
    for name, per_class in zip(names, (4, 3, 2)):
        if name:
            fabricate_own(tmp_path / name, per_class=per_class)
    parts = whole(tmp_path)
    assert [len(parts[part]) for part in parts] == [8, 6 if names[1] else 0, 4]
    assert all(path.startswith(f"{name}/") for name, part in zip(names, parts) for path, _ in parts[part])
    task = own(tmp_path, shots=2)
    scan = datasets.folder._scan
    monkeypatch.setattr(datasets.folder, "_scan", lambda folder: scan(folder)[::-1])
    assert own(tmp_path, shots=2) == task, "the disk's order shows"
    assert task.class_names == ("cat", "dog") and {i.path.split("/")[0] for i in task.train} == {names[0]}
    assert len(task.val) == (4 if names[1] else 0)
    check_images_exist(task)


def test_a_class_without_test_images_is_noted(tmp_path, capsys):
    fabricate_own(tmp_path / "train", ("cat", "dog", "eel"))
    fabricate_own(tmp_path / "test", ("cat", "eel"))
    assert own(tmp_path).class_names == ("cat", "dog", "eel")
    assert "no test images of 1 classes, dog for one" in capsys.readouterr().err
    assert {item.label for item in own(tmp_path).test} == {0, 2}


def test_a_class_may_be_called_train(tmp_path):
    fabricate_own(tmp_path, ("bus", "train"))
    assert own(tmp_path).class_names == ("bus", "train")


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (("val", "test"), ("no train folder", "divided")),
        (("train",), ("no test folder", "divided")),
        (("train", "dev"), ("no test folder",)),
        (("train", "Train", "test"), ("Train and train", "same part")),
        (("train", "test", "extra"), ("train", "extra", "manifest.csv")),
        (("test", "."), ("test", "cat", "manifest.csv")),  # class folders, and test images put aside
    ],
)
def test_what_may_be_meant_as_parts_is_never_taken_for_classes(folders, words, tmp_path):
    for folder in folders:
        fabricate_own(tmp_path / folder)
    message = error_of_build("folder", tmp_path, 1, 1)
    assert str(tmp_path) in message and all(word in message for word in words), message


def test_parts_that_hold_images_themselves_are_no_classes_either(tmp_path):
    fabricate_own(tmp_path, ("cat", "test", "train"))
    assert "(test, train) and other folders beside them (cat)" in error_of_build("folder", tmp_path, 1, 1)


@pytest.mark.parametrize("name", ["eel", "Cat"])
@pytest.mark.parametrize("part", ["val", "test"])
def test_a_class_that_train_does_not_know_is_refused(name, part, tmp_path):
    for folder in ("train", "val", "test"):
        fabricate_own(tmp_path / folder)
    fabricate_own(tmp_path / part, (name,))
    message = error_of_build("folder", tmp_path, 1, 1)
    assert f"{tmp_path / part / name}: {tmp_path / 'train'} has no class of this name" in message


def test_features_of_images_that_are_read_otherwise_are_not_taken_from_the_cache(tmp_path):
    task = own(fabricate_own(tmp_path))
    published = datasets.Task(*(getattr(task, field.name) for field in dataclasses.fields(task)))
    assert published.fingerprint(task.test) != task.fingerprint(task.test)
    assert own(Path(os.path.relpath(tmp_path))).fingerprint(task.test) == task.fingerprint(task.test)


def test_hidden_and_foreign_files_are_left_out_and_the_latter_counted_once(tmp_path, capsys):
    fabricate_own(tmp_path)
    images = whole(tmp_path)
    assert "left out" not in capsys.readouterr().err
    for folder in ("__MACOSX/cat", ".git", "cat/.thumbnails", "cat/@eaDir/0.png"):
        (tmp_path / folder).mkdir(parents=True)
        picture(1, 1).save(tmp_path / folder / "x.png")
    for name in (".DS_Store", "cat/._0.png", "dog/.hidden.png"):
        (tmp_path / name).write_bytes(b"x")
    assert whole(tmp_path) == images and "left out" not in capsys.readouterr().err
    for name in ("cat/Thumbs.db", "dog/Thumbs.db", "dog/notes.txt", "stray.png"):
        (tmp_path / name).write_bytes(b"x")
    assert whole(tmp_path) == images
    err = capsys.readouterr().err
    assert err.count("left out") == 1 and "4 files" in err and "cat/Thumbs.db for one" in err


def test_images_in_subfolders_and_in_a_folder_that_is_called_like_one(tmp_path):
    fabricate_own(tmp_path, per_class=2)
    for name in ("cat/old/deep/a.JPG", "cat/x.jpg/b.jpeg"):
        (tmp_path / name).parent.mkdir(parents=True)
        picture(0, 7).save(tmp_path / name, "JPEG")
    paths = {path for items in whole(tmp_path).values() for path, label in items if label == 0}
    assert paths == {"cat/0.png", "cat/1.png", "cat/old/deep/a.JPG", "cat/x.jpg/b.jpeg"}


def test_a_folder_of_100000_images_is_listed_without_asking_for_each(tmp_path, monkeypatch):
    class Entry:
        def __init__(self, folder, name):
            self.name, self.path, self.folder = name, f"{folder}/{name}", "." not in name

        def is_dir(self):
            return self.folder

        def is_symlink(self):
            return False

    def scan(folder):
        names = ("cat", "dog") if Path(folder) == tmp_path else (f"{i}.jpg" for i in range(50_000))
        return [Entry(folder, name) for name in names]

    def asked(path):
        pytest.fail(f"{path} was asked for")

    monkeypatch.setattr(datasets.folder, "_scan", scan)
    task = own(tmp_path, shots=16)
    assert (len(task.train), len(task.test)) == (32, 30_000)
    monkeypatch.setattr(os, "listdir", lambda folder: [f"{i}.jpg" for i in range(50_000)])
    monkeypatch.setattr(os.path, "exists", asked)
    check_images_exist(task)


# --- links


def test_links_are_followed(tmp_path, run_main):
    fabricate_own(tmp_path / "elsewhere", ("felines",))
    fabricate_own(tmp_path / "pets", ("dog",))
    (tmp_path / "pets" / "cat").symlink_to(tmp_path / "elsewhere" / "felines")
    picture(1, 1).save(tmp_path / "single.png")
    (tmp_path / "pets" / "dog" / "link.png").symlink_to(tmp_path / "single.png")
    (tmp_path / "pets" / "dog" / "loop").symlink_to("loop")
    (tmp_path / "all").symlink_to("pets")
    parts = whole(tmp_path / "all")
    paths = {path for items in parts.values() for path, _ in items}
    assert {"cat/0.png", "dog/link.png"} <= paths and len(paths) == 13
    assert run_main(*OWN, "--root_path", "all")[0] == 0


@pytest.mark.parametrize(
    ("link", "target", "named"),
    [
        ("cat/loop", "..", "cat/loop links to a folder"),
        ("cat/loop", "../cat", "cat/loop links to a folder"),
        ("all", ".", "all links to a folder"),
        ("dog/up", "../..", "links to a folder"),
        ("cat/latest.png", "3.png", "cat/3.png and"),
        ("cat/latest.png", "../dog/3.png", "cat/latest.png and"),
        ("puppy", "dog", "puppy/"),
    ],
)
def test_links_that_list_a_file_twice_are_refused(link, target, named, tmp_path):
    root = fabricate_own(tmp_path / "pets")
    (root / link).symlink_to(target)
    message = error_of_build("folder", root, 1, 1)
    assert f"{root}/" in message and named in message and "remove the link" in message


def test_a_test_part_that_is_also_val_is_refused(tmp_path):
    fabricate_own(tmp_path / "train")
    fabricate_own(tmp_path / "test")
    (tmp_path / "val").symlink_to("test")
    assert "test/cat/" in error_of_build("folder", tmp_path, 1, 1)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_link_to_nowhere_stops_before_training(part, run_main):
    for folder in ("pets/train", "pets/test"):
        fabricate_own(folder, per_class=1)
    link = Path("pets", part, "cat", "0.png")
    link.unlink()
    link.symlink_to("nowhere.png")
    assert str(link) in refused(run_main(*OWN, "--root_path", "pets"), ["pets"])


# --- class names


def test_folders_whose_names_read_the_same_are_refused_or_renamed(tmp_path):
    fabricate_own(tmp_path, ("Cat", "cat", "dog"))
    message = error_of_build("folder", tmp_path, 1, 1)
    assert "'Cat'" in message and "'cat'" in message and "merge or rename" in message
    lines(tmp_path / "classnames.txt", "Cat lion", "cat house cat", "dog dog")
    assert own(tmp_path).class_names == ("lion", "house cat", "dog")


@pytest.mark.parametrize("twin", ["polar_bear", "Polar  bear", "pola\u0301r bear"])
def test_class_names_that_one_prompt_cannot_tell_apart(twin):
    with pytest.raises(DatasetError, match="read the same"):
        check_names(["pol\u00e1r bear" if "\u0301" in twin else "polar bear", twin], "here")


@pytest.mark.parametrize("name", ["", " ", "_", "new\nline", os.fsdecode(b"\xff"), "\ufeffcat"])
def test_class_names_that_cannot_be_read(name):
    with pytest.raises(DatasetError, match=r"here.*classnames\.txt"):
        check_names(["dog", name], "here")


NAMES = ("cat", "cat big", "dog")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat small lion\ncat big lion\ndog wolf\n", ("small lion", "lion", "wolf")),
        ("dog wolf\n\ncat big  lion \r\ncat\tsmall lion", ("small lion", "lion", "wolf")),
        ("\ufeffcat big lion\ncat tiger\ndog wolf", ("tiger", "lion", "wolf")),
        ("tiger\nlion\nwolf\n", ("tiger", "lion", "wolf")),
        ("\ufefftiger\r\nlion\r\nwolf\r\n", ("tiger", "lion", "wolf")),
        ("Größe\n猫\nx_y\n", ("Größe", "猫", "x_y")),
        ("tiger\nlion\n", "2 lines for 3 class folders"),
        ("", "0 lines for 3 class folders"),
        ("cat tiger\ncat big lion\nhund wolf\n", "2 of the 3 class folders ('hund wolf' names none)"),
        ("cat tiger\ncat big lion\n", "2 of the 3 class folders"),
        ("cat tiger\ncat lion\ndog wolf\n", "named twice"),
        ("cat tiger\ncat big lion\ndog wolf\neel x\n", "('eel x' names none)"),
        ("cat,tiger\ncat big,lion\ndog,wolf\n", "'cat,tiger' begins with a folder, but no blank follows"),
        ("wolf\nlion\nwolf\n", "read the same"),
        ("a\x07\nb\nc\n", "cannot be read"),
        (b"\xff\xfec\x00a\x00", "not UTF-8 text; save it as UTF-8"),
    ],
)
def test_classnames_txt(text, expected, tmp_path):
    fabricate_own(tmp_path, NAMES)
    file = tmp_path / "classnames.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    if isinstance(expected, tuple):
        assert own(tmp_path).class_names == expected
    else:
        message = error_of_build("folder", tmp_path, 1, 1)
        assert str(file) in message and expected in message, message


@pytest.mark.parametrize("folders", [("1", "2", "10"), ("c2", "c10"), ("Zebra", "ant")])
def test_names_alone_need_folders_with_one_order(folders, tmp_path):
    """Numbers are sorted by value by people and by text here: names would go to other folders, silently."""
    fabricate_own(tmp_path, folders)
    lines(tmp_path / "classnames.txt", *(f"name {i}" for i in range(len(folders))))
    assert "several ways; write one line for each, `folder name`" in error_of_build("folder", tmp_path, 1, 1)
    lines(tmp_path / "classnames.txt", *(f"{folder} name {folder}" for folder in folders))
    assert own(tmp_path).class_names == tuple(f"name {folder}" for folder in sorted(folders))


# --- manifests


def manifest(tmp_path, text: str | bytes, name: str = "manifest.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


PARTS = "a.jpg,cat,train\nb.jpg,dog,train\nc.jpg,cat,test\n"
CAT_DOG = {"train": [("a.jpg", 0), ("b.jpg", 1)], "val": [], "test": [("c.jpg", 0)]}


@pytest.mark.parametrize(
    "text",
    [
        "path,class_name,part\n" + PARTS,
        "\ufeffpath,class_name,part\n" + PARTS,
        ("path,class_name,part\n" + PARTS).replace(",", ";"),
        ("path,class_name,part\n" + PARTS).replace(",", "\t"),
        ("path,class_name,part\n" + PARTS).replace("\n", "\r\n"),
        ("path,class_name,part\n" + PARTS).replace(",", ", "),
        "Path,Class Name,Part\n" + PARTS,
        "path,class,part\n" + PARTS + "\n\n",
        "path,class_name,part\n" + PARTS + ",,\n",
        "part,path,label,class_name\ntrain,a.jpg,0,cat\nTRAINING,b.jpg, 1 ,dog\n Test ,./c.jpg,0,cat\n",
        'class_name, path, part\ncat, "a.jpg", train\ndog, b.jpg, train\ncat,c.jpg,test\n',
        'path,class_name,part\n"a.jpg","cat","train"\nb.jpg,dog,train\n"c.jpg", cat ,test\n',
    ],
)
def test_csv_dialects(text, tmp_path):
    path = manifest(tmp_path, text)
    split = read_manifest(path)
    assert split.class_names == ("cat", "dog")
    assert {part: [(i.path, i.label) for i in getattr(split, part)] for part in CAT_DOG} == CAT_DOG
    assert own(path).image_root == own(tmp_path).image_root == tmp_path


def test_quoted_fields_hold_anything(tmp_path):
    text = 'path,class_name,part\n"a,1.jpg","say ""cat""",train\n"new\nline.jpg",dog,train\n'
    text += '" b.jpg",dog,test\nc\u2028.jpg,dog,test\n'
    split = read_manifest(manifest(tmp_path, text))
    assert [item.path for item in (*split.train, *split.test)] == ["a,1.jpg", "new\nline.jpg", " b.jpg", "c\u2028.jpg"]
    assert split.class_names == ("dog", 'say "cat"')


def test_labels_decide_the_order_and_names_come_from_columns_or_beside(tmp_path):
    rows = "z.jpg,1,train\ny.jpg,0,train\nx.jpg,1,test\n"
    path = manifest(tmp_path, "path,label,part\n" + rows)
    lines(tmp_path / "classnames.txt", "zebra", "ant")
    split = read_manifest(path)
    assert split.class_names == ("zebra", "ant") and split.train == (Item("z.jpg", 1), Item("y.jpg", 0))
    lines(tmp_path / "classnames.txt", "zebra", "ant", "bee")
    message = error_of_build("folder", path, 1, 1)
    assert str(path) in message and f"{tmp_path / 'classnames.txt'} has 3 lines for the 2 labels" in message
    named = "path,label,class_name,part\nz.jpg,1,ant,train\ny.jpg,0,zebra,train\nx.jpg,1,ant,test\n"
    assert read_manifest(manifest(tmp_path, named)) == split


def test_a_manifest_without_parts_is_divided_whatever_its_order_and_names(tmp_path, capsys):
    rows = [f"{name}/{i}.jpg,{label}" for label, name in enumerate(("cat", "dog")) for i in range(10)]
    lines(tmp_path / "classnames.txt", "cat", "dog")
    first = read_manifest(lines(tmp_path / "a.csv", "path,label", *rows))
    assert "a.csv names no train, val and test parts" in capsys.readouterr().err
    assert [len(part) for part in (first.train, first.val, first.test)] == [10, 4, 6]
    lines(tmp_path / "classnames.txt", "lion", "wolf")
    second = read_manifest(lines(tmp_path / "b.csv", "path,label", *rows[::-1]))
    assert (first.train, first.val, first.test) == (second.train, second.val, second.test)


TABLE = "path,class_name,part\n"
BAD_MANIFESTS = {
    "empty": ("", ["first line", "path"]),
    "header alone": ("path,label\n", ["lists no images"]),
    "no header": (PARTS, ["first line", "a.jpg,cat,train"]),
    "unknown column": ("path,class_name,weight\n", ["first line", "weight"]),
    "column twice": ("path,class,class_name\na,b,c\n", ["first line"]),
    "no path column": ("label,class_name\n0,cat\n", ["first line", "path"]),
    "short row": (TABLE + PARTS + "d.jpg,cat\n", ["line 5", "2 fields instead of 3"]),
    "line after blank ones": (TABLE + "\n\n" + PARTS + "d.jpg,cat\n", ["line 7"]),
    "open quote": (TABLE + '"a.jpg,cat,train\n', ["no valid CSV"]),
    "no path": (TABLE + PARTS + ",cat,test\n", ["line 5", "no path"]),
    "no class": ("path,part\na.jpg,train\n", ["line 2", "neither label nor class_name"]),
    "some without class": (TABLE + PARTS + "d.jpg,,test\n", ["line 5", "neither"]),
    "some without label": ("path,label,class_name\na,0,cat\nb,,dog\n", ["line 3", "no label"]),
    "some without part": (TABLE + PARTS + "d.jpg,cat,\n", ["line 5", "no part"]),
    "unknown part": (TABLE + PARTS + "d.jpg,cat,holdout\n", ["line 5", "'holdout'", "train, val, test"]),
    "text as label": ("path,label\na.jpg,cat\n", ["line 2", "'cat'", "class_name"]),
    "fraction as label": ("path,label\na.jpg,0.0\n", ["line 2", "'0.0'"]),
    "negative label": ("path,label\na.jpg,-1\n", ["line 2", "'-1'"]),
    "labels from 1": ("path,label,class_name\na,1,cat\nb,2,dog\n", ["count up from 0", "0 is missing"]),
    "gap in labels": ("path,label,class_name\na,0,cat\nb,2,dog\n", ["1 is missing"]),
    "two names": ("path,label,class_name\na,0,cat\nb,0,dog\n", ["line 3", "label 0", "'dog'", "'cat'"]),
    "two labels": ("path,label,class_name\na,0,cat\nb,1,cat\n", ["read the same"]),
    "no names": ("path,label\na,0\nb,1\n", ["no class names", "classnames.txt"]),
    "one class": (TABLE + "a,cat,train\nb,cat,test\n", ["one class ('cat')"]),
    "twins": (TABLE + PARTS + "d.jpg,Cat,test\n", ["'Cat'", "'cat'", "read the same"]),
    "untrained class": (TABLE + PARTS + "d.jpg,eel,test\n", ["'eel'", "no image in train"]),
    "no test": (TABLE + "a,cat,train\nb,dog,train\n", ["no image in test"]),
    "one image": ("path,class_name\na,cat\nb,cat\nc,dog\n", ["'dog'", "one image"]),
    "twice": (TABLE + PARTS + "a.jpg,cat,test\n", ["line 5", "'a.jpg'", "listed before"]),
    "twice, written otherwise": (TABLE + PARTS + ".//a.jpg,cat,test\n", ["line 5", "'a.jpg'", "listed before"]),
    "backslashes": (TABLE + PARTS + "cat\\d.jpg,cat,test\n", ["line 5", "forward slashes"]),
    "drive": (TABLE + PARTS + "C:/pets/d.jpg,cat,test\n", ["line 5", "relative path"]),
    "absolute": (TABLE + PARTS + "/pets/d.jpg,cat,test\n", ["line 5", "relative path"]),
    "outside": (TABLE + PARTS + "cat/../../d.jpg,cat,test\n", ["line 5", "relative path"]),
    "Latin-1": ("path,class_name\na,Käse\n".encode("latin-1"), ["UTF-8"]),
}


@pytest.mark.parametrize(("text", "words"), BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
def test_bad_csv_manifests(text, words, tmp_path):
    path = manifest(tmp_path, text)
    message = error_of_build("folder", tmp_path, 1, 1)
    assert str(path) in message and all(word in message for word in words), message
    assert not any(word in message for word in ("download", "published", "split file", "--split")), message


GOOD = {"train": [["a.jpg", 0, "cat"], ["b.jpg", 1, "dog"]], "test": [["c.jpg", 0, "cat"]]}
ROW = {"path": "a.jpg", "class_name": "cat"}
BAD_JSON = {
    "no JSON": ("{", ["not JSON", "line 1"]),
    "web page": ("<html>", ["not JSON"]),
    "lines": ('{"path": "a"}\n{"path": "b"}\n', ["not JSON", "line 2"]),
    "number": ("7", ["neither a list of objects nor"]),
    "huge number": ("[" + "1" * 5000 + "]", ["not JSON"]),
    "deep": ("[" * 100_000, ["not JSON"]),
    "empty list": ("[]", ["lists no images"]),
    "empty object": ("{}", ["lists no images"]),
    "list of texts": ('["a.jpg"]', ["row 1", "expected the fields"]),
    "unknown field": (json.dumps([ROW | {"size": 3}]), ["row 1", "expected the fields"]),
    "path no text": (json.dumps([ROW | {"path": 3}]), ["row 1", "no path"]),
    "true as label": (json.dumps([ROW | {"label": True}]), ["row 1", "label True"]),
    "number as name": (json.dumps([{"path": "a", "label": 0, "class_name": 5}]), ["row 1", "class_name 5"]),
    "list as name": (json.dumps([{"path": "a", "class_name": ["x"]}]), ["row 1", "class_name"]),
    "list as part": (json.dumps([ROW | {"part": ["train"]}]), ["row 1", "part"]),
    "NUL": (json.dumps([ROW | {"path": "a\0.jpg"}]), ["row 1", "relative path"]),
    "half a character": (json.dumps([ROW | {"path": "\ud800.jpg"}]), ["row 1", "relative path"]),
    "coop: parts no lists": (json.dumps(GOOD | {"val": 3}), ["neither a list of objects nor"]),
    "coop: short row": (json.dumps(GOOD | {"val": [["d.jpg", 0]]}), ["val row 1", "[path, label, class name]"]),
    "coop: other part": (json.dumps(GOOD | {"meta": [["d.jpg", 0, "cat"]]}), ["meta row 1", "'meta'"]),
    "coop: in two parts": (json.dumps(GOOD | {"val": [["c.jpg", 0, "cat"]]}), ["val row 1", "listed before"]),
    "coop: outside": (json.dumps(GOOD | {"val": [["../c.jpg", 0, "cat"]]}), ["val row 1", "relative path"]),
    "coop: no test": (json.dumps(GOOD | {"test": []}), ["no image in test"]),
}


@pytest.mark.parametrize(("text", "words"), BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json_manifests(text, words, tmp_path):
    path = manifest(tmp_path, text, "manifest.json")
    message = error_of_build("folder", tmp_path, 1, 1)
    assert str(path) in message and all(word in message for word in words), message
    assert not any(word in message for word in ("download", "published", "split file", "--split")), message


def test_json_manifests_may_have_a_byte_order_mark_and_need_no_val(tmp_path):
    split = read_manifest(manifest(tmp_path, "\ufeff" + json.dumps(GOOD), "x.json"))
    assert split.class_names == ("cat", "dog") and split.val == () and split.test == (Item("c.jpg", 0),)


# --- mistakes, as the user sees them


def damaged(content: bytes):
    def damage(root):
        for path in Path(root).rglob("*.png"):
            path.write_bytes(content)

    return damage


def with_file(name: str, text: str):
    return lambda root: lines(Path(root) / name, *text.splitlines())


def emptied(root):
    for path in Path(root, "cat").iterdir():
        path.unlink()


def only(*paths: str):
    def remove(root):
        for path in list(Path(root).rglob("*.png")):
            if path.relative_to(root).as_posix() not in paths:
                path.unlink()
        for folder in list(Path(root).iterdir()):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    return remove


def folder_for(*names: str):
    return lambda root: fabricate_own(root, names)


def thirty_two_bits(root):
    for path in Path(root).rglob("*.png"):
        picture(0, 0, (4, 4)).convert("F").save(path, "TIFF")


def in_place_of_images(root):
    for path in list(Path(root).rglob("*.png")):
        path.unlink()
    picture(0, 0).save(Path(root) / "x.png")
    lines(Path(root) / "manifest.csv", "path,class_name,part", "x.png,cat,train", "dog,dog,train", "./cat/,cat,test")


def both_manifests(root):
    (Path(root) / "manifest.csv").touch()
    (Path(root) / "manifest.json").touch()


MISTAKES = {
    "nowhere": (None, ["--root_path", "nowhere"], ["nowhere does not exist", "--root_path", "your images"]),
    "no root": (None, ["--root_path", ""], ["--dataset folder needs --root_path", "manifest"]),
    "a text file": (with_file("x.txt", "a"), ["--root_path", "pets/x.txt"], ["pets/x.txt", ".csv or .json"]),
    "no folders": (only(), [], ["pets holds no class folders", "two or more classes"]),
    "one class": (only("cat/0.png", "cat/1.png"), [], ["pets holds one folder (cat)"]),
    "empty class": (emptied, [], ["class folder pets/cat holds no images", "fill or remove"]),
    "one image": (only("cat/0.png", "dog/0.png", "dog/1.png"), [], ["pets: class 'cat' has one image"]),
    "twins": (folder_for("Cat"), [], ["'Cat' and 'cat'", "merge or rename"]),
    "name of blanks": (folder_for("_"), [], ["class folders in pets", "'_'", "classnames.txt"]),
    "name with a newline": (folder_for("new\nline"), [], ["new\\nline", "classnames.txt"]),
    "long name": (folder_for("1 " * 100 + "1"), [], ["tokens", "shorten the class's name"]),
    "long template": (None, ["--template", "cat " * 90 + "{}"], ["tokens", "--template"]),
    "parts and more": (folder_for("train/a", "test/a"), [], ["test, train", "cat", "manifest.csv"]),
    "classnames short": (with_file("classnames.txt", "a"), [], ["pets/classnames.txt", "1 lines for 2"]),
    "classnames wrong": (with_file("classnames.txt", "cat a\nhund b"), [], ["pets/classnames.txt", "hund b"]),
    "zero bytes": (damaged(b""), [], ["pets/", ".png is empty or no image; replace or remove it"]),
    "text": (damaged(b"hello"), [], [".png is empty or no image"]),
    "truncated": (damaged(b"\x89PNG\r\n\x1a\n" + b"\0" * 30), [], [".png"]),
    "32 bits": (thirty_two_bits, [], ["32-bit", "8 bits a channel"]),
    "two manifests": (both_manifests, [], ["manifest.csv and a manifest.json", "remove one"]),
    "missing image": (
        with_file("manifest.csv", "path,class_name,part\ncat/0.png,cat,train\ndog/x.png,dog,train\ncat/1.png,cat,test"),
        [],
        ["image pets/dog/x.png of folder cannot be found", "correct the manifest"],
    ),
    "folders listed": (in_place_of_images, [], ["pets/", "directory", "replace or remove"]),
    "outside": (
        with_file("manifest.csv", "path,class_name\n../x.png,cat"),
        [],
        ["pets/manifest.csv, line 2", "'../x.png'"],
    ),
    "no JSON": (with_file("manifest.json", "{"), [], ["pets/manifest.json is not JSON"]),
    "a missing manifest": (None, ["--root_path", "pets/x.csv"], ["pets/x.csv does not exist"]),
    "template without place": (None, ["--template", "a cat"], ["--template 'a cat'", "{}"]),
    "two kinds of prompts": (None, ["--template", "a {}", "--prompts", "specific"], ["--template and --prompts"]),
    "split of nowhere": (None, ["--split", "x.json"], ["--split x.json is no file", "split.json"]),
    "split that is a folder": (None, ["--split", "pets"], ["--split pets is no file"]),
    "split that is none": (
        with_file("x.json", "[]"),
        ["--split", "pets/x.json"],
        ["--split pets/x.json is no split.json"],
    ),
    "new to train on": (None, ["--classes", "new"], ["--classes new", "--classes base"]),
    "half of two classes": (None, ["--classes", "base"], ["--classes base", "1 classes", "--classes all"]),
    "as target": (None, ["--eval_datasets", "folder"], ["--eval_datasets", "'folder'"]),
}


@pytest.mark.parametrize(("change", "flags", "words"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_in_one_clear_line(change, flags, words, run_main):
    fabricate_own("pets", per_class=3)
    if change:
        change("pets")
    line = refused(run_main(*OWN, "--root_path", "pets", *flags), ["pets"])
    assert all(word in line for word in words), line
    assert "download" not in line and "unpack" not in line, line
    assert all(path.name != "results" for path in Path("pets").rglob("*"))


def test_unreadable_folders_and_files(run_main, monkeypatch):
    """Simulated, because the superuser may read everything."""

    def denied(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    fabricate_own("pets", per_class=2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", denied)
        assert "pets cannot be listed (Permission denied)" in refused(run_main(*OWN, "--root_path", "pets"), ["pets"])
    monkeypatch.setattr(datasets.task.Image, "open", denied)
    assert "may not be read" in refused(run_main(*OWN, "--root_path", "pets"), ["pets"])


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_one_file_under_two_names_in_a_manifest_is_refused(link, tmp_path):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        picture(0, 0).save(tmp_path / name)
    getattr(tmp_path / "d.jpg", link)(tmp_path / "a.jpg")
    text = "path,class_name,part\na.jpg,cat,train\nb.jpg,dog,train\nc.jpg,cat,test\nd.jpg,dog,test\n"
    with pytest.raises(DatasetError, match=r"line 5: 'd.jpg' is listed before as 'a.jpg'"):
        read_manifest(manifest(tmp_path, text))


def test_postscript_is_no_image(tmp_path, capsys):
    fabricate_own(tmp_path / "pets")
    (tmp_path / "pets" / next((tmp_path / "pets").iterdir()).name / "figure.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0")
    datasets.build("folder", tmp_path / "pets", 1, 1)
    assert "1 files" in capsys.readouterr().err
