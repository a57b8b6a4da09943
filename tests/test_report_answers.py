"""The report's answers: which method is best, what it does elsewhere, which images and classes it gets wrong."""

import itertools
import re
import statistics

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from support.report import Folder, texts
from support.runs import call

from scripts import report
from scripts.reporting import comparison, deviations
from scripts.reporting.errors import read_errors
from scripts.reporting.summary import below_zero_shot_sheet, ranking
from scripts.reporting.transfer import UNCHANGED, base_to_new_tables, transfer_tables

ELSEWHERE = {"eval_only": True, "dataset": "imagenet"}


@pytest.fixture
def results(tmp_path):
    return Folder(tmp_path / "results")


# --- which is best


def test_the_ranking_says_which_is_best_by_how_much_and_at_what_cost(results):
    accuracies = {"so": (80, 82, 84), "lora": (79, 81.5, 84), "adam": (70, 71, 69), "zero_shot": (60, 60, 60)}
    for (method, values), name in itertools.product(accuracies.items(), ("dtd", "eurosat")):
        cost = {"train_seconds": {"so": 100.0, "lora": 10.0}.get(method, 50.0), "trainable_weights": 5000}
        for seed, accuracy in enumerate(values):
            results.add(method, name, seed=seed, accuracy=accuracy + (name == "dtd"), zero_shot_accuracy=60.0, **cost)
    results.add("so", "dtd", shots=16, accuracy=99)  # one configuration only
    results.add("so", "dtd", seed=7, accuracy=99, classes="base")
    for seed in range(3):
        results.add("so", "digits", seed=seed, accuracy=99)  # of no suite: the average comes first
    found = ranking(results.read())
    labels = found.rows.configuration.tolist()
    assert [label.split()[0] for label in labels] == ["so", "lora", "adam", "zero_shot"]
    best, second, *_ = found.rows.itertuples()
    assert best.accuracy == pytest.approx(82.5) and best.gain == pytest.approx(22.5)
    means = [statistics.mean(accuracies["lora"]) - statistics.mean(accuracies["so"])] * 2  # a mean for each dataset
    assert second.ahead == pytest.approx(means[0]) and (best.seconds, best.weights) == (100, 5000)
    answers = " ".join(found.answers)
    assert "is best after 4 shots, average of 2 datasets: 82.50 %, 22.50 points above" in answers
    assert "5,000 weights: 100.0 s and 900 MiB on the CPU" in answers and "On digits, 4 shots: so" in answers


@pytest.mark.parametrize("lead, words", [(5, "a clear difference"), (0.1, "no clear difference")])
def test_a_lead_is_clear_only_if_its_interval_leaves_out_zero(results, lead, words):
    so, lora = np.array([80, 82, 84.0]) + lead, np.array([80, 82.5, 83.5])
    for seed in range(3):
        results.add("so", "digits", seed=seed, accuracy=so[seed], train_seconds=99.0)
        results.add("lora", "digits", seed=seed, accuracy=lora[seed], train_seconds=1.0)
    found = ranking(results.read())
    low, high = stats.ttest_rel(so, lora).confidence_interval(0.95)
    assert (low > 0) == (lead == 5)
    assert f"{low:+.2f} to {high:+.2f}: {words}" in " ".join(found.answers)
    assert ("lora is not clearly worse" in " ".join(found.answers)) == (lead == 0.1)


def test_costs_are_compared_on_one_device(results):
    for seed in (1, 2):
        results.add("so", "digits", seed=seed, device="NVIDIA A100", train_seconds=10.0)
    results.add("lora", "digits", device="NVIDIA H100", train_seconds=1.0)
    found = ranking(results.read())
    seconds = {row.configuration: row.seconds for row in found.rows.itertuples()}
    assert seconds["so"] == 10 and np.isnan(seconds["lora"]) and "on NVIDIA A100" in found.sheet.notes[0]


def test_datasets_below_zero_shot_are_named(results):
    for name, accuracy in (("dtd", 43.0), ("eurosat", 50.0), ("ucf101", 41.0)):
        for seed in (1, 2):
            results.add("so", name, seed=seed, accuracy=accuracy + seed, zero_shot_accuracy=45.0)
    sheet = below_zero_shot_sheet(results.read())
    assert texts(sheet) == {"so": ["2 of 3: UCF101 -2.50, DTD -0.50"]}
    results.add("so", "digits", accuracy=99, zero_shot_accuracy=1.0)
    assert texts(below_zero_shot_sheet(results.read()))["so"][0].startswith("2 of 4")


