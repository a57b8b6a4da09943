"""Measurements side by side; see RESULTS.md."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as main.py does, before torch is imported
