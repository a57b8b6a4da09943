"""The method that methods/README.md adds: a file of about thirty lines and an entry in the dict, nothing else."""

import importlib.util
import re
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file

import clip
import methods
from run_utils import Settings

FIELDS = set(Settings.__dataclass_fields__)
MANUAL = (Path(methods.__file__).parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def bias_tuning(tmp_path, monkeypatch):
    (source,) = re.findall(r"```python\n(.*?)```", MANUAL, flags=re.DOTALL)
    assert len(source.splitlines()) <= 32
    path = tmp_path / "bias_tuning.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("methods.bias_tuning", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(methods.METHODS, "bias_tuning", module)


def test_a_new_method_runs(run_main, bias_tuning):
    flags = ("--method", "bias_tuning", "--shots", 2, "--workers", 0, "--encoder", "vision", "--position", "top1")
    code, trained, out, _ = run_main(*flags, "--save_path", "saved")
    weights = 3 * 128 + 128 + 4 * 128 + 128
    assert code == 0 and trained["trainable_weights"] == weights and 0 < trained["changed_weights"] <= weights
    assert "trains 4 tensors" in out and trained["test_accuracy"] > trained["zero_shot_accuracy"]
    assert (trained["iterations"], trained["lr"], trained["position"]) == (20, 1e-3, "top1")  # its defaults
    (row,) = pd.read_csv("results/results.csv").itertuples()
    assert (row.method, row.test_accuracy) == ("bias_tuning", trained["test_accuracy"])
    saved = load_file("saved/tiny/digits/2shots/seed3/bias_tuning.safetensors")
    names = {name.rpartition(".")[0] for name in saved}
    assert names <= {name for name in clip.load("tiny")[0].state_dict() if ".resblocks.3." in name and "bias" in name}
    _, evaluated, _, _ = run_main(*flags, "--save_path", "saved", "--eval_only")
    assert evaluated["test_accuracy"] == trained["test_accuracy"]
    code, _, _, err = run_main("--method", "bias_tunning")
    assert code == 2 and "bias_tuning" in err


def test_the_manual_names_what_there_is():
    for name in re.findall(r"\| `([a-z_]+)[(`]", MANUAL):
        assert hasattr(methods.Adaptation, name), name
    for name in re.findall(r"`([a-z_]+\.py)`", MANUAL):
        assert name == "bias_tuning.py" or (Path(methods.__file__).parent / name).is_file(), name
    for module in methods.METHODS.values():
        assert callable(module.prepare) and set(module.HYPERPARAMETERS) | set(module.DEFAULTS) <= FIELDS
