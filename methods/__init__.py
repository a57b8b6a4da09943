"""Methods of adaptation. A method is a module with `HYPERPARAMETERS`, the settings that matter to it; `DEFAULTS`, its
published values where they differ from those in run_utils.Settings; and `prepare(model, task, settings) -> Adaptation`,
which freezes everything but what it trains."""

from . import so, zero_shot
from .adaptation import Adaptation, MethodError, cosine_schedule, select_matrices

METHODS = {"so": so, "zero_shot": zero_shot}

__all__ = ["METHODS", "Adaptation", "MethodError", "cosine_schedule", "select_matrices"]
