"""python -m datasets.download against a server on this machine: every dataset, and every way in which it can fail."""

import dataclasses
import errno
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gdown
import pytest
from support.fabricate import FOLDERS, SPLIT_FILES, VARIANTS, fabricate, fabricate_variant
from support.runs import call
from support.server import PAGE, files_in, offer, original, snapshot, tar_of, zip_of

import datasets
from common import progress
from datasets.acquire import archives, doctor, download
from datasets.acquire.sources import SOURCES
from datasets.specs import SPECS
from fetching import CHUNK


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "imagenet"])
def test_every_dataset_comes_into_coops_layout_and_a_second_run_does_nothing(
    world, data_root, run_download, tmp_path, name
):
    path, _, _ = offer(world, name, tmp_path)
    code, out, err = run_download(name)
    assert code == 0 and f"{name}: ready" in out and "may be deleted" in out, err
    place = VARIANTS[name][0] if name in VARIANTS else FOLDERS[name]["coop"][1]
    task = datasets.build(name, data_root, shots=None if name in VARIANTS else 1, seed=1)
    assert task.image_root == data_root / place
    for item in (*task.train, *task.test):
        task.read(item)
    assert not list(data_root.rglob(".unpacking")) and not list(data_root.rglob("*.part"))
    asked = [asked for asked, _ in world.requests]
    assert asked[-1] == path and len(asked) == 1 + (name in SPLIT_FILES)
    if name == "food101":  # text beside the images comes along, and nothing else
        archive, terms = "food-101.tar.gz", "license_agreement.txt"
        assert files_in(data_root / "food-101") == {"images", terms, archive, SPLIT_FILES[name]}

    before = snapshot(data_root)
    code, out, err = run_download(name)
    assert code == 0 and f"{name}: ready" in out and snapshot(data_root) == before
    assert len(world.requests) == len(asked) and not world.drive_requests


def test_all_names_all_fifteen_and_one_failure_stops_no_other(world, data_root, run_download, tmp_path):
    for name in ("eurosat", "imagenet_a"):
        offer(world, name, tmp_path)
    code, out, err = run_download("all")
    assert code == 2
    assert [line.partition(":")[0] for line in out.splitlines() if ": ready" in line] == ["eurosat", "imagenet_a"]
    failed = [line for line in err.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[1] for line in failed] == [n for n in SOURCES if n not in ("eurosat", "imagenet_a")]


def test_the_names_and_which_have_a_split():
    assert set(SOURCES) == set(SPECS)
    assert all(bool(source.split_sha256) == bool(SPECS[name].split_file) for name, source in SOURCES.items())
    assert {name for name, source in SOURCES.items() if source.split_reported} == {"food101", "sun397"}


def test_an_interrupted_download_is_resumed_from_the_same_source(world, data_root, run_download, tmp_path):
    path, archive, _ = offer(world, "dtd", tmp_path)
    world.cuts[path] = 1000
    code, _, err = run_download("dtd")
    part = data_root / "dtd" / "dtd-r1.0.1.tar.gz.part"
    assert code == 2 and str(part) in err and "by hand" not in err
    assert part.read_bytes() == archive[:1000] and not (data_root / "dtd" / "images").exists()
    assert [asked for asked, _ in world.requests][-1] == path  # no other source was tried
    world.requests.clear()
    assert run_download("dtd")[0] == 0
    assert world.requests == [(path, "bytes=1000-")]


def test_a_wrong_checksum_deletes_the_part_and_the_next_source_is_used(world, data_root, run_download, tmp_path):
    _, archive, _ = offer(world, "dtd", tmp_path)
    first = world.has_archive("dtd", archive[:-5] + b"12345", checksum="0" * 32)
    second = world.has_archive("dtd", archive, which=1)
    code, _, err = run_download("dtd")
    assert code == 0 and "MD5 differs" in err
    assert [asked for asked, _ in world.requests][-2:] == [first, second]
    assert not (data_root / "dtd" / "dtd-r1.0.1.tar.gz").exists() and not list(data_root.rglob("*.part"))


