"""The paper's tables in one command: from the empty folder to the page, killed, offline; published numbers."""

import functools
import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from support.report import Folder, texts
from support.runs import MEASURED, Killed, call, killed_after
from support.server import offer

import main as entry
from common import UserError
from methods import METHODS
from run_utils import IDENTITY
from scripts import reproduce, sweep
from scripts.reporting import deviations, figures
from scripts.reporting.results import ELEVEN, PUBLISHED, SUITES, read_results
from scripts.reproducing import costs, machine
from scripts.reproducing.parts import read_part
from scripts.sweeping.clusters import Cluster
from scripts.sweeping.grid import cells


class Here(Cluster):
    """Does one run after another in this process."""

    poll_seconds = 0

    def __init__(self, feature_cache):
        super().__init__(Path("logs"), gpus_per_run=1)
        self.flags = ["--cache_dir", feature_cache, "--workers", 0]

    def start(self, waiting):
        cell = waiting.pop(0)
        self.code, _, _, self.err = call(entry.main, *cell.words, *self.flags)
        self.jobs["the only one"] = cell
        if self.code == -9:
            raise Killed

    def ended(self):
        return [(cell, self.code, self.err) for cell in [self.jobs.pop("the only one", None)] if cell]

    def running(self):
        return 0

    def stop(self):
        pass


@pytest.fixture
def run(tmp_path, monkeypatch, feature_cache):
    """Calls reproduce.py in an empty folder; its runs are done in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "_cluster", lambda *_: Here(feature_cache))
    monkeypatch.setattr(figures, "grids", lambda results, folder: ([], []))  # they take most of a report's time

    def reproduced(*argv):
        code, _, out, err = call(reproduce.main, *argv)
        return code, out, [line for line in err.splitlines() if line.startswith("error: ")]

    return reproduced


def outcome(out):
    """All tables of the page, without what is measured with a clock and without the runs' names, which hash paths."""
    runs = pd.read_csv(Path(out, "report", "runs.csv"))
    runs = runs.drop(columns=[name for name in (*MEASURED, "run_id") if name in runs])
    return sorted(runs.to_csv(index=False).splitlines()), *(
        Path(out, "report", f"{name}.csv").read_text() for name in ("differences", "deviations")
    )


SMALL = ("--quick", "--datasets", "dtd", "eurosat", "--methods", "so_released", "zero_shot", "--root_path", "data")
SMALL += ("--parts", "main", "new_classes", "--seeds", 1)


def test_from_the_empty_folder_to_the_page_killed_and_resumed(run, world, data_root, tmp_path):
    for name in ("dtd", "eurosat"):
        offer(world, name, tmp_path, classes=4)
    code, out, errors = run(*SMALL, "--out", "whole")
    assert (code, errors) == (0, []), (errors, out)
    assert "4 runs: 4 done" in out and len(world.requests) == 4
    with killed_after(8):  # in the second training
        assert run(*SMALL, "--out", "killed")[0] == -9
    assert 0 < len(list(Path("killed/results").glob("*/result.json"))) < 12 and not Path("killed/report").exists()
    assert run(*SMALL, "--out", "killed")[0] == 0
    runs = pd.read_csv("killed/report/runs.csv")
    assert len(runs) == 12 and set(runs.classes) == {"all", "base", "new"} and set(runs.backbone) == {"tiny"}
    assert outcome("killed") == outcome("whole")
    assert "quick: " in Path("whole/report/index.html").read_text()
    _, out, _ = run(*SMALL, "--out", "whole")
    assert "0 done, 4 were done before" in out and len(world.requests) == 4


def test_without_network_each_missing_thing_is_one_line(run, world, data_root, monkeypatch):
    def no_network(*names):
        raise UserError("no network")

    monkeypatch.setattr(machine, "find", no_network)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, errors = run("--root_path", "data", "--datasets", "dtd", "imagenet", "--parts", "main")
    assert code == 2 and not Path("reproduced/report").exists()
    for line, name in zip(errors, ("GPU", "imagenet", "dtd", "weights of ViT-B/16"), strict=True):
        assert line.startswith(f"error: {name}: ")


