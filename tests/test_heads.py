"""Classifiers on frozen features: what they train, what they save, and whom their files belong to."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from support.fabricate import fabricate
from support.runs import refused
from support.training import prepared

import clip
import datasets
import train
from clip.weights import save_weights
from methods import METHODS
from methods.heads.head import Head

HEADS = {  # method: its tensors after two shots of the ten digits; which of them are trained
    "linear_probe": ({"weight": (10, 64), "bias": (10,)}, {"weight", "bias"}),
    "tip_adapter": ({"keys": (20, 64), "labels": (20,)}, set()),
    "tip_adapter_f": ({"keys": (20, 64), "labels": (20,)}, {"keys"}),
    "gda": ({"weight": (10, 64), "bias": (10,)}, set()),
    "zs_lp": ({"weight": (10, 64)}, {"weight"}),
    "clap": ({"weight": (10, 64)}, {"weight"}),
    "taskres": ({"residual": (10, 64)}, {"residual"}),
    "lp_plus_plus": ({"weight": (10, 64), "bias": (10,), "alpha": (10,)}, {"weight", "bias", "alpha"}),
    "cross_modal": ({"weight": (10, 64)}, {"weight"}),
    "clip_adapter": ({"down": (16, 64), "up": (64, 16)}, {"down", "up"}),
}


UNTRAINED = ("linear_probe", "tip_adapter", "gda")  # by the training loop


def test_every_head_is_looked_at_here():
    assert HEADS.keys() == {name for name, module in METHODS.items() if module.__name__.startswith("methods.heads.")}


@pytest.fixture(scope="module")
def digits():
    task = datasets.build("digits", None, shots=2, seed=3)
    return dataclasses.replace(task, test=task.test[::9])


@pytest.mark.parametrize("method", HEADS)
def test_what_a_head_trains_and_saves(method, digits, tmp_path):
    head = prepared(method, digits, clip.load("tiny")[0], shots=2)
    shapes, trained = HEADS[method]
    assert isinstance(head, Head) and not head.trains_images and not head.trains_text
    assert not any(p.requires_grad for p in head.model.parameters())
    assert set(head.parameters) == trained and (head.optimizer is None) == (method in UNTRAINED)
    head.saved.save(tmp_path / "head.safetensors", "a" * 64, {})
    saved = load_file(tmp_path / "head.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == shapes
    floats = {name: tensor.numel() for name, tensor in saved.items() if tensor.is_floating_point()}
    assert head.saved.changed_weights() == sum(floats.values())
    assert head.trainable_weights == sum(floats[name] for name in trained)


@pytest.mark.parametrize("method", HEADS)
def test_bf16_features_make_a_float32_head(method, digits, tmp_path):
    options = {"precision": "bf16", "cache_dir": str(tmp_path)} | ({} if method in UNTRAINED else {"total_iters": 1})
    head = prepared(method, digits, clip.load("tiny")[0], shots=2, **options)
    head.build()
    assert train.evaluate(head.experiment, head) > 60
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in head.saved.tensors.values())


def test_a_head_belongs_to_its_weights_its_classes_and_its_method(run_main, tmp_path, monkeypatch):
    for name, classes in (("data", 3), ("more", 4)):
        fabricate("dtd", tmp_path / name, classes=classes)
    flags = ("--shots", 2, "--save_path", "saved", "--dataset", "dtd", "--backbone", "tiny")
    flags = (*flags, "--method", "tip_adapter", "--root_path")
    path = tmp_path / "saved/tiny/dtd/2shots/seed3/tip_adapter.safetensors"
    _, trained, _, _ = run_main(*flags, "data")
    before = load_file(path)
    path.unlink()  # without its weights the run is not done
    _, again, out, _ = run_main(*flags, "data")
    assert "already done" not in out and again["test_accuracy"] == trained["test_accuracy"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(path).items())

    def no_images(*_, **__):
        pytest.fail("an evaluation of saved weights looked at training images")

    for name in ("augmented_loader", "training_loader", "test_loader"):
        monkeypatch.setattr(datasets, name, no_images)  # features of the test images are cached
    _, evaluated, _, _ = run_main(*flags, "data", "--eval_only")
    assert evaluated["test_accuracy"] == trained["test_accuracy"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)

    model, _ = clip.load("tiny")
    with torch.no_grad():
        model.logit_scale += 1
    save_weights(model, "tiny.safetensors")  # the same name, other weights
    for words, message in (
        (("more",), "3 other classes (kind_0, kind_1, kind_2"),
        (("data", "--backbone", "tiny.safetensors"), "other base weights"),
        (("data", "--method", "linear_probe", "--filename", "tip_adapter"), "--method tip_adapter"),
    ):
        error = refused(
            run_main(*flags, *words, "--eval_only"), before=["data", "more", "saved", "results", "tiny.safetensors"]
        )
        assert str(path.relative_to(tmp_path)) in error and message in error
