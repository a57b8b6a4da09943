"""SO, the sparse optimizer."""

from .SparseOptimizer import SO

__all__ = ["SO"]
