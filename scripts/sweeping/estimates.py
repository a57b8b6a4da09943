"""What runs will cost, from the records of others."""

from pathlib import Path

import pandas as pd

from configs.settings import one_by_one
from run_utils import Settings, UserError

ALIKE = ("method", "dataset", "test_dataset", "classes", "backbone", "precision", "eval_only")
PER_ITERATION = ("batch_size", "encoder", "position", "sampled_gradients")  # what its time depends on


def read_results(results: Path) -> pd.DataFrame:
    """results.csv of a results folder; empty if there is none. UserError names a damaged one."""
    path = results / "results.csv"
    try:
        return pd.read_csv(path)
    except FileNotFoundError:
        return pd.DataFrame()
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it, and the next run writes it anew") from None


def seconds(settings: Settings, records: pd.DataFrame, device: str | None) -> float | None:
    """Time of training and final evaluation, if training does not stop early: from the medians of records of the same
    method, data set, backbone and precision on the same device, which None leaves open among GPUs. None if there are no
    such records, and for a search, whose candidates they do not tell.

    Where a method trains by iterations, records say how long one takes; elsewhere those count that have as many shots
    (and epochs).
    """
    parts = [_seconds(single, records, device) for single in one_by_one(settings)]
    return None if None in parts else sum(parts)


def _seconds(settings: Settings, records: pd.DataFrame, device: str | None) -> float | None:
    used = settings.settled(1).hyperparameters
    by_iteration = "total_iters" in used and settings.epochs is None and not settings.eval_only
    names = [*ALIKE]
    if by_iteration:
        names += [name for name in PER_ITERATION if name in used]
    elif used and not settings.eval_only:
        names += ["shots", "epochs"] if "total_iters" in used else ["shots"]
    wanted = {name: getattr(settings, name) for name in names}
    if settings.test_dataset == "folder":
        wanted["root_path"] = str(Path(settings.root_path).expanduser().resolve())
    if settings.search or not {*wanted, "device", "train_seconds", "eval_seconds"} <= {*records.columns}:
        return None
    rows = records[records.device != "cpu"] if device is None else records[records.device == device]
    for name, value in wanted.items():
        rows = rows[rows[name] == value]
    if by_iteration:
        rows = rows[rows.iterations > 0]
        training = (rows.train_seconds / rows.iterations).median() * settings.iterations
    else:
        training = rows[~rows.stopped_early.astype(bool)].train_seconds.median()
    total = training + rows.eval_seconds.median()
    return None if pd.isna(total) else float(total)
