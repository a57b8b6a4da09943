"""The settings of a run: what they are called, what they mean, and which of them go together.

arguments.py reads them from the command line and config files like those beside this file.
"""

import hashlib
import importlib.util
import itertools
import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

import datasets
from common import file_sha256
from methods import METHODS
from methods.adaptation import ENCODERS, POSITIONS
from optimizers.ablations import GRADIENTS, MOMENTS, SUPPORTS


class UserError(Exception):
    """A mistake that the user can mend; the message is one line with the remedy."""


def option(default, text: str, choices: Collection[str] | None = None, kind: type | None = None):
    """A field of Settings that is also a command-line flag and a key of config files."""
    return field(default=default, metadata={"help": text, "choices": choices, "kind": kind or type(default)})


@dataclass(frozen=True)
class Settings:
    """All that determines a run. The names are those of the flags; no code changes them after `parse`."""

    # what
    method: str = option("so", "method of adaptation", METHODS)
    dataset: str = option("digits", "data set; digits is embedded, folder your own", datasets.available_datasets())
    root_path: str = option("", "folder that holds the data sets ($DATA); for folder, that of your images")
    shots: int = option(1, "labelled training images per class")
    seed: int = option(3, "of the few-shot draw, the order and augmentation of images, and the method's own draws")
    backbone: str = option("ViT-B/16", "OpenAI's model name, tiny, or the path of a weight file")
    # where and how much of the network is trained
    encoder: str = option("both", "towers that are adapted", ENCODERS)
    position: str = option("all", "blocks that are adapted in each tower", POSITIONS)
    # optimisation
    lr: float = option(2e-4, "initial learning rate; cosine schedule down to 1e-6")
    n_iters: int = option(2000, "iterations per shot: n_iters x shots in all")
    total_iters: int | None = option(None, "iterations in all, instead of n_iters x shots", kind=int)
    epochs: int | None = option(None, "passes over the training images, instead of n_iters x shots", kind=int)
    batch_size: int = option(32, "training images per iteration")
    early_stop_loss: float = option(0.01, "stop when an epoch's mean training loss falls below this; 0 never stops")
    # SO
    density_ratio: float = option(5e-5, "fraction of each matrix's entries with a gradient and a state (= 1 - s)")
    t: int = option(5, "iterations between two draws of SO's support")
    prune_first: bool = option(False, "SO prunes before it updates, as the paper's equation; released: after")
    sampled_gradients: bool = option(True, "SO: compute weight gradients at the support alone; the same to rounding")
    # SO's ablations; SO itself is random, importance, dynamic
    gradient: str = option("random", "so_ablation: which entries have a gradient", GRADIENTS)
    moments: str = option("importance", "so_ablation: which entries keep moments", MOMENTS)
    support: str = option("dynamic", "so_ablation: entries with a gradient drawn every t iterations, or once", SUPPORTS)
    # LoRA and its kin
    rank: int = option(2, "LoRA: rank of each update; AdaLoRA: mean rank at the end")
    alpha: float = option(1.0, "LoRA: updates are scaled by alpha / sqrt(rank); AdaLoRA: by alpha / (1.5 rank)")
    dropout: float = option(0.25, "LoRA: part of its input that is dropped at random while training")
    lora_on: str = option("q,k,v", "LoRA: which of the attention's projections q, k, v and o it is on")
    merge_every: int = option(125, "ReLoRA: iterations between two merges")
    # classifiers on frozen features
    probe_c: float = option(0.316, "linear_probe: inverse strength of the L2 penalty, scikit-learn's C")
    probe_iters: int = option(1000, "linear_probe: most iterations of the solver")
    text_init: bool = option(False, "linear_probe: the solver starts at the text classifier, not at zero")
    tip_alpha: float = option(1.0, "Tip-Adapter: residual ratio, weight of the cache beside CLIP's logits")
    tip_beta: float = option(5.5, "Tip-Adapter: sharpness of the cache's affinities")
    cache_passes: int = option(10, "Tip-Adapter: augmented views of an image whose mean is its key")
    # ProLIP
    prolip_lambda: float = option(1.0, "ProLIP: its regulariser's lambda times shots; 1 means lambda = 1 / shots")
    # choice of settings
    search: dict = field(  # name of a setting: values
        default_factory=dict,
        metadata={
            "help": "values of a setting of the method, to choose from by accuracy on the few-shot val images; given "
            "several times, all combinations are tried"
        },
    )
    tuned_on: str = option(
        "none", "for the record: images on which settings were chosen; --search makes it val", ("none", "val", "test")
    )
    # images, classes and prompts
    draw: str = option("released", "order of the few-shot draw: the released code's, or CoOp's", datasets.ORDERS)
    split: str | None = option(
        None, "train on the images of this split.json of a run, or of CoOp's few-shot pickle", kind=str
    )
    classes: str = option("all", "base or new: half of the classes, as in the base-to-new protocol", datasets.CLASSES)
    prompts: str = option(
        "released", "'a photo of a {}.' for all data sets, or each one's own", ("released", "specific")
    )
    template: tuple[str, ...] = option((), "prompt of your own with {} for the class; may be given several times")
    min_area: float = option(0.08, "smallest part of an image that a random training crop keeps")
    flip: bool = option(True, "flip training images at random")
    # machine
    device: str = option("auto", "cpu, cuda or cuda:N; auto takes a GPU if there is one")
    precision: str = option("fp32", "of the towers' computation; weights are float32 always", ("fp32", "bf16"))
    workers: int | None = option(None, "processes that read images; default from the machine's cores", kind=int)
    image_cache_mb: int = option(2048, "memory for decoded training images; beyond it they are decoded every time")
    cache_dir: str = option("~/.cache/clip-so", "folder for features of test images under unchanged weights")
    # output
    results_dir: str = option("results", "folder of run folders and results.csv")
    save_path: str | None = option(None, "folder for the adapted weights; nothing is saved without it", kind=str)
    filename: str | None = option(
        None, "name of the weight file there, without ending; default: the method's", kind=str
    )
    eval_only: bool = option(False, "train nothing: evaluate the weights that --save_path holds")
    eval_datasets: str | None = option(
        None, "with --eval_only: data sets to evaluate them on, with commas between, instead of --dataset", kind=str
    )
    eval_every: int = option(0, "diagnostic: test accuracy every N iterations in curve.csv; it decides nothing")
    save_every: int = option(1000, "iterations between two states of training that a stopped run goes on from; 0: none")
    tensorboard: bool = option(False, "write the curves to the run's folder for TensorBoard")
    force: bool = option(False, "run even if the same run is recorded already")
    wait: bool = option(False, "while another process is doing the same run, wait for it; without, that is a mistake")

    @property
    def iterations(self) -> int:
        """Iterations in all. ValueError where `epochs` are asked for and `settled` has not seen the data."""
        if self.epochs is not None and self.total_iters is None:
            raise ValueError("epochs become iterations by `settled`")
        return self.total_iters or self.n_iters * self.shots

    def settled(self, training_images: int) -> "Settings":
        """The same settings with the `total_iters` that `epochs`, if asked for, are."""
        if self.epochs is None:
            return self
        per_epoch = datasets.batches_per_epoch(training_images, self.batch_size)
        return replace(self, total_iters=self.epochs * per_epoch)

    @property
    def test_dataset(self) -> str:
        """The data set that is tested on: the one that is trained on, or, after `one_by_one`, another."""
        return self.eval_datasets or self.dataset

    @property
    def checkpoint(self) -> Path | None:
        """File of the adapted weights, apart for each backbone, data set, shots and seed. Weights that are evaluated on
        new classes were trained on the base classes."""
        if self.save_path is None:
            return None
        data = f"folder-{own_data_name(self.root_path)}" if self.dataset == "folder" else self.dataset
        data += "" if self.classes == "all" else "-base"
        folder = Path(self.save_path) / slug(self.backbone) / data / f"{self.shots}shots" / f"seed{self.seed}"
        return folder / f"{(self.filename or self.method).removesuffix('.safetensors')}.safetensors"

    @property
    def run_id(self) -> str:
        """Readable name, and a hash of every setting that can change the outcome."""
        relevant = {name: getattr(self, name) for name in IDENTITY} | self.hyperparameters
        relevant["device"] = self.device.split(":")[0]
        relevant |= {"template": self.template, "tuned_on": self.tuned_on}
        if self.test_dataset == "folder":  # elsewhere the name says which images are meant
            relevant["root_path"] = str(Path(self.root_path).expanduser().resolve())
        if Path(self.backbone).is_file():
            relevant["backbone"] = file_sha256(Path(self.backbone))
        if self.split:
            relevant["split"] = file_sha256(Path(self.split).expanduser())
        if self.eval_only:  # the weights decide, not where they lie
            relevant["checkpoint"] = file_sha256(self.checkpoint)
        if self.search:  # in order, which decides between equals
            relevant = {name: value for name, value in relevant.items() if name not in self.search}
            relevant["search"] = list(self.search.items())
        digest = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:8]
        data = self.dataset if self.classes == "all" else f"{self.dataset}-{self.classes}"
        evaluated = f"_eval_{self.test_dataset}" if self.eval_only else ""
        name = f"{self.method}_{data}_{slug(self.backbone)}_{self.shots}shot_seed{self.seed}"
        return f"{name}{evaluated}_{digest}"

    @property
    def hyperparameters(self) -> dict:
        """The settings that matter to this run's method, with the number of iterations as `total_iters` alone."""
        used = {name: getattr(self, name) for name in METHODS[self.method].HYPERPARAMETERS if name != "n_iters"}
        return used | ({"total_iters": self.iterations} if "total_iters" in used else {})

    @property
    def candidates(self) -> list["Settings"]:
        """The settings that a search compares: all combinations of its values, the last name's varying fastest.
        UserError if one of them cannot work."""
        total_iters = None if {"n_iters", "epochs"} & self.search.keys() else self.total_iters
        epochs = None if {"n_iters", "total_iters"} & self.search.keys() else self.epochs
        found = replace(self, search={}, tuned_on="val", total_iters=total_iters, epochs=epochs)
        points = itertools.product(*self.search.values())
        return [check(replace(found, **dict(zip(self.search, values)))) for values in points]


