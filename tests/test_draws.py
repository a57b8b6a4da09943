"""Few-shot draws: the published procedure and CoOp's, image by image."""

import random
from collections import Counter

import pytest

from datasets.fewshot import draw, draw_disjoint
from datasets.task import Item


def reference_draw(train, val, shots, seed, order):
    """The procedures with Python's global generator. Released: seed it, draw val, draw train. CoOp: train, then val."""
    before = random.getstate()
    random.seed(seed)
    drawn = {}
    for name in ("val", "train") if order == "released" else ("train", "val"):
        part, k = (val, min(shots, 4)) if name == "val" else (train, shots)
        picks = []
        for label in dict.fromkeys(item.label for item in part):
            rows = [item for item in part if item.label == label]
            if len(rows) >= k:
                picks += random.sample(rows, k)
            else:
                picks += random.choices(rows, k=k) if order == "released" else rows
        drawn[name] = tuple(picks)
    random.setstate(before)
    return drawn["train"], drawn["val"]


def make_items(part: str, sizes: dict[int, int]) -> tuple[Item, ...]:
    return tuple(Item(f"{part}/{label}_{i}.jpg", label) for label, size in sizes.items() for i in range(size))


@pytest.mark.parametrize("order", ["released", "coop"])
@pytest.mark.parametrize("shots", [1, 4, 16])
def test_draws_equal_the_published_procedures(shots, order):
    # Class order 2, 0, 1 as in the flowers and cars splits; class 1 has too few images for 16 shots.
    train, val = make_items("train", {2: 20, 0: 60, 1: 5}), make_items("val", {2: 9, 1: 3, 0: 24})
    for seed in (0, 1, 2):
        few_train, few_val = draw(train, val, shots, seed, order)
        assert (few_train, few_val) == reference_draw(train, val, shots, seed, order)
        n = shots if order == "released" else min(shots, 5)
        assert [item.label for item in few_train] == [2] * shots + [0] * shots + [1] * n
        k = min(shots, 4)
        assert Counter(item.label for item in few_val) == {2: k, 1: k if order == "released" else min(shots, 3), 0: k}
        enough = [item for item in few_train if item.label != 1 or order == "coop"]
        assert len(set(enough)) == len(enough)
    assert draw(train, val, shots, 1, "coop") != draw(train, val, shots, 1)


def test_draws_are_those_written_here():
    """Seed 1 on ten images a class, computed in an interpreter with random.seed and random.sample."""
    few_train, few_val = draw(make_items("train", {0: 10, 1: 10}), make_items("val", {0: 10, 1: 10}), 2, 1)
    assert [item.path for item in few_val] == ["val/0_2.jpg", "val/0_1.jpg", "val/1_4.jpg", "val/1_1.jpg"]
    assert [item.path for item in few_train] == ["train/0_7.jpg", "train/0_9.jpg", "train/1_7.jpg", "train/1_6.jpg"]


def test_draws_neither_read_nor_change_the_global_generator():
    train, val = make_items("train", {0: 10}), make_items("val", {0: 10})
    random.seed(5)
    first = draw(train, val, 4, 1)
    state = random.getstate()
    assert draw(train, val, 4, 1) == first != draw(train, val, 4, 2)
    assert random.getstate() == state


@pytest.mark.parametrize("order", ["released", "coop"])
def test_imagenet_draws_train_and_val_from_one_sample_per_class(order):
    pools = [[f"{label}_{i}" for i in range(20)] for label in range(3)]
    train, val = draw_disjoint(pools, 8, 3, order)
    rng = random.Random(3)
    samples = [rng.sample(pool, 12 if order == "released" else 8) for pool in pools]
    assert train == [sample[:8] for sample in samples] and val == [sample[8:] for sample in samples]
