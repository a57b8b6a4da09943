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
from torch import nn
from torchvision.transforms import v2

import clip
import datasets
import train
import utils
from clip.layouts import PackedPrompts
from clip.preprocess import test_transform as transform_of
from methods import Adaptation, cosine_schedule, select_matrices
from run_utils import Settings

TEMPLATES = ("a photo of a {}.", "{} texture.", "the number {}, drawn by hand.")
IMAGES = 24
NAMES = ("traffic_light", "zebra", "very_old_oak_tree")


@pytest.fixture
def model():
    return clip.load("tiny")[0]


def settings_of(**options):
    return Settings(**{"dataset": "dtd", "backbone": "tiny", "device": "cpu", "workers": 0} | options)


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


def test_prompts_are_filled_templates_with_spaces_for_underscores():
    expected = clip.tokenize(["itap of a traffic light.", "itap of a zebra.", "itap of a very old oak tree."])
    assert torch.equal(utils.tokenize_classes(NAMES, "itap of a {}."), expected)


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
    classifier = utils.text_classifier(SimpleNamespace(encode_text=encode_text), names, ["a {}."])
    prompts = clip.tokenize([f"a {name}." for name in names])
    torch.testing.assert_close(classifier.double(), normalised(table[prompts].mean(dim=1)), rtol=0, atol=1e-6)
    assert sum(sizes) == len(names) and max(sizes) <= utils.PROMPTS_AT_ONCE == 256


def test_accuracy_of_four_images():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6]])

    def logits(part):
        return utils.cosine_logits(part, torch.eye(2))

    assert utils.accuracy(logits, features, [0, 1, 0, 0]) == 75.0
    assert utils.accuracy(logits, features, [0, 1, 1, 0]) == 100.0
    assert utils.accuracy(logits, features, [1, 0, 0, 0]) == 25.0


# --- features and precision


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_image_features_are_those_of_the_precision_in_order(model, precision):
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loader = [(images[:2], None), (images[2:4], None), (images[4:], None)]
    features = utils.image_features(model, loader, precision, "features")
    with torch.no_grad():
        full = normalised(model.encode_image(images))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = normalised(torch.cat([model.encode_image(part) for part, _ in loader]).float())
    assert features.dtype == torch.float32 and not features.requires_grad
    expected, other = (full, rounded) if precision == "fp32" else (rounded, full)
    torch.testing.assert_close(features.double(), expected, rtol=0, atol=1e-5)
    assert (features - other).abs().max() > 1e-4
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))


class Spy:
    """Notes what both towers of a model are called with, and whether under bf16 autocast."""

    def __init__(self, model):
        self.images, self.prompts, self.autocast = [], [], []
        encode_image, encode_text = model.encode_image, model.encode_text

        def image(x):
            self.images.append(len(x))
            self.autocast.append(torch.is_autocast_enabled("cpu"))
            return encode_image(x)

        def text(tokens):
            packed = tokens if isinstance(tokens, PackedPrompts) else PackedPrompts(tokens)
            self.prompts.append(packed.ids.tolist())
            self.autocast.append(torch.is_autocast_enabled("cpu"))
            return encode_text(tokens)

        model.encode_image, model.encode_text = image, text

    def forget(self):
        self.images, self.prompts, self.autocast = [], [], []


def ids_of(task, template):
    words = [" ".join(name.split("_")) for name in task.class_names]
    return PackedPrompts(clip.tokenize([template.replace("{}", word) for word in words])).ids.tolist()


# --- evaluation


class CountingTask(datasets.Task):
    """A task that counts how many images are read."""

    reads = 0

    def read(self, item):
        CountingTask.reads += 1
        return super().read(item)


@pytest.fixture
def task(tmp_path, monkeypatch):
    """24 of the digits' test images, as files, and three templates: the tiny model gets most of them right."""
    digits = datasets.build("digits", None, shots=1, seed=1)
    (tmp_path / "data").mkdir()
    items = tuple(datasets.Item(f"{i:02d}.png", item.label) for i, item in enumerate(digits.test[::23]))
    for source, item in zip(digits.test[::23], items):
        digits.read(source).save(tmp_path / "data" / item.path)
    monkeypatch.setattr(CountingTask, "reads", 0)
    return CountingTask("files", digits.class_names, TEMPLATES, items[:4], (), items, tmp_path / "data")


