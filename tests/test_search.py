"""--search: what it accepts, that it sees val images alone, and that the run after it is the run of what it chose."""

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch
from support.fabricate import fabricate
from support.runs import refused

import clip
import datasets
import main as entry
import train
import utils
from datasets.digits import DigitsTask
from methods import METHODS
from run_utils import Settings, UserError, parse

QUICK = ("--shots", 1, "--total_iters", 4, "--workers", 0)
GRID = ("--search", "lr=1e-5,3e-3", "--search", "density_ratio=0.01,0.05")


@pytest.fixture(autouse=True)
def few_test_images(monkeypatch):
    """The digits with 42 of their 540 test images, because nothing here takes as long as these."""
    build = datasets.build

    def smaller(*args, **options):
        task = build(*args, **options)
        return dataclasses.replace(task, test=task.test[::13])

    monkeypatch.setattr(datasets, "build", smaller)


def settings_of(**options):
    return Settings(**{"backbone": "tiny", "device": "cpu", "workers": 0} | options)


# --- what it accepts


def test_grids_come_from_the_command_line_and_from_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--search", "lr=1e-4,2e-4", "--search", "flip=true,false", "--search", "encoder=text,both"]
    Path("c.yaml").write_text("search:\n  lr: [1e-4, 2e-4]\n  flip: [true, false]\n  encoder: [text, both]\n")
    expected = {"lr": [1e-4, 2e-4], "flip": [True, False], "encoder": ["text", "both"]}
    for settings in (parse(words), parse(["--config", "c.yaml"])):
        assert list(settings.search.items()) == list(expected.items())
    assert parse(["--config", "c.yaml", "--search", "t=3"]).search == {"t": [3]}
    assert parse(["--search", "lr=1", "--search", "lr=2"]).search == {"lr": [1.0, 2.0]}
    assert parse([]).search == {} and parse([]).candidates == [dataclasses.replace(parse([]), tuned_on="val")]


def test_candidates_are_all_combinations_in_order():
    settings = settings_of(search={"lr": [1.0, 2.0], "t": [3, 4]}, eval_every=7, seed=9)
    found = settings.candidates
    assert [(c.lr, c.t) for c in found] == [(1.0, 3), (1.0, 4), (2.0, 3), (2.0, 4)]
    assert all((c.search, c.tuned_on, c.seed, c.eval_every) == ({}, "val", 9, 7) for c in found)
    settings = settings_of(search={"n_iters": [5, 6]}, total_iters=100, shots=2)
    assert [c.iterations for c in settings.candidates] == [10, 12]
    settings = settings_of(search={"total_iters": [5, 6]}, n_iters=100)
    assert [c.iterations for c in settings.candidates] == [5, 6]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--search", "lr"], ["--search lr", "NAME=VALUE,VALUE"]),
        (["--search", "lr=1e-4,fast"], ["--search", "lr must be float", "fast"]),
        (["--search", "lr=1e-4,-1"], ["--lr must be positive", "-1"]),
        (["--search", "flip=yes"], ["flip must be bool"]),
        (["--search", "encoder=text,audio"], ["encoder must be text, vision, both", "audio"]),
        (["--search", "rate=1"], ["unknown setting 'rate'"]),
        (["--search", "search=1"], ["search"]),
        (["--search", "seed=1,2"], ["seed", "no such setting", "density_ratio"]),
        (["--search", "eval_every=1,2"], ["eval_every", "no such setting"]),
        (["--search", "s=0.9"], ["s: the method so has no such setting", "density_ratio"]),
        (["--search", "density_ratio=0.1", "--method", "adam"], ["density_ratio", "the method adam", "lr"]),
        (["--search", "lr=1e-4", "--method", "zero_shot"], ["zero_shot", "leave --search out"]),
        (["--search", "n_iters=1", "--search", "total_iters=2"], ["n_iters and total_iters", "one of them"]),
        (["--tuned_on", "train"], ["tuned_on", "val"]),
    ],
)
def test_bad_grids(run_main, argv, words):
    line = refused(run_main(*argv))
    assert all(word in line for word in words), line
    with pytest.raises(UserError):  # before CLIP is loaded
        parse(argv)


@pytest.mark.parametrize("value", ["7", "[lr]", "{lr: 1}", "{lr: []}", "null", "{lr: [null]}", "{s: [2]}"])
def test_bad_grids_in_files(run_main, value):
    Path("c.yaml").write_text(f"search: {value}\n")
    assert "search" in refused(run_main("--config", "c.yaml"), before=["c.yaml"])


def test_a_data_set_without_val_images_is_refused():
    task = datasets.Task("mine", ("a", "b"), ("{}",), (datasets.Item("0", 0),), (), (), None)
    with pytest.raises(datasets.DatasetError, match=r"mine has no val images.*leave --search out"):
        train.search(None, task, None, settings_of(search={"lr": [1.0]}), "0" * 64)


