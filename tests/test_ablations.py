"""SO's ablations beside a slow reference that works entry by entry, beside SO and Adam, and as a method."""

import copy
import itertools

import pytest
import torch
from torch import nn

from optimizers import SO, SOAblation
from optimizers.ablations import GRADIENTS, MOMENTS, SUPPORTS

ALL = list(itertools.product(GRADIENTS, MOMENTS, SUPPORTS, (False, True)))


class SlowAblation:
    """The definition in SOAblation's docstring on one float64 tensor: dictionaries from flat index to moment.

    What is drawn at random is taken over from the optimizer, after a check that it could have been drawn."""

    def __init__(self, weight, k, T, gradient, moments, support, prune_first, lr, betas, eps, weight_decay):
        self.w, self.k, self.T, self.t = weight.reshape(-1).tolist(), k, T, 0
        self.gradient, self.moments_kind, self.support_kind = gradient, moments, support
        self.prune_first, self.lr, self.eps, self.weight_decay = prune_first, lr, eps, weight_decay
        self.b1, self.b2 = (0.0 if moments == "none" else betas[0]), betas[1]
        self.moments, self.S = {}, None

    def choose_support(self, grad, drawn):
        if self.gradient == "dense":
            self.S = set(range(len(grad)))
        elif self.t == 1 or (self.support_kind == "dynamic" and (self.t - 1) % self.T == 0):
            if self.gradient == "importance":
                self.S = set(sorted(range(len(grad)), key=lambda i: -abs(grad[i]))[: self.k])
            else:
                assert drawn != self.S or len(grad) < 20, "not drawn anew"  # small ones may repeat by chance
                self.S = drawn
        assert drawn is None or drawn == self.S
        assert len(self.S) == (len(grad) if self.gradient == "dense" else self.k)

    def choose_kept(self, moments, drawn):
        if self.moments_kind == "importance":
            return set(sorted(moments, key=lambda i: -abs(moments[i][0]))[: self.k])
        if self.moments_kind == "random":
            assert len(drawn) == self.k and drawn <= moments.keys()
            return drawn
        return set(moments) if self.moments_kind == "dense" else self.S

    def step(self, grad, state):
        grad = grad.reshape(-1).tolist()
        self.t += 1
        self.choose_support(grad, set(state["support"].tolist()) if "support" in state else None)
        union = self.S | self.moments.keys()
        if self.moments_kind == "dense":
            union = set(range(len(grad)))
        elif self.moments_kind == "none":
            union = self.S
        new = {}
        for i in union:
            m, v = self.moments.get(i, (0.0, 0.0))
            g = grad[i] + self.weight_decay * self.w[i] if i in self.S else 0.0
            new[i] = (self.b1 * m + (1 - self.b1) * g, self.b2 * v + (1 - self.b2) * g * g)
        kept = self.choose_kept(new, set(state["kept"].tolist()) if "kept" in state else None)
        self.moments = {i: new[i] for i in kept}
        for i, (m, v) in (self.moments if self.prune_first else new).items():
            m_hat, v_hat = m / (1 - self.b1**self.t), v / (1 - self.b2**self.t)
            self.w[i] -= self.lr * m_hat / (v_hat**0.5 + self.eps)


@pytest.mark.parametrize("gradient, moments, support, prune_first", ALL)
def test_equals_the_slow_reference(gradient, moments, support, prune_first):
    generator = torch.Generator().manual_seed(0)
    options = dict(gradient=gradient, moments=moments, support=support, prune_first=prune_first, T=3)
    options |= dict(lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    weights = [
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((6, 5), (2, 3, 5), (7,), (1,))
    ]
    slow = [SlowAblation(w, max(1, int(0.2 * w.numel())), **options) for w in weights]
    params = [nn.Parameter(w.clone()) for w in weights]
    fast = SOAblation(params, density_ratio=0.2, seed=1, **options)
    for _ in range(11):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        fast.step()
        for p, reference in zip(params, slow):
            reference.step(p.grad, fast.state[p])
            torch.testing.assert_close(p.detach().reshape(-1).tolist(), reference.w, rtol=1e-10, atol=1e-12)
    for p, reference in zip(params, slow):
        places = fast.state[p]["kept"].tolist() if "kept" in fast.state[p] else range(p.numel())
        assert list(places) == sorted(reference.moments)
        expected = torch.tensor([reference.moments[i] for i in places], dtype=torch.float64)
        torch.testing.assert_close(fast.state[p]["m"].reshape(-1), expected[:, 0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(fast.state[p]["v"].reshape(-1), expected[:, 1], rtol=1e-10, atol=1e-12)


def in_lockstep(make, other, steps=40):
    """Steps two optimizers of two equal models on the same random gradients; yields their parameters' pairs."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 7))
    theirs = copy.deepcopy(ours)
    a, b = make(ours.parameters()), other(theirs.parameters())
    for _ in range(steps):
        for p, q in zip(ours.parameters(), theirs.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
        yield from zip(ours.parameters(), theirs.parameters())


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


@pytest.mark.parametrize("gradient, moments, support, prune_first", ALL)
def test_state_has_the_size_that_is_said(gradient, moments, support, prune_first):
    p = nn.Parameter(torch.randn(40, 50))
    optimizer = SOAblation([p], density_ratio=0.01, T=2, gradient=gradient, moments=moments, support=support)
    for _ in range(5):
        p.grad = torch.randn_like(p)
        optimizer.step()
    indices = {} if gradient == "dense" else {"support": 20}
    kept = 2000 if moments == "dense" or (gradient, moments) == ("dense", "none") else 20
    indices |= {} if moments == "dense" else {"kept": kept}
    sizes = {name: value.numel() for name, value in optimizer.state[p].items() if isinstance(value, torch.Tensor)}
    assert sizes == indices | {"m": kept, "v": kept}


def test_random_moments_are_kept_uniformly():
    p = nn.Parameter(torch.zeros(60))
    optimizer = SOAblation([p], density_ratio=0.1, T=1, moments="random", seed=3)
    excess, variance, before = 0.0, 0.0, set()
    for _ in range(1500):
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
