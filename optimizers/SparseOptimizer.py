"""SO, the sparse optimizer: Adam with a sparse random gradient and a sparse, importance-pruned state.

Paper: Mrabah, Richet, Ben Ayed, Granger, "Sparsity Outperforms Low-Rank Projections in Few-Shot Adaptation",
ICCV 2025 (arXiv 2504.12436). This file needs only torch and can be copied into any project:

    from SparseOptimizer import SO
    optimizer = SO(model.parameters(), lr=3e-4, density_ratio=5e-4, T=10)

Words: the *support* S of a tensor are the k entries whose gradient is used; they are random and drawn again every T
steps. The *kept set* K are the k entries that have a first and a second moment. k = max(1, int(numel * density_ratio)).
Entries are flat indices in row-major order. Shapes: n tensors updated as one batch, k entries of each.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from numbers import Integral

import torch
from torch import Tensor
from torch.optim import Optimizer


def draw_support(
    numel: int, k: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Return k distinct indices out of range(numel), uniform without replacement: int64 [k] on `device`.

    The numbers are drawn on the generator's device, so a CPU generator gives the same draws for every `device`. The
    cost is O(k log k): draw with repeats, keep first occurrences and draw the missing ones. If k is at least a quarter
    of numel, it is a permutation. Raise ValueError unless 1 <= k <= numel.
    """
    if not 1 <= k <= numel:
        raise ValueError(f"cannot draw {k} distinct indices out of {numel}")
    source = generator.device if generator is not None else "cpu"
    if 4 * k >= numel:
        return torch.randperm(numel, generator=generator, device=source)[:k].to(device, non_blocking=True)
    drawn = torch.empty(0, dtype=torch.int64, device=source)
    while len(drawn) < k:
        more = torch.randint(numel, (k + k // 4 + 8 - len(drawn),), generator=generator, device=source)
        drawn = _first_occurrences(torch.cat([drawn, more]))
    return drawn[:k].to(device, non_blocking=True)


def _first_occurrences(x: Tensor) -> Tensor:
    """Return x without repeats, in order. (The first k of a sorted `unique` would favour small values.)"""
    values, positions = x.sort(stable=True)
    is_first = torch.ones_like(values, dtype=torch.bool)
    is_first[1:] = values[1:] != values[:-1]
    return x[positions[is_first].sort().values]


def merge(
    kept: Tensor, support: Tensor, m: Tensor, v: Tensor, grad: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the moments of U = K union S: indices, m, v and `is_twin`, all [n, k + k'].

    `kept` [n, k] and `support` [n, k'] have sorted, distinct indices in each row; `m` and `v` belong to `kept`, `grad`
    to `support`. An entry in both K and S appears twice with the same moments; `is_twin` marks the second.
    """
    # For each entry of S its position in K, and whether it is there.
    at = torch.searchsorted(kept, support).clamp_(max=kept.shape[1] - 1)
    in_kept = kept.gather(1, at) == support
    # Gradients of entries in both S and K go to their places in K; the others go to a last column that is cut off.
    places = torch.where(in_kept, at, kept.shape[1])
    grad_of_kept = grad.new_zeros(len(kept), kept.shape[1] + 1).scatter_(1, places, grad)[:, :-1]
    m = beta1 * m + (1 - beta1) * grad_of_kept
    v = beta2 * v + (1 - beta2) * grad_of_kept**2
    m_of_support = torch.where(in_kept, m.gather(1, at), (1 - beta1) * grad)
    v_of_support = torch.where(in_kept, v.gather(1, at), (1 - beta2) * grad**2)
    is_twin = torch.cat([torch.zeros_like(kept, dtype=torch.bool), in_kept], dim=1)
    return torch.cat([kept, support], 1), torch.cat([m, m_of_support], 1), torch.cat([v, v_of_support], 1), is_twin


def prune(indices: Tensor, m: Tensor, v: Tensor, is_twin: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k entries of each row with the largest |m|, without twins: sorted indices, m, v, all [n, k]."""
    best = m.abs().masked_fill(is_twin, -1).topk(k, dim=1, sorted=False).indices
    kept, order = indices.gather(1, best).sort(dim=1)
    best = best.gather(1, order)
    return kept, m.gather(1, best), v.gather(1, best)


def adam_update(m: Tensor, v: Tensor, step: int, lr: float, beta1: float, beta2: float, eps: float) -> Tensor:
    """Return what Adam subtracts from the weights in step 1, 2, ... (Kingma and Ba 2015, algorithm 1)."""
    return lr / (1 - beta1**step) * m / ((v / (1 - beta2**step)).sqrt() + eps)


def at_flat(tensor: Tensor, indices: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return a view of `tensor` and an index such that view[index] are its entries at flat row-major `indices`."""
    if tensor.is_contiguous():
        return tensor.view(-1), (indices,)
    return tensor, torch.unravel_index(indices, tensor.shape)


class SO(Optimizer):
    """Adam on a sparse random gradient, with moments only for the k most important entries of each tensor.

    One step on one tensor W whose step counter is t = 1, 2, ...:

    1. before steps 1, T + 1, 2T + 1, ... draw the support S: k entries, uniform without replacement;
    2. g = gradient at S (plus weight_decay * W there, coupled as in Adam);
    3. decay the moments of U = K union S, and add g to those in S; entries new in S start from zero;
    4. update the entries of U as Adam does;
    5. K becomes the k entries of U with the largest |m|; the moments of the others are forgotten.

    Parameters may have any rank and 16 bits (their moments are float32). Parameters without a gradient are not updated,
    and their step counter does not change.

    Args:
        params: tensors or parameter groups. A group may have its own value of every option below except `seed`, and
            change it during the run, except `dense`.
        lr: learning rate. 2e-4 is published for CLIP.
        betas: decay of the first and of the second moment.
        eps: added to the denominator.
        weight_decay: coupled L2 penalty, on S only.
        density_ratio: fraction of each tensor's entries in S and in K (kappa in the paper), in (0, 1]; 1 is Adam.
            Published: 5e-5 to 5e-4. A change takes effect at the next draw.
        T: steps between two draws of the support, at least 1. Published: 5 to 10.
        dense: True makes the group plain Adam, for tensors that are small or new, such as a classifier.
        prune_first: True does step 5 before step 4, which then updates only K, as in the paper's equation. The code
            released with the paper, and its published runs, update first.
        seed: of the optimizer's own generator, which draws the supports; `state_dict` holds its state.

    Memory: 2 indices and 2 moments for each of the k entries of a tensor. Raises ValueError for options out of range
    and complex parameters, RuntimeError for sparse gradients.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        density_ratio: float = 5e-4,
        T: int = 10,
        dense: bool = False,
        prune_first: bool = False,
        seed: int = 0,
    ):
        self.generator = torch.Generator().manual_seed(seed)
        self.gradients: dict[Tensor, Tensor] = {}  # for the next step: parameter -> values [k] at its support
        self.is_drawn = False  # whether the supports of the next step are drawn
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, density_ratio=density_ratio, T=T)
        defaults |= dict(dense=dense, prune_first=prune_first)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group; options that it does not name have the constructor's values. Raise ValueError if one is out of
        range, without a change."""
        super().add_param_group(param_group)
        self.is_drawn = False
        try:
            check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient; return the closure's loss, if a closure is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with_grad = [[p for p in group["params"] if p.grad is not None and p.numel()] for group in self.param_groups]
        if any(p.grad.is_sparse for params in with_grad for p in params):
            raise RuntimeError("SO needs dense gradients; use layers without sparse=True")
        self.draw_supports()
        for group, params in zip(self.param_groups, with_grad):
            if group["dense"]:
                for p in params:
                    self._dense_step(p, group)
            else:
                for p in params:
                    self.add_gradient(p, entries(p.grad, self.state[p]["support"]))
                self._sparse_step([p for p in group["params"] if p in self.gradients], group)
        self.gradients.clear()
        self.is_drawn = False
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, also those at the support."""
        super().zero_grad(set_to_none)
        self.gradients.clear()

    @torch.no_grad()
    def draw_supports(self) -> None:
        """Draw the supports that are due before the next step; do nothing if they are drawn.

        `step` calls it. Code that needs S before the gradient exists may call it earlier, and may then give the values
        at S to `add_gradient` instead of setting `.grad`.
        """
        if self.is_drawn:
            return
        self.is_drawn = True
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad and p.numel() > 0 and not group["dense"]:
                    self._draw_if_due(p, group)

    def _draw_if_due(self, p: Tensor, group: dict) -> None:
        state = self.state[p]
        if not state:
            state.update(step=0, drawn_after=-1)
        # The second case: p was drawn for this step before, but had no gradient, so its counter did not change.
        if state["step"] % group["T"] != 0 or state["drawn_after"] == state["step"]:
            return
        k = max(1, int(p.numel() * group["density_ratio"]))
        state["support"] = draw_support(p.numel(), k, self.generator, p.device).sort().values
        state["drawn_after"] = state["step"]
        if "kept" not in state:  # zero moments on the support are the same as no moments
            state["kept"] = state["support"].clone()
            state["m"] = torch.zeros(k, dtype=_moment_dtype(p), device=p.device)
            state["v"] = torch.zeros_like(state["m"])

    def add_gradient(self, p: Tensor, values: Tensor) -> None:
        """Add values [k] to the gradient of `p` at its support."""
        values = values.to(_moment_dtype(p))
        self.gradients[p] = self.gradients[p] + values if p in self.gradients else values

    @torch.no_grad()
    def own_gradients(self) -> list[Tensor]:
        """Return what the coming step reads as gradient, in the order of the parameters: values [k] at the support, and
        of dense groups the gradients. Whoever trains in several processes sums each over them, in place."""
        self.draw_supports()
        read = []
        for group in self.param_groups:
            for p in group["params"]:
                if group["dense"]:
                    read += [] if p.grad is None else [p.grad]
                    continue
                if p.grad is not None and p.numel():
                    self.add_gradient(p, entries(p.grad, self.state[p]["support"]))
                    p.grad = None
                read += [self.gradients[p]] if p in self.gradients else []
        return read

    def _dense_step(self, p: Tensor, group: dict) -> None:
        beta1, beta2 = group["betas"]
        state = self.state[p]
        if not state:
            state.update(step=0, m=torch.zeros_like(p, dtype=_moment_dtype(p)))
            state["v"] = torch.zeros_like(state["m"])
        state["step"] += 1
        grad = p.grad.to(state["m"].dtype)
        if group["weight_decay"]:
            grad = grad + group["weight_decay"] * p.to(grad.dtype)
        state["m"].mul_(beta1).add_(grad, alpha=1 - beta1)
        state["v"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        p.sub_(adam_update(state["m"], state["v"], state["step"], group["lr"], beta1, beta2, group["eps"]))

    def _sparse_step(self, params: list[Tensor], group: dict) -> None:
        batches = defaultdict(list)  # tensors that one batched update can treat together
        for p in params:
            state = self.state[p]
            state["step"] += 1
            batches[state["step"], len(state["support"]), len(state["kept"]), p.device, p.dtype].append(p)
        for batch in batches.values():
            self._update_batch(batch, group)

    def _update_batch(self, params: list[Tensor], group: dict) -> None:
        beta1, beta2 = group["betas"]
        states = [self.state[p] for p in params]
        kept, support, m, v = (torch.stack([s[key] for s in states]) for key in ("kept", "support", "m", "v"))
        step, k = states[0]["step"], support.shape[1]
        grad = torch.stack([self.gradients[p] for p in params])
        if group["weight_decay"]:
            grad = grad + group["weight_decay"] * torch.stack(
                [entries(p, s["support"]) for p, s in zip(params, states)]
            )

        indices, m, v, is_twin = merge(kept, support, m, v, grad, beta1, beta2)
        kept, kept_m, kept_v = prune(indices, m, v, is_twin, k)
        if group["prune_first"]:
            indices, m, v = kept, kept_m, kept_v
        updates = adam_update(m, v, step, group["lr"], beta1, beta2, group["eps"])
        for p, state, index, update, *moments in zip(params, states, indices, updates, kept, kept_m, kept_v):
            view, at = at_flat(p, index)
            view[at] = (view[at] - update).to(p.dtype)  # twins write the same value
            state["kept"], state["m"], state["v"] = moments

    def state_dict(self) -> dict:
        """Return the usual state and the generator's, so that a run can resume between two draws."""
        return super().state_dict() | {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore what `state_dict` returned. Raise ValueError if it is of another optimizer or of other shapes."""
        if "generator" not in state_dict:
            raise ValueError("this state_dict has no generator state; it was not made by SO")
        params = [p for group in self.param_groups for p in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, p in zip(saved, params):
            state = state_dict["state"].get(index, {})
            if "support" in state and max(state["support"].max(), state["kept"].max()) >= p.numel():
                raise ValueError(f"this state_dict is for other shapes: parameter {index} has {p.numel()} entries")
        super().load_state_dict(state_dict)
        # The base class casts all state to the parameter's type, which rounds indices above 2**24: copy it unchanged.
        for index, p in zip(saved, params):
            for name, value in state_dict["state"].get(index, {}).items():
                self.state[p][name] = value.to(p.device, copy=True) if isinstance(value, Tensor) else value
        self.generator.set_state(state_dict["generator"].cpu())
        self.gradients, self.is_drawn = {}, False

    def __getstate__(self) -> dict:  # for copy and pickle
        return super().__getstate__() | {"generator": self.generator, "gradients": {}, "is_drawn": False}


def _moment_dtype(p: Tensor) -> torch.dtype:
    """Return the type of the moments: at least 32 bits, because 16 would lose small updates."""
    return torch.promote_types(p.dtype, torch.float32)


def entries(tensor: Tensor, indices: Tensor) -> Tensor:
    """Return the entries of `tensor` at flat row-major `indices`, for any strides."""
    view, index = at_flat(tensor, indices)
    return view[index]


def check_group(group: dict) -> None:
    """Raise ValueError if an option of a parameter group is out of range."""
    betas, T = group["betas"], group["T"]
    checks = {
        "lr": (group["lr"] >= 0, "at least 0"),
        "betas": (len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)"),
        "eps": (group["eps"] >= 0, "at least 0"),
        "weight_decay": (group["weight_decay"] >= 0, "at least 0"),
        "density_ratio": (0 < group["density_ratio"] <= 1, "in (0, 1]"),
        "T": (isinstance(T, Integral) and T >= 1, "an integer of at least 1"),
    }
    for name, (holds, range_) in checks.items():
        if not holds:
            raise ValueError(f"SO: {name} must be {range_}, not {group[name]}")
    if any(p.is_complex() for p in group["params"]):
        raise ValueError("SO: complex parameters are not supported; pass their real view (torch.view_as_real)")
