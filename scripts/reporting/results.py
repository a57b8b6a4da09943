"""The runs of a results folder: which of them belong together, and in which settings the others differ.

Runs that differ in a setting other than the seed are never mixed. A configuration is a method with all of its settings;
its label is the method and those settings in which the method's configurations differ. Shots and dataset are not part
of it: they are the tables' captions and columns.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from common import UserError, counted
from records import in_order, read_record
from settings import Settings

PUBLISHED = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text(encoding="utf-8"))
SUITES: dict[str, dict[str, str]] = PUBLISHED["suites"]
ELEVEN = SUITES["the eleven datasets"]
SHORT = {dataset: name for names in SUITES.values() for dataset, name in names.items()}  # in tables; others keep theirs

NEEDED = ("run_id", "method", "dataset", "backbone", "shots", "seed", "test_accuracy", "finished_at")
CALIBRATION = ("macro_accuracy", "nll", "brier", "ece")
ZERO_SHOT = tuple(f"zero_shot_{name}" for name in CALIBRATION)
SCALED = ("scaled_nll", "scaled_brier", "scaled_ece")  # after temperature scaling
# What a run measures, and where and when it did. Every other column, known or not, is a setting.
MEASURED = {
    *("run_id", "test_accuracy", "zero_shot_accuracy", "train_accuracy", "val_accuracy", "final_loss", "iterations"),
    *("stopped_early", "train_seconds", "eval_seconds", "search_seconds", "peak_memory_mb", "trainable_weights"),
    *("changed_weights", "optimizer_bytes", "checkpoint_bytes", "split_sha256", "data_sha256", "weights_sha256"),
    *("git_commit", "torch_version", "finished_at", "largest_class_share", *CALIBRATION, *ZERO_SHOT),
    *("temperature", *SCALED, "base_accuracy", "harmonic_mean", "processes"),
}
PLACE = {"dataset", "test_dataset", "root_path", "shots", "seed"}  # the data of a run, and its repetition
# Settings that old records may lack: they had the defaults.
ALWAYS = ("classes", "draw", "prompts", "precision", "eval_only", "test_part", "ece_bins", "imbalance", "label_noise")
BUDGETS = ("epochs", "n_iters", "total_iters")


@dataclass
class Results:
    """Runs by configuration.

    `runs` has a row for each run. Its columns are the record's and `configuration` (label), `tested_on` (dataset, and
    which half of its classes, if a run had only these), `short_name` (of that, in tables) and `evaluated` (whether
    saved weights were evaluated). Of runs with the same configuration, dataset, shots and seed only the newest is here.
    `settings` has a row for each label, in the order of the tables' rows. `recorded` are the records' columns.
    """

    runs: pd.DataFrame
    settings: pd.DataFrame
    recorded: list[str]
    notes: list[str]

    @property
    def tested(self) -> pd.DataFrame:
        """The runs that methods are compared by: they trained, and were tested on the test part."""
        return self.runs[~self.runs.evaluated & (self.runs.test_part == "test")]

    def tidy(self) -> pd.DataFrame:
        """Return one row a run: its configuration, then all recorded columns in the order of results.csv."""
        ordered = [name for name in in_order(self.recorded) if name != "run_id"]
        return self.runs[["configuration", *ordered, "run_id"]]

    def labels(self, runs: pd.DataFrame) -> list[str]:
        """Return the configurations of these runs, in order."""
        present = set(runs.configuration)
        return [label for label in self.settings.index if label in present]


def read_results(folder: Path) -> Results:
    """Return the runs of a results folder, from its `*/result.json` or, if there are none, from its results.csv.

    Raise UserError that names what is missing or damaged.
    """
    paths, notes = sorted(folder.glob("*/result.json")), []
    records = [_searched(path.parent) | record for path in paths if (record := read_record(path)) is not None]
    if len(records) < len(paths):
        notes.append(f"{len(paths) - len(records)} of {counted(len(paths), 'record')} damaged and left out.")
    if paths and not records:
        raise UserError(f"{folder}: no record can be read; do the runs again with --force")
    source = folder if paths else folder / "results.csv"
    try:
        runs = pd.DataFrame(records) if paths else pd.read_csv(source, low_memory=False)
    except FileNotFoundError:
        raise UserError(f"{folder} holds no results, no */result.json; name the --results_dir of your runs") from None
    except (OSError, ValueError) as error:  # ValueError: of pandas and of decoding
        reason = " ".join(str(error).split())
        raise UserError(f"{source} cannot be read ({reason}); any run of main.py writes it again") from None
    _check(runs, source)
    return arrange(runs.astype({"shots": int, "seed": int, "test_accuracy": float}), notes)


def _searched(folder: Path) -> dict[str, str]:
    """Return the values that a run chose from on val images, as the setting `searched`; empty without a search."""
    path = folder / "search.csv"
    if not path.exists():
        return {}
    try:
        trials = pd.read_csv(path)
    except ValueError:
        raise UserError(f"{path} is damaged; remove that run or repeat it with --force") from None
    names = [name for name in trials if name not in ("val_accuracy", "iterations", "chosen")]
    return {"searched": "; ".join(f"{name} of {', '.join(map(text, trials[name].unique()))}" for name in names)}


def _check(runs: pd.DataFrame, source: Path) -> None:
    missing = [name for name in NEEDED if name not in runs]
    if missing:
        raise UserError(f"{source} is no table of results: it lacks {', '.join(missing)}")
    if runs.empty:
        raise UserError(f"{source} holds no runs")
    valid = {name: runs[name].notna() for name in NEEDED}
    numbers = runs[["test_accuracy", "shots", "seed"]].apply(pd.to_numeric, errors="coerce")
    valid["test_accuracy"] = numbers.test_accuracy.between(0, 100)
    valid["shots"] = (numbers.shots >= 1) & (numbers.shots % 1 == 0)
    valid["seed"] = (numbers.seed >= 0) & (numbers.seed % 1 == 0)
    valid["finished_at"] = pd.to_datetime(runs.finished_at, errors="coerce", utc=True, format="ISO8601").notna()
    for name, good in valid.items():
        if not good.all():
            run = runs.loc[(~good).idxmax()]
            problem = f"run {text(run.run_id)} has the {name} {text(run[name])}"
            raise UserError(f"{source} is damaged: {problem}; remove that run or repeat it with --force")


def arrange(runs: pd.DataFrame, notes: list[str]) -> Results:
    """Return the runs by configuration and dataset, and `notes` with one on repeated runs."""
    runs, recorded = runs.copy(), list(runs)
    filled = {name: getattr(Settings, name) for name in ALWAYS}
    filled |= {"test_dataset": runs.dataset, "split_sha256": "", "data_sha256": ""}
    optional = ("root_path", "searched", "template", "device", "weights_sha256", "zero_shot_accuracy", "base_accuracy")
    optional += ("by_data",)
    for name in (*optional, *BUDGETS, *filled):
        if name not in runs:
            runs[name] = None
    for name, value in filled.items():
        runs[name] = runs[name].astype(object).where(runs[name].notna(), value)
    runs["evaluated"] = runs.eval_only.map(text) == "true"
    names = _columns(runs)
    half = (" " + runs.classes + " classes").where(runs.classes != "all", "")
    runs["tested_on"] = names + half  # half of the classes is another problem, with accuracies of its own
    runs["short_name"] = names.map(lambda name: SHORT.get(name, name)) + half

    settings = _settings(runs)
    runs["configuration"] = _labels(runs, settings)
    ends = runs.method.map({"zero_shot": 0, "so": 2}).fillna(1)  # baselines first, SO last, as in the papers
    order = runs.assign(ends=ends).sort_values(["evaluated", "ends", "method", "configuration"]).configuration.unique()
    settings = settings.set_axis(pd.Index(runs.configuration))
    settings = settings[~settings.index.duplicated()].loc[order]

    runs = runs.sort_values(["finished_at", "run_id"])
    repeats = runs.duplicated(["configuration", "tested_on", "shots", "seed"], keep="last")
    if repeats.any():
        older = runs.run_id[repeats].astype(str).tolist()
        named = ", ".join(older[:5]) + (", ..." if len(older) > 5 else "")
        reason = "because a newer one has the same settings, dataset, shots and seed"
        notes = [*notes, f"{counted(len(older), 'run')} left out {reason}: {named}"]
    shares = runs.get("largest_class_share", pd.Series(float("nan"), runs.index))  # older records have none
    below = runs.run_id[~repeats & (runs.test_accuracy < shares.astype(float))].astype(str).tolist()
    if below:
        reason = "are less accurate than always naming the largest test class"
        notes = [*notes, f"{len(below)} of {counted((~repeats).sum(), 'run')} {reason}, for example {below[0]}"]
    names = dict.fromkeys((*order, *SHORT, *sorted(set(runs.tested_on))))
    place = {name: i for i, name in enumerate(names)}
    runs = runs[~repeats].sort_values(
        ["configuration", "shots", "tested_on", "seed"],
        key=lambda column: column if column.name in ("shots", "seed") else column.map(place),
    )
    return Results(runs.reset_index(drop=True), settings, recorded, notes)


def text(value: object) -> str:
    """Return a setting as it is shown and compared: `-` where a method has none, numbers without trailing zeros."""
    if isinstance(value, (list, dict)):
        return json.dumps(value)
    if pd.isna(value):
        return "-"
    if isinstance(value, str):
        return {"True": "true", "False": "false", "": "-"}.get(value, value)  # pandas reads an empty text as nan
    return str(bool(value)).lower() if isinstance(value, (bool, np.bool_)) else f"{value:.12g}"


def _columns(runs: pd.DataFrame) -> pd.Series:
    """Return the dataset that each run was tested on; your own datasets are named by their folders."""
    own = runs.test_dataset == "folder"
    paths = runs.root_path.astype(object).where(runs.root_path.notna(), "")
    names = "folder:" + paths.map(lambda path: Path(path).stem)
    ambiguous = paths[own].groupby(names[own]).transform("nunique") > 1
    names = names.where(~ambiguous.reindex(runs.index, fill_value=False), "folder:" + paths)
    return runs.test_dataset.where(~own, names)


def _settings(runs: pd.DataFrame) -> pd.DataFrame:
    """Return all settings of each run as text, a column for each."""
    added = {"evaluated", "tested_on", "short_name", "by_data"}
    names = [name for name in runs if name not in MEASURED | PLACE | added and name not in BUDGETS]
    settings = runs[names].apply(lambda column: column.map(text))
    # Prompts that belong to the dataset vary with it; the user's own are a setting.
    settings["template"] = settings.template.where(settings.prompts == "own", "-")
    settings["device"] = runs.device.map(lambda name: "cpu" if text(name) in ("cpu", "-") else "gpu")
    weights = settings.backbone.map(lambda name: Path(name).name if Path(name).suffix else name)
    several = runs.weights_sha256.astype(str).groupby(weights).transform("nunique") > 1
    settings["backbone"] = weights.where(~several, weights + " " + runs.weights_sha256.astype(str).str[:8])
    settings["classes"] = "as tested"
    settings["trained_on"] = runs.dataset.where(runs.dataset != runs.test_dataset, "the same")
    # Values that a run chose from a list are outcomes; the list is the setting.
    chosen = runs.searched.map(text).map(lambda searched: {part.split(" of ")[0] for part in searched.split("; ")})
    # So are values that a config file sets by dataset or number of shots: the file is the setting.
    files = runs.by_data.map(lambda said: dict(re.findall("(.+?): (.+?)(?:; |$)", text(said))))
    for name in settings:
        file = files.map(lambda own, name=name: own.get(name))
        settings[name] = settings[name].mask(file.notna(), "as in " + file.map(text))
        settings[name] = settings[name].mask(chosen.map(lambda names, name=name: name in names), "searched")
    open_budget = chosen.map(lambda names: bool(names & {*BUDGETS}))
    budgets = _budgets(runs, settings)
    file = files.map(lambda own: own.get("epochs"))
    budgets = budgets.mask(file.notna(), "iterations as in " + file.map(text))
    settings["iterations"] = budgets.mask(open_budget, "iterations searched")
    return settings


def _budgets(runs: pd.DataFrame, settings: pd.DataFrame) -> pd.Series:
    """Return how many iterations were asked for, in a form that is the same for all shots of a sweep.

    Records have the number of iterations in all. Only several runs show whether it was meant per shot: among runs with
    the same other settings, the rule that holds for the most numbers of shots is taken first.
    """
    budgets = pd.Series("-", index=runs.index)
    budgets = budgets.mask(runs.epochs.notna(), "epochs " + runs.epochs.map(text))
    counted = runs.epochs.isna() & runs.total_iters.notna()
    for _, family in settings[counted].groupby([*settings]):
        totals, shots = runs.total_iters[family.index], runs.shots[family.index]
        rules = {f"total_iters {total:.0f}": totals == total for total in sorted(totals.unique())}
        for per_shot in sorted((totals / shots).unique()):
            if per_shot % 1 == 0:
                rules[f"n_iters {per_shot:.0f}"] = totals == per_shot * shots
        open_runs = pd.Series(True, index=family.index)
        while open_runs.any():
            best = max(rules, key=lambda rule: shots[rules[rule] & open_runs].nunique())
            budgets.loc[(rules[best] & open_runs).loc[lambda chosen: chosen].index] = best
            open_runs &= ~rules[best]
    return budgets


def _labels(runs: pd.DataFrame, settings: pd.DataFrame) -> pd.Series:
    """Return each run's method and those of its settings in which the method's runs differ."""
    labels = pd.Series("", index=runs.index)
    for (method, evaluated), group in settings.groupby([runs.method, runs.evaluated]):
        differing = group[[name for name in group if group[name].nunique() > 1]]
        for index, row in differing.iterrows():
            words = ", ".join(value if name == "iterations" else f"{name} {value}" for name, value in row.items())
            labels[index] = method + (", evaluated weights" if evaluated else "") + (f" ({words})" if words else "")
    return labels
