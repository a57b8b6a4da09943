"""Reports on results: what is pooled and what is not, means and intervals, published numbers, figures, the page."""

import itertools
import json
import re
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy import stats
from support.report import Folder, texts
from support.runs import call

from scripts import report
from scripts.reporting import comparison, deviations, figures
from scripts.reporting.results import ELEVEN, PUBLISHED
from scripts.reporting.sheets import accuracy_tables, cost_tables, validation_tables
from scripts.reporting.summary import ranking


@pytest.fixture
def results(tmp_path):
    return Folder(tmp_path / "results")


@pytest.fixture
def no_figures(monkeypatch):
    """They take most of a report's time."""
    monkeypatch.setattr(figures, "grids", lambda results, folder: ([], []))


@pytest.fixture
def make(results, tmp_path):
    """Makes the report; returns (exit code, stdout, stderr, folder)."""

    def run(*argv, out=tmp_path / "report"):
        code, _, stdout, err = call(report.main, results.path, "--out", out, *argv)
        return code, stdout, err, out

    return run


# --- what belongs together


@pytest.mark.parametrize(
    "change, words",
    [
        ({"lr": 0.0002000001}, "lr 0.0002000001"),
        ({"precision": "bf16"}, "precision bf16"),
        ({"prompts": "specific", "template": "a {} texture."}, "prompts specific"),
        ({"prompts": "own", "template": "one {}."}, "prompts own, template one {}."),
        ({"backbone": "w/mine.pt"}, "backbone mine.pt"),
        ({"weights_sha256": "e" * 64}, "backbone ViT-B/16 eeeeeeee"),
        ({"device": "NVIDIA H100"}, "device gpu"),
        ({"prune_first": True}, "prune_first true"),
        ({"total_iters": 600}, "total_iters 600"),
        ({"total_iters": None, "epochs": 50}, "epochs 50"),
        ({"unheard_of": 3}, "unheard_of 3"),
        ({"density_ratio": None}, "density_ratio -"),
        ({"odd": [1, "two"]}, 'odd [1, "two"]'),
    ],
    ids=str,
)
def test_runs_that_differ_in_a_setting_are_not_mixed(results, change, words):
    for seed in (1, 2):
        results.add(seed=seed, accuracy=50)
        results.add(seed=seed, accuracy=60, **change)
    (sheet,) = accuracy_tables(results.read())
    assert len(sheet.rows) == 2
    (label,) = [label for label in texts(sheet) if words in label.removesuffix(")").split("(")[1]]
    assert texts(sheet)[label][0] == "60.00 ± 0.00"


def test_what_runs_measure_and_what_varies_with_the_dataset_does_not_part_them(results):
    results.add(seed=1, device="NVIDIA H100")
    measured = {"train_seconds": 5.0, "changed_weights": 3, "optimizer_bytes": 9, "iterations": 3, "final_loss": 0.3}
    measured |= {"data_sha256": "a" * 64, "stopped_early": True, "peak_memory_mb": 3.0, "search_seconds": 1.0}
    measured |= {"checkpoint_bytes": 55, "git_commit": "def", "torch_version": "2.9", "nll": 1.0, "zero_shot_ece": 2.0}
    measured |= {"imbalance": "none", "imbalance_ratio": None, "label_noise": 0.0, "noise_kind": None, "ece_bins": 15}
    measured |= {"temperature": 1.5, "scaled_ece": 1.0, "base_accuracy": None}  # older records have none of these
    results.add(seed=2, device="NVIDIA A100", **measured)
    for dataset, template, iterations in (("dtd", "{} texture.", 80), ("eurosat", "satellite photo of {}.", 30)):
        results.add("adam", dataset, prompts="specific", template=template, epochs=10, total_iters=iterations)
    assert list(results.read().settings.index) == ["adam", "so"]


