"""SO and its ablations as their definition reads, entry by entry; two optimizers in lockstep."""

import copy
import math
from types import SimpleNamespace

import torch
from torch import nn

SO_CHOICES = {"gradient": "random", "moments": "importance", "support": "dynamic"}


class SlowSO:
    """The definition in SOAblation's docstring on one float64 tensor, with dictionaries from flat index to moment.

    It takes the random draws from the optimizer's state, after a check that they are possible.
    """

    def __init__(self, weight, density_ratio, **options):
        self.w, self.k, self.t = weight.reshape(-1).tolist(), max(1, int(weight.numel() * density_ratio)), 0
        self.options = o = SimpleNamespace(**SO_CHOICES | options)
        self.b1, self.b2 = (0.0 if o.moments == "none" else o.betas[0]), o.betas[1]
        self.moments, self.S = {}, None

    def choose_support(self, grad, drawn):
        o = self.options
        if o.gradient == "dense":
            self.S = set(range(len(grad)))
        elif self.t == 1 or (o.support == "dynamic" and (self.t - 1) % o.T == 0):
            if o.gradient == "importance":
                self.S = set(sorted(range(len(grad)), key=lambda i: -abs(grad[i]))[: self.k])
            else:
                few = math.comb(len(grad), self.k) < 10_000  # draws that may repeat by chance
                assert drawn != self.S or few, "not drawn again"
                self.S = drawn
        assert drawn is None or drawn == self.S
        assert len(self.S) == (len(grad) if o.gradient == "dense" else self.k)

    def choose_kept(self, moments, drawn):
        kind = self.options.moments
        if kind == "importance":
            return set(sorted(moments, key=lambda i: -abs(moments[i][0]))[: self.k])
        if kind == "random":
            assert len(drawn) == self.k and drawn <= moments.keys()
            return drawn
        return set(moments) if kind == "dense" else self.S

    def step(self, grad, state):
        grad, o = grad.reshape(-1).tolist(), self.options
        self.t += 1
        self.choose_support(grad, set(state["support"].tolist()) if "support" in state else None)
        union = self.S | self.moments.keys()
        if o.moments == "dense":
            union = set(range(len(grad)))
        elif o.moments == "none":
            union = self.S
        new = {}
        for i in union:
            m, v = self.moments.get(i, (0.0, 0.0))
            g = grad[i] + o.weight_decay * self.w[i] if i in self.S else 0.0
            new[i] = (self.b1 * m + (1 - self.b1) * g, self.b2 * v + (1 - self.b2) * g * g)
        kept = self.choose_kept(new, set(state["kept"].tolist()) if "kept" in state else None)
        self.moments = {i: new[i] for i in kept}
        for i, (m, v) in (self.moments if o.prune_first else new).items():
            m_hat, v_hat = m / (1 - self.b1**self.t), v / (1 - self.b2**self.t)
            self.w[i] -= o.lr * m_hat / (v_hat**0.5 + o.eps)


def beside_slow(optimizer_class, shapes, steps, density_ratio, **options):
    """Step an optimizer and the slow one on tensors of these shapes, and compare the weights after each step. Yield
    each tensor's state and its slow counterpart, also after each step."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    options |= dict(lr=0.05, betas=(0.8, 0.95), eps=1e-6)
    slow = [SlowSO(w, density_ratio, **options) for w in weights]
    params = [nn.Parameter(w.clone()) for w in weights]
    fast = optimizer_class(params, density_ratio=density_ratio, **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        fast.step()
        for p, reference in zip(params, slow):
            reference.step(p.grad, fast.state[p])
            torch.testing.assert_close(p.detach().reshape(-1).tolist(), reference.w, rtol=1e-10, atol=1e-12)
            yield fast.state[p], reference


def in_lockstep(make, other, steps=40):
    """Step two optimizers of two equal models on the same random gradients; yield pairs of their parameters."""
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
