"""SO on few-shot GLUE-RTE: a grid over density and T. In this folder:

python script.py                                                    # the published densities and T
python script.py --kappa 1e-5 1e-4 --T_sparse 10 --seed 1 2 3 4 5   # means over five seeds

Writes so_grid_results.csv (kappa, T, steps, val_acc, ...) and a record of each run in so_grid_runs/. Runs that are
recorded are not done again, except failed ones.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # in front: `import datasets` must find this project's package, not Hugging Face's
    sys.path.insert(0, str(ROOT))

from BERT import grid
from common import one_line_errors


def main(argv: Sequence[str] | None = None) -> None:
    """Do the grid of the command line."""
    with one_line_errors():
        parser = grid.parser(__doc__, out="so_grid_results.csv")
        kappas, intervals = [1e-5, 1e-4, 1e-3], [5, 10, 20]
        parser.add_argument("--kappa", type=float, nargs="+", default=kappas, help=f"densities {kappas}")
        parser.add_argument("--T_sparse", type=int, nargs="+", default=intervals, help=f"intervals {intervals}")
        arguments = vars(parser.parse_args(argv))
        intervals = arguments.pop("T_sparse")
        cells = [{"kappa": kappa, "T_sparse": T} for kappa in arguments.pop("kappa") for T in intervals]
        grid.run_all({"kappa": "kappa", "T": "T_sparse"}, cells, arguments)


if __name__ == "__main__":
    main()
