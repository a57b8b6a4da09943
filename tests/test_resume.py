"""A run that is stopped at any point goes on from its last state, and ends as one that was not stopped, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

import main as entry
import run_utils
import train
from utils import States

SHORT = ("--workers", 0, "--early_stop_loss", 0, "--shots", 4, "--min_area", 0.6, "--batch_size", 16)
SHORT = (*SHORT, "--position", "top2", "--eval_every", 9)  # epochs of 3 iterations
FLAGS = {
    "so": ("--lr", 1e-3, "--density_ratio", 0.01, "--t", 5),
    "so_ablation": ("--lr", 1e-3, "--density_ratio", 0.01, "--gradient", "importance", "--moments", "random"),
    "adam": ("--lr", 1e-4),
    "lora": ("--lr", 1e-3, "--lora_on", "q,k,v,o"),
    "relora": ("--lr", 1e-3, "--merge_every", 4),
    "dora": ("--lr", 1e-3),
    "adalora": ("--lr", 1e-2),
    "prolip": ("--lr", 1e-3, "--batch_size", 16),
    "tip_adapter_f": ("--lr", 1e-3, "--batch_size", 16),
}


class Killed(BaseException):
    """Stops a run where the operating system might."""


def outcome(folder: str, record: dict) -> dict:
    """All that a run leaves behind but for times and sizes."""
    run = Path(folder, record["run_id"])
    (weights,) = Path(folder, "weights").rglob("*.safetensors")
    vary = [name for name in record if name.endswith("_seconds")]
    vary += ["finished_at", "peak_memory_mb", "checkpoint_bytes", "run_id", "git_commit"]
    return {
        "record": {name: value for name, value in record.items() if name not in vary},
        "curve": (run / "curve.csv").read_text(),
        "iterations": pd.read_csv(run / "timing.csv").iteration.tolist(),
        "weights": {name: tensor.numpy().tobytes() for name, tensor in load_file(weights).items()},
    }


def in_folder(name: str) -> tuple:
    return ("--results_dir", name, "--save_path", f"{name}/weights")


def killed_at(monkeypatch, iteration: int):
    """The run's process dies after the update of this iteration."""
    epoch_row, step = train._totals, [0]

    def dying(*args):
        step[0] += 1
        if step[0] == iteration:
            raise Killed
        return epoch_row(*args)

    monkeypatch.setattr(train, "_totals", dying)


def call_killed(run_main, *argv) -> None:
    with pytest.raises(Killed):
        run_main(*argv)


@pytest.mark.parametrize("method", FLAGS)
def test_a_killed_run_ends_as_one_that_was_not(run_main, monkeypatch, method):
    flags = ("--method", method, *SHORT, "--total_iters", 15, *FLAGS[method])
    _, whole, _, _ = run_main(*flags, *in_folder("whole"), "--save_every", 0)
    assert not list(Path("whole").rglob("*.pt"))
    for iteration in (8, 8):  # in the third epoch, with a state of the second; 8 iterations on, with one of the fourth
        with monkeypatch.context() as patch:
            killed_at(patch, iteration)
            call_killed(run_main, *flags, *in_folder("parts"), "--save_every", 5)
    (folder,) = {path.parent for path in Path("parts").rglob("training-*.pt")}
    assert not (folder / "result.json").exists()
    code, resumed, out, _ = run_main(*flags, *in_folder("parts"), "--save_every", 5)
    assert code == 0 and "goes on after iteration 12," in out
    assert outcome("parts", resumed) == outcome("whole", whole)
    assert resumed["iterations"] == 15 and len(pd.read_csv(folder / "curve.csv").test_accuracy.dropna()) == 1
    assert not list(folder.glob("*.pt"))


def test_what_a_method_of_ones_own_draws_goes_on_too(run_main, monkeypatch):
    """A method may use torch's own generator, as nn.Dropout does."""
    prepare = train.METHODS["so"].prepare

    def drawing(model, task, settings):
        adaptation = prepare(model, task, settings)
        plain = adaptation.logits
        adaptation.logits = lambda images, texts: plain(torch.nn.functional.dropout(images, 0.1), texts)
        return adaptation

    monkeypatch.setattr(train.METHODS["so"], "prepare", drawing)
    flags = (*SHORT, "--eval_every", 0, "--total_iters", 12, *FLAGS["so"])
    _, whole, _, _ = run_main(*flags, *in_folder("whole"))
    with monkeypatch.context() as patch:
        killed_at(patch, 8)
        call_killed(run_main, *flags, *in_folder("parts"), "--save_every", 6)
    _, resumed, out, _ = run_main(*flags, *in_folder("parts"), "--save_every", 6)
    assert "goes on after iteration 6," in out
    curves = [pd.read_csv(next(Path(name).rglob("curve.csv"))).loss.tolist() for name in ("whole", "parts")]
    assert curves[0] == curves[1] and outcome("whole", whole)["weights"] == outcome("parts", resumed)["weights"]


