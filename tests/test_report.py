"""Reports on results: what is pooled and what is not, means and intervals, published numbers, figures, the page."""

import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy import stats

from scripts import report
from scripts.reporting import comparison, figures
from scripts.reporting.results import ELEVEN, read_results
from scripts.reporting.sheets import accuracy_tables

SO = {"encoder": "both", "position": "all", "lr": 0.0002, "batch_size": 32, "early_stop_loss": 0.01, "min_area": 0.08}
SO |= {"flip": True, "prune_first": False, "density_ratio": 5e-05, "t": 5, "eval_every": 0, "sampled_gradients": True}
LORA = {
    "encoder": "both",
    "position": "all",
    "rank": 2,
    "alpha": 1.0,
    "dropout": 0.25,
    "lora_on": "q,k,v",
    "lr": 0.0002,
}
LORA |= {"batch_size": 32, "early_stop_loss": 0.0, "min_area": 0.08, "flip": True, "eval_every": 0}
OWN = {"so": SO, "lora": LORA, "adam": {"lr": 0.0002}, "zero_shot": {}}
PER_SHOT = {"so": 2000, "lora": 500, "adam": 2000}


class Folder:
    """A results folder with made-up records."""

    def __init__(self, path):
        self.path = path
        self.number = itertools.count(1)

    def add(self, method="so", dataset="dtd", shots=4, seed=1, accuracy=50.0, curve=None, search=None, **changes):
        number = next(self.number)
        record = {
            **{"run_id": f"run{number}", "method": method, "dataset": dataset, "backbone": "ViT-B/16"},
            **{"shots": shots, "seed": seed, "test_accuracy": accuracy, "zero_shot_accuracy": 44.0 + number / 7},
            **{"iterations": 7, "train_seconds": number / 3, "peak_memory_mb": 900.5, "trainable_weights": 100},
            **{"changed_weights": 0 if method == "zero_shot" else 1000, "checkpoint_bytes": None},
            **{"precision": "fp32", "draw": "released", "classes": "all", "prompts": "released"},
            **{"template": "a photo of a {}.", "test_dataset": dataset, "root_path": None, "eval_only": False},
            **{"split_sha256": f"{dataset} {shots} {seed}", "weights_sha256": "f" * 64, "git_commit": "abc"},
            **{
                "torch_version": "2.6.0",
                "device": "cpu",
                "finished_at": f"2026-01-01T00:{number // 60:02}:{number % 60:02}",
            },
            **OWN[method],
            **({"total_iters": PER_SHOT[method] * shots} if method in PER_SHOT else {}),
            **changes,
        }
        folder = self.path / record["run_id"]
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(record))
        if curve is not None:
            pd.DataFrame(curve).to_csv(folder / "curve.csv", index=False)
        if search is not None:
            pd.DataFrame(search | {"val_accuracy": 1.0, "chosen": True}).to_csv(folder / "search.csv", index=False)
        return record

    def read(self):
        return read_results(self.path)


@pytest.fixture
def results(tmp_path):
    return Folder(tmp_path / "results")


@pytest.fixture
def no_figures(monkeypatch):
    """They take most of a report's time."""
    monkeypatch.setattr(figures, "grids", lambda results, folder: ([], []))


@pytest.fixture
def make(results, tmp_path, capsys):
    """Makes the report; returns (exit code, stdout, stderr, folder)."""

    def call(*argv):
        code = 0
        try:
            report.main([str(word) for word in (results.path, "--out", tmp_path / "report", *argv)])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr(), tmp_path / "report"

    return call


def texts(sheet):
    return {row[0].text: [cell.text for cell in row[1:]] for row in sheet.rows}


# --- what belongs together


