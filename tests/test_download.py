"""python -m datasets.download against a server on this machine: every dataset, and every way in which it can fail."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import gdown
import pytest
from support.fabricate import FOLDERS, SPLIT_FILES, VARIANTS, fabricate, fabricate_variant
from support.server import PAGE, files_in, offer, original, snapshot, tar_of, zip_of

import datasets
from datasets.acquire import archives, download
from datasets.acquire.sources import SOURCES
from datasets.specs import SPECS
from fetching import CHUNK

WITH_SPLIT = sorted(SPLIT_FILES)


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "imagenet"])
def test_every_dataset_comes_into_coops_layout_and_a_second_run_does_nothing(
    world, data_root, run_download, tmp_path, name
):
    path = offer(world, name, tmp_path)
    code, out, err = run_download(name)
    assert code == 0 and f"{name}: ready" in out and "may be deleted" in out, err
    if name in VARIANTS:
        task = datasets.build(name, data_root, shots=None, seed=1)
        assert task.image_root == data_root / VARIANTS[name][0] and len(task.test) == 2
    else:
        task = datasets.build(name, data_root, shots=1, seed=1)
        assert task.image_root == data_root / FOLDERS[name]["coop"][1]
    for item in (*task.train, *task.test):
        task.read(item)
    assert not list(data_root.rglob(".unpacking")) and not list(data_root.rglob("*.part"))
    asked = [asked for asked, _ in world.requests]
    assert asked[-1] == path and len(asked) == 1 + (name in SPLIT_FILES)

    before = snapshot(data_root)
    code, out, err = run_download(name)
    assert code == 0 and f"{name}: ready" in out
    assert len(world.requests) == len(asked) and not world.drive_requests
    assert snapshot(data_root) == before


def test_all_names_all_fifteen_and_one_failure_stops_no_other(world, data_root, run_download, tmp_path):
    for name in ("eurosat", "imagenet_a"):
        offer(world, name, tmp_path)
    code, out, err = run_download("all")
    assert code == 2
    assert [line.partition(":")[0] for line in out.splitlines() if ": ready" in line] == ["eurosat", "imagenet_a"]
    failed = [line for line in err.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[1] for line in failed] == [n for n in SOURCES if n not in ("eurosat", "imagenet_a")]


def test_names_and_sources_are_the_programs_datasets():
    assert set(SOURCES) == set(SPECS)
    for name, source in SOURCES.items():
        assert (source.split is None) == (SPECS[name].split_file is None)


def test_text_beside_the_images_comes_along_and_nothing_else(world, data_root, run_download, tmp_path):
    offer(world, "food101", tmp_path)
    run_download("food101")
    assert files_in(data_root / "food-101") == {
        "images",
        "license_agreement.txt",
        "food-101.tar.gz",
        SPLIT_FILES["food101"],
    }


def test_an_interrupted_download_is_resumed_from_the_same_source(world, data_root, run_download, tmp_path):
    archive, split = original("dtd", tmp_path / "original")
    world.has_split("dtd", split)
    path = world.has_archive("dtd", archive)
    world.cuts[path] = 1000
    code, _, err = run_download("dtd")
    assert code == 2 and "needs your hand" not in err
    part = data_root / "dtd" / "dtd-r1.0.1.tar.gz.part"
    assert part.read_bytes() == archive[:1000]
    assert not (data_root / "dtd" / "images").exists()
    assert [asked for asked, _ in world.requests][-1] == path  # no other source was tried

    world.requests.clear()
    assert run_download("dtd")[0] == 0
    assert world.requests == [(path, "bytes=1000-")]


def test_a_wrong_checksum_deletes_the_part_and_the_next_source_is_taken(world, data_root, run_download, tmp_path):
    archive, split = original("dtd", tmp_path / "original")
    world.has_split("dtd", split)
    first = world.has_archive("dtd", archive[:-5] + b"12345", checksum="0" * 32)
    second = world.has_archive("dtd", archive, which=1)
    code, _, err = run_download("dtd")
    assert code == 0
    assert "arrived damaged (MD5 differs)" in err
    assert [asked for asked, _ in world.requests][-2:] == [first, second]
    assert not (data_root / "dtd" / "dtd-r1.0.1.tar.gz").exists() and not list(data_root.rglob("*.part"))


def test_a_truncated_archive_without_a_checksum(world, data_root, run_download, tmp_path):
    big = tmp_path / "big" / "2750"
    big.mkdir(parents=True)
    for number in range(5):
        (big / f"{number}.jpg").write_bytes(os.urandom(30_000))
    split = world.has_split("eurosat", original("eurosat", tmp_path / "original")[1])
    for content, problem in (
        (tar_of(big.parent)[:100_000], "damaged or cut off"),
        (tar_of(big.parent)[:50], "no readable zip or tar archive (perhaps cut off)"),
        (tar_of(big.parent, mode="w")[:100_000], "damaged or cut off"),
        (zip_of(big.parent)[:100_000], "no readable zip or tar archive (perhaps cut off)"),
    ):
        shutil.rmtree(data_root, ignore_errors=True)
        world.has_archive("eurosat", content, checksum=None)
        code, _, err = run_download("eurosat")
        assert code == 2 and problem in err and str(data_root / "eurosat" / "EuroSAT.zip") in err and "delete it" in err
        assert files_in(data_root / "eurosat") == {"EuroSAT.zip", split.rpartition("/")[2]}


def test_a_file_that_is_no_archive_makes_way_for_the_next_source(world, data_root, run_download, tmp_path):
    archive, split = original("eurosat", tmp_path / "original")
    world.has_split("eurosat", split)
    world.has_archive("eurosat", b"{'error': 'gone'}", checksum=None)
    world.has_archive("eurosat", archive, which=1, checksum=None)
    code, _, err = run_download("eurosat")
    assert code == 0 and "EuroSAT.zip is no readable zip or tar archive" in err


@pytest.mark.parametrize("page", [PAGE, b"\xef\xbb\xbf\n  <HTML><body>Sign in</body></HTML>"])
def test_a_web_page_instead_of_an_archive(world, data_root, run_download, tmp_path, page):
    offer(world, "eurosat", tmp_path)
    world.has_archive("eurosat", page, checksum=None)
    code, _, err = run_download("eurosat")
    assert code == 2
    assert "sent a web page instead of the file" in err and "open it in a browser" in err
    assert "eurosat needs your hand" in err and str(data_root / "eurosat") in err
    assert files_in(data_root / "eurosat") == {SPLIT_FILES["eurosat"]}


def test_a_web_page_does_not_harm_what_has_come(world, data_root, run_download, tmp_path):
    archive, split = original("dtd", tmp_path / "original")
    world.has_split("dtd", split)
    path = world.has_archive("dtd", archive)
    world.cuts[path] = 1000
    run_download("dtd")
    world.monkeypatch.setattr("support.server.Handler.do_GET", lambda handler: _send(handler, PAGE))
    assert run_download("dtd")[0] == 2
    assert (data_root / "dtd" / "dtd-r1.0.1.tar.gz.part").read_bytes() == archive[:1000]


def _send(handler, content):
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(content)


def test_google_drive_comes_last_and_its_refusal_is_one_line(world, data_root, run_download, tmp_path):
    archive, split = original("ucf101", tmp_path / "original")
    world.has_split("ucf101", split)
    code, _, err = run_download("ucf101")
    assert code == 2 and len(world.drive_requests) == 1
    line = next(line for line in err.splitlines() if "Google Drive did not give" in line)
    assert "Cannot retrieve the public link of the file. Too many" in line
    assert "in a browser" in line and str(data_root / "ucf101" / "UCF-101-midframes.zip") in line

    world.has_archive("ucf101", PAGE, which=1, checksum=None)
    code, _, err = run_download("ucf101")
    assert code == 2 and "Google Drive sent a web page (a quota or a virus scan)" in err
    assert files_in(data_root / "ucf101") == {SPLIT_FILES["ucf101"]}

    world.has_archive("ucf101", archive, which=1, checksum=None)
    assert run_download("ucf101")[0] == 0


def test_without_gdown(world, data_root, run_download, tmp_path):
    world.monkeypatch.setitem(sys.modules, "gdown", None)
    code, _, err = run_download("ucf101")
    assert code == 2 and "need the package gdown; pip install" in err


def test_the_split_comes_from_drive_if_the_first_copy_is_gone_or_damaged(world, data_root, run_download, tmp_path):
    archive, split = original("eurosat", tmp_path / "original")
    world.has_archive("eurosat", archive)
    path = world.has_split("eurosat", split, drive=split)
    for wrong in (None, split[:-1], PAGE, json.dumps(json.loads(split)).encode() + b" "):
        shutil.rmtree(data_root, ignore_errors=True)
        world.drive_requests.clear()
        world.files[path] = wrong
        assert run_download("eurosat")[0] == 0
        assert world.drive_requests == [SOURCES["eurosat"].split.drive]
        assert (data_root / "eurosat" / SPLIT_FILES["eurosat"]).read_bytes() == split
        assert not list(data_root.rglob("*.new")) and not list(data_root.rglob("*.part"))


def other_bytes(split: bytes) -> bytes:
    return json.dumps(json.loads(split), indent=1).encode()


def has_published_numbers(world, name, split: bytes) -> None:
    """Make the numbers and class names of this small split the published ones."""
    parts = json.loads(split)
    sizes = tuple(len(parts[part]) for part in ("train", "val", "test"))
    names = hashlib.sha256(b"kind_0\nkind_1\nkind_2").hexdigest()
    spec = dataclasses.replace(SPECS[name], classes=3, sizes=sizes, names_sha256=names)
    world.monkeypatch.setitem(SPECS, name, spec)


@pytest.mark.parametrize("name", ["eurosat", "food101"])
def test_another_copy_of_a_split_is_judged_by_its_content(world, data_root, run_download, tmp_path, name):
    """Drive's copies may differ in their bytes, and so may those two whose checksum was only reported."""
    archive, split = original(name, tmp_path / "original")
    world.has_archive(name, archive)
    path = world.has_split(name, split, drive=other_bytes(split))
    world.files[path] = other_bytes(split)
    folder = data_root / FOLDERS[name]["coop"][0]
    code, _, err = run_download(name)
    assert code == 2 and "these are not the published" in err
    assert "images" in files_in(folder) or "2750" in files_in(folder)
    assert not any(file.startswith("split") for file in files_in(folder))

    has_published_numbers(world, name, split)
    fewer = json.loads(split)
    fewer["test"].pop()
    for wrong in (other_bytes(split).replace(b"kind_2", b"kind_3"), json.dumps(fewer).encode()):
        world.files[path] = world.drive[SOURCES[name].split.drive] = wrong
        assert "or have other names" in run_download(name)[2]
    world.files[path] = world.drive[SOURCES[name].split.drive] = other_bytes(split)
    world.drive_requests.clear()
    code, out, _ = run_download(name)
    assert code == 0 and "but other bytes than the known copy" in out
    assert world.drive_requests == ([SOURCES[name].split.drive] if name == "eurosat" else [])


