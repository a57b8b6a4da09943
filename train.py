"""The training loop, the evaluation, and the choice of hyperparameters on val images. None knows a method or a dataset
by name."""

import contextlib
import copy
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

import distributed
import metrics
from clip.model import VisionTransformer
from common import UserError, counted, note, progress
from datasets.images import derive_seed
from experiment import Experiment
from methods import METHODS
from methods.adaptation import Adaptation, Batch
from predictions import NotFinite, Predictions
from records import Checkpoints
from settings import Hparams, Loop

CHECK_EVERY = 100  # iterations between two checks that several processes have the same weights


class TrainingDiverged(UserError):
    """The loss is no longer a finite number."""


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
        """Add a row of the curve, and the seconds of training until then."""
        self.curve.append(row)
        self.timing.append({"iteration": row["iteration"], "seconds": seconds})
        self.seconds = seconds


class Stopwatch:
    """Seconds since it was made plus `before`, without those in which it was paused."""

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


def zero_shot(experiment: Experiment) -> Predictions:
    """Return what the unchanged model says of the test images, with text features averaged over all templates."""
    classifier = experiment.text_classifier(experiment.task.templates)
    return experiment.predictions(experiment.test_features(), lambda part: experiment.cosine_logits(part, classifier))


def predict(experiment: Experiment, adaptation: Adaptation, temperature: float | None = None) -> Predictions:
    """Return what the adapted model, as it is now, says of the test images; see `predictions.predict`.

    Raise TrainingDiverged if its logits are not finite.
    """
    features, logits = _features_and_logits(experiment, adaptation)
    try:
        return experiment.predictions(features, logits, temperature)
    except NotFinite:
        raise TrainingDiverged("the trained model's logits are not finite numbers; lower --lr") from None


def _features_and_logits(experiment: Experiment, adaptation: Adaptation) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the test images' features [N, E] by the adapted model, and the function that makes logits of some."""
    if adaptation.trains_images:
        features = experiment.image_features(experiment.task.test, "evaluation")
    else:
        features = experiment.test_features()
    classifier = adaptation.text_classifier()
    return features, lambda part: adaptation.logits(part, classifier)


@torch.no_grad()
def fit_temperature(experiment: Experiment, adaptation: Adaptation) -> float:
    """Return the temperature that calibrates the adapted model best on the task's few-shot val images.

    A note says if it is at the end of its range, as where all val images are right.
    """
    val = experiment.task.val
    on_val = dataclasses.replace(experiment, task=dataclasses.replace(experiment.task, test=val))
    features, logits = _features_and_logits(on_val, adaptation)
    of_val = logits(features.to(experiment.device)).double().cpu().numpy()
    temperature = metrics.fit_temperature(of_val, np.array([item.label for item in val]))
    if temperature <= 1.01 * min(metrics.TEMPERATURES) or temperature >= 0.99 * max(metrics.TEMPERATURES):
        note(
            f"temperature {temperature:.3g}: the {counted(len(val), 'val image')} cannot tell a good one, for example "
            "because all are right; do not use the scaled columns"
        )
    return temperature


def evaluate(experiment: Experiment, adaptation: Adaptation) -> float:
    """Return the test accuracy, in per cent, of the adapted model as it is now."""
    return predict(experiment, adaptation).accuracy


def adapt(experiment: Experiment) -> Adaptation:
    """Return the method on this model, with nothing trained yet."""
    torch.manual_seed(experiment.settings.seed)  # for methods that draw from torch's own generator, as dropout does
    return METHODS[experiment.settings.method].prepare(experiment)


