"""DoRA and AdaLoRA: what peft's layers compute in this CLIP, their settings and AdaLoRA's budget."""

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.runs import refused
from support.training import filled, fitted, prepared

import clip
from arguments import parse
from common import UserError
from records import PROJECT

BOTH = ["dora", "adalora"]


def adapter(method, **options):
    return prepared(method, **{"dropout": 0.0, "lr": 1e-2, "total_iters": 2} | options)


def published(method):
    return parse(["--method", method, "--dataset", "dtd", "--root_path", "data", "--shots", "4"]).hparams


@pytest.mark.parametrize("method", BOTH)
def test_layers_are_where_so_trains(method):
    adaptation = adapter(method, position="half-up")
    so = prepared("so", position="half-up").parameters
    assert {f"{name}.weight" for name in adaptation.layers} == so.keys()
    rank = {"dora": 2, "adalora": 3}[method]
    weights = sum(rank * sum(p.shape) + (len(p) if method == "dora" else rank) for p in so.values())
    assert adaptation.trainable_weights == weights


@pytest.mark.parametrize("method", BOTH)
def test_without_peft_a_run_says_what_to_install(run_main, monkeypatch, method):
    monkeypatch.setitem(sys.modules, "peft", None)
    error = refused(run_main("--method", method, "--shots", 2, "--total_iters", 2), before=["results"])
    assert "pip install -r requirements-all.txt" in error and f"--method {method}" in error


