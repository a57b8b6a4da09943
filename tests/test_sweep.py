"""Sweeps: the grid, the shell loop, and runs as jobs on this machine and on a slurm that is played by scripts."""

import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

import main as entry
from run_utils import Run, UserError, parse
from scripts import sweep
from scripts.sweeping import clusters, estimates
from scripts.sweeping.grid import cells, read_grid

PROJECT = Path(__file__).parent.parent
TIMES = ["train_seconds", "eval_seconds", "search_seconds", "peak_memory_mb", "finished_at"]
QUICK = ("--shots", "1", "--total_iters", "2")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def run_sweep(capsys):
    """Calls sweep.py and returns (exit code, stdout, stderr)."""

    def call(*argv):
        with pytest.raises(SystemExit) as stop:
            sweep.main([str(word) for word in argv])
        return stop.value.code, *capsys.readouterr()

    return call


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

    make.notes = lambda: [json.loads(line) for line in Path("notes").read_text().splitlines()]
    return make


def table(results):
    return pd.read_csv(Path(results) / "results.csv").drop(columns=TIMES).sort_values("run_id", ignore_index=True)


# --- real runs


def test_both_sweeps_make_the_table_of_main_and_skip_what_is_done(run_main, run_sweep, tmp_path):
    for method in ("so", "zero_shot"):
        run_main(*QUICK, "--method", method, "--seed", 5, "--results_dir", "direct")
    flags = [*QUICK, "--cache_dir", tmp_path / "cache", "--results_dir", "swept"]
    code, out, err = run_sweep("--methods", "so", "--seeds", 5, *flags)
    assert code == 0 and "1 runs: 1 done, 0 were done before, 0 failed" in out and "sweep: 100%" in err
    (log,) = Path("swept/sweeps").glob("*/*")
    assert "->  so" in log.read_text() and len(list(Path("swept").glob("*/result.json"))) == 1

    environment = os.environ | {"PYTHON": sys.executable, "METHODS": "so zero_shot", "SHOTS": "1", "SEEDS": "5"}
    command = ["bash", PROJECT / "scripts" / "sweep.sh", *flags[:4], "--cache_dir", tmp_path / "cache"]
    done = subprocess.run(command, env=environment | {"RESULTS_DIR": "swept"}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("already done") == 1 and "failed" not in done.stderr
    pd.testing.assert_frame_equal(table("swept"), table("direct"))
    curve = next(Path("direct").glob("so_*/curve.csv"))
    assert Path("swept", curve.parent.name, "curve.csv").read_bytes() == curve.read_bytes()

    Path("swept/results.csv").unlink()  # as if a run had been killed before it wrote the table
    code, out, _ = run_sweep("--methods", "so", "zero_shot", "--seeds", 5, *flags)
    assert code == 0 and "2 runs: 0 done, 2 were done before, 0 failed" in out
    assert len(list(Path("swept/sweeps").iterdir())) == 1 and len(table("swept")) == 2


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="starting torch takes seconds")
@pytest.mark.parametrize("succeeds", [True, False])
def test_a_run_waits_for_another_process_that_does_it(run_main, succeeds):
    argv = ("--method", "zero_shot", "--shots", "1", "--seed", "5")

    def other():
        with Run(parse(argv)) as run:
            Path("locked").touch()
            time.sleep(1)
            if succeeds:
                known = json.loads(next(Path("earlier").glob("*/result.json")).read_text())
                run.record(known | {"test_accuracy": 12.0}, [], [])

    run_main(*argv, "--results_dir", "earlier")
    process = multiprocessing.get_context("fork").Process(target=other)
    process.start()
    while not Path("locked").exists():
        time.sleep(0.01)
    code, _, _, err = run_main(*argv)
    assert code == 2 and "another process" in err and "--wait" in err
    code, record, out, _ = run_main(*argv, "--wait")
    process.join()
    assert code == 0 and "waiting for it" in out and ("already done" in out) == succeeds
    assert record["test_accuracy"] == (12.0 if succeeds else record["zero_shot_accuracy"])
    folder = Path("results", record["run_id"])
    assert "wait" not in yaml.safe_load((folder / "config.yaml").read_text())


