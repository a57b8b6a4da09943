"""BERT/main.py: single runs of SO and LoRA on a tiny random BERT and made-up pairs, offline."""

import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support import runs
from support.bert import LAYERS, SMALL, small_bert, tiny_bert
from transformers import BertConfig, BertForSequenceClassification, BertModel, RobertaConfig, RobertaModel

from BERT import main as bert
from BERT import rte
from optimizers import SO, attach
from run_utils import make_reproducible

METHODS = [["--kappa", 0.05, "--T_sparse", 2], ["--rank", 2]]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the tiny BERT and RTE's files; the current one."""
    small_bert(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(place):
    """Call main on the tiny BERT with 4 pairs per label and return (exit code, result, stdout, stderr)."""
    return lambda *argv: runs.call(bert.main, *SMALL, "--max_steps", 3, *argv)


def settings_of(**changes):
    return bert.Settings(**{"model": "tiny", "data_dir": "RTE", "shots": 4, "max_steps": 3, "seed": 1} | changes)


def trained(settings):
    """Train, and return the parameters by name before and after, the model, and its training pairs."""
    make_reproducible(settings.seed)
    model, tokenizer = bert.load_model(settings.model)
    data = rte.load(settings.data_dir)
    rows = rte.draw(data.train, settings.shots, settings.seed, settings.protocol)
    training = rte.Encoded([data.train[row] for row in rows], tokenizer, True, "cpu")
    optimizer = bert.prepare(model, settings)
    if settings.method == "SO":
        attach(model, optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    bert.train(model, optimizer, training, settings)
    return before, dict(model.named_parameters()), model, training


def is_dense(name, p):
    return p.dim() == 1 or "pooler" in name or "classifier" in name


def is_without_gradient(name):
    """Whether it is a key's bias, which cancels in the softmax: its gradient is zero or rounding."""
    return name.endswith(("key.bias", "key.base_layer.bias"))


@pytest.mark.parametrize("argv", METHODS)
@pytest.mark.parametrize("protocol", rte.PROTOCOLS)
def test_a_run_ends_with_its_accuracy_and_repeats(call, monkeypatch, argv, protocol):
    encoded = []
    make = rte.Encoded
    monkeypatch.setattr(rte, "Encoded", lambda *args: encoded.append(args) or make(*args))
    code, result, out, _ = call(*argv, "--protocol", protocol, "--seed", 3)
    _, first, *_, end, last = out.splitlines()
    assert (code, result.steps, result.reached) == (0, 3, False) and "--max_steps 3" in end
    assert last == f"{'LoRA' if '--rank' in argv else 'SO'} - tiny RTE-8shot: {result.val_acc:.1f}%"
    assert "8 training pairs, seed 3, cpu" in first
    # All 24 validation pairs count, and the protocol decides the training pairs and whether there are segments.
    assert result.val_acc * 24 / 100 == pytest.approx(round(result.val_acc * 24 / 100))
    data = rte.load("RTE")
    training, validation = encoded
    assert training[0] == [data.train[row] for row in rte.draw(data.train, 4, 3, protocol)]
    assert validation[0] == data.validation and training[2] == validation[2] == (protocol == "balanced")
    again, other = (call(*argv, "--protocol", protocol, "--seed", seed)[1] for seed in (3, 6))
    assert (again.loss, again.val_acc) == (result.loss, result.val_acc) and other.loss != result.loss


def test_pairs_are_cut_to_the_models_positions(place, call, monkeypatch):
    config = BertConfig.from_pretrained("tiny", max_position_embeddings=16)
    BertModel(config).save_pretrained("tiny")
    seen = []
    monkeypatch.setattr(bert, "train", lambda model, optimizer, training, settings: seen.append(training) or (1, 0.0))
    assert call("--rank", 1)[0] == 0
    assert seen[0].inputs["input_ids"].shape == (8, 16) and int(seen[0].lengths.max()) == 16


@pytest.mark.parametrize("argv, is_sampled", [(["--kappa", 0.005], True), (["--rank", 2], False)])
def test_so_samples_its_gradients(call, monkeypatch, argv, is_sampled):
    models = []
    monkeypatch.setattr(bert, "accuracy", lambda model, _: models.append(model) or 50.0)
    call(*argv)
    linear = models[0].bert.encoder.layer[0].output.dense
    assert ("forward" in vars(linear)) == is_sampled
    assert not is_sampled or (linear.weight.grad is None and linear.bias.grad is not None)


def test_a_run_stops_at_a_mini_batch_loss_at_or_below_the_threshold(call):
    losses = [call("--kappa", 0.05, "--max_steps", steps)[1].loss for steps in (1, 2, 3)]
    lowest, steps = min(losses), losses.index(min(losses)) + 1
    _, result, out, _ = call("--kappa", 0.05, "--max_steps", 10, "--loss_stop", lowest)
    assert (result.reached, result.steps, result.loss) == (True, steps, lowest)
    assert f"stopped at step {steps}" in out
    just_below = math.nextafter(lowest, 0)
    assert not call("--kappa", 0.05, "--max_steps", steps, "--loss_stop", just_below)[1].reached


def test_so_trains_matrices_sparsely_and_the_dense_group_by_adam(place):
    before, after, model, _ = trained(settings_of(kappa=0.05, T_sparse=1))
    for name, p in after.items():
        share = (p != before[name]).float().mean().item()
        if is_dense(name, p):
            assert share > 0.9 or is_without_gradient(name), name
        elif p.numel() > 100:
            assert 0 < share <= 3 * 0.05, name
    optimizer = bert.prepare(model, settings_of(kappa=0.005))
    groups = {group["dense"]: group for group in optimizer.param_groups}
    assert groups[False]["density_ratio"] == 0.005 and groups[False]["T"] == 5
    assert optimizer.generator.initial_seed() == 1
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p] for p in groups[True]["params"]} == {name for p, name in names.items() if is_dense(name, p)}
    assert {names[p] for p in groups[False]["params"]} == {name for p, name in names.items() if not is_dense(name, p)}


