"""SO, Adam and SO's ablations as methods: their settings, what they train, and Adam beside Adam by hand."""

import re
from pathlib import Path

import pytest
import torch
from support.runs import experiment_of
from support.training import cosine, fitted, noise, plain_loss, prepared

import clip
from arguments import parse
from methods.choice import select_matrices
from optimizers import SO, SOAblation

CONFIGS = Path(__file__).parent.parent / "configs" / "ablations"
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}
SPARSE = {"lr": 3e-3, "density_ratio": 0.003, "prune_first": True}
CHOICES = {"gradient": "importance", "moments": "random", "support": "static"}


@pytest.mark.parametrize(
    "method, kind, options, group",
    [
        ("so", SO, SPARSE | {"t": 7}, SPARSE | {"T": 7, "dense": False}),
        ("adam", torch.optim.Adam, {"lr": 3e-3}, {"lr": 3e-3, "amsgrad": False}),
        ("so_ablation", SOAblation, SPARSE | CHOICES | {"t": 7}, SPARSE | CHOICES | {"T": 7}),
    ],
)
def test_a_method_takes_its_settings_and_trains_the_chosen_matrices(method, kind, options, group):
    options |= {"encoder": "text", "position": "top1", "n_iters": 11, "shots": 2, "seed": 2**62}
    adaptation = prepared(method, **options)
    chosen = select_matrices(clip.load("tiny")[0], adaptation.experiment.hparams).keys()
    assert chosen == adaptation.parameters.keys()
    assert {name for name, p in adaptation.model.named_parameters() if p.requires_grad} == chosen
    assert adaptation.trains_text and not adaptation.trains_images
    optimizer = adaptation.optimizer
    assert type(optimizer) is kind and len(optimizer.param_groups) == 1
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in adaptation.parameters.values()]
    assert (group | ADAM).items() <= optimizer.param_groups[0].items()
    assert method == "adam" or optimizer.generator.initial_seed() == 2**62
    for step in range(23):  # shots x n_iters, and the end
        assert optimizer.param_groups[0]["lr"] == pytest.approx(cosine(3e-3, step, 22), rel=1e-6)
        optimizer.step()
        adaptation.scheduler.step()


def test_released_values():
    data = ["--dataset", "dtd", "--root_path", "data", "--shots", "4", "--method"]
    so, adam = (parse([*data, method]).hparams.settled(4, images=0) for method in ("so", "adam"))
    for hparams in (so, adam):
        assert (hparams.lr, hparams.total_iters, hparams.batch_size, hparams.early_stop_loss) == (2e-4, 8000, 32, 0.01)
    assert (so.density_ratio, so.t, so.prune_first, so.sampled_gradients) == (5e-5, 5, False, True)


def test_the_seed_decides_what_so_draws():
    def supports(seed):
        adaptation = prepared("so", density_ratio=0.005, seed=seed)
        adaptation.optimizer.draw_supports()
        return [adaptation.optimizer.state[p]["support"] for p in adaptation.parameters.values()]

    torch.manual_seed(0)
    first = supports(seed=1)
    torch.manual_seed(99)  # the optimizer's generator is its own
    assert all(torch.equal(a, b) for a, b in zip(first, supports(seed=1)))
    assert not any(torch.equal(a, b) for a, b in zip(first, supports(seed=2)))
    matrices = {width: (3 * width**2, width**2, 4 * width**2, 4 * width**2) for width in (128, 64)}
    assert [len(s) for s in first] == [int(0.005 * n) for n in 4 * matrices[128] + 2 * matrices[64]]


def assert_close(adaptation, expected, atol, untrained):
    """Compare all trained tensors. Where a gradient is nearly zero, its rounding decides the sign of Adam's step."""
    for name, p in adaptation.parameters.items():
        assert (p - untrained[name]).abs().max() > atol * 10
        assert ((p - expected[name]).abs() < atol).float().mean() > 0.999, name


@pytest.fixture(scope="module")
def untrained():
    return dict(clip.load("tiny")[0].double().named_parameters())


