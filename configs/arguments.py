"""Reading settings: command-line arguments, config files and methods' published values, in layers."""

import argparse
import difflib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from clip.delta import checkpoint_metadata
from methods import METHODS

from .settings import ALTERNATIVES, SIMPLE, Settings, UserError, check

QUICK_START = Path(__file__).resolve().parent / "digits.yaml"


class Parser(argparse.ArgumentParser):
    """Reports mistakes as UserError, so that all of them reach the user in one way."""

    def error(self, message: str):
        raise UserError(f"{message}; see python main.py --help")


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Settings from the command line and, below it, a config file. UserError for anything that cannot work.

    Below both lie the method's published values and, for the data set digits, the quick start's configs/digits.yaml.
    """
    parser = _parser()
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        close = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1, cutoff=0.7)
        parser.error(f"unknown argument {' '.join(unknown)}" + (f", meant {close[0]}?" if close else ""))
    given = vars(known)
    if "search" in given:
        given["search"] = _grid_of_words(given["search"])
    layers = [read_config(Path(given.pop("config"))), given] if "config" in given else [given]
    merged = {name: value for layer in layers for name, value in layer.items() if name in ("dataset", "method")}
    method = merged.get("method", "so")
    if merged.get("dataset", "digits") == "digits":
        layers.insert(0, read_config(QUICK_START))
    layers = [METHODS[method].DEFAULTS, *(part for layer in layers for part in _general_and_own(layer, method))]
    merged = {}
    for layer in layers:
        for names in ALTERNATIVES:
            used = [name for name in names if name in layer]
            if len(used) > 1:
                raise UserError(f"{used[0]} and {used[1]} say the same thing twice; give one of them")
            if used:
                merged = {name: value for name, value in merged.items() if name not in names}
        merged |= layer
    if "s" in merged:
        merged["density_ratio"] = round(1 - merged.pop("s"), 12)
    if "template" in merged:
        merged["template"] = tuple(merged["template"])
    settings = check(Settings(**merged))
    if settings.eval_only:  # what the weights were trained with is the truth, whatever else was given
        try:
            trained = json.loads(checkpoint_metadata(settings.checkpoint)["settings"])
            if trained["method"] != settings.method:
                raise UserError(f"{settings.checkpoint} was trained with --method {trained['method']}; evaluate it so")
            known = {name: trained[name] for name in (*METHODS[settings.method].HYPERPARAMETERS, "tuned_on", "draw")}
            if not {"prompts", "template"} & given.keys():  # a config file's prompts may be those of another purpose
                known |= {"prompts": trained["prompts"], "template": tuple(trained["template"])}
            settings = check(replace(settings, epochs=None, search={}, **known))
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{settings.checkpoint} does not say how it was trained; save it again") from None
    return settings


def ignored(argv: Sequence[str] | None, method: str) -> list[str]:
    """The flags of a command line that set what other methods have and this one has not."""
    spelled = {"s": "density_ratio", "n_iters": "total_iters", "epochs": "total_iters"}
    others = {name for module in METHODS.values() for name in module.HYPERPARAMETERS}
    others -= {*METHODS[method].HYPERPARAMETERS}
    given = vars(_parser().parse_known_args(argv)[0])
    return [f"--{name}" for name in given if spelled.get(name, name) in others]


def _general_and_own(layer: dict, method: str) -> tuple[dict, dict]:
    """A config file's settings for all methods, and those that it has for this one."""
    own = layer.get("methods", {}).get(method, {})
    return {name: value for name, value in layer.items() if name != "methods"}, own


def _parser() -> Parser:
    parser = Parser(
        prog="main.py",
        description="Few-shot adaptation of CLIP. Defaults are in brackets. For the embedded digits, which are taken\n"
        "when no data set is named, configs/digits.yaml replaces some of them: tiny CLIP, 16 shots and others.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; the command line wins over it")
    for f in SIMPLE:
        text = f"{f.metadata['help']} [{f.default}]"
        if f.metadata["kind"] is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, help=text)
        elif f.metadata["kind"] is tuple:
            parser.add_argument(f"--{f.name}", action="append", metavar="TEXT", help=text)
        else:
            parser.add_argument(f"--{f.name}", type=f.metadata["kind"], choices=f.metadata["choices"], help=text)
    parser.add_argument("--s", type=float, help="sparsity, 1 - density_ratio [0.99995]")
    search = Settings.__dataclass_fields__["search"].metadata["help"]
    parser.add_argument("--search", action="append", metavar="NAME=VALUE,VALUE,...", help=search)
    return parser


def read_config(path: Path) -> dict:
    """The settings in a YAML file, each in its proper type, and under `methods` those for single methods, by name.
    UserError names the file, the key and the remedy."""
    where = f"--config {path}"
    settings = _settings(read_yaml(path, where), where, ("methods",))
    if "methods" in settings:
        methods = settings["methods"]
        if not isinstance(methods, dict) or not methods.keys() <= METHODS.keys():
            raise UserError(f"{where}: methods must hold settings under the names {', '.join(METHODS)}")
        settings["methods"] = {name: _settings(own, f"{where}: methods: {name}") for name, own in methods.items()}
    return settings


def read_yaml(path: Path, where: str):
    """What a YAML file holds. UserError, which begins with `where`, if it cannot be read."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def _settings(content, where: str, untyped: Sequence[str] = ()) -> dict:
    """The settings in a part of a config file, each in its proper type."""
    if not isinstance(content or {}, dict):
        raise UserError(f"{where} must hold lines of the form `name: value`")
    known = {f.name: (f.metadata["kind"], f.metadata["choices"], f.default) for f in SIMPLE}
    known["s"] = (float, None, 0.99995)
    settings = {}
    for name, value in (content or {}).items():
        if name in untyped:
            settings[name] = value
            continue
        if name == "search":
            settings[name] = _grid(value, f"{where}: search")
            continue
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise UserError(f"{where}: unknown setting {name!r}" + (f"; meant {close[0]}?" if close else ""))
        settings[name] = _typed(value, *known[name], where=f"{where}: {name}")
    return settings


def _grid(content, where: str) -> dict[str, list]:
    """What a search compares: by name of a setting its values, each in its proper type."""
    if not isinstance(content, dict) or not all(isinstance(values, list) and values for values in content.values()):
        raise UserError(f"{where} must be `name: [value, value, ...]`, not {content!r}")
    return {name: [_settings({name: value}, where)[name] for value in values] for name, values in content.items()}


def _grid_of_words(words: Sequence[str]) -> dict[str, list]:
    """The same from the command line, where it is NAME=VALUE,VALUE,... once or more."""
    truth, grid = {"true": True, "false": False}, {}
    for word in words:
        name, sign, values = word.partition("=")
        if not sign:
            raise UserError(f"--search {word}: write --search NAME=VALUE,VALUE,...")
        grid.setdefault(name, []).extend(truth.get(value, value) for value in values.split(","))
    return _grid(grid, "--search")


def _typed(value, kind: type, choices: Sequence[str] | None, default, where: str):
    if value is None and default is None:
        return None
    if kind is tuple:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where} must be a list of texts, not {value!r}")
        return tuple(texts)
    wanted = f"{where} must be {', '.join(choices) if choices else kind.__name__}, not {value!r}"
    if value is None or isinstance(value, bool) != (kind is bool):
        raise UserError(wanted)
    try:
        # Through text, because YAML reads 2e-4 as text and 1 as an integer.
        typed = value if kind is bool else kind(str(value))
    except ValueError:
        raise UserError(wanted) from None
    if choices and typed not in choices:
        raise UserError(wanted)
    return typed
