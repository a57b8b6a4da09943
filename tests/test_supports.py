"""Support sets as they are in life: every image, unequal classes, wrong labels, and files that others published."""

import json
import pickle
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import yaml
from support.fabricate import error_of_build, fabricate, fabricate_own
from support.runs import refused

import datasets
from datasets.supports import Support, class_sizes, with_label_noise
from datasets.task import Item, Task

QUICK = ("--shots", 4, "--total_iters", 3)
NAMES = tuple("abcd")


def support_of(record: dict) -> dict:
    return json.loads(Path("results", record["run_id"], "split.json").read_text())


# --- every image


def test_all_shots_are_the_whole_training_part_without_repeats(run_main):
    fabricate_own("pets", ("ant", "bee"), per_class=12)
    fabricate_own("pets", ("cat",), per_class=40)
    flags = ("--dataset", "folder", "--root_path", "pets", "--backbone", "tiny", "--total_iters", 3)
    code, record, _, err = run_main(*flags, "--shots", "all", "--save_path", "w")
    assert code == 0, err
    counts = Counter(label for _, label in support_of(record)["train"])
    assert sorted(counts.values()) == [6, 6, 20] and len({path for path, _ in support_of(record)["train"]}) == 32
    assert (record["shots"], record["draw"], len(support_of(record)["val"])) == (20, "all", 3 * 4)
    assert list(Path("w").rglob("allshots/seed3/so.safetensors"))
    config = Path("results", record["run_id"], "config.yaml")
    assert "already done" in run_main("--config", config)[2]
    _, evaluated, _, _ = run_main(*flags, "--shots", "all", "--save_path", "w", "--eval_only")
    same = ("shots", "draw", "test_accuracy", "label_noise", "imbalance")
    assert [evaluated[name] for name in same] == [record[name] for name in same]
    _, few, _, _ = run_main("--config", config, "--shots", 2)
    assert (few["shots"], few["draw"]) == (2, "released") and len(support_of(few)["train"]) == 6
    _, zero_shot, _, _ = run_main(*flags[:-2], "--shots", "all", "--method", "zero_shot")
    assert zero_shot["shots"] == 20


def test_more_than_sixteen_shots_are_possible_and_all_of_imagenet_leaves_val_out(tmp_path, few_imagenet_classes):
    assert len(datasets.build("digits", None, 40, 1).train) == 400
    fabricate("imagenet", tmp_path, per_class=7)
    task = datasets.build("imagenet", tmp_path, 10_000, 1, order="all")
    train, val = ({item.path for item in part} for part in (task.train, task.val))
    assert (len(train), len(val), len(train & val)) == (12 * 3, 12 * 4, 0)
    natural = datasets.build("imagenet", tmp_path, 1, 1, support=Support("natural"))
    assert Counter(item.label for item in natural.train) == dict.fromkeys(range(12), 1)


# --- unequal classes


@pytest.mark.parametrize(
    "counts, shots, sizes",
    [
        ((100, 10, 1), 4, [10, 1, 1]),  # of 12: 10.8, 1.1 and 0.1; the smallest gets one, the largest gives one
        ((30, 20, 10), 4, [6, 4, 2]),
        ((5, 5, 5), 2, [2, 2, 2]),
        ((6, 2), 100, [6, 2]),  # no more than there are
        ((1000, 1, 1, 1), 1, [1, 1, 1, 1]),
    ],
)
def test_natural_sizes_follow_the_training_part(counts, shots, sizes):
    assert class_sizes(counts, shots, 0, Support("natural")) == sizes


def test_long_tailed_sizes_fall_exponentially_in_an_order_that_the_seed_draws():
    support = Support("long_tail", 8)
    found = [class_sizes([99] * 4, 16, seed, support) for seed in range(20)]
    assert all(sorted(sizes) == [2, 4, 8, 16] for sizes in found) and found[3] == class_sizes([99] * 4, 16, 3, support)
    assert len({tuple(sizes) for sizes in found}) > 5
    assert all(class_sizes([3] * 4, 16, seed, support).count(3) == 3 for seed in range(3))  # no more than there are
    assert class_sizes([9], 4, 0, support) == [4]


