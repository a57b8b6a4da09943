"""Everything to measure on a GPU at first, in about an hour: one command, one page.

    python -m benchmarks.gpu --out gpu.md                # steps, launches, waiting, whether runs repeat
    python -m benchmarks.gpu --out gpu.md --tests        # also the whole test suite

Steps: ViT-B/16 with random weights and 32 images, for SO, LoRA and the plain dense computation. A block of steps is
timed without waiting for the GPU in between, and the better of three blocks counts. Each side has a process of its own,
so that its peak of memory is its own. Launches are kernels by torch's profiler in a step without a draw; "waits" says
whether such a step makes the host wait for the GPU. Features: a test pass beside its matrix products. Runs: each method
twice on the digits; their curves must be equal, to the byte. Not run on a GPU yet.
"""

import json
import platform
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import torch

from benchmarks.step import Side, side
from common import Parser, UserError, one_line_errors, progress, write_atomically
from methods import METHODS
from records import PROJECT, git_commit
from run_utils import make_reproducible, use_device

COLUMNS = ("side", "classes", "precision", "ms a step", "peak MB", "launches", "waits")
# The plain computation pads prompts, and with 1000 of them needs 45 GB in float32.
CASES = [("plain", 47, "fp32")]
CASES += [(name, classes, kind) for classes in (47, 1000) for kind in ("fp32", "bf16") for name in ("fast", "lora")]
DRAWS_EVERY = 5  # SO's T in benchmarks.step
BLOCK = 4 * DRAWS_EVERY


def measured(name: str, classes: int, precision: str, device: str) -> dict:
    """Return the row of one side, measured in this process."""
    make_reproducible(0)
    use_device(device)
    own = side(name, Namespace(backbone="ViT-B/16", batch_size=32, classes=classes, precision=precision, device=device))
    before = torch.cuda.max_memory_allocated()
    seconds = min(_block(own) for _ in range(3))  # the first one warms up
    row = {"side": name, "classes": classes, "precision": precision, "ms a step": round(1e3 * seconds, 1)}
    row["peak MB"] = round((torch.cuda.max_memory_allocated() - before) / 1e6)
    own.update()  # the next one has no draw: blocks are whole multiples of the steps between two
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        own.update()
        torch.cuda.synchronize()
    row["launches"] = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    return row | {"waits": _waits(own)}


def _block(own: Side) -> float:
    """Return the seconds of a step, over a block of them."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(BLOCK):
        own.update()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / BLOCK


def _waits(own: Side) -> str:
    torch.cuda.set_sync_debug_mode("error")
    try:
        own.update()
    except RuntimeError as error:
        return f"yes ({str(error).splitlines()[0]})"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no"


def repeated(method: str, device: str, folder: Path) -> str:
    """Return what became of two short runs of a method."""
    command = [sys.executable, PROJECT / "main.py", "--method", method, "--shots", "2", "--device", device]
    loops = {"total_iters", "epochs"} & set(METHODS[method].Hparams.__dataclass_fields__)
    length = ["--epochs", "2"] if loops and METHODS[method].Hparams.__dataclass_fields__["epochs"].default else []
    length = length or (["--total_iters", "8"] if loops else [])
    command += ["--backbone", "tiny", *length, "--cache_dir", folder / "cache"]
    contents = []
    for number in ("1", "2"):
        out = folder / f"{method}{number}"
        done = subprocess.run([*command, "--results_dir", out], capture_output=True, text=True)
        if done.returncode:
            return f"failed: {done.stderr.strip().splitlines()[-1]}"
        contents.append([path.read_bytes() for path in (*out.glob("*/curve.csv"), *out.glob("*/predictions.csv"))])
    return "equal" if contents[0] == contents[1] else "**different**"


def page(device: str, tests: bool) -> Iterator[str]:
    """Yield the page's lines, as they are measured."""
    name, commit, torch_version = torch.cuda.get_device_name(device), git_commit(), torch.__version__
    yield f"# {name}, {date.today()}\n\ntorch {torch_version}, Python {platform.python_version()}, commit {commit}\n"
    yield "| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS)
    for case in progress(CASES, "steps", "side"):
        words = [sys.executable, "-m", "benchmarks.gpu", "--device", device, "--one", *map(str, case)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=PROJECT)
        ended = done.stderr.strip().splitlines()[-1:] or ["no output"]
        row = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else dict(zip(COLUMNS, (*case, *ended)))
        yield "| " + " | ".join(str(row.get(column, "")) for column in COLUMNS) + " |"
    yield "\nImage features, ViT-B/16:\n"
    for precision in ("fp32", "bf16"):
        words = [sys.executable, "-m", "benchmarks.features", "--device", device, "--precision", precision]
        done = subprocess.run([*words, "--batch_size", "256"], capture_output=True, text=True, cwd=PROJECT)
        yield "- " + "; ".join((done.stdout or done.stderr).strip().splitlines())
    yield "\nTwo runs of each method on the digits:\n"
    with tempfile.TemporaryDirectory() as folder:
        for method in progress(METHODS, "runs", "method"):
            yield f"- {method}: {repeated(method, device, Path(folder))}"
    if tests:
        done = subprocess.run([sys.executable, "-m", "pytest", "-q"], capture_output=True, text=True, cwd=PROJECT)
        yield f"\nTests: {done.stdout.strip().splitlines()[-1]}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="FILE.md", default="gpu.md", help="the page [gpu.md]")
    parser.add_argument("--device", default="cuda:0", help="[cuda:0]")
    parser.add_argument("--tests", action="store_true", help="also run the tests")
    parser.add_argument("--one", nargs=3, metavar=("SIDE", "CLASSES", "PRECISION"), help="print one row as JSON")
    with one_line_errors():
        args = parser.parse_args(argv)
        if not torch.cuda.is_available():
            raise UserError("benchmarks.gpu needs a GPU, and torch finds none; the other benchmarks run on a CPU")
        if args.one:
            name, classes, precision = args.one
            print(json.dumps(measured(name, int(classes), precision, args.device)))
            return
        lines = []
        for line in page(args.device, args.tests):
            lines.append(line)
            write_atomically(args.out, "\n".join(lines) + "\n")
        print(f"written: {args.out}")


if __name__ == "__main__":
    main()
