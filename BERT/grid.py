"""Grids of runs with means over seeds: what script.py and script_LoRA.py share.

Each run has a folder beside the table of results, `so_grid_runs/<run_id>/`, with its record (see records.py). Failed
runs are recorded too. The table is rebuilt from the records after each run.
"""

import argparse
import hashlib
import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev

from BERT import rte
from BERT.main import Result, Settings, TrainingDiverged, add_common_flags, display_name, load_model, run
from common import Parser, UserError, acquire_lock, note, write_atomically
from records import RecordFolder, read_record
from run_utils import make_reproducible
from settings import choose_device, slug


def parser(description: str, out: str) -> Parser:
    """Return a parser with the flags of both grids. `out` is the default of --out."""
    parser = Parser(description=description, argument_default=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, nargs="+", default=[42], help="seeds; results are means over them [42]")
    parser.add_argument("--out", default=out, help=f"table of results; the records of all runs are beside it [{out}]")
    add_common_flags(parser)
    return parser


def run_all(key: dict[str, str], cells: Sequence[dict], arguments: dict) -> None:
    """Do all runs of `cells` and seeds that are not done yet, one after another.

    `key` maps columns of the table to the settings that they show. Runs that fail are recorded and listed at the end,
    and the exit code is then 1. The next call tries them again.
    """
    seeds, out = arguments.pop("seed"), Path(arguments.pop("out"))
    wanted = [Settings(**arguments, **cell, seed=seed) for cell in cells for seed in seeds]
    table = Table(out, key, wanted[0])
    failed = []
    for number, settings in enumerate(wanted, start=1):
        cell = {column: getattr(settings, field) for column, field in (key | {"seed": "seed"}).items()}
        label = f"[{number}/{len(wanted)}] " + ", ".join(f"{column} {value}" for column, value in cell.items())
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
    print(f"results: {table.path}")
    if failed:
        print("\n".join(("failed; the same command tries them again:", *failed)), file=sys.stderr)
        sys.exit(1)


def attempt(settings: Settings) -> dict:
    """Do one run. Return what is recorded of its outcome, which may be an error."""
    try:
        return asdict(run(settings)) | {"error": None}
    except TrainingDiverged as error:
        return failure(error)
    except UserError:
        raise  # all runs would end with it
    except Exception as error:
        traceback.print_exc()
        return failure(error)


def failure(error: Exception) -> dict:
    """Return what is recorded of a run that failed."""
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
    """The table of one grid's results: a row a cell, built from the records of its runs.

    Records that differ in more than the cell and the seed, for example in the weights of the model, stay out of it.
    """

    def __init__(self, path: Path, key: dict[str, str], settings: Settings):
        if not path.name:
            raise UserError(f"--out {str(path)!r} is not the name of a file")
        self.path, self.key = path, key
        self.runs = path.with_name(f"{path.stem.removesuffix('_results')}_runs")
        if path.exists() and not self.runs.is_dir():
            raise UserError(f"{path} exists without its {self.runs.name}/; move it away or choose another --out")
        self.shared = {
            "method": settings.method,
            "model": display_name(settings.model),
            **fingerprint(settings),
            "device": choose_device(settings.device).partition(":")[0],
        }
        varied = {*key.values(), "seed"}
        self.selected = {name: value for name, value in self.identity(settings).items() if name not in varied}
        self.runs.mkdir(parents=True, exist_ok=True)
        others = self.rebuild()  # if nothing can be written, this fails now and not after hours
        if others:
            note(f"{others} runs in {self.runs} have other settings, weights or data; they stay out of {path}")

    def identity(self, settings: Settings) -> dict:
        """Return everything that can change the outcome of a run. Model and data count by their content."""
        values = asdict(settings) | self.shared
        return {name: value for name, value in values.items() if name != "data_dir"}

    def folder(self, settings: Settings) -> RecordFolder:
        """Return the folder of a run: a readable name and a hash of its identity."""
        digest = hashlib.sha256(json.dumps(self.identity(settings), sort_keys=True).encode()).hexdigest()[:8]
        cell = "_".join(f"{column}{getattr(settings, field)}" for column, field in self.key.items())
        name = f"{settings.method.lower()}_{slug(self.shared['model'])}_{cell}_seed{settings.seed}_{digest}"
        return RecordFolder(self.runs, name)

    def rebuild(self) -> int:
        """Write the table from all records of this grid. Return how many records belong to other ones."""
        import pandas as pd

        lock = acquire_lock(self.runs / ".table.lock", seconds=-1)  # no row of another process is lost
        try:
            records = [read_record(path) for path in self.runs.glob("*/result.json")]
            records = [record for record in records if record is not None]
            own = [record for record in records if self.selected.items() <= record.items()]
            columns = [*self.key, "steps", "val_acc", "val_acc_sd", "seeds", "reached", "failed"]
            frame = pd.DataFrame(self.rows(own), columns=columns, dtype=object)
            write_atomically(self.path, frame.to_csv(index=False))
        finally:
            lock.release()
        return len(records) - len(own)

    def rows(self, records: Sequence[dict]) -> list[dict]:
        """Return a row a cell: means over the finished seeds; `reached` counts those that came down to loss_stop."""
        cells: dict[tuple, list[dict]] = {}
        for record in sorted(records, key=lambda record: record["seed"]):
            cells.setdefault(tuple(record[field] for field in self.key.values()), []).append(record)
        rows = []
        for cell in sorted(cells):
            done = [record for record in cells[cell] if not record["error"]]
            accuracies = [record["val_acc"] for record in done]
            rows.append(
                dict(zip(self.key, cell))
                | {
                    "steps": f"{mean(record['steps'] for record in done):g}" if done else "",
                    "val_acc": f"{mean(accuracies):.2f}" if done else "",
                    "val_acc_sd": f"{stdev(accuracies):.2f}" if len(done) > 1 else "",
                    "seeds": " ".join(str(record["seed"]) for record in done),
                    "reached": sum(record["reached"] for record in done),
                    "failed": " ".join(str(record["seed"]) for record in cells[cell] if record["error"]),
                }
            )
        return rows
