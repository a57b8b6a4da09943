"""Command `python -m datasets.download NAME ... --root_path $DATA`; see acquire/download.py."""

import sys

from .acquire.download import main

if __name__ == "__main__":
    sys.exit(main())
