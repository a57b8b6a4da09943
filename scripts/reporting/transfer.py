"""Tables of what adapted weights do elsewhere: on new classes, on other datasets, under domain shift."""

from collections.abc import Iterable

import pandas as pd

import metrics
from scripts.reporting.results import SHORT, Results
from scripts.reporting.sheets import MISSING, Cell, Sheet, in_words, number, seeds, spread, suites

# Settings that a training run and an evaluation of its weights need not share in their records.
NOT_SHARED = {"classes", "eval_only", "trained_on", "iterations", "searched", "tuned_on", "ece_bins"}
UNCHANGED = "zero-shot CLIP"  # the row of the unchanged model, from the records of the runs in the table
TITLES = {"the eleven datasets": "Cross-dataset transfer", "variants of ImageNet": "Domain shift"}


def _keys(results: Results, runs: pd.DataFrame) -> pd.Series:
    """Return for each run what tells whose weights were evaluated: method, shots, seed and the shared settings."""
    settings = results.settings.drop(columns=[name for name in NOT_SHARED if name in results.settings])
    shared = {label: tuple(row) for label, row in zip(settings.index, settings.to_numpy())}
    keys = [
        (run.method, shared[run.configuration], run.dataset, run.shots, run.seed)
        for run in runs.itertuples(index=False)
    ]
    return pd.Series(keys, index=runs.index, dtype=object)


def _names(results: Results, labels: Iterable[str]) -> dict[str, str]:
    """Return a short name for each configuration: its method and the settings in which those of the method differ."""
    settings = results.settings.loc[list(dict.fromkeys(labels))]
    names = {}
    for method, group in settings.groupby("method", sort=False):
        differing = [name for name in group if name not in NOT_SHARED - {"iterations"} and group[name].nunique() > 1]
        for label, row in group[differing].iterrows():
            words = ", ".join(f"{name} {value}" for name, value in row.items())
            names[label] = method + (f" ({words})" if words else "")
    return names


def _trained(
    results: Results, trained: pd.DataFrame, evaluated: pd.DataFrame, what: str = "test_accuracy"
) -> pd.Series:
    """Return an accuracy of the training run of each evaluation's weights; nan where there is none, or several."""
    found = trained[~trained.evaluated]
    by_key = found.assign(key=_keys(results, found)).groupby("key")[what]
    return _keys(results, evaluated).map(by_key.first().where(by_key.nunique() == 1)).astype(float)


# --- base to new


def new_class_runs(results: Results) -> pd.DataFrame:
    """Return the runs on new classes with the accuracies `base`, `new` and `harmonic` of the same weights, and that of
    the unchanged model on the base classes, `base_before`. Those whose run on the base classes is missing are left out,
    except where their record has its accuracy."""
    runs = results.runs[results.runs.test_part == "test"]
    new = runs[(runs.classes == "new") & (runs.dataset == runs.test_dataset)]
    trained = runs[runs.classes == "base"]
    base = new.base_accuracy.astype(float).fillna(_trained(results, trained, new))
    tested_on = new.tested_on.str.removesuffix(" new classes")
    before = _trained(results, trained, new, "zero_shot_accuracy")
    pairs = new.assign(base=base, new=new.test_accuracy, tested_on=tested_on, base_before=before).dropna(subset="base")
    pairs["harmonic"] = [metrics.harmonic_mean(*both) for both in zip(pairs.base, pairs.new)]
    return pairs


def base_to_new_tables(results: Results) -> list[Sheet]:
    """Return for each suite and number of shots the accuracies on base and new classes and their harmonic means."""
    pairs = new_class_runs(results)
    return [
        _base_to_new_table(results, part, shots, suite, columns)
        for suite, columns in suites(pairs).items()
        for shots, part in pairs[pairs.tested_on.isin(columns)].groupby("shots")
    ]


