"""How a setting is declared and checked, and the settings that every method shares. Knows no method.

A setting is a field of a frozen dataclass, made by `option` with its default, help text and range. The same field is a
command-line flag, a key of config files and, if it can change the result, a part of a run's identity. The settings of a
method are a dataclass of the same kind in the method's own file: `Hparams`.
"""

import dataclasses
import importlib.util
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

import datasets
import distributed
from common import UserError, none_of


def option(
    default: Any,
    text: str,
    *,
    group: str = "method",
    kind: Callable | None = None,
    optional: bool | None = None,
    choices: Collection[str] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    complement: str | None = None,
) -> Any:
    """Return a dataclass field that is also a flag and a key of config files.

    `text` is its help, `group` the heading of --help that it stands under. `kind` is its type, by default that of
    `default`; where it is given the value may also be None, unless `optional` is False. `choices` or the four bounds
    say which values are allowed.
    `complement` names a second flag whose value is 1 minus this one.
    """
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    return field(
        default=default,
        metadata={
            "help": text,
            "group": group,
            "kind": kind or type(default),
            "optional": kind is not None if optional is None else optional,
            "choices": choices,
            "bounds": {word: bound for word, bound in bounds.items() if bound is not None},
            "complement": complement,
        },
    )


# The headings of --help.
GROUPS = ("data", "model", "method", "training", "machine", "output")
data, model, _, training, machine, output = (partial(option, group=group) for group in GROUPS)


def with_default(options: type, name: str, default: Any) -> Any:
    """Return the field `name` of a class of options with another default, for a subclass."""
    return field(default=default, metadata=options.__dataclass_fields__[name].metadata)


_HOLDS = {
    "at least": lambda value, bound: value >= bound,
    "above": lambda value, bound: value > bound,
    "at most": lambda value, bound: value <= bound,
    "below": lambda value, bound: value < bound,
}


