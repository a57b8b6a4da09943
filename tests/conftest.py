import pytest

import main as entry


@pytest.fixture
def run_main(tmp_path, monkeypatch, capsys):
    """Calls `main` in an empty folder and returns (exit code, record, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        record, code = None, 0
        try:
            record = entry.main([str(word) for word in argv])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, record, out, err

    return call
