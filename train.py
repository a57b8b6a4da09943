"""The training loop, the evaluation, and the choice of settings on val images. None knows a method or a data set by
name."""

import copy
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

import datasets
import utils
from clip import CLIP
from clip.layouts import PackedPrompts
from clip.preprocess import train_transform
from methods import METHODS, Adaptation

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

    def read_images(self) -> None:
        """Computes the features that `zero_shot` needs, without a look at the labels. DatasetError names a damaged
        image."""
        self._untrained()

    def zero_shot(self) -> float:
        """Of the unchanged model, with text features averaged over all of the task's templates."""
        return self._accuracy(self._untrained(), self.task.templates, utils.cosine_logits)

    def adapted(self, adaptation: Adaptation) -> float:
        """Of the adapted model as it is now, with text features of the first template."""
        features = self._image_features("evaluation") if adaptation.trains_images else self._untrained()
        return self._accuracy(features, self.task.templates[:1], adaptation.logits)

    def _untrained(self) -> Tensor:
        """Features by an image tower that is not, or not yet, trained."""
        if self.untrained_features is None:
            self.untrained_features = utils.load_features(self.cache)
        if self.untrained_features is None:
            self.untrained_features = self._image_features("zero-shot")
            utils.save_features(self.cache, self.untrained_features)
        return self.untrained_features

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


def prepare(model: CLIP, task: datasets.Task, settings) -> tuple[Adaptation, DataLoader | None]:
    """The settings' method on this model, and the augmented images to train it with; None where nothing is trained.
    Raises DatasetError for damaged training images."""
    torch.manual_seed(settings.seed)  # for methods that draw from torch's own generator, as dropout does
    adaptation = METHODS[settings.method].prepare(model, task, settings)
    if adaptation.optimizer is None or settings.eval_only:
        return adaptation, None
    augment = train_transform(model.arch.resolution, settings.min_area, settings.flip)
    loader = datasets.training_loader(
        task,
        augment,
        settings.batch_size,
        settings.iterations,
        settings.seed,
        settings.workers,
        settings.image_cache_mb,
        pin_memory=model.device.type == "cuda",
    )
    return adaptation, loader


def search(
    model: CLIP, task: datasets.Task, preprocess: Callable, settings, weights_sha256: str
) -> tuple[object, list[dict], float]:
    """The choice between the settings' candidates: the one with the best accuracy on the task's few-shot val images,
    the first of equals; a row for each candidate, with the values that are searched, val_accuracy (per cent),
    iterations and chosen; and the seconds it took.

    Each candidate trains a copy of the model on the training images, as a run does; `model` stays as it is, and the
    candidates' task has no test images. Where the loss diverges there is no accuracy. Raises DatasetError if there are
    no val images, TrainingDiverged if every candidate diverges.
    """
    if not task.val:
        raise datasets.DatasetError(f"{task.name} has no val images to choose settings by; leave --search out")
    on_val, candidates = dataclasses.replace(task, test=task.val), settings.candidates
    start, rows, best = time.perf_counter(), [], None
    for number, candidate in enumerate(candidates, start=1):
        values = {name: getattr(candidate, name) for name in settings.search}
        candidate = candidate.settled(len(task.train))
        print(f"search {number}/{len(candidates)}:", *(f"{name}={value}" for name, value in values.items()))
        evaluator = Evaluator(copy.deepcopy(model), on_val, preprocess, candidate, weights_sha256)
        row = values | {"val_accuracy": None, "iterations": None, "chosen": False}
        try:
            row["val_accuracy"], row["iterations"] = _trained(evaluator)
            print(f"val accuracy {row['val_accuracy']:.2f} % on {len(task.val)} images")
            if best is None or row["val_accuracy"] > rows[best]["val_accuracy"]:
                best = len(rows)
        except TrainingDiverged as error:
            print(f"note: {error}", file=sys.stderr)
        rows.append(row)
    if best is None:
        raise TrainingDiverged("the training loss diverges with all settings of --search; search lower values of lr")
    rows[best]["chosen"] = True
    return candidates[best].settled(len(task.train)), rows, time.perf_counter() - start


def _trained(evaluator: Evaluator) -> tuple[float, int]:
    """Accuracy, in per cent, after training the evaluator's model with its settings, and the iterations done."""
    model, task, settings = evaluator.model, evaluator.task, dataclasses.replace(evaluator.settings, eval_every=0)
    adaptation, loader = prepare(model, task, settings)
    result = fit(model, task, adaptation, loader, settings, evaluator)
    return evaluator.adapted(adaptation), result.iterations


def fit(
    model: CLIP,
    task: datasets.Task,
    adaptation: Adaptation,
    loader: DataLoader | None,
    settings,
    evaluator: Evaluator,
) -> Fit:
    """Lets the method build what it does without this loop; then, if there is a loader, trains on its batches.

    The loss is the cross-entropy of the method's logits, plus its penalty. Training ends early when an epoch's mean
    loss falls below `early_stop_loss`. Every `eval_every` iterations, at the next epoch's end, the evaluator is asked
    for the test accuracy, for the curve alone. Raises TrainingDiverged on a loss that is not finite.
    """
    result, start = Fit(), time.perf_counter()
    adaptation.build()
    if loader is None:
        result.seconds = time.perf_counter() - start
        return result
    tokens = utils.tokenize_classes(task.class_names, task.templates[0])
    prompts = PackedPrompts(tokens, adaptation.shares_prefix).to(model.device)
    text = None if adaptation.trains_text else _text_features(model, prompts, settings.precision).detach()
    per_epoch = datasets.batches_per_epoch(len(task.train), settings.batch_size)
    totals = torch.zeros(3, device=model.device)  # sums over an epoch: loss, correct, images
    evaluating, next_eval = 0.0, settings.eval_every or math.inf

    bar = utils.progress(loader, "training", settings.iterations, leave=True, unit="it")
    for result.iterations, (images, labels) in enumerate(bar, start=1):
        labels = labels.to(model.device, non_blocking=True)
        with utils.autocast(model.device, settings.precision):
            features = utils.encode_image(model, images)
        classifier = _text_features(model, prompts, settings.precision) if text is None else text
        logits = adaptation.logits(features, classifier)
        loss = F.cross_entropy(logits, labels)
        begins_epoch, ends_epoch = (result.iterations - 1) % per_epoch == 0, result.iterations % per_epoch == 0
        if begins_epoch or not adaptation.full_batch:
            adaptation.optimizer.zero_grad()
        # The shares of an epoch's batches add up to 1: the penalty is counted once, the loss is the mean over images.
        share = len(labels) / len(task.train) if adaptation.full_batch else 1.0
        (share * (loss + adaptation.penalty())).backward()
        lr = adaptation.optimizer.param_groups[0]["lr"]
        if ends_epoch or not adaptation.full_batch:
            adaptation.optimizer.step()
            adaptation.scheduler.step()
            adaptation.after_step(result.iterations)
        totals += _totals(loss.detach(), logits.detach(), labels)

        is_last = result.iterations == settings.iterations
        if ends_epoch or is_last:
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
