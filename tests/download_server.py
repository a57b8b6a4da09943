"""A server on this machine in place of the datasets' hosts, and a stand-in for Google Drive."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import shutil
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gdown
import pytest

from datasets import download
from datasets.sources import SOURCES
from datasets.specs import SPECS

PAGE = b"<!DOCTYPE html><html><title>Quota exceeded</title></html>"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.requests.append((self.path, asked))
        content = server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        cut = server.cuts.pop(self.path, None)
        self.wfile.write(content[start:][:cut])

    def log_message(self, *arguments):
        pass


class World:
    """What the internet has: `files` (path: bytes), `drive` (id: bytes), `cuts` (path: bytes sent before a break).

    Nothing is there at first. `requests` are the (path, Range) asked for, `drive_requests` the ids.
    """

    def __init__(self, server, monkeypatch):
        self.files, self.cuts, self.requests = server.files, server.cuts, server.requests
        self.url, self.monkeypatch = f"http://127.0.0.1:{server.server_port}", monkeypatch
        self.drive, self.drive_requests = {}, []

    def has_archive(self, name: str, content: bytes, which: int = 0, checksum: str | None = "right") -> str:
        """Offer `content` as archive number `which` of a dataset and return its path. "right" is its own checksum."""
        source = SOURCES[name]
        archives = list(source.archives)
        right = hashlib.md5(content).hexdigest() if checksum == "right" else checksum
        archives[which] = dataclasses.replace(archives[which], checksum=right)
        self.monkeypatch.setitem(SOURCES, name, dataclasses.replace(source, archives=tuple(archives)))
        url = archives[which].url
        if url.startswith("drive:"):
            self.drive[url.removeprefix("drive:")] = content
        self.files[url.removeprefix(self.url)] = content
        return url.removeprefix(self.url)

    def has_split(self, name: str, content: bytes, drive: bytes | None = None) -> str:
        """Offer a split file, whose checksum becomes the known one; return its path. `drive` is Google Drive's copy."""
        source = SOURCES[name]
        split = dataclasses.replace(source.split, sha256=hashlib.sha256(content).hexdigest())
        self.monkeypatch.setitem(SOURCES, name, dataclasses.replace(source, split=split))
        path = f"/splits/{SPECS[name].split_file}"
        self.files[path] = content
        if drive is not None:
            self.drive[split.drive] = drive
        return path


@pytest.fixture
def world(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")  # whatever proxy the machine has
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.cuts, server.requests = {}, {}, []
    world = World(server, monkeypatch)
    for name, source in SOURCES.items():
        archives = tuple(
            archive
            if archive.url.startswith("drive:")
            else dataclasses.replace(archive, url=f"{world.url}/{name}/{number}/{archive.file}")
            for number, archive in enumerate(source.archives)
        )
        monkeypatch.setitem(SOURCES, name, dataclasses.replace(source, archives=archives))
    usage = shutil.disk_usage(".")._replace(free=10**12)  # whatever disk the machine has
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(download, "SPLITS", f"{world.url}/splits")

    def drive_download(id, output, resume, timeout):
        world.drive_requests.append(id)
        assert resume
        if id not in world.drive:
            raise gdown.exceptions.FileURLRetrievalError("Cannot retrieve the public link of the file.\n\n\tToo many")
        Path(output).write_bytes(world.drive[id])

    monkeypatch.setattr(gdown, "download", drive_download)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield world
    server.shutdown()
    thread.join()
    server.server_close()


def tar_of(folder: Path, inside: str = "", mode: str = "w:gz") -> bytes:
    """A tar of the content of `folder`, whose members' names start with `inside`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for path in sorted(folder.rglob("*")):
            archive.add(path, f"{inside}{path.relative_to(folder)}", recursive=False)
    return buffer.getvalue()


def zip_of(folder: Path, inside: str = "") -> bytes:
    """A zip of the content of `folder`, whose members' names start with `inside`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, f"{inside}{path.relative_to(folder)}")
    return buffer.getvalue()
