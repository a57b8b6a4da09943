"""Runs that are killed by SIGKILL at random moments, again and again, beside the same run left alone.

    python -m benchmarks.kills
    python -m benchmarks.kills --runs 4 --method lora

Each of the runs is started, killed after a random time, and started again until it ends before it would be killed; one
that was never killed does not count. Then its curve, its accuracy and its saved weights are compared, byte for byte,
with those of the run that nobody killed. Exit code 1 if one differs.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from safetensors.torch import load_file
from tqdm import tqdm

PROJECT = Path(__file__).resolve().parent.parent


def command(folder: Path, method: str, iterations: int, flags: list[str]) -> list[str]:
    words = ["--method", method, "--shots", "4", "--total_iters", str(iterations), "--early_stop_loss", "0"]
    words += ["--eval_every", str(iterations // 4), "--save_every", "20", "--save_path", str(folder / "weights")]
    return [sys.executable, "main.py", *words, "--results_dir", str(folder), *flags]


def outcome(folder: Path) -> dict:
    """Return what must be the same: the curve, the accuracy, and the weights by name."""
    (record,) = folder.glob("*/result.json")
    (weights,) = (folder / "weights").rglob("*.safetensors")
    return {
        "curve.csv": (record.parent / "curve.csv").read_bytes(),
        "test accuracy": json.loads(record.read_text())["test_accuracy"],
        "weights": {name: tensor.numpy().tobytes() for name, tensor in load_file(weights).items()},
        "checkpoints left": sorted(path.name for path in record.parent.glob("*.pt")),
    }


def newest_checkpoint(folder: Path) -> int:
    """Return the iteration of the newest checkpoint; 0 if there is none."""
    return max((int(path.name.split("-")[1]) for path in folder.glob("*/training-*.pt")), default=0)


def kill_until_done(words: list[str], folder: Path, longest: float, draw: random.Random) -> list[int]:
    """Start the command until it ends by itself. Return, for each kill, the iteration the next start resumes at."""
    kills = []
    while True:
        process = subprocess.Popen(words, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if process.wait(timeout=draw.uniform(0, longest)) != 0:
                raise SystemExit(f"{' '.join(words)} failed")
            return kills
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills.append(newest_checkpoint(folder))


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--method", default="so")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options, flags = parser.parse_known_args()
    draw = random.Random(options.seed)
    different, kills = 0, Counter()
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary, "whole")
        start = time.perf_counter()
        subprocess.run(command(whole, options.method, options.iterations, flags), cwd=PROJECT, check=True)
        seconds = time.perf_counter() - start
        expected = outcome(whole)
        for number in tqdm(range(options.runs), desc="killed runs"):
            folder = Path(temporary, str(number))
            words = command(folder, options.method, options.iterations, flags)
            while not (resumed_from := kill_until_done(words, folder, 1.2 * seconds, draw)):
                shutil.rmtree(folder)
            kills[len(resumed_from)] += 1
            found = outcome(folder)
            differing = [name for name in expected if found[name] != expected[name]]
            different += bool(differing)
            print(f"run {number + 1}: resumes from {resumed_from}; differs in {differing or 'nothing'}")
    total = sum(times * runs for times, runs in kills.items())
    print(f"{options.runs} runs, {total} kills, {different} different from the run that was not killed")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