@pytest.fixture
def evaluate(task, tmp_path):
    """Calls a new Evaluator's zero_shot: (accuracy, features, number of images read)."""

    def call(task=task, preprocess=transform_of(32), weights="0" * 64, precision="fp32", cache="cache"):  # noqa: B008
        CountingTask.reads = 0
        settings = settings_of(precision=precision, cache_dir=str(tmp_path / cache))
        model, _ = clip.load("tiny")
        evaluator = train.Evaluator(model, task, preprocess, settings, weights)
        return evaluator.zero_shot(), evaluator.untrained_features, CountingTask.reads

    return call


def test_zero_shot_uses_all_templates_and_the_end_the_first(task, model, tmp_path):
    settings, preprocess = settings_of(cache_dir=str(tmp_path / "cache")), transform_of(32)
    spy = Spy(model)
    evaluator = train.Evaluator(model, task, preprocess, settings, "0" * 64)
    accuracy = evaluator.zero_shot()
    assert spy.prompts == [ids_of(task, template) for template in TEMPLATES] and sum(spy.images) == IMAGES
    assert accuracy == slow_accuracy(model, task, preprocess, TEMPLATES)
    spy.forget()
    accuracy = evaluator.adapted(Adaptation(model, dict(model.named_parameters())))
    assert spy.prompts == [ids_of(task, TEMPLATES[0])] and sum(spy.images) == IMAGES
    assert accuracy == slow_accuracy(model, task, preprocess, TEMPLATES[:1])


def test_accuracy_counts_each_image_with_its_own_label(task, model, tmp_path):
    preprocess = transform_of(32)
    predictions = [
        int((slow_classifier(model, task.class_names, TEMPLATES) @ normalised(f)).argmax())
        for f in (model.encode_image(preprocess(task.read(item))[None])[0].detach() for item in task.test)
    ]
    for right in (1, 5, IMAGES):  # the first so many get their prediction as label, the others another
        items = [
            dataclasses.replace(item, label=p if i < right else (p + 1) % 10)
            for i, (item, p) in enumerate(zip(task.test, predictions))
        ]
        relabelled = CountingTask(**vars(dataclasses.replace(task, test=tuple(items))))
        settings = settings_of(cache_dir=str(tmp_path / "cache"))
        evaluator = train.Evaluator(model, relabelled, preprocess, settings, "0" * 64)
        assert evaluator.zero_shot() == 100 * right / IMAGES


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_at_the_end_features_are_new_where_the_tower_was_trained(task, model, tmp_path, tower):
    settings, preprocess = settings_of(cache_dir=str(tmp_path / "cache")), transform_of(32)
    evaluator = train.Evaluator(model, task, preprocess, settings, "0" * 64)
    evaluator.zero_shot()
    untrained = slow_accuracy(model, task, preprocess, TEMPLATES[:1])
    torch.manual_seed(3)
    parameters = select_matrices(model, tower, "all")
    with torch.no_grad():
        for p in parameters.values():
            p.add_(0.1 * torch.randn_like(p))
    spy = Spy(model)
    accuracy = evaluator.adapted(Adaptation(model, parameters))
    assert sum(spy.images) == (IMAGES if tower == "vision" else 0)
    assert accuracy == slow_accuracy(model, task, preprocess, TEMPLATES[:1]) != untrained


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_computes_in_the_precision(task, model, tmp_path, precision):
    spy = Spy(model)
    settings = settings_of(precision=precision, cache_dir=str(tmp_path / "cache"))
    evaluator = train.Evaluator(model, task, transform_of(32), settings, "0" * 64)
    evaluator.zero_shot()
    evaluator.adapted(Adaptation(model, dict(model.named_parameters())))
    assert len(spy.autocast) == len(spy.images) + 4 and set(spy.autocast) == {precision == "bf16"}


# --- the cache of features


def test_the_second_run_takes_features_from_the_cache(evaluate):
    first, features, reads = evaluate()
    assert reads == IMAGES
    again, cached, reads = evaluate()
    assert reads == 0 and again == first and torch.equal(cached, features)


def other_preprocessing():
    return v2.Compose([v2.Resize((32, 32)), *transform_of(32).transforms[2:]])


