"""SO on few-shot GLUE-RTE: a grid over density and T. In this folder:

python script.py                                                    # the published densities and T
python script.py --kappa 1e-5 1e-4 --T_sparse 10 --seed 1 2 3 4 5   # means over five seeds

Writes so_grid_results.csv (kappa, T, steps, val_acc, ...) and a record of each run in so_grid_runs/. Runs that are
recorded are not done again, except failed ones.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `import datasets` must find this project's package

from BERT.grid import main

if __name__ == "__main__":
    main("SO", __doc__)
