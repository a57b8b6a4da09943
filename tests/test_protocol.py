"""The published protocol: prompts, classifiers, features and their cache, the training loop, the evaluation.

Expected numbers are computed by hand or by slow loops that share no code with utils.py and train.py.
"""

import dataclasses
import math
import os
from types import SimpleNamespace

import PIL
import pytest
import torch
import torchvision
from support.runs import experiment_of
from torch import nn
from torchvision.transforms import v2

import clip
import datasets
import train
import utils
from clip.layouts import PackedPrompts
from clip.preprocess import Preprocessing
from clip.preprocess import test_transform as transform_of
from experiment import Experiment
from methods.adaptation import Adaptation
from methods.choice import cosine_schedule, select_matrices
from methods.weights.adam import Hparams
from settings import Settings

TEMPLATES = ("a photo of a {}.", "{} texture.", "the number {}, drawn by hand.")
IMAGES = 24
NAMES = ("traffic_light", "zebra", "very_old_oak_tree")

TRANSFORM = transform_of(Preprocessing(32))


@pytest.fixture
def model():
    return clip.load("tiny")[0]


def normalised(x):
    """Rows of unit length, in float64."""
    return x.double() / x.double().square().sum(dim=-1, keepdim=True).sqrt()


@torch.no_grad()
def slow_classifier(model, names, templates):
    """One prompt at a time, and one class after the other."""
    rows = []
    for name in names:
        words = " ".join(name.split("_"))
        features = [normalised(model.encode_text(clip.tokenize([t.replace("{}", words)])))[0] for t in templates]
        rows.append(normalised(sum(features) / len(features)))
    return torch.stack(rows)


@torch.no_grad()
def slow_accuracy(model, task, preprocess, templates):
    """One image at a time."""
    classifier, correct = slow_classifier(model, task.class_names, templates), 0
    for item in task.test:
        feature = normalised(model.encode_image(preprocess(task.read(item))[None]))[0]
        correct += int((classifier @ feature).argmax()) == item.label
    return 100 * correct / len(task.test)


# --- prompts and classifiers


def test_zero_shot_classifier_is_the_normalised_mean_over_all_templates(model):
    classifier = utils.text_classifier(model, NAMES, TEMPLATES)
    torch.testing.assert_close(classifier.double(), slow_classifier(model, NAMES, TEMPLATES), rtol=0, atol=1e-5)
    for fewer in (TEMPLATES[:1], TEMPLATES[:2], TEMPLATES[1:]):
        assert (classifier - slow_classifier(model, NAMES, fewer)).abs().max() > 0.01
    assert not classifier.requires_grad


def test_many_prompts_are_encoded_in_parts_in_order():
    table = torch.randn(49408, 8, generator=torch.Generator().manual_seed(0))
    sizes = []

    def encode_text(tokens):
        sizes.append(len(tokens))
        return table[tokens].mean(dim=1)

    names = [f"thing {number}" for number in range(2 * utils.PROMPTS_AT_ONCE + 1)]
    model = SimpleNamespace(encode_text=encode_text, tokenize=clip.tokenize)
    classifier = utils.text_classifier(model, names, ["a {}."])
    prompts = clip.tokenize([f"a {name}." for name in names])
    torch.testing.assert_close(classifier.double(), normalised(table[prompts].mean(dim=1)), rtol=0, atol=1e-6)
    assert sum(sizes) == len(names) and max(sizes) <= utils.PROMPTS_AT_ONCE == 256


# --- evaluation


class Spy:
    """Notes what both towers of a model are called with, and whether under bf16 autocast."""

    def __init__(self, model):
        self.images, self.prompts, self.autocast = [], [], []
        encode_image, encode_text = model.encode_image, model.encode_text

        def image(x):
            self.images.append(len(x))
            self.autocast.append(torch.is_autocast_enabled("cpu"))
            return encode_image(x)

        def text(tokens, vectors=None):
            packed = tokens if isinstance(tokens, PackedPrompts) else PackedPrompts(tokens)
            self.prompts.append(packed.ids.tolist())
            self.autocast.append(torch.is_autocast_enabled("cpu"))
            return encode_text(tokens, vectors)

        model.encode_image, model.encode_text = image, text


def ids_of(task, template):
    words = [" ".join(name.split("_")) for name in task.class_names]
    return PackedPrompts(clip.tokenize([template.replace("{}", word) for word in words])).ids.tolist()


