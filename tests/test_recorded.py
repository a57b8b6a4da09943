"""Recorded splits: written by every run, replayed bit for bit; CoOp's pickles and its order of draws."""

import builtins
import dataclasses
import json
import os
import pickle
import re
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
from support.fabricate import error_of_build, fabricate, fabricate_own, fabricate_variant
from support.runs import refused

import datasets
from datasets.recorded import import_coop
from datasets.splits import imagenet_classes
from datasets.task import Item

QUICK = ("--backbone", "tiny", "--shots", 2, "--total_iters", 3, "--workers", 0)


def split_of(record: dict) -> Path:
    return Path("results", record["run_id"], "split.json")


# --- split.json


@pytest.fixture
def flags(run_main):
    """Return the data flags of runs on a fabricated DTD of 4 classes, on your own images, and on the digits."""
    fabricate("dtd", Path("data"), classes=4)
    fabricate_own("pets", ("ant", "bee", "cat", "dog"))
    return {
        "dtd": ("--dataset", "dtd", "--root_path", "data"),
        "folder": ("--dataset", "folder", "--root_path", "pets"),
        "digits": ("--dataset", "digits"),
    }


@pytest.mark.parametrize(
    ("name", "extra"),
    [("dtd", ("--draw", "coop")), ("dtd", ("--test_part", "val")), ("folder", ()), ("folder", ("--classes", "base"))],
)
def test_a_replay_trains_on_the_same_images_and_gives_the_same_curve(name, extra, run_main, flags):
    _, first, _, _ = run_main(*QUICK, *flags[name], *extra)
    split, curve = split_of(first), Path("results", first["run_id"], "curve.csv").read_bytes()
    content = json.loads(split.read_text())
    assert content["split_sha256"] == first["split_sha256"] and content["dataset"] == name
    parts = {"train", "val", "test"} if name == "folder" else {"train", "val"}
    part = {"test_part"} if "val" in extra else set()
    assert content.keys() == {"dataset", "class_names", "split_sha256", *parts} | part
    assert first.get("test_part", "test") == content.get("test_part", "test") == ("val" if part else "test")
    classes = 2 if "base" in extra else 4
    assert Counter(label for _, label in content["train"]) == dict.fromkeys(range(classes), 2)
    assert len(content["val"]) >= classes
    if name == "folder":  # new images change the division, but not that of the record
        fabricate_own("pets", ("ant", "bee", "cat", "dog"), per_class=8)
    options = [word for word in extra if word not in ("--draw", "coop")]  # the file says which images, not the draw
    code, again, _, _ = run_main(*QUICK, *flags[name], *options, "--split", split)
    assert code == 0 and again["run_id"] != first["run_id"]
    assert Path("results", again["run_id"], "curve.csv").read_bytes() == curve
    assert split_of(again).read_bytes() == split.read_bytes()
    assert again["test_accuracy"] == first["test_accuracy"]


def test_a_replay_of_another_seed_uses_its_images_and_is_another_run(run_main, flags):
    _, first, _, _ = run_main(*QUICK, *flags["dtd"], "--seed", 1)
    _, other, _, _ = run_main(*QUICK, *flags["dtd"], "--seed", 2)
    assert first["split_sha256"] != other["split_sha256"]
    _, replayed, _, _ = run_main(*QUICK, *flags["dtd"], "--seed", 2, "--split", split_of(first))
    assert replayed["split_sha256"] == first["split_sha256"]
    assert len({first["run_id"], other["run_id"], replayed["run_id"]}) == 3
    _, reread, out, _ = run_main(*QUICK, *flags["dtd"], "--seed", 2, "--split", split_of(replayed))
    assert "already done" in out and reread == replayed, "the same images from a file elsewhere are the same run"


def test_val_images_of_a_split_may_not_be_tested_on(tmp_path):
    fabricate("dtd", tmp_path, classes=4)
    task = datasets.build("dtd", tmp_path, 1, 3)
    mixed = dataclasses.replace(task, val=task.test[:1])  # as from another version of the dataset's split
    (tmp_path / "split.json").write_text(datasets.to_json(mixed))
    with pytest.raises(datasets.DatasetError, match=re.escape(task.test[0].path)):
        datasets.build("dtd", tmp_path, 1, 3, split=tmp_path / "split.json")


