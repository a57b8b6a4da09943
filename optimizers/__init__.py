"""SO, the sparse optimizer, and weight gradients at its support alone."""

from .sampled_gradients import attach
from .SparseOptimizer import SO

__all__ = ["SO", "attach"]
