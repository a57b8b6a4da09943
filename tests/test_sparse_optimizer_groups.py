"""SO on groups of mixed tensors, and groups that are refused."""

import copy

import pytest
import torch
from torch import nn

from optimizers import SO, SparseOptimizer

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def mixed():
    """Tensors of three types, all of 60 entries, so of equal k, one without entries between them."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(60, generator=generator).bfloat16()  # exact in all three
    params = [nn.Parameter(values.to(dtype).view(shape)) for dtype, shape in zip(DTYPES, ((60,), (6, 10), (3, 4, 5)))]
    return [params[0], nn.Parameter(torch.zeros(0, 5)), *params[1:]]


def gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(60, generator=generator).bfloat16().to(p.dtype).view(p.shape) if p.numel() else p * 0


@pytest.mark.parametrize("prune_first", [False, True])
def test_a_group_of_mixed_types_is_trained_as_each_alone(monkeypatch, prune_first):
    step = 0

    def draw(numel, k, *_):
        assert (numel, k) == (60, 12)
        return (5 * torch.arange(12) + step) % 60

    monkeypatch.setattr(SparseOptimizer, "draw_support", draw)
    options = dict(lr=0.05, density_ratio=0.2, T=2, weight_decay=0.1, prune_first=prune_first)
    together, alone = mixed(), mixed()
    optimizer, single = SO(together, **options), [SO([p], **options) for p in alone]
    for step in range(8):
        gradients(together, step)
        gradients(alone, step)
        optimizer.step()
        for each in single:
            each.step()
        assert all(torch.equal(p, q) for p, q in zip(together, alone))
    narrow, empty, half, wide = together
    assert [p.dtype for p in (narrow, half, wide)] == list(DTYPES) and empty.shape == (0, 5)
    for p, start in zip(together, mixed()):
        assert p.numel() == 0 or 24 <= int((p != start).sum()) < 60
        assert p.numel() == 0 or {len(optimizer.state[p][name]) for name in ("support", "kept", "m", "v")} == {12}


def test_moments_of_16_bit_parameters_are_float32():
    for dense in (False, True):
        params = mixed()
        optimizer = SO(params, density_ratio=0.2, dense=dense)
        gradients(params, 0)
        optimizer.step()
        for p in (params[0], *params[2:]):
            wide = torch.float64 if p.dtype == torch.float64 else torch.float32
            assert optimizer.state[p]["m"].dtype == optimizer.state[p]["v"].dtype == wide


def test_moments_of_16_bit_parameters_add_up_small_gradients():
    """With bfloat16 moments, v = 0.999 v + 0.001 g^2 would stand still long before it reaches g^2."""
    p = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = SO([p], density_ratio=1.0)
    for _ in range(1000):
        p.grad = torch.ones(1, dtype=torch.bfloat16)
        optimizer.step()
    assert optimizer.state[p]["v"].item() == pytest.approx(1 - 0.999**1000, rel=1e-3)


@pytest.mark.parametrize(
    "group",
    [
        {"params": [nn.Parameter(torch.zeros(3))], "density_ratio": 2.0},
        {"params": [nn.Parameter(torch.zeros(3))], "T": 0},
        {"params": [nn.Parameter(torch.zeros(3))], "lr": -1.0},
        {"params": [nn.Parameter(torch.zeros(3, dtype=torch.complex64))]},
    ],
    ids=["density_ratio", "T", "lr", "complex"],
)
def test_a_refused_group_changes_nothing(group):
    params = mixed()
    optimizer = SO(params, density_ratio=0.2, T=3)
    gradients(params, 0)
    optimizer.step()
    groups, state = copy.deepcopy(optimizer.param_groups), copy.deepcopy(optimizer.state_dict())
    twin = copy.deepcopy(params)
    other = SO(twin, density_ratio=0.2, T=3)
    other.load_state_dict(state)
    with pytest.raises(ValueError):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == len(groups) == 1
    for name, value in groups[0].items():
        assert name == "params" or optimizer.param_groups[0][name] == value
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in params]
    for step in range(1, 6):  # and training goes on as if nothing had been tried
        for each, opt in ((params, optimizer), (twin, other)):
            gradients(each, step)
            opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twin))
    good = nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [good]})
    assert len(optimizer.param_groups) == 2 and optimizer.param_groups[1]["density_ratio"] == 0.2


@pytest.mark.parametrize("option", [{"lr": "0.1"}, {"betas": 0.9}, {"density_ratio": None}])
def test_a_group_with_options_of_a_wrong_type_changes_nothing_either(option):
    optimizer = SO(mixed())
    with pytest.raises((TypeError, ValueError)):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], **option})
    assert len(optimizer.param_groups) == 1
