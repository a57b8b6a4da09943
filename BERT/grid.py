"""Grids of runs with means over seeds: script.py and script_LoRA.py call `main`.

Each run has a folder beside the table of results, `so_grid_runs/<run_id>/`, with its record (see records.py). Failed
runs are recorded too. The table is rebuilt from the records after each run.
"""

import hashlib
import itertools
import json
import sys
import traceback
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev

from BERT import rte
from BERT.main import Result, Settings, TrainingDiverged, display_name, load_model, parser, run
from common import UserError, acquire_lock, counted, note, one_line_errors, write_atomically
from records import RecordFolder, read_record
from run_utils import make_reproducible
from settings import choose_device, slug

GRIDS = {  # the published values of the flags that take lists, by method
    "SO": {"kappa": [1e-5, 1e-4, 1e-3], "T_sparse": [5, 10, 20]},
    "LoRA": {"rank": [2, 4, 8, 16]},
}


def main(method: str, description: str, argv: Sequence[str] | None = None) -> None:
    """Do the grid of a command line. The exit code is 1 if runs failed; the next call tries them again."""
    with one_line_errors():
        lists = GRIDS[method] | {"seed": [42]}
        default = f"{method.lower()}_grid_results.csv"
        flags = parser(description, lists)
        flags.add_argument("--out", default=default, help=f"table; the records of all runs are beside it [{default}]")
        given = vars(flags.parse_args(argv))
        out = Path(given.pop("out"))
        axes = [given.pop(name) for name in lists]
        wanted = [Settings(**given, **dict(zip(lists, values))) for values in itertools.product(*axes)]
        failed = run_all(wanted, Table(out, GRIDS[method], wanted[0]))
        print(f"results: {out}")
        if failed:
            print("\n".join(("failed; the same command tries them again:", *failed)), file=sys.stderr)
            sys.exit(1)


def run_all(wanted: Sequence[Settings], table: "Table") -> list[str]:
    """Do the runs that are not done yet, one after another. Return a line for each that failed."""
    failed = []
    for number, settings in enumerate(wanted, start=1):
        cell = ", ".join(f"{column} {value}" for column, value in table.cell(settings).items())
        label = f"[{number}/{len(wanted)}] {cell}, seed {settings.seed}"
        folder = table.folder(settings)
        with folder.locked(wait=True):
            record = folder.read()
            if record is not None and not record["error"]:
                print(f"{label}: done already, {record['val_acc']:.1f} %")
                continue
            print(label)
            outcome = attempt(settings)
            folder.write(table.identity(settings) | outcome, {})
        table.rebuild()
        if outcome["error"]:
            failed.append(f"{label}: {outcome['error']}")
        else:
            print(f"{label}: {outcome['val_acc']:.1f} % after {outcome['steps']} steps")
    return failed


def attempt(settings: Settings) -> dict:
    """Do one run. Return what is recorded of its outcome, which may be an error."""
    try:
        return asdict(run(settings)) | {"error": None}
    except Exception as error:
        if isinstance(error, UserError) and not isinstance(error, TrainingDiverged):
            raise  # all runs would end with it
        if not isinstance(error, UserError):
            traceback.print_exc()
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return dict.fromkeys(Result.__dataclass_fields__) | {"error": text}


def fingerprint(settings: Settings) -> dict:
    """Return hashes of the model (config and all weights) and of the data (token ids and labels)."""
    make_reproducible(0)  # weights that start at random are the same each time
    model, tokenizer = load_model(settings.model)
    config = model.config.to_diff_dict()
    config = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    weights = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        weights.update(name.encode() + tensor.numpy().tobytes())
    data = rte.load(settings.data_dir)
    tokens = [tokenizer([p.premise for p in part], [p.hypothesis for p in part])["input_ids"] for part in data]
    labels = [[pair.label for pair in part] for part in data]
    return {
        "weights_sha256": weights.hexdigest()[:16],
        "data_sha256": hashlib.sha256(json.dumps([tokens, labels]).encode()).hexdigest()[:16],
    }


