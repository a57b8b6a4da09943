"""The training loop, the evaluation, and the choice of settings on val images. None knows a method or a data set by
name."""

import contextlib
import copy
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
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
from utils import States

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
    seconds: float = 0.0  # without test passes and saving in between

    next_eval: float = math.inf  # iteration

    @property
    def last(self) -> dict:
        return self.curve[-1] if self.curve else {"loss": None, "train_accuracy": None}

    def add(self, row: dict, seconds: float) -> None:
        """A row of the curve, and the seconds of training until then."""
        self.curve.append(row)
        self.timing.append({"iteration": row["iteration"], "seconds": seconds})
        self.seconds = seconds


class Stopwatch:
    """Seconds since it was made, and `before`, without those in which it was paused."""

    def __init__(self, before: float = 0.0):
        self.start = time.perf_counter() - before

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.start += time.perf_counter() - began


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


def prepare(model: CLIP, task: datasets.Task, settings, start: int = 0) -> tuple[Adaptation, DataLoader | None]:
    """The settings' method on this model, and the augmented images to train it with from iteration `start` (from 0)
    on; None where nothing is trained. Raises DatasetError for damaged training images."""
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
        start,
        pin_memory=model.device.type == "cuda",
    )
    return adaptation, loader


def search(
    model: CLIP,
    task: datasets.Task,
    preprocess: Callable,
    settings,
    weights_sha256: str,
    states: Callable[[str], States] | None = None,
) -> tuple[object, list[dict], float]:
    """The choice between the settings' candidates: the one with the best accuracy on the task's few-shot val images,
    the first of equals; a row for each candidate, with the values that are searched, val_accuracy (per cent),
    iterations and chosen; and the seconds it took.

    Each candidate trains a copy of the model on the training images, as a run does; `model` stays as it is, and the
    candidates' task has no test images. Where the loss diverges there is no accuracy. `states` gives the states, by
    name, that keep what is done of an unfinished search. Raises DatasetError if there are no val images,
    TrainingDiverged if every candidate diverges.
    """
    if not task.val:
        raise datasets.DatasetError(f"{task.name} has no val images to choose settings by; leave --search out")
    on_val, candidates = dataclasses.replace(task, test=task.val), settings.candidates
    done = states("search") if states else States()
    state = done.take() or {"rows": [], "seconds": 0.0}
    rows, watch = state["rows"], Stopwatch(state["seconds"])
    for number, candidate in enumerate(candidates[len(rows) :], start=len(rows) + 1):
        values = {name: getattr(candidate, name) for name in settings.search}
        candidate = candidate.settled(len(task.train))
        print(f"search {number}/{len(candidates)}:", *(f"{name}={value}" for name, value in values.items()))
        evaluator = Evaluator(copy.deepcopy(model), on_val, preprocess, candidate, weights_sha256)
        row = values | {"val_accuracy": None, "iterations": None, "chosen": False}
        own = states(f"candidate{number}") if states else States()
        try:
            row["val_accuracy"], row["iterations"] = _trained(evaluator, own)
            print(f"val accuracy {row['val_accuracy']:.2f} % on {len(task.val)} images")
        except TrainingDiverged as error:
            print(f"note: {error}", file=sys.stderr)
        rows.append(row)
        if done.save(number, {"rows": rows, "seconds": watch.seconds}):
            own.clear()
    accuracies = [-1.0 if row["val_accuracy"] is None else row["val_accuracy"] for row in rows]
    if max(accuracies) < 0:
        raise TrainingDiverged("the training loss diverges with all settings of --search; search lower values of lr")
    best = accuracies.index(max(accuracies))
    rows[best]["chosen"] = True
    return candidates[best].settled(len(task.train)), rows, watch.seconds


def _trained(evaluator: Evaluator, states: States) -> tuple[float, int]:
    """Accuracy, in per cent, after training the evaluator's model with its settings, and the iterations done."""
    model, task, settings = evaluator.model, evaluator.task, dataclasses.replace(evaluator.settings, eval_every=0)
    adaptation, loader = prepare(model, task, settings, states.number)
    result = fit(model, task, adaptation, loader, settings, evaluator, states)
    return evaluator.adapted(adaptation), result.iterations