def edited(change):
    """Return a change of the parsed split.json as a change of its text."""

    def edit(text: str) -> str:
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return edit


def without(key):
    return edited(lambda content: content.pop(key))


def row(value):
    return edited(lambda content: content["train"].__setitem__(0, value))


TAMPERED = {
    "order": (edited(lambda c: c["train"].reverse()), ["was changed"]),
    "image": (edited(lambda c: c["train"][0].__setitem__(0, c["val"][0][0])), ["was changed"]),
    "hash": (edited(lambda c: c.update(split_sha256="0" * 64)), ["was changed"]),
    "names": (edited(lambda c: c["class_names"].reverse()), ["other class names", "--classes", "--root_path"]),
    "dataset": (edited(lambda c: c.update(dataset="food101")), ["--dataset food101"]),
    "test part": (edited(lambda c: c.update(test_part="val")), ["--test_part val"]),
    "no hash": (without("split_sha256"), ["not the split.json of a run"]),
    "no train": (without("train"), ["train", "missing"]),
    "not a list": (edited(lambda c: c.update(val={"a": 1})), ["val", "missing"]),
    "outside": (row(["../x.jpg", 0]), ["train, row 0", "'../x.jpg'", "relative path"]),
    "no such class": (row(["a.jpg", 4]), ["train, row 0", "no class 4"]),
    "negative class": (row(["a.jpg", -1]), ["train, row 0", "no class -1"]),
    "true as class": (row(["a.jpg", True]), ["train, row 0", "expected [path, label]"]),
    "number as path": (row([3, 0]), ["train, row 0", "expected [path, label]"]),
    "three fields": (row(["a.jpg", 0, "a"]), ["train, row 0", "expected [path, label]"]),
    "a text": (row("a.jpg"), ["train, row 0", "expected [path, label]"]),
    "half of it": (lambda text: text[:300], ["not JSON", "split.json of a run"]),
    "a list": (lambda text: "[]", ["not the split.json of a run"]),
    "nothing": (lambda text: "", ["not JSON"]),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Return a data folder and the text of a split.json of it."""
    root = tmp_path_factory.mktemp("data")
    fabricate("dtd", root, classes=4)
    return root, datasets.to_json(datasets.build("dtd", root, 2, 3))


@pytest.mark.parametrize(("change", "words"), TAMPERED.values(), ids=TAMPERED)
def test_a_changed_record_is_rejected(change, words, recorded, tmp_path):
    root, text = recorded
    path = tmp_path / "split.json"
    path.write_text(text)
    assert datasets.build("dtd", root, 2, 9, split=path) == datasets.build("dtd", root, 2, 3)
    path.write_text(change(text))
    message = error_of_build("dtd", root, 2, 9, split=path)
    assert str(path) in message and all(word in message for word in words), message
    assert "download" not in message and "manifest" not in message


def test_a_record_that_trains_on_evaluated_images_or_lacks_a_class_is_rejected(recorded, tmp_path):
    root, _ = recorded
    path = tmp_path / "split.json"
    for part in ("test", "val"):
        task = datasets.build("dtd", root, 2, 3, test_part=part)
        leaking = dataclasses.replace(task, train=(task.test[0], *task.train[1:]))  # with a right hash
        path.write_text(datasets.to_json(leaking))
        message = error_of_build("dtd", root, 2, 3, split=path, test_part=part)
        assert str(path) in message and task.test[0].path in message and f"{part} part" in message
    path.write_text(datasets.to_json(dataclasses.replace(task, train=task.train[2:])))
    assert "no training images for some" in error_of_build("dtd", root, 2, 3, split=path, test_part="val")


def test_records_of_other_runs_are_rejected(run_main, flags):
    _, first, _, _ = run_main(*QUICK, *flags["dtd"])
    split = split_of(first).rename("split.json")

    def line(*argv):
        return refused(run_main(*QUICK, *argv, "--split", split), [path.name for path in Path(".").iterdir()])

    assert "--dataset dtd" in line(*flags["digits"])
    assert "give --shots 2" in line(*flags["dtd"], "--shots", 4)
    assert "other class names" in line(*flags["dtd"], "--classes", "base")
    fabricate("dtd", Path("more"), classes=4, per_class=12)
    assert "was changed" in line("--dataset", "dtd", "--root_path", "more")
    Path("data/dtd/images", json.loads(split.read_text())["train"][3][0]).unlink()
    assert "cannot be found" in line(*flags["dtd"])


def test_own_images_that_a_record_lists_and_that_are_gone(run_main, flags):
    _, first, _, _ = run_main(*QUICK, *flags["folder"])
    split = split_of(first).rename("split.json")
    gone = json.loads(split.read_text())["test"][0][0]
    Path("pets", gone).unlink()
    line = refused(run_main(*QUICK, *flags["folder"], "--split", split), ("data", "pets", "results", "split.json"))
    assert gone in line and "--split" in line and "unpack" not in line


# --- CoOp's pickles


DASSL = "dassl.data.datasets.base_dataset"


def coop_pickle(path, task, prefix, separator="/", protocol=5, parts=("train", "val"), **extra) -> Path:
    """Write a file like CoOp's: {"train": [Datum, ...], "val": [...]}, with the paths of another machine.

    The class is like Dassl's, in a module of its name, which no longer exists when the pickle is read.
    """

    class Datum:
        def __init__(self, impath, label, classname):
            self._impath, self._label, self._domain, self._classname = impath, label, 0, classname

    Datum.__module__, Datum.__qualname__ = DASSL, "Datum"
    content = {
        part: [
            Datum(prefix + item.path.replace("/", separator), item.label, task.class_names[item.label])
            for item in getattr(task, part)
        ]
        for part in parts
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in ("dassl", "dassl.data", "dassl.data.datasets", DASSL):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[DASSL].Datum = Datum
        path.write_bytes(pickle.dumps(content | extra, protocol=protocol))
    return path


@pytest.mark.parametrize(
    ("prefix", "separator", "protocol"),
    [
        ("/home/zhou/data/dtd/images/", "/", pickle.HIGHEST_PROTOCOL),
        ("D:\\data\\dtd\\images\\", "\\", pickle.HIGHEST_PROTOCOL),
        ("./data/dtd/images/", "/", 2),
        ("", "/", 4),
    ],
)
def test_coops_pickles_are_imported(prefix, separator, protocol, recorded, tmp_path):
    root, _ = recorded
    drawn = datasets.build("dtd", root, 2, 1, order="coop")
    path = coop_pickle(tmp_path / "shot_2-seed_1.pkl", drawn, prefix, separator, protocol)
    assert b"dassl.data.datasets.base_dataset" in path.read_bytes() and "dassl" not in sys.modules
    task = datasets.build("dtd", root, 2, 3, split=path)
    assert task == drawn != datasets.build("dtd", root, 2, 3)
    base = datasets.build("dtd", root, 2, 3, split=path, classes="base")
    assert base == datasets.build("dtd", root, 2, 1, order="coop", classes="base")


def test_coops_pickles_of_imagenet_have_no_val(tmp_path):
    items = tuple(Item(f"train/n0{label}/n0{label}_{i}.JPEG", label) for label in range(2) for i in range(3))
    task = datasets.Task(
        "imagenet", ("a", "b"), ("{}",), items[1:2], items[2:3], (Item("val/n00/1.JPEG", 0),), tmp_path
    )
    drawn = dataclasses.replace(task, train=(items[0], items[5]), val=())
    path = coop_pickle(tmp_path / "shot_1-seed_5.pkl", drawn, "/d/imagenet/images/", val=[])
    content = path.read_bytes()
    assert import_coop(task, path, {item.path: item.label for item in items}) == drawn
    path = coop_pickle(tmp_path / "without.pkl", drawn, "/d/imagenet/images/", parts=("train",))
    assert path.read_bytes() != content
    assert import_coop(task, path, {item.path: item.label for item in items}) == drawn


def test_the_longest_known_end_of_a_path_is_used(tmp_path):
    items = Item("a/x.jpg", 0), Item("x.jpg", 1)
    task = datasets.Task("t", ("a", "b"), ("{}",), items, (), (Item("t.jpg", 0),), tmp_path)
    path = coop_pickle(tmp_path / "x.pkl", task, "/d/b/")
    assert import_coop(task, path, {item.path: item.label for item in items}).train == items


class Runs:
    """Pickles to a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


ESCAPE = "open({mark!r}, 'w').close()"


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (os.system, ["touch {mark}"]),
        (builtins.eval, [ESCAPE]),
        (builtins.exec, [ESCAPE]),
        (builtins.open, ["{mark}", "w"]),
        (os.mkdir, ["{mark}"]),
    ],
)
def test_a_pickle_that_runs_code_is_rejected_and_runs_none(function, arguments, recorded, tmp_path):
    root, _ = recorded
    mark, path = tmp_path / "mark", tmp_path / "shot_2-seed_1.pkl"
    harm = Runs(function, *(argument.format(mark=str(mark)) for argument in arguments))
    contents = [pickle.dumps(harm, protocol=protocol) for protocol in (0, 2, 5)]
    contents.append(coop_pickle(path, datasets.build("dtd", root, 2, 1), "", test=harm).read_bytes())
    for content in contents:
        path.write_bytes(content)
        message = error_of_build("dtd", root, 2, 3, split=path)
        assert str(path) in message and "of CoOp" in message and function.__name__ in message
        assert not mark.exists()
    pickle.loads(contents[0])
    assert mark.exists(), "otherwise nothing was proved"


