"""Reads what one command asks for, in layers: later ones win.

Defaults of the dataclasses < the YAML file beside the method's own, with values that were published for some datasets
or numbers of shots < for the digits configs/digits.yaml < --config FILE < command line. --print_config shows what comes
out and where each value is from.
"""

import dataclasses
import difflib
import hashlib
import itertools
import json
import re
from argparse import SUPPRESS, BooleanOptionalAction
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import datasets
import distributed
import launching
from clip.delta import checkpoint_metadata
from common import Parser, UserError, none_of, note
from config_files import by_data, flags_of, read_config, sections, typed
from methods import METHODS, saved_settings
from settings import ALL, GROUPS, LENGTHS, SUPPORT, Hparams, Settings, check_data, check_output, choose_device

PROMPTS = ("prompts", "template")
QUICK_START = Path(__file__).resolve().parent / "configs" / "digits.yaml"


@dataclass(frozen=True)
class Config:
    """What one command asks for: the common settings, the method's own, and the values to search."""

    settings: Settings
    hparams: Hparams
    search: dict[str, list]  # hyperparameter: values to choose from on val images
    # Settings that a config file sets by dataset or number of shots: its name, and a hash of what it says.
    by_data: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def trains(self) -> bool:
        return METHODS[self.settings.method].prepare is not None and not self.settings.eval_only

    @property
    def searched(self) -> str | None:
        """What is recorded of a search."""
        return "; ".join(f"{name} of {', '.join(map(str, values))}" for name, values in self.search.items()) or None

    def one_by_one(self) -> list["Config"]:
        """Return what each single run is asked for: one, or one for each of --eval_datasets."""
        return [dataclasses.replace(self, settings=settings) for settings in self.settings.one_by_one()]

    def for_images(self, task: datasets.Task) -> "Config":
        """Return the same with `shots` in numbers: with --shots all, the training images of the largest class."""
        if self.settings.draw != ALL or self.settings.eval_only:
            return self
        largest = max(Counter(item.label for item in task.train).values())
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, shots=largest))

    def candidates(self) -> list[Hparams]:
        """Return the hyperparameters that a search compares: all combinations of its values, the last name's varying
        fastest. Raise UserError if a value is out of range."""
        names = [other for name in self.search for other in self.hparams.alternatives(name)]
        cleared = dict.fromkeys(names)  # of n_iters and total_iters, one searched, the other does not count
        return [
            dataclasses.replace(self.hparams, **cleared | dict(zip(self.search, values)))
            for values in itertools.product(*self.search.values())
        ]

    def as_yaml(self) -> str:
        """Return a config file that repeats the run."""
        values = dataclasses.asdict(self.settings) | dataclasses.asdict(self.hparams) | {"search": self.search}
        left_out = {"force", "wait", *LENGTHS} - {self.hparams.length}
        values = {name: value for name, value in values.items() if name not in left_out}
        values |= {"template": list(self.settings.template)}
        if distributed.is_member():  # each has its own GPU
            values["device"] = self.settings.device.partition(":")[0]
        if self.settings.draw == ALL:
            values["shots"] = ALL
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=float("inf"))  # a setting a line


def parse(argv: Sequence[str] | None = None) -> Config:
    """Return what a command line asks for. Raise UserError for anything that cannot work.

    With --help or --print_config, print instead, and raise SystemExit(0).
    """
    given = _command_line(argv)
    layers = [("command line", given)]
    if "config" in given:
        path = Path(given.pop("config"))
        layers.insert(0, (f"--config {path}", read_config(path, given.get("method"))))
    method, dataset = _last(layers, "method"), _last(layers, "dataset")
    if method not in METHODS:
        raise none_of("method", METHODS, method)
    if given.pop("help", False):
        _parser(method).print_help()
        raise SystemExit(0)
    shows = given.pop("print_config", False)
    given |= _own_flags(given, method)
    if given.get("draw") == ALL:
        raise UserError("--draw all is written --shots all")
    if dataset == "digits":
        if "root_path" in given and not any("dataset" in layer for _, layer in layers):
            note("--root_path is not used by the embedded digits; for your own images add --dataset folder")
        layers.insert(0, ("configs/digits.yaml", read_config(QUICK_START, method)))
    published = Path(METHODS[method].__file__).with_suffix(".yaml")
    if published.is_file():
        layers.insert(0, (f"published, {published.name}", read_config(published, method)))
    for_method = [(source, layer | layer.get("methods", {}).get(method, {})) for source, layer in layers]
    shots = _last(for_method, "shots")
    chosen = {"methods": method, "by_shots": shots, "datasets": dataset}
    values = Layers(method)
    root_path, others = _last(layers, "root_path"), {}  # others: source -> the data that its values were chosen on
    for source, layer in layers:
        elsewhere = _is_of_other_data(layer, dataset, root_path)
        for _, where, part in sorted(sections(source, layer, chosen), key=lambda part: part[0]):
            if elsewhere and part.get("tuned_on", "none") != "none" and f", datasets: {dataset}" not in where:
                part["tuned_on"] = "none"
                others[where] = elsewhere
            values.add(where, part)
        values.add_by_data(source, layer)
    source = values.sources.get("tuned_on")
    if source in others:
        note(f"{source}: its values were chosen on other images, those of {others[source]}; tuned_on is none")
    asked = values.config()
    if shots == ALL and asked.settings.draw != ALL:
        raise UserError(f"--shots all takes every image, and --draw {asked.settings.draw} a few; leave one of them out")
    config = _evaluated(_checked(asked), given) if asked.settings.eval_only else _checked(asked)
    if shows:
        if asked.settings.eval_only:
            values.sources |= dict.fromkeys(
                (*values.own, "tuned_on", "draw", *SUPPORT), str(config.settings.weights_file)
            )
        as_asked = {name: getattr(asked.settings, name) for name in ("device", "workers")}  # for other machines too
        shown = dataclasses.replace(config, settings=dataclasses.replace(config.settings, **as_asked))
        print(values.described(shown), end="")
        raise SystemExit(0)
    return config