def test_splits_known_by_checksum_are_the_published_ones():
    """The nine checksums, written down a second time; the last two were reported of copies elsewhere."""
    starts = "52ce8320 d7f3ffe6 40acee7a 2f50c42f f26ebecc 541503a7 d78cb834 7c3d456c 9847f9ef".split()
    names = "caltech101 oxford_pets stanford_cars oxford_flowers dtd eurosat ucf101 food101 sun397".split()
    splits = {name: SOURCES[name].split for name in names}
    assert [split.sha256[:8] for split in splits.values()] == starts
    assert [name for name, split in splits.items() if split.reported] == ["food101", "sun397"]
    assert all(len(split.sha256) == 64 for split in splits.values())


@pytest.mark.parametrize("layout", ["coop", "released", "torchvision"])
@pytest.mark.parametrize("name", WITH_SPLIT)
def test_images_that_lie_there_are_used_and_only_the_split_is_fetched(world, data_root, run_download, name, layout):
    images = fabricate(name, data_root, layout)
    split_file = data_root / FOLDERS[name][layout][0] / SPLIT_FILES[name]
    split = split_file.read_bytes()
    split_file.unlink()
    path = world.has_split(name, split)
    code, out, err = run_download(name)
    assert code == 0, err
    assert world.requests == [(path, None)]
    assert str(images) in out
    assert len(list(data_root.rglob(SPLIT_FILES[name]))) == 1
    assert datasets.build(name, data_root, shots=1, seed=1).image_root == images


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_left_where_they_were_unpacked_are_used(world, data_root, run_download, name):
    for image_root in VARIANTS[name]:
        shutil.rmtree(data_root, ignore_errors=True)
        fabricate_variant(data_root, image_root, ["n01440764", "n01443537"])
        code, out, _ = run_download(name)
        assert code == 0 and f"2 images in {data_root / image_root}" in out
    assert not world.requests