def test_dassls_name_opens_no_other_door(recorded, tmp_path):
    root, _ = recorded
    doors = {
        "method": b"cdassl.data.datasets.base_dataset\nDatum.__init__.__globals__\n.",
        "other": b"cdassl.data.datasets.base_dataset\nDatasetBase\n.",
        "other package": b"cdassl.evil\nDatum\n.",
        "called": b"cdassl.data.datasets.base_dataset\nDatum\n(S'a'\ntR.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"Pid\n.",
    }
    for name, content in doors.items():
        path = tmp_path / f"{name}.pkl"
        path.write_bytes(content)
        message = error_of_build("dtd", root, 2, 3, split=path)
        assert "not a few-shot file of CoOp" in message, name
        assert ("it asks for dassl." in message) == (name in ("method", "other", "other package")), message


def test_damaged_pickles(recorded, tmp_path):
    root, _ = recorded
    path = tmp_path / "x.pkl"
    for content in (b"", b"not a pickle", *map(pickle.dumps, ([1, 2], {"train": 3}, {"train": ["a.jpg"]}, {}))):
        path.write_bytes(content)
        assert f"--split {path}" in error_of_build("dtd", root, 2, 3, split=path)


def test_pickles_of_other_images_or_labels(recorded, tmp_path):
    root, _ = recorded
    task = datasets.build("dtd", root, 2, 1)
    path = tmp_path / "x.pkl"

    def message(train):
        coop_pickle(path, dataclasses.replace(task, train=tuple(train)), "/x/images/")
        return error_of_build("dtd", root, 2, 3, split=path)

    first, *rest = task.train
    assert "/x/images/nowhere.jpg" in message([Item("nowhere.jpg", 0), *rest])
    assert f"{first.path} with label 1" in message([Item(first.path, 1), *rest])
    assert f"{first.path} with label False" in message([Item(first.path, False), *rest])
    assert task.test[0].path in message([task.test[0], *rest]), "a test image to train on"
    assert "give --shots 1" in message(task.train[::2])
    assert "no training images for some" in message([i for i in task.train if i.label != 3])


# --- CoOp's draws


def test_coops_draw_through_main(run_main, flags):
    few = (*QUICK, "--shots", 16)
    _, coop, _, err = run_main(*few, *flags["folder"], "--draw", "coop")
    assert "each once" in err and "twice" not in err
    content = json.loads(split_of(coop).read_text())
    assert Counter(label for _, label in content["train"]) == dict.fromkeys(range(4), 3)
    _, released, _, err = run_main(*few, *flags["folder"])
    assert "twice" in err and len(json.loads(split_of(released).read_text())["train"]) == 64
    assert (coop["draw"], released["draw"]) == ("coop", "released") and coop["run_id"] != released["run_id"]
    assert coop["split_sha256"] != released["split_sha256"]


def test_the_variants_have_nothing_to_replay(run_main):
    fabricate_variant(Path("."), "imagenet-a", imagenet_classes()[0][:3])
    Path("split.json").write_text("{}")
    flags = ("--dataset", "imagenet_a", "--root_path", ".", "--method", "zero_shot", "--split", "split.json")
    assert "no training images" in refused(run_main(*flags), ["imagenet-a", "split.json"])
