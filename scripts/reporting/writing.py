"""All files of a report."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from common import note, progress, write_atomically
from scripts.reporting import comparison, figures, page
from scripts.reporting.results import read_results
from scripts.reporting.sheets import accuracy_tables, cost_tables, validation_tables


def write(folder: Path, compared: Sequence[Sequence[str]] | None, out: Path) -> None:
    """Write the report on a folder of results into `out`, after all of it is known to work.

    `compared` are pairs of methods, or labels of configurations; None compares SO with every other. Raise UserError for
    results that cannot be read, and for names that are not among them.
    """
    results = read_results(folder)
    pairs = comparison.chosen_pairs(results, compared)
    tables = [*accuracy_tables(results), *cost_tables(results), *validation_tables(results)]
    differences = [comparison.differences(results, a, b) for a, b in pairs]
    difference_sheets = [comparison.difference_sheet(results, rows, *pair) for pair, rows in zip(pairs, differences)]
    deviations, unmatched = comparison.deviations(results)
    published = [*comparison.deviation_sheets(deviations), comparison.published_sheet()]
    grids, damaged = figures.grids(results, folder)
    drawn, images = [], {}
    for grid in progress(grids, "figures", "figure"):
        drawn.append((grid, *figures.inline(grid)))
        images |= {f"{grid.name}.{kind}": figures.image(grid, kind) for kind in ("png", "svg")}
    runs_csv = results.tidy().to_csv(index=False)
    notes = [*results.notes, *damaged]
    for text in notes:
        note(text)
    everything = page.page(results, runs_csv, tables, difference_sheets, published, unmatched, drawn, notes)

    (out / "figures").mkdir(parents=True, exist_ok=True)
    for name, content in images.items():
        (out / "figures" / name).write_bytes(content)
    sheets = [*tables, *difference_sheets, *published]
    rows = pd.concat(differences) if differences else pd.DataFrame(columns=comparison.DIFFERENCES)
    files = {
        "runs.csv": runs_csv,
        "tables.md": "\n".join([*(f"{text}\n" for text in notes), *(sheet.markdown() for sheet in sheets)]),
        "tables.tex": "\n".join(sheet.latex() for sheet in tables),
        "differences.csv": rows.to_csv(index=False),
        "deviations.csv": deviations.to_csv(index=False),
        "index.html": everything,
    }
    for name, content in files.items():
        write_atomically(out / name, content)
