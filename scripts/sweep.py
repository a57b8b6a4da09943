"""A grid of runs, several at a time, on this machine or on a slurm cluster.

    python scripts/sweep.py --methods so lora --shots 1 4 16 --seeds 1 2 3 --cluster local --workers 2
    python scripts/sweep.py --grid configs/grids/compare_digits.yaml --dry_run
    python scripts/sweep.py --grid grid.yaml --cluster slurm --partition gpu --gpus_per_run 1 --time 120

Needs requirements-all.txt. Flags that --help does not list are main.py's, for all runs, and so is everything after --.
Recorded runs are skipped: after Ctrl-C or a crash the same command continues. A run that fails does not stop the
others: failures are listed at the end with their logs, and the exit code is 1. README.md in this folder has the
details.
"""

import argparse
import importlib.util
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import Parser, UserError, counted, one_line_errors, progress
from records import read_record, rebuild_table
from run_utils import device_name
from scripts.sweeping.grid import LISTS, Cell, cells, read_grid

if TYPE_CHECKING:  # submitit is optional
    from scripts.sweeping.clusters import Cluster


def main(argv: Sequence[str] | None = None) -> None:
    """Do the sweep. A mistake of the user ends in one line and exit code 2, before anything has started."""
    with one_line_errors():
        code = sweep(sys.argv[1:] if argv is None else argv)
    sys.exit(code)


def sweep(argv: Sequence[str]) -> int:
    """Do the sweep and return the exit code: 1 if runs failed."""
    options, flags = arguments(argv)
    grid = read_grid(options.grid) if options.grid else {}
    grid |= {name: getattr(options, name) for name in LISTS if getattr(options, name)}
    device = None
    if options.cluster == "slurm":  # which has other machines than this one
        device = "cuda" if options.gpus_per_run else "cpu"
    planned = cells(grid, flags, device)
    to_do = [cell for cell in progress(planned, "looking for finished runs", "run") if not cell.finished()]
    results = Path(planned[0].settings.results_dir)
    if options.dry_run:
        show(planned, to_do, results, device is not None, options.gpus_per_run)
        return 0
    failures = watch(_cluster(options, results, to_do), to_do, len(planned)) if to_do else []
    rebuild_table(results)  # a run may have been killed after its record and before the table
    done, skipped = len(to_do) - len(failures), len(planned) - len(to_do)
    print(f"{counted(len(planned), 'run')}: {done} done, {skipped} were done before, {len(failures)} failed")
    print(f"results: {results / 'results.csv'}")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the sweep's options, and the flags that are main.py's."""
    epilog = "All other flags are main.py's, for all runs. Flags of only some methods belong in a grid file's rows."
    parser = Parser(prog="sweep.py", description=__doc__.splitlines()[0], epilog=epilog)
    parser.add_argument("--grid", type=Path, metavar="FILE", help="YAML file of the grid; the lists below win over it")
    parser.add_argument("--methods", nargs="+", help="[so]")
    parser.add_argument("--datasets", nargs="+", help="[digits]")
    parser.add_argument("--shots", nargs="+", help="[1 2 4 8 16]")
    parser.add_argument("--seeds", nargs="+", help="[1 2 3]")
    parser.add_argument("--dry_run", action="store_true", help="only show the runs, and how long they will take")
    parser.add_argument("--cluster", choices=("local", "slurm"), default="local", help="[local]")
    parser.add_argument("--workers", type=positive, help="runs at a time [local: all GPUs', or one; slurm: 256]")
    parser.add_argument("--partition", help="slurm: partition of the jobs [the cluster's default]")
    parser.add_argument("--time", type=positive, default=240, metavar="MINUTES", help="slurm: limit of a job [240]")
    parser.add_argument("--timeouts", type=positive, default=10, help="slurm: times a run may reach that limit [10]")
    parser.add_argument("--mem_gb", type=positive, help="slurm: memory of a job [the cluster's default]")
    parser.add_argument("--cpus_per_task", type=positive, help="slurm: cores of a job [the cluster's default]")
    text = "GPUs that share each run, a process each; slurm: 0 for CPUs [1]"
    parser.add_argument("--gpus_per_run", type=int, default=1, metavar="N", help=text)
    text = "another parameter of submitit's SlurmExecutor, such as account or qos; may be given several times"
    parser.add_argument("--slurm", action="append", default=[], metavar="NAME=VALUE", help=text)
    end = argv.index("--") if "--" in argv else len(argv)
    options, flags = parser.parse_known_args(argv[:end])
    flags += argv[end + 1 :]
    for word in [word for name in LISTS for word in getattr(options, name) or []]:
        if "," in word:
            raise UserError(f"{word}: separate the values by spaces; write {word.replace(',', ' ')}")
    if options.gpus_per_run < (options.cluster == "local"):
        raise UserError(
            f"--gpus_per_run {options.gpus_per_run}: give 1 or more; --device cpu is for runs without a GPU"
        )
    for word in flags:
        name = word.partition("=")[0]
        if name == "--processes" and options.gpus_per_run > 1:
            raise UserError("--processes and --gpus_per_run both say how many processes share a run; leave one out")
        if name in ("--method", "--dataset", "--seed"):
            raise UserError(f"{name}: a sweep takes lists; write {name}s")
    return options, flags


def positive(text: str) -> int:
    """Return a whole number from 1 on."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text!r}")
    return int(text)


