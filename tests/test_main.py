"""Whole runs of the program: what they leave behind, and when they are done again."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file
from support.fabricate import fabricate

import train
from clip.delta import checkpoint_metadata

QUICK = ("--shots", 2, "--total_iters", 6)


def test_a_run_leaves_its_records(run_main):
    code, record, out, _ = run_main(*QUICK, "--early_stop_loss", 0)
    assert code == 0
    folder = Path("results") / record["run_id"]
    files = {"config.yaml", "result.json", "split.json", "curve.csv", "timing.csv"}
    files |= {"predictions.csv", "classes.csv"}
    assert {path.name for path in folder.iterdir()} == files
    assert json.loads((folder / "result.json").read_text()) == record
    (row,) = pd.read_csv("results/results.csv").itertuples()
    assert (row.run_id, row.method, row.dataset, row.backbone) == (folder.name, "so", "digits", "tiny")
    assert (row.iterations, row.shots, row.lr, row.density_ratio, row.t) == (6, 2, 1e-3, 0.01, 5)
    assert row.trainable_weights == 884736 and 0 < row.changed_weights < 884736
    # In each of 24 matrices k = 1 % of the weights have two 8-byte indices, in S and in K, and two 4-byte moments.
    sizes = [n * width**2 for width, blocks in ((128, 4), (64, 2)) for n in blocks * (3, 1, 4, 4)]
    assert row.optimizer_bytes == 24 * sum(int(0.01 * size) for size in sizes)
    assert (row.tuned_on, row.search_seconds) == ("val", 0) and 35 < row.zero_shot_accuracy < 85
    curve = pd.read_csv(folder / "curve.csv")
    assert list(curve.columns) == ["iteration", "loss", "train_accuracy", "lr"]
    assert list(curve.iteration) == [1, 2, 3, 4, 5, 6]  # 20 images, batch 32: an epoch is one iteration
    assert curve.lr.is_monotonic_decreasing and curve.lr[0] == 1e-3
    assert row.train_accuracy == curve.train_accuracy.iloc[-1]
    assert f"{row.test_accuracy:.2f} %" in out and "results/results.csv" in out


def test_workers_change_nothing_and_the_seed_does(run_main):
    records = [run_main(*QUICK, *words)[1] for words in ((), ("--workers", 2, "--results_dir", "b"), ("--seed", 8))]
    folders = (Path(results) / record["run_id"] for results, record in zip(("results", "b", "results"), records))
    curves = [(folder / "curve.csv").read_bytes() for folder in folders]
    assert curves[0] == curves[1] != curves[2] and records[0]["test_accuracy"] == records[1]["test_accuracy"]


def test_a_finished_run_is_done_again_only_if_forced_or_its_weights_are_missing(run_main):
    _, first, _, _ = run_main(*QUICK)
    _, second, out, _ = run_main("--shots", 2, "--n_iters", 3)  # the same run in other words
    assert "already done" in out and second == first
    for flags in (("--force",), ("--save_path", "saved", "--filename", "mine")):
        _, again, out, _ = run_main(*QUICK, *flags)
        assert "already done" not in out and again["test_accuracy"] == first["test_accuracy"]
    assert Path("saved/tiny/digits/2shots/seed3/mine.safetensors").is_file()
    run_main(*QUICK, "--seed", 4)
    assert sorted(pd.read_csv("results/results.csv").seed) == [3, 4]


@pytest.mark.parametrize("method, accuracy, changed", [("so", 35 / 42, 958), ("lora", 23 / 42, 8192)])
def test_weights_that_were_saved_before_methods_owned_their_settings(run_main, method, accuracy, changed):
    """These files, and what the evaluation gives, are from the program as it was then."""
    path = Path("saved/tiny/digits/1shots/seed3", f"{method}.safetensors")
    path.parent.mkdir(parents=True)
    shutil.copy(Path(__file__).parent / "support" / "saved_before" / path.name, path)
    if method == "lora":  # and it may lack a setting that came later
        about = checkpoint_metadata(path)
        settings = {name: value for name, value in json.loads(about["settings"]).items() if name != "flip"}
        save_file(load_file(path), path, about | {"settings": json.dumps(settings)})
    words = ("--method", method, "--shots", 1, "--save_path", "saved", "--eval_only", "--lr", 1, "--encoder", "both")
    _, record, _, err = run_main(*words, "--device", "cpu")
    assert (record["test_accuracy"], record["changed_weights"]) == (pytest.approx(100 * accuracy), changed), err
    assert (record["lr"], record["encoder"], record["total_iters"]) == (0.1, "text", 20)  # those of the training
    assert method == "lora" or record["run_id"] == "so_digits_tiny_1shot_seed3_eval_digits_78742df9"


def test_a_run_on_another_split_is_done(run_main, tmp_path):
    fabricate("dtd", tmp_path / "data")
    fabricate("dtd", tmp_path / "other", classes=4)
    flags = ("--dataset", "dtd", "--backbone", "tiny", "--shots", 1, "--total_iters", 1, "--root_path")
    _, first, _, _ = run_main(*flags, tmp_path / "data")
    _, second, out, _ = run_main(*flags, tmp_path / "other")
    assert "already done" not in out and first["split_sha256"] != second["split_sha256"]
    assert "already done" in run_main(*flags, tmp_path / "other")[2]


def test_a_deleted_table_is_rebuilt_and_a_deleted_folder_made_again(run_main, monkeypatch):
    run_main(*QUICK)
    Path("results/results.csv").unlink()
    run_main(*QUICK)
    assert len(pd.read_csv("results/results.csv")) == 1

    predict = train.predict

    def clean_up(*of):
        shutil.rmtree("elsewhere")
        return predict(*of)

    monkeypatch.setattr(train, "predict", clean_up)
    code, _, _, _ = run_main(*QUICK, "--results_dir", "elsewhere")
    assert code == 0 and len(pd.read_csv("elsewhere/results.csv")) == 1


def test_curves_of_test_accuracy_decide_nothing(run_main):
    _, plain, _, _ = run_main(*QUICK)
    _, curved, _, _ = run_main(*QUICK, "--eval_every", 4)
    assert (plain["eval_every"], curved["eval_every"]) == (0, 4) and plain["test_accuracy"] == curved["test_accuracy"]
    curve = pd.read_csv(Path("results") / curved["run_id"] / "curve.csv")
    assert list(curve.iteration[curve.test_accuracy.notna()]) == [4]


def test_early_stop(run_main):
    _, record, out, _ = run_main(*QUICK, "--early_stop_loss", 1000)
    assert record["stopped_early"] and record["iterations"] == 1 and "stopped at iteration 1" in out


def test_bf16_learns_too(run_main):
    fp32, bf16 = (run_main(*QUICK, "--precision", precision)[1] for precision in ("fp32", "bf16"))
    assert bf16["precision"] == "bf16" and bf16["final_loss"] != fp32["final_loss"]
    assert bf16["final_loss"] == pytest.approx(fp32["final_loss"], rel=0.1)


@pytest.mark.parametrize("name", ["dtd", "fgvc"])
def test_a_dataset_on_disk_whose_images_may_not_suffice(run_main, tmp_path, name):
    fabricate(name, tmp_path / "data")  # with 4 training images a class
    flags = ("--dataset", name, "--root_path", tmp_path / "data", "--backbone", "tiny", "--prompts", "specific")
    for shots in (4, 5):
        code, record, _, err = run_main(*flags, "--total_iters", 1, "--shots", shots)
        assert code == 0 and record["dataset"] == name and record["template"] != "a photo of a {}."
        assert ("drawn twice" in err) == (shots == 5)
