"""The page: one file that holds everything and loads nothing."""

import io
from collections.abc import Sequence
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup

from scripts.reporting.comparison import ASSUMPTIONS, read_published
from scripts.reporting.figures import Grid
from scripts.reporting.results import Results
from scripts.reporting.sheets import Cell, Sheet

TEMPLATE = Path(__file__).parent / "page.html"


def page(
    results: Results,
    runs_csv: str,
    accuracies: Sequence[Sheet],
    differences: Sequence[Sheet],
    published: Sequence[Sheet],
    unmatched: Sequence[str],
    figures: Sequence[tuple[Grid, str, list[str]]],
    notes: Sequence[str],
) -> str:
    """Return the HTML of the whole report.

    `runs_csv` is the tidy table; all of its values are in the page. `figures` are grids with the SVG of their legend
    and panels.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    runs, constant = _runs_sheet(runs_csv)
    return template.render(
        results=results,
        last=str(results.runs.finished_at.max())[:10],
        accuracies=accuracies,
        differences=differences,
        assumptions=ASSUMPTIONS,
        published=published,
        unmatched=unmatched,
        papers=read_published()["papers"].values(),
        figures=[(grid, Markup(legend), [*map(Markup, panels)]) for grid, legend, panels in figures],
        notes=notes,
        runs=runs,
        constant=constant,
    )


def _runs_sheet(runs_csv: str) -> tuple[Sheet, dict[str, str]]:
    """Return the table of all runs and, separately, the columns with the same value in all of several runs."""
    table = pd.read_csv(io.StringIO(runs_csv), dtype=str, keep_default_na=False)
    same = [name for name in table if table[name].nunique() == 1 and len(table) > 1]
    rest = table.drop(columns=same)
    rows = [
        [Cell(_short(name, value), value) for name, value in zip(rest, row)] for row in rest.itertuples(index=False)
    ]
    return Sheet("All runs", [*rest], rows), {name: table[name][0] or "-" for name in same}


def _short(name: str, value: str) -> str:
    """Return a value of the tidy table as it is shown; the page also holds the whole value."""
    if name.endswith("_sha256"):
        return value[:8]
    try:
        number = float(value)
    except ValueError:
        return value
    return f"{number:.2f}" if name.endswith("_accuracy") else f"{number:.6g}" if "." in value else value
