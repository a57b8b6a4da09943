"""The jobs that do the runs of a sweep: submitit's, on this machine or on a slurm cluster."""

import contextlib
import getpass
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import cloudpickle
import submitit
import torch
from submitit.core.utils import DelayedSubmission, FailedJobError, JobPaths

from common import UserError, counted
from records import PROJECT
from scripts.sweeping.grid import Cell

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # jobs do not find this module: they start elsewhere
MAIN = PROJECT / "main.py"
TERMINATED = 128 + signal.SIGTERM  # exit code of a main.py that was stopped and kept its checkpoint


class RunJob:
    """The job of a run: `python main.py` in a process of its own, whose exit code is the job's result.

    It is a separate process because main.py and submitit use the same signals differently. Slurm announces the time
    limit and preemptions with SIGUSR2; submitit then calls `checkpoint` and puts the job back into the queue. That
    signal would kill main.py, so main.py is sent SIGTERM instead, which submitit ignores. The process has its own
    process group, which a terminal's Ctrl-C does not reach.
    """

    def __init__(self, key: str, words: Sequence[str]):
        self.key, self.words = key, tuple(words)
        self.process: int | None = None

    def __call__(self) -> int:
        command = [sys.executable, str(MAIN), *self.words]
        print(shlex.join(command), flush=True)
        on_slurm = os.environ["SUBMITIT_EXECUTOR"] == "slurm"  # where SIGTERM goes to all processes of a job
        if not on_slurm:
            signal.signal(signal.SIGTERM, self._stop)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        self.process = os.posix_spawn(command[0], command, os.environ, setpgroup=0, setsigmask=[signal.SIGUSR2])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        self.process = None
        if on_slurm and code in (TERMINATED, -signal.SIGTERM):
            # Cancelled, preempted or requeued: there is no result, and slurm will end this process as well.
            time.sleep(600)
        return code

    def _stop(self, *_) -> None:
        """Pass SIGTERM on to main.py, once. On this machine it is how a sweep stops its jobs."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.process is None:
            sys.exit(TERMINATED)
        os.kill(self.process, signal.SIGTERM)

    def checkpoint(self) -> DelayedSubmission:
        """Stop main.py and return the job that goes back into the queue: the same run, which resumes."""
        if self.process is not None:
            os.kill(self.process, signal.SIGTERM)
            os.waitpid(self.process, 0)
            self.process = None
        return DelayedSubmission(self)


class Cluster:
    """Jobs of submitit, with their logs and other files in a folder.

    Its two kinds start jobs for the first of the waiting runs, as many as there is room for, and remove these runs from
    the list (`start`), return the jobs that are over (`_over`), count those that have begun (`running`), and leave all
    so that the same sweep can be started again (`stop`).
    """

    poll_seconds: float

    def __init__(self, folder: Path, gpus_per_run: int):
        self.folder = folder
        self.gpus_per_run = gpus_per_run
        self.jobs: dict[submitit.Job, Cell] = {}

    def _job(self, cell: Cell) -> RunJob:
        """Return the job of a run. Where several GPUs share it, main.py starts a process for each."""
        several = ("--processes", str(self.gpus_per_run)) if self.gpus_per_run > 1 else ()
        return RunJob(cell.key, (*cell.words, *several))

    def ended(self) -> list[tuple[Cell, int | None, Path]]:
        """Return what has ended since the last call: the run, main.py's exit code (None if the job ended without one)
        and the log. Of submitit's files only the log is kept."""
        ended = []
        for job in self._over():
            code = None
            with contextlib.suppress(FailedJobError):  # RunJob itself failed
                code = job.result() if job.paths.result_pickle.exists() else None
            ended.append((self.jobs.pop(job), code, job.paths.stdout))
            job.paths.submitted_pickle.unlink(missing_ok=True)
            job.paths.result_pickle.unlink(missing_ok=True)
            folder = job.paths.folder  # that of the sweep that started it
            if not any(folder.glob("*_submitted.pkl")):  # no other job needs the rest
                for path in (*folder.glob("*_submission.sh"), *folder.glob(".submission_file_*")):
                    path.unlink(missing_ok=True)
        return ended


