"""A sweep's table is that of its runs, however it was done and however often it was killed.

    python -m benchmarks.sweeps                # 24 runs on the digits, five times: twenty minutes on two busy cores
    python -m benchmarks.sweeps --kills 10

The grid: 2 methods, 3 shots, 4 seeds. The runs are done by main.main in this process; by scripts/sweep.sh; by
scripts/sweep.py with 2 workers; and again by both, killed at random moments and started again. A kill is one of SIGINT
(Ctrl-C), SIGTERM and SIGKILL to the sweep alone, or SIGKILL to its process group; what a killed sweep leaves running is
not looked after. All tables must be equal in every column but times, memory and the code's commit, all curves to the
byte, and the folders must hold the same files. Exit code 1 if something differs.
"""

import argparse
import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import main as entry  # isort: skip (before torch: it sets how torch's threads wait)

import pandas as pd
from tqdm import tqdm

from records import PROJECT

METHODS, SHOTS, SEEDS = ("so", "lora"), (1, 2, 4), (1, 2, 3, 4)
MEASURED = ["train_seconds", "eval_seconds", "search_seconds", "peak_memory_mb", "finished_at", "git_commit"]
KILLS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL, "all SIGKILL": signal.SIGKILL}
# The exit codes; the negative ones of SIGINT and SIGTERM in the first seconds, when modules are still imported.
CODES = {"SIGINT": (130, -2), "SIGTERM": (143, -15), "SIGKILL": (-9,), "all SIGKILL": (-9,)}


def outcome(results: Path) -> tuple[pd.DataFrame, dict[str, bytes], set[str]]:
    """The table without what is measured, the curves, and the names of all files of runs."""
    table = pd.read_csv(results / "results.csv").drop(columns=MEASURED).sort_values("run_id", ignore_index=True)
    curves = {path.parent.name: path.read_bytes() for path in results.glob("*/curve.csv")}
    return table, curves, {str(path.relative_to(results)) for path in results.glob("*_*/*")}


def difference(ours: tuple, reference: tuple) -> str:
    """Where two outcomes differ, in a few words; empty if they are the same."""
    if list(ours[0].run_id) != list(reference[0].run_id):
        return f"{len(ours[0])} runs instead of {len(reference[0])}"
    columns = [name for name in reference[0] if not ours[0][name].equals(reference[0][name])]
    curves = [name for name, curve in reference[1].items() if ours[1].get(name) != curve]
    return ", ".join([*columns, *(f"curve of {name}" for name in curves), *sorted(ours[2] ^ reference[2])])


def killed(command: list[str], environment: dict[str, str], kills: int, span: float, rng: random.Random) -> list[str]:
    """Does a sweep that takes `span` seconds and is killed at a random moment of each of its first `kills` starts, most
    of them before it would end. Says how it went."""
    report = []
    for _ in range(kills):
        how, moment = rng.choice(list(KILLS)), rng.uniform(0, 2 * span / (kills + 1))
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            process.wait(moment)
            report.append(f"finished before {moment:.1f} s with exit code {process.returncode}")
            continue
        except subprocess.TimeoutExpired:
            (os.killpg if how.startswith("all") else os.kill)(process.pid, KILLS[how])
        code = process.wait()
        expected = "" if code in CODES[how] else f", NOT {CODES[how][0]}"
        report.append(f"{how} after {moment:.1f} s: exit code {code}{expected}")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    report.append(f"then exit code {done.returncode}" + (f": {done.stderr[-2000:]}" if done.returncode else ""))
    return report


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total_iters", default="40")
    parser.add_argument("--kills", type=int, default=4, help="of each of the two sweeps [4]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [0]")
    options = parser.parse_args(argv)
    rng, wrong = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--total_iters", options.total_iters, "--save_every", "10", "--cache_dir", f"{folder}/cache"]
        lists = {"METHODS": METHODS, "SHOTS": SHOTS, "SEEDS": SEEDS}
        words = {name: [str(value) for value in values] for name, values in lists.items()}
        environment = (
            os.environ | {name: " ".join(values) for name, values in words.items()} | {"PYTHON": sys.executable}
        )
        shell = ["bash", str(PROJECT / "scripts" / "sweep.sh"), *flags]
        python = [sys.executable, str(PROJECT / "scripts" / "sweep.py"), "--cluster", "local", "--workers", "2", *flags]
        python += [word for name, values in words.items() for word in (f"--{name.lower()}", *values)]

        grid = [(m, n, s) for m in METHODS for n in SHOTS for s in SEEDS]
        for method, shots, seed in tqdm(grid, desc="main.main", unit="run"):
            run = ["--method", method, "--shots", str(shots), "--seed", str(seed), "--results_dir", f"{folder}/main"]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                entry.main([*run, *flags])
        reference = outcome(Path(folder, "main"))
        print(f"main.main: {len(reference[0])} runs, mean accuracy {reference[0].test_accuracy.mean():.4f} %")

        for name, command in (("sweep.sh", shell), ("sweep.py", python)):
            start = time.perf_counter()
            for label, kills in ((name, 0), (f"{name}, killed", options.kills)):
                results = Path(folder, label)
                span = time.perf_counter() - start
                env = environment | {"RESULTS_DIR": str(results)}
                where = [] if name == "sweep.sh" else ["--results_dir", str(results)]
                report = killed([*command, *where], env, kills, span, rng)
                differs = difference(outcome(results), reference)
                wrong += bool(differs) or any("NOT" in line for line in report)
                print(
                    f"{label}: {f'DIFFERENT: {differs}' if differs else 'the same'}", *report, sep="\n    ", flush=True
                )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