def test_values_that_were_searched_are_outcomes_and_their_list_is_the_setting(results):
    for seed, (lr, iterations) in enumerate(((0.001, 100), (0.01, 900), (0.01, 100))):
        lists = {"lr": [0.001, 0.001, 0.01, 0.01], "n_iters": [100, 900] * 2}
        results.add(seed=seed, lr=lr, total_iters=4 * iterations, search=lists)
        results.add(seed=seed, lr=0.001, search={"lr": [0.001, 0.1]})
    results.add(lr=0.001)
    read = results.read()
    assert read.runs.groupby("configuration").size().tolist() == [1, 3, 3]
    assert read.settings[["searched", "lr", "iterations"]].to_numpy().tolist() == [
        ["-", "0.001", "total_iters 8000"],
        ["lr of 0.001, 0.01; n_iters of 100, 900", "searched", "iterations searched"],
        ["lr of 0.001, 0.1", "searched", "total_iters 8000"],
    ]


def test_iterations_per_shot_and_in_all_are_told_apart_over_shots(results):
    for shots in (1, 2, 4):
        results.add(shots=shots, total_iters=2000 * shots)
        results.add(shots=shots, total_iters=600)
    read = results.read()
    assert {label: set(runs.shots) for label, runs in read.runs.groupby("configuration")} == {
        "so (n_iters 2000)": {1, 2, 4},
        "so (total_iters 600)": {1, 2, 4},
    }


def test_what_is_left_out_is_named(results, make, no_figures):
    results.add(accuracy=50, run_id="old")
    results.add(accuracy=60, run_id="new")  # the same settings and seed
    results.add(seed=2, accuracy=70, run_id="damaged")
    (results.path / "damaged" / "result.json").write_text('{"run_id": ')
    code, _, err, out = make()
    assert code == 0 and "old" in err and "damaged" in err
    for file in ("index.html", "tables.md"):
        assert all(note in (out / file).read_text() for note in ("1 run left out", "1 of 3 records damaged"))
    assert pd.read_csv(out / "runs.csv").test_accuracy.tolist() == [60]


def test_evaluated_weights_and_datasets_of_no_suite_have_separate_tables(results):
    results.add(accuracy=50)
    results.add(accuracy=40, eval_only=True, dataset="imagenet", test_dataset="dtd")
    results.add(accuracy=30, eval_only=True, dataset="imagenet", test_dataset="imagenet_v2")
    results.add(accuracy=20, eval_only=True, classes="new")
    results.add(accuracy=10, dataset="digits", backbone="tiny")
    for path in ("/a/mine", "/b/mine", "/b/other"):
        results.add(accuracy=len(path), dataset="folder", root_path=path, backbone="tiny")
    sheets = {sheet.title: sheet for sheet in accuracy_tables(results.read())}
    after = "Test accuracy after 4 shots on"
    assert list(sheets) == [
        f"{after} the eleven datasets",
        f"{after} digits, folder:/a/mine, folder:/b/mine, folder:other",
        f"{after} the eleven datasets, evaluated weights",
        f"{after} variants of ImageNet, evaluated weights",
        f"{after} dtd new classes, evaluated weights",
    ]
    first, own, moved, variants, new = sheets.values()
    assert texts(first) == {"so (backbone ViT-B/16)": ["50.00", "50.00"]}
    assert texts(own) == {"so (backbone tiny)": ["10.00", "7.00", "7.00", "8.00"]}
    label = "so, evaluated weights (trained_on {})"
    assert texts(moved) == {label.format("imagenet"): ["40.00"] * 2}
    assert texts(variants) == {label.format("imagenet"): ["30.00"] * 2}
    assert texts(new) == {label.format("the same"): ["20.00"]}
    results.add(accuracy=20, eval_only=True, classes="new", base_accuracy=70.0, seed=2)
    assert texts([*accuracy_tables(results.read())][-1]) == texts(new)


# --- tables