def _last(layers: Sequence[tuple[str, dict]], name: str) -> Any:
    """Return the value that a common setting has in the last layer that names it."""
    return [getattr(Settings, name), *(layer[name] for _, layer in layers if name in layer)][-1]


def _is_of_other_data(layer: dict[str, Any], dataset: str, root_path: str | None) -> str | None:
    """Return the data that a layer names if they are not those of the run: then its values were not chosen on these."""
    if layer.get("dataset", dataset) != dataset:
        return layer["dataset"]
    own = layer.get("root_path") if "dataset" in layer and dataset == "folder" else None
    places = {Path(path).expanduser().resolve() for path in (own, root_path) if path}
    return own if own and len(places) > 1 else None


class Layers:
    """Values of all settings for one method, merged from layers, each with where it came from."""

    def __init__(self, method: str):
        self.method, self.kind = method, METHODS[method].Hparams
        self.common = {f.name: f for f in dataclasses.fields(Settings)}
        self.own = {f.name: f for f in dataclasses.fields(self.kind)}
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.by_data: dict[str, str] = {}

    def add(self, source: str, layer: dict[str, Any]) -> None:
        """Put a layer on top of the others. A value replaces all ways of saying the same."""
        layer = self._with_draw(source, self._with_complements(source, layer))
        for name, value in layer.items():
            same = self.kind.alternatives(name)
            if value is None and len(same) > 1:
                continue  # null leaves it to the others
            twice = [other for other in same if layer.get(other) is not None]
            if len(twice) > 1:
                raise UserError(f"{source}: {twice[0]} and {twice[1]} set the same thing; give only one")
            self.values |= dict.fromkeys(same) | {name: value}
            self.sources |= dict.fromkeys(same, source)

    def add_by_data(self, source: str, layer: dict[str, Any]) -> None:
        """Note which settings the layer, now on top, sets by dataset or number of shots, and which for all of them."""
        for name in self._recorded({*layer, *layer.get("methods", {}).get(self.method, {})}):
            self.by_data.pop(name, None)
        said = {name: pairs for name, pairs in by_data(layer, self.method).items() if self._recorded({name})}
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:6]
        file = re.sub(r"[^\w.-]", "_", Path(source.removeprefix("--config ").removeprefix("published, ")).name)
        self.by_data |= dict.fromkeys(self._recorded(said), f"{file} {digest}")

    def _recorded(self, names: Iterable[str]) -> set[str]:
        """Return the settings that these names set, without those that cannot change what is measured."""
        complements = {f.metadata["complement"]: f.name for f in self.own.values()}
        same = {other for name in names for other in self.kind.alternatives(complements.get(name, name))}
        if same & {*PROMPTS}:  # the one says whether the other counts
            same |= {*PROMPTS}
        known = {name for name, f in self.common.items() if f.metadata["group"] not in ("machine", "output")}
        return same & {*self.own, *known}

    def _with_complements(self, source: str, layer: dict[str, Any]) -> dict[str, Any]:
        """Return the layer with `s: 0.9` as `density_ratio: 0.1`."""
        layer = dict(layer)
        for f in self.own.values():
            other = f.metadata["complement"]
            if other in layer:
                if f.name in layer:
                    raise UserError(f"{source}: {other} and {f.name} set the same thing; give only one")
                layer[f.name] = round(1 - layer.pop(other), 12)
        return layer

    def _with_draw(self, source: str, layer: dict[str, Any]) -> dict[str, Any]:
        """Return the layer with `shots: all` as `draw: all`, which a layer with a number of shots ends."""
        if layer.get("shots") == ALL:
            self.sources["shots"] = source
            return {"draw": ALL} | {name: value for name, value in layer.items() if name != "shots"}
        if "shots" in layer and self.values.get("draw") == ALL:
            return {"draw": Settings.draw} | layer
        return layer

    def config(self) -> Config:
        """Return the settings that these values make. Values of other methods have no effect; a note names them."""
        unused: dict[str, list[str]] = {}
        for name, source in self.sources.items():
            if name not in self.common and name not in self.own and name != "search" and source.startswith("--config"):
                unused.setdefault(source, []).append(name)
        for source, names in unused.items():
            note(f"{source}: {self.method} has no settings {', '.join(names)}; they are ignored")
        settings = Settings(**{name: value for name, value in self.values.items() if name in self.common})
        hparams = self.kind(**{name: value for name, value in self.values.items() if name in self.own})
        source = self.sources.get("search", "")
        where = "--search" if source == "command line" else f"{source}: search"
        search = _search(self.values.get("search", {}), hparams, self.method, where)
        return Config(settings, hparams, search, self.by_data)

    def described(self, config: Config) -> str:
        """Return all settings as a config file, each with a comment that says where its value comes from."""
        lines = []
        for line in config.as_yaml().splitlines(keepends=True):
            name = line.partition(":")[0]
            if name in self.common | self.own | {"search": None}:
                default = f"default of {self.method}" if name in self.own else "default"
                line = f"{line.rstrip()}  # {self.sources.get(name, default)}\n"
            lines.append(line)
        return "".join(lines)


