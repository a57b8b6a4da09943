"""The training loop and the evaluation. Neither knows a method or a data set by name."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import datasets
import utils
from clip import CLIP
from clip.layouts import PackedPrompts
from methods import Adaptation

TEST_BATCH = 256


class TrainingDiverged(Exception):
    """The loss is no finite number any more; the message is one line with the remedy."""


@dataclass
class Fit:
    """What training leaves behind. Losses and accuracies (per cent) are means over an epoch's augmented images."""

    curve: list[dict] = field(default_factory=list)  # a row per epoch: iteration, loss, train_accuracy, lr, ...
    timing: list[dict] = field(default_factory=list)  # iteration, seconds since the start
    iterations: int = 0
    stopped_early: bool = False
    seconds: float = 0.0  # without test passes in between

    @property
    def last(self) -> dict:
        return self.curve[-1] if self.curve else {"loss": None, "train_accuracy": None}


class Evaluator:
    """Test accuracy of a model as it is at the time, in per cent.

    Features of the unchanged model are taken from the cache on disk if this very computation was done before, and
    serve again at the end if the image tower is not trained.
    """

    def __init__(self, model: CLIP, task: datasets.Task, preprocess: Callable, settings, weights_sha256: str):
        self.model, self.task, self.preprocess, self.settings = model, task, preprocess, settings
        self.labels = [item.label for item in task.test]
        key = (weights_sha256, task.fingerprint(task.test), repr(preprocess), settings.precision, model.device.type)
        self.cache = utils.cache_file(settings.cache_dir, *key)
        self.untrained_features: Tensor | None = None

    def zero_shot(self) -> float:
        """Of the unchanged model, with text features averaged over all of the task's templates."""
        self.untrained_features = utils.load_features(self.cache)
        if self.untrained_features is None:
            self.untrained_features = self._image_features("zero-shot")
            utils.save_features(self.cache, self.untrained_features)
        return self._accuracy(self.untrained_features, self.task.templates, utils.cosine_logits)

    def adapted(self, adaptation: Adaptation) -> float:
        """Of the adapted model as it is now, with text features of the first template."""
        features = self._image_features("test") if adaptation.trains_images else self.untrained_features
        return self._accuracy(features, self.task.templates[:1], adaptation.logits)

    def _image_features(self, label: str) -> Tensor:
        pin = self.model.device.type == "cuda"
        loader = datasets.test_loader(
            self.task.test, self.task, self.preprocess, TEST_BATCH, self.settings.workers, pin_memory=pin
        )
        return utils.image_features(self.model, loader, self.settings.precision, label)

    def _accuracy(self, features: Tensor, templates: tuple[str, ...], logits: Callable) -> float:
        with utils.autocast(self.model.device, self.settings.precision):
            classifier = utils.text_classifier(self.model, self.task.class_names, templates)
        return utils.accuracy(lambda part: logits(part.to(self.model.device), classifier), features, self.labels)


def fit(
    model: CLIP,
    task: datasets.Task,
    adaptation: Adaptation,
    loader,
    settings,
    evaluator: Evaluator,
) -> Fit:
    """Trains on the loader's batches with cross-entropy of the method's logits; ends early when an epoch's mean loss
    falls below `early_stop_loss`. Every `eval_every` iterations, at the next epoch's end, the evaluator is asked for
    the test accuracy, for the curve alone. Raises TrainingDiverged on a loss that is not finite."""
    prompts = PackedPrompts(utils.tokenize_classes(task.class_names, task.templates[0])).to(model.device)
    text = None if adaptation.trains_text else _text_features(model, prompts, settings.precision).detach()
    per_epoch = datasets.batches_per_epoch(len(task.train), settings.batch_size)
    result, totals = Fit(), torch.zeros(3, device=model.device)  # sums over an epoch: loss, correct, images
    start, evaluating, next_eval = time.perf_counter(), 0.0, settings.eval_every or math.inf

    bar = utils.progress(loader, "training", settings.iterations, leave=True, unit="it")
    for result.iterations, (images, labels) in enumerate(bar, start=1):
        labels = labels.to(model.device, non_blocking=True)
        with utils.autocast(model.device, settings.precision):
            features = utils.encode_image(model, images)
        classifier = _text_features(model, prompts, settings.precision) if text is None else text
        logits = adaptation.logits(features, classifier)
        loss = F.cross_entropy(logits, labels)
        adaptation.optimizer.zero_grad()
        (loss + adaptation.penalty()).backward()
        lr = adaptation.optimizer.param_groups[0]["lr"]
        adaptation.optimizer.step()
        adaptation.scheduler.step()
        adaptation.after_step(result.iterations)
        totals += _totals(loss.detach(), logits.detach(), labels)

        is_last = result.iterations == settings.iterations
        if result.iterations % per_epoch == 0 or is_last:
            row = _epoch_row(result.iterations, totals, settings)
            if result.iterations >= next_eval:
                began = time.perf_counter()
                row["test_accuracy"] = evaluator.adapted(adaptation)
                evaluating += time.perf_counter() - began
                next_eval += settings.eval_every
            result.curve.append(row | {"lr": lr})
            result.seconds = time.perf_counter() - start - evaluating
            result.timing.append({"iteration": result.iterations, "seconds": result.seconds})
            bar.set_postfix(loss=f"{row['loss']:.3f}", accuracy=f"{row['train_accuracy']:.1f}", refresh=False)
            if row["loss"] < settings.early_stop_loss and not is_last:
                result.stopped_early = True
                break
    bar.close()
    return result


def _text_features(model: CLIP, prompts: PackedPrompts, precision: str) -> Tensor:
    with utils.autocast(model.device, precision):
        return utils.encode_text(model, prompts)


def _totals(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over a batch, left on the device: loss, correct predictions, images."""
    correct = (logits.argmax(dim=-1) == labels).sum()
    return torch.stack([loss * len(labels), correct, torch.full_like(loss, len(labels))])


def _epoch_row(iteration: int, totals: Tensor, settings) -> dict:
    """The curve's row for the epoch that ends here; the totals begin again at zero. A row per epoch, because
    reading the totals waits for the device."""
    loss, correct, images = totals.tolist()
    totals.zero_()
    if not math.isfinite(loss):
        remedy = "lower --lr" if settings.precision == "fp32" else "lower --lr or use --precision fp32"
        raise TrainingDiverged(f"the training loss is {loss} at iteration {iteration}; {remedy}")
    return {"iteration": iteration, "loss": loss / images, "train_accuracy": 100 * correct / images}