class Local(Cluster):
    """A number of runs at a time on this machine. Each run sees the same number of GPUs, assigned in turn."""

    poll_seconds = 0.2

    def __init__(self, folder: Path, workers: int | None, gpus_per_run: int, cells: Sequence[Cell]):
        super().__init__(folder, gpus_per_run)
        devices = {cell.settings.device for cell in cells}
        if any(":" in device for device in devices):
            raise UserError("--device: a sweep assigns the GPUs; leave the number out, and set CUDA_VISIBLE_DEVICES")
        gpus = _gpus() if "cuda" in devices else []
        groups = [gpus[first : first + gpus_per_run] for first in range(0, len(gpus) - gpus_per_run + 1, gpus_per_run)]
        if gpus_per_run > 1 and not groups:
            raise UserError(f"--gpus_per_run {gpus_per_run}: there are {len(gpus)} GPUs here for these runs; lower it")
        workers = workers or max(len(groups), 1)
        self.gpus = [groups[place % len(groups)] if groups else [] for place in range(workers)]
        self.places: dict[submitit.Job, int] = {}

    def start(self, waiting: list[Cell]) -> None:
        free = set(range(len(self.gpus))) - {self.places[job] for job in self.jobs}
        for place, cell in zip(sorted(free), [*waiting]):
            executor = submitit.LocalExecutor(self.folder)
            executor.update_parameters(timeout_min=10**7, stderr_to_stdout=True)  # never
            if cell.settings.device == "cuda":
                executor.update_parameters(gpus_per_node=self.gpus_per_run, visible_gpus=self.gpus[place])
            # The job inherits this mask: only the sweep gets Ctrl-C, and then sends SIGTERM.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                job = executor.submit(self._job(cell))
                self.jobs[job], self.places[job] = cell, place
                waiting.remove(cell)
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def _over(self) -> list[submitit.Job]:
        return [job for job in self.jobs if job.done()]

    def running(self) -> int:
        return len(self.jobs)

    def stop(self) -> None:
        print(f"stopping {counted(len(self.jobs), 'run')}; the same command continues", file=sys.stderr)
        while self.jobs:
            for job in self.jobs:
                os.kill(int(job.job_id), signal.SIGTERM)  # repeatedly: the job may just be starting
            time.sleep(self.poll_seconds)
            self.ended()


def _gpus() -> list[int]:
    """Return the numbers of this machine's GPUs that CUDA_VISIBLE_DEVICES allows."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(range(torch.cuda.device_count()))
    try:
        return [int(number) for number in visible.split(",")][: torch.cuda.device_count()]
    except ValueError:
        raise UserError(f"CUDA_VISIBLE_DEVICES={visible} must hold numbers: a sweep assigns them to its runs") from None


class Slurm(Cluster):
    """Job arrays. Jobs continue without the sweep; a later one finds those that slurm still has."""

    poll_seconds = 5.0
    MOST = 1000  # jobs in an array, slurm's default
    LATE_SECONDS = 60.0  # after the end of a job its result may be invisible for so long on a shared file system

    def __init__(self, folder: Path, parameters: dict, timeouts: int, gpus_per_run: int, cells: Iterable[Cell]):
        super().__init__(folder, gpus_per_run)
        self.queue: dict[str, str] = {}
        self.gone_since: dict[submitit.Job, float] = {}
        try:
            self.executor = submitit.SlurmExecutor(folder, max_num_timeout=timeouts)
            self.executor.update_parameters(**parameters)
        except RuntimeError:
            raise UserError("--cluster slurm: there is no srun; start the sweep on a machine of the cluster") from None
        except ValueError as error:
            raise UserError(f"--slurm: {str(error).splitlines()[0]}; see submitit's SlurmExecutor") from None
        of_key = {cell.key: cell for cell in cells}
        if not self._look():
            raise UserError("slurm does not answer squeue; start the sweep again when it does")
        for number, other in itertools.product(self.queue, folder.parent.glob("*/")):  # jobs of earlier sweeps
            path = JobPaths(other, number).submitted_pickle
            if path.exists() and (cell := of_key.get(DelayedSubmission.load(path).function.key)):
                self.jobs[submitit.SlurmJob(other, number)] = cell

    def start(self, waiting: list[Cell]) -> None:
        while waiting:
            part = waiting[: self.MOST]
            try:
                jobs = self.executor.submit_array([self._job(cell) for cell in part])
            except FailedJobError as error:
                if not self.jobs:
                    shutil.rmtree(self.folder)
                raise UserError(f"slurm rejects the jobs: {' '.join(str(error).split())}") from None
            self.jobs |= dict(zip(jobs, part))
            del waiting[: self.MOST]

    def _over(self) -> list[submitit.Job]:
        now = time.monotonic()
        if self._look():
            self.gone_since = {job: self.gone_since.get(job, now) for job in self.jobs if job.job_id not in self.queue}
        late = {job for job, since in self.gone_since.items() if now - since > self.LATE_SECONDS}
        return [job for job in self.jobs if job in late or job.paths.result_pickle.exists()]

    def _look(self) -> bool:
        """Ask slurm for the state of each of this user's jobs. Return whether it answers."""
        command = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format", "%i %T"]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode == 0:
            self.queue = dict(line.split() for line in answer.stdout.splitlines())
        return answer.returncode == 0

    def stop(self) -> None:
        print(
            f"{len(self.jobs)} jobs stay in slurm's queue: the same command watches them again, and scancel ends them: "
            f"{' '.join(sorted({job.job_id.partition('_')[0] for job in self.jobs}))}",
            file=sys.stderr,
        )

    def running(self) -> int:
        return sum(self.queue.get(job.job_id) == "RUNNING" for job in self.jobs)
