"""Metrics of classification, as pure functions of numpy arrays over N images. Accuracies and ECE are in per cent.

Labels and predictions are integers from 0; `confidence` is the probability of the predicted class, in [0, 1].
"""

import numpy as np


def accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Return the per cent of the images [N] whose prediction is their label."""
    return 100 * int((labels == predicted).sum()) / len(labels)


def class_accuracies(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Return the accuracy [C] on each class's own images, its recall, in per cent; nan for a class without images."""
    images = np.bincount(labels, minlength=classes)
    correct = np.bincount(labels[labels == predicted], minlength=classes)
    return np.where(images > 0, 100 * correct / np.maximum(images, 1), np.nan)


def macro_accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Return the mean accuracy over the classes that have images, in per cent: each class counts the same."""
    return float(np.nanmean(class_accuracies(labels, predicted, int(labels.max()) + 1)))


def nll(true_log_probability: np.ndarray) -> float:
    """Return the negative log-likelihood in nats: the mean of minus the log probability [N] of the true class."""
    return float(0.0 - true_log_probability.mean())  # never -0.0


def brier(squared_error: np.ndarray) -> float:
    """Return the Brier score (Brier 1950), from 0 to 2: the mean over images [N] of sum_c (p_c - y_c)^2."""
    return float(squared_error.mean())


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> tuple[np.ndarray, ...]:
    """Return for each of `bins` bins of equal width how many images it has, their mean confidence, and their accuracy,
    in per cent (Guo et al. 2017, section 2).

    Bin m holds confidences in ((m - 1) / bins, m / bins]; the first one also 0. Means of an empty bin are nan.
    """
    inner_edges = np.arange(1, bins) / bins
    places = np.digitize(confidence, inner_edges, right=True)
    images = np.bincount(places, minlength=bins)
    sums = (np.bincount(places, weights=values, minlength=bins) for values in (confidence, correct))
    with np.errstate(invalid="ignore"):
        return images, *(100 * total / images for total in sums)


def ece(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Return the expected calibration error (Guo et al. 2017, equation 3) in per cent: the mean over images of the
    distance between the accuracy and the mean confidence in their bin (`reliability`). Empty bins count nothing."""
    images, mean_confidence, mean_accuracy = reliability(confidence, correct, bins)
    return float(np.nansum(images * np.abs(mean_accuracy - mean_confidence)) / images.sum())


def harmonic_mean(base: float, new: float) -> float:
    """Return the harmonic mean of two accuracies, as of the base-to-new protocol (CoCoOp, section 4.1); 0 if one is."""
    return 2 * base * new / (base + new) if base and new else 0.0


def confusions(labels: np.ndarray, predicted: np.ndarray) -> list[tuple[int, int, int]]:
    """Return (label, predicted class, images) for all pairs of classes that were confused, the most frequent first."""
    wrong = labels != predicted
    pairs, images = np.unique(np.stack([labels[wrong], predicted[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-images, kind="stable")
    return [(int(label), int(other), int(n)) for (label, other), n in zip(pairs.T[order], images[order])]


TEMPERATURES = (0.01, 100.0)  # the range in which a temperature is looked for


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature T in TEMPERATURES for which softmax(logits / T) has the smallest NLL (Guo et al. 2017,
    section 4.2), for logits [N, C].

    The NLL is convex in 1 / T. Its slope there is the mean over images of the expected logit minus the true class's;
    its zero is found by bisection. If all T are equally good, as for one class, T is 1. If every image is right, the
    best T is 0: the lower limit is returned.
    """
    logits = logits - logits.max(axis=1, keepdims=True)  # which changes no probability
    true = logits[np.arange(len(labels)), labels]

    def slope(log_t: float) -> float:
        weights = np.exp(logits * np.exp(-log_t))
        return float(((weights * logits).sum(axis=1) / weights.sum(axis=1) - true).mean())

    low, high = np.log(TEMPERATURES)
    if slope(low) == slope(high) == 0:
        return 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return float(np.exp((low + high) / 2))
