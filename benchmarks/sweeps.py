"""A sweep's results are those of its runs, however it was done and however often it was killed.

    python -m benchmarks.sweeps                # 24 runs on the digits, five times: twenty minutes on two busy cores
    python -m benchmarks.sweeps --kills 10

The grid: 2 methods, 3 shots, 4 seeds. The runs are done by main.main in this process; by scripts/sweep.sh; by
scripts/sweep.py with 2 workers; and again by both, killed at random moments and started again. A kill is one of SIGINT
(Ctrl-C), SIGTERM and SIGKILL only to the sweep, or SIGKILL to its process group; what a killed sweep leaves running
continues. All tables must be equal in every column but times, memory and the code's commit, all curves and saved
weights to the byte, and the folders must hold the same files. Exit code 1 if something differs.
"""

import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from safetensors import deserialize

import main as entry
from common import Parser, one_line_errors, progress
from records import PROJECT

LISTS = {"METHODS": ["so", "lora"], "SHOTS": ["1", "2", "4"], "SEEDS": ["1", "2", "3", "4"]}
MEASURED = ["train_seconds", "eval_seconds", "search_seconds", "peak_memory_mb", "finished_at", "git_commit"]
MEASURED += ["checkpoint_bytes"]  # the paths in the settings that weight files hold have several lengths
KILLS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL, "all SIGKILL": signal.SIGKILL}
# The exit codes; the negative ones of SIGINT and SIGTERM in the first seconds, when modules are still imported.
CODES = {"SIGINT": (130, -2), "SIGTERM": (143, -15), "SIGKILL": (-9,), "all SIGKILL": (-9,)}


def outcome(results: Path) -> dict[str, object]:
    """Return by name what must be the same: columns of the table, curves, saved tensors, and the names of all files."""
    table = pd.read_csv(results / "results.csv", dtype=str).drop(columns=MEASURED).sort_values("run_id")
    found = {f"column {name}": values.fillna("").tolist() for name, values in table.items()}
    found |= {f"curve of {path.parent.name}": path.read_bytes() for path in results.glob("*/curve.csv")}
    for path in results.rglob("*.safetensors"):
        found |= {f"{path.relative_to(results)} {name}": tensor for name, tensor in deserialize(path.read_bytes())}
    return found | {"files": sorted(str(path.relative_to(results)) for path in results.glob("*_*/*"))}


def killed(command: list[str], environment: dict[str, str], kills: int, span: float, rng: random.Random) -> list[str]:
    """Do a sweep that takes `span` seconds and is killed at a random moment of each of its first `kills` starts, most
    of them before it would end. Return how it went, a line for each start."""
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
    return [*report, f"then exit code {done.returncode}" + (f": {done.stderr[-2000:]}" if done.returncode else "")]


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--total_iters", default="40")
    parser.add_argument("--kills", type=int, default=4, help="of each of the two sweeps [4]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [0]")
    options = parser.parse_args(argv)
    rng, wrong = random.Random(options.seed), 0
    shell = ["bash", str(PROJECT / "scripts" / "sweep.sh")]
    python = [sys.executable, str(PROJECT / "scripts" / "sweep.py"), "--cluster", "local", "--workers", "2"]
    python += [word for name, values in LISTS.items() for word in (f"--{name.lower()}", *values)]
    environment = os.environ | {name: " ".join(values) for name, values in LISTS.items()} | {"PYTHON": sys.executable}
    with tempfile.TemporaryDirectory() as temporary:

        def flags(name: str) -> list[str]:
            """Return main.py's flags of all runs; the results are in the folder `name`."""
            words = ["--total_iters", options.total_iters, "--save_every", "10", "--cache_dir", f"{temporary}/cache"]
            return [*words, "--results_dir", f"{temporary}/{name}", "--save_path", f"{temporary}/{name}/weights"]

        grid = [(m, n, s) for m in LISTS["METHODS"] for n in LISTS["SHOTS"] for s in LISTS["SEEDS"]]
        for method, shots, seed in progress(grid, "main.main", "run"):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                entry.main(["--method", method, "--shots", shots, "--seed", seed, *flags("main")])
        reference = outcome(Path(temporary, "main"))
        print(f"main.main: {len(grid)} runs, {len(reference)} columns, curves and tensors to compare")

        for name, command in (("sweep.sh", shell), ("sweep.py", python)):
            start = time.perf_counter()
            for label, kills in ((name, 0), (f"{name}, killed", options.kills)):
                span = time.perf_counter() - start
                report = killed([*command, *flags(label)], environment, kills, span, rng)
                found = outcome(Path(temporary, label))
                differs = [key for key in sorted(found | reference) if found.get(key) != reference.get(key)]
                wrong += bool(differs) or any("NOT" in line for line in report)
                print(f"{label}:", f"DIFFERENT: {', '.join(differs[:9])}" if differs else "the same")
                print(*(f"    {line}" for line in report), sep="\n", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    with one_line_errors():
        main()