class CountingTask(datasets.Task):
    """A task that counts how many images are read."""

    reads = 0

    def read(self, item):
        CountingTask.reads += 1
        return super().read(item)


@pytest.fixture
def task(tmp_path):
    """24 of the digits' test images, as files, and three templates: the tiny model gets most of them right."""
    digits = datasets.build("digits", None, shots=1, seed=1)
    (tmp_path / "data").mkdir()
    items = tuple(datasets.Item(f"{i:02d}.png", item.label) for i, item in enumerate(digits.test[::23]))
    for source, item in zip(digits.test[::23], items):
        digits.read(source).save(tmp_path / "data" / item.path)
    return CountingTask("files", digits.class_names, TEMPLATES, items[:4], (), items, tmp_path / "data")


@pytest.fixture
def files(task, model, tmp_path):
    """Make an experiment on these files."""

    def experiment(precision="fp32", **changes):
        settings = {"precision": precision, "cache_dir": str(tmp_path / "cache")}
        return dataclasses.replace(experiment_of("adam", task, model, **settings), **changes)

    return experiment


@pytest.fixture
def zero_shot(files):
    """Measure zero-shot accuracy in a new experiment: (accuracy, features, number of images read)."""

    def call(**changes):
        CountingTask.reads = 0
        experiment = files(**changes)
        return train.zero_shot(experiment).accuracy, experiment.test_features(), CountingTask.reads

    return call


def trained(experiment, encoder="both"):
    hparams = dataclasses.replace(experiment.hparams, encoder=encoder)
    return Adaptation(experiment, select_matrices(experiment.model, hparams))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_shot_uses_all_templates_and_the_end_the_first(files, task, model, precision):
    experiment, spy = files(precision), Spy(model)
    accuracies, prompts = [train.zero_shot(experiment).accuracy], [ids_of(task, template) for template in TEMPLATES]
    assert spy.prompts == prompts and spy.images == [IMAGES]
    accuracies += [train.evaluate(experiment, trained(experiment))]
    assert spy.prompts[3:] == prompts[:1] and spy.images == [IMAGES] * 2
    assert set(spy.autocast) == {precision == "bf16"}
    features = experiment.test_features()
    assert features.dtype == torch.float32 and not features.requires_grad
    torch.testing.assert_close(features.norm(dim=1), torch.ones(IMAGES))
    if precision == "fp32":
        assert accuracies == [slow_accuracy(model, task, TRANSFORM, used) for used in (TEMPLATES, TEMPLATES[:1])]


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_at_the_end_features_are_new_where_the_tower_was_trained(files, task, model, tower):
    experiment = files()
    train.zero_shot(experiment)
    untrained = slow_accuracy(model, task, experiment.preprocess, TEMPLATES[:1])
    adaptation = trained(experiment, tower)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in adaptation.parameters.values():
            p.add_(0.1 * torch.randn_like(p))
    spy = Spy(model)
    accuracy = train.evaluate(experiment, adaptation)
    assert sum(spy.images) == (IMAGES if tower == "vision" else 0)
    assert accuracy == slow_accuracy(model, task, experiment.preprocess, TEMPLATES[:1]) != untrained


# --- the cache of features


def write_again(task, more=b"", seconds=0):
    last = task.image_root / task.test[-1].path
    before = last.stat()
    last.write_bytes(last.read_bytes() + more)
    os.utime(last, ns=(before.st_atime_ns, before.st_mtime_ns + seconds * 10**9))
    return {}


def change_path(task):
    last = dataclasses.replace(task.test[-1], path="renamed.png")
    (task.image_root / task.test[-1].path).rename(task.image_root / last.path)
    return {"task": dataclasses.replace(task, test=(*task.test[:-1], last))}


CHANGES = {
    "weights": lambda task: {"base_sha256": "1" * 64},
    "preprocessing": lambda task: {"preprocess": v2.Compose([v2.Resize((32, 32)), *TRANSFORM.transforms[2:]])},
    "precision": lambda task: {"precision": "bf16"},
    "order": lambda task: {"task": dataclasses.replace(task, test=task.test[::-1])},
    "time": lambda task: write_again(task, seconds=1),
    "size": lambda task: write_again(task, more=b"\0"),
    "path": change_path,
}


