"""SO beside a slow reference that works entry by entry, beside torch's Adam, and its state and draws."""

import ast
import copy
import importlib.util
import pickle
import shutil
import sys
from collections import Counter
from itertools import pairwise

import pytest
import torch
from support.slow_so import beside_slow, in_lockstep
from torch import nn

from optimizers import SO, SparseOptimizer


@pytest.mark.parametrize("prune_first", [False, True])
@pytest.mark.parametrize("T, weight_decay", [(1, 0.0), (5, 0.1)])
@pytest.mark.parametrize("density", [0.2, 0.02])  # most supports overlap with the kept set; few do
def test_equals_the_slow_reference(prune_first, T, weight_decay, density):
    options = dict(T=T, weight_decay=weight_decay, prune_first=prune_first)
    shapes = [(6, 5), (6, 5), (30,), (2, 3, 5), (7, 11), (40, 20), (1,)]
    for state, reference in beside_slow(SO, shapes, steps=30, density_ratio=density, **options):
        assert state["kept"].tolist() == sorted(reference.moments)


@pytest.mark.parametrize("density, dense", [(1.0, False), (0.3, True)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_density_one_and_dense_groups_are_adam(density, dense, weight_decay):
    options = dict(lr=0.01, betas=(0.7, 0.9), eps=1e-7, weight_decay=weight_decay)
    for p, q in in_lockstep(
        lambda ps: SO(ps, density_ratio=density, T=3, dense=dense, **options),
        lambda ps: torch.optim.Adam(ps, **options),
    ):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_changes_only_support_and_kept_entries_and_has_o_of_k_state():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(200, 300))
    optimizer = SO([p], density_ratio=1e-3, T=2)
    optimizer.draw_supports()
    k, state = 60, optimizer.state[p]
    assert state["kept"].data_ptr() != state["support"].data_ptr()
    for _ in range(7):
        before, kept = p.detach().clone(), set(state["kept"].tolist())
        p.grad = torch.randn_like(p)
        optimizer.step()
        changed = set((p.detach() != before).reshape(-1).nonzero().reshape(-1).tolist())
        assert changed == kept | set(state["support"].tolist())
        sizes = {name: value.numel() for name, value in state.items() if isinstance(value, torch.Tensor)}
        assert sizes == {"support": k, "kept": k, "m": k, "v": k}


def test_k_is_at_least_one_and_rounds_down():
    for numel, density, k in ((10, 0.01, 1), (99, 0.1, 9), (1, 1e-6, 1), (64, 1.0, 64)):
        p = nn.Parameter(torch.zeros(numel))
        optimizer = SO([p], density_ratio=density)
        p.grad = torch.ones(numel)
        optimizer.step()
        assert len(optimizer.state[p]["support"]) == k and int((p != 0).sum()) == k


@pytest.mark.parametrize("numel, k", [(1, 1), (10, 10), (10, 9), (1000, 249), (1000, 250), (10**9, 5000)])
def test_draw_support_is_distinct_and_in_range(numel, k):
    draw = SparseOptimizer.draw_support(numel, k, torch.Generator().manual_seed(1), "cpu")
    assert draw.dtype == torch.int64 and draw.shape == (k,)
    assert len(draw.unique()) == k and draw.min() >= 0 and draw.max() < numel


@pytest.mark.parametrize("k", [4, 20])  # drawn with repeats, drawn as a permutation
def test_draw_support_is_uniform(k):
    generator, draws, numel = torch.Generator().manual_seed(2), 2000, 40
    counts = torch.zeros(numel)
    for _ in range(draws):
        counts[SparseOptimizer.draw_support(numel, k, generator, "cpu")] += 1
    p = k / numel
    z = (counts - draws * p) / (draws * p * (1 - p)) ** 0.5
    assert z.abs().max() < 4.5


def test_supports_are_redrawn_every_T_steps_by_a_separate_generator():
    def supports(seed, disturb):
        p = nn.Parameter(torch.zeros(1000))
        optimizer, seen = SO([p], density_ratio=0.01, T=3, seed=seed), []
        for _ in range(9):
            p.grad = torch.ones(1000)
            if disturb:
                torch.rand(5)
            optimizer.step()
            seen.append(tuple(optimizer.state[p]["support"].tolist()))
        return seen

    seen = supports(0, disturb=False)
    assert [a == b for a, b in pairwise(seen)] == [True, True, False, True, True, False, True, True]
    assert supports(0, disturb=True) == seen
    assert supports(1, disturb=False) != seen


def run(params, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape[-1], generator=generator).expand(p.shape)
        optimizer.step()
    return params


@pytest.mark.parametrize("how", ["torch.save", "state_dict", "pickle", "deepcopy"])
def test_resumes_bit_for_bit_in_the_middle_of_an_interval(tmp_path, how):
    params = [nn.Parameter(torch.zeros(3400, 5000)), nn.Parameter(torch.zeros(2, 7))]  # 17 M entries, above 2**24
    optimizer = SO([{"params": params[:1]}, {"params": params[1:], "dense": True}], density_ratio=1e-4, T=3)
    run(params, optimizer, 5, seed=1)  # two steps into the second interval
    assert max(optimizer.state[params[0]]["support"]) > 2**24
    if how in ("pickle", "deepcopy"):
        duplicate = copy.deepcopy if how == "deepcopy" else lambda value: pickle.loads(pickle.dumps(value))
        others, resumed = duplicate((params, optimizer))
    else:
        state = optimizer.state_dict()
        if how == "torch.save":
            torch.save(state, tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt", weights_only=True)
        others = copy.deepcopy(params)
        resumed = SO([{"params": others[:1]}, {"params": others[1:], "dense": True}], seed=99)
        resumed.load_state_dict(state)
    for p, q in zip(run(params, optimizer, 5, seed=2), run(others, resumed, 5, seed=2)):
        assert p is not q and torch.equal(p, q)


def test_groups_schedulers_and_closures():
    torch.manual_seed(0)
    a, b = nn.Parameter(torch.randn(100)), nn.Parameter(torch.randn(100))
    optimizer = SO(
        [{"params": [a], "density_ratio": 0.1, "T": 2}, {"params": [b], "lr": 0.5}], lr=0.1, density_ratio=0.3
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (a**2).sum() + (b**2).sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.25]
    assert [len(optimizer.state[p]["support"]) for p in (a, b)] == [10, 30]
    assert optimizer.step(closure) < first
    optimizer.param_groups[0]["density_ratio"] = 0.2  # takes effect at the next draw, step 3
    optimizer.step(closure)
    assert len(optimizer.state[a]["support"]) == len(optimizer.state[a]["kept"]) == 20
    optimizer.param_groups[0]["density_ratio"] = 0.05
    for _ in range(2):
        optimizer.step(closure)
    assert len(optimizer.state[a]["kept"]) == 5 and optimizer.state[b]["step"] == 5


def test_parameters_without_gradient_keep_their_step_counter():
    a, b = nn.Parameter(torch.ones(50)), nn.Parameter(torch.ones(50))
    optimizer = SO([a, b], density_ratio=0.1)
    for i in range(4):
        a.grad, b.grad = torch.ones(50), torch.ones(50) if i % 2 else None
        optimizer.step()
    assert (optimizer.state[a]["step"], optimizer.state[b]["step"]) == (4, 2)


def test_non_contiguous_and_16_bit_parameters():
    torch.manual_seed(0)
    grad = torch.randn(4, 6, 5, 3)
    plain = nn.Parameter(torch.zeros(4, 6, 5, 3))
    strided = nn.Parameter(torch.zeros(4, 6, 5, 3).to(memory_format=torch.channels_last))
    half = nn.Parameter(torch.zeros(4, 6, 5, 3, dtype=torch.bfloat16))
    for p in (plain, strided, half):
        optimizer = SO([p], lr=0.1, density_ratio=0.1, T=2, seed=5)
        for _ in range(6):
            p.grad = grad.to(p.dtype)
            optimizer.step()
    assert torch.equal(plain, strided) and int((plain != 0).sum()) > 36
    torch.testing.assert_close(half.float(), plain, rtol=0.02, atol=0.02)


def test_16_bit_weights_are_updated_in_float32():
    torch.manual_seed(0)
    weight, grad = torch.randn(100).bfloat16(), torch.randn(100).bfloat16()
    sparse, dense = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    optimizer = SO([{"params": [sparse], "density_ratio": 1.0}, {"params": [dense], "dense": True}], weight_decay=0.1)
    for _ in range(5):
        sparse.grad, dense.grad = grad.clone(), grad.clone()
        optimizer.step()
        assert torch.equal(sparse, dense)


DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def mixed():
    """Tensors of three types, all of 60 entries and so of equal k; the second has no entries."""
    values = torch.randn(60, generator=torch.Generator().manual_seed(0)).bfloat16()  # exact in all three
    params = [nn.Parameter(values.to(dtype).view(shape)) for dtype, shape in zip(DTYPES, ((60,), (6, 10), (3, 4, 5)))]
    return [params[0], nn.Parameter(torch.zeros(0, 5)), *params[1:]]


def give_gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(60, generator=generator).bfloat16().to(p.dtype).view(p.shape) if p.numel() else p * 0


@pytest.mark.parametrize("prune_first", [False, True])
def test_a_group_of_mixed_types_is_trained_as_each_alone(monkeypatch, prune_first):
    drawn = Counter()  # of each optimizer, by its generator

    def draw(numel, k, generator):
        assert (numel, k) == (60, 12)
        drawn[generator] += 1
        interval = (drawn[generator] - 1) // (3 if generator is optimizer.generator else 1)
        return ((5 * torch.arange(12) + interval) % 60).sort().values

    monkeypatch.setattr(SparseOptimizer, "draw_support", draw)
    options = dict(lr=0.05, density_ratio=0.2, T=2, weight_decay=0.1, prune_first=prune_first)
    together, alone = mixed(), mixed()
    optimizer, single = SO(together, **options), [SO([p], **options) for p in alone]
    for step in range(8):
        give_gradients(together, step)
        give_gradients(alone, step)
        optimizer.step()
        for each in single:
            each.step()
        assert all(torch.equal(p, q) for p, q in zip(together, alone))
    for p, start in zip(together, mixed()):
        assert p.dtype == start.dtype and p.shape == start.shape
        assert p.numel() == 0 or 24 <= int((p != start).sum()) < 60


def test_moments_have_at_least_32_bits():
    for dense in (False, True):
        params = mixed()
        optimizer = SO(params, density_ratio=0.2, dense=dense)
        give_gradients(params, 0)
        optimizer.step()
        for p in (params[0], *params[2:]):
            expected = torch.float64 if p.dtype == torch.float64 else torch.float32
            assert optimizer.state[p]["m"].dtype == optimizer.state[p]["v"].dtype == expected


OUT_OF_RANGE = [("lr", -1.0), ("betas", (1.0, 0.9)), ("betas", (0.9,)), ("eps", -1e-8), ("weight_decay", -0.1)]
OUT_OF_RANGE += [("density_ratio", 0.0), ("density_ratio", 1.5), ("T", 0), ("T", 2.5)]
NO_NUMBERS = [("lr", "0.1"), ("betas", 0.9), ("density_ratio", None)]
COMPLEX = ("params", [nn.Parameter(torch.zeros(3, dtype=torch.complex64))])


@pytest.mark.parametrize("name, value", [*OUT_OF_RANGE, *NO_NUMBERS, COMPLEX])
def test_a_rejected_group_changes_nothing(name, value):
    p = nn.Parameter(torch.zeros(3))
    if (name, value) in OUT_OF_RANGE:
        with pytest.raises(ValueError, match=name):
            SO([p], **{name: value})
    params, others = mixed(), mixed()
    optimizer, other = SO(params, density_ratio=0.2, T=3), SO(others, density_ratio=0.2, T=3)
    give_gradients(params, 0)
    give_gradients(others, 0)
    optimizer.step()
    with pytest.raises((ValueError, TypeError)):
        optimizer.add_param_group({"params": [p], name: value})
    other.step()
    give_gradients(params, 1)
    give_gradients(others, 1)
    optimizer.step()
    other.step()
    assert len(optimizer.param_groups) == 1 and all(torch.equal(p, q) for p, q in zip(params, others))
    optimizer.add_param_group({"params": [p]})
    assert optimizer.param_groups[1]["density_ratio"] == 0.2


def test_sparse_gradients_are_rejected_before_anything_changes():
    first, second = nn.Parameter(torch.ones(5)), nn.Embedding(5, 2, sparse=True)
    optimizer = SO([{"params": [first]}, {"params": second.parameters()}])
    first.grad = torch.ones(5)
    second(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=True"):
        optimizer.step()
    assert torch.equal(first, torch.ones(5))


def test_other_states_and_impossible_draws_are_rejected():
    large, small = nn.Parameter(torch.ones(1000)), nn.Parameter(torch.ones(4))
    optimizer = SO([large], density_ratio=0.5)
    large.grad = torch.ones(1000)
    optimizer.step()
    with pytest.raises(ValueError, match="other shapes"):
        SO([small]).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="not made by SO"):
        SO([small]).load_state_dict(torch.optim.Adam([small]).state_dict())
    for k in (0, 6):
        with pytest.raises(ValueError, match="distinct"):
            SparseOptimizer.draw_support(5, k)


def test_the_file_works_when_copied_into_another_project(tmp_path):
    path = shutil.copy(SparseOptimizer.__file__, tmp_path / "SparseOptimizer.py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in imported} <= {"torch", *sys.stdlib_module_names}
    spec = importlib.util.spec_from_file_location("copied", path)
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    layer = nn.Linear(3, 2)
    before = layer.weight.clone()
    optimizer = copied.SO(layer.parameters(), lr=3e-4, density_ratio=5e-4, T=10)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert int((layer.weight != before).sum()) == 1