@dataclass(frozen=True)
class Options:
    """Base of all settings: raises UserError when a value is none of its choices or out of its range."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, choices, bounds = getattr(self, f.name), f.metadata["choices"], f.metadata["bounds"]
            if value is None:
                continue
            if choices and value not in choices:
                raise none_of(f.name, choices, value)
            if bounds and not (math.isfinite(value) and all(_HOLDS[word](value, b) for word, b in bounds.items())):
                wanted = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items())
                raise UserError(f"--{f.name} must be a finite number, {wanted}, not {value}")


OWN_IMAGES = tuple(f.name for f in dataclasses.fields(datasets.OwnImages))  # the flags for --dataset folder only
SUPPORT = tuple(f.name for f in dataclasses.fields(datasets.Support))  # flags of the same names
ALL = "all"  # --shots all: draw is then "all", and shots the images of the largest class
MAX_SHOTS = 10_000  # no class of the datasets has more images; lists of repeats beyond it would fill the memory


def number_or_all(text: str) -> int | str:
    """Return a number of shots, or ALL."""
    return ALL if text == ALL else int(text)


number_or_all.__name__ = "int or all"  # as messages call this type


@dataclass(frozen=True)
class Settings(Options):
    """The settings that every method shares. The names are those of the flags; nothing changes them after parsing."""

    method: str = option("so", "method of adaptation; its own flags: --method NAME --help")

    dataset: str = data("digits", "digits is embedded, folder is your images", choices=datasets.available_datasets())
    root_path: str = data("", "folder that holds the datasets ($DATA); for --dataset folder, your images")
    shots: int = data(
        1,
        "labelled training images per class; all: every training image",
        kind=number_or_all,
        optional=False,
        at_least=1,
        at_most=MAX_SHOTS,
    )
    seed: int = data(3, "random seed of few-shot draw, image order, augmentation and method", at_least=0, below=2**63)
    draw: str = data(
        "released", "few-shot draw as in SO's released code, or CoOp's; all: by --shots all", choices=datasets.ORDERS
    )
    split: str | None = data(
        None, "train on the images in a run's split.json, or in CoOp's, cross_modal's or 2SFS's few-shot file", kind=str
    )
    imbalance: str = data(
        "none", "unequal classes: as in the training part, or exponentially smaller", choices=datasets.IMBALANCES
    )
    imbalance_ratio: float = data(10.0, "long_tail: images of the largest class / of the smallest", at_least=1)
    label_noise: float = data(0.0, "share of training images that get a wrong label", at_least=0, below=1)
    noise_kind: str = data("symmetric", "wrong labels: any other, or the next one", choices=datasets.NOISES)
    classes: str = data("all", "base or new: one half, for the base-to-new protocol", choices=datasets.CLASSES)
    test_part: str = data("test", "images to test on; val: all validation images", choices=("test", "val"))
    prompts: str = data("released", "'a photo of a {}.', or each dataset's own", choices=("released", "specific"))
    template: tuple[str, ...] = data((), "your own prompt with {} for the class name; may be repeated")

    max_megapixels: int = data(datasets.MAX_MEGAPIXELS, "largest image that is read, in million pixels", at_least=1)
    white_level: float | None = data(
        None, "your images of more than 8 bits a channel: the level that is white", kind=float, above=0
    )

    train_dir: str | None = data(None, "your images: the folder of the part train, below --root_path", kind=str)
    val_dir: str | None = data(None, "that of val, with --train_dir and --test_dir", kind=str)
    test_dir: str | None = data(None, "that of test", kind=str)
    classnames: str | None = data(None, "your images: a file with other names for the classes", kind=str)
    image_root: str | None = data(None, "your images: the folder that a manifest's paths start from", kind=str)
    drop_copies: bool = data(False, "your images: leave out copies, byte for byte, in two parts or classes")

    backbone: str = model(
        "ViT-B/16", "OpenAI's name, tiny, MODEL/TAG of open_clip, hf-hub:NAME, a folder or a weight file"
    )
    arch: str | None = model(
        None, "for a weight file whose shapes do not tell it: open_clip's name or config FILE.json, or openai", kind=str
    )
    precision: str = model("fp32", "of the computation; weights are always float32", choices=("fp32", "bf16", "fp16"))

    tuned_on: str = training("none", "only recorded: images you chose settings with", choices=("none", "val", "test"))
    save_every: int = training(1000, "iterations between checkpoints to resume from; 0: none", at_least=0)

    device: str = machine("auto", "cpu, cuda or cuda:N; auto takes a GPU if there is one")
    processes: int = machine(
        1, "processes, one a GPU, that share each step; results differ only in rounding", at_least=1
    )
    checkpoint_blocks: bool = machine(
        False, "keep only each block's input for backward: less memory, a third more time"
    )
    workers: int | None = machine(None, "processes that read images; default: from the cores", kind=int, at_least=0)
    image_cache_mb: int = machine(2048, "MB of decoded images; what does not fit is decoded each time", at_least=0)
    cache_test_pixels: bool = machine(False, "keep the test images in --cache_dir as the model reads them, for sweeps")
    cache_dir: str = machine("~/.cache/clip-so", "folder for the features of test images under unchanged weights")

    results_dir: str = output("results", "folder of run folders and results.csv")
    save_path: str | None = output(None, "folder for the adapted weights; without it nothing is saved", kind=str)
    filename: str | None = output(None, "name of the weight file there; default: the method's name", kind=str)
    save_logits: bool = output(False, "also keep all logits of the test images, in the run's folder")
    temperature_scaling: bool = output(
        False, "also record the calibration with logits divided by a temperature that is fitted on val images"
    )
    ece_bins: int = output(15, "bins of equal width for the calibration error (ECE)", at_least=1, at_most=1000)
    eval_only: bool = output(False, "do not train: evaluate the weights in --save_path")
    eval_datasets: str | None = output(None, "with --eval_only: datasets to test on, comma-separated", kind=str)
    tensorboard: bool = output(False, "write the curves for TensorBoard into the run's folder")
    force: bool = output(False, "run even if this run is already recorded")
    wait: bool = output(False, "if another process is doing this run, wait for it instead of stopping")

    @property
    def own_images(self) -> datasets.OwnImages:
        """What is said about your own images beside their folder."""
        return datasets.OwnImages(**{name: getattr(self, name) for name in OWN_IMAGES})

    @property
    def support(self) -> datasets.Support:
        """How the training images differ from equally many, rightly labelled ones of each class."""
        return datasets.Support(**{name: getattr(self, name) for name in SUPPORT})

    @property
    def test_dataset(self) -> str:
        """The dataset that is tested on: the one trained on or, in an evaluation elsewhere, another."""
        return self.eval_datasets or self.dataset

    @property
    def weights_file(self) -> Path | None:
        """The file of the adapted weights, a different one for each backbone, dataset, shots and seed.

        Weights that are evaluated on new classes were trained on the base classes.
        """
        if self.save_path is None:
            return None
        data = f"folder-{_data_name(self.root_path)}" if self.dataset == "folder" else self.dataset
        data += "" if self.classes == "all" else "-base"
        shots = ALL if self.draw == ALL else self.shots
        folder = Path(self.save_path) / slug(self.backbone) / data / f"{shots}shots" / f"seed{self.seed}"
        return folder / f"{(self.filename or self.method).removesuffix('.safetensors')}.safetensors"

    def one_by_one(self) -> list["Settings"]:
        """Return the settings of each single run: one, or one for each of --eval_datasets."""
        if self.eval_datasets is None:
            return [self]
        return [dataclasses.replace(self, eval_datasets=name) for name in self.eval_datasets.split(",")]


def _data_name(root_path: str) -> str:
    """Return the name of the user's data in file names: that of the folder, and of the manifest if it is one."""
    path = Path(root_path).expanduser().resolve()
    return re.sub(r"[^\w.-]", "_", f"{path.parent.name}-{path.stem}" if path.is_file() else path.name)