def show(planned: Sequence[Cell], to_do: Sequence[Cell], results: Path, anywhere: bool, gpus_per_run: int) -> None:
    """Print every run, whether it is recorded, and the time that the others will take by the records in `results`.

    If the runs are done `anywhere`, records of all GPUs count.
    """
    import pandas as pd  # slow

    from scripts.sweeping import estimates

    records = pd.DataFrame([record for path in results.glob("*/result.json") if (record := read_record(path))])
    hours, unknown = Counter(), 0
    for cell in planned:
        state = "finished"
        if cell in to_do:
            on_gpu = cell.settings.device != "cpu"
            device = None if on_gpu and anywhere else device_name(cell.settings.device)
            seconds = estimates.seconds(cell.config, records, device, gpus_per_run)
            hours["GPU" if on_gpu else "CPU"] += (seconds or 0) / 3600
            unknown += seconds is None
            state = "to do" if seconds is None else f"to do, {seconds / 3600:.3f} h"
        print(f"{state:15} {cell.command}")
    print(f"{counted(len(planned), 'run')}: {len(planned) - len(to_do)} finished, {len(to_do)} to do")
    if unknown < len(to_do):
        total = " and ".join(f"{number:.3f} {kind} hours" for kind, number in hours.items())
        print(f"training and evaluation of {len(to_do) - unknown}: {total}, by past records, if none stops early")
    if unknown:
        print(f"no estimate for {unknown}: no past records of this method, dataset, backbone, precision and device")


def _cluster(options: argparse.Namespace, results: Path, to_do: Sequence[Cell]) -> "Cluster":
    if importlib.util.find_spec("submitit") is None:
        raise UserError("sweep.py needs the package submitit; pip install -r requirements-all.txt")
    from scripts.sweeping import clusters  # needs submitit

    folder = results.resolve() / "sweeps" / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{os.getpid()}"
    if options.cluster == "local":
        return clusters.Local(folder, options.workers, options.gpus_per_run, to_do)
    parameters = {
        "job_name": "sweep",
        "partition": options.partition,
        "time": options.time,
        "mem": options.mem_gb and f"{options.mem_gb}GB",
        "cpus_per_task": options.cpus_per_task,
        # Since Slurm 22.05 srun does not take them from sbatch.
        "srun_args": options.cpus_per_task and [f"--cpus-per-task={options.cpus_per_task}"],
        "gpus_per_node": options.gpus_per_run or None,
        "array_parallelism": options.workers or 256,
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True},  # by slurm itself, when it preempts a job or a node fails
    }
    for word in options.slurm:
        name, sign, value = word.partition("=")
        if not sign:
            raise UserError(f"--slurm {word}: write --slurm NAME=VALUE")
        parameters[name] = int(value) if value.isdecimal() else value
    return clusters.Slurm(folder, parameters, options.timeouts, options.gpus_per_run, to_do)


def watch(cluster: "Cluster", to_do: Sequence[Cell], total: int) -> list[str]:
    """Do the runs, `total` with those that are finished already. Return a line for each that failed."""
    queued = {cell.key for cell in cluster.jobs.values()}
    waiting = [cell for cell in to_do if cell.key not in queued]
    skipped, failures, shown = total - len(to_do), [], None
    with progress(None, "sweep", "run", total=total, initial=skipped, leave=True) as bar:
        try:
            while waiting or cluster.jobs:
                cluster.start(waiting)
                if shown is None:
                    bar.write(f"logs: {cluster.folder}")
                ended = cluster.ended()
                for cell, code, log in ended:
                    if code != 0 and not (code is None and cell.finished()):
                        ending = f"exit code {code}" if code is not None else "its job was ended"
                        failures.append(f"{cell.command} ({ending}; log: {log})")
                        bar.write(f"failed: {failures[-1]}", file=sys.stderr)
                if ended:
                    bar.update(len(ended))
                done = bar.n - skipped - len(failures)
                state = {"done": done, "failed": len(failures), "running": cluster.running(), "skipped": skipped}
                bar.set_postfix(state, refresh=state != shown or sys.stderr.isatty())
                shown = state
                if not ended:
                    time.sleep(cluster.poll_seconds)
        except BaseException:
            bar.close()
            if cluster.jobs:
                cluster.stop()
            raise
    print(f"logs: {cluster.folder}")
    return failures


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main()
