"""The training loop and the evaluation. Neither knows a method or a data set by name."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import datasets
import utils
from clip import CLIP
from methods import Adaptation


class TrainingDiverged(Exception):
    """The loss is no finite number any more; the message is one line with the remedy."""


@dataclass
class Fit:
    """What training leaves behind. Losses and accuracies (per cent) are means over an epoch's augmented images."""

    curve: list[dict] = field(default_factory=list)  # a row per epoch: iteration, loss, train_accuracy, lr, ...
    timing: list[dict] = field(default_factory=list)  # iteration, seconds since the start
    iterations: int = 0
    stopped_early: bool = False
    seconds: float = 0.0

    @property
    def last(self) -> dict:
        return self.curve[-1] if self.curve else {"loss": None, "train_accuracy": None}


def evaluate(model: CLIP, task: datasets.Task, preprocess: Callable, settings, label: str = "test") -> float:
    """Test accuracy in per cent, with text features of the first template from the current weights."""
    with utils.autocast(model.device, settings.precision):
        classifier = utils.text_classifier(model, task.class_names, task.templates[:1])
    return _test_accuracy(model, task, preprocess, settings, classifier, label)


def evaluate_zero_shot(model: CLIP, task: datasets.Task, preprocess: Callable, settings) -> float:
    """Test accuracy in per cent, with text features averaged over all of the task's templates."""
    with utils.autocast(model.device, settings.precision):
        classifier = utils.text_classifier(model, task.class_names, task.templates)
    return _test_accuracy(model, task, preprocess, settings, classifier, "zero-shot")


def _test_accuracy(model, task, preprocess, settings, classifier: Tensor, label: str) -> float:
    loader = datasets.test_loader(task.test, task, preprocess, TEST_BATCH, settings.workers)
    return utils.accuracy(model, classifier, loader, settings.precision, label)


TEST_BATCH = 256


def fit(
    model: CLIP,
    task: datasets.Task,
    adaptation: Adaptation,
    loader,
    settings,
    test_accuracy: Callable[[], float] | None = None,
) -> Fit:
    """Trains on the loader's batches with cross-entropy of 100 x cosine; ends early when an epoch's mean loss
    falls below `early_stop_loss`. `test_accuracy`, if given, is asked every `eval_every` iterations, at the next
    epoch's end, for the curve alone. Raises TrainingDiverged on a loss that is not finite."""
    tokens = utils.tokenize_classes(task.class_names, task.templates[0]).to(model.device)
    text_is_trained = any(not name.startswith("visual.") for name in adaptation.parameters)
    text = None if text_is_trained else utils.text_classifier(model, task.class_names, task.templates[:1])
    per_epoch = math.ceil(len(task.train) / settings.batch_size)
    result, total, start = Fit(), torch.zeros(3, device=model.device), time.perf_counter()
    next_eval = settings.eval_every or math.inf

    bar = tqdm(loader, total=settings.iterations, desc="training", unit="it")
    for result.iterations, (images, labels) in enumerate(bar, start=1):
        labels = labels.to(model.device, non_blocking=True)
        with utils.autocast(model.device, settings.precision):
            classifier = utils.encode_text(model, tokens) if text_is_trained else text
            features = utils.encode_image(model, images)
        logits = utils.LOGIT_FACTOR * features @ classifier.T
        loss = F.cross_entropy(logits, labels)
        adaptation.optimizer.zero_grad()
        loss.backward()
        lr = adaptation.optimizer.param_groups[0]["lr"]
        adaptation.optimizer.step()
        adaptation.scheduler.step()
        with torch.no_grad():
            correct = (logits.argmax(dim=-1) == labels).sum()
            total += torch.stack([loss * len(labels), correct, torch.ones_like(loss) * len(labels)])

        if result.iterations % per_epoch == 0 or result.iterations == settings.iterations:
            loss_sum, correct, seen = total.tolist()
            total.zero_()
            row = {"iteration": result.iterations, "loss": loss_sum / seen, "train_accuracy": 100 * correct / seen}
            if not math.isfinite(row["loss"]):
                raise TrainingDiverged(
                    f"the training loss is {row['loss']} at iteration {result.iterations}; lower --lr"
                    + (" or use --precision fp32" if settings.precision != "fp32" else "")
                )
            result.stopped_early = row["loss"] < settings.early_stop_loss
            if result.iterations >= next_eval and test_accuracy is not None:
                row["test_accuracy"] = test_accuracy()
                next_eval += settings.eval_every
            result.curve.append(row | {"lr": lr})
            result.timing.append({"iteration": result.iterations, "seconds": time.perf_counter() - start})
            bar.set_postfix(loss=f"{row['loss']:.3f}", accuracy=f"{row['train_accuracy']:.1f}", refresh=False)
            if result.stopped_early:
                break
    bar.close()
    result.seconds = time.perf_counter() - start
    return result
