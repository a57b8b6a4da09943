"""One run's settings (`parse`), seeds, folder, states to go on from, and records.

Records: `results/<run_id>/result.json` is the truth, written last and atomically; `results/results.csv` is
rebuilt from all of these files.
"""

import contextlib
import errno
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import pandas as pd
import torch
import yaml
from filelock import FileLock, Timeout

from clip.delta import checkpoint_metadata
from configs.arguments import parse
from configs.settings import IDENTITY, Settings, UserError
from utils import States, write_atomically

__all__ = ["Run", "Settings", "UserError", "parse"]  # parse and what it returns are this module's for its users

PROJECT = Path(__file__).resolve().parent


def make_reproducible(seed: int) -> None:
    """Deterministic kernels, float32 that is float32 (no TF32), and seeds for what a library may draw; this
    project's own draws come from generators of their own."""
    random.seed(seed)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


class Run:
    """The folders of one run. As a context it makes them, and removes again what holds no result at the end."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.results = Path(settings.results_dir)
        self.folder = self.results / settings.run_id
        self.csv = self.results / "results.csv"
        self.lock_file = self.results / f".{settings.run_id}.lock"  # not in the folder, which may be removed
        self.made: list[Path] = []
        self.checkpoint_lock: FileLock | None = None
        self.is_recorded = False

    def states(self, name: str, belongs_to: dict) -> States:
        """Where an unfinished run keeps what it goes on from, until its result is recorded."""
        return States(self.folder, name, belongs_to)

    @contextlib.contextmanager
    def log(self) -> Iterator[Callable[[dict], None]]:
        """With --tensorboard, a function that writes the values of a curve's row there; else one that does nothing."""
        if not self.settings.tensorboard:
            yield lambda row: None
            return
        from torch.utils.tensorboard import SummaryWriter  # an extra, and slow to import

        for old in self.folder.glob("events.out.tfevents.*"):  # of the part before a stop, which is written again
            old.unlink()
        with SummaryWriter(self.folder) as writer:

            def write(row: dict) -> None:
                for name, value in row.items():
                    if name != "iteration":
                        writer.add_scalar(name, value, row["iteration"])

            yield write

    def finished(self, split_sha256: str, data_sha256: str | None = None) -> dict | None:
        """The record, if this run is done: on the same split and data, and its weights are saved if they are asked
        for."""
        record = read_record(self.folder / "result.json")
        checkpoint = self.settings.checkpoint
        if record is None or (record["split_sha256"], record.get("data_sha256")) != (split_sha256, data_sha256):
            return None
        nothing_changed = record["trainable_weights"] == 0 == record["changed_weights"]
        no_weights = checkpoint is None or self.settings.eval_only or nothing_changed
        saved = no_weights or checkpoint_metadata(checkpoint).get("run_id") == self.settings.run_id
        return record if saved else None

    def __enter__(self) -> "Run":
        try:
            self.lock = self._acquire_lock()
        except (OSError, UserError):
            self._remove_empty()
            raise
        try:
            self.folder.mkdir(exist_ok=True)
            _try_to_write(self.folder)
            for part in self.folder.glob("*.part"):  # of a process that was killed
                part.unlink()
            if self.csv.is_dir():
                raise UserError(f"{self.csv} is a folder, but the table of results must go there; remove it")
            if self.settings.checkpoint and not self.settings.eval_only:
                self._reserve(self.settings.checkpoint)
            if self.settings.force:
                self.forget_states()
        except BaseException:
            self._leave()
            raise
        return self

    def _acquire_lock(self) -> FileLock:
        """What keeps other processes from the same run. UserError if one is doing it, unless this one is to wait."""
        try:
            return self._make(self.results, lambda: acquire(self.lock_file, seconds=0))
        except Timeout:
            if not self.settings.wait:
                remedy = "wait for it, as --wait does"
                raise UserError(f"another process is doing this run in {self.folder}; {remedy}") from None
        print(f"another process is doing this run in {self.folder}; waiting for it", flush=True)
        return self._make(self.results, lambda: acquire(self.lock_file, seconds=-1))

    def _make(self, folder: Path, write: Callable):
        """Makes a folder and returns what `write` does in it; anew if another run removed the folder meanwhile, as
        empty."""
        self.made += [f for f in (folder, *folder.parents) if not f.exists()]
        for tries_left in reversed(range(20)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                return write()
            except (FileNotFoundError, FileExistsError):
                if not tries_left:
                    raise

    def _reserve(self, checkpoint: Path) -> None:
        self._make(checkpoint.parent, lambda: _try_to_write(checkpoint.parent, checkpoint.name))
        try:  # another run may be on its way to the same file
            lock = checkpoint.with_name(f".{checkpoint.name}.lock")
            self.checkpoint_lock = self._make(checkpoint.parent, lambda: acquire(lock, seconds=0))
        except Timeout:
            raise UserError(f"another run is about to write {checkpoint}; choose another --filename") from None
        if checkpoint.exists() and not self.settings.force:
            owner = checkpoint_metadata(checkpoint).get("run_id", "none of this program")
            if owner != self.settings.run_id:
                raise UserError(
                    f"{checkpoint} holds the weights of another run ({owner}); choose another --filename or "
                    "--save_path, or replace them with --force"
                )

    def __exit__(self, kind: type[BaseException] | None = None, *_) -> None:
        has_result = (self.folder / "result.json").exists()
        if has_result and (self.is_recorded or self.settings.force):
            self.forget_states()  # nobody goes on from them: what is recorded is not run again, and --force begins anew
        elif kind is not None and any(self.folder.glob(STATES)):
            command = "without --force the same command" if self.settings.force else "the same command"
            print(f"note: {command} goes on where this run was stopped; its state is in {self.folder}")
        elif not has_result:
            shutil.rmtree(self.folder, ignore_errors=True)
            if kind in (KeyboardInterrupt, SystemExit) and "total_iters" in self.settings.hyperparameters:
                print("note: no state was written yet (--save_every); the same command begins anew")
        self._leave()

    def _leave(self) -> None:
        with contextlib.suppress(OSError):
            self.folder.rmdir()  # if it is empty
        # The run's folder is left alone from here on. The lock is still held: a process that opened this file before
        # it was removed will find out, and make another.
        locks = [self.lock] if self.checkpoint_lock is None else [self.checkpoint_lock, self.lock]
        for lock in locks:
            Path(lock.lock_file).unlink(missing_ok=True)
        self._remove_empty()
        for lock in locks:
            lock.release()

    def forget_states(self) -> None:
        """Takes care that this run begins anew the next time."""
        for path in self.folder.glob(STATES):
            path.unlink()

    def _remove_empty(self) -> None:
        for folder in sorted(self.made, key=lambda f: len(f.parts), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()  # if it is empty

    def record(
        self,
        result: dict,
        curve: list[dict],
        timing: list[dict],
        split: str | None = None,
        search: Sequence[dict] = (),
    ) -> dict:
        """Writes the split, if images were drawn, the curves and the search, then the result, then the table of all
        results. Returns the whole record.

        `result` may have other values of the method's settings than the run's: those that a search chose.
        """
        settings = self.settings
        own = settings.test_dataset == "folder"
        record = {
            **{name: getattr(settings, name) for name in IDENTITY},
            **settings.hyperparameters,
            **result,
            "draw": _draw(settings),
            "epochs": settings.epochs,
            "prompts": "own" if settings.template else settings.prompts,
            "root_path": _as_text(Path(settings.root_path).expanduser().resolve()) if own else None,
            "run_id": settings.run_id,
            "git_commit": git_commit(),
            "torch_version": torch.__version__,
            "device": device_name(settings.device),
            "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        record = {name: record[name] for name in _in_order(record)}
        self.folder.mkdir(parents=True, exist_ok=True)  # somebody may have cleaned up since
        write_atomically(self.folder / "config.yaml", yaml.safe_dump(_config(settings), sort_keys=False))
        if split:
            write_atomically(self.folder / "split.json", split)
        if curve:
            columns = [name for name in CURVE if any(name in row for row in curve)]
            write_atomically(self.folder / "curve.csv", pd.DataFrame(curve, columns=columns).to_csv(index=False))
            write_atomically(self.folder / "timing.csv", pd.DataFrame(timing).to_csv(index=False))
        if search:
            table = pd.DataFrame(search).astype({"iterations": "Int64"})  # whole, or missing
            write_atomically(self.folder / "search.csv", table.to_csv(index=False))
        write_atomically(self.folder / "result.json", json.dumps(record, indent=2) + "\n")
        self.is_recorded = True
        self.forget_states()
        rebuild_table(self.results)
        return record


def _draw(settings: Settings) -> str:
    """How the training images were chosen; of an evaluation, those of its weights."""
    split = settings.split
    if settings.eval_only:
        split = json.loads(checkpoint_metadata(settings.checkpoint)["settings"])["split"]
    return "recorded" if split else settings.draw


def _as_text(path: Path) -> str:
    """A path that a UTF-8 file can hold: names on disk may be no valid text."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


STATES = "*.pt"
CURVE = ("iteration", "loss", "train_accuracy", "test_accuracy", "lr")
# Columns of results.csv in order. Hyperparameters that are not named here follow lr, density_ratio and t.
FIRST = (
    "run_id method dataset backbone shots seed test_accuracy zero_shot_accuracy train_accuracy final_loss iterations "
    "stopped_early train_seconds eval_seconds search_seconds peak_memory_mb trainable_weights changed_weights "
    "optimizer_bytes checkpoint_bytes lr density_ratio t".split()
)
LAST = (
    "encoder position precision draw classes prompts template test_dataset root_path eval_only tuned_on split_sha256 "
    "data_sha256 weights_sha256 git_commit torch_version device finished_at".split()
)


def _in_order(names: Iterable[str]) -> list[str]:
    """`names` in the order of the table's columns."""
    names = list(names)
    between = [name for name in names if name not in FIRST and name not in LAST]
    return [*(n for n in FIRST if n in names), *between, *(n for n in LAST if n in names)]


def read_record(path: Path) -> dict | None:
    """The record in a result.json; None if there is none. A damaged one is named on stderr and left out."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and {"run_id", "split_sha256", "trainable_weights", "finished_at"} <= record.keys():
            return record
    except FileNotFoundError:
        return None
    except ValueError:
        pass
    print(f"note: {path} is damaged and left out; run it again with --force, or remove it", file=sys.stderr)
    return None


def _config(settings: Settings) -> dict:
    """Settings as a config file that repeats the run; of two alternatives only the one in force."""
    left_out = {"n_iters" if settings.total_iters else "total_iters", "epochs", "force", "wait"}
    return {name: value for name, value in asdict(settings).items() if name not in left_out}


def rebuild_table(results: Path) -> None:
    """results.csv from every result.json below `results`, one row a run, oldest first.

    Who reads the records is the next to write the table, because both are done under a lock: no row is lost. When the
    lock is not to be had in TABLE_SECONDS, a note on stderr says what to do, and the table stays as it is.
    """
    table = results / "results.csv"
    try:
        lock = acquire(results / ".results.lock", TABLE_SECONDS)
    except Timeout:
        print(
            f"note: {table} may lack the latest runs, because another process keeps it locked and may hang; their "
            "records are safe. The next run that ends here writes it anew, and so does the same command again",
            file=sys.stderr,
        )
        return
    try:
        for part in results.glob("results.csv.*.part"):  # of a process that was killed
            part.unlink()
        records = [read_record(folder / "result.json") for folder in results.iterdir() if _has_record(folder)]
        records = [record for record in records if record is not None]
        records.sort(key=lambda record: (record["finished_at"], record["run_id"]))
        names = dict.fromkeys((*FIRST, *(name for record in records for name in record), *LAST))
        # As objects: beside rows that have none, whole numbers would become fractions.
        frame = pd.DataFrame(records, columns=_in_order(names), dtype=object)
        write_atomically(table, frame.to_csv(index=False))
    finally:
        lock.release()


def _has_record(folder: Path) -> bool:
    """Whether the folder lists a result.json. Only a folder that is opened is up to date on NFS, which may remember
    for a minute that there was no file of that name."""
    try:
        return "result.json" in os.listdir(folder)
    except (NotADirectoryError, FileNotFoundError, PermissionError):  # a file, a run that just failed, lost+found
        return False


TABLE_SECONDS = 60.0  # a rebuild takes one or two, with thousands of runs
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


def acquire(path: Path, seconds: float) -> FileLock:
    """A lock that one process at a time holds on `path`, and that ends with the process, however that ends.

    Timeout if it is not to be had in `seconds`, below 0 never; UserError on a file system without locks.
    """
    # No soft lock, which is a file that exists: it would outlive a process that is killed.
    lock = FileLock(path, timeout=seconds, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        path.unlink(missing_ok=True)
        raise UserError(
            f"{path.parent} is on a file system without file locks ({error.strerror}); choose another --results_dir, "
            "or have it mounted with locks (Lustre's option is flock)"
        ) from None
    return lock


def _try_to_write(folder: Path, name: str = "") -> None:
    """Makes sure, before hours of work, that files of such names can be written."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{name}.", suffix=".part"):
        pass


def git_commit() -> str:
    """Commit of this code, with + if files were changed since; empty outside a git checkout."""
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def reset_peak_memory(device: str) -> None:
    """Lets the peak begin anew for a run in a process that has done others. Where the system does not allow it, as on
    macOS, a CPU's peak is that of the process so far."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes what is in use now


def peak_memory_mb(device: torch.device) -> float:
    """Most memory in use so far, in MiB: on a GPU what torch allocated there, on a CPU the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent process before exec
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024