def test_seconds_add_up_over_the_parts(run_main, monkeypatch):
    flags = (*SHORT, "--total_iters", 9, "--save_every", 3)
    with monkeypatch.context() as patch:
        killed_at(patch, 8)
        call_killed(run_main, *flags)
    (path,) = Path("results").rglob("training-000000006-*.pt")
    content = torch.load(path, weights_only=True)
    content["state"]["fit"]["seconds"] += 1000
    path.unlink()
    States(path.parent, "training", content["belongs_to"]).save(6, content["state"])
    _, record, _, _ = run_main(*flags)
    assert 1000 < record["train_seconds"] < 1100
    assert pd.read_csv(Path("results", record["run_id"], "timing.csv")).seconds.is_monotonic_increasing


def test_a_killed_search_keeps_its_finished_candidates(run_main, monkeypatch):
    flags = (*SHORT, "--total_iters", 9, "--search", "lr=1e-3,1e30,3e-3", "--density_ratio", 0.01)
    _, whole, _, _ = run_main(*flags, *in_folder("whole"))
    done = []
    trained = train._trained
    monkeypatch.setattr(train, "_trained", lambda *args: done.append(args[0].settings.lr) or trained(*args))
    for iteration in (16, 5):  # in the third candidate, the second diverges in its first epoch; and there again
        with monkeypatch.context() as patch:
            killed_at(patch, iteration)
            call_killed(run_main, *flags, *in_folder("parts"), "--save_every", 3)
    assert done[:2] == [1e-3, 1e30] and set(done[2:]) == {3e-3}
    _, resumed, _, _ = run_main(*flags, *in_folder("parts"), "--save_every", 3)
    assert outcome("parts", resumed) == outcome("whole", whole)
    tables = [pd.read_csv(next(Path(name).rglob("search.csv"))) for name in ("whole", "parts")]
    pd.testing.assert_frame_equal(*tables)
    assert resumed["search_seconds"] > 0 and not list(Path("parts").rglob("*.pt"))


# --- damaged states, and states of something else


@pytest.fixture
def stopped(run_main, monkeypatch):
    """Flags of a run that was stopped after iteration 10, and its two states, the newer one first."""
    flags = ("--lr", 1e-3, "--density_ratio", 0.01, *SHORT, "--total_iters", 15, "--save_every", 3)
    with monkeypatch.context() as patch:
        killed_at(patch, 10)
        call_killed(run_main, *flags, *in_folder("parts"))
    return flags, sorted(Path("parts").rglob("*.pt"), reverse=True)


