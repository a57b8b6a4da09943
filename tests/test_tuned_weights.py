"""LayerNorm and bias tuning, 2SFS, partial fine-tuning and SHiRA beside plain loops; their weights; 2SFS's classes."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.runs import NAMES, TASK, error_of, experiment_of, in_folder
from support.training import SGD, TOKENS, VIT_B16, AdamW, cosine, fitted, noise, plain_loss, prepared
from support.weights import RESNET

import clip
import datasets
import utils
from arguments import parse
from clip.preprocess import Preprocessing
from clip.preprocess import test_transform as centre_crop
from common import UserError
from datasets import Task
from experiment import Experiment
from methods import METHODS
from methods.choice import reached, select_blocks
from methods.weights.shira import MASKS

STEPS = 20
BIASES = ("ln_pre", "ln_1", "ln_2", "ln_post", "ln_final", "out_proj", "c_fc", "c_proj")
UPPER = ("visual.transformer.resblocks.2", "visual.transformer.resblocks.3", "transformer.resblocks.1")
UPPER += ("visual.ln_post", "visual.proj", "ln_final", "text_projection")
CHOSEN = {  # by the names of the tiny CLIP's parameters
    "layernorm": lambda name: "ln_" in name,
    "bias": lambda name: name.endswith(".bias") and name.split(".")[-2] in BIASES,
    "partial": lambda name: name.startswith(UPPER),
    "two_stage": lambda name: "ln_" in name,
}


def plain_model(method):
    """Return a CLIP and, by name, its parameters that a method trains."""
    model = clip.load("tiny")[0].double()
    return model, {name: p for name, p in model.named_parameters() if CHOSEN[method](name)}


def assert_trained(adaptation, expected, untrained):
    for name, p in adaptation.parameters.items():
        torch.testing.assert_close(p, expected[name], rtol=1e-9, atol=1e-11)
        assert name not in untrained or (p - untrained[name]).abs().max() > 1e-5, name


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["layernorm", "bias", "partial"])
def test_training_beside_a_plain_loop(method):
    adaptation = prepared(method, lr=1e-3, total_iters=STEPS)
    untrained = {name: p.detach().clone() for name, p in adaptation.parameters.items()}
    fit, losses, rates = fitted(adaptation), [], []
    model, parameters = plain_model(method)
    assert parameters.keys() == adaptation.parameters.keys()
    assert {name for name, p in adaptation.model.named_parameters() if p.requires_grad} == parameters.keys()
    own = list(parameters.values())
    optimizer = SGD(own, 5e-4) if method == "partial" else AdamW(own, 0.01)
    for step, batch in enumerate(noise(STEPS)):
        losses.append(plain_loss(model, *batch))
        # Four images: an epoch is one iteration. Without warm-up the rate falls from the first epoch on.
        rates.append(
            1e-3 / 2 * (1 + math.cos(math.pi * step / STEPS)) if method == "partial" else cosine(1e-3, step, 20)
        )
        optimizer.step(own, torch.autograd.grad(losses[-1], own), rates[-1])
    assert [row["loss"] for row in fit.curve] == pytest.approx(
        [loss.item() for loss in losses], rel=1e-6
    )  # the loop adds up in float32
    assert [row["lr"] for row in fit.curve] == pytest.approx(rates)
    assert_trained(adaptation, parameters, untrained)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("first_stage", ["layernorm", "bias"])
def test_both_stages_beside_a_plain_loop(first_stage):
    adaptation = prepared("two_stage", lr=1e-3, total_iters=STEPS, first_stage=first_stage)
    untrained = {name: p.detach().clone() for name, p in adaptation.parameters.items()}
    fit, losses, batches = fitted(adaptation), [], noise(STEPS)
    model, parameters = plain_model(first_stage)
    own = list(parameters.values())
    optimizer = AdamW(own, 0.01)
    for step in range(12):
        losses.append(plain_loss(model, *batches[step]))
        optimizer.step(own, torch.autograd.grad(losses[-1], own), cosine(1e-3, step, 12))
    rows = F.normalize(model.encode_text(TOKENS)).detach().requires_grad_()
    optimizer = AdamW([rows], 0.01)
    for step in range(8):
        images, labels = batches[12 + step]
        features = F.normalize(model.encode_image(images)).detach()
        losses.append(F.cross_entropy(100 * features @ F.normalize(rows).T, labels))
        optimizer.step([rows], torch.autograd.grad(losses[-1], [rows]), cosine(1e-3, step, 8))
    assert [row["loss"] for row in fit.curve] == pytest.approx([loss.item() for loss in losses], rel=1e-6)
    assert_trained(adaptation, parameters | {"classifier": rows}, untrained)
    torch.testing.assert_close(adaptation.text_classifier(), F.normalize(rows))
    assert adaptation.optimizer_bytes == 2 * 8 * rows.numel() + 4  # moments and a counter, of the second stage


# --- SHiRA


def digits_task() -> Task:
    return datasets.build("digits", "", 1, 5)


def plain_scores(mask, task):
    """Return the score of each entry of the matrices of SO: the largest are trained."""
    model = clip.load("tiny")[0].double()
    matrices = {n: p for n, p in model.named_parameters() if p.dim() == 2 and ".resblocks." in n}
    images = torch.stack([centre_crop(Preprocessing(32))(task.read(item)) for item in task.train]).double()
    tokens = utils.tokenize_classes(clip.tokenize, task.class_names, task.templates[0])
    features = [F.normalize(x) for x in (model.encode_image(images), model.encode_text(tokens))]
    loss = F.cross_entropy(100 * features[0] @ features[1].T, torch.tensor([item.label for item in task.train]))
    gradients = torch.autograd.grad(loss, list(matrices.values()))
    weigh = {"magnitude": lambda w, g: w, "gradient": lambda w, g: g, "snip": lambda w, g: w * g}[mask]
    return {name: weigh(w, g).abs().flatten() for (name, w), g in zip(matrices.items(), gradients)}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("mask", MASKS)
def test_shira_trains_the_masked_entries_beside_a_plain_loop(mask, monkeypatch):
    task = digits_task()
    options = {"density_ratio": 0.003, "lr": 1e-3, "total_iters": STEPS, "batch_size": 4}
    adaptation = prepared("shira", task, mask=mask, seed=7, **options)
    monkeypatch.setattr(Experiment, "test_batches", double(Experiment.test_batches))
    batches = [(images, labels) for images, labels in noise(STEPS)]
    fit = fitted(adaptation, batches)
    if mask == "random":  # SO whose support is drawn once
        other = prepared("so_ablation", task, support="static", seed=7, **options)
        losses, after = [row["loss"] for row in fitted(other, batches).curve], other.model.get_parameter
    else:
        model, scores = clip.load("tiny")[0].double(), plain_scores(mask, task)
        own = [model.get_parameter(name) for name in scores]
        chosen = {name: torch.zeros(len(s)).index_fill(0, adaptation.indices[name], 1) for name, s in scores.items()}
        for name, s in scores.items():  # of equal scores any may be chosen
            assert s[chosen[name] == 1].min() >= s[chosen[name] == 0].max()
        optimizer, losses, after = AdamW(own), [], model.get_parameter
        for step, (images, labels) in enumerate(batches):
            tokens = utils.tokenize_classes(clip.tokenize, task.class_names, task.templates[0])
            features = [F.normalize(x) for x in (model.encode_image(images), model.encode_text(tokens))]
            losses.append(F.cross_entropy(100 * features[0] @ features[1].T, labels))
            gradients = torch.autograd.grad(losses[-1], own)
            masked = [g * mask.view(g.shape) for g, mask in zip(gradients, chosen.values())]
            optimizer.step(own, masked, cosine(1e-3, step, STEPS))
        losses = [sum(loss.item() for loss in part) / len(part) for part in zip(*[iter(losses)] * 3)] + [None]
    before = clip.load("tiny")[0].double()
    for name, values in adaptation.parameters.items():
        W = adaptation.model.get_parameter(name)
        torch.testing.assert_close(W, after(name), rtol=1e-9, atol=1e-11)
        changed = (before.get_parameter(name) != W).view(-1).nonzero().view(-1)
        assert torch.equal(changed, adaptation.indices[name]) and len(values) == int(0.003 * W.numel())
    assert [row["loss"] for row in fit.curve][:6] == pytest.approx(losses[:6], rel=1e-6)
    assert adaptation.trainable_weights == sum(int(0.003 * n) for n in map(torch.numel, adaptation.matrices.values()))
    assert adaptation.optimizer_bytes == 16 * adaptation.trainable_weights + 4 * len(adaptation.parameters)


def double(loader):
    return lambda *args: [(images.double(), labels) for images, labels in loader(*args)]


# --- what is trained


@pytest.mark.parametrize(
    "method, options, weights",
    [
        ("layernorm", {}, 65_536),
        ("layernorm", {"outer_norms": False}, 61_440),
        ("layernorm", {"encoder": "text", "position": "top1"}, 6 * 512),
        ("layernorm", {"encoder": "vision", "position": "half-bottom"}, (6 * 4 + 2) * 768),
        ("bias", {}, 124_928),
        ("bias", {"qkv_biases": True}, 171_008),
        ("two_stage", {}, 65_536 + 3 * 512),
        ("two_stage", {"outer_norms": False}, 61_440 + 3 * 512),
        ("partial", {}, 62_099_456),
        ("partial", {"position": "all"}, 123_540_992),
        ("partial", {"encoder": "vision", "position": "bottom"}, 4 * (12 * 768**2 + 13 * 768)),
        ("shira", {"density_ratio": 0.01}, sum(int(0.01 * k * d * d) * 12 for d in (768, 512) for k in (1, 3, 4, 4))),
    ],
)
def test_weights_of_vit_b16(method, options, weights, monkeypatch):
    monkeypatch.setattr("clip.delta.snapshot", lambda model: {})  # these weights have no values
    with torch.device("meta"):
        model = clip.CLIP(VIT_B16)
        experiment = experiment_of(method, **options)
        adaptation = METHODS[method].prepare(dataclasses.replace(experiment, model=model))
    assert adaptation.trainable_weights == weights


def test_a_resnet_has_norms_in_its_text_tower():
    with torch.device("meta"):
        model = clip.CLIP(RESNET)
    hparams = METHODS["layernorm"].Hparams(encoder="text")
    assert reached(model, select_blocks(model, hparams), "last") == ["text"]
    assert METHODS["partial"].upper_parameters(model, hparams).keys() >= {"text_projection", "ln_final.weight"}
    assert "--encoder text" in error_of(UserError, METHODS["bias"].biases, model, METHODS["bias"].Hparams(), False)


def test_published_values():
    def settled(method, dataset="dtd"):
        words = ["--method", method, "--dataset", dataset, "--root_path", "data", "--shots", "4"]
        return parse(words).hparams.settled(4, images=188)

    for method in ("layernorm", "bias", "two_stage"):
        own = settled(method)
        assert (own.lr, own.weight_decay, own.total_iters, own.batch_size) == (2e-4, 0.01, 1200, 32)
        assert (own.min_area, own.flip, own.early_stop_loss) == (0.08, True, 0)
    assert (own.first_share, own.first_stage) == (0.6, "layernorm")
    own = settled("partial")
    assert (own.lr, own.epochs, own.batch_size, own.position, own.weight_decay) == (1e-5, 40, 4, "half-up", 5e-4)
    assert own.total_iters == 40 * 47 and settled("partial", "food101").epochs == 10
    assert METHODS["partial"].Hparams(epochs=1).settled(1, 6).total_iters == 1  # a smaller last batch is left out
    files = {"two_stage_released": ("outer_norms", False), "full_fine_tuning": ("position", "all")}
    for name, (option, value) in files.items():
        config = parse(["--config", f"configs/{name}.yaml", "--dataset", "dtd", "--root_path", "data"])
        assert getattr(config.hparams, option) == value


# --- 2SFS on other classes

TRAIN = ("--method", "two_stage", "--shots", 2, "--workers", 0, "--total_iters", 5, "--lr", "1e-2", "--batch_size", 8)


def test_new_classes_are_told_by_the_tuned_text_tower_and_trained_ones_by_their_rows(run_main, tmp_path):
    flags = (*TRAIN, *in_folder(tmp_path))
    code, base, _, err = run_main(*flags, "--classes", "base")
    assert code == 0, err
    (path,) = tmp_path.rglob("*.safetensors")
    saved = load_file(path)
    assert saved["classifier"].shape[0] == 5 and saved["trained"].all()
    code, new, _, err = run_main(*flags, "--classes", "new", "--eval_only")
    assert code == 0, err
    own = {name: saved[name] for name in saved if "ln_" in name}
    for classes, record in (("base", base), ("new", new)):
        model, preprocess = clip.load("tiny")
        model.load_state_dict(own, strict=False)
        task = datasets.build("digits", "", None, 3, classes=classes)
        text = utils.text_classifier(model, task.class_names, task.templates[:1])
        rows = text if classes == "new" else F.normalize(saved["classifier"])
        items = task.test[::13]  # as tests/conftest.py thins them
        with torch.no_grad():
            features = model.encode_image(torch.stack([preprocess(task.read(item)) for item in items]))
        right = (features @ rows.T).argmax(1) == torch.tensor([item.label for item in items])
        assert record["test_accuracy"] == pytest.approx(100 * right.double().mean().item(), abs=1e-4)


@pytest.mark.usefixtures("float64")
def test_each_class_of_a_mixture_has_its_own_kind_of_row(tmp_path):
    adaptation = prepared("two_stage", lr=1e-2, total_iters=5)
    fitted(adaptation)
    path = tmp_path / "two_stage.safetensors"
    adaptation.saved.save(path, "a" * 64, {})
    mixed = dataclasses.replace(TASK, class_names=("zebra", "dog", "cat"), train=())
    other = prepared("two_stage", mixed, total_iters=5)
    other.saved.load(path, "a" * 64)
    assert other.trained.tolist() == [False, True, True]
    tuned, classifier = utils.text_classifier(adaptation.model, ["zebra"], ["{}"]), adaptation.text_classifier()
    expected = torch.stack([tuned[0], classifier[NAMES.index("dog")], classifier[NAMES.index("cat")]])
    torch.testing.assert_close(other.text_classifier(), expected)
    adaptation.saved.class_names = ["cat", "dog", "dog"]  # a name twice: nobody knows which row is meant
    adaptation.saved.save(path, "a" * 64, {})
    other.saved.load(path, "a" * 64)
    assert other.trained.tolist() == [False, False, True]


def test_a_first_stage_needs_an_iteration():
    assert "--first_share" in error_of(UserError, prepared, "two_stage", total_iters=1)
