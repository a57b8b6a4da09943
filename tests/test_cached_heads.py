"""Heads that are trained on cached features: beside plain loops on fixed features in float64, and what they share."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.runs import experiment_of

import clip
import datasets
import train
import utils
from arguments import parse
from clip import WeightsError
from common import UserError
from datasets import Item, Task
from experiment import Experiment
from methods import METHODS
from methods.choice import epoch_cosine
from methods.heads.cross_modal import warmed_cosine

C, K, V, T, E = 4, 3, 3, 2, 6  # classes, shots, views, templates, width
N = C * K
TEMPLATES = ("a {}.", "the {}.")


def task_of(*labels, names=tuple(f"kind {c}" for c in range(C))):
    return Task("fixed", names, TEMPLATES, tuple(Item(str(i), c) for i, c in enumerate(labels)), (), (), None)


TASK = task_of(*(i % C for i in range(N)))  # image i is of class i % C


def unit(x):
    return x / x.square().sum(dim=-1, keepdim=True).sqrt()


@pytest.fixture(scope="module")
def fixed():
    """Features as the encoder gives them: text [T, C, E], and views of images [V, N, E]."""
    generator = torch.Generator().manual_seed(0)
    text = 3 * torch.randn(T, C, E, generator=generator, dtype=torch.float64)
    images = text[0].repeat(K, 1) + 5 * torch.randn(V, N, E, generator=generator, dtype=torch.float64)
    return text, images


@pytest.fixture(scope="module")
def tiny():
    return clip.load("tiny")[0]


@pytest.fixture
def head_of(fixed, tiny):
    """Make a head on the fixed features."""

    def make(method, task=TASK, text=fixed[0], **values):
        experiment = experiment_of(method, task, tiny, shots=K, **values)
        hparams = experiment.hparams
        experiment.features[("text", task.class_names, task.templates)] = text
        for mirrored in (False, True):
            experiment.features[("train", task.train, mirrored)] = unit(fixed[1][int(mirrored)])
        if hasattr(hparams, "min_area"):
            views = getattr(hparams, "views", 1)
            key = ("augmented", task.train, views, hparams.min_area, hparams.flip)
            experiment.features[key] = fixed[1][:views]
        return train.adapt(experiment)

    return make


def trained(head, monkeypatch):
    """Train a head, and return loss, lr and tensors of every update."""
    step, after, parts, updates = train._step, head.after_step, [], []

    def recorded(experiment, adaptation, *batch):
        lr = adaptation.optimizer.param_groups[0]["lr"]
        sums = step(experiment, adaptation, *batch)
        parts.append((sums[0].item(), sums[2].item(), lr))
        return sums

    def snapshot(iteration):
        after(iteration)
        losses, images, rates = zip(*parts)
        updates.append((sum(losses) / sum(images), rates[-1], {n: p.detach().clone() for n, p in named.items()}))
        parts.clear()

    named, head.after_step = head.parameters, snapshot
    monkeypatch.setattr(train, "_step", recorded)
    train.fit(head.experiment, head, head.batches(0))
    return updates


def check(updates, *expected):
    """Compare updates with the losses, rates and tensors of a plain loop."""
    assert len(updates) == len(expected) == 20
    for (loss, lr, tensors), (plain_loss, plain_lr, plain) in zip(updates, expected):
        assert loss == pytest.approx(plain_loss.item(), rel=1e-11) and lr == pytest.approx(plain_lr, rel=1e-11)
        for name, tensor in plain.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-10, atol=1e-13)
    last, first = updates[-1][2], updates[0][2]
    assert all((last[name] - first[name]).abs().max() > 1e-3 for name in last)


def mean_loss(logit, rows, labels, *weights):
    """Cross-entropy with logits that `logit(row, class, *weights)` makes one by one."""
    total = 0
    for row, label in zip(rows, labels):
        logits = [logit(row, c, *weights) for c in range(C)]
        total = total + torch.stack(logits).logsumexp(dim=0) - logits[label]
    return total / len(labels)


def dassl_rate(lr, update, per_epoch, epochs):
    epoch = update // per_epoch
    return 1e-5 if epoch == 0 else lr * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2


def view_batch(images, update, per_epoch, size):
    """The rows of an update where epoch e has view e modulo V, and their labels."""
    epoch, batch = divmod(update, per_epoch)
    positions = datasets.shuffled(N, 3, epoch).tolist()[batch * size : (batch + 1) * size]
    return [images[epoch % V, p] for p in positions], [p % C for p in positions]


@pytest.mark.parametrize("method", ["zs_lp", "clap"])
def test_prototypes_beside_a_plain_loop(fixed, head_of, monkeypatch, method):
    text, images = fixed
    t, pool = (text[0] + text[1]) / 2, [images[v, i] for v in range(V) for i in range(N)]
    w, velocity, expected = t.clone(), torch.zeros_like(t), []
    multipliers = [0.0] * C

    def logit(f, c, w):
        return 100 * unit(f) @ unit(w[c])

    if method == "clap":
        of_class = [[unit(f) for p, f in enumerate(pool) if p % C == c] for c in range(C)]
        sure = [[(100 * unit(t) @ f).softmax(dim=0)[c].item() for f in of_class[c]] for c in range(C)]
        multipliers = [sum(sure[c]) / len(sure[c]) for c in range(C)]
        assert 0 < min(multipliers) < max(multipliers) < 1
    for update in range(20):
        epoch, batch = divmod(update, 2)  # 12 images in batches of 5: two an epoch, from 36 views
        rows = datasets.shuffled(V * N, 3, epoch).tolist()[batch * 5 : (batch + 1) * 5]
        w.requires_grad_()
        loss = mean_loss(logit, [pool[p] for p in rows], [p % C for p in rows], w)
        pull = sum(multipliers[c] * ((w[c] - t[c]) ** 2).sum() for c in range(C)) / C
        (gradient,) = torch.autograd.grad(loss + pull, w)
        lr, velocity = dassl_rate(0.1, update, 2, 10), 0.9 * velocity + gradient
        w = w.detach() - lr * velocity
        expected.append((loss, lr, {"weight": w}))
    head = head_of(method, views=V, batch_size=5, epochs=10)
    assert torch.equal(head.weight, t)
    check(trained(head, monkeypatch), *expected)


def test_taskres_beside_a_plain_loop(fixed, head_of, monkeypatch):
    text, images = fixed
    t = (text[0] + text[1]) / 2
    x, m, v, expected = torch.zeros_like(t), 0, 0, []

    def logit(f, c, x):
        return 100 * unit(f) @ unit(t[c] + 0.7 * x[c])

    for update in range(20):
        x.requires_grad_()
        loss = mean_loss(logit, *view_batch(images, update, 2, 5), x)
        gradient = torch.autograd.grad(loss, x)[0] + 5e-4 * x.detach()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        lr, k = dassl_rate(2e-3, update, 2, 10), update + 1
        x = x.detach() - lr * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
        expected.append((loss, lr, {"residual": x}))
    head = head_of("taskres", views=V, batch_size=5, epochs=10, taskres_alpha=0.7)
    assert not head.residual.any()
    check(trained(head, monkeypatch), *expected)


def test_clip_adapter_beside_a_plain_loop(fixed, head_of, monkeypatch):
    text, images = fixed
    text = torch.nn.functional.pad(text, (0, 2))  # 8 wide: two hidden units
    images = torch.nn.functional.pad(images, (0, 2), value=1.0)
    head = head_of("clip_adapter", text=text, views=V, batch_size=5, epochs=10, lr=0.05, adapter_ratio=0.3)
    (key,) = [key for key in head.experiment.features if key[0] == "augmented"]
    head.experiment.features[key] = images
    t, W = unit(unit(text[0]) + unit(text[1])), [head.down.detach().clone(), head.up.detach().clone()]
    assert [w.shape for w in W] == [(2, 8), (8, 2)] and W[0].abs().max() < 8**-0.5 and 0.5 < W[1].abs().max() < 2**-0.5
    velocities, expected = [0, 0], []

    def logit(x, c, down, up):  # of the feature as the encoder gives it, not of unit length
        adapted = (up @ (down @ x).clamp(min=0)).clamp(min=0)
        return 100 * unit(0.3 * adapted + 0.7 * x) @ t[c]

    for update in range(20):
        W = [w.requires_grad_() for w in W]
        loss = mean_loss(logit, *view_batch(images, update, 2, 5), *W)
        gradients, lr = torch.autograd.grad(loss, W), dassl_rate(0.05, update, 2, 10)
        velocities = [0.9 * u + g + 5e-4 * w.detach() for u, g, w in zip(velocities, gradients, W)]
        W = [w.detach() - lr * u for w, u in zip(W, velocities)]
        expected.append((loss, lr, dict(zip(("down", "up"), W))))
    check(trained(head, monkeypatch), *expected)


def test_lp_plus_plus_beside_a_plain_loop(fixed, head_of, monkeypatch):
    text, images = fixed
    t, f = unit(unit(text[0]) + unit(text[1])), unit(images[0])
    w = torch.stack([f[c] + f[C + c] + f[2 * C + c] for c in range(C)])  # sums
    cosines = [sum(f[i] @ t[c] for i in range(c, N, C)).item() / K for c in range(C)]
    alpha = torch.full((C,), 250 * sum(cosines) / C, dtype=torch.float64)
    lr = 0.5 * 4 * N / torch.linalg.eigvalsh(f.T @ f).max().item()
    lr_alpha = 0.5 * N / (4 * max(sum((f[i] @ t[c]).item() ** 2 for i in range(N)) for c in range(C)))
    head = head_of("lp_plus_plus", batch_size=5, epochs=20, lr=0.5)  # three parts of an update
    b, velocity, summed, expected = head.bias.detach().clone(), [0, 0], 0, []
    assert b.std() > 0.1 and b.abs().max() < E**-0.5

    def logit(x, c, w, b, alpha):
        return w[c] @ x + b[c] + alpha[c] * (x @ t[c])

    for update in range(1, 21):
        parts = [p.requires_grad_() for p in (w, b, alpha)]
        loss = mean_loss(logit, f, [i % C for i in range(N)], *parts)
        *gradients, of_alpha = torch.autograd.grad(loss, parts)
        velocity, summed = [0.9 * u + g for u, g in zip(velocity, gradients)], summed + of_alpha
        w, b, alpha = (p.detach() for p in parts)
        w, b = w - lr * velocity[0], b - lr * velocity[1]
        if update % 10 == 0:
            alpha = alpha - lr_alpha * summed  # never cleared
        expected.append((loss, lr, {"weight": w, "bias": b, "alpha": alpha}))
    check(trained(head, monkeypatch), *expected)


def test_cross_modal_beside_a_plain_loop(fixed, head_of, monkeypatch):
    text, images = fixed
    start = unit((text[0] + text[1]) / 2)
    w, m, v, expected = start.clone(), 0, 0, []

    def logit(x, c, w):
        return 100 * x @ w[c]

    for update in range(20):
        # 24 images, 8 texts: passes of 8 and of 2 batches of 3
        order = datasets.shuffled(2 * N, 3, 1 + update // 8).tolist()[update % 8 * 3 : (update % 8 + 1) * 3]
        texts = datasets.shuffled(T * C, 3, -1 - update // 2).tolist()[update % 2 * 3 : (update % 2 + 1) * 3]
        rows = [unit(images[p // N, p % N]) for p in order] + [unit(text[p // C, p % C]) for p in texts]
        w.requires_grad_()
        loss = mean_loss(logit, rows, [p % C for p in (*order, *texts)], w)
        (gradient,) = torch.autograd.grad(loss, w)
        lr, k = (0.05 * update / 50 if update else 1e-5), update + 1
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        w = w.detach() * (1 - lr * 0.02) - lr * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
        expected.append((loss, lr, {"weight": w}))
    head = head_of("cross_modal", batch_size=3, total_iters=20, lr=0.05, weight_decay=0.02, wise_ft=0.25)
    assert torch.equal(head.weight, start)
    check(trained(head, monkeypatch), *expected)
    torch.testing.assert_close(head.weight.detach(), 0.75 * w + 0.25 * start)


def test_cross_modal_takes_all_texts_where_there_are_too_few(head_of):
    head = head_of("cross_modal", batch_size=50, total_iters=3, flip=False)
    head.build()
    for features, labels in head.batches(0):
        assert len(features) == N + T * C
        assert labels[:N].bincount().tolist() == [K] * C and labels[N:].bincount().tolist() == [T] * C


def test_schedules_of_the_first_iterations():
    rates = [2e-3 * epoch_cosine(2e-3, 100, 2, 1e-5)(i) for i in (0, 1, 2, 3, 4, 5, 6, 199)]
    expected = [1e-5, 1e-5, 2e-3, 2e-3, 1.9995065604e-3, 1.9995065604e-3, 1.9980267284e-3, 1.9732715717e-6]
    assert rates == pytest.approx(expected, rel=1e-9)
    rates = [1e-3 * warmed_cosine(1e-3, 12800)(i) for i in (0, 1, 2, 49, 50, 51, 6450, 12799)]
    expected = [1e-5, 2e-5, 4e-5, 9.8e-4, 1e-3, 9.9999998494e-4, 5e-4, 3.9170083417e-8]
    assert rates == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "method, weights",
    [("zs_lp", 512), ("clap", 512), ("taskres", 512), ("cross_modal", 512), ("lp_plus_plus", 514), ("clip_adapter", 0)],
)
def test_trained_weights_of_vit_b16(head_of, method, weights):
    names = tuple(f"texture {c}" for c in range(47))
    head = head_of(method, task_of(names=names), text=torch.randn(1, 47, 512))
    assert head.trainable_weights == head.saved.changed_weights() == (47 * weights or 131_072)


def test_published_values():
    def hparams(method, shots, dataset="dtd", images=47):
        own = parse(["--method", method, "--dataset", dataset, "--root_path", "x", "--shots", str(shots)]).hparams
        return own.settled(shots, images * shots)

    for method in ("zs_lp", "clap"):
        own = hparams(method, 1)
        assert (own.lr, own.batch_size, own.views, own.min_area, own.total_iters) == (0.1, 256, 20, 0.08, 300)
        assert hparams(method, 16).total_iters == 300 * 2  # 752 images: two whole batches
    own = hparams("taskres", 4)
    assert (own.lr, own.batch_size, own.taskres_alpha, own.min_area) == (2e-3, 256, 0.5, 0.08)
    assert [hparams("taskres", shots).epochs for shots in (1, 2, 4, 8, 16)] == [100, 100, 100, 200, 200]
    assert (hparams("taskres", 1, "imagenet").lr, hparams("taskres", 1, "oxford_flowers").taskres_alpha) == (2e-4, 1)
    own = hparams("clip_adapter", 1)
    assert (own.lr, own.batch_size, own.adapter_ratio, own.total_iters) == (2e-3, 32, 0.2, 50)
    assert [hparams("clip_adapter", 16, dataset).epochs for dataset in ("dtd", "imagenet")] == [200, 50]
    own = hparams("lp_plus_plus", 4)
    assert (own.lr, own.epochs, own.min_area, own.total_iters) == (1.0, 300, 0.5, 300)
    own = hparams("cross_modal", 4)
    assert (own.lr, own.weight_decay, own.batch_size, own.total_iters, own.wise_ft) == (1e-4, 0.01, 4, 12800, 0)
    assert all(hparams(name, 1).early_stop_loss == 0 for name in ("clap", "taskres", "lp_plus_plus", "cross_modal"))


# --- what a file serves


@pytest.mark.parametrize("method", ["zs_lp", "clap", "taskres", "lp_plus_plus", "cross_modal", "linear_probe"])
def test_some_of_the_classes_take_their_rows_and_other_classes_are_rejected(fixed, head_of, tmp_path, method):
    options = {} if method == "linear_probe" else {"total_iters": 5}
    head, path = head_of(method, **options), tmp_path / "head.safetensors"
    with torch.no_grad():
        for tensor in head.saved.tensors.values():
            tensor.copy_(torch.randn(tensor.shape))
    head.saved.save(path, head.experiment.base_sha256, {})
    some = head_of(method, task_of(names=("kind 3", "kind 1")), text=fixed[0][:, [3, 1]], **options)
    some.saved.load(path, some.experiment.base_sha256)
    tensor = next(iter(head.saved.tensors.values()))
    features = unit(torch.randn(5, tensor.shape[1], dtype=tensor.dtype))
    whole, rows = (h.logits(features, h.text_classifier().to(features)) for h in (head, some))
    torch.testing.assert_close(rows, whole[:, [3, 1]])
    for names in (("kind 1", "other"), ("kind 1", "kind 1")):
        other = head_of(method, task_of(names=names), text=fixed[0][:, :2], **options)
        with pytest.raises(WeightsError, match="4 other classes"):
            other.saved.load(path, other.experiment.base_sha256)


def test_the_adapter_serves_other_classes(run_main):
    flags = ("--method", "clip_adapter", "--shots", 1, "--save_path", "saved", "--epochs", 2)
    assert run_main(*flags, "--classes", "base")[0] == 0
    code, record, _, err = run_main(*flags[:6], "--classes", "new", "--eval_only")
    assert code == 0, err
    assert record["trainable_weights"] == 2 * 16 * 64 and record["test_accuracy"] > 50
    assert run_main("--method", "taskres", *flags[2:], "--classes", "base")[0] == 0
    assert run_main("--method", "taskres", *flags[2:6], "--classes", "new", "--eval_only")[0] == 2


# --- what is computed once


def test_views_are_computed_once_for_a_search_and_for_other_methods(run_main, monkeypatch, tmp_path):
    computed, compute = [], Experiment._augmented_features
    monkeypatch.setattr(Experiment, "_augmented_features", lambda *args: computed.append(args[1]) or compute(*args))
    flags = ("--shots", 1, "--cache_dir", "cache", "--epochs", 2)
    _, first, _, _ = run_main("--method", "clap", *flags, "--search", "lr=0.01,0.1")
    for method in ("zs_lp", "taskres", "clip_adapter", "clap"):
        assert run_main("--method", method, *flags)[0] == 0
    assert computed == [20]
    assert run_main("--method", "clap", *flags, "--seed", 4)[0] == run_main("--method", "lp_plus_plus", *flags)[0] == 0
    assert computed == [20, 20, 1]
    for file in Path("cache").iterdir():  # as if the features had taken an hour
        saved = load_file(file)
        save_file(saved | {"seconds": torch.tensor(3600.0)}, file)
    _, cached, _, _ = run_main("--method", "taskres", *flags, "--force")
    assert cached["train_seconds"] > 3600 > first["train_seconds"]


def test_lp_plus_plus_resumes_with_the_gradients_of_alpha(head_of):
    whole, head, resumed = (head_of("lp_plus_plus", epochs=30) for _ in range(3))
    train.fit(whole.experiment, whole, whole.batches(0))
    head.experiment.hparams = dataclasses.replace(head.experiment.hparams, total_iters=15)
    train.fit(head.experiment, head, head.batches(0))
    resumed.build()
    resumed.load_state_dict(head.state_dict())
    for iteration, batch in enumerate(resumed.batches(15), start=16):
        train._step(resumed.experiment, resumed, *batch, iteration)
        resumed.after_step(iteration)
    for name, tensor in whole.parameters.items():
        assert torch.equal(resumed.parameters[name], tensor), name


def test_what_cannot_be_trained(head_of):
    for method in ("clap", "lp_plus_plus"):
        task = task_of(*(0, 1, 2) * (N // 3))  # none of class 3
        with pytest.raises(UserError, match=f"{method} needs training images of every class"):
            head_of(method, task).build()
    with pytest.raises(UserError, match="lp_plus_plus trains in whole epochs"):
        head_of("lp_plus_plus", batch_size=5, total_iters=7)
    for method, values in (("taskres", {"taskres_alpha": 0.0}), ("clip_adapter", {"adapter_ratio": 1.5})):
        with pytest.raises(UserError, match=f"--{next(iter(values))} "):
            METHODS[method].Hparams(**values)


def test_text_embeddings_are_the_encoders_own(tiny):
    embeddings = experiment_of("clap", TASK, tiny).text_embeddings()
    with torch.no_grad():
        expected = tiny.encode_text(clip.tokenize(["the kind 2."]))[0]
    torch.testing.assert_close(embeddings[1, 2], expected)
    assert embeddings.shape == (T, C, 64) and expected.norm() > 1.1
    head = METHODS["clip_adapter"].prepare(experiment_of("clip_adapter", TASK, tiny, epochs=1))
    torch.testing.assert_close(head.zero_shot, utils.text_classifier(tiny, TASK.class_names, TEMPLATES))
