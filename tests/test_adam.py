"""The method adam: dense Adam on SO's tensors, beside Adam written out by hand, and SO where it is Adam."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_methods import NAMES, TASK, settings_of

import clip
import train
from methods import METHODS, select_matrices
from run_utils import Settings, parse

STEPS = 6


def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2, 3, 32, 32, generator=generator).double(), torch.arange(2)) for _ in range(STEPS)]


def trained(method, **options):
    """The matrices after STEPS iterations of train.fit, in float64, and the adaptation."""
    model = clip.load("tiny")[0].double()
    settings = settings_of(method=method, total_iters=STEPS, batch_size=2, lr=1e-3, early_stop_loss=0.0, **options)
    adaptation = METHODS[method].prepare(model, TASK, settings)
    train.fit(model, TASK, adaptation, batches(), settings, None)
    return adaptation


def by_hand(encoder):
    """The same by Kingma and Ba's algorithm 1, with text features computed in every iteration."""
    model = clip.load("tiny")[0].double()
    parameters = select_matrices(model, encoder, "all")
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    tokens = clip.tokenize([name.replace("_", " ") for name in NAMES])
    for step, (images, labels) in enumerate(batches(), start=1):
        features = [F.normalize(x.float(), dim=-1) for x in (model.encode_image(images), model.encode_text(tokens))]
        loss = F.cross_entropy(100 * features[0] @ features[1].T, labels)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        lr = 1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * (step - 1) / STEPS)) / 2
        with torch.no_grad():
            for (name, p), g in zip(parameters.items(), gradients):
                m, v = moments[name]
                m, v = moments[name] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                p -= lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return parameters


@pytest.mark.parametrize("encoder", ["both", "vision"])
def test_adam_is_adam_on_the_matrices_of_so(encoder):
    adaptation, expected = trained("adam", encoder=encoder), by_hand(encoder)
    assert isinstance(adaptation.optimizer, torch.optim.Adam)
    assert adaptation.parameters.keys() == expected.keys()
    untrained = dict(clip.load("tiny")[0].double().named_parameters())
    for name, p in adaptation.parameters.items():
        moved = (p - untrained[name]).abs().max()
        assert moved > 1e-3  # of steps of 1e-3
        close = (p - expected[name]).abs() < 1e-5
        assert close.float().mean() > 0.999  # where a gradient is nearly zero, its rounding decides a step's sign


@pytest.mark.parametrize(
    "method, options",
    [
        ("so", dict(density_ratio=1.0)),
        ("so_ablation", dict(density_ratio=1.0)),
        ("so_ablation", dict(gradient="dense", moments="dense")),
    ],
    ids=["so", "so_ablation", "dense"],
)
def test_so_at_density_one_and_dense_ablation_train_as_adam(method, options):
    adam, other = (trained(name, encoder="text", **rest) for name, rest in (("adam", {}), (method, options)))
    for name, p in adam.parameters.items():
        close = (p - other.parameters[name]).abs() < 1e-6
        assert close.float().mean() > 0.999


def test_a_run_with_adam(run_main):
    flags = ("--method", "adam", "--shots", 1, "--total_iters", 3, "--workers", 0, "--save_path", "saved")
    _, record, _, _ = run_main(*flags, "--lr", "1e-4")
    assert record["trainable_weights"] == 884736 >= record["changed_weights"] > 870000
    assert record["optimizer_bytes"] == 2 * 4 * 884736 + 24 * 4  # both moments, and a step counter for each tensor
    assert record["lr"] == 1e-4 and "density_ratio" not in record and "t" not in record
    assert record["test_accuracy"] != record["zero_shot_accuracy"]
    assert Path("saved/tiny/digits/1shots/seed3/adam.safetensors").is_file()
    _, evaluated, _, _ = run_main(*flags, "--eval_only")
    assert evaluated["test_accuracy"] == record["test_accuracy"]
    assert (evaluated["optimizer_bytes"], evaluated["lr"]) == (0, 1e-4)


def test_adam_takes_its_settings():
    released = parse(["--method", "adam", "--dataset", "dtd", "--root_path", "data", "--shots", "4"])
    assert (released.lr, released.iterations) == (2e-4, 8000)
    base = Settings(method="adam", device="cpu", workers=0)
    assert base.run_id == Settings(method="adam", device="cpu", workers=0, density_ratio=0.5, t=9).run_id
    for change in ({"lr": 1e-3}, {"encoder": "text"}, {"position": "up"}, {"n_iters": 3}):
        assert Settings(method="adam", device="cpu", workers=0, **change).run_id != base.run_id
    model, _ = clip.load("tiny")
    adaptation = METHODS["adam"].prepare(model, TASK, settings_of(method="adam", lr=3e-3, encoder="text"))
    (group,) = adaptation.optimizer.param_groups
    expected = dict(lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False)
    assert {name: group[name] for name in expected} == expected
    assert {n for n, p in model.named_parameters() if p.requires_grad} == adaptation.parameters.keys()
    assert adaptation.trains_text and not adaptation.trains_images
