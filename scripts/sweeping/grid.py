"""From lists of methods, data sets, shots and seeds to the runs of a sweep."""

import difflib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import main as entry
from configs.arguments import read_yaml
from configs.settings import one_by_one
from run_utils import Run, Settings, UserError, parse

LISTS = ("methods", "datasets", "shots", "seeds")
KEYS = (*LISTS, "rows", "settings")


@dataclass(frozen=True)
class Cell:
    """One run of the grid: what `python main.py` is given, and the settings that these words mean."""

    words: tuple[str, ...]
    settings: Settings

    @property
    def command(self) -> str:
        return shlex.join(["python", "main.py", *self.words])

    @cached_property
    def key(self) -> str:
        """What two spellings of the same run have in common, without a look at the data."""
        return f"{self.settings.settled(1).run_id} {self.settings.epochs}"

    def finished(self) -> bool:
        """Whether main.py would find all of it recorded. False, too, where its data cannot be read from here."""
        if self.settings.force:
            return False
        try:
            known = [Run(single).folder for single in one_by_one(self.settings) if single.epochs is None]
            if not all((folder / "result.json").is_file() for folder in known):
                return False  # and no need to read the data, which takes longer
            runs = entry.single_runs(self.settings)
            return all(run.finished(task.split_sha256, task.data_sha256) for run, task in runs)
        except (*entry.MISTAKES, OSError):
            return False


def read_grid(path: Path) -> dict:
    """The grid in a YAML file: under `methods`, `datasets`, `shots`, `seeds` lists; under `rows` settings by the name
    of a row, instead of methods or beside them; under `settings` those of all runs. UserError names file and key."""
    where = f"--grid {path}"
    grid = read_yaml(path, where)
    if not isinstance(grid, dict):
        raise UserError(f"{where} must have some of the keys {', '.join(KEYS)}")
    for name, value in grid.items():
        if name not in KEYS:
            close = difflib.get_close_matches(str(name), KEYS, n=1)
            raise UserError(f"{where}: unknown key {name!r}" + (f"; meant {close[0]}?" if close else ""))
        if name in LISTS and not (isinstance(value, list) and value):
            raise UserError(f"{where}: {name} must be a list, not {value!r}")
    settings = grid.get("settings", {})
    rows = grid.get("rows", {})
    if not isinstance(rows, dict):
        raise UserError(f"{where}: rows must be `name: {{setting: value}}`, not {rows!r}")
    for name, own in (("settings", settings), *((f"rows: {name}", own) for name, own in rows.items())):
        if not isinstance(own, dict):
            raise UserError(f"{where}: {name} must be `setting: value`, not {own!r}")
    return grid


def cells(grid: dict, flags: Sequence[str], device: str | None = None) -> list[Cell]:
    """All runs of the grid, the first seed's first, so that there is a whole table early. `flags` are main.py's, for
    all of them. With a `device` that this machine need not have, they run there.

    UserError if a run is a mistake, the same as another, or saves its weights where another does.
    """
    rows = {str(name): _flags(own) for name, own in grid.get("rows", {}).items()}
    methods = grid.get("methods", [] if rows else ["so"])
    rows |= {f"method {name}": ["--method", str(name)] for name in methods}
    flags = [*_flags(grid.get("settings", {})), *flags]
    if device and any(word.partition("=")[0] == "--device" for word in flags):
        raise UserError("--cluster slurm takes --gpus_per_task to say on what runs are done; leave --device out")
    made: dict[str, Cell] = {}
    axes = [
        (s, d, n)
        for s in grid.get("seeds", [1, 2, 3])
        for d in grid.get("datasets", ["digits"])
        for n in grid.get("shots", [1, 2, 4, 8, 16])
    ]
    for seed, dataset, shots in axes:
        for row in rows.values():
            words = [*row, "--dataset", str(dataset), "--shots", str(shots), "--seed", str(seed), *flags, "--wait"]
            cell = _cell(words, device)
            if cell.key in made:
                raise UserError(f"the grid has a run twice: {made[cell.key].command}; and {cell.command}")
            made[cell.key] = cell
    if len({cell.settings.results_dir for cell in made.values()}) > 1:
        raise UserError("a sweep has one --results_dir; the rows of this one name several")
    files: dict[Path, Cell] = {}
    for cell in made.values():
        path = cell.settings.checkpoint
        if path is not None and not cell.settings.eval_only and files.setdefault(path, cell) is not cell:
            raise UserError(f"two runs save their weights as {path}; give each row a filename of its own")
    return list(made.values())


def _cell(words: list[str], device: str | None) -> Cell:
    given = [*words, "--device", device] if device else words
    try:
        settings = parse([*words, "--device", "cpu"] if device else words)
    except UserError as error:
        raise UserError(f"{shlex.join(['python', 'main.py', *given])}: {error}") from None
    return Cell(tuple(given), replace(settings, device=device) if device else settings)


def _flags(settings: dict) -> list[str]:
    """Settings of a YAML file as main.py's arguments."""
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, dict):  # of search
            words += [f"--{name}={key}={','.join(map(str, values))}" for key, values in value.items()]
        else:
            words += [f"--{name}={item}" for item in (value if isinstance(value, list) else [value])]
    return words
