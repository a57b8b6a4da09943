"""GDA beside the formulas written out in numpy, class by class and view by view."""

import json

import numpy as np
import pytest
import torch
from support.runs import NAMES, TASK, experiment_of

import utils
from clip import WeightsError
from common import UserError
from datasets import Item, Task
from methods import METHODS

NEAREST, TEXT_COPIES = 64, 16  # published

E = 64  # embedding size of the tiny CLIP
LABELS = [item.label for item in TASK.train]  # two images of class 0, one of each other


def fitted(views=3, classes="all", task=TASK, **values):
    """A built head on random unit features [N, E] of views, and these features with their labels."""
    experiment = experiment_of("gda", task=task, views=views, classes=classes, **values)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(views, len(task.train), experiment.model.arch.embed_dim, generator=generator)
    experiment.features[("augmented", task.train, views, 0.5, True)] = features
    head = METHODS["gda"].prepare(experiment)
    head.build()
    flat = torch.nn.functional.normalize(features, dim=-1).flatten(0, 1).double().numpy()
    return head, flat, np.array([item.label for item in task.train] * views)


def classifier(means, precision):
    weight = np.stack([precision @ mean for mean in means])
    bias = [-np.log(len(means)) - mean @ precision @ mean / 2 for mean in means]
    return weight, np.array(bias)


def shrunk(centred):
    n, width = centred.shape
    covariance = sum(np.outer(x, x) for x in centred) / (n - 1)
    return width * np.linalg.pinv((n - 1) * covariance + np.trace(covariance) * np.eye(width))


def test_the_classifier_is_the_published_formula():
    head, x, labels = fitted(gda_alpha=0.5)
    means = [x[labels == c].mean(axis=0) for c in range(3)]
    weight, bias = classifier(means, shrunk(np.stack([v - means[c] for v, c in zip(x, labels)])))
    np.testing.assert_allclose(head.weight.numpy(), weight, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(head.bias.numpy(), bias, rtol=1e-4)
    images, text = torch.randn(5, x.shape[1]), torch.randn(3, x.shape[1])
    expected = 100 * images @ text.T + 0.5 * (images @ head.weight.T + head.bias)
    torch.testing.assert_close(head.logits(images, text), expected)
    assert head.trainable_weights == 0 and head.saved.changed_weights() == 3 * x.shape[1] + 3


def test_base_classes_have_the_mean_of_their_covariances():
    head, x, labels = fitted(classes="base")
    means = [x[labels == c].mean(axis=0) for c in range(3)]
    precision = np.linalg.pinv(np.mean([np.cov(x[labels == c].T) for c in range(3)], axis=0))
    weight, bias = classifier(means, precision)
    np.testing.assert_allclose(head.weight.numpy(), weight, rtol=1e-3, atol=1e-3 * np.abs(weight).max())
    np.testing.assert_allclose(head.bias.numpy(), bias, rtol=1e-3)


def test_new_classes_are_made_from_base_views_and_text(tmp_path):
    head, x, _ = fitted(classes="base", views=20)  # 80 views, more than are taken
    sha256 = head.experiment.base_sha256
    head.saved.save(tmp_path / "head.safetensors", sha256, {})
    task = Task("noise", ("horse", "zebra"), ("{}",), (), (), (), None)
    new = METHODS["gda"].prepare(experiment_of("gda", task=task, views=20, classes="new"))
    new.saved.load(tmp_path / "head.safetensors", sha256)
    text = utils.text_classifier(new.model, task.class_names, task.templates).double().numpy()
    means, precisions = [], []
    for w in text:
        nearest = x[np.argsort(-x @ w)[:NEAREST]]
        means.append((nearest.sum(axis=0) + TEXT_COPIES * w) / (NEAREST + TEXT_COPIES))
        precisions.append(shrunk(nearest - w))
    weight, bias = classifier(means, np.mean(precisions, axis=0))
    np.testing.assert_allclose(new.weight.numpy(), weight, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(new.bias.numpy(), bias, rtol=1e-3)


def test_a_head_of_all_classes_does_not_fit_others(tmp_path):
    head, _, _ = fitted()
    head.saved.save(tmp_path / "head.safetensors", head.experiment.base_sha256, {})
    task = Task("noise", ("horse", "zebra", "cow"), ("{}",), (), (), (), None)
    other = METHODS["gda"].prepare(experiment_of("gda", task=task))
    with pytest.raises(WeightsError, match="other classes"):
        other.saved.load(tmp_path / "head.safetensors", other.experiment.base_sha256)
    assert not other.weight.any()


def test_a_class_with_one_view_is_rejected():
    with pytest.raises(UserError, match="--views"):
        fitted(views=1)
    incomplete = Task("noise", NAMES, ("{}",), (Item("0", 0), Item("1", 2)), (), (), None)
    with pytest.raises(UserError):
        fitted(task=incomplete)


def test_base_to_new_and_the_search_of_alpha(run_main):
    flags = ("--method", "gda", "--shots", 2, "--views", 2, "--workers", 0, "--save_path", "saved")
    code, base, _, err = run_main(*flags, "--classes", "base", "--search", "gda_alpha=1e-4,1")
    assert code == 0 and base["tuned_on"] == "val", err
    code, new, _, err = run_main(*flags, "--classes", "new", "--eval_only")
    assert code == 0 and new["gda_alpha"] == base["gda_alpha"], err
    assert json.loads(json.dumps(new["classes"])) == "new" and new["changed_weights"] == 5 * E + 5
