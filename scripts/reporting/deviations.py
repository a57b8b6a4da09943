"""Deviations from what papers report, and whether the spread over seeds explains them."""

import functools
from collections.abc import Iterator

import pandas as pd
from scipy import stats

import metrics
from arguments import Config
from scripts.reporting.comparison import CONFIDENCE, SIGNED
from scripts.reporting.results import ELEVEN, PUBLISHED, SUITES, Results, text
from scripts.reporting.sheets import MISSING, Cell, Sheet, accuracies, in_words, number
from scripts.reporting.transfer import new_class_runs, transfer_runs
from scripts.reproducing.parts import read_part
from scripts.sweeping.grid import cells
from settings import LENGTHS

KINDS = ("rows", "rn50", "base_to_new", "transfer", "ablations")  # the lists of published.yaml
COLUMNS = [
    *("list", "name", "paper", "configuration", "shots", "data_set", "published", "read_off", "measured", "sd"),
    *("seeds", "deviation", "explained", "verdict"),
]
JUDGED = (
    "Percentage points. Explained by seeds: t s sqrt(1/n + 1/m), and the error of values that were read off a figure. "
    f"s is the standard deviation over our n seeds, t Student's quantile for {CONFIDENCE:.0%} with n - 1 degrees of "
    "freedom, m the published number of seeds, 1 if it is unknown. It assumes that published runs vary as ours do. "
    "Within: the deviation is not larger. Not judged: there is one seed, or seeds make no difference, or not enough is "
    "known of how the published number came about."
)
WITHOUT_EFFECT = {*LENGTHS, "eval_every", "sampled_gradients"}  # on what is learned, beside the length in force


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

    A configuration matches a published row if it is of its method, was trained and tested on the same classes, is equal
    to one of the row's `settings` in every setting named there, and has all hyperparameters of the runs of
    configs/reproduce/ that are planned for the row. Columns: list (of published.yaml), name, paper, configuration,
    shots, data_set, published, read_off (error of that), measured (mean over seeds), sd, seeds, deviation, explained
    (by seeds, points), verdict (within, outside, not judged). Means over datasets are compared if all are there.
    """
    rows, notes = [], []
    for kind, classes, runs in _kinds(results):
        for row in [row for row in PUBLISHED[kind] if "runs" in row]:
            own = runs[runs.method == row["method"]]
            for (label, shots), group in own.groupby(["configuration", "shots"], sort=False):
                pairs = list(_pairs(kind, row, shots, group))
                if not pairs:
                    continue
                if words := unlike(row, classes, group):
                    where = f"{label}, {in_words(shots)},"
                    notes.append(f"{where} is not compared with {row['name']}: {'; '.join(words)}.")
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
    most = None if "not_judged" in row else explained(found, published_seeds, read_off)
    verdict = "not judged" if most is None else "within" if abs(deviation) <= most else "outside"
    head = {"list": kind, "name": row["name"], "paper": PUBLISHED["papers"][row["paper"]]["url"]}
    head |= {"configuration": label, "shots": shots, "data_set": name, "published": value, "read_off": read_off}
    head |= {"measured": found.mean(), "sd": found.std(), "seeds": seeds}
    return head | {"deviation": deviation, "explained": most, "verdict": verdict}


def unlike(row: dict, classes: str, runs: pd.DataFrame) -> list[str]:
    """Return in words the settings in which runs with one number of shots are not as published or as planned; those of
    the first run that is not."""
    plans = [(part, label) for part, labels in row["runs"].items() for label in labels]
    for _, run in runs.iterrows():
        published = [mismatch(run, {"classes": classes} | wanted) for wanted in row["settings"]]
        of_plans = [_unlike_plan(run, plan) for place in plans if (plan := _planned(*place, run.dataset, run.shots))]
        if words := min(published, key=len) or min(of_plans, key=len):
            return [f"{run.dataset}: {word}" for word in words]
    return []


def mismatch(run: pd.Series, wanted: dict) -> list[str]:
    """Return in words the settings in which a run has another value than the wanted one; None is any."""
    wanted = {name: value for name, value in wanted.items() if value is not None}
    if "n_iters" in wanted:
        wanted["total_iters"] = wanted.pop("n_iters") * run.shots
    return [
        f"{name} is {text(run.get(name))}, not {text(value)}"
        for name, value in wanted.items()
        if text(run.get(name)) != text(value)
    ]


@functools.cache
def _planned(part: str, label: str, dataset: str, shots: int) -> Config | None:
    """Return what a row of configs/reproduce/ asks for on this dataset; None if it has no such run."""
    grid = read_part(part).grid
    if dataset not in grid["datasets"] or shots not in grid["shots"]:
        return None
    one = grid | {"rows": {label: grid["rows"][label]}, "datasets": [dataset], "shots": [shots], "seeds": [1]}
    (cell,) = cells(one, ["--root_path", ".", "--device", "cpu"])
    return cell.config


def _unlike_plan(run: pd.Series, plan: Config) -> list[str]:
    """Return in words the hyperparameters in which a run is not as planned, how they were to be chosen, and the images
    that it was to be trained on. Evaluations do not know what their weights' run searched, only what it chose."""
    values = plan.hparams.identity
    wanted = {name: value for name, value in values.items() if name not in {*WITHOUT_EFFECT, *plan.search}}
    wanted |= {name: getattr(plan.hparams, name) for name in [plan.hparams.length] if name}
    wanted |= {name: getattr(plan.settings, name) for name in ("draw", "prompts", "imbalance", "label_noise")}
    wanted["tuned_on"] = "val" if plan.search else plan.settings.tuned_on
    words = mismatch(run, wanted)
    if text(run.eval_only) != "true" and text(run.get("searched")) != text(plan.searched):
        words.append(f"searched is {text(run.get('searched'))}, not {text(plan.searched)}")
    chosen = {name: [text(value) for value in values] for name, values in plan.search.items()}
    return words + [
        f"{name} is {text(run.get(name))}, not one of {', '.join(choices)}"
        for name, choices in chosen.items()
        if text(run.get(name)) not in choices
    ]


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
    named = {(kind, row["name"]): row for kind in KINDS for row in PUBLISHED[kind]}
    sheets = [verdict_sheet(rows)] if len(rows) else []
    for (label, kind, name), part in rows.groupby(["configuration", "list", "name"], sort=False):
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
        published = named[kind, name]
        known, plans = ", ".join(published["settings"][0]), ", ".join(published["runs"])
        notes = [f"Percentage points. The runs agree with what is known of the published settings: {known}."]
        notes[0] += f" All other hyperparameters are those of configs/reproduce/ ({plans})."
        if "not_judged" in published:
            notes.append(f"Not judged: {published['not_judged']}.")
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
