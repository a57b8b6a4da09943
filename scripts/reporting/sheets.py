"""Tables, written as Markdown, LaTeX and, through page.html, HTML: accuracies, costs, validation accuracies."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from scripts.reporting.results import SHORT, SUITES, Results

MISSING = "-"
EVALUATED = ", evaluated weights"  # what the titles of their tables end with


@dataclass(frozen=True)
class Cell:
    """What a table shows, and the exact number behind it, by which columns are sorted."""

    text: str
    value: float | None = None


@dataclass
class Sheet:
    """A table. The first column names the rows."""

    title: str
    header: list[str]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)]]
        lines += [[cell.text for cell in row] for row in self.rows]
        table = "\n".join("| " + " | ".join(word.replace("|", r"\|") for word in line) + " |" for line in lines)
        return "\n\n".join([f"## {self.title}", table, *self.notes]) + "\n"

    def latex(self) -> str:
        """Return a table environment for the booktabs package, as wide as its content."""
        frame = pd.DataFrame([[_latex(cell.text) for cell in row] for row in self.rows])
        body = frame.to_latex(
            header=[_latex(name) for name in self.header],
            index=False,
            escape=False,
            column_format="l" + "c" * (len(self.header) - 1),
        )
        caption = _latex(" ".join([f"{self.title}.", *self.notes]))
        return f"\\begin{{table*}}\n\\centering\n\\caption{{{caption}}}\n{body}\\end{{table*}}\n"


def _latex(words: str) -> str:
    words = re.sub(r"[\\{}_%&#$~^]", lambda m: _ESCAPES.get(m[0], "\\" + m[0]), words)
    return words.replace("±", r"$\pm$")


_ESCAPES = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def in_words(shots: int) -> str:
    return "1 shot" if shots == 1 else f"{shots} shots"


def number(value: float | None, shown: str = "{:.2f}") -> Cell:
    """Return a cell that shows a number in this format; None and nan are missing."""
    return Cell(MISSING) if pd.isna(value) else Cell(shown.format(value), value)


def spread(values: pd.Series | None, usual: int | None = None) -> Cell:
    """Return mean and, of several, standard deviation (of a sample, n - 1); and how many, unless as `usual`."""
    if values is None or values.empty:
        return Cell(MISSING)
    shown = "{:.2f}" + (f" ± {values.std():.2f}" if len(values) > 1 else "")
    return number(values.mean(), shown + (f" (n={len(values)})" if usual not in (None, len(values)) else ""))


def seeds(runs: pd.DataFrame) -> tuple[int, str]:
    """Return how many seeds most cells of a table have, and a note on them."""
    counts = runs.groupby(["configuration", "shots", "tested_on"]).size()
    usual, found = int(counts.mode().max()), sorted(runs.seed.unique())
    listed, uneven = ", ".join(map(str, found)), counts.nunique() > 1
    if len(found) == 1:
        return usual, f"Per cent, seed {listed}."
    over = f"{usual} of the seeds" if uneven or usual < len(found) else "the seeds"
    text = f"Per cent, mean ± standard deviation over {over} {listed}"
    return usual, text + (", or n where it says so." if uneven else ".")


def usual_shots(runs: pd.DataFrame) -> int:
    """Return the number of shots that most configurations were run with, the larger of equals."""
    counts = runs.groupby("shots").configuration.nunique()
    return int(max(counts.index, key=lambda shots: (counts[shots], shots)))


# --- which datasets stand together


def suites(runs: pd.DataFrame) -> dict[str, list[str]]:
    """Return datasets that share a table, in order, by the name of the suite; those of no suite are under ""."""
    present = list(runs.tested_on.unique())
    found = {suite: [column for column in names if column in present] for suite, names in SUITES.items()}
    found[""] = sorted(set(present) - {column for columns in found.values() for column in columns})
    return {suite: columns for suite, columns in found.items() if columns}


def places(runs: pd.DataFrame, once: bool = False) -> list[tuple[str, pd.DataFrame, list[str]]]:
    """Return what accuracies can be shown of, as title, runs and datasets: averages over suites, then each dataset,
    or, if each is to be shown `once`, those that are part of no average."""
    averages, single = [], []
    for suite, columns in suites(runs).items():
        part = runs[runs.tested_on.isin(columns)]
        if suite and len(columns) > 1:
            averages.append((f"average of {len(columns)}", part, columns))
            if once:
                continue
        for column in columns:
            own = part[part.tested_on == column]
            single.append((own.short_name.iloc[0], own, [column]))
    return averages + single


def accuracies(runs: pd.DataFrame, columns: Sequence[str]) -> pd.Series | None:
    """Return the accuracy of one configuration and number of shots, averaged over datasets, for each seed.

    Return None if a dataset is missing, and a single value, the average of the datasets' means, if not all datasets
    have the same seeds.
    """
    if set(runs.tested_on) != set(columns):
        return None
    table = runs.pivot(index="seed", columns="tested_on", values="test_accuracy")
    return table.mean(axis=1) if table.notna().all(axis=None) else pd.Series([table.mean().mean()])


# --- accuracy


def accuracy_tables(results: Results) -> list[Sheet]:
    """Return for each number of shots the configurations' test accuracies by dataset.

    Saved weights that were evaluated, and datasets of no suite, have separate tables. Tests on new classes whose base
    accuracy is known are left out: base-to-new tables have both.
    """
    sheets, in_base_to_new = [], results.runs.evaluated & results.runs.base_accuracy.notna()
    for evaluated, kind in results.runs[(results.runs.test_part == "test") & ~in_base_to_new].groupby("evaluated"):
        for suite, columns in suites(kind).items():
            for shots, runs in kind[kind.tested_on.isin(columns)].groupby("shots"):
                shown = columns if suite else [column for column in columns if column in set(runs.tested_on)]
                title = f"Test accuracy after {in_words(shots)} on {suite or ', '.join(shown)}"
                title += EVALUATED if evaluated else ""
                sheets.append(_accuracy_table(results, runs, title, suite, shown))
    return sheets


def _accuracy_table(results: Results, runs: pd.DataFrame, title: str, suite: str, columns: list[str]) -> Sheet:
    usual, note = seeds(runs)
    notes, rows, mixed = [note], [], False
    for label in results.labels(runs):
        own = runs[runs.configuration == label]
        row = [Cell(label), *(spread(own.test_accuracy[own.tested_on == column], usual) for column in columns)]
        if suite:
            mean = accuracies(own, columns)
            mixed |= mean is not None and len(mean) < own.groupby("tested_on").size().max()
            row.append(spread(mean))
        rows.append(row)
    if any(cell.text == MISSING for row in rows for cell in row):
        elsewhere = "; tests of saved weights have tables of their own" if results.runs.evaluated.any() else ""
        notes.append(f"{MISSING}: no such run{elsewhere}" + (", and no average without it." if suite else "."))
    if mixed:
        notes.append("An average without ± is over datasets that have different seeds.")
    absent = [name for column, name in SUITES.get(suite, {}).items() if column not in columns]
    if absent:
        notes.append(f"Of {suite} there is no run, at any number of shots, on {', '.join(absent)}.")
    header = ["method", *(SHORT.get(column, column) for column in columns)]
    return Sheet(title, header + ([f"average of {len(columns)}"] if suite else []), rows, notes)


# --- accuracy and cost

COSTS = {  # column of the records: heading, format, unit
    "trainable_weights": ("trained", "{:,.0f}", 1),
    "changed_weights": ("changed", "{:,.0f}", 1),
    "optimizer_bytes": ("optimizer", "{:,.0f} kB", 1000),
    "train_seconds": ("training", "{:.1f} s", 1),
    "eval_seconds": ("test", "{:.1f} s", 1),
    "peak_memory_mb": ("memory", "{:,.0f} MiB", 1),
}
MADE_ON = {"device": "device", "torch_version": "torch", "git_commit": "commit"}


def cost_tables(results: Results) -> list[Sheet]:
    """Return the configurations' accuracies beside what they cost, for each dataset or average over a suite."""
    return [_cost_table(results, *place) for place in places(results.tested, once=True)]


