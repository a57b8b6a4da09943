"""Weight gradients only at SO's support: the dense gradient of a trained matrix never exists.

The support S is random and known before the forward pass. For a linear layer y = x W^T + b over N rows of x, the
entries (i, j) of dW in S are sums over n of dy[n, i] * x[n, j]. That is k dot products of length N instead of a matrix
product, and k columns of x kept for backward instead of all of x. The update equals SO's, up to rounding.

    optimizer = SO(model.parameters(), ...)
    attached = attach(model, optimizer)   # from now on forward, backward and optimizer.step() as usual
    attached.remove()                     # back to plain gradients

How: `attach` replaces the forward of each `nn.Linear` whose weight SO trains sparsely. The new forward has one input
more, `optimizer.leaf(weight)` [k], whose gradient is that of the weight at the support. All other parameters of the
optimizer's sparse groups keep their ordinary gradient, and so do layers with so dense a support that a matrix product
is cheaper. A hook reads this gradient at the support and frees it as soon as it is accumulated.

A module may apply only some output rows of a linear layer, as CLIP's attention does. Such a module calls the layer
`in_proj` and has two methods: `project(x, parts)` is the only place that applies `in_proj`, and `attach` replaces it;
`rows(parts)` is the slice of output rows that `project` applies.

Several backward passes before a step add up. Evaluation without gradients, activation checkpointing, autocast,
GradScaler and clipping of all that is in `optimizer.param_groups` work as before. Code that reads the weights' `.grad`
does not see these gradients: DistributedDataParallel, clipping of `model.parameters()`. `attach` moves the weights into
one piece of memory (`share_memory`), and 16-bit copies of them into another, so that a step is few operations.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .so import SO, share_memory
from .SparseOptimizer import entries

# Density of the support above which the dense product is cheaper than gathering, by device type. Measured on a CPU
# (benchmarks/RESULTS.md); an estimate on a GPU, whose products are faster.
DENSE_ABOVE = {"cpu": 0.01, "cuda": 0.002}


class Place(NamedTuple):
    """Where a layer's output needs a gradient: `rows` of the output and `columns` of the input, both [k].

    `outside` [k] marks entries in other rows than those that the layer applies; None if it applies all.
    """

    rows: Tensor
    columns: Tensor
    outside: Tensor | None


class SampledLinear(torch.autograd.Function):
    """`F.linear(x, weight, bias)`, with the weight gradient computed only at a place, as the gradient of `leaf` [k].

    `weight` are the rows that are applied, in the type of the computation; `current` returns the place again.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, leaf: Tensor, weight: Tensor, bias: Tensor | None, place: Place, current: Callable[[], Place]
    ) -> Tensor:
        x = x.to(weight.dtype)
        ctx.place, ctx.current = place, current
        flat = x.reshape(-1, x.shape[-1])
        # Columns of x are copied, one for each entry of the support; if that is more than half of x, x itself is kept.
        ctx.few = len(place.columns) <= weight.shape[1] // 2
        ctx.save_for_backward(flat.index_select(1, place.columns) if ctx.few else flat, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        place = ctx.place
        if ctx.current() is not place:
            raise RuntimeError("the support was drawn again between forward and backward; call step() after backward()")
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_at_rows = flat.index_select(1, place.rows)
        x_at_columns = x if ctx.few else x.index_select(1, place.columns)
        sum_type = torch.promote_types(grad.dtype, torch.float32)  # 16-bit products are summed in float32
        values = (grad_at_rows.to(sum_type) * x_at_columns).sum(dim=0)
        if place.outside is not None:
            values.masked_fill_(place.outside, 0)
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_bias = flat.sum(dim=0) if ctx.needs_input_grad[3] else None
        return grad_x, values, None, grad_bias, None, None


class Attached:
    """Linear layers that compute their weight gradients only at the optimizer's support, until `remove`."""

    def __init__(self, optimizer: SO):
        self.optimizer = optimizer
        self.replaced: list[tuple[nn.Module, str]] = []  # modules, and the method that each has a replacement of
        self.hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        # Weights and biases in 16 bits for forward and backward, and the version of what each is a copy of. The copies
        # of weights in one piece of memory lie in another, in the same order.
        self.casts: dict[Tensor, tuple[Tensor, int]] = {}
        self.memories: list[tuple[Tensor, list[Tensor]]] = []  # what `share_memory` returned
        self.copies: dict[int, Tensor] = {}  # of a memory, by its number in the list
        self.current: list[Tensor] = []  # during a step: what has a copy of its newest version
        self.places: dict[tuple, tuple[Tensor, int, Place]] = {}

    def replace(self, module: nn.Module, method: str, replacement: Callable) -> None:
        setattr(module, method, replacement)
        self.replaced.append((module, method))

    def remove(self) -> None:
        """Undo `attach`: the model computes plain gradients again."""
        for module, method in self.replaced:
            delattr(module, method)  # the class's method shows again
        for hook in self.hooks:
            hook.remove()

    def draw(self) -> None:
        """Draw the supports that are due, and find where they are in each layer, in the memory that they have."""
        self.optimizer.draw_supports()
        for weight, start, stop in list(self.places):
            if "support" in self.optimizer.state.get(weight, {}):  # else it is not trained any more
                self._place(weight, slice(start, stop))

    def forward(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """Return a linear layer's output. `attach` puts this in the place of its forward."""
        if not _needs_gradient(layer):
            return type(layer).forward(layer, x)
        return self._sampled(layer, x, slice(0, layer.out_features))

    def project(self, module: nn.Module, x: Tensor, parts: str) -> Tensor:
        """Return some output rows of `in_proj`. `attach` puts this in the place of the module's `project`."""
        if not _needs_gradient(module.in_proj):
            return type(module).project(module, x, parts)
        return self._sampled(module.in_proj, x, module.rows(parts))

    def _sampled(self, layer: nn.Linear, x: Tensor, rows: slice) -> Tensor:
        if not self.optimizer.is_drawn:
            self.draw()
        device, weight, bias = x.device.type, layer.weight, layer.bias
        cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if cast else x.dtype
        if bias is not None:
            bias = bias.to(dtype) if bias.requires_grad else self._cast(bias, dtype)
        used, place = self._cast(weight, dtype), partial(self._place, weight, rows)
        if rows.stop - rows.start < len(weight):
            used, bias = used[rows], None if bias is None else bias[rows]
        return SampledLinear.apply(x, self.optimizer.leaf(weight), used, bias, place(), place)

    def _place(self, weight: Tensor, rows: slice) -> Place:
        """Return where the output `rows` of a layer need a gradient; a new place, in the same memory, for each draw."""
        support, key = self.optimizer.state[weight]["support"], (weight, rows.start, rows.stop)
        of, version, place = self.places.get(key, (None, None, None))
        if of is support and version == support._version:
            return place
        new = [support // weight.shape[1], support % weight.shape[1], None]
        if rows.stop - rows.start < len(weight):
            new[2] = (new[0] < rows.start) | (new[0] >= rows.stop)
            new[0] = (new[0] - rows.start).clamp_(0, rows.stop - rows.start - 1)
        if of is support:
            new = [None if value is None else old.copy_(value) for old, value in zip(place, new)]
        self.places[key] = support, support._version, Place(*new)
        return self.places[key][2]

    def take_gradient(self, p: Tensor) -> None:
        """Keep the values at the support of an ordinary gradient, and free the gradient."""
        if p.grad is None:  # all of it came from sampled layers
            return
        self.optimizer.draw_supports()
        self.optimizer.add_gradient(p, entries(p.grad, self.optimizer.state[p]["support"]))
        p.grad = None

    def _cast(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `p` in another type. Each step changes the same entries in the copy as in `p`; if anything else has
        changed `p`, the copy is made again."""
        if p.dtype == dtype:
            return p.detach()
        copy, version = self.casts.get(p, (None, None))
        if copy is None or copy.dtype != dtype or version != p._version:
            self._cast_again(p, dtype)
        return self.casts[p][0]

    @torch.no_grad()
    def _cast_again(self, p: Tensor, dtype: torch.dtype) -> None:
        """Copy `p`, and all that shares its memory: for autograd, a write into one of the copies is one into all."""
        number = self._memory_of(p)
        if number is None:
            self.casts[p] = p.detach().to(dtype), p._version
            return
        memory, params = self.memories[number]
        if number not in self.copies or self.copies[number].dtype != dtype:
            self.copies[number] = torch.empty_like(memory, dtype=dtype)
        self.copies[number].copy_(memory)
        for q, copy in zip(params, self.copies[number].split([q.numel() for q in params])):
            if self._memory_of(q) == number:
                self.casts[q] = copy.view(q.shape), q._version

    def _memory_of(self, p: Tensor) -> int | None:
        storage = p.untyped_storage()._cdata
        numbers = (i for i, (memory, _) in enumerate(self.memories) if memory.untyped_storage()._cdata == storage)
        return next(numbers, None)

    def _before_step(self, *_) -> None:
        self.current = [p for p, (_, version) in self.casts.items() if version == p._version]

    @torch.no_grad()
    def _after_step(self, *_) -> None:
        current = set(self.current)
        for params, memory, indices, values in self.optimizer.written:
            copies = self.copies.get(self._memory_of(memory))
            if copies is not None:
                copies[indices] = values.to(copies.dtype)
                self.casts |= {p: (self.casts[p][0], p._version) for p in params if p in current}


def _needs_gradient(layer: nn.Linear) -> bool:
    return torch.is_grad_enabled() and layer.weight.requires_grad


def attach(model: nn.Module, optimizer: SO, dense_above: float | None = None) -> Attached:
    """Make the model's linear layers compute their weight gradients only at the optimizer's support.

    Parameter groups with `dense` stay as they are. `dense_above`: the density above which a layer keeps the dense
    product, by default DENSE_ABOVE of the weight's device; 0 keeps it everywhere, 1 nowhere.
    """
    density = {p: group["density_ratio"] for group in optimizer.param_groups for p in optimizer.weights(group)}

    def is_sampled(layer: nn.Module) -> bool:
        if not isinstance(layer, nn.Linear) or layer.weight not in density:
            return False
        limit = DENSE_ABOVE.get(layer.weight.device.type, 0) if dense_above is None else dense_above
        return density[layer.weight] <= limit

    attached = Attached(optimizer)
    attached.memories = share_memory(density)
    for module in model.modules():
        if is_sampled(module):
            attached.replace(module, "forward", partial(attached.forward, module))
        elif is_sampled(getattr(module, "in_proj", None)) and hasattr(module, "project") and hasattr(module, "rows"):
            attached.replace(module, "project", partial(attached.project, module))
    for p in density:
        attached.hooks.append(p.register_post_accumulate_grad_hook(attached.take_gradient))
    return attached