def slug(backbone: str) -> str:
    """Return a backbone's name, or that of its file or folder, as part of a file name."""
    path = Path(backbone.removeprefix("local-dir:")).expanduser()
    name = path.stem if path.is_file() else path.resolve().name if path.is_dir() else backbone
    return re.sub(r"[/@:]", "-", name)


def check_data(settings: Settings, trains: bool) -> None:
    """Raise UserError for datasets, classes and prompts that do not go together. `trains`: whether images are drawn."""
    names = _eval_datasets(settings) if settings.eval_datasets is not None else [settings.dataset]
    if settings.dataset == "folder" and not settings.root_path:
        raise UserError("--dataset folder needs --root_path, the folder of your images or a manifest of them")
    given = [name for name in OWN_IMAGES if getattr(settings, name) != Settings.__dataclass_fields__[name].default]
    if given and settings.dataset != "folder":
        raise UserError(f"--{given[0]} is for your own images; add --dataset folder, or leave it out")
    if datasets.is_test_only(settings.dataset) and (trains or settings.eval_only):
        raise UserError(
            f"--dataset {settings.dataset} has only test images; train on another dataset, for example imagenet, and "
            f"evaluate with --eval_only --eval_datasets {settings.dataset}"
        )
    if datasets.is_test_only(settings.dataset) and settings.split:
        raise UserError(f"--split: {settings.dataset} has no training images to choose")
    if settings.imbalance != "none" and (settings.split or settings.draw == ALL):
        other = "--split" if settings.split else "--shots all"
        raise UserError(f"--imbalance {settings.imbalance} and {other} both say which images to take; leave one out")
    if settings.imbalance != "long_tail" and settings.imbalance_ratio != Settings.imbalance_ratio:
        raise UserError("--imbalance_ratio is that of --imbalance long_tail; add this, or leave it out")
    if not settings.label_noise and settings.noise_kind != Settings.noise_kind:
        raise UserError("--noise_kind says how labels are wrong; add --label_noise, their share, or leave it out")
    if settings.split and settings.draw == ALL:
        raise UserError("--split says which images to take; give the --shots that it has instead of all")
    if settings.split and not Path(settings.split).expanduser().is_file():
        raise UserError(f"--split {settings.split} is not a file; every run that draws images writes a split.json")
    if settings.classes == "new" and trains:
        raise UserError("--classes new is only for testing; train with --classes base, then add --eval_only")
    if names != ["digits"] and not settings.root_path:
        flag = "dataset" if settings.eval_datasets is None else "eval_datasets"
        raise UserError(f"--{flag} {settings.test_dataset} needs --root_path, the folder that holds the datasets")
    for template in settings.template:
        if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
            raise UserError(f"--template {template!r} must have {{}} where the class name goes, and no other braces")
    if settings.template and settings.prompts == "specific":
        raise UserError("--template and --prompts specific both say which prompts to use; give one of them")


