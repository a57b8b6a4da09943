"""What identifies a run, what it writes, and what several runs beside each other must not do to one another."""

import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
import safetensors
import torch
from torchvision.transforms import v2

import clip
import datasets
import main as entry
import run_utils
import train
from clip.delta import apply_delta, save_delta
from optimizers import SO
from run_utils import Run, Settings, UserError, parse, rebuild_table

QUICK = ("--shots", 1, "--total_iters", 2, "--workers", 0)
NO_FORK = "fork" not in multiprocessing.get_all_start_methods()
needs_fork = pytest.mark.skipif(NO_FORK, reason="starting a Python with torch takes seconds")
SPLIT = "5" * 64
MADE_UP = {"test_accuracy": 50.0, "zero_shot_accuracy": 40.0, "trainable_weights": 1, "split_sha256": SPLIT}


def settings_of(folder=".", **options):
    return Settings(**{"backbone": "tiny", "device": "cpu", "workers": 0, "results_dir": str(folder)} | options)


def record(settings, **result):
    with Run(settings) as run:
        return run.record(MADE_UP | result, [], [])


def in_another_process(target, *args):
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    return process


# --- what a run hands on


@pytest.fixture
def no_test_images(monkeypatch):
    """Runs whose accuracies are made up, because nothing but them takes long."""
    monkeypatch.setattr(train.Evaluator, "zero_shot", lambda evaluator: 40.0)
    monkeypatch.setattr(train.Evaluator, "adapted", lambda evaluator, image_tower_is_trained: 50.0)


def test_augmentation_follows_the_settings(run_main, monkeypatch):
    transforms = []

    def loader(task, transform, *args, **options):
        transforms.append(transform)
        raise train.TrainingDiverged("seen enough")

    monkeypatch.setattr(datasets, "training_loader", loader)
    for flags in (("--min_area", "0.3", "--flip"), ("--min_area", "0.9", "--no-flip")):
        run_main(*QUICK, *flags)
    crops = [next(t for t in transform.transforms if isinstance(t, v2.RandomResizedCrop)) for transform in transforms]
    assert [(tuple(crop.scale), tuple(crop.size)) for crop in crops] == [((0.3, 1), (32, 32)), ((0.9, 1), (32, 32))]
    flips = [any(isinstance(t, v2.RandomHorizontalFlip) for t in transform.transforms) for transform in transforms]
    assert flips == [True, False]


def test_saved_weights_say_where_they_are_from(run_main, no_test_images):
    flags = (*QUICK, "--seed", 2**62, "--save_path", "saved", "--lr", "3e-3")
    _, result, _, _ = run_main(*flags)
    model, _ = clip.load("tiny")
    path = Path(f"saved/tiny/digits/1shots/seed{2**62}/so.safetensors")
    metadata = apply_delta(model, path, clip.weights_sha256(model))
    assert (metadata["run_id"], metadata["method"]) == (result["run_id"], "so")
    assert metadata["base_sha256"] == result["weights_sha256"]
    stored = json.loads(metadata["settings"])
    assert (stored["lr"], stored["seed"], stored["total_iters"], stored["backbone"]) == (3e-3, 2**62, 2, "tiny")
    assert stored.keys() == Settings.__dataclass_fields__.keys()


@pytest.mark.parametrize(
    "error, code, words",
    [
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore"), 2, ["error: ", "--batch_size"]),
        (train.TrainingDiverged("the training loss is nan"), 2, ["error: ", "loss is nan"]),
    ],
    ids=["ctrl-c", "memory", "divergence"],
)
@pytest.mark.parametrize("when", ["training", "evaluation", "recording"])
def test_a_run_that_ends_in_the_middle_says_so_in_one_line(
    run_main, no_test_images, monkeypatch, error, code, words, when
):
    def fails(*args, **_):
        if when != "recording" or args[0].name == "result.json":
            raise error
        write(*args)

    write = run_utils.write_atomically
    place, name = {
        "training": (SO, "step"),
        "evaluation": (train.Evaluator, "adapted"),
        "recording": (run_utils, "write_atomically"),
    }[when]
    monkeypatch.setattr(place, name, fails)
    flags = () if when == "recording" else ("--save_path", "saved")
    try:
        ended, result, out, err = run_main(*QUICK, *flags)
    except KeyboardInterrupt:
        pytest.fail("an interruption with a traceback")
    assert ended == code and result is None and "Traceback" not in err and "already" not in out
    lines = [line for line in err.splitlines() if line.strip() and "it/s" not in line and "batch/s" not in line]
    assert len(lines) == 1 and all(word in lines[0] for word in words)
    assert not list(Path(".").iterdir()), "something was left behind"


