"""SO with one of its choices replaced, as in the paper's ablation table (arXiv 2504.12436).

Written to be compared with the definition of SO in SparseOptimizer.py: it updates one tensor at a time and is not made
for speed. It needs dense gradients, so `attach` does not work with it.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from .SparseOptimizer import adam_update, check_group, corrections, draw_support, merge

GRADIENTS = ("random", "importance", "dense")
MOMENTS = ("importance", "random", "dense", "none")
SUPPORTS = ("dynamic", "static")


class SOAblation(Optimizer):
    """SO with other ways to choose the support S and the kept set K. Without options it is SO.

    One step on one tensor W of n entries whose step counter is t = 1, 2, ...; k = max(1, int(n * density_ratio)):

    1. Before steps 1, T + 1, 2T + 1, ... choose S.
       gradient="random": k entries, uniform without replacement, as SO does;
       gradient="importance": the k entries with the largest magnitude in this step's gradient;
       gradient="dense": S is always all of W; T and `support` have no effect.
       support="dynamic": every T steps; support="static": only before step 1.
    2. g = gradient at S, plus weight_decay * W there.
    3. Decay the moments of U = K union S, and add g to those in S; entries new in S start from zero.
    4. Update the entries of U as Adam does, with the bias correction of step t.
    5. Choose K out of U; the moments of the other entries are forgotten.
       moments="importance": the k entries with the largest |m|, as SO does;
       moments="random": k entries, uniform without replacement, in every step;
       moments="dense": nothing is forgotten: m and v have the size of W, g is zero outside S, and all of W is updated;
       moments="none": no first moment: m = g on S and zero elsewhere (beta1 = 0). So nothing outside S is updated or
       kept: U and K are S, and v lasts until S is chosen again.

    `prune_first` does step 5 before step 4, which then updates only K; moments "dense" and "none" are the same with it.
    gradient="dense" with moments="dense" is Adam; gradient="dense" with moments="none" is Adam with beta1 = 0.

    The definition of the paper's "no momentum" is not known here. This one leaves out only the first moment. Plain
    gradient descent on S would be another, but with SO's learning rates it hardly changes a weight, while the published
    accuracy without momentum gains nine points from 1 shot to 4. A consequence: in the first step after a draw v holds
    only one gradient, and the step is lr / sqrt(1 - beta2); SO's first step on a new entry is (1 - beta1) times that
    (both for large t).

    Args:
        params: tensors or parameter groups: contiguous, in float32 or float64.
        lr, betas, eps, weight_decay, density_ratio, T, prune_first: as for SO, but only lr may change during the run.
        gradient, moments, support: see above.
        seed: of the generator for all draws; with the same seed S is SO's, except with moments="random".

    Memory, in entries per tensor: indices of S (none with a dense gradient) and of K, m and v of K; with
    moments="dense" m and v of W. Raises ValueError for options out of range.
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
        gradient: str = "random",
        moments: str = "importance",
        support: str = "dynamic",
        prune_first: bool = False,
        seed: int = 0,
    ):
        self.generator = torch.Generator().manual_seed(seed)
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, density_ratio=density_ratio, T=T)
        defaults |= dict(gradient=gradient, moments=moments, support=support, prune_first=prune_first)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group; options that it does not name have the constructor's values."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_group(group)
        for name, known in (("gradient", GRADIENTS), ("moments", MOMENTS), ("support", SUPPORTS)):
            if group[name] not in known:
                raise ValueError(f"SOAblation: {name} must be one of {', '.join(known)}, not {group[name]}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient; return the closure's loss, if a closure is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    self._update(p.view(-1), p.grad.reshape(-1), self.state[p], group)
        return loss

    def _update(self, weights: Tensor, grad: Tensor, state: dict, group: dict) -> None:
        """Do one step on one flattened tensor: `weights` and `grad` [n]."""
        moments, (beta1, beta2) = group["moments"], group["betas"]
        if moments == "none":
            beta1 = 0.0
        k = max(1, int(len(weights) * group["density_ratio"]))
        support = self._support(grad, state, k, group)
        state["step"] = state.get("step", 0) + 1
        adam = (*corrections(state["step"], group["lr"], beta1, beta2), group["eps"])
        g = grad[support] + group["weight_decay"] * weights[support]

        if moments == "dense":
            if "m" not in state:
                state["m"], state["v"] = torch.zeros_like(weights), torch.zeros_like(weights)
            m, v = state["m"].mul_(beta1), state["v"].mul_(beta2)
            m[support] += (1 - beta1) * g
            v[support] += (1 - beta2) * g**2
            weights -= adam_update(m, v, *adam)
            return

        if "kept" not in state:  # zero moments on the support are the same as no moments
            state["kept"], state["m"], state["v"] = support.clone(), torch.zeros_like(g), torch.zeros_like(g)
        kept, before = state["kept"], torch.stack([state["m"], state["v"]])
        union = torch.cat([kept, support])
        (m, v), is_twin = merge(kept, support, before, g, beta1, beta2)
        # Each entry once: of all of U, or only of S, which comes after K.
        is_first = torch.cat([torch.ones_like(kept, dtype=torch.bool), ~is_twin])
        once = slice(len(kept), None) if moments == "none" else is_first
        union, m, v = union[once], m[once], v[once]

        if moments == "importance":
            chosen = m.abs().topk(k).indices
        elif moments == "random":
            chosen = draw_support(len(union), k, self.generator, union.device)
        else:
            chosen = torch.arange(len(union), device=union.device)
        chosen = chosen[union[chosen].argsort()]  # `merge` needs sorted indices
        state["kept"], state["m"], state["v"] = union[chosen], m[chosen], v[chosen]
        if group["prune_first"]:
            union, m, v = state["kept"], state["m"], state["v"]
        weights[union] -= adam_update(m, v, *adam)

    def _support(self, grad: Tensor, state: dict, k: int, group: dict) -> Tensor:
        """Return the flat indices in S for the next step, ascending; choose them if that is due."""
        if group["gradient"] == "dense":
            return torch.arange(len(grad), device=grad.device)
        steps = state.get("step", 0)
        if steps == 0 or (group["support"] == "dynamic" and steps % group["T"] == 0):
            if group["gradient"] == "random":
                support = draw_support(len(grad), k, self.generator, grad.device)
            else:
                support = grad.abs().topk(k).indices
            state["support"] = support.sort().values
        return state["support"]

    def state_dict(self) -> dict:
        """Return the usual state and the generator's."""
        return super().state_dict() | {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore what `state_dict` returned, so that a run resumes as if it had not been interrupted."""
        super().load_state_dict(state_dict)
        # The base class casts all state to the parameter's type, which rounds large indices: copy it unchanged.
        params = [p for group in self.param_groups for p in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, p in zip(saved, params):
            for name, value in state_dict["state"].get(index, {}).items():
                self.state[p][name] = value.to(p.device, copy=True) if isinstance(value, Tensor) else value
        self.generator.set_state(state_dict["generator"].cpu())
