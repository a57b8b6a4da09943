"""Arithmetic of deltas beside dense tensors, and scripts/deltas.py on the files of runs."""

import copy
from pathlib import Path

import pytest
import torch
from support.runs import call, error_of, in_folder, refused
from support.weights import small_clip
from test_contracts import quick

import clip
from clip.arithmetic import Switch, combine, entries, interpolate, overlap
from clip.delta import apply_changes, difference
from methods import merge_file
from methods.loading import load_adapted
from scripts import deltas


def adapted(base: clip.CLIP, seed: int, share: float = 0.1) -> clip.CLIP:
    """A copy of the model with a share of each matrix's entries moved, some by very much."""
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            where = torch.rand(tensor.shape, generator=generator) < share
            tensor += where * torch.randn(tensor.shape, generator=generator) * 10**seed
    return model


@pytest.fixture(scope="module")
def models():
    base = small_clip().requires_grad_(False)
    return base, [adapted(base, seed) for seed in (1, 2, 3)]


def weights(model: clip.CLIP) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def with_changes(base: clip.CLIP, changes) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(base)
    apply_changes(model, changes)
    return weights(model)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("factors", [(1, 1, 1), (1, -1, 0.5), (0.25, 0, -2)])
def test_combinations_equal_dense_arithmetic(models, factors, mean):
    base, others = models
    start, ends = weights(base), [weights(model) for model in others]
    found = with_changes(base, combine(start, [difference(start, model) for model in others], factors, mean))
    for name, before in start.items():
        moved = [end[name].double() - before.double() for end in ends]
        total = sum(factor * each for factor, each in zip(factors, moved))
        count = sum((each != 0).double() for each in moved).clamp(min=1)
        expected = (before.double() + (total / count if mean else total)).float()
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=0)


def test_arithmetic_is_exact_where_it_can_be(models):
    base, (one, other, _) = models
    start = weights(base)
    first, second = difference(start, one), difference(start, other)
    both = combine(start, [first, second], [1, 1])
    assert entries(combine(start, [first, first], [1, -1])) == 0
    ways = {"subtract": combine(start, [both, second], [1, -1]), "half": combine(start, [first, first], [0.5, 0.5])}
    for name, end in weights(one).items():
        assert torch.equal(with_changes(base, interpolate(start, {}, first, 1))[name], end)
        assert torch.equal(with_changes(base, interpolate(start, second, first, 1))[name], end)
        for way in ways.values():
            torch.testing.assert_close(with_changes(base, way)[name], end, rtol=1e-5, atol=1e-4)
    assert interpolate(start, {}, first, 0) == {}


def test_overlap_by_hand():
    base = {"w": torch.zeros(2, 3), "b": torch.ones(2)}
    of = lambda *rows: (torch.tensor([i for i, _ in rows], dtype=torch.int32), torch.tensor([v for _, v in rows]))  # noqa: E731
    one = {"w": of((0, 3.0), (2, 4.0), (5, 0.0))}
    other = {"w": of((2, -1.0), (4, 1.0), (5, 2.0)), "b": of((1, 3.0))}
    found = overlap(base, one, other)
    assert found["common"] == 2 and found["of_smaller"] == pytest.approx(2 / 3) and found["same_sign"] == 0
    assert found["cosine"] == pytest.approx(-4 / (5 * 10**0.5))
    alone = overlap(base, one, {"b": of((1, 3.0))})
    assert alone["common"] == 0 == alone["cosine"] and alone["same_sign"] != alone["same_sign"]


