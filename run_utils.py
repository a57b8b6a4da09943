"""One run's settings, seeds, folder and records.

Settings come from three layers: the defaults below, a YAML file (`--config`), the command line; later ones win.
Records: `results/<run_id>/result.json` is the truth, written last and atomically; `results/results.csv` is
rebuilt from all of these files.
"""

import argparse
import difflib
import hashlib
import json
import math
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path

import pandas as pd
import safetensors
import torch
import yaml
from filelock import FileLock, Timeout

import datasets
from clip.download import file_sha256
from methods import METHODS
from methods.adaptation import ENCODERS, POSITIONS

PROJECT = Path(__file__).resolve().parent
QUICK_START = PROJECT / "configs" / "digits.yaml"


class UserError(Exception):
    """A mistake that the user can mend; the message is one line with the remedy."""


def option(default, text: str, choices: Sequence[str] | None = None, kind: type | None = None):
    """A field of Settings that is also a command-line flag and a key of config files."""
    return field(default=default, metadata={"help": text, "choices": choices, "kind": kind or type(default)})


@dataclass(frozen=True)
class Settings:
    """All that determines a run. The names are those of the flags; no code changes them after `parse`."""

    # what
    method: str = option("so", "method of adaptation", tuple(METHODS))
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
    batch_size: int = option(32, "training images per iteration")
    early_stop_loss: float = option(0.01, "stop when an epoch's mean training loss falls below this; 0 never stops")
    # SO
    density_ratio: float = option(5e-5, "fraction of each matrix's entries with a gradient and a state (= 1 - s)")
    t: int = option(5, "iterations between two draws of SO's support")
    prune_first: bool = option(False, "SO prunes before it updates, as the paper's equation; released: after")
    sampled_gradients: bool = option(True, "SO: compute weight gradients at the support alone; the same to rounding")
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
    force: bool = option(False, "run even if the same run is recorded already")

    @property
    def iterations(self) -> int:
        return self.total_iters or self.n_iters * self.shots

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
        relevant["template"] = self.template
        if self.test_dataset == "folder":  # elsewhere the name says which images are meant
            relevant["root_path"] = str(Path(self.root_path).expanduser().resolve())
        if Path(self.backbone).is_file():
            relevant["backbone"] = file_sha256(Path(self.backbone))
        if self.split:
            relevant["split"] = file_sha256(Path(self.split).expanduser())
        if self.eval_only:  # the weights decide, not where they lie
            relevant["checkpoint"] = file_sha256(self.checkpoint)
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

# Two spellings of one thing: whichever the later layer uses replaces the other.
ALTERNATIVES = (("s", "density_ratio"), ("n_iters", "total_iters"))


class Parser(argparse.ArgumentParser):
    """Reports mistakes as UserError, so that all of them reach the user in one way."""

    def error(self, message: str):
        raise UserError(f"{message}; see python main.py --help")


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Settings from the command line and, below it, a config file. UserError for anything that cannot work.

    Below both lie the method's published values and, for the data set digits, the quick start's configs/digits.yaml.
    """
    given = vars(_parser().parse_args(argv))
    layers = [read_config(Path(given.pop("config"))), given] if "config" in given else [given]
    merged = {name: value for layer in layers for name, value in layer.items() if name in ("dataset", "method")}
    method = merged.get("method", "so")
    if merged.get("dataset", "digits") == "digits":
        layers.insert(0, read_config(QUICK_START))
    layers = [METHODS[method].DEFAULTS, *(part for layer in layers for part in _general_and_own(layer, method))]
    merged = {}
    for layer in layers:
        for pair in ALTERNATIVES:
            if set(pair) <= layer.keys():
                raise UserError(f"{pair[0]} and {pair[1]} say the same thing twice; give one of them")
            if set(pair) & layer.keys():
                merged = {name: value for name, value in merged.items() if name not in pair}
        merged |= layer
    if "s" in merged:
        merged["density_ratio"] = round(1 - merged.pop("s"), 12)
    if "template" in merged:
        merged["template"] = tuple(merged["template"])
    settings = check(Settings(**merged))
    if settings.eval_only:  # what the weights were trained with is the truth, whatever else was given
        try:
            trained = json.loads(checkpoint_metadata(settings.checkpoint)["settings"])
            known = {name: trained[name] for name in METHODS[settings.method].HYPERPARAMETERS}
            if not {"prompts", "template"} & merged.keys():
                known |= {"prompts": trained["prompts"], "template": tuple(trained["template"])}
            settings = check(replace(settings, **known))
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{settings.checkpoint} does not say how it was trained; save it again") from None
    return settings


def _general_and_own(layer: dict, method: str) -> tuple[dict, dict]:
    """A config file's settings for all methods, and those that it has for this one."""
    own = layer.get("methods", {}).get(method, {})
    return {name: value for name, value in layer.items() if name != "methods"}, own


