"""Weight gradients at SO's support alone: the dense gradient of a trained matrix never exists.

The support S is random and known before the forward pass. For a linear layer y = x W^T + b over N rows of x, the
entries (i, j) of dW in S are sums over n of dy[n, i] * x[n, j]: k dot products of length N instead of a matrix product,
and k columns of x kept for backward instead of all of it. The result is SO's, to rounding.

    optimizer = SO(model.parameters(), ...)
    attached = attach(model, optimizer)   # from now on forward, backward and optimizer.step() as ever
    attached.remove()                     # back to plain gradients

How: the forward of each `nn.Linear` whose weight SO trains sparsely is replaced by a function that, in backward, hands
`optimizer.add_gradient(weight, values)` the values at the support. All other parameters of the optimizer's sparse
groups, and layers so dense in support that a matrix product is cheaper, keep their ordinary gradient, which a hook
reads at the support and frees as soon as it is accumulated.

A module may also apply only some output rows of a linear layer `in_proj`, as CLIP's attention does. It has two methods
then: `project(x, parts)`, which is the only place that applies `in_proj` and is replaced, and `rows(parts)`, the slice
of rows that it applies.

Several backward passes before a step add up. Evaluation without gradients, activation checkpointing and autocast work
as they are. What reads `.grad` does not see these gradients: gradient clipping, GradScaler, DistributedDataParallel.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .SparseOptimizer import SO, entries

# Share of a matrix above which the dense product is cheaper than gathering, by device type. Measured on a CPU,
# benchmarks/RESULTS.md; on a GPU, whose products are faster, an estimate.
DENSE_ABOVE = {"cpu": 0.01, "cuda": 0.002}


class SampledLinear(torch.autograd.Function):
    """`F.linear(x, weight[start:stop], bias)` whose weight gradient is computed at the support alone."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, optimizer: SO, start: int, stop: int) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        else:
            dtype = x.dtype
        x, used = x.to(dtype), optimizer.cast(weight, dtype)[start:stop]
        support = optimizer.state[weight]["support"]
        rows, columns = support // weight.shape[1], support % weight.shape[1]
        flat = x.reshape(-1, x.shape[-1])
        # Few columns are kept as they are needed; where they were more than all of x, x itself is kept.
        ctx.few = len(columns) <= weight.shape[1] // 2
        ctx.save_for_backward(flat.index_select(1, columns) if ctx.few else flat, used, rows, columns)
        ctx.weight, ctx.optimizer, ctx.support, ctx.start, ctx.stop = weight, optimizer, support, start, stop
        return F.linear(x, used, None if bias is None else bias[start:stop].to(dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.optimizer.state[ctx.weight]["support"] is not ctx.support:
            raise RuntimeError("the support was drawn anew between forward and backward; call step() after backward()")
        x, used, rows, columns = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        # Rows outside start:stop belong to another part of the weight: their values are set to zero.
        inside = (rows >= ctx.start) & (rows < ctx.stop)
        at_rows = flat.index_select(1, (rows - ctx.start).clamp(0, ctx.stop - ctx.start - 1))
        at_columns = x if ctx.few else x.index_select(1, columns)
        sum_type = torch.promote_types(grad.dtype, torch.float32)  # 16-bit products are summed in float32
        values = (at_rows.to(sum_type) * at_columns).sum(dim=0).masked_fill(~inside, 0)
        ctx.optimizer.add_gradient(ctx.weight, values)
        grad_x = grad @ used if ctx.needs_input_grad[0] else None
        grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = F.pad(flat.sum(dim=0), (ctx.start, ctx.weight.shape[0] - ctx.stop))
        return grad_x, None, grad_bias, None, None, None


def _needs_gradient(layer: nn.Linear) -> bool:
    return torch.is_grad_enabled() and layer.weight.requires_grad


def _sampled_forward(layer: nn.Linear, optimizer: SO, x: Tensor) -> Tensor:
    if not _needs_gradient(layer):
        return type(layer).forward(layer, x)
    optimizer.draw_supports()
    return SampledLinear.apply(x, layer.weight, layer.bias, optimizer, 0, layer.out_features)


def _sampled_project(attention: nn.Module, optimizer: SO, x: Tensor, parts: str) -> Tensor:
    layer, rows = attention.in_proj, attention.rows(parts)
    if not _needs_gradient(layer):
        return type(attention).project(attention, x, parts)
    optimizer.draw_supports()
    return SampledLinear.apply(x, layer.weight, layer.bias, optimizer, rows.start, rows.stop)


class Attached:
    """The methods and hooks that `attach` installed; `remove` takes them out again."""

    def __init__(self, layers: list[nn.Linear], attentions: list[nn.Module], hooks: list):
        self.layers, self.attentions, self.hooks = layers, attentions, hooks

    def remove(self) -> None:
        for layer in self.layers:
            del layer.forward  # the class's method shows again
        for attention in self.attentions:
            del attention.project
        for hook in self.hooks:
            hook.remove()


def attach(model: nn.Module, optimizer: SO, dense_above: float | None = None) -> Attached:
    """Makes the model's linear layers compute their weight gradients at the optimizer's support alone.

    Groups that are `dense` are left alone. `dense_above`: the density above which a layer keeps the dense
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

    layers = [layer for layer in model.modules() if is_sampled(layer)]
    for layer in layers:
        layer.forward = partial(_sampled_forward, layer, optimizer)
    attentions = [m for m in model.modules() if _projects_parts(m) and m.in_proj in layers]
    for attention in attentions:
        attention.project = partial(_sampled_project, attention, optimizer)

    def take_gradient(p: Tensor) -> None:
        if p.grad is None:  # all of it came from sampled layers
            return
        optimizer.draw_supports()
        optimizer.add_gradient(p, entries(p.grad, optimizer.state[p]["support"]))
        p.grad = None

    hooks = [p.register_post_accumulate_grad_hook(take_gradient) for p in density if p.requires_grad]
    return Attached(layers, attentions, hooks)


def _projects_parts(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("in_proj", "project", "rows"))
