"""Processes that record in one folder at once, and what killed, hung and lockless ones do to the others."""

import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import stat
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

import run_utils
from clip.weights import save_tensors
from run_utils import Run, UserError, rebuild_table, write_atomically

if "fork" not in multiprocessing.get_all_start_methods():
    pytest.skip("starting a Python with torch takes seconds", allow_module_level=True)

from benchmarks.concurrency import FORK, finish, read_table, record_at_once, settings_of, take_turns

QUICK = ("--shots", 1, "--method", "zero_shot", "--workers", 0)


@pytest.fixture
def started():
    """Starts a function in another process, which is killed at the end, and waits until it says that it is ready."""
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


def kill(process):
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_records_of_many_processes(tmp_path):
    found = record_at_once(tmp_path / "results", processes=8, rounds=5)
    assert found["wrong"] == [] and found["looks"] > 0


def test_many_processes_want_the_same_run(tmp_path):
    assert take_turns(tmp_path / "results", processes=6, turns=15) == []


def test_a_folder_is_removed_before_others_can_have_it(tmp_path, monkeypatch):
    """The lock goes last: otherwise the next process of the same run would lose its files."""
    settings, refused, remove = settings_of(tmp_path / "results", seed=1), [], shutil.rmtree

    def slow(folder, **options):
        with pytest.raises(UserError, match="another process is doing this run"), Run(settings):
            pass
        refused.append(folder)
        remove(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", slow)
    with Run(settings) as run:
        (run.folder / "file").touch()
    assert refused == [run.folder] and not (tmp_path / "results").exists()


@pytest.mark.parametrize("place, name", [(Path, "unlink"), (run_utils.FileLock, "release")], ids=["file", "lock"])
def test_the_next_process_may_begin_while_the_last_one_leaves(tmp_path, monkeypatch, place, name):
    settings, step, entered = settings_of(tmp_path / "results", seed=1), getattr(place, name), []

    def then_the_next_begins(self, *args, **options):
        step(self, *args, **options)
        if not entered and (name == "release" or self.suffix == ".lock"):
            entered.append(Run(settings))
            entered[0].__enter__()

    with monkeypatch.context() as patch, Run(settings):
        patch.setattr(place, name, then_the_next_begins)
    assert entered[0].folder.is_dir()
    with pytest.raises(UserError, match="another process is doing this run"), Run(settings):
        pass
    entered[0].__exit__()
    assert not list(tmp_path.glob("results/*"))


def test_folders_that_other_runs_remove_or_use(tmp_path, monkeypatch):
    weights, make, rmdir = tmp_path / "saved" / "weights", tempfile.NamedTemporaryFile, Path.rmdir
    settings = replace(settings_of(tmp_path / "results", seed=1), save_path=str(weights))
    folder = settings.checkpoint.parent

    def removed_in_this_moment(**options):
        if options["dir"] == folder and not entries:
            entries.append(folder.rmdir())
        return make(**options)

    def used_in_this_moment(path):
        if path == folder:
            (folder / "of another run").touch()
        rmdir(path)

    entries = []
    with Run(settings) as run:
        pass
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", removed_in_this_moment)
    with run:
        assert entries and folder.is_dir()
        monkeypatch.setattr(Path, "rmdir", used_in_this_moment)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["of another run"]


def test_a_run_that_may_not_begin_removes_nothing(tmp_path):
    run = Run(replace(settings_of(tmp_path, seed=1), force=True))
    run.folder.mkdir()
    (run.folder / "state.pt").write_text("hours of work")
    run.csv.mkdir()
    with pytest.raises(UserError, match="is a folder"), run:
        pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["results.csv", run.folder.name, "state.pt"])


# --- killed and hung


def test_a_killed_process_leaves_its_run_to_others(tmp_path, started):
    settings, worker = settings_of(tmp_path, seed=1), FORK.Value("i")

    def works(ready):
        with Run(settings) as run:
            (run.folder / "result.json.f00.part").write_text("{")
            pid = os.fork()  # like a process that reads images, it lives on for a while
            if pid:
                worker.value = pid
                ready.set()
            time.sleep(60)

    process = started(works)
    with pytest.raises(UserError, match="another process is doing this run"), Run(settings):
        pass
    kill(process)
    assert worker.value > 0
    try:
        os.kill(worker.value, 0)  # is there
        assert Run(settings).lock_file.exists()
        with Run(settings) as run:
            assert not list(run.folder.iterdir())
        assert not list(tmp_path.iterdir())
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
        patch.setattr(run_utils, "write_atomically", dies)
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
        lock = run_utils.acquire(Path("results/.results.lock"), seconds=0)
        ready.set()
        time.sleep(60)
        lock.release()

    monkeypatch.setattr(run_utils, "TABLE_SECONDS", 0.2)
    process = started(holds_the_table)
    os.kill(process.pid, signal.SIGSTOP)
    code, record, out, err = run_main(*QUICK)
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert code == 0 and len(notes) == 1 and "results.csv may lack the latest runs" in notes[0]
    assert "the same command again" in notes[0] and "Traceback" not in err
    assert not Path("results/results.csv").exists()
    assert run_utils.read_record(Path("results") / record["run_id"] / "result.json") == record
    kill(process)
    code, _, out, err = run_main(*QUICK)
    assert code == 0 and "already done" in out and "note: " not in err
    assert list(pd.read_csv("results/results.csv").run_id) == [record["run_id"]]


# --- file systems


@pytest.mark.parametrize("missing", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_found_out_before_the_work(run_main, monkeypatch, missing):
    def flock(descriptor, operation):
        raise OSError(missing, os.strerror(missing))

    monkeypatch.setattr(fcntl, "flock", flock)
    code, _, out, err = run_main(*QUICK, "--results_dir", "there/results")
    assert code == 2 and "zero-shot" not in out and err.count("\n") == 1
    assert all(word in err for word in ("there/results is on a file system without", os.strerror(missing), "--results"))
    assert not list(Path(".").iterdir())


def test_processes_of_the_same_number_on_two_hosts(tmp_path, monkeypatch):
    """Both write the same file: the second begins and ends while the first is about to rename its own."""
    path, rename, others = tmp_path / "file", Path.replace, []

    def meanwhile(part, target):
        if not others:
            others.append(part)
            write(target)
        return rename(part, target)

    monkeypatch.setattr(Path, "replace", meanwhile)
    for write in (lambda path: write_atomically(path, "text"), lambda path: save_tensors({"x": torch.ones(2)}, path)):
        others.clear()
        write(path)
        assert [p.name for p in tmp_path.iterdir()] == ["file"] and len(others) == 1


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events, sync, rename = [], os.fsync, Path.replace

    def synced(descriptor):
        status = os.fstat(descriptor)
        events.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_size)
        sync(descriptor)

    def replaced(part, target):
        events.append("renamed")
        return rename(part, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write_atomically(tmp_path / "result.json", "{}\n")
    assert events == [3, "renamed", "folder"]


def test_other_things_in_the_folder_of_results(tmp_path, monkeypatch):
    def listed(path):
        if Path(path).name == "failed":
            Path(path).rmdir()
        return list_folder(path)

    finish(tmp_path, 1)
    list_folder = os.listdir
    monkeypatch.setattr(os, "listdir", listed)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "failed").mkdir()  # of a run that ends without a result in this moment
    (tmp_path / "lost+found").mkdir(mode=0)
    rebuild_table(tmp_path)
    assert list(read_table(tmp_path).seed) == [1] and not (tmp_path / "failed").exists()