def prepare(experiment: Experiment, start: int = 0) -> tuple[Adaptation, Iterable | None]:
    """Return the method on this model, and the batches to train it with from iteration `start` on (counted from 0).

    There are no batches where the training loop is not used. Raise DatasetError if a training image is damaged, and
    UserError if the method cannot be trained in this precision, or the tower's blocks not be checkpointed.
    """
    adaptation = adapt(experiment)
    if adaptation.scaler.is_enabled() and adaptation.instead_of_fp16:
        raise UserError(
            f"--precision fp16 does not work with these settings of {experiment.settings.method}, which uses gradients "
            f"of the scaled loss; use {adaptation.instead_of_fp16}"
        )
    if experiment.settings.checkpoint_blocks:
        _checkpoint_blocks(experiment, adaptation)
    return adaptation, None if adaptation.optimizer is None else adaptation.batches(start)


def _checkpoint_blocks(experiment: Experiment, adaptation: Adaptation) -> None:
    model = experiment.model
    if isinstance(model.visual, VisionTransformer):
        model.visual.transformer.checkpoint_blocks(adaptation.generators)
    elif adaptation.trains_images:
        raise UserError(
            f"--checkpoint_blocks: the image tower of {experiment.settings.backbone} is no transformer of CLIP's kind; "
            "leave the flag out, or train the text tower alone"
        )
    model.transformer.checkpoint_blocks(adaptation.generators)


def fit(
    experiment: Experiment[Loop],
    adaptation: Adaptation,
    batches: Iterable | None,
    checkpoints: Checkpoints | None = None,
    log: Callable[[dict], None] = lambda row: None,
) -> Fit:
    """Build what the method computes without this loop; then, if there are batches, train on them.

    What is minimised is the method's loss, by default the cross-entropy of its logits, plus its penalty. Training ends
    early when an epoch's mean loss falls below `early_stop_loss`. Every `eval_every` iterations, at the end of the
    epoch, the test accuracy is measured, only for the curve. Every `save_every` iterations the state of training is
    saved in `checkpoints`; if these hold one, training resumes from it, and `batches` begin there. `log` is given each
    row of the curve. Raise TrainingDiverged on a loss that is not finite.
    """
    checkpoints, watch = checkpoints or Checkpoints(), Stopwatch()
    experiment.seconds_spared = 0.0
    adaptation.build()
    built = watch.seconds + experiment.seconds_spared
    if batches is None:
        return Fit(seconds=built)
    hparams, task, save_every = experiment.hparams, experiment.task, experiment.settings.save_every or math.inf
    result = _resumed(adaptation, checkpoints) or Fit(seconds=built, next_eval=hparams.eval_every or math.inf)
    watch = Stopwatch(result.seconds)
    done = result.iterations
    next_save, next_check = done + save_every, done + CHECK_EVERY
    for row in result.curve:
        log(row)
    if adaptation.scaler.is_enabled():  # torch takes a skipped first update for a wrong order of calls
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
    per_epoch = hparams.batches_per_epoch(len(task.train))
    totals = torch.zeros(3, device=experiment.device)  # sums over an epoch: loss, correct, images

    bar = progress(batches, "training", "it", total=hparams.total_iters, initial=done, leave=True)
    for result.iterations, (images, labels) in enumerate(bar, start=done + 1):
        ends_epoch = result.iterations % per_epoch == 0
        lr = adaptation.optimizer.param_groups[0]["lr"]
        totals += _step(experiment, adaptation, images, labels, result.iterations)
        if ends_epoch or not adaptation.full_batch:
            adaptation.after_step(result.iterations)

        is_last = result.iterations == hparams.total_iters
        if ends_epoch or is_last:
            if result.iterations >= next_check or is_last:
                distributed.check_replicas(adaptation.parameters)
                next_check = result.iterations + CHECK_EVERY
            of_all = totals if adaptation.replicated else distributed.total(totals)
            row = _epoch_row(result.iterations, of_all, experiment.settings.precision)
            totals.zero_()
            if result.iterations >= result.next_eval:
                with watch.paused():
                    row["test_accuracy"] = evaluate(experiment, adaptation)
                result.next_eval += hparams.eval_every
            result.add(row | {"lr": lr}, watch.seconds)
            log(result.last)
            bar.set_postfix(loss=f"{row['loss']:.3f}", accuracy=f"{row['train_accuracy']:.1f}", refresh=False)
            if row["loss"] < hparams.early_stop_loss and not is_last:
                result.stopped_early = True
                break
            if result.iterations >= next_save and not is_last:
                with watch.paused():
                    if distributed.is_first():
                        checkpoints.save(result.iterations, _state(result, adaptation))
                next_save = result.iterations + save_every
    bar.close()
    adaptation.finish()
    return result


