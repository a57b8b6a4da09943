"""Downloads, from a server on this machine that can cut connections, ignore ranges and send rubbish."""

import hashlib
import os
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import open_clip
import pytest

import clip
from clip import download
from clip.download import MODELS, fetch_model
from common import UserError
from fetching import CHUNK, fetch

CONTENT = random.Random(0).randbytes(2 * CHUNK + 12_345)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Sends `server.content`, as the server's flags say."""

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.requests.append(asked)
        time.sleep(server.delay)
        if self.path != "/model.pt":
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        if start >= len(server.content):
            self.send_error(416)
            return
        body = server.content[start:]
        self.send_response(206 if asked and server.ranges else 200)
        if server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif server.tells_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.chunked:
            self.wfile.write(b"%x\r\n" % len(body))
        self.wfile.write(body[: server.cut])
        if server.chunked and server.cut is None:
            self.wfile.write(b"\r\n0\r\n\r\n")
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")  # whatever proxy the machine has
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.ranges, server.cut, server.delay = CONTENT, True, None, 0
    server.chunked, server.tells_length, server.requests = False, True, []
    server.url = f"http://127.0.0.1:{server.server_port}/model.pt"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def chunked(server, monkeypatch):
    monkeypatch.setattr(Handler, "protocol_version", "HTTP/1.1")
    server.chunked = True


@pytest.fixture
def target(tmp_path):
    return tmp_path / "cache" / "clip" / "model.pt"


@pytest.fixture
def part(target):
    target.parent.mkdir(parents=True)
    return target.with_name("model.pt.part")


def assert_complete(target):
    assert target.read_bytes() == CONTENT
    assert set(os.listdir(target.parent)) <= {"model.pt", "model.pt.lock"}


def error_of(url, target, sha256=SHA256) -> str:
    """The message of the UserError that fetch raises; it must be one line."""
    with pytest.raises(UserError) as caught:
        fetch(url, target, sha256)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_fresh_download_and_none_the_second_time(server, target):
    assert fetch(server.url, target, SHA256) == target
    assert_complete(target)
    assert fetch(server.url, target, SHA256) == target
    assert server.requests == [None]


def test_a_verified_file_needs_neither_lock_nor_folder_to_write_in(server, target, part):
    target.write_bytes(CONTENT)
    fetch(server.url, target, SHA256)
    assert os.listdir(target.parent) == ["model.pt"]
    assert server.requests == []


@pytest.mark.parametrize("have", [1, CHUNK, len(CONTENT) - 1])
def test_a_part_is_resumed(server, target, part, have):
    part.write_bytes(CONTENT[:have])
    fetch(server.url, target, SHA256)
    assert_complete(target)
    assert server.requests == [f"bytes={have}-"]


def test_resumed_bytes_come_from_the_part(server, target, part):
    """The first half is right only in the part, so a download that started over would fail."""
    part.write_bytes(CONTENT[:CHUNK])
    server.content = b"x" * CHUNK + CONTENT[CHUNK:]
    fetch(server.url, target, SHA256)
    assert_complete(target)


def test_a_server_that_ignores_ranges(server, target, part):
    server.ranges = False
    part.write_bytes(b"rubbish" * 1000)
    fetch(server.url, target, SHA256)
    assert_complete(target)


def test_a_complete_part(server, target, part):
    part.write_bytes(CONTENT)
    fetch(server.url, target, SHA256)
    assert_complete(target)
    assert server.requests == [f"bytes={len(CONTENT)}-"]


@pytest.mark.parametrize("content", [CONTENT + b"more", b"x" * len(CONTENT), b"rubbish"])
def test_a_wrong_part_is_deleted(server, target, part, content):
    part.write_bytes(content)
    assert "SHA-256 differs" in error_of(server.url, target)
    assert not part.exists() and not target.exists()
    fetch(server.url, target, SHA256)  # the remedy that the message names
    assert_complete(target)


def test_a_wrong_checksum(server, target):
    message = error_of(server.url, target, "0" * 64)
    assert server.url in message and "run again" in message
    assert os.listdir(target.parent) in (["model.pt.lock"], [])


