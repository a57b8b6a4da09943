"""The linear probe is scikit-learn's logistic regression on CLIP's features, and starts where it says."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from support.runs import TASK
from support.training import prepared

import clip
import datasets
import train
from common import UserError
from datasets import Item
from methods.heads.linear_probe import Hparams, fit_probe


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@torch.no_grad()
def slow_features(model, preprocess, task, items):
    """One image at a time, of unit length, in float64."""
    return unit(np.stack([model.encode_image(preprocess(task.read(i))[None])[0].double().numpy() for i in items]))


@pytest.fixture(scope="module")
def digits():
    """The digits with few test images; features and labels of two shots and of the test images; the classifier."""
    model, preprocess = clip.load("tiny")
    task = datasets.build("digits", None, shots=2, seed=3)
    task = dataclasses.replace(task, test=task.test[::9])
    with torch.no_grad():
        prompts = [f"a photo of a {name}." for name in task.class_names]
        text = unit(np.stack([model.encode_text(clip.tokenize([p]))[0].double().numpy() for p in prompts]))
    parts = [
        (slow_features(model, preprocess, task, items), np.array([i.label for i in items]))
        for items in (task.train, task.test)
    ]
    return (task, *parts, text)


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
@pytest.mark.parametrize("c, iterations, from_text", [(0.001, 9, False), (0.316, 1000, True), (0.316, 6, True)])
def test_it_is_scikit_learn_on_the_features(digits, tmp_path, capsys, c, iterations, from_text):
    task, (features, labels), (test_features, test_labels), text = digits
    options = {"probe_c": c, "probe_iters": iterations, "text_init": from_text, "cache_dir": str(tmp_path)}
    probe = prepared("linear_probe", task, clip.load("tiny")[0], shots=2, **options)
    probe.build()
    expected = LogisticRegression(C=c, max_iter=iterations, warm_start=True)
    if from_text:
        expected.coef_, expected.intercept_ = text, np.zeros(10)
    expected.fit(100 * features, labels)
    size = np.abs(expected.coef_).max()
    np.testing.assert_allclose(probe.weight.detach(), expected.coef_, rtol=0, atol=0.01 * size)
    np.testing.assert_allclose(probe.bias.detach(), expected.intercept_, rtol=0, atol=0.01 * size)
    accuracy = 100 * np.mean(expected.predict(100 * test_features) == test_labels)
    assert train.evaluate(probe.experiment, probe) == pytest.approx(accuracy, abs=1.7)  # one image of 60
    assert ("without convergence" in capsys.readouterr().err) == (iterations < 1000)


def test_the_start_matters_only_before_convergence(digits):
    _, (features, labels), _, text = digits
    features, text = torch.from_numpy(features).float(), torch.from_numpy(text).float()

    def between(iterations):
        (plain, _), (started, _) = (fit_probe(features, labels, 0.001, iterations, s) for s in (None, text))
        return ((plain - started).norm() / plain.norm()).item()

    assert between(5) > 0.3 and between(1000) < 0.01


@pytest.mark.parametrize("classes", [2, 3])
def test_a_text_classifier_that_needs_no_improvement_stays(classes, capsys):
    """Gaps of 100 between the logits leave no loss, and so weak a penalty no gradient: the solver takes no step."""
    text = torch.eye(classes, 4)
    features, labels = text.repeat(3, 1), list(range(classes)) * 3
    weight, bias = fit_probe(features, labels, 1e9, 1000, text)
    if classes == 2:  # of two rows the difference is what counts
        weight, text = weight[1] - weight[0], text[1] - text[0]
    assert torch.equal(weight, text.double()) and torch.equal(bias, torch.zeros(classes, dtype=torch.float64))
    plain, _ = fit_probe(features, labels, 1e9, 1000, None)
    assert not torch.equal(plain, text.double()) and not capsys.readouterr().err


@pytest.mark.parametrize("classes", [2, 5])
def test_probabilities_are_scikit_learns(classes):
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(40, 6, generator=generator), dim=-1)
    labels = [i % classes for i in range(40)]
    expected = LogisticRegression(C=1e-3, max_iter=1000).fit(100 * features.double().numpy(), labels)
    weight, bias = fit_probe(features, labels, 1e-3, 1000, None)
    logits = 100 * features.double() @ weight.T + bias
    probabilities = expected.predict_proba(100 * features.double().numpy())
    np.testing.assert_allclose(softmax(logits.numpy(), axis=1), probabilities, atol=1e-7)


def test_logits_by_hand():
    probe = prepared("linear_probe", dataclasses.replace(TASK, class_names=("cat", "dog")))
    with torch.no_grad():
        probe.weight[0, :2], probe.weight[1, 1] = torch.tensor([0.25, 0.5]), -2
        probe.bias.copy_(torch.tensor([7.0, 300.0]))
    features = torch.zeros(1, 64)
    features[0, :2] = torch.tensor([0.6, 0.8])
    expected = [100 * (0.25 * 0.6 + 0.5 * 0.8) + 7, 100 * -2 * 0.8 + 300]
    assert probe.logits(features, torch.randn(2, 64))[0].tolist() == pytest.approx(expected)


def test_what_cannot_be_fitted():
    for names, labels in ((("cat", "dog", "cow"), (0, 2, 0)), (("cat",), (0, 0))):
        items = tuple(Item(str(i), label) for i, label in enumerate(labels))
        task = dataclasses.replace(TASK, class_names=names, train=items)
        with pytest.raises(UserError, match="two classes"):
            prepared("linear_probe", task).build()
    for values in ({"probe_c": 0.0}, {"probe_c": math.inf}, {"probe_iters": 0}):
        with pytest.raises(UserError, match=f"--{next(iter(values))} "):
            Hparams(**values)
