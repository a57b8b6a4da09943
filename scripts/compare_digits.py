"""Every method and every ablation of SO on the embedded digits: a table of means over seeds, with budgets.

    python scripts/compare_digits.py --out benchmarks/COMPARISON.md
    python scripts/compare_digits.py --methods so adam --ablations --shots 1 --seeds 1 2

A run that is recorded already is not run again, so an interrupted comparison goes on where it stopped. All other flags
are main.py's, for all runs. The table is printed and, with --out, written between that file's markers. A run that fails
does not stop the others: it is missing in the table, named at the end, and the exit code is 1.
"""

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main as entry  # isort: skip (before torch: it sets how torch's threads wait)

import pandas as pd
from tqdm import tqdm

from methods import METHODS
from run_utils import PROJECT

BEGIN, END = "<!-- table: scripts/compare_digits.py -->", "<!-- end of table -->"
ABLATIONS = {path.stem: path for path in sorted((PROJECT / "configs" / "ablations").glob("*.yaml"))}


def compare(rows: dict[str, list[str]], shots: Sequence[int], seeds: Sequence[int], flags: Sequence[str]):
    """Runs all combinations of rows (name: main.py's flags), shots and seeds: (records with their row, failures)."""
    runs = [(seed, number, row) for seed in seeds for number in shots for row in rows]
    records, failures = [], []
    for seed, number, row in tqdm(runs, desc="comparison", unit="run"):
        words = [*rows[row], "--dataset", "digits", "--shots", str(number), "--seed", str(seed), *flags]
        try:
            records.append(entry.main(words) | {"row": row})
        except SystemExit as stop:
            if stop.code == 130:  # Ctrl-C
                raise
            failures.append(" ".join(words))
        except Exception:
            traceback.print_exc()
            failures.append(" ".join(words))
    return records, failures


def table(records: Sequence[dict], rows: Sequence[str], shots: Sequence[int], seeds: Sequence[int]) -> str:
    """Markdown: accuracies as mean and standard deviation over seeds; budgets as means, at the most shots."""
    runs = pd.DataFrame(records, columns=[*records[0]])
    lines = [["", *(f"{n} shot{'s' * (n > 1)}" for n in shots), "trained", "changed", "optimizer", "training"]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        cells = [_accuracy(runs[(runs.row == row) & (runs.shots == n)].test_accuracy, len(seeds)) for n in shots]
        most = runs[(runs.row == row) & (runs.shots == max(shots))]
        if len(most):
            budget = most[["trainable_weights", "changed_weights", "optimizer_bytes", "train_seconds"]].mean()
            cells += [f"{budget.iloc[0]:,.0f}", f"{budget.iloc[1]:,.0f}", f"{budget.iloc[2] / 1000:,.0f} kB"]
            cells += [f"{budget.iloc[3]:.1f} s"]
        else:
            cells += ["-"] * 4
        lines.append([row, *cells])
    made = {name: ", ".join(sorted(set(runs[name].astype(str)))) for name in ("device", "torch_version", "git_commit")}
    days = sorted({finished[:10] for finished in runs.finished_at})
    return "\n".join(
        [
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
            f"Seeds {', '.join(map(str, seeds))}; {days[0]} to {days[-1]}; device {made['device']}; torch "
            f"{made['torch_version']}; commit {made['git_commit']}.",
        ]
    )


def _accuracy(values: pd.Series, asked: int) -> str:
    if len(values) == 0:
        return "failed"
    spread = f" ± {values.std():.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{spread}" + (f" ({len(values)} of {asked})" if len(values) < asked else "")


def between_markers(path: Path, text: str) -> str:
    """The file's content with `text` in the place of the table. ValueError if it has no place for one."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} lacks the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    methods = [name for name in METHODS if name != "so_ablation"]
    parser.add_argument("--methods", nargs="*", choices=methods, default=methods)
    parser.add_argument("--ablations", nargs="*", choices=ABLATIONS, default=list(ABLATIONS))
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, help="file with a place for the table")
    options, flags = parser.parse_known_args(argv)
    if options.out:
        try:
            between_markers(options.out, "")  # before the work
        except (OSError, ValueError) as error:
            parser.error(str(error))
    rows = {name: ["--method", name] for name in options.methods}
    rows |= {f"ablation: {name}": ["--config", str(ABLATIONS[name])] for name in options.ablations}
    records, failures = compare(rows, options.shots, options.seeds, flags)
    if records:
        text = table(records, list(rows), options.shots, options.seeds)
        print(text)
        if options.out:
            options.out.write_text(between_markers(options.out, text), encoding="utf-8")
    for words in failures:
        print(f"failed: python main.py {words}", file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
