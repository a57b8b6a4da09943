"""Whole runs of the program: what they leave behind, and that they can be repeated."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from support.fabricate import fabricate

import clip
from methods import METHODS
from run_utils import Settings, UserError, parse

QUICK = ("--shots", 2, "--total_iters", 6, "--workers", 0)
COLUMNS = set(
    "run_id method dataset backbone shots seed test_accuracy zero_shot_accuracy train_accuracy final_loss iterations "
    "stopped_early train_seconds eval_seconds search_seconds peak_memory_mb trainable_weights changed_weights "
    "optimizer_bytes checkpoint_bytes lr density_ratio t prune_first encoder position precision template tuned_on "
    "split_sha256 weights_sha256 git_commit torch_version device finished_at".split(" ")
)


def only_folder(results):
    (folder,) = [f for f in Path(results).iterdir() if f.is_dir()]
    return folder


def test_a_run_leaves_its_records(run_main):
    code, record, out, _ = run_main(*QUICK, "--early_stop_loss", 0)
    assert code == 0
    folder = only_folder("results")
    assert {f.name for f in folder.iterdir()} == {"config.yaml", "result.json", "split.json", "curve.csv", "timing.csv"}
    assert json.loads((folder / "result.json").read_text()) == record
    table = pd.read_csv("results/results.csv")
    assert set(table.columns) >= COLUMNS and len(table) == 1
    row = table.iloc[0]
    assert (row.run_id, row.method, row.dataset, row.backbone) == (folder.name, "so", "digits", "tiny")
    assert (row.iterations, row.shots, row.lr, row.density_ratio, row.t) == (6, 2, 1e-3, 0.01, 5)
    assert row.trainable_weights == 884736 and 0 < row.changed_weights < 884736
    # In each of 24 matrices k = 1 % of the weights have two 8-byte indices, in S and in K, and two 4-byte moments.
    sizes = [n * width**2 for width, blocks in ((128, 4), (64, 2)) for n in blocks * (3, 1, 4, 4)]
    assert row.optimizer_bytes == 24 * sum(int(0.01 * size) for size in sizes)
    assert (row.tuned_on, row.search_seconds) == ("val", 0)  # configs/digits.yaml says so
    assert 35 < row.zero_shot_accuracy < 85
    curve = pd.read_csv(folder / "curve.csv")
    assert list(curve.columns) == ["iteration", "loss", "train_accuracy", "lr"]
    assert list(curve.iteration) == [1, 2, 3, 4, 5, 6]  # 20 images, batch 32: an epoch is one iteration
    assert curve.lr.is_monotonic_decreasing and curve.lr[0] == 1e-3
    assert row.final_loss == curve.loss.iloc[-1] and row.train_accuracy == curve.train_accuracy.iloc[-1]
    assert f"{row.test_accuracy:.2f} %" in out and "results/results.csv" in out


def test_the_same_run_twice_is_the_same_and_another_seed_is_not(run_main):
    accuracies, curves = [], []
    for results, extra in (("a", ()), ("b", ("--workers", 2)), ("c", ("--seed", 8))):
        _, record, _, _ = run_main(*QUICK, *extra, "--results_dir", results)
        accuracies.append(record["test_accuracy"])
        curves.append((only_folder(results) / "curve.csv").read_bytes())
    assert curves[0] == curves[1] and accuracies[0] == accuracies[1]
    assert curves[0] != curves[2]


def test_a_finished_run_is_not_run_again_unless_forced(run_main):
    _, first, _, _ = run_main(*QUICK)
    _, second, out, _ = run_main("--shots", 2, "--n_iters", 3)  # the same run in other words
    assert "already done" in out and second == first
    _, third, out, _ = run_main(*QUICK, "--force")
    assert "already done" not in out and third["test_accuracy"] == first["test_accuracy"]
    run_main(*QUICK, "--seed", 4)
    assert sorted(pd.read_csv("results/results.csv").seed) == [3, 4]


def test_config_of_a_run_repeats_it(run_main):
    run_main(*QUICK, "--seed", 5)
    folder = only_folder("results")
    _, _, out, _ = run_main("--config", folder / "config.yaml")
    assert "already done" in out


@pytest.mark.parametrize("encoder", ["text", "vision", "both"])
def test_saved_weights_evaluate_to_the_same_accuracy(run_main, encoder):
    base, _ = clip.load("tiny")
    flags = (*QUICK, "--save_path", "saved", "--encoder", encoder, "--position", "half-up", "--lr", "1e-2")
    _, trained, _, _ = run_main(*flags)
    checkpoint = Path("saved/tiny/digits/2shots/seed3/so.safetensors")
    assert checkpoint.stat().st_size == trained["checkpoint_bytes"]
    _, evaluated, _, _ = run_main(*flags, "--eval_only")
    assert evaluated["test_accuracy"] == trained["test_accuracy"] != trained["zero_shot_accuracy"]
    assert trained["optimizer_bytes"] > evaluated["optimizer_bytes"] == 0
    assert evaluated["iterations"] == 0 and evaluated["changed_weights"] == trained["changed_weights"]
    model, _ = clip.load("tiny")
    clip.delta.apply_delta(model, checkpoint, clip.weights_sha256(model))
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, base.state_dict()[n])}
    towers = {"vision" if name.startswith("visual.") else "text" for name in changed}
    assert towers == ({"text", "vision"} if encoder == "both" else {encoder})
    assert all(".resblocks." in name for name in changed)
    assert (
        sum(int((t != base.state_dict()[n]).sum()) for n, t in model.state_dict().items()) == trained["changed_weights"]
    )


def test_evaluation_records_what_the_weights_were_trained_with(run_main):
    _, trained, _, _ = run_main(*QUICK, "--save_path", "saved", "--lr", "1e-2")
    _, evaluated, _, _ = run_main(*QUICK, "--save_path", "saved", "--eval_only", "--lr", "1", "--encoder", "text")
    for name in ("lr", "encoder", "test_accuracy", "changed_weights", "total_iters"):
        assert evaluated[name] == trained[name]


def test_weights_of_different_runs_are_never_mistaken_for_each_other(run_main):
    save = (*QUICK, "--save_path", "saved")
    _, first, _, _ = run_main(*save)
    _, evaluated, _, _ = run_main(*save, "--eval_only")
    code, _, _, err = run_main(*save, "--lr", "0.1")
    assert code == 2 and "another run" in err and first["run_id"] in err
    _, second, _, _ = run_main(*save, "--lr", "0.1", "--force")
    assert second["test_accuracy"] != first["test_accuracy"] == evaluated["test_accuracy"]
    _, again, out, _ = run_main(*save, "--eval_only")
    assert "already done" not in out and again["test_accuracy"] == second["test_accuracy"]
    assert run_main(*save)[0] == 2  # its record is there, its weights are not


def test_a_run_on_another_split_is_another_run(run_main, tmp_path):
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

    def clean_up(*_):
        shutil.rmtree("elsewhere")
        return 90.0

    monkeypatch.setattr("train.Evaluator.adapted", clean_up)
    code, _, _, _ = run_main(*QUICK, "--results_dir", "elsewhere")
    assert code == 0 and len(pd.read_csv("elsewhere/results.csv")) == 1


def test_a_checkpoint_that_was_not_asked_for_before_is_made(run_main):
    run_main(*QUICK)
    _, _, out, _ = run_main(*QUICK, "--save_path", "saved", "--filename", "mine")
    assert "already done" not in out
    assert Path("saved/tiny/digits/2shots/seed3/mine.safetensors").is_file()
    assert len(pd.read_csv("results/results.csv")) == 1


def test_curves_of_test_accuracy_decide_nothing(run_main):
    _, plain, _, _ = run_main(*QUICK)
    _, curved, _, _ = run_main(*QUICK, "--eval_every", 4)
    assert (plain["eval_every"], curved["eval_every"]) == (0, 4)
    assert plain["test_accuracy"] == curved["test_accuracy"]
    curve = pd.read_csv(Path("results") / curved["run_id"] / "curve.csv")
    assert list(curve.iteration[curve.test_accuracy.notna()]) == [4]


def test_early_stop(run_main):
    _, record, _, _ = run_main(*QUICK, "--early_stop_loss", 1000)
    assert record["stopped_early"] and record["iterations"] == 1


def test_zero_shot_trains_nothing(run_main):
    _, record, _, _ = run_main("--method", "zero_shot", "--save_path", "saved")
    assert record["test_accuracy"] == record["zero_shot_accuracy"]
    assert record["trainable_weights"] == record["changed_weights"] == record["iterations"] == 0
    assert record["optimizer_bytes"] == 0
    assert not Path("saved").exists()
    assert "already done" in run_main("--method", "zero_shot", "--save_path", "saved")[2]


def test_bf16_learns_too(run_main):
    _, fp32, _, _ = run_main(*QUICK)
    _, bf16, _, _ = run_main(*QUICK, "--precision", "bf16")
    assert bf16["precision"] == "bf16" and bf16["final_loss"] != fp32["final_loss"]
    assert bf16["final_loss"] == pytest.approx(fp32["final_loss"], rel=0.1)


@pytest.mark.parametrize("name", ["dtd", "fgvc", "stanford_cars"])
def test_a_data_set_on_disk(run_main, tmp_path, name):
    fabricate(name, tmp_path / "data")
    flags = ("--dataset", name, "--root_path", tmp_path / "data", "--backbone", "tiny", "--shots", 2)
    code, record, _, _ = run_main(*flags, "--total_iters", 4, "--prompts", "specific", "--flip", "--lr", "1e-3")
    assert code == 0 and record["dataset"] == name and record["changed_weights"] > 0
    assert record["template"] != "a photo of a {}." or name == "stanford_cars"


def test_settings_come_in_layers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ("--dataset", "dtd", "--root_path", "data")
    released = parse(data)
    assert (released.backbone, released.lr, released.iterations, released.density_ratio) == (
        "ViT-B/16",
        2e-4,
        2000,
        5e-5,
    )
    assert (released.seed, released.shots, released.batch_size, released.t, released.early_stop_loss) == (
        3,
        1,
        32,
        5,
        0.01,
    )
    assert parse((*data, "--s", "0.999")).density_ratio == 1e-3
    assert parse([]).backbone == parse(["--dataset", "digits"]).backbone == "tiny"
    Path("c.yaml").write_text("lr: 3e-4\ntotal_iters: 70\nshots: 4\ns: 0.9\n")
    layered = parse((*data, "--config", "c.yaml", "--shots", "2"))
    assert (layered.lr, layered.iterations, layered.shots, layered.density_ratio) == (3e-4, 70, 2, 0.1)
    assert parse((*data, "--config", "c.yaml", "--n_iters", "5")).iterations == 20
    assert parse((*data, "--config", "c.yaml", "--density_ratio", "0.5")).density_ratio == 0.5
    with pytest.raises(AttributeError):
        layered.lr = 1.0


def test_a_config_may_have_settings_for_single_methods(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(
        "lr: 3e-4\nmin_area: 0.5\nmethods:\n  so:\n    lr: 4e-4\n    s: 0.9\n  zero_shot:\n    lr: 1\n"
    )
    so = parse(["--config", "c.yaml"])
    assert (so.lr, so.density_ratio, so.min_area) == (4e-4, 0.1, 0.5)
    assert parse(["--config", "c.yaml", "--lr", "5e-4"]).lr == 5e-4
    assert parse(["--config", "c.yaml", "--method", "zero_shot"]).lr == 1.0
    for wrong in (
        "methods: 7\n",
        "methods:\n  sso:\n    lr: 1\n",
        "methods:\n  so:\n    rate: 1\n",
        "methods:\n  so: 7\n",
    ):
        Path("c.yaml").write_text(wrong)
        with pytest.raises(UserError, match=r"c\.yaml.*methods"):
            parse(["--config", "c.yaml"])


def test_published_values_of_a_method_lie_below_everything_else(tmp_path, monkeypatch):
    monkeypatch.setattr(METHODS["zero_shot"], "DEFAULTS", {"n_iters": 500, "lr": 7e-4})
    data = ["--method", "zero_shot", "--dataset", "dtd", "--root_path", "data", "--shots", "2"]
    assert (parse(data).lr, parse(data).iterations) == (7e-4, 1000)
    assert parse([*data, "--total_iters", "9"]).iterations == 9
    assert parse(["--method", "so", *data[2:]]).iterations == 4000


def test_shipped_configs_say_what_they_promise():
    configs = Path(__file__).parent.parent / "configs"
    assert yaml.safe_load((configs / "default.yaml").read_text()).keys() | {"total_iters", "epochs"} == set(
        Settings.__dataclass_fields__
    )
    data = ["--dataset", "dtd", "--root_path", "data", "--shots", "4"]
    default, released, paper = (
        parse(["--config", str(configs / f"{name}.yaml"), *data]) for name in ("default", "so_released", "so_paper")
    )
    assert default == released == parse(data)
    assert (paper.density_ratio, paper.t, paper.iterations) == (5e-4, 10, 2000)


def test_more_shots_than_images_are_drawn_with_repeats_and_say_so(run_main, tmp_path):
    fabricate("dtd", tmp_path / "data", per_class=8)  # 4 training images a class
    flags = ("--dataset", "dtd", "--root_path", tmp_path / "data", "--backbone", "tiny", "--total_iters", 1)
    assert "drawn twice" not in run_main(*flags, "--shots", 4)[3]
    code, _, _, err = run_main(*flags, "--shots", 5)
    assert code == 0 and "has 4" in err and "drawn twice" in err
