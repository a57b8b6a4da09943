"""The parts of sweep.py: the grid, what it will cost, and the cluster that does it."""
