"""The linear probe is scikit-learn's logistic regression on CLIP's features, and starts where it says."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from support.fabricate import fabricate

import clip
import datasets
from methods import METHODS, MethodError
from methods.linear_probe import fit_probe
from run_utils import Settings


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@torch.no_grad()
def slow_features(model, preprocess, task, items):
    """One image at a time, of unit length, in float64."""
    return unit(np.stack([model.encode_image(preprocess(task.read(i))[None])[0].double().numpy() for i in items]))


@pytest.fixture(scope="module")
def digits():
    """Features and labels of two training shots and of the test part, and the text classifier."""
    model, preprocess = clip.load("tiny")
    task = datasets.build("digits", None, shots=2, seed=3)
    with torch.no_grad():
        prompts = [f"a photo of a {name}." for name in task.class_names]
        text = unit(np.stack([model.encode_text(clip.tokenize([p]))[0].double().numpy() for p in prompts]))
    parts = [
        (slow_features(model, preprocess, task, items), np.array([i.label for i in items]))
        for items in (task.train, task.test)
    ]
    return (*parts, text)


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
@pytest.mark.parametrize(
    "flags, c, iterations, from_text",
    [
        (("--probe_c", 0.316), 0.316, 1000, False),
        (("--probe_c", "0.001", "--probe_iters", 9), 0.001, 9, False),
        (("--text_init", "--probe_c", 0.316), 0.316, 1000, True),
        (("--text_init", "--probe_c", 0.316, "--probe_iters", 6), 0.316, 6, True),
    ],
)
def test_a_run_is_scikit_learn_on_the_features(run_main, digits, flags, c, iterations, from_text):
    (features, labels), (test_features, test_labels), text = digits
    _, record, _, err = run_main("--method", "linear_probe", "--shots", 2, "--workers", 0, "--save_path", "s", *flags)
    expected = LogisticRegression(C=c, max_iter=iterations, warm_start=True)
    if from_text:
        expected.coef_, expected.intercept_ = text, np.zeros(10)
    expected.fit(100 * features, labels)
    saved = load_file("s/tiny/digits/2shots/seed3/linear_probe.safetensors")
    size = np.abs(expected.coef_).max()
    np.testing.assert_allclose(saved["weight"], expected.coef_, rtol=0, atol=0.01 * size)
    np.testing.assert_allclose(saved["bias"], expected.intercept_, rtol=0, atol=0.01 * size)
    accuracy = 100 * np.mean(expected.predict(100 * test_features) == test_labels)
    assert record["test_accuracy"] == pytest.approx(accuracy, abs=0.4)  # two images of 540
    assert record["probe_c"] == c and record["text_init"] == from_text
    assert ("without convergence" in err) == (iterations < 1000)


def test_the_start_matters_before_convergence_alone(digits):
    (features, labels), _, text = digits
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


def test_logits_by_hand():
    model, _ = clip.load("tiny")
    items = (datasets.Item("0.jpg", 0), datasets.Item("1.jpg", 1))
    task = datasets.Task("noise", ("cat", "dog"), ("{}",), items, (), (), None)
    probe = METHODS["linear_probe"].prepare(model, task, Settings(backbone="tiny", device="cpu"))
    with torch.no_grad():
        probe.weight[0, :2], probe.weight[1, 1] = torch.tensor([0.25, 0.5]), -2
        probe.bias.copy_(torch.tensor([7.0, 300.0]))
    features = torch.zeros(1, 64)
    features[0, :2] = torch.tensor([0.6, 0.8])
    expected = [100 * (0.25 * 0.6 + 0.5 * 0.8) + 7, 100 * -2 * 0.8 + 300]
    assert probe.logits(features, torch.randn(2, 64))[0].tolist() == pytest.approx(expected)


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


def test_two_classes_end_to_end(run_main, tmp_path):
    fabricate("dtd", tmp_path / "data", classes=2)
    flags = ("--dataset", "dtd", "--root_path", "data", "--backbone", "tiny", "--shots", 2, "--method", "linear_probe")
    task, (model, preprocess) = datasets.build("dtd", "data", shots=2, seed=3), clip.load("tiny")
    features, test_features = (slow_features(model, preprocess, task, items) for items in (task.train, task.test))
    expected = LogisticRegression(C=0.316, max_iter=1000).fit(100 * features, [item.label for item in task.train])
    accuracy = 100 * expected.score(100 * test_features, [item.label for item in task.test])
    code, record, _, _ = run_main(*flags)
    assert code == 0 and record["test_accuracy"] == accuracy and record["trainable_weights"] == 2 * 65


@pytest.mark.parametrize("names, labels", [(("cat", "dog", "cow"), (0, 2, 0)), (("cat",), (0, 0))])
def test_classes_that_cannot_be_fitted(names, labels):
    model, _ = clip.load("tiny")
    items = tuple(datasets.Item(f"{i}.jpg", label) for i, label in enumerate(labels))
    task = datasets.Task("noise", names, ("{}",), items, (), (), None)
    probe = METHODS["linear_probe"].prepare(model, task, Settings(backbone="tiny", device="cpu", workers=0))
    with pytest.raises(MethodError, match=r"two classes or more"):
        probe.build()


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--probe_c", "0"), "--probe_c must be positive"),
        (("--probe_c", "inf"), "--probe_c must be positive"),
        (("--probe_iters", "0"), "--probe_iters must be at least 1"),
    ],
)
def test_bad_settings(run_main, flags, words):
    code, _, _, err = run_main("--method", "linear_probe", *flags)
    assert code == 2 and words in err