SIMPLE = [f for f in fields(Settings) if f.name != "search"]  # those that have one value
# What identifies a run beside its method's hyperparameters. Paths, caches and workers change no result.
IDENTITY = "method dataset test_dataset classes shots seed backbone draw prompts precision eval_only".split()


def own_data_name(root_path: str) -> str:
    """The name of one's own data set in file names: that of its folder, and its manifest's if `root_path` is one."""
    path = Path(root_path).expanduser().resolve()
    return re.sub(r"[^\w.-]", "_", f"{path.parent.name}-{path.stem}" if path.is_file() else path.name)


def slug(backbone: str) -> str:
    """A backbone's name, or its file's, as part of a file name."""
    name = Path(backbone).stem if Path(backbone).suffix else backbone
    return name.replace("/", "-").replace("@", "-")


MAX_SHOTS = 10_000  # no class of the data sets has more images; beyond it lists of repeats fill the memory

# Spellings of one thing: whichever the later layer uses replaces the others.
ALTERNATIVES = (("s", "density_ratio"), ("n_iters", "total_iters", "epochs"))


def check(settings: Settings) -> Settings:
    """The same settings, with device and workers decided. UserError for values out of range or at odds."""
    at_least = dict.fromkeys("shots n_iters total_iters epochs batch_size t rank merge_every".split(), 1)
    at_least |= dict.fromkeys("probe_iters cache_passes".split(), 1)
    at_least |= dict.fromkeys("seed eval_every save_every early_stop_loss workers image_cache_mb".split(), 0)
    at_least |= dict.fromkeys("tip_alpha tip_beta prolip_lambda".split(), 0)
    for name, minimum in at_least.items():
        value = getattr(settings, name)
        if value is not None and not (minimum <= value < math.inf):
            raise UserError(f"--{name} must be at least {minimum}, not {value}")
    if settings.shots > MAX_SHOTS:
        raise UserError(f"--shots must be at most {MAX_SHOTS}, not {settings.shots}")
    if settings.seed >= 2**63:
        raise UserError(f"--seed must be below 2**63, not {settings.seed}")
    for name in ("lr", "alpha", "probe_c"):
        if not 0 < getattr(settings, name) < math.inf:
            raise UserError(f"--{name} must be positive, not {getattr(settings, name)}")
    if not 0 <= settings.dropout < 1:
        raise UserError(f"--dropout must be in [0, 1), not {settings.dropout}")
    lora_on = [part.strip() for part in settings.lora_on.split(",")]
    if len(set(lora_on)) < len(lora_on) or not set(lora_on) <= set("qkvo"):
        raise UserError(f"--lora_on must name some of q,k,v,o with commas between, not {settings.lora_on!r}")
    if not 0 < settings.density_ratio <= 1:
        raise UserError(f"--density_ratio (1 - s) must be in (0, 1], not {settings.density_ratio}")
    if not 0 < settings.min_area <= 1:
        raise UserError(f"--min_area must be in (0, 1], not {settings.min_area}")
    _check_data(settings)
    if settings.save_path == "":
        raise UserError("--save_path is empty; name a folder, . for this one")
    if settings.eval_only and settings.method == "zero_shot":
        raise UserError("--eval_only evaluates adapted weights, and zero_shot has none; leave --eval_only out")
    if settings.eval_only and settings.save_path is None:
        raise UserError("--eval_only needs --save_path, the folder given when the weights were saved")
    if settings.eval_only and not settings.checkpoint.is_file():
        raise UserError(f"--eval_only: there is no {settings.checkpoint}; check --save_path and the run's settings")
    if settings.filename and Path(settings.filename).name != settings.filename:
        raise UserError(f"--filename {settings.filename} must be a plain name; folders go into --save_path")
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs the package tensorboard; pip install -r requirements-tensorboard.txt")
    _check_search(settings)
    workers = datasets.default_workers() if settings.workers is None else settings.workers
    lora_on = ",".join(part for part in "qkvo" if part in lora_on)  # one order, one run
    return replace(settings, device=_device(settings.device), workers=workers, lora_on=lora_on)


