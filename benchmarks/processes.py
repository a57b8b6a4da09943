"""A training step shared by processes beside the same step in one, on the CPU.

    python -m benchmarks.processes                          # ViT-B/16, 47 classes, 4 images, 2 processes of one thread
    python -m benchmarks.processes --classes 200 --processes 4

One process has as many threads as the others together. Both sides do SO's step at density 5e-5 on the same batches, in
turns; weights are random and images noise. Printed are the shortest step of each side, their ratio, the difference of
the first losses, and what each process gives to the collectives in a step.
"""

import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import distributed
import launching
from benchmarks.step import ARCHITECTURES, class_names
from clip.model import CLIP
from common import Parser, one_line_errors
from methods.choice import Blocks, select_matrices
from optimizers import SO, attach


class Side:
    """A model and what its step needs. `shared`: this process does its part of the step, else all of it."""

    def __init__(self, args: Namespace, shared: bool):
        torch.manual_seed(0)
        self.model, self.shared = CLIP(ARCHITECTURES[args.backbone]), shared
        self.optimizer = SO(select_matrices(self.model, Blocks()).values(), density_ratio=5e-5, T=5)
        attach(self.model, self.optimizer)
        names = class_names(args.classes)
        pixels = self.model.arch.resolution
        images, labels = torch.randn(args.batch_size, 3, pixels, pixels), torch.arange(args.batch_size) % len(names)
        own = distributed.mine_or_one(len(images)) if shared else list(range(len(images)))
        self.images, self.labels, self.share = images[own], labels[own], len(own) / len(images)
        classes = distributed.mine_or_one(len(names)) if shared else range(len(names))
        tokens = self.model.tokenize([f"a photo of a {names[label]}." for label in classes])
        self.prompts, self.classes = self.model.prompts(tokens), len(names)

    def step(self) -> float:
        """Do a step and return its loss."""
        images = F.normalize(self.model.encode_image(self.images), dim=-1)
        text = F.normalize(self.model.encode_text(self.prompts), dim=-1)
        text = distributed.rows_of_all(text, self.classes) if self.shared else text
        loss = self.share * F.cross_entropy(100 * images @ text.T, self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        if self.shared:
            distributed.sum_gradients(self.optimizer)
        self.optimizer.step()
        return (distributed.total(loss.detach()) if self.shared else loss).item()


def timed(side: Side, threads: int) -> tuple[float, float]:
    """Return the loss of a step and its seconds."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    return side.step(), time.perf_counter() - start


def compare(args: Namespace) -> None:
    """Do steps of both sides in turns: all processes together, then the first alone. Print the result."""
    count, given = distributed.size(), []
    shared = Side(args, shared=True)
    alone = Side(args, shared=False) if distributed.is_first() else None
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda x, **options: (given.append(x.numel() * x.element_size()), all_reduce(x, **options))[1]
    losses, seconds = {"shared": [], "alone": []}, {"shared": [], "alone": []}
    for _ in range(args.steps):
        for name, side, threads in (("shared", shared, 1), ("alone", alone, count)):
            distributed.of_first(None)  # the others wait here, asleep
            if side is not None:
                loss, took = timed(side, threads)
                losses[name].append(loss)
                seconds[name].append(took)
    if not distributed.is_first():
        return
    best = {name: min(times[1:]) for name, times in seconds.items()}
    print(f"{args.backbone}, {args.classes} classes, {args.batch_size} images, fp32, the shortest of {args.steps - 1}")
    print(f"1 process, {count} threads: {best['alone']:.3f} s; {count} processes, 1 thread: {best['shared']:.3f} s")
    apart = abs(losses["shared"][0] - losses["alone"][0])
    print(f"ratio {best['shared'] / best['alone']:.2f}; the first losses differ by {apart:.1e}")
    print(f"{sum(given) // args.steps:,} bytes a step to the collectives, of each process")


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="benchmarks.processes", description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", choices=ARCHITECTURES, default="ViT-B/16")
    parser.add_argument("--classes", type=int, default=47)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    with one_line_errors(), distributed.joined():
        args = parser.parse_args(argv)
        if distributed.is_member():
            compare(args)
            return
        os.environ["OMP_NUM_THREADS"] = str(args.processes)  # of the process that is alone
        os.chdir(Path(__file__).parent.parent)
        sys.exit(launching.launch(args.processes, [sys.executable, "-m", "benchmarks.processes", *argv]))


if __name__ == "__main__":
    with distributed.leaving_at_once():
        main()
