"""What every method promises: the same run again is the same, also when it is killed on the way; its record is
complete; its weights can be saved and evaluated; it can be searched. A new method in METHODS joins by itself."""

import dataclasses
import json
from pathlib import Path

import pandas as pd
import pytest
import safetensors
import yaml
from support.runs import call, in_folder, killed_after, outcome, refused

import clip
import main as entry
from arguments import parse
from methods import METHODS
from records import FIRST, LAST
from run_utils import run_identity
from settings import Settings

# Settings of a short run with epochs of 3 iterations, for the methods that have them.
QUICK = {"lr": 1e-3, "batch_size": 16, "early_stop_loss": 0, "min_area": 0.6, "eval_every": 9}
QUICK |= {"position": "top2", "density_ratio": 0.01, "t": 2, "merge_every": 4, "lora_on": "q,k,v,o"}
QUICK |= {"gradient": "importance", "moments": "random", "depth": 2, "first_block": 2}
FIELDS = {name: {f.name: f for f in dataclasses.fields(module.Hparams)} for name, module in METHODS.items()}
LOOPS = [name for name in METHODS if "total_iters" in FIELDS[name]]
SAVING = [name for name in METHODS if METHODS[name].prepare]


def quick(method: str, iterations: int = 12) -> tuple:
    """Return the flags of a run of so many iterations, at 4 shots in epochs of 3."""
    own = FIELDS[method]
    values = {name: value for name, value in QUICK.items() if name in own}
    if method in LOOPS:
        values |= {"total_iters": iterations} if own["epochs"].default is None else {"epochs": iterations // 3}
        values |= {"batch_size": 13} if METHODS[method].Hparams.drop_last else {}
    words = [word for name, value in values.items() for word in (f"--{name}", value)]
    return ("--method", method, "--shots", 4, "--seed", 5, "--workers", 0, *words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, feature_cache):
    """Do each method's quick run at most once: (folder, record)."""
    done = {}

    def run(method: str) -> tuple[Path, dict]:
        if method not in done:
            folder = tmp_path_factory.mktemp(method)
            flags = (*quick(method), *in_folder(folder), "--save_every", 0, "--cache_dir", feature_cache)
            code, record, _, err = call(entry.main, *flags)
            assert code == 0, err
            done[method] = folder, record
        return done[method]

    return run


@pytest.mark.parametrize("method", [name for name in METHODS if name not in LOOPS])
def test_the_same_run_again_is_the_same(run_main, finished, tmp_path, method):
    folder, record = finished(method)
    code, again, _, _ = run_main(*quick(method), *in_folder(tmp_path))
    assert code == 0
    assert outcome(tmp_path, again) == outcome(folder, record)


@pytest.mark.parametrize("method", LOOPS)
def test_a_run_that_is_killed_twice_ends_as_one_that_was_not(run_main, finished, tmp_path, method):
    whole, record = finished(method)
    flags = (*quick(method), *in_folder(tmp_path), "--save_every", 3)
    for _ in range(2):  # in the second epoch, with a checkpoint of the first; then in the third
        with killed_after(5):
            assert run_main(*flags)[0] == -9
    assert not list(tmp_path.rglob("result.json"))
    code, resumed, out, _ = run_main(*flags)
    assert code == 0 and "resumes after iteration 6," in out
    assert outcome(tmp_path, resumed) == outcome(whole, record)
    steps = [pd.read_csv(next(folder.rglob("timing.csv"))).iteration.tolist() for folder in (tmp_path, whole)]
    assert steps[0] == steps[1] == [3, 6, 9, 12]


@pytest.mark.parametrize("method", METHODS)
def test_a_record_is_complete(finished, method):
    folder, record = finished(method)
    own = FIELDS[method].keys()
    other = {"lr", "density_ratio", "t", "encoder", "position", "epochs"} - own  # columns that not all methods have
    assert (own | {*FIRST, *LAST}) - {"n_iters", "epochs"} <= record.keys() | other
    assert json.loads((folder / record["run_id"] / "result.json").read_text()) == record
    (row,) = pd.read_csv(folder / "results.csv").to_dict("records")
    assert {name: row[name] for name in ("run_id", "test_accuracy")}.items() <= record.items()
    saved, quick_values = yaml.safe_load((folder / record["run_id"] / "config.yaml").read_text()), quick(method)
    for flag, value in zip(quick_values[::2], quick_values[1::2]):
        assert saved[flag.removeprefix("--")] == value, flag
    if method in LOOPS:
        curve = pd.read_csv(folder / record["run_id"] / "curve.csv")
        assert list(curve.iteration) == [3, 6, 9, 12] and list(curve.test_accuracy.dropna().index) == [2]
        assert curve.loss.iloc[-1] == record["final_loss"] and curve.loss.iloc[-1] != curve.loss[0]
    assert (record["changed_weights"] > 0) == (record["checkpoint_bytes"] is not None) == (method in SAVING)


@pytest.mark.parametrize("method", METHODS)
def test_its_config_file_is_the_same_run(finished, method):
    folder, record = finished(method)
    config = parse(["--config", str(folder / record["run_id"] / "config.yaml")])
    assert run_identity(config, 40) == record["run_id"]


@pytest.mark.parametrize("method", SAVING)
def test_saved_weights_evaluate_to_the_same_accuracy(run_main, finished, method):
    folder, trained = finished(method)
    path = folder / "weights" / "tiny" / "digits" / "4shots" / "seed5" / f"{method}.safetensors"
    words = ("--method", method, "--shots", 4, "--seed", 5, "--save_path", folder / "weights", "--eval_only")
    code, evaluated, _, err = run_main(*words)
    assert code == 0, err
    same = {"test_accuracy", "zero_shot_accuracy", "changed_weights", "checkpoint_bytes", "total_iters"}
    same |= FIELDS[method].keys() - {"n_iters", "epochs"}  # as they were in training
    for name in same & trained.keys():
        assert evaluated[name] == trained[name], name
    assert (evaluated["iterations"], evaluated["optimizer_bytes"]) == (0, 0)
    with safetensors.safe_open(path, "pt") as file:
        about = file.metadata()
    assert about["run_id"] == trained["run_id"] and about["base_sha256"] == clip.weights_sha256(clip.load("tiny")[0])
    assert (about["method"], about["backbone"]) == (method, "tiny")
    stored = json.loads(about["settings"])
    assert stored.keys() == {f.name for f in dataclasses.fields(Settings)} | FIELDS[method].keys()
    assert (stored["seed"], stored["shots"]) == (5, 4) and len(json.loads(about["class_names"])) == 10
    assert json.loads(about["templates"]) == [trained["template"]]
    assert path.stat().st_size == trained["checkpoint_bytes"]


def test_a_method_that_adapts_nothing_has_nothing_to_save(run_main, finished):
    folder, record = finished("zero_shot")
    assert record["test_accuracy"] == record["zero_shot_accuracy"] and not (folder / "weights").exists()
    nothing = ("trainable_weights", "changed_weights", "iterations", "optimizer_bytes")
    assert [record[name] for name in nothing] == [0] * 4
    assert "--eval_only" in refused(run_main("--method", "zero_shot", "--eval_only", "--save_path", "saved"))


@pytest.mark.parametrize("method", LOOPS)
def test_every_trained_method_can_be_searched(run_main, method):
    code, record, _, err = run_main(*quick(method, 3), "--shots", 1, "--search", "lr=1e-3,3e-3")
    assert code == 0, err
    table = pd.read_csv(Path("results") / record["run_id"] / "search.csv")
    assert record["lr"] == table[table.chosen].lr.item() and record["tuned_on"] == "val"
    assert list(table.iterations) == [record["iterations"]] * 2
