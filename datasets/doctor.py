"""Command `python -m datasets.doctor NAME ... --root_path $DATA`; see acquire/doctor.py."""

import sys

from .acquire.doctor import main

if __name__ == "__main__":
    sys.exit(main())
