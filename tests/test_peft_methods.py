"""DoRA and AdaLoRA: that peft's layers work in this CLIP, what they compute, and whole runs."""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import clip
import datasets
import train
import utils
from clip.weights import save_weights
from methods import METHODS
from methods.adalora import AdaLoRA
from methods.dora import DoRA
from run_utils import PROJECT, Settings, parse

NAMES = ("cat", "dog", "traffic_light")
TASK = datasets.Task("noise", NAMES, ("a {}.",), tuple(datasets.Item(str(i), i % 3) for i in range(3)), (), (), None)
QUICK = ("--shots", 2, "--total_iters", 6, "--workers", 0, "--lr", "1e-2")
BOTH = ["dora", "adalora"]
KINDS = {"attn.in_proj": (3, 1), "attn.out_proj": (1, 1), "mlp.c_fc": (4, 1), "mlp.c_proj": (1, 4)}


def settings_of(method, **options):
    defaults = {"backbone": "tiny", "device": "cpu", "workers": 0, "dropout": 0.0, "lr": 1e-2, "early_stop_loss": 0.0}
    return Settings(method=method, **defaults | options)


def prepared(method, **options):
    return METHODS[method].prepare(clip.load("tiny")[0].double(), TASK, settings_of(method, **options))


def fill(adaptation):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adaptation.parameters.values():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return adaptation


def batches_of(count):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(3, 3, 32, 32, generator=generator).double(), torch.arange(3)) for _ in range(count)]


def features(model):
    images = batches_of(1)[0][0].to(model.logit_scale.dtype)
    return model.encode_image(images), model.encode_text(clip.tokenize(["a cat.", "a small dog.", "a"]))


def losses(record):
    return pd.read_csv(Path("results") / record["run_id"] / "curve.csv")[["iteration", "loss", "lr"]]


# --- both


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("encoder, position", [("text", "all"), ("vision", "top1"), ("both", "half-up")])
def test_layers_are_where_so_trains(method, encoder, position):
    model, _ = clip.load("tiny")
    names = METHODS["so"].prepare(model, TASK, settings_of("so", encoder=encoder, position=position)).parameters
    adaptation = prepared(method, encoder=encoder, position=position, rank=2)
    assert {f"{name}.weight" for name in adaptation.layers} == names.keys()
    found = {name.partition(".lora_")[0] for name in adaptation.parameters}
    assert found == adaptation.layers.keys()
    assert {n for n, p in adaptation.model.named_parameters() if p.requires_grad} == adaptation.parameters.keys()
    assert (adaptation.trains_images, adaptation.trains_text) == (encoder != "text", encoder != "vision")
    rank = {"dora": 2, "adalora": 3}[method]
    weights = 0
    for name in adaptation.layers:
        D = 128 if name.startswith("visual.") else 64
        rows, columns = KINDS[".".join(name.split(".")[-2:])]
        weights += rank * D * (rows + columns) + (rows * D if method == "dora" else rank)
    assert adaptation.trainable_weights == weights


@pytest.mark.parametrize("method", BOTH)
def test_at_the_start_it_is_the_plain_model(method):
    plain = features(clip.load("tiny")[0].double())
    adaptation = prepared(method, dropout=0.3)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(features(adaptation.model), plain))
    assert adaptation.changed_weights() == 0
    without_dropout = prepared(method)
    for a, b in zip(features(without_dropout.model), plain):  # the layers' own forward
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", BOTH)
def test_merged_equals_unmerged(method):
    adaptation = fill(prepared(method))
    training = [f.detach() for f in features(adaptation.model)]
    with torch.no_grad():
        evaluation = features(adaptation.model)
    changed, base = adaptation.changed_weights(), clip.load("tiny")[0].double()
    assert torch.equal(features(adaptation.model)[0], training[0]), "counting the changes changed the weights"
    merged = adaptation.merge()
    state, before = merged.state_dict(), base.state_dict()
    assert state.keys() == before.keys() and not hasattr(merged, "peft_config")
    assert changed == sum(int((t != before[name]).sum()) for name, t in state.items())
    assert {name for name, t in state.items() if not torch.equal(t, before[name])} == {
        name for name in before if any(kind in name for kind in ("in_proj_w", "out_proj.w", "c_fc.w", "c_proj.w"))
    }
    with torch.no_grad():
        for a, b, c, d in zip(training, evaluation, features(merged), features(base)):
            torch.testing.assert_close(a, c, rtol=1e-8, atol=1e-10)
            assert torch.equal(b, c) and not torch.allclose(c, d, atol=1e-3)


