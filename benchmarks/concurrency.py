"""Many processes at once in one folder of results: is every record kept, and is the table always valid?

    python -m benchmarks.concurrency
    python -m benchmarks.concurrency --folder /scratch/me     # on the file system in question

Records: in each round all processes finish a run at the same time, and find it in results.csv when they are done. One
more is killed somewhere in the middle of it, while another process reads the table again and again. Turns: all
processes want the same run's folder. Then the time to write the table. Ends with exit code 1 if anything was wrong;
tracebacks on stderr say what.
"""

import contextlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch

from benchmarks.timing import median_seconds
from common import Parser, UserError, one_line_errors, progress
from records import FIRST, LAST, RecordFolder, rebuild_table

FORK = multiprocessing.get_context("fork")  # importing torch takes seconds
PATIENCE = 300  # seconds that processes wait for each other before they give up
RESULT = dict.fromkeys((*FIRST, *LAST), 1234.56789)  # about as long as a real record


def begun(function: Callable, count: int, *arguments: object) -> list[multiprocessing.Process]:
    """Return `count` new processes that call a function with their number and these arguments."""
    processes = [FORK.Process(target=function, args=(number, *arguments)) for number in range(count)]
    for process in processes:
        process.start()
    return processes


def failures(processes: Sequence[multiprocessing.Process]) -> list[str]:
    """Wait for the end of these processes, and return those that failed."""
    for process in processes:
        process.join()
    return [f"{process.name} failed" for process in processes if process.exitcode]


def finish(results: Path, seed: int) -> dict:
    """Record the run with this seed, whose accuracy is an eighth of it, and return its record."""
    folder = RecordFolder(results, f"so_digits_tiny_16shot_seed{seed}")
    with folder.locked(wait=False):
        curve = "iteration,loss\n" + "".join(f"{100 * i},{1 / i}\n" for i in range(1, 17))
        return folder.write(RESULT | {"seed": seed, "test_accuracy": seed / 8}, {"curve.csv": curve})


def read_table(results: Path) -> pd.DataFrame:
    """Return the table as a user reads it. Raise AssertionError if it is not whole and right."""
    table = pd.read_csv(results / "results.csv")
    assert len(table) and table.run_id.is_unique, "the table is empty or has a run twice"
    assert list(table.test_accuracy) == [seed / 8 for seed in table.seed], "wrong values"
    assert table.columns[0] == "run_id" and table.columns[-1] == LAST[-1] and table.finished_at.notna().all()
    return table


def _recorder(first: int, results: Path, seeds: range, barrier) -> None:
    try:
        for seed in seeds[first :: barrier.parties - 1]:
            barrier.wait(PATIENCE)
            run_id = finish(results, seed)["run_id"]
            assert run_id in set(read_table(results).run_id), f"{run_id} was recorded, and the table lacks it"
        barrier.wait(PATIENCE)
    except BaseException:
        barrier.abort()
        raise


def _reader(_: int, results: Path, stop, looks) -> None:
    known = set()
    while not stop.is_set():
        if (results / "results.csv").exists():
            now = set(read_table(results).run_id)
            assert known <= now, f"rows disappeared: {sorted(known - now)}"
            known = now
            looks.value += 1


def record_at_once(results: Path, processes: int, rounds: int) -> dict:
    """Try the records. Return how long it took, how often the reader looked, how many of the killed processes had
    their record written already, and what went wrong."""
    barrier, stop, looks = FORK.Barrier(processes + 1), FORK.Event(), FORK.Value("q", 0)
    count = processes * rounds
    reader = begun(_reader, 1, results, stop, looks)
    recorders = begun(_recorder, processes, results, range(count), barrier)
    moments, begin, took = random.Random(0), time.perf_counter(), 0.1
    with contextlib.suppress(threading.BrokenBarrierError):  # somebody's traceback says why
        for seed in progress(range(count, count + rounds), "rounds", "round"):
            barrier.wait(PATIENCE)
            start = time.perf_counter()
            victim = FORK.Process(target=finish, args=(results, seed))
            victim.start()
            time.sleep(took * moments.random() ** 3)  # more often early, before it waits for the table
            victim.kill()
            victim.join()
            while barrier.n_waiting < processes and not barrier.broken:
                time.sleep(0.002)
            took = time.perf_counter() - start  # as long as the next round will take, about
        barrier.wait(PATIENCE)
    wrong = failures(recorders)
    seconds = time.perf_counter() - begin
    stop.set()
    wrong += failures(reader)
    rebuild_table(results)
    recorded = set(read_table(results).seed)
    written = {json.loads(file.read_text())["seed"] for file in results.glob("*/result.json")}
    wrong += [f"seed {seed} is missing" for seed in (written | set(range(count))) - recorded]
    wrong += [f"left behind: {part}" for part in results.glob("*.part")]
    return {"seconds": seconds, "looks": looks.value, "killed_late": len(recorded) - count, "wrong": wrong}


def _turns(_: int, results: Path, turns: int) -> None:
    folder, done = RecordFolder(results, "wanted"), 0
    while done < turns:
        try:
            with folder.locked(wait=False):
                mine = folder.path / "mine"
                with mine.open("x") as file:  # fails if another process's is there
                    file.write(str(os.getpid()))
                time.sleep(0.001)
                assert mine.read_text() == str(os.getpid()), "two processes do the same run"
                mine.unlink()
            done += 1
        except UserError:  # another process is doing it
            time.sleep(0.001)


def take_turns(results: Path, processes: int, turns: int) -> list[str]:
    """Try the turns, and return what went wrong."""
    return failures(begun(_turns, processes, results, turns))


def rebuild_seconds(results: Path, count: int) -> float:
    """Return the median time to write the table of `count` records."""
    record = finish(results, 0)
    for number in range(1, count):
        folder = results / f"run{number}"
        folder.mkdir(exist_ok=True)
        (folder / "result.json").write_text(json.dumps(record | {"run_id": folder.name, "seed": number}, indent=2))
    return median_seconds(lambda: rebuild_table(results))


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--turns", type=int, default=50, help="of each process with the run that all want")
    parser.add_argument("--folder", type=Path, help="where a folder is made for this and removed again [/tmp]")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, count = Path(name), args.processes * args.rounds
        found = record_at_once(folder / "records", args.processes, args.rounds)
        print(
            f"{args.processes} processes, {args.rounds} rounds: {count} records in {found['seconds']:.1f} s, "
            f"{found['looks']} looks at the table, {args.rounds} more processes killed "
            f"({found['killed_late']} of them after their record was written)"
        )
        wrong = found["wrong"] + take_turns(folder / "turns", args.processes, args.turns)
        print(f"{args.processes} processes wanted the same run, {args.turns} times each")
        for number in (800, 5000):
            print(f"results.csv from {number} records: {rebuild_seconds(folder / 'many', number):.2f} s")
    fine = "every record is there, every look found a valid table, every run had one process"
    print("\n".join(wrong) if wrong else fine)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    with one_line_errors():
        main()
