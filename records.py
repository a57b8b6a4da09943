"""Folders of runs: a record that is written last and at once, the table of all records, checkpoints to resume from.

`results/<run_id>/result.json` is the truth; `results/results.csv` is rebuilt from all of these files. This module knows
neither CLIP nor the settings: BERT's runs use it too.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import torch
from filelock import AcquireReturnProxy, Timeout

from common import UserError, acquire_lock, note, write_atomically

PROJECT = Path(__file__).resolve().parent
CHECKPOINTS = "*.pt"
TABLE_SECONDS = 60.0  # to wait for the table's lock; a rebuild takes one or two, with thousands of runs

# Columns of results.csv in order. Those that are not named here, such as hyperparameters, stand between the two.
FIRST = (
    *("run_id", "method", "dataset", "backbone", "shots", "seed", "test_accuracy", "zero_shot_accuracy"),
    *("largest_class_share", "train_accuracy", "final_loss", "iterations", "stopped_early", "train_seconds"),
    *("eval_seconds", "search_seconds", "peak_memory_mb", "trainable_weights", "changed_weights", "optimizer_bytes"),
    *("checkpoint_bytes", "lr", "density_ratio", "t"),
)
LAST = (
    *("encoder", "position", "precision", "draw", "classes", "prompts", "template", "test_dataset", "root_path"),
    *("eval_only", "tuned_on", "by_data", "split_sha256", "data_sha256", "weights_sha256", "git_commit"),
    *("torch_version", "device", "finished_at", "macro_accuracy", "nll", "brier", "ece", "zero_shot_macro_accuracy"),
    *("zero_shot_nll", "zero_shot_brier", "zero_shot_ece", "ece_bins", "temperature", "scaled_nll", "scaled_brier"),
    *("scaled_ece", "base_accuracy", "harmonic_mean", "imbalance", "imbalance_ratio", "label_noise", "noise_kind"),
    "processes",
)


class RecordFolder:
    """The folder of one run below `results`, named by the run's identity."""

    def __init__(self, results: str | Path, run_id: str):
        self.results, self.run_id = Path(results), run_id
        self.path = self.results / run_id
        self.table = self.results / "results.csv"
        self.lock_file = self.results / f".{run_id}.lock"  # not in the folder, which somebody may delete

    @contextlib.contextmanager
    def locked(self, wait: bool) -> Iterator[None]:
        """Hold the run's lock: no other process does the same run meanwhile.

        Make the folder, and be sure that it can be written to. Raise UserError if another process holds the lock,
        unless this one is to `wait` for it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self._lock(wait):
            check_writable(self.path)
            if self.table.is_dir():
                raise UserError(f"{self.table} is a folder, but the table of results must be there; remove it")
            for part in self.path.glob("*.part"):  # of a process that was killed
                part.unlink()
            yield

    def _lock(self, wait: bool) -> AcquireReturnProxy:
        try:
            return acquire_lock(self.lock_file, seconds=0)
        except Timeout:
            if not wait:
                raise UserError(f"another process is doing the run {self.path}; --wait waits for it") from None
        print(f"another process is doing the run {self.path}; waiting for it", flush=True)
        return acquire_lock(self.lock_file, seconds=-1)

    def read(self) -> dict | None:
        """Return the record, or None if this run is not done."""
        return read_record(self.path / "result.json")

    def write(self, record: dict, files: dict[str, str | bytes | None]) -> dict:
        """Write the other `files` (name: content; None: there is none), then the record, then the table of all records.

        Add the identity of the run and what it ran on, and return the whole record.
        """
        record = record | {
            "run_id": self.run_id,
            "git_commit": git_commit(),
            "torch_version": torch.__version__,
            "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        record = {name: record[name] for name in in_order(record)}
        self.path.mkdir(parents=True, exist_ok=True)  # somebody may have cleaned up since
        for name, content in files.items():
            if content is None:
                (self.path / name).unlink(missing_ok=True)  # of the record that is replaced
            else:
                write_atomically(self.path / name, content)
        write_atomically(self.path / "result.json", json.dumps(record, indent=2) + "\n")
        self.forget_checkpoints()
        rebuild_table(self.results)
        return record

    def forget_checkpoints(self) -> None:
        """Make the run start from the beginning next time."""
        for path in self.path.glob(CHECKPOINTS):
            path.unlink()


def check_writable(folder: Path, name: str = "") -> None:
    """Raise OSError now, and not after hours of work, if a file of such a name cannot be written."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{name}.", suffix=".part"):
        pass


