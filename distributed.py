"""Several processes that share each step of one run, one a GPU (or one a part of the CPU's cores).

Each process takes every W-th image of a batch and the prompts of every W-th class, and all do the same update:

- the text features of the own classes are gathered (`rows_of_all`), and the backward pass of that sums their gradient
  over the processes;
- the loss of the own images is weighted with their share of the batch, so that the processes' losses add up to that of
  one process;
- gradients are summed over the processes before the optimizer's step (`sum_gradients`). SO needs k numbers a tensor.

The sum is that of one process up to rounding: nothing is averaged, and W divides nothing. What follows from the sum is
computed in every process, from equal bits; `check_replicas` makes sure that it stays so. The first process alone reads
and writes files (`from_first`).

Processes are started by launching.py (main.py --processes W) or by torchrun, whose environment variables both use. In
one process all functions here return what they are given. GPUs use NCCL, CPUs gloo; tested with gloo alone.
"""

import contextlib
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
PEER_GONE = 75  # exit code of a process that stopped because another one did
LAUNCHED = "LAUNCHED_BY_MAIN"  # environment variable of the processes that `launching.launch` starts
FOREVER = timedelta(days=7)  # the others wait as long as the first does, for a lock or an evaluation
SMALL = 2**18  # entries up to which a tensor is summed together with others

_store: dist.Store | None = None


class PeerGone(Exception):
    """Another process of this run has ended; it said why."""


class ReplicasDiffer(RuntimeError):
    """The processes no longer have the same weights."""


def is_member() -> bool:
    """Return whether this process was started as one of several, with torchrun's environment variables."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    return rank() == 0


def own_gpu() -> int:
    """Return the number of this process's GPU. A cluster may show each process its own GPU alone."""
    return int(os.environ["LOCAL_RANK"]) % max(1, torch.cuda.device_count())


def local_size() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size())) if size() > 1 else 1


