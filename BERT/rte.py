"""GLUE-RTE: pairs of sentences from TSV files or from the Hub, few-shot draws, and token ids.

Sizes: 2,490 training and 277 validation pairs. Labels: 0 entailment, 1 not_entailment.
"""

import csv
import importlib
import logging
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import UserError

ROOT = Path(__file__).resolve().parent.parent
INSTALL = f"pip install -r {ROOT / 'requirements-all.txt'}"
LABELS = ("entailment", "not_entailment")
HUB_NAME = "nyu-mll/glue"
HUB_FILES = ("rte/train-00000-of-00001.parquet", "rte/validation-00000-of-00001.parquet")
MAX_TOKENS = 128  # as published
PROTOCOLS = ("balanced", "released")


class Pair(NamedTuple):
    premise: str
    hypothesis: str
    label: int


class RTE(NamedTuple):
    train: list[Pair]
    validation: list[Pair]


def extra(name: str) -> ModuleType:
    """Import and return a package of requirements-all.txt. Raise UserError if it is missing.

    Called where the package is used, so that --help and mistakes do not wait for it.
    """
    try:
        package = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} cannot be imported ({error}); {INSTALL}") from None
    for library in (name, "huggingface_hub"):  # no warnings of retries and of new classifiers; failures raise
        logging.getLogger(library).setLevel(logging.ERROR)
    return package


def load(data_dir: str | None) -> RTE:
    """Return RTE from the folder that holds GLUE's train.tsv and dev.tsv, or from the Hub if `data_dir` is None.

    GLUE's test.tsv has no labels and is not read.
    """
    if data_dir is None:
        return from_hub()
    files = [Path(data_dir).expanduser() / name for name in ("train.tsv", "dev.tsv")]
    for file in files:
        if not file.is_file():
            raise UserError(f"--data_dir: there is no {file}; name the folder that holds RTE's TSV files")
    return RTE(*map(read_tsv, files))


def read_tsv(path: Path) -> list[Pair]:
    """Return the pairs of one TSV file, in order. Raise UserError if the file is damaged.

    As in the Hub's copy, quotes are ordinary characters.
    """
    pairs = []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            missing = {"sentence1", "sentence2", "label"} - set(reader.fieldnames or ())
            if missing:
                raise UserError(f"{path}: the first line names no column {', '.join(sorted(missing))}; is this RTE?")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise UserError(f"{where}: not {len(reader.fieldnames)} fields; unpack GLUE's archive again")
                if row["label"] not in LABELS:
                    raise UserError(f"{where}: the label is {row['label']!r}; it must be {' or '.join(LABELS)}")
                pairs.append(Pair(row["sentence1"], row["sentence2"], LABELS.index(row["label"])))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}); unpack GLUE's archive again") from None
    if not pairs:
        raise UserError(f"{path} holds no pairs; unpack GLUE's archive again")
    return pairs


def from_hub() -> RTE:
    """Return RTE from the Hub's parquet files, which huggingface_hub downloads once and keeps in its cache."""
    download = extra("huggingface_hub").hf_hub_download
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # again: the line above loads more of the package
    try:
        files = [download(HUB_NAME, name, repo_type="dataset") for name in HUB_FILES]
    except Exception as error:  # network and cache errors have no common class
        raise UserError(
            f"RTE cannot be downloaded from the Hub ({first_line(error)}); check the network, or give GLUE's files: "
            "--data_dir FOLDER with train.tsv and dev.tsv"
        ) from error
    return RTE(*(read_parquet(Path(file)) for file in files))


def read_parquet(path: Path) -> list[Pair]:
    """Return the pairs of one of the Hub's files, in order. Raise UserError if the file is damaged."""
    pandas, _ = extra("pandas"), extra("pyarrow")
    columns = ["sentence1", "sentence2", "label"]
    try:
        table = pandas.read_parquet(path, columns=columns)
        pairs = [Pair(*row) for row in zip(*(table[name].tolist() for name in columns))]
        if not pairs or not set(table["label"]) <= set(range(len(LABELS))):
            raise ValueError("labels must be 0 or 1")
    except (ValueError, OSError) as error:
        # The cache's snapshot links to this file. It is downloaded again only when the link's target is gone.
        raise UserError(
            f"{path.resolve()} is not RTE ({first_line(error)}); remove it, and it is downloaded again"
        ) from None
    return pairs


def first_line(error: Exception) -> str:
    """Return the type of an exception and the first line of its message."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def draw(pairs: list[Pair], shots: int, seed: int, protocol: str) -> list[int]:
    """Return the row numbers of 2 x `shots` training pairs. They depend on nothing but the labels and the arguments.

    The rows are shuffled as Hugging Face's `shuffle(seed)` does it, by numpy's permutation. "balanced" takes the first
    `shots` of each label. "released" takes the first 2 x `shots` whatever their labels, as the published script does.
    """
    order = np.random.default_rng(seed).permutation(len(pairs)).tolist()
    if protocol == "balanced":
        of_labels = [[row for row in order if pairs[row].label == label][:shots] for label in range(len(LABELS))]
        chosen = {row for rows in of_labels for row in rows}
        order = [row for row in order if row in chosen]
    rows = order[: 2 * shots]
    if len(rows) < 2 * shots:
        counts = ", ".join(f"{sum(p.label == i for p in pairs)} {name}" for i, name in enumerate(LABELS))
        raise UserError(f"--shots {shots} needs more pairs than RTE's training split has ({counts}); lower --shots")
    return rows


class Encoded:
    """Token ids, attention masks, segment ids and labels of pairs.

    Pairs are padded and cut to `max_tokens`. Without `segments` all segment ids are 0.
    """

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
        if not segments:
            encoding["token_type_ids"].zero_()
        names = ("input_ids", "attention_mask", "token_type_ids")
        self.inputs = {name: encoding[name].to(device) for name in names}
        self.labels = torch.tensor([pair.label for pair in pairs], device=device)
        self.lengths = encoding["attention_mask"].sum(dim=1)

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return inputs [rows, tokens] and labels [rows] of some rows, cut to the longest of them.

        The attention mask hides padding, so cutting it saves time and changes nothing but rounding.
        """
        longest = int(self.lengths[rows].max())
        rows = rows.to(self.labels.device)
        return {name: values[rows, :longest] for name, values in self.inputs.items()}, self.labels[rows]