@pytest.mark.parametrize("method", BOTH)
def test_a_run_is_recorded_saved_and_evaluated(run_main, method):
    flags = ("--method", method, *QUICK, "--save_path", "saved", "--position", "half-up")
    _, trained, out, _ = run_main(*flags, "--rank", 3)
    assert f"trains {len(load_file(f'saved/tiny/digits/2shots/seed3/{method}.safetensors'))} tensors" in out
    assert (trained["method"], trained["rank"], trained["iterations"]) == (method, 3, 6)
    assert trained["final_loss"] < losses(trained).loss[0]
    assert trained["test_accuracy"] != trained["zero_shot_accuracy"]
    assert 0.9 * 442_368 < trained["changed_weights"] <= 442_368
    assert trained["checkpoint_bytes"] < 200_000
    _, evaluated, _, _ = run_main(*flags, "--eval_only")
    for name in ("test_accuracy", "changed_weights", "trainable_weights", "rank"):
        assert evaluated[name] == trained[name]
    model, _ = clip.load("tiny")
    {"dora": DoRA, "adalora": AdaLoRA}[method].merge_file(model, f"saved/tiny/digits/2shots/seed3/{method}.safetensors")
    save_weights(model, "merged.safetensors")
    adaptation = METHODS[method].prepare(
        clip.load("tiny")[0], TASK, parse([str(word) for word in (*flags, "--rank", 3)])
    )
    adaptation.load(Path(f"saved/tiny/digits/2shots/seed3/{method}.safetensors"), trained["weights_sha256"])
    with torch.no_grad():
        plain = clip.load("merged.safetensors")[0]
        assert all(torch.equal(a, b) for a, b in zip(features(plain), features(adaptation.model)))
    with torch.no_grad():
        model.logit_scale += 1
    save_weights(model, "tiny.safetensors")
    code, _, _, err = run_main(*flags, "--eval_only", "--backbone", "tiny.safetensors")
    assert code == 2 and "tiny/digits" in err
    code, _, _, err = run_main(*flags, "--eval_only", "--method", "lora", "--filename", method)
    assert code == 2 and f"--method {method}" in err


@pytest.mark.parametrize("method", BOTH)
def test_the_seed_alone_decides(method):
    def losses_of(disturbance, **options):
        torch.manual_seed(disturbance)
        options = {"total_iters": 3, "dropout": 0.5} | options
        adaptation, settings = prepared(method, **options), settings_of(method, **options)
        move_on = adaptation.after_step

        def disturbed(iteration):
            torch.rand(disturbance)  # as a data loader draws
            move_on(iteration)

        adaptation.after_step = disturbed
        fit = train.fit(adaptation.model, TASK, adaptation, batches_of(3), settings, None)
        return [row["loss"] for row in fit.curve]

    state = torch.get_rng_state()
    assert losses_of(1) == losses_of(2)
    assert len({tuple(losses_of(1, **options)) for options in ({}, {"dropout": 0.0}, {"seed": 9})}) == 3
    torch.set_rng_state(state)
    prepared(method)
    assert torch.equal(torch.get_rng_state(), state), "the program's random state was moved on"


@pytest.mark.parametrize("method", BOTH)
def test_bf16(method):
    adaptation = fill(METHODS[method].prepare(clip.load("tiny")[0], TASK, settings_of(method)))
    fp32 = [f.detach() for f in features(adaptation.model)]
    with utils.autocast(torch.device("cpu"), "bf16"):
        training = [f.detach() for f in features(adaptation.model)]
        with torch.no_grad():
            evaluation = features(adaptation.model)
    adaptation.merge()
    with utils.autocast(torch.device("cpu"), "bf16"), torch.no_grad():
        merged = features(adaptation.model)
    for a, b, c, d in zip(fp32, training, evaluation, merged):
        assert b.dtype == torch.bfloat16 and torch.equal(c, d)
        assert torch.cosine_similarity(a, b.float(), dim=-1).min() > 0.98
        assert torch.cosine_similarity(a, c.float(), dim=-1).min() > 0.98


