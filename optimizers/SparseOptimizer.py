"""SO, the sparse optimizer: Adam with a sparse random gradient and a sparse, importance-pruned state.

Paper: Mrabah, Richet, Ben Ayed, Granger, "Sparsity Outperforms Low-Rank Projections in Few-Shot Adaptation",
ICCV 2025 (arXiv 2504.12436). This file needs only torch and can be copied into any project:

    from SparseOptimizer import SO
    optimizer = SO(model.parameters(), lr=3e-4, density_ratio=5e-4, T=10)

Words: the *support* S of a tensor are the k entries whose gradient is used; they are random and drawn again every T
steps. The *kept set* K are the k entries that have a first and a second moment. k = max(1, int(numel * density_ratio)).
Entries are flat indices in row-major order. All tensors of a group are updated as one batch: their entries stand side
by side, a of all K and b of all S, so that tensors of different sizes need no loop and no padding.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from numbers import Integral

import torch
from torch import Tensor
from torch.optim import Optimizer


def draw_support(
    numel: int, k: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Return k distinct indices out of range(numel), uniform without replacement, ascending: int64 [k] on `device`.

    The numbers are drawn on the generator's device, so a CPU generator gives the same draws for every `device`. The
    cost is O(k log k): draw with repeats, keep first occurrences and draw the missing ones. If k is at least a quarter
    of numel, it is a permutation. Raise ValueError unless 1 <= k <= numel.
    """
    if not 1 <= k <= numel:
        raise ValueError(f"cannot draw {k} distinct indices out of {numel}")
    source = generator.device if generator is not None else "cpu"
    if 4 * k >= numel:
        drawn = torch.randperm(numel, generator=generator, device=source)
        return drawn[:k].sort().values.to(device, non_blocking=True)
    drawn = torch.randint(numel, (k + k // 4 + 8,), generator=generator, device=source)
    first = drawn[:k].sort().values
    if bool((first[1:] == first[:-1]).any()):  # else they are the first k without repeats
        while len(drawn := _first_occurrences(drawn)) < k:
            more = torch.randint(numel, (k + k // 4 + 8 - len(drawn),), generator=generator, device=source)
            drawn = torch.cat([drawn, more])
        first = drawn[:k].sort().values
    return first.to(device, non_blocking=True)


def _first_occurrences(x: Tensor) -> Tensor:
    """Return x without repeats, in order. (The first k of a sorted `unique` would favour small values.)"""
    values, positions = x.sort(stable=True)
    is_first = torch.ones_like(values, dtype=torch.bool)
    is_first[1:] = values[1:] != values[:-1]
    return x[positions[is_first].sort().values]


def merge(
    kept: Tensor, support: Tensor, moments: Tensor, grad: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """Return the new moments [2, a + b] of U = K union S, those of K first, and `is_twin` [b].

    `kept` [a] and `support` [b] are sorted and distinct; `moments` [2, a], m and v, belong to `kept`, `grad` [b] to
    `support`. An entry in both K and S appears twice with the same moments; `is_twin` marks it in S.
    """
    at, is_new = _find(support, kept)
    moments = torch.cat([moments, moments.index_select(1, at).masked_fill_(is_new, 0)], dim=1)
    at, has_no_grad = _find(kept, support)
    grad = torch.cat([grad.index_select(0, at).masked_fill_(has_no_grad, 0), grad])
    m, v = moments
    return torch.stack([beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2]), ~is_new


def _find(wanted: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each of `wanted` its place in the sorted `among`, and whether it is missing there."""
    at = torch.searchsorted(among, wanted).clamp_(max=len(among) - 1)
    return at, among.index_select(0, at) != wanted


def prune(
    indices: Tensor, moments: Tensor, is_twin: Tensor, tensors: list[tuple[Tensor, int]]
) -> tuple[Tensor, Tensor]:
    """Return the entries of U with the largest |m|, without twins: sorted indices [b] and moments [2, b].

    `indices` [a + b] and `moments` [2, a + b] are those of U. `tensors` are pairs of places in U [n, a' + b'], a row
    for each of n tensors, and the number of entries that each of them keeps.
    """
    size = moments[0].abs()
    size[len(size) - len(is_twin) :].masked_fill_(is_twin, -1)
    best = torch.cat([rows.gather(1, size[rows].topk(k, dim=1, sorted=False).indices).view(-1) for rows, k in tensors])
    kept, order = indices.index_select(0, best).sort()
    return kept, moments.index_select(1, best.index_select(0, order))


def corrections(step: int, lr: float, beta1: float, beta2: float) -> tuple[float, float]:
    """Return what depends on the step 1, 2, ... in Adam's update: the factor of m, and the divisor of v."""
    return lr / (1 - beta1**step), 1 - beta2**step


def adam_update(m: Tensor, v: Tensor, factor: float | Tensor, divisor: float | Tensor, eps: float) -> Tensor:
    """Return what Adam subtracts from the weights (Kingma and Ba 2015, algorithm 1), by the step's `corrections`."""
    return factor * m / ((v / divisor).sqrt() + eps)


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
        self._forget()
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
        if any(p.grad is not None and p.grad.is_sparse for group in self.param_groups for p in group["params"]):
            raise RuntimeError("SO needs dense gradients; use layers without sparse=True")
        self.draw_supports()
        batches = self.batches()
        self.advance(batches)
        for group, params in batches:
            self._update(group, params)
        self.is_drawn = False
        return loss

    def batches(self) -> list[tuple[dict, list[Tensor]]]:
        """Return the parameters that have a gradient, those together that one update can treat together, with their
        group."""
        alike = defaultdict(list)
        for number, group in enumerate(self.param_groups):
            for p in group["params"] if group["dense"] else self.weights(group):
                if p.numel() and self._has_gradient(p):
                    alike[number, self.state[p].get("step", 0), p.device, p.dtype].append(p)
        return [(self.param_groups[key[0]], params) for key, params in alike.items()]

    def advance(self, batches: list[tuple[dict, list[Tensor]]]) -> None:
        """Count the step of the parameters in `batches`."""
        for _, params in batches:
            for p in params:
                self.state[p]["step"] = self.state[p].get("step", 0) + 1

    def _corrections(self, group: dict, params: Sequence[Tensor]) -> tuple[float | Tensor, float | Tensor]:
        return corrections(self.state[params[0]]["step"], group["lr"], *group["betas"])

    def _update(self, group: dict, params: list[Tensor]) -> None:
        adam = (*self._corrections(group, params), group["eps"])
        if not group["dense"]:
            self._update_sparsely(group, params, adam)
            return
        for p in params:
            self._update_densely(group, p, adam)

    @torch.no_grad()
    def draw_supports(self) -> None:
        """Draw the supports that are due before the next step; do nothing if they are drawn.

        `step` calls it. Code that needs S before the gradient exists may call it earlier.
        """
        if self.is_drawn:
            return
        self.is_drawn = True
        due = [(p, group) for group in self.param_groups for p in self.weights(group) if self._is_due(p, group)]
        for p, group in due:
            self._set_support(p, self._next_draw(p.numel(), entries_kept(p, group)))

    def _is_due(self, p: Tensor, group: dict) -> bool:
        state = self.state[p]
        if not state:
            state.update(step=0, drawn_after=-1)
        # The second case: p was drawn for this step before, but had no gradient, so its counter did not change.
        return state["step"] % group["T"] == 0 and state["drawn_after"] != state["step"]

    def _set_support(self, p: Tensor, support: Tensor) -> None:
        state = self.state[p]
        state["drawn_after"] = state["step"]
        if "support" in state and len(state["support"]) == len(support):
            state["support"].copy_(support, non_blocking=True)
            return
        state["support"] = support.to(p.device)
        if "kept" not in state:  # zero moments on the support are the same as no moments
            state["kept"] = state["support"].clone()
            state["m"] = torch.zeros(len(support), dtype=moment_dtype(p), device=p.device)
            state["v"] = torch.zeros_like(state["m"])

    def _next_draw(self, numel: int, k: int) -> Tensor:
        return draw_support(numel, k, self.generator)

    def weights(self, group: dict) -> list[Tensor]:
        """Return the parameters of a group that have a support; none of a dense group."""
        return [] if group["dense"] else [p for p in group["params"] if p.requires_grad and p.numel() > 0]

    def _has_gradient(self, p: Tensor) -> bool:
        return p.grad is not None

    def _gradient(self, p: Tensor) -> Tensor:
        """Return the gradient of `p` at its support [k]."""
        return entries(p.grad, self.state[p]["support"]).to(moment_dtype(p))

    def _update_densely(self, group: dict, p: Tensor, adam: tuple) -> None:
        beta1, beta2 = group["betas"]
        state = self.state[p]
        if "m" not in state:
            state["m"] = torch.zeros_like(p, dtype=moment_dtype(p))
            state["v"] = torch.zeros_like(state["m"])
        grad = p.grad.to(state["m"].dtype)
        if group["weight_decay"]:
            grad = grad + group["weight_decay"] * p.to(grad.dtype)
        state["m"].mul_(beta1).add_(grad, alpha=1 - beta1)
        state["v"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        p.sub_(adam_update(state["m"], state["v"], *adam))

    def _update_sparsely(self, group: dict, params: list[Tensor], adam: tuple) -> None:
        beta1, beta2 = group["betas"]
        states = [self.state[p] for p in params]
        kept, support, m, v = ([s[key] for s in states] for key in ("kept", "support", "m", "v"))
        counts = [len(indices) for indices in (*kept, *support)]
        starts, tensors = self._arranged(params[0], tuple(self._starts(params)), tuple(counts))

        indices = torch.cat([*kept, *support]).add_(starts)
        of_kept, of_support = indices.split([sum(counts[: len(params)]), sum(counts[len(params) :])])
        grad = torch.cat([self._gradient(p) for p in params])
        if group["weight_decay"]:
            grad = grad + group["weight_decay"] * torch.cat([entries(p, s) for p, s in zip(params, support)])
        moments, is_twin = merge(of_kept, of_support, torch.cat([*m, *v]).view(2, -1), grad, beta1, beta2)
        new_kept, new_moments = prune(indices, moments, is_twin, tensors)
        starts_of_new, owners = starts[len(of_kept) :], [*params, *params]
        if group["prune_first"]:
            indices, moments, starts = new_kept, new_moments, starts_of_new
            counts, owners = counts[len(params) :], params
        update = adam_update(*moments, *adam)
        self._subtract(owners, indices, starts, counts, update)
        _set_kept(states, new_kept - starts_of_new, new_moments)

    def _starts(self, params: Sequence[Tensor]) -> list[int]:
        """Return for each tensor what its flat indices are counted from, so that no two tensors share an index."""
        return [0, *accumulate(p.numel() for p in params[:-1])]

    def _subtract(
        self, owners: Sequence[Tensor], indices: Tensor, starts: Tensor, counts: Sequence[int], update: Tensor
    ) -> None:
        """Subtract `update` from entries of weights: `counts` of them of each of the `owners`, one after the other."""
        subtract(owners, (indices - starts).split(counts), update)

    def _arranged(self, first: Tensor, *how: tuple[int, ...]) -> tuple[Tensor, list]:
        known, arranged = self.arrangements.get(first, (None, None))
        if known != how:
            arranged = arrange(first.device, *how)
            self.arrangements[first] = how, arranged
        return arranged

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

    def _forget(self) -> None:
        """Set what is known between two steps beside the state."""
        self.is_drawn = False  # whether the supports of the next step are drawn
        self.arrangements: dict[Tensor, tuple] = {}  # first of a batch -> what `arrange` was given and returned

    def __getstate__(self) -> dict:  # for copy and pickle
        return super().__getstate__() | {"generator": self.generator}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._forget()


def arrange(
    device: torch.device, starts: Sequence[int], counts: Sequence[int]
) -> tuple[Tensor, list[tuple[Tensor, int]]]:
    """Return how the entries of n tensors stand side by side: those of K, tensor by tensor, then those of S.

    `starts` [n] are what each tensor's flat indices are counted from, `counts` [2n] the lengths of each K, then of each
    S. Return the start of each entry [a + b], and the `tensors` that `prune` takes.
    """
    n = len(starts)
    alike = defaultdict(list)
    pieces = torch.arange(sum(counts)).split(list(counts))
    for kept, support in zip(pieces[:n], pieces[n:]):
        alike[len(kept), len(support)].append(torch.cat([kept, support]))
    of_each = torch.tensor([*starts, *starts]).repeat_interleave(torch.tensor(counts), output_size=sum(counts))
    return of_each.to(device), [(torch.stack(rows).to(device), k) for (_, k), rows in alike.items()]


def subtract(owners: Sequence[Tensor], indices: Sequence[Tensor], update: Tensor) -> Tensor:
    """Subtract `update` from the entries of `owners` at flat `indices`, side by side; return their new values."""
    old = [entries(p, index) for p, index in zip(owners, indices)]
    new = ((torch.cat(old) if len(old) > 1 else old[0]) - update).to(owners[0].dtype)
    for p, index, values in zip(owners, indices, new.split([len(index) for index in indices])):
        view, at = at_flat(p, index)
        view[at] = values  # twins write the same value
    return new


def _set_kept(states: Sequence[dict], kept: Tensor, moments: Tensor) -> None:
    """Write each tensor's new K [k] and moments [2, k] into its state: in place, unless k has changed."""
    counts = [len(s["support"]) for s in states]
    new = [kept.split(counts), *(row.split(counts) for row in moments)]
    for name, values in zip(("kept", "m", "v"), new):
        if all(len(s[name]) == k for s, k in zip(states, counts)):
            torch._foreach_copy_([s[name] for s in states], list(values))
        else:
            for s, value in zip(states, values):
                s[name] = value.clone()


def entries_kept(p: Tensor, group: dict) -> int:
    """Return k, the number of entries in S and in K."""
    return max(1, int(p.numel() * group["density_ratio"]))


def moment_dtype(p: Tensor) -> torch.dtype:
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
