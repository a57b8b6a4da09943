"""Arithmetic of adapted models on the digits, and the time of a switch between adapted models of ViT-B/16.

    python -m benchmarks.merging digits --methods so adam lora --seeds 1 2 3
    python -m benchmarks.merging switch

`digits` adapts the tiny CLIP to the base classes (zero to four) and, from the same start, to the new ones (five to
nine), each at 16 shots with configs/digits.yaml. It adds the two differences and tests on all ten classes, with and
without the mean where both change an entry. Then it tests WiSE-FT's curve from the unchanged model to the one adapted
to the base classes, and beyond. `switch` has random weights and deltas of random entries in SO's 96 matrices: their
values do not matter for the time.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

import clip
import datasets
import train
from arguments import parse
from benchmarks.step import ARCHITECTURES
from benchmarks.timing import alternately
from clip.arithmetic import Changes, Switch, combine, entries, interpolate, overlap
from clip.delta import apply_changes, difference, snapshot
from clip.weights import save_weights
from common import Parser, one_line_errors
from datasets import Task
from experiment import Experiment
from methods.adapters.matrices import Adapters
from methods.choice import Blocks, select_matrices
from settings import Settings

CURVE = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
HALVES = ("base", "new", "all")


def digits(method: str, seed: int, new_seed: int) -> None:
    """Print the accuracies, in per cent, of one method's adapted, added and interpolated models.

    `new_seed` is that of the run on the new classes: with the same seed SO draws the same entries for both.
    """
    config = parse(["--method", method, "--shots", "16", "--seed", str(seed), "--device", "cpu", "--workers", "0"])
    settings = config.settings
    tasks = {half: datasets.build("digits", None, settings.shots, seed, classes=half) for half in HALVES}

    def model_with(delta: Changes) -> Experiment:
        experiment = Experiment.load(settings, config.hparams, tasks["all"])
        apply_changes(experiment.model, delta)
        return experiment

    def adapted(task: Task, settings: Settings) -> Changes:
        experiment = Experiment.load(settings, config.hparams.settled(settings.shots, len(task.train)), task)
        adaptation, batches = train.prepare(experiment)
        train.fit(experiment, adaptation, batches)
        if isinstance(adaptation, Adapters):
            adaptation.merge()
        return difference(base, experiment.model)

    def accuracies(delta: Changes) -> str:
        model, found = model_with(delta).model, []
        for half in HALVES:
            experiment = Experiment.load(settings, config.hparams, tasks[half])
            experiment.model.load_state_dict(model.state_dict())
            features = experiment.image_features(tasks[half].test, "test")
            classifier = experiment.text_classifier(tasks[half].templates[:1])
            labels = torch.tensor([item.label for item in tasks[half].test])
            found.append(100 * float(((features @ classifier.T).argmax(dim=1) == labels).float().mean()))
        return " ".join(f"{half} {value:6.2f}" for half, value in zip(HALVES, found))

    base = {name: t for name, t in clip.load("tiny")[0].state_dict().items() if t.is_floating_point()}
    of = {"base": adapted(tasks["base"], settings)}
    of["new"] = adapted(tasks["new"], dataclasses.replace(settings, seed=new_seed))
    rows = {f"adapted to {half}": of[half] for half in of}
    rows["base + new"] = combine(base, [of["base"], of["new"]], [1, 1])
    rows["base + new, mean"] = combine(base, [of["base"], of["new"]], [1, 1], mean=True)
    rows["half of base + new"] = combine(base, [of["base"], of["new"]], [0.5, 0.5])
    rows |= {f"{at:4.2f} of base": interpolate(base, {}, of["base"], at) for at in CURVE}
    for name, delta in rows.items():
        print(f"{method} seed {seed} {name:20} {accuracies(delta)} entries {entries(delta):,}", flush=True)
    found = overlap(base, of["base"], of["new"])
    print(f"{method} seed {seed} overlap", *(f"{name} {value:.4g}" for name, value in found.items()), flush=True)
    print(f"{method} seed {seed} {'adapted to all':20} {accuracies(adapted(tasks['all'], settings))}", flush=True)


def switch(name: str, share: float, times: int) -> None:
    """Print the median time of a switch between two deltas that change a `share` of the matrices' entries."""
    torch.manual_seed(0)
    model = clip.CLIP(ARCHITECTURES[name]).eval().requires_grad_(False)
    for tensor in model.parameters():
        torch.nn.init.normal_(tensor, std=0.02)
    select_matrices(model, Blocks())
    matrices = snapshot(model)
    deltas = {
        label: {
            tensor: (indices := (torch.rand(weight.numel()) < share).nonzero().view(-1).int(), torch.rand(len(indices)))
            for tensor, weight in matrices.items()
        }
        for label in ("one", "other")
    }
    model.requires_grad_(False)
    models = Switch(model, deltas)
    states = [{tensor: value.clone() for tensor, value in model.state_dict().items()} for _ in range(2)]
    turn = iter(range(10**9))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "whole.safetensors")
        save_weights(model, path)
        ways = {
            "switch in place": lambda: models.to(("one", "other")[next(turn) % 2]),
            "load_state_dict from memory": lambda: model.load_state_dict(states[next(turn) % 2]),
            "clip.load of a file": lambda: clip.load(path, arch="openai"),
        }
        seconds, _ = alternately(ways, times)
    for way, measured in seconds.items():
        print(f"{name} {entries(deltas['one']):,} entries: {way} {1000 * median(measured):.1f} ms", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m benchmarks.merging", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("digits", "switch"))
    parser.add_argument("--methods", nargs="+", default=["so", "adam", "lora"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--new_seed", type=int, help="of the runs on the new classes [that of the base classes]")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.001, 0.01, 0.1], help="of the entries")
    parser.add_argument("--times", type=int, default=5)
    with one_line_errors():
        args = parser.parse_args(argv)
        if args.what == "switch":
            for share in args.shares:
                switch("ViT-B/16", share, args.times)
            return
        for method in args.methods:
            for seed in args.seeds:
                digits(method, seed, seed if args.new_seed is None else args.new_seed)


if __name__ == "__main__":
    main()
