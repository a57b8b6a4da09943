"""What every part of the program uses: errors for the user, notes, progress bars, command lines, files written whole.

It knows nothing of CLIP, datasets or methods, and imports neither torch nor pandas.
"""

import argparse
import contextlib
import difflib
import errno
import hashlib
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock
from tqdm import tqdm


class UserError(Exception):
    """A mistake that the user can correct. The message is one line that names the file or flag and the remedy."""


def none_of(flag: str, choices: Iterable[str], value: object) -> UserError:
    """Return the mistake that a value is none of a flag's choices. It names the nearest, whatever its case."""
    close = difflib.get_close_matches(str(value).lower().replace("-", "_"), choices, n=1)
    hint = f"; meant {close[0]}?" if close else ""
    return UserError(f"--{flag} must be one of {', '.join(choices)}, not {value!r}{hint}")


def printable(text: str) -> str:
    """Return `text` on one line that every terminal can show; file names may contain anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def counted(number: int, thing: str) -> str:
    """Return a number with the singular or plural of what it counts: "1 class", "1,200 images"."""
    plural = f"{thing}es" if thing.endswith("s") else f"{thing}s"
    return f"{number:,} {thing if number == 1 else plural}"


def note(text: str) -> None:
    """Print one line on stderr: something the user may want to know but need not correct."""
    print(f"note: {printable(text)}", file=sys.stderr)


def progress(iterable: Iterable | None, label: str, unit: str = "batch", **options: object) -> tqdm:
    """Return a progress bar around `iterable`; `options` are tqdm's.

    The bar disappears when it is done, unless `leave=True`. Where stderr is a log file and not a terminal, it prints a
    line every half minute at most.
    """
    interval = 0.1 if sys.stderr.isatty() else 30
    options = {"leave": False, "mininterval": interval, "maxinterval": 2 * interval} | options
    return tqdm(iterable, desc=label, unit=unit, **options)


class Parser(argparse.ArgumentParser):
    """An argument parser that reports mistakes as UserError, so that all mistakes reach the user in one way."""

    def __init__(self, **options: object):
        super().__init__(**{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter} | options)

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see {self.prog} --help")


DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
_NOT_WRITABLE |= {errno.ENAMETOOLONG}


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the user's mistakes into one line on stderr and exit code 2, and an interruption into exit code 130.

    Every entry point runs inside this. An OSError counts as a mistake if it says that a disk is full or that a path
    cannot be used. All other exceptions are bugs and keep their traceback.
    """
    try:
        yield
    except UserError as error:
        sys.exit(fail(str(error)))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in DISK_FULL | _NOT_WRITABLE:
            raise
        remedy = "free some space there" if error.errno in DISK_FULL else "choose another path"
        sys.exit(fail(f"{error.filename or 'disk'}: {error.strerror}; {remedy}"))


def fail(message: str) -> int:
    """Print `message` as an error and return the exit code of a mistake, 2."""
    print(f"error: {printable(message)}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; at the end it is renamed to `path`.

    A reader sees the old file or the new one, never half of it, even after a power cut. If the block raises, the old
    file stays.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")  # processes on two hosts may have the same number
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut may keep the new name and lose the content
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # where the file system can, make the new name survive a power cut too
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, which is renamed to `path` at the end, or removed if the block raises."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(path)
    except BaseException:
        shutil.rmtree(part)
        raise


def write_atomically(path: str | Path, content: str | bytes | memoryview) -> None:
    """Write a whole file at once (see `replacing`). Text is written as UTF-8."""
    with replacing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def file_sha256(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    return file_digest(path, "sha256")


def file_digest(path: str | Path, algorithm: str) -> str:
    """Return the hexadecimal digest of a file's bytes by one of hashlib's algorithms."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


def acquire_lock(path: Path, seconds: float) -> AcquireReturnProxy:
    """Take the lock on `path`, which one process holds at a time, until the end of a `with` block on what is returned.

    Raises filelock.Timeout if another process still holds it after `seconds` (negative: wait for ever), and UserError
    on a file system without locks.
    """
    # No soft lock, which is a plain file: it would outlive a process that is killed.
    lock = FileLock(path, timeout=seconds, fallback_to_soft=False)
    try:
        return lock.acquire()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        path.unlink(missing_ok=True)
        raise UserError(
            f"{path.parent} is on a file system without file locks ({error.strerror}); choose another folder, or have "
            "it mounted with locks (Lustre's option is flock)"
        ) from None