def _checked(config: Config) -> Config:
    """Return the same with device and workers decided. Raise UserError for settings that do not go together."""
    settings = config.settings
    check_data(settings, config.trains)
    check_output(settings)
    if settings.eval_only:
        _check_saved(settings)
    launching.check(settings.processes, settings.device)
    workers = settings.workers
    if workers is None:
        workers = datasets.default_workers(distributed.local_size())
    settings = dataclasses.replace(settings, device=choose_device(settings.device), workers=workers)
    if settings.temperature_scaling and not (config.trains or settings.eval_only):
        raise UserError(f"--temperature_scaling is for trained models, and {settings.method} trains none; leave it out")
    if settings.temperature_scaling and settings.test_part == "val":
        raise UserError("--temperature_scaling fits on val images, which --test_part val tests on; leave one out")
    if config.search:
        config.candidates()  # raises for values out of range
        if settings.test_part == "val":
            raise UserError("--search chooses on val images, which --test_part val tests on; leave one of them out")
    return dataclasses.replace(config, settings=settings)


def _check_saved(settings: Settings) -> None:
    """Raise UserError if there are no saved weights to evaluate."""
    if METHODS[settings.method].prepare is None:
        raise UserError(f"--eval_only evaluates adapted weights, and {settings.method} has none; leave it out")
    if settings.save_path is None:
        raise UserError("--eval_only needs --save_path, the folder given when the weights were saved")
    if not settings.weights_file.is_file():
        saved = sorted(map(str, Path(settings.save_path).glob("*/*/*/*/*.safetensors")))[:3]
        there = f" (found: {', '.join(saved)})" if saved else ""
        raise UserError(f"--eval_only: there is no {settings.weights_file}{there}; check --save_path and the settings")


def _evaluated(config: Config, given: dict[str, Any]) -> Config:
    """Return the same with the settings that the saved weights were trained with: these are the truth. Prompts may be
    given on the command line."""
    settings, path = config.settings, config.settings.weights_file
    metadata = checkpoint_metadata(path)
    hparams, trained = saved_settings(path, metadata)
    if trained["method"] != settings.method:
        raise UserError(f"{path} was trained with --method {trained['method']}; evaluate it with that")
    known = {name: trained[name] for name in ("tuned_on", "draw", *SUPPORT)}
    if trained["draw"] == ALL:
        known["shots"] = trained["shots"]
    if not {*PROMPTS} & given.keys():
        known |= {"prompts": trained["prompts"], "template": tuple(trained["template"])}
    of_weights = {*hparams.identity, *LENGTHS, *known}
    files = {name: file for name, file in config.by_data.items() if name not in of_weights}
    saved = json.loads(metadata.get("by_data", "{}"))
    files |= {name: file for name, file in saved.items() if name in of_weights}
    return _checked(Config(dataclasses.replace(settings, **known), hparams, {}, files))


# --- the command line