def one_device(runs: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return the runs on the device that most were done on, and its name: costs are compared only on one device."""
    devices = runs.device.map(lambda name: "cpu" if pd.isna(name) else str(name))
    most = devices.value_counts().sort_index().idxmax()
    return runs[devices == most], most


def _cost_table(results: Results, title: str, runs: pd.DataFrame, columns: list[str]) -> Sheet:
    shots, rows = sorted(runs.shots.unique()), []
    usual, note = seeds(runs)
    measured, device = one_device(runs[runs.shots == shots[-1]])
    for label in results.labels(runs):
        own = runs[runs.configuration == label]
        row = [Cell(label), *(spread(accuracies(own[own.shots == n], columns), usual) for n in shots)]
        most = measured[measured.configuration == label]
        for column, (_, shown, unit) in COSTS.items():  # means, over datasets if there are several
            mean = pd.to_numeric(most[column]).groupby(most.tested_on).mean().mean() if column in runs else math.nan
            row.append(number(mean, shown.format(mean / unit)))
        rows.append(row)
    days = sorted({str(finished)[:10] for finished in runs.finished_at})
    made = [f"{days[0]} to {days[-1]}"]
    for name, word in MADE_ON.items():
        if name in runs:
            made.append(f"{word} {', '.join(sorted(set(runs[name].astype(str))))}")
    after = (
        f"After {in_words(shots[-1])}, on {device} only: weights that are trained, weights that changed, size of the "
        "optimizer's state, seconds of training and of the final test, most memory in use."
    )
    header = ["method", *map(in_words, shots), *(heading for heading, _, _ in COSTS.values())]
    return Sheet(f"Accuracy and cost, {title}", header, rows, [note, after, f"{'; '.join(made)}."])


# --- accuracy on validation images


def validation_tables(results: Results) -> list[Sheet]:
    """Return for each dataset the configurations that were tested on its validation part, each method's best first."""
    runs = results.runs[results.runs.test_part == "val"]
    return [_validation_table(part) for _, part in runs.groupby("tested_on", sort=False)]


def _validation_table(runs: pd.DataFrame) -> Sheet:
    shots, rows = sorted(runs.shots.unique()), []
    usual, note = seeds(runs)
    for _, of_method in runs.groupby("method", sort=False):
        ranked = []
        for label, own in of_method.groupby("configuration", sort=False):
            found = [own.test_accuracy[own.shots == n] for n in shots]
            whole = all(len(values) >= usual for values in found)
            mean = number(sum(values.mean() for values in found) / len(shots) if whole else None)
            ranked.append([Cell(label), *(spread(values, usual) for values in found), mean])
        rows += sorted(ranked, key=lambda row: -1.0 if row[-1].value is None else row[-1].value, reverse=True)
    missing = f"The mean is over the numbers of shots; {MISSING} where runs are missing, as those that diverged are."
    title = f"Validation accuracy on {runs.short_name.iloc[0]}, each method's best settings first"
    return Sheet(title, ["method", *map(in_words, shots), "mean"], rows, [note, missing])
