"""Differences between configurations, and deviations from what papers report."""

from collections.abc import Sequence

import pandas as pd
from scipy import stats

from common import UserError
from scripts.reporting.results import ELEVEN, PUBLISHED, Results, text
from scripts.reporting.sheets import MISSING, Cell, Sheet, accuracies, in_words, number, suites

CONFIDENCE = 0.95
SIGNED = "{:+.2f}"
DIFFERENCES = ["a", "b", "shots", "data_set", "pairs", "data_sets", "mean_a", "mean_b", "difference", "low", "high"]
DEVIATIONS = ["name", "paper", "configuration", "shots", "data_set", "published", "read_off", "measured", "sd", "seeds"]
DEVIATIONS += ["deviation"]
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
            notes.append(f"Left out, runs of the two without a partner with the same images: {named}.")
        if found.low.isna().any():
            notes.append(f"{MISSING}: an interval needs at least two pairs.")
        header = ["minus", "dataset", "shots", "difference", f"{CONFIDENCE:.0%} interval", "pairs", a, "the other"]
        title = f"{a} minus {next(iter(others))}" if len(others) == 1 else f"{a} minus each of the others"
        sheets.append(Sheet(title, header, cells, notes))
    return sheets


def deviations(results: Results) -> tuple[pd.DataFrame, list[str]]:
    """Return measured minus published accuracy where the settings match, and notes on those that do not.

    A configuration matches a published row if it is of its method, trained and tested on all classes, and equal to one
    of the row's `settings` in every setting named there. Columns: name, paper, configuration, shots, data_set,
    published, read_off (error of that), measured (mean over seeds), sd, seeds, deviation. Means over datasets are
    compared if all eleven are there.
    """
    rows, notes = [], []
    runs = results.tested[results.tested.tested_on.isin(ELEVEN)]
    for row in PUBLISHED["rows"]:
        own = runs[runs.method == row.get("method")]
        for (label, shots), group in own.groupby(["configuration", "shots"], sort=False):
            reported = {ELEVEN[name]: value for name, value in row.get("data_sets", {}).get(shots, {}).items()}
            mean = row["means"].get(shots)
            if mean is None and not reported:
                continue
            mismatch = min((_mismatch(group.iloc[0], wanted) for wanted in row["settings"]), key=len)
            if mismatch:
                notes.append(f"{label}, {in_words(shots)}, is not compared with {row['name']}: {'; '.join(mismatch)}.")
                continue
            measured = {name: part.test_accuracy for name, part in group.groupby("short_name", sort=False)}
            compared = {name: (value, measured[name]) for name, value in reported.items() if name in measured}
            averages = accuracies(group, list(ELEVEN))
            if mean is not None and averages is not None:
                compared["mean of 11"] = (mean, averages)
            fewest = group.groupby("tested_on").size().min()
            for name, (value, found) in compared.items():
                head = {"name": row["name"], "paper": PUBLISHED["papers"][row["paper"]]["url"], "configuration": label}
                head |= {"shots": shots, "data_set": name, "published": value, "read_off": row.get("read_off")}
                head |= {"measured": found.mean(), "sd": found.std()}
                head |= {"seeds": len(measured[name]) if name in measured else fewest}
                rows.append(head | {"deviation": found.mean() - value})
    return pd.DataFrame(rows, columns=DEVIATIONS), notes


def _mismatch(run: pd.Series, wanted: dict) -> list[str]:
    """Return in words the settings in which a run is not as published."""
    wanted = {"classes": "all"} | {name: value for name, value in wanted.items() if value is not None}
    if "n_iters" in wanted:
        wanted["total_iters"] = wanted.pop("n_iters") * run.shots
    return [
        f"{name} is {text(run.get(name))}, published {text(value)}"
        for name, value in wanted.items()
        if text(run.get(name)) != text(value)
    ]


def deviation_sheets(rows: pd.DataFrame) -> list[Sheet]:
    """Return the same as tables, one for each configuration and published row."""
    known = {row["name"]: ", ".join(row["settings"][0]) for row in PUBLISHED["rows"] if "settings" in row}
    sheets = []
    for (label, name), part in rows.groupby(["configuration", "name"], sort=False):
        cells = [
            [
                Cell(row.data_set),
                number(row.shots, "{}"),
                number(row.deviation, SIGNED),
                _reported(row.published, row.read_off),
                number(row.measured, "{:.2f}" + ("" if pd.isna(row.sd) else f" ± {row.sd:.2f}")),
                number(row.seeds, "{}"),
            ]
            for row in part.itertuples(index=False)
        ]
        notes = [f"Percentage points. The runs agree with what is known of the published settings: {known[name]}."]
        header = ["dataset", "shots", "deviation", "published", "here", "seeds"]
        sheets.append(Sheet(f"{label} minus {name} as published", header, cells, notes))
    return sheets


PROTOCOL = ("prompts", "validation", "precision", "seeds")
PROTOCOL_NOTE = "Protocol: prompts, use of validation images, precision, seeds; unknown: not found."


def published_sheets() -> list[Sheet]:
    """Return what papers report: averages over the eleven datasets with two backbones, base-to-new, and transfer."""
    sheets = []
    for title, rows in {"Published averages": PUBLISHED["rows"], "Published averages, RN50": PUBLISHED["rn50"]}.items():
        shots = sorted({n for row in rows for n in row["means"]})
        cells = [[_reported(row["means"].get(n), row.get("read_off")) for n in shots] for row in rows]
        backbone = "ViT-B/16" if rows is PUBLISHED["rows"] else "RN50"
        notes = [f"Per cent, {backbone}, averages over the eleven datasets. ≈: read off a plot. {PROTOCOL_NOTE}"]
        sheets.append(_published(title, rows, [in_words(n) for n in shots], cells, notes))
    rows = PUBLISHED["base_to_new"]
    cells = [[number(row[name]) for name in ("base", "new", "harmonic")] for row in rows]
    note = f"Per cent, ViT-B/16, 16 shots: averages over the eleven datasets, their harmonic mean. {PROTOCOL_NOTE}"
    sheets.append(_published("Published base-to-new accuracies", rows, ["base", "new", "harmonic mean"], cells, [note]))
    rows = PUBLISHED["transfer"]
    cells = [[number(row.get(name)) for name in ("imagenet", "others", "variants")] for row in rows]
    note = "Per cent, ViT-B/16, trained on ImageNet with 16 shots; all from one paper."
    header = ["ImageNet", "mean of ten others", "mean of four variants"]
    sheets.append(_published("Published transfer from ImageNet", rows, header, cells, [note]))
    return sheets


def _published(title: str, rows: list[dict], header: list[str], cells: list[list[Cell]], notes: list[str]) -> Sheet:
    """Return a table with a row's name first, its protocol and its source last."""
    table = []
    for row, own in zip(rows, cells):
        protocol = "; ".join(f"{name} {row['protocol'][name]}" for name in PROTOCOL) if "protocol" in row else MISSING
        source = PUBLISHED["papers"][row["paper"]]["url"].removeprefix("https://")
        table.append([Cell(row["name"]), *own, Cell(protocol), Cell(source)])
    return Sheet(title, ["method", *header, "protocol", "source"], table, notes)


def _reported(value: float | None, read_off: float | None) -> Cell:
    return number(value, "{:.1f}" if pd.isna(read_off) else "≈ {:.1f}")
