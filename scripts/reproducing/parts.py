"""The parts of the reproduction. Each is a grid in configs/reproduce/; some test the weights of its runs afterwards."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import UserError
from config_files import read_yaml
from methods import METHODS
from records import PROJECT
from scripts.reporting.results import ELEVEN, SUITES
from scripts.sweeping.grid import read_grid

FOLDER = PROJECT / "configs" / "reproduce"
STANDARD = ("main", "many_shots", "new_classes", "ablations")  # without --parts
PARTS = (*STANDARD, "peers", "peers_new_classes", "rn50", "transfer")
NEW_CLASSES, TRANSFER = ("new_classes", "peers_new_classes"), "transfer"
ELSEWHERE = (*list(ELEVEN)[1:], *SUITES["variants of ImageNet"])  # where weights trained on ImageNet are tested
QUICK = (
    "quick: one or two seeds, one number of shots in each part, 5 epochs, the tiny CLIP; it shows that all works, and "
    "nothing else"
)


SMALLER = {"epochs": 5, "depth": 2, "first_block": 2}  # the tiny CLIP has few blocks


@dataclass(frozen=True)
class Choice:
    """What of the parts is run; an empty tuple leaves everything in. `quick` replaces what takes long."""

    parts: tuple[str, ...] = STANDARD
    datasets: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    shots: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()
    quick: bool = False


@dataclass(frozen=True)
class Part:
    """A grid as `read_grid` returns it. `elsewhere`: datasets that its weights are tested on afterwards."""

    name: str
    grid: dict
    elsewhere: tuple[str, ...] = ()

    @property
    def datasets(self) -> tuple[str, ...]:
        """All datasets that the part needs."""
        return (*self.grid["datasets"], *self.elsewhere)

    def only(self, ready: Collection[str]) -> "Part | None":
        """Return the same with the datasets that are `ready`; None if there is nothing left to train on."""
        left = [name for name in self.grid["datasets"] if name in ready]
        elsewhere = tuple(name for name in self.elsewhere if name in ready)
        return Part(self.name, self.grid | {"datasets": left}, elsewhere) if left else None

    def stages(self, weights: Path) -> list[dict]:
        """Return the grids to sweep one after the other. A later one tests what the one before it saved in `weights`,
        so it can be planned only when that is done."""
        if self.name not in (*NEW_CLASSES, TRANSFER):
            return [self.grid]
        rows = {
            name: row | ({"save_path": str(weights), "filename": f"{self.name}-{name}"} if _trains(row) else {})
            for name, row in self.grid["rows"].items()
        }
        if self.name in NEW_CLASSES:
            after = {
                name: row | {"classes": "new"} | ({"eval_only": True} if _trains(row) else {})
                for name, row in rows.items()
            }
        else:
            tested = {"eval_only": True, "eval_datasets": ",".join(self.elsewhere)}
            after = {name: row | tested for name, row in rows.items() if self.elsewhere}
        return [self.grid | {"rows": each} for each in (rows, after) if each]


def method_of(row: dict) -> str:
    """Return the method of a grid's row, which it names itself or by its config file."""
    return row.get("method") or read_yaml(Path(row["config"]), row["config"])["method"]


def _trains(row: dict) -> bool:
    return METHODS[method_of(row)].prepare is not None


def read_part(name: str) -> Part:
    """Return a part as its file has it, with config files found from any folder."""
    grid = read_grid(FOLDER / f"{name}.yaml")
    rows = {
        label: row | ({"config": str(PROJECT / row["config"])} if "config" in row else {})
        for label, row in grid["rows"].items()
    }
    return Part(name, grid | {"rows": rows}, ELSEWHERE if name == TRANSFER else ())


def chosen(choice: Choice) -> list[Part]:
    """Return the parts of this choice. Raise UserError for a name that none of them has."""
    parts = [read_part(name) for name in choice.parts]
    if choice.quick:
        parts = [_quick(part, choice.datasets or ("digits",)) for part in parts]
    _check("--datasets", choice.datasets, [name for part in parts for name in part.datasets])
    _check("--methods", choice.methods, [name for part in parts for name in _names(part.grid["rows"])])
    _check("--shots", choice.shots, [shots for part in parts for shots in part.grid["shots"]])
    narrowed = [_narrowed(part, choice) for part in parts]
    left = [part for part in narrowed if part.grid["datasets"] and part.grid["rows"] and part.grid["shots"]]
    if not left:
        raise UserError("none of these --parts has such runs; leave --datasets, --methods or --shots out")
    return left


def _check(flag: str, given: Sequence, known: Sequence) -> None:
    for name in given:
        if name not in known:
            raise UserError(
                f"{flag}: these parts have no {name}; choose from {', '.join(map(str, dict.fromkeys(known)))}"
            )


def _names(rows: dict[str, dict]) -> list[str]:
    """Return the names of rows and of their methods."""
    return [name for label, row in rows.items() for name in (label, method_of(row))]


def _narrowed(part: Part, choice: Choice) -> Part:
    grid = dict(part.grid)
    for name in ("datasets", "shots"):
        given = getattr(choice, name)
        grid[name] = [value for value in grid[name] if not given or value in given]
    grid["seeds"] = list(choice.seeds) or grid["seeds"]
    rows = grid["rows"].items()
    grid["rows"] = {
        label: row for label, row in rows if not choice.methods or {label, method_of(row)} & {*choice.methods}
    }
    elsewhere = tuple(name for name in part.elsewhere if not choice.datasets or name in choice.datasets)
    return Part(part.name, grid, elsewhere)


def _quick(part: Part, datasets: Sequence[str]) -> Part:
    """Return a part that takes little time, on these datasets; those after the first are tested on by `transfer`."""
    rows = {}
    for label, row in part.grid["rows"].items():
        own = METHODS[method_of(row)].Hparams.__dataclass_fields__
        smaller = {name: value for name, value in SMALLER.items() if name in own}
        rows[label] = row | {"backbone": "tiny", "precision": "fp32"} | smaller
    settings = {name: value for name, value in part.grid.get("settings", {}).items() if name != "backbone"}
    grid = part.grid | {"rows": rows, "settings": settings, "shots": part.grid["shots"][:1]}
    grid["seeds"] = [1, 2] if part.name == "main" else [1]
    split = 1 if part.name == TRANSFER else len(datasets)
    return Part(part.name, grid | {"datasets": list(datasets[:split])}, tuple(datasets[split:]))
