"""Sweeps: the grid, the shell loop, and runs as jobs on this machine and on a slurm that is played by scripts."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from support.runs import MEASURED, call

import main as entry
from arguments import parse
from run_utils import run_identity
from scripts import sweep
from scripts.sweeping import clusters, estimates
from scripts.sweeping.grid import cells, read_grid

PROJECT = Path(__file__).parent.parent
QUICK = ("--shots", "1", "--total_iters", "2")
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc for parents")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def run_sweep():
    """Calls sweep.py and returns (exit code, stdout, stderr)."""

    def run(*argv):
        code, _, out, err = call(sweep.main, *argv)
        return code, out, err

    return run


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Puts a script in the place of main.py; `notes()` are what its runs noted down."""
    prelude = f"""
import json, os, signal, sys, time
words = sys.argv[1:]
def of(name):
    return words[words.index("--" + name) + 1]
def note(**values):
    with open({str(tmp_path / "notes")!r}, "a") as file:
        file.write(json.dumps(dict(method=of("method"), shots=of("shots"), seed=of("seed")) | values) + "\\n")
"""

    def make(body):
        (tmp_path / "stub.py").write_text(prelude + body)
        monkeypatch.setattr(clusters, "MAIN", tmp_path / "stub.py")

    def notes():
        path = tmp_path / "notes"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    make.notes = notes
    return make


@pytest.fixture
def aside():
    """Starts a function in a thread, which must have ended when the test ends."""
    threads = []

    def start(function):
        threads.append(threading.Thread(target=function, daemon=True))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def one_line_error(outcome, *words):
    code, out, err = outcome
    line = err.splitlines()[-1]
    assert code == 2 and not out and line.startswith("error: ") and "Traceback" not in err
    assert all(word in line for word in words), line


def table(results):
    return pd.read_csv(Path(results) / "results.csv").drop(columns=[*MEASURED]).sort_values("run_id", ignore_index=True)


# --- real runs


