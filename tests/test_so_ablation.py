"""SOAblation beside a slow reference that works entry by entry, beside SO and torch's Adam; its state and draws."""

import itertools

import pytest
import torch
from support.slow_so import beside_slow, in_lockstep
from torch import nn

from optimizers import SO, SOAblation
from optimizers.ablations import GRADIENTS, MOMENTS, SUPPORTS

ALL = list(itertools.product(GRADIENTS, MOMENTS, SUPPORTS, (False, True)))


@pytest.mark.parametrize("gradient, moments, support, prune_first", ALL)
def test_equals_the_slow_reference(gradient, moments, support, prune_first):
    options = dict(gradient=gradient, moments=moments, support=support, prune_first=prune_first, T=3, weight_decay=0.1)
    shapes = ((6, 5), (2, 3, 5), (7,), (1,))
    for state, reference in beside_slow(SOAblation, shapes, steps=11, density_ratio=0.2, **options):
        n, k = len(reference.w), reference.k
        size = n if moments == "dense" or (gradient, moments) == ("dense", "none") else k
        sizes = {"m": size, "v": size}
        sizes |= {} if gradient == "dense" else {"support": k}
        sizes |= {} if moments == "dense" else {"kept": size}
        assert {name: x.numel() for name, x in state.items() if isinstance(x, torch.Tensor)} == sizes
        places = state["kept"].tolist() if "kept" in state else range(n)
        assert list(places) == sorted(reference.moments)
        expected = torch.tensor([reference.moments[i] for i in places], dtype=torch.float64)
        found = torch.stack([state["m"].reshape(-1), state["v"].reshape(-1)], dim=1)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


OPTIONS = dict(lr=0.01, betas=(0.7, 0.9), eps=1e-7, weight_decay=0.1)


@pytest.mark.parametrize("prune_first", [False, True])
def test_without_options_it_is_so_bit_for_bit(prune_first):
    options = OPTIONS | dict(density_ratio=0.05, T=3, prune_first=prune_first, seed=5)
    for p, q in in_lockstep(lambda ps: SOAblation(ps, **options), lambda ps: SO(ps, **options)):
        assert torch.equal(p, q)


@pytest.mark.parametrize("gradient", ["dense", "random", "importance"])
def test_dense_is_torchs_adam(gradient):
    density = 0.05 if gradient == "dense" else 1.0  # all entries are the important ones, or are drawn
    options = OPTIONS | dict(density_ratio=density, T=3, gradient=gradient, moments="dense")
    for p, q in in_lockstep(lambda ps: SOAblation(ps, **options), lambda ps: torch.optim.Adam(ps, **OPTIONS)):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_no_momentum_is_beta1_zero():
    dense = OPTIONS | dict(gradient="dense", moments="none", density_ratio=0.05)
    adam = OPTIONS | dict(betas=(0.0, 0.9))
    for p, q in in_lockstep(lambda ps: SOAblation(ps, **dense), lambda ps: torch.optim.Adam(ps, **adam)):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    sparse = dict(density_ratio=0.05, T=3, seed=5)
    for p, q in in_lockstep(
        lambda ps: SOAblation(ps, moments="none", **OPTIONS, **sparse), lambda ps: SO(ps, **adam, **sparse)
    ):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_random_moments_are_kept_uniformly():
    p = nn.Parameter(torch.zeros(60))
    optimizer = SOAblation([p], density_ratio=0.1, T=1, moments="random", seed=3)
    excess, variance, before = 0.0, 0.0, set()
    for _ in range(1000):
        p.grad = torch.randn(60) * (100 if len(before) % 2 else 0.01)  # size must not matter
        optimizer.step()
        support, kept = (set(optimizer.state[p][name].tolist()) for name in ("support", "kept"))
        union = len(support | before)
        share = 6 / union
        excess += len(kept & support) - 6 * share
        variance += 6 * share * (1 - share) * (union - 6) / max(1, union - 1)
        before = kept
    assert abs(excess) < 4.5 * variance**0.5


@pytest.mark.parametrize("moments", MOMENTS)
def test_resumes_in_the_middle_of_an_interval(tmp_path, moments):
    def steps(optimizer, p, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(5):
            p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(30, 20))
    optimizer = SOAblation([p], density_ratio=0.05, T=4, moments=moments)
    steps(optimizer, p, seed=1)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    q = nn.Parameter(p.detach().clone())
    resumed = SOAblation([q], seed=9)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for parameter, which in ((p, optimizer), (q, resumed)):
        steps(which, parameter, seed=2)
    assert torch.equal(p, q)


def test_options_out_of_range_are_named():
    for option in ({"gradient": "some"}, {"moments": "kept"}, {"support": "fixed"}, {"T": 0}, {"density_ratio": 2}):
        (name,) = option
        with pytest.raises(ValueError, match=name):
            SOAblation([nn.Parameter(torch.zeros(3))], **option)
        with pytest.raises(ValueError, match=name):
            SOAblation([{"params": [nn.Parameter(torch.zeros(3))], **option}])


def test_closures_groups_and_parameters_without_gradient():
    a, b = nn.Parameter(torch.ones(50)), nn.Parameter(torch.ones(50))
    optimizer = SOAblation([{"params": [a], "moments": "dense"}, {"params": [b]}], density_ratio=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (a**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 50 > optimizer.step(closure)
    assert len(optimizer.state[a]["m"]) == 50 and b not in optimizer.state and torch.equal(b, torch.ones(50))