def test_switching_in_place_is_exact_both_ways(models):
    base, (one, other, _) = models
    model, start = copy.deepcopy(base), weights(base)
    switch = Switch(model, {"one": difference(start, one), "other": difference(start, other)})
    memory = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    for name, expected in (
        ("one", one),
        ("other", other),
        ("one", one),
        (None, base),
        ("other", other),
        ("other", other),
    ):
        switch.to(name)
        assert all(torch.equal(tensor, weights(expected)[key]) for key, tensor in weights(model).items()), name
    with pytest.raises(KeyError):
        switch.to("unknown")
    switch.to(None)
    assert all(torch.equal(tensor, start[key]) for key, tensor in weights(model).items())
    assert memory == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weight files of short runs, by method; so and lora adapt the same model."""
    import main as entry

    folder, found = tmp_path_factory.mktemp("deltas"), {}
    for method in ("so", "lora", "linear_probe"):
        flags = (*quick(method, 3), *in_folder(folder), "--filename", method, "--cache_dir", folder / "cache")
        code, _, _, err = call(entry.main, *flags)
        assert code == 0, err
        (found[method],) = folder.rglob(f"{method}.safetensors")
    return found


def test_operations_on_files_make_models_that_run(files, run_main):
    so, lora = files["so"], files["lora"]
    code, _, out, err = call(
        deltas.main, "add", so, lora, "--out", "new/both.safetensors", "--whole", "clip.safetensors"
    )
    assert code == 0 and "in common" in out, err
    base, _ = clip.load("tiny")
    expected = weights(base)
    one, other = (weights(merge_file(clip.load("tiny")[0], path)) for path in (so, lora))
    whole, delta = (
        weights(clip.load("clip.safetensors", arch="openai")[0]),
        weights(merge_file(clip.load("tiny")[0], "new/both.safetensors")),
    )
    for name, start in expected.items():
        assert torch.equal(whole[name], delta[name])
        torch.testing.assert_close(delta[name], one[name] + (other[name] - start), rtol=1e-6, atol=1e-7)
    code, _, _, err = call(deltas.main, "subtract", "new/both.safetensors", lora, "--out", "back.safetensors")
    assert code == 0, err
    for name, tensor in weights(merge_file(clip.load("tiny")[0], "back.safetensors")).items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-6, atol=1e-7)
    words = ("--method", "so", "--shots", 1, "--save_path", "w", "--filename", "both", "--eval_only")
    path = Path("w/tiny/digits/1shots/seed3/both.safetensors")
    path.parent.mkdir(parents=True)
    Path("new/both.safetensors").rename(path)
    assert "--whole" in error_of(clip.WeightsError, load_adapted, path)  # as predict.py and evaluate.py do
    assert "--whole" in refused(run_main(*words), ["w", "back.safetensors", "clip.safetensors", "new"])
    code, record, _, err = run_main(
        "--method", "zero_shot", "--backbone", "clip.safetensors", "--arch", "openai", "--dataset", "digits"
    )
    assert code == 0 and record["backbone"] == "clip.safetensors", err
    for operation, flag in (("scale", "--by"), ("interpolate", "--at")):
        assert call(deltas.main, operation, so, flag, 0.5, "--out", f"{operation}.safetensors")[0] == 0
        for name, tensor in weights(merge_file(clip.load("tiny")[0], f"{operation}.safetensors")).items():
            torch.testing.assert_close(tensor, (expected[name] + one[name]) / 2, rtol=1e-6, atol=1e-9)
    assert call(deltas.main, "merge", so, so, "--out", "merged.safetensors")[0] == 0
    assert all(
        torch.equal(tensor, one[name])
        for name, tensor in weights(merge_file(clip.load("tiny")[0], "merged.safetensors")).items()
    )


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("add", "so", "--out", "x.safetensors"), "add"),
        (("scale", "so", "--out", "x.safetensors"), "--by"),
        (("add", "so", "lora", "--at", 1, "--out", "x.safetensors"), "--at"),
        (("add", "so", "lora"), "--out"),
        (("compare", "so", "lora", "--out", "x.safetensors"), "--out"),
        (("interpolate", "so", "lora", "so", "--at", 1, "--out", "x.safetensors"), "interpolate"),
        (("add", "so", "nowhere.safetensors", "--out", "x.safetensors"), "nowhere.safetensors"),
        (("add", "nowhere.safetensors", "so", "--out", "x.safetensors"), "nowhere.safetensors"),
        (("add", "so", "linear_probe", "--out", "x.safetensors"), "linear_probe"),
    ],
)
def test_mistakes(files, words, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused(call(deltas.main, *(files.get(word, word) for word in words)))
    assert named in line


def test_files_of_another_model_are_rejected(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _ = clip.load("tiny")
    model.logit_scale.data += 1
    clip.weights.save_weights(model, Path("other.safetensors"))
    words = (
        "scale",
        files["so"],
        "--by",
        2,
        "--out",
        "x.safetensors",
        "--backbone",
        "other.safetensors",
        "--arch",
        "openai",
    )
    assert "so.safetensors" in refused(call(deltas.main, *words), ["other.safetensors"])