def _eval_datasets(settings: Settings) -> Sequence[str]:
    """Return the names in --eval_datasets. Raise UserError if they cannot be evaluated on."""
    names = settings.eval_datasets.split(",")
    known = [name for name in datasets.available_datasets() if name != "folder"]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--eval_datasets: {unknown[0]!r} is not one of {', '.join(known)}")
    if len(set(names)) < len(names):
        raise UserError(f"--eval_datasets {settings.eval_datasets} names a dataset twice")
    if not settings.eval_only:
        raise UserError("--eval_datasets evaluates saved weights; add --eval_only, and --save_path where they are")
    if settings.classes != "all" or settings.split:
        raise UserError("--eval_datasets takes whole test parts; leave --classes and --split out")
    if settings.dataset == "folder" and names != ["digits"]:
        raise UserError("--eval_datasets: with --dataset folder only digits is possible; else use methods.merge_file")
    return names


def check_output(settings: Settings) -> None:
    """Raise UserError for output flags that cannot work."""
    if settings.save_path == "":
        raise UserError("--save_path is empty; name a folder, or . for this one")
    if settings.filename and Path(settings.filename).name != settings.filename:
        raise UserError(f"--filename {settings.filename} must be a plain name; folders belong in --save_path")
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs the package tensorboard; pip install -r requirements-all.txt")


def choose_device(name: str) -> str:
    """Return the device that `name` (cpu, cuda, cuda:N or auto) means here; in one of several processes that share a
    run, its own GPU. Raise UserError if there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and distributed.is_member():
        name = f"cuda:{distributed.own_gpu()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is unknown; use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return name


@dataclass(frozen=True)
class Hparams(Options):
    """Base of a method's own settings, its hyperparameters. All of them identify a run and are recorded."""

    @classmethod
    def alternatives(cls, name: str) -> tuple[str, ...]:
        """Return the hyperparameters that set the same thing in different ways, `name` being one of them."""
        return (name,)

    def settled(self, shots: int, images: int) -> "Hparams":
        """Return the same hyperparameters with everything decided that depends on the training images."""
        return self

    @property
    def length(self) -> str | None:
        """The name of the hyperparameter that says how long training is; None without a loop."""
        return None

    @property
    def identity(self) -> dict[str, Any]:
        """The values that identify a run and are recorded."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


LENGTHS = ("n_iters", "total_iters", "epochs")


@dataclass(frozen=True)
class Loop(Hparams):
    """Hyperparameters of every method that `train.fit` trains. The defaults are SO's."""

    # Whether an epoch leaves out its last batch if that is smaller than the others (and not the only one).
    drop_last: ClassVar[bool] = False

    lr: float = training(2e-4, "initial learning rate", above=0)
    n_iters: int | None = training(2000, "iterations per shot: n_iters x shots in all", kind=int, at_least=1)
    total_iters: int | None = training(None, "iterations in all, instead of n_iters x shots", kind=int, at_least=1)
    epochs: int | None = training(None, "passes over the images, instead of n_iters x shots", kind=int, at_least=1)
    batch_size: int = training(32, "training images per iteration", at_least=1)
    early_stop_loss: float = training(0.01, "stop below this mean loss of an epoch; 0 never stops", at_least=0)
    eval_every: int = training(0, "test accuracy every N iterations in curve.csv; training does not use it", at_least=0)

    @classmethod
    def alternatives(cls, name: str) -> tuple[str, ...]:
        return LENGTHS if name in LENGTHS else (name,)

    def settled(self, shots: int, images: int) -> "Loop":
        """Return the same hyperparameters with `total_iters` decided, for this many shots and training images."""
        if self.total_iters is not None:
            return self
        if self.epochs is not None:
            return dataclasses.replace(self, total_iters=self.epochs * self.batches_per_epoch(images))
        return dataclasses.replace(self, total_iters=self.n_iters * shots)

    @property
    def length(self) -> str:
        return next(name for name in ("total_iters", "epochs", "n_iters") if getattr(self, name) is not None)

    def batches_per_epoch(self, images: int) -> int:
        """Return the number of batches in a pass over this many images, at least 1."""
        return max(1, datasets.batches_per_epoch(images, self.batch_size, self.drop_last))

    @property
    def identity(self) -> dict[str, Any]:
        return {name: value for name, value in super().identity.items() if name not in ("n_iters", "epochs")}


@dataclass(frozen=True)
class Training(Loop):
    """The loop's, and the augmentation of the training images."""

    min_area: float = training(0.08, "smallest part of an image in a random training crop", above=0, at_most=1)
    flip: bool = training(True, "flip training images at random")


@dataclass(frozen=True)
class Views(Hparams):
    """Augmentation of heads that are computed from several views of each training image."""

    min_area: float = with_default(Training, "min_area", 0.5)
    flip: bool = with_default(Training, "flip", True)
