"""Processes that record in one folder at once, and what killed, hung and lockless ones do to the others."""

import errno
import fcntl
import os
import signal
import stat
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from support.runs import refused

import main as entry
import records
from arguments import parse
from benchmarks.concurrency import FORK, finish, read_table, record_at_once, take_turns
from clip.weights import save_tensors
from common import UserError, acquire_lock, write_atomically
from records import RecordFolder, rebuild_table

QUICK = ("--shots", 1, "--method", "zero_shot")


@pytest.fixture
def started():
    """Start a function in another process, which is killed at the end, and wait until it says that it is ready."""
    processes = []

    def start(target):
        ready = FORK.Event()
        processes.append(FORK.Process(target=target, args=(ready,)))
        processes[-1].start()
        assert ready.wait(30)
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.join()


def test_records_of_many_processes(tmp_path):
    found = record_at_once(tmp_path / "results", processes=8, rounds=3)
    assert found["wrong"] == [] and found["looks"] > 0


def test_many_processes_want_the_same_run(tmp_path):
    assert take_turns(tmp_path / "results", processes=6, turns=15) == []


def test_a_second_process_is_rejected_or_waits(run_main, started, monkeypatch):
    (run,), leave = entry.planned(parse([str(word) for word in QUICK])), FORK.Event()

    def works(ready):
        with run.folder.locked(wait=False):
            ready.set()
            leave.wait(60)

    def acquire(path, seconds):
        if seconds < 0:  # it is about to wait
            leave.set()
        return acquire_lock(path, seconds)

    monkeypatch.setattr(records, "acquire_lock", acquire)
    Path("results").mkdir()
    started(works)
    line = refused(run_main(*QUICK), before=["results"])
    assert str(run.folder.path) in line and "--wait" in line
    assert run_main(*QUICK, "--seed", 4)[0] == 0  # another run is not its business
    code, _, out, _ = run_main(*QUICK, "--wait")
    assert code == 0 and "waiting" in out


def test_two_processes_do_not_write_the_same_weights(tmp_path, monkeypatch, started):
    monkeypatch.chdir(tmp_path)
    words = ["--shots", "1", "--save_path", "weights"]
    (first,), (second,) = (entry.planned(parse([*words, "--lr", lr])) for lr in ("0.1", "0.2"))

    def hold(ready):
        with first.claimed():
            ready.set()
            time.sleep(60)

    process = started(hold)
    with pytest.raises(UserError, match=r"so\.safetensors.*--filename"), second.claimed():
        pass
    process.kill()
    process.join()
    with second.claimed():  # free again
        pass


def test_a_run_that_cannot_begin_removes_no_checkpoint(run_main):
    (run,) = entry.planned(parse(["--shots", "1"]))
    run.folder.path.mkdir(parents=True)
    (run.folder.path / "training-000000001-0.pt").write_text("hours of work")
    run.folder.table.mkdir()
    line = refused(run_main("--shots", 1, "--force"), before=["results"])
    assert str(run.folder.table) in line and (run.folder.path / "training-000000001-0.pt").exists()


# --- killed and hung


def test_a_killed_process_leaves_its_run_to_others(tmp_path, started):
    folder, worker = RecordFolder(tmp_path, "run"), FORK.Value("i")

    def works(ready):
        with folder.locked(wait=False):
            (folder.path / "result.json.f00.part").write_text("{")
            pid = os.fork()  # like a process that reads images, it lives on for a while
            if pid:
                worker.value = pid
                ready.set()
            time.sleep(60)

    process = started(works)
    with pytest.raises(UserError, match="another process"), folder.locked(wait=False):
        pass
    process.kill()
    process.join()
    try:
        os.kill(worker.value, 0)  # is there
        with folder.locked(wait=False):
            assert [path.name for path in folder.path.iterdir()] == []
    finally:
        os.kill(worker.value, signal.SIGKILL)


def test_a_process_killed_while_it_writes_the_table(tmp_path, monkeypatch):
    def dies(path, text):
        if path.name == "results.csv":
            path.with_name("results.csv.f00.part").write_text(text[: len(text) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write_atomically(path, text)

    finish(tmp_path, 1)
    before = (tmp_path / "results.csv").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(records, "write_atomically", dies)
        process = FORK.Process(target=finish, args=(tmp_path, 2))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL and (tmp_path / "results.csv").read_text() == before
    assert list(tmp_path.glob("*.part"))
    finish(tmp_path, 3)
    assert sorted(read_table(tmp_path).seed) == [1, 2, 3] and not list(tmp_path.rglob("*.part"))


def test_nobody_waits_for_ever_for_a_hung_process(run_main, started, monkeypatch):
    Path("results").mkdir()

    def holds_the_table(ready):
        with acquire_lock(Path("results/.results.lock"), seconds=0):
            ready.set()
            time.sleep(60)

    monkeypatch.setattr(records, "TABLE_SECONDS", 0.2)
    process = started(holds_the_table)
    os.kill(process.pid, signal.SIGSTOP)
    code, record, _, err = run_main(*QUICK)
    (line,) = [line for line in err.splitlines() if line.startswith("note: ")]
    assert code == 0 and "results.csv" in line and not Path("results/results.csv").exists()
    assert RecordFolder("results", record["run_id"]).read() == record
    process.kill()
    process.join()
    code, _, out, err = run_main(*QUICK)
    assert code == 0 and "already done" in out and "note: " not in err
    assert list(pd.read_csv("results/results.csv").run_id) == [record["run_id"]]


# --- file systems


@pytest.mark.parametrize("missing", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_found_out_before_the_work(run_main, monkeypatch, missing):
    def flock(descriptor, operation):
        raise OSError(missing, os.strerror(missing))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(entry, "do_now", lambda run: pytest.fail("the work began"))
    line = refused(run_main(*QUICK, "--results_dir", "there/results"))
    assert "there/results" in line and os.strerror(missing) in line


@pytest.mark.parametrize(
    "write", [lambda path: write_atomically(path, "text"), lambda path: save_tensors({"x": torch.ones(2)}, path)]
)
def test_processes_of_the_same_number_on_two_hosts_may_write_the_same_file(tmp_path, monkeypatch, write):
    path, rename, others = tmp_path / "file", Path.replace, []

    def meanwhile(part, target):  # the second begins and ends while the first is about to rename its own
        if not others:
            others.append(part)
            write(target)
        return rename(part, target)

    monkeypatch.setattr(Path, "replace", meanwhile)
    write(path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and len(others) == 1


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events, sync, rename = [], os.fsync, Path.replace

    def synced(descriptor):
        status = os.fstat(descriptor)
        events.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_size)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", lambda *paths: events.append("renamed") or rename(*paths))
    write_atomically(tmp_path / "result.json", "{}\n")
    assert events == [3, "renamed", "folder"]


def test_other_things_in_the_folder_of_results(tmp_path, monkeypatch):
    list_folder = os.listdir

    def listed(path):
        if Path(path).name == "removed":  # by somebody in this moment
            Path(path).rmdir()
        return list_folder(path)

    finish(tmp_path, 1)
    monkeypatch.setattr(os, "listdir", listed)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "removed").mkdir()
    (tmp_path / "lost+found").mkdir(mode=0)
    rebuild_table(tmp_path)
    assert list(read_table(tmp_path).seed) == [1] and not (tmp_path / "removed").exists()
