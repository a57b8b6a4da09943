"""A run that is stopped at any point resumes from its last checkpoint, and ends as one that was not stopped, bit for
bit. test_contracts.py shows it for each method; here are the checkpoints, and what may happen to them."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from support.runs import call, in_folder, killed_after, outcome, refused

import main as entry
import train
from methods import METHODS
from records import PROJECT, Checkpoints

FORK = multiprocessing.get_context("fork")
# SO in epochs of 3 iterations.
SO = ("--shots", 4, "--batch_size", 16, "--early_stop_loss", 0, "--position", "top1", "--density_ratio", 0.01)
SO = (*SO, "--total_iters", 9, "--save_every", 3)

# --- the files


@pytest.fixture
def saved(tmp_path):
    """Three checkpoints 3, 6 and 9 of one run: their files that are left, the newest first."""
    for number in (3, 6, 9):
        assert Checkpoints(tmp_path, "training", {"split": "a"}).save(number, {"x": torch.tensor(number)})
    return sorted(tmp_path.iterdir(), reverse=True)


def test_the_newest_two_are_kept(saved, tmp_path):
    assert [path.name[:18] for path in saved] == ["training-000000009", "training-000000006"]
    found = Checkpoints(tmp_path, "training", {"split": "a"})
    assert found.number == 9 and found.take() == {"x": torch.tensor(9)} and found.take() is None
    found.clear()
    assert not list(tmp_path.iterdir())


DAMAGES = {
    "cut": lambda content: content[:-100],
    "flip": lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:],
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_instead_of_a_damaged_one_the_one_before_is_taken(saved, tmp_path, capsys, damage):
    for number, path in zip((6, 0), saved):
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
        found = Checkpoints(tmp_path, "training", {"split": "a"})
        assert found.number == number and found.take() == ({"x": torch.tensor(6)} if number else None)
        (line,) = capsys.readouterr().err.splitlines()
        assert str(path) in line and not path.exists()


def test_one_that_runs_code_is_not_loaded(saved, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))

    Checkpoints(tmp_path, "training", {"split": "a"}).save(12, {"x": Evil()})
    assert Checkpoints(tmp_path, "training", {"split": "a"}).number == 9 and list(tmp_path.iterdir()) == saved[:1]


def test_those_of_other_images_or_weights_make_room_for_the_first_new_one(saved, tmp_path, capsys):
    found = Checkpoints(tmp_path, "training", {"split": "b"})
    assert found.number == 0 and found.take() is None and str(saved[0]) in capsys.readouterr().err
    assert Checkpoints(tmp_path, "training", {"split": "a"}).number == 9  # a look costs nothing
    assert Checkpoints(tmp_path, "candidate1", {"split": "a"}).number == 0
    found.save(1, {})
    assert [path.name[:18] for path in tmp_path.iterdir()] == ["training-000000001"]


def test_a_full_disk_stops_no_training(tmp_path, monkeypatch, capsys):
    def full(path, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(Path, "replace", full)
    assert not Checkpoints(tmp_path, "training").save(3, {})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: ") and "No space left on device" in line and not list(tmp_path.iterdir())


# --- runs


@pytest.fixture
def stopped(run_main):
    """Stop a run after its eighth update, and return how to call it again."""
    with killed_after(8):
        assert run_main(*SO, *in_folder("parts"))[0] == -9
    assert len(list(Path("parts").rglob("*.pt"))) == 2
    return lambda *flags: run_main(*SO, *in_folder("parts"), *flags)


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(run_main, stopped):
    max(Path("parts").rglob("*.pt")).write_bytes(b"damaged")
    _, resumed, out, _ = stopped("--save_every", 0)  # how often is saved may change on the way
    _, whole, _, _ = run_main(*SO, *in_folder("whole"))
    assert "resumes after iteration 3," in out and outcome("parts", resumed) == outcome("whole", whole)


def test_other_settings_are_another_run(stopped):
    before = set(Path("parts").rglob("*.pt"))
    code, _, out, _ = stopped("--lr", 2e-3, "--filename", "other")
    assert code == 0 and "resumes" not in out and before == set(Path("parts").rglob("*.pt"))


def test_force_starts_from_the_beginning_and_says_how_to_resume(stopped):
    with killed_after(5):
        code, _, out, err = stopped("--force")
    assert code == -9 and "resumes after" not in out and "without --force" in err
    out = stopped()[2]
    assert "resumes after iteration 3," in out
    with killed_after(5):
        _, _, _, err = stopped("--force")
    assert "note" not in err and not list(Path("parts").rglob("*.pt"))  # for without --force it is done already
    assert "already done" in stopped()[2]


def test_seconds_add_up_over_the_parts(stopped):
    path = max(Path("parts").rglob("training-*.pt"))
    content = torch.load(path, weights_only=True)
    content["state"]["fit"]["seconds"] += 1000
    path.unlink()
    Checkpoints(path.parent, "training", content["belongs_to"]).save(6, content["state"])
    _, record, _, _ = stopped()
    assert 1000 < record["train_seconds"] < 1100
    assert pd.read_csv(Path("parts", record["run_id"], "timing.csv")).seconds.is_monotonic_increasing


def test_draws_from_torchs_own_generator_resume_too(run_main, monkeypatch):
    prepare = METHODS["so"].prepare

    def drawing(experiment):
        adaptation = prepare(experiment)
        plain = adaptation.logits
        adaptation.logits = lambda images, texts: plain(torch.nn.functional.dropout(images, 0.1), texts)
        return adaptation

    monkeypatch.setattr(METHODS["so"], "prepare", drawing)
    _, whole, _, _ = run_main(*SO, *in_folder("whole"))
    with killed_after(8):
        run_main(*SO, *in_folder("parts"))
    _, resumed, out, _ = run_main(*SO, *in_folder("parts"))
    assert "resumes after iteration 6," in out and outcome("parts", resumed) == outcome("whole", whole)


def test_a_killed_search_keeps_its_finished_candidates(run_main, monkeypatch):
    flags = (*SO, "--search", "lr=1e-3,1e30,3e-3")
    _, whole, _, _ = run_main(*flags, *in_folder("whole"))
    began, fit = [], train.fit
    monkeypatch.setattr(train, "fit", lambda *args: began.append(args[0].hparams.lr) or fit(*args))
    for update in (16, 5):  # in the third candidate (the second diverges in its first epoch), and there again
        with killed_after(update):
            assert run_main(*flags, *in_folder("parts"))[0] == -9
    assert began == [1e-3, 1e30, 3e-3, 3e-3]
    _, resumed, _, _ = run_main(*flags, *in_folder("parts"))
    assert outcome("parts", resumed) == outcome("whole", whole) and resumed["search_seconds"] > 0


def test_a_search_whose_rows_cannot_be_saved_keeps_its_candidates(run_main, monkeypatch):
    replace = Path.replace

    def full(path, target):
        if Path(target).name.startswith("search-"):
            raise OSError(28, "No space left on device", str(target))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", full)
    with killed_after(12):
        run_main(*SO, "--search", "lr=1e-3,3e-3")
    assert list(Path("results").rglob("candidate1-*.pt"))


@pytest.mark.parametrize("flags", [(), ("--search", "lr=1e30,1e31")], ids=["run", "search"])
def test_what_diverges_does_not_resume(run_main, flags):
    line = refused(run_main(*SO, "--lr", 1e30, "--density_ratio", 1, "--save_every", 1, "--batch_size", 40, *flags))
    assert "the training loss" in line and "lr" in line


# --- stops


def test_signals_stop_runs_that_then_resume(tmp_path, all_digits):
    codes = {signal.SIGTERM: 143, signal.SIGKILL: -9, signal.SIGINT: 130}
    flags = ("--shots", 1, "--total_iters", 50, "--encoder", "text", "--position", "top1", "--early_stop_loss", 0)
    flags = (*flags, "--workers", 0, "--cache_dir", tmp_path / "cache", "--device", "cpu")

    def command(name, save_every=1):
        return [str(word) for word in (*flags, *in_folder(tmp_path / name), "--save_every", save_every)]

    def start(name):
        with open(tmp_path / f"{name}.err", "w") as file:
            os.dup2(file.fileno(), 2)
        if name == "SIGTERM":  # as users start it; a new Python takes seconds
            os.chdir(PROJECT)
            words = [sys.executable, "main.py", *command(name)]
            os.execve(sys.executable, words, os.environ | {"OMP_NUM_THREADS": "1"})
        sys.stderr = os.fdopen(2, "w")
        entry.main(command(name))

    _, whole, _, _ = call(entry.main, *command("whole", save_every=0))
    running = {sent: FORK.Process(target=start, args=(sent.name,)) for sent in codes}
    for process in running.values():
        process.start()
    waiting = dict(running)
    while waiting:
        for sent, process in [*waiting.items()]:
            if not process.is_alive() or list((tmp_path / sent.name).rglob("training-*.pt")):
                os.kill(process.pid, sent)
                del waiting[sent]
        time.sleep(0.01)
    for sent, process in running.items():
        process.join()
        assert process.exitcode == codes[sent]
        said = (tmp_path / f"{sent.name}.err").read_text()
        assert ("the same command resumes" in said) == (sent != signal.SIGKILL)
        _, resumed, out, _ = call(entry.main, *command(sent.name))
        assert "resumes after iteration" in out
        assert outcome(tmp_path / sent.name, resumed) == outcome(tmp_path / "whole", whole)


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_stop_before_the_first_checkpoint_says_so(run_main, monkeypatch):
    monkeypatch.setattr(train, "fit", interrupted)
    code, _, _, err = run_main(*SO)
    assert code == 130 and "--save_every" in err and err.endswith("interrupted\n")
    code, _, _, err = run_main("--method", "tip_adapter", "--shots", 1)
    assert (code, err) == (130, "interrupted\n")  # without iterations there are no checkpoints to speak of
    assert not [path for path in Path("results").rglob("*") if path.is_file() and path.suffix != ".lock"]


# --- TensorBoard


def test_tensorboard_shows_the_curve(run_main):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = (*SO, "--eval_every", 4, "--tensorboard")
    with killed_after(5):
        run_main(*flags)
    _, record, _, _ = run_main(*flags)
    folder = Path("results", record["run_id"])
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    shown, curve = EventAccumulator(str(folder)).Reload(), pd.read_csv(folder / "curve.csv", index_col="iteration")
    expected = {name: curve[name].dropna().to_dict() for name in ("loss", "train_accuracy", "lr", "test_accuracy")}
    expected["test_accuracy"][9] = record["test_accuracy"]
    assert shown.Tags()["scalars"] == [*expected] and 6 in expected["test_accuracy"]
    for name, values in expected.items():
        assert {point.step: point.value for point in shown.Scalars(name)} == pytest.approx(values, rel=1e-6)


def test_tensorboard_is_written_only_if_asked_for_and_its_lack_is_named(run_main, monkeypatch):
    run_main(*SO, "--total_iters", 3)
    assert not list(Path("results").rglob("events*"))
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    line = refused(run_main(*SO, "--tensorboard", "--results_dir", "other"), before=["results"])
    assert "--tensorboard" in line and "requirements-all.txt" in line
