"""Gradients only at the support beside dense ones, in float64, so that only mistakes can differ."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from optimizers import SO, attach


class Parts(nn.Module):
    """A module that applies only some rows of `in_proj`, as CLIP's attention does in its last block."""

    def __init__(self, width):
        super().__init__()
        self.width, self.in_proj = width, nn.Linear(width, 2 * width)

    def rows(self, part):
        return slice(self.width * part, self.width * (part + 1))

    def project(self, x, part):
        rows = self.rows(part)
        return F.linear(x, self.in_proj.weight[rows], self.in_proj.bias[rows])

    def forward(self, x):
        return self.project(torch.tanh(self.project(x, 1)), 0)


class Net(nn.Module):
    """Linear layers with and without bias, one used twice, one by parts, one tied to an embedding, a convolution."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.first, self.twice = nn.Linear(16, 24), nn.Linear(24, 24, bias=False)
        self.narrow, self.parts = nn.Linear(24, 16), Parts(16)
        self.tied = nn.Linear(16, 11, bias=False)
        self.tied.weight = self.embedding.weight
        self.recompute = None

    def body(self, x):
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = self.twice(torch.tanh(self.twice(torch.tanh(self.first(x)))))
        return self.tied(self.parts(self.narrow(x)))

    def forward(self, tokens):
        x = self.embedding(tokens)
        if self.recompute is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.recompute)


def lockstep(change=lambda net: None, steps=8, micro_batches=1, evaluate=False, density=0.1, dense_above=1.0, T=3):
    """Train two copies, plain and attached, on the same data, and return both."""
    torch.manual_seed(0)
    plain = Net().double()
    change(plain)
    fast = copy.deepcopy(plain)
    optimizers = [SO(net.parameters(), lr=0.01, density_ratio=density, T=T, weight_decay=0.01) for net in (plain, fast)]
    attach(fast, optimizers[1], dense_above)
    dense = []  # dense gradients of the linear layers' weights; the tied one has some from the embedding
    for layer in (fast.first, fast.twice, fast.narrow, fast.parts.in_proj):
        if layer.weight.requires_grad:
            layer.weight.register_hook(lambda grad: dense.append(grad) if grad is not None else None)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batches = [torch.randint(11, (4, 7), generator=generator) for _ in range(micro_batches)]
        for net, optimizer in zip((plain, fast), optimizers):
            optimizer.zero_grad()
            for tokens in batches:
                F.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten()).backward()
                if evaluate:
                    with torch.no_grad():
                        net(tokens)
            if net is fast:
                assert all(p.grad is None for p in net.parameters()), "a dense gradient is kept"
            optimizer.step()
        for (name, p), q in zip(plain.named_parameters(), fast.parameters()):
            torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-11, msg=lambda text: f"{name}: {text}")  # noqa: B023
    assert bool(dense) == (density > dense_above)
    return plain, fast


@pytest.mark.parametrize("density", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("dense_above", [0.0, 1.0])
def test_equals_dense_gradients(density, dense_above):
    lockstep(density=density, dense_above=dense_above)


def test_several_backward_passes_and_evaluation_before_a_step():
    lockstep(micro_batches=3, evaluate=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_activation_checkpointing(reentrant):
    lockstep(lambda net: setattr(net, "recompute", reentrant))


def test_frozen_parts_and_dense_groups_are_not_touched():
    def freeze(net):
        net.first.requires_grad_(False)
        net.parts.requires_grad_(False)
        net.narrow.bias.requires_grad_(False)

    _, fast = lockstep(freeze)
    torch.manual_seed(0)
    assert torch.equal(fast.first.weight, Net().double().first.weight)

    layer = nn.Linear(4, 4)
    optimizer = SO([{"params": layer.parameters(), "dense": True}])
    attach(layer, optimizer)
    layer(torch.ones(2, 4)).sum().backward()
    assert layer.weight.grad is not None and not optimizer.leaves


def test_only_the_needed_columns_are_saved_for_backward():
    layer = nn.Linear(1000, 1000, bias=False)
    x = torch.randn(64, 1000, requires_grad=True)

    def kept_bytes():
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
            y = layer(x)
        y.sum().backward()
        return sum(t.numel() * t.element_size() for t in kept.values() if t.data_ptr() != layer.weight.data_ptr())

    assert kept_bytes() == 64 * 1000 * 4  # all of x
    optimizer = SO(layer.parameters(), density_ratio=2e-5)  # k = 20
    attach(layer, optimizer)
    assert kept_bytes() == 64 * 20 * 4  # 20 columns; where they belong is known until the next draw


def test_autocast_computes_in_bf16_and_sums_in_float32():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 64), torch.randn(2000, 64, requires_grad=True)
    reference = copy.deepcopy(layer)
    optimizer = SO(layer.parameters(), density_ratio=0.01)
    attach(layer, optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), reference(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    scale = torch.randn(2000, 64)
    (y * scale).sum().backward()
    (expected * scale).sum().backward()
    support = optimizer.state[layer.weight]["support"]
    values = optimizer.leaves[layer.weight].grad
    assert values.dtype == torch.float32 and optimizer.leaves[layer.bias].grad.dtype == torch.float32
    dense = reference.weight.grad.view(-1)[support]
    torch.testing.assert_close(values, dense, rtol=0.01, atol=0.01 * dense.abs().max().item())


@pytest.mark.parametrize("prune_first", [False, True])
def test_the_16_bit_copy_of_a_weight_is_always_its_cast(prune_first):
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    optimizer = SO(layer.parameters(), lr=0.1, density_ratio=0.01, T=2, prune_first=prune_first)
    attached = attach(layer, optimizer)

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(torch.ones(3, 64))
        assert torch.equal(y, F.linear(torch.ones(3, 64).bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()))
        return y

    for _ in range(7):
        forward().float().square().sum().backward()
        optimizer.step()
        copy, version = attached.casts[layer.weight]
        assert version == layer.weight._version and torch.equal(copy, layer.weight.bfloat16())
    layer.load_state_dict({name: t + 1 for name, t in layer.state_dict().items()})
    forward()
    with torch.no_grad():
        layer.weight[3] *= 2
    forward()


def test_remove_restores_plain_gradients():
    net = Net()
    optimizer = SO(net.parameters(), density_ratio=0.1)
    attach(net, optimizer, dense_above=1.0).remove()
    net(torch.ones(2, 8, dtype=torch.int64)).sum().backward()
    assert all(p.grad is not None for p in net.parameters()) and not optimizer.leaves
    assert not any({"forward", "project"} & vars(module).keys() for module in net.modules())


def test_a_support_drawn_again_before_backward_is_an_error():
    layer = nn.Linear(8, 8)
    optimizer = SO(layer.parameters(), density_ratio=0.1, T=1)
    attach(layer, optimizer, dense_above=1.0)
    late = layer(torch.ones(2, 8)).sum()
    layer(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    layer(torch.ones(2, 8))
    with pytest.raises(RuntimeError, match="drawn again"):
        late.backward()


def test_resumes_bit_for_bit_with_the_support_drawn_already():
    def build():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 3))
        optimizer = SO(net.parameters(), lr=0.01, density_ratio=0.05, T=2)
        attach(net, optimizer, dense_above=1.0)
        return net, optimizer

    def run(net, optimizer, seed, steps):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            optimizer.zero_grad()
            net(torch.randn(5, 30, generator=generator)).square().sum().backward()
            optimizer.step()

    net, optimizer = build()
    run(net, optimizer, 1, 4)
    net(torch.ones(1, 30))  # draws the support of step 5
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    other, resumed = build()
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    run(net, optimizer, 2, 7)
    run(other, resumed, 2, 7)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters()))