def _parser() -> Parser:
    parser = Parser(
        prog="main.py",
        description="Few-shot adaptation of CLIP. Defaults are in brackets. For the embedded digits, which are taken\n"
        "when no data set is named, configs/digits.yaml replaces some of them: tiny CLIP, 16 shots and others.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; the command line wins over it")
    for f in fields(Settings):
        text = f"{f.metadata['help']} [{f.default}]"
        if f.metadata["kind"] is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, help=text)
        elif f.metadata["kind"] is tuple:
            parser.add_argument(f"--{f.name}", action="append", metavar="TEXT", help=text)
        else:
            parser.add_argument(f"--{f.name}", type=f.metadata["kind"], choices=f.metadata["choices"], help=text)
    parser.add_argument("--s", type=float, help="sparsity, 1 - density_ratio [0.99995]")
    return parser


def read_config(path: Path) -> dict:
    """The settings in a YAML file, each in its proper type, and under `methods` those for single methods, by name.
    UserError names the file, the key and the remedy."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    where = f"--config {path}"
    settings = _settings(content, where, ("methods",))
    if "methods" in settings:
        methods = settings["methods"]
        if not isinstance(methods, dict) or not methods.keys() <= METHODS.keys():
            raise UserError(f"{where}: methods must hold settings under the names {', '.join(METHODS)}")
        settings["methods"] = {name: _settings(own, f"{where}: methods: {name}") for name, own in methods.items()}
    return settings


def _settings(content, where: str, untyped: Sequence[str] = ()) -> dict:
    """The settings in a part of a config file, each in its proper type."""
    if not isinstance(content or {}, dict):
        raise UserError(f"{where} must hold lines of the form `name: value`")
    known = {f.name: (f.metadata["kind"], f.metadata["choices"], f.default) for f in fields(Settings)}
    known["s"] = (float, None, 0.99995)
    settings = {}
    for name, value in (content or {}).items():
        if name in untyped:
            settings[name] = value
            continue
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise UserError(f"{where}: unknown setting {name!r}" + (f"; meant {close[0]}?" if close else ""))
        settings[name] = _typed(value, *known[name], where=f"{where}: {name}")
    return settings


def _typed(value, kind: type, choices: Sequence[str] | None, default, where: str):
    if value is None and default is None:
        return None
    if kind is tuple:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where} must be a list of texts, not {value!r}")
        return tuple(texts)
    wanted = f"{where} must be {', '.join(choices) if choices else kind.__name__}, not {value!r}"
    if value is None or isinstance(value, bool) != (kind is bool):
        raise UserError(wanted)
    try:
        # Through text, because YAML reads 2e-4 as text and 1 as an integer.
        typed = value if kind is bool else kind(str(value))
    except ValueError:
        raise UserError(wanted) from None
    if choices and typed not in choices:
        raise UserError(wanted)
    return typed


def check(settings: Settings) -> Settings:
    """The same settings with device and workers decided. UserError for values out of range or at odds."""
    at_least = {"shots": 1, "seed": 0, "n_iters": 1, "total_iters": 1, "batch_size": 1, "t": 1, "eval_every": 0}
    at_least |= {"early_stop_loss": 0, "workers": 0, "image_cache_mb": 0}
    for name, minimum in at_least.items():
        value = getattr(settings, name)
        if value is not None and not (minimum <= value < math.inf):
            raise UserError(f"--{name} must be at least {minimum}, not {value}")
    if settings.shots > MAX_SHOTS:
        raise UserError(f"--shots must be at most {MAX_SHOTS}, not {settings.shots}")
    if settings.seed >= 2**63:
        raise UserError(f"--seed must be below 2**63, not {settings.seed}")
    if not 0 < settings.lr < math.inf:
        raise UserError(f"--lr must be positive, not {settings.lr}")
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
    workers = datasets.default_workers() if settings.workers is None else settings.workers
    return replace(settings, device=_device(settings.device), workers=workers)


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


def make_reproducible(seed: int) -> None:
    """Deterministic kernels, float32 that is float32 (no TF32), and seeds for what a library may draw; this
    project's own draws come from generators of their own."""
    random.seed(seed)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