@pytest.mark.parametrize("change", CHANGES)
def test_features_are_computed_once_for_what_makes_them(zero_shot, task, change):
    first, features, reads = zero_shot()
    assert reads == IMAGES
    again, cached, reads = zero_shot()
    assert reads == 0 and again == first and torch.equal(cached, features)
    changed = CHANGES[change](task)
    _, other, reads = zero_shot(**changed)
    assert reads == IMAGES and zero_shot(**changed)[2] == 0
    assert torch.equal(other, features) == (change in ("weights", "time", "size", "path"))  # only what names it differs


@pytest.mark.parametrize("library", [torch, torchvision, PIL], ids=lambda library: library.__name__)
def test_features_of_another_library_version_are_not_used(library, monkeypatch):
    before = utils.cache_file("cache", "weights", "images")
    assert before == utils.cache_file("cache", "weights", "images") and before.parent.name == "cache"
    monkeypatch.setattr(library, "__version__", "0.0")
    assert utils.cache_file("cache", "weights", "images") != before


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "another file"])
def test_a_damaged_cache_file_is_computed_again(zero_shot, tmp_path, damage):
    first, features, _ = zero_shot()
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    if damage == "another file":
        utils.save_tensors({"other": torch.zeros(3)}, path)
    else:
        path.write_bytes({"truncated": whole[:-100], "empty": b"", "garbage": b"\xff" * 500}[damage])
    again, computed, reads = zero_shot()
    assert reads == IMAGES and again == first and torch.equal(computed, features)
    assert torch.equal(utils.load_features(path)[0], features) and zero_shot()[2] == 0


def test_an_unwritable_cache_is_a_note(zero_shot, tmp_path, capsys):
    (tmp_path / "cache").write_text("in the way")
    _, _, reads = zero_shot()
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert reads == IMAGES and len(notes) == 1 and str(tmp_path / "cache") in notes[0] and "--cache_dir" in notes[0]


# --- training: a model whose features are given, so that every loss is known


class Given(nn.Module):
    """Image features are the images; text features are the rows of a matrix. Two classes."""

    tokenize, prompts, logit_factor = staticmethod(clip.tokenize), staticmethod(PackedPrompts), 100

    def __init__(self):
        super().__init__()
        self.device = torch.device("cpu")
        self.turn = nn.Parameter(torch.eye(2))
        self.classes = nn.Parameter(torch.eye(2))

    def encode_image(self, images):
        return images @ self.turn

    def encode_text(self, prompts):
        assert isinstance(prompts, PackedPrompts)
        return self.classes


def image_with_loss(loss):
    """A unit feature whose cross-entropy of 100 x cosine, label 0, is `loss`: the logits differ by -log(e^loss - 1)."""
    difference = -math.log(math.expm1(loss)) / 100
    angle = math.acos(difference / math.sqrt(2)) - math.pi / 4  # cos a - sin a = sqrt(2) cos(a + pi/4)
    return torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float32)


def batch(*losses):
    return torch.stack([image_with_loss(loss) for loss in losses]), torch.zeros(len(losses), dtype=torch.int64)


