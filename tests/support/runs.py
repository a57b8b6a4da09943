"""Calls of the program."""

from pathlib import Path

import clip
from clip.preprocess import test_transform
from datasets import Item, Task
from experiment import Experiment
from methods import METHODS
from settings import Settings


def refused(call, before=()):
    """The error line of a call that must fail cleanly."""
    code, record, _, err = call
    assert code == 2 and record is None
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err
    assert sorted(p.name for p in Path(".").iterdir()) == sorted(before), "something was left behind"
    return lines[0]


NAMES = ("cat", "dog", "traffic_light")
TASK = Task("noise", NAMES, ("{}",), tuple(Item(str(i), i % 3) for i in range(4)), (), (), None)


def experiment_of(method: str, task: Task = TASK, model: clip.CLIP | None = None, **values) -> Experiment:
    """An Experiment on the tiny CLIP; `values` are common settings and hyperparameters of the method."""
    kind = METHODS[method].Hparams
    own = {name: values.pop(name) for name in [*values] if name in kind.__dataclass_fields__}
    settings = Settings(**{"method": method, "backbone": "tiny", "device": "cpu", "workers": 0, **values})
    hparams = kind(**own).settled(settings.shots, len(task.train))
    model = clip.load("tiny")[0] if model is None else model
    return Experiment(settings, hparams, task, model, test_transform(32), clip.weights_sha256(model))