# --- which run it is


def test_the_grid_is_part_of_the_run_id():
    base = settings_of(search={"lr": [1e-3, 1e-4]})
    others = [{}, {"lr": [1e-3]}, {"lr": [1e-4, 1e-3]}, {"lr": [1e-3, 1e-4], "t": [5]}, {"t": [5], "lr": [1e-3, 1e-4]}]
    ids = [base.run_id, *(settings_of(search=search).run_id for search in others)]
    assert len(set(ids)) == len(ids)
    assert settings_of(search={"lr": [1e-3, 1e-4]}, lr=7.0).run_id == base.run_id  # it is searched
    assert settings_of(search={"lr": [1e-3, 1e-4]}, t=9).run_id != base.run_id
    assert settings_of(tuned_on="val").run_id != settings_of().run_id  # a label, but the record must not lie


# --- what it does


@pytest.fixture
def searched(run_main):
    """A run after a search over GRID, and the table of the search."""
    _, record, out, _ = run_main(*QUICK, *GRID, "--save_path", "saved", "--eval_every", 2)
    return record, pd.read_csv(Path("results") / record["run_id"] / "search.csv"), out


def test_the_best_on_val_is_trained_and_recorded(run_main, searched, monkeypatch):
    record, table, out = searched
    assert list(table.columns) == ["lr", "density_ratio", "val_accuracy", "iterations", "chosen"]
    assert list(zip(table.lr, table.density_ratio)) == [(1e-5, 0.01), (1e-5, 0.05), (3e-3, 0.01), (3e-3, 0.05)]
    best = table[table.chosen].iloc[0]
    assert table.chosen.sum() == 1 and best.val_accuracy == table.val_accuracy.max() > table.val_accuracy.min()
    assert (record["lr"], record["density_ratio"], record["tuned_on"]) == (best.lr, best.density_ratio, "val")
    assert record["search_seconds"] > 0 and list(table.iterations) == [4] * 4
    assert out.count("val accuracy ") == 4 and f"{best.val_accuracy:.2f} % on 10 images" in out
    # A run with these settings and without a search is the same, to the byte.
    chosen = ("--lr", best.lr, "--density_ratio", best.density_ratio)
    _, plain, _, _ = run_main(*QUICK, *chosen, "--eval_every", 2, "--results_dir", "plain")
    assert plain["search_seconds"] == 0 and not (Path("plain") / plain["run_id"] / "search.csv").exists()
    for name in ("test_accuracy", "zero_shot_accuracy", "final_loss", "changed_weights", "optimizer_bytes"):
        assert record[name] == plain[name], name
    curves = [Path(a, b["run_id"], "curve.csv").read_bytes() for a, b in (("results", record), ("plain", plain))]
    assert curves[0] == curves[1] and b"test_accuracy" in curves[0]
    # Val accuracies are those of runs that are tested on the val images.
    build = datasets.build

    def on_val(*args, **options):
        task = build(*args, **options)
        return dataclasses.replace(task, test=task.val)

    monkeypatch.setattr(datasets, "build", on_val)
    for row in table.itertuples():
        flags = ("--lr", row.lr, "--density_ratio", row.density_ratio, "--results_dir", "val")
        assert run_main(*QUICK, *flags)[1]["test_accuracy"] == row.val_accuracy


def test_a_search_is_not_repeated_and_its_weights_know_what_was_chosen(run_main, searched):
    record, _, _ = searched
    flags = (*QUICK, *GRID, "--save_path", "saved", "--eval_every", 2)
    _, again, out, _ = run_main(*flags, "--lr", 9)
    assert "already done" in out and again == record
    _, _, out, _ = run_main("--config", Path("results") / record["run_id"] / "config.yaml")
    assert "already done" in out
    _, evaluated, out, _ = run_main(*flags, "--eval_only", "--tuned_on", "none")
    assert "search" not in out and evaluated["search_seconds"] == 0
    for name in ("lr", "density_ratio", "tuned_on", "test_accuracy"):
        assert evaluated[name] == record[name]


def test_of_equals_the_first_is_chosen(run_main):
    for values in ("1e-12,2e-12", "2e-12,1e-12"):  # too small to change a prediction
        _, record, _, _ = run_main(*QUICK, "--search", f"lr={values}")
        assert record["lr"] == float(values.split(",")[0])