def _command_line(argv: Sequence[str] | None) -> dict[str, Any]:
    """Return the flags that were given, each in its type. Raise UserError for flags that the method does not have."""
    parser = _parser()
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        close = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1, cutoff=0.7)
        parser.error(f"unknown argument {' '.join(unknown)}" + (f", meant {close[0]}?" if close else ""))
    given = vars(known)
    if "template" in given:
        given["template"] = tuple(given["template"])
    if "search" in given:
        given["search"] = _words_of_search(given["search"])
    return given


def _parser(method: str | None = None) -> Parser:
    """Return a parser for the common flags and those of one method, or without one those of all methods."""
    parser = Parser(
        prog="main.py",
        usage="main.py [flags]",
        description="Few-shot adaptation of CLIP: one run. Defaults are in brackets. For the embedded digits, taken\n"
        "if no dataset is named, configs/digits.yaml replaces some: tiny CLIP, 16 shots and others.",
        epilog="Each method has flags of its own: main.py --method NAME --help. Methods:\n" + ", ".join(METHODS),
        argument_default=SUPPRESS,
        add_help=False,
    )
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    kinds = [METHODS[method].Hparams] if method else [module.Hparams for module in METHODS.values()]
    flags = flags_of(Settings)
    for kind in kinds:
        flags = flags_of(kind) | flags
    order = {name: number for number, name in enumerate(flags)}
    for name in sorted(flags, key=lambda name: (name != "method", order[name])):
        about, group = flags[name], groups[flags[name]["group"]]
        shown = "-" if about["default"] in (None, "", ()) else about["default"]
        text = f"{about['help']} [{shown}]".replace("%", "%%")
        if about["kind"] is bool:
            group.add_argument(f"--{name}", action=BooleanOptionalAction, help=text)
        elif about["kind"] is tuple:
            group.add_argument(f"--{name}", action="append", metavar="TEXT", help=text)
        else:
            choices = about["choices"] and "{" + ",".join(about["choices"]) + "}"
            # Two methods may have a flag of one name in different types: `_own_flags` gives it that of the chosen one.
            kind = about["kind"] if name in Settings.__dataclass_fields__ else str
            group.add_argument(f"--{name}", type=kind, metavar=choices, help=text)
    text = "values of a hyperparameter, to choose from by accuracy on few-shot val images; repeated: all combinations"
    groups["training"].add_argument("--search", action="append", metavar="NAME=VALUE,VALUE,...", help=text)
    output = groups["output"]
    output.add_argument("--config", metavar="FILE", help="YAML file of settings; the command line wins over it")
    output.add_argument("--print_config", action="store_true", help="print all settings and where they come from; stop")
    output.add_argument("--help", "-h", action="store_true", help="print this; with --method NAME its flags; stop")
    return parser


def _own_flags(given: dict[str, Any], method: str) -> dict[str, Any]:
    """Return the method's own flags on the command line, in their types. Raise UserError for those of other methods."""
    own = flags_of(METHODS[method].Hparams)
    known = flags_of(Settings).keys() | own.keys() | {"search", "config"}
    for name in given.keys() - known:
        owners = [other for other, module in METHODS.items() if name in flags_of(module.Hparams)]
        raise UserError(f"--method {method} has no flag --{name}, only {', '.join(owners)} (--method NAME --help)")
    return {name: typed(given[name], own[name], f"--{name}") for name in given.keys() & own.keys()}


# --- what is searched


def _words_of_search(words: Sequence[str]) -> dict[str, list]:
    """Return what --search NAME=VALUE,VALUE,..., given once or more, compares."""
    grid: dict[str, list] = {}
    for word in words:
        name, sign, values = word.partition("=")
        if not sign:
            raise UserError(f"--search {word}: write --search NAME=VALUE,VALUE,...")
        grid.setdefault(name, []).extend(
            {"true": True, "false": False}.get(value, value) for value in values.split(",")
        )
    return grid


def _search(content: Any, hparams: Hparams, method: str, where: str) -> dict[str, list]:
    """Return the values of each hyperparameter that is searched, in its type. Raise UserError for others."""
    if not isinstance(content, dict) or not all(isinstance(values, list) and values for values in content.values()):
        raise UserError(f"{where} must be `name: [value, value, ...]`, not {content!r}")
    known = {f.name: {**f.metadata, "optional": False} for f in dataclasses.fields(hparams) if f.name != "eval_every"}
    for name in content:
        if name not in known:
            remedy = f"choose from {', '.join(known)}" if known else "leave --search out"
            raise UserError(f"{where} {name}: the method {method} has no such setting to choose; {remedy}")
        same = [other for other in hparams.alternatives(name) if other in content]
        if len(same) > 1:
            raise UserError(f"{where}: {same[0]} and {same[1]} set the same thing; give only one")
    return {
        name: [typed(value, known[name], f"{where} {name}") for value in values] for name, values in content.items()
    }
