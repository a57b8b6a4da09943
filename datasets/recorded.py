"""Recorded splits: a run writes its images as `split.json`, and `--split` trains on the same images again.

The file is a JSON object with `dataset`, `class_names`, `split_sha256` and the parts `train` and `val`, for your own
images also `test`, each a list of [path, label]. `test_part` is there if the validation part was evaluated. CoOp's
`split_fewshot/shot_K-seed_S.pkl` is read too, without running code from it.
"""

import dataclasses
import json
import pickle
from collections.abc import Mapping
from pathlib import Path

from .splits import check_path, parse_json
from .task import DatasetError, Item, Task


def to_json(task: Task) -> str | None:
    """Return the text of a `split.json`, from which `replay` takes the images of `task`; None if nothing was drawn."""
    if not any(getattr(task, part) for part in task.parts_to_record):
        return None
    head = {"dataset": task.name, "class_names": task.class_names, "split_sha256": task.split_sha256}
    if task.test_part != "test":
        head["test_part"] = task.test_part
    fields = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    for part in task.parts_to_record:
        rows = ",\n".join(json.dumps([item.path, item.label]) for item in getattr(task, part))
        fields.append(f"{json.dumps(part)}: [\n{rows}\n]")
    return "{" + ",\n".join(fields) + "}\n"


def replay(task: Task, path: Path) -> Task:
    """Return `task` with the images that the `split.json` at `path` lists, instead of those drawn.

    Raises DatasetError if the file belongs to another dataset or other classes, if it was changed, or if parts that it
    does not list differ from those of the run that wrote it.
    """
    content = parse_json(path, "--split takes the split.json of a run, or a .pkl file of CoOp")
    if not isinstance(content, dict) or not {"dataset", "class_names", "split_sha256"} <= content.keys():
        raise DatasetError(f"--split {path} is not the split.json of a run; every run writes one into its folder")
    if content["dataset"] != task.name:
        raise DatasetError(f"--split {path} belongs to --dataset {content['dataset']}, not to {task.name}")
    if content["class_names"] != list(task.class_names):
        raise DatasetError(f"--split {path} was recorded with other class names; check --classes and --root_path")
    recorded_part = content.get("test_part", "test")
    if recorded_part != task.test_part:
        raise DatasetError(f"--split {path} was recorded with --test_part {recorded_part}; give the same one")
    parts = {part: _rows(content.get(part), f"--split {path}, {part}", task) for part in task.parts_to_record}
    replayed = dataclasses.replace(task, **parts)
    if replayed.split_sha256 != content["split_sha256"]:
        raise DatasetError(
            f"--split {path} was changed, or the {task.test_part} part of {task.name} was another when it was recorded"
        )
    return replayed


def _rows(rows: object, where: str, task: Task) -> tuple[Item, ...]:
    if not isinstance(rows, list):
        raise DatasetError(f"{where}: this list of [path, label] is missing")
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
    """A substitute for Dassl's Datum: path on the machine that wrote it, label, domain and class name of an image."""


class _DatumUnpickler(pickle.Unpickler):
    """An unpickler of plain containers, text, numbers and _Datum; it rejects whatever else a pickle may call."""

    def find_class(self, module: str, name: str) -> type:
        if name == "Datum" and module.startswith("dassl.data.datasets"):
            return _Datum
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def import_coop(task: Task, path: Path, labels: Mapping[str, int]) -> Task:
    """Return `task` with the images of CoOp's few-shot file `path` (`shot_K-seed_S.pkl`), instead of those drawn.

    `labels` are the labels, by path, of all images that may be drawn. The file has the paths of the machine that wrote
    it; of each, the longest end that is in `labels` is used. Raises DatasetError if the file is damaged, has another
    content, or lists images that are not in `labels` with the same label.
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
        raise DatasetError(f"--split {path} is not a few-shot file of CoOp ({reason})") from error
    for item in (*parts["train"], *parts["val"]):
        if type(item.label) is not int or labels.get(item.path) != item.label:
            raise DatasetError(
                f"--split {path}: {item.path} with label {item.label} is not in train or val of {task.name}"
            )
    return dataclasses.replace(task, **parts)


def _known_end(impath: str, labels: Mapping[str, int]) -> str:
    """Return the longest end of `impath` in `labels`, or all of it if there is none."""
    names = impath.replace("\\", "/").split("/")
    ends = ("/".join(names[start:]) for start in range(len(names)))
    return next((end for end in ends if end in labels), impath)
