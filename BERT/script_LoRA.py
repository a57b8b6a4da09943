"""LoRA on few-shot GLUE-RTE: a grid over the rank. In this folder:

python script_LoRA.py                                     # the published ranks
python script_LoRA.py --rank 2 8 16 --seed 1 2 3 4 5      # means over five seeds

Writes lora_grid_results.csv (rank, steps, val_acc, ...) and a record of each run in lora_grid_runs/. Runs that are
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
        parser = grid.parser(__doc__, out="lora_grid_results.csv")
        ranks = [2, 4, 8, 16]
        parser.add_argument("--rank", type=int, nargs="+", default=ranks, help=f"ranks {ranks}")
        arguments = vars(parser.parse_args(argv))
        cells = [{"rank": rank} for rank in arguments.pop("rank")]
        grid.run_all({"rank": "rank"}, cells, arguments)


if __name__ == "__main__":
    main()
