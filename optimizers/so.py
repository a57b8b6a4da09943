"""SO as this project trains with it: the same numbers as SparseOptimizer.SO (on a GPU up to rounding), and there in
fewer operations.

Supports are drawn ahead. Weights that lie in one piece of memory, where `share_memory` puts them, are read and written
at once. The gradient at the support may arrive without the dense one, as that of a small tensor: `leaf`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from . import SparseOptimizer
from .SparseOptimizer import corrections, entries, entries_kept, moment_dtype, subtract


class SO(SparseOptimizer.SO):
    __doc__ = SparseOptimizer.SO.__doc__

    def _forget(self) -> None:
        super()._forget()
        # Supports drawn before they are due, in order: the generator's state before, numel, k, support.
        self.ahead: list[tuple[Tensor, int, int, Tensor]] = []
        self.counted: set[Tensor] | None = None  # what `advance` was called with for the next step
        self.leaves: dict[Tensor, Tensor] = {}  # parameter -> `leaf`
        self.leaf_set: set[Tensor] = set()
        self.scalars: dict[Tensor, tuple[Tensor, Tensor]] = {}  # first of a batch -> `corrections` of the step
        # What the last step wrote: parameters, the memory they share, indices there, new values.
        self.written: list[tuple[Sequence[Tensor], Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        self.written.clear()
        try:
            loss = super().step(closure)
        finally:
            self.counted = None
        for leaf in self.leaves.values():
            leaf.grad = None
        self.finish()
        return loss

    # --- draws

    @torch.no_grad()
    def draw_supports(self) -> None:
        number = len(self.ahead)
        super().draw_supports()
        if len(self.ahead) < number:  # a draw that uses some uses all, or what is due has changed
            self._undo_draws()

    def _next_draw(self, numel: int, k: int) -> Tensor:
        """Return the next support, which may be drawn already."""
        if self.ahead and self.ahead[0][1:3] == (numel, k):
            return self.ahead.pop(0)[3]
        self._undo_draws()
        return super()._next_draw(numel, k)

    def _undo_draws(self) -> None:
        """Forget the draws ahead that were not used: the generator gives the same numbers again."""
        if self.ahead:
            self.generator.set_state(self.ahead[0][0])
            self.ahead.clear()

    def _draw_ahead(self) -> None:
        """Draw a share of the supports that are due next, so that no step waits for all of them.

        They are the same as if they were drawn when they are due.
        """
        coming = [
            (-self.state[p]["step"] % group["T"], (p.numel(), entries_kept(p, group)))
            for group in self.param_groups
            for p in self.weights(group)
        ]
        steps = min((steps for steps, _ in coming), default=0)  # until the next draw
        due = [what for own, what in coming if own == steps][len(self.ahead) :]
        for numel, k in due[: -(-len(due) // (steps + 1))]:
            before = self.generator.get_state()
            self.ahead.append((before, numel, k, super()._next_draw(numel, k)))

    # --- gradients at the support

    def weights(self, group: dict) -> list[Tensor]:
        return [p for p in super().weights(group) if p not in self.leaf_set]

    def leaf(self, p: Tensor) -> Tensor:
        """Return the tensor [k] whose `.grad` is the gradient of `p` at its support, beside `p.grad`.

        It stands among the group's parameters, so that `zero_grad`, GradScaler and clipping find its gradient.
        """
        k, old = len(self.state[p]["support"]), self.leaves.get(p)
        if old is not None and len(old) == k:
            return old
        leaf = torch.zeros(k, dtype=moment_dtype(p), device=p.device, requires_grad=True)
        group = next(group for group in self.param_groups if any(q is p for q in group["params"]))
        group["params"] = [q for q in group["params"] if q is not old] + [leaf]
        self.leaves[p] = leaf
        self.leaf_set = set(self.leaves.values())
        return leaf

    def add_gradient(self, p: Tensor, values: Tensor) -> None:
        """Add values [k] to the gradient of `p` at its support."""
        leaf = self.leaf(p)
        values = values.to(leaf.dtype)
        leaf.grad = values if leaf.grad is None else leaf.grad + values

    @torch.no_grad()
    def own_gradients(self) -> list[Tensor]:
        """Return what the coming step reads as gradient, in the order of the parameters: values [k] at the support, and
        the whole gradients of dense groups. Who trains in several processes sums each over them, in place."""
        self.draw_supports()
        for group in self.param_groups:
            for p in self.weights(group):
                if p.grad is not None:
                    self.add_gradient(p, entries(p.grad, self.state[p]["support"]))
                    p.grad = None
        read = [q for group in self.param_groups for q in (group["params"] if group["dense"] else self._leaves(group))]
        return [q.grad for q in read if q.grad is not None]

    def _leaves(self, group: dict) -> list[Tensor]:
        return [self.leaves[p] for p in self.weights(group) if p in self.leaves]

    def _has_gradient(self, p: Tensor) -> bool:
        return super()._has_gradient(p) or (p in self.leaves and self.leaves[p].grad is not None)

    def _gradient(self, p: Tensor) -> Tensor:
        values = self.leaves[p].grad if p in self.leaves else None
        if values is None:
            return super()._gradient(p)
        return values if p.grad is None else values + super()._gradient(p)

    # --- what changes with the step

    @torch.no_grad()
    def advance(self, batches: list[tuple[dict, list[Tensor]]]) -> None:
        """Count the coming step, unless that is done, and write its `corrections` where the update reads them: in
        tensors that stay in place. Then forward, backward and update are the same operations in every step, which a GPU
        can record as a graph. Who does that calls `Attached.draw` and this before the step that is recorded, with the
        `batches` of the step before it; then both before each repetition, and `finish` after it. Raise RuntimeError if
        the step updates other parameters than those that were counted."""
        parameters = {p for _, params in batches for p in params}
        if self.counted is not None:
            if self.counted != parameters:
                raise RuntimeError("other parameters have gradients than those whose step was counted")
            return
        super().advance(batches)
        self.counted = parameters
        for group, (p, *_) in batches:
            if p not in self.scalars:
                self.scalars[p] = torch.empty(2, dtype=moment_dtype(p), device=p.device).unbind()
            for tensor, value in zip(self.scalars[p], corrections(self.state[p]["step"], group["lr"], *group["betas"])):
                tensor.fill_(value if value <= torch.finfo(tensor.dtype).max else torch.inf)

    def _corrections(self, group: dict, params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self.scalars[params[0]]

    @torch.no_grad()
    def finish(self) -> None:
        """End a step: what comes belongs to the next one, whose supports are drawn in part."""
        self.is_drawn, self.counted = False, None
        self._draw_ahead()

    # --- one read and one write

    def _starts(self, params: Sequence[Tensor]) -> list[int]:
        return super()._starts(params) if common_memory(params) is None else [p.storage_offset() for p in params]

    def _subtract(
        self, owners: Sequence[Tensor], indices: Tensor, starts: Tensor, counts: Sequence[int], update: Tensor
    ) -> None:
        params = list(dict.fromkeys(owners))
        memory = common_memory(params)
        if memory is None:
            return super()._subtract(owners, indices, starts, counts, update)
        new = subtract([memory], [indices], update)
        for p in params:
            torch.autograd.graph.increment_version(p)
        self.written.append((params, memory, indices, new))

    # --- state

    @contextmanager
    def _without_leaves(self) -> Iterator[None]:
        """Hide the leaves, which are no part of what is saved."""
        groups = [(group, group["params"]) for group in self.param_groups]
        for group, params in groups:
            group["params"] = [p for p in params if p not in self.leaf_set]
        try:
            yield
        finally:
            for group, params in groups:
                group["params"] = params

    def state_dict(self) -> dict:
        """Return the usual state and the generator's, before the draws made ahead: who resumes makes them again. Raise
        RuntimeError if the next step is counted and not done."""
        if self.counted is not None:
            raise RuntimeError("the state cannot be saved between `advance` and the end of the step")
        with self._without_leaves():
            state = super().state_dict()
        return state | {"generator": self.ahead[0][0]} if self.ahead else state

    def load_state_dict(self, state_dict: dict) -> None:
        with self._without_leaves():
            super().load_state_dict(state_dict)

    def __getstate__(self) -> dict:
        self._undo_draws()
        with self._without_leaves():
            return super().__getstate__() | {"param_groups": [dict(group) for group in self.param_groups]}


def share_memory(params: Iterable[Tensor]) -> list[tuple[Tensor, list[Tensor]]]:
    """Move contiguous parameters of the same type and device into one piece of memory, one after the other.

    SO then updates all of them with one read and one write. They stay the same parameters with the same values. What
    moves them apart again, such as `module.to`, costs only speed. Return each memory [sum of sizes] and what is there.
    """
    alike = defaultdict(list)
    for p in params:
        if p.is_contiguous() and p.numel():
            alike[p.device, p.dtype].append(p)
    memories = []
    for (device, dtype), own in alike.items():
        memory = torch.empty(sum(p.numel() for p in own), dtype=dtype, device=device)
        for p, part in zip(own, memory.split([p.numel() for p in own])):
            part.copy_(p.detach().view(-1))
            p.data = part.view(p.shape)
        memories.append((memory, own))
    return memories


def common_memory(params: Sequence[Tensor]) -> Tensor | None:
    """Return the memory of contiguous parameters that lie one after the other in it, as one vector; else None."""
    places = [(p.storage_offset(), p.storage_offset() + p.numel()) for p in params]
    one = len({p.untyped_storage()._cdata for p in params}) == 1 and all(p.is_contiguous() for p in params)
    if not one or any(end > start for (_, end), (start, _) in pairwise(places)):
        return None
    return params[0].detach().as_strided((places[-1][1],), (1,), 0)
