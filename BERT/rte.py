"""GLUE-RTE: pairs of sentences, from TSV files or from the Hub, the few-shot draws, and their token ids.

Sizes: 2,490 training and 277 validation pairs. Labels: 0 entailment, 1 not_entailment.
"""

import csv
import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
INSTALL = f"pip install -r {ROOT / 'requirements-nlp.txt'}"
LABELS = ("entailment", "not_entailment")
HUB_NAME, HUB_CONFIG = "nyu-mll/glue", "rte"
MAX_TOKENS = 128  # as published
PROTOCOLS = ("balanced", "released")


class UserError(Exception):
    """A mistake that the user can mend; the message is one line with the remedy."""


class Pair(NamedTuple):
    premise: str
    hypothesis: str
    label: int


class RTE(NamedTuple):
    train: list[Pair]
    validation: list[Pair]


def extra(name: str):
    """A package of requirements-nlp.txt, imported when it is needed: mistakes and --help are answered without it."""
    try:
        package = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} cannot be imported ({error}); {INSTALL}") from None
    for library in (name, "huggingface_hub"):  # what matters of their retries and new heads ends in an error
        logging.getLogger(library).setLevel(logging.ERROR)
    return package


def load(data_dir: str | None) -> RTE:
    """RTE from the folder that holds train.tsv and dev.tsv, or without one from the Hub."""
    return from_hub() if data_dir is None else from_folder(Path(data_dir).expanduser())


def from_folder(folder: Path) -> RTE:
    """RTE from the files of GLUE's archive; test.tsv has no labels and is not read."""
    for name in ("train.tsv", "dev.tsv"):
        if not (folder / name).is_file():
            raise UserError(f"--data_dir: there is no {folder / name}; name the folder that holds RTE's TSV files")
    return RTE(read_tsv(folder / "train.tsv"), read_tsv(folder / "dev.tsv"))


def read_tsv(path: Path) -> list[Pair]:
    """The pairs of one file, in order. As in the Hub's copy, quotes are characters like others, and a row that
    lacks a field is left out (none does in the original files), with a note."""
    pairs, short = [], []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            missing = {"sentence1", "sentence2", "label"} - set(reader.fieldnames or ())
            if missing:
                raise UserError(f"{path}: the first line names no column {', '.join(sorted(missing))}; is this RTE?")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row:
                    raise UserError(f"{where}: more fields than columns; fields are separated by one tab")
                if None in row.values():
                    short.append(reader.line_num)
                    continue
                if row["label"] not in LABELS:
                    raise UserError(f"{where}: the label is {row['label']!r}; it must be {' or '.join(LABELS)}")
                pairs.append(Pair(row["sentence1"], row["sentence2"], LABELS.index(row["label"])))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; unpack GLUE's archive anew") from None
    except csv.Error as error:
        raise UserError(f"{path}: {error}; unpack GLUE's archive anew") from None
    if short:
        print(f"note: {path}: {len(short)} rows lack a field and are left out (lines {short})", file=sys.stderr)
    if not pairs:
        raise UserError(f"{path} holds no pairs; unpack GLUE's archive anew")
    return pairs


def from_hub() -> RTE:
    """RTE through Hugging Face's `datasets`, which keeps a copy in its cache."""
    with hugging_face_datasets() as datasets:
        try:
            parts = datasets.load_dataset(HUB_NAME, HUB_CONFIG)
            columns = [parts[name][:] for name in ("train", "validation")]
        except Exception as error:  # of several libraries' network and cache layers, without a common class
            reason = next(iter(str(error).splitlines()), "")
            raise UserError(
                f"RTE cannot be fetched from the Hub ({type(error).__name__}: {reason}); check the network, or give "
                "GLUE's files: --data_dir FOLDER with train.tsv and dev.tsv"
            ) from error
    return RTE(*([Pair(*row) for row in zip(c["sentence1"], c["sentence2"], c["label"])] for c in columns))


