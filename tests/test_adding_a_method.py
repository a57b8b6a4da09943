"""The method that methods/README.md adds, with two options of its own: one file and one line."""

import importlib.util
import re
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file
from support.runs import refused

import methods
from methods.adaptation import Adaptation

FOLDER = Path(methods.__file__).parent
MANUAL = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def bias_tuning(tmp_path, monkeypatch):
    """The manual's file as a module, in METHODS as if it stood in MODULES."""
    (source,) = re.findall(r"```python\n(.*?)```", MANUAL, flags=re.DOTALL)
    assert len(source.splitlines()) <= 35
    path = tmp_path / "bias_tuning.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("methods.weights.bias_tuning", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(methods.METHODS, "bias_tuning", module)


FLAGS = ("--method", "bias_tuning", "--shots", 2, "--encoder", "vision", "--position", "top1")


def test_a_new_method_is_trained_recorded_saved_and_evaluated(run_main, bias_tuning):
    flags = (*FLAGS, "--save_path", "saved")
    _, trained, out, _ = run_main(*flags, "--no-mlp_biases", "--bias_decay", "0.01")
    weights = 3 * 128 + 128
    assert "trains 2 tensors" in out and trained["trainable_weights"] == weights >= trained["changed_weights"] > 0
    assert (trained["iterations"], trained["lr"], trained["position"]) == (20, 1e-3, "top1")  # two of its own defaults
    (row,) = pd.read_csv("results/results.csv").itertuples()
    assert (row.method, row.bias_decay, row.mlp_biases) == ("bias_tuning", 0.01, False)
    saved = load_file("saved/tiny/digits/2shots/seed3/bias_tuning.safetensors")
    attention = "visual.transformer.resblocks.3.attn"
    assert {name.rpartition(".")[0] for name in saved} == {f"{attention}.in_proj_bias", f"{attention}.out_proj.bias"}
    _, evaluated, _, _ = run_main(*flags, "--eval_only")
    for name in ("test_accuracy", "changed_weights", "bias_decay", "mlp_biases"):
        assert evaluated[name] == trained[name], name


def test_its_options_are_flags_keys_and_what_a_search_chooses_from(run_main, bias_tuning):
    code, _, out, _ = run_main("--method", "bias_tuning", "--help")
    assert code == 0 and "--mlp_biases, --no-mlp_biases" in out and "weight decay of the biases [0.0]" in out
    Path("mine.yaml").write_text("mlp_biases: false\nmethods: {bias_tuning: {epochs: 1}}\n")
    _, record, _, _ = run_main(*FLAGS, "--config", "mine.yaml", "--search", "bias_decay=0,0.1")
    search = pd.read_csv(Path("results") / record["run_id"] / "search.csv")
    assert list(search.bias_decay) == [0, 0.1] and record["bias_decay"] == search[search.chosen].bias_decay.item()
    assert (record["mlp_biases"], record["iterations"], record["tuned_on"]) == (False, 1, "val")
    before = ["bias_tuning.py", "mine.yaml", "results"]
    assert "--bias_decay" in refused(run_main(*FLAGS, "--bias_decay", "-1"), before)
    assert "bias_tuning" in refused(run_main("--method", "so", "--mlp_biases"), before)


def test_the_manual_names_what_there_is():
    table = MANUAL.partition("## The contract")[2]
    for name in re.findall(r"`([a-z_]+)(?:\([a-z_, ]*\))?`", table.partition("`adaptation.saved`")[0]):
        assert hasattr(Adaptation, name) or name == "parameters", name
    for name in re.findall(r"`((?:[a-z_]+/)?[a-z_]+\.(?:py|yaml))`", MANUAL):
        paths = [folder / name for folder in (FOLDER, FOLDER.parent)]
        assert name == "tests/test_contracts.py" or any(path.is_file() for path in paths), name
    for module in methods.METHODS.values():
        assert callable(module.prepare) or module.__name__ == "methods.zero_shot"
        assert module.Hparams.__dataclass_params__.frozen
