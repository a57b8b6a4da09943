"""Deviations from what papers report, and whether the spread over seeds explains them."""

from collections.abc import Iterator, Sequence

import pandas as pd
from scipy import stats

import metrics
from arguments import parse
from scripts.reporting.comparison import CONFIDENCE, SIGNED
from scripts.reporting.results import ELEVEN, PUBLISHED, SUITES, Results, text
from scripts.reporting.sheets import MISSING, Cell, Sheet, accuracies, in_words, number
from scripts.reporting.transfer import new_class_runs, transfer_runs

COLUMNS = ["name", "paper", "configuration", "shots", "data_set", "published", "read_off", "measured", "sd", "seeds"]
COLUMNS += ["deviation", "explained", "verdict"]
JUDGED = (
    "Percentage points. Explained by seeds: t s sqrt(1/n + 1/m), and the error of values that were read off a figure. "
    f"s is the standard deviation over our n seeds, t Student's quantile for {CONFIDENCE:.0%} with n - 1 degrees of "
    "freedom, m the published number of seeds, 1 if it is unknown. It assumes that published runs vary as ours do. "
    "Within: the deviation is not larger. Not judged: there is one seed, or seeds make no difference."
)
SUBSET = "Not judged: the published mean is of some of the datasets, and it is not known which."


def explained(found: pd.Series, published_seeds: int | str, read_off: float | None) -> float | None:
    """Return the largest deviation (points) that seeds explain, for accuracies [n], one a seed; None if it cannot be
    said. `published_seeds`: how many the published mean is of, or unknown."""
    n, m = len(found), published_seeds if isinstance(published_seeds, int) else 1
    if n < 2 or found.std() < 1e-9:
        return None
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
    return quantile * found.std() * (1 / n + 1 / m) ** 0.5 + (read_off or 0.0)


def deviations(results: Results) -> tuple[pd.DataFrame, list[str]]:
    """Return measured minus published accuracy where the settings match, and notes on those that do not.

    A configuration matches a published row if it is of its method, was trained and tested on the same classes, and is
    equal to one of the row's `settings` in every setting named there, and in those of `as_by_default` to what main.py
    has for the dataset and shots. Columns: name, paper, configuration, shots, data_set, published, read_off (error of
    that), measured (mean over seeds), sd, seeds, deviation, explained (by seeds, points), verdict (within, outside, not
    judged). Means over datasets are compared if all of them are there.
    """
    rows, notes = [], []
    for kind, classes, runs in _kinds(results):
        for row in PUBLISHED[kind]:
            own = runs[runs.method == row.get("method")]
            for (label, shots), group in own.groupby(["configuration", "shots"], sort=False):
                pairs = list(_pairs(kind, row, shots, group))
                if not pairs:
                    continue
                unlike = min((mismatch(group.iloc[0], wanted, classes) for wanted in row["settings"]), key=len)
                unlike = unlike or unlike_default(group, row.get("as_by_default", ()))
                if unlike:
                    where = f"{label}, {in_words(shots)},"
                    notes.append(f"{where} is not compared with {row['name']}: {'; '.join(unlike)}.")
                    continue
                rows += [_deviation(kind, row, label, shots, *pair) for pair in pairs if pair[2] is not None]
    return pd.DataFrame(rows, columns=COLUMNS), notes


