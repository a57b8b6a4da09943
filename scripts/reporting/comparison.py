"""Differences between configurations."""

from collections.abc import Sequence

import pandas as pd
from scipy import stats

from common import UserError
from scripts.reporting.results import Results
from scripts.reporting.sheets import MISSING, Cell, Sheet, number, suites

CONFIDENCE = 0.95
SIGNED = "{:+.2f}"
DIFFERENCES = ["a", "b", "shots", "data_set", "pairs", "data_sets", "mean_a", "mean_b", "difference", "low", "high"]
# Over datasets: in 1000 simulated samples of 11 the t interval of the mean covered the truth more often than the
# percentile and the BCa bootstrap: normal values 96, 90, 90 %; exponential 89, 85, 88 %; with outliers 73, 71, 70 %.
ASSUMPTIONS = (
    "Runs are paired by dataset, shots and seed, and only if both saw the same images; zero-shot runs, which see no "
    "training images, are paired with any. Within a dataset the interval is Student's t of the paired differences over "
    "seeds. It assumes that they are independent and normal, and predicts other seeds. Over datasets it is Student's t "
    "of the datasets' mean differences. It assumes that the datasets are a random sample of tasks of equal weight, "
    "with normal differences; if a few datasets stand out it is too narrow. Each interval alone is of 95 %: of twenty "
    "comparisons without any difference, one is expected to exclude zero."
)


def interval(differences: pd.Series) -> tuple[float, float]:
    """Return Student's t confidence interval of the mean; nan for a single value."""
    n = len(differences)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * differences.std() / n**0.5
    return differences.mean() - half, differences.mean() + half


def chosen_pairs(results: Results, asked: Sequence[Sequence[str]] | None) -> list[tuple[str, str]]:
    """Return the labels of the configurations to compare: those `asked` for or, if SO has one configuration, SO with
    every other. Raise UserError for a name that is unknown or has several configurations."""
    labels = results.labels(results.tested)

    def of(method: str) -> list[str]:
        return [label for label in labels if results.settings.method[label] == method]

    def chosen(name: str) -> str:
        own = [name] if name in labels else of(name)
        if len(own) == 1:
            return own[0]
        choice = ", ".join(repr(label) for label in own or labels) or "nothing: no trained runs"
        problem = f"{name} has several configurations" if own else f"there is no {name!r} in these results"
        raise UserError(f"--compare: {problem}; choose from {choice}")

    if not asked:
        return [(so, label) for so in of("so") for label in labels if label != so] if len(of("so")) == 1 else []
    pairs = [(chosen(a), chosen(b)) for a, b in asked]
    for a, b in pairs:
        if a == b:
            raise UserError(f"--compare needs two different methods, not {a!r} twice")
    return pairs


def differences(results: Results, a: str, b: str) -> pd.DataFrame:
    """Return a row for each number of shots and dataset with pairs, and one for the mean over a suite's datasets.

    Columns: a, b, shots, data_set, pairs, data_sets, mean_a, mean_b (per cent, of the pairs), difference (a - b), low,
    high (empty where there are too few values for an interval).
    """
    runs = results.tested
    one, two = (runs[runs.configuration == label] for label in (a, b))
    both = one.merge(two, on=["shots", "tested_on", "classes", "seed"], suffixes=("", "_b"))
    untrained = both[["method", "method_b"]].eq("zero_shot").any(axis=1)  # its hashes are of the test part only
    same_images = (both.split_sha256 == both.split_sha256_b) & (both.data_sha256 == both.data_sha256_b)
    both = both[untrained | same_images].assign(mean_a=both.test_accuracy, mean_b=both.test_accuracy_b)
    both["difference"] = both.mean_a - both.mean_b
    rows = []
    for shots, pairs in both.groupby("shots"):
        for suite, columns in suites(pairs).items():
            parts = [pairs[pairs.tested_on == column] for column in columns]
            for part in parts:
                row = {"shots": shots, "data_set": part.short_name.iloc[0], "pairs": len(part), "data_sets": 1}
                rows.append(row | _difference(part))
            if suite and len(parts) > 1:
                means = pd.DataFrame([part[["mean_a", "mean_b", "difference"]].mean() for part in parts])
                row = {"shots": shots, "data_set": f"mean of {len(parts)}", "data_sets": len(parts)}
                rows.append(row | {"pairs": sum(map(len, parts))} | _difference(means))
    return pd.DataFrame([{"a": a, "b": b} | row for row in rows], columns=DIFFERENCES)


def _difference(values: pd.DataFrame) -> dict[str, float]:
    low, high = interval(values.difference)
    return values[["mean_a", "mean_b", "difference"]].mean().to_dict() | {"low": low, "high": high}


def difference_sheets(results: Results, pairs: Sequence[tuple[str, str]], rows: Sequence[pd.DataFrame]) -> list[Sheet]:
    """Return the `differences` of these pairs as tables: one for each first configuration, which all others of its
    pairs stand in."""
    sheets = []
    for a in dict.fromkeys(first for first, _ in pairs):
        others = {b: part for (first, b), part in zip(pairs, rows) if first == a}
        found = pd.concat(others.values())
        cells = [
            [
                Cell(row.b),
                Cell(row.data_set),
                number(row.shots, "{}"),
                number(row.difference, SIGNED),
                number(row.low, f"{SIGNED} to {SIGNED.format(row.high)}"),
                number(row.pairs, "{}"),
                number(row.mean_a),
                number(row.mean_b),
            ]
            for row in found.itertuples()
        ]
        notes = ["Percentage points; means are of the pairs of runs only."]
        alone = {
            b: results.tested.configuration.isin([a, b]).sum() - 2 * part.pairs[part.data_sets == 1].sum()
            for b, part in others.items()
        }
        if any(alone.values()):
            named = ", ".join(f"{b} {count:.0f}" for b, count in alone.items() if count)
            notes.append(f"Left out, runs of {a} and of the other without a partner with the same images: {named}.")
        if found.low.isna().any():
            notes.append(f"{MISSING}: an interval needs at least two pairs.")
        header = ["minus", "dataset", "shots", "difference", f"{CONFIDENCE:.0%} interval", "pairs", a, "the other"]
        title = f"{a} minus {next(iter(others))}" if len(others) == 1 else f"{a} minus each of the others"
        sheets.append(Sheet(title, header, cells, notes))
    return sheets