def test_dense_none_and_kappa_zero_take_the_method_apart(place):
    before, after, _, _ = trained(settings_of(kappa=0.05, T_sparse=1, dense="none"))
    assert all((p != before[n]).sum() <= 3 * max(1, int(0.05 * p.numel())) for n, p in after.items())
    assert (after["classifier.weight"] != before["classifier.weight"]).any()
    before, after, _, _ = trained(settings_of(kappa=0))
    for name, p in after.items():
        assert p.requires_grad == is_dense(name, p), name
        assert (p != before[name]).any() == p.requires_grad or is_without_gradient(name), name
    before, after, _, _ = trained(settings_of(rank=2, dense="none"))
    changed = {name for name, p in after.items() if (p != before[name]).any()}
    assert changed and all(".lora_" in name for name in changed)


def test_lora_adapts_every_linear_layer_of_the_blocks_beside_the_same_dense_group(place):
    before, after, model, _ = trained(settings_of(rank=2))
    adapted = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert len(adapted) == 6 * LAYERS
    for module in adapted:
        assert module.scaling == {"default": 1 / 2}
        assert module.lora_A["default"].weight.shape[0] == 2 == module.lora_B["default"].weight.shape[1]
        assert isinstance(module.lora_dropout["default"], torch.nn.Identity)
    for name, p in after.items():
        assert p.requires_grad == (is_dense(name, p) or ".lora_" in name), name
        if not is_without_gradient(name) and "lora_A" not in name:
            assert (p != before[name]).any() == p.requires_grad, name


