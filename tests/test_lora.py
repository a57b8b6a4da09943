"""LoRA on packed attention projections: beside its definition, with each weight written out."""

import math
from pathlib import Path

import pytest
import torch
from support.training import VIT_B16, cosine, filled, fitted, noise, plain_loss, prepared
from torch import nn

import clip
from arguments import parse
from common import UserError
from methods.adapters.lora import Branches, Hparams
from methods.adapters.matrices import SeededDropout


def lora(**options):
    return prepared("lora", **{"dropout": 0.0} | options)


@pytest.mark.parametrize(
    "options, tensors, weights",
    [
        ({}, 36, 3 * 2 * (4 * 256 + 2 * 128)),
        ({"encoder": "text", "rank": 5}, 12, 2 * 3 * 5 * 128),
        ({"encoder": "vision", "position": "top1", "lora_on": "q,v,o", "rank": 1}, 6, 3 * 256),
        ({"lora_on": "o", "position": "half-up"}, 6, 2 * (2 * 256 + 128)),
    ],
)
def test_what_is_trained(options, tensors, weights):
    adaptation = lora(**options)
    assert (len(adaptation.parameters), adaptation.trainable_weights) == (tensors, weights)
    (group,) = adaptation.optimizer.param_groups
    assert isinstance(adaptation.optimizer, torch.optim.AdamW)
    assert (group["lr"], group["weight_decay"], group["betas"]) == (2e-4, 1e-2, (0.9, 0.999))


def test_published_values(monkeypatch):
    with torch.device("meta"):
        model = clip.CLIP(VIT_B16)
    monkeypatch.setattr(clip, "weights_sha256", lambda model: "of weights that are never set")
    adaptation = prepared("lora", model=model.to_empty(device="cpu"))
    assert (len(adaptation.parameters), adaptation.trainable_weights) == (144, 184_320)
    data = ["--dataset", "dtd", "--root_path", "data", "--shots", "4"]
    config = parse(["--method", "lora", *data])
    path = Path(__file__).parent.parent / "configs" / "clip_lora.yaml"
    assert parse(["--config", str(path), *data]) == config
    hparams = config.hparams.settled(4, images=0)
    assert (hparams.rank, hparams.alpha, hparams.dropout, hparams.lora_on) == (2, 1, 0.25, "q,k,v")
    assert (hparams.lr, hparams.total_iters, hparams.early_stop_loss, hparams.batch_size) == (2e-4, 2000, 0, 32)


def test_values_that_cannot_work():
    for values in ({"rank": 0}, {"alpha": 0.0}, {"alpha": math.inf}, {"dropout": 1.0}, {"dropout": math.nan}):
        with pytest.raises(UserError, match=f"--{next(iter(values))} "):
            Hparams(**values)
    for chosen in ("q,k,x", "q,q", ""):
        with pytest.raises(UserError, match="--lora_on "):
            Hparams(lora_on=chosen)
    assert Hparams(lora_on="v, q") == Hparams(lora_on="q,v")


def test_matrices_start_as_published_and_from_the_seed_alone():
    torch.manual_seed(1)
    first = lora(rank=4).parameters
    torch.manual_seed(2)
    again, other = lora(rank=4).parameters, lora(rank=4, seed=4).parameters
    for name, p in first.items():
        assert torch.equal(p, again[name])
        if name.endswith("lora_B"):
            assert not p.any()
        else:
            width = p.shape[1]
            assert p.shape == (4, width) and not torch.equal(p, other[name])
            # Kaiming with a = sqrt(5): uniform within gain sqrt(3 / fan_in) = 1 / sqrt(width)
            assert 0.95 < p.abs().max() * math.sqrt(width) <= 1
            assert p.std().item() * math.sqrt(3 * width) == pytest.approx(1, abs=0.15)
    matrices = [p for name, p in first.items() if name.endswith("lora_A")]
    assert len({p[0, 0].item() for p in matrices}) == len(matrices), "two branches start alike"


def with_lora(weights, matrices, scaling):
    """CLIP's weights with W + s B A in place of each W, written out for queries, keys and values one by one."""
    result = dict(weights)
    for name, weight in weights.items():
        layer, _, kind = name.partition(".attn.")
        if parts := {"in_proj.weight": "qkv", "out_proj.weight": "o"}.get(kind):
            changed = []
            for part, W in zip(parts, weight.chunk(len(parts))):
                A, B = (matrices.get(f"{layer}.attn.{part}.lora_{matrix}") for matrix in "AB")
                changed.append(W if A is None else W + scaling * B @ A)
            result[name] = torch.cat(changed)
    return result


