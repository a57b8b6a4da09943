"""ProLIP: its penalty by hand, its training beside a plain full-batch loop, and what it leaves alone."""

import dataclasses

import pytest
import torch
from support.runs import TASK
from support.training import cosine, fitted, noise, plain_loss, prepared
from support.weights import RESNET, small_clip

import clip
from arguments import parse
from common import UserError
from datasets import Item, Task
from methods.weights.prolip import Hparams

FIVE = Task("noise", TASK.class_names, TASK.templates, tuple(Item(str(i), i % 3) for i in range(5)), (), (), None)


def prolip(**options):
    """An epoch is five images, read two at a time."""
    given = {"epochs": 4, "batch_size": 2, "lr": 3e-3, "shots": 2}
    return prepared("prolip", FIVE, **given | options)


def test_penalty_and_its_gradient_by_hand():
    adaptation = prolip(prolip_lambda=3.0, shots=4)
    assert adaptation.penalty(None).item() == 0
    with torch.no_grad():
        adaptation.projection[3, 5] += 0.5
        adaptation.projection[0, 1] -= 2
    penalty = adaptation.penalty(None)
    assert penalty.item() == pytest.approx(3 / 4 * (0.5**2 + 2**2))
    (gradient,) = torch.autograd.grad(penalty, adaptation.projection)
    expected = torch.zeros_like(gradient)
    expected[3, 5], expected[0, 1] = 3 / 4 * 2 * 0.5, 3 / 4 * 2 * -2
    torch.testing.assert_close(gradient, expected)


def test_training_beside_a_plain_loop_over_whole_epochs():
    adaptation, epochs = prolip(prolip_lambda=0.5), noise(4, images=5)
    fit = fitted(adaptation, [part for images, labels in epochs for part in zip(images.split(2), labels.split(2))])
    model = clip.load("tiny")[0].double()
    W = model.visual.proj
    start, m, v, losses = W.detach().clone(), torch.zeros_like(W), torch.zeros_like(W), []
    for step, batch in enumerate(epochs, start=1):
        losses.append(plain_loss(model, *batch))
        (gradient,) = torch.autograd.grad(losses[-1] + 0.25 * ((W - start) ** 2).sum(), W)
        lr = cosine(3e-3, step - 1, 4, lowest=0)
        with torch.no_grad():
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            W -= lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-4)
    assert (W - start).abs().max() > 5e-3
    torch.testing.assert_close(adaptation.projection, W, rtol=0, atol=2e-5)
    assert [row["iteration"] for row in fit.curve] == [3, 6, 9, 12]
    assert [row["loss"] for row in fit.curve] == pytest.approx([loss.item() for loss in losses], rel=1e-3)
    assert fit.last["lr"] == pytest.approx(lr)


@pytest.mark.parametrize(
    "model, name", [(None, "visual.proj"), (small_clip(RESNET), "visual.attnpool.c_proj.weight")], ids=["vit", "resnet"]
)
def test_only_the_projection_is_trained(model, name):
    adaptation = prolip(model=model)
    model = adaptation.model
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adaptation.parameters) == {name}
    assert adaptation.trains_images and not adaptation.trains_text
    assert adaptation.trainable_weights == model.get_parameter(name).numel()
    images = noise(1)[0][0].to(model.logit_scale.dtype)
    images = torch.nn.functional.interpolate(images, model.arch.resolution)
    (gradient,) = torch.autograd.grad(model.encode_image(images).sum(), adaptation.projection)
    assert gradient.abs().sum() > 0


def test_published_values():
    hparams = parse(["--method", "prolip", "--dataset", "dtd", "--root_path", "data", "--shots", "4"]).hparams
    assert (hparams.lr, hparams.epochs, hparams.early_stop_loss, hparams.min_area) == (1e-5, 300, 0, 0.5)
    assert hparams.settled(4, images=4 * 47).total_iters == 300
    adaptation = prolip(lr=hparams.lr, shots=4)
    assert adaptation.weight == 1 / 4 and type(adaptation.optimizer) is torch.optim.Adam
    (group,) = adaptation.optimizer.param_groups
    assert (group["lr"], group["eps"], group["weight_decay"], group["betas"]) == (1e-5, 1e-4, 0, (0.9, 0.999))


def test_values_that_cannot_work():
    with pytest.raises(UserError, match="--prolip_lambda"):
        Hparams(prolip_lambda=-1.0)
    with pytest.raises(UserError, match=r"epochs.* 3 iterations.* 13 .*--epochs"):
        prolip(total_iters=13)
    assert prepared("prolip", dataclasses.replace(TASK, train=()), total_iters=13).parameters  # an evaluation
