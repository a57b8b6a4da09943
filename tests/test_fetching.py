"""Downloads from a server on this machine that can cut connections, ignore ranges and send rubbish."""

import hashlib
import os
import random
from concurrent.futures import ThreadPoolExecutor

import open_clip
import pytest
from support.runs import error_of
from support.server import Handler

import clip
from clip import download
from clip.download import MODELS, fetch_model
from common import UserError
from fetching import CHUNK, fetch

CONTENT = random.Random(0).randbytes(2 * CHUNK + 12_345)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(server):
    server.files["/model.pt"] = CONTENT
    server.url += "/model.pt"
    return server


def ranges(server):
    """The Range of each request."""
    return [asked for _, asked in server.requests]


@pytest.fixture
def target(tmp_path):
    return tmp_path / "cache" / "clip" / "model.pt"


@pytest.fixture
def part(target):
    target.parent.mkdir(parents=True)
    return target.with_name("model.pt.part")


def fetch_whole(server, target):
    assert fetch(server.url, target, SHA256) == target
    assert target.read_bytes() == CONTENT
    assert set(os.listdir(target.parent)) <= {"model.pt", "model.pt.lock"}


def rejection(url, target, sha256=SHA256) -> str:
    """Return the message of the UserError that fetch raises; it must name the file."""
    message = error_of(UserError, fetch, url, target, sha256)
    assert url in message or str(target) in message
    return message


def test_a_fresh_download_and_none_the_second_time(server, target):
    fetch_whole(server, target)
    fetch_whole(server, target)
    assert ranges(server) == [None]


def test_a_verified_file_needs_neither_lock_nor_folder_to_write_in(server, target, part):
    target.write_bytes(CONTENT)
    fetch(server.url, target, SHA256)
    assert os.listdir(target.parent) == ["model.pt"] and not server.requests


@pytest.mark.parametrize("have", [1, CHUNK, len(CONTENT)])
def test_a_part_is_resumed(server, target, part, have):
    """The beginning is right only in the part, so a download that starts from zero would fail."""
    part.write_bytes(CONTENT[:have])
    server.files["/model.pt"] = b"x" * have + CONTENT[have:]
    fetch_whole(server, target)
    assert ranges(server) == [f"bytes={have}-"]


def test_a_server_that_ignores_ranges(server, target, part):
    server.ranges = False
    part.write_bytes(b"rubbish" * 1000)
    fetch_whole(server, target)


@pytest.mark.parametrize("content", [CONTENT + b"more", b"x" * len(CONTENT), b"rubbish"])
def test_a_wrong_part_is_deleted(server, target, part, content):
    part.write_bytes(content)
    assert "SHA-256 differs" in rejection(server.url, target)
    assert not part.exists() and not target.exists()
    fetch_whole(server, target)  # the remedy in the message


def test_a_wrong_checksum(server, target):
    rejection(server.url, target, "0" * 64)
    assert os.listdir(target.parent) in (["model.pt.lock"], [])


@pytest.mark.parametrize("cut", [0, CHUNK + 7])
def test_a_cut_connection_is_resumed(server, target, cut):
    server.cut, part = cut, target.with_name("model.pt.part")
    assert str(part) in rejection(server.url, target)
    assert part.read_bytes() == CONTENT[:cut] and not target.exists()
    assert f"after {2 * cut} of {len(CONTENT)} bytes" in rejection(server.url, target)  # cut a second time
    server.cut = None
    fetch_whole(server, target)
    assert ranges(server) == [None, *([f"bytes={cut}-", f"bytes={2 * cut}-"] if cut else [None, None])]


def test_without_a_length(server, target):
    server.tells_length = False
    fetch_whole(server, target)


def test_a_cut_chunked_transfer(server, target, monkeypatch):
    monkeypatch.setattr(Handler, "protocol_version", "HTTP/1.1")
    server.chunked, server.cut = True, CHUNK + 7
    rejection(server.url, target)
    assert not target.exists()
    server.cut = None
    fetch_whole(server, target)


def test_no_file_and_no_server(server, target):
    assert "404" in rejection(server.url.replace("model", "other"), target)
    rejection("http://127.0.0.1:1/model.pt", target)
    assert not target.exists()


def test_a_damaged_target_is_not_replaced(server, target, part):
    target.write_bytes(CONTENT[:-1])
    rejection(server.url, target)
    assert target.read_bytes() == CONTENT[:-1] and not server.requests


@pytest.mark.parametrize("page", [b"<!DOCTYPE html>\n<html>", b"\xef\xbb\xbf <HTML lang=en>"])
def test_a_web_page_instead_of_the_file(server, target, part, page):
    server.files["/model.pt"] = page
    assert "sent a web page" in rejection(server.url, target)
    assert set(os.listdir(target.parent)) <= {"model.pt.lock"}
    part.write_bytes(CONTENT[:1000])
    server.ranges = False
    rejection(server.url, target)
    assert part.read_bytes() == CONTENT[:1000]


@pytest.mark.parametrize("checksum", [hashlib.md5(CONTENT).hexdigest(), None])
def test_other_checksums_and_errors(server, target, checksum):
    for _ in range(2):
        assert fetch(server.url, target, checksum, clip.WeightsError).read_bytes() == CONTENT
    assert ranges(server) == [None]
    if checksum:
        target.write_bytes(b"damaged")
        with pytest.raises(clip.WeightsError, match="MD5 differs"):
            fetch(server.url, target, checksum, clip.WeightsError)


def test_many_at_once_make_one_download(server, target):
    server.delay = 0.2
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: fetch_whole(server, target), range(4)))
    assert ranges(server) == [None]


# --- OpenAI's models


def test_addresses_and_checksums_are_open_ais():
    for name, (file, sha256) in MODELS.items():
        known = open_clip.get_pretrained_cfg(name.replace("/", "-").replace("@336px", "-336"), "openai")
        assert known["url"] == f"{download.PREFIX}/{sha256}/{file}"


def test_models_are_fetched_by_name(tmp_path, monkeypatch):
    (tmp_path / "ViT-B-16.pt").write_bytes(b"half a file")
    with pytest.raises(clip.WeightsError, match=r"ViT-B-16\.pt is damaged"):
        clip.load("ViT-B/16", download_root=tmp_path)
    asked = []
    monkeypatch.setattr(download, "fetch", lambda *arguments: asked.append(arguments) or arguments[1])
    assert fetch_model("ViT-L/14@336px", tmp_path) == tmp_path / "ViT-L-14-336px.pt"
    sha256 = MODELS["ViT-L/14@336px"][1]
    url, target = f"{download.PREFIX}/{sha256}/ViT-L-14-336px.pt", tmp_path / "ViT-L-14-336px.pt"
    assert asked == [(url, target, sha256, clip.WeightsError)]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch_model("RN50") == tmp_path / ".cache" / "clip" / "RN50.pt"
