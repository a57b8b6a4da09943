"""Measurements side by side; see RESULTS.md."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as main.py does, before torch is imported
