"""Download a file so that it resumes, is verified, and is never there by half. For weights and datasets."""

import http.client
import urllib.error
import urllib.request
from pathlib import Path

from filelock import FileLock

from common import DISK_FULL, UserError, file_digest, progress

CHUNK = 1 << 20


def fetch(url: str, target: Path, checksum: str | None, error: type[UserError] = UserError) -> Path:
    """Return `target`, a file with this checksum; download it from `url` unless it is there already.

    `checksum` is an MD5 (32 hexadecimal digits), a SHA-256 (64), or None if none is known: then only the announced
    length is checked. A download grows in `target`.part, resumes where an earlier one stopped, and gets its real name
    only when it is whole and its checksum right. Processes that want the same file wait for the first of them. Raises
    `error` with the remedy.
    """
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.exists():  # no other process downloaded it while this one waited
                _download_verified(url, target, checksum, error)
    elif not has_checksum(target, checksum):
        raise error(
            f"{target} is damaged or not the original ({_algorithm(checksum)} differs); delete it and run again"
        )
    return target


def _download_verified(url: str, target: Path, checksum: str | None, error: type[UserError]) -> None:
    part = target.with_name(f"{target.name}.part")
    try:
        _download(url, part)
    except (OSError, http.client.HTTPException) as reason:  # URLError is an OSError
        if getattr(reason, "errno", None) in DISK_FULL:
            raise error(f"no space left for {part}; free some space there and run again to resume") from reason
        again = f"run again to resume {part}" if part.exists() else "run again"
        raise error(
            f"could not download {url} ({reason}); {again}, or get the file elsewhere and put it at {target}"
        ) from reason
    if not has_checksum(part, checksum):
        part.unlink()
        raise error(f"the download of {url} arrived damaged ({_algorithm(checksum)} differs); run again")
    part.replace(target)


def _download(url: str, part: Path) -> None:
    """Append to `part` what is missing. If the server ignores the Range header, start from zero."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "few-shot-clip"}  # some hosts reject the default name of Python's client
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left to send; the checksum decides whether it is right
            return
        raise
    with response:
        resumes = response.status == 206
        have = have if resumes else 0
        chunk = response.read(CHUNK)
        if not resumes and is_web_page(chunk):
            raise OSError("the server sent a web page, perhaps a login or a quota; open the address in a browser")
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        bar = progress(None, part.stem, "B", total=total, initial=have, unit_scale=True, leave=True)
        with bar, open(part, "ab" if resumes else "wb") as file:
            while chunk:
                file.write(chunk)
                bar.update(len(chunk))
                chunk = response.read(CHUNK)
            if total is not None and file.tell() < total:
                raise OSError(f"the connection closed after {file.tell()} of {total} bytes")


def is_web_page(start: bytes) -> bool:
    """Return whether a file that starts with these bytes is HTML."""
    return start.removeprefix(b"\xef\xbb\xbf").lstrip()[:15].lower().startswith((b"<!doctype html", b"<html"))


def has_checksum(path: Path, checksum: str | None) -> bool:
    """Return whether a file has this MD5 or SHA-256; with None, which means unknown, every file has."""
    return checksum is None or file_digest(path, _algorithm(checksum).replace("-", "")) == checksum


def _algorithm(checksum: str) -> str:
    return {32: "MD5", 64: "SHA-256"}[len(checksum)]