@pytest.mark.parametrize("layout", ["coop", "released", "torchvision"])
@pytest.mark.parametrize("name", ["fgvc", "imagenet", "dtd"])
def test_a_complete_dataset_is_left_alone_even_where_nothing_may_be_written(
    world, data_root, run_download, name, layout
):
    fabricate(name, data_root, layout, per_class=4 if name != "imagenet" else 1)
    before = snapshot(data_root)
    for folder in [data_root, *data_root.glob("*/")]:
        folder.chmod(0o555)
    code, out, err = run_download(name)
    for folder in [data_root, *data_root.glob("*/")]:
        folder.chmod(0o755)
    assert code == 0 and "ready" in out, err
    assert not world.requests and snapshot(data_root) == before
    assert not list(data_root.rglob("*.lock"))


def test_absent_images_are_named_and_nothing_is_touched(world, data_root, run_download):
    images = fabricate("dtd", data_root)
    victim = sorted(images.rglob("*.jpg"))[3]
    victim.unlink()
    code, _, err = run_download("dtd")
    assert code == 2 and not world.requests
    assert f"image {victim} of dtd cannot be found" in err and f"move {images} away and run again" in err
    shutil.rmtree(images / victim.parent.name)
    assert "and 7 more of dtd" in run_download("dtd")[2]
    assert not world.requests