@pytest.mark.parametrize(
    "change, words",
    [
        ({"lr": 0.001}, "lr 0.001"),
        ({"lr": 0.0002000001}, "lr 0.0002000001"),
        ({"precision": "bf16"}, "precision bf16"),
        ({"draw": "coop"}, "draw coop"),
        ({"classes": "base"}, "classes base"),
        ({"prompts": "specific", "template": "a {} texture."}, "prompts specific"),
        ({"prompts": "own", "template": "one {}."}, "prompts own, template one {}."),
        ({"backbone": "ViT-B/32"}, "backbone ViT-B/32"),
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


def test_what_runs_measure_does_not_part_them(results):
    results.add(seed=1, device="NVIDIA H100")
    measured = {"train_seconds": 5.0, "changed_weights": 3, "optimizer_bytes": 9, "iterations": 3, "final_loss": 0.3}
    measured |= {
        "data_sha256": "a" * 64,
        "stopped_early": True,
        "peak_memory_mb": 3.0,
        "search_seconds": 1.0,
        "checkpoint_bytes": 55,
    }
    results.add(seed=2, git_commit="def", torch_version="2.9", device="NVIDIA A100", **measured)
    assert list(results.read().settings.index) == ["so"]


def test_prompts_of_the_data_set_and_iterations_by_epochs_vary_with_it(results):
    for dataset, template, iterations in (("dtd", "{} texture.", 80), ("eurosat", "satellite photo of {}.", 30)):
        results.add(dataset=dataset, prompts="specific", template=template, epochs=10, total_iters=iterations)
    assert list(results.read().settings.index) == ["so"]


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


def test_a_run_of_the_same_settings_and_seed_replaces_the_older_with_a_note(results, make, no_figures):
    results.add(accuracy=50, run_id="old")
    results.add(accuracy=60, run_id="new")
    code, _, err, out = make()
    assert code == 0 and "old" in err and "1 run(s) left out" in err
    assert "1 run(s) left out" in (out / "index.html").read_text() and "1 run(s)" in (out / "tables.md").read_text()
    assert pd.read_csv(out / "runs.csv").test_accuracy.tolist() == [60]


def test_evaluated_weights_and_data_sets_of_no_suite_have_tables_of_their_own(results):
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
        f"{after} the eleven data sets",
        f"{after} digits, folder:/a/mine, folder:/b/mine, folder:other",
        f"{after} the eleven data sets, evaluated weights",
        f"{after} variants of ImageNet, evaluated weights",
    ]
    first, own, moved, variants = sheets.values()
    assert texts(first) == {"so (backbone ViT-B/16)": ["50.00", "50.00"]}
    assert texts(own) == {"so (backbone tiny)": ["10.00", "7.00", "7.00", "8.00"]}
    from_imagenet, new = (
        "so, evaluated weights (classes all, trained_on imagenet)",
        "so, evaluated weights (classes new, ",
    )
    assert texts(moved) == {from_imagenet: ["40.00"] * 2, f"{new}trained_on the same)": ["20.00"] * 2}
    assert texts(variants) == {from_imagenet: ["30.00"] * 2}


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
    notes = " ".join(sheet.notes)
    assert "over 3 of the seeds 5, 6, 7, or n where it says so" in notes
    assert "no average without it" in notes and "different seeds" in notes


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
    assert "± 0.71 | - | - |" in sheet.markdown() and "Of the eleven data sets there is no run" in latex


# --- differences


def test_differences_are_paired_t_tests(results, make, no_figures):
    generator = np.random.default_rng(1)
    names = ("imagenet", "dtd", "ucf101", "digits", "birds")  # the last two have no mean
    a, b = generator.uniform(40, 60, (2, len(names), 4))
    for (d, seed), _ in np.ndenumerate(a):
        results.add("so", names[d], seed=seed, accuracy=a[d, seed])
        if (d, seed) != (1, 0):  # a run that is missing
            results.add("lora", names[d], seed=seed, accuracy=b[d, seed])
    results.add("so", "fgvc", accuracy=99)  # a data set that is missing
    results.add("so", "ucf101", seed=9, accuracy=99)
    results.add("lora", "ucf101", seed=9, accuracy=1, split_sha256="other images")
    results.add("so", "ucf101", seed=10, accuracy=99)
    results.add("lora", "ucf101", seed=10, accuracy=1, data_sha256="changed images")
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
    assert "19 pairs of runs" in page and "6 runs of the two have no partner" in page


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


def test_one_pair_has_no_interval_and_the_order_decides_the_sign(results, make, no_figures):
    results.add("so", accuracy=52)
    results.add("lora", accuracy=50)
    _, _, _, out = make("--compare", "lora", "so", "--compare", "so", "lora")
    rows = pd.read_csv(out / "differences.csv")
    assert rows.difference.tolist() == [-2, 2] and rows.low.isna().all() and rows.high.isna().all()
    assert "at least two pairs" in (out / "tables.md").read_text()


def test_methods_with_several_configurations_are_compared_by_label(results, make, no_figures):
    for t in (5, 10):
        results.add("so", accuracy=50 + t, t=t)
    results.add("lora", accuracy=50)
    _, _, _, out = make()
    assert pd.read_csv(out / "differences.csv").empty and "--compare A B" in (out / "index.html").read_text()
    _, _, _, out = make("--compare", "so (t 10)", "lora")
    assert pd.read_csv(out / "differences.csv").difference.tolist() == [10]


# --- published numbers


def published_row(name):
    (row,) = [row for row in comparison.read_published()["rows"] if row["name"] == name]
    return row


def test_published_means_are_those_of_the_data_sets():
    for name in ("SO", "LoRA by SO's authors"):
        row = published_row(name)
        assert row["data_sets"][4].keys() == ELEVEN.keys()
        assert np.mean(list(row["data_sets"][4].values())) == pytest.approx(row["means"][4], abs=0.051)


def test_deviations_where_the_settings_match(results):
    published = published_row("SO")["data_sets"][4]
    for name, accuracy in published.items():
        for seed in (1, 2):
            results.add("so", name, seed=seed, accuracy=accuracy + seed)
            results.add("so", name, seed=seed, accuracy=accuracy - 1, density_ratio=5e-4, t=10, total_iters=2000)
    results.add("so", "dtd", shots=1, accuracy=60)  # no mean without the other ten
    rows, notes = comparison.deviations(results.read())
    assert not notes and len(rows) == 24 and set(rows.shots) == {4}
    released = rows[rows.configuration.str.contains("t 5")].set_index("data_set")
    single = released.drop("mean of 11")
    assert single.published.to_dict() == {ELEVEN[name]: accuracy for name, accuracy in published.items()}
    assert single.deviation.tolist() == pytest.approx([1.5] * 11) and set(released.seeds) == {2}
    mean = released.loc["mean of 11"]
    assert (mean.published, mean.deviation, mean.sd) == pytest.approx((78.9, 78.9454 + 1.5 - 78.9, 0.5**0.5), abs=1e-3)
    assert rows[rows.configuration.str.contains("t 10")].deviation.tolist()[:11] == pytest.approx([-1] * 11)
    paper, code = comparison.deviation_sheets(rows)
    assert code.title == "so (density_ratio 5e-05, t 5, n_iters 2000) minus SO as published"
    assert texts(code)["DTD"] == ["4", "+1.50", "66.4", "67.90 ± 0.71", "2"] and texts(paper)["DTD"][1] == "-1.00"


@pytest.mark.parametrize(
    "change",
    [
        *({"backbone": "ViT-B/32"}, {"prompts": "specific"}, {"precision": "bf16"}, {"draw": "coop"}, {"t": 10}),
        *({"density_ratio": 5e-4}, {"total_iters": 2000}, {"prune_first": True}, {"classes": "base"}, {"flip": False}),
        {"encoder": None},
    ],
    ids=str,
)
def test_other_settings_are_not_compared_with_published_numbers(results, change):
    results.add("so", "dtd", **change)
    rows, notes = comparison.deviations(results.read())
    assert rows.empty and next(iter(change)) in notes[0] and "not compared with SO" in notes[0]


def test_evaluated_weights_and_other_data_are_not_compared_with_published_numbers(results):
    results.add("so", "dtd", eval_only=True)
    results.add("so", "digits")
    assert comparison.deviations(results.read())[0].empty


def test_clip_lora_is_compared_at_its_settings_alone(results):
    for name in ELEVEN:
        results.add("lora", name, shots=16, accuracy=82)
        results.add("lora", name, shots=16, accuracy=82, rank=4)
    rows, notes = comparison.deviations(results.read())
    assert rows[["name", "configuration", "shots", "data_set"]].values.tolist() == [
        ["CLIP-LoRA", "lora (rank 2)", 16, "mean of 11"]
    ]
    assert rows.deviation.item() == pytest.approx(-1) and any("rank is 4, published 2" in note for note in notes)


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


LOADING = ("src", "srcset", "href", "xlink:href", "data", "action", "poster")


class Page(HTMLParser):
    """What a page would load, and the cells of its tables."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.links, self.full, self.ids, self.used = [], [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "data-v":
                self.full.add(value)
            if name == "id":
                self.ids.append(value)
        if tag == "use":
            self.used.append(dict(attributes).get("href"))
        for name, value in attributes:
            if tag == "a" and name == "href":
                self.links.append(value)
            elif name in ("src", "srcset", "href", "xlink:href", "data", "action", "poster") and not value.startswith(
                "#"
            ):
                self.loads.append((tag, value))
        if tag in ("link", "iframe", "object", "embed", "base"):
            self.loads.append((tag, ""))


def test_the_report_of_real_runs_holds_every_number_and_loads_nothing(run_main, tmp_path, capsys):
    for seed, method in itertools.product((1, 2), ("so", "zero_shot")):
        flags = ("--shots", 1, "--seed", seed, "--method", method, "--total_iters", 4, "--eval_every", 2)
        assert run_main(*flags, "--workers", 0)[0] == 0
    for out in ("one", "two"):
        report.main(["results", "--out", out])
    files = sorted(str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").rglob("*") if path.is_file())
    names = ("accuracy_against_changed_weights", "accuracy_against_memory", "accuracy_against_shots", "curves_1shot")
    pictures = [f"figures/{name}.{kind}" for name in names for kind in ("png", "svg")]
    texts = ["deviations.csv", "differences.csv", "index.html", "runs.csv", "tables.md", "tables.tex"]
    assert files == sorted([*pictures, *texts])
    for name in files:  # the same results make the same report
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    for name in pictures:
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
    page = Page(text)
    assert not page.loads and all(link.startswith(("#", "https://arxiv.org/")) for link in page.links)
    assert set(re.findall(r"\w+://[^\s\"<]+", text)) == {link for link in page.links if not link.startswith("#")}
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", text)
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    clips = re.findall(r"url\(#([^)]*)\)", text)
    assert page.used and clips and {*page.used, *(f"#{clip}" for clip in clips)} <= {f"#{name}" for name in page.ids}
    assert len(set(page.ids)) == len(page.ids)
    assert text.count("<svg") == 4 * 2  # a legend and a panel each
    for name in tidy:
        for value in pd.read_csv("one/runs.csv", dtype=str)[name].dropna().unique():
            assert value in page.full or f"<dd>{value}</dd>" in text, (name, value)
    for accuracy in tidy.test_accuracy:
        assert f">{accuracy:.2f}<" in text


def test_nothing_in_a_record_becomes_markup_or_formula(results, make):
    odd = "<script>alert(1)</script> $\\frac$ & \"x'"
    results.add(odd_setting=odd)
    results.add(odd_setting="plain", dataset="folder", root_path=f"/data/{odd}")
    code, _, err, out = make()
    assert code == 0, err
    text = (out / "index.html").read_text()
    assert text.count("<script>") == 1 and "&lt;script&gt;alert(1)" in text
    assert "\\frac$" in text


def test_a_table_of_results_alone_gives_the_same_tables(results, make, no_figures, tmp_path):
    for seed in (1, 2):
        results.add("so", seed=seed, accuracy=50 + seed / 3)
        results.add("zero_shot", seed=seed, accuracy=40)
    _, _, _, out = make()
    before = (out / "tables.md").read_text()
    table = pd.DataFrame([json.loads(path.read_text()) for path in results.path.glob("*/result.json")])
    results.path = tmp_path / "alone"
    results.path.mkdir()
    table.to_csv(results.path / "results.csv", index=False)
    code, _, _, out = make()
    assert code == 0 and (out / "tables.md").read_text() == before


def test_a_damaged_record_is_left_out_and_said(results, make, no_figures):
    results.add(seed=1)
    results.add(seed=2)
    (results.path / "run2" / "result.json").write_text('{"run_id": ')
    code, _, err, out = make()
    assert code == 0 and "run2" in err
    assert "1 of 2 records are damaged" in (out / "index.html").read_text()


GOOD = "run_id,method,dataset,backbone,shots,seed,test_accuracy,finished_at\nr,so,dtd,tiny,1,1,50,2026-01-01T00:00:00\n"


@pytest.mark.parametrize(
    "table, flags, words",
    [
        (None, (), ["holds no results", "--results_dir"]),
        ("", (), ["results.csv", "damaged"]),
        (b"\xff\xfe\x00", (), ["results.csv", "damaged"]),
        (GOOD + 'r,"so,dtd', (), ["results.csv", "damaged"]),
        (GOOD + "r2,so,dtd,tiny,1,2\n", (), ["damaged", "r2", "test_accuracy -"]),
        (GOOD.replace(",50,", ",150,"), (), ["damaged", "test_accuracy 150"]),
        (GOOD.replace(",50,", ",x,"), (), ["damaged", "test_accuracy x"]),
        (GOOD.replace("tiny,1,", "tiny,1.5,"), (), ["damaged", "shots 1.5"]),
        (GOOD.replace("2026-01-01T00:00:00", "2026-0"), (), ["damaged", "finished_at"]),
        (GOOD.splitlines()[0], (), ["holds no runs"]),
        ("a,b\n1,2\n", (), ["no table of results", "run_id"]),
        (GOOD, ("--compare", "so", "nobody"), ["--compare", "'nobody'", "'so'"]),
        (GOOD, ("--compare", "so", "so"), ["--compare", "two different"]),
        (GOOD, ("--compare", "so"), ["--compare", "expected 2"]),
        (GOOD + GOOD.splitlines()[1].replace("tiny", "RN50"), ("--compare", "so", "x"), ["several", "backbone RN50"]),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(results, make, table, flags, words):
    if table is not None:
        results.path.mkdir()
        (results.path / "results.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    code, stdout, err, out = make(*flags)
    assert code == 2 and stdout == "" and not out.exists()
    assert err.startswith("error: ") and err.count("\n") == 1 and all(word in err for word in words), err


def test_a_folder_that_cannot_be_written_is_named(results, no_figures, tmp_path, capsys):
    results.add()
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        report.main([str(results.path), "--out", str(tmp_path / "file" / "report")])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and str(tmp_path / "file") in err and "Not a directory" in err
