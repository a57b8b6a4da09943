"""How long runs will take, from the records of others."""

import math
from pathlib import Path

import pandas as pd

from arguments import Config
from settings import Loop

ALIKE = ("method", "dataset", "test_dataset", "classes", "backbone", "precision", "eval_only")
PER_ITERATION = ("batch_size", "encoder", "position", "sampled_gradients")  # the time of an iteration depends on these


def seconds(config: Config, records: pd.DataFrame, device: str | None, processes: int = 1) -> float | None:
    """Return the time of training and final evaluation, if training does not stop early.

    It is made of medians over records of the same method, dataset, backbone and precision on the same device, shared by
    as many `processes`; with `device` None on any GPU. Where a method trains by iterations, records say how long one
    takes; elsewhere only those with as many shots (and epochs) count. Return None if there are no such records, and for
    a search, because records do not say how long its candidates take.
    """
    parts = [_seconds(single, records, device, processes) for single in config.one_by_one()]
    return None if None in parts else sum(parts)


def _seconds(config: Config, records: pd.DataFrame, device: str | None, processes: int) -> float | None:
    settings, hparams = config.settings, config.hparams.settled(config.settings.shots, 1)
    iterates = isinstance(hparams, Loop)
    by_iteration = iterates and hparams.epochs is None and config.trains
    names = ["shots", "epochs"] if iterates else ["shots"]
    if by_iteration:
        names = [name for name in PER_ITERATION if hasattr(hparams, name)]
    wanted = {name: getattr(settings, name) for name in ALIKE}
    if "processes" in records:  # older records have none
        records = records[records.processes.fillna(1) == max(processes, settings.processes)]
    if config.trains:
        wanted |= {name: getattr(hparams, name, getattr(settings, name, None)) for name in names}
    if settings.test_dataset == "folder":
        wanted["root_path"] = str(Path(settings.root_path).expanduser().resolve())
    if config.search or not {*wanted, "device", "train_seconds", "eval_seconds"} <= {*records.columns}:
        return None
    rows = records[records.device != "cpu"] if device is None else records[records.device == device]
    for name, value in wanted.items():
        rows = rows[rows[name] == value]
    if by_iteration:
        rows = rows[rows.iterations > 0]
        training = (rows.train_seconds / rows.iterations).median() * hparams.total_iters
    else:
        training = rows[~rows.stopped_early.astype(bool)].train_seconds.median()
    total = training + rows.eval_seconds.median()
    return None if math.isnan(total) else float(total)