def test_the_table_has_means_and_deviations_and_marks_what_is_missing(results):
    accuracies = np.random.default_rng(0).uniform(20, 90, (3, 11, 3))
    for (m, d, s), accuracy in np.ndenumerate(accuracies):
        method, dataset = ("lora", "zero_shot", "so")[m], list(ELEVEN)[::-1][d]
        if (method, dataset) != ("lora", "dtd") and (method, dataset, s) != ("so", "fgvc", 2):
            results.add(method, dataset, seed=s + 5, accuracy=accuracy)
    (sheet,) = accuracy_tables(results.read())
    assert sheet.header == ["method", *ELEVEN.values(), "average of 11"]
    assert list(texts(sheet)) == ["zero_shot", "lora", "so"]
    by_name = dict(zip(("lora", "zero_shot", "so"), accuracies[:, ::-1]))
    for method, cells in texts(sheet).items():
        for dataset, cell, values in zip(ELEVEN, cells, by_name[method]):
            wanted = f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"
            if (method, dataset) == ("lora", "dtd"):
                wanted = "-"
            if (method, dataset) == ("so", "fgvc"):
                wanted = f"{values[:2].mean():.2f} ± {values[:2].std(ddof=1):.2f} (n=2)"
            assert cell == wanted, (method, dataset)
    per_seed = by_name["zero_shot"].mean(axis=0)
    assert texts(sheet)["zero_shot"][-1] == f"{per_seed.mean():.2f} ± {per_seed.std(ddof=1):.2f}"
    assert texts(sheet)["lora"][-1] == "-"
    means = [values[:2].mean() if name == "fgvc" else values.mean() for name, values in zip(ELEVEN, by_name["so"])]
    assert texts(sheet)["so"][-1] == f"{np.mean(means):.2f}"
    assert "over 3 of the seeds 5, 6, 7" in sheet.notes[0] and len(sheet.notes) == 3