def _check_data(settings: Settings) -> None:
    """UserError for data sets, classes and prompts that do not go together."""
    trains = settings.method != "zero_shot" and not settings.eval_only
    if settings.dataset == "folder" and not settings.root_path:
        raise UserError("--dataset folder needs --root_path, the folder of your images or a manifest of them")
    if datasets.is_test_only(settings.dataset) and settings.method != "zero_shot":
        raise UserError(
            f"--dataset {settings.dataset} has a test part alone; train on another, imagenet for one, and evaluate "
            f"with --eval_only --eval_datasets {settings.dataset}"
        )
    if datasets.is_test_only(settings.dataset) and settings.split:
        raise UserError(f"--split: {settings.dataset} has no training images to choose")
    if settings.split and not Path(settings.split).expanduser().is_file():
        raise UserError(f"--split {settings.split} is no file; every run that draws images writes a split.json")
    if settings.classes == "new" and trains:
        raise UserError("--classes new is there to test on; train with --classes base, then add --eval_only")
    names = [settings.dataset] if settings.eval_datasets is None else settings.eval_datasets.split(",")
    if settings.eval_datasets is not None:
        known = [name for name in datasets.available_datasets() if name != "folder"]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise UserError(f"--eval_datasets: {unknown[0]!r} is none of {', '.join(known)}")
        if len(set(names)) < len(names):
            raise UserError(f"--eval_datasets {settings.eval_datasets} names a data set twice")
        if not settings.eval_only:
            raise UserError("--eval_datasets evaluates saved weights; add --eval_only, and --save_path where they are")
        if settings.classes != "all" or settings.split:
            raise UserError("--eval_datasets takes whole test parts; leave --classes and --split out")
        if settings.dataset == "folder" and names != ["digits"]:
            raise UserError("--eval_datasets: with --dataset folder, --root_path holds your images alone; take digits")
    if names != ["digits"] and not settings.root_path:
        flag = "dataset" if settings.eval_datasets is None else "eval_datasets"
        raise UserError(f"--{flag} {settings.test_dataset} needs --root_path, the folder that holds the data sets")
    for template in settings.template:
        if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
            raise UserError(f"--template {template!r} must have {{}} where the class name goes, and no other braces")
    if settings.template and settings.prompts == "specific":
        raise UserError("--template and --prompts specific both say which prompts to use; give one of them")


def one_by_one(settings: Settings) -> list[Settings]:
    """The settings of each single run: one, or with --eval_datasets one for each data set."""
    if settings.eval_datasets is None:
        return [settings]
    return [replace(settings, eval_datasets=name) for name in settings.eval_datasets.split(",")]


def _check_search(settings: Settings) -> None:
    names = [name for name in METHODS[settings.method].HYPERPARAMETERS if name != "eval_every"]
    names += ["epochs"] if "total_iters" in names else []
    for name in settings.search:
        if name not in names:
            remedy = f"choose from {', '.join(names)}" if names else "leave --search out"
            raise UserError(f"--search {name}: the method {settings.method} has no such setting to choose; {remedy}")
    for spellings in ALTERNATIVES:
        used = [name for name in spellings if name in settings.search]
        if len(used) > 1:
            raise UserError(f"--search: {used[0]} and {used[1]} say the same thing twice; give one of them")
    if settings.search:
        _ = settings.candidates  # each of which is checked


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is unknown; use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return name