def test_an_unequal_run_records_its_rule_and_is_a_run_of_its_own(run_main):
    flags = ("--imbalance", "long_tail", "--imbalance_ratio", 4)
    records = [run_main(*QUICK, *extra)[1] for extra in ((), flags, (*flags, "--seed", 9))]
    sizes = [sorted(Counter(label for _, label in support_of(record)["train"]).values()) for record in records]
    assert sizes == [[4] * 10, *[[1] * 5 + [2] * 3 + [3, 4]] * 2]
    assert [record["imbalance"] for record in records] == ["none", "long_tail", "long_tail"]
    assert [record["imbalance_ratio"] for record in records] == [None, 4, 4]
    assert len({record["run_id"] for record in records}) == 3 and len(support_of(records[1])["val"]) == 40
    table = pd.read_csv("results/results.csv")
    assert list(table.columns[-5:-1]) == ["imbalance", "imbalance_ratio", "label_noise", "noise_kind"]
    assert support_of(records[1])["train"] != support_of(records[2])["train"]


# --- wrong labels


def made_up(per_class=50):
    items = tuple(Item(f"{label} {i}", label) for label in range(4) for i in range(per_class))
    return Task("made up", NAMES, ("{}",), items, items[:4], items[:4], None)


@pytest.mark.parametrize("kind", ["symmetric", "pair_flip"])
def test_so_many_labels_are_wrong_and_in_the_way_that_was_asked_for(kind):
    task, support = made_up(), Support(label_noise=0.3, noise_kind=kind)
    noisy = with_label_noise(task, 1, support)
    changed = [(a.label, b.label) for a, b in zip(task.train, noisy.train) if a.label != b.label]
    assert len(changed) == 60 and [item.path for item in noisy.train] == [item.path for item in task.train]
    assert (noisy.val, noisy.test, noisy.label_noise, noisy.noise_kind) == (task.val, task.test, 0.3, kind)
    steps = Counter((new - old) % 4 for old, new in changed)
    assert set(steps) == ({1} if kind == "pair_flip" else {1, 2, 3}) and all(n > 8 for n in steps.values())
    assert noisy == with_label_noise(task, 1, support) != with_label_noise(task, 2, support)


def test_noise_that_changes_nothing_or_empties_a_class_is_rejected(run_main):
    for flags, words in (((1, 0.05), "none"), ((1, 0.9), "no image")):
        line = refused(run_main("--shots", flags[0], "--total_iters", 3, "--label_noise", flags[1]))
        assert "--label_noise" in line and words in line


def test_a_noisy_run_is_recorded_and_its_split_says_so(run_main, all_digits):
    noise = ("--label_noise", 0.25, "--noise_kind", "pair_flip")
    _, clean, _, _ = run_main(*QUICK)
    _, noisy, _, _ = run_main(*QUICK, *noise, "--save_path", "w")
    pairs = zip(support_of(clean)["train"], support_of(noisy)["train"])
    assert sum(a != b for a, b in pairs) == 10 and support_of(clean)["val"] == support_of(noisy)["val"]
    assert (clean["label_noise"], noisy["label_noise"], noisy["noise_kind"]) == (0, 0.25, "pair_flip")
    assert noisy["run_id"] != clean["run_id"] and noisy["train_accuracy"] != clean["train_accuracy"]
    split = Path("results", noisy["run_id"], "split.json")
    _, again, _, _ = run_main(*QUICK, "--split", split)
    recorded = (again["draw"], again["label_noise"], again["noise_kind"], again["final_loss"])
    assert recorded == ("recorded", 0.25, "pair_flip", noisy["final_loss"])
    code, _, _, err = run_main(*QUICK, "--split", split, *noise)
    assert code == 2 and "--label_noise" in err.splitlines()[-1]
    _, evaluated, _, _ = run_main(*QUICK, "--save_path", "w", "--eval_only")
    assert (evaluated["label_noise"], evaluated["noise_kind"]) == (0.25, "pair_flip")
    saved = yaml.safe_load(Path("results", noisy["run_id"], "config.yaml").read_text())
    assert saved["label_noise"] == 0.25 and "already done" in run_main("--config", split.with_name("config.yaml"))[2]


