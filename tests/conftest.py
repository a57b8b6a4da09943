import dataclasses
import functools
import signal

import pytest
import torch
from support.fabricate import few_imagenet_classes  # noqa: F401, a fixture
from support.runs import call
from support.server import data_root, run_download, server, world  # noqa: F401, fixtures

import main as entry

# Ctrl-C is tested. A shell that starts pytest in the background has it ignored, here and in all that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests' models are tiny: a second thread gains nothing on them, and costs much when cores are shared.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def feature_cache(tmp_path_factory):
    """A folder for the features of test images, the same for all runs of a session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session", autouse=True)
def thin_digits():
    """Give `main` only 42 of the digits' 540 test images: nothing in a short run takes as long as these."""
    read_data = entry.read_data

    @functools.wraps(read_data)
    def thin(config):
        task = read_data(config)
        return dataclasses.replace(task, test=task.test[::13]) if task.name == "digits" else task

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entry, "read_data", thin)
        yield


@pytest.fixture
def all_digits(monkeypatch):
    """Let `main` test on all of the digits, as in another process."""
    monkeypatch.setattr(entry, "read_data", entry.read_data.__wrapped__)


@pytest.fixture
def run_main(tmp_path, feature_cache, monkeypatch):
    """Call `main` in an empty folder, without worker processes. See `call` for what it returns."""
    monkeypatch.chdir(tmp_path)
    return lambda *argv: call(entry.main, "--cache_dir", feature_cache, "--workers", 0, *argv)


@pytest.fixture
def float64(monkeypatch):
    """Features keep the type of the model, which is float64 here."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
