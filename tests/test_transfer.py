"""One adapted model on several datasets, base-to-new classes, and your own prompts."""

import hashlib
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from support.fabricate import VARIANTS, error_of_build, fabricate, fabricate_own, fabricate_variant
from support.runs import refused

import clip
import datasets
import main as entry
import utils
from arguments import parse
from datasets.fewshot import base_or_new
from datasets.splits import imagenet_classes
from datasets.task import Item
from methods import METHODS
from scripts.reporting.results import read_results
from scripts.reporting.transfer import base_to_new_tables

TINY = ("--backbone", "tiny", "--shots", 2, "--workers", 0)
QUICK = (*TINY, "--total_iters", 3, "--lr", "1e-3")
DATA = ("--dataset", "dtd", "--root_path", "data")
DTD = (*QUICK, *DATA, "--save_path", "saved")
WEIGHTS = Path("saved/tiny/dtd/2shots/seed3/so.safetensors")


@pytest.fixture
def data(few_imagenet_classes, run_main):
    """Fabricate datasets, adapt weights on one of them, and return the record."""
    wnids, _ = imagenet_classes()
    fabricate("dtd", Path("data"), classes=5)
    fabricate("eurosat", Path("data"), classes=3, per_class=4)
    fabricate_variant(Path("data"), VARIANTS["imagenet_a"][0], [wnids[label] for label in (1, 4, 7, 10)])
    code, record, _, _ = run_main(*DTD)
    assert code == 0
    return record


# --- several datasets


def test_one_model_is_evaluated_on_several_datasets(data, run_main):
    weights = WEIGHTS.read_bytes()
    names = ["eurosat", "dtd", "imagenet_a"]
    code, records, out, _ = run_main(*DTD, "--eval_only", "--eval_datasets", ",".join(names))
    assert code == 0 and [record["test_dataset"] for record in records] == names
    assert WEIGHTS.read_bytes() == weights
    assert {record["dataset"] for record in records} == {"dtd"} and all(record["eval_only"] for record in records)
    assert all(record["root_path"] is None and record["iterations"] == 0 for record in records)
    assert len({record["changed_weights"] for record in records} | {data["changed_weights"]}) == 1
    own = records[1]
    assert own["test_accuracy"] == data["test_accuracy"] and own["split_sha256"] != data["split_sha256"]
    for record in records:
        assert record["test_accuracy"] == accuracy_by_hand(record["test_dataset"])
        folder = Path("results", record["run_id"])
        assert json.loads((folder / "result.json").read_text()) == record
        assert f"_eval_{record['test_dataset']}_" in record["run_id"] and "2shot_seed3" in record["run_id"]
        assert not (folder / "split.json").exists(), "nothing was drawn"
    table = pd.read_csv("results/results.csv")
    assert sorted(table.test_dataset) == sorted(["dtd", *names]) and list(table.dataset) == ["dtd"] * 4
    assert table.run_id.is_unique and out.count("record: ") == 3


def accuracy_by_hand(name: str) -> float:
    """Return the accuracy of the saved weights, computed here."""
    model, preprocess = clip.load("tiny")
    clip.delta.apply_delta(model, WEIGHTS, clip.weights_sha256(model))
    task = datasets.build(name, "data", None, 1)
    classifier = utils.text_classifier(model, task.class_names, task.templates)
    features = model.encode_image(torch.stack([preprocess(task.read(item)) for item in task.test])).detach()
    predictions = (features @ classifier.T).argmax(dim=1).tolist()
    return 100 * sum(p == item.label for p, item in zip(predictions, task.test)) / len(task.test)


# One method for each way of saving, and all heads, which have the classes that they were trained on.
@pytest.mark.parametrize("method", ["lora", "prolip", "coop", "linear_probe", "tip_adapter", "tip_adapter_f", "gda"])
def test_methods_are_evaluated_elsewhere_or_say_why_not(method, run_main):
    for name, classes in (("dtd", 3), ("eurosat", 3), ("ucf101", 4)):  # eurosat with the class names of dtd
        fabricate(name, Path("data"), classes=classes, per_class=4)
    lengths = [name for name in ("epochs", "total_iters") if name in METHODS[method].Hparams.__dataclass_fields__]
    flags = ("--method", method, *TINY, "--root_path", "data", "--dataset", "dtd", "--save_path", "saved")
    flags += (f"--{lengths[0]}", 3) if lengths else ()
    code, trained, _, err = run_main(*flags)
    assert code == 0, err
    is_head = ".heads." in METHODS[method].__name__
    other = "eurosat" if is_head else "ucf101"
    code, (same, elsewhere), _, err = run_main(*flags, "--eval_only", "--eval_datasets", f"dtd,{other}")
    assert code == 0, err
    assert same["test_accuracy"] == trained["test_accuracy"] and elsewhere["test_dataset"] == other
    assert same["changed_weights"] == trained["changed_weights"]
    if is_head:
        code, _, _, err = run_main(*flags, "--eval_only", "--eval_datasets", "ucf101")
        assert code == 2 and "3 other classes" in err


