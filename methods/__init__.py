"""Methods of adaptation. A method is a module with `HYPERPARAMETERS`, the settings that matter to it; `DEFAULTS`, its
published values where they differ from configs/settings.py; and `prepare(model, task, settings) -> Adaptation`, which
freezes everything but what it trains. README.md shows how one is added."""

from . import (
    adalora,
    adam,
    dora,
    linear_probe,
    lora,
    prolip,
    relora,
    so,
    so_ablation,
    tip_adapter,
    tip_adapter_f,
    zero_shot,
)
from .adaptation import Adaptation, MethodError, cosine_schedule, select_matrices

METHODS = {
    "so": so,
    "adam": adam,
    "lora": lora,
    "relora": relora,
    "dora": dora,
    "adalora": adalora,
    "prolip": prolip,
    "linear_probe": linear_probe,
    "tip_adapter": tip_adapter,
    "tip_adapter_f": tip_adapter_f,
    "zero_shot": zero_shot,
    "so_ablation": so_ablation,
}

__all__ = ["METHODS", "Adaptation", "MethodError", "cosine_schedule", "select_matrices"]
