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
    seconds: float = 0.0

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
        return self._accuracy(self.untrained_features, self.task.templates)

    def adapted(self, image_tower_is_trained: bool, label: str = "test") -> float:
        """Of the model as it is now, with text features of the first template."""
        features = self._image_features(label) if image_tower_is_trained else self.untrained_features
        return self._accuracy(features, self.task.templates[:1])

    def _image_features(self, label: str) -> Tensor:
        pin = self.model.device.type == "cuda"
        loader = datasets.test_loader(
            self.task.test, self.task, self.preprocess, TEST_BATCH, self.settings.workers, pin_memory=pin
        )
        return utils.image_features(self.model, loader, self.settings.precision, label)

    def _accuracy(self, features: Tensor, templates: tuple[str, ...]) -> float:
        with utils.autocast(self.model.device, self.settings.precision):
            classifier = utils.text_classifier(self.model, self.task.class_names, templates)
        return utils.accuracy(features, classifier, self.labels)


def fit(
    model: CLIP,
    task: datasets.Task,
    adaptation: Adaptation,
    loader,
    settings,
    evaluator: Evaluator,
) -> Fit:
    """Trains on the loader's batches with cross-entropy of 100 x cosine; ends early when an epoch's mean loss
    falls below `early_stop_loss`. Every `eval_every` iterations, at the next epoch's end, the evaluator is asked for
    the test accuracy, for the curve alone. Raises TrainingDiverged on a loss that is not finite."""
    prompts = PackedPrompts(utils.tokenize_classes(task.class_names, task.templates[0])).to(model.device)
    text = None if adaptation.trains_text else utils.text_classifier(model, task.class_names, task.templates[:1])
    per_epoch = math.ceil(len(task.train) / settings.batch_size)
    result, total, start = Fit(), torch.zeros(3, device=model.device), time.perf_counter()
    next_eval = settings.eval_every or math.inf

    bar = tqdm(loader, total=settings.iterations, desc="training", unit="it")
    for result.iterations, (images, labels) in enumerate(bar, start=1):
        labels = labels.to(model.device, non_blocking=True)
        with utils.autocast(model.device, settings.precision):
            classifier = utils.encode_text(model, prompts) if adaptation.trains_text else text
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
            if result.iterations >= next_eval:
                row["test_accuracy"] = evaluator.adapted(adaptation.trains_images)
                next_eval += settings.eval_every
            result.curve.append(row | {"lr": lr})
            result.timing.append({"iteration": result.iterations, "seconds": time.perf_counter() - start})
            bar.set_postfix(loss=f"{row['loss']:.3f}", accuracy=f"{row['train_accuracy']:.1f}", refresh=False)
            if result.stopped_early:
                break
    bar.close()
    result.seconds = time.perf_counter() - start
    return result
