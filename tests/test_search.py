"""--search: what it accepts, that it sees only val images, and that the run after it is the run of what it chose."""

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch
from support.fabricate import fabricate
from support.runs import experiment_of, in_folder, outcome, refused

import clip
import datasets
import experiment as experiments
import main as entry
import predictions
import train
from arguments import parse
from common import UserError
from datasets.digits import DigitsTask
from methods import METHODS

QUICK = ("--shots", 1, "--total_iters", 4)
GRID = ("--search", "lr=1e-5,3e-3", "--search", "density_ratio=0.01,0.05")


def digits() -> datasets.Task:
    return datasets.build("digits", None, 1, 3)


# --- what it accepts


def test_grids_come_from_the_command_line_and_from_files(tmp_path):
    words = ["--search", "lr=1e-4,2e-4", "--search", "flip=true,false", "--search", "encoder=text,both"]
    path = tmp_path / "c.yaml"
    path.write_text("search:\n  lr: [1e-4, 2e-4]\n  flip: [true, false]\n  encoder: [text, both]\n")
    expected = {"lr": [1e-4, 2e-4], "flip": [True, False], "encoder": ["text", "both"]}
    for config in (parse(words), parse(["--config", str(path)])):
        assert list(config.search.items()) == list(expected.items())
    assert parse(["--config", str(path), "--search", "t=3"]).search == {"t": [3]}
    assert parse(["--search", "lr=1", "--search", "lr=2"]).search == {"lr": [1.0, 2.0]}
    assert parse([]).search == {} and parse([]).candidates() == [parse([]).hparams]


def test_candidates_are_all_combinations_in_order():
    found = parse(["--search", "lr=1,2", "--search", "t=3,4", "--eval_every", "7"]).candidates()
    assert [(c.lr, c.t, c.eval_every) for c in found] == [(1.0, 3, 7), (1.0, 4, 7), (2.0, 3, 7), (2.0, 4, 7)]
    for searched, given in (("n_iters", "--total_iters"), ("total_iters", "--n_iters"), ("total_iters", "--epochs")):
        found = parse([given, "100", "--search", f"{searched}=5,6"]).candidates()
        assert [c.settled(2, 20).total_iters for c in found] == ([10, 12] if searched == "n_iters" else [5, 6])


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--search", "lr"], ["--search lr", "NAME=VALUE,VALUE"]),
        (["--search", "lr=1e-4,fast"], ["--search lr", "float", "fast"]),
        (["--search", "lr=1e-4,-1"], ["--lr", "above 0", "-1"]),
        (["--search", "flip=yes"], ["flip", "bool"]),
        (["--search", "encoder=text,audio"], ["encoder", "text, vision, both", "audio"]),
        (["--search", "rate=1"], ["rate", "lr"]),
        (["--search", "seed=1,2"], ["seed", "density_ratio"]),
        (["--search", "s=0.9"], ["s:", "so", "density_ratio"]),
        (["--search", "density_ratio=0.1", "--method", "adam"], ["density_ratio", "adam", "lr"]),
        (["--search", "lr=1e-4", "--method", "zero_shot"], ["zero_shot", "leave --search out"]),
        (["--search", "n_iters=1", "--search", "total_iters=2"], ["n_iters and total_iters"]),
        (["--tuned_on", "train"], ["tuned_on", "val"]),
    ],
)
def test_bad_grids(run_main, argv, words):
    line = refused(run_main(*argv))
    assert all(word in line for word in words), line


@pytest.mark.parametrize("value", ["7", "[lr]", "{lr: 1}", "{lr: []}", "null", "{lr: [null]}", "{t: [null]}"])
def test_bad_grids_in_files(run_main, value):
    Path("c.yaml").write_text(f"search: {value}\n")
    assert "search" in refused(run_main("--config", "c.yaml"), before=["c.yaml"])


def test_a_dataset_without_val_images_is_rejected():
    with pytest.raises(UserError, match=r"noise has no val images.*leave --search out"):
        train.search(experiment_of("so"), [], ["lr"])


# --- what it does


