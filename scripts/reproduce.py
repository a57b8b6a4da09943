"""The paper's tables in one command: download, check, run, and compare with what was published.

    bash scripts/reproduce.sh --root_path $DATA                    # main table, 8 and 16 shots, base to new, ablations
    bash scripts/reproduce.sh --root_path $DATA --dry_run --gpu A100
    bash scripts/reproduce.sh --root_path $DATA --parts main --datasets dtd eurosat --shots 4
    bash scripts/reproduce.sh --root_path $DATA --cluster slurm --partition gpu --time 240
    bash scripts/reproduce.sh --quick                              # all of it on the embedded digits, in minutes

Flags that --help does not list are scripts/sweep.py's and main.py's. After any interruption the same command continues.
Exit code 0: all is done; 2: something is missing, with a line on stderr for each; 130: interrupted.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from common import Parser, UserError, counted, fail, one_line_errors, write_atomically
from scripts import sweep
from scripts.reproducing import costs, machine
from scripts.reproducing.parts import NEW_CLASSES, PARTS, QUICK, STANDARD, Choice, Part, chosen
from scripts.sweeping.grid import Cell, cells


def main(argv: Sequence[str] | None = None) -> None:
    """Reproduce the tables. What is missing at the end is a line each, and exit code 2."""
    with one_line_errors():
        options, flags = _arguments(sys.argv[1:] if argv is None else argv)
        shots, seeds = tuple(options.shots), tuple(options.seeds)
        names = tuple(options.parts), tuple(options.datasets), tuple(options.methods)
        parts = chosen(Choice(*names, shots, seeds, options.quick))
        if not options.root_path and any(name != machine.EMBEDDED for part in parts for name in part.datasets):
            raise UserError("--root_path is missing: the folder for all datasets; or --quick, on the embedded digits")
        if options.root_path:
            flags = ["--root_path", options.root_path, *flags]
        if options.dry_run:
            show(parts, flags, costs.gpu_named(options.gpu), options.out)
            return
        missing = reproduce(parts, flags, options)
        for line in missing:
            fail(line)
        sys.exit(2 if missing else 0)


def reproduce(parts: Sequence[Part], flags: list[str], options: argparse.Namespace) -> list[str]:
    """Get the data, do the runs and write the report. Return a line for each thing that is missing."""
    remarks = [QUICK] if options.quick else []
    for remark in remarks:
        print(remark)
    root = Path(options.root_path or ".").expanduser()
    names = list(dict.fromkeys(name for part in parts for name in part.datasets))
    missing = machine.check_space([name for name in names if name != machine.EMBEDDED], root)
    given = any(word.partition("=")[0] == "--device" for word in flags)
    needed_here = sweep.arguments(flags)[0].cluster == "local" and not (options.quick or given)
    no_gpu = machine.check_gpu() if needed_here else []
    for line in missing + no_gpu:
        print(f"missing, before anything is downloaded: {line}")
    ready, unready = machine.prepare(names, root)
    planned = {part.name: _planned(part.stages(options.out / "weights")[0], flags) for part in parts}
    backbones = {name: {cell.settings.backbone for cell in of_part} for name, of_part in planned.items()}
    there, absent = machine.check_weights(set().union(*backbones.values()))
    missing += no_gpu + unready + absent
    for part in [part.only(ready) for part in parts]:
        if part and not no_gpu and backbones[part.name] <= there:
            missing += run(part, flags, options)
    results = options.out / "results"
    if any(results.glob("*/result.json")):
        from scripts.reporting.writing import write  # slow

        write(results, None, options.out / "report", remarks)
        print(options.out / "report" / "index.html")
    return missing


def run(part: Part, flags: list[str], options: argparse.Namespace) -> list[str]:
    """Do the runs of a part, stage after stage. Return a line for each thing that is missing."""
    for number, grid in enumerate(part.stages(options.out / "weights")):
        file = options.out / "grids" / f"{part.name}{'-tested' if number else ''}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, yaml.safe_dump(grid, sort_keys=False))
        words = [*flags, "--results_dir", str(options.out / "results")]
        print(f"\n{part.name}{', tests of its weights' if number else ''}")
        workers = ["--workers", str(options.gpus)] if options.gpus else []
        try:
            failed = sweep.sweep(["--grid", str(file), *workers, *words])
        except UserError as error:
            return [f"{part.name}: {error}"]
        if failed:
            return [f"{part.name}: runs failed, listed above with their logs; correct that and run this again"]
    return []


def _planned(grid: dict, flags: Sequence[str]) -> list[Cell]:
    """Return the runs of a grid; those of a cluster with GPUs need none here."""
    options, own = sweep.arguments(flags)
    return cells(grid, own, "cuda" if options.cluster == "slurm" and options.gpus_per_run else None)


def show(parts: Sequence[Part], flags: Sequence[str], gpu: costs.Gpu, out: Path) -> None:
    """Print all runs with the hours that are estimated for one GPU, and how they are estimated."""
    total = runs = 0
    for part in parts:
        sum_of_part, number = 0.0, 0
        planned = _planned(part.stages(out / "weights")[0], [*flags, "--results_dir", str(out / "results")])
        for cell in planned:
            after = part.elsewhere or ([cell.settings.dataset] if part.name in NEW_CLASSES else [])
            later = sum(costs.START + costs.testing(cell.config, name, gpu) for name in after)
            seconds = 0.0 if cell.finished() else costs.seconds(cell.config, gpu)
            print(f"{(seconds + later) / 3600:8.2f} h  {cell.command}" + (f"  (+ {len(after)} tests)" if after else ""))
            sum_of_part += seconds + later
            number += 1 + len(after)
        print(f"{part.name}: {counted(number, 'run')}, {sum_of_part / 3600:.1f} hours on one {gpu.name}\n")
        total, runs = total + sum_of_part, runs + number
    print(f"all: {counted(runs, 'run')}, {total / 3600:.1f} hours on one {gpu.name}, divided by the number of GPUs")
    print(f"{costs.BASIS}.")


def _arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of this program, and the flags that are sweep.py's and main.py's."""
    epilog = "All other flags are sweep.py's (--cluster, --partition, ...) and main.py's, for all runs."
    parser = Parser(prog="reproduce.py", description=__doc__.splitlines()[0], epilog=epilog)
    parser.add_argument(
        "--root_path", help="the folder for all datasets, which are downloaded there as far as possible"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=STANDARD, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--datasets", nargs="+", default=[], help="only these")
    parser.add_argument("--methods", nargs="+", default=[], help="only these methods, or rows of configs/reproduce/")
    parser.add_argument("--shots", nargs="+", type=int, default=[], help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="instead of 1 2 3")
    parser.add_argument("--gpus", type=sweep.positive, help="runs at a time on this machine [one a GPU]")
    parser.add_argument("--quick", action="store_true", help=QUICK)
    parser.add_argument("--dry_run", action="store_true", help="only list the runs, with estimated hours")
    parser.add_argument("--gpu", help=f"for --dry_run [that of this machine, or A100]: {', '.join(costs.GPUS)}")
    parser.add_argument("--out", type=Path, help="folder of results and report [reproduced, or reproduced-quick]")
    options, flags = parser.parse_known_args(argv)
    options.out = options.out or Path("reproduced-quick" if options.quick else "reproduced")
    if options.quick:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # several runs at a time are faster than several threads
        options.gpus = options.gpus or min(os.cpu_count(), 4)
    return options, flags


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main()
