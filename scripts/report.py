"""From a folder of results to tables, comparisons, figures and one page that shows them all.

    python scripts/report.py results/ --out report/
    python scripts/report.py results/ --out report/ --compare so lora --compare so zero_shot

Needs requirements-report.txt. Writes into the output folder, over what an earlier report left there:

    index.html         everything on one page that loads nothing else: to read on a phone, to send
    runs.csv           tidy: one row a run with all recorded columns, and the configuration that it belongs to
    tables.md, .tex    test accuracy, mean and standard deviation over seeds, a table for each number of shots
    differences.csv    paired differences with confidence intervals: reporting/comparison.py says which
    deviations.csv     measured minus published accuracy where the settings match: see reporting/published.yaml
    figures/           PNG and SVG
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
from tqdm import tqdm

from run_utils import UserError, write_atomically
from scripts.reporting import comparison, figures, page
from scripts.reporting.results import Results, read_results
from scripts.reporting.sheets import accuracy_tables


class Parser(argparse.ArgumentParser):
    """Reports mistakes in one line."""

    def error(self, message: str):
        sys.exit(fail(f"{message}; see --help"))


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the report. A mistake of the user ends in one line and exit code 2."""
    parser = Parser(prog="report.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("results", type=Path, nargs="?", default=Path("results"), help="--results_dir of the runs")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of the report [report]")
    compare = "two methods, or rows of the tables; may be given several times [so with every other]"
    parser.add_argument("--compare", nargs=2, action="append", metavar=("A", "B"), help=compare)
    options = parser.parse_args(argv)
    try:
        results = read_results(options.results)
        pairs = comparison.chosen_pairs(results, options.compare)
        write(results, pairs, options.results, options.out)
    except UserError as error:
        sys.exit(fail(str(error)))
    except OSError as error:
        sys.exit(fail(f"{error.filename or options.out}: {error.strerror}; choose another folder"))
    print(f"{options.out / 'index.html'}")


def write(results: Results, pairs: Sequence[tuple[str, str]], folder: Path, out: Path) -> None:
    """All files of the report; nothing before all of it is known to work."""
    tables = accuracy_tables(results)
    compared = [comparison.differences(results, a, b) for a, b in pairs]
    difference_sheets = [comparison.difference_sheet(results, rows, *pair) for pair, rows in zip(pairs, compared)]
    deviations, unmatched = comparison.deviations(results)
    published = [*comparison.deviation_sheets(deviations), comparison.published_sheet()]
    grids, damaged = figures.grids(results, folder)
    drawn, pictures = [], {}
    for grid in tqdm(grids, desc="figures", unit="figure", leave=False, disable=None):
        drawn.append((grid, *figures.inline(grid)))
        pictures |= {f"{grid.name}.{kind}": figures.picture(grid, kind) for kind in ("png", "svg")}
    runs_csv = results.tidy().to_csv(index=False)
    notes = [*results.notes, *damaged]
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    everything = page.page(results, runs_csv, tables, difference_sheets, published, unmatched, drawn, notes)

    (out / "figures").mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        (out / "figures" / name).write_bytes(picture)
    write_atomically(out / "runs.csv", runs_csv)
    sheets = [*tables, *difference_sheets, *published]
    write_atomically(out / "tables.md", "\n".join([*(f"{note}\n" for note in notes), *(s.markdown() for s in sheets)]))
    write_atomically(out / "tables.tex", "\n".join(sheet.latex() for sheet in tables))
    rows = pd.concat(compared) if compared else pd.DataFrame(columns=comparison.DIFFERENCES)
    write_atomically(out / "differences.csv", rows.to_csv(index=False))
    write_atomically(out / "deviations.csv", deviations.to_csv(index=False))
    write_atomically(out / "index.html", everything)


def fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