def test_space_is_checked_before_anything_is_asked_for(world, data_root, run_download, tmp_path):
    path = offer(world, "food101", tmp_path)
    free = 9.9e9
    usage = shutil.disk_usage(tmp_path)
    world.monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=free))
    code, _, err = run_download("food101")
    assert code == 2 and path not in dict(world.requests)
    assert f"food101 needs about 10.0 GB in {data_root / 'food-101'}, and 9.9 GB are free" in err
    free = 10.1e9
    assert run_download("food101")[0] == 0


def test_what_has_come_already_needs_no_space_again(world, data_root, run_download, tmp_path):
    offer(world, "food101", tmp_path)
    (data_root / "food-101").mkdir(parents=True)
    with open(data_root / "food-101" / "food-101.tar.gz.part", "wb") as part:
        part.truncate(10_000_000)
    usage = shutil.disk_usage(tmp_path)
    world.monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=9.995e9))
    _, _, err = run_download("food101")
    assert "needs about" not in err


def test_a_disk_that_fills_up_while_downloading(world, data_root, run_download, tmp_path):
    archive, split = original("dtd", tmp_path / "original")
    world.has_split("dtd", split)
    path = world.has_archive("dtd", archive + b"x" * 3 * CHUNK)

    class Full:
        """A file on a disk that has space for one chunk."""

        def __init__(self, file):
            self.file, self.left = file, 1

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def write(self, chunk):
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.left -= 1
            return self.file.write(chunk)

        def tell(self):
            return self.file.tell()

    def full_open(file, mode):
        opened = open(file, mode)  # noqa: SIM115, its caller closes it
        return Full(opened) if str(file).endswith("tar.gz.part") and mode in ("ab", "wb") else opened

    with world.monkeypatch.context() as patch:
        patch.setattr("fetching.open", full_open, raising=False)
        code, _, err = run_download("dtd")
    assert code == 2 and "no space left for" in err
    assert len([asked for asked, _ in world.requests if asked.startswith("/dtd")]) == 1
    assert (data_root / "dtd" / "dtd-r1.0.1.tar.gz.part").stat().st_size == CHUNK
    run_download("dtd")
    assert world.requests[-1] == (path, f"bytes={CHUNK}-")