def test_peft_works_where_this_datasets_hides_hugging_faces(tmp_path):
    """Libraries that ask whether Hugging Face's `datasets` is there find this project's package, in whose place the
    other one may be installed or not. It must not be taken for the other."""
    site = tmp_path / "site"
    for name, file, text in (
        ("datasets", "__init__.py", "raise ImportError('the wrong datasets')\n"),
        ("datasets-4.0.0.dist-info", "METADATA", "Metadata-Version: 2.1\nName: datasets\nVersion: 4.0.0\n"),
    ):
        (site / name).mkdir(parents=True)
        (site / name / file).write_text(text)
    code = (
        f"import sys; sys.path[1:1] = [{str(site)!r}, {str(PROJECT / 'tests')!r}]\n"
        "import importlib.metadata; assert importlib.metadata.version('datasets') == '4.0.0'\n"
        "import peft, datasets\n"
        "from support.training import fitted, prepared\n"
        "adaptation = prepared('dora', total_iters=1, encoder='text')\n"
        "fitted(adaptation)\n"
        "assert hasattr(datasets, 'available_datasets') and adaptation.saved.changed_weights() > 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- DoRA


@torch.no_grad()
def merged(adaptation):
    return {name: weight for name, (_, weight) in zip(adaptation.layers, adaptation.merged_weights())}


def test_dora_is_a_length_times_a_direction():
    """Liu et al. 2024, equation 5, with the weight of peft's layer written out."""
    adaptation, base = filled(adapter("dora", rank=4, alpha=3.0)), clip.load("tiny")[0].double()
    for name, weight in merged(adaptation).items():
        A, B, m = (
            adaptation.parameters[f"{name}.lora_{part}.default.weight"] for part in ("A", "B", "magnitude_vector")
        )
        direction = base.get_submodule(name).weight + 3 / math.sqrt(4) * B @ A
        expected = m[:, None] * direction / direction.pow(2).sum(dim=1, keepdim=True).sqrt()
        torch.testing.assert_close(weight, expected.detach(), rtol=1e-9, atol=1e-12)


def test_lengths_of_dora_are_those_of_the_rows_and_do_not_decay():
    adaptation = adapter("dora")
    lengths = {name: p for name, p in adaptation.parameters.items() if "magnitude" in name}
    assert len(lengths) == 24 and sum(p.numel() for p in lengths.values()) == 9 * (4 * 128 + 2 * 64)
    name = "visual.transformer.resblocks.2.attn.in_proj"
    rows = clip.load("tiny")[0].double().get_submodule(name).weight.norm(dim=1)
    torch.testing.assert_close(lengths[f"{name}.lora_magnitude_vector.default.weight"].detach(), rows.detach())
    matrices, vectors = adaptation.optimizer.param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"], len(matrices["params"])) == (0.01, 0.0, 48)
    assert {id(p) for p in vectors["params"]} == {id(p) for p in lengths.values()}
    before = {name: p.detach().clone() for name, p in adaptation.parameters.items()}
    fitted(adaptation)
    assert all(not torch.equal(p, before[name]) for name, p in adaptation.parameters.items())


def test_values_of_dora_are_those_of_lora():
    assert vars(published("dora")) == {name: v for name, v in vars(published("lora")).items() if name != "lora_on"}


# --- AdaLoRA


def singular_values(adaptation):
    """The entries of E, a list of those of each matrix."""
    return [p.detach() for name, p in adaptation.parameters.items() if ".lora_E." in name]


def test_the_budget_of_adalora_falls_to_the_target():
    adaptation = adapter("adalora", total_iters=39, rank=4, position="top2")
    budgets, move_on = [], adaptation.after_step

    def spied(iteration):
        move_on(iteration)
        budgets.append(sum(int((p != 0).sum()) for p in singular_values(adaptation)))

    adaptation.after_step = spied
    fitted(adaptation)
    start, end, begin, final = 6 * 16, 4 * 16, 6, 39 - 18  # of 39 iterations the first 6 and the last 18
    for iteration, budget in enumerate(budgets, start=1):
        left = min(1, max(0, 1 - (iteration - begin) / (final - begin)))  # part of the fall that is still to come
        assert budget == (int((start - end) * left**3 + end)), iteration
    assert len({int((p != 0).sum()) for p in singular_values(adaptation)}) > 1, "all matrices have the same rank"


@pytest.mark.parametrize("iterations", [2, 3, 5])
def test_adalora_of_few_iterations(iterations):
    adaptation = adapter("adalora", total_iters=iterations, position="top1")
    mode = torch.get_deterministic_debug_mode()
    fitted(adaptation)
    assert torch.get_deterministic_debug_mode() == mode, "a setting of torch was left changed"
    assert adaptation.saved.changed_weights() > 0
    assert sum(int((p != 0).sum()) for p in singular_values(adaptation)) <= 8 * 2


def test_one_iteration_is_not_enough_for_adalora():
    with pytest.raises(UserError, match=r"2 iterations.*--total_iters"):
        adapter("adalora", total_iters=1)


def test_the_penalty_of_adalora_is_pefts():
    adaptation = filled(adapter("adalora"))
    adaptation.model.forward = lambda: SimpleNamespace(loss=torch.zeros((), dtype=torch.float64))
    expected = adaptation.tuner.forward().loss
    del adaptation.model.forward
    assert expected.item() > 0.5
    torch.testing.assert_close(adaptation.penalty(None), expected, rtol=1e-6, atol=0)
    adaptation.penalty(None).backward()
    assert all((p.grad is None) == (".lora_E." in name) for name, p in adaptation.parameters.items())


def test_adalora_is_b_e_a():
    adaptation, base = filled(adapter("adalora", alpha=5.0)), clip.load("tiny")[0].double()
    for name, weight in merged(adaptation).items():
        A, B, E = (adaptation.parameters[f"{name}.lora_{matrix}.default"] for matrix in "ABE")
        expected = base.get_submodule(name).weight + 5 / 3 * B @ torch.diag(E.view(-1)) @ A
        torch.testing.assert_close(weight, expected.detach(), rtol=1e-4, atol=1e-5)  # peft divides by rank + 1e-5


def test_values_of_adalora():
    hparams = published("adalora").settled(4, images=0)
    assert (hparams.alpha, hparams.lr, hparams.dropout, hparams.rank, hparams.total_iters) == (32, 1.2e-3, 0, 2, 2000)
    config = adapter("adalora", total_iters=3900).tuner.peft_config["default"]
    assert (config.init_r, config.target_r, config.total_step) == (3, 2, 3900)
    assert (config.tinit, config.tfinal, config.deltaT) == (600, 1800, 1)