@pytest.mark.parametrize("method", BOTH)
def test_without_peft_a_run_says_what_to_install(run_main, monkeypatch, method):
    monkeypatch.setitem(sys.modules, "peft", None)
    code, record, _, err = run_main("--method", method, *QUICK)
    assert code == 2 and record is None and "pip install -r requirements-peft.txt" in err and method in err
    assert not list(Path(".").iterdir())
    assert (PROJECT / "requirements-peft.txt").is_file()


def test_peft_works_where_this_datasets_hides_hugging_faces(tmp_path):
    """Libraries that ask whether Hugging Face's `datasets` is there find this project's package, in whose place the
    other one may be installed or not. It must not be taken for the other."""
    site = tmp_path / "site"
    (site / "datasets").mkdir(parents=True)
    (site / "datasets" / "__init__.py").write_text("raise ImportError('the wrong datasets')\n")
    (site / "datasets-4.0.0.dist-info").mkdir()
    (site / "datasets-4.0.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: datasets\nVersion: 4.0.0\n"
    )
    code = (
        f"import sys; sys.path.insert(1, {str(site)!r})\n"
        "import importlib.metadata; assert importlib.metadata.version('datasets') == '4.0.0'\n"
        "import peft, clip, datasets, methods, run_utils\n"
        "settings = run_utils.parse(['--method', 'dora'])\n"
        "adaptation = methods.METHODS['dora'].prepare(clip.load('tiny')[0], None, settings)\n"
        "adaptation.model.encode_text(clip.tokenize(['a cat'])).sum().backward(); adaptation.optimizer.step()\n"
        "assert hasattr(datasets, 'available_datasets') and adaptation.changed_weights() > 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- DoRA


def test_dora_is_a_length_times_a_direction():
    """Liu et al. 2024, equation 5, with the weight of peft's layer written out."""
    adaptation = fill(prepared("dora", rank=4, alpha=3.0))
    base = clip.load("tiny")[0].double()
    merged = {name: weight.data for name, weight in zip(adaptation.layers, _merged(adaptation))}
    for name, weight in merged.items():
        A = adaptation.parameters[f"{name}.lora_A.default.weight"]
        B = adaptation.parameters[f"{name}.lora_B.default.weight"]
        m = adaptation.parameters[f"{name}.lora_magnitude_vector.default.weight"]
        direction = base.get_submodule(name).weight + 3 / math.sqrt(4) * B @ A
        expected = m[:, None] * direction / direction.pow(2).sum(dim=1, keepdim=True).sqrt()
        torch.testing.assert_close(weight, expected.detach(), rtol=1e-9, atol=1e-12)


@torch.no_grad()
def _merged(adaptation):
    return [merged for _, merged in adaptation.merged_weights()]


def test_lengths_of_dora_are_those_of_the_rows_and_do_not_decay():
    adaptation = prepared("dora")
    lengths = {name: p for name, p in adaptation.parameters.items() if "magnitude" in name}
    assert len(lengths) == 24 and sum(p.numel() for p in lengths.values()) == 9 * (4 * 128 + 2 * 64)
    name = "visual.transformer.resblocks.2.attn.in_proj"
    rows = clip.load("tiny")[0].double().get_submodule(name).weight.norm(dim=1)
    torch.testing.assert_close(lengths[f"{name}.lora_magnitude_vector.default.weight"].detach(), rows.detach())
    matrices, vectors = adaptation.optimizer.param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"], len(matrices["params"])) == (0.01, 0.0, 48)
    assert {id(p) for p in vectors["params"]} == {id(p) for p in lengths.values()}
    before = {name: p.detach().clone() for name, p in adaptation.parameters.items()}
    train.fit(adaptation.model, TASK, adaptation, batches_of(2), settings_of("dora", total_iters=2), None)
    assert all(not torch.equal(p, before[name]) for name, p in adaptation.parameters.items())


def test_settings_of_dora():
    data = ["--dataset", "dtd", "--root_path", "data", "--shots", "4"]
    dora, lora = parse(["--method", "dora", *data]), parse(["--method", "lora", *data])
    assert dora.hyperparameters == {name: v for name, v in lora.hyperparameters.items() if name != "lora_on"}


# --- AdaLoRA


def singular_values(adaptation):
    return torch.cat([p.detach().view(-1) for name, p in adaptation.parameters.items() if ".lora_E." in name])


def test_the_budget_of_adalora_falls_to_the_target():
    options = dict(total_iters=39, rank=4)
    adaptation = prepared("adalora", **options)
    budgets, move_on = [], adaptation.after_step

    def spied(iteration):
        move_on(iteration)
        budgets.append(int((singular_values(adaptation) != 0).sum()))

    adaptation.after_step = spied
    batches = batches_of(39)
    train.fit(adaptation.model, TASK, adaptation, batches, settings_of("adalora", **options), None)
    start, end, begin, final = 6 * 24, 4 * 24, 6, 39 - 18  # of 39 iterations the first 6 and the last 18
    for iteration, budget in enumerate(budgets, start=1):
        if iteration <= begin:
            expected = start
        elif iteration < final:
            expected = int((start - end) * (1 - (iteration - begin) / (final - begin)) ** 3 + end)
        else:
            expected = end
        assert budget == expected, iteration
    ranks = [int((p != 0).sum()) for name, p in adaptation.parameters.items() if ".lora_E." in name]
    assert sum(ranks) == end and len(set(ranks)) > 1, "all matrices have the same rank"


@pytest.mark.parametrize("iterations", [2, 3, 5])
def test_adalora_of_few_iterations(iterations):
    adaptation = prepared("adalora", total_iters=iterations)
    settings = settings_of("adalora", total_iters=iterations)
    train.fit(adaptation.model, TASK, adaptation, batches_of(iterations), settings, None)
    assert adaptation.changed_weights() > 0
    assert int((singular_values(adaptation) != 0).sum()) <= 24 * 2


def test_one_iteration_is_not_enough_for_adalora(run_main):
    code, _, _, err = run_main("--method", "adalora", *QUICK, "--total_iters", 1)
    assert code == 2 and "2 iterations" in err and not list(Path(".").iterdir())


def test_the_penalty_of_adalora_is_pefts():
    adaptation = fill(prepared("adalora"))
    adaptation.model.forward = lambda: SimpleNamespace(loss=torch.zeros((), dtype=torch.float64))
    expected = adaptation.tuner.forward().loss
    del adaptation.model.forward
    assert expected.item() > 0.5
    torch.testing.assert_close(adaptation.penalty(), expected, rtol=1e-6, atol=0)
    adaptation.penalty().backward()
    assert all((p.grad is None) == (".lora_E." in name) for name, p in adaptation.parameters.items())


def test_adalora_is_b_e_a():
    adaptation = fill(prepared("adalora", rank=2, alpha=5.0))
    base = clip.load("tiny")[0].double()
    for name, weight in zip(adaptation.layers, _merged(adaptation)):
        A, B, E = (adaptation.parameters[f"{name}.lora_{matrix}.default"] for matrix in "ABE")
        expected = base.get_submodule(name).weight + 5 / 3 * B @ torch.diag(E.view(-1)) @ A
        torch.testing.assert_close(weight, expected.detach(), rtol=1e-4, atol=1e-5)  # peft divides by rank + 1e-5


def test_settings_of_adalora():
    data = ["--dataset", "dtd", "--root_path", "data", "--shots", "4"]
    settings = parse(["--method", "adalora", *data])
    assert (settings.alpha, settings.lr, settings.dropout, settings.rank) == (32, 1.2e-3, 0, 2)
    assert settings.iterations == 2000
    config = prepared("adalora", total_iters=3900).tuner.peft_config["default"]
    assert (config.init_r, config.target_r, config.total_step) == (3, 2, 3900)
    assert (config.tinit, config.tfinal, config.deltaT) == (600, 1800, 1)
