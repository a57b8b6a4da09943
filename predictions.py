"""What a model says of each test image: predictions, their table, their metrics, and all logits in a compact form.

Every method is evaluated here, so that accuracy, metrics and `predictions.csv` come from the same logits.
"""

import dataclasses
import gzip
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

import metrics
from common import UserError
from datasets import Task

COLUMNS = ("predicted", "probability", "true_probability", "true_rank")
ZERO_SHOT = "zero_shot_"  # what the columns of the unchanged model begin with
TABLE, LOGITS = "predictions.csv", "logits.safetensors"
PLAIN_BYTES = 1_000_000  # a longer table is compressed
IMAGES_AT_ONCE = 4096  # whose logits are computed together, to bound memory


class NotFinite(UserError):
    """A model's logits are no finite numbers."""


@dataclass(frozen=True)
class Predictions:
    """What a model says of N images with known labels: arrays [N] in the order of the task's test images.

    `predicted` is the class of the largest logit, the first of equals; `probability` is its softmax probability.
    `true_rank` is 1 where it is the true class, 2 where one other class stands before that, and so on.
    `true_log_probability` (nats) and `true_probability` are those of the true class, `squared_error` is the sum over
    the classes of (p_c - y_c)^2. `logits` [N, C], if they are kept, are float16, each image's largest subtracted: this
    changes no probability, and makes float16 most exact for the most probable classes. `scaled` is what the model says
    with its logits divided by a temperature, if there is one.
    """

    labels: np.ndarray
    predicted: np.ndarray
    probability: np.ndarray
    true_rank: np.ndarray
    true_log_probability: np.ndarray
    squared_error: np.ndarray
    logits: Tensor | None = None
    scaled: "Predictions | None" = None

    @property
    def true_probability(self) -> np.ndarray:
        return np.exp(self.true_log_probability)

    @property
    def correct(self) -> np.ndarray:
        return self.labels == self.predicted

    @property
    def accuracy(self) -> float:
        """The per cent of the images whose prediction is their label."""
        return metrics.accuracy(self.labels, self.predicted)

    def calibration(self, bins: int) -> dict[str, float]:
        """Return nll (nats), brier (0 to 2) and ece (per cent, of `bins` bins of equal width)."""
        return {
            "nll": metrics.nll(self.true_log_probability),
            "brier": metrics.brier(self.squared_error),
            "ece": metrics.ece(self.probability, self.correct, bins),
        }

    def metrics(self, bins: int) -> dict[str, float]:
        """Return macro_accuracy (per cent) and `calibration`."""
        return {"macro_accuracy": metrics.macro_accuracy(self.labels, self.predicted)} | self.calibration(bins)


@torch.no_grad()
def predict(
    logits: Callable[[Tensor], Tensor],
    features: Tensor,
    labels: Sequence[int],
    keep_logits: bool = False,
    temperature: float | None = None,
) -> Predictions:
    """Return the predictions for image features [N, E] by `logits`, which maps some of them to [B, C].

    With a `temperature` they are also made from the logits divided by it. Raise NotFinite if a logit is no number, or
    infinite where that matters.
    """
    parts, kept, scaled_parts = [], [], []
    all_labels = torch.tensor(labels)
    for part, true in zip(features.split(IMAGES_AT_ONCE), all_labels.split(IMAGES_AT_ONCE)):
        of_part = logits(part)
        true = true.to(of_part.device)
        parts.append(_summary(of_part, true))
        if temperature is not None:
            scaled_parts.append(_summary(of_part / temperature, true))
        if keep_logits:
            kept.append((of_part - of_part.amax(dim=-1, keepdim=True)).half().cpu())
    scaled = _joined(all_labels, scaled_parts) if scaled_parts else None
    return dataclasses.replace(
        _joined(all_labels, parts), logits=torch.cat(kept) if keep_logits else None, scaled=scaled
    )


def _joined(labels: Tensor, parts: list[tuple[Tensor, ...]]) -> Predictions:
    """Return the predictions whose batches `_summary` has described."""
    found = Predictions(labels.numpy(), *(torch.cat(column).cpu().numpy() for column in zip(*parts)))
    if not np.isfinite(found.true_log_probability).all():
        raise NotFinite("the model's logits are not finite numbers; are the weights of --backbone intact?")
    return found