@pytest.mark.parametrize(
    "change",
    [{"weights": "1" * 64}, {"preprocess": other_preprocessing()}, {"precision": "bf16"}],
    ids=["weights", "preprocessing", "precision"],
)
def test_features_are_computed_anew_if_what_makes_them_differs(evaluate, change):
    _, features, _ = evaluate()
    _, other, reads = evaluate(**change)
    assert reads == IMAGES
    assert torch.equal(other, features) == ("weights" in change)  # here the hash alone is another
    assert evaluate()[2] == evaluate(**change)[2] == 0  # both are kept


@pytest.mark.parametrize("change", ["time", "size", "path", "order"])
def test_features_are_computed_anew_if_an_image_changes(evaluate, task, change):
    evaluate()
    last = task.image_root / task.test[-1].path
    status = last.stat()
    if change == "time":
        os.utime(last, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
    elif change == "size":
        last.write_bytes(last.read_bytes() + b"\0")
        os.utime(last, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "path":
        last.rename(last.with_name("renamed.png"))
        renamed = dataclasses.replace(task.test[-1], path="renamed.png")
        task = CountingTask(**vars(dataclasses.replace(task, test=(*task.test[:-1], renamed))))
    else:
        task = CountingTask(**vars(dataclasses.replace(task, test=task.test[::-1])))
    assert evaluate(task=task)[2] == IMAGES
    assert evaluate(task=task)[2] == 0


@pytest.mark.parametrize("library", [torch, torchvision, PIL], ids=lambda library: library.__name__)
def test_features_of_another_library_version_are_not_used(library, monkeypatch, tmp_path):
    key = ("weights", "images")
    before = utils.cache_file(str(tmp_path), *key)
    assert before == utils.cache_file(str(tmp_path), *key) and before.parent == tmp_path
    monkeypatch.setattr(library, "__version__", "0.0")
    assert utils.cache_file(str(tmp_path), *key) != before


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "another file"])
def test_a_damaged_cache_file_is_computed_anew(evaluate, tmp_path, damage):
    first, features, _ = evaluate()
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    if damage == "another file":
        utils.save_tensors({"other": torch.zeros(3)}, path)
    else:
        path.write_bytes({"truncated": whole[:-100], "empty": b"", "garbage": b"\xff" * 500}[damage])
    again, computed, reads = evaluate()
    assert reads == IMAGES and again == first and torch.equal(computed, features)
    assert path.read_bytes() == whole and evaluate()[2] == 0


def test_an_unwritable_cache_is_a_note(evaluate, tmp_path, capsys):
    first, _, _ = evaluate()
    assert "note" not in capsys.readouterr().out
    (tmp_path / "file").write_text("in the way")
    again, _, reads = evaluate(cache="file/cache")
    captured = capsys.readouterr()
    notes = [line for line in (captured.out + captured.err).splitlines() if "note: " in line]
    assert again == first and reads == IMAGES
    assert len(notes) == 1 and "file/cache" in notes[0] and "--cache_dir" in notes[0]


# --- training: a model whose features are given, so that every loss is known


class Given(nn.Module):
    """Image features are the images; text features are the rows of a matrix. Two classes."""

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


def given_task(images):
    items = tuple(datasets.Item(f"{i}.jpg", 0) for i in range(images))
    return datasets.Task("given", ("cat", "dog"), TEMPLATES, items, (), (), None)


