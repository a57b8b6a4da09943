"""OpenAI's nine models: their addresses, and a download that resumes and is verified (of datasets too)."""

import errno
import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from .errors import WeightsError

PREFIX = "https://openaipublic.azureedge.net/clip/models"
MODELS = {  # name: (file, its SHA-256)
    "RN50": ("RN50.pt", "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"),
    "RN101": ("RN101.pt", "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"),
    "RN50x4": ("RN50x4.pt", "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd"),
    "RN50x16": ("RN50x16.pt", "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa"),
    "RN50x64": ("RN50x64.pt", "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c"),
    "ViT-B/32": ("ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16": ("ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14": ("ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L/14@336px": ("ViT-L-14-336px.pt", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
}
CACHE = Path("~/.cache/clip")
CHUNK = 1 << 20


def fetch_model(name: str, folder: str | Path | None = None) -> Path:
    """The verified file of OpenAI's model `name` in `folder` (default ~/.cache/clip), downloaded if need be."""
    file, sha256 = MODELS[name]
    return fetch(f"{PREFIX}/{sha256}/{file}", Path(folder or CACHE).expanduser() / file, sha256)


def fetch(url: str, target: Path, checksum: str | None, error: type[Exception] = WeightsError) -> Path:
    """`target`, whose content has this checksum; downloaded from `url` unless it is there already.

    `checksum` is an MD5 (32 hexadecimal digits) or a SHA-256 (64), or None where none is known: then only the
    announced length is checked. A download grows in `target`.part, goes on where an earlier one stopped, and
    gets its real name only when it is whole and its checksum right; so `target`, if it exists, is never half a
    file. Processes that want the same file wait for the first of them. Raises `error` with the remedy.
    """
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.exists():  # nobody brought it while this process waited
                _download_verified(url, target, checksum, error)
    elif not has_checksum(target, checksum):
        raise error(f"{target} is damaged or not the original ({algorithm(checksum)} differs); delete it and run again")
    return target


def _download_verified(url: str, target: Path, checksum: str | None, error: type[Exception]) -> None:
    part = target.with_name(target.name + ".part")
    try:
        _download(url, part)
    except _WebPageError:
        raise error(
            f"{url} sent a web page instead of the file (a login, a quota or an error page); open it in a browser "
            f"and put the file that it offers at {target}, or run again later"
        ) from None
    except (OSError, http.client.HTTPException) as reason:  # URLError is an OSError
        if isinstance(reason, OSError) and reason.errno in (errno.ENOSPC, errno.EDQUOT):
            raise error(f"no space left for {part}; free space there and run again to go on with it") from reason
        again = f"run again to go on with {part}" if part.exists() else "run again"
        raise error(
            f"could not download {url} ({reason}); {again}, or get the file elsewhere and put it at {target}"
        ) from reason
    if not has_checksum(part, checksum):
        part.unlink()
        raise error(f"the download of {url} arrived damaged ({algorithm(checksum)} differs); run again")
    part.replace(target)


class _WebPageError(Exception):
    """The server sent HTML where a file was asked for."""


def _download(url: str, part: Path) -> None:
    """Appends to `part` what it lacks. A server that ignores the Range header makes it start over."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "few-shot-clip"}  # some hosts refuse the name that Python's own client gives
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left to send; the checksum decides whether it is right
            return
        raise
    with response:
        resumed = response.status == 206
        chunk = response.read(CHUNK)
        if not resumed and is_web_page(chunk):
            raise _WebPageError
        length = response.headers.get("Content-Length")
        total = int(length) + have * resumed if length else None
        bar = tqdm(desc=part.stem, total=total, initial=have * resumed, unit="B", unit_scale=True)
        with bar, open(part, "ab" if resumed else "wb") as file:
            while chunk:
                file.write(chunk)
                bar.update(len(chunk))
                chunk = response.read(CHUNK)
            if total is not None and file.tell() < total:
                raise OSError(f"the connection closed after {file.tell()} of {total} bytes")


def is_web_page(start: bytes) -> bool:
    """Whether a file that starts with these bytes is HTML."""
    return start.removeprefix(b"\xef\xbb\xbf").lstrip()[:15].lower().startswith((b"<!doctype html", b"<html"))


def has_checksum(path: Path, checksum: str | None) -> bool:
    """Whether a file has this MD5 or SHA-256 (None: no checksum is known, any file will do)."""
    return checksum is None or _file_digest(path, algorithm(checksum)) == checksum


def algorithm(checksum: str) -> str:
    """The algorithm of a hexadecimal checksum, told by its length."""
    return {32: "MD5", 64: "SHA-256"}[len(checksum)]


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    return _file_digest(path, "SHA-256")


def _file_digest(path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm.replace("-", ""), usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
