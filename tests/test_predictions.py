"""Predictions of a run and metrics, beside scikit-learn, torchmetrics and values computed by hand."""

import io
import statistics

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from scipy import optimize
from sklearn.metrics import accuracy_score, balanced_accuracy_score, brier_score_loss, log_loss, top_k_accuracy_score
from support.runs import TASK, error_of, experiment_of

import metrics
import predictions
import train
from datasets import Item, Task
from methods.adaptation import Adaptation

QUICK = ("--shots", 1, "--total_iters", 4, "--lr", 3e-3)


def of(logits, labels, **options):
    """Predictions of given logits: the features are the logits themselves."""
    return predictions.predict(lambda part: part, torch.as_tensor(logits), labels, **options)


def made_up(n=9000, classes=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(n, classes, generator=generator)
    return logits, torch.multinomial((logits / 2).softmax(dim=-1), 1, generator=generator)[:, 0].numpy()


# --- metrics


def slow_ece(probability, correct, bins):
    total = 0.0
    for m in range(bins):
        inside = [i for i, p in enumerate(probability) if m / bins < p <= (m + 1) / bins or (m == 0 and p == 0)]
        if inside:
            total += abs(sum(correct[i] for i in inside) - sum(probability[i] for i in inside))
    return 100 * total / len(probability)


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
@pytest.mark.parametrize("classes, n", [(2, 50), (12, 9000), (300, 700)])
def test_metrics_are_those_of_scikit_learn(classes, n):
    logits, labels = made_up(n, classes)
    found, p, every = of(logits, labels), logits.double().softmax(dim=-1).numpy(), range(classes)
    assert found.accuracy == pytest.approx(100 * accuracy_score(labels, p.argmax(axis=1)))
    values = found.metrics(15)
    assert values["macro_accuracy"] == pytest.approx(100 * balanced_accuracy_score(labels, p.argmax(axis=1)))
    assert values["nll"] == pytest.approx(log_loss(labels, p, labels=every), rel=1e-6)
    one_hot = np.eye(classes)[labels]
    scale = 0.5 if classes == 2 else 1.0  # for two classes scikit-learn has half of Brier's sum
    wanted = brier_score_loss(labels, p[:, 1]) if classes == 2 else np.square(p - one_hot).sum(axis=1).mean()
    assert scale * values["brier"] == pytest.approx(wanted, rel=1e-6)
    for bins in (1, 10, 15):
        assert found.calibration(bins)["ece"] == pytest.approx(slow_ece(p.max(axis=1), found.correct, bins), abs=1e-5)
    for k in (1, 2, 5)[: classes - 1]:
        top = top_k_accuracy_score(labels, logits.numpy(), k=k, labels=every) if classes > 2 else found.accuracy / 100
        assert (found.true_rank <= k).mean() == pytest.approx(top)
    np.testing.assert_allclose(found.true_probability, p[np.arange(n), labels], rtol=1e-5)
    np.testing.assert_allclose(found.probability, p.max(axis=1), rtol=1e-5)


def test_calibration_error_in_bins_that_are_known_by_hand():
    confidence = np.array([0.0, 0.1, 0.2, 0.2, 0.55, 1.0])
    correct = np.array([False, True, False, False, True, False])
    images, means, accuracies = metrics.reliability(confidence, correct, 5)
    assert images.tolist() == [4, 0, 1, 0, 1] and np.isnan(means[[1, 3]]).all() and np.isnan(accuracies[[1, 3]]).all()
    assert means[[0, 2, 4]] == pytest.approx([12.5, 55, 100]) and accuracies[[0, 2, 4]] == pytest.approx([25, 100, 0])
    assert metrics.ece(confidence, correct, 5) == pytest.approx((4 * 12.5 + 45 + 100) / 6)


def test_degenerate_inputs_have_values():
    one_class = of([[3.0], [-1.0]], [0, 0])
    assert one_class.accuracy == 100 and one_class.true_rank.tolist() == [1, 1]
    assert one_class.metrics(15) == {"macro_accuracy": 100, "nll": 0, "brier": 0, "ece": 0}
    tied = of([[1.0, 1, 1], [1, 1, 1], [0, 2, 2]], [0, 2, 2])  # the first of equals is predicted
    assert tied.predicted.tolist() == [0, 0, 1] and tied.true_rank.tolist() == [1, 3, 2] and tied.accuracy == 100 / 3
    sure = of([[1000.0, 0], [1000, 0]], [0, 1])
    assert sure.true_probability.tolist() == [1, 0] and sure.calibration(15) == {"nll": 500, "brier": 1, "ece": 50}
    assert metrics.macro_accuracy(np.array([0, 0, 0, 5]), np.array([0, 0, 1, 5])) == pytest.approx(500 / 6)
    assert np.isnan(metrics.class_accuracies(np.array([0, 2]), np.array([0, 1]), 4)).tolist() == [0, 1, 0, 1]
    assert [metrics.harmonic_mean(*pair) for pair in ((80, 60), (0, 50), (0, 0))] == [pytest.approx(480 / 7), 0, 0]
    assert metrics.confusions(np.array([0, 0, 1, 2, 2, 2]), np.array([1, 0, 2, 0, 0, 2])) == [
        (2, 0, 2),
        (0, 1, 1),
        (1, 2, 1),
    ]
    for bad in (float("nan"), float("inf")):
        error_of(predictions.NotFinite, of, [[0.0, bad]], [0])


@pytest.mark.parametrize("classes, true_t", [(12, 2.0), (3, 0.3), (2, 7.0)])
def test_the_temperature_is_the_one_with_the_smallest_likelihood_loss(classes, true_t):
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(4000, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial((logits / true_t).softmax(dim=-1), 1, generator=generator)[:, 0].numpy()
    found = metrics.fit_temperature(logits.numpy(), labels)
    loss = lambda log_t: log_loss(labels, (logits / np.exp(log_t)).softmax(dim=-1))  # noqa: E731
    slow = optimize.minimize_scalar(loss, bounds=(-3, 4), method="bounded", options={"xatol": 1e-8})
    assert found == pytest.approx(np.exp(slow.x), rel=1e-4) and found == pytest.approx(true_t, rel=0.1)
    scaled = of(logits, labels, temperature=found).scaled
    assert scaled.calibration(15)["nll"] == pytest.approx(slow.fun) and scaled.scaled is None


def test_temperatures_of_degenerate_images_are_in_their_range():
    assert metrics.fit_temperature(np.array([[2.0], [3.0]]), np.array([0, 0])) == 1
    right, wrong = ([[2.0, 1], [0, 3]], [[1.0, 2], [3, 0]])
    found = [metrics.fit_temperature(np.array(logits), np.array([0, 1])) for logits in (right, wrong)]
    assert found == pytest.approx(metrics.TEMPERATURES)


# --- the files of a run


def read(folder, name="predictions.csv"):
    return pd.read_csv(folder / name)


def test_predictions_are_what_accuracy_and_metrics_are_made_of(run_main, tmp_path):
    code, record, _, err = run_main(*QUICK, "--save_logits", "--ece_bins", 10, "--save_path", "w")
    assert code == 0, err
    folder = tmp_path / "results" / record["run_id"]
    rows, logits, classes = read(folder), load_file(folder / predictions.LOGITS), read(folder, "classes.csv")
    assert not rows.predicted.equals(rows.zero_shot_predicted) and rows.label.tolist() == logits["labels"].tolist()
    for head, model in (("", "adapted"), ("zero_shot_", "zero_shot")):
        own, right = rows[f"{head}predicted"], rows[f"{head}predicted"] == rows.label
        accuracy = "zero_shot_accuracy" if head else "test_accuracy"
        assert 100 * right.sum() / len(rows) == record[accuracy]
        assert (rows[f"{head}true_rank"] == 1).equals(right)
        p = logits[model].double().softmax(dim=-1).numpy()
        assert p.argmax(axis=1).tolist() == own.tolist() and logits[model].dtype == torch.float16
        np.testing.assert_allclose(rows[f"{head}probability"], p.max(axis=1), atol=2e-3)
        assert record[f"{head}ece"] == pytest.approx(metrics.ece(rows[f"{head}probability"], right, 10), abs=1e-3)
        assert record[f"{head}nll"] == pytest.approx(-np.log(rows[f"{head}true_probability"]).mean(), rel=1e-4)
        recall = right.groupby(rows.label).mean() * 100
        column = classes["zero_shot_accuracy" if head else "accuracy"]
        np.testing.assert_allclose(column, recall, rtol=1e-5)
        assert record[f"{head}macro_accuracy"] == pytest.approx(recall.mean())
    assert classes.images.sum() == len(rows) and classes.class_name[3] == "three"
    _, again, _, _ = run_main(*QUICK, "--ece_bins", 10, "--save_path", "w", "--eval_only")
    assert (tmp_path / "results" / again["run_id"] / "predictions.csv").read_bytes() == (
        folder / "predictions.csv"
    ).read_bytes()
    assert not (tmp_path / "results" / again["run_id"] / predictions.LOGITS).exists()


def test_a_recorded_run_is_done_again_for_its_logits(run_main, tmp_path):
    flags = ("--shots", 1, "--method", "zero_shot")
    _, first, _, _ = run_main(*flags)
    _, second, out, err = run_main(*flags, "--save_logits")
    assert "already done" not in out and "logits" in err and first["run_id"] == second["run_id"]
    assert (tmp_path / "results" / first["run_id"] / predictions.LOGITS).is_file()
    assert "already done" in run_main(*flags, "--save_logits")[2] and "already done" in run_main(*flags)[2]
    run_main(*flags, "--force")
    assert not list((tmp_path / "results").rglob(predictions.LOGITS))


def test_a_long_table_is_compressed_and_odd_names_stay_readable():
    names = ['a, "b"', "c"]
    items = tuple(Item(path, i % 2) for i, path in enumerate(['x,"1".png', "y\nz.png", "bad\udcff.png"] * 6000))
    task = Task("odd", names, ("{}",), (), (), items, None)
    found = of(torch.eye(2).repeat(9000, 1), [item.label for item in items])
    files = predictions.files(task, found, found)
    assert files["predictions.csv"] is None and files[predictions.LOGITS] is None
    rows = pd.read_csv(io.BytesIO(files["predictions.csv.gz"]), compression="gzip")
    assert rows.path[:3].tolist() == ['x,"1".png', "y\nz.png", "bad\\xff.png"] and len(rows) == 18000
    assert files == predictions.files(task, found, found)
    assert pd.read_csv(io.StringIO(files["classes.csv"])).class_name.tolist() == names


def test_a_model_whose_logits_are_no_numbers_has_diverged(monkeypatch):
    experiment = experiment_of("adam", TASK)
    adaptation = Adaptation(experiment, {})
    monkeypatch.setattr(type(experiment), "test_features", lambda self: torch.full((0, 4), 0.0))
    monkeypatch.setattr(type(experiment), "predictions", lambda *_: of([[float("nan")]], [0]))
    error_of(train.TrainingDiverged, train.predict, experiment, adaptation)


def test_the_temperature_is_fitted_on_val_images_and_travels_with_the_weights(run_main):
    flags = (*QUICK, "--shots", 4, "--save_path", "w")
    _, plain, _, _ = run_main(*flags)
    _, scaled, out, err = run_main(*flags, "--temperature_scaling")
    assert plain["run_id"] == scaled["run_id"] and "temperature" in err and "already done" not in out
    same = {"test_accuracy", "nll", "brier", "ece", "final_loss"}
    assert {name: plain[name] for name in same} == {name: scaled[name] for name in same} and plain[
        "temperature"
    ] is None
    assert scaled["scaled_nll"] < scaled["nll"] and scaled["temperature"] != 1
    _, evaluated, _, _ = run_main(*flags, "--eval_only", "--temperature_scaling")
    for name in ("temperature", "scaled_nll", "scaled_brier", "scaled_ece"):
        assert evaluated[name] == scaled[name]


@pytest.mark.parametrize(
    "flags", [("--method", "zero_shot"), ("--test_part", "val"), ("--eval_only", "--save_path", "w")], ids=str
)
def test_temperature_scaling_needs_val_images_and_a_trained_model(run_main, flags):
    before = ["w", "results"] if "--eval_only" in flags else []
    if before:
        run_main(*QUICK, "--save_path", "w")
    code, record, _, err = run_main(*QUICK[:2], *flags, "--temperature_scaling")
    assert code == 2 and record is None and "--temperature_scaling" in err.splitlines()[-1]


def test_an_evaluation_on_new_classes_has_the_harmonic_mean(run_main):
    flags = (*QUICK, "--save_path", "w")
    _, base, _, _ = run_main(*flags, "--classes", "base")
    _, again, _, _ = run_main(*flags, "--classes", "base", "--eval_only")
    _, new, _, _ = run_main(*flags, "--classes", "new", "--eval_only")
    assert base["harmonic_mean"] is None is again["harmonic_mean"] and new["base_accuracy"] == base["test_accuracy"]
    wanted = statistics.harmonic_mean([base["test_accuracy"], new["test_accuracy"]])
    assert new["harmonic_mean"] == pytest.approx(wanted) and new["test_accuracy"] > 0
