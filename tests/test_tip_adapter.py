"""Tip-Adapter and Tip-Adapter-F: logits by hand, keys and training beside plain computations."""

import dataclasses
import math

import pytest
import torch
from support.runs import TASK
from support.training import cosine, fitted, noise, prepared
from torch.nn.functional import normalize

import clip
import datasets
from arguments import parse
from clip.preprocess import Preprocessing, train_transform
from common import UserError
from datasets import Item
from methods.heads.tip_adapter_f import Hparams


def adapter_of(*labels, **options):
    items = tuple(Item(str(i), label) for i, label in enumerate(labels))
    task = dataclasses.replace(TASK, class_names=("cat", "dog"), train=items)
    return prepared("tip_adapter", task, **options)


def in_the_plane(*rows):
    """Features that lie in the plane of the first two coordinates."""
    return torch.nn.functional.pad(torch.tensor(rows), (0, 62))


def test_logits_by_hand():
    features, text = in_the_plane([0.8, 0.6]), in_the_plane([1.0, 0.0], [0.6, -0.8])
    keys = in_the_plane([0.6, 0.8], [1.0, 0.0], [0.0, 1.0])

    def logits(**options):
        adapter = adapter_of(1, 0, 1, **options)
        adapter.keys.copy_(keys)
        return adapter.logits(features, text)[0].tolist()

    # Cosines with the keys: 0.96, 0.8, 0.6; with the two classes' texts: 0.8 and 0.
    cat = 80 + 2 * math.exp(-3 * 0.2)
    dog = 0 + 2 * (math.exp(-3 * 0.04) + math.exp(-3 * 0.4))
    assert logits(tip_alpha=2.0, tip_beta=3.0) == pytest.approx([cat, dog], rel=1e-5)
    assert logits()[0] == pytest.approx(80 + math.exp(-5.5 * 0.2), rel=1e-6)  # alpha 1, beta 5.5
    assert logits(tip_alpha=0.0) == (100 * features @ text.T)[0].tolist()


def test_a_saved_cache_brings_its_labels(tmp_path):
    saved, loaded = adapter_of(0, 1, 1), adapter_of(1, 0)
    saved.keys.copy_(torch.eye(3, 64))
    saved.saved.save(tmp_path / "cache.safetensors", "a" * 64, {})
    loaded.saved.load(tmp_path / "cache.safetensors", "a" * 64)
    features, text = in_the_plane([0.6, 0.8], [1.0, 0.0]), torch.eye(2, 64)
    assert torch.equal(loaded.logits(features, text), saved.logits(features, text))


@pytest.fixture(scope="module")
def task():
    return datasets.build("digits", None, shots=1, seed=5)


@torch.no_grad()
def test_keys_are_unit_means_of_the_encoders_own_features(task):
    options = {"cache_passes": 3, "min_area": 0.4, "flip": True, "seed": 5}
    adapter = prepared("tip_adapter", task, clip.load("tiny")[0], **options)
    adapter.build()
    views = datasets.augmented_loader(task, train_transform(Preprocessing(32), 0.4, True), 1, 3, seed=5, workers=0)
    features = torch.cat([adapter.model.encode_image(images) for images, _ in views]).view(3, 10, -1)
    torch.testing.assert_close(adapter.keys, normalize(features.mean(dim=0), dim=-1), rtol=0, atol=1e-5)
    of_unit_length = normalize(normalize(features, dim=-1).mean(dim=0), dim=-1)
    assert (of_unit_length - adapter.keys).abs().max() > 1e-4  # another thing
    assert adapter.labels.tolist() == [item.label for item in task.train]
    trained = prepared("tip_adapter_f", task, clip.load("tiny")[0], **options)
    trained.build()
    assert torch.equal(trained.keys, adapter.keys)


def test_training_beside_a_plain_loop(task):
    options = {"cache_passes": 1, "lr": 0.03, "tip_alpha": 1.5, "tip_beta": 4.0, "total_iters": 6, "batch_size": 7}
    adaptation = prepared("tip_adapter_f", task, clip.load("tiny")[0], **options)
    model = adaptation.model
    batches = [(images, torch.arange(n)) for n in (7, 3) for images, _ in noise(3, n, torch.float32)]
    fit = fitted(adaptation, batches)  # builds the keys first
    keys, start = (prepared("tip_adapter", task, model, cache_passes=1) for _ in range(2))
    for cache in (keys, start):
        cache.build()
    keys, start = keys.keys, start.keys
    with torch.no_grad():
        text = normalize(model.encode_text(clip.tokenize([f"a photo of a {name}." for name in task.class_names])))
    keys.requires_grad_(True)
    labels_of_keys = [item.label for item in task.train]
    m, v = torch.zeros_like(keys), torch.zeros_like(keys)
    for step, (images, labels) in enumerate(batches, start=1):
        with torch.no_grad():
            f = normalize(model.encode_image(images))
        cached = [[0.0] * 10 for _ in labels]
        for b in range(len(labels)):
            for n, label in enumerate(labels_of_keys):
                cached[b][label] = cached[b][label] + torch.exp(-4.0 + 4.0 * f[b].dot(keys[n]))
        logits = 100 * f @ text.T + 1.5 * torch.stack([torch.stack(row) for row in cached])
        loss = -logits.log_softmax(dim=1)[range(len(labels)), labels].mean()
        (gradient,) = torch.autograd.grad(loss, keys)
        lr = cosine(0.03, step - 1, 6, lowest=0)
        with torch.no_grad():
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            keys *= 1 - lr * 0.01
            keys -= lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-4)
    assert (keys - start).abs().max() > 0.02
    torch.testing.assert_close(adaptation.keys, keys, rtol=0, atol=1e-4)
    assert fit.last["lr"] == pytest.approx(lr)


def test_published_values():
    data = ["--dataset", "dtd", "--root_path", "data", "--shots", "16", "--method"]
    plain, trained = parse([*data, "tip_adapter"]).hparams, parse([*data, "tip_adapter_f"]).hparams
    for hparams in (plain, trained):
        assert (hparams.tip_alpha, hparams.tip_beta, hparams.cache_passes) == (1.0, 5.5, 10)
        assert (hparams.min_area, hparams.flip) == (0.5, True)
    assert (trained.lr, trained.batch_size, trained.early_stop_loss, trained.epochs) == (1e-3, 256, 0, 20)
    assert trained.settled(16, images=47 * 16).total_iters == 20 * 3
    assert parse([*data, "tip_adapter_f", "--n_iters", "5"]).hparams.settled(16, images=752).total_iters == 80
    optimizer = prepared("tip_adapter_f").optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["eps"], group["weight_decay"], group["betas"]) == (1e-3, 1e-4, 0.01, (0.9, 0.999))


def test_values_that_cannot_work():
    for values in ({"tip_alpha": -1.0}, {"tip_beta": -1.0}, {"cache_passes": 0}, {"epochs": 0}):
        with pytest.raises(UserError, match=f"--{next(iter(values))} "):
            Hparams(**values)