def test_both_sweeps_do_what_main_does_and_skip_what_is_done(run_main, run_sweep, all_digits, tmp_path):
    run_main(*QUICK, "--seed", 5, "--results_dir", "direct")
    flags = [*QUICK, "--cache_dir", tmp_path / "cache", "--results_dir", "swept"]
    code, out, err = run_sweep("--methods", "so", "--seeds", 5, *flags)
    assert code == 0 and "1 run: 1 done, 0 were done before, 0 failed" in out and "sweep: 100%" in err
    (log,) = Path("swept/sweeps").glob("*/*")
    assert "->  so" in log.read_text()
    pd.testing.assert_frame_equal(table("swept"), table("direct"))
    curve = next(Path("direct").glob("so_*/curve.csv"))
    assert Path("swept", curve.parent.name, "curve.csv").read_bytes() == curve.read_bytes()

    environment = os.environ | {"PYTHON": sys.executable, "METHODS": "so", "SHOTS": "1", "SEEDS": "5"}
    command = ["bash", PROJECT / "scripts" / "sweep.sh", *QUICK[2:]]
    done = subprocess.run(command, env=environment | {"RESULTS_DIR": "swept"}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("already done") == 1

    Path("swept/results.csv").unlink()  # as if a run had been killed before it wrote the table
    assert "1 run: 0 done, 1 were done before, 0 failed" in run_sweep("--methods", "so", "--seeds", 5, *flags)[1]
    assert len(list(Path("swept/sweeps").iterdir())) == 1 and len(table("swept")) == 1


@pytest.mark.parametrize("succeeds", [True, False])
def test_a_run_waits_for_another_that_does_it(run_main, aside, succeeds):
    argv = ("--method", "zero_shot", "--shots", "1", "--seed", "5")
    _, known, _, _ = run_main(*argv, "--results_dir", "earlier")
    (run,), locked = entry.planned(parse(argv)), threading.Event()

    def other():
        with run.claimed():
            locked.set()
            time.sleep(0.5)
            if succeeds:
                run.folder.write(known | {"test_accuracy": 12.0}, {})

    aside(other)
    assert locked.wait(20)
    code, record, out, _ = run_main(*argv, "--wait")
    assert code == 0 and ("already done" in out) == succeeds
    assert record["test_accuracy"] == (12.0 if succeeds else known["test_accuracy"])


# --- sweep.sh


@pytest.fixture
def shell_sweep(tmp_path):
    """Starts sweep.sh with a script in the place of Python, which notes its arguments."""

    def start(body, *flags, **variables):
        python = tmp_path / "python"
        python.write_text(
            f'#!/usr/bin/env bash\n[ "$1" = -c ] && exit $NO_TORCH\necho "$@" >> {tmp_path}/calls\n{body}\n'
        )
        python.chmod(0o755)
        command = ["bash", PROJECT / "scripts" / "sweep.sh", *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=os.environ | {"PYTHON": str(python), "NO_TORCH": "0"} | variables, **pipes)

    start.calls = lambda: [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    return start


def test_the_shell_loop_continues_after_failures_and_lists_them(shell_sweep):
    grid = {"METHODS": "so lora", "DATASETS": "dtd", "SHOTS": "1 4", "SEEDS": "1 2", "ROOT_PATH": "/my data"}
    fails = 'case "$*" in *"so"*"--shots 4 --seed 2"*) exit 3 ;; *"lora"*"--shots 1 --seed 1"*) exit 2 ;; esac'
    process = shell_sweep(fails, "--template", "a {}", **grid)
    _, err = process.communicate()
    assert process.returncode == 1
    runs = [call[2:9:2] for call in shell_sweep.calls()]
    assert sorted(runs) == sorted([m, "dtd", n, s] for m in ("so", "lora") for n in "14" for s in "12")
    first, second = [line for line in err.splitlines() if line.startswith("(exit code")]
    assert first.startswith("(exit code 2)") and second.startswith("(exit code 3)")
    words = shlex.split(second.partition(") ")[2])
    assert Path(words[1]).samefile(PROJECT / "main.py")
    assert words[2:] == shlex.split(
        "--method so --dataset dtd --shots 4 --seed 2 --root_path '/my data' --results_dir results --wait "
        "--template 'a {}'"
    )


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_shell_loop_and_its_run(shell_sweep, tmp_path, sent, code):
    body = (
        f"trap 'touch {tmp_path}/terminated; exit 143' TERM\ntouch {tmp_path}/running\nwhile true; do sleep 0.05; done"
    )
    process = shell_sweep(body, SEEDS="1 2")
    while not (tmp_path / "running").exists():
        time.sleep(0.01)
    process.send_signal(sent)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code and "failed" not in err
    assert (tmp_path / "terminated").exists() and len(shell_sweep.calls()) == 1


@pytest.mark.parametrize("lacking, named", [({"PYTHON": "./none"}, "./none"), ({"NO_TORCH": "1"}, "torch")])
def test_the_shell_loop_says_once_that_the_environment_is_missing(shell_sweep, lacking, named):
    process = shell_sweep("", **lacking)
    _, err = process.communicate()
    assert process.returncode == 2 and len(err.splitlines()) == 1 and named in err


# --- the grid


def write_grid(**content):
    Path("grid.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return "--grid", "grid.yaml"


def test_a_grid_is_all_combinations_with_the_first_seed_first():
    write_grid(
        methods=["lora"],
        rows={
            "static": {"config": str(PROJECT / "configs" / "ablations" / "static_support.yaml")},
            "searched": {"method": "so", "search": {"lr": ["1e-4", 0.1]}, "flip": True, "template": ["a {}", "b {}"]},
        },
        settings={"total_iters": 7, "lr": 5, "draw": "coop"},
        shots=[1, 4],
        seeds=[2, 1],
    )
    found = cells(read_grid(Path("grid.yaml")), ["--lr", "3e-4"])
    assert [(cell.settings.seed, cell.settings.shots, cell.settings.method) for cell in found] == [
        (seed, shots, method) for seed in (2, 1) for shots in (1, 4) for method in ("so_ablation", "so", "lora")
    ]
    shared = {(c.settings.dataset, c.settings.draw, c.settings.wait, c.config.hparams.lr) for c in found}
    assert shared == {("digits", "coop", True, 3e-4)}
    static, searched, lora = [cell.config for cell in found[:3]]
    assert static.hparams.support == "static" and not static.search and lora.hparams.total_iters == 7
    assert searched.search == {"lr": [1e-4, 0.1]} and searched.settings.template == ("a {}", "b {}")
    assert all(parse(shlex.split(cell.command)[2:]) == cell.config for cell in found)


def test_a_list_is_a_run_for_each_value():
    rows = {"adam": {"method": "adam", "lr": ["1e-5", 0.1]}, "prolip": {"method": "prolip", "epochs": 7}}
    rows["as many iterations"] = {"method": "prolip", "total_iters": 7}
    grid = {"rows": rows, "settings": {"precision": ["fp32", "bf16"]}, "seeds": [1], "shots": [1]}
    found = [(cell.config.hparams.lr, cell.settings.precision) for cell in cells(grid, [])]
    assert found == [(lr, precision) for lr in (1e-5, 0.1, 1e-3, 1e-3) for precision in ("fp32", "bf16")]


@pytest.mark.parametrize("path", sorted((PROJECT / "configs" / "grids").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_grids_that_ship_are_runs(path, monkeypatch):
    monkeypatch.chdir(PROJECT)
    found = cells(read_grid(path) | {"seeds": [1], "shots": [1]}, [])
    assert {cell.settings.test_part for cell in found} == {"val" if path.stem == "tune_digits" else "test"}
    assert {"so", "lora", "tip_adapter_f"} <= {cell.settings.method for cell in found}


MISTAKES = {
    "a method": (["--methods", "so", "lorra"], "lorra"),
    "a flag": (["--total_iter", "2"], "--total_iter"),
    "a flag of another method": (["--methods", "so", "zero_shot", "--total_iters", "2"], "--method zero_shot"),
    "a value": (["--shots", "1", "0"], "--shots 0"),
    "twice": (["--seeds", "1", "1"], "twice"),
    "commas": (["--methods", "so,lora"], "so lora"),
    "one seed": (["--seed", "1"], "--seeds"),
    "workers": (["--workers", "0"], "--workers"),
    "main's workers": (["--", "--workers", "-1"], "--workers"),
    "no file": (["--grid", "none.yaml"], "none.yaml"),
    "no slurm": (["--cluster", "slurm"], "srun"),
    "device": (["--cluster", "slurm", "--device", "cuda"], "--gpus_per_run"),
}
GRIDS = {
    "a key": ({"method": ["so"]}, "'method'"),
    "no list": ({"shots": 4}, "shots"),
    "no rows": ({"rows": ["so"]}, "rows"),
    "no settings": ({"settings": 3}, "settings"),
    "no values": ({"rows": {"x": {"lr": []}}}, "rows: x"),
    "a row's": ({"rows": {"x": {"rankk": 3}}}, "--rankk"),
    "folders": ({"rows": {"x": {"results_dir": "a"}, "y": {"method": "adam"}}}, "--results_dir"),
    "weights": ({"rows": {"x": {"lr": [1, 2]}}, "settings": {"save_path": "w"}}, "so.safetensors"),
}


@pytest.mark.parametrize("given, word", [*MISTAKES.values(), *GRIDS.values()], ids=[*MISTAKES, *GRIDS])
def test_a_mistake_is_one_line_before_anything_starts(run_sweep, monkeypatch, tmp_path, given, word):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))  # without srun
    argv = given if isinstance(given, list) else write_grid(**given)
    before = list(tmp_path.iterdir())
    one_line_error(run_sweep(*argv), word)
    assert list(tmp_path.iterdir()) == before


def test_a_file_that_is_no_yaml_is_named(run_sweep):
    Path("grid.yaml").write_text("shots: [")
    one_line_error(run_sweep("--grid", "grid.yaml"), "grid.yaml")


def test_without_submitit_the_remedy_is_named(run_sweep, monkeypatch):
    monkeypatch.setattr(sweep.importlib.util, "find_spec", lambda name: None)
    one_line_error(run_sweep(*QUICK), "requirements-all.txt")
    assert run_sweep(*QUICK, "--dry_run")[0] == 0


def test_what_is_recorded_is_known_as_main_knows_it(run_sweep):
    for method in ("so", "tip_adapter_f"):  # iterations and epochs
        (run,) = entry.planned(parse(["--method", method, "--shots", "1", "--seed", "1"]))
        made_up = {"test_accuracy": 50.0, "trainable_weights": 1, "split_sha256": run.task.split_sha256}
        run.folder.write(made_up | {"data_sha256": run.task.data_sha256, "template": run.template}, {})
    argv = ["--methods", "so", "tip_adapter_f", "lora", "--shots", 1, "--seeds", 1, "--dry_run"]
    assert "3 runs: 2 finished, 1 to do" in run_sweep(*argv)[1]
    assert "3 runs: 0 finished, 3 to do" in run_sweep(*argv, "--force")[1]
    for path in Path("results").glob("*/result.json"):
        path.write_text(path.read_text().replace(run.task.split_sha256, "0" * 64))
    assert "3 runs: 0 finished, 3 to do" in run_sweep(*argv)[1]


# --- runs of this machine


def test_failures_are_listed_with_their_logs(run_sweep, run_main, stub, tmp_path):
    _, record, _, _ = run_main("--method", "zero_shot", "--shots", 1, "--seed", 4)
    Path("results").rename("made")
    stub(f"""
if of("seed") == "2":
    print("a very special reason", file=sys.stderr)
    sys.exit(3)
if of("seed") == "3":
    os.kill(os.getpid(), signal.SIGKILL)
if of("seed") == "4":  # recorded before its job dies
    os.rename("{tmp_path}/made/{record["run_id"]}", "results/{record["run_id"]}")
if of("seed") in "45":
    os.kill(os.getppid(), signal.SIGKILL)
""")
    code, out, err = run_sweep("--methods", "zero_shot", "--shots", 1, "--seeds", 1, 2, 3, 4, 5, "--workers", 3)
    assert code == 1 and "5 runs: 2 done, 0 were done before, 3 failed" in out
    listed = sorted([line for line in err.splitlines() if line.startswith("failed: ")][-3:])
    for line, seed, ending in zip(listed, (2, 3, 5), ("exit code 3", "exit code -9", "its job was ended")):
        assert f"--seed {seed} " in line and f"({ending}; log: " in line
    assert "a very special reason" in Path(listed[0].partition("log: ")[2].rstrip(")")).read_text()
    (folder,) = Path("results/sweeps").iterdir()
    assert len(list(folder.glob("*_log.out"))) == 5


def test_gpus_are_assigned(run_sweep, stub, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    stub("""
processes = of("processes") if "--processes" in words else "1"
note(gpu=os.environ["CUDA_VISIBLE_DEVICES"], processes=processes)
while open("notes").read().count("gpu") < int(os.environ["TOGETHER"]):
    time.sleep(0.02)
""")

    def gpus(together, *argv):
        """The GPUs of the runs that are there at once: each waits until `together` have begun."""
        monkeypatch.setenv("TOGETHER", str(together))
        Path("notes").unlink(missing_ok=True)
        assert run_sweep(*QUICK, *argv)[0] == 0
        return [run["gpu"] for run in stub.notes()]

    assert sorted(gpus(2, "--seeds", 1, 2)) == ["4", "6"]
    assert sorted(gpus(3, "--seeds", 1, 2, 3, "--workers", 3)) == ["4", "4", "6"]
    assert gpus(1, "--seeds", 1, "--device", "cpu") == [""]
    assert gpus(1, "--seeds", 1, "--gpus_per_run", 2) == ["4,6"]
    assert [run["processes"] for run in stub.notes()] == ["2"]
    one_line_error(run_sweep(*QUICK, "--gpus_per_run", 3), "--gpus_per_run 3")
    one_line_error(run_sweep(*QUICK, "--gpus_per_run", 0), "--gpus_per_run 0")
    one_line_error(run_sweep(*QUICK, "--gpus_per_run", 2, "--processes", 2), "--processes")
    one_line_error(run_sweep(*QUICK, "--device", "cuda:1"), "--device")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-3f2a")
    one_line_error(run_sweep(*QUICK), "GPU-3f2a")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert clusters._gpus() == [0, 1]


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@needs_proc
def test_ctrl_c_ends_runs_in_order_and_nothing_else_hears_it(run_sweep, stub, aside):
    stub("""
def stop(*_):
    time.sleep(0.3)
    note(event="stopped")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
note(event="began", pid=os.getpid())
time.sleep(60)
""")
    began = []

    def press():
        while len(began) < 2:
            time.sleep(0.05)
            began[:] = stub.notes()
        for run in began:
            job = parent_of(run["pid"])
            assert os.getpgid(run["pid"]) != os.getpgid(0) == os.getpgid(job)
            os.kill(job, signal.SIGINT)  # as a terminal does
            os.kill(parent_of(job), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    aside(press)
    code, _, err = run_sweep(*QUICK, "--seeds", 1, 2, 3, "--workers", 2)
    assert code == 130 and "Traceback" not in err
    assert sorted((n["seed"], n["event"]) for n in stub.notes()) == [
        (seed, event) for seed in "12" for event in ("began", "stopped")
    ]
    assert not any(Path("/proc", str(run["pid"])).exists() for run in began)
    stub("")
    assert "1 done" in run_sweep(*QUICK, "--seeds", 1)[1]


# --- slurm, played by scripts: a file in the folder `queue` is a job


SLURM = """
import os, re, subprocess, sys
from pathlib import Path
queue, name, words = Path("QUEUE"), Path(sys.argv[0]).name, sys.argv[1:]
if name == "sbatch":
    script = Path(words[0])
    number = len(list(queue.parent.glob("submitted_*"))) + 1
    (queue.parent / f"submitted_{number}").write_text(script.read_text())
    array = re.search("--array=0-([0-9]+)", script.read_text())
    for index in range(int(array[1]) + 1) if array else [None]:
        job = f"{number}" if index is None else f"{number}_{index}"
        environment = os.environ | {"SLURM_JOB_ID": f"{number}"}
        if index is not None:
            environment |= {"SLURM_ARRAY_JOB_ID": f"{number}", "SLURM_ARRAY_TASK_ID": f"{index}"}
        loop = f"while bash {script.resolve()}; test -e {queue}/.{job}; do rm {queue}/.{job}; done; rm {queue}/{job}"
        quiet = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
        process = subprocess.Popen(["bash", "-c", loop], env=environment, start_new_session=True, **quiet)
        (queue / job).write_text(f"{process.pid}")
    print(f"Submitted batch job {number}")
elif name == "srun":
    log = words[words.index("--output") + 1].replace("%t", "0").replace("%j", os.environ["SLURM_JOB_ID"])
    for letter, variable in (("A", "JOB"), ("a", "TASK")):
        log = log.replace(f"%{letter}", os.environ.get(f"SLURM_ARRAY_{variable}_ID", ""))
    command = words[words.index(sys.executable) :]
    with open(log, "a") as file:
        sys.exit(subprocess.run(command, stdout=file, stderr=file).returncode)
elif name == "squeue":
    for path in queue.glob("[0-9]*"):
        print(path.name, "RUNNING")
elif name == "scontrol":
    assert words[0] == "requeue" and (queue / words[1]).exists()
    (queue / f".{words[1]}").touch()
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The folder that is the queue. The job numbers count from 1, with what was submitted beside it."""
    (tmp_path / "slurm" / "queue").mkdir(parents=True)
    for name in ("sbatch", "srun", "squeue", "scontrol"):
        path = tmp_path / "slurm" / name
        path.write_text(f"#!{sys.executable}{SLURM.replace('QUEUE', str(tmp_path / 'slurm' / 'queue'))}")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/slurm:{os.environ['PATH']}")
    monkeypatch.setattr(clusters.Slurm, "poll_seconds", 0.1)
    monkeypatch.setattr(clusters.Slurm, "LATE_SECONDS", 0.5)
    return tmp_path / "slurm" / "queue"


STOPPABLE = """
def stop(*_):
    note(event="stopped")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
note(event="began", pid=os.getpid(), device=of("device"))
"""
ON_SLURM = ("--cluster", "slurm", "--gpus_per_run", "0")


@needs_proc
def test_jobs_go_back_into_the_queue_before_the_time_limit_and_cancelled_ones_have_failed(
    run_sweep, stub, slurm, aside
):
    stub(f"""{STOPPABLE}
if of("seed") == "3" or of("seed") == "2" and open("notes").read().count('"seed": "2"') == 1:
    time.sleep(60)
""")

    def happen():
        began = {}
        while not {"2", "3"} <= began.keys():
            time.sleep(0.05)
            began = {n["seed"]: n["pid"] for n in stub.notes()}
        for process in (began["2"], parent_of(began["2"])):  # slurm signals all processes of a job
            os.kill(process, signal.SIGUSR2)
        for process in (began["3"], parent_of(began["3"])):
            os.kill(process, signal.SIGTERM)
        time.sleep(1)  # it is no failure yet: slurm may put the job back into the queue
        os.killpg(int((slurm / "1_2").read_text()), signal.SIGKILL)
        (slurm / "1_2").unlink()

    aside(happen)
    parameters = ["--partition", "p", "--time", 7, "--mem_gb", 3, "--cpus_per_task", 2, "--workers", 5]
    code, out, err = run_sweep(*QUICK, "--seeds", 1, 2, 3, *ON_SLURM, *parameters, "--slurm", "account=me")
    assert code == 1 and "3 runs: 2 done, 0 were done before, 1 failed" in out
    assert [(n["event"], n.get("device", "cpu")) for n in stub.notes() if n["seed"] == "2"] == [
        (event, "cpu") for event in ("began", "stopped", "began")
    ]
    failed = err.splitlines()[-1]
    assert failed.startswith("failed: ") and "--seed 3" in failed and "(its job was ended; log: " in failed
    assert "stub.py --method so" in Path(failed.partition("log: ")[2].rstrip(")")).read_text()
    submitted = Path("slurm/submitted_1").read_text()
    for line in ("partition=p", "time=7", "mem=3GB", "cpus-per-task=2", "array=0-2%3", "account=me", "requeue"):
        assert f"#SBATCH --{line}\n" in submitted
    assert "--gpus" not in submitted and "srun --unbuffered" in submitted and " --cpus-per-task=2 " in submitted
    assert all(path.suffix == ".out" for path in Path("results/sweeps").glob("*/*"))


def test_jobs_outlive_the_sweep_and_the_next_one_knows_them(run_sweep, stub, slurm, aside):
    stub(f"""{STOPPABLE}
while not os.path.exists("continue"):
    time.sleep(0.05)
""")

    def press():
        while len(stub.notes()) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    aside(press)
    code, _, err = run_sweep(*QUICK, "--seeds", 1, 2, *ON_SLURM)
    assert code == 130 and ": 1\n" in err  # the number of the jobs that stay
    timer = threading.Timer(1, Path("continue").touch)
    timer.start()
    code, out, _ = run_sweep(*QUICK, "--seeds", 1, 2, 3, "--workers", 9, *ON_SLURM)
    assert code == 0 and "3 runs: 3 done" in out
    assert sorted(n["seed"] for n in stub.notes()) == ["1", "2", "3"]
    assert "--array" not in Path("slurm/submitted_2").read_text() and not Path("slurm/submitted_3").exists()


def test_what_slurm_rejects_is_one_line(run_sweep, slurm):
    reason = "invalid partition specified: p"
    (slurm.parent / "sbatch").write_text(f"#!/bin/sh\necho 'sbatch: error: {reason}' >&2\nexit 1\n")
    one_line_error(run_sweep(*QUICK, *ON_SLURM, "--partition", "p"), reason)
    one_line_error(run_sweep(*QUICK, *ON_SLURM, "--slurm", "acount=me"), "acount")
    one_line_error(run_sweep(*QUICK, *ON_SLURM, "--slurm", "me"), "--slurm me")
    assert not list(Path("results").glob("sweeps/*"))


def test_runs_of_a_cluster_are_known_without_its_gpus():
    (there,) = cells({"seeds": [1], "shots": [1]}, [], "cuda")
    assert there.words[-2:] == ("--device", "cuda") and there.settings.device == "cuda"
    (here,) = cells({"seeds": [1], "shots": [1]}, ["--device", "cpu"])
    moved = dataclasses.replace(here.config, settings=dataclasses.replace(here.settings, device="cuda"))
    assert run_identity(moved, 1) == run_identity(there.config, 1) != run_identity(here.config, 1)


# --- what it will take


def test_estimates_are_from_records_of_the_same_kind(run_sweep, run_main):
    run_main("--method", "zero_shot", "--shots", 1, "--seed", 1)
    head = ["method", "dataset", "test_dataset", "classes", "backbone", "precision", "eval_only"]
    head += ["batch_size", "encoder", "position", "sampled_gradients", "shots", "epochs", "iterations"]
    head += ["train_seconds", "eval_seconds", "stopped_early"]
    here = ("digits", "digits", "all", "tiny", "fp32", False)
    iterates, other = (32, "both", "all", True), (None, None, None, None)
    rows = [
        ("so", *here, *iterates, 16, None, 100, 50, 2, False),
        ("so", *here, *iterates, 16, None, 200, 300, 4, True),
        ("zero_shot", *here, *other, 2, None, 0, 0, 1, False),
        ("linear_probe", *here, *other, 1, None, 0, 10, 1, False),
        ("prolip", *here, *iterates, 4, 300, 100, 30, 5, False),
    ]
    records = pd.DataFrame(rows, columns=head).assign(device="cpu")
    wrong = ("adam", "dtd", "dtd", "base", "ViT-B/16", "bf16", True, 8, "text", "up", False)
    like = records.iloc[0].to_dict() | {"train_seconds": 1e6, "eval_seconds": 1e6}
    unlike = [like | {name: value} for name, value in [*zip(head, wrong), ("device", "a GPU")]]
    records = pd.concat([records, pd.DataFrame(unlike)])
    for number, record in enumerate(json.loads(records.to_json(orient="records"))):
        folder = Path("results", f"made{number}")
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(record | {"run_id": "", "finished_at": ""}))
    write_grid(methods=["zero_shot", "linear_probe", "tip_adapter"], rows={"so": {"method": "so", "total_iters": 50}})
    code, out, _ = run_sweep("--grid", "grid.yaml", "--shots", 1, 4, "--seeds", 1, "--dry_run")
    lines = out.splitlines()
    assert code == 0 and not Path("results/sweeps").exists()
    assert [line.partition("  python")[0].strip() for line in lines[:8]] == [
        "to do, 0.015 h", "finished", "to do, 0.003 h", "to do",
        "to do, 0.015 h", "to do, 0.000 h", "to do", "to do",
    ]  # fmt: skip
    assert "of 4: 0.033 CPU hours" in lines[9]  # 2 x (50 x 1 + 3) + 1 + 11 seconds
    assert lines[10].startswith("no estimate for 3:")

    def seconds(*argv, records=records, device="cpu"):
        return estimates.seconds(parse([*map(str, argv)]), records, device)

    assert seconds("--method", "prolip", "--shots", 4) == 35 and seconds("--method", "prolip", "--shots", 1) is None
    assert seconds("--shots", 1, device="a GPU") == 600 * 1e4 + 1e6
    assert seconds("--shots", 1, device=None) == 600 * 1e4 + 1e6 and seconds("--shots", 1, device="another") is None
    assert seconds("--search", "lr=1e-4,1e-3") is None and seconds(records=pd.DataFrame()) is None
