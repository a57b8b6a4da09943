import signal

import pytest
import torch
from support.fabricate import few_imagenet_classes  # noqa: F401, a fixture
from support.server import data_root, run_download, world  # noqa: F401, fixtures of test_download*.py

import main as entry

# Ctrl-C is tested. A shell that starts pytest in the background has it ignored, here and in all that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests' models are tiny: a second thread gains nothing on them, and costs much when cores are shared.
torch.set_num_threads(1)


@pytest.fixture
def run_main(tmp_path, tmp_path_factory, monkeypatch, capsys):
    """Calls `main` in an empty folder and returns (exit code, record, stdout, stderr).

    Features are cached in another empty folder, the same for all calls of a test.
    """
    monkeypatch.chdir(tmp_path)
    cache = tmp_path_factory.mktemp("cache")

    def call(*argv):
        record, code = None, 0
        try:
            record = entry.main([str(word) for word in ("--cache_dir", cache, *argv)])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, record, out, err

    return call