def test_markdown_and_latex_have_the_same_table(results):
    for seed in (1, 2):
        results.add("lora", "imagenet", seed=seed, accuracy=50 + seed)
        results.add("so", "dtd", seed=seed, accuracy=60, odd_name="50% & a_b\\c|d")
        results.add("so", "dtd", seed=seed, accuracy=70)
    (sheet,) = accuracy_tables(results.read())
    markdown = [re.split(r"(?<!\\)\|", line)[1:-1] for line in sheet.markdown().splitlines() if line.startswith("|")]
    assert len(markdown) == 5 and {len(row) for row in markdown} == {4}
    latex = sheet.latex()
    body = [line.removesuffix(r" \\") for line in latex.splitlines() if line.endswith(r"\\")]
    assert len(body) == 4 and {len(re.split(r"(?<!\\)&", line)) for line in body} == {4}
    assert [latex.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule", "{lccc}")] == [1] * 4
    assert r"51.50 $\pm$ 0.71 & - & - \\" in latex and r"50\% \& a\_b\textbackslash{}c|d" in latex
    assert "± 0.71 | - | - |" in sheet.markdown()


def test_costs_stand_beside_accuracies_of_all_shots(results):
    for seed, shots in itertools.product((1, 2), (1, 16)):
        cost = {"trainable_weights": 9000, "changed_weights": 1000 * shots + seed, "optimizer_bytes": 1500 * seed}
        for name in ("digits", "imagenet", "dtd"):
            accuracy = 10 * shots / 16 + seed + (name == "dtd")
            results.add("so", name, shots=shots, seed=seed, accuracy=accuracy, **cost, train_seconds=shots * seed)
    results.add("zero_shot", "digits", seed=1, shots=1, accuracy=70)
    of_eleven, digits = cost_tables(results.read())
    assert digits.header == [
        "method",
        "1 shot",
        "16 shots",
        "trained",
        "changed",
        "optimizer",
        "training",
        "test",
        "memory",
    ]
    so = ["2.12 ± 0.71", "11.50 ± 0.71", "9,000", "16,002", "2 kB", "24.0 s", "-", "900 MiB"]
    assert texts(digits) == {"zero_shot": ["70.00 (n=1)", *"-------"], "so": so}
    assert texts(of_eleven)["so"] == ["2.62 ± 0.71", "12.00 ± 0.71", *so[2:]]
    assert "2026-01-01; device cpu; torch 2.6.0; commit abc." in digits.notes[-1]


def test_validation_accuracies_are_ranked_and_stand_in_no_other_table(results):
    found = {1e-4: (50, 70), 1e-3: (70, 60), 1e-2: (99, None)}  # at 1 and 4 shots; the last diverged once
    for lr, accuracies in found.items():
        for shots, accuracy in zip((1, 4), accuracies):
            for seed in (1, 2) if accuracy else (1,):
                results.add("so", "digits", shots, seed, accuracy or 98, lr=lr, test_part="val", total_iters=600)
    results.add("lora", "digits", test_part="val", accuracy=65)
    (sheet,) = validation_tables(results.read())
    ranked = [row[0].text for row in sheet.rows if "so" in row[0].text]
    assert ranked == [f"so (lr {lr})" for lr in ("0.001", "0.0001", "0.01")]
    assert texts(sheet)["so (lr 0.001)"] == ["70.00 ± 0.00", "60.00 ± 0.00", "65.00"]
    assert texts(sheet)["so (lr 0.01)"] == ["99.00 ± 0.00", "98.00 (n=1)", "-"]
    assert not accuracy_tables(results.read()) and not cost_tables(results.read())
    assert comparison.chosen_pairs(results.read(), None) == []
    assert figures.grids(results.read(), results.path)[0] == []


# --- differences


def test_differences_are_paired_t_tests(results, make, no_figures):
    generator = np.random.default_rng(1)
    names = ("imagenet", "dtd", "ucf101", "digits", "birds")  # the last two have no mean
    a, b = generator.uniform(40, 60, (2, len(names), 4))
    for (d, seed), _ in np.ndenumerate(a):
        own = {"data_sha256": "the same"} if names[d] == "birds" else {}
        results.add("so", names[d], seed=seed, accuracy=a[d, seed], **own)
        if (d, seed) != (1, 0):  # a run that is missing
            results.add("lora", names[d], seed=seed, accuracy=b[d, seed], **own)
    results.add("so", "fgvc", accuracy=99)  # a dataset that is missing
    for seed, changed in ((9, "split_sha256"), (10, "data_sha256")):
        results.add("so", "ucf101", seed=seed, accuracy=99)
        results.add("lora", "ucf101", seed=seed, accuracy=1, **{changed: "other images"})
    code, _, _, out = make()
    assert code == 0
    rows = pd.read_csv(out / "differences.csv").set_index("data_set")
    assert list(rows.index) == ["ImageNet", "DTD", "UCF101", "mean of 3", "birds", "digits"]
    assert rows.pairs.tolist() == [4, 3, 4, 11, 4, 4] and set(rows.a) == {"so"} and set(rows.b) == {"lora"}
    differences = []
    for d, name in enumerate(("ImageNet", "DTD", "UCF101", "digits", "birds")):
        first, second = (a[d], b[d]) if d != 1 else (a[d, 1:], b[d, 1:])
        test = stats.ttest_rel(first, second)
        wanted = [first.mean(), second.mean(), (first - second).mean(), *test.confidence_interval(0.95)]
        assert rows.loc[name, ["mean_a", "mean_b", "difference", "low", "high"]].tolist() == pytest.approx(wanted)
        differences.append((first - second).mean())
    wanted = stats.ttest_1samp(differences[:3], 0).confidence_interval(0.95)
    mean = rows.loc["mean of 3"]
    assert (mean.difference, mean.low, mean.high) == pytest.approx((np.mean(differences[:3]), *wanted))
    page = (out / "index.html").read_text()
    assert "without a partner with the same images: lora 6." in page


@pytest.mark.parametrize(
    "change, pairs",
    [({"split_sha256": "test part"}, 1), ({"classes": "base"}, 0), ({"data_sha256": "test part"}, 1), ({"seed": 2}, 0)],
    ids=str,
)
def test_zero_shot_runs_which_have_no_training_images_are_paired_with_others(results, change, pairs):
    results.add("so", accuracy=60)
    results.add("zero_shot", accuracy=50, **change)
    rows = comparison.differences(results.read(), "so", "zero_shot")
    assert rows.difference.tolist() == [10] * pairs
    assert comparison.differences(results.read(), "zero_shot", "so").difference.tolist() == [-10] * pairs


def test_pairs_are_chosen_by_method_or_label(results, make, no_figures):
    results.add("lora", accuracy=50)
    for t in (5, 10):
        results.add("so", accuracy=50 + t, t=t)
    _, _, _, out = make()
    assert pd.read_csv(out / "differences.csv").empty and "--compare A B" in (out / "index.html").read_text()
    _, _, _, out = make("--compare", "so (t 10)", "lora", "--compare", "lora", "so (t 5)")
    rows = pd.read_csv(out / "differences.csv")
    assert rows.difference.tolist() == [10, -5]
    assert rows.low.isna().all() and rows.high.isna().all()  # one pair has no interval


# --- published numbers


PUBLISHED_ROWS = {row["name"]: row for row in PUBLISHED["rows"]}


def test_published_means_are_those_of_the_datasets():
    for name, shots in (("SO", 4), ("LoRA by SO's authors", 4), ("GDA", 16)):
        row = PUBLISHED_ROWS[name]
        assert row["data_sets"][shots].keys() == ELEVEN.keys()
        assert np.mean(list(row["data_sets"][shots].values())) == pytest.approx(row["means"][shots], abs=0.051)
    for row in PUBLISHED["base_to_new"]:
        expected = 2 * row["base"] * row["new"] / (row["base"] + row["new"])
        assert row["harmonic"] == pytest.approx(expected, abs=0.2 if row["name"] in ("RPO", "HPT") else 0.011)


def test_what_is_the_same_for_all_seeds_is_no_clear_difference(results):
    for seed in (1, 2, 3):
        results.add("so", accuracy=50.2, seed=seed)
        results.add("lora", accuracy=50.0, seed=seed)
    lead = ranking(results.read()).answers[1]
    assert "0.20 points" in lead and "nothing of chance" in lead and "clear" not in lead


def test_published_tables_name_protocol_and_source():
    vit, rn50, new, transfer, ablations = deviations.published_sheets()
    protocol = "prompts released; validation none; precision fp32; seeds unknown"
    assert texts(vit)["SO"] == ["73.8", "76.6", "78.9", "-", "-", protocol, "arxiv.org/abs/2504.12436"]
    assert texts(vit)["SkipTuning"][:5] == ["≈ 72.2", "≈ 75.2", "≈ 78.4", "≈ 81.0", "≈ 83.9"]
    assert texts(rn50)["GDA"][4] == "76.0" and texts(new)["2SFS"][:3] == ["85.55", "75.48", "80.20"]
    assert texts(transfer)["TCP"][:3] == ["71.40", "66.29", "-"]
    assert texts(ablations)["no momentum"][:2] == ["67.80", "76.70"]
    rows = [row for part in ("rows", "rn50", "base_to_new") for row in PUBLISHED[part]]
    assert all(row["protocol"].keys() == set(deviations.PROTOCOL) for row in rows if "protocol" in row)


def test_deviations_where_the_settings_match(results):
    published = PUBLISHED_ROWS["SO"]["data_sets"][4]
    for name, accuracy in published.items():
        for seed in (1, 2):
            results.add("so", name, seed=seed, accuracy=accuracy + seed)
            results.add("so", name, seed=seed, accuracy=accuracy - 1, density_ratio=5e-4, t=10, total_iters=2000)
    results.add("so", "dtd", shots=1, accuracy=60)  # no mean without the other ten
    results.add("so", "dtd", eval_only=True)
    results.add("so", "digits")
    rows, notes = deviations.deviations(results.read())
    assert not notes and len(rows) == 24 and set(rows.shots) == {4}
    released = rows[rows.configuration.str.contains("t 5")].set_index("data_set")
    single = released.drop("mean of 11")
    assert single.published.to_dict() == {ELEVEN[name]: accuracy for name, accuracy in published.items()}
    assert single.deviation.tolist() == pytest.approx([1.5] * 11) and set(released.seeds) == {2}
    mean = released.loc["mean of 11"]
    assert (mean.published, mean.deviation, mean.sd) == pytest.approx((78.9, 78.9454 + 1.5 - 78.9, 0.5**0.5), abs=1e-3)
    assert rows[rows.configuration.str.contains("t 10")].deviation.tolist()[:11] == pytest.approx([-1] * 11)
    verdicts, paper, code = deviations.deviation_sheets(rows)
    assert list(texts(verdicts).values()) == [["SO", "0", "0", "12", "-"], ["SO", "12", "0", "0", "-"]]
    assert code.title == "so (density_ratio 5e-05, t 5, n_iters 2000) minus SO as published"
    assert (
        texts(code)["DTD"] == ["4", "+1.50", "± 11.00", "within", "66.4", "67.90 ± 0.71", "2"]
        and texts(paper)["DTD"][1] == "-1.00"
    )


OTHER = [{"backbone": "ViT-B/32"}, {"prompts": "specific"}, {"t": 10}, {"total_iters": 2000}, {"prune_first": True}]


@pytest.mark.parametrize("change", [*OTHER, {"encoder": None}], ids=str)
def test_other_settings_are_not_compared_with_published_numbers(results, change):
    results.add("so", "dtd", **change)
    rows, notes = deviations.deviations(results.read())
    assert rows.empty and next(iter(change)) in notes[0]


# --- figures


def drawn(results, name):
    """The axes of each panel of a figure."""
    grids, _ = figures.grids(results.read(), results.path)
    (grid,) = [grid for grid in grids if grid.name == name]
    axes = {}
    for title, draw in grid.panels.items():
        axes[title] = Figure().subplots()
        draw(axes[title])
    return grid, axes


def test_accuracy_against_shots_shows_means_and_deviations(results):
    for shots, seed, name in itertools.product((1, 4), (1, 2), ("dtd", "eurosat")):
        results.add("so", name, shots=shots, seed=seed, accuracy=50 + shots + 2 * seed + 10 * (name == "dtd"))
        if (shots, name) != (4, "dtd"):
            results.add("lora", name, shots=shots, seed=seed, accuracy=30)
    grid, axes = drawn(results, "accuracy_against_shots")
    assert list(axes) == ["average of 2", "EuroSAT", "DTD"] and list(grid.styles) == ["lora", "so"]
    lora, so = axes["average of 2"].containers
    assert so.lines[0].get_ydata() == pytest.approx([59, 62]) and lora.lines[0].get_ydata() == pytest.approx([30])
    ends = [segment[:, 1].tolist() for segment in so.lines[2][0].get_segments()]
    assert ends == [pytest.approx([mean - 2**0.5, mean + 2**0.5]) for mean in (59, 62)]
    assert np.log2(np.array(so.lines[0].get_xdata(), float)) == pytest.approx([0, 2], abs=0.1)
    styles = [(style["color"], style["marker"]) for style in grid.styles.values()]
    assert len(set(styles)) == 2 and so.lines[0].get_color() == styles[1][0]


def test_curves_show_training_of_all_runs_and_test_accuracy_where_it_was_measured(results):
    iterations = np.arange(1, 1001)
    training = {"iteration": iterations, "loss": 1.0, "train_accuracy": iterations / 10}
    tested = training | {"test_accuracy": np.where(iterations % 500 == 0, 40.0, np.nan)}
    results.add("so", curve=tested)
    results.add("lora", curve=training)
    results.add("adam", curve={"iteration": ["x"], "train_accuracy": ["y"]})
    _, axes = drawn(results, "curves_4shot")
    thin = [line for line in axes["DTD"].lines if line.get_linewidth() < 1]
    (thick,) = [line for line in axes["DTD"].lines if line.get_linewidth() > 1]
    assert thick.get_xydata().tolist() == [[500, 40], [1000, 40]]
    for line in thin:
        assert line.get_xydata()[[0, -1]] == pytest.approx(np.array([[5.5, 0.55], [995.5, 99.55]]))
    assert len(thin) == 2 and {line.get_color() for line in thin} > {thick.get_color()}
    assert "run3" in figures.grids(results.read(), results.path)[1][0]


def test_accuracy_against_cost_has_a_point_for_each_configuration(results):
    for seed in (1, 2):
        results.add("so", "digits", seed=seed, accuracy=80 + seed, changed_weights=1000 + 10 * seed, peak_memory_mb=70)
        results.add("zero_shot", "digits", seed=seed, accuracy=70, peak_memory_mb=50)
    for name, costs in (("accuracy_against_changed_weights", [0, 1015]), ("accuracy_against_memory", [50, 70])):
        _, axes = drawn(results, name)
        points = [container.lines[0].get_xydata()[0].tolist() for container in axes["digits, 4 shots"].containers]
        assert sorted(points) == [[costs[0], 70], [costs[1], 81.5]]


# --- the page and the other files


def test_the_report_of_real_runs_holds_every_number_and_loads_nothing(run_main, tmp_path):
    for seed, method in itertools.product((1, 2), (("so", "--total_iters", 4, "--eval_every", 2), ("zero_shot",))):
        assert run_main("--shots", 1, "--seed", seed, "--method", *method)[0] == 0
    for out in ("one", "two"):
        report.main(["results", "--out", out])
    files = sorted(str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").rglob("*") if path.is_file())
    names = ("accuracy_against_changed_weights", "accuracy_against_memory", "accuracy_against_shots", "curves_1shot")
    names += ("reliability",)
    images = [f"figures/{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert files == sorted(
        [*images, "deviations.csv", "differences.csv", "index.html", "runs.csv", "tables.md", "tables.tex"]
    )
    for name in files:  # the same results make the same report
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    for name in images:
        content = (tmp_path / "one" / name).read_bytes()
        assert content.startswith(b"\x89PNG") or ElementTree.fromstring(content).tag.endswith("svg")

    original = pd.read_csv("results/results.csv").set_index("run_id").sort_index()
    tidy = pd.read_csv("one/runs.csv").set_index("run_id").sort_index()
    columns = [name for name in original if name in tidy]
    pd.testing.assert_frame_equal(tidy[columns], original[columns], check_dtype=False)
    assert original.drop(columns=columns).isna().all(axis=None)

    (difference,) = pd.read_csv("one/differences.csv").itertuples()
    assert (difference.a, difference.b, difference.pairs) == ("so", "zero_shot", 2)

    text = (tmp_path / "one" / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'href="([^"]*)"', text)
    assert all(link.startswith(("#", "https://arxiv.org/", "https://github.com/")) for link in links)
    assert set(re.findall(r"\w+://[^\s\"<]+", text)) == {link for link in links if not link.startswith("#")}
    assert not re.search(r'\b(src|srcset|data|action|poster)="|<(link|iframe|object|embed|base)\b', text)
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", text)
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    ids = re.findall(r'\bid="([^"]*)"', text)
    clips = re.findall(r"url\(#([^)]*)\)", text)
    assert len(set(ids)) == len(ids) and clips and {*clips, *(link[1:] for link in links if link[0] == "#")} <= {*ids}
    assert text.count("<svg") == 5 * 2  # a legend and a panel each
    for name in tidy:
        for value in pd.read_csv("one/runs.csv", dtype=str)[name].dropna().unique():
            assert f'data-v="{value}"' in text or f"<dd>{value}</dd>" in text, (name, value)
    for accuracy in tidy.test_accuracy:
        assert f">{accuracy:.2f}<" in text


def test_nothing_in_a_record_becomes_markup_or_formula(results, make, monkeypatch):
    monkeypatch.setattr(figures, "image", lambda grid, kind: b"")  # the page has its own
    odd = "<script>alert(1)</script> $\\frac$ & \"x'"
    results.add(odd_setting=odd)
    results.add(odd_setting="plain", dataset="folder", root_path=f"/data/{odd}")
    code, _, err, out = make()
    assert code == 0, err
    text = (out / "index.html").read_text()
    assert text.count("<script>") == 1 and "&lt;script&gt;alert(1)" in text
    assert "\\frac$" in text


def test_only_a_table_of_results_gives_the_same_tables(results, make, no_figures, tmp_path):
    for seed in (1, 2):
        results.add("so", seed=seed, accuracy=50 + seed / 3)
        results.add("zero_shot", seed=seed, accuracy=40)
    before = (make()[-1] / "tables.md").read_text()
    table = pd.DataFrame([json.loads(path.read_text()) for path in results.path.glob("*/result.json")])
    results.path = tmp_path / "alone"
    results.path.mkdir()
    table.to_csv(results.path / "results.csv", index=False)
    code, _, _, out = make()
    assert code == 0 and (out / "tables.md").read_text() == before


GOOD = "run_id,method,dataset,backbone,shots,seed,test_accuracy,finished_at\nr,so,dtd,tiny,1,1,50,2026-01-01T00:00:00\n"


@pytest.mark.parametrize(
    "table, flags, words",
    [
        (None, (), ["--results_dir"]),
        (b"\xff\xfe\x00", (), ["results.csv"]),
        (GOOD + 'r,"so,dtd', (), ["results.csv"]),
        (GOOD + "r2,so,dtd,tiny,1,2\n", (), ["r2", "test_accuracy -"]),
        (GOOD.replace(",50,", ",150,"), (), ["test_accuracy 150"]),
        (GOOD.replace(",50,", ",x,"), (), ["test_accuracy x"]),
        (GOOD.replace("tiny,1,", "tiny,1.5,"), (), ["shots 1.5"]),
        (GOOD.replace("2026-01-01T00:00:00", "2026-0"), (), ["finished_at"]),
        (GOOD.splitlines()[0], (), ["no runs"]),
        ("a,b\n1,2\n", (), ["run_id"]),
        (GOOD, ("--compare", "so", "nobody"), ["--compare", "'nobody'", "'so'"]),
        (GOOD, ("--compare", "so", "so"), ["--compare", "two different"]),
        (GOOD, ("--compare", "so"), ["--compare"]),
        (GOOD + GOOD.splitlines()[1].replace("tiny", "RN50"), ("--compare", "so", "x"), ["backbone RN50"]),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(results, make, table, flags, words):
    if table is not None:
        results.path.mkdir()
        (results.path / "results.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    code, stdout, err, out = make(*flags)
    assert code == 2 and stdout == "" and not out.exists()
    assert err.startswith("error: ") and err.count("\n") == 1 and all(word in err for word in words), err


def test_an_unwritable_folder_and_a_missing_package_are_named(results, make, no_figures, monkeypatch, tmp_path):
    results.add()
    (tmp_path / "file").write_text("")
    code, _, err, _ = make(out=tmp_path / "file" / "report")
    assert code == 2 and str(tmp_path / "file") in err
    assert call(report.main, tmp_path / "file")[0] == 2
    monkeypatch.setitem(sys.modules, "scripts.reporting.writing", None)  # as without matplotlib
    code, _, err, _ = make()
    assert code == 2 and "requirements-all.txt" in err
