"""The parts of sweep.py: the grid, the time it will take, and the cluster that does it."""
