"""ProLIP: its penalty by hand, its training beside a plain full-batch loop, and what it leaves alone."""

import math

import pytest
import torch

import clip
import datasets
import train
from clip.model import CLIP, Architecture
from methods import METHODS, MethodError
from run_utils import Settings, parse

NAMES = ("cat", "dog", "traffic_light")
ITEMS = tuple(datasets.Item(f"{i}.jpg", i % 3) for i in range(5))
TASK = datasets.Task("noise", NAMES, ("a photo of a {}.",), ITEMS, (), (), None)


def settings_of(**options):
    given = {"total_iters": 12, "batch_size": 2, "early_stop_loss": 0.0, "lr": 3e-3, "shots": 2}
    return Settings(**{"backbone": "tiny", "device": "cpu", "workers": 0, "method": "prolip"} | given | options)


def prepared(**options):
    model, _ = clip.load("tiny")
    return METHODS["prolip"].prepare(model, TASK, settings_of(**options))


def test_penalty_and_its_gradient_by_hand():
    adaptation = prepared(prolip_lambda=3.0, shots=4)
    assert adaptation.penalty().item() == 0
    with torch.no_grad():
        adaptation.projection[3, 5] += 0.5
        adaptation.projection[0, 1] -= 2
    penalty = adaptation.penalty()
    assert penalty.item() == pytest.approx(3 / 4 * (0.5**2 + 2**2), rel=1e-5)
    (gradient,) = torch.autograd.grad(penalty, adaptation.projection)
    expected = torch.zeros_like(gradient)
    expected[3, 5], expected[0, 1] = 3 / 4 * 2 * 0.5, 3 / 4 * 2 * -2
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def epochs_of_noise(epochs):
    """An epoch is five images, read two at a time."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        images = torch.randn(5, 3, 32, 32, generator=generator)
        yield images, torch.tensor([0, 1, 2, 0, 1])


def test_training_beside_a_plain_loop_over_whole_epochs():
    adaptation = prepared(prolip_lambda=0.5)
    batches = [
        (i, y) for images, labels in epochs_of_noise(4) for i, y in zip(images.split(2), labels.split(2))
    ]  # 12 iterations, 4 updates
    fit = train.fit(adaptation.model, TASK, adaptation, batches, settings_of(), None)

    model, _ = clip.load("tiny")
    model.requires_grad_(False)
    W = model.visual.proj
    start, m, v = W.clone(), torch.zeros_like(W), torch.zeros_like(W)
    text = model.encode_text(clip.tokenize([f"a photo of a {name.replace('_', ' ')}." for name in NAMES]))
    text /= text.norm(dim=1, keepdim=True)
    W.requires_grad_(True)
    losses = []
    for step, (images, labels) in enumerate(epochs_of_noise(4), start=1):
        f = model.encode_image(images)
        logits = 100 * (f / f.norm(dim=1, keepdim=True)) @ text.T
        losses.append(-logits.log_softmax(dim=1)[range(5), labels].mean())
        (gradient,) = torch.autograd.grad(losses[-1] + 0.25 * ((W - start) ** 2).sum(), W)
        lr = 3e-3 * (1 + math.cos(math.pi * (step - 1) / 4)) / 2
        with torch.no_grad():
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            W -= lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-4)
    assert (W - start).abs().max() > 5e-3
    torch.testing.assert_close(adaptation.projection, W, rtol=0, atol=2e-5)
    assert [row["iteration"] for row in fit.curve] == [3, 6, 9, 12]
    assert [row["loss"] for row in fit.curve] == pytest.approx([loss.item() for loss in losses], rel=1e-3)
    assert fit.last["lr"] == pytest.approx(lr)


def test_the_projection_alone_is_trained():
    for model, name in (
        (clip.load("tiny")[0], "visual.proj"),
        (CLIP(Architecture(16, 32, 64, (1, 1, 1, 1), None, 77, 99, 64, 1)).eval(), "visual.attnpool.c_proj.weight"),
    ):
        adaptation = METHODS["prolip"].prepare(model, TASK, settings_of())
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adaptation.parameters) == {name}
        assert adaptation.trains_images and not adaptation.trains_text
        assert adaptation.trainable_weights == model.get_parameter(name).numel()
        features = model.encode_image(torch.randn(1, 3, 32, 32))
        (gradient,) = torch.autograd.grad(features.sum(), adaptation.projection)
        assert gradient.abs().sum() > 0


def test_published_settings():
    data = ["--dataset", "dtd", "--root_path", "data", "--shots", "4", "--device", "cpu", "--method", "prolip"]
    settings = parse(data)
    assert (settings.lr, settings.epochs, settings.early_stop_loss, settings.min_area) == (1e-5, 300, 0, 0.5)
    settings = settings.settled(len(ITEMS))
    assert settings.iterations == 300
    model, _ = clip.load("tiny")
    adaptation = METHODS["prolip"].prepare(model, TASK, settings)
    assert adaptation.penalty_weight == 1 / 4
    assert type(adaptation.optimizer) is torch.optim.Adam
    (group,) = adaptation.optimizer.param_groups
    assert (group["lr"], group["eps"], group["weight_decay"], group["betas"]) == (1e-5, 1e-4, 0, (0.9, 0.999))


def test_parts_of_epochs_are_refused():
    with pytest.raises(MethodError, match=r"3 iterations, and 13 are none; use --epochs"):
        prepared(total_iters=13)
    assert prepared(total_iters=13, eval_only=True).parameters


FLAGS = ("--method", "prolip", "--shots", 2, "--workers", 0, "--epochs", 5, "--lr", "1e-2", "--batch_size", 8)


def test_a_run_its_weights_and_their_evaluation(run_main):
    save = (*FLAGS, "--save_path", "saved")
    _, trained, _, _ = run_main(*save)
    assert trained["iterations"] == 15 and trained["trainable_weights"] == 128 * 64  # 20 images, 8 at a time
    assert 0 < trained["changed_weights"] <= 128 * 64 and trained["test_accuracy"] != trained["zero_shot_accuracy"]
    model, _ = clip.load("tiny")
    path = "saved/tiny/digits/2shots/seed3/prolip.safetensors"
    before = {name: t.clone() for name, t in model.state_dict().items()}
    clip.delta.apply_delta(model, path, clip.weights_sha256(model))
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"visual.proj"}
    _, evaluated, _, _ = run_main(*save, "--eval_only")
    assert evaluated["test_accuracy"] == trained["test_accuracy"]
    _, again, _, _ = run_main(*FLAGS, "--results_dir", "again")
    assert (again["test_accuracy"], again["final_loss"]) == (trained["test_accuracy"], trained["final_loss"])
    spelled = [15 if word == 5 else "--total_iters" if word == "--epochs" else word for word in FLAGS]
    assert "already done" in run_main(*spelled)[2]  # five epochs of three iterations
    assert "already done" in run_main("--config", f"results/{trained['run_id']}/config.yaml")[2]


def test_a_strong_pull_keeps_the_projection_at_its_start(run_main):
    def distance(weight):
        model, _ = clip.load("tiny")
        before = model.visual.proj.detach().clone()
        run_main(*FLAGS, "--epochs", 15, "--prolip_lambda", weight, "--save_path", f"s{weight}")
        path = f"s{weight}/tiny/digits/2shots/seed3/prolip.safetensors"
        clip.delta.apply_delta(model, path, clip.weights_sha256(model))
        return (model.visual.proj - before).norm().item()

    free, default, strong = distance(0), distance(1), distance(1e6)
    assert free > default > 3 * strong


def test_bad_settings(run_main):
    code, _, _, err = run_main("--method", "prolip", "--prolip_lambda", "-1")
    assert code == 2 and "--prolip_lambda must be at least 0" in err
    code, _, _, err = run_main("--method", "prolip", "--shots", 2, "--total_iters", 4, "--batch_size", 8)
    assert code == 2 and "whole epochs" in err and "--epochs" in err
