"""Tip-Adapter and Tip-Adapter-F: logits by hand, keys and training beside plain computations."""

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import clip
import datasets
import train
from clip.preprocess import train_transform
from methods import METHODS
from run_utils import Settings, parse

QUICK = ("--shots", 2, "--workers", 0)


def settings_of(**options):
    return Settings(**{"backbone": "tiny", "device": "cpu", "workers": 0, "seed": 5} | options)


class Plane(nn.Module):
    """Stands for a CLIP with embeddings in the plane."""

    arch, device = SimpleNamespace(embed_dim=2), torch.device("cpu")


def test_logits_by_hand():
    items = tuple(datasets.Item(f"{i}.jpg", label) for i, label in enumerate((1, 0, 1)))
    task = datasets.Task("plane", ("cat", "dog"), ("{}",), items, (), (), None)
    adapter = METHODS["tip_adapter"].prepare(Plane(), task, settings_of(tip_alpha=2.0, tip_beta=3.0))
    adapter.keys.copy_(torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]]))
    logits = adapter.logits(torch.tensor([[0.8, 0.6]]), torch.tensor([[1.0, 0.0], [0.6, -0.8]]))
    # Cosines with the keys: 0.96, 0.8, 0.6; with the two classes' texts: 0.8 and 0.
    cat = 80 + 2 * math.exp(-3 * 0.2)
    dog = 0 + 2 * (math.exp(-3 * 0.04) + math.exp(-3 * 0.4))
    assert logits[0].tolist() == pytest.approx([cat, dog], rel=1e-5)
    plain = METHODS["tip_adapter"].prepare(Plane(), task, settings_of())  # alpha 1, beta 5.5
    plain.keys.copy_(adapter.keys)
    logits = plain.logits(torch.tensor([[0.8, 0.6]]), torch.tensor([[1.0, 0.0], [0.6, -0.8]]))
    assert logits[0, 0].item() == pytest.approx(80 + math.exp(-5.5 * 0.2), rel=1e-6)


def test_a_saved_cache_brings_its_labels(tmp_path):
    def adapter_of(*labels):
        items = tuple(datasets.Item(f"{i}.jpg", label) for i, label in enumerate(labels))
        task = datasets.Task("plane", ("cat", "dog"), ("{}",), items, (), (), None)
        return METHODS["tip_adapter"].prepare(Plane(), task, settings_of())

    saved, loaded = adapter_of(0, 1, 1), adapter_of(1, 0, 1)
    saved.keys.copy_(torch.eye(3, 2))
    saved.save(tmp_path / "cache.safetensors", "a" * 64, {})
    loaded.load(tmp_path / "cache.safetensors", "a" * 64)
    features = torch.tensor([[0.6, 0.8], [1.0, 0.0]])
    assert torch.equal(loaded.logits(features, torch.eye(2)), saved.logits(features, torch.eye(2)))


@pytest.fixture(scope="module")
def task():
    return datasets.build("digits", None, shots=1, seed=5)


@torch.no_grad()
def test_keys_are_unit_means_of_the_encoders_own_features(task):
    model, _ = clip.load("tiny")
    settings = settings_of(cache_passes=3, min_area=0.4, flip=True)
    adapter = METHODS["tip_adapter"].prepare(model, task, settings)
    adapter.build()
    views = datasets.augmented_loader(task, train_transform(32, 0.4, True), 1, 3, seed=5, workers=0)
    features = [model.encode_image(images)[0] for images, _ in views]
    assert len(features) == 30 and adapter.labels.tolist() == [item.label for item in task.train]
    for p in range(10):
        mean = (features[p] + features[10 + p] + features[20 + p]) / 3
        torch.testing.assert_close(adapter.keys[p], mean / mean.norm(), rtol=0, atol=1e-5)
    of_unit_length = torch.stack(features).view(3, 10, -1)
    of_unit_length = nn.functional.normalize(nn.functional.normalize(of_unit_length, dim=-1).mean(0), dim=-1)
    assert (of_unit_length - adapter.keys).abs().max() > 1e-4  # another thing


