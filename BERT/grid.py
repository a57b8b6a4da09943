"""Grids of runs, averaged over seeds: what script.py and script_LoRA.py share.

`*_runs.csv` is the record: a row a run, failed ones included, with all settings. `*_results.csv` is rebuilt from it
after each run: a row a cell of the grid, means over its seeds. One pair of files holds one configuration: what
the cells and seeds do not vary is the same in all rows, or the call is refused.
"""

import argparse
import csv
import hashlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from filelock import FileLock

from BERT import rte
from BERT.main import Settings, TrainingDiverged, add_common_flags, choose_device, display_name, load_model, run
from common import Parser
from run_utils import make_reproducible

OUTCOME = ("steps", "val_acc", "reached", "loss", "seconds", "error")
CONFIGURATION = "method model weights_sha256 data_sha256 protocol shots dense lr loss_stop max_steps device".split()


def parser(description: str, out: str) -> Parser:
    """The flags that both grids have."""
    parser = Parser(description=description, argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "--seed", type=int, nargs="+", default=[42], help="one or more; results are means over them [42]"
    )
    parser.add_argument("--out", default=out, help=f"table of results; the runs' lies beside it [{out}]")
    add_common_flags(parser)
    return parser


def run_all(key: dict[str, str], cells: Sequence[dict], arguments: dict) -> None:
    """Does what is not done yet of all cells and seeds, a run after the other.

    `key`: the cells' columns in the tables, and the settings that they hold. Runs that fail are recorded, named at
    the end, and tried again by the next call; the exit code is then 1.
    """
    seeds, out = arguments.pop("seed"), Path(arguments.pop("out"))
    wanted = [Settings(**arguments, **cell, seed=seed) for cell in cells for seed in seeds]
    tables = Tables(out, key, configuration(wanted[0]))
    failed = []
    for number, settings in enumerate(wanted, start=1):
        row = tables.key_of(settings)
        label = f"[{number}/{len(wanted)}] " + ", ".join(f"{name} {value}" for name, value in row.items())
        done = tables.finished(row)
        if done is not None:
            print(f"{label}: done already, {float(done['val_acc']):.1f} %")
            continue
        print(label)
        try:
            result = run(settings)
        except Exception as error:
            diverged = isinstance(error, TrainingDiverged)
            if isinstance(error, rte.UserError) and not diverged:
                raise  # it would be the same for all
            if not diverged:
                traceback.print_exc()
            failed.append(f"{label}: {type(error).__name__}: {' '.join(str(error).split())}")
            tables.record(row | dict.fromkeys(OUTCOME, "") | {"error": failed[-1].split(": ", 1)[1]})
        else:
            outcome = {name: getattr(result, name) for name in OUTCOME if name != "error"}
            tables.record(row | outcome | {"error": ""})
            print(f"{label}: {result.val_acc:.1f} % after {result.steps} steps")
    print(f"results: {tables.results}")
    if failed:
        print("\n".join(("failed, to be tried again by the next call:", *failed)), file=sys.stderr)
        sys.exit(1)


def configuration(settings: Settings) -> dict:
    """What all runs of one table share. The model, its tokenizer and the pairs of sentences count by their content."""
    make_reproducible(0)  # for weights that are new: here they are the same each time
    model, tokenizer = load_model(settings.model)
    config = model.config.to_diff_dict()
    config = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    weights = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        weights.update(name.encode() + tensor.numpy().tobytes())
    data = rte.load(settings.data_dir)
    tokens = [tokenizer([p.premise for p in part], [p.hypothesis for p in part])["input_ids"] for part in data]
    labels = [[pair.label for pair in part] for part in data]
    values = {
        "model": display_name(settings.model),
        "weights_sha256": weights.hexdigest()[:16],
        "data_sha256": hashlib.sha256(json.dumps([tokens, labels]).encode()).hexdigest()[:16],
        "device": choose_device(settings.device).partition(":")[0],
    }
    return {name: values[name] if name in values else getattr(settings, name) for name in CONFIGURATION}