# --- sweep.sh


@pytest.fixture
def shell_sweep(tmp_path):
    """Starts sweep.sh with a script in the place of Python, which notes its arguments."""

    def start(body, *flags, **variables):
        python = tmp_path / "python"
        python.write_text(f'#!/usr/bin/env bash\necho "$@" >> {tmp_path}/calls\n{body}\n')
        python.chmod(0o755)
        environment = os.environ | {"PYTHON": str(python)} | variables
        command = ["bash", PROJECT / "scripts" / "sweep.sh", *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, **pipes)

    start.calls = lambda: [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    return start


def test_the_shell_loop_goes_on_after_failures_and_lists_them(shell_sweep):
    grid = {"METHODS": "so lora", "DATASETS": "dtd", "SHOTS": "1 4", "SEEDS": "1 2", "ROOT_PATH": "/my data"}
    fails = 'case "$*" in *"so"*"--shots 4 --seed 2"*) exit 3 ;; *"lora"*"--shots 1 --seed 1"*) exit 2 ;; esac'
    process = shell_sweep(fails, "--template", "a {}", **grid)
    _, err = process.communicate()
    assert process.returncode == 1
    runs = [call[2:9:2] for call in shell_sweep.calls()]
    assert sorted(runs) == sorted([m, "dtd", n, s] for m in ("so", "lora") for n in "14" for s in "12")
    listed = err[err.index("failed:") :].splitlines()[1:]
    assert [line.partition(")")[0] for line in listed] == ["(exit code 2", "(exit code 3"]
    words = shlex.split(listed[1].partition(") ")[2])
    assert words[1].endswith("main.py") and Path(words[1]).samefile(PROJECT / "main.py")
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
    assert process.returncode == code and "failed" not in err and "goes on" in err
    assert (tmp_path / "terminated").exists() and len(shell_sweep.calls()) == 1


def test_the_shell_loop_names_a_missing_python():
    command = ["bash", PROJECT / "scripts" / "sweep.sh"]
    done = subprocess.run(command, env=os.environ | {"PYTHON": "./none"}, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "./none" in done.stderr


# --- the grid


def write_grid(**content):
    Path("grid.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return "--grid", "grid.yaml"


def test_a_grid_is_all_combinations_with_the_first_seed_first():
    write_grid(
        methods=["lora"],
        rows={
            "static": {"config": str(PROJECT / "configs" / "ablations" / "static_support.yaml")},
            "searched": {
                "method": "so",
                "search": {"lr": ["1e-4", "2e-4"]},
                "flip": True,
                "template": ["a {}", "b {}"],
            },
        },
        settings={"total_iters": 7, "lr": 5, "sampled_gradients": False},
        shots=[1, 4],
        seeds=[2, 1],
    )
    found = cells(read_grid(Path("grid.yaml")), ["--lr", "3e-4"])
    settings = [cell.settings for cell in found]
    assert [(s.seed, s.shots, s.method) for s in settings] == [
        (seed, shots, method) for seed in (2, 1) for shots in (1, 4) for method in ("so_ablation", "so", "lora")
    ]
    assert {(s.dataset, s.total_iters, s.lr, s.wait, s.sampled_gradients) for s in settings} == {
        ("digits", 7, 3e-4, True, False)
    }
    static, searched, lora = settings[:3]
    assert static.support == "static" and not static.search and lora.rank == 2
    assert searched.search == {"lr": [1e-4, 2e-4]} and searched.flip and searched.template == ("a {}", "b {}")
    for cell in found:
        assert parse(shlex.split(cell.command)[2:]) == cell.settings
    own_epochs = cells({"methods": ["prolip"], "rows": {"x": {"method": "prolip", "total_iters": 300}}}, [])
    assert len({cell.key for cell in own_epochs}) == len(own_epochs)  # 300 epochs are not 300 iterations


def no_slurm(monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))


MISTAKES = {
    "a method": (["--methods", "so", "lorra"], ["lorra", "main.py --method lorra"]),
    "a flag": (["--total_iter", "2"], ["--total_iter", "meant --total_iters?"]),
    "a value": (["--shots", "1", "0"], ["--shots must be at least 1", "--shots 0"]),
    "twice": (["--seeds", "1", "1"], ["twice"]),
    "one seed": (["--seed", "1"], ["--seeds"]),
    "workers": (["--workers", "0"], ["--workers", "from 1 on"]),
    "main's workers": (["--", "--workers", "-1"], ["--workers must be at least 0"]),
    "no file": (["--grid", "none.yaml"], ["none.yaml", "No such file"]),
    "no slurm": (["--cluster", "slurm"], ["srun"]),
    "device": (["--cluster", "slurm", "--device", "cuda"], ["--device", "--gpus_per_task"]),
}
GRIDS = {
    "a key": ({"method": ["so"]}, ["'method'", "methods?"]),
    "no list": ({"shots": 4}, ["shots", "list"]),
    "no rows": ({"rows": ["so"]}, ["rows", "['so']"]),
    "no settings": ({"settings": 3}, ["settings", "3"]),
    "a row's": ({"rows": {"x": {"rankk": 3}}}, ["--rankk", "meant --rank?"]),
    "folders": ({"rows": {"x": {"results_dir": "a"}, "y": {"method": "adam"}}}, ["--results_dir"]),
    "weights": (
        {"rows": {"x": {"lr": 1}, "y": {"lr": 2}}, "settings": {"save_path": "w"}},
        ["so.safetensors", "filename"],
    ),
}


@pytest.mark.parametrize("argv, words", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_before_anything_starts(run_sweep, stub, monkeypatch, tmp_path, argv, words):
    no_slurm(monkeypatch)
    code, out, err = run_sweep(*argv)
    assert code == 2 and not out and err.startswith("error: ") and len(err.splitlines()) == 1
    assert all(word in err for word in words), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content, words", GRIDS.values(), ids=GRIDS)
def test_a_mistake_in_the_file_is_one_line(run_sweep, tmp_path, content, words):
    code, _, err = run_sweep(*write_grid(**content))
    assert code == 2 and len(err.splitlines()) == 1 and all(word in err for word in words), err
    Path("grid.yaml").write_text("shots: [")
    code, _, err = run_sweep("--grid", "grid.yaml")
    assert code == 2 and len(err.splitlines()) == 1 and "grid.yaml is not valid YAML" in err
    assert [path.name for path in tmp_path.iterdir()] == ["grid.yaml"]


def test_without_submitit_the_remedy_is_named(run_sweep, monkeypatch):
    monkeypatch.setattr(sweep.importlib.util, "find_spec", lambda name: None)
    code, _, err = run_sweep(*QUICK)
    assert code == 2 and err.splitlines()[-1].startswith("error: ") and "pip install -r requirements-sweep.txt" in err
    assert run_sweep(*QUICK, "--dry_run")[0] == 0


def test_what_is_recorded_is_known_as_main_knows_it(run_sweep):
    for method in ("so", "tip_adapter_f"):  # iterations and epochs
        ((run, task),) = entry.single_runs(parse(["--method", method, "--shots", "1", "--seed", "1"]))
        with run:
            made_up = {"test_accuracy": 50.0, "zero_shot_accuracy": 40.0, "trainable_weights": 1}
            run.record(made_up | {"split_sha256": task.split_sha256}, [], [])
    argv = ["--methods", "so", "tip_adapter_f", "lora", "--shots", 1, "--seeds", 1, "--dry_run"]
    assert "3 runs: 2 finished, 1 to do" in run_sweep(*argv)[1]
    assert "3 runs: 0 finished, 3 to do" in run_sweep(*argv, "--force")[1]
    for path in Path("results").glob("*/result.json"):
        path.write_text(path.read_text().replace(task.split_sha256, "0" * 64))
    assert "3 runs: 0 finished, 3 to do" in run_sweep(*argv)[1]


# --- runs of this machine


def test_failures_are_listed_with_their_logs(run_sweep, stub):
    stub("""
note()
if of("seed") == "2":
    print("a very special reason", file=sys.stderr)
    sys.exit(3)
if of("seed") == "3":
    os.kill(os.getpid(), signal.SIGKILL)
""")
    code, out, err = run_sweep("--methods", "so", "lora", *QUICK, "--seeds", 1, 2, 3, "--workers", 3)
    assert code == 1 and "6 runs: 2 done, 0 were done before, 4 failed" in out and len(stub.notes()) == 6
    listed = [line for line in err.splitlines() if line.startswith("failed: ")][-4:]
    assert sum("--seed 2" in line and "(exit code 3; " in line for line in listed) == 2
    assert sum("--seed 3" in line and "(exit code -9; " in line for line in listed) == 2
    logs = {line.partition("log: ")[2].rstrip(")") for line in listed}
    assert sum("a very special reason" in Path(log).read_text() for log in logs) == 2
    (folder,) = Path("results/sweeps").iterdir()
    assert len(list(folder.iterdir())) == 6 and all(path.name.endswith("_log.out") for path in folder.iterdir())


def test_a_job_that_dies_has_failed_unless_its_run_is_recorded(run_sweep, run_main, stub, tmp_path):
    _, record, _, _ = run_main("--method", "zero_shot", *QUICK, "--seed", 1)
    Path("results").rename("made")
    stub(f"""
if of("seed") == "1":
    os.rename("{tmp_path}/made/{record["run_id"]}", "results/{record["run_id"]}")
os.kill(os.getppid(), signal.SIGKILL)
""")
    code, out, err = run_sweep("--methods", "zero_shot", *QUICK, "--seeds", 2, 1, 3)
    assert code == 1 and "3 runs: 1 done, 0 were done before, 2 failed" in out
    listed = [line for line in err.splitlines() if line.startswith("failed: ")][-2:]
    assert all("its job was ended" in line for line in listed) and not any("--seed 1 " in line for line in listed)


def test_gpus_are_dealt_out(run_sweep, stub, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(sweep, "device_name", lambda device: "a GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    stub("""
began = time.time()
note(gpu=os.environ["CUDA_VISIBLE_DEVICES"])
while open("notes").read().count("gpu") < int(os.environ["TOGETHER"]):
    time.sleep(0.02)
note(gpu=os.environ["CUDA_VISIBLE_DEVICES"], began=began, ended=time.time())
""")

    def at_once(together, *argv):
        """The most runs that were there at once, by GPU, where each waits until `together` have begun."""
        monkeypatch.setenv("TOGETHER", str(together))
        Path("notes").write_text("")
        assert run_sweep(*QUICK, *argv)[0] == 0
        runs = [run for run in stub.notes() if "began" in run]
        return {
            gpu: max(sum(a["began"] <= b["began"] < a["ended"] and a["gpu"] == gpu for a in runs) for b in runs)
            for gpu in {run["gpu"] for run in runs}
        }

    assert at_once(2, "--seeds", 1, 2, 3) == {"4": 1, "6": 1}
    assert at_once(3, "--seeds", 1, 2, 3, "--workers", 3) == {"4": 2, "6": 1}
    assert at_once(1, "--seeds", 1, 2, "--device", "cpu") == {"": 1}
    code, _, err = run_sweep(*QUICK, "--device", "cuda:1")
    assert code == 2 and "dealt out" in err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-3f2a")
    code, _, err = run_sweep(*QUICK)
    assert code == 2 and "GPU-3f2a" in err
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert clusters._gpus() == [0, 1]


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc for parents")
def test_ctrl_c_ends_runs_in_order_and_nothing_else_hears_it(run_sweep, stub):
    stub("""
def stop(*_):
    time.sleep(0.5)
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
            began[:] = stub.notes() if Path("notes").exists() else []
        for run in began:
            job = parent_of(run["pid"])
            assert os.getpgid(run["pid"]) != os.getpgid(0) == os.getpgid(job)
            os.kill(job, signal.SIGINT)  # as a terminal does
            os.kill(parent_of(job), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    code, _, err = run_sweep(*QUICK, "--seeds", 1, 2, 3, "--workers", 2)
    thread.join()
    assert code == 130 and "stopping 2 runs" in err and "Traceback" not in err
    assert sorted((n["seed"], n["event"]) for n in stub.notes()) == [
        (seed, event) for seed in "12" for event in ("began", "stopped")
    ]
    assert not any(Path("/proc", str(run["pid"])).exists() for run in began)
    stub("note(event='again')")
    code, out, _ = run_sweep(*QUICK, "--seeds", 1, 2, 3, "--workers", 2)
    assert code == 0 and "3 done" in out


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
ON_SLURM = ("--cluster", "slurm", "--gpus_per_task", "0")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc for parents")
def test_jobs_go_back_into_the_queue_before_the_time_limit_and_cancelled_ones_have_failed(run_sweep, stub, slurm):
    stub(
        STOPPABLE
        + """
if of("seed") == "3" or of("seed") == "2" and open("notes").read().count('"seed": "2"') == 1:
    time.sleep(60)
"""
    )

    def happen():
        began = {}
        while not {"2", "3"} <= began.keys():
            time.sleep(0.05)
            began = {n["seed"]: n["pid"] for n in (stub.notes() if Path("notes").exists() else [])}
        for process in (began["2"], parent_of(began["2"])):  # slurm signals all processes of a job
            os.kill(process, signal.SIGUSR2)
        for process in (began["3"], parent_of(began["3"])):
            os.kill(process, signal.SIGTERM)
        time.sleep(1)  # it is no failure yet: slurm may put the job back into the queue
        os.killpg(int((slurm / "1_2").read_text()), signal.SIGKILL)
        (slurm / "1_2").unlink()

    thread = threading.Thread(target=happen, daemon=True)
    thread.start()
    parameters = ["--partition", "p", "--time", 7, "--mem_gb", 3, "--cpus_per_task", 2, "--workers", 5]
    code, out, err = run_sweep(*QUICK, "--seeds", 1, 2, 3, *ON_SLURM, *parameters, "--slurm", "account=me")
    thread.join()
    assert code == 1 and "3 runs: 2 done, 0 were done before, 1 failed" in out
    assert [(n["event"], n.get("device", "cpu")) for n in stub.notes() if n["seed"] == "2"] == [
        (event, "cpu") for event in ("began", "stopped", "began")
    ]
    failed = err.splitlines()[-1]
    assert failed.startswith("failed: python main.py")
    assert "--seed 3" in failed and "(its job was ended; log: " in failed
    assert "stub.py --method so" in Path(failed.partition("log: ")[2].rstrip(")")).read_text()
    submitted = Path("slurm/submitted_1").read_text()
    for line in ("partition=p", "time=7", "mem=3GB", "cpus-per-task=2", "array=0-2%3", "account=me", "requeue"):
        assert f"#SBATCH --{line}\n" in submitted
    assert "--gpus" not in submitted and "srun --unbuffered" in submitted and " --cpus-per-task=2 " in submitted
    assert all(path.suffix == ".out" for path in Path("results/sweeps").glob("*/*"))


def test_jobs_outlive_the_sweep_and_the_next_one_knows_them(run_sweep, stub, slurm):
    stub(
        STOPPABLE
        + """
while not os.path.exists("go on"):
    time.sleep(0.05)
"""
    )

    def press():
        while not (Path("notes").exists() and len(stub.notes()) == 2):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    code, _, err = run_sweep(*QUICK, "--seeds", 1, 2, *ON_SLURM)
    thread.join()
    assert code == 130 and "2 jobs stay in slurm's queue" in err and err.rstrip().endswith(": 1")
    timer = threading.Timer(1, Path("go on").touch)
    timer.start()
    code, out, _ = run_sweep(*QUICK, "--seeds", 1, 2, 3, "--workers", 9, *ON_SLURM)
    assert code == 0 and "3 runs: 3 done" in out
    assert sorted(n["seed"] for n in stub.notes()) == ["1", "2", "3"]
    assert "--array" not in Path("slurm/submitted_2").read_text() and not Path("slurm/submitted_3").exists()
    assert all(path.suffix == ".out" for path in Path("results/sweeps").glob("*/*"))


def test_what_slurm_does_not_take_is_one_line(run_sweep, slurm):
    (slurm.parent / "sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: invalid partition specified: p' >&2\nexit 1\n"
    )
    code, _, err = run_sweep(*QUICK, *ON_SLURM, "--partition", "p")
    assert code == 2 and "invalid partition specified: p" in err.splitlines()[-1] and "Traceback" not in err
    code, _, err = run_sweep(*QUICK, *ON_SLURM, "--slurm", "acount=me")
    assert code == 2 and "acount" in err.splitlines()[-1]
    code, _, err = run_sweep(*QUICK, *ON_SLURM, "--slurm", "me")
    assert code == 2 and "NAME=VALUE" in err
    assert not list(Path("results").glob("sweeps/*"))


def test_runs_of_a_cluster_are_known_without_its_gpus():
    (cell,) = cells({"seeds": [1], "shots": [1]}, [], "cuda")
    assert cell.words[-2:] == ("--device", "cuda") and cell.settings.device == "cuda"
    (here,) = cells({"seeds": [1], "shots": [1]}, ["--device", "cpu"])
    assert replace(here.settings, device="cuda").run_id == cell.settings.run_id != here.settings.run_id


# --- what it will cost


def test_estimates_are_from_records_of_the_same_kind(run_sweep, run_main):
    run_main("--method", "zero_shot", "--shots", 1, "--seed", 1)
    base = dict(
        method="so", dataset="digits", test_dataset="digits", classes="all", backbone="tiny", precision="fp32",
        eval_only=False, batch_size=32, encoder="both", position="all", sampled_gradients=True, shots=16, epochs=None,
        device="cpu", iterations=100, train_seconds=50.0, eval_seconds=2.0, stopped_early=False,
    )  # fmt: skip
    classifier = dict.fromkeys(("batch_size", "encoder", "position", "sampled_gradients")) | {"iterations": 0}
    other = dict(
        method="adam", dataset="dtd", test_dataset="dtd", classes="base", backbone="ViT-B/16", precision="bf16",
        eval_only=True, batch_size=8, encoder="text", position="up", sampled_gradients=False, device="a GPU",
    )  # fmt: skip
    records = pd.DataFrame(
        [
            base,
            base | {"iterations": 200, "train_seconds": 300.0, "eval_seconds": 4.0, "stopped_early": True},
            base | classifier | {"method": "zero_shot", "train_seconds": 0.0, "eval_seconds": 1.0, "shots": 2},
            base | classifier | {"method": "linear_probe", "train_seconds": 10.0, "eval_seconds": 1.0, "shots": 1},
            base | {"method": "prolip", "epochs": 300, "shots": 4, "train_seconds": 30.0, "eval_seconds": 5.0},
            *(base | {name: value, "train_seconds": 1e6, "eval_seconds": 1e6} for name, value in other.items()),
        ]
    )
    records.to_csv("results/results.csv", index=False)
    argv = ["--methods", "so", "zero_shot", "linear_probe", "tip_adapter", "--shots", 1, 4, "--seeds", 1, "--dry_run"]
    code, out, _ = run_sweep(*argv, "--total_iters", 50)
    lines = out.splitlines()
    assert code == 0 and not Path("results/sweeps").exists()
    assert [line.partition("  python")[0].strip() for line in lines[:8]] == [
        "to do, 0.015 h", "finished", "to do, 0.003 h", "to do",
        "to do, 0.015 h", "to do, 0.000 h", "to do", "to do",
    ]  # fmt: skip
    assert lines[8] == "8 runs: 1 finished, 7 to do"
    assert "training and evaluation of 4: 0.033 CPU hours" in lines[9]  # 2 x (50 x 1 + 3) + 1 + 11 seconds
    assert lines[10].startswith("no estimate for 3:")

    def seconds(*argv, device="cpu"):
        return estimates.seconds(parse([*map(str, argv)]), records, device)

    assert seconds("--method", "prolip", "--shots", 4) == 35 and seconds("--method", "prolip", "--shots", 1) is None
    assert seconds("--shots", 1, "--device", "cpu", device="a GPU") == 600 * 1e4 + 1e6
    assert seconds("--shots", 1, device=None) == 600 * 1e4 + 1e6 and seconds("--shots", 1, device="another") is None
    assert seconds("--search", "lr=1e-4,1e-3") is None
    assert estimates.seconds(parse([]), pd.DataFrame(), "cpu") is None
    with pytest.raises(UserError, match=r"results\.csv"):
        Path("results/results.csv").write_text("")
        estimates.read_results(Path("results"))