def test_nothing_is_below_zero_shot_and_nothing_ranked_without_such_runs(results):
    results.add("so", accuracy=80, zero_shot_accuracy=10.0, classes="base")
    assert below_zero_shot_sheet(results.read()) is None and ranking(results.read()) is None


# --- elsewhere


def test_runs_on_half_of_the_classes_stand_apart(results):
    for method in ("so", "lora"):
        for classes in ("all", "base"):
            results.add(method, "dtd", classes=classes)
    read = results.read()
    assert read.labels(read.tested) == ["lora", "so"]
    assert set(read.tested.short_name) == {"DTD", "DTD base classes"}
    rows = comparison.differences(read, "so", "lora")
    assert rows.data_set.tolist() == ["DTD", "DTD base classes"] and rows.pairs.tolist() == [1, 1]
    assert set(deviations.deviations(read)[0].data_set) <= {"DTD"}


def test_base_to_new_begins_with_the_unchanged_model(results):
    for name, before in (("dtd", (60.0, 50.0)), ("imagenet", (70.0, 40.0))):
        for seed, (classes, value) in itertools.product((1, 2), zip(("base", "new"), before)):
            flags = {"eval_only": True, "base_accuracy": 80.0} if classes == "new" else {}
            results.add("so", name, seed=seed, classes=classes, zero_shot_accuracy=value, **flags)
    (table,) = base_to_new_tables(results.read())
    h = statistics.harmonic_mean
    wanted = [65, 45, h([65, 45]), (h([60, 50]) + h([70, 40])) / 2, 70, 40, h([70, 40]), 60, 50, h([60, 50])]
    assert [float(cell) for cell in texts(table)[UNCHANGED]] == pytest.approx(wanted, abs=0.005)
    for classes in ("base", "new"):  # with other prompts the unchanged model is another one
        flags = {"eval_only": True, "base_accuracy": 80.0} if classes == "new" else {}
        results.add("so", "dtd", classes=classes, prompts="specific", zero_shot_accuracy=61.0, **flags)
    (table,) = base_to_new_tables(results.read())
    assert texts(table)[UNCHANGED] == ["-"] * 4 + texts(table)[UNCHANGED][4:7] + ["-"] * 3


def test_base_to_new_has_a_row_for_each_configuration(results):
    """Also for those that differ only in what names do not say: the images that the settings were chosen on."""
    for tuned_on, value in (("none", 50.0), ("val", 60.0)):
        flags = {"classes": "new", "eval_only": True, "base_accuracy": 80.0, "tuned_on": tuned_on}
        results.add("so", "dtd", accuracy=value, **flags)
    (table,) = base_to_new_tables(results.read())
    assert sorted(cell.text for row in table.rows[1:] for cell in row[2:3]) == ["50.00", "60.00"]


def test_base_to_new_has_both_harmonic_means(results):
    base, new = np.random.default_rng(0).uniform(40, 90, (2, 3, 2, 2))
    for (m, d, s), _ in np.ndenumerate(base):
        name, method = ("imagenet", "dtd", "digits")[m], ("so", "lora")[d]
        results.add(method, name, seed=s, accuracy=base[m, d, s], classes="base")
        recorded = {"base_accuracy": base[m, d, s]} if method == "lora" else {}  # of so by the run with its settings
        epochs = {"total_iters": 7} if method == "lora" else {}
        flags = {"classes": "new", "eval_only": True, **recorded, **epochs}
        results.add(method, name, seed=s, accuracy=new[m, d, s], **flags)
        results.add("zero_shot", name, seed=s, accuracy=50, classes="base")
        results.add("zero_shot", name, seed=s, accuracy=25, classes="new")
    suite, digits = base_to_new_tables(results.read())
    assert suite.header[1:5] == ["base", "new", "H, averages first", "mean of H"] and digits.header[-1] == "digits H"
    assert texts(suite)["zero_shot"][:4] == ["50.00", "25.00", "33.33", "33.33"]
    h = statistics.harmonic_mean
    for d, method in enumerate(("so", "lora")):
        of_base, of_new = base[:2, d], new[:2, d]  # dataset, seed
        first = h([of_base.mean(), of_new.mean()])
        mean = np.mean([h(pair) for pair in zip(of_base.flat, of_new.flat)])
        wanted = [of_base.mean(), of_new.mean(), first, mean]
        assert [float(cell) for cell in texts(suite)[method][:4]] == pytest.approx(wanted, abs=0.005)
        assert abs(first - mean) > 0.05
        per_seed = pd.Series([h(pair) for pair in zip(base[2, d], new[2, d])])
        assert texts(digits)[method][2] == f"{per_seed.mean():.2f} ± {per_seed.std():.2f}"