def _kinds(results: Results) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield each list of published rows with the classes that its runs were tested on, and these runs."""
    whole = results.tested[results.tested.tested_on.isin(ELEVEN)]
    for kind in ("rows", "rn50", "ablations"):
        yield kind, "all", whole
    yield "base_to_new", "new", new_class_runs(results)
    moved = transfer_runs(results)
    yield "transfer", "all", moved[moved.dataset == "imagenet"]


def _pairs(
    kind: str, row: dict, shots: int, runs: pd.DataFrame
) -> Iterator[tuple[str, float, pd.Series | None, int | None]]:
    """Yield what a row publishes for this number of shots: name, value, the runs' accuracies by seed, None if they are
    incomplete, and the smallest number of seeds."""
    fewest = runs.groupby("tested_on").size().min()
    if kind == "base_to_new" and shots == 16:
        base, new = (accuracies(runs.assign(test_accuracy=runs[name]), list(ELEVEN)) for name in ("base", "new"))
        whole = base is not None
        both = pd.Series([metrics.harmonic_mean(*pair) for pair in zip(base, new)]) if whole else None
        values = {"base classes": ("base", base), "new classes": ("new", new), "harmonic mean": ("harmonic", both)}
        for name, (key, found) in values.items():
            yield name, row[key], found, fewest
    elif kind == "transfer" and shots == 16:
        source = runs.groupby("seed").source.first().dropna()
        yield "ImageNet", row["imagenet"], source if len(source) else None, len(source)
        suites = {"others": list(ELEVEN)[1:], "variants": list(SUITES["variants of ImageNet"])}
        for key, columns in suites.items():
            if key in row:
                part = runs[runs.tested_on.isin(columns)]
                yield f"mean of {len(columns)} {key}", row[key], accuracies(part, columns), fewest
    elif kind not in ("base_to_new", "transfer"):
        for name, value in row.get("data_sets", {}).get(shots, {}).items():
            found = runs[runs.tested_on == name].set_index("seed").test_accuracy
            yield ELEVEN[name], value, found if len(found) else None, len(found)
        if shots in row["means"]:
            yield "mean of 11", row["means"][shots], accuracies(runs, list(ELEVEN)), fewest


def _deviation(
    kind: str, row: dict, label: str, shots: int, name: str, value: float, found: pd.Series, seeds: int
) -> dict:
    read_off, deviation = row.get("read_off"), found.mean() - value
    published_seeds = row.get("protocol", {}).get("seeds", "unknown")
    most = None if kind == "ablations" else explained(found, published_seeds, read_off)
    verdict = "not judged" if most is None else "within" if abs(deviation) <= most else "outside"
    head = {"name": row["name"], "paper": PUBLISHED["papers"][row["paper"]]["url"], "configuration": label}
    head |= {"shots": shots, "data_set": name, "published": value, "read_off": read_off, "measured": found.mean()}
    return head | {"sd": found.std(), "seeds": seeds, "deviation": deviation, "explained": most, "verdict": verdict}


def mismatch(run: pd.Series, wanted: dict, classes: str) -> list[str]:
    """Return in words the settings in which a run is not as published."""
    wanted = {"classes": classes} | {name: value for name, value in wanted.items() if value is not None}
    if "n_iters" in wanted:
        wanted["total_iters"] = wanted.pop("n_iters") * run.shots
    return [
        f"{name} is {text(run.get(name))}, published {text(value)}"
        for name, value in wanted.items()
        if text(run.get(name)) != text(value)
    ]


def unlike_default(runs: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """Return in words where a run has other values of these hyperparameters than main.py has by default, as they were
    published for its method, dataset and number of shots."""
    for _, run in runs.drop_duplicates(["dataset", "shots"]).iterrows():
        words = ["--method", run.method, "--dataset", run.dataset, "--shots", f"{run.shots}", "--root_path", "."]
        hparams = parse([*words, "--backbone", "ViT-B/16", "--device", "cpu"]).hparams
        if unlike := mismatch(run, {name: getattr(hparams, name) for name in names}, run.classes):
            return [f"{run.dataset}: {words}" for words in unlike]
    return []


VERDICTS = ("within", "outside", "not judged")


def verdict_sheet(rows: pd.DataFrame) -> Sheet:
    """Return how many of the deviations seeds explain, by configuration and published row."""
    table = []
    for (label, name), part in rows.groupby(["configuration", "name"], sort=False):
        counts = [number((part.verdict == verdict).sum(), "{}") for verdict in VERDICTS]
        worst = part[part.verdict == "outside"]
        where = [f"{row.data_set}, {in_words(row.shots)} ({row.deviation:+.2f})" for row in worst.itertuples()]
        table.append([Cell(label), Cell(name), *counts, Cell("; ".join(where) or MISSING)])
    header = ["here", "published", *VERDICTS, "where outside"]
    return Sheet("Deviations from published accuracies: do seeds explain them?", header, table, [JUDGED])


def deviation_sheets(rows: pd.DataFrame) -> list[Sheet]:
    """Return all deviations as tables: how many seeds explain, then one for each configuration and published row."""
    kinds = ("rows", "rn50", "ablations", "base_to_new", "transfer")
    named = {(row["name"], PUBLISHED["papers"][row["paper"]]["url"]): row for kind in kinds for row in PUBLISHED[kind]}
    sheets = [verdict_sheet(rows)] if len(rows) else []
    for (label, name, paper), part in rows.groupby(["configuration", "name", "paper"], sort=False):
        cells = [
            [
                Cell(row.data_set),
                number(row.shots, "{}"),
                number(row.deviation, SIGNED),
                number(row.explained, "± {:.2f}"),
                Cell(row.verdict),
                _reported(row.published, row.read_off),
                number(row.measured, "{:.2f}" + ("" if pd.isna(row.sd) else f" ± {row.sd:.2f}")),
                number(row.seeds, "{}"),
            ]
            for row in part.itertuples(index=False)
        ]
        known = ", ".join(named[name, paper]["settings"][0])
        notes = [f"Percentage points. The runs agree with what is known of the published settings: {known}."]
        if any(row["name"] == name for row in PUBLISHED["ablations"]):
            notes.append(SUBSET)
        header = ["dataset", "shots", "deviation", "explained", "verdict", "published", "here", "seeds"]
        sheets.append(Sheet(f"{label} minus {name} as published", header, cells, notes))
    return sheets


PROTOCOL = ("prompts", "validation", "precision", "seeds")
PROTOCOL_NOTE = "Protocol: prompts, use of validation images, precision, seeds; unknown: not found."


def published_sheets() -> list[Sheet]:
    """Return what papers report: averages over the eleven datasets with two backbones, base-to-new, transfer, and
    ablations of SO."""
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
    rows = PUBLISHED["ablations"]
    cells = [[number(row["means"].get(shots)) for shots in (1, 4)] for row in rows]
    note = "Per cent, ViT-B/16, as cited elsewhere: means of some of the datasets, and it is not known which."
    sheets.append(_published("Published ablations of SO", rows, [in_words(1), in_words(4)], cells, [note]))
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
