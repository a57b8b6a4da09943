"""From lists of methods, datasets, shots and seeds to the runs of a sweep."""

import dataclasses
import itertools
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import main as entry
from arguments import Config, parse
from common import UserError
from config_files import read_yaml
from run_utils import run_identity
from settings import ALL, Settings

LISTS = ("methods", "datasets", "shots", "seeds")
KEYS = (*LISTS, "rows", "settings")
REPEATED = {f.name for f in dataclasses.fields(Settings) if f.metadata["kind"] is tuple}  # a list is one value of these


@dataclass(frozen=True)
class Cell:
    """One run of the grid: the arguments of `python main.py`, and what they ask for."""

    words: tuple[str, ...]
    config: Config

    @property
    def settings(self) -> Settings:
        return self.config.settings

    @property
    def command(self) -> str:
        return shlex.join(["python", "main.py", *self.words])

    @property
    def epochs(self) -> int | None:
        return getattr(self.config.hparams, "epochs", None)

    @cached_property
    def key(self) -> str:
        """A text that two spellings of the same run share. The data are not read, so epochs stay epochs."""
        return f"{run_identity(self.config, images=1)} {self.epochs}"

    def finished(self) -> bool:
        """Return whether main.py would find all of it recorded. Return False, too, if its data cannot be read here."""
        if self.settings.force:
            return False
        try:
            if self.epochs is None and self.settings.draw != ALL:  # known without the data, which take longer to read
                known = [run_identity(single, images=1) for single in self.config.one_by_one()]
                if not all(Path(self.settings.results_dir, name, "result.json").is_file() for name in known):
                    return False
            return all(run.finished() is not None for run in entry.planned(self.config))
        except (UserError, OSError):
            return False


def read_grid(path: Path) -> dict:
    """Return the grid in a YAML file. Raise UserError that names file and key.

    `methods`, `datasets`, `shots` and `seeds` hold lists. `rows` holds settings by the name of a row, instead of
    methods or in addition to them. `settings` holds those of all runs.
    """
    where = f"--grid {path}"
    grid = read_yaml(path, where)
    if not isinstance(grid, dict) or not grid.keys() <= set(KEYS):
        unknown = [name for name in grid if name not in KEYS] if isinstance(grid, dict) else grid
        raise UserError(f"{where} must have only the keys {', '.join(KEYS)}, not {unknown!r}")
    for name in LISTS:
        if name in grid and not (isinstance(grid[name], list) and grid[name]):
            raise UserError(f"{where}: {name} must be a list, not {grid[name]!r}")
    rows = grid.get("rows", {})
    if not isinstance(rows, dict):
        raise UserError(f"{where}: rows must be `name: {{setting: value}}`, not {rows!r}")
    parts = {"settings": grid.get("settings", {})} | {f"rows: {name}": row for name, row in rows.items()}
    for name, part in parts.items():
        if not isinstance(part, dict) or [] in part.values():
            raise UserError(f"{where}: {name} must be `setting: value` or `setting: [value, ...]`, not {part!r}")
    return grid


def cells(grid: dict, flags: Sequence[str], device: str | None = None) -> list[Cell]:
    """Return all runs of the grid, those of the first seed first, so that there is a whole table early.

    `flags` are main.py's, for all runs. With a `device`, the runs are done there; this machine need not have it. Raise
    UserError if a run is a mistake, the same as another, or saves its weights in the same file as another.
    """
    rows = [words for row in grid.get("rows", {}).values() for words in _combinations(row)]
    rows += [["--method", str(name)] for name in grid.get("methods", [] if rows else ["so"])]
    shared = [[*words, *flags, "--wait"] for words in _combinations(grid.get("settings", {}))]
    if device and any(word.partition("=")[0] == "--device" for words in shared for word in words):
        raise UserError("--cluster slurm: --gpus_per_run says where the runs are done; leave --device out")
    axes = itertools.product(
        grid.get("seeds", [1, 2, 3]), grid.get("datasets", ["digits"]), grid.get("shots", [1, 2, 4, 8, 16])
    )
    made: dict[str, Cell] = {}
    for seed, dataset, shots in axes:
        place = ["--dataset", str(dataset), "--shots", str(shots), "--seed", str(seed)]
        for row, common in itertools.product(rows, shared):
            cell = _cell([*row, *place, *common], device)
            if cell.key in made:
                raise UserError(f"the grid has a run twice: {made[cell.key].command}; and {cell.command}")
            made[cell.key] = cell
    _check_output(made.values())
    return list(made.values())


def _combinations(settings: dict) -> list[list[str]]:
    """Return settings of a YAML file as main.py's arguments: one list of arguments for each combination of values."""
    choices = []
    for name, value in settings.items():
        values = value if isinstance(value, list) and name not in REPEATED else [value]
        choices.append([_flags(name, single) for single in values])
    return [list(itertools.chain(*choice)) for choice in itertools.product(*choices)]


def _flags(name: str, value: object) -> list[str]:
    """Return one setting of a YAML file as main.py's arguments."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, dict):  # of search
        lists = {key: values if isinstance(values, list) else [values] for key, values in value.items()}
        return [f"--{name}={key}={','.join(map(str, values))}" for key, values in lists.items()]
    return [f"--{name}={item}" for item in (value if isinstance(value, list) else [value])]


def _cell(words: list[str], device: str | None) -> Cell:
    given = [*words, "--device", device] if device else words
    try:
        config = parse([*words, "--device", "cpu"] if device else words)
    except UserError as error:
        raise UserError(f"{shlex.join(['python', 'main.py', *given])}: {error}") from None
    if device:
        config = dataclasses.replace(config, settings=dataclasses.replace(config.settings, device=device))
    return Cell(tuple(given), config)


def _check_output(made: Collection[Cell]) -> None:
    """Raise UserError if two runs save their weights in the same file, or if there are several results folders."""
    if len({cell.settings.results_dir for cell in made}) > 1:
        raise UserError("a sweep has one --results_dir; the rows of this one name several")
    files: dict[Path, Cell] = {}
    for cell in made:
        path = cell.settings.weights_file
        if path is not None and cell.config.trains and files.setdefault(path, cell) is not cell:
            raise UserError(f"two runs save their weights as {path}; give each row a filename of its own")
