"""Methods of adaptation. README.md shows how to add one: a file, and a line in MODULES.

Each module has `Hparams`, the method's own settings with their published defaults, and `prepare(experiment)`, which
freezes everything except what it trains and returns an Adaptation.
"""

import dataclasses
import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

from clip import CLIP, WeightsError, delta, weights_sha256
from common import UserError
from datasets import Task
from experiment import Experiment
from settings import SUPPORT, Hparams, Settings

from .adapters.matrices import LowRank

MODULES = (
    "weights.so",
    "weights.adam",
    "adapters.lora",
    "adapters.relora",
    "adapters.dora",
    "adapters.adalora",
    "weights.shira",
    "weights.layernorm",
    "weights.bias",
    "weights.two_stage",
    "weights.partial",
    "weights.prolip",
    "heads.linear_probe",
    "heads.tip_adapter",
    "heads.tip_adapter_f",
    "heads.gda",
    "heads.zs_lp",
    "heads.clap",
    "heads.taskres",
    "heads.lp_plus_plus",
    "heads.cross_modal",
    "heads.clip_adapter",
    "prompts.coop",
    "prompts.cocoop",
    "prompts.kgcoop",
    "prompts.prograd",
    "prompts.maple",
    "prompts.promptsrc",
    "prompts.mmrl",
    "zero_shot",
    "weights.so_ablation",
)
METHODS: dict[str, ModuleType] = {
    name.rpartition(".")[2]: import_module(f".{name}", package=__name__) for name in MODULES
}

for _name, _module in METHODS.items():  # a mistake in a new method shows at the start
    for _field in dataclasses.fields(_module.Hparams):
        if "help" not in _field.metadata or _field.name in Settings.__dataclass_fields__:
            raise TypeError(f"{_name}: Hparams.{_field.name} has no option(...), or the name of a common setting")


def saved_settings(path: Path, metadata: dict[str, str]) -> tuple[Hparams, dict]:
    """Return the hyperparameters that a weight file was trained with, and the common settings of its run.

    Files of earlier versions lack hyperparameters that did not exist then: their defaults are what the code did. Raise
    WeightsError if the file does not hold settings.
    """
    if "operation" in metadata:
        raise WeightsError(
            f"{path} was made by scripts/deltas.py and belongs to no run; write the whole CLIP with its --whole FILE, "
            "and test that with main.py --method zero_shot --backbone FILE"
        )
    try:
        saved = json.loads(metadata["settings"])
        kind = METHODS[saved["method"]].Hparams
        own = {field.name: saved[field.name] for field in dataclasses.fields(kind) if field.name in saved}
        common = {name: saved[name] for name in ("method", "shots", "draw", "split", "prompts", "template", "tuned_on")}
        common |= {name: saved.get(name, getattr(Settings, name)) for name in SUPPORT}
        return kind(**own).settled(common["shots"], images=0), common
    except (KeyError, TypeError, ValueError):
        raise WeightsError(f"{path} does not say how it was trained; save it again") from None


def merge_file(model: CLIP, path: str | Path) -> CLIP:
    """Change the weights of `model` to those that a run saved in `path`, and return it: a plain CLIP.

    `model` has the weights that the run started from. A delta is applied; matrices of LoRA, DoRA and AdaLoRA are added
    to the weights they belong to. Raise UserError if the file holds a head, which is no part of CLIP, and WeightsError,
    with the model unchanged, if it does not fit.
    """
    path, base_sha256 = Path(path), weights_sha256(model)
    metadata = delta.checkpoint_metadata(path)
    if metadata.get("format", delta.FORMAT) == delta.FORMAT:  # or there is no such file: apply_delta says that
        delta.apply_delta(model, path, base_sha256)
        return model
    method = metadata.get("method")
    if method not in METHODS:
        raise WeightsError(f"{path} is from a method {method} that is not known here; take the version that saved it")
    kind = METHODS[method].Hparams
    if not issubclass(kind, LowRank):
        raise UserError(f"{path} holds only what {method} adds, which cannot be merged into CLIP; use --eval_only")
    hparams, _ = saved_settings(path, metadata)
    no_images = Task(method, (), (), (), (), (), None)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    adaptation = METHODS[method].prepare(
        Experiment(Settings(method=method), hparams, no_images, model, None, base_sha256)
    )
    try:
        adaptation.saved.load(path, base_sha256)
    except WeightsError:
        adaptation.remove()
        raise
    finally:
        model.requires_grad_(True)
        for p in frozen:
            p.requires_grad_(False)
    return adaptation.merge()