def test_a_part_that_fails_is_named_and_the_rest_goes_on(run, monkeypatch):
    def failing(one):
        if one.settings.classes == "base":
            raise UserError("a mistake")
        return done(one)

    done = entry.do
    monkeypatch.setattr(entry, "do", failing)
    code, _, errors = run("--quick", "--methods", "zero_shot", "--parts", "new_classes", "main", "--seeds", 1)
    assert code == 2 and len(errors) == 1 and errors[0].startswith("error: new_classes: ")
    assert len(pd.read_csv("reproduced-quick/report/runs.csv")) == 1


def test_mistakes_are_one_line(run):
    for flags, word in (
        (("--gpu", "abacus", "--dry_run"), "T4"),
        (("--methods", "magic"), "so_released"),
        (("--datasets", "dtd", "--parts", "transfer", "--shots", 16), "--datasets"),
    ):
        code, _, (error,) = run(*flags, "--root_path", "data")
        assert code == 2 and word in error
    assert "--root_path" in run()[2][0]


def test_dry_run_lists_runs_and_hours(run):
    code, out, _ = run("--root_path", "data", "--dry_run", "--gpu", "A100", "--parts", "new_classes", "--seeds", 1)
    lines = out.splitlines()
    assert code == 0 and "88 runs" in lines[-2] and "A100" in lines[-2] and costs.BASIS in lines[-1]
    listed = [line for line in lines if "python main.py" in line]
    hours = [float(line.split()[0]) for line in listed]
    assert len(listed) == 44 and min(hours) > 0 and not Path("reproduced").exists()
    assert float(lines[-2].split(", ")[1].split()[0]) == pytest.approx(sum(hours), abs=0.5)
    on_cluster = ("--cluster", "slurm", "--partition", "gpu", "--parts", "new_classes", "--seeds", 1)
    code, again, _ = run("--root_path", "data", "--dry_run", "--gpu", "A100", *on_cluster)
    assert code == 0 and again.splitlines()[-2] == lines[-2]
    code, _, (error,) = run("--root_path", "data", "--dry_run", "--backbone", "ViT-B/32")
    assert code == 2 and "ViT-B/32" in error


# --- published numbers

REACHED = [
    (kind, row, part, label)
    for kind in ("rows", "rn50", "base_to_new", "transfer", "ablations")
    for row in PUBLISHED[kind]
    for part, labels in row.get("runs", {}).items()
    for label in labels
]


@functools.cache
def planned(part, label):
    """The first seed's runs of a row of a part, by the real command line; the images are not there."""
    grid = read_part(part).grid
    rows = {"rows": {label: grid["rows"][label]}, "seeds": grid["seeds"][:1]}
    return cells(grid | rows, ["--root_path", "data"])


def recorded(cell):
    """What a run of this cell records of its settings, with as many training images as there may be."""
    settings, hparams = cell.settings, cell.config.hparams.settled(cell.settings.shots, 100)
    values = {name: getattr(settings, name) for name in IDENTITY} | hparams.identity | {"epochs": cell.epochs}
    values["by_data"] = "; ".join(f"{name}: {file}" for name, file in cell.config.by_data.items()) or None
    values |= {"searched": cell.config.searched, "tuned_on": "val" if cell.config.search else "none"}
    return values | {"imbalance": "none", "label_noise": 0.0}


@pytest.mark.parametrize("kind, row, part, label", REACHED, ids=lambda value: value if isinstance(value, str) else "")
def test_settings_of_the_runs_are_those_published(kind, row, part, label):
    protocol = dict.fromkeys(deviations.PROTOCOL, "unknown") | row.get("protocol", {})
    classes = "base" if kind == "base_to_new" else "all"
    for cell in planned(part, label):
        settings, run = cell.settings, pd.DataFrame([recorded(cell)])
        assert settings.method == row["method"] and deviations.unlike(row, classes, run) == [], cell.command
        prompts = protocol["prompts"]
        if prompts == "learned":
            assert METHODS[settings.method].__name__.startswith("methods.prompts.")
        elif settings.dataset != "imagenet":  # some have their own choice there
            assert prompts in ("unknown", settings.prompts)
        assert protocol["precision"].partition(" ")[0] in ("unknown", settings.precision)
        searched = protocol["validation"].startswith(("full", "searched"))
        assert bool(cell.config.search) == searched
    assert protocol["seeds"] in ("unknown", len(read_part(part).grid["seeds"]))


