"""What a run writes, what is kept of it whatever happens, and whose weights a file holds."""

import gc
import json
import mmap
import multiprocessing
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import safetensors
import torch
from support.runs import Killed, refused

import common
import datasets
import main as entry
import records
import run_utils
import train
from clip.delta import checkpoint_metadata, save_delta
from methods import METHODS
from records import FIRST, LAST, RecordFolder, rebuild_table

FORK = multiprocessing.get_context("fork")
QUICK = ("--shots", 1, "--total_iters", 2)
MADE_UP = {"method": "so", "test_accuracy": 50.0, "zero_shot_accuracy": 40.0, "split_sha256": "5" * 64}
MADE_UP |= {"data_sha256": None, "trainable_weights": 1, "changed_weights": 1}


def write(results, seed=3, **values):
    """Write the record of a made-up run, and return it."""
    return RecordFolder(results, f"so_{seed}").write(MADE_UP | {"seed": seed} | values, {"curve.csv": "loss\n1\n"})


def files():
    """Return the content of all files below the working folder, except locks."""
    paths = [path for path in Path(".").rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    return {path: path.read_bytes() for path in paths}


# --- runs that end in the middle


@pytest.mark.parametrize(
    "error, code, words",
    [
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore"),
            2,
            ["error: ", "--checkpoint_blocks", "--batch_size"],
        ),
        (train.TrainingDiverged("the training loss is nan"), 2, ["error: ", "loss is nan"]),
        (OSError(28, "No space left on device", "result.json"), 2, ["error: ", "result.json", "free some space"]),
    ],
    ids=["ctrl-c", "memory", "divergence", "disk full"],
)
@pytest.mark.parametrize("place, name", [(train, "predict"), (records, "write_atomically")])
def test_a_run_that_ends_in_the_middle_says_so_in_one_line(run_main, monkeypatch, error, code, words, place, name):
    def fails(*args, **_):
        if place is train or args[0].name == "result.json":
            raise error
        common.write_atomically(*args)

    monkeypatch.setattr(train, "fit", lambda *_: train.Fit())
    monkeypatch.setattr(place, name, fails)
    ended, result, out, err = run_main(*QUICK)
    assert ended == code and result is None and "Traceback" not in err and "already" not in out
    line = err.splitlines()[-1]
    assert all(word in line for word in words) and not list(Path("results").rglob("result.*"))


def test_a_run_that_ends_in_the_middle_keeps_what_was_there(run_main, monkeypatch):
    _, result, _, _ = run_main(*QUICK, "--save_path", "saved")
    before = files()

    def fails(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "fit", fails)
    assert run_main(*QUICK, "--save_path", "saved", "--force")[0] == 130
    assert files() == before
    assert run_main(*QUICK, "--save_path", "saved")[1] == result  # still recorded


def test_unforeseen_errors_keep_their_traceback(run_main, monkeypatch):
    monkeypatch.setattr(train, "fit", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_main(*QUICK)
    assert not files()


@pytest.mark.parametrize("flag, length", [("--filename", 300), ("--save_path", 300), ("--filename", 240)])
def test_names_that_no_disk_takes_are_rejected_before_the_work(run_main, monkeypatch, flag, length):
    monkeypatch.setattr(entry, "do_now", lambda run: pytest.fail("the work began"))
    before = ["--save_path", "saved"] if flag == "--filename" else []
    assert "nnn" in refused(run_main(*QUICK, *before, flag, "n" * length))


# --- seeds and kernels


@pytest.mark.parametrize(
    ("precision", "device", "flags", "slow"),
    [
        ("bf16", "cpu", "avx2 avx512f", True),
        ("bf16", "cpu", "avx512_bf16", False),
        ("fp32", "cpu", "avx2", False),
        ("bf16", "cuda:1", "avx2", False),
    ],
)
def test_bf16_without_units_is_said_to_be_slow(precision, device, flags, slow, monkeypatch, tmp_path, capsys):
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}")
    monkeypatch.setattr(run_utils, "Path", lambda name: tmp_path / Path(name).name)
    run_utils.note_slow_precision(precision, device)
    assert ("bf16" in capsys.readouterr().err) == slow