def test_a_run_that_ends_in_the_middle_keeps_what_was_there(run_main, no_test_images, monkeypatch):
    _, result, _, _ = run_main(*QUICK, "--save_path", "saved")
    files = sorted(path for path in Path(".").rglob("*") if path.is_file() and path.suffix != ".lock")
    contents = [path.read_bytes() for path in files]

    def fails(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(SO, "step", fails)
    assert run_main(*QUICK, "--save_path", "saved", "--force")[0] == 130
    assert files == sorted(path for path in Path(".").rglob("*") if path.is_file() and path.suffix != ".lock")
    assert contents == [path.read_bytes() for path in files]
    assert run_main(*QUICK, "--save_path", "saved")[1] == result  # still recorded


# --- seeds and kernels


@pytest.fixture
def global_state(monkeypatch):
    """Puts back what make_reproducible sets for the whole process."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    places = (torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")
    places = (*places, (torch.utils.deterministic, "fill_uninitialized_memory"))
    before = [getattr(*place) for place in places]
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield places
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    for place, value in zip(places, before):
        setattr(*place, value)


def test_make_reproducible(global_state):
    torch.use_deterministic_algorithms(False)
    for place in global_state:
        setattr(*place, True)
    run_utils.make_reproducible(7)
    assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    assert [getattr(*place) for place in global_state] == [False, False, False]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"

    def draws(seed):
        run_utils.make_reproducible(seed)
        return torch.rand(1).item(), random.random()

    assert draws(7) == draws(7)
    assert all(a != b for a, b in zip(draws(7), draws(8)))


# --- identity


CHANGES = {
    "shots": 2,
    "seed": 4,
    "backbone": "other.pt",
    "prompts": "specific",
    "precision": "bf16",
    "lr": 1.5e-4,
    "n_iters": 7,
    "batch_size": 16,
    "early_stop_loss": 0.02,
    "min_area": 0.5,
    "flip": False,
    "eval_every": 5,
    "density_ratio": 1e-4,
    "t": 6,
    "prune_first": True,
    "sampled_gradients": False,
    "encoder": "text",
    "position": "up",
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_the_outcome_changes_the_run_id(name):
    base, other = settings_of(), settings_of(**{name: CHANGES[name]})
    assert base.run_id != other.run_id
    assert base.run_id == settings_of().run_id


def test_places_and_workers_do_not_change_the_run_id():
    elsewhere = settings_of(
        "r", workers=3, image_cache_mb=1, cache_dir="c", save_path="s", filename="f", force=True, root_path="d"
    )
    assert elsewhere.run_id == settings_of().run_id
    assert settings_of(n_iters=10, shots=2).run_id == settings_of(total_iters=20, shots=2).run_id


def test_the_run_id_of_zero_shot_knows_no_training():
    base = settings_of(method="zero_shot")
    training = ("lr", "n_iters", "batch_size", "early_stop_loss", "min_area", "flip", "eval_every")
    for name in (*training, "density_ratio", "t", "prune_first", "sampled_gradients", "encoder", "position"):
        assert settings_of(method="zero_shot", **{name: CHANGES[name]}).run_id == base.run_id, name
    for name in ("seed", "shots", "prompts", "precision", "backbone"):
        assert settings_of(method="zero_shot", **{name: CHANGES[name]}).run_id != base.run_id, name
    assert settings_of().run_id != base.run_id


# --- two runs and one file of weights


@pytest.fixture
def made_up(monkeypatch):
    """Training in no time: its weights are one number, 1 for the first training, 2 for the second, and their
    accuracy is that number. So the same settings may give other weights, as on two machines."""
    trained = 0

    def experiment(settings, task, run, log):
        nonlocal trained
        if settings.eval_only:
            with safetensors.safe_open(settings.checkpoint, "pt") as file:
                accuracy = file.get_tensor("x.values").item()
        else:
            trained += 1
            accuracy = float(trained)
        if settings.checkpoint and not settings.eval_only:
            changes = {"x": (torch.tensor([0], dtype=torch.int32), torch.tensor([accuracy]))}
            metadata = {"run_id": settings.run_id, "settings": json.dumps(asdict(settings))}
            save_delta(changes, settings.checkpoint, "0" * 64, metadata)
        return run.record(MADE_UP | {"test_accuracy": accuracy, "split_sha256": task.split_sha256}, [], [])

    monkeypatch.setattr(entry, "experiment", experiment)


def owner(path):
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata()["run_id"]


def test_evaluations_of_different_weights_are_different_runs(run_main, made_up):
    def evaluated(place):
        _, result, out, _ = run_main(*QUICK, "--save_path", place, "--eval_only")
        return result["test_accuracy"], "already done" in out

    for place, flags in (("a", ()), ("b", ()), ("c", ("--lr", "2e-3"))):
        assert run_main(*QUICK, "--save_path", place, *flags)[0] == 0
    assert [evaluated(place) for place in "abc"] == [(1, False), (2, False), (3, False)]
    assert [evaluated(place) for place in "abc"] == [(1, True), (2, True), (3, True)]
    run_main(*QUICK, "--save_path", "a", "--force")  # other weights in the same place
    run_main(*QUICK, "--save_path", "b", "--lr", "3e-3", "--force")
    assert [evaluated(place) for place in "ab"] == [(4, False), (5, False)]
    shutil.copytree("a", "moved")  # the same weights in another place
    assert evaluated("moved") == (4, True)


def test_weights_of_another_run_are_not_overwritten(run_main, made_up):
    path = Path("saved/tiny/digits/1shots/seed3/so.safetensors")
    _, first, _, _ = run_main(*QUICK, "--save_path", "saved", "--lr", "1e-3")
    whole, folders = path.read_bytes(), sorted(Path("results").iterdir())
    code, _, _, err = run_main(*QUICK, "--save_path", "saved", "--lr", "2e-3")
    assert code == 2 and path.read_bytes() == whole and sorted(Path("results").iterdir()) == folders
    assert all(word in err for word in (str(path), first["run_id"], "--filename", "--force"))
    assert run_main(*QUICK, "--save_path", "saved", "--lr", "2e-3", "--filename", "other")[0] == 0
    assert path.read_bytes() == whole and path.with_name("other.safetensors").is_file()
    _, second, _, _ = run_main(*QUICK, "--save_path", "saved", "--lr", "2e-3", "--force")
    assert owner(path) == second["run_id"] != first["run_id"]
    code, _, out, err = run_main(*QUICK, "--save_path", "saved", "--lr", "1e-3")
    assert code == 2 and "already done" not in out, "the first run's weights are gone"
    assert second["run_id"] in err


def test_a_file_that_is_no_weights_is_not_overwritten(run_main, made_up):
    path = Path("saved/tiny/digits/1shots/seed3/so.safetensors")
    path.parent.mkdir(parents=True)
    path.write_text("my thesis")
    code, _, _, err = run_main(*QUICK, "--save_path", "saved")
    assert code == 2 and "of this program" in err and path.read_text() == "my thesis"


# --- several processes


@needs_fork
def test_a_second_process_with_the_same_run_is_refused(tmp_path):
    settings, context = settings_of(tmp_path), multiprocessing.get_context("fork")
    entered, leave = context.Event(), context.Event()

    def first():
        with Run(settings) as run:
            (run.folder / "work in progress").write_text("hours of it")
            entered.set()
            leave.wait(20)
            run.record(MADE_UP, [], [])

    process = in_another_process(first)
    try:
        assert entered.wait(20)
        with pytest.raises(UserError, match="another process is doing this run"), Run(settings):
            pass
        assert (tmp_path / settings.run_id / "work in progress").read_text() == "hours of it"
        with Run(settings_of(tmp_path, seed=9)):  # another run is none of its business
            pass
    finally:
        leave.set()
        process.join()
    assert process.exitcode == 0 and Run(settings).finished(SPLIT)
    with Run(settings):  # free again
        pass
    assert [path.name for path in tmp_path.rglob("*.lock")] == [".results.lock"]


@needs_fork
def test_eight_processes_record_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(run_utils, "git_commit", lambda: "")
    write = run_utils.write_atomically

    def slow_write(path, text):
        # Who reads the records first writes the table last: without a lock, rows would be lost.
        if path.name == "results.csv":
            time.sleep(0.01 * (9 - text.count("\n")))
        write(path, text)

    monkeypatch.setattr(run_utils, "write_atomically", slow_write)
    start = multiprocessing.get_context("fork").Event()

    def one(seed):
        start.wait(20)
        record(settings_of(tmp_path, seed=seed), test_accuracy=10.0 + seed)

    processes = [in_another_process(one, seed) for seed in range(8)]
    start.set()
    table, seen = tmp_path / "results.csv", []
    while any(process.is_alive() for process in processes):
        if table.exists():
            rows = pd.read_csv(table)
            assert list(rows.columns[:6]) == ["run_id", "method", "dataset", "backbone", "shots", "seed"]
            assert list(rows.test_accuracy) == [10.0 + seed for seed in rows.seed] and rows.seed.is_unique
            seen.append(len(rows))
        time.sleep(0.002)
    assert [process.exitcode for process in processes] == [0] * 8
    assert seen == sorted(seen), "rows disappeared"
    assert sorted(pd.read_csv(table).seed) == list(range(8))
    assert not list(tmp_path.rglob("*.part"))


def test_a_table_that_cannot_be_written_whole_stays_as_it_was(tmp_path, monkeypatch):
    first = record(settings_of(tmp_path))["run_id"]
    before, sync = (tmp_path / "results.csv").read_text(), os.fsync

    def disk_full(descriptor):
        if any(part.stat().st_ino == os.fstat(descriptor).st_ino for part in tmp_path.glob("results.csv.*.part")):
            os.truncate(descriptor, len(before) // 2)
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        record(settings_of(tmp_path, seed=9))
    assert (tmp_path / "results.csv").read_text() == before and not list(tmp_path.rglob("*.part"))
    assert len(list(tmp_path.glob("*/result.json"))) == 2 and first in before


# --- the table


@pytest.mark.parametrize("damage", [b"", b'{\n  "run_id": "so_di', b"\xff\xfe\x00", b"\0" * 200])
def test_a_damaged_record_is_named_and_left_out(tmp_path, capsys, damage):
    ids = [record(settings_of(tmp_path, seed=seed))["run_id"] for seed in range(3)]
    path = tmp_path / ids[1] / "result.json"
    path.write_bytes(damage)
    capsys.readouterr()
    rebuild_table(tmp_path)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(path) in err and "--force" in err
    assert sorted(pd.read_csv(tmp_path / "results.csv").run_id) == sorted((ids[0], ids[2]))
    assert Run(settings_of(tmp_path, seed=0)).finished(SPLIT)["run_id"] == ids[0]
    assert Run(settings_of(tmp_path, seed=1)).finished(SPLIT) is None
    record(settings_of(tmp_path, seed=1))
    assert sorted(pd.read_csv(tmp_path / "results.csv").run_id) == sorted(ids)


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"run_id": "x"}'])
def test_what_is_json_but_no_record_is_left_out_too(tmp_path, capsys, text):
    settings = settings_of(tmp_path)
    run_id = record(settings)["run_id"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "result.json").write_text(text)
    rebuild_table(tmp_path)
    assert list(pd.read_csv(tmp_path / "results.csv").run_id) == [run_id]
    assert str(tmp_path / "other" / "result.json") in capsys.readouterr().err
    (tmp_path / run_id / "result.json").write_text(text)
    assert Run(settings).finished(SPLIT) is None


def test_whole_numbers_stay_whole_where_other_rows_have_none(run_main):
    for argv in (QUICK, ("--method", "zero_shot"), (*QUICK, "--t", 10**22)):
        assert run_main(*argv)[0] == 0
    rows = pd.read_csv("results/results.csv", dtype=str, keep_default_na=False)
    assert sorted(rows["total_iters"]) == ["", "2", "2"] and sorted(rows["t"]) == ["", str(10**22), "5"]
    assert sorted(rows["lr"]) == ["", "0.001", "0.001"] and set(rows["search_seconds"]) == {"0.0"}


def test_columns_stand_in_one_order_whichever_methods_ran(tmp_path):
    first = "run_id method dataset backbone shots seed test_accuracy zero_shot_accuracy train_accuracy final_loss"
    first += " iterations stopped_early train_seconds eval_seconds search_seconds peak_memory_mb trainable_weights"
    first += " changed_weights optimizer_bytes checkpoint_bytes lr density_ratio t"
    last = "encoder position precision draw classes prompts template test_dataset root_path eval_only tuned_on"
    last += " split_sha256 data_sha256 weights_sha256 git_commit torch_version device finished_at"
    between = {"batch_size", "early_stop_loss", "eval_every", "flip", "min_area", "prune_first", "sampled_gradients"}
    between |= {"total_iters", "epochs"}
    last_result = {"template": "a photo of a {}.", "split_sha256": "s", "weights_sha256": "w", "final_loss": 0.5}
    for order in (("so", "zero_shot"), ("zero_shot", "so")):
        folder = tmp_path / order[0]
        for method in order:
            written = record(settings_of(folder, method=method), **last_result)
            in_file = list(json.loads((folder / written["run_id"] / "result.json").read_text()))
            middle = [name for name in in_file if name in between]
            assert in_file == [name for name in (*first.split(), *middle, *last.split()) if name in in_file]
        columns = list(pd.read_csv(folder / "results.csv").columns)
        assert columns[: len(first.split())] == first.split() and columns[-len(last.split()) :] == last.split()
        assert set(columns[len(first.split()) : -len(last.split())]) == between
        assert len(columns) == len(set(columns))


def test_a_search_is_written_beside_the_result_and_its_choice_is_recorded(tmp_path):
    settings = settings_of(tmp_path, search={"lr": [1e-3, 2e-3]}, lr=7.0)
    rows = [dict(lr=1e-3, val_accuracy=50.0, iterations=3, chosen=True)]
    rows += [dict(lr=2e-3, val_accuracy=None, iterations=None, chosen=False)]
    with Run(settings) as run:
        written = run.record(MADE_UP | {"lr": 1e-3, "tuned_on": "val", "search_seconds": 2.5}, [], [], search=rows)
    text = (tmp_path / settings.run_id / "search.csv").read_text()
    assert text == "lr,val_accuracy,iterations,chosen\n0.001,50.0,3,True\n0.002,,,False\n"
    assert (written["lr"], written["tuned_on"], written["search_seconds"]) == (1e-3, "val", 2.5)
    assert pd.read_csv(tmp_path / "results.csv").lr.item() == 1e-3
    repeated = parse(["--config", str(tmp_path / settings.run_id / "config.yaml")])
    assert repeated.search == {"lr": [1e-3, 2e-3]} and repeated.run_id == settings.run_id


# --- measurements


def test_peak_memory_is_in_mib():
    code = (  # a program of its own: in this one much may have been in use before, or be let go of meanwhile
        "import torch, run_utils\n"
        "def peak(): print(run_utils.peak_memory_mb(torch.device('cpu')))\n"
        "peak(); block = bytearray(b'x') * (200 * 2**20); peak(); del block; peak()"
    )
    command, folder = [sys.executable, "-c", code], Path(run_utils.__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    before, during, after = map(float, done.stdout.split())
    assert during - before == pytest.approx(200, abs=4) and before > 20
    assert after == pytest.approx(during, abs=4)  # a peak does not fall


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not let it begin anew")
def test_a_second_run_in_a_process_has_a_peak_of_its_own():
    code = (
        "import torch, run_utils\n"
        "def peak(): print(run_utils.peak_memory_mb(torch.device('cpu')))\n"
        "block = bytearray(b'x') * (200 * 2**20); del block; peak(); run_utils.reset_peak_memory('cpu'); peak()"
    )
    command, folder = [sys.executable, "-c", code], Path(run_utils.__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    first, second = map(float, done.stdout.split())
    assert first - second > 150


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_commit_is_forty_digits_and_says_when_files_differ(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(run_utils, "PROJECT", tmp_path)
    assert run_utils.git_commit() == ""

    def git(*words):
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
        done = subprocess.run(["git", "-C", tmp_path, *identity, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "--quiet")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--quiet", "-m", "first")
    git("tag", "-a", "v1", "-m", "a tag that must not take the commit's place")
    commit = run_utils.git_commit()
    assert commit == git("rev-parse", "HEAD") and re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "file").write_text("2")
    assert run_utils.git_commit() == commit + "+"


# --- settings that cannot work


def test_the_largest_seed():
    assert parse(["--seed", str(2**63 - 1)]).seed == 2**63 - 1
    for seed in (2**63, 2**64, -1):
        with pytest.raises(UserError, match="--seed"):
            parse(["--seed", str(seed)])


def test_null_in_a_config_file_is_refused_where_it_has_no_meaning(tmp_path):
    path = tmp_path / "c.yaml"
    optional = {"total_iters", "epochs", "workers", "save_path", "filename", "split", "eval_datasets"}
    for name in Settings.__dataclass_fields__:
        path.write_text(f"{name}: null\n")
        if name in optional:
            assert name == "workers" or getattr(parse(["--config", str(path)]), name) is None
        else:
            with pytest.raises(UserError, match=f"{name} must be .*not None"):
                parse(["--config", str(path)])
    path.write_text("s: null\n")
    with pytest.raises(UserError, match="s must be"):
        parse(["--config", str(path)])


@pytest.mark.parametrize(
    "flag, length",
    [("--filename", 300), ("--save_path", 300), ("--filename", 240)],
)
def test_names_that_no_disk_takes_are_refused_before_the_work(run_main, no_test_images, monkeypatch, flag, length):
    began = []
    monkeypatch.setattr(train, "fit", lambda *_: began.append(True) or train.Fit())
    before = ["--save_path", "saved"] if flag == "--filename" else []
    code, _, _, err = run_main(*QUICK, *before, flag, "n" * length)
    assert code == 2 and not began and len(err.splitlines()) == 1 and "nnn" in err
    assert not list(Path(".").iterdir()), "something was left behind"