def test_with_all_entries_so_is_adam_on_the_published_schedule(tmp_path, monkeypatch):
    small_bert(tmp_path, dropout=0.0)
    monkeypatch.chdir(tmp_path)
    settings = settings_of(kappa=1.0, max_steps=6, shots=6)
    before, after, _, training = trained(settings)
    make_reproducible(settings.seed)
    model = BertForSequenceClassification.from_pretrained("tiny", num_labels=2)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
    generator, rows = torch.Generator().manual_seed(settings.seed), []
    for step in range(6):
        rows = rows or list(torch.randperm(12, generator=generator).split(8))
        optimizer.param_groups[0]["lr"] = 1e-6 + (2e-5 - 1e-6) * (1 + math.cos(math.pi * step / 10_000)) / 2
        chosen = rows.pop(0)
        inputs = {name: values[chosen] for name, values in training.inputs.items()}
        loss = F.cross_entropy(model(**inputs).logits, training.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, p in model.named_parameters():
        if not is_without_gradient(name):
            assert (after[name] - before[name]).abs().max() > 1e-5, name
            assert (after[name] - p).abs().max() <= 2e-6, name


@pytest.mark.parametrize("method, lr", [("rank", 2e-5), ("kappa", 2e-4), ("rank", 1e-7)])
def test_both_methods_have_adams_published_settings_and_schedule(place, monkeypatch, method, lr):
    monkeypatch.setattr(bert, "SCHEDULE_STEPS", 6)
    seen = []
    kind = torch.optim.Adam if method == "rank" else SO
    step = kind.step
    monkeypatch.setattr(kind, "step", lambda self, *a: (seen.append(dict(self.param_groups[0])), step(self, *a))[1])
    trained(settings_of(**{method: 1}, max_steps=6, lr=lr))
    lowest = min(1e-6, lr)
    rates = [lowest + (lr - lowest) * (1 + math.cos(math.pi * t / 6)) / 2 for t in range(6)]
    assert [group["lr"] for group in seen] == pytest.approx(rates)
    assert (seen[0]["betas"], seen[0]["eps"], seen[0]["weight_decay"]) == ((0.9, 0.999), 1e-8, 0)


def test_training_has_dropout_and_evaluation_has_not(place):
    _, _, model, training = trained(settings_of(kappa=0.05))
    assert model.training
    first = bert.accuracy(model, training)
    assert not model.training and first == bert.accuracy(model, training)


def test_accuracy_counts_every_pair_once():
    data = SimpleNamespace(labels=torch.tensor([0, 1, 1, 0, 1] * 20), lengths=torch.arange(100) % 7)
    data.batch = lambda rows: ({"rows": rows}, data.labels[rows])
    right = torch.arange(100) < 73

    class Model(torch.nn.Module):
        def forward(self, rows):
            answer = torch.where(right[rows], data.labels[rows], 1 - data.labels[rows])
            return SimpleNamespace(logits=F.one_hot(answer, 2).float())

    assert bert.accuracy(Model(), data) == 73.0


@pytest.mark.parametrize(
    "argv, named",
    [
        ([], "--kappa (SO) and --rank"),
        (["--kappa", 0.1, "--rank", 2], "not both"),
        (["--kappa", "nan"], "--kappa"),
        (["--kappa", "x"], "--kappa"),
        (["--kappa", 0, "--dense", "none"], "--kappa 0 --dense none"),
        (["--rank", 0], "--rank"),
        (["--rank", 2, "--T_sparse", 5], "--T_sparse"),
        (["--kappa", 0.1, "--T_sparse", 0], "--T_sparse"),
        (["--rank", 2, "--loss_stop", -1], "--loss_stop"),
        (["--rank", 2, "--lr", 0], "--lr"),
        (["--rank", 2, "--max_steps", 10_001], "--max_steps"),
        (["--rank", 2, "--shots", 30], "--shots 30"),
        (["--rank", 2, "--device", "tpu"], "--device tpu"),
        (["--rank", 2, "--data_dir", "nowhere"], "nowhere/train.tsv"),
        (["--rank", 2, "--model", "./nowhere"], "./nowhere"),
        (["--rank", 2, "--model", "RTE"], "tokenizer.json"),
        (["--rank", 2, "--kapa", 1], "--kapa"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(call, argv, named):
    code, result, out, err = call(*argv)
    assert code == 2 and result is None and "%" not in out
    assert err.startswith("error: ") and named in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "damage, named",
    [
        ("no weights", "model.safetensors"),
        ("damaged weights", "deserializing"),
        ("no BERT", "roberta"),
        ("missing tensors", "2 tensors of BERT, such as bert.encoder.layer.1.output.dense.bias"),
        ("other vocabulary", "tokenizer"),
        ("three labels", "cannot be loaded"),
        ("not finite", "nan"),
    ],
)
def test_unusable_models_are_rejected(place, call, damage, named):
    if damage == "no weights":
        os.remove("tiny/model.safetensors")
    elif damage == "damaged weights":
        (place / "tiny" / "model.safetensors").write_bytes(b"x" * 99)
    elif damage == "no BERT":
        tiny_bert(place / "tiny", model_class=lambda config: RobertaModel(RobertaConfig(**config.to_dict())))
    elif damage == "other vocabulary":
        with open("tiny/vocab.txt", "a") as file:
            file.write("one\ntwo\n")
    else:
        model = BertForSequenceClassification.from_pretrained("tiny", num_labels=3 if damage == "three labels" else 2)
        tensors = {name: p for name, p in model.state_dict().items() if "layer.1.output.dense" not in name}
        model.bert.pooler.dense.bias.data[0] = math.nan
        model.save_pretrained("tiny", state_dict=tensors if damage == "missing tensors" else None)
    code, _, out, err = call("--rank", 1)
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and "--model" in last and named in last and "%" not in out


def test_weights_in_16_bits_are_trained_in_32(place):
    BertForSequenceClassification.from_pretrained("tiny").half().save_pretrained("tiny")
    assert {p.dtype for p in bert.load_model("tiny")[0].parameters()} == {torch.float32}


@pytest.mark.parametrize("package, argv", [("transformers", METHODS[0]), ("peft", METHODS[1])])
def test_missing_packages_are_named(call, monkeypatch, package, argv):
    monkeypatch.setitem(sys.modules, package, None)
    code, _, _, err = call(*argv)
    assert code == 2 and err.startswith(f"error: {package} ") and err.count("\n") == 1


def test_names(place, monkeypatch):
    assert bert.display_name("bert-base-uncased") == bert.display_name("google-bert/bert-base-uncased") == "BERT-base"
    assert bert.display_name("prajjwal1/bert-tiny") == "prajjwal1/bert-tiny"
    assert bert.display_name("tiny") == bert.display_name("tiny/") == bert.display_name("RTE/../tiny") == "tiny"
    monkeypatch.chdir("tiny")
    assert bert.display_name(".") == "tiny"


@pytest.mark.parametrize("script", ["main.py", "script.py", "script_LoRA.py"])
def test_scripts_find_this_projects_datasets_before_other_packages_of_that_name(monkeypatch, script):
    path = [entry for entry in sys.path if Path(entry).resolve() != rte.ROOT]
    monkeypatch.setattr(sys, "path", [str(rte.ROOT / "BERT"), *path])
    runpy.run_path(str(rte.ROOT / "BERT" / script))
    assert sys.path == [str(rte.ROOT), str(rte.ROOT / "BERT"), *path]


def test_a_run_is_a_command_in_its_folder(place):
    flags = ["--rank", "1", "--model", place / "tiny", "--data_dir", place / "RTE", "--shots", "4", "--max_steps", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "main.py", *flags]
    done = subprocess.run(command, cwd=rte.ROOT / "BERT", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"LoRA - tiny RTE-8shot: \d+\.\d%", done.stdout.splitlines()[-1])
