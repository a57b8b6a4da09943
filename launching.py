"""Starts several processes that share a run on this machine, and ends them together. What they do: distributed.py."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

import distributed
from common import UserError, note

GRACE, LAST_GRACE = 5.0, 25.0  # seconds to end in order, before SIGTERM and before SIGKILL
POLL = 0.05  # seconds


def serve() -> dist.TCPStore:
    """Return the store where processes that get `environment` of its port find each other."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def environment(port: int, number: int, count: int) -> dict[str, str]:
    """Return torchrun's environment variables for one of several processes on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is the launcher's
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),  # no C++ traces when a process is gone
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // count))),
        distributed.LAUNCHED: "1",
    }


def launch(count: int, command: Sequence[str]) -> int:
    """Run a command in `count` processes on this machine, and return the exit code: 0, or that of the process that
    failed.

    SIGTERM and Ctrl-C are passed on. When one process ends badly, the others are ended.
    """
    store = serve()
    # Sessions of their own, or a terminal's Ctrl-C would reach them twice.
    processes = [
        subprocess.Popen(command, env=os.environ | environment(store.port, number, count), start_new_session=True)
        for number in range(count)
    ]
    received: list[int] = []

    def pass_on(number: int, _: object) -> None:
        received.append(number)
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        codes = _wait(processes, received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return _exit_code(codes, received)


def _wait(processes: Sequence[subprocess.Popen], received: Sequence[int]) -> list[int]:
    """Wait for the end of all processes; end the others when one has failed. Return the exit codes of those that ended
    by themselves."""
    bad_since, terminated, codes = None, False, []
    while any(process.poll() is None for process in processes):
        if bad_since is None and (received or any(process.poll() for process in processes)):
            bad_since = time.monotonic()
        late = 0.0 if bad_since is None else time.monotonic() - bad_since
        for process in processes:
            if late > GRACE + LAST_GRACE:
                process.kill()
            elif late > GRACE and not terminated:
                codes = codes or [other.poll() for other in processes if other.poll() is not None]
                process.terminate()
        terminated |= late > GRACE
        time.sleep(POLL)
    return codes or [process.returncode for process in processes]


def _exit_code(codes: Sequence[int], received: Sequence[int]) -> int:
    if received:
        return 128 + received[0]
    spoken = [code for code in codes if code not in (0, distributed.PEER_GONE, -signal.SIGTERM)]
    if not spoken:
        return max(map(abs, codes))
    code = min(spoken)  # a signal before all others: it is why they ended
    if code < 0:
        note(f"one of the processes was ended by signal {-code}; the same command resumes")
    return code if code > 0 else 128 - code


def check(processes: int, device: str) -> None:
    """Raise UserError unless this many processes can share the run: `processes` and `device` as the user gave them."""
    if distributed.is_member() and processes not in (1, int(os.environ["WORLD_SIZE"])):
        raise UserError(
            f"--processes {processes}: torchrun has started {os.environ['WORLD_SIZE']} processes; leave --processes out"
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])) if distributed.is_member() else processes
    if here == 1 or device == "cpu" or not torch.cuda.is_available():
        return
    if ":" in device:
        raise UserError(
            f"--device {device} is one GPU, and each of {here} processes needs its own; write --device cuda"
        )
    one_each = distributed.is_member() and distributed.LAUNCHED not in os.environ and torch.cuda.device_count() == 1
    if here > torch.cuda.device_count() and not one_each:
        raise UserError(
            f"{here} processes need as many GPUs, and this machine has {torch.cuda.device_count()}; use fewer processes"
        )
