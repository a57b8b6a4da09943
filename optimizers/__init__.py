"""SO, the sparse optimizer; weight gradients only at its support; SO's ablations."""

from .ablations import SOAblation
from .sampled_gradients import attach
from .so import SO

__all__ = ["SO", "SOAblation", "attach"]