def test_the_newest_two_states_are_kept(stopped):
    assert [path.name[:18] for path in stopped[1]] == ["training-000000009", "training-000000006"]
    assert not list(Path("parts").rglob("*.part"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_a_damaged_state_falls_back_to_the_one_before(run_main, stopped, damage):
    flags, (newest, _) = stopped
    damage(newest)
    _, resumed, out, err = run_main(*flags, *in_folder("parts"))
    assert "goes on after iteration 6," in out and f"{newest} is damaged" in err
    _, whole, _, _ = run_main(*flags, *in_folder("whole"))
    assert outcome("parts", resumed) == outcome("whole", whole)


def test_without_a_readable_state_the_run_begins_anew(run_main, stopped):
    flags, states = stopped
    for path in states:
        cut(path)
    _, resumed, out, err = run_main(*flags, *in_folder("parts"))
    assert "goes on after" not in out and err.count("is damaged") == 2
    _, whole, _, _ = run_main(*flags, *in_folder("whole"))
    assert outcome("parts", resumed) == outcome("whole", whole)


def test_a_state_that_runs_code_is_not_loaded(run_main, stopped):
    flags, (newest, _) = stopped

    class Evil:
        def __reduce__(self):
            return (open, ("evil", "w"))

    content = torch.load(newest, weights_only=True)
    newest.unlink()
    States(newest.parent, "training", content["belongs_to"]).save(9, {"fit": Evil()})
    _, _, out, err = run_main(*flags, *in_folder("parts"))
    assert "goes on after iteration 6," in out and "is damaged" in err and not Path("evil").exists()


def test_a_state_of_other_images_or_weights_is_not_taken(run_main, stopped, monkeypatch):
    flags, (newest, older) = stopped
    older.unlink()
    content = torch.load(newest, weights_only=True)
    newest.unlink()
    belongs_to = content["belongs_to"] | {"weights": "0" * 64}
    States(newest.parent, "training", belongs_to).save(90, content["state"])
    with monkeypatch.context() as patch:
        killed_at(patch, 8)
        call_killed(run_main, *flags, *in_folder("parts"))
    code, _, out, _ = run_main(*flags, *in_folder("parts"))
    assert code == 0 and "goes on after iteration 6," in out  # of the second attempt, which the other state left alone


def test_a_look_at_other_images_costs_a_stopped_run_nothing(run_main, stopped):
    flags, (newest, older) = stopped
    content = torch.load(newest, weights_only=True)
    elsewhere = States(newest.parent, "training", content["belongs_to"] | {"split": "0" * 64})
    assert elsewhere.number == 0 and elsewhere.take() is None and newest.exists() and older.exists()
    _, _, out, _ = run_main(*flags, *in_folder("parts"))
    assert "goes on after iteration 9," in out
    elsewhere = States(newest.parent, "training", {})
    assert elsewhere.number == 0


def test_other_settings_are_another_run(run_main, stopped):
    flags, states = stopped
    code, record, out, _ = run_main(*flags, *in_folder("parts"), "--lr", 2e-3)
    assert code == 0 and record["iterations"] == 15 and "goes on after" not in out and all(map(Path.exists, states))


def test_force_begins_anew(run_main, stopped, monkeypatch):
    flags, states = stopped
    with monkeypatch.context() as patch:
        killed_at(patch, 4)
        call_killed(run_main, *flags, *in_folder("parts"), "--force")
    assert not any(map(Path.exists, states))
    code, _, out, _ = run_main(*flags, *in_folder("parts"))
    assert code == 0 and "goes on after iteration 3," in out


def test_a_stopped_force_says_how_to_go_on(run_main, stopped, monkeypatch, capsys):
    flags, _ = stopped
    with monkeypatch.context() as patch:
        killed_at(patch, 5)
        call_killed(run_main, *flags, *in_folder("parts"), "--force")
    assert "note: without --force the same command goes on" in capsys.readouterr().out
    _, record, out, _ = run_main(*flags, *in_folder("parts"))
    assert "goes on after iteration 3," in out
    with monkeypatch.context() as patch:
        killed_at(patch, 5)
        call_killed(run_main, *flags, *in_folder("parts"), "--force")
    assert "goes on" not in capsys.readouterr().out  # for without --force it is done already
    assert not list(Path("parts").rglob("*.pt")) and Path("parts", record["run_id"], "result.json").exists()


def test_a_stop_after_the_record_leaves_no_states(run_main, monkeypatch):
    def killed(results):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run_utils, "rebuild_table", killed)
        patch.setattr(run_utils.Run, "forget_states", lambda self: None)
        call_killed(run_main, *SHORT, "--total_iters", 9, "--save_every", 3)
        patch.undo()
    assert len(list(Path("results").rglob("*.pt"))) == 2  # as SIGKILL would leave them
    (folder,) = {path.parent for path in Path("results").rglob("*.pt")}
    with monkeypatch.context() as patch:
        patch.setattr(run_utils, "rebuild_table", killed)
        call_killed(run_main, *SHORT, "--total_iters", 9, "--save_every", 3, "--force")
    assert not list(folder.glob("*.pt")) and (folder / "result.json").exists()


def test_a_search_whose_rows_do_not_fit_on_the_disk_keeps_its_candidates(run_main, monkeypatch):
    replace = Path.replace

    def full(path, target):
        if Path(target).name.startswith("search-"):
            raise OSError(28, "No space left on device", str(target))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", full)
    flags = (*SHORT, "--eval_every", 0, "--total_iters", 9, "--save_every", 3, "--search", "lr=1e-3,3e-3")
    with monkeypatch.context() as patch:
        killed_at(patch, 12)
        call_killed(run_main, *flags)
    assert list(Path("results").rglob("candidate1-*.pt"))


def test_save_every_may_change_on_the_way(run_main, stopped):
    flags, _ = stopped
    _, resumed, out, _ = run_main(*flags, *in_folder("parts"), "--save_every", 0)
    _, whole, _, _ = run_main(*flags, *in_folder("whole"))
    assert "goes on after iteration 9," in out and outcome("parts", resumed) == outcome("whole", whole)
    code, _, _, err = run_main("--save_every", -1)
    assert code == 2 and "--save_every must be at least 0" in err


def test_a_full_disk_stops_no_training(run_main, monkeypatch):
    replace = Path.replace

    def full(path, target):
        if str(target).endswith(".pt"):
            raise OSError(28, "No space left on device", str(target))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", full)
    code, record, _, err = run_main(*SHORT, "--total_iters", 9, "--save_every", 3)
    assert code == 0 and record["iterations"] == 9 and err.count("could not be saved (No space left on device)") == 2
    assert not list(Path("results").rglob("*.part"))


def test_a_run_that_diverges_leaves_nothing(run_main):
    code, _, _, err = run_main(*SHORT, "--total_iters", 90, "--lr", 1e30, "--density_ratio", 1, "--save_every", 3)
    assert code == 2 and "the training loss is nan" in err and not Path("results").exists()


# --- real signals


def command(results: Path, *flags) -> list[str]:
    words = (*SHORT, *FLAGS["so"], "--total_iters", 60, "--save_every", 3, *flags)
    return [sys.executable, "main.py", *map(str, words), "--results_dir", str(results), "--cache_dir", str(results)]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_run_that_then_goes_on(tmp_path, sent):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(tmp_path / "parts"), cwd=run_utils.PROJECT, env=environment, stdout=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list(tmp_path.rglob("training-*.pt")):
        time.sleep(0.01)
    process.send_signal(sent)
    out, _ = process.communicate()
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[sent]
    (folder,) = (tmp_path / "parts").glob("so_*")
    if sent != signal.SIGKILL:
        assert "the same command goes on where this run was stopped" in out and not (folder / ".lock").exists()
    resumed = entry.main(command(tmp_path / "parts")[2:])
    whole = entry.main([*command(tmp_path / "whole", "--save_every", 0)[2:]])
    curves = [(tmp_path / name / whole["run_id"] / "curve.csv").read_text() for name in ("parts", "whole")]
    assert curves[0] == curves[1] and resumed["test_accuracy"] == whole["test_accuracy"]


def test_two_runs_at_once_do_not_write_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--shots", "1", "--save_path", "weights"]
    with run_utils.Run(run_utils.parse(words)), pytest.raises(run_utils.UserError, match="about to write"):
        run_utils.Run(run_utils.parse([*words, "--lr", "0.5"])).__enter__()
    assert not list(tmp_path.iterdir())
    with run_utils.Run(run_utils.parse([*words, "--lr", "0.5"])):
        pass


def test_a_stop_before_the_first_state_leaves_nothing_and_says_so(run_main, monkeypatch):
    killed_at(monkeypatch, 2)
    call_killed(run_main, *SHORT, "--total_iters", 9)
    assert not Path("results").exists()
    monkeypatch.setattr(train.Stopwatch, "__init__", interrupted)
    code, _, out, err = run_main(*SHORT, "--total_iters", 9)
    assert code == 130 and "no state was written yet (--save_every)" in out and err.endswith("interrupted\n")
    assert not Path("results").exists()


def test_a_stop_of_a_method_without_iterations_does_not_speak_of_states(run_main, monkeypatch):
    monkeypatch.setattr(train.Evaluator, "zero_shot", interrupted)
    code, _, out, _ = run_main("--method", "linear_probe", "--shots", 1, "--workers", 0)
    assert code == 130 and "state" not in out and not Path("results").exists()


def interrupted(*_):
    raise KeyboardInterrupt


# --- TensorBoard


def test_tensorboard_shows_the_curve(run_main, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = (*SHORT, *FLAGS["so"], "--total_iters", 12, "--save_every", 3, "--tensorboard")
    with monkeypatch.context() as patch:
        killed_at(patch, 8)
        call_killed(run_main, *flags)
    _, record, _, _ = run_main(*flags)
    folder = Path("results", record["run_id"])
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    shown = EventAccumulator(str(folder)).Reload()
    curve = pd.read_csv(folder / "curve.csv")
    assert shown.Tags()["scalars"] == ["loss", "train_accuracy", "lr", "test_accuracy"]
    for name in ("loss", "train_accuracy", "lr"):
        points = shown.Scalars(name)
        assert [point.step for point in points] == curve.iteration.tolist() == [3, 6, 9, 12]
        assert [point.value for point in points] == pytest.approx(curve[name].tolist(), rel=1e-6)
    tested = {point.step: point.value for point in shown.Scalars("test_accuracy")}
    asked = curve.dropna().set_index("iteration").test_accuracy.to_dict()
    assert tested == pytest.approx(asked | {12: record["test_accuracy"]}, rel=1e-6)


def test_without_tensorboard_there_are_no_events_and_with_it_missing_a_clear_line(run_main, monkeypatch):
    _, record, _, _ = run_main(*SHORT, "--total_iters", 3)
    assert not list(Path("results").rglob("events*"))
    config = yaml.safe_load(Path("results", record["run_id"], "config.yaml").read_text())
    assert config["tensorboard"] is False and config["save_every"] == 1000
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    code, _, _, err = run_main(*SHORT, "--tensorboard", "--force")
    assert code == 2 and err == (
        "error: --tensorboard needs the package tensorboard; pip install -r requirements-tensorboard.txt\n"
    )