# --- who joins, and who speaks


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Be one of several processes if this one was started so. What ends all of them is said by one alone, and only the
    first prints anything else."""
    if not is_member() or dist.is_initialized():
        yield
        return
    _join()
    try:
        yield
    except PeerGone as gone:
        if _is_first_to_say():  # the others run: what failed is the exchange itself
            print(f"error: processes cannot exchange data: {gone.__cause__}", file=sys.__stderr__)
        sys.exit(PEER_GONE)
    except BaseException:
        sys.stderr = sys.__stderr__ if _is_first_to_say() else open(os.devnull, "w")  # noqa: SIM115, until the end
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # who launched may send it while this process leaves
    dist.destroy_process_group()


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """End one of several processes here: when Python tidies up, threads of gloo sometimes abort it."""
    if not is_member():
        yield
        return
    code: object = 0
    try:
        yield
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else 0)


def _join() -> None:
    global _store
    if int(os.environ["RANK"]) > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # it holds no lock and writes no file
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, until the end
    if LAUNCHED in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: do not outlive a launcher that is killed
    if torch.cuda.is_available():
        torch.cuda.set_device(own_gpu())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    _store, number, count = next(dist.rendezvous("env://"))
    _store.set_timeout(FOREVER)
    group = dist.PrefixStore("group", _store)
    dist.init_process_group(backend, store=group, rank=number, world_size=count, timeout=FOREVER)


def _is_first_to_say() -> bool:
    try:
        return _store.add("said", 1) == 1
    except RuntimeError:  # the process that keeps the store is gone
        return False


@contextlib.contextmanager
def said_by_launcher() -> Iterator[None]:
    """Print nothing on stderr where the process that started this one has printed it already."""
    with contextlib.ExitStack() as stack:
        if LAUNCHED in os.environ:
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        yield


def _checked(collective: Callable[..., Any], *args: Any, **options: Any) -> Any:
    try:
        return collective(*args, **options)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PeerGone from error


# --- what is shared


def mine(number: int, at_once: int = 1) -> list[int]:
    """Return which of 0, 1, ..., number - 1 are this process's: every W-th group of `at_once`."""
    return [place for place in range(number) if place // at_once % size() == rank()]


def mine_or_one(number: int, at_once: int = 1) -> list[int]:
    """Return `mine`, or [0] where that is nothing: all processes compute the same things, and what comes of a place
    that is not a process's own does not count."""
    return mine(number, at_once) or [0]


def rows_of_all(own: Tensor, number: int, at_once: int = 1) -> Tensor:
    """Return [number, ...] from each process's rows, those of `mine_or_one`; differentiable. The gradient of a row is
    summed over the processes."""
    if size() == 1:
        return own
    places = torch.tensor(mine(number, at_once), dtype=torch.int64, device=own.device)
    return _Summed.apply(own.new_zeros(number, *own.shape[1:]).index_copy(0, places, own[: len(places)]))


class _Summed(torch.autograd.Function):
    """The sum over the processes, of a tensor and of its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return total(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return total(grad)


def total(x: Tensor) -> Tensor:
    """Return the sum over the processes."""
    if size() == 1:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    _checked(dist.all_reduce, x)
    return x


def largest(x: float) -> float:
    """Return the largest of the processes' numbers."""
    if size() == 1:
        return x
    of_all = torch.tensor(x, dtype=torch.float64)
    _checked(dist.all_reduce, of_all, op=dist.ReduceOp.MAX)
    return of_all.item()


@torch.no_grad()
def sum_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Sum over the processes what the coming step reads: the parameters' gradients, or what the optimizer's own
    `own_gradients` returns."""
    if size() == 1:
        return
    if hasattr(optimizer, "own_gradients"):
        gradients = optimizer.own_gradients()
    else:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    together: dict[tuple, list[Tensor]] = {}
    for gradient in gradients:
        if gradient.numel() > SMALL and gradient.is_contiguous():
            _checked(dist.all_reduce, gradient)
        else:
            together.setdefault((gradient.dtype, gradient.device), []).append(gradient)
    for several in together.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in several])
        _checked(dist.all_reduce, flat)
        for gradient, part in zip(several, flat.split([gradient.numel() for gradient in several])):
            gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def check_replicas(tensors: dict[str, Tensor]) -> None:
    """Raise ReplicasDiffer, in all processes, if these tensors are not the same in all of them, to the bit."""
    if size() == 1 or not tensors:
        return
    sums = torch.stack([_bits(t).sum(dtype=torch.int64) for t in tensors.values()])
    extremes = torch.cat([sums, -sums])
    _checked(dist.all_reduce, extremes, op=dist.ReduceOp.MAX)
    differs = extremes[: len(sums)] != -extremes[len(sums) :]
    if differs.any():
        names = [name for name, one in zip(tensors, differs.tolist()) if one]
        raise ReplicasDiffer(
            f"the processes no longer have the same weights ({len(names)} tensors, the first is {names[0]}): either "
            "their machines compute differently, or a method draws random numbers that differ between processes"
        )


def _bits(x: Tensor) -> Tensor:
    """Return a tensor's bits as whole numbers [n]."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.detach().contiguous().view(-1).view(kinds[x.element_size()])


def from_first(function: Callable[[], T]) -> T:
    """Let the first process alone call `function`; all return what it returned, or raise what it raised. Both must be
    possible to pickle."""
    if size() == 1:
        return function()
    answer: list[Any] = [None]
    if is_first():
        try:
            answer = [(True, function())]
        except Exception as error:
            answer = [(False, error)]
    _checked(dist.broadcast_object_list, answer, src=0)
    succeeded, value = answer[0]
    if not succeeded:
        raise value
    return value


def of_first(value: T) -> T:
    """Return the first process's value."""
    return from_first(lambda: value)


@contextlib.contextmanager
def held_by_first(manager: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Enter a context manager in the first process alone; what it raises is raised in all."""
    with contextlib.ExitStack() as stack:
        from_first(lambda: stack.enter_context(manager()) and None)
        yield