@pytest.mark.parametrize("kind, row, part, label", REACHED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_run_with_another_hyperparameter_is_not_compared(kind, row, part, label):
    """Each in turn is changed."""
    classes = "base" if kind == "base_to_new" else "all"
    cell = planned(part, label)[-1]
    run, hparams = recorded(cell), cell.config.hparams
    names = {*hparams.identity, "tuned_on", "draw", "imbalance", "label_noise", "searched"}
    names -= {"eval_every", "sampled_gradients"} | ({"total_iters"} if cell.epochs else set())
    for name in names | ({"epochs"} if cell.epochs else set()):
        other = not run[name] if isinstance(run[name], bool) else "other" if isinstance(run[name], str) else 12345
        (word, *_) = deviations.unlike(row, classes, pd.DataFrame([run | {name: other}]))
        assert word.startswith(f"{cell.settings.dataset}: {name} is "), (name, word)


def test_every_published_number_is_reached_or_says_why_not():
    for kind in ("rows", "rn50", "base_to_new", "transfer", "ablations"):
        for row in PUBLISHED[kind]:
            assert ("runs" in row) != ("no_run" in row), row["name"]
            cells_of_it = (planned(part, label) for part, labels in row.get("runs", {}).items() for label in labels)
            own = [cell.settings for found in cells_of_it for cell in found]
            numbers = row.get("means", {16: 0}) if own else {}
            datasets = ["imagenet"] if kind == "transfer" else ELEVEN
            wanted = {*itertools.product(datasets, numbers)}
            assert wanted <= {(settings.dataset, settings.shots) for settings in own}, row["name"]
    assert {*ELEVEN, *SUITES["variants of ImageNet"]} == {*read_part("transfer").datasets}


# --- what seeds explain


def test_seeds_explain_a_deviation_or_do_not(tmp_path):
    results, spread = Folder(tmp_path), np.array([-1.0, 0.0, 1.0])
    for dataset, value in PUBLISHED["rows"][0]["data_sets"][4].items():
        for seed, offset in enumerate(spread * (dataset != "food101") + 9 * (dataset == "fgvc")):
            if (dataset, seed) not in (("dtd", 0), ("dtd", 1)):
                results.add("so", dataset, seed=seed, accuracy=min(value + offset, 99))
    rows, _ = deviations.deviations(results.read())
    rows = rows.set_index("data_set")
    half = stats.t.ppf(0.975, 2) * spread.std(ddof=1) * (1 / 3 + 1) ** 0.5
    assert rows.explained["Aircraft"] == pytest.approx(half) and rows.explained["ImageNet"] == pytest.approx(half)
    verdicts = {"Aircraft": "outside", "ImageNet": "within", "DTD": "not judged", "Food101": "not judged"}
    assert rows.verdict[[*verdicts]].to_dict() == verdicts and rows.verdict["mean of 11"] == "not judged"
    values = pd.Series([70.0, 71.0])
    more = deviations.explained(values, 3, 0.3) - stats.t.ppf(0.975, 1) * values.std() * (1 / 2 + 1 / 3) ** 0.5
    assert more == pytest.approx(0.3)


def test_new_classes_other_datasets_and_ablations_are_compared_too(tmp_path):
    results = Folder(tmp_path)
    tested = {"eval_only": True, "classes": "new"}
    for seed, cell in itertools.product((1, 2), planned("peers_new_classes", "coop")):
        results.add(**recorded(cell) | tested | {"seed": seed, "accuracy": 60.0 + seed, "base_accuracy": 82.0 + seed})
    for seed, cell, dataset in itertools.product((1, 2), planned("transfer", "promptsrc"), ELEVEN):
        elsewhere = {"seed": seed, "accuracy": 60.0 + seed, "test_dataset": dataset, "eval_only": True}
        results.add(**recorded(cell) | elsewhere)
    for seed, cell in itertools.product((1, 2), planned("ablations", "ablation_no_momentum")):
        if cell.settings.shots == 1:
            results.add(**recorded(cell) | {"seed": seed, "accuracy": 60.0 + seed})
    rows, _ = deviations.deviations(results.read())
    found = rows.set_index("data_set")
    assert found.deviation["new classes"] == pytest.approx(61.5 - 63.22)
    assert found.measured["harmonic mean"] == pytest.approx(np.mean([2 * 83 * 61 / 144, 2 * 84 * 62 / 146]))
    assert found.deviation["mean of 10 others"] == pytest.approx(61.5 - 65.81)
    (ablation,) = rows[rows.data_set == "mean of 11"].itertuples()
    assert (ablation.name, ablation.verdict) == ("no momentum", "not judged")
    counted = texts(deviations.verdict_sheet(rows)).values()
    assert ["no momentum", "0", "0", "1", "-"] in counted and len(counted) == 3


def test_every_run_of_a_mean_is_looked_at(tmp_path):
    """One of a search's outcomes, and one dataset, with another rate than planned."""
    for name, change in (("searched", {"searched": "lr of 0.002, 0.02", "tuned_on": "val"}), ("by_data", {})):
        results = Folder(tmp_path / name)
        for seed, cell in itertools.product((1, 2), planned("peers", "coop")):
            if cell.settings.shots == 16:
                other = seed == 2 and (name == "searched" or cell.settings.dataset == "dtd")
                change |= {"lr": 0.02 if other else 0.002}
                change |= {} if name == "searched" else {"by_data": "lr: c.yaml abc; epochs: c.yaml abc"}
                results.add(**recorded(cell) | change | {"seed": seed, "accuracy": 70.0 + seed})
        rows, (note, *_) = deviations.deviations(results.read())
        assert rows.empty and ("lr is 0.02, not 0.002" if name == "by_data" else "searched is lr of") in note


def test_planned_runs_are_compared_also_from_the_table(tmp_path):
    """In a CSV file an empty text is no text: CoOp's beginning of the prompts."""
    results = Folder(tmp_path / "records")
    for seed, cell in itertools.product((1, 2), planned("peers", "coop")):
        results.add(**recorded(cell) | {"seed": seed, "accuracy": 70.0 + seed})
    records = [json.loads(path.read_text()) for path in results.path.glob("*/result.json")]
    (tmp_path / "table").mkdir()
    pd.DataFrame(records).to_csv(tmp_path / "table" / "results.csv", index=False)
    rows, notes = deviations.deviations(read_results(tmp_path / "table"))
    assert not notes and (rows.data_set == "mean of 11").sum() == 5


def test_a_mean_over_datasets_with_settings_of_their_own_is_compared(tmp_path):
    """CoOp has other epochs on ImageNet, TaskRes another alpha on flowers, PromptSRC other averages; GDA searches."""
    results = Folder(tmp_path)
    for label in ("coop", "taskres", "promptsrc", "gda"):
        for seed, cell in itertools.product((1, 2), planned("peers", label)):
            if cell.settings.shots == 16:
                own = {name: values[seed] for name, values in cell.config.search.items()}
                results.add(**recorded(cell) | own | {"seed": seed, "accuracy": 70.0 + seed})
    rows, notes = deviations.deviations(results.read())
    means = rows[rows.data_set == "mean of 11"].set_index("name")
    assert all("not RN50" in note for note in notes) and {*means.index} == {"TaskRes", "CoOp", "PromptSRC", "GDA"}
    assert set(means.measured) == {71.5} and set(means.configuration) == {"coop", "taskres", "promptsrc", "gda"}
