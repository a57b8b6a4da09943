"""Recorded splits: which images a run trained on, written as `split.json`, and read back to train on them again.

A file of this program is a JSON object with `dataset`, `class_names`, `split_sha256` and the parts `train` and `val`,
for one's own images also `test`, each a list of [path, label]. What CoOp keeps in `split_fewshot/shot_K-seed_S.pkl` is
read as well, without running code from it.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Mapping
from pathlib import Path

from .splits import check_path, parse_json
from .task import DatasetError, Item, Task


def to_json(task: Task) -> str | None:
    """The text of a `split.json`: what `replay` needs to draw the same images of `task`, one row a line. None where
    nothing was drawn."""
    if not any(getattr(task, part) for part in task.parts_to_record):
        return None
    head = {"dataset": task.name, "class_names": task.class_names, "split_sha256": task.split_sha256}
    fields = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    for part in task.parts_to_record:
        rows = ",\n".join(json.dumps([item.path, item.label]) for item in getattr(task, part))
        fields.append(f"{json.dumps(part)}: [\n{rows}\n]")
    return "{" + ",\n".join(fields) + "}\n"


def replay(task: Task, path: Path) -> Task:
    """`task` with the images that the `split.json` at `path` lists, instead of those drawn.

    Raises DatasetError if it belongs to another data set or other classes, if it was changed, or if the parts that it
    does not list are not those of the run that wrote it.
    """
    content = parse_json(path, "--split takes the split.json of a run, or a .pkl file of CoOp")
    if not isinstance(content, dict) or not {"dataset", "class_names", "split_sha256"} <= content.keys():
        raise DatasetError(f"--split {path} is no split.json of a run of this program")
    if content["dataset"] != task.name:
        raise DatasetError(f"--split {path} belongs to the data set {content['dataset']}, not to {task.name}")
    if content["class_names"] != list(task.class_names):
        raise DatasetError(f"--split {path} was recorded with other class names; check --classes and --root_path")
    parts = {part: _rows(content.get(part), f"--split {path}, {part}", task) for part in task.parts_to_record}
    replayed = dataclasses.replace(task, **parts)
    if replayed.split_sha256 != content["split_sha256"]:
        raise DatasetError(
            f"--split {path} was changed, or the test part of {task.name} is not the one it was recorded with"
        )
    return replayed


def _rows(rows: object, where: str, task: Task) -> tuple[Item, ...]:
    if not isinstance(rows, list):
        raise DatasetError(f"{where}: there is no such list of [path, label]")
    items = []
    for number, row in enumerate(rows):
        if not (isinstance(row, list) and [type(field) for field in row] == [str, int]):
            raise DatasetError(f"{where}, row {number}: expected [path, label], found {json.dumps(row)[:80]}")
        image, label = row
        check_path(image, f"{where}, row {number}")
        if not 0 <= label < len(task.class_names):
            raise DatasetError(f"{where}, row {number}: there is no class {label}")
        items.append(Item(image, label))
    return tuple(items)


# --- CoOp's pickles


class _Datum:
    """Stands in for Dassl's Datum: an image's path on the machine that wrote it, label, domain and class name."""


class _DatumUnpickler(pickle.Unpickler):
    """Knows plain containers, text, numbers and _Datum; anything else that a pickle may call is refused."""

    def find_class(self, module: str, name: str) -> type:
        if name == "Datum" and module.startswith("dassl.data.datasets"):
            return _Datum
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def import_coop(task: Task, path: Path, labels: Mapping[str, int]) -> Task:
    """`task` with the images of CoOp's few-shot file `path` (`shot_K-seed_S.pkl`), instead of those drawn.

    `labels` are the labels of all images that may be drawn. The file's paths are those of the machine that wrote it:
    the longest end of each that `labels` knows is meant. Raises DatasetError if the file is damaged, holds anything
    but such a list, or images that are not in `labels` with the same label.
    """
    try:
        with open(path, "rb") as file:
            content = _DatumUnpickler(file).load()
        parts = {
            part: tuple(Item(_known_end(d._impath, labels), d._label) for d in content.get(part, []))
            for part in ("train", "val")
        }
    except OSError as error:
        raise DatasetError(f"--split {path} cannot be read ({error.strerror})") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(f"--split {path} is none of CoOp's few-shot files ({reason})") from error
    for items in parts.values():
        for item in items:
            if type(item.label) is not int or labels.get(item.path) != item.label:
                raise DatasetError(
                    f"--split {path}: {item.path} with label {item.label} is not to be drawn in {task.name}"
                )
    return dataclasses.replace(task, **parts)


def _known_end(impath: str, labels: Mapping[str, int]) -> str:
    """The longest end of `impath` in `labels`, or all of it if there is none."""
    names = impath.replace("\\", "/").split("/")
    ends = ("/".join(names[start:]) for start in range(len(names)))
    return next((end for end in ends if end in labels), impath)