class Run:
    """The folders of one run. As a context it makes them, and removes again what holds no result at the end."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.results = Path(settings.results_dir)
        self.folder = self.results / settings.run_id
        self.csv = self.results / "results.csv"
        self.made: list[Path] = []

    def finished(self, split_sha256: str, data_sha256: str | None = None) -> dict | None:
        """The record, if this run is done: on the same split and data, and its weights are saved if they are asked
        for."""
        record = read_record(self.folder / "result.json")
        checkpoint = self.settings.checkpoint
        if record is None or (record["split_sha256"], record.get("data_sha256")) != (split_sha256, data_sha256):
            return None
        no_weights = checkpoint is None or self.settings.eval_only or record["trainable_weights"] == 0
        saved = no_weights or checkpoint_metadata(checkpoint).get("run_id") == self.settings.run_id
        return record if saved else None

    def __enter__(self) -> "Run":
        try:
            self._make(self.folder)
            self.lock = FileLock(self.folder / ".lock", timeout=0)
            self.lock.acquire()
        except Timeout:
            raise UserError(f"another process is doing this run in {self.folder}; wait for it") from None
        except OSError:
            self._remove_empty()
            raise
        try:
            if self.csv.is_dir():
                raise UserError(f"{self.csv} is a folder, but the table of results must go there; remove it")
            if self.settings.checkpoint and not self.settings.eval_only:
                self._reserve(self.settings.checkpoint)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self, folder: Path, name: str = "") -> None:
        """Makes a folder and makes sure, before hours of work, that files of such names can be written there."""
        self.made += [f for f in (folder, *folder.parents) if not f.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{name}.", suffix=".part"):
            pass

    def _reserve(self, checkpoint: Path) -> None:
        self._make(checkpoint.parent, checkpoint.name)
        if checkpoint.exists() and not self.settings.force:
            owner = checkpoint_metadata(checkpoint).get("run_id", "none of this program")
            if owner != self.settings.run_id:
                raise UserError(
                    f"{checkpoint} holds the weights of another run ({owner}); choose another --filename or "
                    "--save_path, or replace them with --force"
                )

    def __exit__(self, *_) -> None:
        (self.folder / ".lock").unlink(missing_ok=True)
        if not (self.folder / "result.json").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        self._remove_empty()
        self.lock.release()

    def _remove_empty(self) -> None:
        for folder in sorted(self.made, key=lambda f: len(f.parts), reverse=True):
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()

    def record(self, result: dict, curve: list[dict], timing: list[dict], split: str | None = None) -> dict:
        """Writes the split, if images were drawn, and the curves, then the result, then the table of all results.
        Returns the whole record."""
        settings = self.settings
        own = settings.test_dataset == "folder"
        record = {
            **{name: getattr(settings, name) for name in IDENTITY},
            **settings.hyperparameters,
            **result,
            "prompts": "own" if settings.template else settings.prompts,
            "root_path": _as_text(Path(settings.root_path).expanduser().resolve()) if own else None,
            "run_id": settings.run_id,
            "git_commit": git_commit(),
            "torch_version": torch.__version__,
            "device": device_name(settings.device),
            "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        record = {name: record[name] for name in _in_order(record)}
        self.folder.mkdir(parents=True, exist_ok=True)  # somebody may have cleaned up since
        write_atomically(self.folder / "config.yaml", yaml.safe_dump(_config(settings), sort_keys=False))
        if split:
            write_atomically(self.folder / "split.json", split)
        if curve:
            columns = [name for name in CURVE if any(name in row for row in curve)]
            write_atomically(self.folder / "curve.csv", pd.DataFrame(curve, columns=columns).to_csv(index=False))
            write_atomically(self.folder / "timing.csv", pd.DataFrame(timing).to_csv(index=False))
        write_atomically(self.folder / "result.json", json.dumps(record, indent=2) + "\n")
        rebuild_table(self.results)
        return record


def _as_text(path: Path) -> str:
    """A path that a UTF-8 file can hold: names on disk may be no valid text."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