def test_sampled_gradients_train_the_same_weights(untrained):
    options = {"density_ratio": 0.005, "lr": 1e-3, "t": 2, "total_iters": 6, "batch_size": 3}
    plain, sampled = (prepared("so", sampled_gradients=sampled, **options) for sampled in (False, True))
    assert [sum("forward" in vars(m) for m in a.model.modules()) for a in (plain, sampled)] == [0, 24]
    batches = [(images[:n], labels[:n]) for (images, labels), n in zip(noise(6), (3, 1) * 3)]
    losses = [[row["loss"] for row in fitted(adaptation, batches).curve] for adaptation in (plain, sampled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(set(losses[0])) == 3
    for name, p in plain.parameters.items():
        assert not torch.equal(p, untrained[name])
        torch.testing.assert_close(sampled.parameters[name], p, rtol=0, atol=1e-7)  # where a step is 1e-3


STEPS = {"total_iters": 6, "lr": 1e-3}


def test_adam_is_kingma_and_bas_algorithm_on_the_matrices_of_so(untrained):
    experiment = experiment_of("adam", model=clip.load("tiny")[0].double())
    parameters = select_matrices(experiment.model, experiment.hparams)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    for step, batch in enumerate(noise(6), start=1):
        gradients = torch.autograd.grad(plain_loss(experiment.model, *batch), list(parameters.values()))
        with torch.no_grad():
            for (name, p), g in zip(parameters.items(), gradients):
                m, v = moments[name]
                m, v = moments[name] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                m_hat, v_hat = m / (1 - 0.9**step), v / (1 - 0.999**step)
                p -= cosine(1e-3, step - 1, 6) * m_hat / (v_hat.sqrt() + 1e-8)
    adaptation = prepared("adam", **STEPS)
    fitted(adaptation)
    assert_close(adaptation, parameters, 1e-5, untrained)


def test_so_at_density_one_and_the_dense_ablation_train_as_adam(untrained):
    adam = prepared("adam", encoder="text", position="top1", **STEPS)
    fitted(adam)
    for method, options in (
        ("so", {"density_ratio": 1.0}),
        ("so_ablation", {"density_ratio": 1.0}),
        ("so_ablation", {"gradient": "dense", "moments": "dense"}),
    ):
        other = prepared(method, encoder="text", position="top1", **STEPS, **options)
        fitted(other)
        assert_close(other, adam.parameters, 1e-6, untrained)


PUBLISHED = {  # gradient, moments, support, prune_first; accuracy at 1 shot and 4 shots
    "dense": ("dense", "dense", "dynamic", False, "4.4 %", "13.6 %"),
    "dense_moments": ("random", "dense", "dynamic", False, "73.6 %", "77.2 %"),
    "so": ("random", "importance", "dynamic", False, "74.6 %", "80.4 %"),
    "importance_gradient": ("importance", "importance", "dynamic", False, "66.6 %"),
    "random_moments": ("random", "random", "dynamic", False, "72.9 %"),
    "static_support": ("random", "importance", "static", False, "71.2 %", "77.0 %"),
    "no_momentum": ("random", "none", "dynamic", False, "67.8 %", "76.7 %"),
    "prune_first": ("random", "importance", "dynamic", True),
}


def test_the_config_files_are_the_published_table():
    assert {path.stem for path in CONFIGS.iterdir()} == PUBLISHED.keys()
    for flags in (["--dataset", "dtd", "--root_path", "data"], []):
        so = parse(flags)
        for name, row in PUBLISHED.items():
            path = CONFIGS / f"{name}.yaml"
            text = path.read_text(encoding="utf-8")
            assert f"--config configs/ablations/{name}.yaml " in text and re.findall(r"[\d.]+ %", text) == list(row[4:])
            config = parse(["--config", str(path), *flags])
            assert (config.settings.method, config.settings.tuned_on) == ("so_ablation", so.settings.tuned_on)
            choices = dict(zip(("gradient", "moments", "support", "prune_first"), row))
            same = {n: v for n, v in vars(so.hparams).items() if n not in ("prune_first", "sampled_gradients")}
            assert vars(config.hparams) == same | choices
