"""Your own images: class folders, parts and manifests from the disk to a row of results."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from support.fabricate import error_of_build, fabricate_own, picture
from support.runs import refused

import datasets
import datasets.folder
from datasets.classnames import check_names
from datasets.division import divide_class
from datasets.task import DatasetError, check_images_exist
from settings import Settings

PROJECT = Path(datasets.__file__).resolve().parents[1]
OWN = ("--dataset", "folder", "--backbone", "tiny", "--shots", 1, "--total_iters", 2, "--workers", 0)


def own(root, shots=1, **options) -> datasets.Task:
    return datasets.build("folder", root, shots, 1, **options)


def whole(root) -> dict[str, list[tuple[str, int]]]:
    """Return path and label of all images in each part."""
    split, _ = datasets.folder.read_folder(Path(root))
    return {part: [(i.path, i.label) for i in getattr(split, part)] for part in ("train", "val", "test")}


def lines(name: str, *rows: str) -> Path:
    """Write a text file."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


# --- from the disk to a row of results.csv


def test_images_of_all_formats_are_found_in_a_fresh_process(tmp_path):
    """Pillow has no formats when it starts, and afterwards those that a test used. The package's own import is slow."""
    for number, ending in enumerate(("png", "jpg", "jpeg", "webp", "bmp", "JPG")):
        for label, name in enumerate(("cat", "dog")):
            path = tmp_path / "photos" / name / f"{number}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(label, number).save(path)
    (tmp_path / "photos" / "cat" / "notes.txt").touch()
    code = f"""
import pathlib, sys, types
package = sys.modules["datasets"] = types.ModuleType("datasets")
package.__path__ = [{str(PROJECT / "datasets")!r}]
from datasets.folder import read_folder
split, _ = read_folder(pathlib.Path({str(tmp_path / "photos")!r}))
print([len(part) for part in (split.train, split.val, split.test)])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout == "[6, 2, 4]\n" and "notes.txt" in done.stderr, done.stderr


def test_every_form_gives_the_same_images_and_a_row_of_results(run_main):
    fabricate_own("folders", per_class=10)
    parts = whole("folders")
    rows = [(path, label, ("cat", "dog")[label], part) for part in parts for path, label in parts[part]]
    for path, _, _, part in rows:
        target = Path("parts", part, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(Path("folders", path).read_bytes())
    columns = ("path", "label", "class_name", "part")
    with open("folders/x.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    Path("folders/x.json").write_text(json.dumps([dict(zip(columns, row)) for row in rows]))
    coop = {part: [[path, label, name] for path, label, name, p in rows if p == part] for part in parts}
    Path("folders/coop.json").write_text(json.dumps(coop))
    forms = ("folders", "folders/x.csv", "folders/x.json", "folders/coop.json")
    tasks = [own(root, shots=2) for root in forms]
    assert all(task == tasks[0] and task.class_names == ("cat", "dog") for task in tasks)
    assert [len(part) for part in (tasks[0].train, tasks[0].val, tasks[0].test)] == [4, 4, 6]
    test = {item.path.removeprefix("test/") for item in own("parts").test}
    assert test == {item.path for item in tasks[0].test}
    accuracies = set()
    for root in forms[:2]:
        code, record, _, err = run_main(*OWN, "--root_path", root, "--shots", 2, "--seed", 1)
        assert code == 0 and ("divided" in err) == (root == "folders")
        assert (record["dataset"], record["root_path"]) == ("folder", str(Path(root).resolve()))
        split = json.loads(Path("results", record["run_id"], "split.json").read_text())
        assert all(split[part] == [[i.path, i.label] for i in getattr(tasks[0], part)] for part in parts)
        accuracies.add((record["zero_shot_accuracy"], record["test_accuracy"], record["final_loss"]))
    assert len(accuracies) == 1, "the same images in the same order give the same results"
    table = pd.read_csv("results/results.csv")
    assert sorted(table.root_path) == sorted(str(Path(root).resolve()) for root in forms[:2])
    assert set(table.dataset) == set(table.test_dataset) == {"folder"} and table.run_id.is_unique


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
    _, other, _, _ = run_main(*OWN, "--root_path", fabricate_own("elsewhere/pets", per_class=4))
    assert other["run_id"] != first["run_id"], "a folder of the same name is another dataset"


def test_weights_of_your_own_images_have_a_place_of_their_own(tmp_path):
    def place(*parts):
        settings = Settings(dataset="folder", root_path=str(tmp_path.joinpath(*parts)), save_path="saved")
        return settings.weights_file.parts[2]

    for name in ("pets.v1", "pets.v2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.csv").touch()
    names = {place(name) for name in ("pets.v1", "pets.v2", "pets.v1/manifest.csv")}
    assert names == {"folder-pets.v1", "folder-pets.v2", "folder-pets.v1-manifest"}
    assert place("pets.v1", "..", "my pets\n\udcff", "é") == "folder-é"
    assert place("my pets\n\udcff") == "folder-my_pets__"


def test_weights_evaluated_on_another_division_give_a_note(run_main):
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
    assert "50/20/30 %" in capsys.readouterr().err
    counts = {part: Counter(label for _, label in items) for part, items in parts.items()}
    assert counts == {part: {0: n, 1: n, 2: n} for part, n in (("train", 5), ("val", 2), ("test", 3))}
    assert len({path for items in parts.values() for path, _ in items}) == 30
    assert all(path.startswith(("cat/", "dog/", "eel/")[label]) for items in parts.values() for path, label in items)
    assert own(tmp_path).test == datasets.build("folder", tmp_path, 2, seed=7).test
    scan = datasets.folder.scan
    monkeypatch.setattr(datasets.folder, "scan", lambda folder: scan(folder)[::-1])
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
    # Constants, because another rule would silently make other parts of old data.
    assert divide_class(list("0123456789")) == (list("35187"), list("24"), list("690"))


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "valid", "TESTING"), ("train", None, "test")])
def test_parts_are_recognised_by_their_usual_names(names, tmp_path, monkeypatch):
    for name, per_class in zip(names, (4, 3, 2)):
        if name:
            fabricate_own(tmp_path / name, per_class=per_class)
    parts = whole(tmp_path)
    assert [len(parts[part]) for part in parts] == [8, 6 if names[1] else 0, 4]
    assert all(path.startswith(f"{name}/") for name, part in zip(names, parts) for path, _ in parts[part])
    task = own(tmp_path, shots=2)
    scan = datasets.folder.scan
    monkeypatch.setattr(datasets.folder, "scan", lambda folder: scan(folder)[::-1])
    assert own(tmp_path, shots=2) == task, "the disk's order shows"
    assert task.class_names == ("cat", "dog") and {i.path.split("/")[0] for i in task.train} == {names[0]}
    assert len(task.val) == (4 if names[1] else 0)
    check_images_exist(task)


def test_a_class_without_test_images_is_noted(tmp_path, capsys):
    fabricate_own(tmp_path / "train", ("cat", "dog", "eel"))
    fabricate_own(tmp_path / "test", ("cat", "eel"))
    task = own(tmp_path)
    assert task.class_names == ("cat", "dog", "eel") and {item.label for item in task.test} == {0, 2}
    assert "for example dog" in capsys.readouterr().err


def test_a_class_may_be_called_train(tmp_path):
    fabricate_own(tmp_path, ("bus", "train"), per_class=2)
    assert own(tmp_path).class_names == ("bus", "train")


def test_features_of_images_that_are_read_in_another_way_are_not_taken_from_the_cache(tmp_path):
    task = own(fabricate_own(tmp_path))
    published = datasets.Task(*(getattr(task, field.name) for field in dataclasses.fields(task)))
    assert published.fingerprint(task.test) != task.fingerprint(task.test)
    assert own(Path(os.path.relpath(tmp_path))).fingerprint(task.test) == task.fingerprint(task.test)


def test_which_files_are_images_and_how_others_are_noted(tmp_path, capsys):
    fabricate_own(tmp_path, per_class=2)
    for name in ("cat/old/deep/a.JPG", "cat/x.jpg/b.jpeg"):  # the latter in a folder with the name of an image
        (tmp_path / name).parent.mkdir(parents=True)
        picture(0, 7).save(tmp_path / name, "JPEG")
    images = whole(tmp_path)
    paths = {path for items in images.values() for path, label in items if label == 0}
    assert paths == {"cat/0.png", "cat/1.png", "cat/old/deep/a.JPG", "cat/x.jpg/b.jpeg"}
    for folder in ("__MACOSX/cat", ".git", "cat/.thumbnails", "cat/@eaDir/0.png"):
        (tmp_path / folder).mkdir(parents=True)
        picture(1, 1).save(tmp_path / folder / "x.png")
    for name in (".DS_Store", "cat/._0.png", "dog/.hidden.png"):
        (tmp_path / name).write_bytes(b"x")
    assert whole(tmp_path) == images and "ignored" not in capsys.readouterr().err
    for name in ("cat/Thumbs.db", "cat/figure.eps", "dog/Thumbs.db", "dog/notes.txt", "stray.png"):
        (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")  # EPS is a program, not an image
    assert whole(tmp_path) == images
    err = capsys.readouterr().err
    assert err.count("ignored") == 1 and "5 files in" in err and "cat/Thumbs.db" in err


def test_a_large_folder_is_listed_without_asking_for_each_image(tmp_path, monkeypatch):
    def entry(folder, name):
        return SimpleNamespace(name=name, path=f"{folder}/{name}", is_dir=lambda: "." not in name, is_symlink=bool)

    def scan(folder):
        names = ("cat", "dog") if Path(folder) == tmp_path else (f"{i}.jpg" for i in range(5_000))
        return [entry(folder, name) for name in names]

    def asked(path):
        pytest.fail(f"a question about {path}")

    monkeypatch.setattr(datasets.folder, "scan", scan)
    monkeypatch.setattr(datasets.parts, "scan", scan)
    task = own(tmp_path, shots=16)
    assert (len(task.train), len(task.test)) == (32, 3_000)
    monkeypatch.setattr(os, "listdir", lambda folder: [f"{i}.jpg" for i in range(5_000)])
    monkeypatch.setattr(os.path, "exists", asked)
    check_images_exist(task)


# --- links


def test_links_are_followed(tmp_path):
    fabricate_own(tmp_path / "elsewhere", ("felines",))
    fabricate_own(tmp_path / "pets", ("dog",))
    (tmp_path / "pets" / "cat").symlink_to(tmp_path / "elsewhere" / "felines")
    picture(1, 1).save(tmp_path / "single.png")
    (tmp_path / "pets" / "dog" / "link.png").symlink_to(tmp_path / "single.png")
    (tmp_path / "pets" / "dog" / "loop").symlink_to("loop")
    (tmp_path / "all").symlink_to("pets")
    paths = {path for items in whole(tmp_path / "all").values() for path, _ in items}
    assert {"cat/0.png", "dog/link.png"} <= paths and len(paths) == 13
    task = own(tmp_path / "all", shots=2)
    check_images_exist(task)
    for item in (*task.train, *task.test):
        task.read(item)


# --- class names


def test_class_names_that_give_the_same_prompt_or_none(tmp_path):
    twins = [("polar bear", twin) for twin in ("polar_bear", "Polar  bear", "polar bear ")]
    for names in (*twins, ("pol\u00e1r bear", "pola\u0301r bear")):
        with pytest.raises(DatasetError, match=r"^here: .*merge or rename"):
            check_names(names, "here")
    for name in ("", " ", "_", "new\nline", os.fsdecode(b"\xff"), "\ufeffcat"):
        with pytest.raises(DatasetError, match=r"^here: .*classnames\.txt"):
            check_names(["dog", name], "here")
    fabricate_own(tmp_path, ("Cat", "cat", "dog"), per_class=2)
    lines(tmp_path / "classnames.txt", "Cat lion", "cat house cat", "dog dog")
    assert own(tmp_path).class_names == ("lion", "house cat", "dog")


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
        ("cat tiger\ncat big lion\nhund wolf\n", "2 of the 3 class folders ('hund wolf' names none)"),
        ("cat tiger\ncat lion\ndog wolf\n", "named twice"),
        ("cat tiger\ncat big lion\ndog wolf\neel x\n", "('eel x' names none)"),
        ("cat,tiger\ncat big,lion\ndog,wolf\n", "'cat,tiger'"),
        ("wolf\nlion\nwolf\n", "'wolf' and 'wolf'"),
        ("a\x07\nb\nc\n", "'a\\x07'"),
        (b"\xff\xfec\x00a\x00", "not UTF-8 text"),
    ],
)
def test_classnames_txt(text, expected, tmp_path):
    fabricate_own(tmp_path, NAMES, per_class=2)
    file = tmp_path / "classnames.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    if isinstance(expected, tuple):
        assert own(tmp_path).class_names == expected
    else:
        message = error_of_build("folder", tmp_path, 1, 1)
        assert str(file) in message and expected in message, message


@pytest.mark.parametrize("folders", [("1", "2", "10"), ("c2", "c10"), ("Zebra", "ant")])
def test_names_without_folders_need_folders_with_only_one_order(folders, tmp_path):
    """People sort numbers by value, here they are sorted as text: names would silently belong to other folders."""
    fabricate_own(tmp_path, folders, per_class=2)
    lines(tmp_path / "classnames.txt", *(f"name {i}" for i in range(len(folders))))
    assert "`folder name`" in error_of_build("folder", tmp_path, 1, 1)
    lines(tmp_path / "classnames.txt", *(f"{folder} name {folder}" for folder in folders))
    assert own(tmp_path).class_names == tuple(f"name {folder}" for folder in sorted(folders))


# --- mistakes


def folders(*names: str, classes: tuple[str, ...] = ("cat", "dog"), per_class: int = 2):
    """Make these folders, each with folders of `classes`."""
    return lambda root: [fabricate_own(root / name, classes, per_class) for name in names]


def link(path: str, target: str):
    return lambda root: [fabricate_own(root, per_class=2), (root / path).symlink_to(target)]


def both(*changes):
    return lambda root: [change(root) for change in changes]


def with_file(name: str, *rows: str):
    return lambda root: lines(root / name, *rows)


PARTS = folders("train", "val", "test")
BAD_FOLDERS = {
    "two manifests": (
        both(with_file("manifest.csv"), with_file("manifest.json")),
        ["manifest.csv and a manifest.json"],
    ),
    "no folders": (folders(".", classes=(".cat", ".dog")), ["no class folders"]),
    "one class": (folders(".", classes=("cat",)), ["one folder (cat)"]),
    "empty class": (both(folders("."), lambda root: (root / "eel").mkdir()), ["class folder", "pets/eel"]),
    "one image": (both(folders("."), folders(".", classes=("eel",), per_class=1)), ["class 'eel' has one image"]),
    "twins": (folders(".", classes=("Cat", "cat", "dog")), ["'Cat' and 'cat'"]),
    "no train": (folders("val", "test"), ["no train folder", "divided"]),
    "no test": (folders("train"), ["no test folder", "divided"]),
    "no test but val": (folders("train", "dev"), ["no test folder"]),
    "a part twice": (folders("train", "Train", "test"), ["Train and train", "same part"]),
    "parts and more": (folders("train", "test", "extra"), ["train", "extra", "--train_dir"]),
    "classes beside a part": (folders("test", "."), ["test", "cat", "--train_dir"]),
    "parts with images, a class beside": (folders(".", classes=("cat", "test", "train")), ["(test, train)", "(cat)"]),
    "class only in val": (both(PARTS, folders("val", classes=("eel",))), ["pets/val/eel", "pets/train"]),
    "class in another case": (both(PARTS, folders("test", classes=("Cat",))), ["pets/test/Cat", "pets/train"]),
    "link to the root": (link("cat/loop", ".."), ["cat/loop links to a folder"]),
    "link to its folder": (link("cat/loop", "../cat"), ["cat/loop links to a folder"]),
    "class that is the root": (link("all", "."), ["all links to a folder"]),
    "link above the root": (link("dog/up", "../.."), ["links to a folder"]),
    "link to an image": (link("cat/latest.png", "1.png"), ["cat/1.png and", "remove the link"]),
    "link to an image of another class": (link("cat/latest.png", "../dog/1.png"), ["cat/latest.png and"]),
    "link to a class": (link("puppy", "dog"), ["puppy/", "remove the link"]),
    "val that is test": (
        both(folders("train", "test"), lambda root: (root / "val").symlink_to("test")),
        ["test/cat/", "remove the link"],
    ),
}


@pytest.mark.parametrize(("make", "words"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_folders(make, words, tmp_path):
    root = tmp_path / "pets"
    root.mkdir()
    make(root)
    message = error_of_build("folder", root, 1, 1)
    assert all(word in message for word in words), message
    assert str(root) in message and "download" not in message and "unpack" not in message, message


def test_bad_roots_halves_and_splits(tmp_path):
    root = fabricate_own(tmp_path / "pets", per_class=2)
    lines(root / "x.txt", "a")
    for name, options, words in (
        ("x", {}, ["pets/x does not exist", "--root_path"]),
        ("x.txt", {}, ["pets/x.txt", "path"]),
        ("x.csv", {}, ["pets/x.csv does not exist"]),
        ("", {"classes": "base"}, ["--classes base", "1 class "]),
        ("", {"split": "/"}, ["--split /"]),
    ):
        message = error_of_build("folder", root / name, 1, 1, **options)
        assert all(word in message for word in words), message


def mistake_of(call) -> str:
    """Return the error line of a call that fails without a result; its empty run folder may remain."""
    assert not list(Path("results").rglob("result*"))
    return refused(call, sorted({"pets", *(path.name for path in Path(".").glob("results"))}))


LINKED = ("manifest.csv", "path,class_name,part", "cat/1.png,cat,train", "dog/1.png,dog,train", "cat/0.png,cat,test")
MISSING = ("path,class_name,part", "cat/0.png,cat,train", "dog/x.png,dog,train", "cat/1.png,cat,test")
MISTAKES = {
    "broken link": (
        lambda root: [(root / "cat/0.png").unlink(), (root / "cat/0.png").symlink_to("x"), with_file(*LINKED)(root)],
        [],
        ["pets/cat/0.png"],
    ),
    "no root": (None, ["--root_path", ""], ["--dataset folder", "--root_path"]),
    "name with a newline": (lambda root: fabricate_own(root, ["new\nline"]), [], ["new\\nline", "classnames.txt"]),
    "long name": (lambda root: fabricate_own(root, ["1 " * 100 + "1"]), [], ["tokens", "class name"]),
    "long template": (None, ["--template", "cat " * 90 + "{}"], ["tokens", "--template"]),
    "two kinds of prompts": (None, ["--template", "a {}", "--prompts", "specific"], ["--template and --prompts"]),
    "missing image": (with_file("manifest.csv", *MISSING), [], ["pets/dog/x.png of folder", "the manifest"]),
}


@pytest.mark.parametrize(("change", "flags", "words"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_in_one_clear_line(change, flags, words, run_main):
    root = fabricate_own("pets", per_class=3)
    if change:
        change(root)
    line = mistake_of(run_main(*OWN, "--root_path", "pets", *flags))
    assert all(word in line for word in words), line
    assert "download" not in line and "unpack" not in line, line


def test_unreadable_folders_and_files(run_main, monkeypatch):
    """Simulated, because the superuser may read everything."""

    def denied(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    fabricate_own("pets", per_class=2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", denied)
        assert "pets cannot be listed (Permission denied)" in mistake_of(run_main(*OWN, "--root_path", "pets"))
    monkeypatch.setattr(datasets.task.Image, "open", denied)
    assert "may not be read" in mistake_of(run_main(*OWN, "--root_path", "pets"))
