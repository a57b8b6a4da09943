"""Classifiers on frozen features: what all of them have in common, from whole runs to damaged files."""

from pathlib import Path

import pandas as pd
import pytest
import safetensors
import torch
from safetensors.torch import load_file
from support.fabricate import fabricate

import clip
import datasets
import methods
from clip.weights import save_tensors, save_weights
from run_utils import Settings

HEADS = {  # method: its tensors after two shots of the ten digits; which of them are trained
    "linear_probe": ({"weight": (10, 64), "bias": (10,)}, {"weight", "bias"}),
    "tip_adapter": ({"keys": (20, 64), "labels": (20,)}, set()),
    "tip_adapter_f": ({"keys": (20, 64), "labels": (20,)}, {"keys"}),
}
QUICK = ("--shots", 2, "--workers", 0)


def flags_of(method):
    return (*QUICK, "--method", method, *(("--epochs", 3, "--lr", "0.01") if method == "tip_adapter_f" else ()))


def checkpoint_of(method, dataset="digits"):
    return Path(f"saved/tiny/{dataset}/2shots/seed3/{method}.safetensors")


def size(shape):
    return torch.Size(shape).numel()


@pytest.mark.parametrize("method", HEADS)
def test_a_run_its_weights_and_their_evaluation(run_main, monkeypatch, method):
    code, trained, out, _ = run_main(*flags_of(method), "--save_path", "saved")
    shapes, trainable = HEADS[method]
    tensors = load_file(checkpoint_of(method))
    assert code == 0 and {name: tuple(t.shape) for name, t in tensors.items()} == shapes
    weights = {name: size(shape) for name, shape in shapes.items() if name != "labels"}
    assert trained["trainable_weights"] == sum(n for name, n in weights.items() if name in trainable)
    assert trained["changed_weights"] == sum(weights.values())
    assert trained["checkpoint_bytes"] == checkpoint_of(method).stat().st_size
    assert trained["iterations"] == (3 if method == "tip_adapter_f" else 0)
    assert trained["test_accuracy"] not in (0, trained["zero_shot_accuracy"])
    assert trained["train_seconds"] > 0 and (trained["final_loss"] is None) == (method != "tip_adapter_f")
    row = pd.read_csv("results/results.csv").iloc[0]
    assert row.method == method and row.test_accuracy == trained["test_accuracy"]
    for name in methods.METHODS[method].HYPERPARAMETERS:
        assert name == "n_iters" or name in row

    assert "already done" in run_main(*flags_of(method), "--save_path", "saved")[2]
    checkpoint_of(method).unlink()
    _, again, out, _ = run_main(*flags_of(method), "--save_path", "saved")  # without its weights it is not done
    assert "already done" not in out and again["test_accuracy"] == trained["test_accuracy"]
    assert all(torch.equal(t, tensors[name]) for name, t in load_file(checkpoint_of(method)).items())

    def no_images(*_, **__):
        pytest.fail("an evaluation of saved weights looked at training images")

    for name in ("augmented_loader", "training_loader", "test_loader"):
        monkeypatch.setattr(datasets, name, no_images)  # features of the test images are cached
    _, evaluated, _, _ = run_main(*flags_of(method), "--save_path", "saved", "--eval_only")
    for name in ("test_accuracy", "changed_weights", "trainable_weights", "checkpoint_bytes"):
        assert evaluated[name] == trained[name]


@pytest.mark.parametrize("method", HEADS)
def test_the_seed_decides(run_main, method):
    def accuracy_and_bytes(results, *extra):
        _, record, _, _ = run_main(*flags_of(method), *extra, "--results_dir", results, "--save_path", results)
        (path,) = Path(results).rglob("*.safetensors")
        return record["test_accuracy"], {name: t.tolist() for name, t in load_file(path).items()}

    first = accuracy_and_bytes("a")
    assert first == accuracy_and_bytes("b", *(("--workers", 2) if method == "tip_adapter" else ()))
    assert first[1] != accuracy_and_bytes("c", "--seed", 4)[1]


@pytest.mark.parametrize("method", HEADS)
def test_bf16(run_main, method):
    code, bf16, _, _ = run_main(*flags_of(method), "--precision", "bf16", "--save_path", "saved")
    assert code == 0 and bf16["test_accuracy"] > 60
    tensors = load_file(checkpoint_of(method)).values()
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in tensors)