def test_an_evaluation_records_how_its_weights_were_drawn(run_main):
    fabricate("dtd", Path("data"))
    _, trained, _, _ = run_main(*DTD, "--draw", "coop")
    _, evaluated, _, _ = run_main(*DTD, "--eval_only")
    assert (trained["draw"], evaluated["draw"]) == ("coop", "coop")
    split = Path("results", trained["run_id"], "split.json")
    _, replayed, _, _ = run_main(*DTD, "--split", split, "--filename", "again")
    _, evaluated, _, _ = run_main(*DTD, "--eval_only", "--filename", "again")
    assert (replayed["draw"], evaluated["draw"]) == ("recorded", "recorded")
    assert replayed["split_sha256"] == trained["split_sha256"]


def test_finished_evaluations_are_skipped_and_others_done(data, run_main, monkeypatch):
    flags = (*DTD, "--eval_only", "--eval_datasets")
    _, (variant,), _, _ = run_main(*flags, "imagenet_a")
    do_now, done = entry.do_now, []
    monkeypatch.setattr(entry, "do_now", lambda run: done.append(run.task.name) or do_now(run))
    _, records, out, _ = run_main(*flags, "eurosat,imagenet_a")
    assert done == ["eurosat"] and records[1] == variant and out.count("already done") == 1
    _, same, _, _ = run_main(*DTD, "--eval_only")
    _, (again,), _, _ = run_main(*flags, "dtd")
    assert again == same and done == ["eurosat", "dtd"], "the dataset itself is the plain --eval_only"
    run_main(*DTD, "--lr", "1e-2", "--force")  # other weights in the same place
    _, (other,), _, _ = run_main(*flags, "eurosat")
    assert other["run_id"] != records[0]["run_id"] and done[-1] == "eurosat"
    run_main(*flags, "eurosat", "--force")
    assert done[-2:] == ["eurosat", "eurosat"]


def test_a_missing_dataset_is_found_before_any_is_evaluated(data, run_main):
    def files():
        return sorted(Path("results").rglob("result*"))

    before, left = files(), ["data", "results", "saved"]
    line = refused(run_main(*DTD, "--eval_only", "--eval_datasets", "eurosat,food101"), left)
    assert "food101: no dataset folder in data" in line and files() == before
    Path("data/eurosat/2750", datasets.build("eurosat", "data", None, 1).test[0].path).write_bytes(b"")
    line = refused(run_main(*DTD, "--eval_only", "--eval_datasets", "eurosat"), left)
    assert ".jpg is empty" in line and files() == before


ROOT = ("--root_path", "data")
SAVED = ("--save_path", "saved", "--eval_only")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((*SAVED, *ROOT, "--eval_datasets", "cifar"), ["--eval_datasets", "'cifar'", "imagenet_v2"]),
        ((*SAVED, *ROOT, "--eval_datasets", ""), ["--eval_datasets", "''"]),
        ((*SAVED, *ROOT, "--eval_datasets", "dtd,"), ["--eval_datasets", "''"]),
        ((*SAVED, *ROOT, "--eval_datasets", "dtd,digits,dtd"), ["--eval_datasets", "twice"]),
        ((*SAVED, *ROOT, "--eval_datasets", "folder"), ["--eval_datasets", "'folder'"]),
        ((*SAVED, "--eval_datasets", "digits,dtd"), ["--eval_datasets digits,dtd needs --root_path"]),
        ((*SAVED, "--eval_datasets", "dtd"), ["--eval_datasets dtd needs --root_path"]),
        ((*SAVED, "--dataset", "dtd"), ["--dataset dtd needs --root_path"]),
        (("--eval_datasets", "digits"), ["--eval_only", "--save_path"]),
        (("--save_path", "saved", "--eval_datasets", "digits"), ["--eval_only"]),
        (("--eval_only", "--eval_datasets", "digits"), ["--save_path"]),
        ((*SAVED, "--eval_datasets", "digits"), ["there is no saved/tiny/digits", "so.safetensors"]),
        ((*SAVED, "--eval_datasets", "digits", "--classes", "new"), ["--eval_datasets", "--classes"]),
        ((*SAVED, "--eval_datasets", "digits", "--split", "data/x"), ["--eval_datasets", "--split"]),
        ((*SAVED, "--eval_datasets", "digits", "--method", "zero_shot"), ["--eval_only", "zero_shot"]),
        (("--dataset", "imagenet_r", *ROOT), ["imagenet_r", "--eval_datasets imagenet_r"]),
        ((*SAVED, "--dataset", "imagenet_r", *ROOT), ["imagenet_r"]),
        ((*SAVED, *ROOT, "--dataset", "folder", "--eval_datasets", "dtd"), ["--dataset folder", "only digits"]),
        ((*SAVED, "--dataset", "folder", "--eval_datasets", "digits"), ["--dataset folder needs --root_path"]),
    ],
)
def test_evaluations_that_cannot_work(flags, words, run_main):
    Path("data").mkdir()
    Path("data/x").touch()
    line = refused(run_main(*TINY, *flags), ["data"])
    assert all(word in line for word in words), line