def test_test_images_are_read_but_not_judged_before_the_choice(run_main, monkeypatch):
    task = datasets.build("digits", None, 1, 3)
    events, read, search = [], DigitsTask.read, train.search

    def watched_read(self, item):
        events.append("test" if item in set(task.test) else "val" if item in set(task.val) else "train")
        return read(self, item)

    def watched_search(model, task, *args):
        result = search(model, task, *args)
        events.append("chosen")
        return result

    monkeypatch.setattr(DigitsTask, "read", watched_read)
    monkeypatch.setattr(train, "search", watched_search)
    judged, accuracy = [], utils.accuracy
    monkeypatch.setattr(
        utils, "accuracy", lambda *args: judged.append((len(args[2]), "chosen" in events)) or accuracy(*args)
    )
    run_main(*QUICK, *GRID, "--eval_every", 1)
    before, after = events[: events.index("chosen")], events[events.index("chosen") :]
    assert before.count("train") == 4 * 10 and before.count("val") == 4 * 10
    assert before[:42] == ["test"] * 42 and before.count("test") == 42  # damaged ones would stop it here
    assert after.count("test") >= 42 and "val" not in after
    assert judged[:4] == [(10, False)] * 4 and all(call == (42, True) for call in judged[4:])


def test_every_candidate_starts_from_the_same_model(monkeypatch):
    model, preprocess = clip.load("tiny")
    sha256, modules = clip.weights_sha256(model), {name: type(m) for name, m in model.named_modules()}
    trainable = [p.requires_grad for p in model.parameters()]
    started, models, so = [], [], METHODS["so"].prepare

    def prepare(candidate, task, settings):
        models.append(candidate)
        assert not any("forward" in vars(m) for m in candidate.modules())
        assert [p.requires_grad for p in candidate.parameters()] == trainable
        started.append((clip.weights_sha256(candidate), torch.rand(3).tolist(), settings.lr))
        return so(candidate, task, settings)

    monkeypatch.setattr(METHODS["so"], "prepare", prepare)
    task = datasets.build("digits", None, 1, 3)
    settings = settings_of(search={"lr": [1e-2, 1e-3]}, total_iters=3, density_ratio=0.01)
    train.search(model, task, preprocess, settings, sha256)
    assert [(sha, lr) for sha, _, lr in started] == [(sha256, 1e-2), (sha256, 1e-3)]
    assert started[0][1] == started[1][1]  # what a method draws from torch's own generator
    assert len({id(m) for m in (model, *models)}) == 3 and clip.weights_sha256(model) == sha256
    assert {name: type(m) for name, m in model.named_modules()} == modules
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(p.grad is None for p in model.parameters())
    assert not any("forward" in vars(m) for m in model.modules())
    train.prepare(model, task, settings.candidates[0])
    assert started[2] == started[0]  # and so does the run after the search


def test_a_loss_that_diverges_is_not_chosen(run_main):
    _, record, _, err = run_main(*QUICK, "--search", "lr=1e30,1e-3")
    table = pd.read_csv(Path("results") / record["run_id"] / "search.csv")
    assert record["lr"] == 1e-3 and "note: the training loss is" in err
    assert list(table.chosen) == [False, True] and list(table.val_accuracy.isna()) == [True, False]
    assert (Path("results") / record["run_id"] / "search.csv").read_text().endswith(",4,True\n")
    line = refused(run_main(*QUICK, "--search", "lr=1e30,1e31", "--results_dir", "none"), before=["results"])
    assert "diverges with all settings" in line and "lr" in line


@pytest.mark.parametrize("method", [name for name in METHODS if "total_iters" in METHODS[name].HYPERPARAMETERS])
def test_every_trained_method_can_be_searched(run_main, method):
    flags = ("--method", method, "--shots", 1, "--workers", 0, "--search", "total_iters=2,3")
    code, record, _, err = run_main(*flags)
    assert code == 0, err
    table = pd.read_csv(Path("results") / record["run_id"] / "search.csv")
    assert list(table.iterations) == [2, 3] and record["iterations"] == table[table.chosen].iterations.item()
    assert record["total_iters"] == record["iterations"] and record["tuned_on"] == "val"


# --- labels


def test_a_record_says_on_what_its_settings_were_chosen(run_main, tmp_path):
    fabricate("dtd", tmp_path / "data")
    flags = ("--shots", 1, "--total_iters", 1, "--workers", 0)
    dtd = (*flags, "--dataset", "dtd", "--backbone", "tiny", "--root_path", tmp_path / "data")
    assert run_main(*dtd)[1]["tuned_on"] == "none"
    assert run_main(*dtd, "--tuned_on", "test", "--seed", 2)[1]["tuned_on"] == "test"
    assert run_main(*dtd, "--search", "lr=1e-3,1e-4")[1]["tuned_on"] == "val"
    assert run_main(*flags)[1]["tuned_on"] == "val"  # configs/digits.yaml says so
    assert run_main(*flags, "--method", "zero_shot")[1]["tuned_on"] == "none"


def test_experiment_leaves_the_runs_settings_as_they_are(run_main, monkeypatch):
    seen, experiment = [], entry.experiment

    def watched(settings, task, run, log):
        record = experiment(settings, task, run, log)
        seen.append(run.settings == settings and settings.search == {"lr": [1e-5, 1e-3]})
        return record

    monkeypatch.setattr(entry, "experiment", watched)
    run_main(*QUICK, "--search", "lr=1e-5,1e-3")
    assert seen == [True]
