"""From a folder of results to tables, comparisons, figures and one page that shows them all.

    python scripts/report.py results/ --out report/
    python scripts/report.py results/ --out report/ --compare so lora --compare so zero_shot

Needs requirements-all.txt. Files of the same names in the output folder are replaced:

    index.html         everything on one page that loads nothing else: to read on a phone, to send. It begins with which
                       method is best, by how much, and at what cost
    runs.csv           tidy: one row a run with all recorded columns, and the configuration that it belongs to
    tables.md, .tex    accuracies, mean and standard deviation over seeds, for each number of shots; datasets on which a
                       method is below zero-shot; accuracy and cost, on one device; base to new, other datasets, domain
                       shift; calibration and accuracy per class; for runs with --test_part val: which settings are best
    differences.csv    paired differences with confidence intervals: reporting/comparison.py explains them
    deviations.csv     measured minus published accuracy where the settings match (reporting/published.yaml), and
                       whether the spread over seeds explains it (reporting/deviations.py)
    figures/           PNG and SVG: accuracy against shots and cost, curves, reliability

Calibration, classes and the images of the worst errors are from the runs' predictions.csv; the images are embedded,
small, if the data are still where the runs found them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import Parser, UserError, one_line_errors


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report. A mistake of the user ends in one line and exit code 2."""
    parser = Parser(prog="report.py", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=Path("results"), help="--results_dir of the runs")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of the report [report]")
    compare = "two methods, or rows of the tables; may be given several times [so with every other]"
    parser.add_argument("--compare", nargs=2, action="append", metavar=("A", "B"), help=compare)
    with one_line_errors():
        options = parser.parse_args(argv)
        if options.results.is_file():
            raise UserError(f"{options.results}: name the folder of results, not a file")
        try:
            from scripts.reporting.writing import write
        except ModuleNotFoundError as error:
            raise UserError(f"report.py needs the package {error.name}; pip install -r requirements-all.txt") from None
        write(options.results, options.compare, options.out)
        print(options.out / "index.html")


if __name__ == "__main__":
    main()
