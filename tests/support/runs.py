"""Calls of the program."""

from pathlib import Path


def refused(call, before=()):
    """The error line of a call that must fail cleanly."""
    code, record, _, err = call
    assert code == 2 and record is None
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err
    assert sorted(p.name for p in Path(".").iterdir()) == sorted(before), "something was left behind"
    return lines[0]