def still(model):
    """An adaptation whose learning rate is zero."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return SimpleNamespace(
        optimizer=optimizer,
        scheduler=scheduler,
        trains_text=True,
        trains_images=True,
        full_batch=False,
        shares_prefix=True,
        logits=utils.cosine_logits,
        penalty=float,
        build=lambda: None,
        after_step=lambda iteration: None,
    )


def fit_given(batches, images, batch_size, evaluator=None, **options):
    model = Given()
    settings = settings_of(**{"total_iters": len(batches), "batch_size": batch_size} | options)
    return train.fit(model, given_task(images), still(model), batches, settings, evaluator)


def test_loss_is_the_cross_entropy_of_100_cosines():
    features = torch.tensor([[0.6, 0.8], [1.0, 0.0], [math.sqrt(0.5), math.sqrt(0.5)], [0.705, (1 - 0.705**2) ** 0.5]])
    labels = torch.tensor([1, 0, 0, 0])
    fit = fit_given([(features, labels)], images=4, batch_size=4, early_stop_loss=0.0)
    logits = [[100 * x for x in row] for row in features.tolist()]
    losses = [math.log(sum(math.exp(x - row[y]) for x in row)) for row, y in zip(logits, labels.tolist())]
    assert 0.2 < losses[2] < losses[3] < 1  # the factor matters
    assert fit.curve[0]["loss"] == pytest.approx(sum(losses) / 4, rel=1e-4)
    assert fit.iterations == 1 and fit.last is fit.curve[0]


def test_image_features_are_normalised_before_the_loss():
    images, labels = batch(0.3, 2.0)
    fit = fit_given([(7.5 * images, labels)], images=2, batch_size=2, early_stop_loss=0.0)
    assert fit.curve[0]["loss"] == pytest.approx(1.15, rel=1e-3)


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


def test_a_threshold_of_zero_never_stops():
    images = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    fit = fit_given([images] * 3, images=1, batch_size=1, early_stop_loss=0.0)
    assert fit.last["loss"] == 0.0 and fit.iterations == 3 and not fit.stopped_early


@pytest.mark.parametrize("iterations, rows", [(4, [2, 4]), (5, [2, 4, 5])])
def test_the_last_iteration_is_no_early_stop(iterations, rows):
    epochs = [(0.3,), (0.3,), (0.2,), (0.2,), (0.001,)] if iterations == 5 else [(0.3,), (0.3,), (0.001,), (0.001,)]
    fit = fit_given([batch(*losses) for losses in epochs], images=2, batch_size=1)
    assert not fit.stopped_early and fit.iterations == iterations
    assert [row["iteration"] for row in fit.curve] == rows == [row["iteration"] for row in fit.timing]
    assert fit.last["loss"] == pytest.approx(0.001, rel=0.02)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("precision, remedy", [("fp32", "lower --lr"), ("bf16", "--precision fp32")])
def test_a_loss_that_is_no_number_ends_the_run(monkeypatch, value, precision, remedy):
    monkeypatch.setattr(train.F, "cross_entropy", lambda logits, labels: logits.sum() * 0 + value)
    with pytest.raises(train.TrainingDiverged, match="iteration 1;") as caught:
        fit_given([batch(0.3)] * 2, images=1, batch_size=1, precision=precision)
    assert remedy in str(caught.value) and "\n" not in str(caught.value)
    assert ("--precision" in str(caught.value)) == (precision == "bf16")


def test_one_nan_in_an_epoch_is_found_at_its_end():
    images, labels = batch(0.3)
    with pytest.raises(train.TrainingDiverged, match=r"nan at iteration 3"):
        fit_given([(images, labels), (images * math.nan, labels)] + [(images, labels)] * 4, images=3, batch_size=1)


def test_time_of_test_passes_is_left_out_of_training_time(monkeypatch):
    clock, asked = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    class Slow:
        def adapted(self, adaptation):
            asked.append(adaptation.trains_images)
            clock.now += 1000
            return 10.0 * len(asked)

    def batches():
        for _ in range(8):
            clock.now += 1
            yield batch(0.3)

    loader = list(batches())
    clock.now = 0.0

    def ticking():
        for images in loader:
            clock.now += 1
            yield images

    model = Given()
    settings = settings_of(total_iters=8, batch_size=1, eval_every=3)
    fit = train.fit(model, given_task(2), still(model), ticking(), settings, Slow())
    # Every three iterations, at the end of the epoch of two that is under way: 3 -> 4, 6 -> 6, and 9 is not reached.
    assert [row.get("test_accuracy") for row in fit.curve] == [None, 10.0, 20.0, None] and asked == [True, True]
    assert fit.timing == [{"iteration": i, "seconds": float(i)} for i in (2, 4, 6, 8)]
    assert fit.seconds == 8.0


# --- training the tiny CLIP


def adaptation_of(model, encoder, iterations, lr=1e-3):
    parameters = select_matrices(model, encoder, "all")
    optimizer = torch.optim.SGD(parameters.values(), lr=lr)
    return Adaptation(model, parameters, optimizer, cosine_schedule(optimizer, iterations))


def noise(iterations, sizes=(2,)):
    generator = torch.Generator().manual_seed(0)
    for i in range(iterations):
        size = sizes[i % len(sizes)]
        yield torch.randn(size, 3, 32, 32, generator=generator), torch.arange(size) % 3


NAMED = datasets.Task(
    "named", NAMES, TEMPLATES, tuple(datasets.Item(f"{i}.jpg", i % 3) for i in range(3)), (), (), None
)


@pytest.mark.parametrize("encoder", ["text", "vision", "both"])
def test_training_uses_the_first_template_and_computes_trained_text_anew(model, encoder):
    spy = Spy(model)
    settings = settings_of(total_iters=5, batch_size=2, early_stop_loss=0.0, precision="bf16")
    train.fit(model, NAMED, adaptation_of(model, encoder, 5), noise(5, (2, 1)), settings, None)
    assert spy.prompts == [ids_of(NAMED, TEMPLATES[0])] * (1 if encoder == "vision" else 5)
    assert spy.images == [2, 1, 2, 1, 2] and all(spy.autocast)


@pytest.mark.parametrize("encoder", ["text", "vision", "both"])
def test_three_steps_of_plain_gradient_descent(model, encoder):
    """Beside a loop that computes text with gradients in every iteration, in float32 and to rounding."""
    reference, _ = clip.load("tiny")
    settings = settings_of(total_iters=3, batch_size=2, early_stop_loss=0.0)
    fit = train.fit(model, NAMED, adaptation_of(model, encoder, 3), noise(3, (2, 1)), settings, None)
    parameters = select_matrices(reference, encoder, "all")
    before = {name: p.detach().clone() for name, p in parameters.items()}
    tokens = clip.tokenize([TEMPLATES[0].replace("{}", name.replace("_", " ")) for name in NAMES])
    for step, (images, labels) in enumerate(noise(3, (2, 1))):
        image, text = reference.encode_image(images), reference.encode_text(tokens)
        cosines = (image @ text.T) / image.norm(dim=1)[:, None] / text.norm(dim=1)
        loss = -(100 * cosines).log_softmax(dim=1)[range(len(labels)), labels].mean()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        lr = 1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * step / 3)) / 2
        with torch.no_grad():
            for p, gradient in zip(parameters.values(), gradients):
                p.sub_(lr * gradient)
    assert fit.last["loss"] == pytest.approx(loss.item(), rel=1e-3)
    trained = dict(model.named_parameters())
    for name, p in parameters.items():
        moved = (p - before[name]).abs().max().item()
        assert moved > 0
        torch.testing.assert_close(trained[name], p, rtol=0, atol=0.01 * moved + 1e-7)


def test_the_curve_holds_the_learning_rates_that_were_used(model):
    adaptation, used = adaptation_of(model, "text", 5, lr=0.02), []
    adaptation.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    settings = settings_of(total_iters=5, batch_size=2, early_stop_loss=0.0, lr=0.02)
    fit = train.fit(model, NAMED, adaptation, noise(5, (2, 1)), settings, None)
    assert used == pytest.approx([1e-6 + (0.02 - 1e-6) * (1 + math.cos(math.pi * i / 5)) / 2 for i in range(5)])
    assert [row["lr"] for row in fit.curve] == [used[1], used[3], used[4]]


def test_a_curve_of_test_accuracy_is_the_accuracy_at_that_time(task, model, tmp_path):
    settings = settings_of(
        total_iters=4, batch_size=2, early_stop_loss=0.0, eval_every=2, cache_dir=str(tmp_path / "cache")
    )
    preprocess, expected = transform_of(32), []
    adaptation = adaptation_of(model, "both", 4, lr=0.1)
    evaluator = train.Evaluator(model, task, preprocess, settings, "0" * 64)
    evaluator.zero_shot()

    class Asked:
        def adapted(self, adaptation):
            expected.append(slow_accuracy(model, task, preprocess, TEMPLATES[:1]))
            return evaluator.adapted(adaptation)

    fit = train.fit(model, task, adaptation, noise(4), settings, Asked())
    assert [row["iteration"] for row in fit.curve] == [2, 4]
    assert [row["test_accuracy"] for row in fit.curve] == expected
