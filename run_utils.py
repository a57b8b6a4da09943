"""One run of the program: reproducible conditions, its identity, what it writes."""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from filelock import Timeout

import clip
import datasets
import distributed
import metrics
import predictions
from arguments import Config
from clip.delta import checkpoint_metadata
from common import UserError, acquire_lock, file_sha256, note
from datasets import Task
from experiment import Experiment
from methods.adaptation import Adaptation
from predictions import Predictions
from records import CHECKPOINTS, Checkpoints, RecordFolder, check_writable
from settings import Hparams, Settings, slug
from train import Fit, TrainingDiverged

CURVE = ("iteration", "loss", "train_accuracy", "test_accuracy", "lr")  # columns of curve.csv
# Common settings that identify a run. Paths, caches and workers change no result.
IDENTITY = (
    *("method", "dataset", "test_dataset", "classes", "shots", "seed", "backbone", "draw", "prompts", "precision"),
    "eval_only",
)


def make_reproducible(seed: int) -> None:
    """Choose deterministic kernels and float32 that is float32 (no TF32), and seed what a library may draw from.

    This project's own draws come from generators of their own.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    # Strict: with warn_only the backward of attention on a GPU uses atomics, and curves do not repeat.
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_cudnn_sdp(False)  # the kernel of attention would depend on torch's version
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def note_slow_precision(precision: str, device: str) -> None:
    """Say on stderr that bf16 is slow on a processor without instructions for it, as far as Linux lists these."""
    processor = Path("/proc/cpuinfo")
    if precision != "bf16" or device != "cpu" or not processor.is_file():
        return
    if "bf16" not in processor.read_text():  # x86 lists avx512_bf16 or amx_bf16, ARM bf16
        note("this processor has no bf16 units: --precision bf16 is several times slower here than --precision fp32")


def use_device(device: str) -> None:
    """Make a GPU the current one, for everything that names none, and start its peak of memory, or the CPU's, again.

    Where the system does not allow it, as on macOS, a CPU's peak is that of the process so far.
    """
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device).index or 0)  # also initialises CUDA, which the next line needs
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes what is in use now


def peak_memory_mb(device: torch.device) -> float:
    """Return the most memory in use so far, in MiB: on a GPU what torch allocated, on a CPU the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent process before exec
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024


def run_identity(config: Config, images: int) -> str:
    """Return a readable name and a hash of everything that can change the outcome, for this many training images."""
    settings = config.settings
    relevant = {name: getattr(settings, name) for name in IDENTITY}
    relevant |= config.hparams.settled(settings.shots, images).identity
    relevant |= {"device": settings.device.split(":")[0], "template": settings.template, "tuned_on": settings.tuned_on}
    if settings.test_part != "test":
        relevant["test_part"] = settings.test_part
    if settings.test_dataset == "folder":  # elsewhere the name says which images are meant
        relevant["root_path"] = str(Path(settings.root_path).expanduser().resolve())
        if settings.white_level is not None:
            relevant["white_level"] = settings.white_level
        said = {name: value for name, value in dataclasses.asdict(settings.own_images).items() if value}
        if "classnames" in said:
            said["classnames"] = file_sha256(Path(settings.classnames).expanduser())
        relevant |= said
    relevant |= clip.identity(settings.backbone, settings.arch)
    if settings.imbalance != "none":
        relevant["imbalance"] = settings.imbalance
        relevant |= {"imbalance_ratio": settings.imbalance_ratio} if settings.imbalance == "long_tail" else {}
    if settings.label_noise:
        relevant |= {"label_noise": settings.label_noise, "noise_kind": settings.noise_kind}
    if settings.ece_bins != Settings.ece_bins:
        relevant["ece_bins"] = settings.ece_bins
    if settings.split:
        relevant["split"] = file_sha256(Path(settings.split).expanduser())
    if settings.eval_only:  # the weights decide, not where they are
        relevant["checkpoint"] = file_sha256(settings.weights_file)
    if config.search:  # in order, which decides between equals
        relevant = {name: value for name, value in relevant.items() if name not in config.search}
        relevant["search"] = list(config.search.items())
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:8]
    data = settings.dataset if settings.classes == "all" else f"{settings.dataset}-{settings.classes}"
    evaluated = f"_eval_{settings.test_dataset}" if settings.eval_only else ""
    name = f"{settings.method}_{data}_{slug(settings.backbone)}_{settings.shots}shot_seed{settings.seed}"
    return f"{name}{evaluated}_{digest}"