def _step(
    experiment: Experiment,
    adaptation: Adaptation,
    images: Tensor,
    labels: Tensor,
    iteration: int,
) -> Tensor:
    """Do one iteration, counted from 1. Return its sums over this process's images, left on the device: loss, correct
    predictions, images."""
    per_epoch = experiment.hparams.batches_per_epoch(len(experiment.task.train))
    begins_epoch, ends_epoch = (iteration - 1) % per_epoch == 0, iteration % per_epoch == 0
    own, whole = _batch_sizes(experiment, adaptation, labels, (iteration - 1) % per_epoch)
    if distributed.size() > 1:
        for generator in adaptation.noise:
            generator.manual_seed(derive_seed("noise", experiment.settings.seed, iteration, distributed.rank()))
    labels = labels.to(experiment.device, non_blocking=True)
    image_features, text_features = adaptation.image_features(images), adaptation.text_features()
    logits = adaptation.logits(image_features, text_features)
    batch = Batch(images, labels, image_features, text_features, logits, own / whole)
    loss = adaptation.loss(batch)
    if begins_epoch or not adaptation.full_batch:
        adaptation.optimizer.zero_grad()
    # The shares of all processes, and with a full batch those of an epoch's batches, add up to 1: the penalty is
    # counted once, and the loss is the mean over images.
    share = batch.share * (whole / len(experiment.task.train) if adaptation.full_batch else 1.0)
    adaptation.scaler.scale(share * (loss + adaptation.penalty(batch))).backward()
    if ends_epoch or not adaptation.full_batch:
        if not adaptation.replicated:
            distributed.sum_gradients(adaptation.optimizer)
        adaptation.scaler.step(adaptation.optimizer)
        adaptation.scaler.update()
        if adaptation.scheduler is not None:
            adaptation.scheduler.step()
    correct = (logits.detach().argmax(dim=-1) == labels)[:own].sum()
    loss = loss.detach()
    return torch.stack([loss * own, correct, torch.full_like(loss, own)])


def _batch_sizes(experiment: Experiment, adaptation: Adaptation, labels: Tensor, number: int) -> tuple[int, int]:
    """Return how many images of an epoch's batch `number`, counted from 0, are this process's, and how many there are
    in all. A process without an image of its own computes with another's, which does not count."""
    if distributed.size() == 1 or adaptation.replicated:
        return len(labels), len(labels)
    size, images = experiment.hparams.batch_size, len(experiment.task.train)
    whole = min(size, images - number * size)
    return len(distributed.mine(whole)), whole


def _epoch_row(iteration: int, totals: Tensor, precision: str) -> dict:
    """Return the curve's row for the epoch that ends here. A row per epoch, because reading the totals waits for the
    device."""
    loss, correct, images = totals.tolist()
    if not math.isfinite(loss):
        remedy = "lower --lr" if precision == "fp32" else "lower --lr or use --precision fp32"
        raise TrainingDiverged(f"the training loss is {loss} at iteration {iteration}; {remedy}")
    return {"iteration": iteration, "loss": loss / images, "train_accuracy": 100 * correct / images}