def _base_to_new_table(results: Results, runs: pd.DataFrame, shots: int, suite: str, columns: list[str]) -> Sheet:
    averaged = bool(suite) and len(columns) > 1
    usual, note = seeds(runs)
    names = _names(results, results.labels(runs))
    own = [(names[label], runs[runs.configuration == label]) for label in results.labels(runs)]
    if "zero_shot" not in set(runs.method):
        own.insert(0, (UNCHANGED, _before(runs)))
    rows = []
    for name, part in own:
        row = [Cell(name)]
        if averaged:
            means = part.groupby("tested_on")[["base", "new", "harmonic"]].mean()
            base, new, mean_of_h = means.mean() if set(means.index) == set(columns) else [None] * 3
            h_of_averages = None if base is None else metrics.harmonic_mean(base, new)
            row += [number(value) for value in (base, new, h_of_averages, mean_of_h)]
        for column in columns:
            on_it = part[part.tested_on == column]
            row += [spread(on_it[kind], 1 if name == UNCHANGED else usual) for kind in ("base", "new", "harmonic")]
        rows.append(row)
    header = ["method", *(["base", "new", "H, averages first", "mean of H"] if averaged else [])]
    header += [f"{SHORT.get(column, column)} {name}" for column in columns for name in ("base", "new", "H")]
    notes = [note]
    if averaged:
        notes.append(
            f"Averages over {len(columns)} datasets. H, averages first: the harmonic mean of the average base and the "
            "average new accuracy, as papers report it. Mean of H: the mean of the datasets' harmonic means."
        )
    where = suite or ", ".join(columns)
    title = f"Base to new after {in_words(shots)} on {where}"
    return Sheet(title, header, rows, notes)


def _before(runs: pd.DataFrame) -> pd.DataFrame:
    """Return runs on new classes as if nothing had been trained, one a dataset; none where prompts or backbones of the
    runs differ, so that there are several accuracies."""
    before = runs.assign(base=runs.base_before, new=runs.zero_shot_accuracy.astype(float))
    before = before.dropna(subset=["base", "new"])
    before["harmonic"] = [metrics.harmonic_mean(*both) for both in zip(before.base, before.new)]
    by_dataset = before.groupby("tested_on")[["base", "new", "harmonic"]]
    same = (by_dataset.max() - by_dataset.min() < 1e-9).all(axis=1)
    return before[before.tested_on.map(same).astype(bool)].drop_duplicates("tested_on")


# --- other datasets


def transfer_runs(results: Results) -> pd.DataFrame:
    """Return the evaluations on other datasets than the one trained on, with the accuracy there as `source`."""
    whole = results.runs[(results.runs.test_part == "test") & (results.runs.classes == "all")]
    runs = whole[whole.evaluated & (whole.dataset != whole.test_dataset)]
    return runs.assign(source=_trained(results, whole, runs))


def transfer_tables(results: Results) -> list[Sheet]:
    """Return for each source, number of shots and suite the accuracies on datasets other than the one trained on."""
    runs = transfer_runs(results)
    return [
        _transfer_table(
            results, part, f"{TITLES.get(suite, 'Transfer')}: trained on {SHORT.get(source, source)}", columns
        )
        for (source, _), of_source in runs.groupby(["dataset", "shots"])
        for suite, columns in suites(of_source).items()
        for part in [of_source[of_source.tested_on.isin(columns)]]
    ]


def _transfer_table(results: Results, runs: pd.DataFrame, title: str, columns: list[str]) -> Sheet:
    usual, note = seeds(runs)
    names = _names(results, results.labels(runs))
    rows = [_unchanged(runs, columns)]
    for label in results.labels(runs):
        own = runs[runs.configuration == label]
        parts = [own[own.tested_on == column] for column in columns]
        means = [part.test_accuracy.mean() for part in parts]
        source = own.groupby("seed").source.first().dropna()
        cells = [spread(source), *(spread(part.test_accuracy, usual) for part in parts)]
        rows.append([Cell(names[label]), *cells, number(sum(means) / len(means))])
    header = ["method", "source", *(SHORT.get(column, column) for column in columns), f"average of {len(columns)}"]
    notes = [note, "Source: the accuracy of the same weights on the dataset that they were trained on; the average is "]
    notes[1] += f"over the others. {MISSING}: no run."
    return Sheet(f"{title} with {in_words(runs.shots.iloc[0])}", header, rows, notes)


def _unchanged(runs: pd.DataFrame, columns: list[str]) -> list[Cell]:
    """Return the row of the unchanged model; a cell is missing where prompts or backbones of the runs differ."""
    values = []
    for column in columns:
        found = runs[runs.tested_on == column].zero_shot_accuracy.astype(float)
        values.append(found.mean() if found.max() - found.min() < 1e-9 else None)
    average = None if None in values else sum(values) / len(values)
    return [Cell(UNCHANGED), number(None), *map(number, values), number(average)]