def test_a_truncated_archive_without_a_checksum(world, data_root, run_download, tmp_path):
    big = tmp_path / "big" / "2750"
    big.mkdir(parents=True)
    for number in range(5):
        (big / f"{number}.jpg").write_bytes(os.urandom(30_000))
    split = world.has_split("eurosat", original("eurosat", tmp_path / "original")[1])
    for content, problem in (
        (tar_of(big.parent)[:100_000], "damaged or incomplete"),
        (tar_of(big.parent)[:50], "not a readable zip or tar archive"),
        (tar_of(big.parent, mode="w")[:100_000], "damaged or incomplete"),
        (zip_of(big.parent)[:100_000], "not a readable zip or tar archive"),
    ):
        shutil.rmtree(data_root, ignore_errors=True)
        world.has_archive("eurosat", content, checksum=None)
        code, _, err = run_download("eurosat")
        assert code == 2 and problem in err and str(data_root / "eurosat" / "EuroSAT.zip") in err
        assert files_in(data_root / "eurosat") == {"EuroSAT.zip", split.rpartition("/")[2]}


def test_web_pages_and_other_files_that_are_not_archives(world, data_root, run_download, tmp_path):
    _, archive, _ = offer(world, "eurosat", tmp_path)
    for page in (PAGE, b"\xef\xbb\xbf\n  <HTML><body>Sign in</body></HTML>"):
        world.has_archive("eurosat", page, checksum=None)
        code, _, err = run_download("eurosat")
        assert code == 2 and "sent a web page" in err and "by hand" in err and str(data_root / "eurosat") in err
        assert files_in(data_root / "eurosat") == {SPLIT_FILES["eurosat"]}
    world.has_archive("eurosat", b"{'error': 'gone'}", checksum=None)
    world.has_archive("eurosat", archive, which=1, checksum=None)
    code, _, err = run_download("eurosat")  # the next source is used
    assert code == 0 and "EuroSAT.zip is not a readable" in err


def test_google_drive_comes_last_and_its_rejection_is_one_line(world, data_root, run_download, tmp_path):
    archive, split = original("ucf101", tmp_path / "original")
    world.has_split("ucf101", split)
    code, _, err = run_download("ucf101")
    assert code == 2 and len(world.drive_requests) == 1
    line = next(line for line in err.splitlines() if "Google Drive" in line)
    assert "Cannot retrieve the public link of the file. Too many" in line
    assert str(data_root / "ucf101" / "UCF-101-midframes.zip") in line

    world.has_archive("ucf101", PAGE, which=1, checksum=None)
    code, _, err = run_download("ucf101")
    assert code == 2 and "Google Drive sent a web page" in err
    assert files_in(data_root / "ucf101") == {SPLIT_FILES["ucf101"]}

    world.has_archive("ucf101", archive, which=1, checksum=None)
    assert run_download("ucf101")[0] == 0
    shutil.rmtree(data_root)
    world.monkeypatch.setitem(sys.modules, "gdown", None)
    code, _, err = run_download("ucf101")
    assert code == 2 and "pip install" in err


def test_the_split_comes_from_drive_if_the_first_copy_is_gone_or_damaged(world, data_root, run_download, tmp_path):
    archive, split = original("eurosat", tmp_path / "original")
    world.has_archive("eurosat", archive)
    path = world.has_split("eurosat", split, drive=split)
    for wrong in (None, split[:-1], PAGE, json.dumps(json.loads(split)).encode() + b" "):
        (data_root / "eurosat" / SPLIT_FILES["eurosat"]).unlink(missing_ok=True)
        world.drive_requests.clear()
        world.files[path] = wrong
        assert run_download("eurosat")[0] == 0
        assert world.drive_requests == [SOURCES["eurosat"].split_drive]
        assert (data_root / "eurosat" / SPLIT_FILES["eurosat"]).read_bytes() == split
        assert not list(data_root.rglob("*.new")) and not list(data_root.rglob("*.part"))