CURVE = ("iteration", "loss", "train_accuracy", "test_accuracy", "lr")
# Columns of results.csv in order. Hyperparameters that are not named here follow lr, density_ratio and t.
FIRST = (
    "run_id method dataset backbone shots seed test_accuracy zero_shot_accuracy train_accuracy final_loss iterations "
    "stopped_early train_seconds eval_seconds peak_memory_mb trainable_weights changed_weights checkpoint_bytes "
    "lr density_ratio t".split()
)
LAST = (
    "encoder position precision draw classes prompts template test_dataset root_path eval_only split_sha256 "
    "data_sha256 weights_sha256 git_commit torch_version device finished_at".split()
)


def _in_order(names: Iterable[str]) -> list[str]:
    """`names` in the order of the table's columns."""
    names = list(names)
    between = [name for name in names if name not in FIRST and name not in LAST]
    return [*(n for n in FIRST if n in names), *between, *(n for n in LAST if n in names)]


def read_record(path: Path) -> dict | None:
    """The record in a result.json; None if there is none. A damaged one is named on stderr and left out."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and {"run_id", "split_sha256", "trainable_weights", "finished_at"} <= record.keys():
            return record
    except FileNotFoundError:
        return None
    except ValueError:
        pass
    print(f"note: {path} is damaged and left out; run it again with --force, or remove it", file=sys.stderr)
    return None


def checkpoint_metadata(checkpoint: Path) -> dict[str, str]:
    """What a run wrote beside its weights: run_id, method and settings; empty for other files and for none."""
    try:
        with safetensors.safe_open(checkpoint, "pt") as file:
            return file.metadata() or {}
    except (OSError, safetensors.SafetensorError):
        return {}


def _config(settings: Settings) -> dict:
    """Settings as a config file that repeats the run; of two alternatives only the one in force."""
    left_out = {"n_iters" if settings.total_iters else "total_iters", "force"}
    return {name: value for name, value in asdict(settings).items() if name not in left_out}


def rebuild_table(results: Path) -> None:
    """results.csv from every result.json below `results`, one row a run, oldest first."""
    with FileLock(results / ".results.lock"):
        records = [read_record(path) for path in results.glob("*/result.json")]
        records = [record for record in records if record is not None]
        records.sort(key=lambda record: (record["finished_at"], record["run_id"]))
        names = dict.fromkeys((*FIRST, *(name for record in records for name in record), *LAST))
        table = pd.DataFrame(records, columns=_in_order(names))
        write_atomically(results / "results.csv", table.to_csv(index=False))


def write_atomically(path: Path, text: str) -> None:
    """Writes beside `path`, then renames: a reader sees the old file or the new one, never half of it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def git_commit() -> str:
    """Commit of this code, with + if files were changed since; empty outside a git checkout."""
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def peak_memory_mb(device: torch.device) -> float:
    """Most memory in use so far, in MiB: on a GPU what torch allocated there, on a CPU the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent process before exec
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024