def test_training_beside_a_plain_loop(task):
    model, _ = clip.load("tiny")
    settings = settings_of(
        cache_passes=1, lr=0.03, tip_alpha=1.5, tip_beta=4.0, total_iters=6, batch_size=7, early_stop_loss=0.0
    )
    adaptation = METHODS["tip_adapter_f"].prepare(model, task, settings)
    adaptation.build()
    keys = adaptation.keys.detach().clone()
    start = keys.clone()
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(n, 3, 32, 32, generator=generator), torch.arange(n)) for n in (7, 3) * 3]
    fit = train.fit(model, task, adaptation, batches, settings, None)

    with torch.no_grad():
        text = model.encode_text(clip.tokenize([f"a photo of a {name}." for name in task.class_names]))
        text /= text.norm(dim=1, keepdim=True)
    keys.requires_grad_(True)
    labels_of_keys = [item.label for item in task.train]
    m, v = torch.zeros_like(keys), torch.zeros_like(keys)
    for step, (images, labels) in enumerate(batches, start=1):
        with torch.no_grad():
            f = model.encode_image(images)
            f /= f.norm(dim=1, keepdim=True)
        cached = [[0.0] * 10 for _ in labels]
        for b in range(len(labels)):
            for n, label in enumerate(labels_of_keys):
                cached[b][label] = cached[b][label] + torch.exp(-4.0 + 4.0 * f[b].dot(keys[n]))
        logits = 100 * f @ text.T + 1.5 * torch.stack([torch.stack(row) for row in cached])
        loss = -logits.log_softmax(dim=1)[range(len(labels)), labels].mean()
        (gradient,) = torch.autograd.grad(loss, keys)
        lr = 0.03 * (1 + math.cos(math.pi * (step - 1) / 6)) / 2  # down to zero
        with torch.no_grad():
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            keys *= 1 - lr * 0.01
            keys -= lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-4)
    assert (keys - start).abs().max() > 0.02
    torch.testing.assert_close(adaptation.keys, keys, rtol=0, atol=1e-4)
    assert fit.last["lr"] == pytest.approx(lr)


def test_published_settings_and_epochs():
    data = ["--dataset", "dtd", "--root_path", "data", "--shots", "16", "--device", "cpu", "--method"]
    plain, trained = parse([*data, "tip_adapter"]), parse([*data, "tip_adapter_f"])
    for settings in (plain, trained):
        assert (settings.tip_alpha, settings.tip_beta, settings.cache_passes) == (1.0, 5.5, 10)
        assert (settings.min_area, settings.flip) == (0.5, True)
    assert (trained.lr, trained.batch_size, trained.early_stop_loss, trained.epochs) == (1e-3, 256, 0, 20)
    with pytest.raises(ValueError, match="settled"):
        _ = trained.iterations
    settled = trained.settled(47 * 16)
    assert settled.iterations == settled.total_iters == 20 * 3 and settled.epochs == 20
    assert parse([*data, "tip_adapter_f", "--n_iters", "5"]).settled(752).iterations == 80
    model, _ = clip.load("tiny")
    task = datasets.build("digits", None, 1, 1)
    optimizer = METHODS["tip_adapter_f"].prepare(model, task, settled).optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["eps"], group["weight_decay"], group["betas"]) == (1e-3, 1e-4, 0.01, (0.9, 0.999))


def saved_keys(method):
    return load_file(f"s/tiny/digits/2shots/seed3/{method}.safetensors")["keys"]


def test_both_begin_with_the_same_cache_and_training_moves_it(run_main):
    run_main(*QUICK, "--method", "tip_adapter", "--save_path", "s")
    flags = (*QUICK, "--method", "tip_adapter_f", "--save_path", "s", "--force")
    run_main(*flags, "--lr", "1e-12")
    torch.testing.assert_close(saved_keys("tip_adapter_f"), saved_keys("tip_adapter"), rtol=0, atol=1e-6)
    _, record, _, _ = run_main(*flags, "--lr", 1e-3)
    assert (saved_keys("tip_adapter_f") - saved_keys("tip_adapter")).abs().max() > 1e-3
    assert record["iterations"] == 20 and record["lr"] == 1e-3  # an epoch of 20 images is one iteration


def test_an_evaluation_has_the_iterations_of_the_training(run_main):
    """Not those that --epochs would be with the batch size of the command line."""
    flags = (*QUICK, "--method", "tip_adapter_f", "--save_path", "s")
    run_main(*flags, "--epochs", 2, "--batch_size", 8)
    _, evaluated, _, _ = run_main(*flags, "--eval_only")
    assert (evaluated["total_iters"], evaluated["batch_size"]) == (6, 8)


def test_an_empty_say_of_the_cache_is_zero_shot(run_main):
    _, none, _, _ = run_main(*QUICK, "--method", "tip_adapter", "--tip_alpha", 0)
    assert none["test_accuracy"] == none["zero_shot_accuracy"]
    _, much, _, _ = run_main(*QUICK, "--method", "tip_adapter", "--tip_alpha", 100, "--tip_beta", 20)
    assert much["test_accuracy"] > none["test_accuracy"] + 1
    assert (much["tip_alpha"], much["tip_beta"], much["cache_passes"]) == (100, 20, 10)


@pytest.mark.parametrize("flag", ["--tip_alpha", "--tip_beta", "--cache_passes", "--epochs"])
def test_bad_settings(run_main, flag):
    code, _, _, err = run_main("--method", "tip_adapter_f", flag, "-1")
    assert code == 2 and f"{flag} must be at least" in err