def test_weights_of_your_own_images_on_the_digits(run_main):
    fabricate_own("pets")
    flags = (*QUICK, "--dataset", "folder", "--root_path", "pets", "--save_path", "saved")
    run_main(*flags)
    code, (record,), _, _ = run_main(*flags, "--eval_only", "--eval_datasets", "digits")
    assert code == 0 and (record["dataset"], record["test_dataset"]) == ("folder", "digits")
    assert len(pd.read_csv("results/results.csv")) == 2


def test_a_variant_without_training(few_imagenet_classes, run_main):
    wnids, names = imagenet_classes()
    fabricate_variant(Path("data"), VARIANTS["imagenet_r"][0], wnids[11:7:-1])
    flags = (*TINY, "--dataset", "imagenet_r", "--root_path", "data", "--method", "zero_shot")
    code, record, _, err = run_main(*flags)
    assert code == 0 and record["test_dataset"] == "imagenet_r" and "published split has 4" in err
    assert not Path("results", record["run_id"], "split.json").exists()
    task = datasets.build("imagenet_r", "data", None, 1)
    assert task.class_names == names[8:] and [item.label for item in task.test] == [0, 1, 2, 3]


# --- base-to-new


@pytest.mark.parametrize("classes", [2, 3, 10, 47])
def test_base_is_the_larger_first_half_and_new_the_rest(classes):
    names = tuple(f"kind_{label}" for label in range(classes))
    items = tuple(Item(str(number), number % classes) for number in range(2 * classes))
    whole = datasets.Task("x", names, ("{}",), items, items[classes:], items[::-1], None)
    middle = (classes + 1) // 2
    for half, first, end in (("base", 0, middle), ("new", middle, classes)):
        task = base_or_new(whole, half)
        assert task.class_names == names[first:end]
        for part in ("train", "val", "test"):
            expected = [Item(i.path, i.label - first) for i in getattr(whole, part) if first <= i.label < end]
            assert list(getattr(task, part)) == expected


def test_images_are_drawn_before_classes_are_halved(tmp_path):
    whole = datasets.build("digits", None, 2, 1)
    for half in ("base", "new"):
        assert datasets.build("digits", None, 2, 1, classes=half) == base_or_new(whole, half)
    fabricate("dtd", tmp_path, classes=3, per_class=4)
    assert "--classes new" in error_of_build("dtd", tmp_path, 1, 1, classes="new")  # only one class


def test_training_on_base_and_evaluation_on_both(data, run_main):
    code, base, _, _ = run_main(*DTD, "--classes", "base")
    assert code == 0 and Path("saved/tiny/dtd-base/2shots/seed3/so.safetensors").is_file()
    _, again, _, _ = run_main(*DTD, "--classes", "base", "--eval_only")
    assert again["test_accuracy"] == base["test_accuracy"]
    _, new, out, _ = run_main(*DTD, "--classes", "new", "--eval_only")
    assert "dtd (2 classes)" in out and "on 4 test images" in out
    assert new["changed_weights"] == base["changed_weights"] != 0
    _, zero_shot, _, _ = run_main(*TINY, *DATA, "--classes", "new", "--method", "zero_shot")
    assert zero_shot["test_accuracy"] == zero_shot["zero_shot_accuracy"] == new["zero_shot_accuracy"]
    records = [data, base, again, new, zero_shot]
    assert [record["classes"] for record in records] == ["all", "base", "base", "new", "new"]
    assert len({record["run_id"] for record in records}) == 5
    _, whole, _, err = run_main(*DTD, "--eval_only", "--draw", "coop")
    assert "another split" not in err, "the test part is the same for every draw"
    assert whole["test_accuracy"] == data["test_accuracy"], "the weights of all classes are still there"


