"""Several processes that share each step of a run do what one process does."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from support.runs import call, in_folder, outcome
from test_contracts import FIELDS, LOOPS, quick

import distributed
import launching
import main as entry
import train
from arguments import parse
from clip.model import VisionTransformer
from common import UserError
from datasets import DigitsTask
from experiment import Experiment
from records import PROJECT

FORK = multiprocessing.get_context("fork")


def in_processes(count: int, function, joins: bool = False) -> list:
    """Return what `function`, which may join them itself, returns in each of several processes, or what it raises."""
    pipes = [FORK.Pipe() for _ in range(count)]

    def child(number: int) -> None:
        os.environ |= launching.environment(pipes[number][1].recv(), number, count)
        del os.environ[distributed.LAUNCHED]
        try:
            with contextlib.nullcontext() if joins else distributed.joined():
                answer = function()
        except BaseException as error:
            answer = error
        pipes[number][1].send(answer)
        os._exit(0)  # nothing of pytest's

    children = [FORK.Process(target=child, args=(number,)) for number in range(count)]
    for process in children:
        process.start()
    store = launching.serve()  # only now: a fork may copy a lock that a thread of the store holds
    for here, _ in pipes:
        here.send(store.port)
    answers = []
    for (here, there), process in zip(pipes, children):
        assert here.poll(60), "a process hangs"
        answers.append(here.recv())
        process.join()
        here.close()
        there.close()
    return answers


@pytest.fixture
def trained(tmp_path, float64, monkeypatch):
    """Train in float64, in this process or in several: (curve, iterations, tensors, accuracy)."""
    embed = VisionTransformer.embed
    monkeypatch.setattr(VisionTransformer, "embed", lambda self, images: embed(self, images.double()))

    def run(*flags, dense: bool = False) -> tuple:
        config = parse([str(word) for word in (*flags, "--cache_dir", tmp_path / str(distributed.size()))])
        task = entry.read_data(config)
        hparams = config.hparams.settled(config.settings.shots, len(task.train))
        experiment = Experiment.load(config.settings, hparams, task)
        experiment.model.double()
        experiment.test_features()
        adaptation, batches = train.prepare(experiment)
        for p in adaptation.parameters.values():
            p.data = p.data.double()
        if dense:
            weight = experiment.model.visual.proj.requires_grad_()
            adaptation.scheduler = None
            adaptation.optimizer.add_param_group({"params": [weight], "dense": True})
            adaptation.parameters["visual.proj"] = weight
        fit = train.fit(experiment, adaptation, batches)
        accuracy = train.evaluate(experiment, adaptation)
        return fit.curve, fit.iterations, {n: p.detach().numpy() for n, p in adaptation.parameters.items()}, accuracy

    return run


def assert_same(one: tuple, of_several: list[tuple]) -> None:
    for several in of_several:
        assert isinstance(several, tuple), several
        assert several[1] == one[1] and several[3] == one[3]
        pd.testing.assert_frame_equal(pd.DataFrame(several[0]), pd.DataFrame(one[0]), rtol=1e-5)  # sums in float32
        assert several[2].keys() == one[2].keys()
        for name, tensor in several[2].items():
            assert abs(tensor - one[2][name]).max() < 1e-11, name
            assert (tensor == of_several[0][2][name]).all()


@pytest.mark.parametrize("method", LOOPS)
def test_two_and_three_processes_do_what_one_does_over_fifty_steps(trained, method):
    # 40 images in batches of 16, 16 and 8 (13 each if a smaller last one is left out), and 10 classes.
    flags = [*quick(method, 50), "--eval_every", 0]
    flags += ["--dropout", 0] if "dropout" in FIELDS[method] else []
    one = trained(*flags)
    assert one[1] in (48, 50)
    for count in (2, 3):
        assert_same(one, in_processes(count, lambda: trained(*flags)))


SO = ("--shots", 4, "--seed", 5, "--workers", 0, "--lr", 1e-3, "--density_ratio", 0.01, "--t", 3, "--min_area", 0.6)
LONG = ("--batch_size", 16, "--total_iters", 50, "--early_stop_loss", 0)
CASES = {
    "so": (2, *SO, *LONG),
    "dense gradients": (2, *SO, *LONG, "--no-sampled_gradients"),
    "a dense group": (2, *SO, *LONG),
    "text": (2, *SO, *LONG, "--encoder", "text"),
    "vision": (3, *SO, *LONG, "--encoder", "vision"),
    # 5 classes, and batches of 16 and 4 images.
    "fewer classes and images than processes": (6, *SO, *LONG, "--classes", "base"),
    "early stop": (2, *SO, "--batch_size", 16, "--total_iters", 200, "--early_stop_loss", 1.2),
    "bias": (2, "--method", "bias", *SO[:6], "--batch_size", 16, "--epochs", 8, "--min_area", 0.6),
}


@pytest.mark.parametrize("case", CASES)
def test_fifty_steps(trained, case):
    count, *flags = CASES[case]
    dense = case == "a dense group"
    one = trained(*flags, dense=dense)
    assert (one[1] < 200) if case == "early stop" else (one[1] in (24, 50))
    assert_same(one, in_processes(count, lambda: trained(*flags, dense=dense)))


def test_the_noise_of_dropout_differs_between_processes_but_not_the_weights(trained):
    flags = ("--method", "lora", *SO[:6], "--dropout", 0.5, "--total_iters", 6, "--early_stop_loss", 0)
    first, second = in_processes(2, lambda: trained(*flags))
    again, _ = in_processes(2, lambda: trained(*flags))
    assert all((p == second[2][name]).all() and (p == again[2][name]).all() for name, p in first[2].items())
    same_images = in_processes(2, lambda: _dropped(*flags))
    assert (same_images[0] != same_images[1]).any()


def _dropped(*flags) -> np.ndarray:
    """Return image features of a training step, of one image that all processes have."""
    config = parse([str(word) for word in flags])
    task = entry.read_data(config)
    experiment = Experiment.load(config.settings, config.hparams.settled(4, len(task.train)), task)
    experiment.model.double()
    adaptation = train.adapt(experiment)
    for branches in adaptation.branches:
        for B in branches.B.values():
            torch.nn.init.ones_(B)
    seen, image_features = [], adaptation.image_features
    adaptation.image_features = lambda images: [seen.append(image_features(images)), seen[-1]][1]
    train._step(experiment, adaptation, torch.ones(1, 3, 32, 32), torch.tensor([0]), 1)
    return seen[0].detach().numpy()


def test_a_change_of_one_bit_in_one_process_is_found_by_all(trained, monkeypatch):
    step = train._step

    def other(experiment, adaptation, *args):
        sums = step(experiment, adaptation, *args)
        if args[-1] == 2 and distributed.rank() == 1:
            weight = next(iter(adaptation.parameters.values())).data.view(-1)
            weight[7] = torch.nextafter(weight[7], torch.tensor(9.0).double())
        return sums

    monkeypatch.setattr(train, "_step", other)
    errors = in_processes(2, lambda: trained(*SO, "--batch_size", 16, "--total_iters", 3, "--early_stop_loss", 0))
    assert [type(error) for error in errors] == [distributed.ReplicasDiffer] * 2
    assert "visual" in str(errors[0]) or "transformer" in str(errors[0])


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_mistake_is_said_once(tmp_path, monkeypatch, capfd, everywhere):
    """A mistake that all processes meet, and one that only the second does."""

    def read(self, item):
        if everywhere or distributed.rank() == 1:
            raise UserError("an image is damaged; replace it")
        return original(self, item)

    original = DigitsTask.read
    monkeypatch.setattr(DigitsTask, "read", read)
    flags = (*SO, "--total_iters", 3, "--results_dir", tmp_path / "results", "--cache_dir", tmp_path / "cache")
    codes = [error.code for error in in_processes(2, lambda: entry.main([str(word) for word in flags]), joins=True)]
    _out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert lines == ["error: an image is damaged; replace it"] and "Traceback" not in err
    assert codes == ([2, 2] if everywhere else [distributed.PEER_GONE, 2])
    assert not list(tmp_path.rglob("result.json"))


def test_the_first_process_answers_for_all():
    def function():
        answers = [distributed.from_first(lambda: os.getpid()), distributed.largest(distributed.rank())]
        with pytest.raises(UserError, match="no such file"):
            distributed.from_first(lambda: (_ for _ in ()).throw(UserError("no such file")))
        return answers

    first, second = in_processes(2, function)
    assert first == second and first[1] == 1.0


def test_numbers_that_are_sampled_or_not_are_summed_whatever_their_size_and_layout():
    def function():
        rank = distributed.rank()
        sizes = {"small": (3, 2), "large": (600, 600), "none": (2,), "turned": (4, 5)}
        parameters = {name: torch.nn.Parameter(torch.zeros(size)) for name, size in sizes.items()}
        for name, p in parameters.items():
            p.grad = None if name == "none" else torch.full(p.shape, 1.0 + rank)
        parameters["turned"].grad = torch.arange(20.0).view(5, 4).T
        distributed.sum_gradients(torch.optim.SGD(parameters.values(), lr=1.0))
        return {name: None if p.grad is None else p.grad.numpy() for name, p in parameters.items()}

    for answer in in_processes(2, function):
        assert (answer["small"] == 3).all() and (answer["large"] == 3).all() and answer["none"] is None
        assert (answer["turned"] == 2 * torch.arange(20.0).view(5, 4).T.numpy()).all()


# --- the program


RUN = ("--shots", 4, "--workers", 0, "--batch_size", 16, "--position", "top1", "--density_ratio", 0.01, "--lr", 1e-3)
RUN = (*RUN, "--total_iters", 60, "--early_stop_loss", 0, "--save_every", 3)


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    """A run in two processes, with --force: its folder, its record and its output."""
    folder = tmp_path_factory.mktemp("in_two")
    flags = (*RUN, *in_folder(folder), "--cache_dir", folder / "cache", "--processes", 2, "--force")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entry, "read_data", entry.read_data.__wrapped__)
        code, record, _out, err = call(entry.main, *flags)
    assert code == 0, err
    return folder, record, flags


def test_main_starts_the_processes_and_returns_the_record(in_two, run_main, all_digits, tmp_path, capfd):
    folder, record, flags = in_two
    assert record["processes"] == 2
    code, one, _, _ = run_main(*RUN, *in_folder(tmp_path))
    assert code == 0 and one["processes"] == 1
    assert one["run_id"] == record["run_id"] and one["test_accuracy"] == record["test_accuracy"]
    curves = [pd.read_csv(next(path.rglob("curve.csv"))) for path in (folder, tmp_path)]
    pd.testing.assert_frame_equal(*curves, rtol=1e-3)
    code, again, _, _ = run_main(*flags[:-1])
    out = capfd.readouterr().out
    assert code == 0 and again == record and out.count("already done") == 1


def test_torchrun_does_the_same(in_two, tmp_path):
    folder, _record, flags = in_two
    flags = (*RUN, *in_folder(tmp_path), "--cache_dir", folder / "cache")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, PROJECT / "main.py", *map(str, flags)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("zero-shot accuracy") == 1
    curves = [next(path.rglob("curve.csv")).read_bytes() for path in (folder, tmp_path)]
    assert curves[0] == curves[1]


def _started(flags) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, PROJECT / "main.py", *map(str, flags)], stderr=subprocess.PIPE, text=True)


def _wait_for_checkpoint(folder: Path, process: subprocess.Popen, newer_than: set[Path]) -> set[Path]:
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        if found := {*folder.rglob("training-*.pt")} - newer_than:
            return found
        time.sleep(0.01)
    raise AssertionError("no checkpoint")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_that_is_terminated_and_then_loses_a_process_resumes(in_two, tmp_path):
    whole, record, _ = in_two
    flags = (*RUN, *in_folder(tmp_path), "--cache_dir", whole / "cache", "--processes", 2)
    process = _started(flags)
    seen = _wait_for_checkpoint(tmp_path, process, set())
    process.send_signal(signal.SIGTERM)
    err = process.communicate()[1]
    assert process.returncode == 143
    assert err.splitlines().count("terminated") <= 1 and "the same command resumes" in err and "Traceback" not in err

    process = _started(flags)
    _wait_for_checkpoint(tmp_path, process, seen)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    err = process.communicate()[1]
    assert process.returncode == 137
    assert "one of the processes was ended by signal 9" in err and "Traceback" not in err
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]

    process = _started(flags)
    assert "Traceback" not in process.communicate()[1] and process.returncode == 0
    ended = next(tmp_path.rglob("result.json")).parent
    assert (ended / "curve.csv").read_bytes() == next(whole.rglob("curve.csv")).read_bytes()
    assert outcome(tmp_path, {"run_id": ended.name})["weights"] == outcome(whole, record)["weights"]


def test_what_cannot_work_is_said_before_a_process_is_started(run_main, monkeypatch):
    monkeypatch.setattr(launching, "launch", lambda *_: pytest.fail("started"))
    assert run_main("--processes", 0)[0] == 2
    assert run_main("--processes", 2, "--lr", -1)[0] == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    code, _, _, err = run_main("--processes", 2, "--device", "cuda")
    assert code == 2 and "this machine has 1" in err
    code, _, _, err = run_main("--processes", 2, "--device", "cuda:0")
    assert code == 2 and "--device cuda:0" in err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="torchrun"):
        parse(["--processes", "2", "--device", "cpu"])
