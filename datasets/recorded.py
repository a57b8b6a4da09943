"""Recorded splits: a run writes its images as `split.json`, and `--split` trains on the same images again.

The file is a JSON object with `dataset`, `class_names`, `split_sha256` and the parts `train` and `val`, for your own
images also `test`, each a list of [path, label]. `test_part` is there if the validation part was evaluated, and
`label_noise` and `noise_kind` if labels are wrong on purpose. Support sets that others published are read too:

- CoOp's `split_fewshot/shot_K-seed_S.pkl`, without running code from it;
- cross_modal_adaptation's `indices/DATASET/shot_K-seed_S.json`;
- 2SFS's `split_fewshot/shot_K-seed_S_train.jsonl`, with `..._val.jsonl` beside it, except for ImageNet.
"""

import dataclasses
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

from .splits import check_path, parse_json, read_text
from .task import DatasetError, Item, Task

TAKES = (
    "--split takes the split.json of a run, CoOp's .pkl, cross_modal_adaptation's index .json or 2SFS's _train.jsonl"
)


def to_json(task: Task) -> str | None:
    """Return the text of a `split.json`, from which `replay` takes the images of `task`; None if nothing was drawn."""
    if not any(getattr(task, part) for part in task.parts_to_record):
        return None
    head = {"dataset": task.name, "class_names": task.class_names, "split_sha256": task.split_sha256}
    if task.test_part != "test":
        head["test_part"] = task.test_part
    if task.label_noise:
        head |= {"label_noise": task.label_noise, "noise_kind": task.noise_kind}
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
    content = parse_json(path, TAKES)
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
    noise = {name: content[name] for name in ("label_noise", "noise_kind") if name in content}
    replayed = dataclasses.replace(task, **parts, **noise)
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


# --- support sets of others

Rows = dict[str, list[tuple[str, int]]]  # by part: path on the machine that wrote the file, and label


def importer(path: Path) -> Callable[[Task, Path, Mapping[str, int]], Task] | None:
    """Return the function that imports a support set that others published; None for a run's split.json."""
    if path.suffix != ".json":
        return {".pkl": import_coop, ".jsonl": import_jsonl}.get(path.suffix)
    content = parse_json(path, TAKES)
    train = content.get("train") if isinstance(content, dict) else None
    return import_index if isinstance(train, dict) and isinstance(train.get("data"), list) else None


def import_index(task: Task, path: Path, labels: Mapping[str, int]) -> Task:
    """Return `task` with the images of an index file of cross_modal_adaptation; see `_with_rows`."""
    content = parse_json(path, TAKES)
    rows: Rows = {}
    for part in ("train", "val"):
        where, listed = f"--split {path}, {part}", content.get(part)
        if not (isinstance(listed, dict) and isinstance(listed.get("data"), list)):
            raise DatasetError(f"{where}: the list of images under data is missing; download it again")
        rows[part] = _fields(listed["data"], "impath", "label", where)
    return _with_rows(task, path, rows, labels)


def _fields(rows: list, image: str, label: str, where: str) -> list[tuple[str, int]]:
    """Return the two fields of each row, which is a JSON object. Raise DatasetError if one lacks them."""
    for number, row in enumerate(rows):
        if not (isinstance(row, dict) and type(row.get(image)) is str and type(row.get(label)) is int):
            found = json.dumps(row)[:80]
            raise DatasetError(f"{where}, row {number}: expected {image} (text) and {label} (number), found {found}")
    return [(row[image], row[label]) for row in rows]


def import_jsonl(task: Task, path: Path, labels: Mapping[str, int]) -> Task:
    """Return `task` with the images of 2SFS's file `..._train.jsonl`, and of `..._val.jsonl` beside it, if that is
    there; see `_with_rows`."""
    if not path.name.endswith("_train.jsonl"):
        raise DatasetError(f"--split {path}: name the file that ends in _train.jsonl; _val.jsonl is read beside it")
    beside = path.with_name(path.name.replace("_train.jsonl", "_val.jsonl"))
    rows: Rows = {"train": _jsonl_rows(path), "val": _jsonl_rows(beside) if beside.exists() else []}
    return _with_rows(task, path, rows, labels)


def _jsonl_rows(path: Path) -> list[tuple[str, int]]:
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise DatasetError(f"--split {path}, line {number} is not JSON; download it again") from None
    return _fields(rows, "_impath", "_label", f"--split {path}")


class _Datum:
    """A substitute for Dassl's Datum: path on the machine that wrote it, label, domain and class name of an image."""


class _DatumUnpickler(pickle.Unpickler):
    """An unpickler of plain containers, text, numbers and _Datum; it rejects whatever else a pickle may call."""

    def find_class(self, module: str, name: str) -> type:
        if name == "Datum" and module.startswith("dassl.data.datasets"):
            return _Datum
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def import_coop(task: Task, path: Path, labels: Mapping[str, int]) -> Task:
    """Return `task` with the images of CoOp's few-shot file `path` (`shot_K-seed_S.pkl`); see `_with_rows`."""
    try:
        with open(path, "rb") as file:
            content = _DatumUnpickler(file).load()
        rows = {part: [(d._impath, d._label) for d in content.get(part, [])] for part in ("train", "val")}
        return _with_rows(task, path, rows, labels)
    except DatasetError:
        raise
    except OSError as error:
        raise DatasetError(f"--split {path} cannot be read ({error.strerror})") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(f"--split {path} is not a few-shot file of CoOp ({reason})") from error


def _with_rows(task: Task, path: Path, rows: Rows, labels: Mapping[str, int]) -> Task:
    """Return `task` with the images in `rows`, which the file `path` lists, instead of those drawn.

    `labels` are the labels, by path, of all images that may be drawn. `rows` has the paths of the machine that wrote
    the file; of each, the longest end that is in `labels` is used. Raises DatasetError for images that are not in
    `labels` with the same label.
    """
    parts = {
        part: tuple(Item(_known_end(image, labels), label) for image, label in of_part)
        for part, of_part in rows.items()
    }
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