class Tables:
    """The two files of one grid. Values are compared as they are written, as text."""

    def __init__(self, results: Path, key: dict[str, str], configuration: dict):
        if not results.name:
            raise rte.UserError(f"--out {str(results)!r} is no file's name")
        self.results, self.key = results, key
        self.runs = results.with_name(f"{results.stem.removesuffix('_results')}_runs.csv")
        self.columns = [*key, "seed", *OUTCOME, *CONFIGURATION]
        self.configuration = {name: str(value) for name, value in configuration.items()}
        if results.exists() and not self.runs.exists():
            raise rte.UserError(
                f"{results} is there without its {self.runs.name}; move it away or choose another --out"
            )
        results.parent.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.runs.with_name(f".{self.runs.name}.lock"))
        with self.lock:  # where nothing can be written this fails now, not after hours
            if self.runs.exists():
                self._write(self.read())

    def key_of(self, settings: Settings) -> dict[str, str]:
        """What tells a run from the others of its table."""
        return {name: str(getattr(settings, field)) for name, field in self.key.items()} | {"seed": str(settings.seed)}

    def finished(self, key: dict[str, str]) -> dict[str, str] | None:
        return next((row for row in self.read() if key.items() <= row.items() and not row["error"]), None)

    def read(self) -> list[dict[str, str]]:
        """The rows of the runs. Damaged ones are named and left out; UserError if others are of another kind."""
        if not self.runs.exists():
            return []
        with open(self.runs, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != self.columns:
                raise rte.UserError(f"{self.runs} is no table of this grid's runs; choose another --out")
            rows = []
            for row in reader:
                if not self._is_whole(row):
                    print(f"note: {self.runs}, line {reader.line_num} is damaged and left out", file=sys.stderr)
                    continue
                for name, value in self.configuration.items():
                    if row[name] != value:
                        raise rte.UserError(
                            f"{self.runs} has runs with {name} {row[name]}, and this is {value}; choose another --out"
                        )
                rows.append(row)
        return rows

    def _is_whole(self, row: dict) -> bool:
        if None in row or None in row.values():
            return False
        try:
            [float(row[name]) for name in (*self.key, "seed", *(() if row["error"] else ("steps", "val_acc", "loss")))]
        except ValueError:
            return False
        return True

    def record(self, row: dict) -> None:
        """Adds a run, in place of an earlier one of the same key, and rebuilds the results. A failure is in place of
        failures alone: another process may have finished the run."""
        row = {name: str(value) for name, value in (row | self.configuration).items()}
        with self.lock:
            rows = self.read()
            same = [other for other in rows if all(other[name] == row[name] for name in (*self.key, "seed"))]
            if not row["error"] or all(other["error"] for other in same):
                self._write([*(other for other in rows if other not in same), row])

    def _write(self, rows: list[dict[str, str]]) -> None:
        rows = sorted(rows, key=lambda row: [float(row[name]) for name in (*self.key, "seed")])
        write_atomically(self.runs, self.columns, rows)
        columns = [*self.key, "steps", "val_acc", "val_acc_sd", "seeds", "reached", "failed"]
        write_atomically(self.results, columns, self.averaged(rows))

    def averaged(self, rows: list[dict[str, str]]) -> list[dict]:
        """A row a cell: means over the finished seeds; `reached` counts those that came down to loss_stop."""
        cells: dict[tuple, list] = {}
        for row in rows:
            cells.setdefault(tuple(row[name] for name in self.key), []).append(row)
        table = []
        for cell, members in cells.items():
            done = [row for row in members if not row["error"]]
            accuracies = [float(row["val_acc"]) for row in done]
            table.append(
                dict(zip(self.key, cell))
                | {
                    "steps": f"{mean(float(row['steps']) for row in done):g}" if done else "",
                    "val_acc": f"{mean(accuracies):.2f}" if done else "",
                    "val_acc_sd": f"{stdev(accuracies):.2f}" if len(done) > 1 else "",
                    "seeds": " ".join(row["seed"] for row in done),
                    "reached": sum(row["reached"] == "True" for row in done),
                    "failed": " ".join(row["seed"] for row in members if row["error"]),
                }
            )
        return table


def write_atomically(path: Path, columns: Sequence[str], rows: Sequence[dict]) -> None:
    """Writes beside `path`, then renames: a reader sees the old table or the new one, never half of it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
