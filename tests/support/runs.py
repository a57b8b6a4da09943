"""Calls of the programs."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import clip
import train
from clip.preprocess import Preprocessing, test_transform
from common import UserError
from datasets import Item, Task
from experiment import Experiment
from methods import METHODS
from settings import Settings


class Killed(BaseException):
    """Stops a run where the operating system might."""


def call(main: Callable, *argv) -> tuple:
    """Call a `main` and return (exit code, result, stdout, stderr). The exit code of a run that is `Killed` is -9."""
    code, result, out, err = 0, None, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            result = main([str(word) for word in argv])
        except SystemExit as stop:
            code = stop.code
        except Killed:
            code = -9
    return code, result, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def killed_after(iteration: int):
    """Let the process of a run die after this many updates, counted over everything that it trains."""
    step, done = train._step, []

    def dying(*args):
        result = step(*args)
        done.append(None)
        if len(done) == iteration:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_step", dying)
        yield


def in_folder(folder: Path | str) -> tuple:
    """Return the flags of a run that writes everything into one folder."""
    return ("--results_dir", folder, "--save_path", f"{folder}/weights")


MEASURED = ("train_seconds", "eval_seconds", "search_seconds", "peak_memory_mb", "checkpoint_bytes", "finished_at")


def outcome(folder: Path | str, record: dict) -> dict:
    """Return all that a run `in_folder` leaves behind, bit for bit, except times and sizes."""
    run, files = Path(folder, record["run_id"]), ("curve.csv", "search.csv", "split.json")
    tensors = [load_file(path) for path in Path(folder, "weights").rglob("*.safetensors")]
    return {
        "record": {name: value for name, value in record.items() if name not in MEASURED},
        "files": {name: (run / name).read_text() for name in files if (run / name).exists()},
        "weights": [{name: tensor.numpy().tobytes() for name, tensor in file.items()} for file in tensors],
        "checkpoints": list(run.glob("*.pt")),
    }


def refused(call, before=()) -> str:
    """Return the error line of a call that must fail cleanly: without a record, and with no file left behind.

    Empty folders, locks and bytecode may be left. `before` names what was in the working folder.
    """
    code, record, _, err = call
    assert code == 2 and record is None
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err
    files = {path.parts[0] for path in Path(".").rglob("*") if path.is_file() and path.suffix not in (".lock", ".pyc")}
    assert files <= set(before) <= {path.name for path in Path(".").iterdir()}, "something was left behind, or lost"
    return lines[0]


def error_of(kind: type[UserError], function: Callable, *arguments, **options) -> str:
    """Return the message of the error of this kind that a function raises; it must be one line."""
    with pytest.raises(kind) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


NAMES = ("cat", "dog", "traffic_light")
TASK = Task("noise", NAMES, ("{}",), tuple(Item(str(i), i % 3) for i in range(4)), (), (), None)


def experiment_of(method: str, task: Task = TASK, model: clip.CLIP | None = None, **values) -> Experiment:
    """An Experiment on the tiny CLIP; `values` are common settings and hyperparameters of the method."""
    kind = METHODS[method].Hparams
    own = {name: values.pop(name) for name in [*values] if name in kind.__dataclass_fields__}
    settings = Settings(**{"method": method, "backbone": "tiny", "device": "cpu", "workers": 0, **values})
    hparams = kind(**own).settled(settings.shots, len(task.train))
    model = clip.load("tiny")[0] if model is None else model
    return Experiment(settings, hparams, task, model, test_transform(Preprocessing(32)), clip.weights_sha256(model))