def _state(result: Fit, adaptation: Adaptation) -> dict:
    """Return what training resumes from, at the end of an epoch."""
    device = adaptation.model.device
    drawn = {"cpu": torch.get_rng_state()}  # no method here draws from torch's own generators; a user's method may
    if device.type == "cuda":
        drawn["cuda"] = torch.cuda.get_rng_state(device)
    return {"fit": dataclasses.asdict(result), "adaptation": adaptation.state_dict(), "drawn": drawn}


def _resumed(adaptation: Adaptation, checkpoints: Checkpoints) -> Fit | None:
    """Return the part of training that is already done, and bring the adaptation to its end; None if there is none."""
    state = checkpoints.take()
    if state is None:
        return None
    adaptation.load_state_dict(state["adaptation"])
    torch.set_rng_state(state["drawn"]["cpu"])
    if adaptation.model.device.type == "cuda":
        torch.cuda.set_rng_state(state["drawn"]["cuda"], adaptation.model.device)
    return Fit(**state["fit"])


def search(
    experiment: Experiment,
    choices: list[Hparams],
    names: Iterable[str],
    checkpoints: Callable[[str], Checkpoints] = lambda name: Checkpoints(),
) -> tuple[Hparams, list[dict], float]:
    """Choose between hyperparameters by the accuracy on the task's few-shot val images; the first of equals wins.

    Each of the `choices` trains a copy of the model on the training images, as a run does; their task has no test
    images. Return the choice; a row for each, with the values of the `names` that are searched, val_accuracy (per cent,
    None where the loss diverged), iterations and chosen; and the seconds it took. `checkpoints` gives, by name, those
    that keep what an unfinished search has done. Raise DatasetError if there are no val images, TrainingDiverged if
    every candidate diverges.
    """
    task = experiment.task
    if not task.val:
        raise UserError(f"{task.name} has no val images to choose settings by; leave --search out")
    on_val = dataclasses.replace(experiment, task=dataclasses.replace(task, test=task.val))
    done = checkpoints("search")
    state = done.take() or {"rows": [], "seconds": 0.0}
    rows, watch = state["rows"], Stopwatch(state["seconds"])
    for number, hparams in enumerate(choices[len(rows) :], start=len(rows) + 1):
        values = {name: getattr(hparams, name) for name in names}
        print(f"search {number}/{len(choices)}:", *(f"{name}={value}" for name, value in values.items()))
        row = values | {"val_accuracy": None, "iterations": None, "chosen": False}
        hparams = _diagnostic_off(hparams.settled(experiment.settings.shots, len(task.train)))
        candidate = dataclasses.replace(on_val, model=copy.deepcopy(experiment.model), hparams=hparams)
        own = checkpoints(f"candidate{number}")
        try:
            adaptation, batches = prepare(candidate, own.number)
            if not adaptation.trains_images:
                on_val.test_features()  # by the model that no method has touched
            row["iterations"] = fit(candidate, adaptation, batches, own).iterations
            row["val_accuracy"] = distributed.of_first(evaluate(candidate, adaptation))  # unlike GPUs may differ
            print(f"val accuracy {row['val_accuracy']:.2f} % on {counted(len(task.val), 'image')}")
        except TrainingDiverged as error:
            note(str(error))
        rows.append(row)
        if distributed.is_first() and done.save(number, {"rows": rows, "seconds": watch.seconds}):
            own.clear()
    accuracies = [-1.0 if row["val_accuracy"] is None else row["val_accuracy"] for row in rows]
    if max(accuracies) < 0:
        raise TrainingDiverged("the training loss diverges with all settings of --search; search lower values of lr")
    best = accuracies.index(max(accuracies))
    rows[best]["chosen"] = True
    print("chosen:", *(f"{name}={rows[best][name]}" for name in names), f"({accuracies[best]:.2f} % on val images)")
    return choices[best].settled(experiment.settings.shots, len(task.train)), rows, watch.seconds


def _diagnostic_off(hparams: Hparams) -> Hparams:
    return dataclasses.replace(hparams, eval_every=0) if isinstance(hparams, Loop) else hparams