def fit(
    model: CLIP,
    task: datasets.Task,
    adaptation: Adaptation,
    loader: DataLoader | None,
    settings,
    evaluator: Evaluator,
    states: States | None = None,
    log: Callable[[dict], None] = lambda row: None,
) -> Fit:
    """Lets the method build what it does without this loop; then, if there is a loader, trains on its batches.

    The loss is the cross-entropy of the method's logits, plus its penalty. Training ends early when an epoch's mean
    loss falls below `early_stop_loss`. Every `eval_every` iterations, at the next epoch's end, the evaluator is asked
    for the test accuracy, for the curve alone; every `save_every` the state is saved in `states`, and where these hold
    one, training goes on from it, with a loader that starts there. `log` is given each row of the curve. Raises
    TrainingDiverged on a loss that is not finite.
    """
    states, watch = states or States(), Stopwatch()
    adaptation.build()
    if loader is None:
        return Fit(seconds=watch.seconds)
    result = _resumed(adaptation, states) or Fit(seconds=watch.seconds, next_eval=settings.eval_every or math.inf)
    watch = Stopwatch(result.seconds)
    next_save, done = result.iterations + (settings.save_every or math.inf), result.iterations
    for row in result.curve:
        log(row)
    classifier = _classifier(model, task, adaptation, settings.precision)
    per_epoch = datasets.batches_per_epoch(len(task.train), settings.batch_size)
    totals = torch.zeros(3, device=model.device)  # sums over an epoch: loss, correct, images

    bar = utils.progress(loader, "training", settings.iterations, leave=True, unit="it", done=done)
    for result.iterations, (images, labels) in enumerate(bar, start=done + 1):
        labels = labels.to(model.device, non_blocking=True)
        with utils.autocast(model.device, settings.precision):
            features = utils.encode_image(model, images)
        logits = adaptation.logits(features, classifier())
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
            if result.iterations >= result.next_eval:
                with watch.paused():
                    row["test_accuracy"] = evaluator.adapted(adaptation)
                result.next_eval += settings.eval_every
            result.add(row | {"lr": lr}, watch.seconds)
            log(result.last)
            bar.set_postfix(loss=f"{row['loss']:.3f}", accuracy=f"{row['train_accuracy']:.1f}", refresh=False)
            if row["loss"] < settings.early_stop_loss and not is_last:
                result.stopped_early = True
                break
            if result.iterations >= next_save and not is_last:
                with watch.paused():
                    states.save(result.iterations, _state(result, adaptation))
                next_save = result.iterations + settings.save_every
    bar.close()
    return result


def _state(result: Fit, adaptation: Adaptation) -> dict:
    """What training goes on from, at the end of an epoch."""
    device = adaptation.model.device
    drawn = {"cpu": torch.get_rng_state()}  # no method here draws from torch's own generators; one's own may
    if device.type == "cuda":
        drawn["cuda"] = torch.cuda.get_rng_state(device)
    return {"fit": dataclasses.asdict(result), "adaptation": adaptation.state_dict(), "drawn": drawn}


def _resumed(adaptation: Adaptation, states: States) -> Fit | None:
    """The part of training that is done already; None if it begins. The adaptation is then as it was at its end."""
    state = states.take()
    if state is None:
        return None
    adaptation.load_state_dict(state["adaptation"])
    torch.set_rng_state(state["drawn"]["cpu"])
    if adaptation.model.device.type == "cuda":
        torch.cuda.set_rng_state(state["drawn"]["cuda"], adaptation.model.device)
    return Fit(**state["fit"])


def _classifier(model: CLIP, task: datasets.Task, adaptation: Adaptation, precision: str) -> Callable[[], Tensor]:
    """What gives the text features [C, E] of the task's classes with its first template: anew each time if they are
    trained, else always those of now."""
    tokens = utils.tokenize_classes(task.class_names, task.templates[0])
    prompts = PackedPrompts(tokens, adaptation.shares_prefix).to(model.device)

    def text_features() -> Tensor:
        with utils.autocast(model.device, precision):
            return utils.encode_text(model, prompts)

    if adaptation.trains_text:
        return text_features
    features = text_features().detach()
    return lambda: features


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