def test_a_disk_that_fills_up_while_unpacking(world, data_root, run_download, tmp_path):
    offer(world, "dtd", tmp_path)
    copied = []

    def full(source, target, length=0):
        copied.append(target.name)
        if len(copied) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        target.write(source.read())

    with world.monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        code, _, err = run_download("dtd")
    assert code == 2 and "error: dtd: no space left" in err and "Traceback" not in err
    assert not (data_root / "dtd" / "images").exists() and not list(data_root.rglob(".unpacking"))
    world.requests.clear()
    assert run_download("dtd")[0] == 0
    assert not world.requests  # the archive is there


def test_an_interrupted_unpacking_starts_again(world, data_root, run_download, tmp_path, capsys):
    offer(world, "dtd", tmp_path)
    copied = []

    def interrupted(source, target, length=0):
        copied.append(target.name)
        if len(copied) == 5:
            raise KeyboardInterrupt
        target.write(source.read())

    with world.monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", interrupted)
        patch.setattr(shutil, "rmtree", lambda *arguments, **options: None)  # as if it had been killed
        code, _, err = run_download("dtd")
    assert code == 130 and "the same command goes on from there" in err
    assert not (data_root / "dtd" / "images").exists()
    left = data_root / "dtd" / ".unpacking"
    assert len([path for path in left.rglob("*") if path.is_file()]) == 5
    (left / "dtd" / "images" / "stale").mkdir()
    assert run_download("dtd")[0] == 0
    assert not left.exists() and not (data_root / "dtd" / "images" / "stale").exists()


def test_processes_that_want_the_same_dataset_make_one_download(world, data_root, tmp_path):
    path = offer(world, "eurosat", tmp_path)
    start, states, unpacked, unpack = threading.Barrier(4), [], [], archives.unpack

    def slow_unpack(archive, folder):
        unpacked.append(archive)
        time.sleep(0.1)
        unpack(archive, folder)

    world.monkeypatch.setattr("datasets.acquire.arrange.unpack", slow_unpack)

    def work():
        start.wait()
        states.append(download.prepare("eurosat", data_root))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(states) == 4 and len(set(states)) == 1
    assert [asked for asked, _ in world.requests].count(path) == 1 and len(unpacked) == 1


def test_a_folder_that_may_not_be_written(world, data_root, run_download):
    data_root.mkdir()
    world.monkeypatch.setattr(
        Path, "mkdir", lambda *arguments, **options: os.open(data_root / "no" / "file", os.O_RDONLY)
    )
    code, _, err = run_download("dtd")
    assert code == 2 and err.startswith("error: dtd: ") and "Traceback" not in err


def test_mistakes_on_the_command_line(capsys):
    for arguments in (["dtd"], ["--root_path", "x"], ["food", "--root_path", "x"]):
        with pytest.raises(SystemExit) as stop:
            download.main(arguments)
        assert stop.value.code == 2
    assert "invalid choice: 'food'" in capsys.readouterr().err


def test_gdown_knows_the_call_that_the_stand_in_takes(tmp_path, monkeypatch):
    """The real function, stopped before it asks the network: arguments and error type are as assumed."""
    import requests

    def refuse(*arguments, **options):
        raise requests.exceptions.ConnectionError("no network in tests")

    monkeypatch.setattr(requests.Session, "get", refuse)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert issubclass(gdown.exceptions.FileURLRetrievalError, gdown.DownloadError)
    with pytest.raises(datasets.DatasetError, match=r"Google Drive did not give .*no network in tests"):
        download.fetch_from_drive("some-id", tmp_path / "x" / "file.zip")
