"""Reads config files: YAML with settings, and with sections of settings for one method, number of shots or dataset."""

import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import datasets
from common import UserError
from methods import METHODS
from settings import Settings

SECTIONS = ("methods", "by_shots", "datasets")


def flags_of(kind: type) -> dict[str, dict]:
    """Return the flags of a class of options: name and, for argparse and for config files, type and help."""
    flags = {}
    for f in dataclasses.fields(kind):
        flags[f.name] = {**f.metadata, "default": f.default}
        if f.metadata["complement"]:
            text = f"1 - {f.name}"
            flags[f.metadata["complement"]] = {**f.metadata, "help": text, "default": round(1 - f.default, 12)}
    return flags


def read_config(path: Path, method: str | None = None) -> dict[str, Any]:
    """Return the settings in a YAML file, each in its type, with the sections `methods` and `datasets` as dicts.

    Types are those of the settings of `method`, by default the file's own. Raise UserError with file, key and remedy.
    """
    where = f"--config {path}"
    known = flags_of(Settings)
    for module in METHODS.values():
        known = flags_of(module.Hparams) | known
    content = read_yaml(path, where)
    if isinstance(content, dict) and (
        content.keys() & {"rows", "seeds"} or list in (type(content.get("methods")), type(content.get("datasets")))
    ):
        raise UserError(f"{where}: this is a grid for scripts/sweep.py --grid")
    chosen = method or (content.get("method") if isinstance(content, dict) else None) or Settings.method
    if chosen in METHODS:
        known |= flags_of(METHODS[chosen].Hparams)
    return _section(content, where, known)


def read_yaml(path: Path, where: str) -> Any:
    """Return what a YAML file holds. Raise UserError, which begins with `where`, if it cannot be read."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def _section(content: Any, where: str, known: dict[str, dict]) -> dict[str, Any]:
    """Return the settings in a part of a config file. `known` are those that it may hold."""
    if not isinstance(content or {}, dict):
        raise UserError(f"{where} must hold lines of the form `name: value`")
    settings = {}
    for name, value in (content or {}).items():
        if name in SECTIONS:
            settings[name] = _subsections(value, f"{where}: {name}", name, known)
        elif name == "search":
            settings[name] = value
        elif name in known:
            settings[name] = typed(value, known[name], f"{where}: {name}")
        else:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise UserError(f"{where}: unknown setting {name!r}" + (f"; meant {close[0]}?" if close else ""))
    return settings


def _subsections(content: Any, where: str, kind: str, known: dict[str, dict]) -> dict[str | int, dict]:
    names = METHODS if kind == "methods" else datasets.available_datasets()
    if kind == "by_shots" and not (isinstance(content, dict) and all(isinstance(shots, int) for shots in content)):
        raise UserError(f"{where} must hold settings under numbers of shots")
    if kind != "by_shots" and not (isinstance(content, dict) and content.keys() <= set(names)):
        raise UserError(f"{where} must hold settings under the names {', '.join(names)}")
    parts = {}
    for name, part in content.items():
        choosing = {"method", "dataset"} if kind == "methods" else {"method", "shots", "dataset"}
        if isinstance(part, dict) and part.keys() & choosing:
            raise UserError(f"{where}: {name}: what chooses between sections stands outside them")
        inside = known | flags_of(METHODS[name].Hparams) if kind == "methods" else known
        parts[name] = _section(part, f"{where}: {name}", inside)
    return parts


def sections(source: str, layer: dict[str, Any], chosen: dict[str, Any], depth: int = 0) -> list[tuple]:
    """Return a layer as several (depth, source, settings): its general settings, then those for the method, the shots
    and the dataset that are `chosen`. The deeper a section, the more special it is."""
    parts = [(depth, source, {name: value for name, value in layer.items() if name not in SECTIONS})]
    for section in SECTIONS:
        own = layer.get(section, {}).get(chosen[section])
        parts += sections(f"{source}, {section}: {chosen[section]}", own, chosen, depth + 1) if own else []
    return parts


def by_data(layer: dict[str, Any], method: str) -> dict[str, list[tuple[str, str]]]:
    """Return the settings that a layer has sections for, by numbers of shots or datasets, whichever is chosen: for each
    all that the layer says of it for this method, as pairs of section and value."""
    said: dict[str, list[tuple[str, str]]] = {}
    for where, name, value in _said(layer, method):
        said.setdefault(name, []).append((where, repr(value)))
    of_data = {"by_shots", "datasets"}
    return {name: own for name, own in said.items() if any(of_data & {*where.split("/")} for where, _ in own)}


def _said(layer: dict[str, Any], method: str, where: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield section, name and value of all settings in a layer, without its sections for other methods."""
    for name, value in layer.items():
        if name not in SECTIONS:
            yield where, name, value
            continue
        for key, part in value.items():
            if name != "methods" or key == method:
                yield from _said(part, method, f"{where}/{name}/{key}")


def typed(value: Any, about: dict[str, Any], where: str) -> Any:
    """Return a value of a config file in the type of its setting."""
    kind = about["kind"]
    if value is None and about["optional"]:
        return None
    if kind is tuple:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where} must be a list of texts, not {value!r}")
        return tuple(texts)
    choices = about["choices"]
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
