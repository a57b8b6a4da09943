"""BERT/main.py: single runs of SO and LoRA on a tiny random BERT and made-up pairs, offline."""

import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.bert import LAYERS, rte_files, tiny_bert
from transformers import BertConfig, BertForSequenceClassification, BertModel, RobertaModel

from BERT import main as bert
from BERT import rte
from optimizers import SO, attach
from run_utils import make_reproducible


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the tiny BERT and RTE's files; the current one."""
    tiny_bert(tmp_path / "tiny")
    rte_files(tmp_path / "RTE")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(place, capsys):
    """Calls main on the tiny BERT with 4 pairs per label and returns (exit code, result, stdout, stderr)."""

    def call(*argv):
        result, code = None, 0
        common = "--model tiny --data_dir RTE --shots 4 --max_steps 3 --device cpu".split()
        try:
            result = bert.main([*common, *(str(word) for word in argv)])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, result, out, err

    return call


def settings_of(place, **changes):
    base = dict(model=str(place / "tiny"), data_dir=str(place / "RTE"), shots=4, max_steps=3, seed=1, device="cpu")
    return bert.Settings(**base | changes)


def trained(settings):
    """Parameters by name before and after a run's training, the model, and its training pairs."""
    make_reproducible(settings.seed)
    model, tokenizer = bert.load_model(settings.model)
    data = rte.load(settings.data_dir)
    rows = rte.draw(data.train, settings.shots, settings.seed, settings.protocol)
    training = rte.Encoded([data.train[row] for row in rows], tokenizer, True, torch.device("cpu"))
    optimizer = bert.prepare(model, settings)
    if settings.method == "SO":
        attach(model, optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    bert.train(model, optimizer, training, settings)
    return before, dict(model.named_parameters()), model, training


@pytest.mark.parametrize("argv, method", [(["--kappa", 0.05, "--T_sparse", 2], "SO"), (["--rank", 2], "LoRA")])
@pytest.mark.parametrize("protocol", ["balanced", "released"])
def test_a_run_ends_with_its_accuracy(call, argv, method, protocol):
    code, result, out, _ = call(*argv, "--protocol", protocol)
    assert code == 0 and result.steps == 3 and not result.reached
    assert result.val_acc * 24 / 100 == pytest.approx(round(result.val_acc * 24 / 100))
    lines = out.splitlines()
    assert lines[-1] == f"{method} - tiny RTE-8shot: {result.val_acc:.1f}%"
    assert "never at --loss_stop 0.001: ended by --max_steps 3" in lines[-2]
    assert "8 training pairs, seed 42, cpu" in lines[0]


def test_pairs_are_cut_to_the_models_positions(place, call, monkeypatch):
    config = BertConfig.from_pretrained(place / "tiny", max_position_embeddings=16)
    BertModel(config).save_pretrained(place / "tiny")
    seen = []
    monkeypatch.setattr(bert, "train", lambda model, optimizer, training, settings: seen.append(training) or (1, 0.0))
    assert call("--rank", 1)[0] == 0
    assert seen[0].inputs["input_ids"].shape == (8, 16) and int(seen[0].lengths.max()) == 16


@pytest.mark.parametrize("protocol", ["balanced", "released"])
def test_the_protocol_decides_pairs_and_segments_and_all_validation_pairs_are_used(call, monkeypatch, protocol):
    encoded, evaluated = [], []
    make = rte.Encoded
    monkeypatch.setattr(rte, "Encoded", lambda *args: encoded.append((args, make(*args))) or encoded[-1][1])
    monkeypatch.setattr(bert, "accuracy", lambda _, pairs: evaluated.append(pairs) or 50.0)
    call("--kappa", 0.05, "--protocol", protocol, "--seed", 3)
    (training, _), (validation, tensors) = encoded
    data = rte.load("RTE")
    assert training[0] == [data.train[row] for row in rte.draw(data.train, 4, 3, protocol)]
    assert validation[0] == data.validation and evaluated == [tensors]
    assert training[2] == validation[2] == (protocol == "balanced")


@pytest.mark.parametrize("argv, is_sampled", [(["--kappa", 0.005], True), (["--rank", 2], False)])
def test_so_samples_its_gradients(call, monkeypatch, argv, is_sampled):
    models = []
    monkeypatch.setattr(bert, "accuracy", lambda model, _: models.append(model) or 50.0)
    call(*argv)
    linear = models[0].bert.encoder.layer[0].output.dense
    assert ("forward" in vars(linear)) == is_sampled
    if is_sampled:
        assert linear.weight.grad is None and linear.bias.grad is not None


@pytest.mark.parametrize("argv", [["--kappa", 0.05], ["--rank", 2]])
def test_the_same_seed_gives_the_same_run(call, argv):
    first, again, other = (call(*argv, "--seed", seed)[1] for seed in (5, 5, 6))
    assert (first.loss, first.val_acc) == (again.loss, again.val_acc)
    assert first.loss != other.loss


def test_a_run_stops_at_a_mini_batch_loss_at_or_below_the_threshold(call, capsys):
    losses = [call("--kappa", 0.05, "--max_steps", steps)[1].loss for steps in (1, 2, 3)]
    lowest, steps = min(losses), losses.index(min(losses)) + 1
    _, result, out, _ = call("--kappa", 0.05, "--max_steps", 10, "--loss_stop", lowest)
    assert (result.reached, result.steps, result.loss) == (True, steps, lowest)
    assert f"stopped at step {steps}: mini-batch loss" in out and "never" not in out
    just_below = math.nextafter(lowest, 0)
    assert not call("--kappa", 0.05, "--max_steps", steps, "--loss_stop", just_below)[1].reached


@pytest.mark.parametrize("method", [{"kappa": 0.05}, {"rank": 2}])
def test_both_methods_have_adams_published_settings(place, method):
    model, _ = bert.load_model(str(place / "tiny"))
    for group in bert.prepare(model, settings_of(place, **method)).param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (2e-5, (0.9, 0.999), 1e-8, 0)


def test_so_trains_matrices_sparsely_and_the_small_group_densely(place):
    before, after, model, _ = trained(settings_of(place, kappa=0.05, T_sparse=1))
    for name, p in after.items():
        share = (p != before[name]).float().mean().item()
        if p.dim() == 1 or "pooler" in name or "classifier" in name:
            # A key's bias cancels in the softmax, and its gradient is rounding or zero.
            assert share > 0.9 or "key.bias" in name, name
        elif p.numel() > 100:
            assert 0 < share <= 3 * 0.05, name
    optimizer = bert.prepare(model, settings_of(place, kappa=0.005))
    groups = {group["dense"]: group for group in optimizer.param_groups}
    assert groups[False]["density_ratio"] == 0.005 and groups[False]["T"] == 5
    assert optimizer.generator.initial_seed() == 1
    names = {p: name for name, p in model.named_parameters()}
    dense = {names[p] for p in groups[True]["params"]}
    assert {"bert.pooler.dense.weight", "classifier.weight", "bert.embeddings.LayerNorm.bias"} <= dense
    assert {names[p] for p in groups[False]["params"]} == set(names.values()) - dense


def test_dense_none_and_kappa_zero_take_the_method_apart(place):
    before, after, _, _ = trained(settings_of(place, kappa=0.05, T_sparse=1, dense="none"))
    assert all(((p != before[n]).sum() <= 3 * max(1, int(0.05 * p.numel()))) for n, p in after.items())
    assert (after["classifier.weight"] != before["classifier.weight"]).any()
    before, after, _, _ = trained(settings_of(place, kappa=0))
    changed = {name for name, p in after.items() if (p != before[name]).any()}
    assert {"classifier.weight", "bert.pooler.dense.weight", "bert.embeddings.LayerNorm.weight"} <= changed
    for name, p in after.items():
        is_dense = p.dim() == 1 or "pooler" in name or "classifier" in name
        assert p.requires_grad == is_dense and (is_dense or name not in changed), name


def test_lora_adapts_every_linear_layer_of_the_blocks_beside_the_same_dense_group(place):
    before, after, model, _ = trained(settings_of(place, rank=2))
    adapted = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert len(adapted) == 6 * LAYERS
    for module in adapted:
        assert module.scaling == {"default": 1 / 2}
        assert module.lora_A["default"].weight.shape[0] == 2 == module.lora_B["default"].weight.shape[1]
        assert isinstance(module.lora_dropout["default"], torch.nn.Identity)
    for name, p in after.items():
        is_dense = p.dim() == 1 or "pooler" in name or "classifier" in name
        assert p.requires_grad == (is_dense or ".lora_" in name), name
        if "key.base_layer.bias" not in name and "lora_A" not in name:
            assert (p != before[name]).any() == p.requires_grad, name
    before, after, _, _ = trained(settings_of(place, rank=2, dense="none"))
    changed = {name for name, p in after.items() if (p != before[name]).any()}
    assert changed and all(".lora_" in name for name in changed)


def test_with_all_entries_so_is_adam_on_the_published_schedule(tmp_path):
    tiny_bert(tmp_path / "tiny", dropout=0.0)
    rte_files(tmp_path / "RTE")
    settings = settings_of(tmp_path, kappa=1.0, max_steps=6, shots=6)
    before, after, _, training = trained(settings)
    make_reproducible(settings.seed)
    model = BertForSequenceClassification.from_pretrained(settings.model, num_labels=2)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.9, 0.999))
    generator, rows = torch.Generator().manual_seed(settings.seed), []
    for step in range(6):
        if not rows:
            rows = list(torch.randperm(12, generator=generator).split(8))
        optimizer.param_groups[0]["lr"] = 1e-6 + (2e-5 - 1e-6) * (1 + math.cos(math.pi * step / 10_000)) / 2
        chosen = rows.pop(0)
        inputs = {name: values[chosen] for name, values in training.inputs.items()}
        loss = F.cross_entropy(model(**inputs).logits, training.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, p in model.named_parameters():
        if "key.bias" not in name:
            assert (after[name] - before[name]).abs().max() > 1e-5, name
            torch.testing.assert_close(after[name], p, rtol=0, atol=2e-6, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize("method, lr", [("rank", 2e-5), ("rank", 2e-4), ("kappa", 2e-4), ("rank", 1e-7)])
def test_the_learning_rate_ends_at_its_minimum(place, monkeypatch, method, lr):
    monkeypatch.setattr(bert, "SCHEDULE_STEPS", 6)
    seen = []
    kind = torch.optim.Adam if method == "rank" else SO
    step = kind.step
    monkeypatch.setattr(kind, "step", lambda self, *a: (seen.append(self.param_groups[0]["lr"]), step(self, *a))[1])
    trained(settings_of(place, **{method: 1}, max_steps=6, lr=lr))
    lowest = min(1e-6, lr)
    assert seen == pytest.approx([lowest + (lr - lowest) * (1 + math.cos(math.pi * t / 6)) / 2 for t in range(6)])
    assert len(seen) == 6


def test_training_has_dropout_and_evaluation_has_not(place):
    _, _, model, training = trained(settings_of(place, kappa=0.05))
    assert model.training
    torch.manual_seed(0)
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
    "argv, message",
    [
        ([], "one of --kappa (SO) and --rank (LoRA)"),
        (["--kappa", 0.1, "--rank", 2], "not both"),
        (["--kappa", 1.5], "--kappa must be in [0, 1], not 1.5"),
        (["--kappa", "nan"], "--kappa must be in [0, 1]"),
        (["--kappa", "x"], "--kappa: invalid float value: 'x'"),
        (["--kappa", 0, "--dense", "none"], "trains nothing"),
        (["--rank", 0], "--rank must be at least 1"),
        (["--rank", 2, "--T_sparse", 5], "--T_sparse belongs to SO"),
        (["--kappa", 0.1, "--T_sparse", 0], "--T_sparse must be at least 1"),
        (["--rank", 2, "--loss_stop", -1], "--loss_stop must be at least 0"),
        (["--rank", 2, "--lr", 0], "--lr must be positive, not 0.0"),
        (["--rank", 2, "--max_steps", 10_001], "--max_steps must be at most 10000"),
        (["--rank", 2, "--seed", -1], "--seed must be at least 0"),
        (["--rank", 2, "--shots", 0], "--shots must be at least 1"),
        (["--rank", 2, "--shots", 30], "--shots 30 needs more pairs"),
        (["--rank", 2, "--dense", "some"], "--dense: invalid choice"),
        (["--rank", 2, "--device", "cuda"], "--device cuda: this machine has 0 CUDA devices"),
        (["--rank", 2, "--device", "tpu"], "--device tpu is unknown"),
        (["--rank", 2, "--data_dir", "nowhere"], "nowhere/train.tsv"),
        (["--rank", 2, "--model", "./nowhere"], "there is no folder ./nowhere"),
        (["--rank", 2, "--model", "RTE"], "RTE has no tokenizer.json or vocab.txt"),
        (["--rank", 2, "--kapa", 1], "unrecognized arguments: --kapa"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(call, argv, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    code, result, out, err = call(*argv)
    assert code == 2 and result is None and "%" not in out
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def damage(place, how):
    folder = place / "tiny"
    if how == "no weights":
        (folder / "model.safetensors").unlink()
    elif how == "damaged weights":
        (folder / "model.safetensors").write_bytes(b"x" * 99)
    elif how == "no BERT":
        tiny_bert(folder, model_class=lambda config: RobertaModel(roberta(config)))
    elif how == "tensors lack":
        model = BertForSequenceClassification.from_pretrained(folder)
        state = {name: p for name, p in model.state_dict().items() if "layer.1.output.dense" not in name}
        model.save_pretrained(folder, state_dict=state)
    elif how == "other vocabulary":
        with open(folder / "vocab.txt", "a") as file:
            file.write("one\ntwo\n")
    elif how == "three labels":
        BertForSequenceClassification.from_pretrained(folder, num_labels=3).save_pretrained(folder)


def roberta(config):
    from transformers import RobertaConfig

    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return RobertaConfig(**{name: getattr(config, name) for name in names})


@pytest.mark.parametrize(
    "how, message",
    [
        ("no weights", "Error no file named"),
        ("damaged weights", "Error while deserializing"),
        ("no BERT", "is a roberta model"),
        ("tensors lack", "lack 2 tensors of BERT, such as bert.encoder.layer.1.output.dense.bias"),
        ("other vocabulary", "its tokenizer has"),
        ("three labels", "cannot be loaded"),
    ],
)
def test_models_that_do_not_fit_are_refused(place, call, how, message):
    damage(place, how)
    code, _, _, err = call("--rank", 1)
    assert code == 2 and message in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: --model tiny")


def test_weights_in_16_bits_are_trained_in_32(place):
    model = BertForSequenceClassification.from_pretrained(place / "tiny").half()
    model.save_pretrained(place / "tiny")
    assert {p.dtype for p in bert.load_model(str(place / "tiny"))[0].parameters()} == {torch.float32}


def test_a_loss_that_is_no_number_ends_the_run(place, call):
    model = BertForSequenceClassification.from_pretrained(place / "tiny", num_labels=2)
    model.bert.pooler.dense.bias.data[0] = math.nan
    model.save_pretrained(place / "tiny")
    code, _, out, err = call("--rank", 1)
    assert code == 2 and "the training loss is nan at step 1" in err and "%" not in out


@pytest.mark.parametrize("package, argv", [("transformers", ["--kappa", 0.1]), ("peft", ["--rank", 2])])
def test_missing_extras_are_named_with_the_remedy(call, monkeypatch, package, argv):
    monkeypatch.setitem(sys.modules, package, None)
    code, _, _, err = call(*argv)
    assert code == 2 and re.search(rf"^error: {package} cannot be imported .*requirements-nlp\.txt\n$", err)


def test_names(place, monkeypatch):
    assert bert.display_name("bert-base-uncased") == bert.display_name("google-bert/bert-base-uncased") == "BERT-base"
    assert bert.display_name("prajjwal1/bert-tiny") == "prajjwal1/bert-tiny"
    assert bert.display_name("tiny") == bert.display_name("tiny/") == bert.display_name("RTE/../tiny") == "tiny"
    monkeypatch.chdir("tiny")
    assert bert.display_name(".") == "tiny"


def test_an_interruption_is_no_traceback(call, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bert, "train", interrupted)
    code, _, _, err = call("--kappa", 0.1)
    assert code == 130 and err.splitlines()[-1] == "interrupted"


def test_the_command_works_in_its_folder(place):
    """As a program of its own, from BERT/, where this project's root is not first on the path."""
    flags = ["--model", place / "tiny", "--data_dir", place / "RTE", "--shots", "4", "--max_steps", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "main.py", "--kappa", "0.01", *flags]
    done = subprocess.run(command, cwd=rte.ROOT / "BERT", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"SO - tiny RTE-8shot: \d+\.\d%", done.stdout.splitlines()[-1])