@pytest.mark.parametrize("name", ["eurosat", "food101"])
def test_another_copy_of_a_split_is_judged_by_its_content(world, data_root, run_download, tmp_path, name):
    """Drive's copies may differ in their bytes, and so may those two whose checksum was only reported."""
    archive, split = original(name, tmp_path / "original")
    other_bytes = json.dumps(json.loads(split), indent=1).encode()
    world.has_archive(name, archive)
    path = world.has_split(name, split)
    drive = SOURCES[name].split_drive
    world.files[path] = world.drive[drive] = other_bytes
    code, _, err = run_download(name)
    assert code == 2 and f"the published split has {SPECS[name].classes}" in err
    files = files_in(data_root / FOLDERS[name]["coop"][0])
    assert files & {"images", "2750"} and not any(file.startswith("split") for file in files)

    names = hashlib.sha256(b"kind_0\nkind_1\nkind_2").hexdigest()
    published = dataclasses.replace(SPECS[name], classes=3, sizes=(6, 3, 3), names_sha256=names)
    world.monkeypatch.setitem(SPECS, name, published)
    fewer = json.loads(split)
    fewer["test"].pop()
    for wrong in (other_bytes.replace(b"kind_2", b"kind_3"), json.dumps(fewer).encode()):
        world.files[path] = world.drive[drive] = wrong
        assert run_download(name)[0] == 2
    world.files[path] = world.drive[drive] = other_bytes
    world.drive_requests.clear()
    code, _, err = run_download(name)
    assert code == 0 and "other bytes than the known copy" in err
    assert world.drive_requests == ([drive] if name == "eurosat" else [])


@pytest.mark.parametrize("name", SPLIT_FILES)
def test_images_that_exist_are_used_and_only_the_split_is_downloaded(world, data_root, run_download, name):
    for layout in ("coop", "released", "torchvision"):
        shutil.rmtree(data_root, ignore_errors=True)
        world.requests.clear()
        images = fabricate(name, data_root, layout, per_class=4)
        split_file = data_root / FOLDERS[name][layout][0] / SPLIT_FILES[name]
        path = world.has_split(name, split_file.read_bytes())
        split_file.unlink()
        code, out, err = run_download(name)
        assert code == 0 and str(images) in out, err
        assert world.requests == [(path, None)] and len(list(data_root.rglob(SPLIT_FILES[name]))) == 1
        assert datasets.build(name, data_root, shots=1, seed=1).image_root == images


COMPLETE = list(itertools.product(("fgvc", "imagenet", "dtd"), ("coop", "released", "torchvision")))
COMPLETE += [(name, place) for name, places in VARIANTS.items() for place in places]


@pytest.mark.parametrize(("name", "layout"), COMPLETE)
def test_a_complete_dataset_is_not_touched_even_if_nothing_may_be_written(
    few_imagenet_classes, world, data_root, run_download, name, layout
):
    if name in VARIANTS:
        images = fabricate_variant(data_root, layout, ["n01440764", "n01443537"])
    else:
        images = fabricate(name, data_root, layout, per_class=4)
    before = snapshot(data_root)
    folders = [data_root, *data_root.glob("*/")]
    for folder in folders:
        folder.chmod(0o555)
    code, out, err = run_download(name)
    for folder in folders:
        folder.chmod(0o755)
    assert code == 0 and "ready" in out and str(images) in out, err
    assert not world.requests and snapshot(data_root) == before and not list(data_root.rglob("*.lock"))


def test_absent_images_are_named_and_nothing_is_touched(world, data_root, run_download):
    images = fabricate("dtd", data_root, per_class=4)
    victim = sorted(images.rglob("*.jpg"))[2]
    victim.unlink()
    code, _, err = run_download("dtd")
    assert code == 2 and f"image {victim} of dtd cannot be found" in err and f"move {images} away" in err
    assert not world.requests


def test_space_is_checked_before_anything_is_requested(world, data_root, run_download, tmp_path):
    path, _, _ = offer(world, "food101", tmp_path)
    usage = shutil.disk_usage(tmp_path)

    def with_free(free):
        world.monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=free))
        return run_download("food101")

    code, _, err = with_free(9.9e9)
    assert code == 2 and path not in dict(world.requests)
    assert f"needs about 10.0 GB in {data_root / 'food-101'}, but 9.9 GB are free" in err
    with open(data_root / "food-101" / "food-101.tar.gz.part", "wb") as part:
        part.truncate(10_000_000)  # what was downloaded already needs no space again
    assert "needs about" not in with_free(9.995e9)[2]
    assert with_free(10.1e9)[0] == 0