@pytest.mark.parametrize(
    "flags",
    [
        ("--shots", "all", "--draw", "coop"),
        ("--draw", "all"),
        ("--shots", "all", "--imbalance", "natural"),
        ("--shots", "many"),
        ("--label_noise", 1),
        ("--imbalance_ratio", 0.5),
        ("--imbalance_ratio", 5),
        ("--imbalance", "natural", "--imbalance_ratio", 5),
        ("--noise_kind", "pair_flip"),
        ("--imbalance", "some"),
        ("--split", "x.json", "--imbalance", "natural"),
        ("--split", "x.json", "--shots", "all"),
    ],
    ids=str,
)
def test_what_cannot_be_is_rejected(run_main, flags):
    Path("x.json").write_text("{}")
    assert any(flag in refused(run_main(*flags), before=["x.json"]) for flag in flags if str(flag).startswith("--"))


# --- files of others


@pytest.fixture
def published(tmp_path):
    """A fabricated DTD, and 2 images of each of its classes in the formats that others publish."""
    fabricate("dtd", tmp_path, classes=3)
    task = datasets.build("dtd", tmp_path, 2, 7)

    def rows(image, label, items):
        return [{image: f"./data/dtd/images/{i.path}", label: i.label, "classname": "x"} for i in items]

    parts = {"train": task.train[::-1], "val": task.val}
    index = {name: {"data": rows("impath", "label", items), "indices": [0]} for name, items in parts.items()}
    (tmp_path / "index.json").write_text(json.dumps(index))
    for name, items in parts.items():
        lines = [json.dumps(row | {"_domain": -1}) for row in rows("_impath", "_label", items)]
        (tmp_path / f"shot_2-seed_1_{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path, task


@pytest.mark.parametrize("name", ["index.json", "shot_2-seed_1_train.jsonl"])
def test_support_sets_of_others_are_imported(published, name):
    root, task = published
    found = datasets.build("dtd", root, 2, 1, split=root / name)
    assert (found.train, found.val, found.test) == (task.train[::-1], task.val, task.test)
    base = datasets.build("dtd", root, 2, 1, split=root / name, classes="base")
    assert {item.label for item in base.train} == {0, 1} and len(base.train) == 4
    (root / "shot_2-seed_1_val.jsonl").unlink()
    assert bool(datasets.build("dtd", root, 2, 1, split=root / name).val) == (name == "index.json")
    noisy = datasets.build("dtd", root, 2, 1, split=root / name, support=Support(label_noise=0.2))
    assert sum(a != b for a, b in zip(noisy.train, found.train)) == 1


DAMAGE = {
    "index.json": [
        (lambda text: text.replace('"label": 0', '"label": 1'), "with label 1"),
        (lambda text: text.replace('"label"', '"lable"'), "row 0"),
        (lambda text: text.replace('"val": {"data"', '"val": {"dat"'), "val"),
        (lambda text: text[:-9], "--split"),
    ],
    "shot_2-seed_1_train.jsonl": [
        (lambda text: text.replace('"_label": 2', '"_label": 1'), "with label 1"),
        (lambda text: text.replace("_impath", "path"), "row 0"),
        (lambda text: text + "{", "line 7"),
        (lambda text: "", "0 training images"),
    ],
}


@pytest.mark.parametrize("name, number", [(name, i) for name in DAMAGE for i in range(4)])
def test_damaged_support_sets_are_named(published, name, number):
    root, _ = published
    change, words = DAMAGE[name][number]
    (root / name).write_text(change((root / name).read_text()))
    message = error_of_build("dtd", root, 2, 1, split=root / name)
    assert name in message and words in message


def test_the_val_file_of_a_pair_is_not_taken_for_the_training_file(published):
    root, _ = published
    assert "_train.jsonl" in error_of_build("dtd", root, 2, 1, split=root / "shot_2-seed_1_val.jsonl")
    (root / "a.pkl").write_bytes(pickle.dumps([1]))
    assert "a.pkl" in error_of_build("dtd", root, 2, 1, split=root / "a.pkl")