@pytest.mark.parametrize("method", HEADS)
def test_every_hyperparameter_identifies_a_run(method):
    values = dict(probe_c=3.0, probe_iters=7, text_init=True, tip_alpha=2.0, tip_beta=3.0, cache_passes=2)
    values |= dict(min_area=0.7, flip=False, lr=0.5, n_iters=9, total_iters=8, batch_size=5, early_stop_loss=0.5)
    values |= dict(eval_every=4, density_ratio=0.5, encoder="text", prolip_lambda=7.0)
    base = Settings(backbone="tiny", device="cpu", method=method)
    for name, value in values.items():
        other = Settings(backbone="tiny", device="cpu", method=method, **{name: value})
        assert (other.run_id != base.run_id) == (name in methods.METHODS[method].HYPERPARAMETERS), name


@pytest.mark.parametrize("method", HEADS)
def test_a_head_belongs_to_its_weights_its_classes_and_its_method(run_main, tmp_path, method):
    for name, classes in (("data", 3), ("more", 4)):
        fabricate("dtd", tmp_path / name, classes=classes)
    flags = (*flags_of(method), "--save_path", "saved", "--dataset", "dtd", "--backbone", "tiny", "--root_path")
    assert run_main(*flags, "data")[0] == 0
    path = checkpoint_of(method, "dtd")
    code, _, _, err = run_main(*flags, "more", "--eval_only")
    assert code == 2 and str(path) in err and "3 other classes (kind_0, kind_1, kind_2" in err

    model, _ = clip.load("tiny")
    with torch.no_grad():
        model.logit_scale += 1
    save_weights(model, "tiny.safetensors")  # the same name, other weights
    code, _, _, err = run_main(*flags, "data", "--eval_only", "--backbone", "tiny.safetensors")
    assert code == 2 and str(path) in err and "other base weights" in err

    other = "tip_adapter" if method != "tip_adapter" else "linear_probe"
    code, _, _, err = run_main(*flags, "data", "--eval_only", "--method", other, "--filename", method)
    assert code == 2 and str(path) in err and f"--method {method}" in err


@pytest.fixture
def task():
    return datasets.build("digits", None, 2, 3)


def prepared(method, task):
    model, _ = clip.load("tiny")
    settings = Settings(backbone="tiny", device="cpu", workers=0, method=method, cache_passes=1)
    return methods.METHODS[method].prepare(model, task, settings)


@pytest.mark.parametrize("method", HEADS)
def test_what_a_head_says_of_itself(method, task):
    head = prepared(method, task)
    assert head.has_weights and not head.trains_images and not head.trains_text
    assert not any(p.requires_grad for p in head.model.parameters())
    assert set(head.parameters) == HEADS[method][1] and (head.optimizer is None) == (method != "tip_adapter_f")
    other = methods.METHODS["zero_shot"].prepare(head.model, task, None)
    assert not other.has_weights


@pytest.mark.parametrize("method", HEADS)
def test_a_damaged_head_is_refused_whole(method, task, tmp_path):
    head, path = prepared(method, task), tmp_path / "new" / "head.safetensors"
    head.build()
    head.save(path, "a" * 64, {"method": method})
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    whole = load_file(path)
    assert metadata["method"] == method and metadata["base_sha256"] == "a" * 64

    def refusal(tensors, **changes):
        save_tensors(tensors, path, metadata | changes)
        fresh = prepared(method, task)
        before = {name: t.detach().clone() for name, t in fresh.tensors.items()}
        with pytest.raises(clip.WeightsError) as caught:
            fresh.load(path, "a" * 64)
        assert all(torch.equal(t, before[name]) for name, t in fresh.tensors.items())
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    first, last = whole
    assert f"no {last} " in refusal({first: whole[first]})
    length = "different lengths" if "tip" in method else f"no {last} "  # a cache is as long as what it was trained on
    assert length in refusal({**whole, last: whole[last][:-1]})
    assert f"no {last} " in refusal({**whole, last: whole[last].to(torch.float16)})
    assert "clip-head" in refusal(whole, format="clip-sparse-delta-1")
    assert "other base" in refusal(whole, base_sha256="b" * 64)
    reordered = '["one", "zero", "two", "three", "four", "five", "six", "seven", "eight", "nine"]'
    assert "10 other classes (one, zero" in refusal(whole, class_names=reordered)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(clip.WeightsError, match="readable"):
        prepared(method, task).load(path, "a" * 64)
