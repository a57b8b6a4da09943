"""Proof that a refactoring changed nothing but the shape: the same short runs with two versions of the code, compared.

    python -m benchmarks.same_results run --code ../before --out ../same_before  # about 5 minutes on a core of its own
    python -m benchmarks.same_results run --code . --out ../same_after
    python -m benchmarks.same_results compare ../same_before ../same_after

`run` calls `main.py` of the checkout CODE, of any commit, for each of RUNS. All paths are relative to the new folder
OUT; only the images lie elsewhere, in IMAGES, because data_sha256 and run_id depend on their path. Compare on one
machine, with the same packages and the same TMPDIR. `compare` prints one line per run. Exit code 1 if a run failed or
anything differs: FILES (bytes), FIELDS of result.json, saved tensors (name, type, shape, bytes; not the metadata).
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import deserialize

from common import Parser, one_line_errors, progress, replacing, write_atomically

IMAGES = Path(tempfile.gettempdir()).resolve() / "same_results_images"
DTD = f"--dataset dtd --root_path {IMAGES}"
SHORT = "--total_iters 8 --batch_size 8"  # epochs of 3 iterations on the digits
QUICK = f"{SHORT} --lr 1e-3 --density_ratio 0.01"  # where configs/digits.yaml does not set these
OF_SO = ["--no-sampled_gradients", "--prune_first", "--encoder vision --position top1", "--precision bf16"]
OF_SO += ["--eval_every 4", "--early_stop_loss 9", "--search lr=1e-3,3e-3", "--classes base"]
ABLATIONS = ["dense", "dense_moments", "importance_gradient", "no_momentum"]
ABLATIONS += ["prune_first", "random_moments", "so", "static_support"]
RUNS = {  # name -> flags; each run has only flags of its method
    **{name: f"--method {name} {SHORT}" for name in ["so", "adam", "lora", "dora", "adalora", "so_ablation"]},
    "relora": f"--method relora {SHORT} --merge_every 3",
    **{name: f"--method {name} --epochs 2 --batch_size 8" for name in ["prolip", "tip_adapter_f"]},
    **{name: f"--method {name}" for name in ["linear_probe", "tip_adapter", "zero_shot"]},
    **{f"ablation_{name}": f"--config {{code}}/configs/ablations/{name}.yaml {SHORT}" for name in ABLATIONS},
    **{flags.replace("--", "").replace(" ", "_"): f"{SHORT} {flags}" for flags in OF_SO},
    "n_iters": "--n_iters 3 --batch_size 8",
    "search_tip_alpha": "--method tip_adapter --search tip_alpha=1,100",
    "classes_new": "--classes new --eval_only --save_path classes_base/weights",
    "folder": f"{QUICK} --dataset folder --root_path {IMAGES}/dtd/images --template 'a photo of a {{{{}}}} texture.'",
    "dtd": f"{QUICK} {DTD} --prompts specific",
    "draw_coop": f"{QUICK} {DTD} --draw coop",
    **{f"eval_{name}": f"--method {name} --eval_only --save_path {name}/weights" for name in ["so", "lora", "prolip"]},
    "eval_datasets": f"{DTD} --eval_only --eval_datasets digits,dtd --save_path dtd/weights",
    "split_of_so": f"{SHORT} --seed 4 --split {{split}}",
    **{name: "--total_iters 60 --batch_size 8 --save_every 3" for name in ["whole", "resumed"]},
}
FIELDS = ["run_id", "test_accuracy", "zero_shot_accuracy", "train_accuracy", "final_loss", "iterations"]
FIELDS += ["stopped_early", "trainable_weights", "changed_weights", "optimizer_bytes"]
FIELDS += ["split_sha256", "weights_sha256", "data_sha256"]
FILES = ["curve.csv", "search.csv", "split.json"]


def make_images() -> None:
    """Make a small DTD in IMAGES/dtd; its images also serve as a folder of class folders."""
    split = {"train": [], "val": [], "test": []}
    for label, name in enumerate(["banded", "dotted", "grid", "woven"]):
        for number, part in enumerate(["train"] * 4 + ["val"] * 2 + ["test"] * 4):
            pixels = np.random.default_rng((label, number)).integers(40 * label, 40 * label + 120, (32, 40, 3))
            file = IMAGES / "dtd" / "images" / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as new:
                Image.fromarray(pixels.astype(np.uint8)).save(new, "PNG")
                os.utime(new, (1_700_000_000, 1_700_000_000))  # data_sha256 depends on it
            split[part].append([f"{name}/{number}.png", label, name])
    write_atomically(IMAGES / "dtd" / "split_zhou_DescribableTextures.json", json.dumps(split))


def start(name: str, code: Path, out: Path) -> subprocess.Popen:
    """Start a run. Its results, weights and log go to `out`/`name`."""
    split = next(out.glob("so/*/split.json"), out).relative_to(out)
    flags = f"--backbone tiny --shots 2 --device cpu --workers 0 --cache_dir cache --results_dir {name} {RUNS[name]}"
    flags += "" if "--save_path" in flags else f" --save_path {name}/weights"
    command = [sys.executable, f"{code}/main.py", *shlex.split(flags.format(code=code, split=split))]
    with (out / name / "log.txt").open("a") as log:
        return subprocess.Popen(command, cwd=out, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)


def run(code: Path, out: Path) -> int:
    """Do all runs of the checkout `code` in the new folder `out`. Return how many failed."""
    out.mkdir(parents=True)
    make_images()
    for name in (bar := progress(RUNS, "runs", unit="run")):
        log = out / name / "log.txt"
        log.parent.mkdir()
        process = start(name, code, out)
        if name == "resumed":  # it is killed at its first checkpoint and started again
            while process.poll() is None and not any(out.glob("resumed/*/*.pt")):
                time.sleep(0.005)
            process.kill()
            process.wait()
            process = start(name, code, out)
        # A program that ignores its checkpoints gets the same results, so the log must say where it resumed.
        if process.wait() != 0 or (name == "resumed" and "after iteration" not in log.read_text()):
            (out / name / "failed").touch()
            bar.write(f"{name} failed, see {log}")
    return len(list(out.glob("*/failed")))


def outcome(folder: Path) -> dict[str, object]:
    """Return by name what must be the same of a run; nothing if it failed."""
    found = {}
    for file in folder.glob("*/result.json"):
        record = json.loads(file.read_text())
        if record["eval_only"]:  # the hash at the end covers the weight file with its metadata, which may differ
            record["run_id"] = record["run_id"].rpartition("_")[0]
        values = {name: record.get(name, "missing") for name in FIELDS}
        values |= {name: (file.parent / name).read_bytes() for name in FILES if (file.parent / name).exists()}
        found |= {f"{record['test_dataset']} {name}": value for name, value in values.items()}
    for file in folder.rglob("*.safetensors"):  # type, shape and bytes of each tensor
        found |= {f"{file.name} {name}": tensor for name, tensor in deserialize(file.read_bytes())}
    return {} if (folder / "failed").exists() else found


def compare(first: Path, second: Path) -> int:
    """Print a line per run: same, or what differs. Return how many differ."""
    different = 0
    for name, other in [*((name, name) for name in RUNS), ("whole", "resumed")]:
        before, after = outcome(first / name), outcome(second / other)
        keys = [key for key in sorted(before | after) if before.get(key, "none") != after.get(key, "none")]
        keys = keys if before and after else [f"no results in {second if before else first}"]
        different += bool(keys)
        result = f"{len(keys)} DIFFER: {', '.join(keys[:9])}" if keys else f"{len(before)} values same"
        print(f"{name}: {result}" if name == other else f"{name} and {other}: {result}")
    return different


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m benchmarks.same_results", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="do all runs with one version of the code")
    runs.add_argument("--code", type=Path, required=True, help="folder of the checkout")
    runs.add_argument("--out", type=Path, required=True, help="new folder for the results")
    commands.add_parser("compare", help="compare two such folders").add_argument("folders", type=Path, nargs=2)
    with one_line_errors():
        options = parser.parse_args(argv)
        is_run = options.command == "run"
        bad = run(options.code.resolve(), options.out.resolve()) if is_run else compare(*options.folders)
        print(f"{bad} of {len(RUNS)} runs {'failed' if is_run else 'differ'}")
        sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