def test_a_disk_that_fills_up_while_downloading(world, data_root, run_download, tmp_path):
    _, archive, _ = offer(world, "dtd", tmp_path)
    path = world.has_archive("dtd", archive + b"x" * 3 * CHUNK)

    def full_disk(*arguments, **options):
        """A progress bar that fails after the first chunk of an archive, as the next write would."""
        bar = progress(*arguments, **options)
        bar.update = lambda n: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")) if n == CHUNK else None
        return bar

    with world.monkeypatch.context() as patch:
        patch.setattr("fetching.progress", full_disk)
        code, _, err = run_download("dtd")
    assert code == 2 and "no space left for" in err
    assert len([asked for asked, _ in world.requests if asked.startswith("/dtd")]) == 1
    assert (data_root / "dtd" / "dtd-r1.0.1.tar.gz.part").stat().st_size == CHUNK
    run_download("dtd")
    assert world.requests[-1] == (path, f"bytes={CHUNK}-")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_unpacking_that_stops_starts_again(world, data_root, run_download, tmp_path, error):
    offer(world, "dtd", tmp_path)
    copied = []

    def stopping(source, target, length=0):
        copied.append(target.name)
        if len(copied) == 5:
            raise error
        target.write(source.read())

    images, left = data_root / "dtd" / "images", data_root / "dtd" / ".unpacking"
    with world.monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", stopping)
        if isinstance(error, KeyboardInterrupt):
            patch.setattr(shutil, "rmtree", lambda *arguments, **options: None)  # as if it had been killed
        code, _, err = run_download("dtd")
    assert not images.exists()
    if isinstance(error, KeyboardInterrupt):
        assert code == 130 and len([path for path in left.rglob("*") if path.is_file()]) == 5
        (left / "dtd" / "images" / "stale").mkdir()
    else:
        assert code == 2 and "error: dtd: no space left" in err and not left.exists()
    world.requests.clear()
    assert run_download("dtd")[0] == 0
    assert not world.requests  # the archive exists
    assert not left.exists() and not (images / "stale").exists()


def test_processes_that_want_the_same_dataset_make_one_download(world, data_root, tmp_path):
    path, _, _ = offer(world, "eurosat", tmp_path)
    unpacked, unpack = [], archives.unpack

    def slow_unpack(archive, folder):
        unpacked.append(archive)
        time.sleep(0.1)
        unpack(archive, folder)

    world.monkeypatch.setattr("datasets.acquire.arrange.unpack", slow_unpack)
    with ThreadPoolExecutor(4) as pool:
        states = set(pool.map(lambda _: download.prepare("eurosat", data_root), range(4)))
    assert len(states) == 1
    assert [asked for asked, _ in world.requests].count(path) == 1 and len(unpacked) == 1


@pytest.mark.parametrize("program", [download, doctor])
@pytest.mark.parametrize("words", ["dtd", "--root_path x", "food --root_path x", "folder dtd --root_path ."])
def test_mistakes_are_one_line(program, words):
    code, _, _, err = call(program.main, *words.split())
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_one_line(world, data_root, run_download):
    world.monkeypatch.setattr(Path, "mkdir", lambda *_, **__: os.open(data_root / "no" / "file", os.O_RDONLY))
    code, _, err = run_download("dtd")
    assert code == 2 and err.startswith("error: dtd: ") and err.count("\n") == 1


def test_gdown_has_the_interface_of_its_substitute_here(tmp_path, monkeypatch):
    """The real function, stopped before it uses the network: arguments and error type are as assumed."""
    import requests

    def refuse(*arguments, **options):
        raise requests.exceptions.ConnectionError("no network in tests")

    monkeypatch.setattr(requests.Session, "get", refuse)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert issubclass(gdown.exceptions.FileURLRetrievalError, gdown.DownloadError)
    with pytest.raises(datasets.DatasetError, match="no network in tests"):
        download.fetch_from_drive("some-id", tmp_path / "x" / "file.zip")