def test_the_best_on_val_is_trained_and_recorded(run_main, monkeypatch):
    flags = (*QUICK, "--eval_every", 2)
    _, record, out, _ = run_main(*flags, *GRID, *in_folder("searched"))
    table = pd.read_csv(Path("searched") / record["run_id"] / "search.csv")
    assert list(table.columns) == ["lr", "density_ratio", "val_accuracy", "iterations", "chosen"]
    assert list(zip(table.lr, table.density_ratio)) == [(1e-5, 0.01), (1e-5, 0.05), (3e-3, 0.01), (3e-3, 0.05)]
    best = table[table.chosen].iloc[0]
    assert table.chosen.sum() == 1 and best.val_accuracy == table.val_accuracy.max() > table.val_accuracy.min()
    assert (record["lr"], record["density_ratio"], record["tuned_on"]) == (best.lr, best.density_ratio, "val")
    assert record["search_seconds"] > 0 and list(table.iterations) == [4] * 4
    assert out.count("val accuracy ") == 4 and f"{best.val_accuracy:.2f} % on 10 images" in out

    # A run with these settings and without a search is the same, to the byte.
    chosen = ("--lr", best.lr, "--density_ratio", best.density_ratio)
    _, plain, _, _ = run_main(*flags, *chosen, *in_folder("plain"))
    found, expected = outcome("searched", record), outcome("plain", plain)
    assert found["files"].pop("search.csv") and found["record"].pop("run_id") != expected["record"].pop("run_id")
    assert found["record"].pop("searched") == "lr of 1e-05, 0.003; density_ratio of 0.01, 0.05"
    assert expected["record"].pop("searched") is None
    assert found == expected and "test_accuracy" in found["files"]["curve.csv"]

    # Val accuracies are those of runs that are tested on the val images.
    def on_val(config):
        task = digits()
        return dataclasses.replace(task, test=task.val)

    monkeypatch.setattr(entry, "read_data", on_val)
    for row in table.itertuples():
        values = ("--lr", row.lr, "--density_ratio", row.density_ratio, "--results_dir", "val")
        assert run_main(*QUICK, *values)[1]["test_accuracy"] == row.val_accuracy


def test_a_search_is_not_repeated_and_its_weights_know_what_was_chosen(run_main):
    flags = (*QUICK, "--search", "lr=1e-5,3e-3", "--save_path", "saved")
    _, record, _, _ = run_main(*flags)
    _, again, out, _ = run_main(*flags, "--lr", 9)
    assert "already done" in out and again == record
    _, _, out, _ = run_main("--config", Path("results") / record["run_id"] / "config.yaml")
    assert "already done" in out
    _, evaluated, out, _ = run_main(*flags, "--eval_only", "--tuned_on", "none")
    assert "search" not in out and evaluated["search_seconds"] == 0
    for name in ("lr", "tuned_on", "test_accuracy"):
        assert evaluated[name] == record[name]


@pytest.mark.parametrize("values", ["1e-12,2e-12", "2e-12,1e-12"])  # too small to change a prediction
def test_of_equals_the_first_is_chosen(run_main, values):
    _, record, _, _ = run_main("--shots", 1, "--total_iters", 1, "--search", f"lr={values}")
    assert record["lr"] == float(values.split(",")[0])


def test_test_images_are_read_but_not_judged_before_the_choice(run_main, monkeypatch):
    task = digits()
    events, read, search = [], DigitsTask.read, train.search

    def watched_read(self, item):
        events.append("test" if item in set(task.test) else "val" if item in set(task.val) else "train")
        return read(self, item)

    def watched_search(*args):
        result = search(*args)
        events.append("chosen")
        return result

    monkeypatch.setattr(DigitsTask, "read", watched_read)
    monkeypatch.setattr(train, "search", watched_search)
    judged, predict = [], predictions.predict
    monkeypatch.setattr(
        experiments, "predict", lambda *args: judged.append((len(args[2]), "chosen" in events)) or predict(*args)
    )
    run_main(*QUICK, *GRID, "--eval_every", 1, "--cache_dir", "cache")
    before, after = events[: events.index("chosen")], events[events.index("chosen") :]
    assert before.count("train") == 4 * 10 and before.count("val") == 4 * 10
    assert before[:42] == ["test"] * 42 and before.count("test") == 42  # damaged ones would stop it here
    assert after.count("test") >= 42 and "val" not in after
    assert judged[:4] == [(10, False)] * 4 and all(call == (42, True) for call in judged[4:])


