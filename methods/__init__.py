"""Methods of adaptation. A method is a module with `HYPERPARAMETERS`, the settings that matter to it; `DEFAULTS`, its
published values where they differ from those in run_utils.Settings; and `prepare(model, task, settings) -> Adaptation`,
which freezes everything but what it trains. README.md shows how one is added."""

from . import linear_probe, prolip, so, tip_adapter, tip_adapter_f, zero_shot
from .adaptation import Adaptation, MethodError, cosine_schedule, select_matrices

METHODS = {
    "so": so,
    "prolip": prolip,
    "linear_probe": linear_probe,
    "tip_adapter": tip_adapter,
    "tip_adapter_f": tip_adapter_f,
    "zero_shot": zero_shot,
}

__all__ = ["METHODS", "Adaptation", "MethodError", "cosine_schedule", "select_matrices"]
