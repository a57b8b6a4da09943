"""A table that knows how to be Markdown, LaTeX and, through page.html, HTML; and the tables of accuracies."""

import re
from dataclasses import dataclass, field

import pandas as pd

from scripts.reporting.results import SHORT, SUITES, Results

MISSING = "-"


@dataclass(frozen=True)
class Cell:
    """What is shown, and the number behind it in full, by which columns are sorted."""

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
        """A table environment for the booktabs package, as wide as it is: shrink or turn it to fit the page."""
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
    return f"{shots} shot{'s' * (shots > 1)}"


def spread(values: pd.Series, usual: int | None = None) -> Cell:
    """Mean and, of several, standard deviation (of a sample, n - 1) in per cent; and how many, unless as `usual`."""
    if values.empty:
        return Cell(MISSING)
    shown = f"{values.mean():.2f}" + (f" ± {values.std():.2f}" if len(values) > 1 else "")
    return Cell(shown + (f" (n={len(values)})" if usual not in (None, len(values)) else ""), float(values.mean()))


def suites(runs: pd.DataFrame) -> dict[str, list[str]]:
    """Data sets that share a table, in order, by the name of the suite; those of no suite are under ``."""
    present = list(runs.tested_on.unique())
    found = {suite: [column for column in names if column in present] for suite, names in SUITES.items()}
    found[""] = sorted(set(present) - {column for columns in found.values() for column in columns})
    return {suite: columns for suite, columns in found.items() if columns}


def average(runs: pd.DataFrame, columns: list[str]) -> pd.Series | None:
    """Averages over data sets of one configuration and number of shots, one for each seed. None if a data set is
    missing. If not all data sets have the same seeds there is one value, the average of the data sets' means."""
    if set(runs.tested_on) != set(columns):
        return None
    table = runs.pivot(index="seed", columns="tested_on", values="test_accuracy")
    return table.mean(axis=1) if table.notna().all(axis=None) else pd.Series([table.mean().mean()])


def accuracy_tables(results: Results) -> list[Sheet]:
    """For each number of shots the configurations' test accuracies by data set; saved weights that were evaluated, and
    data sets of no suite, have tables of their own."""
    sheets = []
    for evaluated, kind in results.runs.groupby("evaluated"):
        for suite, columns in suites(kind).items():
            for shots, runs in kind[kind.tested_on.isin(columns)].groupby("shots"):
                sheets.append(_accuracy_table(results, runs, suite, columns, shots, evaluated))
    return sheets


def _accuracy_table(
    results: Results, runs: pd.DataFrame, suite: str, columns: list[str], shots: int, evaluated: bool
) -> Sheet:
    counts = runs.groupby(["configuration", "tested_on"]).size()
    usual = int(counts.mode().max())
    title = f"Test accuracy after {in_words(shots)} on {suite or ', '.join(columns)}"
    title += ", evaluated weights" * evaluated
    header, rows, mixed = ["method", *(SHORT.get(column, column) for column in columns)], [], False
    if suite:
        header.append(f"average of {len(columns)}")
    for label in results.labels(runs):
        own = runs[runs.configuration == label]
        row = [Cell(label), *(spread(own.test_accuracy[own.tested_on == column], usual) for column in columns)]
        if suite:
            mean = average(own, columns)
            mixed |= mean is not None and len(mean) < own.groupby("tested_on").size().max()
            row.append(Cell(MISSING) if mean is None else spread(mean))
        rows.append(row)
    notes = [_seeds(sorted(runs.seed.unique()), usual, counts.nunique() > 1)]
    if any(cell.text == MISSING for row in rows for cell in row):
        notes.append(f"{MISSING}: no run" + (", and no average without it." if suite else "."))
    if mixed:
        notes.append("An average without ± is of data sets that have different seeds.")
    absent = [name for column, name in SUITES.get(suite, {}).items() if column not in columns]
    if absent:
        notes.append(f"Of {suite} there is no run, at any number of shots, on {', '.join(absent)}.")
    return Sheet(title, header, rows, notes)


def _seeds(seeds: list[int], usual: int, uneven: bool) -> str:
    listed = ", ".join(map(str, seeds))
    if len(seeds) == 1:
        return f"Per cent, seed {listed}."
    over = f"{usual} of the seeds" if uneven or usual < len(seeds) else "the seeds"
    return f"Per cent, mean ± standard deviation over {over} {listed}" + (", or n where it says so." if uneven else ".")