def fit_given(batches, images, batch_size, precision="fp32", **options):
    """Train on these batches, `images` an epoch, with a learning rate of zero."""
    items, model = tuple(datasets.Item(f"{i}.jpg", 0) for i in range(images)), Given()
    task = datasets.Task("given", ("cat", "dog"), TEMPLATES, items, (), (), None)
    hparams = Hparams(**{"total_iters": len(batches), "batch_size": batch_size} | options)
    experiment = Experiment(Settings(device="cpu", precision=precision), hparams, task, model, None, "0" * 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return train.fit(experiment, Adaptation(experiment, dict(model.named_parameters()), optimizer, scheduler), batches)


def test_loss_is_the_cross_entropy_of_100_cosines():
    features = torch.tensor([[0.6, 0.8], [1.0, 0.0], [math.sqrt(0.5), math.sqrt(0.5)], [0.705, (1 - 0.705**2) ** 0.5]])
    labels = torch.tensor([1, 0, 0, 0])
    logits = [[100 * x for x in row] for row in features.tolist()]
    losses = [math.log(sum(math.exp(x - row[y]) for x in row)) for row, y in zip(logits, labels.tolist())]
    assert 0.2 < losses[2] < losses[3] < 1  # the factor matters
    for length in (1.0, 7.5):  # image features are normalised before
        fit = fit_given([(length * features, labels)], images=4, batch_size=4, early_stop_loss=0.0)
        assert fit.curve[0]["loss"] == pytest.approx(sum(losses) / 4, rel=1e-4)
    assert fit.iterations == 1 and fit.last is fit.curve[0]


def test_an_epoch_is_a_mean_over_images_not_over_batches():
    batches = [batch(*[0.2] * 32), batch(*[1.2] * 8), batch(*[0.1] * 32), batch(*[0.05] * 4, *[3.0] * 4)]
    fit = fit_given(batches, images=40, batch_size=32)
    assert [row["iteration"] for row in fit.curve] == [2, 4]
    assert fit.curve[0]["loss"] == pytest.approx((32 * 0.2 + 8 * 1.2) / 40, rel=1e-3)
    assert fit.curve[1]["loss"] == pytest.approx((32 * 0.1 + 4 * 0.05 + 4 * 3.0) / 40, rel=1e-3)
    # A loss below log 2 is a right prediction.
    assert [row["train_accuracy"] for row in fit.curve] == [pytest.approx(80.0), pytest.approx(90.0)]


def test_stops_when_the_mean_of_an_epoch_is_below_the_threshold():
    epochs = [
        [(0.3,) * 32, (0.001,) * 8],  # its last batch is below
        [(0.001,) * 32, (0.06,) * 8],  # most images are below; the mean is 0.0128
        [(0.0101,) * 32, (0.0101,) * 8],
        [(0.0001,) * 32, (0.0485,) * 8],  # the mean is 0.00978, that of the two batches 0.0243
        [(0.001,) * 32, (0.001,) * 8],
    ]
    batches = [batch(*losses) for epoch in epochs for losses in epoch]
    fit = fit_given(batches, images=40, batch_size=32)  # the default, 0.01
    assert fit.stopped_early and fit.iterations == 8 and len(fit.curve) == 4
    assert fit.last["loss"] == pytest.approx((32 * 0.0001 + 8 * 0.0485) / 40, rel=0.02) and fit.last["loss"] < 0.01
    fit = fit_given(batches, images=40, batch_size=32, early_stop_loss=0.002)
    assert not fit.stopped_early and fit.iterations == 10  # below at the last iteration
    fit = fit_given(batches, images=40, batch_size=32, early_stop_loss=0.011)
    assert fit.stopped_early and fit.iterations == 6
    zero = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    fit = fit_given([zero] * 3, images=1, batch_size=1, early_stop_loss=0.0)  # 0 never stops
    assert fit.last["loss"] == 0.0 and fit.iterations == 3 and not fit.stopped_early


@pytest.mark.parametrize("losses, rows", [([0.3, 0.3, 0.001, 0.001], [2, 4]), ([0.3, 0.3, 0.2, 0.2, 0.001], [2, 4, 5])])
def test_the_last_iteration_is_no_early_stop(losses, rows):
    fit = fit_given([batch(loss) for loss in losses], images=2, batch_size=1)
    assert not fit.stopped_early and fit.iterations == len(losses)
    assert [row["iteration"] for row in fit.curve] == rows == [row["iteration"] for row in fit.timing]
    assert fit.last["loss"] == pytest.approx(0.001, rel=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_that_is_no_number_ends_the_run_at_the_end_of_its_epoch(monkeypatch, precision):
    images, labels = batch(0.3)
    with pytest.raises(train.TrainingDiverged, match=r"nan at iteration 3;.*--lr") as caught:
        batches = [(images, labels), (images * math.nan, labels), *[(images, labels)] * 4]
        fit_given(batches, images=3, batch_size=1, precision=precision)
    assert ("--precision" in str(caught.value)) == (precision == "bf16")
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda logits, labels: logits.sum() * 0 + math.inf)
    with pytest.raises(train.TrainingDiverged, match="inf at iteration 1;"):
        fit_given([batch(0.3)] * 2, images=1, batch_size=1)


def test_time_of_test_passes_is_left_out_of_training_time(monkeypatch):
    clock, asked, one = SimpleNamespace(now=0.0), [], batch(0.3)
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def evaluate(experiment, adaptation):
        asked.append(adaptation)
        clock.now += 1000
        return 10.0 * len(asked)

    class Ticking(list):
        def __iter__(self):
            for images in super().__iter__():
                clock.now += 1
                yield images

    monkeypatch.setattr(train, "evaluate", evaluate)
    fit = fit_given(Ticking([one] * 8), images=2, batch_size=1, eval_every=3)
    # Every three iterations, at the end of the epoch of two that is under way: 3 -> 4, 6 -> 6, and 9 is not reached.
    assert [row.get("test_accuracy") for row in fit.curve] == [None, 10.0, 20.0, None]
    assert fit.timing == [{"iteration": i, "seconds": float(i)} for i in (2, 4, 6, 8)]
    assert fit.seconds == 8.0


# --- training the tiny CLIP


def adaptation_of(experiment):
    """Plain gradient descent on the experiment's matrices."""
    hparams = experiment.hparams
    parameters = select_matrices(experiment.model, hparams)
    optimizer = torch.optim.SGD(parameters.values(), lr=hparams.lr)
    return Adaptation(experiment, parameters, optimizer, cosine_schedule(optimizer, hparams.total_iters))


def noise(*sizes):
    """Yield a batch of each of these sizes."""
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        yield torch.randn(size, 3, 32, 32, generator=generator), torch.arange(size) % 3


ITEMS = tuple(datasets.Item(f"{i}.jpg", i % 3) for i in range(3))
NAMED = datasets.Task("named", NAMES, TEMPLATES, ITEMS, (), (), None)
SHORT = {"batch_size": 2, "early_stop_loss": 0.0}


@pytest.mark.parametrize("encoder", ["text", "vision", "both"])
def test_training_uses_the_first_template_and_computes_trained_text_in_each_step(model, encoder):
    experiment = experiment_of("adam", NAMED, model, encoder=encoder, total_iters=5, precision="bf16", **SHORT)
    spy = Spy(model)
    train.fit(experiment, adaptation_of(experiment), noise(2, 1, 2, 1, 2))
    assert spy.prompts == [ids_of(NAMED, TEMPLATES[0])] * (1 if encoder == "vision" else 5)
    assert spy.images == [2, 1, 2, 1, 2] and all(spy.autocast)


def test_the_curve_holds_the_learning_rates_that_were_used(model):
    experiment = experiment_of("adam", NAMED, model, encoder="text", total_iters=5, lr=0.02, **SHORT)
    adaptation, used = adaptation_of(experiment), []
    adaptation.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    fit = train.fit(experiment, adaptation, noise(2, 1, 2, 1, 2))
    assert used == pytest.approx([1e-6 + (0.02 - 1e-6) * (1 + math.cos(math.pi * i / 5)) / 2 for i in range(5)])
    assert [row["lr"] for row in fit.curve] == [used[1], used[3], used[4]]


def test_a_curve_of_test_accuracy_is_the_accuracy_at_that_time(files, task, model, monkeypatch):
    experiment, expected, evaluate = files(), [], train.evaluate
    hparams = dataclasses.replace(experiment.hparams, total_iters=4, eval_every=2, lr=0.1, **SHORT)
    experiment = dataclasses.replace(experiment, hparams=hparams)

    def asked(*args):
        expected.append(slow_accuracy(model, task, experiment.preprocess, TEMPLATES[:1]))
        return evaluate(*args)

    monkeypatch.setattr(train, "evaluate", asked)
    fit = train.fit(experiment, adaptation_of(experiment), noise(2, 2, 2, 2))
    assert [row["iteration"] for row in fit.curve] == [2, 4]
    assert [row["test_accuracy"] for row in fit.curve] == expected


def test_augmentation_follows_the_settings(monkeypatch):
    transforms = []
    monkeypatch.setattr(datasets, "training_loader", lambda task, transform, *_, **__: transforms.append(transform))
    for min_area, flip in ((0.3, True), (0.9, False)):
        experiment_of("adam", min_area=min_area, flip=flip).training_batches()
    crops = [next(t for t in transform.transforms if isinstance(t, v2.RandomResizedCrop)) for transform in transforms]
    assert [(tuple(crop.scale), tuple(crop.size)) for crop in crops] == [((0.3, 1), (32, 32)), ((0.9, 1), (32, 32))]
    flips = [any(isinstance(t, v2.RandomHorizontalFlip) for t in transform.transforms) for transform in transforms]
    assert flips == [True, False]
