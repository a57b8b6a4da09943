"""The image pipeline: reproducible training batches, the cache, errors that cross processes."""

import dataclasses
import os
import pickle
import re
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from support.fabricate import fabricate
from torchvision import transforms

import datasets
from datasets import images as images_module
from datasets.task import DatasetError, Item, Task

AUGMENT = transforms.Compose(
    [transforms.RandomResizedCrop(12), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
)
PLAIN = transforms.Compose([transforms.Resize((12, 12)), transforms.ToTensor()])


@pytest.fixture
def task(tmp_path) -> Task:
    """Ten training images of two classes, four of val and eight of test."""
    fabricate("dtd", tmp_path, classes=2, per_class=10)
    return datasets.build("dtd", tmp_path, shots=5, seed=1)


def training_batches(task, batch_size=4, iterations=7, seed=3, workers=0, **options) -> list:
    return list(datasets.training_loader(task, AUGMENT, batch_size, iterations, seed, workers, **options))


def same(batches, others) -> bool:
    return len(batches) == len(others) and all(
        torch.equal(images, images2) and torch.equal(labels, labels2)
        for (images, labels), (images2, labels2) in zip(batches, others)
    )


def test_tasks_survive_pickling(task):
    for original in (task, datasets.build("digits", None, shots=1, seed=1)):
        copy = pickle.loads(pickle.dumps(original))
        assert copy == original
        item = original.test[0]
        assert np.array_equal(np.asarray(copy.read(item)), np.asarray(original.read(item)))


# --- training batches


def test_batches_cover_each_epoch_once_and_keep_the_partial_batch(task):
    assert datasets.batches_per_epoch(10, 4) == 3
    assert datasets.batches_per_epoch(8, 4) == 2
    assert datasets.batches_per_epoch(3, 4) == 1
    # Positions as labels, so that a batch shows which images it has.
    numbered = tuple(Item(item.path, position) for position, item in enumerate(task.train))
    numbered = dataclasses.replace(task, train=numbered)
    loader = datasets.training_loader(numbered, AUGMENT, batch_size=4, iterations=7, seed=3, workers=0)
    batches = list(loader)
    assert len(loader) == len(batches) == 7
    assert [len(labels) for _, labels in batches] == [4, 4, 2, 4, 4, 2, 4]
    assert all(images.shape == (len(labels), 3, 12, 12) for images, labels in batches)
    assert batches[0][1].dtype == torch.int64
    orders = [torch.cat([labels for _, labels in batches[i : i + 3]]).tolist() for i in (0, 3)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10))
    assert orders[0] != orders[1] != list(range(10))
    other_seed = list(datasets.training_loader(numbered, AUGMENT, batch_size=10, iterations=1, seed=4, workers=0))
    assert other_seed[0][1].tolist() != orders[0]


def test_labels_belong_to_their_images(task):
    """The two fabricated classes are red and blue: red is the strongest channel in class 0 only."""
    for images, labels in training_batches(task):
        assert torch.equal(images.mean(dim=(2, 3)).argmax(dim=1) != 0, labels.bool())


def test_batches_depend_only_on_the_seed_not_on_workers(task):
    batches = training_batches(task)
    torch.manual_seed(99)
    assert same(batches, training_batches(task))
    assert same(batches, training_batches(task, workers=2))
    assert not same(batches, training_batches(task, seed=4))


def test_a_resumed_run_gets_the_remaining_batches(task):
    batches = training_batches(task)
    assert same(batches[4:], training_batches(task, start=4))
    assert same(batches[3:], training_batches(task, start=3, workers=1))
    assert training_batches(task, start=7) == []