_hugging_face_modules: dict = {}  # while they are not in sys.modules


@contextmanager
def hugging_face_datasets() -> Iterator:
    """Hugging Face's package `datasets`. This project's own package of that name, which `import datasets` finds
    wherever the project's folder comes first on the path (in the tests), steps aside for the time."""
    if not _finds_local():
        yield _hub_package()
        return
    local, path = _take_modules(), list(sys.path)
    sys.modules.update(_hugging_face_modules)
    sys.path[:] = [entry for entry in path if Path(entry or ".").resolve() != ROOT]
    try:
        yield _hub_package()
    finally:
        sys.path[:] = path
        _hugging_face_modules.update(_take_modules())
        sys.modules.update(local)


def _hub_package():
    package = extra("datasets")
    if not hasattr(package, "load_dataset"):
        place = next(iter(getattr(package, "__path__", [])), package)
        raise UserError(f"`import datasets` finds {place}, not Hugging Face's; {INSTALL}")
    return package


def _finds_local() -> bool:
    """Whether `import datasets` gives this project's package."""
    if "datasets" in sys.modules:
        file = getattr(sys.modules["datasets"], "__file__", None)
    else:
        spec = importlib.util.find_spec("datasets")
        file = spec and spec.origin
    return file is not None and Path(file).resolve().parent.parent == ROOT


def _take_modules() -> dict:
    """Removes `datasets` and all below it from the imported modules, and returns them."""
    names = [name for name in sys.modules if name.partition(".")[0] == "datasets"]
    return {name: sys.modules.pop(name) for name in names}


def draw(pairs: list[Pair], shots: int, seed: int, protocol: str) -> list[int]:
    """Row numbers of the 2 x `shots` training pairs, a pure function of the labels and the arguments.

    Both protocols go through the rows in the order of Hugging Face's `shuffle(seed)`, numpy's permutation.
    "balanced" takes the first `shots` of each label; "released", as the published script, the first 2 x `shots`,
    whatever their labels.
    """
    order = np.random.default_rng(seed).permutation(len(pairs)).tolist()
    if protocol == "released":
        rows = order[: 2 * shots]
    else:
        rank = {label: 0 for label in range(len(LABELS))}
        rows = []
        for row in order:
            rank[pairs[row].label] += 1
            if rank[pairs[row].label] <= shots:
                rows.append(row)
    if len(rows) < 2 * shots:
        counts = ", ".join(f"{sum(p.label == i for p in pairs)} {name}" for i, name in enumerate(LABELS))
        raise UserError(f"--shots {shots} needs more pairs than the training part has ({counts}); lower --shots")
    return rows


class Encoded:
    """Token ids, attention masks, segment ids and labels of pairs, padded and cut to `max_tokens`."""

    def __init__(
        self, pairs: list[Pair], tokenizer, segments: bool, device: torch.device, max_tokens: int = MAX_TOKENS
    ):
        encoding = tokenizer(
            [pair.premise for pair in pairs],
            [pair.hypothesis for pair in pairs],
            truncation=True,
            padding="max_length",
            max_length=max_tokens,
            padding_side="right",
            return_token_type_ids=True,
            return_tensors="pt",
        )
        segment_ids = encoding["token_type_ids"] if segments else torch.zeros_like(encoding["token_type_ids"])
        self.inputs = {
            "input_ids": encoding["input_ids"].to(device),
            "attention_mask": encoding["attention_mask"].to(device),
            "token_type_ids": segment_ids.to(device),
        }
        self.labels = torch.tensor([pair.label for pair in pairs], device=device)
        self.lengths = encoding["attention_mask"].sum(dim=1)

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs and labels of some rows, cut to the longest of them: the attention mask hides padding, so that
        nothing changes but rounding and the time."""
        longest = int(self.lengths[rows].max())
        rows = rows.to(self.labels.device)
        return {name: values[rows, :longest] for name, values in self.inputs.items()}, self.labels[rows]