@pytest.mark.parametrize("cut", [0, 1000, CHUNK + 7])
def test_a_cut_connection_and_going_on(server, target, cut):
    server.cut = cut
    message = error_of(server.url, target)
    part = target.with_name("model.pt.part")
    assert all(words in message for words in (server.url, "run again", str(part), str(target)))
    assert f"after {cut} of {len(CONTENT)} bytes" in message
    assert part.read_bytes() == CONTENT[:cut] and not target.exists()

    message = error_of(server.url, target)  # cut a second time, after as many bytes more
    assert f"after {2 * cut} of {len(CONTENT)} bytes" in message
    server.cut = None
    fetch(server.url, target, SHA256)
    assert_complete(target)
    assert server.requests == [None, *([f"bytes={cut}-", f"bytes={2 * cut}-"] if cut else [None, None])]


def test_without_a_length(server, target):
    server.tells_length = False
    fetch(server.url, target, SHA256)
    assert_complete(target)


def test_chunked_transfer_and_its_cut(server, chunked, target):
    server.cut = CHUNK + 7
    assert "run again" in error_of(server.url, target)
    assert not target.exists()
    server.cut = None
    fetch(server.url, target, SHA256)
    assert_complete(target)


def test_no_file_and_no_server(server, target):
    url = server.url.replace("model", "other")
    assert "404" in error_of(url, target) and not target.exists()
    message = error_of("http://127.0.0.1:1/model.pt", target)
    assert "could not download" in message and str(target) in message


def test_a_damaged_target(server, target, part):
    target.write_bytes(CONTENT[:-1])
    message = error_of(server.url, target)
    assert str(target) in message and "delete it" in message
    assert target.read_bytes() == CONTENT[:-1] and server.requests == []
    target.unlink()
    fetch(server.url, target, SHA256)
    assert_complete(target)


@pytest.mark.parametrize("page", [b"<!DOCTYPE html>\n<html>", b"\xef\xbb\xbf <HTML lang=en>"])
def test_a_web_page_instead_of_the_file(server, target, part, page):
    """It is told, and what has come before is kept."""
    server.content = page
    message = error_of(server.url, target)
    assert "sent a web page" in message and "in a browser" in message and str(target) in message
    assert set(os.listdir(target.parent)) <= {"model.pt.lock"}
    part.write_bytes(CONTENT[:1000])
    server.ranges = False
    error_of(server.url, target)
    assert part.read_bytes() == CONTENT[:1000]


@pytest.mark.parametrize("checksum", [hashlib.md5(CONTENT).hexdigest(), None])
def test_other_checksums_and_errors(server, target, checksum):
    fetch(server.url, target, checksum, KeyError)
    assert_complete(target)
    fetch(server.url, target, checksum, KeyError)
    assert server.requests == [None]
    if checksum:
        target.write_bytes(b"damaged")
        with pytest.raises(KeyError, match="MD5 differs"):
            fetch(server.url, target, checksum, KeyError)


def test_many_at_once_make_one_download(server, target):
    server.delay = 0.2
    start, results = threading.Barrier(4), []

    def run():
        start.wait()
        results.append(fetch(server.url, target, SHA256).read_bytes() == CONTENT)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4
    assert server.requests == [None]
    assert_complete(target)


def test_addresses_and_checksums_are_open_ais():
    for name, (file, sha256) in MODELS.items():
        known = open_clip.get_pretrained_cfg(name.replace("/", "-").replace("@336px", "-336"), "openai")
        assert known["url"] == f"{download.PREFIX}/{sha256}/{file}"


def test_models_are_fetched_by_name(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(download, "fetch", lambda *arguments: asked.append(arguments) or arguments[1])
    assert fetch_model("ViT-L/14@336px", tmp_path) == tmp_path / "ViT-L-14-336px.pt"
    sha256 = MODELS["ViT-L/14@336px"][1]
    url, target = f"{download.PREFIX}/{sha256}/ViT-L-14-336px.pt", tmp_path / "ViT-L-14-336px.pt"
    assert asked == [(url, target, sha256, clip.WeightsError)]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch_model("RN50") == tmp_path / ".cache" / "clip" / "RN50.pt"


def test_load_takes_download_root_and_refuses_a_damaged_file(tmp_path):
    (tmp_path / "ViT-B-16.pt").write_bytes(b"half a file")
    with pytest.raises(clip.WeightsError, match=r"ViT-B-16\.pt is damaged"):
        clip.load("ViT-B/16", download_root=tmp_path)
