"""A server on this machine in place of the datasets' hosts, and a stand-in for Google Drive."""

import dataclasses
import hashlib
import io
import shutil
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gdown
import pytest

from datasets.acquire import download
from datasets.acquire.sources import SOURCES
from datasets.specs import SPECS
from support.fabricate import FOLDERS, SPLIT_FILES, VARIANTS, fabricate, fabricate_variant
from support.runs import call

PAGE = b"<!DOCTYPE html><html><title>Quota exceeded</title></html>"


class Handler(BaseHTTPRequestHandler):
    """A handler that sends what is in `server.files`, in the way that the other attributes of the server say."""

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.requests.append((self.path, asked))
        time.sleep(server.delay)
        content = server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        asked = asked if server.ranges else None
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if start >= len(content):
            self.send_error(416)
            return
        body, cut = content[start:], server.cuts.pop(self.path, server.cut)
        self.send_response(206 if asked else 200)
        if server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif server.tells_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.chunked:
            self.wfile.write(b"%x\r\n" % len(body))
        self.wfile.write(body[:cut])
        if server.chunked and cut is None:
            self.wfile.write(b"\r\n0\r\n\r\n")
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server at `url` that has `files` (path: bytes) and notes the `requests` (path, Range).

    A download breaks after `cut` bytes, or once after `cuts` (path: bytes).
    """
    monkeypatch.setenv("no_proxy", "*")  # whatever proxy the machine has
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.requests, server.cuts, server.cut, server.delay = {}, [], {}, None, 0
    server.ranges, server.chunked, server.tells_length = True, False, True
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


class World:
    """What the internet has: `files` (path: bytes), `drive` (id: bytes), `cuts` (path: bytes sent before a break).

    It is empty at first. `requests` are the requested (path, Range), `drive_requests` the ids.
    """

    def __init__(self, server, monkeypatch):
        self.files, self.cuts, self.requests = server.files, server.cuts, server.requests
        self.url, self.monkeypatch = server.url, monkeypatch
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
        source = dataclasses.replace(SOURCES[name], split_sha256=hashlib.sha256(content).hexdigest())
        self.monkeypatch.setitem(SOURCES, name, source)
        path = f"/splits/{SPECS[name].split_file}"
        self.files[path] = content
        if drive is not None:
            self.drive[source.split_drive] = drive
        return path


@pytest.fixture
def world(server, monkeypatch):
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
    return world


def tar_of(folder: Path, inside: str = "", mode: str = "w:gz") -> bytes:
    """Return a tar of the content of `folder`; members' names start with `inside`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for path in sorted(folder.rglob("*")):
            archive.add(path, f"{inside}{path.relative_to(folder)}", recursive=False)
    return buffer.getvalue()


def zip_of(folder: Path, inside: str = "") -> bytes:
    """Return a zip of the content of `folder`; members' names start with `inside`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, f"{inside}{path.relative_to(folder)}")
    return buffer.getvalue()


@pytest.fixture
def data_root(tmp_path, monkeypatch):
    """An empty folder for data; the variants of ImageNet have two classes, to be quick."""
    for name in VARIANTS:
        monkeypatch.setitem(SPECS, name, dataclasses.replace(SPECS[name], classes=2))
    return tmp_path / "data"


@pytest.fixture
def run_download(data_root):
    """Call the program and return (exit code, stdout, stderr)."""

    def run(*names):
        code, result, out, err = call(download.main, *names, "--root_path", data_root)
        return code or result, out, err

    return run


def original(name: str, folder: Path, classes: int = 3) -> tuple[bytes, bytes | None]:
    """Return the archive of a small dataset as its authors pack it, and its split file; `folder` is scratch space."""
    if name in VARIANTS:
        inside = "sketch" if name == "imagenet_sketch" else VARIANTS[name][0].partition("/")[2]
        fabricate_variant(folder, inside, ["7", "10"] if name == "imagenet_v2" else ["n01440764", "n01443537"])
        (folder / inside / "README.txt").write_text("about")
        if name == "imagenet_sketch":
            return zip_of(folder), None
        return tar_of(folder, mode="w:gz" if name == "imagenet_v2" else "w"), None
    images = fabricate(name, folder, classes=classes, per_class=4)
    split_folder = folder / FOLDERS[name]["coop"][0]
    split = None
    if name in SPLIT_FILES:
        split = (split_folder / SPLIT_FILES[name]).read_bytes()
        (split_folder / SPLIT_FILES[name]).unlink()
    if name == "fgvc":
        return tar_of(split_folder, "fgvc-aircraft-2013b/data/"), None
    if name == "food101":
        (split_folder / "meta").mkdir()
        (split_folder / "meta" / "train.json").write_text("{}")
        (split_folder / "license_agreement.txt").write_text("terms")
        return tar_of(folder), split
    if name == "dtd":
        (split_folder / "labels").mkdir()
        (split_folder / "labels" / "train1.txt").write_text("a label\n")
        return tar_of(folder), split
    if name == "caltech101":
        outer = folder / "outer"
        outer.mkdir()
        (outer / "101_ObjectCategories.tar.gz").write_bytes(tar_of(split_folder))
        (outer / "Annotations.tar").write_bytes(tar_of(split_folder / "none", mode="w"))
        return zip_of(outer, "caltech-101/"), split
    if name == "stanford_cars":
        return zip_of(folder), split  # the copy; stanford_cars/cars_train/...
    if name in ("eurosat", "ucf101"):
        return zip_of(images.parent), split
    return tar_of(images.parent), split


def offer(world, name, tmp_path, classes=3) -> tuple[str, bytes, bytes | None]:
    """Put the small dataset on the server; return the path of its archive, the archive and the split file."""
    archive, split = original(name, tmp_path / f"original_{name}", classes)
    if split:
        world.has_split(name, split)
    return world.has_archive(name, archive), archive, split


def snapshot(root: Path) -> dict:
    """Return path -> modification time of everything except locks."""
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.suffix != ".lock"}


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}
