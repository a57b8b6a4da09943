"""How the settings for the digits are chosen: accuracy on their val part, with seeds that are not reported.

    python scripts/tune_digits.py                                          # every method in GRIDS
    python scripts/tune_digits.py --methods adam --search lr=1e-4,3e-4     # one of them, another grid
    python scripts/tune_digits.py --methods so --shots 16 --min_area 0.4   # other flags are those of main.py

The few-shot training images are drawn as in any run; what is evaluated is the whole val part of the fixed split (359
images). The test part is not touched. Of each grid the values with the best mean over shots and seeds are chosen, the
first of equals, and printed as rows for configs/digits.yaml.
"""

import argparse
import dataclasses
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main as entry  # isort: skip (before torch: it sets how torch's threads wait)

import clip
import datasets
import run_utils
import train
from datasets.digits import split_digits

GRIDS = {  # a line a method: what --search takes
    "so": ["total_iters=200,600", "density_ratio=0.001,0.01,0.05", "lr=3e-4,1e-3,3e-3"],
    "adam": ["total_iters=600", "lr=3e-6,1e-5,3e-5,1e-4"],
    "lora": ["total_iters=600", "lr=1e-3,3e-3", "alpha=1,4"],
    "relora": ["total_iters=600", "lr=1e-3,3e-3", "alpha=4"],
    "dora": ["total_iters=600", "lr=3e-4,1e-3,3e-3", "alpha=4"],
    "adalora": ["total_iters=600", "lr=1.3e-4,4e-4,1.2e-3,4e-3,1.2e-2"],
    "prolip": ["lr=1e-3,3e-3", "prolip_lambda=1,0.1,0.01"],
    "linear_probe": ["probe_c=1e-6,1e-5,1e-4,1e-3,0.01,0.1,1"],
    "tip_adapter": ["tip_alpha=1,5,10,20,50,100,200", "tip_beta=5.5,10,20,50,100"],
    "tip_adapter_f": ["lr=1e-4,1e-3", "tip_alpha=20,50,100", "tip_beta=20,50,100"],
}


def trials(settings: run_utils.Settings) -> list[dict]:
    """A row for each candidate of the search: its values, and its accuracy in per cent on the whole val part."""
    run_utils.make_reproducible(settings.seed)
    task = datasets.build("digits", None, settings.shots, settings.seed, settings.prompts)
    task = dataclasses.replace(task, val=split_digits().val, test=())
    model, preprocess = clip.load(settings.backbone, settings.device)
    return train.search(model, task, preprocess, settings, clip.weights_sha256(model))[1]


def tune(method: str, grid: Sequence[str], shots: Sequence[int], seeds: Sequence[int], flags: Sequence[str]) -> str:
    """Prints the accuracies of all of the grid and returns the rows for configs/digits.yaml."""
    accuracies = defaultdict(list)  # by values: of each number of shots the mean over seeds
    names = [word.partition("=")[0] for word in grid]
    for number in shots:
        of_seeds = defaultdict(list)
        for seed in seeds:
            words = ["--method", method, "--shots", str(number), "--seed", str(seed), *flags]
            for row in trials(run_utils.parse([*words, *(f"--search={word}" for word in grid)])):
                accuracy = row["val_accuracy"]  # none if the training diverged, which rules the values out
                of_seeds[tuple(row[name] for name in names)].append(0.0 if accuracy is None else accuracy)
        for values, found in of_seeds.items():
            accuracies[values].append(sum(found) / len(found))
    for values, means in accuracies.items():
        pairs = " ".join(f"{name}={value}" for name, value in zip(names, values))
        print(f"{method} {pairs}: val accuracy", *(f"{mean:.2f} % at {number}" for number, mean in zip(shots, means)))
    best = max(accuracies, key=lambda values: sum(accuracies[values]))
    comment = ", ".join(f"{mean:.2f} % at {number} shots" for number, mean in zip(shots, accuracies[best]))
    rows = [f"  {method}:  # val: {comment}", *(f"    {name}: {value}" for name, value in zip(names, best))]
    return "\n".join([*rows, "    tuned_on: val"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(GRIDS))
    parser.add_argument("--search", action="append", metavar="NAME=VALUE,VALUE,...", help="instead of GRIDS")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12])
    options, flags = parser.parse_known_args(argv)
    if not options.search and not GRIDS.keys() >= set(options.methods):
        parser.error(f"GRIDS has {', '.join(GRIDS)}; give a grid for others with --search")
    try:
        rows = [
            tune(name, options.search or GRIDS[name], options.shots, options.seeds, flags) for name in options.methods
        ]
    except entry.MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print("methods:", *rows, sep="\n")


if __name__ == "__main__":
    main()