def test_transfer_tables_have_the_source_and_the_average_of_the_targets(results):
    results.add("so", "imagenet", accuracy=70)
    for name, accuracy in (("dtd", 40), ("eurosat", 50), ("imagenet_v2", 60), ("imagenet_a", 30)):
        results.add("so", accuracy=accuracy, test_dataset=name, zero_shot_accuracy=35.0, **ELSEWHERE)
    results.add("lora", accuracy=20, test_dataset="dtd", zero_shot_accuracy=35.0, **ELSEWHERE)
    cross, shift = transfer_tables(results.read())
    assert cross.title == "Cross-dataset transfer: trained on ImageNet with 4 shots"
    assert shift.title == "Domain shift: trained on ImageNet with 4 shots" and shift.header[-1] == "average of 2"
    assert texts(cross)["so"] == ["70.00", "50.00", "40.00", "45.00"] and texts(cross)["lora"] == [
        "-",
        "-",
        "20.00",
        "-",
    ]
    assert texts(shift) == {"zero-shot CLIP": ["-", *["35.00"] * 3], "so": ["70.00", "60.00", "30.00", "45.00"]}


# --- errors


def test_errors_and_calibration_are_those_of_the_predictions(run_main, tmp_path):
    for seed in (1, 2):
        flags = ("--shots", 1, "--seed", seed)
        assert run_main(*flags, "--method", "tip_adapter", "--temperature_scaling")[0] == 0
        assert run_main(*flags, "--method", "zero_shot")[0] == 0
    read = report_of = Folder(tmp_path / "results")
    (errors,), notes = read_errors(read.read(), report_of.path)
    tables = {path.parent.name: pd.read_csv(path) for path in report_of.path.glob("*/predictions.csv")}
    both = pd.concat([table for name, table in tables.items() if name.startswith("tip_adapter")])
    assert not notes and errors.best == "tip_adapter" and errors.curves["tip_adapter"].images.sum() == len(both)
    wrong = both[both.label != both.predicted].groupby(["label", "predicted"]).size().sort_values(ascending=False)
    first = errors.pairs[0]
    assert first.errors == wrong.iloc[0] == wrong[(first.label, first.predicted)]
    assert len(errors.pairs) == min(8, len(wrong)) and first.tested == (both.label == first.label).sum()
    assert 1 <= len(first.images) <= 4 and first.images[0][0].startswith("data:image/jpeg;base64,")
    records = pd.DataFrame([record for _, record in read.read().runs.iterrows()])
    scaled = records[records.method == "tip_adapter"].scaled_ece.mean()
    rows = texts(errors.calibration)
    assert rows["tip_adapter, temperature-scaled"][-1].startswith(f"{scaled:.2f}")
    assert list(rows) == ["zero_shot", "tip_adapter", "tip_adapter, temperature-scaled", "zero-shot, all runs"]
    accuracy = 100 * (both.label == both.predicted)[both.label == 0].mean()
    assert texts(errors.classes)["zero"][-1] == f"{accuracy:.1f}"
    report.main([str(report_of.path), "--out", "report"])
    page = (tmp_path / "report" / "index.html").read_text()
    images = re.findall(r"<img src='([^']*)'", page)
    assert images == [uri for pair in errors.pairs for uri, _ in pair.images] and "<strong>tip_adapter is best" in page


def test_damaged_predictions_are_named_and_images_that_are_not_here_too(results, tmp_path):
    table = "path,label,predicted,probability,zero_shot_predicted,zero_shot_probability\na.jpg,0,1,0.9,0,0.5\n"
    results.add("so", "dtd", accuracy=0)
    (results.path / "run1" / "predictions.csv").write_text(table)
    (results.path / "run1" / "config.yaml").write_text(f"dataset: dtd\nroot_path: {tmp_path}/gone\n")
    results.add("lora", "dtd", accuracy=0)
    (results.path / "run2" / "predictions.csv").write_text("path,label\na,0\n")
    (errors,), notes = read_errors(results.read(), results.path)
    assert len(notes) == 2 and "run2" in notes[0] and "gone" in notes[1] and not errors.pairs[0].images
    assert errors.pairs[0].names == ("0", "1")
    code, _, _, err = call(report.main, results.path, "--out", tmp_path / "out")
    assert code == 0 and "run2" in err
