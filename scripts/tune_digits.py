"""How the quick start's settings were chosen: accuracy on the digits' val part, with seeds that are not reported.

    python scripts/tune_digits.py

The few-shot training images are drawn as in any run; what is evaluated is the whole val part of the fixed split (359
images). The test part is not touched. Prints one line for each combination of the grid.
"""

import dataclasses
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import clip
import datasets
import run_utils
import train
from clip.preprocess import train_transform
from datasets.digits import split_digits
from methods import METHODS

SEEDS = (11, 12)
GRID = {
    "shots": (1, 4, 16),
    "total_iters": (200, 600),
    "density_ratio": (0.001, 0.01, 0.05),
    "lr": (3e-4, 1e-3, 3e-3),
    "min_area": (0.6,),
}


def val_accuracy(settings: run_utils.Settings) -> tuple[float, int]:
    """Accuracy in per cent on the val part after training with these settings, and the iterations it took."""
    run_utils.make_reproducible(settings.seed)
    task = datasets.build("digits", None, settings.shots, settings.seed, settings.prompts)
    task = dataclasses.replace(task, test=split_digits().val)
    model, preprocess = clip.load("tiny", settings.device)
    evaluator = train.Evaluator(model, task, preprocess, settings, clip.weights_sha256(model))
    adaptation = METHODS["so"].prepare(model, task, settings)
    augment = train_transform(model.arch.resolution, settings.min_area, settings.flip)
    loader = datasets.training_loader(
        task, augment, settings.batch_size, settings.iterations, settings.seed, settings.workers
    )
    fit = train.fit(model, task, adaptation, loader, settings, evaluator)
    return evaluator.adapted(adaptation), fit.iterations


def main() -> None:
    for values in itertools.product(*GRID.values()):
        flags = [word for name, value in zip(GRID, values) for word in (f"--{name}", str(value))]
        results = [val_accuracy(run_utils.parse(["--seed", str(seed), *flags])) for seed in SEEDS]
        print(" ".join(flags), "  val accuracy", *(f"{accuracy:.2f} ({steps} it)" for accuracy, steps in results))


if __name__ == "__main__":
    main()