def test_augmentation_depends_on_epoch_and_position_but_not_on_the_batch_size(task):
    small = torch.cat([images for images, _ in training_batches(task, batch_size=4, iterations=3)])
    large = torch.cat([images for images, _ in training_batches(task, batch_size=10, iterations=1)])
    assert torch.equal(small, large)
    one = dataclasses.replace(task, train=task.train[:1] * 2)
    views = [image for images, _ in training_batches(one, batch_size=2, iterations=2) for image in images]
    assert not any(torch.equal(views[i], views[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_do_not_change_the_generators_of_the_program(task, workers, monkeypatch):
    program = os.getpid()

    def check(seed):  # a worker process may seed its own
        assert os.getpid() != program, "a loader reseeded the GPU's generator"

    monkeypatch.setattr(torch.cuda, "manual_seed_all", check)
    state = torch.get_rng_state()
    training_batches(task, workers=workers)
    list(datasets.test_loader(task.test, task, PLAIN, 4, workers))
    assert torch.equal(torch.get_rng_state(), state)


# --- the cache


class CountingTask(Task):
    """A task that records what is read."""

    reads: ClassVar[list[str]] = []

    def read(self, item):
        self.reads.append(item.path)
        return super().read(item)


@pytest.fixture
def counting(task) -> CountingTask:
    CountingTask.reads = []
    return CountingTask(*(getattr(task, field) for field in task.__dataclass_fields__))


def test_training_images_are_decoded_once_before_training_except_those_that_do_not_fit(counting, capsys):
    loader = datasets.training_loader(counting, AUGMENT, 4, 7, 3, workers=0)
    assert sorted(counting.reads) == sorted(item.path for item in counting.train)
    batches = list(loader)
    assert len(counting.reads) == 10 and capsys.readouterr().err == ""
    counting.reads.clear()
    uncached = training_batches(counting, cache_mb=0)
    assert len(counting.reads) == 10 + 24  # once beforehand, then 4 + 4 + 2 + 4 + 4 + 2 + 4 uses
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "10 of 10" in message and "0 MB" in message
    assert same(batches, uncached)
    counting.reads.clear()
    twice = dataclasses.replace(counting, train=counting.train[:1] * 3)
    assert len(training_batches(twice, batch_size=3, iterations=1)[0][1]) == 3 and len(twice.reads) == 1


def test_the_cache_is_filled_up_to_its_bound(tmp_path, capsys):
    """Four images of 600 x 400 take 720,000 bytes each: two fit into two megabytes."""
    items = tuple(Item(f"{number}.jpg", number) for number in range(4))
    for item in items:
        Image.new("RGB", (600, 400), (60 * item.label, 0, 0)).save(tmp_path / item.path)
    large = Task("large", ("a",) * 4, ("{}",), items, (), (), tmp_path)
    batches = training_batches(large, iterations=2, cache_mb=2)
    assert "2 of 4" in capsys.readouterr().err
    assert same(batches, training_batches(large, iterations=2))


# --- testing


@pytest.mark.parametrize("workers", [0, 2])
def test_test_images_come_in_order(task, workers):
    loader = datasets.test_loader(task.test, task, PLAIN, batch_size=3, workers=workers)
    images, labels = (torch.cat(parts) for parts in zip(*loader))
    assert labels.tolist() == [item.label for item in task.test]
    assert torch.equal(images, torch.stack([PLAIN(task.read(item)) for item in task.test]))


# --- errors


def test_a_damaged_training_image_is_found_before_training(task):
    damaged = task.image_root / task.train[7].path
    damaged.write_bytes(damaged.read_bytes()[:300])
    with pytest.raises(DatasetError, match=task.train[7].path):
        datasets.training_loader(task, AUGMENT, 4, 7, 3, workers=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_test_image_reaches_the_main_process_as_one_line(task, workers):
    damaged = task.image_root / task.test[-1].path
    damaged.write_bytes(b"")
    with pytest.raises(DatasetError) as direct:
        datasets.read_image(damaged)
    with pytest.raises(DatasetError) as caught:
        list(datasets.test_loader(task.test, task, PLAIN, 3, workers))
    assert str(caught.value) == str(direct.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_image_that_vanishes_while_training(task, workers):
    loader = datasets.training_loader(task, AUGMENT, 4, 7, 3, workers, cache_mb=0)
    (task.image_root / task.train[2].path).unlink()
    with pytest.raises(DatasetError) as caught:
        list(loader)
    assert task.train[2].path in str(caught.value) and "\n" not in str(caught.value)


def _broken_transform(image):
    raise ZeroDivisionError("a mistake in a transform")


def test_an_unforeseen_error_in_a_worker_keeps_its_traceback(task):
    with pytest.raises(ZeroDivisionError, match="_broken_transform"):
        list(datasets.test_loader(task.test, task, _broken_transform, 3, workers=1))


@pytest.mark.parametrize(("cores", "workers"), [(1, 0), (2, 0), (3, 2), (8, 7), (9, 8), (64, 8)])
def test_default_workers(cores, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert datasets.default_workers() == workers


@pytest.mark.parametrize(
    ("workers", "free", "fitting"), [(8, 64, 1), (8, 40, 0), (8, 10, 0), (8, 340, 8), (8, 320, 7), (0, 10, 0)]
)
def test_workers_share_the_memory_of_a_container(workers, free, fitting, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(images_module, "SHARED_MEMORY", tmp_path)
    usage = type("Usage", (), {"free": free * 10**6})
    monkeypatch.setattr(images_module.shutil, "disk_usage", lambda path: usage)
    assert datasets.workers_that_fit(workers, 20 * 10**6) == fitting
    assert (str(tmp_path) in capsys.readouterr().err) == (fitting < workers)
    monkeypatch.setattr(images_module, "SHARED_MEMORY", tmp_path / "none")  # as on macOS
    assert datasets.workers_that_fit(workers, 20 * 10**6) == workers


def test_all_loaders_of_a_run_fit_into_shared_memory(run_main, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "workers_that_fit", lambda workers, size: asked.append((workers, size)) or 0)
    run_main("--total_iters", "1", "--batch_size", "4", "--workers", "3")
    image = 3 * 32**2  # the tiny CLIP's, a byte a value
    assert {workers for workers, _ in asked} == {3} and {size for _, size in asked} == {4 * image, 256 * image}


# --- augmented views in order


def test_augmented_views_come_in_order_and_are_not_training_images(task):
    def views(seed=3, workers=0, batch_size=7):
        batches = list(datasets.augmented_loader(task, AUGMENT, batch_size, 3, seed, workers))
        assert [len(labels) for _, labels in batches] == [7, 7, 7, 7, 2] or batch_size != 7
        return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])

    images, labels = views()
    assert labels.tolist() == 3 * [item.label for item in task.train]
    for i in range(3):
        for position, item in enumerate(task.train):
            torch.manual_seed(images_module.derive_seed("augment", 3, -1 - i, position))
            assert torch.equal(images[10 * i + position], AUGMENT(task.read(item)))
    again, _ = views(workers=2, batch_size=4)
    assert torch.equal(images, again) and not torch.equal(images, views(seed=4)[0])
    trained = torch.cat([batch for batch, _ in training_batches(task, batch_size=10, iterations=5)])
    assert not any(torch.equal(view, image) for view in images for image in trained)


def test_a_damaged_image_ends_augmented_views(task):
    (task.image_root / task.train[3].path).write_bytes(b"")
    with pytest.raises(DatasetError, match=re.escape(task.train[3].path)):
        datasets.augmented_loader(task, AUGMENT, 4, 2, 3, 0)