def test_every_candidate_starts_from_the_same_model(monkeypatch):
    experiment = experiment_of("so", digits(), total_iters=3, density_ratio=0.01)
    model, sha256 = experiment.model, experiment.base_sha256
    modules, trainable = [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    started, models, prepare = [], [], METHODS["so"].prepare

    def watched(candidate):
        models.append(candidate.model)
        assert [type(m) for m in candidate.model.modules()] == modules
        assert [p.requires_grad for p in candidate.model.parameters()] == trainable
        started.append((clip.weights_sha256(candidate.model), torch.rand(3).tolist()))
        return prepare(candidate)

    monkeypatch.setattr(METHODS["so"], "prepare", watched)
    choices = [dataclasses.replace(experiment.hparams, lr=lr) for lr in (1e-2, 1e-3)]
    train.search(experiment, choices, ["lr"])
    assert len({id(m) for m in (model, *models)}) == 3 and clip.weights_sha256(model) == sha256
    assert [type(m) for m in model.modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(p.grad is None for p in model.parameters())
    assert not any({"forward", "project"} & vars(m).keys() for m in model.modules())
    train.prepare(experiment)  # and so does the run after the search
    assert len(started) == 3 and all(start == started[0] for start in started) and started[0][0] == sha256


def test_a_loss_that_diverges_is_not_chosen(run_main):
    _, record, _, err = run_main(*QUICK, "--search", "lr=1e30,1e-3")
    path = Path("results") / record["run_id"] / "search.csv"
    table = pd.read_csv(path)
    assert record["lr"] == 1e-3 and "note: the training loss is" in err
    assert list(table.chosen) == [False, True] and list(table.val_accuracy.isna()) == [True, False]
    assert path.read_text().endswith(",4,True\n")


# --- labels


def test_a_record_says_on_what_its_settings_were_chosen(run_main, tmp_path):
    fabricate("dtd", tmp_path / "data")
    flags = ("--shots", 1, "--total_iters", 1)
    dtd = (*flags, "--dataset", "dtd", "--backbone", "tiny", "--root_path", tmp_path / "data")
    assert run_main(*dtd)[1]["tuned_on"] == "none"
    assert run_main(*dtd, "--tuned_on", "test", "--seed", 2)[1]["tuned_on"] == "test"
    assert run_main(*dtd, "--search", "lr=1e-3,1e-4", "--save_path", "w")[1]["tuned_on"] == "val"
    assert run_main(*dtd, "--save_path", "w", "--eval_only")[1]["tuned_on"] == "val"  # the weights say so
    assert run_main(*flags)[1]["tuned_on"] == "val"  # configs/digits.yaml says so
    assert run_main("--shots", 1, "--method", "zero_shot")[1]["tuned_on"] == "none"


@pytest.mark.parametrize(
    "config, truth",
    [
        ("dataset: digits\ntuned_on: val", "none"),
        ("dataset: digits\nmethods: {so: {lr: 0.1, tuned_on: test}}", "none"),
        ("dataset: folder\nroot_path: elsewhere\ntuned_on: val", "none"),
        ("dataset: folder\nroot_path: ./images\ntuned_on: val", "val"),
        ("dataset: digits\ntuned_on: val\ndatasets: {folder: {tuned_on: test}}", "test"),
        ("tuned_on: val", "val"),
    ],
)
def test_what_was_chosen_on_other_images_is_not_claimed_for_these(tmp_path, capsys, config, truth):
    (tmp_path / "c.yaml").write_text(config)
    flags = ["--config", str(tmp_path / "c.yaml"), "--dataset", "folder", "--root_path", "images"]
    assert parse(flags).settings.tuned_on == truth
    assert ("tuned_on is none" in capsys.readouterr().err) == (truth == "none")
    assert parse([*flags, "--tuned_on", "test"]).settings.tuned_on == "test"


@pytest.mark.parametrize("names", [[3] * 9 + [8], [3] * 9 + [3], [3, 8] * 5])
def test_a_result_below_the_largest_class_is_mentioned(run_main, monkeypatch, names):
    read = entry.read_data

    def lopsided(config):
        task = read(config)
        labels = iter(names)
        return dataclasses.replace(task, test=tuple(dataclasses.replace(i, label=next(labels)) for i in task.test[:10]))

    monkeypatch.setattr(entry, "read_data", lopsided)
    _, record, _, err = run_main("--shots", 1, "--method", "zero_shot")
    share = 10.0 * max(names.count(3), names.count(8))
    assert record["largest_class_share"] == share
    assert ("the largest test class" in err) == (record["test_accuracy"] < share)
