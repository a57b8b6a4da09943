"""Reading zip and tar archives of unknown origin: nothing in them is written outside the target folder."""

import lzma
import posixpath
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import BinaryIO

from tqdm import tqdm

from common import progress
from fetching import is_web_page

from ..task import DatasetError

SUFFIXES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz")
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError)
_UNREADABLE = (NotImplementedError, RuntimeError)  # zip: a compression that Python lacks, a password


def is_archive(path: Path) -> bool:
    """Return whether a file's content is that of a zip or tar archive, at least at its start."""
    try:
        return zipfile.is_zipfile(path) or tarfile.is_tarfile(path)
    except _BROKEN:  # a compressed tar that ends within its first member
        return False


def why_no_archive(path: Path) -> str:
    """Return what a file is instead that has the name of an archive, but not the content."""
    with open(path, "rb") as file:
        web_page = is_web_page(file.read(1024))
    if web_page:
        return f"{path} is a web page, not an archive; open it to see what the server wanted, then delete it"
    return f"{path} is not a readable zip or tar archive (perhaps incomplete); delete it and download it again"


def member_names(path: Path) -> Iterator[str]:
    """Yield the names of an archive's members, in the archive's order."""
    with explained(path):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield from archive.namelist()
        else:
            with tarfile.open(path) as archive:
                yield from (member.name for member in archive)


def unpack(path: Path, folder: Path) -> None:
    """Unpack a zip or tar archive into `folder`, with a progress bar.

    Only regular files and folders are written, so that no link can redirect a later member. Raises DatasetError for a
    damaged archive, and for one with a member that is a device or would leave `folder`.
    """
    with explained(path):
        if zipfile.is_zipfile(path):
            _unpack_zip(path, folder)
        else:
            with open(path, "rb") as file:
                bar = _bytes_bar(path, path.stat().st_size)
                with bar, tarfile.open(fileobj=file) as archive:
                    unpack_tar(archive, path, folder, lambda: bar.update(file.tell() - bar.n))


def _bytes_bar(path: Path, total: int) -> tqdm:
    return progress(None, f"unpack {path.name}", "B", total=total, unit_scale=True)


def unpack_tar(
    archive: tarfile.TarFile, path: Path, folder: Path, after_each: Callable[[], object] = lambda: None
) -> None:
    """Unpack an open tar archive as `unpack` does; `path` names it in errors, `after_each` is called for each member.

    A link inside the archive becomes a copy of the file that it names.
    """
    links = []
    for member in archive:
        target = _target(folder, member.name, path)
        if member.isdir():
            target.mkdir(parents=True, exist_ok=True)
        elif member.isfile():
            _write(archive.extractfile(member), target)
        elif member.issym() or member.islnk():
            base = PureWindowsPath(member.name).parent if member.issym() else ""
            links.append((member, target, PureWindowsPath(base, member.linkname)))
        else:
            raise DatasetError(f"{path}: {member.name!r} is a device file, which no dataset has; do not use it")
        after_each()
    for member, target, source in links:
        original = _target(folder, posixpath.normpath(source.as_posix()), path)
        if not original.is_file():
            raise DatasetError(f"{path}: the link {member.name!r} names no file of the archive; do not use it")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(original, target)


def _unpack_zip(path: Path, folder: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        with _bytes_bar(path, sum(member.file_size for member in members)) as bar:
            for member in members:
                target = _target(folder, member.filename, path)
                if stat.S_ISLNK(member.external_attr >> 16):
                    raise DatasetError(f"{path}: {member.filename!r} is a link, which no dataset has; do not use it")
                if member.is_dir():
                    target.mkdir(parents=True, exist_ok=True)
                else:
                    _write(archive.open(member), target)
                bar.update(member.file_size)


def _target(folder: Path, name: str, path: Path) -> Path:
    """Return the path of member `name` below `folder`; raise DatasetError if it would be elsewhere."""
    parsed = PureWindowsPath(name)  # recognises both slashes, drives and roots
    if parsed.anchor or ".." in parsed.parts:
        raise DatasetError(f"{path}: the member {name!r} would leave the target folder; do not use this archive")
    return folder.joinpath(*parsed.parts)


def _write(source: BinaryIO, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)


def check_space(name: str, folder: Path, gigabytes: float) -> None:
    """Raise DatasetError if the disk of `folder`, which need not exist yet, has less than `gigabytes` (10^9 bytes)."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    if free < gigabytes:
        raise DatasetError(
            f"{name} needs about {gigabytes:.1f} GB in {folder}, but {free:.1f} GB are free; free some space there or "
            "give another --root_path"
        )


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the errors of a broken archive into a DatasetError. gzip's own error is an OSError without a number."""
    try:
        yield
    except (*_BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DatasetError(f"archive {path} is damaged or incomplete ({error}); delete it and run again") from error
    except _UNREADABLE as error:
        raise DatasetError(f"archive {path} cannot be read ({error}); unpack it by hand") from error
