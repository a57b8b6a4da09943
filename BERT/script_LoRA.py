"""LoRA on few-shot GLUE-RTE: a grid over the rank. In this folder:

python script_LoRA.py                                     # the published ranks
python script_LoRA.py --rank 2 8 16 --seed 1 2 3 4 5      # means over five seeds

Writes lora_grid_results.csv (rank, steps, val_acc, ...) and a record of each run in lora_grid_runs/. Runs that are
recorded are not done again, except failed ones.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `import datasets` must find this project's package

from BERT.grid import main

if __name__ == "__main__":
    main("LoRA", __doc__)
