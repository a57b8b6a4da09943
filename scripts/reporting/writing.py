"""All files of a report; the page is one file that holds everything and loads nothing."""

import io
from collections.abc import Sequence
from pathlib import Path

import jinja2
import pandas as pd

from common import counted, note, progress, write_atomically
from scripts.reporting import comparison, deviations, figures
from scripts.reporting.errors import read_errors
from scripts.reporting.results import PUBLISHED, SHORT, read_results
from scripts.reporting.sheets import EVALUATED, Cell, Sheet, accuracy_tables, cost_tables, validation_tables
from scripts.reporting.summary import below_zero_shot_sheet, ranking
from scripts.reporting.transfer import base_to_new_tables, transfer_tables

TEMPLATE = Path(__file__).parent / "page.html"


def write(folder: Path, compared: Sequence[Sequence[str]] | None, out: Path, remarks: Sequence[str] = ()) -> None:
    """Write the report on a folder of results into `out`, after all of it is known to work.

    `compared` are pairs of methods, or labels of configurations; None compares SO with every other. `remarks` are
    lines for the top of the page. Raise UserError for results that cannot be read, and for names that are not among
    them.
    """
    results = read_results(folder)
    pairs = comparison.chosen_pairs(results, compared)
    ranked, below = ranking(results), below_zero_shot_sheet(results)
    accuracies = accuracy_tables(results)
    evaluated = [sheet for sheet in accuracies if sheet.title.endswith(EVALUATED)]
    whole = [sheet for sheet in accuracies if sheet not in evaluated]
    transfers = [*base_to_new_tables(results), *transfer_tables(results)]
    tables = [*whole, *([below] if below else []), *cost_tables(results), *validation_tables(results)]
    errors, unread = read_errors(results, folder)
    per_class = [sheet for one in errors for sheet in (one.calibration, one.classes)]
    differences = [comparison.differences(results, a, b) for a, b in pairs]
    difference_sheets = comparison.difference_sheets(results, pairs, differences)
    compared_rows, unmatched = deviations.deviations(results)
    published = [*deviations.deviation_sheets(compared_rows), *deviations.published_sheets()]
    if not set(results.runs.test_dataset) & set(SHORT):
        published = []  # of these datasets no paper here reports anything
    grids, damaged = figures.grids(results, folder)
    drawn, images = _drawn([*grids, *figures.reliability(results, errors)])
    runs_csv = results.tidy().to_csv(index=False)
    runs, constant = _runs_sheet(runs_csv)
    notes = [*remarks, *results.notes, *damaged, *unread]
    for text in notes:
        note(text)
    page = _page(
        results=results,
        counted=counted,
        datasets=results.runs.tested_on.str.replace(" (base|new) classes$", "", regex=True).nunique(),
        last=str(results.runs.finished_at.max())[:10],
        ranking=ranked,
        accuracies=tables,
        evaluated=evaluated,
        transfers=transfers,
        errors=errors,
        differences=difference_sheets,
        assumptions=comparison.ASSUMPTIONS,
        published=published,
        unmatched=unmatched,
        papers=PUBLISHED["papers"].values(),
        figures=drawn,
        notes=notes,
        runs=runs,
        constant=constant,
    )

    (out / "figures").mkdir(parents=True, exist_ok=True)
    for name, content in images.items():
        (out / "figures" / name).write_bytes(content)
    rows = pd.concat(differences) if differences else pd.DataFrame(columns=comparison.DIFFERENCES)
    own = [ranked.sheet] if ranked else []
    markdown = [*own, *tables, *transfers, *evaluated, *per_class, *difference_sheets, *published]
    files = {
        "runs.csv": runs_csv,
        "tables.md": "\n".join([*(f"{text}\n" for text in notes), *(sheet.markdown() for sheet in markdown)]),
        "tables.tex": "\n".join(sheet.latex() for sheet in (*tables, *transfers, *evaluated)),
        "differences.csv": rows.to_csv(index=False),
        "deviations.csv": compared_rows.to_csv(index=False),
        "index.html": page,
    }
    for name, content in files.items():
        write_atomically(out / name, content)


def _drawn(grids: Sequence[figures.Grid]) -> tuple[list[tuple], dict[str, bytes]]:
    """Return each figure with its legend and panels for the page, and the image files by name."""
    drawn, images = [], {}
    for grid in progress(grids, "figures", "figure"):
        drawn.append((grid, *figures.inline(grid)))
        images |= {f"{grid.name}.{kind}": figures.image(grid, kind) for kind in ("png", "svg")}
    return drawn, images


def _page(**content: object) -> str:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(content)


def _runs_sheet(runs_csv: str) -> tuple[Sheet, dict[str, str]]:
    """Return the table of all runs and, separately, the columns with the same value in all of several runs."""
    table = pd.read_csv(io.StringIO(runs_csv), dtype=str, keep_default_na=False)
    same = [name for name in table if table[name].nunique() == 1 and len(table) > 1]
    rest = table.drop(columns=same)
    rows = [[Cell(_short(name, value), value) for name, value in zip(rest, row)] for row in rest.to_numpy()]
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