def _summary(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Return what Predictions has of each image of a batch, in its order from `predicted` on, where the logits are."""
    true = logits.gather(1, labels[:, None])
    largest, predicted = logits.max(dim=-1, keepdim=True)  # the first of equals
    work = torch.empty_like(logits)  # sums of floats in one buffer: three times as fast as of booleans in new ones
    rank = 1 + torch.gt(logits, true, out=work).sum(dim=-1).long()
    tied = (torch.eq(logits, true, out=work).sum(dim=-1) > 1).nonzero()[:, 0]
    classes = torch.arange(logits.shape[1], device=logits.device)
    rank[tied] += ((logits[tied] == true[tied]) & (classes < labels[tied, None])).sum(dim=-1)
    weights = torch.sub(logits, largest, out=work).exp_()  # softmax without its denominator; 1 for the predicted class
    total, squares = weights.sum(dim=-1).double(), torch.linalg.vector_norm(weights, dim=-1).double().square()
    true_log_probability = (true - largest)[:, 0].double() - total.log()
    squared_error = squares / total.square() + 1 - 2 * true_log_probability.exp()
    return predicted[:, 0], 1 / total, rank, true_log_probability, squared_error


def files(task: Task, adapted: Predictions, zero_shot: Predictions) -> dict[str, str | bytes | None]:
    """Return the files of a run, by name: the table of predictions, that of the classes, and all logits if these were
    kept. A file that must not be there is None."""
    text = _table(task, adapted, zero_shot)
    long = len(text) > PLAIN_BYTES
    return {
        TABLE: None if long else text,
        f"{TABLE}.gz": gzip.compress(text.encode(), compresslevel=2, mtime=0) if long else None,
        "classes.csv": _class_table(task, adapted, zero_shot),
        LOGITS: None if adapted.logits is None else _logits(adapted, zero_shot),
    }


def _table(task: Task, adapted: Predictions, zero_shot: Predictions) -> str:
    """Return predictions.csv. A row is an image: path, label, COLUMNS of the adapted model, and the same of the
    unchanged one, named ZERO_SHOT."""
    columns = [[_field(item.path) for item in task.test], adapted.labels.tolist()]
    for model in (adapted, zero_shot):
        columns += [getattr(model, name).tolist() for name in COLUMNS]
    head = ("path", "label", *COLUMNS, *(f"{ZERO_SHOT}{name}" for name in COLUMNS))
    row = "%s,%d,%d,%.6g,%.6g,%d,%d,%.6g,%.6g,%d"
    return "\n".join([",".join(head), *(row % values for values in zip(*columns)), ""])


def _field(path: str) -> str:
    """Return a path as a field of a CSV file. Names on disk need not be valid text."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',"\r\n') else text


def _class_table(task: Task, adapted: Predictions, zero_shot: Predictions) -> str:
    """Return classes.csv: label, class_name, images, accuracy and zero_shot_accuracy (per cent; empty without images)
    of each class."""
    classes = len(task.class_names)
    images = np.bincount(adapted.labels, minlength=classes)
    accuracies = [metrics.class_accuracies(model.labels, model.predicted, classes) for model in (adapted, zero_shot)]
    lines = ["label,class_name,images,accuracy,zero_shot_accuracy"]
    for label, name in enumerate(task.class_names):
        values = ("" if np.isnan(of_model[label]) else f"{of_model[label]:.6g}" for of_model in accuracies)
        lines.append(",".join([str(label), _field(name), str(images[label]), *values]))
    return "\n".join([*lines, ""])


def _logits(adapted: Predictions, zero_shot: Predictions) -> bytes:
    """Return logits.safetensors: `adapted` (if there is one) and `zero_shot` [N, C] in float16 (see Predictions), and
    `labels` [N], in the order of the table of predictions."""
    tensors = {"zero_shot": zero_shot.logits, "labels": torch.from_numpy(zero_shot.labels)}
    return save(tensors | ({"adapted": adapted.logits} if adapted is not zero_shot else {}))
