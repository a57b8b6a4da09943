"""Weight gradients only at SO's support: the dense gradient of a trained matrix never exists.

The support S is random and known before the forward pass. For a linear layer y = x W^T + b over N rows of x, the
entries (i, j) of dW in S are sums over n of dy[n, i] * x[n, j]. That is k dot products of length N instead of a matrix
product, and k columns of x kept for backward instead of all of x. The update equals SO's, up to rounding.

    optimizer = SO(model.parameters(), ...)
    attached = attach(model, optimizer)   # from now on forward, backward and optimizer.step() as usual
    attached.remove()                     # back to plain gradients

How: `attach` replaces the forward of each `nn.Linear` whose weight SO trains sparsely. In backward the new forward
gives `optimizer.add_gradient(weight, values)` the values at the support. All other parameters of the optimizer's sparse
groups keep their ordinary gradient, and so do layers with so dense a support that a matrix product is cheaper. A hook
reads this gradient at the support and frees it as soon as it is accumulated.

A module may apply only some output rows of a linear layer, as CLIP's attention does. Such a module calls the layer
`in_proj` and has two methods: `project(x, parts)` is the only place that applies `in_proj`, and `attach` replaces it;
`rows(parts)` is the slice of output rows that `project` applies.

Several backward passes before a step add up. Evaluation without gradients, activation checkpointing and autocast work
as before. Code that reads `.grad` does not see these gradients: gradient clipping, GradScaler,
DistributedDataParallel.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .SparseOptimizer import SO, at_flat, entries

# Density of the support above which the dense product is cheaper than gathering, by device type. Measured on a CPU
# (benchmarks/RESULTS.md); an estimate on a GPU, whose products are faster.
DENSE_ABOVE = {"cpu": 0.01, "cuda": 0.002}


class SampledLinear(torch.autograd.Function):
    """Some output rows of `F.linear(x, weight, bias)`, with the weight gradient computed only at the support.

    `used` is `weight` in the type of the computation, and `rows` is a slice with start and stop.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, used: Tensor, rows: slice, optimizer: SO):
        x, used = x.to(used.dtype), used[rows]
        support = optimizer.state[weight]["support"]
        ctx.weight, ctx.rows, ctx.optimizer, ctx.support = weight, rows, optimizer, support
        i, j = support // weight.shape[1], support % weight.shape[1]
        flat = x.reshape(-1, x.shape[-1])
        # Columns of x are copied, one for each entry of the support; if that is more than half of x, x itself is kept.
        ctx.few = len(j) <= weight.shape[1] // 2
        ctx.save_for_backward(flat.index_select(1, j) if ctx.few else flat, used, i, j)
        return F.linear(x, used, None if bias is None else bias[rows].to(used.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.optimizer.state[ctx.weight]["support"] is not ctx.support:
            raise RuntimeError("the support was drawn again between forward and backward; call step() after backward()")
        x, used, i, j = ctx.saved_tensors
        start, stop = ctx.rows.start, ctx.rows.stop
        flat = grad.reshape(-1, grad.shape[-1])
        # Entries outside these rows belong to another part of the weight: their values are set to zero.
        inside = (i >= start) & (i < stop)
        grad_at_i = flat.index_select(1, (i - start).clamp(0, stop - start - 1))
        x_at_j = x if ctx.few else x.index_select(1, j)
        sum_type = torch.promote_types(grad.dtype, torch.float32)  # 16-bit products are summed in float32
        values = (grad_at_i.to(sum_type) * x_at_j).sum(dim=0).masked_fill(~inside, 0)
        ctx.optimizer.add_gradient(ctx.weight, values)
        grad_x = grad @ used if ctx.needs_input_grad[0] else None
        grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = F.pad(flat.sum(dim=0), (start, ctx.weight.shape[0] - stop))
        return grad_x, None, grad_bias, None, None, None


class Attached:
    """Linear layers that compute their weight gradients only at the optimizer's support, until `remove`."""

    def __init__(self, optimizer: SO):
        self.optimizer = optimizer
        self.replaced: list[tuple[nn.Module, str]] = []  # modules, and the method that each has a replacement of
        self.hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        # Weights in 16 bits for forward and backward, and the version of the weight that each is a copy of.
        self.casts: dict[Tensor, tuple[Tensor, int]] = {}
        self.changing: dict[Tensor, Tensor] = {}  # during a step: weights with a current copy, and their kept set

    def replace(self, module: nn.Module, method: str, replacement: Callable) -> None:
        setattr(module, method, replacement)
        self.replaced.append((module, method))

    def remove(self) -> None:
        """Undo `attach`: the model computes plain gradients again."""
        for module, method in self.replaced:
            delattr(module, method)  # the class's method shows again
        for hook in self.hooks:
            hook.remove()

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
        self.optimizer.draw_supports()
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return SampledLinear.apply(x, layer.weight, layer.bias, self._cast(layer.weight, dtype), rows, self.optimizer)

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
            copy = p.detach().to(dtype)
            self.casts[p] = copy, p._version
        return copy

    def _before_step(self, *_) -> None:
        state = self.optimizer.state
        self.changing = {p: state[p]["kept"] for p, (_, version) in self.casts.items() if version == p._version}

    @torch.no_grad()
    def _after_step(self, *_) -> None:
        for p, kept in self.changing.items():
            copy, _ = self.casts[p]
            changed = torch.cat([kept, self.optimizer.state[p]["support"]])
            view, index = at_flat(copy, changed)
            view[index] = entries(p, changed).to(copy.dtype)
            self.casts[p] = copy, p._version
        self.changing = {}


def _needs_gradient(layer: nn.Linear) -> bool:
    return torch.is_grad_enabled() and layer.weight.requires_grad


def attach(model: nn.Module, optimizer: SO, dense_above: float | None = None) -> Attached:
    """Make the model's linear layers compute their weight gradients only at the optimizer's support.

    Parameter groups with `dense` stay as they are. `dense_above`: the density above which a layer keeps the dense
    product, by default DENSE_ABOVE of the weight's device; 0 keeps it everywhere, 1 nowhere.
    """
    density = {
        p: group["density_ratio"] for group in optimizer.param_groups if not group["dense"] for p in group["params"]
    }

    def is_sampled(layer: nn.Module) -> bool:
        if not isinstance(layer, nn.Linear) or layer.weight not in density:
            return False
        limit = DENSE_ABOVE.get(layer.weight.device.type, 0) if dense_above is None else dense_above
        return density[layer.weight] <= limit

    attached = Attached(optimizer)
    for module in model.modules():
        if is_sampled(module):
            attached.replace(module, "forward", partial(attached.forward, module))
        elif is_sampled(getattr(module, "in_proj", None)) and hasattr(module, "project") and hasattr(module, "rows"):
            attached.replace(module, "project", partial(attached.project, module))
    for p in density:
        if p.requires_grad:
            attached.hooks.append(p.register_post_accumulate_grad_hook(attached.take_gradient))
    return attached
