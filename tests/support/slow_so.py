"""SO and its ablations as their definition reads, entry by entry."""

import math


class SlowSO:
    """The definition in SOAblation's docstring on one float64 tensor, with dictionaries from flat index to moment.

    It takes the random draws from the optimizer's state, after a check that they are possible.
    """

    def __init__(
        self,
        weight,
        k,
        T,
        lr,
        betas,
        eps,
        weight_decay,
        prune_first,
        gradient="random",
        moments="importance",
        support="dynamic",
    ):
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
                few = math.comb(len(grad), self.k) < 10_000  # draws that may repeat by chance
                assert drawn != self.S or few, "not drawn again"
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