class Table:
    """The table of one grid's results: a row a cell, which is a combination of the flags `names`, from its records.

    Records that differ in more than the cell and the seed, for example in the weights of the model, stay out of it.
    """

    def __init__(self, path: Path, names: Collection[str], settings: Settings):
        if not path.name:
            raise UserError(f"--out {str(path)!r} is not the name of a file")
        self.path, self.names = path, names
        self.runs = path.with_name(f"{path.stem.removesuffix('_results')}_runs")
        if path.exists() and not self.runs.is_dir():
            raise UserError(f"{path} exists without its {self.runs.name}/; move it away or choose another --out")
        self.shared = {
            "method": settings.method,
            "model": display_name(settings.model),
            **fingerprint(settings),
            "device": choose_device(settings.device).partition(":")[0],
        }
        identity = self.identity(settings)
        self.selected = {name: value for name, value in identity.items() if name not in names and name != "seed"}
        self.runs.mkdir(parents=True, exist_ok=True)
        others = self.rebuild()  # if nothing can be written, this fails now and not after hours
        if others:
            note(f"{path} leaves out {counted(others, 'run')} in {self.runs} with other settings, weights or data")

    def identity(self, settings: Settings) -> dict:
        """Return everything that can change the outcome of a run. Model and data count by their content."""
        values = asdict(settings) | self.shared
        return {name: value for name, value in values.items() if name != "data_dir"}

    def cell(self, settings: Settings) -> dict[str, object]:
        """Return the values of the row that a run belongs to, by column: T_sparse is T there."""
        return {name.removesuffix("_sparse"): getattr(settings, name) for name in self.names}

    def folder(self, settings: Settings) -> RecordFolder:
        """Return the folder of a run: a readable name and a hash of its identity."""
        digest = hashlib.sha256(json.dumps(self.identity(settings), sort_keys=True).encode()).hexdigest()[:8]
        cell = "_".join(f"{column}{value}" for column, value in self.cell(settings).items())
        name = f"{settings.method.lower()}_{slug(self.shared['model'])}_{cell}_seed{settings.seed}_{digest}"
        return RecordFolder(self.runs, name)

    def rebuild(self) -> int:
        """Write the table from all records of this grid. Return how many records belong to other ones."""
        import pandas as pd

        with acquire_lock(self.runs / ".table.lock", seconds=-1):  # no row of another process is lost
            records = [read_record(path) for path in self.runs.glob("*/result.json")]
            records = [record for record in records if record is not None]
            own = [record for record in records if self.selected.items() <= record.items()]
            cells: dict[tuple, list[dict]] = {}
            for record in sorted(own, key=lambda record: record["seed"]):
                cells.setdefault(tuple(record[name] for name in self.names), []).append(record)
            rows = [[*cell, *summary(cells[cell])] for cell in sorted(cells)]
            columns = [*(name.removesuffix("_sparse") for name in self.names), *SUMMARY]
            frame = pd.DataFrame(rows, columns=columns, dtype=object)
            write_atomically(self.path, frame.to_csv(index=False))
        return len(records) - len(own)


SUMMARY = ("steps", "val_acc", "val_acc_sd", "seeds", "reached", "failed")


def summary(records: Sequence[dict]) -> tuple:
    """Return the columns SUMMARY of one cell: means over the seeds that finished, and which seeds these are."""
    done = [record for record in records if not record["error"]]
    accuracies = [record["val_acc"] for record in done]
    return (
        f"{mean(record['steps'] for record in done):g}" if done else "",
        f"{mean(accuracies):.2f}" if done else "",
        f"{stdev(accuracies):.2f}" if len(done) > 1 else "",
        " ".join(str(record["seed"]) for record in done),
        sum(record["reached"] for record in done),  # came down to loss_stop
        " ".join(str(record["seed"]) for record in records if record["error"]),
    )
