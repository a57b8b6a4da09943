"""SO and LoRA on BERT: few-shot GLUE-RTE. `main.py` is one run, `script.py` and `script_LoRA.py` are grids."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as CLIP's main.py does, before torch is imported