def test_settings_by_number_of_shots_are_one_configuration_and_so_are_their_evaluations(run_main):
    Path("by_shots.yaml").write_text("method: coop\nby_shots: {1: {epochs: 1}, 2: {epochs: 2, lr: 1e-3}}\n")
    for shots, *more in ((1,), (2,), (2, "--epochs", 3)):
        flags = ("--config", "by_shots.yaml", "--backbone", "tiny", "--shots", shots, *more)
        flags += ("--save_path", "saved", "--filename", f"coop{len(more)}")
        assert run_main(*flags, "--classes", "base")[0] == 0
        assert run_main(*flags, "--classes", "new", "--eval_only")[0] == 0
    results = read_results(Path("results"))
    found = {label: (own.shots.tolist(), own.lr.tolist()) for label, own in results.runs.groupby("configuration")}
    assert sorted(found.values()) == [([1, 2], [0.002, 0.001])] * 2 + [([2], [0.001])] * 2
    (table, *_) = [sheet for sheet in base_to_new_tables(results) if "2 shots" in sheet.title]
    assert [row[0].text.partition(" (")[0] for row in table.rows] == ["zero-shot CLIP", "coop", "coop"]
    assert sorted("by_shots.yaml" in row[0].text for row in table.rows[1:]) == [False, True]
    records = [json.loads(path.read_text()) for path in Path("results").glob("*/result.json")]
    before = [next(r["zero_shot_accuracy"] for r in records if r["classes"] == half) for half in ("base", "new")]
    assert [cell.value for cell in table.rows[0][1:3]] == pytest.approx(before)


def test_an_evaluation_has_the_settings_by_data_of_its_weights_and_its_own_of_the_rest(run_main):
    text = "{1: {epochs: 1, precision: fp32, prompts: released}, 2: {epochs: 2}}"
    Path("trained.yaml").write_text(f"method: coop\nbackbone: tiny\nby_shots: {text}\n")
    Path("tested.yaml").write_text("method: coop\nbackbone: tiny\nby_shots: {1: {precision: bf16}, 2: {lr: 1}}\n")
    flags = ("--shots", 1, "--save_path", "saved", "--config")
    by_data = [
        run_main(*flags, *more)[1]["by_data"]
        for more in (
            ("trained.yaml",),
            ("tested.yaml", "--eval_only"),
            ("trained.yaml", "--eval_only", "--precision", "fp32"),
            ("trained.yaml", "--eval_only", "--prompts", "specific"),
        )
    ]
    files = [dict(part.split(": ") for part in said.split("; ")) for said in by_data]
    lengths = {"epochs", "n_iters", "total_iters"}
    assert files[0].keys() == {*lengths, "precision", "prompts", "template"}
    assert files[1].pop("precision").startswith("tested.yaml ")
    assert files[1] == files[2] == {name: file for name, file in files[0].items() if name != "precision"}
    assert files[3].keys() == {*lengths, "precision"}


def test_new_classes_of_your_own_images_are_not_another_split(run_main):
    fabricate_own("pets", ("ant", "bee", "cat", "dog"))
    flags = (*QUICK, "--dataset", "folder", "--root_path", "pets", "--save_path", "saved")
    run_main(*flags, "--classes", "base")
    code, new, _, err = run_main(*flags, "--classes", "new", "--eval_only")
    assert code == 0 and new["classes"] == "new" and "another split" not in err


def test_training_on_new_classes_is_rejected(run_main):
    fabricate("dtd", Path("data"), classes=4)
    line = refused(run_main(*DTD, "--classes", "new"), ["data"])
    assert "train with --classes base" in line
    other = Path("saved/tiny/dtd/2shots/seed3/so.safetensors")
    other.parent.mkdir(parents=True)
    other.touch()
    line = refused(run_main(*DTD, "--classes", "new", "--eval_only"), ["data", "saved"])
    assert "there is no saved/tiny/dtd-base/" in line and str(other) in line