class Run:
    """One run: what it is asked for, its data, its identity, its folder and its weight file."""

    def __init__(self, config: Config, task: Task):
        self.config, self.settings, self.task = config, config.settings, task
        self.hparams = config.hparams.settled(self.settings.shots, len(task.train))
        self.folder = RecordFolder(self.settings.results_dir, run_identity(config, len(task.train)))
        self.weights = self.settings.weights_file

    @property
    def id(self) -> str:
        return self.folder.run_id

    @property
    def tuned_on(self) -> str:
        """The images that the hyperparameters in force were chosen on."""
        return "val" if self.config.search else self.settings.tuned_on

    @property
    def template(self) -> str:
        """The prompts as they are recorded."""
        return " | ".join(self.task.templates)

    def finished(self) -> dict | None:
        """Return the record if this run is done: on the same images with the same prompts, and with the weights, logits
        and temperature that are asked for."""
        record = self.folder.read()
        used = {"split_sha256": self.task.split_sha256, "data_sha256": self.task.data_sha256, "template": self.template}
        if record is None or any(record.get(name) != value for name, value in used.items()):
            return None
        if self.settings.save_logits and not (self.folder.path / predictions.LOGITS).is_file():
            return None
        if self.settings.temperature_scaling and record.get("temperature") is None:
            return None
        nothing_changed = record.get("trainable_weights") == 0 == record.get("changed_weights")
        if self.weights is None or not self.config.trains or nothing_changed:
            return record
        return record if checkpoint_metadata(self.weights).get("run_id") == self.id else None

    def note_replaced(self) -> None:
        """Say on stderr that there is a record of this run that is going to be replaced, unless --force asks for it."""
        if not self.settings.force and self.folder.read() is not None:
            lacks = "other images or prompts, or no saved weights, logits or temperature"
            note(f"{self.folder.path} has a record of {lacks}: it is replaced")

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold this run's folder and its weight file: no other process does the same run, or writes the same file.

        Raise UserError if another does, or if the weight file is of another run.
        """
        with self.folder.locked(self.settings.wait), self._weights_claimed():
            if self.settings.force:
                self.folder.forget_checkpoints()
            try:
                yield
            except BaseException as error:
                if isinstance(error, TrainingDiverged):
                    self.folder.forget_checkpoints()  # it would diverge again
                self._say_how_to_resume(error)
                raise

    @contextlib.contextmanager
    def _weights_claimed(self) -> Iterator[None]:
        if self.weights is None or not self.config.trains:
            yield
            return
        self.weights.parent.mkdir(parents=True, exist_ok=True)
        check_writable(self.weights.parent, self.weights.name)
        try:
            lock = acquire_lock(self.weights.with_name(f".{self.weights.name}.lock"), seconds=0)
        except Timeout:
            raise UserError(f"another run is about to write {self.weights}; choose another --filename") from None
        with lock:
            owner = checkpoint_metadata(self.weights).get("run_id", "not of this program")
            if self.weights.exists() and owner != self.id and not self.settings.force:
                raise UserError(
                    f"{self.weights} holds the weights of another run ({owner}); choose another --filename or "
                    "--save_path, or replace them with --force"
                )
            yield

    def _say_how_to_resume(self, error: BaseException) -> None:
        if isinstance(error, UserError):
            return  # the same command would end in the same way
        if self.settings.force and self.finished() is not None:
            self.folder.forget_checkpoints()  # without --force this run is done already
        elif any(self.folder.path.glob(CHECKPOINTS)):
            command = "the same command without --force" if self.settings.force else "the same command"
            note(f"{command} resumes where this run was stopped; its checkpoint is in {self.folder.path}")
        elif isinstance(error, KeyboardInterrupt | SystemExit) and hasattr(self.hparams, "total_iters"):
            note("no checkpoint was written yet (--save_every); the same command starts from the beginning")

    def checkpoints(self, name: str, base_sha256: str) -> Checkpoints:
        """Return what an unfinished run resumes from, until its result is recorded."""
        belongs_to = {"split": self.task.split_sha256, "data": self.task.data_sha256, "weights": base_sha256}
        return Checkpoints(self.folder.path, name, belongs_to | {"template": self.template, "format": 2})

    @contextlib.contextmanager
    def log(self) -> Iterator[Callable[[dict], None]]:
        """Yield a function that writes a row of the curve for TensorBoard; without --tensorboard it does nothing."""
        if not (self.settings.tensorboard and distributed.is_first()):
            yield lambda row: None
            return
        from torch.utils.tensorboard import SummaryWriter  # optional, and slow to import

        for old in self.folder.path.glob("events.out.tfevents.*"):  # of the part before a stop, which is written again
            old.unlink()
        with SummaryWriter(self.folder.path) as writer:

            def write(row: dict) -> None:
                for name, value in row.items():
                    if name != "iteration":
                        writer.add_scalar(name, value, row["iteration"])

            yield write

    def metadata(
        self, hparams: Hparams, adapted: Predictions | None = None, temperature: float | None = None
    ) -> dict[str, str]:
        """Return what a weight file says of its run, so that its use elsewhere needs no other file: also the accuracy
        of what the adapted model said of the test images, and the temperature that was fitted, if they are given."""
        settings = dataclasses.asdict(self.settings) | dataclasses.asdict(hparams) | {"tuned_on": self.tuned_on}
        if self.task.label_noise:
            settings |= {"label_noise": self.task.label_noise, "noise_kind": self.task.noise_kind}
        about = {
            "run_id": self.id,
            "method": self.settings.method,
            "backbone": self.settings.backbone,
            "settings": json.dumps(settings),
            "class_names": json.dumps(self.task.class_names),
            "templates": json.dumps(self.task.templates),
            "test_sha256": self.task.test_sha256,
        }
        about |= {"by_data": json.dumps(self.config.by_data)} if self.config.by_data else {}
        about |= {} if adapted is None else {"test_accuracy": json.dumps(adapted.accuracy)}
        return about if temperature is None else about | {"temperature": json.dumps(temperature)}

    @property
    def saved_temperature(self) -> float:
        """The temperature that was fitted when the weights were trained. Raise UserError if there is none."""
        about = checkpoint_metadata(self.weights)
        if "temperature" not in about:
            raise UserError(f"{self.weights} was trained without --temperature_scaling; leave it out, or train again")
        return json.loads(about["temperature"])

    def base_to_new(self, new_accuracy: float) -> dict[str, float]:
        """Return base_accuracy and harmonic_mean of an evaluation on the new classes; else nothing, and also where the
        weights do not say their accuracy on the test images of the base classes."""
        about = checkpoint_metadata(self.weights)
        trained = json.loads(about["settings"])
        both = (self.settings.classes, trained["classes"]) == ("new", "base") and "test_accuracy" in about
        if not both or {self.settings.test_part, trained["test_part"]} != {"test"}:
            return {}
        base = json.loads(about["test_accuracy"])
        return {"base_accuracy": base, "harmonic_mean": metrics.harmonic_mean(base, new_accuracy)}

    def record(
        self,
        experiment: Experiment,
        adapted: Predictions,
        zero_shot: Predictions,
        result: dict[str, float | None],
        adaptation: Adaptation | None = None,
        fit: Fit | None = None,
        trials: Sequence[dict] = (),
    ) -> dict:
        """Write everything that is left of the run, and return its record.

        `adapted` and `zero_shot` are what the adapted and the unchanged model say of the test images, `result` is what
        else was measured. `experiment` has the hyperparameters in force: after a search those that it chose, of which
        `trials` are the rows. Besides the record there are config.yaml, split.json if images were drawn, the
        predictions and the curves. Of several processes the first one writes them.
        """
        peak = distributed.largest(peak_memory_mb(experiment.device))
        return distributed.from_first(
            lambda: self._record(experiment, adapted, zero_shot, result, adaptation, fit, trials, peak)
        )

    def _record(
        self,
        experiment: Experiment,
        adapted: Predictions,
        zero_shot: Predictions,
        result: dict[str, float | None],
        adaptation: Adaptation | None,
        fit: Fit | None,
        trials: Sequence[dict],
        peak: float,
    ) -> dict:
        settings, task, fit = self.settings, self.task, fit or Fit()
        own_data = settings.test_dataset == "folder"
        record = {
            **{name: getattr(settings, name) for name in IDENTITY},
            **experiment.hparams.identity,
            "largest_class_share": task.largest_class_share,
            "train_accuracy": fit.last["train_accuracy"],
            "final_loss": fit.last["loss"],
            "iterations": fit.iterations,
            "stopped_early": fit.stopped_early,
            "train_seconds": fit.seconds,
            "search_seconds": 0.0,
            "peak_memory_mb": peak,
            "trainable_weights": adaptation.trainable_weights if adaptation else 0,
            "changed_weights": adaptation.saved.changed_weights() if adaptation else 0,
            "optimizer_bytes": adaptation.optimizer_bytes if adaptation else 0,
            "checkpoint_bytes": self.weights.stat().st_size if adaptation and self.weights else None,
            "tuned_on": self.tuned_on,
            "searched": self.config.searched,
            **self._measured(adapted, zero_shot),
            **result,
            **self._support(),
            "draw": self._draw(),
            "epochs": getattr(experiment.hparams, "epochs", None),
            "by_data": "; ".join(f"{name}: {file}" for name, file in sorted(self.config.by_data.items())) or None,
            "prompts": "own" if settings.template else settings.prompts,
            "root_path": _as_text(Path(settings.root_path).expanduser().resolve()) if own_data else None,
            "template": self.template,
            "split_sha256": task.split_sha256,
            "data_sha256": task.data_sha256,
            "weights_sha256": experiment.base_sha256,
            "device": device_name(settings.device),
            "processes": distributed.size(),
        }
        if settings.test_part != "test":
            record["test_part"] = settings.test_part
        if experiment.model.logit_factor != 100:
            record["logit_factor"] = experiment.model.logit_factor
        files = {"config.yaml": self.config.as_yaml(), "split.json": datasets.to_json(task)}
        files |= {"curve.csv": _csv(fit.curve, CURVE), "timing.csv": _csv(fit.timing), "search.csv": _csv(trials)}
        files |= predictions.files(task, adapted, zero_shot)
        return self.folder.write(record, files)

    def _measured(self, adapted: Predictions, zero_shot: Predictions) -> dict[str, float | None]:
        """Return the record's metrics of both models on the test images."""
        bins = self.settings.ece_bins
        scaled = adapted.scaled.calibration(bins) if adapted.scaled else dict.fromkeys(("nll", "brier", "ece"))
        return {
            "test_accuracy": adapted.accuracy,
            "zero_shot_accuracy": zero_shot.accuracy,
            **adapted.metrics(bins),
            **{f"zero_shot_{name}": value for name, value in zero_shot.metrics(bins).items()},
            "ece_bins": bins,
            "temperature": None,
            **{f"scaled_{name}": value for name, value in scaled.items()},
            "base_accuracy": None,
            "harmonic_mean": None,
        }

    def _support(self) -> dict[str, str | float | None]:
        """Return how the training images differ from equally many, rightly labelled ones of each class."""
        settings = self.settings
        of = self.task if self.config.trains else settings  # a recorded split may have wrong labels
        return {
            "imbalance": settings.imbalance,
            "imbalance_ratio": settings.imbalance_ratio if settings.imbalance == "long_tail" else None,
            "label_noise": of.label_noise,
            "noise_kind": of.noise_kind if of.label_noise else None,
        }

    def _draw(self) -> str:
        """Return how the training images were chosen; in an evaluation, those of its weights."""
        split = self.settings.split
        if self.settings.eval_only:
            split = json.loads(checkpoint_metadata(self.weights)["settings"])["split"]
        return "recorded" if split else self.settings.draw


def _csv(rows: Sequence[dict], order: Sequence[str] = ()) -> str | None:
    """Return rows as CSV, with the columns that occur in `order`, or all of them; None without rows."""
    if not rows:
        return None
    import pandas as pd

    columns = [name for name in order if any(name in row for row in rows)] or None
    table = pd.DataFrame(rows, columns=columns)
    if "iterations" in table:
        table = table.astype({"iterations": "Int64"})  # whole, or missing
    return table.to_csv(index=False)


def _as_text(path: Path) -> str:
    """Return a path as valid text: names on disk need not be."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