def git_commit() -> str:
    """Return the commit of this code, with + if files were changed since; empty outside a git checkout."""
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def in_order(names: Iterable[str]) -> list[str]:
    """Return `names` in the order of the table's columns."""
    names = list(names)
    between = [name for name in names if name not in FIRST and name not in LAST]
    return [*(n for n in FIRST if n in names), *between, *(n for n in LAST if n in names)]


def read_record(path: Path) -> dict | None:
    """Return the record in a result.json, or None if there is none. A damaged one is named in a note and left out."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and {"run_id", "finished_at"} <= record.keys():
            return record
    except FileNotFoundError:
        return None
    except ValueError:
        pass
    note(f"{path} is damaged and left out; run it again with --force, or remove it")
    return None


def rebuild_table(results: Path) -> None:
    """Write results.csv from every result.json below `results`, a row a run, oldest first.

    Reading the records and writing the table is done under a lock, so no row is lost. If the lock cannot be had within
    TABLE_SECONDS, a note says what to do, and the table stays as it is.
    """
    import pandas as pd

    table = results / "results.csv"
    try:
        lock = acquire_lock(results / ".results.lock", TABLE_SECONDS)
    except Timeout:
        note(
            f"{table} may lack the latest runs, because another process keeps it locked and may hang; their records "
            "are safe. The next run that ends here writes the table again, and so does the same command"
        )
        return
    with lock:
        for part in results.glob("results.csv.*.part"):  # of a process that was killed
            part.unlink()
        records = [read_record(folder / "result.json") for folder in results.iterdir() if _has_record(folder)]
        records = [record for record in records if record is not None]
        records.sort(key=lambda record: (record["finished_at"], record["run_id"]))
        names = dict.fromkeys((*FIRST, *(name for record in records for name in record), *LAST))
        # As objects: in a column with empty cells whole numbers would become fractions.
        frame = pd.DataFrame(records, columns=in_order(names), dtype=object)
        write_atomically(table, frame.to_csv(index=False))


def _has_record(folder: Path) -> bool:
    """Return whether the folder lists a result.json. Only a folder that is opened is up to date on NFS, which may
    remember for a minute that there was no file of that name."""
    try:
        return "result.json" in os.listdir(folder)
    except (NotADirectoryError, FileNotFoundError, PermissionError):  # a file, a folder just removed, lost+found
        return False


class Checkpoints:
    """Checkpoints that unfinished work resumes from: the newest two, each a file in `folder`.

    A file's name holds a number, which grows, and the SHA-256 of its content, so a damaged one is noticed and the one
    before it is taken. A checkpoint that was saved with another `belongs_to`, a dict of plain values, is not taken, and
    makes room for the first that is saved here. Without a folder nothing is kept.
    """

    def __init__(self, folder: Path | None = None, name: str = "", belongs_to: dict | None = None):
        self.folder, self.name, self.belongs_to = folder, name, belongs_to
        self.number, self.newest = 0, None  # of the checkpoint that `take` gives
        self.others: list[Path] = []
        for path in self._files():
            content = self._read(path)
            if content is not None:
                self.number, self.newest = int(path.name.split("-")[-2]), content["state"]
                break

    def take(self) -> dict | None:
        """Return the newest state, in main memory, and None the next time; None if there is none to resume from."""
        state, self.newest = self.newest, None
        return state

    def save(self, number: int, state: dict) -> bool:
        """Keep what `torch.load` can read with weights_only. Where the disk does not take it, work continues with a
        note; return False then."""
        if self.folder is None:
            return False
        content = io.BytesIO()
        torch.save({"belongs_to": self.belongs_to, "state": state}, content)
        path = self.folder / f"{self.name}-{number:09d}-{_digest(content.getbuffer())}.pt"
        try:
            write_atomically(path, content.getbuffer())
        except OSError as error:
            note(f"{path} could not be saved ({error.strerror}); the run continues")
            return False
        while self.others:
            self.others.pop().unlink()
        for old in self._files()[2:]:
            old.unlink()
        return True

    def clear(self) -> None:
        """Remove what was saved."""
        for path in self._files():
            path.unlink()

    def _files(self) -> list[Path]:
        """Return the files, newest first."""
        return sorted(self.folder.glob(f"{self.name}-*-*.pt"), reverse=True) if self.folder else []

    def _read(self, path: Path) -> dict | None:
        """Return what `save` wrote; None if it is damaged, and then removed, or belongs to something else."""
        content = path.read_bytes()
        if path.stem.split("-")[-1] == _digest(content):
            try:
                content = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
                if content["belongs_to"] == self.belongs_to:
                    return content
                note(f"{path} belongs to other images or weights and is not taken")
                self.others.append(path)
                return None
            except (RuntimeError, pickle.UnpicklingError):  # nothing that `save` wrote
                pass
        note(f"{path} is damaged and is removed")
        path.unlink()
        return None


def _digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