def test_a_half_without_test_images_is_rejected(run_main):
    fabricate_own("pets/train", ("ant", "bee", "cat", "dog"))
    fabricate_own("pets/test", ("ant", "bee"))
    flags = (*TINY, "--dataset", "folder", "--root_path", "pets", "--method", "zero_shot", "--classes", "new")
    assert "2 classes and 0 test images" in refused(run_main(*flags), ["pets"])


# --- your own prompts

TEMPLATES = ("a scan of {}.", "{}, a texture.", "{}")


def test_zero_shot_averages_all_templates_and_training_takes_the_first(run_main, monkeypatch):
    fabricate("dtd", Path("data"), classes=3)
    asked, tokenize = [], utils.tokenize_classes
    monkeypatch.setattr(
        utils, "tokenize_classes", lambda to_ids, names, t: asked.append(t) or tokenize(to_ids, names, t)
    )
    flags = [word for template in TEMPLATES for word in ("--template", template)]
    _, record, _, _ = run_main(*DTD, *flags)
    # checked, then zero-shot, then training, then the adapted model
    assert asked == [*TEMPLATES, *TEMPLATES, TEMPLATES[0], TEMPLATES[0]]
    assert (record["template"], record["prompts"]) == (" | ".join(TEMPLATES), "own")
    _, alone, _, _ = run_main(*DTD, "--template", TEMPLATES[0], "--filename", "alone")
    assert alone["run_id"] != record["run_id"] and alone["final_loss"] == record["final_loss"]
    asked.clear()
    _, zero_shot, _, _ = run_main(*TINY, *DATA, *flags, "--method", "zero_shot")
    assert asked == [*TEMPLATES, *TEMPLATES]
    assert zero_shot["test_accuracy"] == zero_shot["zero_shot_accuracy"] == record["zero_shot_accuracy"]


def test_templates_in_config_files(run_main):
    for text, templates in (('"a {}."', ("a {}.",)), ("['a {}.', 'b {}.']", ("a {}.", "b {}."))):
        Path("x.yaml").write_text(f"template: {text}\n")
        assert parse(["--config", "x.yaml"]).settings.template == templates
    assert parse(["--config", "x.yaml", "--template", "c {}"]).settings.template == ("c {}",)
    fabricate("dtd", Path("data"), classes=2)
    _, record, _, _ = run_main(*DTD, "--config", "x.yaml")
    config = Path("results", record["run_id"], "config.yaml")
    assert yaml.safe_load(config.read_text())["template"] == ["a {}.", "b {}."]
    assert "already done" in run_main("--config", config)[2]
    for text in ("3", "null", "[1]", "{a: b}"):
        Path("x.yaml").write_text(f"template: {text}\n")
        assert "template" in refused(run_main("--config", "x.yaml"), ("data", "results", "saved", "x.yaml"))


def test_templates_with_other_braces_are_rejected(run_main):
    bad = ["", "a photo", "{} and {}", "{0}", "{name}", "{!r}", "{:>9}", "{.upper}", "{[0]}", "{{}}", "{", "}", "{} {"]
    for template in (*bad, "a {} }"):
        line = refused(run_main("--template", "good {}", "--template", template))
        assert f"--template {template!r}" in line and "{}" in line


def test_saved_weights_are_evaluated_with_the_prompts_they_were_trained_with(run_main):
    fabricate("dtd", Path("data"), classes=4)
    _, trained, _, _ = run_main(*DTD, "--template", "{} of many kinds", "--template", "b {}")
    _, same, _, _ = run_main(*DTD, "--eval_only")
    assert same["template"] == "{} of many kinds | b {}" and same["test_accuracy"] == trained["test_accuracy"]
    assert same["zero_shot_accuracy"] == trained["zero_shot_accuracy"]
    _, other, _, _ = run_main(*DTD, "--eval_only", "--template", "c {}")
    assert other["template"] == "c {}" and other["run_id"] != same["run_id"]
    _, own, _, _ = run_main(*DTD, "--eval_only", "--prompts", "specific")
    assert (own["template"], own["prompts"]) == ("{} texture.", "specific")
    fabricate("eurosat", Path("data"), per_class=4)
    _, (elsewhere,), _, _ = run_main(*DTD, "--eval_only", "--eval_datasets", "eurosat")
    assert elsewhere["template"] == "{} of many kinds | b {}"
    hashes = {hashlib.sha256(path.read_bytes()).hexdigest() for path in Path("saved").rglob("*.safetensors")}
    assert len(hashes) == 1