def test_make_reproducible(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    places = [(torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")]
    places += [(torch.utils.deterministic, "fill_uninitialized_memory")]
    before = torch.are_deterministic_algorithms_enabled(), [getattr(*place) for place in places]
    torch.use_deterministic_algorithms(False)
    for place in places:
        setattr(*place, True)

    def draws(seed):
        run_utils.make_reproducible(seed)
        return torch.rand(1).item(), random.random()

    try:
        assert draws(7) == draws(7) and all(a != b for a, b in zip(draws(7), draws(8)))
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert [getattr(*place) for place in places] == [False, False, False]
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(before[0])
        for place, value in zip(places, before[1]):
            setattr(*place, value)


# --- two runs and one file of weights


@pytest.fixture
def made_up(monkeypatch):
    """Training in no time: its weights are one number, 1 for the first training, 2 for the second, and their accuracy
    is that number. So the same settings may give other weights, as on two machines."""
    trained = []

    def do_now(run):
        if run.settings.eval_only:
            with safetensors.safe_open(run.weights, "pt") as file:
                accuracy = file.get_tensor("x.values").item()
        else:
            trained.append(run)
            accuracy = float(len(trained))
            changes = {"x": (torch.tensor([0], dtype=torch.int32), torch.tensor([accuracy]))}
            save_delta(changes, run.weights, "0" * 64, run.metadata(run.hparams))
        data = {"split_sha256": run.task.split_sha256, "template": run.template, "test_accuracy": accuracy}
        return run.folder.write(MADE_UP | data, {})

    monkeypatch.setattr(entry, "do_now", do_now)


WEIGHTS = Path("saved/tiny/digits/1shots/seed3/so.safetensors")


def test_evaluations_of_different_weights_are_different_runs(run_main, made_up):
    def evaluated(place):
        _, result, out, _ = run_main(*QUICK, "--save_path", place, "--eval_only")
        return result["test_accuracy"], "already done" in out

    for place in "ab":
        assert run_main(*QUICK, "--save_path", place)[0] == 0
    assert [evaluated(place) for place in "abab"] == [(1, False), (2, False), (1, True), (2, True)]
    run_main(*QUICK, "--save_path", "a", "--lr", "3e-3", "--force")  # other weights in the same place
    shutil.copytree("b", "moved")  # the same weights in another place
    assert evaluated("a") == (3, False) and evaluated("moved") == (2, True)


def test_weights_of_another_run_are_not_overwritten(run_main, made_up):
    _, first, _, _ = run_main(*QUICK, "--save_path", "saved", "--lr", "1e-3")
    before = files()
    code, _, _, err = run_main(*QUICK, "--save_path", "saved", "--lr", "2e-3")
    assert code == 2 and files() == before
    assert all(word in err for word in (str(WEIGHTS), first["run_id"], "--filename", "--force"))
    assert run_main(*QUICK, "--save_path", "saved", "--lr", "2e-3", "--filename", "other")[0] == 0
    assert WEIGHTS.read_bytes() == before[WEIGHTS] and WEIGHTS.with_name("other.safetensors").is_file()
    _, second, _, _ = run_main(*QUICK, "--save_path", "saved", "--lr", "2e-3", "--force")
    assert checkpoint_metadata(WEIGHTS)["run_id"] == second["run_id"] != first["run_id"]
    code, _, out, err = run_main(*QUICK, "--save_path", "saved", "--lr", "1e-3")
    assert code == 2 and "already done" not in out and second["run_id"] in err, "the first run's weights are gone"


def test_a_file_that_is_no_weights_is_not_overwritten(run_main, made_up):
    WEIGHTS.parent.mkdir(parents=True)
    WEIGHTS.write_text("my thesis")
    line = refused(run_main(*QUICK, "--save_path", "saved"), before=["saved"])
    assert str(WEIGHTS) in line and WEIGHTS.read_text() == "my thesis"


# --- records and their table


def test_a_record_is_written_before_checkpoints_are_removed_and_the_table_last(tmp_path, monkeypatch):
    folder = RecordFolder(tmp_path, "so_3")
    with folder.locked(wait=False):
        (folder.path / "training-000000001-0.pt").touch()

    def killed(results):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(records, "rebuild_table", killed)
        with pytest.raises(Killed):
            write(tmp_path)
    assert sorted(path.name for path in folder.path.iterdir()) == ["curve.csv", "result.json"]
    assert folder.read()["seed"] == 3 and not folder.table.exists()
    write(tmp_path, seed=4)
    assert list(pd.read_csv(folder.table).seed) == [3, 4]


def test_a_table_that_cannot_be_written_whole_stays_as_it_was(tmp_path, monkeypatch):
    write(tmp_path)
    before, sync = (tmp_path / "results.csv").read_text(), os.fsync

    def disk_full(descriptor):
        if any(part.stat().st_ino == os.fstat(descriptor).st_ino for part in tmp_path.glob("results.csv.*.part")):
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, seed=9)
    assert (tmp_path / "results.csv").read_text() == before and not list(tmp_path.rglob("*.part"))
    assert len(list(tmp_path.glob("*/result.json"))) == 2


@pytest.mark.parametrize(
    "damage", [b"", b'{\n  "run_id": "so_di', b"\xff\xfe\x00", b"\0" * 200, b"{}", b"[]", b"3", b'{"run_id": "x"}']
)
def test_a_damaged_record_is_named_and_left_out(tmp_path, capsys, damage):
    for seed in range(3):
        write(tmp_path, seed)
    path = tmp_path / "so_1" / "result.json"
    path.write_bytes(damage)
    rebuild_table(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: ") and str(path) in line and "--force" in line
    assert list(pd.read_csv(tmp_path / "results.csv").seed) == [0, 2]
    assert RecordFolder(tmp_path, "so_1").read() is None and RecordFolder(tmp_path, "so_0").read()["seed"] == 0
    write(tmp_path, 1)
    assert sorted(pd.read_csv(tmp_path / "results.csv").seed) == [0, 1, 2]


def test_columns_have_one_order_and_whole_numbers_stay_whole(tmp_path):
    write(tmp_path, 1, total_iters=2, t=10**22, lr=1e-3, device="cpu")
    record = write(tmp_path, 2, probe_c=0.5, device="cpu", template="a {}.")
    assert [*record] == [*json.loads((tmp_path / "so_2" / "result.json").read_text())]
    order = [name for name in (*FIRST, "probe_c", *LAST) if name in record]
    assert [*record] == order and len(order) == len(MADE_UP) + 8
    rows = pd.read_csv(tmp_path / "results.csv", dtype=str, keep_default_na=False)
    assert list(rows.columns) == [*FIRST, "total_iters", "probe_c", *LAST]
    assert list(rows.total_iters) == ["2", ""] and list(rows.t) == [str(10**22), ""]
    assert list(rows.lr) == ["0.001", ""] and list(rows.test_accuracy) == ["50.0"] * 2


# --- measurements


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not let a peak restart")
def test_peak_memory_is_in_mib_and_may_start_again():
    peaks = FORK.Array("d", 4)

    def measure():  # in a process of its own: in this one much may be in use, or be freed meanwhile
        def measured():
            return run_utils.peak_memory_mb(torch.device("cpu"))

        gc.collect()  # what the tests before this one left is not freed meanwhile
        gc.disable()
        run_utils.use_device("cpu")
        peaks[0], block = measured(), mmap.mmap(-1, 200 * 2**20)  # not from what the heap has free
        for _ in range(200):
            block.write(b"x" * 2**20)
        peaks[1] = measured()
        block.close()
        peaks[2] = measured()
        run_utils.use_device("cpu")
        peaks[3] = measured()

    process = FORK.Process(target=measure)
    process.start()
    process.join()
    before, during, after, again = peaks
    assert before > 20 and during - before == pytest.approx(200, abs=4)
    assert after == pytest.approx(during, abs=4)  # a peak does not fall by itself
    assert again == pytest.approx(before, abs=4)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_commit_is_forty_digits_and_says_when_files_differ(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(records, "PROJECT", tmp_path)
    assert records.git_commit() == ""

    def git(*words):
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
        done = subprocess.run(["git", "-C", tmp_path, *identity, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "--quiet")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--quiet", "-m", "first")
    git("tag", "-a", "v1", "-m", "a tag that must not take the commit's place")
    commit = records.git_commit()
    assert commit == git("rev-parse", "HEAD") and re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "file").write_text("2")
    assert records.git_commit() == commit + "+"


def test_a_run_with_other_prompts_is_done_again_and_says_so(run_main, monkeypatch):
    _, first, _, _ = run_main(*QUICK, "--prompts", "specific")
    monkeypatch.setitem(datasets._TEMPLATES, "digits", ("the number {}.",))  # as after an edit of the dataset's prompts
    _, second, out, err = run_main(*QUICK, "--prompts", "specific")
    assert "already done" not in out and f"{first['run_id']} has a record of other" in err
    assert (first["run_id"], second["template"]) == (second["run_id"], "the number {}.")


def test_zero_shot_accuracy_is_that_of_a_model_which_no_method_has_touched(run_main, monkeypatch):
    _, plain, _, _ = run_main(*QUICK)
    prepare = METHODS["so"].prepare

    def rough(experiment):
        experiment.model.visual.proj.data.copy_(experiment.model.visual.proj.data.roll(1, 1))  # other features at once
        return prepare(experiment)

    monkeypatch.setattr(METHODS["so"], "prepare", rough)
    _, touched, _, _ = run_main(*QUICK, "--seed", 9, "--cache_dir", "other")
    assert touched["zero_shot_accuracy"] == plain["zero_shot_accuracy"] != touched["test_accuracy"]