def test_a_weight_becomes_w_plus_scaled_b_a():
    base = dict(clip.load("tiny")[0].double().named_parameters())
    adaptation = filled(lora(rank=4, alpha=3.0, lora_on="q,v,o"))
    expected = with_lora(base, adaptation.parameters, 3 / math.sqrt(4))
    assert sum(not torch.equal(expected[name], base[name]) for name in base) == 12
    for name, merged in adaptation.merge().named_parameters():
        torch.testing.assert_close(merged, expected[name], rtol=0, atol=1e-14)
    name, k = "transformer.resblocks.0.attn.in_proj.weight", slice(64, 128)  # between the rows of q and those of v
    assert torch.equal(adaptation.model.get_parameter(name)[k], base[name][k])


def test_dropout_is_only_on_the_input_of_each_branch():
    """A and B that hand the first inputs on to the first outputs show what each branch was given."""
    torch.manual_seed(0)
    layer, p, r, s = nn.Linear(8, 24), 0.25, 8, 0.5
    branches = Branches(layer, "qkv", "qk", r, s, SeededDropout(p, torch.Generator().manual_seed(1)))
    with torch.no_grad():
        for part in "qk":
            branches.A[part].copy_(torch.eye(8))
            branches.B[part].copy_(torch.eye(8))
    x = torch.randn(4000, 8)
    q, k, v = ((branches.forward(x) - layer(x)).detach() / s).chunk(3, dim=-1)
    assert not v.any()
    for branch in (q, k):
        kept = branch.abs() > 1e-4
        torch.testing.assert_close(branch[kept], (x / (1 - p))[kept], rtol=1e-3, atol=1e-3)
        assert kept.float().mean() == pytest.approx(1 - p, abs=0.01)
    assert ((q.abs() > 1e-4) != (k.abs() > 1e-4)).float().mean() == pytest.approx(2 * p * (1 - p), abs=0.02)
    assert not torch.equal(branches.forward(x), branches.forward(x))
    with torch.no_grad():
        torch.testing.assert_close(branches.forward(x), layer(x) + s * torch.cat([x, x, 0 * x], -1))


def test_with_dropout_no_prompt_shares_its_beginning():
    assert [lora(dropout=dropout).prompts.prefix for dropout in (0.0, 0.25)] == [1, 0]


class PlainLoss(nn.Module):
    """The training loss as a function of all weights, for `functional_call`."""

    def __init__(self):
        super().__init__()
        self.clip = clip.load("tiny")[0].double()

    def forward(self, images, labels):
        return plain_loss(self.clip, images, labels)


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_on": "q,v,o", "rank": 3, "alpha": 2.0, "position": "half-up"}, {"encoder": "text", "lora_on": "k"}],
)
def test_ten_steps_in_lockstep_with_weights_written_out(options):
    adaptation, plain = lora(lr=1e-2, total_iters=10, batch_size=3, **options), PlainLoss()
    scaling = options.get("alpha", 1.0) / math.sqrt(options.get("rank", 2))
    weights = {name: p.detach() for name, p in plain.clip.named_parameters()}
    matrices = {name: p.detach().clone().requires_grad_() for name, p in adaptation.parameters.items()}
    optimizer = torch.optim.AdamW(matrices.values(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.01)
    batches = [(images, labels.roll(step)) for step, (images, labels) in enumerate(noise(10))]
    losses = []
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = cosine(1e-2, step, 10)
        changed = {f"clip.{name}": weight for name, weight in with_lora(weights, matrices, scaling).items()}
        loss = torch.func.functional_call(plain, changed, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    measured = [row["loss"] for row in fitted(adaptation, batches).curve]
    means = [sum(losses[i : i + 2]) / 2 for i in range(0, 10, 2)]  # four images, so an epoch is two steps
    assert measured == pytest.approx(means, rel=1e-5) and len(set(measured)) == 5
    for name, p in adaptation.parameters.items():
        torch.testing.assert_close(p, matrices[name], rtol=0, atol=1e-6)  # where a step is 1e-2
        assert p.abs().max() > 1e-3
