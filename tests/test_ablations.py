"""SO's ablations as a method, and their config files."""

import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_methods import TASK, settings_of

import clip
import train
from methods import METHODS, select_matrices
from run_utils import parse

CONFIGS = Path(__file__).parent.parent / "configs" / "ablations"


def train_for(method, iterations=7, **options):
    """The trained matrices after a few iterations on noise, and the adaptation."""
    model, _ = clip.load("tiny")
    settings = settings_of(method=method, total_iters=iterations, batch_size=2, early_stop_loss=0.0, t=3, **options)
    adaptation = METHODS[method].prepare(model, TASK, settings)
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(2, 3, 32, 32, generator=generator), torch.arange(2)) for _ in range(iterations)]
    train.fit(model, TASK, adaptation, batches, settings, None)
    return adaptation


@pytest.mark.parametrize("prune_first", [False, True])
def test_the_method_without_options_trains_the_weights_of_so(prune_first):
    so = train_for("so", sampled_gradients=False, prune_first=prune_first)
    ablation = train_for("so_ablation", prune_first=prune_first)
    assert so.parameters.keys() == ablation.parameters.keys()
    assert all(torch.equal(p, ablation.parameters[name]) for name, p in so.parameters.items())
    assert so.optimizer_bytes == ablation.optimizer_bytes
    assert so.changed_weights() == ablation.changed_weights() > 0


def test_the_method_takes_its_settings():
    settings = settings_of(
        method="so_ablation", lr=3e-3, density_ratio=0.003, t=7, prune_first=True, seed=2**62, n_iters=11, shots=2,
        gradient="importance", moments="random", support="static", encoder="text",
    )  # fmt: skip
    model, _ = clip.load("tiny")
    adaptation = METHODS["so_ablation"].prepare(model, TASK, settings)
    (group,) = adaptation.optimizer.param_groups
    expected = dict(lr=3e-3, density_ratio=0.003, T=7, prune_first=True, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    expected |= dict(gradient="importance", moments="random", support="static")
    assert {name: group[name] for name in expected} == expected
    assert adaptation.optimizer.generator.initial_seed() == 2**62 and adaptation.scheduler.T_max == 22
    assert adaptation.parameters.keys() == select_matrices(clip.load("tiny")[0], "text", "all").keys()


PUBLISHED = {  # gradient, moments, support, prune_first; 1 shot, 4 shots
    "dense": ("dense", "dense", "dynamic", False, "4.4 %", "13.6 %"),
    "dense_moments": ("random", "dense", "dynamic", False, "73.6 %", "77.2 %"),
    "so": ("random", "importance", "dynamic", False, "74.6 %", "80.4 %"),
    "importance_gradient": ("importance", "importance", "dynamic", False, "66.6 %"),
    "random_moments": ("random", "random", "dynamic", False, "72.9 %"),
    "static_support": ("random", "importance", "static", False, "71.2 %", "77.0 %"),
    "no_momentum": ("random", "none", "dynamic", False, "67.8 %", "76.7 %"),
    "prune_first": ("random", "importance", "dynamic", True),
}


def test_the_configs_are_the_published_table():
    assert {path.stem for path in CONFIGS.iterdir()} == PUBLISHED.keys()
    released = parse(["--dataset", "dtd", "--root_path", "data"])
    digits = parse([])
    for name, row in PUBLISHED.items():
        path = CONFIGS / f"{name}.yaml"
        text = path.read_text(encoding="utf-8")
        assert f"--config configs/ablations/{name}.yaml " in text and "not yet measured" in text
        assert re.findall(r"[\d.]+ %", text) == list(PUBLISHED[name][4:])
        for base, flags in ((released, ["--dataset", "dtd", "--root_path", "data"]), (digits, [])):
            settings = parse(["--config", str(path), *flags])
            assert settings.method == "so_ablation"
            assert (settings.gradient, settings.moments, settings.support, settings.prune_first) == row[:4]
            same = ("lr", "density_ratio", "t", "iterations", "batch_size", "min_area", "flip", "tuned_on", "backbone")
            assert [getattr(settings, n) for n in same] == [getattr(base, n) for n in same]


def test_a_run_of_an_ablation_is_recorded(run_main):
    flags = ("--shots", 1, "--total_iters", 2, "--workers", 0)
    names = ("no_momentum", "static_support", "importance_gradient")
    records = [run_main(*flags, "--config", CONFIGS / f"{name}.yaml")[1] for name in names]
    table = pd.read_csv("results/results.csv").set_index("run_id").loc[[record["run_id"] for record in records]]
    assert list(table.method.unique()) == ["so_ablation"] and len(table) == 3
    assert list(zip(table.gradient, table.moments, table.support, table.prune_first)) == [
        PUBLISHED[name][:4] for name in names
    ]
    assert (table.changed_weights > 0).all()
    run_main(*flags, "--method", "so")  # which has no such settings
    table = pd.read_csv("results/results.csv")
    assert table[table.method == "so"][["gradient", "moments", "support"]].isna().all(axis=None)
